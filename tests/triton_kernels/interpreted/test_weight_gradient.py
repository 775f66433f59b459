"""dW += Σ dYᵀ·X and db += Σ dY, against torch and float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from pipex.errors import InputError
from pipex.triton_kernels import weight_gradient as module
from pipex.triton_kernels.launch import Launch
from pipex.triton_kernels.weight_gradient import (
    SLABS,
    grouped_weight_gradient,
    weight_gradient,
    weight_gradient_reference,
)

Compare = Callable[[Tensor, Tensor, Tensor], None]

# [N, K]: two tiles each way, with rows aligned; unaligned.
RAGGED, UNALIGNED = (136, 264), (131, 33)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """The launches made so far."""
    made: list[Launch] = []
    run = Launch.run

    def recorded(self: Launch, device: torch.device) -> None:
        made.append(self)
        run(self, device)

    monkeypatch.setattr(Launch, "run", recorded)
    return made


def micro_batches(rows: Sequence[int], n: int, k: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.randn(t, n).to(dtype) for t in rows], [torch.randn(t, k).to(dtype) for t in rows]


def check(
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    gradient_dtype: torch.dtype,
    compare: Compare,
    given: tuple[Tensor | Sequence[Tensor], Tensor | Sequence[Tensor]] | None = None,
) -> None:
    """weight_gradient on top of existing gradients, with bias."""
    n, k = dys[0].shape[1], xs[0].shape[1]
    start = [torch.randn(n, k).to(gradient_dtype), torch.randn(n).to(gradient_dtype)]
    ours = [s.clone() for s in start]
    weight_gradient(*(given or (dys, xs)), *ours)
    # A float32 gradient must be as good as one from float32 operands: nothing may be rounded to 16 bits on its way.
    working = [[tensor.to(gradient_dtype) for tensor in tensors] for tensors in (dys, xs)]
    torch_s = [s.clone() for s in start]
    weight_gradient_reference(*working, *torch_s)
    exact = [s.double() for s in start]
    weight_gradient_reference([dy.double() for dy in dys], [x.double() for x in xs], *exact)
    for result in zip(ours, torch_s, exact, strict=True):
        compare(*result)


@pytest.mark.parametrize(
    ("dtype", "gradient_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
    ],
)
@pytest.mark.parametrize("shape", [RAGGED, UNALIGNED])
@pytest.mark.usefixtures("architecture")
def test_one_micro_batch(
    shape: tuple[int, int], dtype: torch.dtype, gradient_dtype: torch.dtype, assert_as_good: Compare
) -> None:
    n, k = (72, 40) if dtype is torch.float32 else shape
    check(*micro_batches([70], n, k, dtype), gradient_dtype, assert_as_good)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("architecture")
def test_slab(dtype: torch.dtype, assert_as_good: Compare, launches: list[Launch]) -> None:
    wide_dy, wide_x = torch.randn(3, 70, 48).to(dtype), torch.randn(3, 70, 56).to(dtype)
    dys, xs = wide_dy[:, :65, :40], wide_x[:, 5:, 8:]  # gaps between rows and between micro-batches
    check(list(dys), list(xs), torch.float32, assert_as_good, given=(dys, xs))
    assert len(launches) == 1


@pytest.mark.usefixtures("architecture")
def test_micro_batches_of_different_sizes(assert_as_good: Compare, launches: list[Launch]) -> None:
    dys, xs = micro_batches([65, 3, 0, 64], 40, 48, torch.float16)
    check(dys, xs, torch.float32, assert_as_good)
    assert len(launches) == 1
    assert launches[0].arguments["table"] is None


@pytest.mark.usefixtures("architecture")
def test_many_micro_batches_go_through_a_table(assert_as_good: Compare, launches: list[Launch]) -> None:
    dys, xs = micro_batches([65] * SLABS + [33], 40, 48, torch.bfloat16)
    check(dys, xs, torch.float32, assert_as_good)
    assert len(launches) == 1
    assert launches[0].arguments["table"] is not None


def test_many_unaligned_micro_batches_go_by_slabs(assert_as_good: Compare, launches: list[Launch]) -> None:
    dys, xs = micro_batches([9] * (SLABS + 1), 7, 5, torch.bfloat16)
    check(dys, xs, torch.float32, assert_as_good)
    assert [len(launch.arguments["slabs"]) for launch in launches] == [SLABS, 1]


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["slab", "list"])
@pytest.mark.usefixtures("architecture")
def test_exact_has_the_bits_of_one_call_per_micro_batch(form: str, gradient_dtype: torch.dtype) -> None:
    dys, xs = torch.randn(3, 66, 40).bfloat16(), torch.randn(3, 66, 136).bfloat16()
    weight_grad, bias_grad = torch.randn(40, 136).to(gradient_dtype), torch.randn(40).to(gradient_dtype)
    one_by_one = weight_grad.clone(), bias_grad.clone()
    for m in range(3):
        weight_gradient(dys[m : m + 1], xs[m : m + 1], *one_by_one, exact=True)
    weight_gradient(*((dys, xs) if form == "slab" else (list(dys), list(xs))), weight_grad, bias_grad, exact=True)
    assert torch.equal(weight_grad, one_by_one[0])
    assert torch.equal(bias_grad, one_by_one[1])


def test_exact_rounds_where_the_other_does_not(launches: list[Launch]) -> None:
    """1 + 0.375·2⁻⁷ + 0.375·2⁻⁷ in bfloat16 is 1 if rounded each time, and 1 + 2⁻⁷ if rounded once."""
    dys, xs = torch.full((2, 1, 8), 1.0).bfloat16(), torch.full((2, 1, 8), 0.0029296875).bfloat16()
    exact, fused = torch.ones(8, 8).bfloat16(), torch.ones(8, 8).bfloat16()
    weight_gradient(dys, xs, exact, exact=True)
    weight_gradient(dys, xs, fused)
    assert len(launches) == 2
    by_hand = torch.ones(8, 8).bfloat16()
    for dy, x in zip(dys, xs, strict=True):
        by_hand += dy.t() @ x
    assert torch.equal(exact, by_hand)
    assert not torch.equal(fused, by_hand)


@pytest.mark.usefixtures("architecture")
def test_layers_of_one_shape_in_one_launch(assert_as_good: Compare, launches: list[Launch]) -> None:
    layers = [micro_batches([65, 20], 40, 48, torch.float16) for _ in range(3)]
    dys, xs = [dy for dy, _ in layers], [x for _, x in layers]
    start = [(torch.randn(40, 48), torch.randn(40)) for _ in layers]
    weights, biases = [w.clone() for w, _ in start], [b.clone() for _, b in start]
    grouped_weight_gradient(dys, xs, weights, biases)
    assert len(launches) == 1
    for layer, ours in enumerate(zip(weights, biases, strict=True)):
        torch_s, exact = [t.clone() for t in start[layer]], [t.double() for t in start[layer]]
        weight_gradient_reference([t.float() for t in dys[layer]], [t.float() for t in xs[layer]], *torch_s)
        weight_gradient_reference([t.double() for t in dys[layer]], [t.double() for t in xs[layer]], *exact)
        for result in zip(ours, torch_s, exact, strict=True):
            assert_as_good(*result)


@pytest.mark.usefixtures("architecture")
def test_only_its_own_elements_are_changed() -> None:
    dys, xs = micro_batches([9], 136, 40, torch.float16)
    frame, bias = torch.full((138, 56), 7.0), torch.full((138,), 7.0)
    weight_gradient(dys, xs, frame[1:-1, 8:-8], bias[1:-1])
    inner = torch.full((136, 40), 7.0)
    weight_gradient(dys, xs, inner)
    assert torch.equal(frame[1:-1, 8:-8], inner)
    frame[1:-1, 8:-8] = 7.0
    assert (frame == 7.0).all()
    assert (bias[[0, -1]] == 7.0).all()


def test_nothing_to_add() -> None:
    weight_grad = torch.ones(4, 4)
    weight_gradient([], [], weight_grad)
    weight_gradient([torch.ones(0, 4)], [torch.ones(0, 4)], weight_grad)
    weight_gradient(torch.ones(2, 0, 4), torch.ones(2, 0, 4), weight_grad)
    grouped_weight_gradient([], [], [])
    assert torch.equal(weight_grad, torch.ones(4, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dys": [torch.ones(4, 5), torch.ones(4, 5)]}, "dys and xs have different lengths; got 2 and 1"),
        ({"dys": [torch.ones(4, 6)]}, "dys.0. has another shape .* got \\(4, 6\\); needed \\(4, 5\\)"),
        ({"xs": [torch.ones(3, 8)]}, "xs.0. has another shape"),
        ({"xs": [torch.ones(4, 8).half()]}, "xs.0. has another dtype"),
        ({"xs": [torch.ones(8, 4).t()]}, "xs.0. does not lie row by row"),
        ({"weight_grad": torch.ones(40)}, "weight_grad is a matrix"),
        (
            {"weight_grad": torch.ones(5, 8).half()},
            "weight_grad has another dtype; got torch.float16; needed torch.float32",
        ),
        ({"bias_grad": torch.ones(8)}, "bias_grad has another shape"),
        ({"bias_grad": torch.ones(10)[::2]}, "bias_grad does not lie row by row"),
        ({"bias_grad": torch.ones(5, device="meta")}, "bias_grad is on another device"),
    ],
)
def test_what_cannot_be_used_is_refused(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "dys": [torch.ones(4, 5)],
        "xs": [torch.ones(4, 8)],
        "weight_grad": torch.ones(5, 8),
        "bias_grad": torch.ones(5),
    }
    weight_gradient(**arguments)  # type: ignore[arg-type]
    before = [t.clone() for t in (arguments["weight_grad"], arguments["bias_grad"]) if isinstance(t, Tensor)]
    with pytest.raises(InputError, match=message):
        weight_gradient(**(arguments | change))  # type: ignore[arg-type]
    assert torch.equal(before[0], arguments["weight_grad"])  # type: ignore[arg-type]


def test_layers_are_counted() -> None:
    with pytest.raises(InputError, match="different lengths; got \\[1, 1, 2, 2\\]"):
        grouped_weight_gradient([[]], [[]], [torch.ones(2, 2)] * 2)


def test_descriptors_are_used_where_they_can_be() -> None:
    aligned, odd = torch.ones(2, 16, 24).half(), torch.ones(2, 16, 25).half()
    assert module.describes([(aligned, aligned)], torch.ones(24, 24), (9, 0))
    assert not module.describes([(aligned, aligned)], torch.ones(24, 24), (8, 0))
    assert not module.describes([(aligned, odd)], torch.ones(24, 24), (9, 0))
    assert not module.describes([(aligned, aligned)], torch.ones(24, 26)[:, 1:25], (9, 0))
    assert not module.describes([(aligned.float(), aligned.float())], torch.ones(24, 24), (9, 0))
