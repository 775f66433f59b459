"""Modules that make their weight gradients themselves, beside the same modules that do so within the backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from delayed_linear import DelayedLinear
from own_models import MODELS, WIDTH, Mixed, alone, assert_as_whole, micro_batch, owned, twins
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipex.backward import Splitter, dw_builder, stage_backward, stage_backward_input, stage_backward_weight
from pipex.errors import UnsupportedModule


def orders() -> list[str]:
    found = []
    for count in range(1, 5):
        numbers = range(count)
        found.append(" ".join(f"{kind}{m}" for kind in "FIW" for m in numbers))
        found.append(" ".join([*(f"F{m}" for m in numbers), *(f"I{m} W{m}" for m in numbers)]))
        found.append(" ".join([f"F{m} I{m}" for m in numbers] + [f"W{m}" for m in numbers]))
    return found


@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize("order", orders())
@pytest.mark.parametrize("kind", MODELS)
def test_bits_are_those_of_the_module_that_leaves_nothing(kind: str, order: str, needs_gradient: bool) -> None:
    """Of micro-batches under way together, in two steps whose gradients add up."""
    model, whole = twins(MODELS[kind])
    splitter = Splitter.of(model)
    for step in range(2):
        tapes: dict[str, Any] = {}
        outputs: dict[str, Tensor] = {}
        for action in order.split():
            kind_of_action, number = action[0], action[1:]
            x, dy = micro_batch(10 * step + int(number), needs_gradient=needs_gradient)
            if kind_of_action == "F":
                with splitter.record() as tapes[number]:
                    outputs[number] = model(x)
            elif kind_of_action == "I":
                before = [part.calls for part in owned(model)]
                tapes[number].backward_input([outputs.pop(number)], [dy], [])
                assert [part.calls for part in owned(model)] == before, "its W comes later"
                whole(x).backward(dy)
            else:
                tapes.pop(number).backward_weight()
        assert_as_whole(model, whole)


def functions(model: nn.Module, batches: range) -> None:
    splitter = Splitter.of(model)
    rests = []
    for number in batches:
        x, dy = micro_batch(number)
        with splitter.record():
            y = model(x)
        rests.append(stage_backward_input([y], [dy], [x], model.parameters())[1])
    assert not any(part.calls for part in owned(model)), "W comes later"
    for rest in rests:
        stage_backward_weight(model.parameters(), rest)


def builder(model: nn.Module, batches: range) -> None:
    """Which has had a look at the gradient of an input, as torch's stages do."""
    build = dw_builder(model)
    x, _ = micro_batch(99)
    torch.autograd.grad(model(x).sum(), x)
    weights = []
    for number in batches:
        x, dy = micro_batch(number)
        model(x).backward(dy)
        weights.append(build())
    calls = [part.calls for part in owned(model)]
    for weight in weights:
        weight()
    assert calls != [part.calls for part in owned(model)], "W did it"


def at_once(model: nn.Module, batches: range) -> None:
    splitter = Splitter.of(model)
    for number in batches:
        x, dy = micro_batch(number)
        with splitter.record():
            y = model(x)
        stage_backward(y, dy, [x])


def not_split(model: nn.Module, batches: range) -> None:
    splitter = Splitter.of(model)
    for number in batches:
        x, dy = micro_batch(number)
        with splitter.whole():
            y = model(x)
        y.backward(dy)


@pytest.mark.parametrize("way", [functions, builder, at_once, not_split])
@pytest.mark.parametrize("kind", MODELS)
def test_every_way_to_a_backward_has_their_gradients(kind: str, way: Callable[[nn.Module, range], None]) -> None:
    model, whole = twins(MODELS[kind])
    way(model, range(3))
    for number in range(3):
        x, dy = micro_batch(number)
        whole(x).backward(dy)
    for part in owned(model):
        vars(part).pop("forward", None)  # the builder's
    assert_as_whole(model, whole)


def test_a_look_at_other_gradients_adds_nothing_and_calls_nobody() -> None:
    model, _ = twins(Mixed)
    model.own.fused = True
    main_grad = model.own.weight.main_grad = torch.ones(WIDTH, WIDTH)
    called: list[None] = []
    model.own.register_wgrad_accumulation_and_reduce_hooks(lambda: called.append(None))
    model.own.wgrad_accumulation_and_reduce_hooks = model.own.hooks  # TransformerEngine's name
    dw_builder(model)
    x, _ = micro_batch(0)
    torch.autograd.grad(model(x).sum(), x)
    assert torch.equal(main_grad, torch.ones(WIDTH, WIDTH))
    assert not called
    assert not model.own.queue
    assert model.own.hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_gradient_of_higher_precision_is_the_modules_business() -> None:
    """The module adds to it; nothing is added once more."""
    model, whole = twins(alone)
    model.fused = True
    model.weight.main_grad = torch.zeros(WIDTH, WIDTH)
    functions(model, range(3))
    for number in range(3):
        x, dy = micro_batch(number)
        whole(x).backward(dy)
    assert torch.equal(model.weight.main_grad, whole.weight.grad)
    assert model.weight.grad is None
    assert torch.equal(model.bias.grad, whole.bias.grad), "which is only set where there is none"


def test_hooks_of_the_module_run_once_for_each_w_and_may_take_the_gradient() -> None:
    """As Megatron-LM's do: into the gradient of higher precision, and away."""
    model, whole = twins(alone)
    model.weight.main_grad = torch.zeros(WIDTH, WIDTH)

    def take() -> None:
        model.weight.main_grad.add_(model.weight.grad)
        model.weight.grad = None

    model.register_wgrad_accumulation_and_reduce_hooks(take)
    functions(model, range(3))
    for number in range(3):
        x, dy = micro_batch(number)
        whole(x).backward(dy)
    assert torch.equal(model.weight.main_grad, whole.weight.grad)
    assert model.weight.grad is None


@pytest.mark.parametrize("way", [functions, at_once, not_split])
def test_hooks_of_marked_parameters_run_once_on_the_whole_gradient(way: Callable[[nn.Module, range], None]) -> None:
    """Autograd itself would run them in I too, with None."""
    found: list[list[Any]] = []
    models = twins(Mixed)
    for model in models:
        log: list[Any] = []
        found.append(log)
        for parameter in model.own.parameters():
            parameter.register_hook(lambda gradient, log=log: (log.append(gradient.clone()), gradient * 2)[1])
            parameter.register_post_accumulate_grad_hook(lambda p, log=log: log.append(p.grad.clone()))
            torch.autograd.graph.get_gradient_edge(parameter).node.register_hook(
                lambda *_, log=log: log.append(torch.zeros(0))
            )
    nodes = [torch.autograd.graph.get_gradient_edge(p).node for model in models for p in model.own.parameters()]
    assert len(nodes) == 4, "they live while somebody holds them"
    way(models[0], range(2))
    for number in range(2):
        x, dy = micro_batch(number)
        models[1](x).backward(dy)
    assert_as_whole(*models)
    assert sorted(found[0], key=str) != []
    assert sorted(map(str, found[0])) == sorted(map(str, found[1]))


class ByHand(nn.Module):
    """A user's: of plain operations, and without autograd's Functions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.waits = True
        self.queue: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.detach() if self.waits else self.weight)
        if self.waits:
            y = y.requires_grad_() if not y.requires_grad else y
            y.register_hook(lambda dy: self.queue.append((x.detach(), dy)))
        return F.linear(y * self.scale, self.scale.diag())

    def need_backward_dw(self) -> bool:
        return self.waits

    def backward_dw(self) -> None:
        x, dy = self.queue.pop(0)
        self.weight.grad = dy.t().mm(x)


class Kept(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by_hand = ByHand()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.by_hand, x, use_reentrant=False)
        return y


@pytest.mark.parametrize("build", [ByHand, Kept])
def test_nothing_within_such_a_module_is_recorded(build: Callable[[], nn.Module]) -> None:
    """In a checkpoint's second run neither. What it gives autograd, autograd makes in I."""
    torch.manual_seed(0)
    model = build()
    whole = copy.deepcopy(model)
    for part in whole.modules():
        if isinstance(part, ByHand):
            part.waits = False
    splitter = Splitter.of(model)
    for number in range(2):
        x, dy = micro_batch(number)
        with splitter.record() as tape:
            y = model(x)
        tape.backward_input([y], [dy], [x])
        assert tape.targets is None, "nobody but the module knows"
        assert len(list(model.parameters())[1].grad) == WIDTH, "the scale's"
        tape.backward_weight()
        whole(micro_batch(number)[0]).backward(dy)
    for parameter, reference in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(parameter.grad, reference.grad)


def test_the_page_about_them_shows_one_that_works() -> None:
    page = (Path(__file__).parents[2] / "docs/split-backward.md").read_text()
    names: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    module = names["Delayed"](WIDTH)
    functions(module, range(2))
    weight = module.weight.detach().requires_grad_()
    for number in range(2):
        x, dy = micro_batch(number)
        (x @ weight.t()).backward(dy)
    assert torch.equal(module.weight.grad, weight.grad)


def test_without_need_it_is_a_module_as_any_other() -> None:
    model = ByHand()
    model.waits = False
    x, dy = micro_batch(0)
    with Splitter.of(model).record() as tape:
        y = model(x)
    tape.backward_input([y], [dy], [x])
    assert model.weight.grad is None, "its operations are recorded"
    tape.backward_weight()
    assert model.weight.grad is not None


def test_without_gradients_nothing_is_called() -> None:
    model, _ = twins(Mixed)
    splitter = Splitter.of(model)
    x, dy = micro_batch(0)
    with splitter.record(), torch.no_grad():
        model.eval()(x)
    model.train().own.weight.requires_grad_(False)  # and so its backward queues nothing
    with splitter.record() as tape:
        y = model(x)
    tape.backward_input([y], [dy], [x])
    tape.backward_weight()
    assert model.own.calls == 0


def test_reentrant_checkpointing_is_refused_by_name() -> None:
    class Reentrant(Mixed):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = checkpoint(super().forward, x, use_reentrant=True)
            return y

    model, _ = twins(Reentrant)
    problem = pytest.raises(
        UnsupportedModule, match=r"own leaves weight gradients .*; checkpoint with use_reentrant=False"
    )
    with problem, Splitter.of(model).record():
        model(micro_batch(0)[0])


def test_a_module_that_fails_in_w_is_named() -> None:
    model, _ = twins(Mixed)
    before = torch.zeros(WIDTH, WIDTH)
    model.own.weight.grad = before
    x, dy = micro_batch(0)
    with Splitter.of(model).record() as tape:
        y = model(x)
    tape.backward_input([y], [dy], [x])
    model.own.queue.clear()
    with pytest.raises(RuntimeError, match="Pop empty queue") as failed:
        tape.backward_weight()
    assert "own.backward_dw()" in failed.value.__notes__[0]
    assert model.own.weight.grad is before


def test_what_a_pass_does_not_come_to_is_not_called() -> None:
    model, _ = twins(Mixed)
    x, dy = micro_batch(0)
    with Splitter.of(model).record() as tape:
        y = model.inlet(x)
        model.own(x)
    tape.backward_input([y], [dy], [x])
    tape.backward_weight()
    assert model.own.calls == 0


def test_what_is_shared_with_a_recorded_operation_is_nobody_elses_memory() -> None:
    """The module writes every gradient to the same place."""

    class Workspace(DelayedLinear):
        def __init__(self) -> None:
            super().__init__(WIDTH)
            self.space = torch.zeros(WIDTH, WIDTH)

        def backward_dw(self) -> None:
            super().backward_dw()
            self.space.copy_(self.weight.grad)
            self.weight.grad = self.space

    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = Workspace()

        def forward(self, x: Tensor, plain: bool) -> Tensor:
            return F.linear(x, self.own.weight) if plain else self.own(x)

    model, whole = twins(Once)
    splitter = Splitter.of(model)
    for number in range(4):
        x, dy = micro_batch(number)
        with splitter.record() as tape:
            y = model(x, number == 0)
        if number == 1:
            model.zero_grad()
            whole.zero_grad()
        tape.backward_input([y], [dy], [x])
        tape.backward_weight()
        whole(x, number == 0).backward(dy)
    assert_as_whole(model, whole)
