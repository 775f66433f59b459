"""Every form in which torch multiplies an activation by a parameter, beside autograd in the same process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from regimes import selective
from torch import Tensor, nn

from pipex.backward import Splitter

Form = Callable[[nn.ParameterList, Tensor], Tensor]


def offsets(*ends: int) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32)


FORMS: dict[str, tuple[tuple[int, ...], list[tuple[int, ...]], Form]] = {
    # name: shape of x, of the parameters, what is done
    "linear with gaps": ((5, 6, 8), [(7, 4), (7,)], lambda p, x: F.linear(x[..., ::2], *p)),
    "linear, transposed": ((4, 6, 3), [(7, 4), (7,)], lambda p, x: F.linear(x.transpose(0, 2), *p)),
    "linear, transposed, no bias": ((4, 6, 3), [(7, 4)], lambda p, x: F.linear(x.transpose(0, 2), *p)),
    "linear of a vector": ((4,), [(7, 4), (7,)], lambda p, x: F.linear(x, *p)),
    "linear of a vector, no bias": ((4,), [(7, 4)], lambda p, x: F.linear(x, *p)),
    "linear, transposed weight": ((5, 4), [(4, 7), (7,)], lambda p, x: F.linear(x, p[0].t(), p[1])),
    "linear of no rows": ((0, 4), [(7, 4), (7,)], lambda p, x: F.linear(x, *p)),
    "x @ w": ((5, 4), [(4, 7)], lambda p, x: x @ p[0]),
    "w @ x": ((4, 5), [(7, 4)], lambda p, x: p[0] @ x),
    "x @ w.t()": ((5, 4), [(7, 4)], lambda p, x: x @ p[0].t()),
    "x.mT @ w": ((4, 5), [(4, 7)], lambda p, x: x.mT @ p[0]),
    "batch @ w": ((3, 5, 4), [(4, 7)], lambda p, x: x @ p[0]),
    "batch of batches @ w": ((2, 3, 5, 4), [(4, 7)], lambda p, x: x @ p[0]),
    "w @ batch": ((3, 4, 5), [(7, 4)], lambda p, x: p[0] @ x),
    "batch @ vector": ((3, 5, 4), [(4,)], lambda p, x: x @ p[0]),
    "matrix @ vector": ((5, 4), [(4,)], lambda p, x: x @ p[0]),
    "vector @ w": ((4,), [(4, 7)], lambda p, x: x @ p[0]),
    "batch @ batch": ((3, 5, 4), [(3, 4, 7)], lambda p, x: x @ p[0]),
    "batch @ batch, broadcast": ((2, 1, 5, 4), [(3, 4, 7)], lambda p, x: x @ p[0]),
    "weights @ batch, broadcast": ((2, 1, 4, 5), [(3, 7, 4)], lambda p, x: p[0] @ x),
    "one matrix @ one matrix": ((1, 5, 4), [(1, 4, 7)], lambda p, x: x @ p[0]),
    "mm": ((5, 4), [(4, 7)], lambda p, x: torch.mm(x, p[0])),
    "bmm": ((3, 5, 4), [(3, 4, 7)], lambda p, x: x.bmm(p[0])),
    "bmm of w and x": ((3, 4, 5), [(3, 7, 4)], lambda p, x: torch.bmm(p[0], x)),
    "addmm": ((5, 4), [(4, 7), (7,)], lambda p, x: torch.addmm(p[1], x, p[0], beta=0.5, alpha=3)),
    "addmm of w and x": ((4, 5), [(7, 4), (7, 1)], lambda p, x: torch.addmm(p[1], p[0], x, alpha=0.3)),
    "addmm to x": ((5, 5), [(5, 5)], lambda p, x: x.addmm(x, p[0], beta=2)),
    "baddbmm": ((3, 5, 4), [(3, 4, 7), (3, 1, 7)], lambda p, x: torch.baddbmm(p[1], x, p[0], alpha=0.5)),
    "einsum": ((3, 5, 4), [(4, 7)], lambda p, x: torch.einsum("btd,de->bte", x, p[0])),
    "einsum, weight first": ((3, 5, 4), [(7, 4)], lambda p, x: torch.einsum("ed, btd -> bet", p[0], x)),
    "einsum of experts": ((3, 5, 4), [(3, 4, 7)], lambda p, x: torch.einsum("ecd,edf->ecf", x, p[0])),
    "einsum of two sums": ((3, 5, 4), [(5, 4, 7)], lambda p, x: torch.einsum("btd,tde->be", x, p[0])),
    "einsum, implicit": ((3, 4), [(4, 7)], lambda p, x: torch.einsum("bd,da", x, p[0])),
    "einsum, ellipsis": ((2, 3, 5, 4), [(4, 7)], lambda p, x: torch.einsum("...td,de->...et", x, p[0])),
    "einsum, two ellipses": ((2, 3, 5, 4), [(3, 4, 7)], lambda p, x: torch.einsum("...td,...de->...te", x, p[0])),
    "einsum of one row": ((1, 5, 4), [(4, 7)], lambda p, x: torch.einsum("btd,de->ebt", x, p[0])),
    "grouped": ((6, 8), [(3, 8, 16)], lambda p, x: F.grouped_mm(x, p[0], offs=offsets(2, 2, 6))),
    "grouped, transposed": ((6, 8), [(3, 16, 8)], lambda p, x: F.grouped_mm(x, p[0].mT, offs=offsets(2, 2, 6))),
    "batched experts": ((3, 4, 8), [(3, 8, 16)], lambda p, x: F.grouped_mm(x, p[0])),
    "bilinear": ((2, 5, 4), [(7, 4, 4), (7,)], lambda p, x: F.bilinear(x, x.detach().cos(), *p)),
    "mv": ((4,), [(7, 4)], lambda p, x: p[0].mv(x)),
    "mv of a vector": ((7, 4), [(4,)], lambda p, x: torch.mv(x, p[0])),
    "conv1d": ((2, 4, 9), [(6, 2, 3), (6,)], lambda p, x: F.conv1d(x, *p, 2, 1, 1, 2)),
    "conv2d": ((2, 4, 9, 7), [(6, 4, 3, 2), (6,)], lambda p, x: torch.conv2d(x, *p, stride=(2, 1), padding=(1, 0))),
    "conv2d, no bias": ((2, 4, 9, 7), [(6, 4, 3, 2)], lambda p, x: F.conv2d(x, p[0], dilation=2)),
    "conv3d": ((2, 3, 5, 4, 6), [(2, 3, 2, 2, 2), (2,)], lambda p, x: F.conv3d(x, *p)),
    "conv_transpose1d": ((2, 4, 9), [(4, 3, 3), (6,)], lambda p, x: F.conv_transpose1d(x, *p, 2, 1, 1, 2)),
    "conv_transpose2d": ((2, 4, 5, 7), [(4, 6, 3, 2), (6,)], lambda p, x: F.conv_transpose2d(x, *p, stride=2)),
    "conv_transpose3d": ((1, 2, 3, 4, 3), [(2, 3, 2, 2, 2), (3,)], lambda p, x: F.conv_transpose3d(x, *p)),
}  # fmt: skip
CONVOLUTIONS = [form for name, (_, _, form) in FORMS.items() if name.startswith("conv")]


def gradients(
    form: Form, parameters: nn.ParameterList, x: Tensor, split: bool, uses: int, in_input: bool = False
) -> list[Tensor | None]:
    """Output, gradient of x, gradients of the parameters.

    Args:
        in_input: whether I may make the weight's.
    """
    parameters = copy.deepcopy(parameters)
    x = x.detach().clone().requires_grad_(x.requires_grad)

    def forward() -> Tensor:
        # In place, as the next operation of a model may be.
        return torch.stack([form(parameters, x * k).mul_(k) for k in range(1, uses + 1)]).sum(0)

    if not split:
        y = forward()
        y.backward(cotangent(y))
        return [y, x.grad, *(p.grad for p in parameters)]
    tape = Splitter.of(parameters).record()
    with tape:
        y = forward()
    found = tape.backward_input([y], [cotangent(y)], [x] if x.requires_grad else [])
    assert parameters[0].grad is None or in_input, "made in W"
    tape.backward_weight()
    return [y, *(found or [None]), *(p.grad for p in parameters)]


def cotangent(y: Tensor) -> Tensor:
    return torch.arange(y.numel(), dtype=torch.float64).cos().view(y.shape).to(y.dtype)


def assert_same_bits(found: list[Tensor | None], wanted: list[Tensor | None]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        if theirs is None:
            assert ours is None
        else:
            assert ours is not None
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
            assert torch.equal(ours, theirs)


def made(name: str, dtype: torch.dtype) -> tuple[Form, nn.ParameterList, Tensor]:
    shape, shapes, form = FORMS[name]
    torch.manual_seed(0)
    parameters = nn.ParameterList(nn.Parameter(torch.randn(s, dtype=dtype)) for s in shapes)
    return form, parameters, torch.randn(shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("uses", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_bits_are_those_of_autograd(name: str, dtype: torch.dtype, uses: int) -> None:
    form, parameters, x = made(name, dtype)
    try:
        wanted = gradients(form, parameters, x, False, uses)
    except (RuntimeError, ValueError) as refused:
        # torch's own: no grouped product of this type, ...
        with pytest.raises(type(refused)):
            gradients(form, parameters, x, True, uses)
        return
    # A convolution of complex numbers is several, in I.
    in_input = dtype is torch.complex64 and form in CONVOLUTIONS
    assert_same_bits(gradients(form, parameters, x, True, uses, in_input), wanted)


@pytest.mark.parametrize("uses", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_bits_are_those_of_autograd_under_autocast(name: str, dtype: torch.dtype, uses: int) -> None:
    """Which casts for some operations and not for others: the output says so first."""
    form, parameters, x = made(name, torch.float32)

    def under(p: nn.ParameterList, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return form(p, x)

    try:
        wanted = gradients(under, parameters, x, False, uses)
    except (RuntimeError, ValueError) as refused:
        with pytest.raises(type(refused)):
            gradients(under, parameters, x, True, uses)
        return
    in_input = name == "bilinear" or "broadcast" in name  # what is cast before something else happens to it
    assert_same_bits(gradients(under, parameters, x, True, uses, in_input), wanted)


@pytest.mark.parametrize("name", FORMS)
def test_of_an_input_without_gradient(name: str) -> None:
    form, parameters, x = made(name, torch.float32)
    x = x.detach()
    assert_same_bits(gradients(form, parameters, x, True, 1), gradients(form, parameters, x, False, 1))


@pytest.mark.parametrize("name", [name for name, (_, shapes, _) in FORMS.items() if len(shapes) == 2])
@pytest.mark.parametrize("frozen", [0, 1])
def test_with_a_frozen_side(name: str, frozen: int) -> None:
    """The other one's gradient waits all the same, but for the bias of a bilinear layer."""
    form, parameters, x = made(name, torch.float32)
    parameters[frozen].requires_grad_(False)
    tape_parameters = copy.deepcopy(parameters)
    wanted = gradients(form, parameters, x, False, 1)
    tape = Splitter.of(tape_parameters).record()
    x = x.detach().requires_grad_()
    with tape:
        y = form(tape_parameters, x * 1).mul_(1)
    found = tape.backward_input([y], [cotangent(y)], [x])
    assert (tape_parameters[1 - frozen].grad is None) == ((name, frozen) != ("bilinear", 0))
    tape.backward_weight()
    assert_same_bits([y, *found, *(p.grad for p in tape_parameters)], wanted)


@pytest.mark.parametrize("penalized", [0, 1])
@pytest.mark.parametrize("name", [name for name, (_, shapes, _) in FORMS.items() if len(shapes) == 2])
def test_where_one_side_waits_no_more(name: str, penalized: int) -> None:
    """One that is used elsewhere too is left to I from then on; the other's gradient is still whole in W, of which
    hooks see nothing before."""
    form, parameters, x = made(name, torch.float32)

    def of(parameters: nn.ParameterList, given: Tensor) -> Tensor:
        y = form(parameters, given * 1)
        kept = parameters[1 - penalized]
        # A recorded use of the one that is not penalized, whatever becomes of the form itself.
        rows = F.linear(torch.ones(1, kept.numel()), kept.reshape(1, -1))
        return y * parameters[penalized].square().mean() + rows.sum()

    def heard_of(split: bool) -> list[Tensor]:
        module, heard = copy.deepcopy(parameters), []
        module[1 - penalized].register_hook(lambda gradient: heard.append(gradient.clone()))
        splitter = Splitter.of(module)
        for _ in range(3):
            given = x.detach().clone().requires_grad_()
            with splitter.record() if split else nullcontext() as tape:
                y = of(module, given)
            if tape is None:
                y.backward(cotangent(y))
            else:
                tape.backward_input([y], [cotangent(y)], [given])
                tape.backward_weight()
        return heard

    assert_same_bits([*heard_of(split=True)], [*heard_of(split=False)])


def test_an_input_changed_after_the_forward_is_refused() -> None:
    """The second one of two, which W reads as well."""
    layer = nn.Bilinear(4, 4, 3)
    x, other = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    tape = Splitter.of(layer).record()
    with tape:
        y = layer(x * 1, other)
    tape.backward_input([y], [torch.ones_like(y)], [])
    other.mul_(2)
    with pytest.raises(RuntimeError, match="modified in place after the forward"):
        tape.backward_weight()


def test_a_product_that_a_checkpoint_keeps_is_not_changed() -> None:
    """A bias added in place to a kept product would be added once more when that is given again."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8))
    x = torch.randn(2, 3, 8)

    def gradient(split: bool) -> Tensor | None:
        model, given = copy.deepcopy(layers), x.clone().requires_grad_()
        with Splitter.of(model).record() if split else nullcontext() as tape:
            y = selective(model, given[..., ::2])
        if tape is None:
            y.backward(cotangent(y))
        else:
            tape.backward_input([y], [cotangent(y)], [given])
            tape.backward_weight()
        return model[1].weight.grad

    assert_same_bits([gradient(split=True)], [gradient(split=False)])
