"""Long rows: tokenized in pieces, to the ids of the whole text."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedfm.data import public_text
from fedfm.tasks import CausalLM, Classification, Instruct, MaskedLM, causal_lm, instruct, sequences
from fedfm.testing.tiny import tokenizer_folder

KINDS = ("byte-level BPE", "BPE with a prefix space", "WordPiece", "Unigram", "SentencePiece BPE")


def manual(characters: int, seed: int = 0) -> str:
    """Topics of Python's manual: prose, code, tables, runs of spaces; and some words that are not ASCII."""
    texts, rng = list(public_text()), random.Random(seed)
    parts = []
    while sum(map(len, parts)) < characters:
        parts += [rng.choice(texts), rng.choice(["\n\n\n", "   ", " Ünïcödé 漢字かな交じり文 🙂🙃 ", "\t\t x", ""])]
    return "".join(parts)[:characters]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    kind, text = request.param, [manual(200_000)]
    special = ["<unk>", "<s>", "</s>", "[MASK]"]
    if "BPE" in kind and "Sentence" not in kind:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space="prefix" in kind)
        made.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(vocab_size=1500, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    elif kind == "WordPiece":
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.normalizer = normalizers.BertNormalizer()
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=1500, special_tokens=special)
    elif kind == "Unigram":
        made = Tokenizer(models.Unigram())
        made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\n", " ")])
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=1500, special_tokens=special, unk_token="<unk>")
    else:
        # As Llama 2's: spaces become letters of a text that is one word from its first character to its last.
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=special)
        made.train_from_iterator(text, trainer)
        made.pre_tokenizer = None
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        trainer = None
    if trainer is not None:
        made.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>", mask_token="[MASK]"
    )


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces so short that a text has many."""
    for module in (sequences, causal_lm, instruct):
        monkeypatch.setattr(module, "LONG", 4000)
    monkeypatch.setattr(sequences, "OVERLAP", 800)
    monkeypatch.setattr(sequences, "_SPARE", 64)


def whole(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


@pytest.mark.parametrize("seed", range(4))
def test_pieces_give_the_ids_of_the_whole(tokenizer: Any, seed: int, short: None) -> None:
    text = manual(60_000 + 997 * seed, seed)
    pieces = list(sequences.long_ids(tokenizer, text))
    assert len(pieces) > 15
    assert np.concatenate(pieces).tolist() == whole(tokenizer, text)


@pytest.mark.parametrize(
    "text", [" " * 50_000, "a" * 50_000, "word" + " " * 30_000 + "word", "ab" * 20_000 + " c" * 5_000, "漢" * 30_000, "\n" * 30_000]
)
def test_text_without_words_is_cut_somewhere_and_never_lost(tokenizer: Any, text: str, short: None) -> None:
    ids, all_at_once = np.concatenate(list(sequences.long_ids(tokenizer, text))).tolist(), whole(tokenizer, text)
    assert abs(len(ids) - len(all_at_once)) <= 40
    if tokenizer.backend_tokenizer.normalizer is None and "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder):
        assert tokenizer.decode(ids).strip() == text.strip()


@pytest.mark.parametrize(
    "task",
    [
        CausalLM(max_length=32),
        CausalLM(max_length=32, packed=False),
        Classification(max_length=32),
        MaskedLM(max_length=32),
        Instruct(instruction="text", response="text", max_length=64),
        Instruct(instruction="text", response="label", max_length=64),
        Instruct(instruction="label", response="text", max_length=64, template="alpaca"),
        Instruct(instruction="text", response="label", max_length=64, on_long="drop"),
    ],
    ids=repr,
)
def test_examples_of_long_rows_are_what_they_were(task: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": manual(n, n), "label": "yes it is"} for n in (50, 3999, 4001, 9000, 30_000, 200)]

    def examples() -> list[tuple[list[int], int, str | None]]:
        encoder = task.encoder(tokenizer)
        made = [*encoder.add(rows[:3]), *encoder.add(rows[3:]), *encoder.flush()]
        return [(example.ids.tolist(), example.start, example.label) for example in made]

    before = examples()
    for module in (sequences, causal_lm, instruct):
        monkeypatch.setattr(module, "LONG", 4000)
    monkeypatch.setattr(sequences, "OVERLAP", 800)
    assert examples() == before and (before or task.on_long == "drop")


@pytest.mark.parametrize("name", ["stories260k", "babyllama-tok105"])
def test_published_tokenizers(name: str, short: None) -> None:
    folder = Path(os.environ.get("FEDFM_SHARED_DATA", "/nowhere")) / "models" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    tokenizer, text = AutoTokenizer.from_pretrained(folder), manual(80_000, 7)
    assert np.concatenate(list(sequences.long_ids(tokenizer, text))).tolist() == whole(tokenizer, text)


def test_memory_does_not_grow_with_a_row(tmp_path: Path) -> None:
    """A text four times as long takes the same memory while it is tokenized, apart from the text and its ids."""
    import subprocess
    import sys

    program = (
        "import sys, resource, json\n"
        "from transformers import AutoTokenizer\n"
        "from fedfm.tasks import CausalLM\n"
        "encoder = CausalLM(max_length=64).encoder(AutoTokenizer.from_pretrained(sys.argv[1]))\n"
        "unit = 'the small cat saw the old house. ' * 4000\n"
        "encoder.add([{'text': unit}])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(len(encoder.add([{'text': unit * int(sys.argv[2])}])), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )

    def grown(times: int) -> int:
        done = subprocess.run([sys.executable, "-c", program, tokenizer_folder(), str(times)], capture_output=True, text=True, check=True)
        return int(done.stdout.split()[1]) * 1024

    small, large = grown(16), grown(64)
    added = 48 * 4000 * 33
    assert large - small < 6 * added, "some bytes for a character: its text, its id and its example"
