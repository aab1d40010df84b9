"""What one update may reach before the server counts it."""

from fedfm.bounds.median import MedianBounds as MedianBounds
