"""Modules that are easily got wrong, against plain torch: in several stages, in place, drawing, thawed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import host_world
import pytest
import torch
import torch.nn.functional as F
from layer_kinds import SIZE, Layer, lin
from random_models import Model, Plain, base_of, digest, draw, loss_fn, optimizer, seed_of
from torch import Tensor, nn
from trained_models import compare, rank_train

import pipex
from pipex.errors import PeerFailed, UnsupportedModule
from pipex.runtime.received import Received
from pipex.runtime.reference import OneProcess
from pipex.runtime.seeding import Seeds

Kinds = tuple[tuple[str, ...], ...]
AGAIN: Kinds = (("linear", "residual"), ("a layer again", "a weight again"), ("a layer again",), ("a layer again",))


@pytest.mark.parametrize(
    ("cell", "kinds"),
    [
        pytest.param((family, ranks, chunks, 3), kinds, id=f"{what}, {family} on {ranks}")
        for what, kinds in {
            "a module in four stages": AGAIN,
            "in place behind every cut": (("linear",), ("relu in place", "linear"), ("scaled in place",), ("linear",)),
            "in place on the batch": (("scaled in place", "linear"), ("linear",), ("linear",), ("linear",)),
            "a hook on an input behind every cut": (("linear",), *[("hook on an input",)] * 3),
            "a weight used otherwise": (("linear",), ("penalty on a weight",), ("weight used otherwise",), ("linear",)),
            "strided gradients": (("linear",), ("lstm",), ("transposed", "lstm"), ("strided", "attention module")),
            "dropout that begins later": (("dropout that begins later",), *[("noise on some data",)] * 2, ("linear",)),
            "state of every kind": (
                ("buffer reassigned", "counter"), ("frozen parameter as state", "attribute in place"),
                ("attribute reassigned", "generator of its own"), ("embedding with max_norm", "expanded buffer"),
            ),
        }.items()
        for family, ranks, chunks in [("1f1b", 4, 1), ("zb-h1", 4, 1), ("zbv", 2, 2), ("looped-bfs", 1, 4)]
    ],
)  # fmt: skip
def test_bits_are_those_of_plain_torch(cell: tuple[str, int, int, int], kinds: Kinds) -> None:
    model = Model(1, kinds, cell[3], 7)
    expected = Plain(model).train()
    compare([result[0] for result in host_world.launch(rank_train, cell[1], args=([(cell, model)],))], expected)


@pytest.mark.parametrize("seed", range(12))
def test_the_reference_has_the_bits_of_plain_torch(seed: int) -> None:
    """What other tests compare with, compared itself; half of the models share layers among stages."""
    without = {"backward hook", "hook on an activation"}  # they ask for inputs that require grad
    model = draw(seed, 3, 3, without) if seed % 2 else Model(seed, (("linear",), *AGAIN[1:]), 3, 7)
    expected = Plain(model).train()
    process = OneProcess(
        pipex.split_model(nn.Sequential(*model.layers()), 3 + (seed % 2 == 0), balance=model.counts),
        model.microbatches, loss_fn, optimizer=optimizer, seed=11,
    )  # fmt: skip
    losses = [process.step(*model.batch(step)) for step in (1, 2, 3)]
    assert losses == expected["losses"]
    numbered = [(s.first_layer + n, layer) for s in process.stages for n, layer in enumerate(s.layers)]
    found = {f"{n}.{name}": digest(p) for n, layer in numbered for name, p in layer.named_parameters()}
    assert found == {name: expected["tensors"][name] for name in found}
    assert process.evaluate(*model.batch(4)) == expected["evaluated"]  # last: it may change tensors too


# One module in several stages that keeps something.


class Table(nn.Module):
    """Positions that no forward changes, some made when they are first needed."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.linspace(0, 1, SIZE))
        self.inner, self.cached = lin(), None

    def forward(self, x: Tensor) -> Tensor:
        if self.cached is None:
            self.cached = torch.sin(self.positions)
        return self.inner(x) + self.cached


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.count, self.inner = 0, lin()

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.inner(x) / self.count


class Keeping(nn.Module):
    """Keeps something in a way that torch does not know of."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.inner = how, lin()
        self.register_buffer("scale", torch.ones(SIZE))
        self.box: list[Any] = [0.0]
        self.nested = {"counts": {"n": 1}, "seen": {0}, "tensors": [torch.ones(SIZE), torch.ones(SIZE)]}
        self.bytes = bytearray(4)
        self.cache: dict[Any, Any] = {}
        self.shape: Any = None

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "list":
                self.box[0] += 1
            case "longer list":
                self.box.append(0.0)
            case "dict":
                self.nested["counts"]["n"] += 1
            case "set":
                self.nested["seen"].add(len(self.nested["seen"]))
            case "tensor":
                self.nested["tensors"][1].add_(1)
            case "another tensor":
                self.nested["tensors"][0] = self.nested["tensors"][0] + 1
            case "bytes":
                self.bytes[1] += 1
            case "data":
                self.scale.data.mul_(1.1)
            case "made once":  # which changes nothing
                if len(x) not in self.cache:
                    self.cache[len(x)] = torch.ones(SIZE)
                self.shape = x.shape[1:]
                return self.inner(x) * self.cache[len(x)]
        return self.inner(x) * self.scale


class Masked(nn.Module):
    """Its buffer is another module's too."""

    def __init__(self, mask: Tensor, writes: bool) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.inner, self.writes = lin(), writes

    def forward(self, x: Tensor) -> Tensor:
        if self.writes:
            self.mask.mul_(0.9)
        return self.inner(x) * self.mask


def twice(make: Callable[[], nn.Module]) -> list[nn.Module]:
    torch.manual_seed(0)
    again = make()
    return [again, lin(), again, lin()]


def masked(writes: bool) -> list[nn.Module]:
    torch.manual_seed(0)
    mask = torch.ones(SIZE)
    return [Masked(mask, False), lin(), Masked(mask, writes), lin()]


KEPT = {
    "list": "box", "longer list": "box", "dict": "nested", "set": "nested", "tensor": "nested",
    "another tensor": "nested", "bytes": "bytes", "data": "scale", "made once": "",
}  # fmt: skip


def layers(name: str) -> list[nn.Module]:
    made = {
        "batch norm": lambda: twice(lambda: nn.BatchNorm1d(SIZE)),
        "frozen batch norm": lambda: twice(lambda: nn.BatchNorm1d(SIZE).eval()),
        "counter": lambda: twice(Counts),
        "table": lambda: twice(Table),
        **{how: partial(twice, partial(Keeping, how)) for how in KEPT},
        "a mask for two": lambda: masked(False),
        "a mask for two that is changed": lambda: masked(True),
    }
    return made[name]()


BATCH = Model(3, (), 3, 6).batch


def train_twice(name: str, family: str, ranks: int, chunks: int) -> tuple[list[float], float]:
    model = nn.Sequential(*layers(name))
    plan = pipex.build(family, ranks, 3, chunks=chunks)
    pipe = pipex.Pipeline(pipex.split_model(model, plan.placement.stages), plan, F.mse_loss, optimizer=optimizer)
    return [pipe.step(*BATCH(step)) for step in (1, 2)], pipe.evaluate(*BATCH(3))


def plain_twice(name: str) -> tuple[list[float], float]:
    model = nn.Sequential(*layers(name))
    update, losses = optimizer(model.parameters()), []
    for step in (1, 2):
        total = torch.zeros(())
        for x, y in zip(*(t.split(2) for t in BATCH(step)), strict=True):
            loss = F.mse_loss(model(x), y) * (2 / 6)
            loss.backward()
            total = total + loss.detach()
        losses.append(total.item())
        update.step()
        update.zero_grad()
    x, y = BATCH(3)
    with torch.no_grad():
        return losses, F.mse_loss(model.eval()(x), y).item()


@pytest.mark.parametrize("name", ["frozen batch norm", "table", "a mask for two", "made once"])
@pytest.mark.parametrize(("family", "ranks", "chunks"), [("1f1b", 2, 1), ("interleaved", 2, 2), ("looped-bfs", 1, 4)])
def test_what_no_forward_changes_may_be_used_in_several_stages(name: str, family: str, ranks: int, chunks: int) -> None:
    losses, evaluated = plain_twice(name)
    for found in host_world.launch(train_twice, ranks, args=(name, family, ranks, chunks)):
        assert found[0] == pytest.approx(losses, rel=1e-6)  # the sums of a shared weight are made stage by stage
        assert found[1] == pytest.approx(evaluated, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("batch norm", r"BatchNorm1d \(layer 0\) is used in the stages 0, 1 and .* a change of running_mean"),
        ("counter", r"Counts \(layer 0\) is used in the stages 0, 1 and .* a change of count"),
        ("a mask for two that is changed", r"Masked \(layer 2\) is used in the stages 0, 1 and .* a change of mask"),
        *((how, rf"Keeping \(layer 0\) is used in .* a change of {what}") for how, what in KEPT.items() if what),
    ],
)
def test_what_a_forward_changes_may_not(name: str, what: str) -> None:
    with pytest.raises(PeerFailed, match=f"UnsupportedModule: {what}; needed .*; cut the model so that"):
        host_world.launch(train_twice, 2, args=(name, "1f1b", 2, 1))


def test_not_on_one_rank_either_if_its_uses_come_in_another_order() -> None:
    with pytest.raises(UnsupportedModule, match="is used in the stages 0, 2"):
        train_twice("batch norm", "looped-bfs", 1, 4)


@pytest.mark.parametrize("name", ["batch norm", "counter"])
def test_on_one_rank_it_is_shared_if_they_come_in_order(name: str) -> None:
    plan = pipex.build("looped-bfs", 1, 1, chunks=4)  # one micro-batch: through all stages, and back
    model = nn.Sequential(*layers(name))
    pipe = pipex.Pipeline(pipex.split_model(model, 4), plan, F.mse_loss, optimizer=optimizer)
    plain = nn.Sequential(*layers(name))
    update = optimizer(plain.parameters())
    for step in (1, 2):
        x, y = BATCH(step)
        loss = F.mse_loss(plain(x), y)
        loss.backward()
        assert pipe.step(x, y) == pytest.approx(loss.item(), rel=1e-6)
        update.step()
        update.zero_grad()
    for found, expected in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected)
    assert getattr(model[0], "count", 4) == getattr(plain[0], "count", 4) == 4


# In place.


def test_an_in_place_layer_that_torch_refuses_is_refused_on_one_rank_too() -> None:
    """Its input is what the sigmoid of the stage before has saved; on two ranks it is a copy."""
    model = nn.Sequential(lin(), nn.Sigmoid(), nn.ReLU(inplace=True), lin())
    pipe = pipex.Pipeline(
        pipex.split_model(model, 2), pipex.build("interleaved", 1, 2, chunks=2), F.mse_loss, optimizer=optimizer
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        pipe.step(*BATCH(1))


def test_the_batch_is_changed_as_in_plain_torch() -> None:
    pipe = pipex.Pipeline([nn.Sequential(nn.ReLU(inplace=True), lin())], pipex.build("gpipe", 1, 3), F.mse_loss,
                          optimizer=optimizer)  # fmt: skip
    x, y = BATCH(1)
    before = x.clone()
    pipe.step(x, y)
    assert torch.equal(x, before.relu())


def test_memory_of_one_element_in_a_dimension_keeps_its_strides() -> None:
    leaf = torch.randn(2, 4, 4, 1).permute(0, 3, 1, 2).requires_grad_()  # channels last
    (handed,) = Received([leaf], plain=False).handed
    assert handed.stride() == leaf.stride() == (16, 1, 4, 1)
    assert not handed.is_leaf
    assert handed.data_ptr() == leaf.data_ptr()


def test_a_gradient_keeps_the_strides_in_which_autograd_makes_it() -> None:
    """As a leaf's it would get those of the leaf."""
    received = Received([torch.randn(4, 3).requires_grad_()], plain=False)
    received.handed[0].t().backward(torch.ones(3, 4))
    (gradient,) = received.gradients()
    assert gradient.stride() == (1, 4)


def test_what_is_not_contiguous_is_not_handed_as_a_leaf_to_a_plain_stage() -> None:
    (contiguous,) = Received([torch.randn(4, 3).requires_grad_()], plain=True).handed
    (other,) = Received([torch.randn(3, 4).t().requires_grad_()], plain=True).handed
    assert contiguous.is_leaf
    assert not other.is_leaf


# Random numbers.


def draws(_: int) -> list[float]:
    """Noise of gradient hooks, of layers, and the user's own."""
    torch.manual_seed(7)
    seen: list[float] = []
    stages = [Layer(lambda m, x: F.dropout(m.inner(x), 0.5), inner=lin()), lin()]
    stages[1].weight.register_hook(lambda g: seen.append(torch.rand(()).item()))
    pipe = pipex.Pipeline(stages, pipex.build("looped-bfs", 1, 2, chunks=2), F.mse_loss, optimizer=optimizer)
    torch.manual_seed(5)
    own = []
    for step in (1, 2):
        pipe.step(*BATCH(step))
        own.append(torch.rand(()).item())
    torch.manual_seed(5)
    assert own == [torch.rand(()).item(), torch.rand(()).item()]
    return seen


def test_hooks_draw_other_numbers_in_every_step_and_the_user_s_stay() -> None:
    seen = draws(0)
    assert len(set(seen)) == 4


def random_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output + torch.randn_like(output), target)


def losses_with_noise(ranks: int) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(lin(), lin(), lin())
    pipe = pipex.Pipeline(
        pipex.split_model(model, ranks), pipex.build("1f1b", ranks, 3), random_loss, optimizer=optimizer
    )
    return [*(pipe.step(*BATCH(step)) for step in (1, 2)), pipe.evaluate(*BATCH(3))]


def test_a_loss_that_draws_does_not_depend_on_the_cut() -> None:
    one, two, three = (host_world.launch(losses_with_noise, ranks, args=(ranks,))[0] for ranks in (1, 2, 3))
    assert one == two == three
    assert one[0] != one[1]


def test_seeds_of_layers_are_those_of_the_contract() -> None:
    Seeds(torch.device("cpu"), 11).of(2, 3)(4)
    assert torch.initial_seed() == seed_of(base_of(2, 3), 4)


# Parameters between steps.


def frozen_first(ranks: int) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(lin(), nn.Tanh(), lin(), lin())
    model[0].requires_grad_(False)
    return model


def change(model: nn.Sequential, step: int, mine: bool, update: torch.optim.Optimizer) -> None:
    """Thaws, then adds, then replaces a parameter of the first layer."""
    layer = model[0]
    if step == 2:
        layer.requires_grad_(True)
        new: Sequence[Tensor] = list(layer.parameters())
    elif step == 3:
        layer.extra = nn.Parameter(torch.ones(SIZE))
        layer.register_forward_hook(lambda m, x, y: y * m.extra)
        new = [layer.extra]
    elif step == 4:
        layer.weight = nn.Parameter(layer.weight.detach() * 0.5)
        new = [layer.weight]
    else:
        return
    if mine:
        update.add_param_group({"params": new})


def train_changing(family: str, ranks: int) -> tuple[list[float], bool, list[str | None]]:
    model = frozen_first(ranks)
    plan = pipex.build(family, ranks, 3)
    stages = pipex.split_model(model, ranks, balance=[3, 1] if ranks == 2 else "uniform")
    pipe = pipex.Pipeline(stages, plan, F.mse_loss, optimizer=optimizer, clip_norm=0.3)
    losses = []
    for step in range(1, 6):
        change(model, step, pipe.world.rank == 0, pipe.optimizer)
        losses.append(pipe.step(*BATCH(step)))
    left = any(p.grad is not None for stage in pipe.local_stages for p in stage.parameters())
    return losses, left, [digest(p) for p in model[0].parameters()] if pipe.world.rank == 0 else []


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("family", ["gpipe", "zb-h1"])
def test_thawed_added_and_replaced_parameters_train_and_are_clipped_and_cleared(family: str, ranks: int) -> None:
    model = frozen_first(1)
    update = optimizer(p for p in model.parameters() if p.requires_grad)
    expected = []
    for step in range(1, 6):
        change(model, step, True, update)
        total = torch.zeros(())
        for x, y in zip(*(t.split(2) for t in BATCH(step)), strict=True):
            loss = F.mse_loss(model(x), y) * (2 / 6)
            loss.backward()
            total = total + loss.detach()
        # In model order, frozen ones apart.
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 0.3)
        update.step()
        model.zero_grad()
        expected.append(total.item())
    first, *_ = host_world.launch(train_changing, ranks, args=(family, ranks))
    assert first[0] == expected
    assert not first[1]
    assert first[2] == [digest(p) for p in model[0].parameters()]


def untie() -> None:
    layers = [lin(), nn.Tanh(), lin()]
    layers[2].weight = layers[0].weight
    pipe = pipex.Pipeline(layers, pipex.build("looped-bfs", 1, 2, chunks=3), F.mse_loss, optimizer=optimizer)
    pipe.step(*BATCH(1))
    layers[0].weight = nn.Parameter(layers[0].weight.detach())
    pipe.step(*BATCH(2))


def test_a_tied_parameter_that_is_replaced_in_one_stage_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModule, match=r"0\.weight was one parameter of the stages 0, 2 .* got several"):
        untie()


class Handing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = lin()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x), self.inner.weight


class Taking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = lin()

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.inner(F.linear(x, weight))


def handing() -> list[nn.Module]:
    torch.manual_seed(0)
    return [lin(), Handing(), Taking()]


def digests_of_two_steps(pipe: pipex.Pipeline) -> list[list[str | None]]:
    """Of the gradients of this rank's stage, in each step."""
    (stage,) = pipe.local_stages
    seen: list[list[str | None]] = []
    pipe.optimizer.register_step_pre_hook(lambda *_: seen.append([digest(p.grad) for p in stage.parameters()]))
    for step in (1, 2):
        pipe.step(*BATCH(step))
    return seen


def train_handing(family: str) -> list[list[str | None]]:
    """With an I and its W apart in the middle, as only a first stage has them together."""
    pipe = pipex.Pipeline(handing(), pipex.build(family, 3, 6), F.mse_loss, optimizer=optimizer)
    return digests_of_two_steps(pipe)


@pytest.mark.parametrize("family", ["1f1b", "zb-h1", "zb-h2"])
def test_a_weight_that_is_handed_on_gets_both_gradients_in_order(family: str) -> None:
    modules = handing()
    first, second, last = modules
    update = optimizer(p for module in modules for p in module.parameters())
    expected: list[list[list[str | None]]] = [[], [], []]
    for step in (1, 2):
        for x, y in zip(*(t.tensor_split(6) for t in BATCH(step)), strict=True):
            (F.mse_loss(last(*second(first(x))), y) * (len(x) / 6)).backward()
        for seen, module in zip(expected, modules, strict=True):
            seen.append([digest(p.grad) for p in module.parameters()])
        update.step()
        update.zero_grad()
    assert host_world.launch(train_handing, 3, args=(family,)) == expected


def with_penalty() -> tuple[nn.Sequential, Callable[[Tensor, Tensor], Tensor]]:
    """A loss function that uses a weight of the last stage itself."""
    torch.manual_seed(0)
    model = nn.Sequential(lin(), nn.Tanh(), lin(), nn.Tanh(), lin(), lin())
    return model, lambda output, target: F.mse_loss(output, target) + 0.1 * model[5].weight.square().sum()


def train_with_penalty(family: str) -> list[list[str | None]]:
    model, loss = with_penalty()
    pipe = pipex.Pipeline(pipex.split_model(model, 2), pipex.build(family, 2, 3), loss, optimizer=optimizer)
    return digests_of_two_steps(pipe)


@pytest.mark.parametrize("family", ["1f1b", "zb-h1", "zb-h2"])
def test_a_weight_in_the_loss_gets_both_gradients_in_order(family: str) -> None:
    model, loss = with_penalty()
    update = optimizer(model.parameters())
    expected: list[list[str | None]] = []
    for step in (1, 2):
        for x, y in zip(*(t.split(2) for t in BATCH(step)), strict=True):
            (loss(model(x), y) * (2 / 6)).backward()
        expected.append([digest(p.grad) for p in model.parameters()])
        update.step()
        update.zero_grad()
    first, last = host_world.launch(train_with_penalty, 2, args=(family,))
    assert [one + other for one, other in zip(first, last, strict=True)] == expected


def test_a_stage_that_returns_nothing_is_named() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> tuple[()]:
            return ()

    pipe = pipex.Pipeline(
        [Nothing(), lin()], pipex.build("looped-bfs", 1, 2, chunks=2), F.mse_loss, optimizer=optimizer
    )
    with pytest.raises(UnsupportedModule, match="stage 0 cannot hand its output to the next stage; got tuple"):
        pipe.step(*BATCH(1))
