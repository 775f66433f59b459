"""Modules under tensor, sequence and loss parallelism, in DTensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from module_kinds import KINDS, Part, weight
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

WORDS, WIDTH, HEADS, ROWS, TOKENS = 12, 8, 4, 2, 4


class Mlp(nn.Module):
    """A linear layer by columns and one by rows, both with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    """As many heads as this rank has."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Of a Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention, self.mlp = Attention(), Gated()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    """Of words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.block = nn.Embedding(WORDS, WIDTH), Block()
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.words(tokens))))


def parallel_mlp(mesh: DeviceMesh) -> nn.Module:
    torch.manual_seed(0)
    return parallelize_module(Mlp(), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def parallel_block(mesh: DeviceMesh) -> nn.Module:
    """Between blocks every rank has a part of the sequence."""
    torch.manual_seed(0)
    return _parallelized(Block(), mesh)


def _parallelized(block: Block, mesh: DeviceMesh) -> nn.Module:
    gathers = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    return parallelize_module(
        block,
        mesh,
        {
            "attention_norm": SequenceParallel(),
            "attention": gathers,
            "attention.q": ColwiseParallel(),
            "attention.k": ColwiseParallel(),
            "attention.v": ColwiseParallel(),
            "attention.o": RowwiseParallel(output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "mlp": gathers,
            "mlp.gate": ColwiseParallel(),
            "mlp.up": ColwiseParallel(),
            "mlp.down": RowwiseParallel(output_layouts=Shard(1)),
        },
    )


def parallel_model(mesh: DeviceMesh) -> nn.Module:
    """Its logits stay in parts, for ``loss_parallel``."""
    torch.manual_seed(0)
    model = Model()
    _parallelized(model.block, mesh)
    return parallelize_module(
        model,
        mesh,
        {
            "words": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
        },
    )


class OfWhole(nn.Module):
    """Brings an input that all ranks have into a layout, and the output back to all."""

    def __init__(self, inner: nn.Module, mesh: DeviceMesh, layout: Placement) -> None:
        super().__init__()
        self.inner, self.mesh, self.layout = inner, mesh, layout

    def forward(self, x: Tensor) -> Tensor:
        x = DTensor.from_local(x, self.mesh, [Replicate()]).redistribute(placements=[self.layout])
        return self.inner(x).redistribute(placements=[Replicate()]).to_local()


def tied(m: nn.Module, x: Tensor) -> Tensor:
    """The words' and the head's weight is one."""
    tokens = (x.detach() * 5).long()[..., 0] % WIDTH
    return F.linear(F.embedding(tokens, m.w) + x, m.w)


def punished(m: nn.Module, x: Tensor) -> Tensor:
    """A penalty on the weight, made where autograd makes gradients."""
    return F.linear(x, m.w) + m.w.square().sum()


def in_parts(m: nn.Module, x: Tensor) -> Tensor:
    """Of weights that are taken out of DTensors, or put into one."""
    put = DTensor.from_local(m.w.to_local(), m.w.device_mesh, m.w.placements)
    taken = torch.bmm(x.redistribute(placements=[Replicate()]).to_local(), m.experts.full_tensor())
    return DTensor.from_local(taken, x.device_mesh, [Replicate()]) + F.linear(x, put)


def frozen() -> nn.Parameter:
    return weight(WIDTH, WIDTH).requires_grad_(False)


OPERATIONS: dict[str, Callable[[], nn.Module]] = {
    **KINDS,
    "tied": lambda: Part(tied, w=weight(WIDTH, WIDTH)),
    "punished": lambda: Part(punished, w=weight(WIDTH, WIDTH)),
    "weights in parts": lambda: Part(in_parts, w=weight(WIDTH, WIDTH), experts=weight(ROWS, WIDTH, WIDTH)),
    "prompt": lambda: Part(
        lambda m, x: x + F.linear(m.prompt.view(1, WIDTH), m.w), w=weight(WIDTH, WIDTH), prompt=weight(WIDTH)
    ),
    "frozen weight": lambda: Part(lambda m, x: F.linear(x, m.w, m.b), w=frozen(), b=weight(WIDTH)),
    "input that is a parameter": lambda: Part(
        lambda m, x: x + F.linear(m.x, m.w), w=weight(WIDTH, WIDTH), x=weight(TOKENS, WIDTH)
    ),
}


def distributed(kind: str, by: Placement, layout: Placement, mesh: DeviceMesh) -> nn.Module:
    """A module of this kind whose parameters are distributed by a placement, those that have such a dimension."""
    torch.manual_seed(0)

    def distribute(_: str, part: nn.Module, mesh: DeviceMesh) -> None:
        for name, parameter in list(part.named_parameters(recurse=False)):
            there = by if by.is_replicate() or by.dim < parameter.dim() else Replicate()
            whole = distribute_tensor(parameter.detach(), mesh, [there])
            part.register_parameter(name, nn.Parameter(whole, parameter.requires_grad))

    return OfWhole(distribute_module(OPERATIONS[kind](), mesh, distribute), mesh, layout)
