"""Where operations are seen: torch's functions, replaced while a tape is open.

Replacing them where modules find them (``torch.nn.functional``, ...) reaches modules, subclasses and functional code
alike, and costs less than a hook per module or a TorchFunctionMode. Code that holds its own reference to one is not
recorded: right, only not deferred. Other threads see the replacement too but have no tape, so they pass straight
through.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from operator import itemgetter
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

from pipex.backward.torch_internals import run_uncompiled
from pipex.backward.uses import Captor, Use
from pipex.backward.weights import Layer, Weight
from pipex.torch_internals import (
    CHECKPOINT,
    COMPOSABLE_CHECKPOINT,
    forward_derivatives_level,
    functorch_active,
    make_checkpoint,
)

# Looked up once: they are asked before every operation.
_grad_enabled = torch.is_grad_enabled
_compiling = torch.compiler.is_dynamo_compiling

torch_linear = F.linear
torch_embedding = F.embedding
_torch_clear_autocast_cache = torch.clear_autocast_cache


class Recorder(Captor, Protocol):
    """What sees the operations of one forward: a tape.

    Attributes:
        layers: by id of the weight, linear layers that are known; to be added to.
        first_node: the number of the first node of the graph that was made since it is open.
    """

    layers: dict[int, Layer]
    first_node: int

    def replay(self) -> AbstractContextManager[Any]:
        """One for running a part of the forward again."""

    def weight(self, tensor: Tensor | None, lower: bool = False) -> Weight | None: ...

    def shared_weight(self, tensor: Tensor) -> Weight | None: ...

    def is_constant(self, tensor: Tensor) -> bool: ...

    def cast(self, x: Tensor) -> Tensor: ...

    def fuses(self, x: Tensor) -> bool: ...

    def product(self, use: Use, run: Callable[..., Tensor], *operands: Any) -> Tensor: ...

    def hand_over(self, y: Tensor, use: Use) -> None: ...


Functions = Mapping[str, Callable[..., Any]]


class _Module:
    """A module of torch and our functions for it. All at once, in C: a forward may have a few operations only."""

    def __init__(self, module: ModuleType, ours: Functions) -> None:
        self._names = vars(module)
        self._ours = ours
        self._look = itemgetter(*ours)
        self._seen: Any = None
        self._originals: Functions = {}

    def replace(self) -> None:
        seen = self._look(self._names)
        if seen != self._seen:
            self._seen, self._originals = seen, {name: self._names[name] for name in self._ours}
        self._names.update(self._ours)

    def put_back(self) -> None:
        self._names.update(self._originals)


class _Local(threading.local):
    tape: Recorder | None = None
    region = 0  # how many of autocast's have ended


_local = _Local()
_lock = threading.RLock()  # what is let go may be let go of by a garbage collection in here
_open = 0  # tapes open in all threads
_owners = 0  # of tapes that are alive
_patched: dict[str, Any] = {}  # meanwhile: methods that somebody had put on Tensor itself


def start(tape: Recorder) -> Recorder | None:
    """Opens ``tape`` in this thread; returns the one that was open."""
    global _open
    with _lock:
        if _open == 0:
            for name in sys.modules.keys() & _once_imported.keys():
                replace({name: _once_imported.pop(name)}, {})
            for module in _modules.values():
                module.replace()
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
            for module in _modules.values():
                module.put_back()


def replace_methods_for(owner: object) -> None:
    """Tensors have methods that tapes see as long as somebody like this is alive, who opens some. Not only while one is
    open: a class that is changed makes Python look up anew all that it has found there."""
    global _owners
    with _lock:
        if _owners == 0:
            _patched.update((name, vars(Tensor)[name]) for name in _methods.keys() & vars(Tensor).keys())
            for name, method in _methods.items():
                setattr(Tensor, name, method)
        _owners += 1
    weakref.finalize(owner, _put_methods_back)


def _put_methods_back() -> None:
    global _owners
    with _lock:
        _owners -= 1
        if _owners == 0:
            for name, method in _methods.items():
                if vars(Tensor).get(name) is method:  # else somebody has put theirs there since
                    delattr(Tensor, name)  # and the one of the class that it inherits from is there again
                    if name in _patched:
                        setattr(Tensor, name, _patched[name])
            _patched.clear()


def pause() -> Recorder | None:
    """Records nothing in this thread until ``resume`` gets what this returns."""
    if _compiling():
        return None
    tape, _local.tape = _local.tape, None
    return tape


def resume(tape: Recorder) -> None:
    """Goes on recording."""
    _local.tape = tape


def region() -> int:
    """The number of the autocast region that this thread is in."""
    return _local.region


def tape_now() -> Recorder | None:
    """The tape of this thread, if gradients are recorded in the ordinary way."""
    if _local.tape is None or not _grad_enabled() or functorch_active() or forward_derivatives_level() >= 0:
        return None
    return _local.tape


def is_open() -> bool:
    """Whether there is a tape in this thread."""
    return not _compiling() and _local.tape is not None


def tape_for(x: Tensor) -> Recorder | None:
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


def clear_autocast_cache() -> None:
    """In the place of torch's."""
    _local.region += 1
    _torch_clear_autocast_cache()


def _make_checkpoint(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a checkpoint runs again is recorded as it was the first time, so that the same tensors are saved."""
    tape = None if _compiling() else _local.tape
    if tape is None:
        return make_checkpoint(fn, *args, **kwargs)

    def again(*args: Any, **kwargs: Any) -> Any:
        with tape.replay():
            return fn(*args, **kwargs)

    return make_checkpoint(again, *args, **kwargs)


_CHECKPOINTS = {CHECKPOINT: _make_checkpoint}
_modules: dict[str, _Module] = {}
_methods: dict[str, Callable[..., Any]] = {}
_once_imported: dict[str, Functions] = {}


def replace(functions: Mapping[str, Functions], methods: Functions) -> None:
    """Says what takes the place of torch's own.

    Args:
        functions: by module, which is imported, and name; while a tape is open.
        methods: of tensors, by name (``replace_methods_for``).
    """
    for module, ours in functions.items():
        _modules[module] = _Module(sys.modules[module], ours)
        run_uncompiled(ours.values())
    _methods.update(methods)
    run_uncompiled(methods.values())


def replace_once_imported(module: str, functions: Functions) -> None:
    """The same for a module that nobody may ever need."""
    _once_imported[module] = functions


replace({torch.utils.checkpoint.__name__: _CHECKPOINTS}, {})
replace_once_imported(COMPOSABLE_CHECKPOINT, _CHECKPOINTS)
