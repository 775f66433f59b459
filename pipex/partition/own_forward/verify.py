"""The stages, one after the other, beside the model as it is: outputs and gradients, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipex.errors import PipexError, UnsupportedModule, headline
from pipex.partition.own_forward.arguments import Arguments
from pipex.partition.own_forward.loss import loss_in
from pipex.partition.own_forward.record import Record, Seed
from pipex.partition.own_forward.stage import ModelStage, Verified
from pipex.partition.stage import Keywords
from pipex.torch_internals import tree_leaves, unsafe_view

ROUNDED = 1e-6
"""How far a gradient may be off, relative to its norm: where several stages add to it, they do so in another order. Of
float32; of other dtypes by as many roundings."""


def verify_stages(
    model: nn.Module, stages: Sequence[ModelStage], record: Record, arguments: Arguments, seed: Seed
) -> Verified:
    """Runs forward and backward of the sample.

    Args:
        seed: that the model was recorded with.

    Raises:
        UnsupportedModule: names the first tensor that differs.
    """
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inputs, outputs = _forward(stages, arguments, seed)
    got = tree_leaves(outputs[-1])
    for number, (one, needed) in enumerate(zip(got, record.output, strict=False)):
        if isinstance(needed, Tensor) and not (isinstance(one, Tensor) and _equal(one, needed)):
            raise _differs(f"output {number} of the model", one, needed)
    if len(got) != len(record.output):
        raise _differs("the output of the model", f"{len(got)} parts", f"{len(record.output)} parts")
    roots, seeds = _roots(record.live)
    if not roots or not parameters:
        return Verified(len(got), 0, {})
    gradients = _grad(roots, list(parameters.values()), seeds)
    needed_gradients = {n: g for n, g in zip(parameters, gradients, strict=True) if g is not None}
    found = _backward(stages, inputs, outputs, names)
    rounded: dict[str, float] = {}
    for name in parameters:
        one, needed = found.get(name), needed_gradients.get(name)
        if needed is None and (one is None or all(not part.any() for part in one)):
            continue
        if one is None or needed is None:
            words = ["none" if gradient is None else "one" for gradient in (one, needed)]
            raise _differs(f"the gradient of {name}", *words)
        total = one[0]
        for part in one[1:]:
            total = total + part
        if _equal(total, needed):
            continue
        rounded[name] = float((total - needed).norm() / needed.norm().clamp_min(torch.finfo(needed.dtype).tiny))
        if not rounded[name] <= _allowed(needed.dtype):
            raise _differs(f"the gradient of {name}", total, needed)
    return Verified(len(got), len(needed_gradients), rounded)


def _forward(stages: Sequence[ModelStage], arguments: Arguments, seed: Seed) -> tuple[list[list[Tensor]], list[Any]]:
    """What every stage was given, and what it has returned."""
    args, kwargs = arguments.sample()
    given: Sequence[Any] = (*args, Keywords({name: kwargs[name] for name in arguments.names}))
    inputs: list[list[Tensor]] = []
    outputs: list[Any] = []
    leaves: list[Tensor] = []
    with torch.enable_grad():
        for stage in stages:
            stage.before_layer = lambda position, stage=stage: seed(stage.first_layer + position)
            try:
                outputs.append(stage(*given))
            except PipexError:
                raise
            except Exception as error:
                raise UnsupportedModule(
                    f"stage {stage.index} cannot begin at {stage.begin}", got=headline(error),
                    needed="a forward that runs without the layers of other stages", fix="cut it elsewhere (balance=)",
                ) from error  # fmt: skip
            finally:
                stage.before_layer = None
            inputs.append(leaves)
            if stage is not stages[-1]:
                received = [t.detach().requires_grad_(t.requires_grad) for t in outputs[-1]]
                leaves = [t for t in received if t.requires_grad]
                # The forward may work in place on what it gets, which autograd forbids for leaves.
                given = [unsafe_view(t, t.shape) if t.requires_grad else t for t in received]
    return inputs, outputs


def _backward(
    stages: Sequence[ModelStage], inputs: Sequence[list[Tensor]], outputs: Sequence[Any], names: Mapping[int, str]
) -> dict[str, list[Tensor]]:
    """By name the gradients of each parameter, of one stage after the other."""
    found: dict[str, list[Tensor]] = {}
    seeds: Sequence[Tensor | None]
    roots, seeds = _roots(outputs[-1])
    for stage in reversed(stages):
        own = [p for p in dict.fromkeys(stage.parameters()) if p.requires_grad]
        leaves = inputs[stage.index]
        last = stage is stages[-1]
        pairs = [(root, seed) for root, seed in zip(roots, seeds, strict=True) if last or seed is not None]
        wanted = [*own, *leaves]
        gradients: Sequence[Tensor | None] = [None] * len(wanted)
        if pairs and wanted:
            gradients = _grad([r for r, _ in pairs], wanted, [s for _, s in pairs])
        for parameter, gradient in zip(own, gradients, strict=False):
            if gradient is not None:
                found.setdefault(names[id(parameter)], []).insert(0, gradient)
        seeds = gradients[len(own) :]
        if stage.index:
            roots = [t for t in outputs[stage.index - 1] if t.requires_grad]
    return found


def _grad(roots: Sequence[Tensor], wanted: Sequence[Tensor], seeds: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Not by backward, since the parameters' hooks and ``.grad`` are the user's."""
    try:
        return torch.autograd.grad(roots, wanted, seeds, allow_unused=True)
    except RuntimeError as error:
        raise UnsupportedModule(
            "the model's backward cannot be compared with that of its stages", got=headline(error),
            needed="one that torch.autograd.grad can make",
            fix="checkpoint with use_reentrant=False, or leave the comparison out (verify=False)",
        ) from error  # fmt: skip


def _roots(output: Any) -> tuple[list[Tensor], list[Tensor | None]]:
    """Where a backward starts: the loss, if there is one, or all that is returned."""
    loss = loss_in(output)
    if loss is not None:
        return ([loss], [None]) if loss.requires_grad else ([], [])
    roots = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return roots, [_weights(root) for root in roots]


def _weights(tensor: Tensor) -> Tensor:
    """No two alike, so that what a softmax or a norm adds up to a constant does not hide."""
    numbers = torch.arange(tensor.numel(), dtype=torch.float64).cos().reshape(tensor.shape)
    return numbers.to(tensor.dtype).to(tensor.device)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _allowed(dtype: torch.dtype) -> float:
    return ROUNDED * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps


def _differs(what: str, got: object, needed: object) -> UnsupportedModule:
    if isinstance(got, Tensor) and isinstance(needed, Tensor) and got.shape == needed.shape:
        needed_values = needed.detach().double()
        off = float((got.detach().double() - needed_values).norm() / needed_values.norm().clamp_min(1e-300))
        got, needed = f"values that are off by {off:.2g}, relative to their norm", "the bits of the model as it is"
    return UnsupportedModule(
        f"the stages do not compute what the model computes: {what} differs",
        got=f"a tensor of shape {list(got.shape)}" if isinstance(got, Tensor) else got,
        needed=f"one of shape {list(needed.shape)}" if isinstance(needed, Tensor) else needed,
        fix="cut it elsewhere (balance=), name other lists of layers (layers=), or, if that is rounding, leave the "
        "comparison out (verify=False)",
    )  # fmt: skip
