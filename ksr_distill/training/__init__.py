"""Training: the two LightningModules, and what keeps a run alive."""
