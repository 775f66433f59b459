"""Where operations are seen: torch's functions, replaced while a tape is open.

Replacing them where modules find them (``torch.nn.functional``, ...) reaches modules, subclasses and functional code
alike, and costs less than a hook per module or a TorchFunctionMode. Code that holds its own reference to one is not
recorded: right, only not deferred. Other threads see the replacement too but have no tape, so they pass straight
through.
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
    checkpoints,
    forward_derivatives_level,
    functorch_active,
)

# Looked up once: they are asked before every operation.
_grad_enabled = torch.is_grad_enabled
_compiling = torch.compiler.is_dynamo_compiling

torch_linear = F.linear
torch_embedding = F.embedding
_torch_clear_autocast_cache = torch.clear_autocast_cache


class Recorder(Protocol):
    """What sees the operations of one forward: a tape."""

    def replay(self) -> Recorder:
        """One for running a part of the forward again."""

    def cast(self, region: int, *operands: Tensor | None) -> list[Any]: ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    def embedding(self, x: Tensor, weight: Tensor, padding: int | None, scale_by_frequency: bool) -> Tensor: ...


class _Local(threading.local):
    tape: Recorder | None = None
    region = 0  # how many of autocast's have ended


_local = _Local()
_lock = threading.Lock()
_open = 0  # tapes open in all threads
_replaced: list[tuple[Any, str, Any]] = []  # meanwhile: owner, name, and torch's own


def start(tape: Recorder) -> Recorder | None:
    """Opens ``tape`` in this thread; returns the one that was open."""
    global _open
    with _lock:
        if _open == 0:
            _replaced[:] = [(owner, name, getattr(owner, name)) for owner, name, _ in _REPLACEMENTS]
            for owner, name, ours in _REPLACEMENTS:
                setattr(owner, name, ours)
            for owner, name in checkpoints():
                original = getattr(owner, name)
                _replaced.append((owner, name, original))
                setattr(owner, name, _checkpoints(original))
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
            for owner, name, original in _replaced:
                setattr(owner, name, original)


def _tape_for(x: Tensor) -> Recorder | None:
    """The tape that may record an operation on ``x``; None where the general path has to make the gradient."""
    if _compiling():  # first: torch 2.11's compiler can make no guard for what is local to a thread
        return None
    tape = _local.tape
    if (
        tape is None
        or type(x) is not Tensor  # subclasses (DTensor, ...) bring rules of their own
        or not _grad_enabled()
        or functorch_active()  # torch.func, and forward-mode derivatives: they differentiate in ways of their own
        or forward_derivatives_level() >= 0
    ):
        return None
    return tape


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    tape = _tape_for(input)
    if tape is None:
        return torch_linear(input, weight, bias)
    if any_autocast():
        input, weight, bias = tape.cast(_local.region, input, weight, bias)
    if (
        (input.dim() == 2 or (input.dim() > 2 and _folds(input)))
        and weight.dim() == 2
        and (bias is None or bias.shape == weight.shape[:1])
    ):
        return tape.linear(input, weight, bias)
    return torch_linear(input, weight, bias)


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


def _clear_autocast_cache() -> None:
    _local.region += 1
    _torch_clear_autocast_cache()


def _checkpoints(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of what makes torch's checkpoints (those that are not reentrant): what they run again is recorded as
    it was the first time, so that the same tensors are saved."""

    def recorded(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        tape = None if _compiling() else _local.tape
        if tape is None:
            return checkpoint(fn, *args, **kwargs)

        def again(*args: Any, **kwargs: Any) -> Any:
            outer = start(tape.replay())
            try:
                return fn(*args, **kwargs)
            finally:
                stop(outer)

        return checkpoint(again, *args, **kwargs)

    return recorded


_REPLACEMENTS: list[tuple[Any, str, Callable[..., Any]]] = [
    (F, "linear", _linear),
    (F, "embedding", _embedding),
    (torch, "clear_autocast_cache", _clear_autocast_cache),
]
"""By owner and name."""
