"""When a round has enough answers."""

from fedfm.pacing.barrier import Barrier as Barrier
