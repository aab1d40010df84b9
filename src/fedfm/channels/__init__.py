"""How updates reach the aggregator."""

from fedfm.channels.plain import Plain as Plain
from fedfm.channels.secure_aggregation import SecureAggregation as SecureAggregation
