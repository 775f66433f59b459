"""Which world this process is in, and how a process that torchrun started joins one."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Mapping

import torch

from pipex.errors import InputError, NativeUnavailable
from pipex.transport.device import join as join_device
from pipex.transport.group import GroupWorld, store_from_environment
from pipex.transport.host import TIMEOUT, HostRun
from pipex.transport.interface import World
from pipex.transport.solo import SoloWorld

_current: World | None = None


def current_world() -> World:
    """The world of this process: the launched one, or a world of one rank."""
    global _current
    if _current is None:
        _current = SoloWorld(torch.device("cpu"))
    return _current


def enter(world: World | None) -> None:
    """Makes ``world`` this process's world; None leaves it."""
    global _current
    _current = world


def under_torchrun(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun, or something that sets the same variables, started this process as one of several ranks."""
    return "RANK" in environment and "WORLD_SIZE" in environment


def device_of(kind: str, local_rank: int) -> torch.device:
    """Where a rank computes: on the CPU, or on one of the GPUs of its host, by turns where there are fewer than ranks.

    Args:
        kind: "cpu" or "cuda".
        local_rank: the rank's number on its host.

    Raises:
        InputError: another kind.
        NativeUnavailable: torch finds no GPU.
    """
    if kind == "cpu":
        return torch.device("cpu")
    if kind != "cuda":
        raise InputError("no such device", got=repr(kind), needed='"cpu" or "cuda"')
    gpus = torch.cuda.device_count()
    if not gpus:
        raise NativeUnavailable(
            "the ranks are to compute on GPUs and there is none",
            got=f"torch {torch.__version__} without a usable CUDA device",
            needed="a GPU, its driver and a torch that was built for CUDA",
            fix='use device="cpu"',
        )
    return torch.device("cuda", local_rank % gpus)


def join_host(run: HostRun, rank: int, device: torch.device, timeout: float) -> World:
    """Joins a run whose ranks are all on this host.

    Raises:
        InputError: there is no such rank, or another process has taken it.
    """
    if device.type == "cpu":
        return run.join(rank, timeout=timeout)
    torch.cuda.set_device(device)
    return join_device(run, rank, device, timeout=timeout)


def join_torchrun(ranks: int | None, timeout: float = TIMEOUT, kind: str = "cpu") -> World:
    """Joins the run that the environment describes: through shared memory, or the GPUs', where all ranks are on this
    host, through torch.distributed otherwise; there GPUs go through NCCL, or Gloo where ranks share one.

    Raises:
        InputError: the environment is incomplete, or ``ranks`` is given and not the number of ranks it says.
        NativeUnavailable: there is no GPU, or this torch has no NCCL.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with(os.getppid())  # a killed agent leaves its ranks running, and the others would train on with them
    store, rank, size = store_from_environment(timeout)
    if ranks is not None and ranks != size:
        raise InputError("the program and torchrun disagree about the number of ranks", got=f"{size} from torchrun",
                         needed=ranks, fix=f"start it with --nproc-per-node {ranks}, or leave ranks out")  # fmt: skip
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    set_threads(local_ranks)
    device = device_of(kind, int(os.environ.get("LOCAL_RANK", rank)))
    if local_ranks != size:
        if device.type == "cpu":
            return GroupWorld(store, rank, size, device=device, timeout=timeout)
        torch.cuda.set_device(device)
        shared = torch.cuda.device_count() < local_ranks  # NCCL wants a GPU for each rank
        return GroupWorld(store, rank, size, backend="gloo" if shared else "nccl", device=device, timeout=timeout)
    if rank == 0:
        run = HostRun.create(size)
        store.set("host", run.address.hex())
    else:
        run = HostRun.open(bytes.fromhex(store.get("host").decode()))
    world = join_host(run, rank, device, timeout)
    world.exchange(b"")  # everybody has opened the page; rank 0 may close its descriptor
    run.close()
    return world


def die_with(parent: int) -> None:
    """The kernel kills this process when its parent ends."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
    if ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)


def threads_per_rank(ranks: int) -> int:
    """Compute threads of each of ``ranks`` ranks on this host: its cores shared out, at least one each."""
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def cores_of(world: World) -> int:
    """Cores that a rank of this world has to itself: its host's shared out among the ranks there, at least one."""
    return threads_per_rank(int(os.environ.get("LOCAL_WORLD_SIZE", world.ranks)) if under_torchrun() else world.ranks)


def set_threads(ranks: int) -> None:
    """Gives this process its share."""
    torch.set_num_threads(threads_per_rank(ranks))
