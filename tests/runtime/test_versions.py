"""Older weights of a stage: every gradient and weight has the bits that explicit lists of weights give.

The reference shares no code with what is tested: it keeps every version that there ever was as a dict of clones, makes
a micro-batch's gradients with ``torch.func.functional_call`` at the version that the papers name, and steps an
optimizer of its own. Orders are those of the plans, of one rank at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from pipex.backward import Splitter
from pipex.errors import UnsupportedModule
from pipex.plan import Action, Kind, Plan, build, parse_action, validate
from pipex.plan.placement import Placement
from pipex.runtime import versions as module
from pipex.runtime.versions import Versions

STEPS = 3


class OwnGradient(torch.autograd.Function):
    """x · w, with the parameter itself saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        return dy * w, (dy * x).sum(0)


class Block(nn.Module):
    """What saves weights in all ways: products, a norm, the parameter itself; one weight used twice, a frozen one, and
    two buffers, of which the forwards change one."""

    seen: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.into, self.twice, self.frozen = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.norm, self.gain = nn.LayerNorm(8), nn.Parameter(torch.rand(8) + 0.5)
        self.register_buffer("scale", torch.rand(8))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        y = self.norm(torch.tanh(self.twice(torch.tanh(self.into(x)))))
        y = OwnGradient.apply(self.frozen(y), self.gain)  # type: ignore[no-untyped-call]
        return self.twice(y) * self.scale + y * self.gain  # type: ignore[no-any-return]


def sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.002, momentum=0.9)


def adamw(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02)


Optimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def batch(dtype: torch.dtype, step: int, microbatch: int) -> tuple[Tensor, Tensor]:
    """Its input, and the gradient of its output."""
    drawn = torch.Generator().manual_seed(100 * step + microbatch)
    return torch.randn(5, 6, generator=drawn, dtype=dtype), torch.randn(5, 8, generator=drawn, dtype=dtype)


class Course:
    """Runs one rank's order of a plan on a stage of its own."""

    def __init__(self, plan: Plan, rank: int, optimizer: Optimizer, dtype: torch.dtype) -> None:
        torch.manual_seed(7)
        self.plan, self.order, self.dtype = plan, plan.orders[rank], dtype
        self.split = any(action.kind is Kind.I for action in self.order)
        self.stage = Block().to(dtype)
        self.trained = [p for p in self.stage.parameters() if p.requires_grad]
        self.optimizer = optimizer(self.trained)
        self.splitter = Splitter.of(self.stage)
        self.versions = Versions(self.stage.parameters, delayed=plan.update == "delayed")
        self.most = 1
        self.gradients: list[list[Tensor]] = []
        self.weights: list[list[Tensor]] = []
        self.inputs: list[Tensor] = []

    def run(self, step: int) -> None:
        self.versions.begin()
        live: dict[int, tuple[Tensor, Tensor, Any]] = {}
        for stage, kind, m, _ in self.order:
            x, dy = batch(self.dtype, step, m)
            match kind:
                case Kind.F:
                    x.requires_grad_()
                    recording = self.splitter.record() if self.split else nullcontext()
                    with self.versions.forward(m, self.plan.versions[stage, m]), recording as tape:
                        live[m] = x, self.stage(x), tape
                case Kind.I:
                    x, y, tape = live[m]
                    with self.versions.backward(m):
                        self.inputs += tape.backward_input([y], [dy], [x])
                    live[m] = x, x, tape  # the graph is gone
                case Kind.B | Kind.W:
                    x, y, tape = live.pop(m)
                    with self.versions.backward(m):
                        if kind is Kind.W:
                            tape.backward_weight()
                        else:
                            y.backward(dy)
                            assert x.grad is not None
                            self.inputs.append(x.grad)
                    del x, y, tape
                    self.versions.done(m)
                case Kind.UPDATE:
                    self.gradients.append([p.grad.clone() for p in self.trained if p.grad is not None])
                    self.versions.update(self.optimizer.step)
                    self.optimizer.zero_grad()
                    self.weights.append([p.detach().clone() for p in self.trained])
            self.most = max(self.most, self.versions.held)


class Reference:
    """Every version that there ever was, from the first on."""

    def __init__(self, optimizer: Optimizer, dtype: torch.dtype) -> None:
        torch.manual_seed(7)
        self.stage, self.dtype = Block().to(dtype), dtype
        names = [name for name, p in self.stage.named_parameters() if p.requires_grad]
        self.newest = {name: self.stage.get_parameter(name).detach().clone().requires_grad_() for name in names}
        self.optimizer = optimizer(self.newest.values())
        self.history = [self.copy()]
        self.gradients: list[list[Tensor]] = []
        self.inputs: dict[tuple[int, int], Tensor] = {}

    def copy(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self.newest.items()}

    def update(self, step: int, microbatches: Iterable[int], uses: Callable[[int], int]) -> None:
        """One update with the gradients of these micro-batches, each made at ``history[uses(m)]``."""
        sums: list[Tensor] = []
        for m in microbatches:
            x, dy = batch(self.dtype, step, m)
            weights = {name: w.clone().requires_grad_() for name, w in self.history[uses(m)].items()}
            y = torch.func.functional_call(self.stage, weights, (x.requires_grad_(),))
            self.inputs[step, m], *found = torch.autograd.grad(y, [x, *weights.values()], dy)
            sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
        for weight, gradient in zip(self.newest.values(), sums, strict=True):
            weight.grad = gradient.clone()
        self.gradients.append(sums)
        self.optimizer.step()
        self.history.append(self.copy())


def split_backwards(plan: Plan, *, w_before_update: bool) -> Plan:
    """Every B as an I with its W at once, or with all W of an update right before that."""
    orders = []
    for order in plan.orders:
        made: list[Action] = []
        waiting: list[Action] = []
        for action in order:
            if action.kind is Kind.B:
                made.append(action._replace(kind=Kind.I))
                waiting.append(action._replace(kind=Kind.W))
            if action.kind is Kind.UPDATE or not w_before_update:
                made += waiting
                waiting = []
            if action.kind is not Kind.B:
                made.append(action)
        orders.append(tuple(made))
    peaks = (99,) * plan.placement.ranks
    changed = Plan(plan.family, plan.placement, plan.microbatches, tuple(orders), peaks, plan.update)
    validate(changed)
    return changed


def check(course: Course, reference: Reference) -> None:
    """Bits, not closeness."""
    assert len(course.gradients) == len(reference.gradients) > 0
    for found, wanted in zip(course.gradients, reference.gradients, strict=True):
        assert all(map(torch.equal, found, wanted))
    for weights, version in zip(course.weights, reference.history[1:], strict=True):
        assert all(map(torch.equal, weights, version.values()))
        assert all(weight.isfinite().all() for weight in weights)
    assert all(map(torch.equal, course.inputs, reference.inputs.values()))
    frozen, was = course.stage.frozen, reference.stage.frozen
    assert torch.equal(frozen.weight, was.weight)
    assert torch.equal(course.stage.seen, reference.stage.seen)
    assert len({*map(id, course.trained)}) == len(course.optimizer.param_groups[0]["params"])


@pytest.mark.parametrize("split", ["whole", "at once", "before the update"])
@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_pipedream_has_the_bits_of_explicit_versions(
    ranks: int, dtype: torch.dtype, optimizer: Optimizer, split: str
) -> None:
    microbatches = 2 * ranks + 1
    plan = build("pipedream", ranks, microbatches)
    if split != "whole":
        plan = split_backwards(plan, w_before_update=split == "before the update")
    for rank in range(ranks):
        course = Course(plan, rank, optimizer, dtype)
        reference = Reference(optimizer, dtype)
        for step in range(STEPS):
            course.run(step)
            begin = len(reference.history) - 1
            for m in range(microbatches):
                reference.update(step, [m], lambda m: begin + max(0, m - (ranks - 1 - rank)))  # noqa: B023
        check(course, reference)
        assert course.most == plan.weight_versions[rank] == ranks - rank
        assert course.versions.held == 1


@pytest.mark.parametrize("split", ["whole", "at once", "before the update"])
@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("ranks", "each", "updates"), [(1, 1, 3), (1, 2, 1), (3, 3, 2), (3, 4, 1), (4, 4, 3)])
def test_pipedream_2bw_has_the_bits_of_explicit_versions(
    ranks: int, each: int, updates: int, dtype: torch.dtype, optimizer: Optimizer, split: str
) -> None:
    """W(t+1) = W(t) - lr g(W(t-1)), from step to step too."""
    plan = build("pipedream-2bw", ranks, each * updates, updates=updates)
    if split != "whole":
        plan = split_backwards(plan, w_before_update=split == "before the update")
    reference = Reference(optimizer, dtype)
    for step in range(STEPS):
        for group in range(updates):
            before = max(0, len(reference.history) - 2)
            reference.update(step, range(group * each, (group + 1) * each), lambda m: before)  # noqa: B023
    for rank in range(ranks):
        course = Course(plan, rank, optimizer, dtype)
        for step in range(STEPS):
            course.run(step)
        check(course, reference)
        assert course.most == plan.weight_versions[rank] == course.versions.held == 2
        for name, weight in reference.history[-2].items():
            assert torch.equal(course.versions.previous[course.stage.get_parameter(name)], weight)


def test_a_run_goes_on_from_its_newest_weights_and_the_ones_before() -> None:
    plan = build("pipedream-2bw", 2, 4, updates=2)
    through, first = (Course(plan, 0, sgd, torch.float32) for _ in range(2))
    for step in range(2):
        through.run(step)
    first.run(0)
    second = Course(plan, 0, sgd, torch.float32)
    second.stage.load_state_dict(first.stage.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    by_name = dict(zip(first.trained, second.trained, strict=True))
    second.versions.resume({by_name[p]: tensor.clone() for p, tensor in first.versions.previous.items()})
    second.run(1)
    for weights, wanted in zip(second.weights, through.weights[2:], strict=True):
        assert all(map(torch.equal, weights, wanted))
    second.versions.resume({})  # without them the newest are used: another result
    assert not second.versions.previous


def stage_of_one() -> tuple[nn.Linear, Versions]:
    layer = nn.Linear(2, 2, bias=False)
    return layer, Versions(layer.parameters, delayed=False)


def changed(layer: nn.Linear) -> Callable[[], object]:
    def step() -> None:
        with torch.no_grad():
            layer.weight += 1

    return step


def memory_of(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def test_a_version_is_let_go_with_the_last_micro_batch_that_uses_it() -> None:
    layer, versions = stage_of_one()
    first = memory_of(layer.weight)
    for m in (0, 1):
        with versions.forward(m, 0):
            pass
    versions.update(changed(layer))
    assert versions.held == 2
    versions.done(0)
    assert versions.held == 2
    assert not first.expired()
    versions.done(1)
    assert versions.held == 1
    assert first.expired()


def test_weights_that_nobody_needs_any_more_are_changed_where_they_are() -> None:
    layer, versions = stage_of_one()
    where = layer.weight.data_ptr()
    with versions.forward(0, 0):
        pass
    versions.done(0)
    versions.update(changed(layer))
    assert layer.weight.data_ptr() == where


def test_delayed_updates_take_turns_in_two_places() -> None:
    layer = nn.Linear(2, 2, bias=False)
    versions = Versions(layer.parameters, delayed=True)
    places = []
    for _ in range(5):
        versions.begin()
        versions.update(changed(layer))
        places.append(layer.weight.data_ptr())
        assert versions.held == 2
    assert places == [places[0], places[1]] * 2 + [places[0]]
    assert places[0] != places[1]


def test_parameters_that_nothing_changes_are_not_copied() -> None:
    block = Block()
    versions = Versions(block.parameters, delayed=True)
    where = {name: p.data_ptr() for name, p in block.named_parameters()}
    versions.update(lambda: None)
    moved = {name for name, p in block.named_parameters() if p.data_ptr() != where[name]}
    assert moved == {name for name, p in block.named_parameters() if p.requires_grad}
    assert len(versions.previous) == len(moved)


@pytest.mark.parametrize("inside", ["forward", "backward"])
def test_the_newest_weights_are_back_after_an_error(inside: str) -> None:
    layer, versions = stage_of_one()
    old = layer.weight.detach().clone()
    with versions.forward(0, 0):
        pass
    versions.update(changed(layer))

    def fail() -> None:
        with versions.backward(0) if inside == "backward" else versions.forward(1, 0):
            assert torch.equal(layer.weight, old)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(layer.weight, old + 1)
    versions.begin()  # the next step knows of neither
    assert versions.held == 1


def test_what_autograd_would_refuse_is_proven_by_the_versions_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step in place would make the backward of a parameter that was saved itself fail."""
    plan = build("pipedream", 3, 5)
    monkeypatch.setattr(module, "preserving_versions", lambda tensors: nullcontext())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        Course(plan, 0, sgd, torch.float32).run(0)


def test_parameters_in_one_memory_are_refused() -> None:
    """Two that lie side by side in it are not: copies of them are what they are."""
    flat = torch.zeros(8)
    apart = [nn.Parameter(flat[:4]), nn.Parameter(flat[4:])]
    Versions(lambda: apart, delayed=True).update(lambda: None)
    shared = [nn.Parameter(flat[:5]), nn.Parameter(flat[4:])]
    with pytest.raises(
        UnsupportedModule,
        match="parameters that share memory, with each other or with a buffer, cannot have older versions",
    ):
        Versions(lambda: shared, delayed=True).update(lambda: None)


def test_a_parameter_that_moves_is_watched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each version has memory of its own. The splitter must not take that for news about the parameter's uses, which
    would make it walk the graph of every backward."""
    plan = split_backwards(build("pipedream", 3, 6), w_before_update=True)
    course = Course(plan, 0, sgd, torch.float32)
    watched: list[int] = []
    plain = Splitter._watch
    monkeypatch.setattr(Splitter, "_watch", lambda self, p: (watched.append(id(p)), plain(self, p))[1])
    for step in range(2):
        course.run(step)
    assert sorted(watched) == sorted(set(watched))
    assert not course.splitter.mixed.watching


def test_three_stages_by_hand() -> None:
    """The smallest order in which three versions live: two micro-batches under way on other weights than the newest."""
    cells = "0F0 0F1 0F2 0B0 0UPDATE0 0F3 0B1 0UPDATE1 0B2 0UPDATE2 0B3 0UPDATE3"
    plan = Plan("by-hand", Placement("loop", 1), 4, (tuple(map(parse_action, cells.split())),), (9,), "microbatch")
    validate(plan)
    course = Course(plan, 0, sgd, torch.float64)
    course.run(0)
    reference = Reference(sgd, torch.float64)
    for m, version in enumerate((0, 0, 0, 1)):
        reference.update(0, [m], lambda m: version)  # noqa: B023
    check(course, reference)
    assert course.most == plan.weight_versions[0] == 3
