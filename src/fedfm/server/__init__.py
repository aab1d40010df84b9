"""The global step."""

from fedfm.server.fedavg import FedAvg as FedAvg
from fedfm.server.fedavgm import FedAvgM as FedAvgM
from fedfm.server.fedopt import FedAdagrad as FedAdagrad
from fedfm.server.fedopt import FedAdam as FedAdam
from fedfm.server.fedopt import FedYogi as FedYogi
