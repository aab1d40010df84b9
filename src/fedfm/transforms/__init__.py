"""On an update in flight."""

from fedfm.transforms.cast import CastBF16 as CastBF16
from fedfm.transforms.central_dp import CentralDP as CentralDP
from fedfm.transforms.clip import ClipByNorm as ClipByNorm
from fedfm.transforms.distributed_dp import DistributedDP as DistributedDP
from fedfm.transforms.local_dp import LocalDP as LocalDP
from fedfm.transforms.quantize import Int4 as Int4
from fedfm.transforms.quantize import Int8 as Int8
from fedfm.transforms.topk import TopK as TopK
