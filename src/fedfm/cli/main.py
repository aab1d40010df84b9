"""``fedfm``: run, resume, compare, check, list, show, report, export, generate, cache, consortium, quickstart, and commands of other packages.

Only what ``--help`` needs is imported here; a command imports the rest when it runs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedfm.cli.group import Command, Commands
from fedfm.cli.silos import consortium
from fedfm.core.errors import FedfmError
from fedfm.core.version import VERSION

# Characters of an error that are shown: a message may quote what it was given, and that may be a file.
_LONGEST = 4000

app = typer.Typer(
    name="fedfm",
    cls=Commands,
    help="Federated Foundation Models: train and tune foundation models over data that cannot leave its owners.",
    epilog="With --debug, any command shows the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _usable(value: Path | None) -> Path | None:
    from fedfm.core.paths import usable

    return None if value is None else usable(value, "The path")


Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file (YAML).", callback=_usable)]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.", callback=_usable)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Values for fields of the recipe, such as rounds=20 or tuning.LoRA.r=16."),
]
Out = Annotated[Path | None, typer.Option(help="The run's folder. Default: runs/NAME.", callback=_usable)]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress; warnings and errors alone.")]
Json = Annotated[bool, typer.Option("--json", help="Answer in JSON on stdout; everything else goes to stderr.")]
LogLevel = Annotated[str, typer.Option("--log-level", metavar="LEVEL", help="debug, info, warning or error.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"fedfm {VERSION}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and stop.", callback=_version, is_eager=True)] = False,
) -> None:
    """What comes before any command."""


@app.command(cls=Command)
def run(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Out = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the plan, print the resolved recipe, and stop.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
    log_level: LogLevel = "warning",
) -> None:
    """Run a recipe."""
    from fedfm.cli import commands

    commands.run(recipe, overrides or [], out, dry_run, commands.Telling(quiet, as_json, log_level))


@app.command(cls=Command)
def resume(run: Run, overrides: Overrides = None, quiet: Quiet = False, as_json: Json = False, log_level: LogLevel = "warning") -> None:
    """Continue a run after a crash, or for more rounds (rounds=30)."""
    from fedfm.cli import commands

    commands.resume(run, overrides or [], commands.Telling(quiet, as_json, log_level))


@app.command(cls=Command)
def compare(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file, or a run's folder.", callback=_usable)],
    overrides: Overrides = None,
    out: Out = None,
    quiet: Quiet = False,
    as_json: Json = False,
    log_level: LogLevel = "warning",
) -> None:
    """Compare federated, local-only and centralised training."""
    from fedfm.cli import commands

    commands.compare(recipe, overrides or [], out, commands.Telling(quiet, as_json, log_level))


@app.command(cls=Command)
def check(
    recipe: Recipe,
    overrides: Overrides = None,
    data: Annotated[bool, typer.Option("--data", help="Open the model and the data too, and check the recipe against them.")] = False,
    as_json: Json = False,
) -> None:
    """Say whether a recipe's parts fit together, and run nothing."""
    from fedfm.cli import commands

    commands.check(recipe, overrides or [], data, as_json)


@app.command(name="list", cls=Command)
def list_(
    room: Annotated[str | None, typer.Argument(metavar="[ROOM]", help="Kind of part, such as tuning. Default: all kinds.")] = None,
    as_json: Json = False,
) -> None:
    """List the parts, by room and by concern."""
    from fedfm.cli import parts

    parts.list_parts(room, as_json)


@app.command(cls=Command)
def show(part: Annotated[str, typer.Argument(metavar="PART", help="A part's name, such as LoRA.")], as_json: Json = False) -> None:
    """Show a part: what it does, its fields, where it is."""
    from fedfm.cli import parts

    parts.show(part, as_json)


@app.command(cls=Command)
def report(run: Run, as_json: Json = False) -> None:
    """Write a run's report.html again."""
    from fedfm.cli import parts
    from fedfm.reports import render

    path = render(run)
    if as_json:
        parts.show_json({"report": str(path)})
    else:
        print(path)


@app.command(cls=Command)
def export(
    run: Run,
    to: Annotated[Path, typer.Option(help="The folder to write. It must be empty or not exist.", callback=_usable)],
    merge: Annotated[bool, typer.Option("--merge", help="Write a whole model with the tuning merged in, instead of an adapter.")] = False,
) -> None:
    """Write a run's model as peft and transformers load it."""
    from fedfm.cli import commands

    commands.export(run, to, merge)


@app.command(cls=Command)
def generate(
    run: Run,
    prompt: Annotated[str, typer.Argument(help="A question, or the beginning of a text.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens to generate.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Sampling seed; used when temperature > 0.")] = 0,
) -> None:
    """Generate text with a run's model."""
    from fedfm.cli import commands

    commands.generate(run, prompt, max_new_tokens, temperature, seed)


@app.command(cls=Command)
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete it; a run that needs it makes it again.")] = False,
    older_than: Annotated[float | None, typer.Option(metavar="DAYS", help="With --clear: only what is older.")] = None,
) -> None:
    """Show the prepared rows and base models that are kept, or delete them."""
    from fedfm.cli import cache as kept

    kept.show(clear, older_than)


app.add_typer(consortium)


@app.command(cls=Command)
def quickstart(out: Annotated[Path, typer.Option(help="The run's folder.", callback=_usable)] = Path("runs/quickstart")) -> None:
    """Take the tour: offline, in a few minutes."""
    from fedfm.quickstart import main as tour

    tour(out)


def main() -> None:
    """The console script. A FedfmError becomes one message and exit code 2."""
    debug = "--debug" in sys.argv
    # Before torch loads: threads that wait by spinning make a busy machine ten times slower, and an idle one hardly faster.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        app(args=[word for word in sys.argv[1:] if word != "--debug"])
    except FedfmError as error:
        if debug:
            raise
        text = str(error)
        if len(text) > _LONGEST:
            # The end of a message tells what to do.
            half = _LONGEST // 2
            text = f"{text[:half]} ... ({len(text) - 2 * half:,} characters left out, which --debug shows) ... {text[-half:]}"
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # The reader of our output (head, less) closed the pipe.
        sys.stderr.close()
        sys.exit(1)


if __name__ == "__main__":
    main()
