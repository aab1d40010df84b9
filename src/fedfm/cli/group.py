"""Our commands beside those of other packages.

A package adds a command through the entry-point group ``fedfm.commands``: the name is the command's, the object a function in Typer's style,
a ``typer.Typer`` app or a ``click`` command. ``fedfm --help`` reads the packages' metadata alone; a command's package is imported when the
command runs. Our own commands keep their names.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import typer
from typer.core import TyperCommand, TyperGroup

from fedfm.core.errors import ConfigError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "fedfm.commands"


def usable_path(value: Path | None) -> Path | None:
    """What Typer calls with a path that was given.

    Raises:
        ConfigError: if it can be none, or is a pipe or a device.
    """
    # Here and not above: help needs none of it.
    from fedfm.core.paths import usable

    return None if value is None else usable(value, "The path")


class Command(TyperCommand):
    """One of our commands."""

    def get_help(self, ctx: click.Context) -> str:
        """Its help. Typer escapes ``[required]`` for Rich even where Rich does not print it."""
        return super().get_help(ctx).replace("\\[", "[")


class Commands(TyperGroup):
    """A group that also knows the commands of other packages, and looks for them only where its own do not answer."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Ours in the order of the file, then those of other packages by name."""
        self._declare()
        return super().list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, not yet imported if it is another package's."""
        if cmd_name not in self.commands:
            self._declare()
        return super().get_command(ctx, cmd_name)

    def _declare(self) -> None:
        # Here and not above: most commands are ours, and need no look at what is installed.
        from importlib.metadata import entry_points

        points: dict[str, list[EntryPoint]] = {}
        for point in sorted(entry_points(group=GROUP), key=_package):
            points.setdefault(point.name, []).append(point)
        for name in sorted(points):
            self.commands.setdefault(name, ForeignCommand(name, points[name]))


class ForeignCommand(click.Command):
    """A command of another package, which is imported when the command is called.

    Args:
        points: Where it is declared; more than one is refused when it is called.
    """

    def __init__(self, name: str, points: list[EntryPoint]) -> None:
        self.points = points
        super().__init__(name, short_help=f"from {' and '.join(map(_package, points))}")

    def make_context(self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any) -> click.Context:
        """The context of the command itself, which from here on answers in its own name."""
        return self.load().make_context(info_name, args, parent, **extra)

    def load(self) -> click.Command:
        """Imports the command.

        Raises:
            ConfigError: if two packages declare it, its import fails, or it is no command.
        """
        name, packages = self.name, [_package(point) for point in self.points]
        if len(packages) > 1:
            raise ConfigError(f"The packages {' and '.join(packages)} each declare a command {name!r}. Uninstall all but one of them.")
        try:
            command = self.points[0].load()
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"The command {name!r} of the package {packages[0]} cannot be imported from {self.points[0].value}: {error}. "
                f"Reinstall or upgrade {packages[0]}."
            ) from error
        if not isinstance(command, click.Command | typer.Typer) and not callable(command):
            raise ConfigError(
                f"The command {name!r} of the package {packages[0]} is {command!r}. "
                f"The entry point {self.points[0].value} must name a function, a typer.Typer app or a click command."
            )
        return _as_click(name or "", command)


def _as_click(name: str, command: click.Command | typer.Typer | Callable[..., Any]) -> click.Command:
    if isinstance(command, click.Command):
        return command
    if not isinstance(command, typer.Typer):
        function, command = command, typer.Typer(add_completion=False, rich_markup_mode=None)
        command.command(name)(function)
    return typer.main.get_command(command)


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.module
