"""How a client works."""

from fedfm.local.adamw import AdamW as AdamW
from fedfm.local.example_dp import ExampleDP as ExampleDP
from fedfm.local.fedprox import FedProx as FedProx
from fedfm.local.sgd import SGD as SGD
