"""Parts with parameters of every kind, for the split backward: each maps (2, 4, 8) to the same shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

ROWS, TOKENS, WIDTH = 2, 4, 8


class Part(nn.Module):
    """Args:
    act: maps the module and an activation to an activation.
    parts: submodules and parameters by name.
    """

    def __init__(self, act: Callable[[nn.Module, Tensor], Tensor], **parts: object) -> None:
        super().__init__()
        self.act = act
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self, x)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * 0.3)


def square() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


class Doubled(nn.Module):
    """A user's parametrization, with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = weight(WIDTH, WIDTH)

    def forward(self, given: Tensor) -> Tensor:
        return given + given @ self.mix


def parametrized(parametrization: nn.Module) -> nn.Module:
    return Part(
        lambda m, x: m.inner(x), inner=parametrize.register_parametrization(square(), "weight", parametrization)
    )


class Conv1D(nn.Module):
    """GPT-2's: a linear layer with a transposed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = weight(WIDTH, WIDTH), weight(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, WIDTH), self.weight).view(x.shape)


class Attention(nn.Module):
    """nn.MultiheadAttention of an activation and two others made of it."""

    def __init__(self, own_widths: bool, batch_first: bool = True) -> None:
        super().__init__()
        widths = {"kdim": WIDTH // 2, "vdim": WIDTH // 4} if own_widths else {}
        self.inner = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first, **widths)
        self.own_widths = own_widths

    def forward(self, x: Tensor) -> Tensor:
        keys, values = x.tanh(), x.sin()
        if self.own_widths:
            keys, values = keys[..., : WIDTH // 2], values[..., : WIDTH // 4]
        return self.inner(x, keys, values, need_weights=False)[0]


class Product(torch.autograd.Function):
    """Makes its weight's gradient wherever autograd comes by, as kernels of other libraries do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        x, w = ctx.saved_tensors
        return dy @ w.t(), x.flatten(0, 1).t() @ dy.flatten(0, 1) if ctx.needs_input_grad[1] else None


def opaque() -> nn.Module:
    """A linear layer that nobody can split."""
    return Part(lambda m, x: Product.apply(x, m.w), w=weight(WIDTH, WIDTH))


def grouped_experts(m: nn.Module, x: Tensor) -> Tensor:
    """Ragged over the rows; the second expert has none."""
    offsets = torch.tensor([3, 3, ROWS * TOKENS], dtype=torch.int32)
    return F.grouped_mm(x.reshape(-1, WIDTH), m.w, offs=offsets).view(x.shape)


def image(x: Tensor) -> Tensor:
    return x.reshape(ROWS, 2, TOKENS, WIDTH // 2)


def volume(x: Tensor) -> Tensor:
    return x.reshape(ROWS, 2, 2, 2, WIDTH // 2)


def conv(layer: nn.Module, view: Callable[[Tensor], Tensor]) -> nn.Module:
    return Part(lambda m, x: m.inner(view(x)).reshape(x.shape), inner=layer)


def tokens_of(x: Tensor) -> Tensor:
    return (x.detach() * 5).long() % 7


KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": square,
    "linear without bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "linear of a transposed input": lambda: Part(
        lambda m, x: m.inner(x.transpose(0, 1)).transpose(0, 1), inner=square()
    ),
    "linear of a part of the input": lambda: Part(
        lambda m, x: m.inner(x[..., ::2]), inner=nn.Linear(WIDTH // 2, WIDTH)
    ),
    "linear of vectors": lambda: Part(
        lambda m, x: torch.stack([torch.stack([m.inner(v) for v in row.unbind()]) for row in x.unbind()]),
        inner=square(),
    ),
    "linear with a transposed weight": lambda: Part(lambda m, x: F.linear(x, m.w.t()), w=weight(WIDTH, WIDTH)),
    "linear with half of a weight": lambda: Part(lambda m, x: F.linear(x, m.w[:WIDTH]), w=weight(2 * WIDTH, WIDTH)),
    "linear with chunks of a weight": lambda: Part(
        lambda m, x: sum(F.linear(x, w, b) for w, b in zip(m.w.chunk(2), m.b.chunk(2), strict=True)),
        w=weight(2 * WIDTH, WIDTH), b=weight(2 * WIDTH),
    ),
    "mlp": lambda: nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH)),
    "norm": lambda: nn.LayerNorm(WIDTH),
    "root mean square norm": lambda: nn.Sequential(nn.RMSNorm(WIDTH), square()),
    "x @ w": lambda: Part(lambda m, x: x @ m.w, w=weight(WIDTH, WIDTH)),
    "x @ w.t()": lambda: Part(lambda m, x: x @ m.w.t(), w=weight(WIDTH, WIDTH)),
    "x @ w.mT": lambda: Part(lambda m, x: torch.matmul(x, m.w.mT), w=weight(WIDTH, WIDTH)),
    "w @ x": lambda: Part(lambda m, x: m.w @ x, w=weight(TOKENS, TOKENS)),
    "w @ x.mT": lambda: Part(lambda m, x: (m.w @ x.mT).mT, w=weight(WIDTH, WIDTH)),
    "x @ w of a batch": lambda: Part(lambda m, x: x @ m.w, w=weight(ROWS, WIDTH, WIDTH)),
    "x @ v": lambda: Part(lambda m, x: (x @ m.w).unsqueeze(-1) + x, w=weight(WIDTH)),
    "mm": lambda: Part(lambda m, x: torch.mm(x.reshape(-1, WIDTH), m.w).view(x.shape), w=weight(WIDTH, WIDTH)),
    "mm of a weight and an input": lambda: Part(
        lambda m, x: m.w.mm(x.reshape(-1, WIDTH)).view(x.shape), w=weight(WIDTH, WIDTH)
    ),
    "addmm": Conv1D,
    "addmm with factors": lambda: Part(
        lambda m, x: torch.addmm(m.b, x.reshape(-1, WIDTH), m.w, beta=0.5, alpha=2).view(x.shape),
        w=weight(WIDTH, WIDTH), b=weight(WIDTH),
    ),
    "bmm": lambda: Part(lambda m, x: torch.bmm(x, m.w), w=weight(ROWS, WIDTH, WIDTH)),
    "bmm of a weight and an input": lambda: Part(lambda m, x: torch.bmm(m.w, x), w=weight(ROWS, TOKENS, TOKENS)),
    "baddbmm": lambda: Part(
        lambda m, x: torch.baddbmm(m.b, x, m.w, alpha=0.5), w=weight(ROWS, WIDTH, WIDTH), b=weight(ROWS, 1, WIDTH)
    ),
    "einsum": lambda: Part(lambda m, x: torch.einsum("btd,de->bte", x, m.w), w=weight(WIDTH, WIDTH)),
    "einsum of heads": lambda: Part(
        lambda m, x: torch.einsum("bhte,hed->btd", torch.einsum("btd,hde->bhte", x, m.w), m.o),
        w=weight(2, WIDTH, 4), o=weight(2, 4, WIDTH),
    ),
    "einsum over tokens": lambda: Part(lambda m, x: torch.einsum("st,btd->bsd", m.w, x), w=weight(TOKENS, TOKENS)),
    "grouped experts": lambda: Part(grouped_experts, w=weight(3, WIDTH, WIDTH)),
    "batched experts": lambda: Part(
        lambda m, x: torch.bmm(torch.bmm(x, m.up).relu(), m.down),
        up=weight(ROWS, WIDTH, 4), down=weight(ROWS, 4, WIDTH),
    ),
    "one-dimensional convolution": lambda: conv(nn.Conv1d(TOKENS, TOKENS, 3, padding=1), lambda x: x),
    "two-dimensional convolution": lambda: conv(nn.Conv2d(2, 2, 3, padding=1), image),
    "three-dimensional convolution": lambda: conv(nn.Conv3d(2, 2, 3, padding=1), volume),
    "grouped convolution": lambda: conv(nn.Conv2d(2, 2, 3, padding=1, groups=2, bias=False), image),
    "padded convolution": lambda: conv(nn.Conv2d(2, 2, 3, padding="same", padding_mode="circular"), image),
    "convolution with strides": lambda: Part(
        lambda m, x: x + m.inner(image(x)).mean((1, 2, 3)).view(-1, 1, 1),
        inner=nn.Conv2d(2, 3, 2, stride=2, dilation=2),
    ),
    "transposed convolution": lambda: conv(nn.ConvTranspose1d(TOKENS, TOKENS, 3, padding=1), lambda x: x),
    "transposed grouped convolution": lambda: conv(nn.ConvTranspose2d(2, 2, 3, padding=1, groups=2), image),
    "transposed three-dimensional convolution": lambda: conv(nn.ConvTranspose3d(2, 2, 3, padding=1), volume),
    "self-attention": lambda: Part(
        lambda m, x: m.inner(x, x, x, need_weights=False)[0], inner=nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    ),
    "cross-attention": lambda: Attention(False),
    "attention over the first dimension": lambda: Attention(False, batch_first=False),
    "attention with widths of its own": lambda: Attention(True),
    "encoder layer": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 12, dropout=0.0, batch_first=True),
    "LoRA pair": lambda: Part(
        lambda m, x: m.inner(x) + F.linear(F.linear(x, m.a), m.b),
        inner=square().requires_grad_(False), a=weight(2, WIDTH), b=weight(WIDTH, 2),
    ),
    "merged LoRA pair": lambda: Part(
        lambda m, x: F.linear(x, m.w + m.b @ m.a),
        w=weight(WIDTH, WIDTH).requires_grad_(False), a=weight(2, WIDTH), b=weight(WIDTH, 2),
    ),
    "weight norm": lambda: parametrizations.weight_norm(square()),
    "orthogonal": lambda: parametrizations.orthogonal(square()),
    "own parametrization": lambda: parametrized(Doubled()),
    "cast weight": lambda: Part(lambda m, x: F.linear(x.double(), m.w.double()).to(x.dtype), w=weight(WIDTH, WIDTH)),
    "scaled weight": lambda: Part(lambda m, x: F.linear(x, m.w * m.scale), w=weight(WIDTH, WIDTH), scale=weight(1)),
    "embedding": lambda: Part(lambda m, x: x + m.inner(tokens_of(x[..., 0])), inner=nn.Embedding(7, WIDTH)),
    "bilinear": lambda: Part(lambda m, x: m.inner(x, x.tanh()), inner=nn.Bilinear(WIDTH, WIDTH, WIDTH)),
}  # fmt: skip
