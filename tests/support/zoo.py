"""Modules whose backward is hard to split, and two ways to split it, for the tests of the backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipex.backward import Splitter, stage_backward_input, stage_backward_weight


class Block(nn.Module):
    """Pre-norm transformer block with separate projections."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=bias) for bias in (True, False, True, True))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        y = self.norm1(x)
        q, k, v = (layer(y).view(b, t, self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d)
        x = x + self.o(a)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Reused(nn.Module):
    """One linear used three times with another in between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(torch.tanh(self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))))


class TiedLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 8, padding_idx=3), nn.Embedding(6, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.tokens(ids) + self.positions(torch.arange(ids.shape[1])))))


class TiedByHand(TiedLanguageModel):
    """The head is a plain matrix product, which is not recorded: one parameter, both paths."""

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.mix(self.tokens(ids))) @ self.tokens.weight.t()


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu_()).mul_(2)


class EmbeddingInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.out = nn.Embedding(11, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.tokens(ids).mul_(3).add_(1))


class Transposed(nn.Module):
    """Linears on inputs that cannot be flattened without a copy."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 9, bias=bias), nn.Linear(5, 7, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).transpose(1, 2).transpose(0, 1))


class OwnFunction(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        OwnFunction.calls += 1
        x, scale = ctx.saved_tensors
        return dy * scale, (dy * x).sum(0)


class WithOwnFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(OwnFunction.apply(self.a(x), self.scale))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8))
        self.out = nn.Linear(8, 8)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        def region(y: Tensor) -> Tensor:
            self.runs += 1
            return self.inner(y)

        return self.out(checkpoint(region, x, use_reentrant=False))


class Unused(nn.Module):
    """A recorded branch that does not reach the output, and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.dead = nn.Linear(8, 8), nn.Linear(8, 8)
        self.never = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        self.dead(x)
        return self.a(x)


class Shifted(nn.Module):
    """Two parameters whose gradients autograd hands over in the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 4))
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.a + self.b


class BehindLstm(nn.Module):
    """Attention over what an LSTM hands on: of one sample, contiguous, but not with the strides that it would have."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        self.q, self.k, self.v = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lstm(x)[0]
        q, k, v = (layer(x).unsqueeze(1) for layer in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)


class PenaltyInBetween(nn.Module):
    """A weight in recorded operations and in others, by turns: the order of the sum shows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.b(self.a(x)) @ self.a.weight) + 0.1 * self.a.weight.square().mean()
        return self.a(x) + self.a.bias * x


def frozen(module: nn.Module, *names: str) -> nn.Module:
    for name in names:
        module.get_parameter(name).requires_grad_(False)
    return module


def floats(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


def tokens(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, 11, shape)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 5, bias=False)), floats(7, 8)),
    "block": (Block, floats(2, 5, 16)),
    "block of one token": (Block, floats(1, 1, 16)),
    "reused layer": (Reused, floats(3, 8)),
    "tied embedding and head": (TiedLanguageModel, tokens(2, 6)),
    "tied, one use not recorded": (TiedByHand, tokens(2, 6)),
    "in-place operations": (InPlace, floats(4, 8)),
    "in-place operations in three dimensions": (InPlace, floats(2, 3, 8)),
    "in-place operations on an embedding": (EmbeddingInPlace, tokens(2, 6)),
    "transposed inputs": (lambda: Transposed(True), floats(3, 5, 6)),
    "transposed inputs without bias": (lambda: Transposed(False), floats(3, 5, 6)),
    "four dimensions": (lambda: nn.Linear(4, 3), floats(2, 3, 5, 4)),
    "a vector": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), floats(4)),
    "no samples": (lambda: nn.Linear(4, 3), floats(0, 4)),
    "custom Function": (WithOwnFunction, floats(6, 8)),
    "checkpoint": (Checkpointed, floats(6, 8)),
    "unused branch": (Unused, floats(6, 8)),
    "frozen weight": (lambda: frozen(mlp(), "0.weight"), floats(6, 8)),
    "frozen bias": (lambda: frozen(mlp(), "2.bias"), floats(6, 8)),
    "frozen layer": (lambda: frozen(mlp(), "0.weight", "0.bias"), floats(6, 8)),
    "convolution": (convolution, floats(2, 2, 4, 4)),
    "attention module": (lambda: SelfAttention(nn.MultiheadAttention(8, 2, batch_first=True)), floats(2, 5, 8)),
    "lstm": (lambda: First(nn.LSTM(8, 8, batch_first=True)), floats(2, 5, 8)),
    "attention behind an lstm": (BehindLstm, floats(1, 6, 6)),
    "weight used in two ways, by turns": (PenaltyInBetween, floats(6, 8)),
    "scaled embedding": (lambda: nn.Embedding(11, 4, scale_grad_by_freq=True), tokens(2, 9)),
    "embedding with max_norm": (lambda: nn.Embedding(11, 4, max_norm=1.0), tokens(2, 9)),
    "bfloat16": (lambda: mlp().bfloat16(), lambda: torch.randn(6, 8).bfloat16()),
    "float64": (lambda: mlp().double(), lambda: torch.randn(6, 8).double()),
}  # fmt: skip


class SelfAttention(nn.Module):
    def __init__(self, inner: nn.MultiheadAttention) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class First(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


def run_split(
    module: nn.Module, x: Tensor, dy: Tensor, splitter: Splitter | None = None
) -> tuple[Tensor, Tensor | None]:
    inputs = [x] if x.requires_grad else []
    with (splitter or Splitter(module.parameters())).record() as tape:
        y = module(x)
    found = tape.backward_input([y], [dy], inputs)
    tape.backward_weight()
    return y, found[0] if found else None


def run_functions(
    module: nn.Module, x: Tensor, dy: Tensor, splitter: Splitter | None = None
) -> tuple[Tensor, Tensor | None]:
    """The functions with torch's signatures; over a prepared forward where there is a splitter."""
    if splitter is None:
        y = module(x)
    else:
        with splitter.record():
            y = module(x)
    before = [p.grad for p in module.parameters()]
    versions = [None if g is None else g._version for g in before]
    (gradient,), rest = stage_backward_input([y], [dy], [x], module.parameters())
    after = [p.grad for p in module.parameters()]
    assert all(a is b for a, b in zip(after, before, strict=True)), "I must leave weights alone"
    assert versions == [None if g is None else g._version for g in after]
    x.grad = None
    stage_backward_weight(module.parameters(), rest)
    return y, gradient
