"""What ranks do when one of them dies, stops or raises while the streams of the others wait for it."""

from __future__ import annotations

import json
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from machines import machine_of

import pipex
from pipex.errors import PeerError
from pipex.transport.interface import EdgeSpec

DIGEST = bytes(range(16))
HELD = 6.0
"""Seconds for which the culprit's GPU does not come to the message that its host has announced: longer than any limit,
and short enough for its process to end in time."""
FATES = ("killed", "stopped", "raises")


def stand_still(fate: str, notes: str, library: str | None) -> None:
    """Rank 1 announces messages that its GPU does not send, then meets its fate; the streams of ranks 0 and 2 wait.

    Those note what they were told and when, how long their streams took to drain, and whether their GPU works. Rank 2
    has enqueued more behind its wait than a hardware queue takes: there the host hangs in the driver itself.
    """
    world: Any = pipex.current_world()
    gpu = machine_of(world, library)
    specs = [EdgeSpec(source, to, "activation", source, to, 2, 1) for source, to in [(1, 0), (1, 2), (0, 1), (2, 1)]]
    links = world.open(specs, DIGEST)
    ones = torch.ones(256, 256, device=world.device)
    for message in range(2):  # the first one makes room for what comes after it
        for sender in links.senders.values():
            sender.send(0, message, [ones])
        for receiver in links.receivers.values():
            receiver.receive(0, message)
    assert bool((ones @ ones == 256).all())  # what that loads is loaded
    gpu.synchronize()
    world.exchange(b"")
    if world.rank == 1:
        with gpu.on(gpu.stream()):
            gpu.hold(3.0 if fate == "raises" else HELD)
            for sender in links.senders.values():
                sender.send(1, 0, [ones])
        world.exchange(b"")
        time.sleep(0.3)  # now the others' streams wait
        write(notes, 1, at=time.monotonic())
        if fate == "raises":
            raise ArithmeticError("the loss is not finite")
        os.kill(os.getpid(), signal.SIGKILL if fate == "killed" else signal.SIGSTOP)
    (sender,), (receiver,) = links.senders.values(), links.receivers.values()
    world.exchange(b"")
    try:
        sender.send(1, 0, [ones])
        (received,) = receiver.receive(1, 0)
        product = received @ received
        if world.rank == 2:
            gpu.crowd(product)
        gpu.synchronize()
        world.exchange(b"")
    except PeerError as error:
        told = time.monotonic()
        gpu.synchronize()
        drained = time.monotonic()
        works = bool((ones @ ones == 256).all())
        write(notes, world.rank, error=type(error).__name__, text=str(error), of=error.rank, at=told,
              drained=drained, works=works)  # fmt: skip
        raise


def send_more_than_there_is(notes: str, library: str | None) -> None:
    """Rank 1 would need more memory for a message in each slot than its GPU has."""
    world: Any = pipex.current_world()
    free = int(world.exchange(str(machine_of(world, library).free_memory()).encode())[0])
    slots = 1000
    links = world.open([EdgeSpec(0, 1, "activation", 0, 1, slots - 1, 1)], DIGEST)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for sender in links.senders.values():
            sender.send(1, 0, [torch.full((2 * free // slots,), 7, dtype=torch.uint8, device=world.device)])
        arrived = [receiver.receive(1, 0)[0] for receiver in links.receivers.values()]
    right = [bool((tensor == 7).all()) and tensor.numel() == 2 * free // slots for tensor in arrived]
    write(notes, world.rank, told=[str(warning.message) for warning in told], right=right)
    world.exchange(b"")


def write(notes: str, rank: int, **note: Any) -> None:
    Path(notes, str(rank)).write_text(json.dumps(note))


def read(notes: Path, rank: int) -> dict[str, Any]:
    """What a rank has noted; nothing if it did not come to that."""
    path = notes / str(rank)
    note: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return note
