"""Random models of layers of every kind, and their training by plain torch: nothing of pipex is in here."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from layer_kinds import KINDS, SIZE, Layer, lin
from torch import Tensor, nn

STEPS = 3
SEED = 11  # of the layers that draw

AGAIN, WEIGHT_AGAIN = "a layer again", "a weight again"
"""Kinds that share a module, or a parameter, with a layer before."""

SHAREABLE = {"linear", "linear without bias", "residual", "custom Function", "penalty on a weight"}


@dataclass(frozen=True)
class Model:
    """Layers of these kinds, by stage; and how they are trained."""

    seed: int
    kinds: tuple[tuple[str, ...], ...]
    microbatches: int
    samples: int

    def layers(self) -> list[nn.Module]:
        """The same on every call."""
        torch.manual_seed(self.seed)
        chance = random.Random(self.seed)
        layers: list[nn.Module] = []
        shareable: list[Any] = []
        for kind in (kind for stage in self.kinds for kind in stage):
            if kind == AGAIN and shareable:
                layers.append(chance.choice(shareable))
            elif kind == WEIGHT_AGAIN and shareable:
                twin = Layer(lambda m, x: torch.tanh(m.inner(x)), inner=lin())
                twin.inner.weight = chance.choice(shareable).inner.weight
                layers.append(twin)
            else:
                layers.append(KINDS[kind if kind in KINDS else "linear"]())
            if kind in SHAREABLE:
                shareable.append(layers[-1])
        return layers

    @property
    def counts(self) -> list[int]:
        return [len(stage) for stage in self.kinds]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 * self.seed + step)
        x, y = torch.randn(2, self.samples, SIZE, SIZE, generator=generator)
        return x, y


def draw(seed: int, stages: int, microbatches: int, without: Iterable[str] = ()) -> Model:
    """A model for a seed, of so many stages."""
    chance = random.Random(seed)
    kinds = sorted({*KINDS, AGAIN, WEIGHT_AGAIN} - set(without))
    drawn = tuple(tuple(chance.choices(kinds, k=chance.choice((1, 1, 2, 3)))) for _ in range(stages))
    return Model(seed, drawn, microbatches, microbatches * chance.randint(1, 3) + chance.randint(0, 2))


def loss_fn(output: Any, target: Tensor) -> Tensor:
    """Of all that the last layer returns."""
    first, *more = output if isinstance(output, tuple) else (output,)
    return F.mse_loss(first, target) + 0.1 * sum(t.float().square().mean() for t in more)


def optimizer(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def digest(tensor: Tensor | None) -> str | None:
    if tensor is None:
        return None
    data = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return hashlib.blake2b(data.contiguous().numpy().tobytes(), digest_size=8).hexdigest()


def tensors(layers: Iterable[tuple[int, nn.Module]]) -> dict[str, str | None]:
    """A digest of every parameter and buffer, by the number of the layer and its name there."""
    return {
        f"{number}.{name}": digest(tensor)
        for number, layer in layers
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers())
    }


def gradients(layers: Iterable[tuple[int, nn.Module]]) -> dict[str, str | None]:
    return {f"{n}.{name}": digest(p.grad) for n, layer in layers for name, p in layer.named_parameters()}


# Plain torch.


class Stage(nn.Module):
    def __init__(self, first: int, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.first, self.layers = first, nn.ModuleList(layers)

    def forward(self, values: Any, base: int) -> Any:
        for number, layer in enumerate(self.layers, self.first):
            torch.default_generator.manual_seed(seed_of(base, number))
            values = layer(*values) if isinstance(values, tuple) else layer(values)
        return values


def seed_of(base: int, layer: int) -> int:
    """The contract for layers that draw, as the README has it."""
    return (base + layer * 0x9E3779B97F4A7C15) % 2**64


def base_of(step: int, microbatch: int) -> int:
    packed = struct.pack("<3q", SEED, step, microbatch)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


class Plain:
    """The model in one process: micro-batch by micro-batch through the whole of it, one backward each. A parameter in
    several stages has a stand-in in each but the first of them, and their gradients are added in stage order; with
    several copies of the model it has one in each stage of each copy.

    ``copy_of``: which copy each micro-batch passes.
    """

    def __init__(self, model: Model, copy_of: Sequence[int] = ()) -> None:
        self.model, self.layers = model, model.layers()
        self.copies = max(copy_of, default=0) + 1
        self.copy_of = copy_of or [0] * model.microbatches
        self.stages: list[Stage] = []
        first = 0
        for count in model.counts:
            self.stages.append(Stage(first, self.layers[first : first + count]))
            first += count
        self.parameters = list(dict.fromkeys(p for s in self.stages for p in s.parameters() if p.requires_grad))
        self.stand_ins = list(self._stand_ins())

    def _stand_ins(self) -> Iterator[dict[str, Tensor]]:
        known: set[Tensor] = set()
        for stage in self.stages * self.copies:
            held = dict(stage.named_parameters())
            yield {n: p.detach().requires_grad_() for n, p in held.items() if p in known and p.requires_grad}
            known.update(held.values())

    def losses(self, step: int) -> Iterator[Tensor]:
        batch, target = self.model.batch(step)
        pieces = zip(
            batch.tensor_split(self.model.microbatches), target.tensor_split(self.model.microbatches), strict=True
        )
        for microbatch, (values, wanted) in enumerate(pieces):
            samples, base = len(values), base_of(step, microbatch)
            values = values.data  # a version counter of its own
            first = self.copy_of[microbatch] * len(self.stages)
            for stage, stand_ins in zip(self.stages, self.stand_ins[first:], strict=False):
                values = torch.func.functional_call(stage, stand_ins, (values, base))
            torch.default_generator.manual_seed(seed_of(base, len(self.layers)))
            yield loss_fn(values, wanted) * (samples / len(batch))

    def train(self, steps: int = STEPS) -> dict[str, Any]:
        """Everything that can be compared; raises what torch raises."""
        found: dict[str, Any] = {"losses": [], "gradients": []}
        update = optimizer(self.parameters)
        for step in range(1, steps + 1):
            total = None
            for loss in self.losses(step):
                loss.backward()
                total = loss.detach() if total is None else total + loss.detach()
            for stage, stand_ins in zip(self.stages * self.copies, self.stand_ins, strict=True):
                for name, stand_in in stand_ins.items():
                    parameter = stage.get_parameter(name)
                    mine, other = parameter.grad, stand_in.grad
                    parameter.grad = other if mine is None else mine if other is None else mine + other
                    stand_in.grad = None
            found["losses"].append(total.item())
            found["gradients"].append(gradients(enumerate(self.layers)))
            update.step()
            update.zero_grad()
        found["tensors"] = tensors(enumerate(self.layers))
        for stage in self.stages:
            stage.eval()
        with torch.no_grad():
            first, *rest = self.losses(steps + 1)
        found["evaluated"] = sum(rest, first).item()
        return found
