"""Papers made of several parts."""

from fedfm.methods.scaffold import Scaffold as Scaffold
from fedfm.methods.scaffold import ScaffoldLocal as ScaffoldLocal
from fedfm.methods.scaffold import ScaffoldServer as ScaffoldServer
