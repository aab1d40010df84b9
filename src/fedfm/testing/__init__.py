"""Public conformance suites: what every part of a room must do. A failed law is an ``AssertionError`` that says which.

Example:
    >>> from fedfm.transforms import ClipByNorm
    >>> check_transform(ClipByNorm(max_norm=0.1))
"""

from fedfm.testing.aggregators import check_aggregator as check_aggregator
from fedfm.testing.attacks import check_attack as check_attack
from fedfm.testing.bounds import check_bounds as check_bounds
from fedfm.testing.channels import check_channel as check_channel
from fedfm.testing.engines import check_engine as check_engine
from fedfm.testing.local import check_local as check_local
from fedfm.testing.parts import check_part as check_part
from fedfm.testing.parts import examples as examples
from fedfm.testing.samplers import check_sampler as check_sampler
from fedfm.testing.server import check_server as check_server
from fedfm.testing.tasks import check_task as check_task
from fedfm.testing.transforms import check_transform as check_transform
from fedfm.testing.tuning import check_tuning as check_tuning
from fedfm.testing.verbs import check_verb as check_verb
