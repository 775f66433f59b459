"""Modules that make their weight gradients themselves, beside the same modules that do so within the backward."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import persistent
import plain_loop
import pytest
import torch
import torch.nn.functional as F
from delayed_linear import DelayedLinear
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, schedules
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch_group import in_group

import pipex
from pipex.backward import Splitter, dw_builder, stage_backward, stage_backward_input, stage_backward_weight
from pipex.errors import UnsupportedModule
from pipex.partition import profile_layers

WIDTH = 6


class Mixed(nn.Module):
    """One twice, and its weight in a plain operation between; around it layers that are recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.own, self.outlet = nn.Linear(WIDTH, WIDTH), DelayedLinear(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.own(self.inlet(x)))
        x = torch.tanh(F.linear(x, self.own.weight))
        return self.outlet(self.own(x))


class Checkpointed(Mixed):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return y


class Named(nn.Module):
    """What it returns holds its input, which somebody made before it, and two outputs of one backward."""

    def __init__(self) -> None:
        super().__init__()
        self.own = DelayedLinear(WIDTH)
        self.inlet = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inlet(x)
        found = self.own(x)
        return found["y"].mul_(2) + found["parts"][0]


class SeveralOutputs(DelayedLinear):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return {"y": y * 1.5, "parts": (x, [y.tanh()]), "none": None}


def alone() -> nn.Module:
    return DelayedLinear(WIDTH)


def several_outputs() -> nn.Module:
    module = Named()
    module.own = SeveralOutputs(WIDTH)
    return module


MODELS = {"mixed": Mixed, "alone": alone, "checkpointed": Checkpointed, "several outputs": several_outputs}


def owned(module: nn.Module) -> list[DelayedLinear]:
    return [part for part in module.modules() if isinstance(part, DelayedLinear)]


def twins(build: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A model, and the same whose modules leave nothing."""
    torch.manual_seed(0)
    model = build()
    whole = copy.deepcopy(model)
    for part in owned(whole):
        part.delayed = False
    return model, whole


def micro_batch(number: int, *, needs_gradient: bool = True) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    x, dy = torch.randn(2, 4, WIDTH, generator=generator)
    return x.requires_grad_(needs_gradient), dy


def assert_as_whole(model: nn.Module, whole: nn.Module) -> None:
    for (name, parameter), reference in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert (parameter.grad is None) == (reference.grad is None), name
        if reference.grad is not None:
            assert torch.equal(parameter.grad, reference.grad), name
    assert not any(part.queue for part in owned(model)), "nothing is left"
    for part in owned(model):
        assert "forward" not in vars(part), "the module is as it was"


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


def replicated(mode: str) -> str:
    model = DistributedDataParallel(Mixed())
    whole = copy.deepcopy(model.module)
    for part in owned(whole):
        part.delayed = False
    assert Splitter.of(whole).own
    module: nn.Module = model if mode == "stage" else nn.Sequential(model)
    x, _ = micro_batch(0)
    stage = PipelineStage(module, 0, 1, torch.device("cpu"), input_args=(x,), output_args=(x,))
    with pipex.drop_in(), pytest.raises(UnsupportedModule) as refused:
        schedules.ScheduleGPipe(stage, 2, loss_fn=nn.functional.mse_loss).step(x, target=x)
    return str(refused.value)


@pytest.mark.parametrize("mode", ["stage", "part"])
def test_ddp_is_refused_by_name(mode: str, tmp_path: Path) -> None:
    """It would reduce a gradient that is not there yet."""
    assert re.match(r".*own makes its weight gradients by itself", in_group(tmp_path / "store", 0, 1, replicated, mode))


def sharded() -> None:
    model, whole = twins(Mixed)
    for module in (model, whole):
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)), reshard_after_forward=True)
    splitter = Splitter.of(model)
    waiting = []
    for number in range(3):
        x, dy = micro_batch(number)
        with splitter.record() as tape:
            y = model(x)
        tape.backward_input([y], [dy], [x])
        waiting.append(tape)
        whole(x).backward(dy)
    assert model.own.calls == 0
    for tape in waiting:
        tape.backward_weight()
    for (name, parameter), reference in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(parameter.grad.to_local(), reference.grad.to_local()), name


def test_they_wait_under_fsdp2(tmp_path: Path) -> None:
    in_group(tmp_path / "store", 0, 1, sharded)


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


def small() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(6, 6), DelayedLinear(6), nn.Tanh(), DelayedLinear(6), nn.Linear(6, 6), nn.Linear(6, 3)
    )


@pytest.mark.parametrize("family", ["zb-h1", "1f1b", "gpipe"])
def test_a_pipeline_trains_them(family: str) -> None:
    """Split and unsplit; with an evaluation in between, which leaves nothing."""
    reference = twins(small)[1]
    optimizer = plain_loop.adam(reference.parameters())
    pipe = plain_loop.pipeline(family, small)
    for step in range(3):
        loss = pipe.step(*plain_loop.data(step))
        optimizer.zero_grad()
        assert loss == plain_loop.backward(reference, plain_loop.data(step))
        optimizer.step()
        pipe.evaluate(*plain_loop.data(step))
    found = plain_loop.parameters_of(pipe)
    for name, parameter in reference.named_parameters():
        assert torch.equal(found[name], parameter), name
    pipe.close()


def test_profiling_leaves_nothing_in_their_queues() -> None:
    model = small()
    costs = profile_layers(model, torch.randn(2, 6), torch.randn(2, 3), nn.functional.mse_loss, passes=2)
    assert len(costs.layers if hasattr(costs, "layers") else costs) > 0
    assert not any(part.queue for part in owned(model))


def stages(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), DelayedLinear(WIDTH)) for _ in range(count)]


def train_in_torchs_schedule(name: str, around: str, rank: int) -> list[list[Any]]:
    """Two steps on two ranks; the gradients of this rank's stages. Shapes are found by torch."""
    mesh = init_device_mesh("cpu", (2,))
    single = name in ("GPipe", "1F1B")
    modules = stages(2 if single else 4)
    mine = {i: modules[i] for i in range(rank, len(modules), 2)}
    if around == "builder":
        made = [
            PipelineStage(m, i, len(modules), torch.device("cpu"), group=mesh.get_group(), dw_builder=dw_builder(m))
            for i, m in mine.items()
        ]
    else:
        made = [PipelineStage(m, i, len(modules), torch.device("cpu"), group=mesh.get_group()) for i, m in mine.items()]
    schedule = getattr(schedules, f"Schedule{name}")(made[0] if single else made, 4, loss_fn=nn.functional.mse_loss)
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))
    with pipex.drop_in():
        for _ in range(2):
            schedule.step(*([x] if rank == 0 else []), target=x if len(modules) - 1 in mine else None, losses=[])
    for module in mine.values():
        assert not any(part.queue for part in owned(module))
    return [[p.grad.numpy() for p in module.parameters()] for module in mine.values()]


@pytest.mark.parametrize(
    ("name", "around"),
    [("GPipe", "drop_in"), ("1F1B", "drop_in"), ("InterleavedZeroBubble", "drop_in"),
     ("InterleavedZeroBubble", "builder")],
)  # fmt: skip
def test_torchs_schedules_have_their_gradients(name: str, around: str, tmp_path: Path) -> None:
    """Also those of the first step, though torch looks at the shapes by a backward that nobody asked for."""
    found = persistent.ranks.results(
        [partial(in_group, tmp_path / "store", n, 2, train_in_torchs_schedule, name, around, n) for n in range(2)]
    )
    modules = stages(2 if name in ("GPipe", "1F1B") else 4)
    whole = nn.Sequential(*modules)
    for part in owned(whole):
        part.delayed = False
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        for part in x.chunk(4):
            nn.functional.mse_loss(whole(part), part).backward()
        for parameter in whole.parameters():
            parameter.grad.div_(4)
    for index, module in enumerate(modules):
        for gradient, parameter in zip(found[index % 2][index // 2], module.parameters(), strict=True):
            assert torch.equal(torch.from_numpy(gradient), parameter.grad)
