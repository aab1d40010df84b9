"""``fedfm log`` and ``fedfm approve``: what an owner sees and decides on its own machine."""

from __future__ import annotations

from collections import deque
from pathlib import Path

from fedfm.cli.parts import show_json
from fedfm.client import asking
from fedfm.client.log import in_words, logs_in, read
from fedfm.core import words
from fedfm.core.chain import Line
from fedfm.core.errors import ConfigError, RunError


def show(path: Path, last: int | None, verify: bool, head: str | None, as_json: bool) -> None:
    """``fedfm log``: what was asked, what left and what was refused, in plain words; or whether a log is unbroken.

    Args:
        last: So many lines at the end.
        head: A digest noted earlier, which the log must still hold.

    Raises:
        ConfigError: if there is no log.
        RunError: if a log was changed, or does not hold ``head``.
    """
    logs = logs_in(path)
    if head is not None and len(logs) > 1:
        raise ConfigError(f"--head is the digest of one log, and {path} holds {len(logs)}. Name one of them.")
    if verify or head is not None:
        checked = [_verified(log, head) for log in logs]
        if as_json:
            show_json(checked)
        else:
            for told in checked:
                print(f"{told['log']}: {told['lines']} lines, unbroken.\nhead  {told['head']}")
            print(
                "Note the head somewhere else. Lines cut off the end, or an older copy put back, cannot be seen from the file alone; "
                "fedfm log --verify --head DIGEST finds both."
            )
        return
    # Every line is checked on the way, whether it is shown or not.
    shown = {log: deque(read(log), maxlen=last) for log in logs}
    if as_json:
        show_json([{"log": str(log), "number": line.number, "digest": line.digest, **line.what} for log in logs for line in shown[log]])
        return
    for log in logs:
        if len(logs) > 1:
            print(log)
        for line in shown[log]:
            print(in_words(line))


def _verified(log: Path, head: str | None) -> dict[str, object]:
    last: Line | None = None
    holds = head is None
    for line in read(log):
        last, holds = line, holds or line.digest == head
    if not holds:
        raise RunError(
            f"{log} is unbroken, but does not hold the line with the digest {words.clean(head, 40)}: lines were cut off its end, or it is another "
            "or an older copy. What left after its last line is not known."
        )
    return {"log": str(log), "lines": 0 if last is None else last.number, "head": "" if last is None else last.digest}


def approve(path: Path, question: str | None, refuse: bool, as_json: bool) -> None:
    """``fedfm approve``: the questions that wait for a person; or says yes or no to one.

    Raises:
        ConfigError: if there is no such question.
        RunError: if the answer cannot be written.
    """
    known = {file.stem: (file, *asking.read(file)) for file in asking.questions_in(path)}
    if question is None:
        if refuse:
            raise ConfigError("--refuse needs the id of a question; fedfm approve PATH lists them.")
        if as_json:
            show_json([{"id": asked.id, "text": asked.text, "answer": answer, "file": str(file)} for file, asked, answer in known.values()])
            return
        for file, asked, answer in known.values():
            print(f"{asked.id}  {answer or 'waits':<5}  {file.parent.parent.name}: {words.clean(asked.text, 1000)}")
        waiting = sum(answer is None for _, _, answer in known.values())
        print(f"{waiting} wait{'s' if waiting == 1 else ''} for an answer. fedfm approve {path} ID says yes, with --refuse no.")
        return
    if question not in known:
        raise ConfigError(f"There is no question {words.clean(question, 40)!r} at {path}. Known: {words.listed(list(known), 8) or 'none'}.")
    file, asked, _ = known[question]
    verdict: asking.Verdict = "no" if refuse else "yes"
    asking.write(file, asked, verdict)
    if as_json:
        show_json({"id": asked.id, "answer": verdict})
    else:
        print(f"{asked.id}: {verdict}. It holds from the next request on.")
