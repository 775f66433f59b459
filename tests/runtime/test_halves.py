"""A step in two halves, beside the loop that one writes with plain torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import host_world
import pytest
import torch
from plain_loop import (
    LOSS,
    MICROBATCHES,
    Found,
    adam,
    assert_same,
    backward,
    data,
    layers,
    micro_batches,
    parameters_of,
    pipeline,
    plain,
)
from torch import Tensor, nn
from torch.amp import GradScaler

import pipex
from pipex.errors import InputError, PeerFailed

# Several forward_backward before one update.


def accumulate(family: str) -> Found:
    pipe, values = pipeline(family, clip_norm=0.5), []
    for update in range(3):
        values += [pipe.forward_backward(*data(10 * update + call, 6 + call)) for call in range(3)]
        assert pipe.update()
        values.append(pipe.gradient_norm)
    assert pipe.steps == 3
    return values, parameters_of(pipe)


@pytest.mark.parametrize(("family", "ranks"), [("1f1b", 1), ("1f1b", 2), ("zb-h1", 3), ("gpipe", 4)])
def test_gradients_of_several_calls_add_up_as_in_torch(family: str, ranks: int) -> None:
    model, values = layers(), []
    optimizer = adam(model.parameters())
    for update in range(3):
        values += [backward(model, data(10 * update + call, 6 + call)) for call in range(3)]
        values.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    assert_same(host_world.launch(accumulate, ranks, args=(family,)), plain(model, values))


def tied_layers() -> nn.Sequential:
    """Of small integers, so that no sum is rounded and the order of additions does not matter."""
    torch.manual_seed(5)
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4))).double()
    for parameter in model.parameters():
        parameter.data.copy_(torch.randint(-2, 3, (4, 4)))
    model[3].weight = model[0].weight
    return model


def product(output: Tensor, target: Tensor) -> Tensor:
    return (output * target).sum() / 4


def integers(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randint(-2, 3, (2, 6, 4), generator=generator).double()
    return x, y


def accumulate_tied(clamp: bool) -> Found:
    optimizer = partial(torch.optim.SGD, lr=2**-6)
    ranks = pipex.current_world().ranks
    plan = pipex.build("zb-h1", ranks, 2)  # of equal micro-batches: their shares are powers of two
    pipe = pipex.Pipeline(pipex.split_model(tied_layers(), ranks), plan, product, optimizer=optimizer)
    for update in range(2):
        for call in range(3):
            pipe.forward_backward(*integers(3 * update + call))
        if clamp:
            pipe.reduce_gradients()
            for stage in pipe.local_stages:
                nn.utils.clip_grad_value_(stage.parameters(), 16.0)
        pipe.update()
    return [], parameters_of(pipe)


@pytest.mark.parametrize("clamp", [False, True], ids=["", "clipped by value in between"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_tied_parameter_is_added_up_once_for_all_calls(ranks: int, clamp: bool) -> None:
    model = tied_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=2**-6)
    for update in range(2):
        for call in range(3):
            x, y = integers(3 * update + call)
            for a, b in zip(x.split(3), y.split(3), strict=True):
                (product(model(a), b) / 2).backward()
        if clamp:
            nn.utils.clip_grad_value_(model.parameters(), 16.0)
        optimizer.step()
        optimizer.zero_grad()
    assert_same(host_world.launch(accumulate_tied, ranks, args=(clamp,)), plain(model, []))


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(6, 3), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.linear(x))


def test_every_micro_batch_of_every_call_draws_its_own_random_numbers() -> None:
    """Two calls of 3 micro-batches draw what one call of 6 draws."""
    torch.manual_seed(0)
    ones = nn.Sequential(Dropping())
    outputs: list[Tensor] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        outputs.append(output.detach() != 0)
        return LOSS(output, target)

    def masks(microbatches: int) -> list[Tensor]:
        outputs.clear()
        plan = pipex.build("1f1b", 1, microbatches)
        pipe = pipex.Pipeline(pipex.split_model(ones, 1), plan, loss, optimizer=adam)
        for _ in range(6 // microbatches):
            pipe.forward_backward(torch.ones(4 * microbatches, 6), torch.ones(4 * microbatches, 3))
        return list(outputs)

    whole, halves = masks(6), masks(3)
    assert len(whole) == len(halves) == 6
    assert all(torch.equal(a, b) for a, b in zip(whole, halves, strict=True))
    assert not torch.equal(halves[0], halves[3])


# A scaler, and gradients that are not finite.


class Bias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


def steep_layers() -> nn.Sequential:
    """Two samples of steep loss overflow in the gradient of the last layer, and nowhere else."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3, bias=False), Bias())
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
        model[0].bias.mul_(1e-3)
        model[1].weight.mul_(1e-12)
    return model


def steep(output: Tensor, slope: Tensor) -> Tensor:
    return (output * slope).sum() * MICROBATCHES


STEEP = 2e38  # finite; twice that is not


def steep_data(step: int, slope: float) -> tuple[Tensor, Tensor]:
    return data(step)[0], torch.full((6, 3), slope if step in (1, 4) else 1.0)


def scaled() -> Found:
    scaler = GradScaler("cpu", init_scale=2.0**16, growth_interval=2)
    pipe, values = pipeline("1f1b", steep_layers, steep, scaler=scaler, clip_norm=1.0), []
    for step in range(8):
        values += [pipe.forward_backward(*steep_data(step, STEEP / 2**16)), pipe.update(), scaler.get_scale()]
    return values, parameters_of(pipe)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_scaler_does_what_it_does_in_one_process(ranks: int) -> None:
    model, values = steep_layers(), []
    optimizer = adam(model.parameters())
    scaler = GradScaler("cpu", init_scale=2.0**16, growth_interval=2)
    infinite = []
    for step in range(8):
        total = torch.zeros(())
        for x, y in micro_batches(steep_data(step, STEEP / 2**16)):
            part = steep(model(x), y) * (len(x) / 6)
            scaler.scale(part).backward()
            total = total + part.detach()
        scaler.unscale_(optimizer)
        infinite.append([name for name, p in model.named_parameters() if not p.grad.isfinite().all()])
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = model[2].bias.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        values += [total.item(), not torch.equal(before, model[2].bias), scaler.get_scale()]
    assert infinite[1] == ["2.bias"], "one rank alone must have met it"
    assert values[1::3].count(False) >= 2
    assert_same(host_world.launch(scaled, ranks), plain(model, values))


def guarded() -> Found:
    pipe, values = pipeline("zb-h1", steep_layers, steep), []
    for step in range(6):
        values.append(pipe.step(*steep_data(step, STEEP), skip_nonfinite=True))
        values += [pipe.steps, pipe.gradient_norm == torch.inf]
    return values, parameters_of(pipe)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_update_that_is_not_finite_on_one_rank_is_left_out_on_all(ranks: int) -> None:
    model, values, steps = steep_layers(), [], 0
    optimizer = adam(model.parameters())
    for step in range(6):
        values.append(backward(model, steep_data(step, STEEP), steep))
        infinite = [name for name, p in model.named_parameters() if not p.grad.isfinite().all()]
        assert infinite == (["2.bias"] if step in (1, 4) else []), "one rank alone must have met it"
        if not infinite:
            optimizer.step()
            steps += 1
        optimizer.zero_grad()
        values += [steps, bool(infinite)]
    assert_same(host_world.launch(guarded, ranks), plain(model, values))


def guarded_and_scaled() -> list[Any]:
    scaler = GradScaler("cpu", init_scale=2.0**16)
    pipe = pipeline("1f1b", steep_layers, steep, scaler=scaler)
    found: list[Any] = []
    for step in range(3):
        pipe.forward_backward(*steep_data(step, STEEP / 2**16))
        found += [pipe.update(skip_nonfinite=True), scaler.get_scale()]
    return found


def test_the_guard_and_a_scaler_together() -> None:
    assert host_world.launch(guarded_and_scaled, 2) == [[True, 2.0**16, False, 2.0**15, True, 2.0**15]] * 2


def scales_differ() -> None:
    scaler = GradScaler("cpu", init_scale=2.0 ** (4 + pipex.current_world().rank))
    pipeline("1f1b", scaler=scaler).step(*data(0))


def test_ranks_with_other_scales_are_told_both() -> None:
    with pytest.raises(
        PeerFailed, match=r"ConfigMismatch: the ranks disagree about scale; got 16\.0 .* 32\.0 on rank 1"
    ):
        host_world.launch(scales_differ, 2)


def load_between(directory: str) -> Found:
    scaler = GradScaler("cpu", init_scale=2.0**4, growth_interval=100)
    pipe = pipeline("1f1b", scaler=scaler)
    pipe.step(*data(0))
    pipe.save(directory)
    pipe.step(*data(3))
    pipe.forward_backward(*data(2))
    pipe.reduce_gradients()
    pipe.load(directory)
    return [pipe.step(*data(1)), pipe.steps, scaler.get_scale()], parameters_of(pipe)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_load_between_the_halves_starts_the_scaler_anew(ranks: int, tmp_path: Path) -> None:
    model, losses = layers(), []
    optimizer = adam(model.parameters())
    for step in range(2):
        losses.append(backward(model, data(step)))
        optimizer.step()
        optimizer.zero_grad()
    found = host_world.launch(load_between, ranks, args=(str(tmp_path),))
    assert_same(found, plain(model, [losses[1], 2, 2.0**4]))


def test_without_the_guard_torch_s_rule_holds() -> None:
    pipe = pipeline("1f1b", steep_layers, steep, optimizer=partial(torch.optim.SGD, lr=0.1))
    pipe.step(*steep_data(1, STEEP))
    assert pipe.steps == 1
    assert not pipe.local_stages[0].layers[2].bias.isfinite().any()


# Optimizers: schedules, names, and ranks that have nothing to train.


def frozen_layers() -> nn.Sequential:
    model = layers()
    for layer in list(model)[:3]:
        layer.requires_grad_(False)
    return model


def scheduled(directory: str) -> tuple[list[float], list[str], list[float], int]:
    pipe = pipeline("1f1b", frozen_layers)
    assert pipe.optimizer is not None
    schedule = torch.optim.lr_scheduler.StepLR(pipe.optimizer, 2, 0.5)
    rates = []
    for step in range(5):
        pipe.step(*data(step))
        schedule.step()
        rates.append(pipe.optimizer.param_groups[0]["lr"])
    pipe.save(directory)
    losses = [pipe.step(*data(step)) for step in range(5, 7)]
    pipe.load(directory)
    assert [pipe.step(*data(step)) for step in range(5, 7)] == losses
    held = [name for stage in pipe.local_stages for name, p in stage.names.items() if p.requires_grad]
    return rates, held, losses, sum(len(group["params"]) for group in pipe.optimizer.param_groups)


def test_a_rank_that_trains_nothing_has_an_optimizer_like_the_others(tmp_path: Path) -> None:
    model, losses = frozen_layers(), []
    optimizer = adam([p for p in model.parameters() if p.requires_grad])
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for step in range(7):
        losses.append(backward(model, data(step)))
        optimizer.step()
        optimizer.zero_grad()
        if step < 5:
            schedule.step()
    found = host_world.launch(scheduled, 3, args=(str(tmp_path),))
    assert found[0][1] == []
    assert found[2][1] != []
    for rates, held, theirs, optimized in found:
        assert rates == [1e-2, 5e-3, 5e-3, 2.5e-3, 2.5e-3]
        assert theirs == losses[5:]
        assert optimized == len(held)


def by_name(parameters: Any) -> torch.optim.Optimizer:
    assert [id(p) for _, p in parameters.named] == [id(p) for p in parameters]
    groups = {decay: [(n, p) for n, p in parameters.named if ("bias" not in n) is decay] for decay in (True, False)}
    return torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": 0.5}, {"params": groups[False], "weight_decay": 0.0}], lr=1e-2
    )


def named() -> Found:
    pipe = pipeline("1f1b", optimizer=by_name)
    assert pipe.optimizer is not None
    values = [pipe.step(*data(step)) for step in range(3)]
    names = {
        n: p
        for group in pipe.optimizer.param_groups
        for n, p in zip(group["param_names"], group["params"], strict=True)
    }
    held = {name: tensor for stage in pipe.local_stages for name, tensor in stage.names.items()}
    assert {n: id(p) for n, p in names.items()} == {n: id(p) for n, p in held.items()}
    return values, parameters_of(pipe)


@pytest.mark.parametrize("ranks", [1, 3])
def test_parameter_groups_by_name(ranks: int) -> None:
    model, values = layers(), []
    decayed = {True: [], False: []}
    for name, parameter in model.named_parameters():
        decayed["bias" not in name].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": decayed[True], "weight_decay": 0.5}, {"params": decayed[False], "weight_decay": 0.0}], lr=1e-2
    )
    for step in range(3):
        values.append(backward(model, data(step)))
        optimizer.step()
        optimizer.zero_grad()
    assert_same(host_world.launch(named, ranks), plain(model, values))


# Calls that do not fit.


def too_small() -> list[Any]:
    pipe = pipeline("1f1b")
    found: list[Any] = []
    calls: list[Callable[[], object]] = [
        lambda: pipe.evaluate(*data(0, 0)),
        lambda: pipe.step(*data(0, 2)),
        lambda: pipe.step(data(0)[0], data(0, 5)[1]),
        lambda: pipe.step(data(0)[0].to_sparse() if pipe.world.rank == 0 else None, data(0)[1]),
        lambda: pipe.evaluate(None, data(0)[1]),
        lambda: pipe.step(*data(0), total=-1.0),
        lambda: pipe.update(),
        lambda: pipe.reduce_gradients(),
    ]
    for call in calls:
        with pytest.raises(InputError) as error:
            call()
        found.append(str(error.value))
    with torch.no_grad(), pytest.raises(InputError, match="no_grad"):
        pipe.step(*data(0))
    pipe.forward_backward(*data(0))
    pipe.reduce_gradients()
    with pytest.raises(InputError, match="update first"):
        pipe.forward_backward(*data(1))
    pipe.update()
    return [*found, pipe.step(*data(1)), pipe.evaluate(*data(2))]


@pytest.mark.parametrize("ranks", [1, 3])
def test_what_fails_before_anything_has_begun_does_not_end_the_run(ranks: int) -> None:
    model, losses = layers(), []
    optimizer = adam(model.parameters())
    for step in range(2):
        losses.append(backward(model, data(step)))
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        parts = [LOSS(model(x), y) * (len(x) / 6) for x, y in micro_batches(data(2))]
    expected = [losses[1], (parts[0] + parts[1] + parts[2]).item()]
    shown = ["0 samples for 1", "2 samples for 3", "6 and 5 samples", "sparse", "needs the batch", "-1.0"]
    shown += ["no forward_backward", "no forward_backward"]
    for found in host_world.launch(too_small, ranks):
        for text, part in zip(found, shown, strict=False):
            assert part in text
        assert found[len(shown) :] == expected


@pytest.mark.parametrize(
    "loss",
    [
        lambda output, target: LOSS(output, target).detach(),
        lambda output, target: torch.tensor(LOSS(output, target).item()),
        lambda output, target: (output.argmax(1) != target.argmax(1)).sum(),
        lambda output, target: (LOSS(output, target).detach(), 1),
    ],
)
@pytest.mark.parametrize("family", ["1f1b", "zb-h1"])
def test_a_loss_without_a_graph_is_refused_as_torch_does(loss: Any, family: str) -> None:
    pipe = pipeline(family, loss=loss)
    with pytest.raises(InputError, match="the loss does not depend on anything that is trained; got a loss without a"):
        pipe.step(*data(0))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, partial(torch.set_grad_enabled, False)])
def test_a_step_without_gradients_is_refused(context: Any) -> None:
    pipe = pipeline()
    with context(), pytest.raises(InputError, match="a step under no_grad"):
        pipe.step(*data(0))


@pytest.mark.parametrize("options", [{}, {"optimizer": None}, {"clip_norm": 1.0}, {"main_weights": True}])
def test_a_model_that_is_frozen_all_over_may_step(options: dict[str, Any]) -> None:
    model = layers().requires_grad_(False)
    pipe = pipeline("1f1b", lambda: model, **options)
    assert pipe.step(*data(0)) == pipe.evaluate(*data(0))
    assert pipe.steps == 1


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.spare = nn.Linear(6, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def test_a_parameter_without_a_gradient_is_named_once() -> None:
    pipe = pipeline("zb-h1", lambda: nn.Sequential(Unused()))
    with pytest.warns(UserWarning, match=r"no gradient came to 0\.spare\.weight, 0\.spare\.bias; if this is meant"):
        pipe.step(*data(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.step(*data(1))


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        *(({"clip_norm": value}, f"clip_norm cannot be used; got {value!r}") for value in
          (0.0, -1.0, float("nan"), float("inf"), "1", True)),
        *(({"seed": value}, f"seed cannot be used; got {value!r}") for value in (2**63, -(2**63) - 1, "a", 1.5)),
        ({"loss": None}, "loss_fn must be a function; got NoneType"),
        ({"scaler": 3}, "scaler cannot be used; got int"),
        ({"optimizer": adam([nn.Parameter(torch.ones(1))])}, "must be a factory, .* got an instance of AdamW"),
        ({"optimizer": lambda parameters: None}, "factory must return an optimizer; got NoneType"),
    ],
)  # fmt: skip
def test_an_option_that_cannot_be_used(options: dict[str, Any], shown: str) -> None:
    with pytest.raises(InputError, match=shown):
        pipeline(**options)


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return ()


def test_a_stage_that_hands_on_nothing_is_named() -> None:
    plan = pipex.build("looped-bfs", 1, 2, chunks=2)
    with pytest.raises(pipex.errors.UnsupportedModule, match=r"stage 0 cannot hand its output .* got tuple"):
        pipex.Pipeline([Nothing(), nn.Linear(6, 3)], plan, LOSS).evaluate(*data(0))
