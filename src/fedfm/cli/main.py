"""``fedfm``: init, run, resume, compare, sweep, check, audit, leak, list, show, report, export, evaluate, predict, generate, cache, log, approve,
consortium, serve, join, attach, status, pause, leave, quickstart, completion, and commands of other packages.

Only what ``--help`` needs is imported here; a command imports the rest when it runs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import click
import typer

from fedfm.cli import completion
from fedfm.cli.consortium import consortium
from fedfm.cli.group import Command, Commands, usable_path
from fedfm.core.errors import ConfigError, FedfmError
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


Recipe = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A recipe file (YAML).", callback=usable_path, click_type=click.Path(path_type=Path))
]
Run = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run's folder.", callback=usable_path, click_type=completion.Folder(path_type=Path))
]
Coordinator = Annotated[Path, typer.Argument(metavar="DIR", help="The coordinator's folder.", callback=usable_path)]
OwnFolder = Annotated[Path, typer.Argument(metavar="[FOLDER]", help="The member's folder. Default: here.", callback=usable_path)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Values for fields of the recipe, such as rounds=20 or tuning.LoRA.r=16."),
]
Out = Annotated[
    Path | None,
    typer.Option(help="The run's folder. Default: runs/NAME.", callback=usable_path, click_type=completion.Folder(path_type=Path)),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress; warnings and errors alone.")]
Round = Annotated[str, typer.Option(metavar="ROUND", help="last, best, or the number of a round whose state the run has kept.")]
Json = Annotated[bool, typer.Option("--json", help="Answer in JSON on stdout; everything else goes to stderr.")]
LogLevel = Annotated[
    str,
    typer.Option(
        "--log-level",
        metavar="LEVEL",
        help="debug, info, warning or error: what is shown. RUN/log.txt has info and more.",
        autocompletion=completion.levels,
    ),
]
File = Annotated[
    str,
    typer.Argument(
        metavar="FILE",
        help="Rows: .csv or .jsonl (also .gz), .parquet, a folder of texts, or whatever data.source takes.",
        click_type=click.Path(),
    ),
]
Column = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="NAME=COLUMN", help="The file's column for one of the task's, such as text=review. Repeat it."),
]
Delimiter = Annotated[str | None, typer.Option(help="What stands between the values of a csv file, where that is not as in the recipe.")]
Encoding = Annotated[
    str | None, typer.Option(help="How the characters of a csv file are written, such as cp1252, where that is not as in the recipe.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Largest number of tokens to generate.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 takes the likeliest token.")]
Seed = Annotated[int, typer.Option(help="Sampling seed; used when temperature > 0.")]


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
    consortium: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Submit it to the coordinator of this folder, and show its progress.", callback=usable_path),
    ] = None,
    audited: Annotated[bool, typer.Option("--audit", help="Audit its privacy promise afterwards, as fedfm audit does.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
    log_level: LogLevel = "warning",
) -> None:
    """Run a recipe."""
    from fedfm.cli import commands

    if consortium is not None and not dry_run:
        if out is not None:
            raise ConfigError(
                f"--out is for a run on this machine; a run of a consortium lies in {consortium}/runs. Leave one of them out."
            )
        if audited:
            raise ConfigError("--audit is for a run on this machine. Audit a run of a consortium once it has ended: fedfm audit RUN")
        from fedfm.cli import silos

        silos.submit(consortium, recipe, overrides or [], commands.Telling(quiet, as_json, log_level))
        return

    commands.run(recipe, overrides or [], out, dry_run, commands.Telling(quiet, as_json, log_level), audited)


@app.command(cls=Command)
def resume(run: Run, overrides: Overrides = None, quiet: Quiet = False, as_json: Json = False, log_level: LogLevel = "warning") -> None:
    """Continue a run after a crash, or for more rounds (rounds=30)."""
    from fedfm.cli import commands

    commands.resume(run, overrides or [], commands.Telling(quiet, as_json, log_level))


@app.command(cls=Command)
def compare(
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe file, or a run's folder; several runs are put side by side.",
            callback=usable_path,
            click_type=click.Path(path_type=Path),
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]... | [RUN]...", help="Values for fields of the recipe; or more runs, where the first is a run."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The run's folder (default: runs/NAME); of several runs, where to write table and page.",
            callback=usable_path,
            click_type=completion.Folder(path_type=Path),
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
    log_level: LogLevel = "warning",
) -> None:
    """Compare federated, local-only and centralised training; or several runs."""
    from fedfm.cli import commands
    from fedfm.cli import sweep as sweeps

    telling = commands.Telling(quiet, as_json, log_level)
    if sweeps.are_runs(recipe, overrides or []):
        sweeps.compare_runs([recipe, *map(Path, overrides or [])], out, telling)
    else:
        commands.compare(recipe, overrides or [], out, telling)


@app.command(cls=Command)
def sweep(
    recipe: Recipe,
    overrides: Annotated[
        list[str],
        typer.Argument(metavar="KEY=VALUE,VALUE...", help="Fields and their values: tuning.LoRA.r=4,16 server=FedAvg,FedAdam seed=0..2."),
    ],
    out: Annotated[Path | None, typer.Option(help="The sweep's folder. Default: runs/NAME-sweep.", callback=usable_path)] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at a time. Default: as many as cores and total memory hold.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of each run. Default: the cores divided by the runs that fit.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the recipes, list the runs, and stop.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
    log_level: LogLevel = "warning",
) -> None:
    """Run every combination of values; the same command goes on after a crash."""
    from fedfm.cli import commands
    from fedfm.cli import sweep as sweeps

    sweeps.sweep(recipe, overrides, out, jobs, threads, dry_run, commands.Telling(quiet, as_json, log_level))


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


@app.command(cls=Command)
def audit(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="A run's folder, whose report then shows the audit, or a recipe file.",
            callback=usable_path,
            click_type=click.Path(path_type=Path),
        ),
    ],
    overrides: Overrides = None,
    canaries: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="How many canaries. Default: as many as --power needs.", show_default=False)
    ] = None,
    power: Annotated[float, typer.Option(help="The probability with which the fault of --fault is to be noticed.")] = 0.95,
    fault: Annotated[
        float | None,
        typer.Option(
            metavar="TIMES",
            help="The fault to be noticed: noise that is so many times too small. Default: 2, or more where 2 cannot be noticed.",
            show_default=False,
        ),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Play once: twice as fast, and blind to noise from a fixed seed.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Test a privacy promise: canaries join by secret coins, and guesses about them bound epsilon from below. Exit code 1: the claim is wrong."""
    from fedfm.cli import audit
    from fedfm.run.audit import Wanted

    audit.audit(path, overrides or [], Wanted(canaries, power, fault, not once), quiet, as_json)


@app.command(cls=Command)
def leak(
    target: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE|RUN",
            help="A recipe file, or a run's folder to go on from its last round.",
            callback=usable_path,
            click_type=click.Path(path_type=Path),
        ),
    ],
    overrides: Overrides = None,
    owner: Annotated[str | None, typer.Option(help="Whose update is looked at. Default: the first owner.")] = None,
    examples: Annotated[int, typer.Option(min=1, help="Examples in one update.")] = 1,
    trials: Annotated[int, typer.Option(min=1, help="Updates to make, each from other examples; the answer is their mean.")] = 5,
    group: Annotated[int | None, typer.Option(min=2, help="Owners in a sum. Default: all, at most 10.")] = None,
    epsilon: Annotated[float, typer.Option(help="Of the noise to compare with.")] = 8.0,
    delta: Annotated[float, typer.Option(help="The chance that this guarantee fails.")] = 1e-5,
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Rows of one owner, instead of the recipe's data: what a member does on its own machine."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The page to write. Default: leak.html in the run, or NAME-leak.html here.", callback=usable_path)
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
    log_level: LogLevel = "warning",
) -> None:
    """Show what a server could read from an owner's update, before anything leaves.

    Makes updates from the owner's own data and attacks them: sent as they are, with LoRA only, in a sum of owners, with noise, and as the plan sends them. Sends nothing.
    """
    from fedfm.cli import commands
    from fedfm.cli import leak as leaks

    question = {"owner": owner, "num_texts": examples, "trials": trials, "group": group, "epsilon": epsilon, "delta": delta}
    leaks.leak(leaks.Target(target, overrides or [], data, out), question, commands.Telling(quiet, as_json, log_level))


@app.command(name="list", cls=Command)
def list_(
    room: Annotated[
        str | None,
        typer.Argument(metavar="[ROOM]", help="Kind of part, such as tuning. Default: all kinds.", autocompletion=completion.rooms),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the parts, by room and by concern."""
    from fedfm.cli import parts

    parts.list_parts(room, as_json)


@app.command(cls=Command)
def show(
    part: Annotated[str, typer.Argument(metavar="PART", help="A part's name, such as LoRA.", autocompletion=completion.parts)],
    as_json: Json = False,
) -> None:
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
    to: Annotated[
        Path,
        typer.Option(
            help="The folder to write. It must be empty or not exist.", callback=usable_path, click_type=completion.Folder(path_type=Path)
        ),
    ],
    merge: Annotated[bool, typer.Option("--merge", help="Write a whole model with the tuning merged in, instead of an adapter.")] = False,
    round: Round = "last",
) -> None:
    """Write a run's model as peft and transformers load it."""
    from fedfm.cli import commands

    commands.export(run, to, merge, round)


@app.command(cls=Command)
def evaluate(
    run: Run,
    file: File,
    by: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column that names a row's owner: metrics of each owner too.")] = None,
    column: Column = None,
    delimiter: Delimiter = None,
    encoding: Encoding = None,
    round: Round = "last",
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Evaluate a run's model on the rows of a file.

    The task's headline metric comes first, with its standard error, then the others and the number of examples.
    """
    from fedfm.cli import answers

    answers.evaluate(answers.Asked(answers.Model(run, round, device), file, column or [], delimiter, encoding, quiet, as_json), by)


@app.command(cls=Command)
def predict(
    run: Run,
    file: File,
    to: Annotated[
        Path, typer.Option(help="The file to write, .csv or .jsonl: the rows, with an answer beside each.", callback=usable_path)
    ],
    column: Column = None,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="A column for each class as well.")] = False,
    prefix: Annotated[str, typer.Option(help="What the names of the new columns begin with.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    max_new_tokens: NewTokens = 100,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    delimiter: Delimiter = None,
    encoding: Encoding = None,
    round: Round = "last",
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Answer each row of a file with a run's model.

    Writes the rows in their order, with the answer beside each. Classification: the class and its probability. Instruct: the answer. Other tasks: the row's own metrics.
    """
    from fedfm.cli import answers

    drawing = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    answers.predict(
        answers.Asked(answers.Model(run, round, device), file, column or [], delimiter, encoding, quiet, as_json),
        to,
        force,
        probabilities,
        prefix,
        drawing,
    )


@app.command(cls=Command)
def generate(
    run: Run,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]...", help="Questions, or beginnings of a text; - reads one from each line of stdin."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="A text file with a prompt on each line.", callback=usable_path, click_type=click.Path(path_type=Path)),
    ] = None,
    round: Round = "last",
    max_new_tokens: NewTokens = 100,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Generate text with a run's model."""
    from fedfm.cli import answers

    drawing = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    answers.generate(answers.Model(run, round, device), prompts or [], file, drawing, quiet, as_json)


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
def log(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="An owner's log or folder, or a run's folder.", callback=usable_path)],
    last: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the last N lines.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Say whether the log is unbroken, and print its head.")] = False,
    head: Annotated[str | None, typer.Option(metavar="DIGEST", help="A head noted earlier: verify that the log still holds it.")] = None,
    as_json: Json = False,
) -> None:
    """Show an owner's log: what was asked, what left, what was refused."""
    from fedfm.cli import log as owners

    owners.show(path, last, verify, head, as_json)


@app.command(cls=Command)
def approve(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="An owner's folder, or a run's folder.", callback=usable_path)],
    question: Annotated[str | None, typer.Argument(metavar="[ID]", help="The question to say yes to. Default: list them.")] = None,
    refuse: Annotated[bool, typer.Option("--refuse", help="Say no.")] = False,
    as_json: Json = False,
) -> None:
    """Answer the questions that an owner's policy puts to a person."""
    from fedfm.cli import log as owners

    owners.approve(path, question, refuse, as_json)


@app.command(cls=Command)
def init(
    file: Annotated[
        str | None,
        typer.Argument(metavar="[FILE]", help="A csv, jsonl or parquet file, or a folder of texts. Default: the quickstart's data."),
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="The recipe to write. Default: FILE's name with .yaml, here.", callback=usable_path)
    ] = None,
    task: Annotated[str | None, typer.Option(help="Instruct, Classification or CausalLM.")] = None,
    text: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of the text.")] = None,
    label: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of the class.")] = None,
    instruction: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of the instruction or question.")] = None,
    context: Annotated[str | None, typer.Option("--input", metavar="COLUMN", help="Column of the instruction's context.")] = None,
    response: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of the response or answer.")] = None,
    owner: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of the owner.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The base model: a folder or a hub name. Default: a small one that needs no network.")
    ] = None,
    delimiter: Annotated[str | None, typer.Option(help="What stands between the values of a csv file.")] = None,
    encoding: Annotated[str | None, typer.Option(help="How the characters of a csv file are written, such as cp1252.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing; guess.")] = False,
) -> None:
    """Look at your rows and write a commented recipe that runs."""
    from fedfm.cli import init as start

    columns = {"text": text, "label": label, "instruction": instruction, "input": context, "response": response, "owner": owner}
    given = {name: column for name, column in columns.items() if column is not None}
    start.init(file, to, start.Given(task, given, model, delimiter, encoding, yes))


@app.command(cls=Command)
def serve(
    folder: Coordinator,
    at_once: Annotated[
        int,
        typer.Option("--at-once", min=1, metavar="N", help="Runs that are played at a time; further ones wait. Each needs its own memory."),
    ] = 1,
    log_level: LogLevel = "warning",
) -> None:
    """Coordinate a consortium: let members enter, and run what is submitted, one run after the other or N side by side."""
    from fedfm.cli import silos

    silos.serve(folder, at_once, log_level)


@app.command(cls=Command)
def join(
    path: Annotated[
        Path,
        typer.Argument(metavar="INVITATION", help="The invitation file; or the folder of a member that has entered.", callback=usable_path),
    ],
    data: Annotated[str, typer.Option(metavar="FILE", help="The owner's own rows: .csv, .jsonl, .parquet or a folder of texts.")],
    test: Annotated[str | None, typer.Option(metavar="FILE", help="Rows to evaluate on. Default: some of the data are held out.")] = None,
    policy: Annotated[Path | None, typer.Option(help="The owner's policy (YAML). Default: the strictest.", callback=usable_path)] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where the member's keys and records are. Default: the member's name, here.", callback=usable_path)
    ] = None,
    models: Annotated[
        Path | None,
        typer.Option(help="A folder with base models of the owner's own; what lies in it is not fetched.", callback=usable_path),
    ] = None,
    device: Device = "auto",
    log_level: LogLevel = "warning",
) -> None:
    """Enter a consortium, and answer its coordinator with the owner's own data, under the owner's policy."""
    from fedfm.cli import silos

    silos.join(path, data, test, policy, folder, device, log_level, models)


@app.command(cls=Command)
def attach(
    folder: Coordinator,
    name: Annotated[str | None, typer.Argument(metavar="[JOB]", help="As fedfm status names it. Default: the last one.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Follow a run of a consortium; Ctrl-C leaves it alone."""
    from fedfm.cli import commands, silos

    silos.attach(folder, name, commands.Telling(quiet, as_json))


@app.command(cls=Command)
def status(
    folder: Coordinator,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it again every 2 seconds, until Ctrl-C; with --json a line for each look.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show who of a consortium is there, what runs, which round, and how fast."""
    from fedfm.cli import status as shown

    shown.status(folder, watch, as_json)


@app.command(cls=Command)
def pause(
    folder: OwnFolder = Path(),
    resume: Annotated[bool, typer.Option("--resume", help="End the pause.")] = False,
    as_json: Json = False,
) -> None:
    """Pause a member: nothing leaves, and the coordinator is told so when it asks, until --resume."""
    from fedfm.cli import house

    house.pause(folder, resume, as_json)


@app.command(cls=Command)
def leave(
    folder: OwnFolder = Path(),
    delete: Annotated[
        bool,
        typer.Option("--delete", help="Delete its keys, what it remembers of runs, and its copies of rows; asks first. The log stays."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Leave a consortium: the coordinator takes the member off its roster and the broker; runs go on without it."""
    from fedfm.cli import house

    house.leave(folder, delete, yes, as_json)


@app.command(cls=Command)
def quickstart(out: Annotated[Path, typer.Option(help="The run's folder.", callback=usable_path)] = Path("runs/quickstart")) -> None:
    """Take the tour: offline, in a few minutes."""
    from fedfm.quickstart import main as tour

    tour(out)


@app.command(name="completion", cls=Command)
def completion_(
    shell: Annotated[completion.Shell, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")],
) -> None:
    """Print a shell's completion script.

    bash: eval "$(fedfm completion bash)" in ~/.bashrc. zsh: the same with zsh in ~/.zshrc, after compinit. fish: fedfm completion fish | source
    in ~/.config/fish/config.fish.
    """
    print(completion.script(typer.main.get_command(app), shell))


def main() -> None:
    """The console script. A FedfmError becomes one message and exit code 2."""
    if completion.VARIABLE in os.environ:
        sys.exit(completion.answer(typer.main.get_command(app)))
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
