"""After the round: who looks on while a run goes."""

from fedfm.observers.base import Observer as Observer
from fedfm.observers.base import Watcher as Watcher
from fedfm.observers.evaluate import Evaluate as Evaluate
from fedfm.observers.progress import Progress as Progress
from fedfm.observers.tensorboard import TensorBoard as TensorBoard
