"""Where operations are seen: ``F.linear`` and ``F.embedding``, replaced while a tape is open.

Replacing the two functions in ``torch.nn.functional`` reaches modules, subclasses and functional code alike, and
costs less than a hook per module or a TorchFunctionMode. Code that holds its own reference to them is not recorded:
right, only not deferred. Other threads see the replacement too but have no tape, so they pass straight through.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pipex.torch_internals import (
    any_autocast,
    forward_derivatives_level,
    functorch_active,
    top_saved_tensors_hooks,
)

# Looked up once: they are asked before every operation.
_grad_enabled = torch.is_grad_enabled
_compiling = torch.compiler.is_dynamo_compiling

torch_linear = F.linear
torch_embedding = F.embedding


class Keeper(Protocol):
    """Who keeps what one forward leaves to its backward: what autograd saves, by its hooks, and what the tape does."""

    pack: Callable[[Tensor], Any]

    def use(self, use: Any) -> None:
        """The tape keeps the input of this ``Use``."""


class Recorder(Protocol):
    """What sees the operations of one forward: a tape."""

    keeper: Keeper | None

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    def embedding(self, x: Tensor, weight: Tensor, padding: int | None, scale_by_frequency: bool) -> Tensor: ...


class _Local(threading.local):
    tape: Recorder | None = None


_local = _Local()
_lock = threading.Lock()
_open = 0  # tapes open in all threads


def start(tape: Recorder) -> Recorder | None:
    """Opens ``tape`` in this thread; returns the one that was open."""
    global _open
    with _lock:
        if _open == 0:
            F.linear, F.embedding = _linear, _embedding
        _open += 1
    outer, _local.tape = _local.tape, tape
    return outer


def stop(outer: Recorder | None) -> None:
    """Closes this thread's tape and goes back to ``outer``."""
    global _open
    _local.tape = outer
    with _lock:
        _open -= 1
        if _open == 0:
            F.linear, F.embedding = torch_linear, torch_embedding


def _tape_for(x: Tensor) -> Recorder | None:
    """The tape that may record an operation on ``x``; None where the general path has to make the gradient."""
    if _compiling():  # first: torch 2.11's compiler can make no guard for what is local to a thread
        return None
    tape = _local.tape
    if (
        tape is None
        or type(x) is not Tensor  # subclasses (DTensor, ...) bring rules of their own
        or not _grad_enabled()
        or any_autocast()  # the gradient would have to repeat autocast's own casts
        or _others_save(tape)
        or functorch_active()  # torch.func, and forward-mode derivatives: they differentiate in ways of their own
        or forward_derivatives_level() >= 0
    ):
        return None
    return tape


def _others_save(tape: Recorder) -> bool:
    """Whether hooks see what autograd saves, other than the tape's keeper's. Activation checkpointing runs the
    operation again, without a tape, and compares what the graphs have saved."""
    hooks = top_saved_tensors_hooks(False)
    return hooks is not None and (tape.keeper is None or hooks[0] is not tape.keeper.pack)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    tape = _tape_for(input)
    if tape is None or not (input.dim() == 2 or (input.dim() > 2 and _folds(input))):
        return torch_linear(input, weight, bias)
    return tape.linear(input, weight, bias)


def _folds(input: Tensor) -> bool:
    """Whether torch makes a matrix of it in any case. Of one with other strides, if only of a dimension of one element,
    it depends on the weight requiring grad."""
    shape = input.shape
    contiguous = input.is_contiguous()
    if not contiguous or 1 not in shape:
        return contiguous
    strides = input.stride()
    return all(strides[i] == strides[i + 1] * shape[i + 1] for i in range(len(shape) - 2))


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    tape = _tape_for(input)
    if tape is None or sparse or max_norm is not None:
        return torch_embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    return tape.embedding(input, weight, padding_idx, scale_grad_by_freq)
