"""How updates reach the aggregator."""

from fedfm.channels.plain import Plain as Plain
