"""Which world this process is in, and how a process that torchrun started joins one."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from pipex.errors import InputError, NativeUnavailable
from pipex.transport import device as device_transport
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
    """The device of a rank of this host: the CPU, or a GPU, shared where there are fewer of them than ranks.

    Raises:
        InputError: ``kind`` is neither ``"cpu"`` nor ``"cuda"``.
        NativeUnavailable: there is no GPU.
    """
    if kind == "cpu":
        return torch.device("cpu")
    if kind != "cuda":
        raise InputError("there is no such kind of device", got=kind, needed="cpu or cuda")
    if not torch.cuda.is_available():
        raise NativeUnavailable(
            "torch finds no GPU", fix="check torch.version.cuda, nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def join_host(run: HostRun, rank: int, kind: str, timeout: float) -> World:
    """Joins a run on this host, through the memory of the CPU or of GPUs.

    Raises:
        InputError, NativeUnavailable: as ``device_of``; or another process has taken the rank.
    """
    if kind == "cpu":
        return run.join(rank, timeout=timeout)
    return device_transport.join(run, rank, device_of(kind, rank), timeout=timeout)


def join_torchrun(ranks: int | None, kind: str = "cpu", timeout: float = TIMEOUT) -> World:
    """Joins the run that the environment describes: through memory where all ranks are on this host, through
    torch.distributed otherwise.

    Raises:
        InputError: the environment is incomplete, or ``ranks`` is given and not the number of ranks it says.
        NativeUnavailable: as ``device_of``.
    """
    store, rank, size = store_from_environment(timeout)
    if ranks is not None and ranks != size:
        raise InputError("the program and torchrun disagree about the number of ranks", got=f"{size} from torchrun",
                         needed=ranks, fix=f"start it with --nproc-per-node {ranks}, or leave ranks out")  # fmt: skip
    set_threads(int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    if os.environ.get("LOCAL_WORLD_SIZE") != str(size):
        device = device_of(kind, int(os.environ.get("LOCAL_RANK", 0)))
        return GroupWorld(store, rank, size, device=device, timeout=timeout)
    if rank == 0:
        run = HostRun.create(size)
        store.set("host", run.address.hex())
    else:
        run = HostRun.open(bytes.fromhex(store.get("host").decode()))
    world = join_host(run, rank, kind, timeout)
    world.exchange(b"")  # everybody has opened the page; rank 0 may close its descriptor
    run.close()
    return world


def threads_per_rank(ranks: int) -> int:
    """Compute threads of each of ``ranks`` ranks on this host: its cores shared out, at least one each."""
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def set_threads(ranks: int) -> None:
    """Gives this process its share."""
    torch.set_num_threads(threads_per_rank(ranks))
