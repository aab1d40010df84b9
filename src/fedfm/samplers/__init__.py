"""Who takes part in a round."""

from fedfm.samplers.all import All as All
from fedfm.samplers.poisson import Poisson as Poisson
from fedfm.samplers.uniform import Uniform as Uniform
from fedfm.samplers.weighted import Weighted as Weighted
