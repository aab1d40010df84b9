"""What a coordinator leaves for a member that was too late: which requests of a run are over, and why.

The note lies at the broker in the member's own branch, under the run's name. The member reads it before it works on a request, and again before it sends an
answer, so a member that comes back after its deadline spends no work on a round that is over, and its owner reads why it was left out.

Covered here: a note is signed and sealed like every message. Not covered: a broker that withholds it; the member works for nothing then, and its
answer is late.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from fedfm.core import words
from fedfm.core.errors import MessageError
from fedfm.core.messages import Request

OVER = "over"
"""The kind of such a note."""


@dataclass(frozen=True)
class Over:
    """A request that nobody waits for any more, and with it all earlier ones of the run.

    Args:
        round: Its round.
        verb: What was asked.
        why: The reason, in words.
    """

    round: int
    verb: str
    why: str

    @staticmethod
    def deadline(request: Request) -> Over:
        """A request that was not answered in time."""
        return Over(request.round, request.verb, "the recipe's deadline passed, and the round went on without it")

    @staticmethod
    def abandoned(request: Request) -> Over:
        """A request whose answer is not needed any more."""
        return Over(request.round, request.verb, "the coordinator did not wait for more answers")

    @staticmethod
    def session(round: int) -> Over:
        """All that was asked before the coordinator started anew."""
        return Over(round, "", "the coordinator started anew, and asks again")

    def pack(self) -> bytes:
        """As it travels."""
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def unpack(data: bytes) -> Over:
        """Undoes :meth:`pack`.

        Raises:
            MessageError: if it is something else.
        """
        try:
            values = json.loads(data)
            over = Over(values["round"], values["verb"], values["why"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise MessageError(f"A note that a round is over cannot be read ({type(error).__name__}).") from error
        if type(over.round) is not int or not isinstance(over.verb, str) or not isinstance(over.why, str):
            raise MessageError("A note that a round is over has a field of the wrong kind.")
        return Over(over.round, words.clean(over.verb, 80), words.clean(over.why, 200))


def over_id(job: str) -> str:
    """Under which id the note of a run lies."""
    return hashlib.blake2b(job.encode(), digest_size=16, person=b"fedfm over").hexdigest()
