"""A run's folder: journal, checkpoints, resume; and a run beside its two ends, local-only and centralised."""
