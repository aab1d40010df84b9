"""A client as a process of its own: ``python -m fedfm.client.worker``, frames in at stdin, frames out at stdout.

Its first message says who it is: the plan as text, the folder of its own data, the folder in which it keeps its
memory, the run's key. It opens no other owner's data, answers one request after the other, and ends with its parent.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any

from fedfm.client.frames import Inbox, Outbox

if TYPE_CHECKING:
    from fedfm.client.runtime import Runtime

# A message's header is at most 1 MiB, and the first message has no tensors.
_MAX_HELLO = 2 << 20

log = logging.getLogger(__name__)


def serve(incoming: int, outgoing: int) -> None:
    """Answers the frames that arrive at one descriptor with frames to the other, as long as the process lives."""
    from fedfm.core.errors import MessageError
    from fedfm.core.messages import Failure, Message, Reply, Request, pack, unpack

    inbox, outbox = Inbox(incoming, _MAX_HELLO), Outbox(outgoing)

    def send(message: Message) -> None:
        outbox.send(pack(message))
        outbox.flush()

    hello = unpack(memoryview(inbox.receive() or b""))
    assert isinstance(hello, Request)
    client, inbox.max_bytes = str(hello.meta["client"]), int(hello.meta["max_bytes"] or 0)
    # The queue is short, so a server that sends faster than the client answers waits at the pipe.
    frames: Queue[bytearray] = Queue(maxsize=2)
    threading.Thread(target=_read, args=(inbox, frames), daemon=True).start()
    try:
        runtime = _runtime(client, hello.meta)
    except Exception as error:
        log.exception("could not start")
        send(Failure(client, "start", _line(error)))
        return
    send(Reply(client, hello.verb, hello.round))
    while True:
        verb = "exchange"
        try:
            request = unpack(memoryview(frames.get()))
            if not isinstance(request, Request):
                raise MessageError("something else than a request arrived.")
            verb = request.verb
            (answer,) = runtime.handle({client: request})
        except Exception as error:
            log.exception("%s failed", verb)
            answer = Failure(client, verb, _line(error))
        send(answer)


def _runtime(client: str, hello: Mapping[str, Any]) -> Runtime:
    import torch

    from fedfm import notation
    from fedfm.client.house import House
    from fedfm.client.plan import ClientPlan
    from fedfm.client.policy import parse_policy
    from fedfm.client.runtime import Runtime
    from fedfm.core.keys import Key
    from fedfm.data import Shard

    # The order in which a sum is taken, and so its last bits, depends on the number of threads.
    torch.set_num_threads(hello["threads"])
    data = Path(hello["data"])
    house = House(
        plan=notation.build(ClientPlan, hello["plan"], "plan"),
        shards={client: data},
        labels=Shard.open(data).labels,
        key=Key(bytes.fromhex(hello["key"])),
        num_clients=hello["num_clients"],
        cohort_size=hello["cohort_size"],
        num_rounds=hello["num_rounds"],
        device=hello["device"],
        folder=Path(hello["folder"]),
        choices=json.loads(hello["choices"]),
        policies={client: parse_policy(hello["policy"])} if hello["policy"] else {},
        run=hello["run"],
    )
    runtime = Runtime(house)
    # The model is loaded now, so that a failure to load is a failure to start, not one of the first round.
    house.bank  # noqa: B018
    return runtime


def _read(inbox: Inbox, frames: Queue[bytearray]) -> None:
    """Takes frames off the pipe while the client works, so that it is known at once when the parent is gone."""
    try:
        while True:
            frames.put(inbox.receive() or bytearray())
    except Exception as error:
        # Whatever the client has written is durable; there is nobody left to answer.
        log.info("the server is gone: %r", error)
        os._exit(0 if isinstance(error, EOFError) else 1)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def main() -> None:
    """Serves on stdin and stdout, which from then on are closed to everything else: what is printed goes to the log."""
    incoming, outgoing = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    log.info("started, process %d", os.getpid())
    serve(incoming, outgoing)


if __name__ == "__main__":
    main()
