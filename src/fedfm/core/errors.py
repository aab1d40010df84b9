"""What can go wrong, as a tree.

::

    FedfmError                     everything a user can meet; the command line exits with code 2
    ├── ConfigError                a recipe or a part's hyperparameters cannot mean what they say
    │   ├── PlanError              each part is fine, together they are not (``fedfm check``)
    │   └── PrivacyError           a privacy guarantee that is asked for cannot be named
    ├── MissingExtra               an optional dependency is not installed
    ├── DataError                  a file, row, column or owner is unusable
    │   └── RowError               one row is unusable; it may be left out and counted (``data.bad_rows``)
    ├── ModelError                 a model, tokenizer or adapter does not load or does not fit
    ├── MessageError               bytes that crossed a boundary are not a valid message
    ├── PolicyError                an owner's policy refuses what was asked, or what would leave
    ├── WireError                  the network or the broker does not do what is asked
    ├── RoundError                 a round could not be completed under the recipe's rule
    └── RunError                   a run folder cannot be written, resumed or read

A message says what was wrong, the value, why it matters, and what to do.
``assert`` is for our own mistakes; these are for the user's.
"""

from __future__ import annotations


class FedfmError(Exception):
    """Base of every error a user can meet."""


class ConfigError(FedfmError):
    """A recipe or a part's hyperparameters cannot mean what they say."""


class PlanError(ConfigError):
    """Each part is fine alone; together they are not."""


class PrivacyError(ConfigError):
    """A privacy guarantee that is asked for cannot be named, so nothing is promised."""


class MissingExtra(FedfmError):
    """An optional dependency is needed and absent."""

    def __init__(self, package: str, extra: str, why: str) -> None:
        super().__init__(f"{why} needs the package {package!r}, which is not installed. Remedy: pip install 'fedfm[{extra}]'")


class DataError(FedfmError):
    """A file, row, column or owner is unusable."""


class RowError(DataError):
    """One row is unusable; the others may be fine.

    Args:
        text: What is wrong with it.
        kind: A key of :data:`fedfm.core.bad_rows.KINDS`.
        place: Where it was read (``path:line``).
    """

    def __init__(self, text: str, kind: str, place: str) -> None:
        super().__init__(text)
        self.kind, self.place = kind, place


class ModelError(FedfmError):
    """A model, tokenizer or adapter does not load or does not fit."""


class MessageError(FedfmError):
    """Bytes that crossed a boundary are not a valid message."""


class PolicyError(FedfmError):
    """An owner's policy refuses what was asked, or what would leave.

    Args:
        rule: The rule that refuses, as the policy's file calls it.
        why: What it allows, and what was asked.
    """

    def __init__(self, rule: str, why: str) -> None:
        super().__init__(f"its owner's policy refuses (rule {rule!r}): {why}")
        self.rule, self.why = rule, why


class WireError(FedfmError):
    """The network or the broker does not do what is asked."""


class RoundError(FedfmError):
    """A round could not be completed under the recipe's rule."""


class RunError(FedfmError):
    """A run folder cannot be written, resumed or read."""
