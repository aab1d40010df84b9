"""Many updates become one."""

from fedfm.aggregators.mean import Mean as Mean
from fedfm.aggregators.median import CoordinateMedian as CoordinateMedian
from fedfm.aggregators.trimmed_mean import TrimmedMean as TrimmedMean
