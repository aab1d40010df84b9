"""What a server asks and a client answers, one verb a file with both halves."""

from fedfm.verbs.describe import Describe as Describe
from fedfm.verbs.evaluate import Evaluation as Evaluation
from fedfm.verbs.train import Train as Train
