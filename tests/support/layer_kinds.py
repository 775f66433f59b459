"""Layers of every kind, for random models: each maps activations of one shape to others of that shape.

A layer gets further tensors behind its input, and hands them on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

SIZE = 6  # activations are (N, SIZE, SIZE), so that a transpose keeps the shape


class Layer(nn.Module):
    """Args:
    act: maps the module and an activation to an activation.
    parts: submodules, parameters (``nn.Parameter``) and buffers (other tensors) by name; the rest are attributes.
    """

    def __init__(self, act: Callable[[nn.Module, Tensor], Tensor], **parts: object) -> None:
        super().__init__()
        self.act = act
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor, *more: Tensor) -> Tensor | tuple[Tensor, ...]:
        y = self.act(self, x)
        return (y, *more) if more else y


class Adding(nn.Module):
    """Hands one tensor more on."""

    def __init__(self, make: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.make, self.side = make, lin()

    def forward(self, x: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        return x, *more, self.make(self, x)


class Merging(nn.Module):
    """Takes in all that was handed on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = lin()

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        for tensor in more:
            x = x + tensor
        return self.linear(x)


class Dropping(nn.Module):
    """Takes in nothing of what was handed on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = lin()

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        return self.linear(x)


class Collecting(nn.Module):
    """Adds to what is handed on, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = lin()

    def forward(self, x: Tensor, *more: Tensor) -> Tensor | tuple[Tensor, ...]:
        y = torch.tanh(self.linear(x))
        return (y, *(tensor.add_(y) if tensor.is_floating_point() else tensor for tensor in more)) if more else y


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        return dy * 2


def lin(bias: bool = True) -> nn.Linear:
    return nn.Linear(SIZE, SIZE, bias=bias)


def frozen(module: nn.Module, *names: str) -> nn.Module:
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in names)
    return module


def hooked(register: Callable[[nn.Linear], object]) -> Layer:
    linear = lin()
    register(linear)
    return Layer(lambda m, x: m.hooked(m.before(x)), before=lin(), hooked=linear)


def grow(parameter: Tensor) -> None:
    parameter.grad.mul_(1.01)


def mean(x: Tensor) -> Tensor:
    return x.detach().abs().mean((0, 1))


def assign(module: nn.Module, name: str, value: object) -> None:
    setattr(module, name, value)


def attention(m: nn.Module, x: Tensor) -> Tensor:
    q, k, v = (layer(x).unsqueeze(1) for layer in (m.q, m.k, m.v))
    return m.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))


def channels_last(m: nn.Module, x: Tensor) -> Tensor:
    image = x.unflatten(1, (3, 2)).contiguous(memory_format=torch.channels_last)
    return m.conv(image).permute(0, 2, 3, 1).reshape(x.shape[0], SIZE, 6)


def in_place_slice(m: nn.Module, x: Tensor) -> Tensor:
    y = m.inner(x)
    y[:, 0] += 1
    y[:, 1:].mul_(0.5)
    return y


def where_large(m: nn.Module, x: Tensor) -> Tensor:
    if (x > 1).any():
        x[x > 1] = 0.5
    return x


def ema_in_place(m: nn.Module, x: Tensor) -> Tensor:
    m.kept.mul_(0.9).add_(0.1 * mean(x))
    return m.inner(x) / (1 + m.kept)


def ema_reassigned(m: nn.Module, x: Tensor) -> Tensor:
    m.kept = 0.9 * m.kept + 0.1 * mean(x)
    return m.inner(x) / (1 + m.kept)


def ema_frozen(m: nn.Module, x: Tensor) -> Tensor:
    m.state.data.mul_(0.9).add_(0.1 * mean(x))
    return m.inner(x) / (1 + m.state)


def ema_attribute(m: nn.Module, x: Tensor) -> Tensor:
    m.box[0].mul_(0.9).add_(0.1 * mean(x))
    return m.inner(x) / (1 + m.box[0])


def first_seen(m: nn.Module, x: Tensor) -> Tensor:
    m.seen = mean(x) if m.seen is None else 0.5 * m.seen + 0.5 * mean(x)
    return m.inner(x) - m.seen


def counting(m: nn.Module, x: Tensor) -> Tensor:
    m.count += 1
    return m.inner(x) / (1 + 0.1 * m.count)


def raised_later(m: nn.Module, x: Tensor) -> Tensor:
    m.count += m.training
    return F.dropout(m.inner(x), 0.3 if m.count > 4 else 0.0, m.training)


def noise_on_large(m: nn.Module, x: Tensor) -> Tensor:
    y = m.inner(x)
    return y + 0.1 * torch.randn_like(y) if m.training and bool((y > 1.5).any()) else y


def dropped(m: nn.Module, x: Tensor) -> Tensor:
    return x if m.training and torch.rand(()) < 0.4 else x + torch.tanh(m.inner(x))


def checkpointed(m: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(lambda y: F.dropout(torch.tanh(m.inner(y)), 0.2, m.training), x, use_reentrant=False)


def looked_up(m: nn.Module, x: Tensor) -> Tensor:
    return x + m.table((x.detach().abs() * 3).long().clamp(0, 7)).squeeze(-1)


def penalized(m: nn.Module, x: Tensor) -> Tensor:
    return m.inner(x) + 0.01 * m.inner.weight.square().sum()


def used_twice(m: nn.Module, x: Tensor) -> Tensor:
    return m.inner(torch.tanh(m.inner(x) @ m.inner.weight))


def spectrum(m: nn.Module, x: Tensor) -> Tensor:
    return m.inner(torch.fft.irfft(torch.fft.rfft(x) * m.weight, n=SIZE))


def noise_of_its_own(m: nn.Module, x: Tensor) -> Tensor:
    return m.inner(x) + 0.1 * torch.randn(x.shape, generator=m.own)


def with_hook_on_activation(m: nn.Module, x: Tensor) -> Tensor:
    y = m.inner(x)
    y.register_hook(lambda dy: dy * 1.5)
    return torch.sin(y)


def inner(act: Callable[[nn.Module, Tensor], Tensor], **parts: object) -> Callable[[], nn.Module]:
    return lambda: Layer(act, inner=lin(), **parts)


def through(make: Callable[[], nn.Module], last: Callable[[object], Tensor] = lambda y: y) -> Callable[[], nn.Module]:
    return lambda: Layer(lambda m, x: last(m.inner(x)), inner=make())


def simple(act: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Layer(lambda m, x: act(x))


def with_hook_on_input(m: nn.Module, x: Tensor) -> Tensor:
    if x.requires_grad:
        x.register_hook(lambda gradient: gradient * 1.1)
    return torch.tanh(m.inner(x))


KEEPING = frozenset({
    "batch norm", "batch norm over all", "instance norm", "buffer in place", "buffer reassigned",
    "frozen parameter as state", "attribute in place", "attribute reassigned", "counter", "generator of its own",
    "dropout that begins later", "embedding with max_norm", "spectral norm", "hook on a weight", "hook behind the sum",
})  # fmt: skip
"""These keep what their forward changes, or look at the sum of a weight's gradients. With two copies of the model each
would see only its own micro-batches."""

KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": through(lin),
    "linear without bias": through(lambda: lin(False)),
    "mlp": through(lambda: nn.Sequential(lin(), nn.GELU(), lin())),
    "residual": inner(lambda m, x: x + torch.tanh(m.inner(x))),
    "layer norm": through(lambda: nn.LayerNorm(SIZE)),
    "rms norm": through(lambda: nn.RMSNorm(SIZE)),
    "attention": lambda: Layer(attention, q=lin(), k=lin(False), v=lin(), o=lin()),
    "attention module": lambda: Layer(
        lambda m, x: m.inner(x, x, x, need_weights=False)[0],
        inner=nn.MultiheadAttention(SIZE, 2, dropout=0.1, batch_first=True),
    ),
    "lstm": through(lambda: nn.LSTM(SIZE, SIZE, batch_first=True), lambda y: y[0]),
    "gru with dropout": through(lambda: nn.GRU(SIZE, SIZE, 2, dropout=0.2, batch_first=True), lambda y: y[0]),
    "convolution": through(lambda: nn.Conv1d(SIZE, SIZE, 3, padding=1)),
    "channels last": lambda: Layer(channels_last, conv=nn.Conv2d(3, 3, 3, padding=1)),
    "transposed": simple(lambda x: x.transpose(1, 2)),
    "strided": simple(lambda x: torch.stack([x, 2 * x], -1)[..., 0]),
    "chunks": simple(lambda x: torch.cat([y * (n + 1) for n, y in enumerate(x.chunk(2, -1))], -1)),
    "relu in place": simple(lambda x: F.leaky_relu(x, 0.1, inplace=True)),
    "scaled in place": simple(lambda x: x.mul_(0.9).add_(0.1)),
    "in place where large": lambda: Layer(where_large),
    "in place behind a linear": inner(in_place_slice),
    "in-place dropout": lambda: Layer(lambda m, x: F.dropout(m.inner(x), 0.1, m.training, inplace=True), inner=lin()),
    "batch norm": through(lambda: nn.BatchNorm1d(SIZE)),
    "batch norm over all": through(lambda: nn.BatchNorm1d(SIZE, momentum=None)),
    "instance norm": through(lambda: nn.InstanceNorm1d(SIZE, affine=True, track_running_stats=True)),
    "buffer in place": lambda: Layer(ema_in_place, inner=lin(), kept=torch.ones(SIZE)),
    "buffer reassigned": lambda: Layer(ema_reassigned, inner=lin(), kept=torch.ones(SIZE)),
    "frozen parameter as state": lambda: Layer(
        ema_frozen, inner=lin(), state=nn.Parameter(torch.ones(SIZE), requires_grad=False)
    ),
    "attribute in place": lambda: Layer(ema_attribute, inner=lin(), box=[torch.ones(SIZE)]),
    "attribute reassigned": inner(first_seen, seen=None),
    "counter": inner(counting, count=0),
    "generator of its own": lambda: Layer(noise_of_its_own, inner=lin(), own=torch.Generator().manual_seed(3)),
    "dropout": through(lambda: nn.Sequential(lin(), nn.Dropout(0.2))),
    "dropout function": inner(lambda m, x: F.dropout(m.inner(x), 0.2, m.training)),
    "dropout that begins later": inner(raised_later, count=0),
    "noise on some data": inner(noise_on_large),
    "stochastic depth": inner(dropped),
    "checkpointed dropout": inner(checkpointed),
    "frozen": lambda: frozen(Layer(lambda m, x: m.inner(x), inner=lin()), "inner.weight", "inner.bias"),
    "frozen bias": lambda: frozen(Layer(lambda m, x: m.inner(x), inner=lin()), "inner.bias"),
    "embedding": lambda: Layer(looked_up, table=nn.Embedding(8, 1)),
    "embedding with max_norm": lambda: Layer(looked_up, table=nn.Embedding(8, 1, max_norm=0.5)),
    "spectral norm": through(lambda: parametrizations.spectral_norm(lin())),
    "weight norm": through(lambda: parametrizations.weight_norm(lin())),
    "hook before": lambda: hooked(lambda m: m.register_forward_pre_hook(lambda m, x: (x[0] * 1.1,))),
    "hook behind": lambda: hooked(lambda m: m.register_forward_hook(lambda m, x, y: torch.sin(y))),
    "backward hook": lambda: hooked(lambda m: m.register_full_backward_hook(lambda m, dx, dy: (dx[0] * 1.1,))),
    "hook on a weight": lambda: hooked(lambda m: m.weight.register_hook(lambda g: g * 1.1)),
    "hook behind the sum": lambda: hooked(lambda m: m.bias.register_post_accumulate_grad_hook(grow)),
    "hook on an activation": inner(with_hook_on_activation),
    "hook on an input": inner(with_hook_on_input),
    "custom Function": inner(lambda m, x: torch.tanh(Doubled.apply(m.inner(x)))),
    "penalty on a weight": inner(penalized),
    "weight used otherwise": inner(used_twice),
    "spectrum": lambda: Layer(spectrum, inner=lin(), weight=nn.Parameter(torch.randn(SIZE // 2 + 1) + 0j)),
    "expanded buffer": lambda: Layer(
        lambda m, x: m.inner(x) * m.mask[: x.shape[0]],
        inner=lin(), mask=torch.ones(1, SIZE, SIZE).tril().expand(64, -1, -1),
    ),
    "in double precision": inner(lambda m, x: torch.tanh(m.inner(x).double()).float()),
    "one tensor more": lambda: Adding(lambda m, x: torch.tanh(m.side(x))),
    "integers more": lambda: Adding(lambda m, x: (m.side(x).detach() * 2).long()),
    "a mask more": lambda: Adding(lambda m, x: m.side(x).detach() > 0),
    "zeros more": lambda: Adding(lambda m, x: torch.zeros_like(x)),
    "merging": Merging,
    "dropping": Dropping,
    "collecting": Collecting,
    "detached": inner(lambda m, x: m.inner(x.detach())),
}  # fmt: skip
"""What "shared" adds: a layer that stood before in the model, or has a weight of one (``random_models``)."""
