"""Bodies that run in processes of their own, and what became of them."""

from __future__ import annotations

import json
import os
import select
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from pipex.errors import PeerError


class Forked:
    """Forked processes; all are gone when the block ends."""

    def __init__(self, bodies: Sequence[Callable[[], Any]]) -> None:
        self.pids: list[int] = []
        self._pipes: list[int] = []
        for body in bodies:
            reader, writer = os.pipe()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on forking with threads around
                pid = os.fork()
            if pid == 0:
                try:
                    os.write(writer, json.dumps(outcome_of(body)).encode())
                finally:
                    os._exit(0)
            os.close(writer)
            self.pids.append(pid)
            self._pipes.append(reader)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        for pid, pipe in zip(self.pids, self._pipes, strict=True):
            os.close(pipe)
            os.kill(pid, signal.SIGKILL)  # ours, and not reaped before this
            os.waitpid(pid, 0)

    def outcome(self, number: int, seconds: float = 30.0) -> dict[str, Any]:
        """What a body returned (``result``) or raised (``error``, ``text``, a PeerError's ``rank``); empty if it was
        killed, ``{"hung": True}`` if it has not ended."""
        text = b""
        deadline = time.monotonic() + seconds
        while select.select([self._pipes[number]], [], [], max(0.0, deadline - time.monotonic()))[0]:
            piece = os.read(self._pipes[number], 65_536)
            if not piece:
                return json.loads(text) if text else {}
            text += piece
        return {"hung": True}


def outcome_of(body: Callable[[], Any]) -> dict[str, Any]:
    """What ``Forked.outcome`` says of a body that was run to its end."""
    try:
        return {"result": body(), "at": time.monotonic()}
    except BaseException as error:
        seen = {"error": type(error).__name__, "text": str(error), "at": time.monotonic()}
        if isinstance(error, PeerError):
            seen |= {name: getattr(error, name) for name in ("rank", "step", "action", "stage", "microbatch")}
        return seen


def outcomes(bodies: Sequence[Callable[[], Any]], seconds: float = 30.0) -> list[dict[str, Any]]:
    """The outcome of every body, all run at once."""
    with Forked(bodies) as forked:
        return [forked.outcome(number, seconds) for number in range(len(bodies))]
