"""A foundation model and its tokenizer: loaded, built from a config, saved, exported in the Hugging Face layout."""

from fedfm.models.foundation import Foundation as Foundation
from fedfm.models.foundation import load as load
from fedfm.models.spec import Model as Model
from fedfm.models.tokenizer import load_tokenizer as load_tokenizer
from fedfm.models.tokenizer import train_bpe as train_bpe
from fedfm.models.tokenizer import unchanged as unchanged
