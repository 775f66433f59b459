"""What stands in the place of torch's functions and methods, and until when."""

from __future__ import annotations

import subprocess
import sys

IN_PLACE = """
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from pipex.backward import Splitter

functions = torch.einsum, torch.conv2d, F.conv2d, F.bilinear, F.linear
methods = Tensor.__matmul__, Tensor.mm
splitters = [Splitter.of(nn.Linear(2, 2)) for _ in range(2)]
with splitters[0].record():
    with splitters[1].record():
        assert F.linear is not functions[-1]
    assert F.linear is not functions[-1], "one is still open"
assert (torch.einsum, torch.conv2d, F.conv2d, F.bilinear, F.linear) == functions
del splitters[0]
assert Tensor.mm is not methods[1], "there is another one"
del splitters
assert (Tensor.__matmul__, Tensor.mm) == methods

def theirs(*operands):
    return torch.mm(*operands)

F.linear, Tensor.mm, before = theirs, theirs, F.linear
splitter = Splitter.of(nn.Linear(2, 2))
with splitter.record():
    assert F.linear is not theirs
assert F.linear is theirs
F.linear = before
with splitter.record():
    pass
assert F.linear is before
assert Tensor.mm is not theirs
del splitter
assert Tensor.mm is theirs
"""


def test_what_was_there_is_there_again() -> None:
    """In a process of its own: methods are ours as long as anybody records, in whatever test."""
    done = subprocess.run([sys.executable, "-c", IN_PLACE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
