"""Equal shares of one GPU for the ranks that use it, so that they compute at the same time.

Processes that share a GPU are time-sliced: one computes while the others wait, and a schedule's bubbles cannot be seen.
Under NVIDIA's Multi-Process Service they compute at once, each with the share of the multiprocessors that it is given.
The service is started for this run only, with folders of its own; no setting of the card changes.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from pipex.errors import NativeUnavailable

CONTROL = "nvidia-cuda-mps-control"
SECONDS = 20


@contextmanager
def shared_among(ranks: int) -> Iterator[None]:
    """Inside, processes that this one starts have 1/``ranks`` of a GPU's multiprocessors each.

    CUDA must not have been initialised in this process: it would not be a client of the service.

    Raises:
        NativeUnavailable: the service cannot be started.
    """
    with tempfile.TemporaryDirectory(prefix="pipex-mps-") as folder:
        settings = {
            "CUDA_MPS_PIPE_DIRECTORY": folder,
            "CUDA_MPS_LOG_DIRECTORY": folder,
            "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": f"{100 / ranks:g}",
        }
        _control(["-d"], settings)
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
            _control([], settings, "quit\n")


def _control(arguments: list[str], settings: dict[str, str], says: str = "") -> None:
    try:
        done = subprocess.run(
            [CONTROL, *arguments], input=says, env=os.environ | settings, capture_output=True, text=True,
            timeout=SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    else:
        problem = "" if done.returncode == 0 else (done.stderr or done.stdout).strip() or f"exit {done.returncode}"
    if problem:
        raise NativeUnavailable(
            "a GPU cannot be shared out among ranks",
            got=f"{CONTROL}: {problem}",
            needed="NVIDIA's Multi-Process Service, which comes with the driver",
            fix="leave --virtual-devices out; ranks are then time-sliced, and bubbles cannot be seen",
        )
