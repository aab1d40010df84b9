"""Where the clients run."""

from fedfm.engines.embedded import Embedded as Embedded
