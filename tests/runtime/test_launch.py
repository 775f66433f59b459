"""``pipex.launch``: where ranks run, what comes back, and how failures come back."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import outcomes

import pipex
from pipex.errors import InputError, NativeUnavailable, PeerFailed, PeerLost, PeerStalled
from pipex.runtime import worlds


@pytest.fixture(autouse=True)
def _forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread for each rank, whatever the machine: then the ranks are forked and run any function."""
    monkeypatch.setattr(worlds, "threads_per_rank", lambda ranks: 1)


def place(scale: int = 1) -> list[int]:
    world = pipex.current_world()
    return [world.rank * scale, world.ranks]


def parent() -> list[int]:
    return [os.getppid(), os.getpgid(0) == os.getpid(), torch.get_num_threads()]


def test_one_rank_runs_here() -> None:
    assert pipex.launch(lambda: [*place(), os.getpid()], 1) == [[0, 1, os.getpid()]]


@pytest.mark.parametrize("ranks", [2, 3])
def test_returns_every_ranks_result_in_order(ranks: int) -> None:
    assert pipex.launch(place, ranks, args=(10,)) == [[rank * 10, ranks] for rank in range(ranks)]


def test_ranks_are_children_in_groups_of_their_own_with_their_share_of_threads() -> None:
    assert pipex.launch(parent, 2) == [[os.getpid(), True, 1]] * 2


def test_a_forked_rank_runs_any_function_and_sees_what_was_there() -> None:
    here = object()
    assert pipex.launch(lambda: id(here), 2) == [id(here)] * 2


@pytest.mark.parametrize("ranks", [0, -1, None, 2.5, "2", 4097, 1 << 40])
def test_a_number_of_ranks_that_cannot_be(ranks: Any) -> None:
    with pytest.raises(InputError) as error:
        pipex.launch(place, ranks)
    assert str(error.value) == f"launch needs a number of ranks; got {ranks!r}; needed a whole number, 1 to 4096"


@pytest.mark.parametrize("timeout", [0, -1.0, "5", None, float("nan"), float("inf"), 1e300])
def test_a_limit_that_cannot_be(monkeypatch: pytest.MonkeyPatch, timeout: Any) -> None:
    with pytest.raises(
        InputError, match=f"a time-out is out of range; got {re.escape(repr(timeout))}; needed seconds above 0"
    ):
        pipex.launch(place, 2, timeout=timeout)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=f"a time-out is out of range; got {re.escape(repr(timeout))}"):
        pipex.launch(place, timeout=timeout)


def test_this_process_is_no_rank_afterwards() -> None:
    pipex.launch(place, 2)
    assert (pipex.current_world().rank, pipex.current_world().ranks) == (0, 1)


def test_a_result_larger_than_a_pipe() -> None:
    assert pipex.launch(lambda: "x" * (1 << 20), 2) == ["x" * (1 << 20)] * 2


def test_works_beside_the_main_thread() -> None:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(pipex.launch(place, 2)))
    thread.start()
    thread.join()
    assert results == [[[0, 2], [1, 2]]]


def test_the_callers_handler_of_ctrl_c_is_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    pipex.launch(place, 2)
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_result_that_is_no_json_names_its_type() -> None:
    with pytest.raises(PeerFailed, match="TypeError: Object of type set is not JSON serializable"):
        pipex.launch(lambda: {1}, 2)


def test_the_exception_and_its_traceback_come_back(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        if pipex.current_world().rank == 1:
            raise KeyError("missing")
        pipex.current_world().exchange(b"")

    with pytest.raises(PeerFailed, match="rank 1 failed: KeyError: 'missing'") as caught:
        pipex.launch(fail, 2)
    assert (caught.value.rank, caught.value.remote) == (1, "KeyError: 'missing'")
    said = capfd.readouterr().err
    assert "pipex rank 1 failed:\nTraceback" in said
    assert "pipex rank 0: PeerFailed: rank 1 failed: KeyError: 'missing'" in said


def test_an_exception_that_cannot_be_printed_still_has_a_type() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    def fail() -> None:
        raise Mute

    with pytest.raises(PeerFailed, match=r"Mute: .*cannot be printed"):
        pipex.launch(fail, 2)


@pytest.mark.parametrize(
    ("end", "how"),
    [
        (lambda: os._exit(0), "exited with code 0"),
        (lambda: os._exit(7), "exited with code 7"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "killed by SIGSEGV"),
        (lambda: os.abort(), "killed by SIGABRT"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), "killed by SIGTERM"),
    ],
)
def test_a_rank_that_ends_without_a_word_is_lost_however_it_ends(end: Any, how: str) -> None:
    with pytest.raises(PeerLost, match=f"rank 0 is gone: {how}"):
        pipex.launch(end, 2)  # none is left to say it


def test_a_rank_that_is_killed_while_it_reports_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(self: Connection, data: bytes) -> None:
        write(self, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    write = Connection._send  # type: ignore[attr-defined]
    monkeypatch.setattr(Connection, "_send", half)
    with pytest.raises(PeerLost, match="rank 0 is gone: killed by SIGKILL"):
        pipex.launch(place, 2)


def test_a_rank_that_is_done_does_not_succeed_when_another_has_failed(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        world: Any = pipex.current_world()
        if world.rank == 1:
            raise ValueError("at the very end")
        while not world._control.aborted:
            os.sched_yield()

    with pytest.raises(PeerFailed):
        pipex.launch(fail, 2)
    assert "pipex rank 0: PeerFailed: rank 1 failed: ValueError: at the very end" in capfd.readouterr().err


# What ranks may own: no socket, no file under any name, and no descriptor of the test but what they were given.


def belongings() -> list[str]:
    pipex.current_world().exchange(b"")
    targets = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            targets.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:  # that of the listing itself
            continue
    with open("/proc/self/maps") as maps:
        return targets + [line.split()[-1] for line in maps if "/dev/shm" in line]


def test_ranks_open_no_socket_and_no_named_memory() -> None:
    inherited = {os.readlink(f"/proc/self/fd/{d}") for d in os.listdir("/proc/self/fd") if d.isdigit() and _is_open(d)}
    for owned in pipex.launch(belongings, 3):
        opened = [target for target in owned if target not in inherited]
        assert [t for t in opened if t.startswith(("socket:", "/dev/shm")) or "tmp" in t] == []
        assert any(target.startswith("/memfd:pipex") for target in owned)


def _is_open(descriptor: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{descriptor}")


# On GPUs.


def test_a_gpu_that_is_not_there_is_named_before_any_rank_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for ranks in (1, 2):
        with pytest.raises(NativeUnavailable, match="the ranks are to compute on GPUs and there is none"):
            pipex.launch(pytest.fail, ranks, device="cuda")


def test_a_device_of_another_kind_is_refused() -> None:
    with pytest.raises(InputError, match="no such device; got 'tpu'"):
        pipex.launch(pytest.fail, 2, device="tpu")


def test_ranks_share_gpus_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert [str(worlds.device_of("cuda", rank)) for rank in range(5)] == [f"cuda:{gpu}" for gpu in (0, 1, 2, 0, 1)]


# Started afresh.


LOCAL = r"test_[a-z_]*\.<locals>\.<lambda>"


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads for each rank, and another thread in this process: a fork might hang, so ranks are spawned."""
    monkeypatch.setattr(worlds, "threads_per_rank", lambda ranks: 2)
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    yield
    stop.set()
    thread.join()


@pytest.mark.usefixtures("threads")
def test_ranks_are_started_afresh_where_a_fork_could_hang() -> None:
    for command in pipex.launch(Path("/proc/self/cmdline").read_text, 2):
        assert "multiprocessing.spawn" in command


def refused(call: Any) -> str:
    before = set(multiprocessing.active_children())  # ranks of other tests, which stay
    with pytest.raises(InputError) as caught:
        call()
    assert set(multiprocessing.active_children()) == before
    return str(caught.value)


@pytest.mark.usefixtures("threads")
def test_what_ranks_that_are_started_afresh_cannot_import_is_named_before_any_starts() -> None:
    here, local = threading.Lock(), lambda: 1
    for call, got, fix in (
        (lambda: pipex.launch(local, 2), rf"{LOCAL}: Can't (pickle|get) local object .*", "put it into a module"),
        (lambda: pipex.launch(place, 2, args=(here,)), "place with its arguments: cannot pickle '_thread.lock' object",
         "pass what pickle can hold"),
    ):  # fmt: skip
        said = refused(call)
        assert said.startswith("launch has to start its ranks afresh, since this process has other threads (Thread-")
        assert re.search(f"; got {got}; needed a function at the top of a module", said), said
        assert said.endswith(f"{fix}, or launch before threads are started")


def test_threads_are_not_blamed_where_it_is_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    local = lambda: 1  # noqa: E731
    for said in (
        refused(lambda: pipex.launch(local, 2)), refused(lambda: pipex.launch(place, 2, args=(threading.Lock(),)))
    ):  # fmt: skip
        assert "since CUDA is in use in this process" in said
        assert "launch before threads" not in said


def put(queue: Any, done: Any, lock: Any, tensor: torch.Tensor, pipe: Connection) -> None:
    with lock:
        queue.put(tensor.sum().item())
        pipe.send(pipex.current_world().rank)
    done.wait(60)


@pytest.mark.usefixtures("threads")
def test_what_processes_share_may_be_given_to_ranks_that_are_started_afresh() -> None:
    context = multiprocessing.get_context("spawn")
    queue, done, lock = context.Queue(), context.Event(), context.Lock()
    ours, theirs = context.Pipe(duplex=False)
    threads = threading.active_count()
    done.set()
    assert pipex.launch(put, 2, args=(queue, done, lock, torch.ones(3), theirs)) == [None, None]
    assert [queue.get(timeout=60) for _ in range(2)] == [3, 3]
    assert {ours.recv() for _ in range(2)} == {0, 1}
    assert threading.active_count() == threads  # no server for what was pickled


PROGRAM = """
import os, threading
os.sched_getaffinity = lambda process: set(range(8))  # as on a machine of 8 cores: several threads for each rank
import pipex
from pipex.errors import InputError
stop = threading.Event()
threading.Thread(target=stop.wait, name="a loader").start()
def rank():
    return pipex.current_world().rank
if __name__ == "__main__":
    try:
        print(pipex.launch(rank, 2))
    except InputError as error:
        print(error)
    finally:
        stop.set()
"""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["-"],
            "got a program from <stdin>, which each rank would run again; needed a function at the top of a module",
        ),
        (["-c", PROGRAM], "got rank of an interactive session; needed a function at the top of a module"),
    ],
    ids=["stdin", "-c"],
)
def test_a_program_that_is_no_file_is_told_so(options: list[str], said: str) -> None:
    ran = subprocess.run(
        [sys.executable, *options], input=PROGRAM, capture_output=True, text=True, timeout=100,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.stdout.startswith("launch has to start its ranks afresh, since this process has other threads (a loader")
    assert said in ran.stdout
    assert ran.stderr == ""


# Limits of the system.


@pytest.mark.parametrize("spare", [0, 1, 2, 7, 12])
def test_too_few_descriptors_are_named(spare: int) -> None:
    """In a process of its own, which may have so many more than it has."""

    def body() -> Any:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1 + spare,) * 2)
        return pipex.launch(place, 4, timeout=10)

    importlib.import_module("torch._dynamo")  # opens files; launch does it before it forks
    (outcome,) = outcomes([body])
    assert outcome["error"] == "InputError"
    assert re.search("^(4 ranks cannot be started|shared memory between ranks cannot be made); got", outcome["text"])
    assert "Too many open files; " in outcome["text"]
    assert "ulimit -n" in outcome["text"]


def stop_here() -> None:
    world = pipex.current_world()
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    world.exchange(b"")


@pytest.mark.timeout(60)
def test_a_stopped_rank_is_ended_as_soon_as_the_others_have_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipex.runtime.launch.GRACE", 1000.0)
    before = set(multiprocessing.active_children())
    with pytest.raises(PeerStalled, match=r"rank 1 is (stopped|alive)"):
        pipex.launch(stop_here, 3, timeout=1.0)
    assert set(multiprocessing.active_children()) == before
