"""The command line: starts at once, answers clearly, and refuses with one message."""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_run import small

import fedfm
import fedfm.core.errors
import fedfm.core.version
import fedfm.data
from fedfm.cli import main as cli
from fedfm.cli.parts import show_json
from fedfm.recipe import dump, load
from fedfm.run.folder import read_lines

Answer = tuple[int, str, str]
Fedfm = Callable[..., Answer]


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> Fedfm:
    """``fedfm`` with words, in a folder with ``recipe.yaml``: exit code, output, errors."""
    monkeypatch.setenv("FEDFM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(dump(small(tmp_path, rounds=1)))

    def call(*words: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["fedfm", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


# --- start ---------------------------------------------------------------------------------------------------------


def seconds(*words: str) -> float:
    """Processor time of one start: what a quiet machine would take by the clock."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"PYTHONPATH": str(Path(fedfm.__file__).parent.parent)}
    subprocess.run([sys.executable, "-m", "fedfm.cli.main", *words], check=True, capture_output=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_and_list_answer_at_once() -> None:
    assert min(seconds("--help") for _ in range(3)) < 0.3
    assert min(seconds("list") for _ in range(3)) < 1.0


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["list"], ["list", "tuning"], ["show", "LoRA"], ["leak", "--help"]])
def test_nothing_heavy_is_imported_before_it_is_needed(words: list[str]) -> None:
    code = (
        "import sys, atexit; heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'yaml'}\n"
        "atexit.register(lambda: print('HEAVY', *sorted(heavy & set(sys.modules)), file=sys.stderr))\n"
        f"sys.argv = ['fedfm', *{words!r}]; from fedfm.cli.main import main; main()"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(fedfm.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stderr.strip() == "HEAVY"


# --- commands of other packages ------------------------------------------------------------------------------------

HELLO = """
import sys
import typer
print("IMPORTED", file=sys.stderr)

def hello(name: str, times: int = typer.Option(1, help="How often.")) -> None:
    "Greet an owner."
    print(*["hello", name] * times)

def refuse() -> None:
    from fedfm.core.errors import DataError
    raise DataError("there is no owner 'zoe'.")

def run(recipe: str) -> None:
    print("not ours")

app = typer.Typer(help="Two of a kind.")
app.command()(hello)
app.command()(refuse)
number = 3
"""
POINTS = {
    "hello": "hello_commands:hello",
    "refuse": "hello_commands:refuse",
    "group": "hello_commands:app",
    "clicked": "hello_clicked:command",
    "run": "hello_commands:run",
    "number": "hello_commands:number",
    "gone": "hello_commands:gone",
    "absent": "no_such_module:main",
}


def declare(folder: Path, package: str, points: dict[str, str]) -> None:
    """A distribution as pip leaves it, with entry points."""
    info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {target}" for name, target in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[fedfm.commands]", *lines, ""]))


@pytest.fixture
def installed(tmp_path: Path) -> Fedfm:
    """``fedfm`` in a process of its own where two packages declare commands: exit code, output, errors."""
    (tmp_path / "hello_commands.py").write_text(HELLO)
    (tmp_path / "hello_clicked.py").write_text(
        "import click\n@click.command()\n@click.option('--n', type=int)\ndef command(n):\n    print(n)"
    )
    declare(tmp_path, "hello-package", POINTS | {"twice": "hello_commands:hello"})
    declare(tmp_path, "other-package", {"twice": "other:main"})
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(Path(fedfm.__file__).parent.parent), str(tmp_path)))}

    def call(*words: object) -> Answer:
        line = [sys.executable, "-m", "fedfm.cli.main", *map(str, words)]
        done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
        return done.returncode, done.stdout, done.stderr

    return call


def test_help_names_commands_of_other_packages_without_importing_them(installed: Fedfm) -> None:
    code, out, err = installed("--help")
    assert code == 0 and "IMPORTED" not in err
    for name in ("hello", "group", "clicked", "absent"):
        assert re.search(rf"^  {name} +from hello-package$", out, re.M), out
    assert re.search(r"^  run +Run a recipe\.$", out, re.M) and len(re.findall(r"^  run ", out, re.M)) == 1
    assert installed("list", "server")[2] == ""


def test_a_command_of_another_package_runs_as_ours_do(installed: Fedfm) -> None:
    assert installed("hello", "ann", "--times", 2)[:2] == (0, "hello ann hello ann\n")
    assert installed("group", "hello", "bob")[:2] == (0, "hello bob\n")
    assert installed("clicked", "--n", 3)[:2] == (0, "3\n")
    code, out, _ = installed("hello", "--help")
    assert code == 0 and "Greet an owner." in out and "How often." in out and "fedfm.cli.main hello" in out
    refused(installed("refuse"), "there is no owner 'zoe'.")


def test_our_commands_keep_their_names(installed: Fedfm) -> None:
    refused(installed("run", "no.yaml"), "no.yaml")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent", "hello-package cannot be imported from no_such_module:main: No module named 'no_such_module'"),
        ("gone", "cannot be imported from hello_commands:gone"),
        ("number", "is 3. The entry point hello_commands:number must name a function"),
        ("twice", "hello-package and other-package each declare a command 'twice'"),
    ],
)
def test_a_command_that_is_none_is_refused_when_it_is_called(name: str, reason: str, installed: Fedfm) -> None:
    refused(installed(name), reason)


def test_a_misspelt_command_is_told_the_nearest(installed: Fedfm) -> None:
    code, _, err = installed("helo")
    assert code == 2 and "hello" in err and "Traceback" not in err


# --- behaviour -----------------------------------------------------------------------------------------------------


def test_from_a_recipe_to_a_result(call: Fedfm, tmp_path: Path) -> None:
    code, out, err = call("run", "recipe.yaml", "tuning.LoRA.r=4", "--out", "out")
    assert code == 0 and "out/report.html" in out and "1/1" in out, err
    assert load(tmp_path / "out" / "recipe.yaml").tuning.r == 4  # type: ignore[attr-defined]
    code, out, _ = call("resume", "out", "rounds=2")
    assert code == 0 and "resumed after round 1" in out and read_lines(tmp_path / "out" / "metrics.jsonl")[-1]["round"] == 2
    code, out, _ = call("compare", "out")
    assert code == 0 and "local-only" in out and "centralised" in out and (tmp_path / "out" / "compare.json").is_file()
    assert call("report", "out")[1].strip() == "out/report.html"
    assert call("export", "out", "--to", "merged", "--merge")[0] == 0 and (tmp_path / "merged" / "model.safetensors").is_file()
    assert call("generate", "out", "the small cat", "--max-new-tokens", "3")[0] == 0
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "round 1:" in log and "resumed after round 1" in log


def test_the_best_round_is_exported_and_asked(call: Fedfm, tmp_path: Path) -> None:
    assert call("run", "recipe.yaml", "server={FedAvg: {lr: 1e-6}}", "rounds=4", "evaluate.every=2", "--out", "out", "--quiet")[0] == 0
    code, out, _ = call("export", "out", "--to", "best", "--round", "best")
    (number,) = re.findall(r"\(round (\d)\)", out)
    assert code == 0 and call("export", "out", "--to", "same", "--round", number)[0] == 0
    exported = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("best", "same")]
    assert exported[0] == exported[1] and call("export", "out", "--to", "last", "--round", "last")[1] == "last\n"
    assert call("generate", "out", "the small cat", "--max-new-tokens", "2", "--round", "best")[0] == 0
    refused(call("export", "out", "--to", "none", "--round", "1"), "no intact state of round 1")
    refused(call("generate", "out", "the small cat", "--round", "newest"), "it must be last, best, or a round's number")


def test_a_dry_run_prints_what_would_run(call: Fedfm, tmp_path: Path) -> None:
    code, out, _ = call("run", "recipe.yaml", "rounds=7", "--dry-run")
    assert code == 0 and load(out).rounds == 7 and load(out).data.source == str(tmp_path / "rows.jsonl")
    assert not (tmp_path / "runs").exists()


def test_runs_have_a_place_of_their_own(call: Fedfm, tmp_path: Path) -> None:
    assert call("run", "recipe.yaml", "rounds=0")[0] == 0
    assert (tmp_path / "runs" / "small" / "report.html").is_file()


def test_check_tells_what_a_plan_promises_and_refuses(call: Fedfm) -> None:
    code, out, _ = call("check", "recipe.yaml", "--data")
    assert code == 0 and "ann" in out and "can run" in out
    code, out, _ = call("check", "recipe.yaml")
    assert code == 0 and "the plan is sound" in out and "can run" not in out
    code, _, err = call("check", "recipe.yaml", "tuning.LoRA.targets=[q_prj]", "--data")
    assert code == 2 and "Did you mean 'q_proj'?" in err
    code, out, err = call("check", "recipe.yaml", "sampler={Uniform: {clients: 9}}", "--data")
    assert code == 2 and "refusal" in out and "only 3 owners" in out and "refused" in err


def test_list_and_show_tell_what_there_is(call: Fedfm) -> None:
    _, everything, _ = call("list")
    for name in ("LoRA", "FedAdam", "ClipByNorm", "Embedded", "By concern", "robustness"):
        assert name in everything
    _, room, _ = call("list", "server")
    assert "FedAdam" in room and "LoRA" not in room
    _, part, _ = call("show", "LoRA")
    assert "r: int = 8" in part and "lora.py" in part and "parameter-efficient" in part
    _, part, _ = call("show", "ClipByNorm")
    assert "max_norm: float   (must be given)" in part


# --- the cache -----------------------------------------------------------------------------------------------------


def test_the_cache_is_shown_and_cleared(call: Fedfm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "cache"
    monkeypatch.setenv("FEDFM_CACHE", str(root))
    assert call("cache")[:2] == (0, f"{root}\n\nempty\n")
    assert call("check", "recipe.yaml", "--data")[0] == 0
    (prepared,) = (root / "data").iterdir()
    # What is not ours stays, and what another process may be writing.
    for name in ("data/photos", "quickstart/notes"):
        (root / name).mkdir(parents=True)
    old, young = root / "data" / f".{'0' * 24}-abc", root / "data" / f".{'1' * 24}-abc"
    base = root / "quickstart" / ("a" * 16)
    for folder in (old, young, base):
        folder.mkdir()
        (folder / "rows").write_bytes(b"x" * 5000)
    for path in (old / "rows", old, base / "rows", base):
        os.utime(path, (time.time() - 3 * 86400,) * 2)
    (root / "quickstart" / "model").symlink_to(base)
    code, out, _ = call("cache")
    assert code == 0 and "photos" not in out and "notes" not in out and "in the clear" in out
    assert re.search(rf"data/{prepared.name} .*now  prepared rows of ann, ", out)
    assert re.search(r"quickstart/a{16} +5.00 kB +3 days  base model of the quickstart", out)
    assert out.count("cut off while it was made") == 2

    assert call("cache", "--older-than", 1)[0] == 2 and call("cache", "--clear", "--older-than", -1)[0] == 2
    code, out, _ = call("cache", "--clear", "--older-than", 2)
    assert code == 0 and "deleted 10.0 kB" in out and not old.exists() and not base.exists() and prepared.exists()
    code, out, _ = call("cache", "--clear")
    assert code == 0 and prepared.name in out
    assert sorted(path.name for path in (root / "data").iterdir()) == [young.name, "photos"]
    assert call("cache", "--clear")[1].endswith("nothing to delete\n")
    assert call("check", "recipe.yaml", "--data")[0] == 0 and prepared.exists()


# --- a run's model -------------------------------------------------------------------------------------------------


def test_a_file_is_evaluated_and_predicted(call: Fedfm, tmp_path: Path) -> None:
    assert call("run", "recipe.yaml", "--out", "out", "--quiet")[0] == 0
    code, out, err = call("evaluate", "out", "rows.jsonl", "--by", "owner", "--device", "cpu")
    assert code == 0 and re.search(r"^loss +\d\.\d+ \+- \d", out) and re.search(r"^ann +30 ", out, re.M), err
    assert "Evaluating" in err and call("evaluate", "out", "rows.jsonl", "--quiet")[2] == ""
    report = json.loads(call("evaluate", "out", "rows.jsonl", "--by", "owner", "--json")[1])
    assert report["examples"] == 90 and report["owners"]["bob"]["examples"] == 30 and report["headline"]["name"] == "loss"

    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"owner": "ann", "text": ""}\n')
    code, out, err = call("predict", "out", "rows.jsonl", "--to", "new/out.csv")
    assert code == 0 and out == "new/out.csv\n" and "1 of 91 rows have no answer" in err and "rows.jsonl:91" in err
    assert (tmp_path / "new" / "out.csv").read_text().splitlines()[0] == "owner,text,loss,perplexity,token_accuracy,targets"
    refused(call("predict", "out", "rows.jsonl", "--to", "new/out.csv"), "--force")
    answer = json.loads(call("predict", "out", "rows.jsonl", "--to", "new/out.csv", "--force", "--json", "--prefix", "x_")[1])
    assert (answer["rows"], answer["unanswered"], answer["columns"][0]) == (91, 1, "x_loss")
    refused(call("predict", "out", "rows.jsonl", "--to", "out.csv", "--probabilities"), "no classes")
    refused(call("predict", "out", "rows.jsonl", "--to", "out.csv", "--column", "text"), "NAME=COLUMN")
    refused(call("predict", "out", "row.jsonl", "--to", "out.csv"), "Did you mean 'rows.jsonl'?")
    refused(call("evaluate", "out", "rows.jsonl", "--by", "owners"), "Did you mean 'owner'?")


def test_prompts_come_from_words_files_and_stdin(call: Fedfm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    assert call("run", "recipe.yaml", "rounds=0", "--out", "out", "--quiet")[0] == 0
    alone = {prompt: call("generate", "out", prompt, "--max-new-tokens", 5)[1].rstrip("\n") for prompt in ("the cat", "the old king")}
    assert call("generate", "out", "the cat", "the old king", "--max-new-tokens", 5)[1] == (
        f"> the cat\n{alone['the cat']}\n\n> the old king\n{alone['the old king']}\n"
    )
    (tmp_path / "prompts.txt").write_text("the cat\n\nthe old king\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("the old king\n"))
    code, out, _ = call("generate", "out", "-", "--file", "prompts.txt", "--max-new-tokens", 5, "--json")
    given = ["the old king", "the cat", "the old king"]
    assert code == 0 and json.loads(out) == [{"prompt": prompt, "answer": alone[prompt]} for prompt in given]
    assert "Generating 2/2" in call("generate", "out", "the cat", "the dog")[2]
    assert call("generate", "out", "the cat", "the dog", "--quiet")[2] == "" == call("generate", "out", "the cat")[2]
    refused(call("generate", "out"), "There is no prompt")


def test_a_stopped_predict_says_that_nothing_was_written(call: Fedfm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    from fedfm.run import asking

    assert call("run", "recipe.yaml", "rounds=0", "--out", "out", "--quiet")[0] == 0
    monkeypatch.setattr(asking, "_chunks", lambda rows: os.kill(os.getpid(), signal.SIGTERM))
    code, _, err = call("predict", "out", "rows.jsonl", "--to", "out.csv")
    assert code == 143 and "nothing was written" in err and not list(tmp_path.glob("*out.csv*"))


# --- completion ----------------------------------------------------------------------------------------------------


def completed(shell: str, *words: str) -> tuple[list[str], str]:
    """What is offered for the last of the words, and stderr with what heavy was imported."""
    code = (
        "import sys, atexit; heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'yaml'}\n"
        "atexit.register(lambda: print('HEAVY', *sorted(heavy & set(sys.modules)), file=sys.stderr))\n"
        "sys.argv = ['fedfm']; from fedfm.cli.main import main; main()"
    )
    asked = {
        "_FEDFM_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": " ".join(("fedfm", *words)),
        "COMP_CWORD": words[-1] if shell == "fish" else str(len(words)),
    }
    environment = os.environ | {"PYTHONPATH": str(Path(fedfm.__file__).parent.parent)} | asked
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr.strip()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("re",), {"plain,resume", "plain,report"}),
        (("predict", "--pro"), {"plain,--probabilities"}),
        (("show", "LoR"), {"plain,LoRA"}),
        (("list", "tu"), {"plain,tuning"}),
        (("run", "--log-level", "d"), {"plain,debug"}),
        (("completion", "f"), {"plain,fish"}),
        (("run", "rec"), {"file,rec"}),
        (("report", "ru"), {"dir,ru"}),
    ],
)
def test_bash_completes_words_without_importing_anything_heavy(words: tuple[str, ...], offered: set[str]) -> None:
    lines, err = completed("bash", *words)
    assert set(lines) == offered and err == "HEAVY"


def test_other_shells_are_told_what_a_word_means() -> None:
    lines, _ = completed("zsh", "re")
    assert lines[:2] == ["plain", "resume"] and lines[2].startswith("Continue a run after a crash")
    first, second = completed("fish", "re")[0]
    assert first.startswith("plain,resume\tContinue a run") and second == "plain,report\tWrite a run's report.html again."


def test_a_completion_script_works_in_bash(call: Fedfm, tmp_path: Path) -> None:
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "fedfm").write_text(f'#!/bin/sh\nexec {sys.executable} -m fedfm.cli.main "$@"\n')
    (bin / "fedfm").chmod(0o755)
    code = (
        'eval "$(fedfm completion bash)"; complete -p fedfm\n'
        "COMP_WORDS=(fedfm sh); COMP_CWORD=1; _fedfm_completion fedfm 2>/dev/null; echo ${COMPREPLY[@]}\n"
        "COMPREPLY=(); COMP_WORDS=(fedfm show FedA); COMP_CWORD=2; _fedfm_completion fedfm 2>/dev/null; echo ${COMPREPLY[@]}\n"
    )
    environment = os.environ | {"PATH": f"{bin}:{os.environ['PATH']}", "PYTHONPATH": str(Path(fedfm.__file__).parent.parent)}
    done = subprocess.run(["bash", "--norc", "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines() == [
        "complete -o nosort -F _fedfm_completion fedfm", "show", "FedAdagrad FedAdam FedAvg FedAvgM",
    ], done.stderr  # fmt: skip
    for shell in ("bash", "zsh", "fish"):
        assert "_FEDFM_COMPLETE=" in call("completion", shell)[1]
    assert call("completion", "csh")[0] == 2


# --- refusals ------------------------------------------------------------------------------------------------------

BAD_ROWS = {
    "an empty file": ("", "rows.jsonl"),
    "broken JSON": ('{"owner": "ann", "text": "a"}\n{"owner": "ann", "te\n', "rows.jsonl:2"),
    "a row that is no object": ('{"owner": "ann", "text": "a"}\n[1]\n', "rows.jsonl:2"),
    "text that is none": ('{"owner": "ann", "text": 3}\n', "rows.jsonl:1"),
    "half a character": ('{"owner": "ann", "text": "\\ud83d cut"}\n', "rows.jsonl:1: column 'text' holds half a character"),
    "half an owner": ('{"owner": "\\ud83d", "text": "the cat"}\n', "rows.jsonl:1: column 'owner' holds half a character"),
    "owners with one example": ('{"owner": "ann", "text": "the cat"}\n{"owner": "bob", "text": "the dog"}\n', "ann"),
}
BAD_WORDS = {
    "a missing recipe": (["run", "recip.yaml"], "Did you mean 'recipe.yaml'?"),
    "a missing file": (["run", "recipe.yaml", "data.source=no.jsonl"], "no.jsonl"),
    "an unknown column": (["run", "recipe.yaml", "task.text=txt"], "Did you mean 'text'?"),
    "an unknown owner column": (["run", "recipe.yaml", "data.by=owners"], "Did you mean 'owner'?"),
    "texts longer than the context": (["run", "recipe.yaml", "model.max_position_embeddings=16"], "context"),
    "a wrong part": (["run", "recipe.yaml", "tuning=Lora"], "Did you mean 'LoRA'?"),
    "a wrong type": (["run", "recipe.yaml", "tuning.r=eight"], "a whole number"),
    "a negative rank": (["run", "recipe.yaml", "tuning.r=-1"], "-1"),
    "a target that matches nothing": (["run", "recipe.yaml", "tuning.targets=[qq_proj]"], "qq_proj"),
    "a tokenizer that does not fit": (["run", "recipe.yaml", "model.vocab_size=8"], "do not fit"),
    "no tokenizer": (["run", "recipe.yaml", "model.tokenizer=/no/where"], "/no/where"),
    "a model that is none": (["run", "recipe.yaml", "model=./data"], "./data"),
    "a plan that is refused": (["run", "recipe.yaml", "min_clients=9"], "min_clients"),
    "divergence, stopped by choice": (
        ["run", "recipe.yaml", "local={SGD: {lr: 1e30, max_grad_norm: null}}", "on_failure=stop"],
        "on_failure: stop",
    ),
    "a folder that cannot be made": (["run", "recipe.yaml", "--out", "rows.jsonl/out"], "rows.jsonl"),
    "a folder that is none": (["resume", "nowhere"], "holds no run"),
    "a report of nothing": (["report", "nowhere"], "nowhere"),
    "a hub name that is none": (["run", "recipe.yaml", "model={source: nosuch-model}"], "There is no folder 'nosuch-model' here"),
    "a folder that is not there": (["run", "recipe.yaml", "model={source: ./nosuch}"], "There is no model folder"),
    "a package that is none": (["run", "recipe.yaml", "model={source: 'package:os.path.nope/x'}"], "is not installed"),
    "a home that is none": (["run", "recipe.yaml", "data.source=~nosuchuser/x"], "there is no such home folder"),
    "a recipe in a home that is none": (["run", "~nosuchuser/x.yaml"], "there is no such home folder"),
    "a NUL character": (["run", "recipe.yaml", 'data.source="a\\0b"'], "NUL character"),
    "a path that is too long": (["run", "recipe.yaml", f"data.source={'a' * 5000}"], "File name too long"),
    "a recipe's name that is too long": (["run", "a" * 5000], "File name too long"),
    "a device as recipe": (["run", "/dev/zero"], "may never end"),
    "a device as data": (["run", "recipe.yaml", "data.source=/dev/zero"], "may never end"),
    "too many threads": (["run", "recipe.yaml", "engine.threads=1000000"], "from 1 to 1024"),
    "threads beyond 64 bits": (["run", "recipe.yaml", f"engine.threads={2**70}"], "beyond 64 bits"),
    "a rank above every width": (["run", "recipe.yaml", "tuning.r=1000000000"], "no target is wider than 32"),
    "a negative width": (["run", "recipe.yaml", "model.hidden_size=-5"], "The config of Llama is not valid"),
    "a test file that trains": (["check", "recipe.yaml", "data.test=rows.jsonl"], "is refused"),
    "an unknown log level": (["run", "recipe.yaml", "--log-level", "loud"], "it must be debug, info, warning, error"),
    "an unknown room": (["list", "tunning"], "Did you mean 'tuning'?"),
    "an unknown part": (["show", "LORRA"], "Did you mean 'LoRA'?"),
}


def refused(answer: Answer, told: str) -> None:
    """One clear message and exit code 2."""
    code, _, err = answer
    assert code == 2, err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and told in err, err
    assert "Traceback" not in err


@pytest.mark.parametrize("case", BAD_WORDS)
def test_bad_input_is_one_message(case: str, call: Fedfm, tmp_path: Path) -> None:
    words, told = BAD_WORDS[case]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    refused(call(*words), told)
    assert {path: path.read_bytes() for path in before} == before, "nothing that existed is lost"


def test_a_pipe_is_refused_and_not_waited_for(call: Fedfm, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    refused(call("run", "pipe.jsonl"), "may never end")
    refused(call("run", "recipe.yaml", "data.source=pipe.jsonl"), "may never end")


@pytest.mark.parametrize("source", ["", "~nosuchuser/x", "x" * 5000 + ".csv", "pipe.csv"])
def test_a_source_that_is_no_file_is_refused(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedfm.data.sources import open_source

    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.csv")
    with pytest.raises(fedfm.core.errors.ConfigError):
        open_source(source)
    with pytest.raises((fedfm.core.errors.ConfigError, fedfm.core.errors.RunError)):
        fedfm.open_run(source)


def test_an_empty_owner_column_is_refused() -> None:
    with pytest.raises(fedfm.core.errors.ConfigError, match="by is empty"):
        fedfm.data.Data("rows.csv", by="")


def test_a_long_message_is_cut_in_its_middle(call: Fedfm) -> None:
    code, _, err = call("run", "recipe.yaml", f"tuning={'x' * 40_000}")
    assert code == 2 and len(err) < 5000 and "characters left out" in err and "Known: " in err


def test_the_version_and_help_without_escapes(call: Fedfm) -> None:
    assert call("--version")[:2] == (0, f"fedfm {fedfm.core.version.VERSION}\n")
    _, out, _ = call("export", "--help")
    assert "[required]" in out and "\\" not in out


@pytest.mark.parametrize("words", [["--temperature", "nan"], ["--temperature", "1e-300"], ["--seed", 10**30], ["--seed", -1]])
def test_numbers_that_cannot_be_drawn_with_are_refused(words: list[object], call: Fedfm) -> None:
    assert call("run", "recipe.yaml", "rounds=0", "--out", "out", "--quiet")[0] == 0
    refused(call("generate", "out", "the cat", *words), "it must be")


def test_check_warns_of_what_learns_nothing(call: Fedfm, tmp_path: Path) -> None:
    code, out, _ = call("check", "recipe.yaml", "rounds=0", "local.lr=0", "deadline=3", "tuning=Full", "engine.bank=8")
    assert code == 0
    for words in ("with 0 rounds", "has lr 0", "between banks only", "cannot bank, so clients run one by one instead of 8"):
        assert re.search(f"^warning .*{words}", out, re.M), out
    _, out, _ = call("check", "recipe.yaml", "engine={Process: {max_processes: 6400}}")
    assert "6400 processes" in out
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "test.jsonl").write_text("\n".join([*lines[:3], '{"owner": "ann", "text": "no such row"}', ""]))
    code, out, _ = call("check", "recipe.yaml", "data.test=test.jsonl", "--data", "--json")
    answer = json.loads(out)
    assert code == 0 and answer["can_run"] and answer["owners"][0]["owner"] == "ann"
    (shared,) = [entry["text"] for entry in answer["findings"] if entry["where"] == "data"]
    assert re.match(r"\d+ of 4 test rows also stand in the training data", shared)


def test_the_mean_of_factors_is_noted_by_check_and_not_by_runs(call: Fedfm, caplog: pytest.LogCaptureFixture) -> None:
    assert call("check", "recipe.yaml")[1].count("the mean of LoRA factors") == 1
    code, out, err = call("run", "recipe.yaml", "--out", "out")
    assert code == 0 and "mean of LoRA factors" not in out + err + caplog.text


def test_answers_in_json(call: Fedfm) -> None:
    assert {"room": "tuning", "name": "LoRA"}.items() <= next(
        x for x in json.loads(call("list", "--json")[1]) if x["name"] == "LoRA"
    ).items()
    assert json.loads(call("show", "LoRA", "--json")[1])["fields"][0] == {"name": "r", "type": "int", "default": "8"}
    code, out, _ = call("run", "recipe.yaml", "--out", "out", "--json")
    assert code == 0 and json.loads(out)["last_round"]["round"] == 1
    assert json.loads(call("report", "out", "--json")[1]) == {"report": "out/report.html"}
    assert call("resume", "out", "rounds=2", "--quiet")[:2] == (0, "")


def test_each_answer_in_json_is_one_document_of_plain_json(call: Fedfm, capsys: pytest.CaptureFixture[str]) -> None:
    def strict(text: str) -> object:
        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is no JSON")

        return json.loads(text, parse_constant=refuse)

    for words in (
        ["run", "recipe.yaml", "--out", "out", "--json"],
        ["compare", "recipe.yaml", "--out", "out", "--json"],
        ["check", "recipe.yaml", "--json"],
        ["list", "--json"],
        ["show", "LoRA", "--json"],
        ["report", "out", "--json"],
        ["evaluate", "out", "rows.jsonl", "--json"],
        ["run", "recipe.yaml", "--dry-run", "--json"],
    ):
        code, out, err = call(*words)
        assert code == 0 and strict(out), (words, err)
    assert load(json.loads(call("run", "recipe.yaml", "--dry-run", "--json")[1])["recipe"]).rounds == 1
    code, out, _ = call("check", "recipe.yaml", "min_clients=9", "--data", "--json")
    assert code == 2 and strict(out)["can_run"] is False  # type: ignore[index]
    # Numbers of a model that diverged, as a comparison may hold them.
    show_json({"loss": [float("nan"), float("inf"), 1.5], "name": "zoë"})
    assert strict(capsys.readouterr().out) == {"loss": [None, None, 1.5], "name": "zoë"}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_named_with_their_line(case: str, call: Fedfm, tmp_path: Path) -> None:
    text, told = BAD_ROWS[case]
    (tmp_path / "rows.jsonl").write_text(text)
    refused(call("run", "recipe.yaml"), told)
    assert not (tmp_path / "runs" / "small").exists(), "what could not start does not stand in the way"


def test_an_owner_with_one_example_is_named_and_left_out(call: Fedfm, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"owner": "zoe", "text": "the small cat"}) + "\n")
    code, out, err = call("run", "recipe.yaml", "rounds=0", "--out", "out")
    assert code == 0 and "zoe" in out + err + caplog.text
    assert next(line for line in read_lines(tmp_path / "out" / "journal.jsonl") if line["event"] == "data")["left_out"].keys() == {"zoe"}


def test_a_run_that_exists_stays(call: Fedfm, tmp_path: Path) -> None:
    assert call("run", "recipe.yaml", "--out", "out")[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    refused(call("run", "recipe.yaml", "--out", "out"), "fedfm resume out")
    refused(call("resume", "out", "tuning.r=3"), "Only rounds and observers may change")
    refused(call("resume", "out", "rounds=0"), "more than the 0 asked for")
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_debug_shows_where(call: Fedfm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fedfm", "show", "LORRA", "--debug"])
    with pytest.raises(fedfm.core.errors.ConfigError, match="LORRA"):
        cli.main()


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stopped_run_says_how_to_go_on(name: str, code: int, call: Fedfm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    from fedfm.core import disk

    monkeypatch.setattr(
        disk, "on_step", lambda step: os.kill(os.getpid(), signal.Signals[name]) if step == "written round-000000.safetensors" else None
    )
    ended, _, err = call("run", "recipe.yaml", "--out", "out")
    assert ended == code and "fedfm resume out" in err
    monkeypatch.setattr(disk, "on_step", None)
    assert call("resume", "out")[0] == 0
    assert re.search(r"1/1|round", (tmp_path / "out" / "report.html").read_text())


def test_a_name_in_a_warning_cannot_steer_a_terminal_or_forge_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    from fedfm.cli.commands import _Stderr

    record = logging.LogRecord("fedfm", logging.WARNING, "", 0, "round 1: %s failed", ("x\x1b[2J\nWARNING: forged",), None)
    _Stderr().emit(record)
    shown = capsys.readouterr().err
    assert "\x1b" not in shown and shown.count("\n") == 1 and "forged" in shown
