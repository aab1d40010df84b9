"""What can go wrong, made to go wrong: ``python -m benchmarks.robustness``."""
