"""What is claimed, measured. Each module runs alone: ``python -m benchmarks.NAME [--quick] [--json FILE]``."""
