"""I then W against one unsplit autograd backward: the same bits, for every kind of module."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import (
    CASES,
    Block,
    Checkpointed,
    OwnFunction,
    TiedLanguageModel,
    WithOwnFunction,
    mlp,
    run_functions,
    run_split,
)

from pipex.backward import Splitter
from pipex.errors import UnsupportedModule


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("deferred", [1, 2, 4])
def test_split_gives_these_bits_with_several_microbatches_under_way(name: str, deferred: int) -> None:
    """From the first step on: forward of all, then I after I, each W so many later."""
    build, sample = CASES[name]
    module = build()
    whole = copy.deepcopy(module)
    splitter = Splitter(module.parameters())
    for _ in range(2):
        xs = [sample() for _ in range(4)]
        ys = [whole(x.clone()) for x in xs]
        dys = [torch.randn_like(y) for y in ys]
        for y, dy in zip(ys, dys, strict=True):
            y.backward(dy)
        tapes, outputs = [], []
        for x in xs:
            with splitter.record() as tape:
                outputs.append(module(x))
            tapes.append(tape)
        for number in range(4 + deferred):
            if number < 4:
                tapes[number].backward_input([outputs[number]], [dys[number]], [])
            if number >= deferred:
                tapes[number - deferred].backward_weight()
        for (parameter_name, parameter), reference in zip(module.named_parameters(), whole.parameters(), strict=True):
            assert (parameter.grad is None) == (reference.grad is None), parameter_name
            if reference.grad is not None:
                assert torch.equal(parameter.grad, reference.grad), parameter_name
        module.zero_grad()
        whole.zero_grad()


@pytest.mark.parametrize("way", ["tape", "functions", "functions on a tape"])
@pytest.mark.parametrize("input_needs_gradient", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_split_gives_the_bits_of_one_backward(name: str, input_needs_gradient: bool, way: str) -> None:
    build, sample = CASES[name]
    module = build()
    whole = copy.deepcopy(module)
    splitter = Splitter(module.parameters())
    gradient: Tensor | None = None
    for _ in range(3):  # the first micro-batch makes .grad, the others add to it
        x = sample()
        x_whole = x.clone()
        if input_needs_gradient and x.is_floating_point():
            x.requires_grad_(), x_whole.requires_grad_()
        y_whole = whole(x_whole)
        dy = torch.randn_like(y_whole)
        y_whole.backward(dy)
        if way == "tape":
            y, gradient = run_split(module, x, dy, splitter)
        else:
            y, gradient = run_functions(module, x, dy, splitter if way == "functions on a tape" else None)
        assert torch.equal(y, y_whole)
        assert (gradient is None) == (x_whole.grad is None)
        if gradient is not None:
            assert torch.equal(gradient, x_whole.grad)
    for (parameter_name, parameter), reference in zip(module.named_parameters(), whole.parameters(), strict=True):
        assert (parameter.grad is None) == (reference.grad is None), parameter_name
        if reference.grad is not None:
            assert torch.equal(parameter.grad, reference.grad), parameter_name


@pytest.mark.parametrize("rows", [1, 2, 3, 31, 64])
@pytest.mark.parametrize("width", [1, 2, 17, 64, 129])
def test_linear_bits_at_odd_sizes(rows: int, width: int) -> None:
    module = nn.Sequential(nn.Linear(width, 33), nn.ReLU(), nn.Linear(33, width))
    whole = copy.deepcopy(module)
    for shape in ((rows, width), (2, rows, width)):
        x = torch.randn(shape)
        dy = torch.randn(shape)
        whole(x).backward(dy)
        run_split(module, x, dy)
    for parameter, reference in zip(module.parameters(), whole.parameters(), strict=True):
        assert torch.equal(parameter.grad, reference.grad)


class Operations(torch.utils._python_dispatch.TorchDispatchMode):
    """The names of the operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_weight_gradients_are_left_to_w_and_norm_gradients_are_made_in_i() -> None:
    block = Block()
    x = torch.randn(2, 5, 16, requires_grad=True)
    with Splitter(block.parameters()).record() as tape:
        y = block(x)
    with Operations() as in_i:
        tape.backward_input([y], [torch.ones_like(y)], [x])
    made = {name for name, p in block.named_parameters() if p.grad is not None}
    assert made == {"norm1.weight", "norm1.bias", "norm2.weight"}
    with Operations() as in_w:
        tape.backward_weight()
    assert all(p.grad is not None for p in block.parameters())
    # Six linears: one product each for dX in I, one each for dW in W.
    assert in_i.names.count("mm") == in_w.names.count("mm") == 6
    assert "native_layer_norm_backward" in in_i.names
    assert set(in_w.names) <= {
        "mm",
        "sum",
        "t",
        "view",
        "reshape",
        "_unsafe_view",
        "clone",
        "empty_like",
        "new_empty_strided",
        "copy_",
    }


@pytest.mark.parametrize("run", [run_split, run_functions])
def test_custom_function_runs_once(run: Callable[..., object]) -> None:
    OwnFunction.calls = 0
    run(WithOwnFunction(), torch.randn(6, 8, requires_grad=True), torch.randn(6, 8))
    assert OwnFunction.calls == 1


@pytest.mark.parametrize("run", [run_split, run_functions])
def test_checkpointed_region_is_recomputed_once(run: Callable[..., object]) -> None:
    module = Checkpointed()
    run(module, torch.randn(6, 8, requires_grad=True), torch.randn(6, 8))
    assert module.runs == 2  # forward and one recomputation


def test_graph_is_freed_by_i() -> None:
    kept: list[weakref.ref[Tensor]] = []

    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            ctx.buffer = torch.zeros(100)
            kept.append(weakref.ref(ctx.buffer))
            return x.clone()

        @staticmethod
        def backward(ctx, dy: Tensor) -> Tensor:
            return dy

    layer = nn.Linear(4, 4)
    x = torch.randn(2, 4, requires_grad=True)
    with Splitter(layer.parameters()).record() as tape:
        y = layer(Keeps.apply(x))
    assert kept[0]() is not None
    tape.backward_input([y], [torch.ones_like(y)], [x])
    del y
    assert kept[0]() is None, "the graph must not live until W"


def test_input_changed_in_place_after_the_forward_is_refused() -> None:
    layer = nn.Linear(4, 4)
    x = torch.randn(2, 4)
    with Splitter(layer.parameters()).record() as tape:
        y = layer(x)
    x.mul_(2)
    tape.backward_input([y], [torch.ones_like(y)], [])
    with pytest.raises(RuntimeError, match="modified in place"):
        tape.backward_weight()


def test_replaced_parameter_memory_is_seen() -> None:
    layer = nn.Linear(4, 4)
    splitter = Splitter(layer.parameters())
    x = torch.randn(2, 4)
    with splitter.record():
        layer(x)
    layer.weight.data = torch.randn(4, 4)
    with splitter.record() as tape:
        y = layer(x)
    assert torch.equal(y, F.linear(x, layer.weight, layer.bias))
    tape.backward_input([y], [torch.ones_like(y)], [])
    tape.backward_weight()
    assert torch.equal(layer.weight.grad, torch.ones(4, 2) @ x)


def test_hooks_on_parameters_see_the_whole_gradient_once() -> None:
    layer = nn.Linear(4, 4)
    whole = copy.deepcopy(layer)
    seen: dict[str, list[Tensor]] = {"split": [], "whole": []}
    for module, key in ((layer, "split"), (whole, "whole")):
        module.weight.register_hook(lambda g, key=key: (seen[key].append(g.clone()), g * 2)[1])
        module.bias.register_post_accumulate_grad_hook(lambda p, key=key: seen[key].append(p.grad.clone()))
    x, dy = torch.randn(3, 4), torch.randn(3, 4)
    whole(x).backward(dy)
    run_split(layer, x, dy)
    assert len(seen["split"]) == len(seen["whole"]) == 2
    key = lambda t: t.dim()  # noqa: E731 - bias and weight may come in either order
    for mine, reference in zip(sorted(seen["split"], key=key), sorted(seen["whole"], key=key), strict=True):
        assert torch.equal(mine, reference)
    assert torch.equal(layer.weight.grad, whole.weight.grad)


def test_autocast_is_right() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    whole = copy.deepcopy(module)
    x = torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_whole = whole(x)
    dy = torch.randn_like(y_whole)
    y_whole.backward(dy)
    with Splitter(module.parameters()).record() as tape, torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    tape.backward_input([y], [dy], [])
    tape.backward_weight()
    for parameter, reference in zip(module.parameters(), whole.parameters(), strict=True):
        assert torch.equal(parameter.grad, reference.grad)


def test_functions_are_put_back_after_an_error() -> None:
    before = F.linear, F.embedding
    with pytest.raises(ZeroDivisionError), Splitter([]).record():
        raise ZeroDivisionError
    assert (F.linear, F.embedding) == before


def test_w_is_linear_in_depth() -> None:
    """W never walks the graph: the number of operations it runs per layer does not grow."""

    counts = {}
    for depth in (4, 32):
        module = nn.Sequential(*[nn.Linear(8, 8) for _ in range(depth)])
        with Splitter(module.parameters()).record() as tape:
            y = module(torch.randn(2, 8))
        tape.backward_input([y], [torch.ones_like(y)], [])
        with Operations() as in_w:
            tape.backward_weight()
        counts[depth] = len(in_w.names)
    assert counts[32] == 8 * counts[4]


class GradientPenalty(nn.Module):
    """Differentiates itself in its forward."""

    def __init__(self, create_graph: bool) -> None:
        super().__init__()
        self.a, self.b, self.create_graph = nn.Linear(4, 4), nn.Linear(4, 4), create_graph

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(torch.tanh(self.a(x)))
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=self.create_graph, retain_graph=True)
        return y + slope


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_pass_inside_the_forward_is_refused_not_wrong(create_graph: bool) -> None:
    module = GradientPenalty(create_graph)
    with Splitter(module.parameters()).record(), pytest.raises(UnsupportedModule, match="prepared forward"):
        module(torch.randn(3, 4, requires_grad=True))


def test_a_pass_that_nobody_announced_is_refused() -> None:
    layer = nn.Linear(4, 4)
    with Splitter(layer.parameters()).record():
        y = layer(torch.randn(3, 4))
    with pytest.raises(UnsupportedModule, match="stage_backward"):
        y.sum().backward()
    assert layer.weight.grad is None


def test_a_pass_that_failed_half_way_leaves_nothing_to_w() -> None:
    class Fails(torch.autograd.Function):
        failing = True

        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, dy: Tensor) -> Tensor:
            if Fails.failing:
                raise ZeroDivisionError
            return dy

    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    wholes = copy.deepcopy((first, second))
    x, dy = torch.randn(3, 4), torch.randn(3, 4)
    wholes[1](wholes[0](x)).backward(dy)
    splitter = Splitter([*first.parameters(), *second.parameters()])
    for Fails.failing in (True, False):
        with splitter.record() as tape:
            y = second(Fails.apply(first(x)))
        if Fails.failing:
            with pytest.raises(ZeroDivisionError):
                tape.backward_input([y], [dy], [])
        else:
            tape.backward_input([y], [dy], [])
            tape.backward_weight()
    for layer, whole in zip((first, second), wholes, strict=True):
        assert torch.equal(layer.weight.grad, whole.weight.grad)


def test_a_forward_without_a_backward_is_freed_with_its_output() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    x = torch.randn(2, 4)
    kept = weakref.ref(x)
    gc.collect()
    gc.disable()
    try:
        with Splitter(module.parameters()).record() as tape:
            y = module(x)
        del x, y, tape
        assert kept() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
def test_hooks_on_the_output_of_a_linear_are_seen_by_its_weight(shape: tuple[int, ...]) -> None:
    class Hooked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            y.register_hook(lambda dy: 2 * dy)
            return y * 3

    module = Hooked(4, 4)
    whole = copy.deepcopy(module)
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
    whole(x).backward(dy)
    run_split(module, x.detach().requires_grad_(), dy)
    assert torch.equal(module.weight.grad, whole.weight.grad)
    assert torch.equal(module.bias.grad, whole.bias.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_main_gradients_get_what_would_be_added_to_grad(dtype: torch.dtype) -> None:
    module = mlp().to(dtype)
    whole = copy.deepcopy(module)
    wanted = [torch.zeros_like(p, dtype=torch.float32) for p in whole.parameters()]
    for parameter in module.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        parameter.grad_added_to_main_grad = False
    splitter = Splitter(module.parameters())
    for _ in range(3):
        x, dy = torch.randn(6, 8, dtype=dtype), torch.randn(6, 8, dtype=dtype)
        for total, gradient in zip(wanted, torch.autograd.grad(whole(x), list(whole.parameters()), dy), strict=True):
            total += gradient.float()
        run_split(module, x, dy, splitter)
    for parameter, total in zip(module.parameters(), wanted, strict=True):
        assert torch.equal(parameter.main_grad, total)
        assert parameter.grad is None
        assert parameter.grad_added_to_main_grad


def test_a_tied_parameter_adds_once_to_its_main_gradient() -> None:
    module = TiedLanguageModel()
    whole = copy.deepcopy(module)
    module.tokens.weight.main_grad = torch.ones_like(module.tokens.weight)
    ids = torch.randint(0, 11, (2, 6))
    y = whole(ids)
    dy = torch.randn_like(y)
    y.backward(dy)
    run_split(module, ids, dy)
    assert torch.equal(module.tokens.weight.main_grad, 1 + whole.tokens.weight.grad)
    assert module.tokens.weight.grad is None


def test_a_parameter_frozen_between_steps_gets_no_gradient_any_more() -> None:
    module = mlp()
    splitter = Splitter(module.parameters())
    run_split(module, torch.randn(3, 8), torch.randn(3, 8), splitter)
    module.zero_grad()
    module[0].weight.requires_grad_(False)
    run_split(module, torch.randn(3, 8), torch.randn(3, 8), splitter)
    assert module[0].weight.grad is None
    assert module[0].bias.grad is not None
    module[0].weight.requires_grad_()
    run_split(module, torch.randn(3, 8), torch.randn(3, 8), splitter)
    assert module[0].weight.grad is not None
