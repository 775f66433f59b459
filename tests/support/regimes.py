"""Regimes in which people train, as ways to call a module, and a split beside an unsplit backward in one of them."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from pipex.backward import Splitter, Tape, stage_backward
from pipex.backward.stage_backward import weight_later
from pipex.bench.deferred import Products, Shares

Call = Callable[[nn.Module, Tensor], Tensor]


def plain(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def autocast(dtype: torch.dtype) -> Call:
    def call(module: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return module(x)

    return call


def checkpointed(module: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(module, x, use_reentrant=False)


def nested(module: nn.Module, x: Tensor) -> Tensor:
    """Every child of a sequence, within the whole."""
    inner: Callable[[Tensor], Tensor] = partial(checkpointed, module)
    if isinstance(module, nn.Sequential):
        inner = partial(_in_turn, list(module))
    return checkpoint(inner, x, use_reentrant=False)


def _in_turn(layers: list[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = checkpoint(layer, x, use_reentrant=False)
    return x


def _save_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
    return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE


def selective(module: nn.Module, x: Tensor) -> Tensor:
    contexts = partial(create_selective_checkpoint_contexts, _save_products)
    return checkpoint(module, x, use_reentrant=False, context_fn=contexts)


def packed(module: nn.Module, x: Tensor) -> Tensor:
    """As offloading does, with hooks of somebody else."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        return module(x)


def within(outer: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor], inner: Call) -> Call:
    """``inner``, called in ``outer``."""

    def call(module: nn.Module, x: Tensor) -> Tensor:
        return outer(partial(inner, module), x)

    return call


bf16 = autocast(torch.bfloat16)

REGIMES: dict[str, Call] = {
    "plain": plain,
    "bf16 autocast": bf16,
    "fp16 autocast": autocast(torch.float16),
    "checkpointed": checkpointed,
    "checkpointed but for products": selective,
    "checkpointed twice": nested,
    "packed": packed,
    "autocast within a checkpoint": within(checkpointed, bf16),
    "a checkpoint within autocast": within(bf16, checkpointed),
    "products kept, within autocast": within(bf16, selective),
    "checkpointed twice, within autocast": within(bf16, nested),
}


def digest(tensor: Tensor | None) -> str | None:
    """Of all bits, dtype and shape."""
    if tensor is None:
        return None
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{hashlib.blake2b(data, digest_size=8).hexdigest()} {tensor.dtype} {tuple(tensor.shape)}"


Heard = dict[tuple[str, str], list[str | None]]
"""By kind of hook and name of the parameter: what it was called with."""


def listen(module: nn.Module, names: Iterable[str], factor: float = 1.0) -> Heard:
    """Puts a hook on the gradient of these parameters, which it multiplies, and one that waits for ``.grad``."""
    heard: Heard = defaultdict(list)
    parameters = dict(module.named_parameters())
    for name in names:

        def on_gradient(gradient: Tensor, name: str = name) -> Tensor | None:
            heard["gradient", name].append(digest(gradient))
            return None if factor == 1 else gradient * factor

        def on_accumulated(parameter: Tensor, name: str = name) -> None:
            heard["accumulated", name].append(digest(parameter.grad))

        parameters[name].register_hook(on_gradient)
        parameters[name].register_post_accumulate_grad_hook(on_accumulated)
    return heard


def bits(module: nn.Module) -> dict[str, str | None]:
    return {name: digest(p.grad) for name, p in module.named_parameters()}


class Micro:
    """One micro-batch of a split backward.

    Args:
        functions: by ``stage_backward``, as stages of torch do; else by the tape.
    """

    def __init__(self, splitter: Splitter, call: Call, module: nn.Module, x: Tensor, *, functions: bool) -> None:
        self.x, self.functions, self.tapes = x, functions, list[Any]()
        with splitter.record() as tape:
            self.y: Tensor | None = call(module, x)
        self.tape: Tape = tape

    def input(self, dy: Tensor) -> Tensor | None:
        y, self.y = self.y, None
        inputs = [self.x] if self.x.requires_grad else []
        if self.functions:
            with weight_later(self.tapes.append):
                found = stage_backward((y,), (dy,), inputs)
        else:
            found = self.tape.backward_input([y], [dy], inputs) if y.requires_grad else ()
            self.tapes = [self.tape]
        return found[0] if found else None

    def weight(self) -> None:
        for tape in self.tapes:
            tape.backward_weight()


def shares(build: Callable[[], nn.Module], call: Call, x: Tensor, *, warm_up: bool = False) -> Shares:
    """How many products of one micro-batch run where, the module built anew for each way.

    Args:
        warm_up: run everything once before (a compiler traces then).
    """

    def fresh() -> tuple[Tensor, nn.Module]:
        torch.manual_seed(1)
        return x.detach().clone().requires_grad_(x.requires_grad), build()

    for _ in range(1 + warm_up):
        copy, module = fresh()
        y = call(module.requires_grad_(False), copy)
        dy = torch.randn_like(y)
        with Products() as for_inputs:
            if copy.requires_grad:
                y.backward(dy)
        copy, module = fresh()
        y = call(module, copy)
        with Products() as whole:
            y.backward(dy)
        copy, module = fresh()
        micro = Micro(Splitter.of(module), call, module, copy, functions=False)
        with Products() as in_input:
            micro.input(dy)
        with Products() as in_weight:
            micro.weight()
    return Shares(for_inputs.count, whole.count, in_input.count, in_weight.count)
