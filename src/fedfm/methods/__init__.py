"""Papers made of several parts."""

from fedfm.methods.scaffold import Scaffold as Scaffold
