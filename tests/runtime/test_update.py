"""What becomes of gradients between the halves of a step: dropped, counted, unscaled, all together."""

from __future__ import annotations

import inspect
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import host_world
import pytest
import torch
from plain_loop import LOSS, assert_same, backward, data, layers, parameters_of, pipeline, plain
from torch import Tensor, nn
from torch.amp import GradScaler

import pipex
from pipex.errors import CheckpointError, InputError, PeerFailed


def sums(output: Tensor, target: Tensor) -> tuple[Tensor, int]:
    return (output - target).square().sum(), target.numel()


def tied_layers() -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3))
    model[4].weight = model[0].weight
    return model


def short_layers() -> nn.Sequential:
    return tied_layers().bfloat16()


def in_short(output: Tensor, target: Tensor) -> Tensor:
    return LOSS(output.float(), target)


OPTIONS: dict[str, dict[str, Any]] = {
    "means": {},
    "sums": {"loss": sums},
    "ties": {"model": tied_layers},
    "main weights": {"model": short_layers, "loss": in_short, "main_weights": True},
    "a scaler": {"scaler": True},
}


def made(options: str) -> Callable[..., pipex.Pipeline]:
    found = dict(OPTIONS[options])
    if "scaler" in found:
        found["scaler"] = GradScaler("cpu", init_scale=2.0**8)
    return partial(pipeline, "zb-h1", **found)


def batch(options: str, step: int) -> tuple[Tensor, Tensor]:
    x, y = data(step)
    return (x.bfloat16(), y) if options == "main weights" else (x, y)


def train(options: str, drops: str) -> Any:
    pipe = made(options)()
    assert pipe.optimizer is not None
    values = []
    for step in range(3):
        if drops:
            pipe.forward_backward(*batch(options, 50 + step))
            pipe.forward_backward(*batch(options, 60 + step))
            if drops == "completed":
                pipe.reduce_gradients()
            elif drops == "cleared":
                pipe.optimizer.zero_grad()
                with pytest.raises(InputError, match=r"were cleared, but .*; call the pipeline's own zero_grad"):
                    pipe.step(*batch(options, step))
            pipe.zero_grad()
            assert all(p.grad is None for stage in pipe.local_stages for p in stage.parameters())
            with pytest.raises(InputError, match="no forward_backward since the last update"):
                pipe.update()
        values.append(pipe.forward_backward(*batch(options, step)))
        pipe.update()
    return values, parameters_of(pipe)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("drops", ["accumulated", "completed", "cleared"])
def test_dropped_gradients_leave_nothing(drops: str, options: str, ranks: int) -> None:
    expected = host_world.launch(train, ranks, args=(options, ""))
    for found, wanted in zip(host_world.launch(train, ranks, args=(options, drops)), expected, strict=True):
        assert found[0] == wanted[0]
        assert all(torch.equal(found[1][name], tensor) for name, tensor in wanted[1].items())
    if options == "means":
        model, values = layers(), []
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(3):
            values.append(backward(model, data(step)))
            optimizer.step()
            optimizer.zero_grad()
        assert_same(expected, plain(model, values))


def clear_and_update() -> None:
    pipe = pipeline("1f1b")
    assert pipe.optimizer is not None
    pipe.forward_backward(*data(0))
    pipe.optimizer.zero_grad()
    pipe.update()


def test_an_update_of_cleared_gradients_is_refused_by_name() -> None:
    with pytest.raises(PeerFailed, match=r"InputError: the gradients of forward_backward were cleared"):
        host_world.launch(clear_and_update, 2)


def clear_some() -> Any:
    pipe = pipeline("1f1b")
    pipe.forward_backward(*data(0))
    for stage in pipe.local_stages:
        for name, tensor in stage.names.items():
            if name.endswith("weight"):
                tensor.grad = None
    with pytest.warns(UserWarning, match="no gradient came to"):
        pipe.update()
    return [], parameters_of(pipe)


@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_of_some_parameters_may_be_cleared(ranks: int) -> None:
    model = layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    backward(model, data(0))
    for name, parameter in model.named_parameters():
        if name.endswith("weight"):
            parameter.grad = None
    optimizer.step()
    assert_same(host_world.launch(clear_some, ranks), plain(model, []))


def drop_on_one_rank() -> str:
    pipe = pipeline("1f1b")
    pipe.forward_backward(*data(0))
    if pipe.world.rank == 1:
        pipe.zero_grad()
    with pytest.raises(pipex.errors.ConfigMismatch) as error:
        pipe.step(*data(1))
    return str(error.value)


def test_gradients_that_are_dropped_on_one_rank_only_are_noticed() -> None:
    for text in host_world.launch(drop_on_one_rank, 2):
        assert "calls of forward_backward since the last update; got 1 on rank 0, 0 on rank 1" in text


def other_totals() -> Any:
    pipe = pipeline("1f1b", loss=sums)
    last = pipe.world.rank == pipe.world.ranks - 1
    found: list[Any] = []
    for first, second in ((18, 17), (None, 17), (18, None)):
        pipe.forward_backward(*data(0), total=first if last else None)
        with pytest.raises(InputError) as error:
            pipe.forward_backward(*data(1), total=second if last else None)
        found.append(str(error.value))
        pipe.evaluate(*data(2))
        pipe.zero_grad()
    pipe.forward_backward(*data(0), total=36)
    pipe.forward_backward(*data(1), total=36)
    pipe.update()
    pipe.step(*data(2), total=18)
    return found, parameters_of(pipe)


@pytest.mark.parametrize("ranks", [1, 2])
def test_another_total_before_one_update_is_refused(ranks: int) -> None:
    model = layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for steps, total in (((0, 1), 36), ((2,), 18)):
        for step in steps:
            x, y = data(step)
            for a, b in zip(x.split(2), y.split(2), strict=True):
                (sums(model(a), b)[0] / total).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = host_world.launch(other_totals, ranks)
    assert_same([([], held) for _, held in found], plain(model, []))
    for texts, _ in found:
        for text, got in zip(texts, ("17.0 after 18.0", "17.0 after None", "None after 18.0"), strict=True):
            assert f"count over all calls before an update; got {got}; needed the same" in text


def one_scaler_in_two(growth: int, reduced: bool) -> Any:
    scaler = GradScaler("cpu", init_scale=4.0, growth_interval=growth)
    first, second = (pipeline("1f1b", scaler=scaler) for _ in range(2))
    for pipe in (first, second):
        pipe.forward_backward(*data(0))
        if reduced:
            pipe.reduce_gradients()
    first.update()
    second.update()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("growth", "reduced", "shown"),
    [
        (1, False, r"between forward_backward and update; got losses scaled by 4\.0, and a scale of 8\.0 now"),
        (1, True, r"between reduce_gradients and update"),
        (100, True, r"between reduce_gradients and update"),
    ],
)
def test_a_scaler_of_two_pipelines_is_refused_where_it_would_go_wrong(
    ranks: int, growth: int, reduced: bool, shown: str
) -> None:
    with pytest.raises((InputError, PeerFailed), match=shown):
        host_world.launch(one_scaler_in_two, ranks, args=(growth, reduced))


def rescaled() -> Any:
    """A scale that changes and comes back is another one in between."""
    scaler = GradScaler("cpu", init_scale=4.0)
    pipe = pipeline("1f1b", scaler=scaler)
    pipe.forward_backward(*data(0))
    scaler.update(8.0)
    pipe.forward_backward(*data(1))
    scaler.update(4.0)
    with pytest.raises(InputError, match=r"got losses scaled by 8\.0, and a scale of 4\.0 now"):
        pipe.update()
    value = pipe.step(*data(2))
    return [value], parameters_of(pipe)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_scale_that_changes_between_calls_is_refused_and_the_pipeline_goes_on(ranks: int) -> None:
    model = layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    values = [backward(model, data(2))]
    optimizer.step()
    assert_same(host_world.launch(rescaled, ranks), plain(model, values))


# All of it at once.


def short_and_tied() -> nn.Sequential:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)).bfloat16()
    model[2].weight = model[0].weight
    return model


def counted(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    real = target != 0  # as many as there are, other numbers in every micro-batch
    return (output.float()[real] - target[real]).square().sum(), real.sum()


def short_batch(step: int, call: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + call)
    x, y = torch.randn(2, 4 + call, 6, generator=generator)
    y[torch.rand(y.shape, generator=generator) < 0.3] = 0
    if (step, call) == (1, 1):
        y[0] = 2e38  # whose square is infinite, and all ranks leave this update out
    return x.bfloat16(), y


def all_at_once(family: str, chunks: int) -> Any:
    scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    ranks = pipex.current_world().ranks
    plan = pipex.build(family, ranks, 2, chunks=chunks)
    pipe = pipex.Pipeline(
        pipex.split_model(short_and_tied(), plan.placement.stages), plan, counted, main_weights=True, scaler=scaler,
        clip_norm=0.5, optimizer=partial(torch.optim.AdamW, lr=1e-2),
    )  # fmt: skip
    values: list[Any] = []
    for step in range(4):
        for call in range(2):
            pipe.forward_backward(*short_batch(step, call))
        if step == 2:  # dropped: that of another try
            pipe.zero_grad()
            for call in range(2):
                pipe.forward_backward(*short_batch(step, call + 2))
        values += [pipe.update(), scaler.get_scale()]
    return values, parameters_of(pipe)


@pytest.mark.parametrize(("family", "ranks", "chunks"), [("1f1b", 2, 1), ("zb-h1", 3, 1), ("looped-bfs", 1, 3)])
def test_a_scaler_with_ties_and_sums_and_accumulation_and_main_weights(family: str, ranks: int, chunks: int) -> None:
    model = short_and_tied()
    parameters = dict(model.named_parameters())
    main = {name: nn.Parameter(p.detach().float()) for name, p in parameters.items()}
    optimizer = torch.optim.AdamW(main.values(), lr=1e-2)
    scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    values: list[Any] = []
    for step in range(4):
        # Each use of the tied weight has a gradient of its own; they are added once.
        apart = [nn.Parameter(model[0].weight.detach().clone()) for _ in range(2)]
        sources = [apart[0], model[0].bias, model[1].weight, model[1].bias, apart[1], model[2].bias]
        gradients: list[Tensor | None] = [None] * len(sources)
        count = 0.0
        for call in (2, 3) if step == 2 else (0, 1):
            x, y = short_batch(step, call)
            for a, b in zip(x.tensor_split(2), y.tensor_split(2), strict=True):
                for weight, bias in zip(sources[::2], sources[1::2], strict=True):
                    a = nn.functional.linear(a, weight, bias)
                loss, number = counted(a, b)
                count += float(number)
                found = torch.autograd.grad(scaler.scale(loss), sources)
                gradients = [f.float() if g is None else g + f.float() for g, f in zip(gradients, found, strict=True)]
        first, *others, last, bias = gradients
        for weight, gradient in zip(main.values(), (first + last, *others, bias), strict=True):
            weight.grad = gradient / count
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(main.values(), 0.5)
        infinite = not all(weight.grad.isfinite().all() for weight in main.values())
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(main[name])
        values += [not infinite, scaler.get_scale()]
    assert values[::2] == [True, False, True, True]
    assert_same(host_world.launch(all_at_once, ranks, args=(family, chunks)), plain(model, values))


# A factory, and whom a warning tells.


def choose_by_name() -> None:
    pipeline("1f1b", optimizer=lambda parameters: torch.optim.SGD(
        [p for name, p in parameters.named if name.startswith("5.")], lr=0.1))  # fmt: skip


def test_a_factory_that_chooses_nothing_on_a_rank_is_told_what_to_do() -> None:
    with pytest.raises(
        PeerFailed, match=r"chosen none of rank 0's parameters; got 0\.weight, .* freeze what is not to"
    ):
        host_world.launch(choose_by_name, 2)


class Unused(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("call", ["step", "update", "reduce_gradients"])
def test_a_warning_of_no_gradient_is_of_the_line_that_called(call: str) -> None:
    pipe = pipeline(model=lambda: nn.Sequential(nn.Linear(6, 3), Unused(3, 3)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if call == "step":
            pipe.step(*data(0))
            line = here() - 1
        else:
            pipe.forward_backward(*data(0))
            getattr(pipe, call)()
            line = here() - 1
    (warning,) = caught
    assert (warning.filename, warning.lineno) == (__file__, line)


def here() -> int:
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


def load_between() -> list[Any]:
    """With a scaler, and without an optimizer, which a model needs none of that is frozen all over."""
    scaler = GradScaler("cpu", init_scale=16.0)
    pipe = pipeline("1f1b", lambda: layers().requires_grad_(False), optimizer=None, scaler=scaler)
    with tempfile.TemporaryDirectory() as directory:
        pipe.save(directory)
        wanted = pipe.forward_backward(*data(0))
        pipe.reduce_gradients()
        pipe.load(directory)
    return [wanted == pipe.forward_backward(*data(0)), scaler.get_scale()]


def test_a_load_between_the_halves_needs_no_optimizer() -> None:
    assert host_world.launch(load_between, 1) == [[True, 16.0]]


def with_a_scaler(scaler: GradScaler | None, calls: str) -> Any:
    pipe = pipeline("zb-h1", scaler=scaler, clip_norm=1.0)
    losses: list[Any] = []
    for step in range(3):
        if calls == "step":
            losses.append(pipe.step(*data(step), skip_nonfinite=step == 1))
            continue
        losses.append(pipe.forward_backward(*data(step)))
        pipe.reduce_gradients()
        losses.append(pipe.update())
    return losses, parameters_of(pipe), str(scaler and scaler.state_dict())


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("calls", ["step", "halves"])
def test_a_scaler_that_is_not_enabled_does_nothing(calls: str, ranks: int) -> None:
    off = host_world.launch(with_a_scaler, ranks, args=(GradScaler("cpu", enabled=False), calls))
    without = host_world.launch(with_a_scaler, ranks, args=(None, calls))
    for (losses, parameters, state), (wanted, same, _) in zip(off, without, strict=True):
        assert (losses, state) == (wanted, "{}")
        assert parameters.keys() == same.keys()
        assert all(torch.equal(parameter, same[name]) for name, parameter in parameters.items())


def save_apart(directory: str) -> list[Any]:
    pipe = pipeline("1f1b")
    pipe.step(*data(0))
    pipe.save(directory)
    pipe.forward_backward(*data(1))
    if pipex.current_world().rank == 0:
        pipe.update()
    with pytest.raises(CheckpointError) as told:
        pipe.save(directory)
    if pipex.current_world().rank == 1:
        pipe.update()
    loss = pipe.step(*data(2))
    pipe.load(directory)
    return [str(told.value), pipe.steps, loss]


def test_ranks_that_have_made_other_updates_save_nothing(tmp_path: Path) -> None:
    first, second = host_world.launch(save_apart, 2, args=(str(tmp_path),))
    assert first == second
    assert "the ranks have made different numbers of updates: 2, 1" in first[0]
    assert "the one before it stays" in first[0]
    assert first[1] == 1


class Elsewhere:
    """Made by a factory that takes no notice of what it gets."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, parameters: Any) -> torch.optim.Optimizer:
        if self.kind == "LBFGS":
            return torch.optim.LBFGS(parameters)
        return torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)


def optimize(kind: str, main_weights: bool) -> None:
    model, loss = (short_layers, in_short) if main_weights else (layers, LOSS)
    pipeline("1f1b", model, loss, optimizer=Elsewhere(kind), main_weights=main_weights)


@pytest.mark.parametrize("main_weights", [False, True])
@pytest.mark.parametrize(
    ("kind", "told"),
    [("others", "the optimizer has none of the parameters that its factory got; got others on rank"),
     ("LBFGS", "calls the forward again by itself, .*; got LBFGS, whose step needs a closure")],
)  # fmt: skip
def test_an_optimizer_that_could_not_update_is_refused(kind: str, told: str, main_weights: bool) -> None:
    with pytest.raises(PeerFailed, match=told):
        host_world.launch(optimize, 2, args=(kind, main_weights))
