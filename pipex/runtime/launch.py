"""Starts the ranks of a run on this host, watches them, and leaves nothing behind.

    launcher ──fork──► rank 0 … rank P-1      each rank inherits the control page's descriptor and a pipe for its result
       │                   │
       └── waits for all ──┘                  the first rank that dies ends the run for all; the launcher reaps them

The parent's death kills the ranks (PR_SET_PDEATHSIG). No socket is opened and no file is written.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch

from pipex.errors import InputError, PeerError, PeerFailed, PipexError, headline, peer_error
from pipex.runtime import worlds
from pipex.torch_internals import import_compiler
from pipex.transport.host import MOST_RANKS, TIMEOUT, HostRun, check_timeout
from pipex.transport.solo import SoloWorld

GRACE = 5.0
"""Seconds that the other ranks have to end by themselves after the first has failed."""

_Report = dict[str, Any]

_OTHER_THREADS = "this process has other threads"

INTERRUPTED = 130  # exit code of a program that Ctrl-C ended


def launch(
    fn: Callable[..., Any], ranks: int | None = None, *, args: Sequence[Any] = (), timeout: float = TIMEOUT,
    device: str = "cpu",
) -> list[Any]:  # fmt: skip
    """Runs ``fn(*args)`` on every rank, each a process of its own, and returns what it returned, by rank.

    The same program runs under torchrun, on one host or many: there this process already is a rank, so ``fn`` runs
    right here and only this rank's result is returned (the others' places hold None). Inside, ``pipex.current_world()``
    tells rank and ranks, and ``pipex.Pipeline`` finds its world by itself. Cores are shared among the ranks. A single
    rank runs right here too.

    Ranks are forked, so that torch is imported once; for GPUs, and where this process runs OpenMP or CUDA already,
    which a fork would break, they are started afresh and ``fn`` must be importable.

    Args:
        fn: what a rank does; its result must fit into JSON.
        ranks: number of ranks; under torchrun may be left out.
        timeout: seconds without progress of an awaited rank after which it counts as stalled.
        device: "cpu", or "cuda": each rank has the GPU of its number on its host, by turns where there are fewer GPUs.

    Raises:
        InputError: ``ranks`` or ``timeout`` is no such number, or torchrun started another number of ranks; no such
            device; ranks have to be started afresh and cannot import ``fn``; there are not descriptors enough for them.
        NativeUnavailable: there is no GPU.
        PeerFailed: ``fn`` raised on a rank; its traceback is on stderr.
        PeerLost: a rank's process died; PeerStalled: a rank made no progress.
        KeyboardInterrupt: Ctrl-C; the ranks have ended. A second Ctrl-C kills them.
    """
    check_timeout(timeout)
    if worlds.under_torchrun():
        return _run_here(fn, args, worlds.join_torchrun(ranks, timeout, device))
    if not isinstance(ranks, int) or not 1 <= ranks <= MOST_RANKS:
        raise InputError("launch needs a number of ranks", got=repr(ranks), needed=f"a whole number, 1 to {MOST_RANKS}")
    first = worlds.device_of(device, 0)  # what is wrong with it is said here, once
    if ranks == 1:
        return _run_here(fn, args, SoloWorld(first))
    run = HostRun.create(ranks)
    try:
        return _Launcher(run, fn, args, timeout, device).run()
    finally:
        run.close()


def _run_here(fn: Callable[..., Any], args: Sequence[Any], world: Any) -> list[Any]:
    """Runs ``fn`` as a rank of ``world`` and leaves it, together with the others."""
    worlds.enter(world)
    try:
        result = fn(*args)
        world.close()
    except BaseException as error:
        world.fail(error)
        raise
    finally:
        worlds.enter(None)
    results = [None] * world.ranks
    results[world.rank] = result
    return results


class _Launcher:
    def __init__(self, run: HostRun, fn: Callable[..., Any], args: Sequence[Any], timeout: float, device: str) -> None:
        self._run = run
        self._job = (fn, tuple(args), timeout, device)
        self._device = device
        self._interrupts = 0
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._ends: dict[int, str] = {}  # how a rank ended that could not report

    def run(self) -> list[Any]:
        in_main = threading.current_thread() is threading.main_thread()  # only there can signals be caught
        before = signal.signal(signal.SIGINT, self._interrupt) if in_main else None
        try:
            self._start()
            reports = self._wait()
        finally:
            self._end()
            if before is not None:
                signal.signal(signal.SIGINT, before)
        if self._interrupts:
            raise KeyboardInterrupt
        if any(report is None or "error" in report for report in reports):
            raise self._error(reports)
        return [report["result"] for report in reports if report is not None]

    def _start(self) -> None:
        try:
            why_afresh = _why_afresh(self._device, self._run.ranks)
            context = multiprocessing.get_context("fork" if why_afresh is None else "spawn")
            if why_afresh is None:
                import_compiler()  # or the first optimizer of every rank would: a second each
            else:
                _check_importable(self._job[0], why_afresh)
            with _interrupts_held_back():
                self._start_ranks(context, why_afresh)
        except OSError as error:
            raise InputError(
                f"{self._run.ranks} ranks cannot be started", got=error.strerror,
                needed="a process and some file descriptors for each",
                fix="raise the limits of this shell (ulimit -n, ulimit -u), or start fewer ranks",
            ) from error  # fmt: skip

    def _start_ranks(self, context: Any, why_afresh: str | None) -> None:
        run = self._run if why_afresh is None else self._run.address
        for rank in range(self._run.ranks):
            ours, theirs = context.Pipe(duplex=False)
            self._pipes.append(ours)
            process = context.Process(
                target=_rank_main, name=f"pipex rank {rank}",
                args=(run, rank, os.getpid(), theirs, *self._job),
            )  # fmt: skip
            with warnings.catch_warnings():
                # Python warns of forking a process with threads; _why_afresh has looked at what they are.
                warnings.simplefilter("ignore", DeprecationWarning)
                try:
                    process.start()
                except OSError:
                    raise
                except Exception as error:  # pickle has no one error
                    if why_afresh is None:
                        raise
                    raise _not_importable(why_afresh, f"{_name(self._job[0])} with its arguments: {error}",
                                          "pass what pickle can hold") from error  # fmt: skip
            self._processes.append(process)
            theirs.close()

    def _interrupt(self, *_: object) -> None:
        """Ctrl-C. The first one reaches ``fn`` on every rank as it would in one process; the second one kills."""
        self._interrupts += 1
        for process in self._processes:
            if process.pid is not None and process.is_alive():
                with contextlib.suppress(ProcessLookupError):  # it has ended since, or this interrupted its wait
                    os.kill(process.pid, signal.SIGINT if self._interrupts == 1 else signal.SIGKILL)

    def _wait(self) -> list[_Report | None]:
        """What each rank reported; None for a rank that died before it could."""
        reports: list[_Report | None] = [None] * self._run.ranks
        running = dict(enumerate(self._processes))
        deadline = None
        while running and (deadline is None or time.monotonic() < deadline):
            wait([p.sentinel for p in running.values()] + [self._pipes[r] for r in running], timeout=0.2)
            for rank, process in list(running.items()):
                alive = process.is_alive()  # asked first: what an ended rank has reported is then in its pipe
                if reports[rank] is None:
                    reports[rank] = _receive(self._pipes[rank])
                if not alive:
                    del running[rank]
                    if reports[rank] is None:
                        self._ends[rank] = _how(process.exitcode)
                        self._run.lost(rank, self._ends[rank])
            if running.keys() <= _stalled(reports):
                break  # nobody is left who could say more
            ended = [reports[rank] for rank in range(self._run.ranks) if rank not in running]
            failed = any(report is None or "error" in report for report in ended)
            if failed and deadline is None and not self._interrupts:
                deadline = time.monotonic() + GRACE
        return reports

    def _end(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
        for process in self._processes:
            process.join()
            process.close()
        for pipe in self._pipes:
            pipe.close()

    def _error(self, reports: Sequence[_Report | None]) -> PeerError:
        """The failure that ended the run, as a survivor or the culprit itself has reported it."""
        errors = {rank: report["error"] for rank, report in enumerate(reports) if report and "error" in report}
        for error in errors.values():
            if error["peer"] is not None:
                return peer_error(**error["peer"])
        for rank, error in errors.items():
            return peer_error("failed", error["headline"], rank=rank)
        rank = reports.index(None)
        return peer_error("lost", f"is gone: {self._ends[rank]}", rank=rank)


def _rank_main(
    run: HostRun | bytes, rank: int, launcher: int, pipe: Connection, fn: Callable[..., Any], args: Sequence[Any],
    timeout: float, device: str,
) -> None:  # fmt: skip
    worlds.die_with(launcher)
    os.setpgid(0, 0)  # so that a terminal's Ctrl-C comes from the launcher only, once
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if isinstance(run, bytes):
        run = HostRun.open(run)
    worlds.set_threads(run.ranks)
    failed = False
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        world = worlds.join_host(run, rank, worlds.device_of(device, rank), timeout)
        encoded = json.dumps({"result": _run_here(fn, args, world)[rank]}).encode()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BaseException as error:
        if isinstance(error, PipexError):  # its message says it all
            text = f"pipex rank {rank}: {type(error).__name__}: {error}\n"
        else:
            text = f"pipex rank {rank} failed:\n{traceback.format_exc()}"
        sys.stderr.write(text)  # in one piece: the ranks share it
        encoded, failed = json.dumps({"error": _describe(error)}).encode(), True
    with contextlib.suppress(OSError):  # the launcher is gone, and this process with it
        pipe.send_bytes(encoded)
    sys.exit(failed)


def _describe(error: BaseException) -> dict[str, Any]:
    """What the launcher is told: the arguments of ``peer_error``, or the headline of an exception of this rank."""
    if not isinstance(error, PeerError):
        return {"headline": headline(error), "peer": None}
    text = error.remote if isinstance(error, PeerFailed) else error.problem
    return {"peer": {"ending": error.ending, "text": text, "rank": error.rank, "step": error.step,
                     "stage": error.stage, "action": error.action, "microbatch": error.microbatch}}  # fmt: skip


def _stalled(reports: Sequence[_Report | None]) -> set[int]:
    """The ranks of which others have said that they are stopped or stuck: they will not end by themselves."""
    peers = [report["error"]["peer"] for report in reports if report and "error" in report]
    return {peer["rank"] for peer in peers if peer is not None and peer["ending"] == "stalled"}


def _receive(pipe: Connection) -> _Report | None:
    try:
        return json.loads(pipe.recv_bytes()) if pipe.poll() else None
    except (EOFError, OSError):  # it died before it could report, or in the midst of it
        return None


def _how(exitcode: int | None) -> str:
    if exitcode is None:
        return "did not end"
    return f"killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"exited with code {exitcode}"


def _why_afresh(device: str, ranks: int) -> str | None:
    """Why ranks cannot be forked from this process; None where they can.

    GNU OpenMP hangs in the child of a process whose threads it has started, unless the child stays with one thread.
    Which library a thread belongs to cannot be told, so with several threads per rank any thread counts.
    """
    if device != "cpu":
        return "a forked process cannot use a GPU"
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return "CUDA is in use in this process, which a fork would break"
    others = len(os.listdir("/proc/self/task")) - 1
    if worlds.threads_per_rank(ranks) == 1 or not others:
        return None
    python = [thread.name for thread in threading.enumerate() if thread is not threading.current_thread()]
    native = [f"{others - len(python)} of libraries"] if others > len(python) else []
    return f"{_OTHER_THREADS} ({', '.join(python + native)}), which a fork could leave hanging"


def _check_importable(fn: Callable[..., Any], why_afresh: str) -> None:
    """Refuses a function that a process which is started afresh could not get at, before any is. Its arguments can be
    pickled only while a process starts: queues and locks refuse otherwise, and tensors leave a server behind."""
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    if getattr(main, "__spec__", None) is None and file is not None and not os.path.exists(file):
        raise _not_importable(
            why_afresh, f"a program from {file}, which each rank would run again", "put the program into a file"
        )
    try:
        pickled = ForkingPickler.dumps(fn)
    except Exception as error:  # pickle has no one error
        raise _not_importable(why_afresh, f"{_name(fn)}: {error}", "put it into a module") from error
    if file is None and b"__main__" in bytes(pickled):
        raise _not_importable(
            why_afresh, f"{_name(fn)} of an interactive session", "put it into a module and import it"
        )


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__qualname__", repr(fn))


def _not_importable(why_afresh: str, got: str, fix: str) -> InputError:
    return InputError(
        f"launch has to start its ranks afresh, since {why_afresh}; they cannot import what they are to run",
        got=got, needed="a function at the top of a module, and arguments that pickle can hold",
        fix=f"{fix}, or launch before threads are started" if why_afresh.startswith(_OTHER_THREADS) else fix,
    )  # fmt: skip


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Ctrl-C waits: a rank inherits this, and so is not interrupted before it has a handler of its own."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
