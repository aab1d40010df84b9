"""Where the clients run."""

from fedfm.engines.base import Engine as Engine
from fedfm.engines.embedded import Embedded as Embedded
from fedfm.engines.nats import Nats as Nats
from fedfm.engines.process import Process as Process
