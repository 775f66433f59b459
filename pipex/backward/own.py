"""Modules that make their weight gradients themselves, when told to: TransformerEngine's protocol, for anybody.

    need_backward_dw()   whether the backward of the module's forward leaves its weight gradients
    backward_dw()        makes those of one such backward, of the oldest that still waits

TransformerEngine's layers have both where they were made with ``delay_wgrad_compute=True``. What such a backward leaves
is in a queue of the module's own, so the tape keeps nothing but the turn:

    F   y = module(x), which is one operation for the tape: nothing within it is recorded
    I   dy comes to y and is noted; then the module's own backward gives dx, and puts what W needs into its queue
    W   in the order of the notes ``backward_dw()``, once for each; what it puts into ``.grad`` is taken out again and
        added as any gradient is, since TransformerEngine's assigns, and would lose the micro-batches before

What it adds elsewhere (``main_grad``), and the hooks that it runs itself, are the module's business.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipex.backward import recording
from pipex.backward.accumulate import Silence, main_grad_of
from pipex.backward.passes import accumulates, announced_for
from pipex.backward.uses import Captor, Sums, Use
from pipex.errors import UnsupportedModule
from pipex.torch_internals import current_pass, engine

_NOTHING = torch.empty(0)
_MARK = "skip_backward_post_hook"  # TransformerEngine's, on the parameters whose gradients backward_dw() makes
_HOOKS = "wgrad_accumulation_and_reduce_hooks"  # TransformerEngine's list of what it calls at the end of backward_dw()


class OwnUse(Use):
    """One forward of such a module.

    Args:
        name: of the module, for people.
    """

    __slots__ = ("_module", "_name", "_pass", "_silence")

    def __init__(self, tape: Captor, module: nn.Module, name: str) -> None:
        self._module = module
        self._name = name
        self._pass = -1  # the last that has come to it
        self._silence = Silence()
        super().__init__(tape, _NOTHING)

    def _pack(self, *_: Callable[[Any], Any]) -> None:
        """Nothing of a tensor is kept."""

    @property
    def held(self) -> list[Tensor]:
        return []  # the module knows

    def reached(self, _: object) -> None:
        """Called before the backward of what has made an output; a pass comes by once for each."""
        task = current_pass()
        if task == self._pass:
            return
        self._pass = task
        for parameter in self._module.parameters():
            if parameter.requires_grad and getattr(parameter, _MARK, False):
                # Autograd comes to it without a gradient, and would run its hooks all the same.
                self._silence.of(parameter)
        if accumulates() or announced_for(task) is not None:
            engine.queue_callback(self._silence.end)
            self.tape.captured(self, _NOTHING)
        else:  # it wants other gradients, as torch's stages do when they look at their shapes
            engine.queue_callback(self._discard)

    def _discard(self) -> None:
        """What the backward has put into the queue is nobody's: takes it out."""
        found = [main_grad_of(parameter) for parameter in self._module.parameters()]
        kept = [(main_grad, main_grad.clone()) for main_grad in found if main_grad is not None]
        hooks: list[Any] = getattr(self._module, _HOOKS, [])
        waiting, hooks[:] = hooks[:], []
        try:
            self.add_to(Sums(), _NOTHING)
        finally:
            hooks[:] = waiting
            for main_grad, before in kept:
                main_grad.copy_(before)

    def add_to(self, sums: Sums, dy: Tensor) -> None:
        self._silence.end()
        parameters = list(self._module.parameters())
        before = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        try:
            with torch.no_grad():
                self._module.backward_dw()  # type: ignore[operator]
        except Exception as error:
            error.add_note(f"in {self._name}.backward_dw(), which is called once for every backward of a forward")
            raise
        else:
            made = [parameter.grad for parameter in parameters]
        finally:
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient
        for parameter, gradient in zip(parameters, made, strict=True):
            if gradient is not None:
                sums.add(parameter, gradient)


class Own:
    """Those of one stage.

    Args:
        module: the stage; None for one that has none.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        parts = () if module is None else module.named_modules()
        self._names = {part: name or type(part).__name__ for name, part in parts if _brings_its_own(part)}
        self.parameters = {id(parameter) for part in self._names for parameter in part.parameters()}
        """ids of theirs, whose gradients may be anybody's memory"""

    def __bool__(self) -> bool:
        return bool(self._names)

    def refuse_replicated(self) -> None:
        """For what DDP is around.

        Raises:
            UnsupportedModule: a module leaves weight gradients, which DDP would reduce before they are made.
        """
        for module, name in self._names.items():
            if _leaves(module):
                raise UnsupportedModule(
                    f"{name} makes its weight gradients by itself, in a stage under DistributedDataParallel",
                    needed="gradients that autograd makes, on whose arrival DDP reduces them",
                    fix="make it without delay_wgrad_compute, or shard the stage by FSDP2",
                )

    def open(self) -> None:
        """Until ``close`` their forwards are seen."""
        if self._names:
            with _lock:
                for module, name in self._names.items():
                    seen = _seen.setdefault(module, _Seen(module.__dict__.get("forward")))
                    if seen.times == 0:
                        module.__dict__["forward"] = partial(_call, module, name, module.forward)
                    seen.times += 1

    def close(self) -> None:
        """Puts back what ``open`` has found."""
        if self._names:
            with _lock:
                for module in self._names:
                    seen = _seen[module]
                    seen.times -= 1
                    if seen.times == 0:
                        del _seen[module], module.__dict__["forward"]
                        if seen.forward is not None:
                            module.__dict__["forward"] = seen.forward

    def call(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``forward``, which is the module's, where it was open before ``open``."""
        if module not in self._names:
            return forward(*args, **kwargs)
        return _call(module, self._names[module], forward, *args, **kwargs)


class _Seen:
    """A module whose forwards are seen: how many tapes are open, and what its own attribute ``forward`` was."""

    def __init__(self, forward: Any) -> None:
        self.forward = forward
        self.times = 0


_lock = threading.Lock()
_seen: dict[nn.Module, _Seen] = {}


def _brings_its_own(module: nn.Module) -> bool:
    return callable(getattr(module, "need_backward_dw", None)) and callable(getattr(module, "backward_dw", None))


def _leaves(module: nn.Module) -> bool:
    """Whether its backward leaves weight gradients: of the parameters that are marked, if any is. A frozen weight has
    none."""
    parameters: list[Tensor] = list(module.parameters())
    parameters = [parameter for parameter in parameters if getattr(parameter, _MARK, False)] or parameters
    weights = [parameter for parameter in parameters if parameter.dim() > 1] or parameters
    return any(weight.requires_grad for weight in weights) and bool(module.need_backward_dw())  # type: ignore[operator]


def _call(module: nn.Module, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """In the place of the module's forward; in threads without a tape the same."""
    if not _leaves(module):
        return forward(*args, **kwargs)  # then it is a module as any other
    tape = recording.pause()
    if tape is None:
        return forward(*args, **kwargs)
    if module.training and not torch.is_grad_enabled() and not tape.replays:
        recording.resume(tape)
        raise UnsupportedModule(
            f"{name} leaves weight gradients to its backward_dw(), and runs without gradients in a forward of "
            "training, as under reentrant checkpointing, whose second run nobody would take them from",
            fix="checkpoint with use_reentrant=False, or call the module in eval mode there",
        )
    before = {tensor.grad_fn for tensor in _tensors((args, kwargs))}
    try:
        outputs = forward(*args, **kwargs)
    finally:
        recording.resume(tape)
    if not tape.replays:  # of a checkpoint's second run nothing but the saved tensors counts
        use = OwnUse(tape, module, name)
        for node in {tensor.grad_fn for tensor in _tensors(outputs)} - before:
            if node is not None:
                node.register_prehook(use.reached)
    return outputs


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (Sequence, Mapping)) and not isinstance(values, str):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from _tensors(value)
