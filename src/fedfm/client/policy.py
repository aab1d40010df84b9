"""What an owner lets happen in its house: a value, read from a YAML file on the owner's own machine.

The house's guard (:mod:`fedfm.client.guard`) enforces it, whatever the coordinator sends. The defaults are those of a house without a file: a person
is asked about every run, and the update is all that leaves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

from fedfm import notation
from fedfm.core import words
from fedfm.core.errors import ConfigError
from fedfm.core.messages import ClientId
from fedfm.core.paths import usable

# What leaves declare that they tell, and why a request failed.
Telling = Literal["counts", "labels", "losses", "evaluation", "reasons"]
KINDS: tuple[Telling, ...] = get_args(Telling)
# Demands that are not the name of a part.
SUMS, PRIVATE, BOUNDED = "sums", "private", "bounded"
_LARGEST = 1 << 20  # bytes of a policy's file
_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_WINDOW = re.compile(r"(?:(\w{3})(?:-(\w{3}))?\s+)?(\d{2}):(\d{2})-(\d{2}):(\d{2})")


@dataclass(frozen=True)
class Policy:
    """What an owner lets happen in its house. A rule that is ``null`` allows anything; a rule that is left out is as strict as it is written here.

    Args:
        coordinators: Fingerprints of the coordinators that may ask; ``null`` for the one that this house is enrolled with.
        models: Digests of the base's weights, 32 hexadecimal digits each. A name is not enough: whatever is published under it can change.
        tasks: Names of the tasks that may be worked on, such as ``CausalLM``.
        verbs: What may be asked. An exchange of the channel is allowed with the verb that it is made for.
        columns: The task's columns that may be read, each with the owner's own name for it.
        min_cohort: Fewest clients that a round asks. The number is the coordinator's word: nothing here can count the others.
        demand: What must stand before anything leaves: ``sums`` (a channel that shows sums alone), ``private`` (a privacy promise that covers all that
            leaves), ``bounded`` (the length of an update is bounded), or the name of a channel or transform.
        may_leave: What may leave beside the update: ``counts`` (examples, tokens, steps, targets), ``labels``, ``losses`` (of training), ``evaluation``, ``reasons`` (why a
            request failed; the text may quote rows).
        model_bytes: Most bytes of a base that are taken from the coordinator where this machine does not have it; 0 takes none.
        rounds: How many different requests of each verb are answered, and as many before the first round; the same request again costs nothing.
        hours: When requests are taken, on the house's own clock: ``mon-fri 08:00-18:00``, ``sat 10:00-12:00``, ``22:00-06:00``.
        max_bytes: Most bytes of one answer.
        total_bytes: Most bytes of all answers together.
        ask: Whether a person is asked: ``never``, once for each ``run``, or for each ``round``.

    Raises:
        ConfigError: if a rule cannot mean what it says.

    Example:
        >>> Policy(hours=("mon-fri 08:00-18:00",)).is_open(datetime(2026, 7, 4, 12, 0))  # a Saturday
        False
    """

    coordinators: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None
    tasks: tuple[str, ...] | None = None
    verbs: tuple[str, ...] | None = ("describe", "train", "evaluate")
    columns: Mapping[str, str] | None = None
    min_cohort: int = 3
    demand: tuple[str, ...] = ()
    may_leave: tuple[Telling, ...] = ()
    model_bytes: int | None = 20_000_000_000
    rounds: int | None = 100
    hours: tuple[str, ...] | None = None
    max_bytes: int | None = None
    total_bytes: int | None = None
    ask: Literal["never", "run", "round"] = "run"

    def __post_init__(self) -> None:
        for name in ("min_cohort", "rounds", "max_bytes", "total_bytes"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ConfigError(f"{name} is {number}; it must be 1 or more.")
        if self.model_bytes is not None and self.model_bytes < 0:
            raise ConfigError(f"model_bytes is {self.model_bytes}; it must be 0 (take no base from the coordinator) or more.")
        for digest in self.models or ():
            if not re.fullmatch("[0-9a-f]{32}", digest):
                raise ConfigError(
                    f"models holds {digest!r}, which is no digest of weights. A model is named by 32 hexadecimal digits, because what is published under a "
                    "name can change; a request for a model that is not listed is refused with the model's digest."
                )
        unknown = sorted(set(self.may_leave) - set(KINDS))
        if unknown:
            raise ConfigError(f"may_leave holds {unknown[0]!r}; it is a list of {', '.join(KINDS)}.")
        for window in self.hours or ():
            _window(window)
        if self.ask not in ("never", "run", "round"):
            raise ConfigError(f"ask is {self.ask!r}; it must be never, run or round.")

    @staticmethod
    def open(**rules: Any) -> Policy:
        """A policy that allows everything except what ``rules`` say: an owner of a simulation."""
        free: dict[str, Any] = {"verbs": None, "min_cohort": 1, "may_leave": KINDS, "rounds": None, "ask": "never", "model_bytes": None}
        return Policy(**{**free, **rules})

    def withholds(self, kind: str) -> bool:
        """Whether this may not leave."""
        return kind not in self.may_leave

    def is_open(self, now: datetime) -> bool:
        """Whether requests are taken at this time."""
        return self.hours is None or any(_holds(window, now) for window in self.hours)

    def to_json(self) -> dict[str, Any]:
        """Its rules as plain values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def read_policy(path: Path | str) -> Policy:
    """The policy in a YAML file.

    Raises:
        ConfigError: telling the file, the line, the rule, what was given and what is allowed.
    """
    path = usable(path, "The policy")
    try:
        if path.stat().st_size > _LARGEST:
            raise ConfigError(f"The policy {path} has more than {_LARGEST:,} bytes, which no policy has. Is it another file?")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"There is no policy at {path} (looked from {Path.cwd()}).") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The policy {path} cannot be read: {error}") from error
    return parse_policy(text, str(path))


def parse_policy(text: str, name: str = "policy") -> Policy:
    """The policy that a YAML text describes.

    Raises:
        ConfigError: as :func:`read_policy`.
    """
    return notation.build(Policy, text, name, what="policy")


def read_policies(folder: Path | str) -> dict[ClientId, Policy]:
    """The policies of simulated owners: ``<folder>/<owner>.yaml`` each. An owner without a file is not in the answer.

    Raises:
        ConfigError: if the folder or a file in it is wrong.
    """
    folder = usable(folder, "policies")
    if not folder.is_dir():
        raise ConfigError(
            f"policies is {words.clean(folder, 120)}, which is no folder. It holds a file OWNER.yaml for each owner with a policy."
        )
    return {path.stem: read_policy(path) for path in sorted(folder.glob("*.yaml"))}


def require_known(policies: Iterable[ClientId], owners: Iterable[ClientId]) -> None:
    """Refuses the policy of somebody who is not there, because an owner whose name is misspelt would be without one.

    Raises:
        ConfigError: naming it, and the owners.
    """
    known = sorted(owners)
    unknown = sorted(set(policies) - set(known))
    if unknown:
        raise ConfigError(
            f"There is a policy of {words.clean(unknown[0], 40)!r}, and no owner of that name. The owners are {words.listed(known, 8)}."
        )


def write_policy(policy: Policy) -> str:
    """A policy as YAML, every rule written out; ``parse_policy(write_policy(policy)) == policy``."""
    return notation.write(policy)


def _window(text: str) -> tuple[set[int], int, int]:
    """Days of the week (Monday is 0), and the minutes of the day at which the window opens and closes."""
    match = _WINDOW.fullmatch(text.strip().lower())
    days = [day for day in match.group(1, 2) if day] if match else []
    times = [int(part) for part in match.group(3, 4, 5, 6)] if match else []
    if match is None or not set(days) <= set(_DAYS) or max(times[0], times[2]) > 24 or max(times[1], times[3]) > 59:
        raise ConfigError(
            f"hours holds {text!r:.60}; a window is 'mon-fri 08:00-18:00', 'sat 10:00-12:00' or '22:00-06:00', with days of {', '.join(_DAYS)}."
        )
    first, last = (_DAYS.index(days[0]), _DAYS.index(days[-1])) if days else (0, 6)
    span = {(first + i) % 7 for i in range((last - first) % 7 + 1)}
    return span, 60 * times[0] + times[1], 60 * times[2] + times[3]


def _holds(text: str, now: datetime) -> bool:
    days, begin, end = _window(text)
    minute = 60 * now.hour + now.minute
    if begin < end:
        return now.weekday() in days and begin <= minute < end
    # A window over midnight belongs to the day on which it opens.
    return (now.weekday() in days and minute >= begin) or ((now.weekday() - 1) % 7 in days and minute < end)


OPEN = Policy.open()
