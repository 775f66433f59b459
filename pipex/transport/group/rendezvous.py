"""The store of a run that was started by torchrun, or by anything else that sets the same variables."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from pipex.errors import InputError

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def store_from_environment(timeout: float = 300.0) -> tuple[Store, int, int]:
    """Joins the store at MASTER_ADDR:MASTER_PORT.

    Under torchrun the agent hosts it, and every rank is a client. Otherwise rank 0 hosts it, on that address alone
    (left to itself, torch's store listens on every interface of the machine).

    Args:
        timeout: seconds to wait for the store to answer.

    Returns:
        The store, this rank and the number of ranks.

    Raises:
        InputError: a variable is missing or no number, or rank 0 cannot listen on the address.
    """
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise InputError(
            "the environment does not describe a run", got=f"no {', '.join(missing)}", needed=", ".join(VARIABLES),
            fix="start the program with torchrun",
        )  # fmt: skip
    try:
        rank, ranks, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    except ValueError as error:
        raise InputError("RANK, WORLD_SIZE and MASTER_PORT must be whole numbers", got=str(error)) from None
    if not 0 <= rank < ranks:
        raise InputError("RANK does not fit WORLD_SIZE", got=f"rank {rank} of {ranks}", needed="0 ≤ RANK < WORLD_SIZE")
    address = os.environ["MASTER_ADDR"]

    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    listener = None if by_agent or rank != 0 else _listen(address, port)
    store = TCPStore(
        address, port, is_master=listener is not None, timeout=timedelta(seconds=timeout), wait_for_workers=False,
        master_listen_fd=listener,
    )  # fmt: skip
    # The agent keeps its store when it restarts the ranks, and with it what the last attempt left there.
    return PrefixStore(f"pipex/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store), rank, ranks


def _listen(address: str, port: int) -> int:
    """The descriptor of a socket that listens on ``address`` only; the store owns it from then on."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            listener.listen()
            return listener.detach()
    except OSError as error:
        raise InputError(
            f"rank 0 cannot listen on MASTER_ADDR:MASTER_PORT ({address}:{port})", got=error.strerror or str(error),
            needed="an address of rank 0's host and a free port", fix="set both, or use torchrun",
        ) from None  # fmt: skip
