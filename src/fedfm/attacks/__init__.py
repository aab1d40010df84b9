"""What a bad client or server does, for tests, audits and benchmarks."""

from fedfm.attacks.embedding_rows import EmbeddingRows as EmbeddingRows
from fedfm.attacks.labels import Labels as Labels
from fedfm.attacks.lengths import Lengths as Lengths
from fedfm.attacks.membership import Membership as Membership
from fedfm.attacks.span import Span as Span
