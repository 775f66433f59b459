"""Trains a small pipeline with one fault in it, and tells what every rank saw of it and what it left behind."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipex
from pipex.errors import PeerError
from pipex.plan import communicate
from pipex.runtime import worlds
from pipex.runtime.reference import OneProcess
from pipex.torch_internals import import_compiler
from pipex.transport import device
from pipex.transport.host import HostRun
from pipex.transport.interface import Phase

RANKS = MICROBATCHES = 4
STEPS = 2
WIDTH = 6
SCHEDULES = ("1f1b", "zb-h1")
ALL_SCHEDULES = (*SCHEDULES, "chimera", "pipedream")
"""Those with one copy of the model and an update at the end of a step; one with two copies; one with updates within."""
PEER_FIELDS = ("rank", "step", "stage", "action", "microbatch")

Place = tuple[Any, ...]
"""A point in a rank's life, such as ("at", step, position in its order or Phase) or ("forward", step, micro-batch)."""


# The job: four stages, each on its rank, that ask the saboteur at every seam.


@dataclass
class Saboteur:
    """Does ``deed`` when the victim comes to ``place``, and keeps each rank's diary."""

    diaries: Path
    victim: int
    place: Place
    deed: Callable[[], object]
    rank: int = -1
    forwards: Counter[nn.Module] = field(default_factory=Counter)
    """of each layer, which itself must not change where there are two copies of it"""

    def write(self, **entry: Any) -> None:
        with (self.diaries / str(self.rank)).open("a") as diary:
            diary.write(json.dumps(entry) + "\n")

    def at(self, *place: Any) -> None:
        if self.rank == self.victim and place == self.place:
            self.write(deed=time.monotonic())
            self.deed()


class Layer(nn.Module):
    """A linear layer with a seam in its forward and one in its backward."""

    def __init__(self, saboteur: Saboteur | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self._saboteur = saboteur

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.tanh(self.linear(x))
        if self._saboteur is None:
            return y
        forwards = self._saboteur.forwards[self]
        place = 1 + forwards // MICROBATCHES, forwards % MICROBATCHES
        self._saboteur.forwards[self] += 1
        self._saboteur.at("forward", *place)
        y.register_hook(lambda _: self._saboteur.at("backward", *place))
        return y


class Descent(torch.optim.SGD):
    def __init__(self, parameters: Sequence[nn.Parameter], saboteur: Saboteur) -> None:
        super().__init__(parameters, lr=0.1)
        self._saboteur, self._steps = saboteur, 0

    def step(self) -> None:  # type: ignore[override]
        self._steps += 1
        self._saboteur.at("optimizer", self._steps)
        super().step()


def batch(step: int) -> Tensor:
    return torch.randn(2 * MICROBATCHES, WIDTH, generator=torch.Generator().manual_seed(step))


def layers(saboteur: Saboteur | None = None) -> list[nn.Module]:
    torch.manual_seed(3)
    return [Layer(saboteur) for _ in range(RANKS)]


def digest(module: nn.Module) -> str:
    values = [p.detach().double().flatten().tolist() for p in module.parameters()]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def train(saboteur: Saboteur, schedule: str, checkpoint: str | None) -> str:
    """What every rank runs; returns the digest of its parameters after the last step."""
    world = worlds.current_world()
    publish, losses, steps = world.at, 0, 0
    stages = layers(saboteur)

    def at(step: int, position: int) -> None:
        publish(step, position)
        saboteur.at("at", step, position)

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        nonlocal losses
        losses += 1
        saboteur.at("loss", 1 + (losses - 1) // MICROBATCHES, (losses - 1) % MICROBATCHES)
        return nn.functional.mse_loss(output, target)

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        saboteur.at("factory")
        return Descent(parameters, saboteur)

    world.at = at  # type: ignore[method-assign]
    try:
        plan = pipex.build(schedule, RANKS, MICROBATCHES)
        clip_norm = None if plan.asynchronous else 0.1
        pipeline = pipex.Pipeline(stages, plan, loss_fn, optimizer=optimizer, clip_norm=clip_norm)
        for step in range(1, STEPS + 1):
            pipeline.step(batch(step), batch(step))
            steps = pipeline.steps
            saboteur.at("between", step)
        if checkpoint is not None:
            sync = os.fsync
            os.fsync = lambda descriptor: (saboteur.at("saving", STEPS), sync(descriptor))[1]  # type: ignore[assignment]
            pipeline.save(checkpoint)
        world.close()
        return digest(stages[world.rank])
    except BaseException as error:
        place = [getattr(error, name) for name in PEER_FIELDS] if isinstance(error, PeerError) else None
        saboteur.write(
            error=type(error).__name__, text=str(error), place=place, at=time.monotonic(), steps=steps,
            parameters=digest(stages[world.rank]),
        )  # fmt: skip
        raise


@pytest.fixture(scope="session")
def boundaries() -> list[list[str]]:
    """As ``boundaries_of`` a schedule with one copy of the model."""
    return boundaries_of("zb-h1")


@cache
def boundaries_of(schedule: str) -> list[list[str]]:
    """Per step boundary, from 0 on, the digest of each stage, as one process computes it with plain autograd."""
    plan = pipex.build(schedule, RANKS, MICROBATCHES)
    process = OneProcess(layers(), plan, nn.functional.mse_loss, clip_norm=0.1,
                         optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))  # fmt: skip
    found = [[digest(stage) for stage in process.stages]]
    for step in range(1, STEPS + 1):
        process.step(batch(step), batch(step))
        found.append([digest(stage) for stage in process.stages])
    return found


# The run and its aftermath.


@dataclass
class Aftermath:
    """What became of a run.

    Attributes:
        result: what ``launch`` returned; error: or what it raised.
        diaries: per rank what it wrote down.
        exits: per rank the exit status of its process.
    """

    victim: int
    result: list[str] | None = None
    error: BaseException | None = None
    diaries: list[dict[str, Any]] = field(default_factory=list)
    exits: list[int] = field(default_factory=list)

    @property
    def survivors(self) -> list[dict[str, Any]]:
        return [diary for rank, diary in enumerate(self.diaries) if rank != self.victim]

    def assert_all_name(self, kind: type[PeerError], place: Place, *, within: float = 1.0) -> None:
        """Every survivor, and ``launch``, has raised ``kind`` with this (step, stage, action, micro-batch)."""
        for survivor in self.survivors:
            assert (survivor["error"], survivor["place"]) == (kind.__name__, [self.victim, *place]), survivor["text"]
            assert survivor["at"] - self.diaries[self.victim]["deed"] < within
        assert type(self.error) is kind
        assert [getattr(self.error, name) for name in PEER_FIELDS] == [self.victim, *place]
        assert 0 not in self.exits


def read_diary(path: Path) -> dict[str, Any]:
    """All entries of a diary as one; a key that was written twice would hide something."""
    entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    keys = [key for entry in entries for key in entry]
    assert len(keys) == len(set(keys)), entries
    return {key: value for entry in entries for key, value in entry.items()}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Aftermath]:
    """``run(victim, place, deed)`` trains with a fault and checks every survivor's parameters; with a ``library`` that
    simulates a CUDA driver, through device memory."""
    exits: dict[int, int] = {}
    wait = os.waitpid

    def noting_wait(pid: int, options: int) -> tuple[int, int]:
        ended, status = wait(pid, options)
        if ended:
            exits[ended] = os.waitstatus_to_exitcode(status)
        return ended, status

    monkeypatch.setattr(os, "waitpid", noting_wait)

    def start(
        victim: int, place: Place, deed: Callable[[], object], *, schedule: str = "zb-h1", timeout: float = 60.0,
        checkpoint: Path | None = None, library: Path | None = None,
    ) -> Aftermath:  # fmt: skip
        diaries = Path(tempfile.mkdtemp(prefix="diaries", dir=tmp_path))
        saboteur = Saboteur(diaries, victim, place, deed)
        join = HostRun.join

        def joining(run: HostRun, rank: int, **options: Any) -> Any:
            saboteur.rank = rank
            saboteur.write(pid=os.getpid())
            saboteur.at("join")
            if library is not None:
                return device.join(run, rank, torch.device("cpu"), library=str(library), **options)
            return join(run, rank, **options)

        aftermath = Aftermath(victim)
        with monkeypatch.context() as patch:
            patch.setattr(HostRun, "join", joining)
            try:
                aftermath.result = pipex.launch(
                    train, RANKS, args=(saboteur, schedule, checkpoint and str(checkpoint)), timeout=timeout
                )
            except (Exception, KeyboardInterrupt) as error:
                aftermath.error = error
        aftermath.diaries = [read_diary(diaries / str(rank)) for rank in range(RANKS)]
        aftermath.exits = [exits[diary["pid"]] for diary in aftermath.diaries]
        assert not processes_of(exits)
        exits.clear()
        for rank, diary in enumerate(aftermath.diaries):
            if rank != victim and "error" in diary and schedule != "pipedream":  # which changes weights within a step
                assert diary["parameters"] == boundaries_of(schedule)[diary["steps"]][rank]
        return aftermath

    return start


def orders(schedule: str) -> Iterator[tuple[int, int, str]]:
    """(rank, position, kind) of every action."""
    for rank, order in enumerate(communicate(pipex.build(schedule, RANKS, MICROBATCHES))):
        for position, action in enumerate(order):
            yield rank, position, action.kind.name


def expected(schedule: str, victim: int, place: Place) -> Place:
    """(step, stage, action, micro-batch) by which a rank at ``place`` must be named."""
    kind, *numbers = place
    if kind == "at":
        step, position = numbers
        if position < 0:
            return step or None, None, Phase(position).name.lower(), None
        action = communicate(pipex.build(schedule, RANKS, MICROBATCHES))[victim][position]
        return step, action.stage, str(action), action.microbatch
    if kind in ("forward", "loss", "backward"):
        step, microbatch = numbers
        letter = "F" if kind != "backward" else "I" if schedule == "zb-h1" else "B"
        return step, victim, f"{victim}{letter}{microbatch}", microbatch
    phase = {"join": "setup", "factory": "setup", "between": "idle"}.get(kind, kind)
    return numbers[0] if numbers else None, None, phase, None


# Nothing may be left behind.


def processes_of(groups: Iterable[int]) -> set[int]:
    """Children of this process, zombies too, and living processes of these process groups.

    Not multiprocessing's resource tracker, which lives as long as this process once a test has spawned anything.
    """
    wanted, found = set(groups), set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
                if b"resource_tracker" in (entry / "cmdline").read_bytes():
                    continue
            except (FileNotFoundError, ProcessLookupError):
                continue
            state, parent, group = stat.rpartition(") ")[2].split()[:3]
            if int(parent) == os.getpid() or (int(group) in wanted and state != "Z"):
                found.add(int(entry.name))
    return found


def _belongings() -> dict[str, set[str]]:
    return {
        "processes": {str(process) for process in processes_of(())},
        "descriptors": set(os.listdir("/proc/self/fd")),
        "shared memory": set(os.listdir("/dev/shm")),
        "temporary files": set(os.listdir(tempfile.gettempdir())),
    }


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Around every test: it leaves no process, descriptor, shared memory or temporary file."""
    own = tmp_path / "temporary"
    own.mkdir()
    monkeypatch.setenv("TMPDIR", str(own))
    monkeypatch.setattr(tempfile, "tempdir", None)
    # One thread for each rank, whatever the machine: the ranks are forked, and so import nothing.
    monkeypatch.setattr(worlds, "threads_per_rank", lambda ranks: 1)
    before = _belongings()
    yield
    assert _belongings() == before


@pytest.fixture(autouse=True, scope="session")
def _import_once() -> None:
    """What a rank would import first thing is imported before any rank is forked."""
    import_compiler()


# Deeds.


def sigkill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sigstop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def leave() -> None:
    os._exit(0)


def complain() -> None:
    raise ArithmeticError("the loss is not finite\nin micro-batch 3")
