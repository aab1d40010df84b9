"""Who owns what: sources, owners, partitioners, tokenization, batching."""

from fedfm.data.batching import plan as plan
from fedfm.data.batching import poisson as poisson
from fedfm.data.held import Held as Held
from fedfm.data.owners import Owners as Owners
from fedfm.data.owners import Shard as Shard
from fedfm.data.owners import opened as opened
from fedfm.data.partition import IID as IID
from fedfm.data.partition import Dirichlet as Dirichlet
from fedfm.data.partition import Partitioner as Partitioner
from fedfm.data.partition import QuantitySkew as QuantitySkew
from fedfm.data.partition import Shards as Shards
from fedfm.data.prepare import prepare as prepare
from fedfm.data.sample import Sample as Sample
from fedfm.data.spec import Data as Data
from fedfm.data.stdlib import public_text as public_text
