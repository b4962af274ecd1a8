"""The whole path in minutes, on two CPU cores: ``python -m ksr_distill.quickstart``."""
