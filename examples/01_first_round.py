"""A federation is a value: one part of each kind. ``run`` plays it, round by round.

Nothing is downloaded. The owners are the packages of Python's standard library on this machine, the tokenizer is trained on Python's
manual, and the model is a Llama so small that all of its parameters may travel.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from fedfm import Federation, run
from fedfm.data import Data, public_text
from fedfm.local import AdamW
from fedfm.models import Model, train_bpe
from fedfm.observers import Evaluate
from fedfm.samplers import Uniform
from fedfm.server import FedAvg
from fedfm.tasks import CausalLM
from fedfm.tuning import Full


def federation(tokenizer: Path) -> Federation:
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": True}
    return Federation(
        model=Model(architecture="Llama", config=tuple(size.items()), tokenizer=str(tokenizer)),
        data=Data("stdlib", limit=40),  # who owns what: the first 40 examples of each package
        task=CausalLM(max_length=64),  # what is learned: the next token
        tuning=Full(),  # which parameters train and travel
        sampler=Uniform(clients=6),  # who takes part in a round
        local=AdamW(lr=5e-3, steps=10, batch_size=4),  # how a client works
        server=FedAvg(lr=1.0),  # the global step
        evaluate=Evaluate(max_examples=8, ends=8),  # of each owner, held out
        rounds=5,
    )


def main(quick: bool = False) -> list[float]:
    with TemporaryDirectory() as folder:
        train_bpe(public_text(), vocab_size=512).save_pretrained(folder)
        losses = []
        print(f"{'round':>5}  {'loss':>6}  {'worst owner':<20}  cohort")
        for _state, record in run(federation(Path(folder)), rounds=2 if quick else None):
            report = record.metrics["eval"]
            losses.append(report["pooled"]["loss"])
            print(f"{record.round:>5}  {losses[-1]:>6.3f}  {report['worst']['owner']:<20}  {', '.join(record.cohort)}")
    return losses


if __name__ == "__main__":
    main()
