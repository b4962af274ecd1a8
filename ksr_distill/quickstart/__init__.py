"""From photos to a report in minutes on two CPU cores: ``python -m ksr_distill.quickstart``."""
