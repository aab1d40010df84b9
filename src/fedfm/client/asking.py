"""Asking a person: a question waits as a file until somebody with access to the owner's machine answers it.

::

    <folder>/clients/<slug>/questions/<id>.json     the question in words, and the answer once there is one

A question's id is a digest of what it is about, so a yes to one run is no yes to another. Covered here: a crash at any moment (a question is written whole or
not at all). Not covered: whoever can write this folder can answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedfm.client.memory import home
from fedfm.core import disk
from fedfm.core.errors import ConfigError, RunError
from fedfm.core.messages import ClientId

FOLDER = "questions"
Verdict = Literal["yes", "no"]


@dataclass(frozen=True)
class Question:
    """What a person is asked.

    Args:
        id: 16 hexadecimal digits that differ where anything that the answer depends on does.
        text: What is asked, in words.
    """

    id: str
    text: str


# Answers a question, or says ``None`` while it waits.
Door = Callable[[ClientId, Question], Verdict | None]


def file_door(folder: Path | None) -> Door:
    """A door that writes each question into the client's folder, and waits for ``fedfm approve``.

    Args:
        folder: The folder in which ``clients/`` is; without one nobody can answer, and every question waits.
    """

    def door(client: ClientId, question: Question) -> Verdict | None:
        if folder is None:
            return None
        path = home(folder, client) / FOLDER / f"{question.id}.json"
        if path.exists():
            return read(path)[1]
        write(path, question, None)
        return None

    return door


def write(path: Path, question: Question, answer: Verdict | None) -> None:
    """Writes a question with its answer, durably.

    Raises:
        RunError: if it cannot be written.
    """
    disk.write_atomic(path, json.dumps({"id": question.id, "text": question.text, "answer": answer}, indent=1).encode())


def read(path: Path) -> tuple[Question, Verdict | None]:
    """A question, and its answer.

    Raises:
        RunError: if the file is not what was written.
    """
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        question, answer = Question(str(known["id"]), str(known["text"])), known["answer"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{path} cannot be read as a question ({error}). Delete it, and it is asked again.") from error
    if question.id != path.stem or answer not in (None, "yes", "no"):
        raise RunError(f"{path} was changed by something else than fedfm. Delete it, and it is asked again.")
    return question, answer


def questions_in(path: Path) -> list[Path]:
    """The questions at a path: of an owner's folder, or of all owners in a folder with ``clients/``.

    Raises:
        ConfigError: if it is no folder.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder. Give the owner's folder, or a folder with clients/.")
    return sorted([*path.glob(f"{FOLDER}/*.json"), *path.glob(f"clients/*/{FOLDER}/*.json")])
