"""Ctrl-C, once and twice, and the death of the launcher itself. The launcher is a child of the test."""

from __future__ import annotations

import os
import re
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn

import pipex
from pipex import cli
from pipex.runtime import worlds
from pipex.state import Checkpoint
from tests.faults.conftest import MICROBATCHES, RANKS, batch, layers, processes_of

pytestmark = pytest.mark.timing

INTERRUPTED = 130  # exit code by convention: 128 + SIGINT
PATIENCE = 30.0  # seconds to wait for what must happen; only a broken run takes so long


Main = Callable[[int], int | None]
"""Gets the descriptor to write to; returns the exit code."""


class Launcher:
    """A forked process that runs ``main``; it and its ranks write lines to one pipe, which ends when all are gone."""

    def __init__(self, main: Main) -> None:
        self._reader, writer = os.pipe()
        self._text = b""
        self._ended = False
        self._ranks: list[int] = []  # process descriptors
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                status = main(writer) or 0
            except KeyboardInterrupt:
                say(writer, "launcher KeyboardInterrupt")
                status = INTERRUPTED
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(writer)

    def lines(self, count: int) -> list[str]:
        """The next ``count`` lines, sorted."""
        while self._text.count(b"\n") < count:
            assert self._more(PATIENCE), f"the run ended after {self._text!r}"
        *lines, self._text = self._text.split(b"\n", count)
        return sorted(line.decode() for line in lines)

    def ranks(self) -> list[int]:
        """The process ids of the ranks, once all have said "started <process id>"."""
        pids = [int(line.removeprefix("started ")) for line in self.lines(RANKS)]
        self._ranks = [os.pidfd_open(pid) for pid in pids]
        return pids

    def rest(self, seconds: float) -> list[str]:
        """All further lines, sorted; every process of the run must be gone within ``seconds``."""
        deadline = time.monotonic() + seconds
        while self._more(deadline - time.monotonic()):
            pass
        for rank in self._ranks:
            assert select.select([rank], [], [], max(0.0, deadline - time.monotonic()))[0], "a rank is still there"
        return sorted(self._text.decode().splitlines())

    def exit_code(self) -> int:
        self._ended = True
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        os.close(self._reader)
        for rank in self._ranks:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(rank, signal.SIGKILL)
            os.close(rank)
        if not self._ended:
            os.kill(self.pid, signal.SIGKILL)
            self.exit_code()

    def _more(self, seconds: float) -> bytes:
        ready, _, _ = select.select([self._reader], [], [], max(0.0, seconds))
        assert ready, f"processes of the run are still there; they have said {self._text!r}"
        piece = os.read(self._reader, 4096)
        self._text += piece
        return piece


@pytest.fixture
def start() -> Iterator[Callable[..., Launcher]]:
    started: list[Launcher] = []

    def begin(main: Main) -> Launcher:
        started.append(Launcher(main))
        return started[-1]

    yield begin
    for launcher in started:
        launcher.close()


def say(writer: int, text: str) -> None:
    os.write(writer, f"{text}\n".encode())


def train_for_ever(writer: int, before: Callable[[], object] = lambda: None) -> None:
    """Every rank says "started <process id>" in its third step, and how it ended."""

    def rank() -> None:
        before()
        try:
            pipeline = pipex.Pipeline(
                layers(), pipex.build("zb-h1", RANKS, MICROBATCHES), nn.functional.mse_loss,
                optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            )  # fmt: skip
            while True:
                pipeline.step(batch(0), batch(0))
                if pipeline.steps == 3:
                    say(writer, f"started {os.getpid()}")
        except BaseException as error:
            say(writer, f"rank {worlds.current_world().rank} {type(error).__name__}")
            raise

    pipex.launch(rank, RANKS)


def wait_for_ever(writer: int, at_first: Callable[[], object] = lambda: None) -> None:
    """Every rank says "started <process id>" before it talks to any other."""

    def rank() -> None:
        if worlds.current_world().rank == 0:
            at_first()
        say(writer, f"started {os.getpid()}")
        threading.Event().wait()

    pipex.launch(rank, RANKS)


@pytest.mark.parametrize("main", [train_for_ever, wait_for_ever])
def test_a_killed_launcher_takes_its_ranks_along(start: Callable[..., Launcher], main: Main) -> None:
    launcher = start(main)
    ranks = launcher.ranks()
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.rest(2.0)
    assert launcher.exit_code() == -signal.SIGKILL
    assert not processes_of(ranks)


def test_ctrl_c_is_a_keyboard_interrupt_on_every_rank_and_in_the_launcher(start: Callable[..., Launcher]) -> None:
    launcher = start(train_for_ever)
    ranks = launcher.ranks()
    os.kill(launcher.pid, signal.SIGINT)
    ended = launcher.rest(5.0)
    assert ended == ["launcher KeyboardInterrupt", *(f"rank {rank} KeyboardInterrupt" for rank in range(RANKS))]
    assert launcher.exit_code() == INTERRUPTED
    assert not processes_of(ranks)


def test_a_second_ctrl_c_kills_ranks_that_ignore_the_first(start: Callable[..., Launcher]) -> None:
    def ignore(writer: int) -> None:
        train_for_ever(writer, before=lambda: signal.signal(signal.SIGINT, lambda *_: say(writer, "ignored")))

    launcher = start(ignore)
    ranks = launcher.ranks()
    os.kill(launcher.pid, signal.SIGINT)
    assert launcher.lines(RANKS) == ["ignored"] * RANKS
    os.kill(launcher.pid, signal.SIGINT)
    assert launcher.rest(2.0) == ["launcher KeyboardInterrupt"]
    assert launcher.exit_code() == INTERRUPTED
    assert not processes_of(ranks)


def test_ctrl_c_while_ranks_are_being_started_ends_them_all(start: Callable[..., Launcher]) -> None:
    """Sent by rank 0 as soon as it runs, when the others may not have been forked yet."""

    def interrupt_early(writer: int) -> None:
        launcher = os.getpid()
        wait_for_ever(writer, at_first=lambda: os.kill(launcher, signal.SIGINT))

    launcher = start(interrupt_early)
    assert launcher.rest(5.0)[0] == "launcher KeyboardInterrupt"
    assert launcher.exit_code() == INTERRUPTED


def test_pipex_train_stops_at_a_step_boundary_and_saves(start: Callable[..., Launcher], tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    sizes = {"ranks": 2, "microbatches": 2, "batch": 4, "context": 8, "width": 8, "heads": 2, "layers": 3}
    command = ["train", str(text), *(f"--{name}={value}" for name, value in sizes.items())]

    def train(writer: int) -> int:
        os.dup2(writer, sys.stderr.fileno())
        return cli.main([*command, "--steps", "1000000", "--save", str(tmp_path / "interrupted")])

    launcher = start(train)
    while not launcher.lines(1)[0].startswith("step     1 "):
        pass
    os.kill(launcher.pid, signal.SIGINT)
    said = " ".join(launcher.rest(10.0))
    assert launcher.exit_code() == INTERRUPTED
    match = re.search(r"stopped at step (\d+); the checkpoint is in (\S+)", said)
    assert match is not None, said
    assert match[2] == str(tmp_path / "interrupted")

    assert cli.main([*command, "--steps", match[1], "--save", str(tmp_path / "uninterrupted")]) == 0
    interrupted, uninterrupted = (Checkpoint.open(tmp_path / name) for name in ("interrupted", "uninterrupted"))
    assert interrupted.step == uninterrupted.step == int(match[1])
    assert interrupted.tensors == uninterrupted.tensors
    found, expected = interrupted.load(interrupted.tensors), uninterrupted.load(uninterrupted.tensors)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
