"""Completion in a shell: the script that asks, and the answers. Imports nothing heavy, for it runs at each press of a key."""

from __future__ import annotations

import os
from typing import Literal

import click
from click.shell_completion import CompletionItem, get_completion_class, shell_complete

from fedfm.core import registry

VARIABLE = "_FEDFM_COMPLETE"
Shell = Literal["bash", "zsh", "fish"]
LEVELS = ("debug", "info", "warning", "error")


def script(cli: click.Command, shell: Shell) -> str:
    """What a shell reads to complete ``fedfm``."""
    kind = get_completion_class(shell)
    assert kind is not None, shell
    # The class asks an installed bash for its version, which is no matter of the script.
    completion = kind(cli, {}, "fedfm", VARIABLE)
    text: str = completion.source_template % completion.source_vars()
    return text.strip()


def answer(cli: click.Command) -> int:
    """Answers the shell that asks; the exit code."""
    return shell_complete(cli, {}, "fedfm", VARIABLE, os.environ[VARIABLE])


class Folder(click.Path):
    """A path of which a shell offers folders alone; a file is taken all the same, for our own message is the better one."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Folders, which the shell knows best."""
        return [CompletionItem(incomplete, type="dir")]


# Typer gives these what is typed so far, and offers what they return.


def rooms(incomplete: str) -> list[tuple[str, str]]:
    """Kinds of parts."""
    return [(name, what) for name, what in registry.ROOMS.items() if name.startswith(incomplete)]


def parts(incomplete: str) -> list[tuple[str, str]]:
    """Names of parts."""
    known = (entry for room in registry.ROOMS for entry in registry.entries(room).values())
    return [(entry.name, entry.room) for entry in known if entry.name.startswith(incomplete)]


def levels(incomplete: str) -> list[str]:
    """Levels of the log."""
    return [level for level in LEVELS if level.startswith(incomplete)]
