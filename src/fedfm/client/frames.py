"""Messages as bytes on a pipe: eight bytes of length, little endian, then the message.

The same two ends serve a blocking descriptor (a client's) and a non-blocking one (the server's).
A length is checked before anything of that size is buffered.
"""

from __future__ import annotations

import os
from collections import deque

from fedfm.core.errors import MessageError

_LENGTH = 8


class Inbox:
    """The frames that arrive on a descriptor.

    Args:
        fd: Open for reading.
        max_bytes: The longest frame that is accepted.
    """

    def __init__(self, fd: int, max_bytes: int) -> None:
        self.fd, self.max_bytes = fd, max_bytes
        self._length, self._filled = bytearray(_LENGTH), 0
        self._body: bytearray | None = None

    @property
    def announced(self) -> int:
        """Bytes of the frame that is arriving; 0 while none is."""
        return 0 if self._body is None else len(self._body)

    def receive(self) -> bytearray | None:
        """The next frame, or ``None`` if it is not complete yet (never on a blocking descriptor).

        Raises:
            EOFError: if the other end has closed.
            MessageError: if the frame claims to be longer than ``max_bytes``; nothing after that can be read.
        """
        if self._body is None:
            if not self._fill(self._length):
                return None
            size = int.from_bytes(self._length, "little")
            if size > self.max_bytes:
                raise MessageError(f"A message of {size} bytes was announced where at most {self.max_bytes} are allowed.")
            self._body = bytearray(size)
        if not self._fill(self._body):
            return None
        body, self._body = self._body, None
        return body

    def _fill(self, buffer: bytearray) -> bool:
        while self._filled < len(buffer):
            try:
                n = os.readv(self.fd, [memoryview(buffer)[self._filled :]])
            except BlockingIOError:
                return False
            if n == 0:
                raise EOFError
            self._filled += n
        self._filled = 0
        return True


class Outbox:
    """The frames that wait to leave by a descriptor.

    Args:
        fd: Open for writing.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._waiting: deque[memoryview] = deque()

    def send(self, *parts: bytes) -> None:
        """Adds a frame made of these parts, none of which is copied; :meth:`flush` writes it."""
        self._waiting.append(memoryview(sum(map(len, parts)).to_bytes(_LENGTH, "little")))
        self._waiting += [memoryview(part) for part in parts if part]

    def flush(self) -> bool:
        """Writes what fits. Returns whether nothing is left to write.

        Raises:
            BrokenPipeError: if the other end has closed.
        """
        while self._waiting:
            try:
                n = os.write(self.fd, self._waiting[0])
            except BlockingIOError:
                return False
            self._waiting[0] = self._waiting[0][n:]
            if not self._waiting[0]:
                self._waiting.popleft()
        return True
