"""Which parameters train and travel, and where they act in the base."""

from fedfm.tuning.adapters import attach_adapter as attach_adapter
from fedfm.tuning.adapters import load_adapter as load_adapter
from fedfm.tuning.bitfit import BitFit as BitFit
from fedfm.tuning.foreign import Peft as Peft
from fedfm.tuning.full import Full as Full
from fedfm.tuning.head import Head as Head
from fedfm.tuning.ia3 import IA3 as IA3
from fedfm.tuning.lora import LoRA as LoRA
