"""Whether Triton can compile and launch anything on a device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pipex.errors import headline


@triton.jit
def trial_kernel(place):
    tl.store(place, 1.0)


def trial(device: torch.device) -> str | None:
    """Why no kernel runs there: no C compiler for Triton's launcher, a driver too old, ...; None where one has run."""
    place = torch.zeros(1, device=device)
    try:
        trial_kernel[(1,)](place)
        ran = place.item() == 1.0
    except Exception as error:  # whatever a compiler, an assembler and a driver may raise
        return headline(error)
    return None if ran else "a kernel has run and done nothing"
