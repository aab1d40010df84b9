"""What is learned."""

from fedfm.tasks.causal_lm import CausalLM as CausalLM
from fedfm.tasks.classification import Classification as Classification
from fedfm.tasks.instruct import Instruct as Instruct
from fedfm.tasks.masked_lm import MaskedLM as MaskedLM
