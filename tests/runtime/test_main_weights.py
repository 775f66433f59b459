"""bfloat16 parameters with float32 gradients and weights, beside a plain loop that keeps them by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import host_world
import pytest
import torch
from torch import Tensor, nn

import pipex
from pipex.errors import InputError, UnsupportedModule

MICROBATCHES = 4
STEPS = 4


def layers(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    """Deferred gradients (linear, embedding), others (norm, convolution), and a layer that has float32 weights."""
    torch.manual_seed(6)
    model = nn.Sequential(
        nn.Embedding(9, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Conv1d(5, 5, 3, padding=1), nn.Linear(8, 8), Wide()
    )
    for layer in list(model)[:-1]:
        layer.to(dtype)
    return model


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.float())


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 9, (8, 5), generator=generator), torch.randn(8, 5, 3, generator=generator)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


Found = tuple[list[float], dict[str, Tensor], list[Tensor]]


def found_in(pipe: pipex.Pipeline, losses: list[float]) -> Found:
    assert pipe.optimizer is not None
    held = {name: tensor.detach() for stage in pipe.local_stages for name, tensor in stage.names.items()}
    return losses, held, [p.detach() for group in pipe.optimizer.param_groups for p in group["params"]]


def pipeline(family: str = "zb-h1", **options: Any) -> pipex.Pipeline:
    ranks = pipex.current_world().ranks
    stages, plan = pipex.split_model(layers(), ranks), pipex.build(family, ranks, MICROBATCHES)
    return pipex.Pipeline(stages, plan, nn.functional.mse_loss, **{"optimizer": adam, "main_weights": True, **options})


def train(family: str, clip_norm: float | None, calls: int) -> Found:
    pipe = pipeline(family, clip_norm=clip_norm)
    losses = []
    for step in range(STEPS):
        losses += [pipe.forward_backward(*data(10 * step + call)) for call in range(calls)]
        pipe.update()
        assert all(p.grad is None for stage in pipe.local_stages for p in stage.parameters())
        assert all(p.grad is None for group in pipe.optimizer.param_groups for p in group["params"])
    return found_in(pipe, losses)


def accumulate_by_hand(model: nn.Sequential, main: dict[str, nn.Parameter], step: int) -> float:
    x, y = data(step)
    summed = torch.zeros(())
    for a, b in zip(x.split(2), y.split(2), strict=True):
        loss = nn.functional.mse_loss(model(a), b) * 0.25
        loss.backward()
        summed = summed + loss.detach()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            so_far = main[name].grad
            main[name].grad = parameter.grad.float() if so_far is None else so_far + parameter.grad.float()
            parameter.grad = None
    return summed.item()


def by_hand(clip_norm: float | None, calls: int) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    model = layers()
    parameters = dict(model.named_parameters())
    main = {name: nn.Parameter(p.detach().float()) for name, p in parameters.items()}
    optimizer = adam(main.values())
    losses = []
    for step in range(STEPS):
        for call in range(calls):
            losses.append(accumulate_by_hand(model, main, 10 * step + call))
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(main.values(), clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(main[name])
    return losses, parameters, {name: p.detach() for name, p in main.items()}


@pytest.mark.parametrize(("clip_norm", "calls"), [(None, 1), (0.1, 1), (0.1, 3)])
@pytest.mark.parametrize(("family", "ranks"), [("1f1b", 1), ("zb-h1", 1), ("1f1b", 2), ("zb-h1", 2), ("zb-h1", 3)])
def test_gradients_and_weights_have_the_bits_of_those_kept_by_hand(
    family: str, ranks: int, clip_norm: float | None, calls: int
) -> None:
    losses, parameters, main = by_hand(clip_norm, calls)
    names: list[str] = []
    for theirs, held, weights in host_world.launch(train, ranks, args=(family, clip_norm, calls)):
        assert theirs == losses
        for name, weight in zip(held, weights, strict=True):
            assert held[name].dtype is parameters[name].dtype
            assert torch.equal(held[name], parameters[name]), name
            assert weight.dtype is torch.float32
            assert torch.equal(weight, main[name]), name
        names += held
    assert sorted(names) == sorted(parameters)


def test_steps_too_small_for_bfloat16_are_not_lost() -> None:
    model = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    pipe = pipex.Pipeline(
        [model], pipex.build("zb-h1", 1, 2), lambda output, _: -output.sum(), main_weights=True,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=2**-10),
    )  # fmt: skip
    x = torch.ones(2, 1, dtype=torch.bfloat16)
    for _ in range(8):  # each by 2^-10; bfloat16 has 1 + 2^-7 after 1
        pipe.step(x, x)
    assert pipe.local_stages[0].layers[0].weight.item() == 1 + 2**-7


def save_and_go_on(directory: str) -> list[float]:
    pipe = pipeline()
    for step in range(3):
        pipe.step(*data(step))
    pipe.save(directory)
    return [pipe.step(*data(step)) for step in range(3, 9)]


def load_and_go_on(directory: str) -> list[float]:
    pipe = pipeline()
    pipe.step(*data(100))
    pipe.load(directory)
    return [pipe.step(*data(step)) for step in range(3, 9)]


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_checkpoint_holds_the_main_weights(ranks: int, tmp_path: Path) -> None:
    expected = host_world.launch(save_and_go_on, 2, args=(str(tmp_path),))[0]
    assert host_world.launch(load_and_go_on, ranks, args=(str(tmp_path),)) == [expected] * ranks


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": adam,
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    "NAdam": lambda parameters: torch.optim.NAdam(parameters, lr=1e-2),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
}


def load_across(optimizer: str, from_main: bool, directory: str) -> Found:
    """Three steps with main weights or without; then three without them or with."""
    made = OPTIMIZERS[optimizer]
    pipe = pipeline(optimizer=made, main_weights=from_main)
    for step in range(3):
        pipe.step(*data(step))
    pipe.save(directory)
    pipe = pipeline(optimizer=made, main_weights=not from_main)
    pipe.step(*data(100))
    pipe.load(directory)
    losses = [pipe.step(*data(step)) for step in range(3, 6)]
    return found_in(pipe, losses)


def across_by_hand(optimizer: str, from_main: bool) -> tuple[list[float], dict[str, Tensor]]:
    """With torch's own ``load_state_dict`` in between. NAdam's product of decays stays what it was, though."""
    model = layers()
    parameters = dict(model.named_parameters())
    losses, state = [], {}
    for with_main in (from_main, not from_main):
        stepped = {n: nn.Parameter(p.detach().float()) if with_main else p for n, p in parameters.items()}
        by_hand = OPTIMIZERS[optimizer](stepped.values())
        if state:
            products = [s["mu_product"].clone() for s in state["state"].values() if "mu_product" in s]
            by_hand.load_state_dict(state)
            for one, product in zip(by_hand.state.values(), products, strict=False):
                one["mu_product"] = product
        for step in range(3):
            if with_main:
                losses.append(accumulate_by_hand(model, stepped, 3 * bool(state) + step))
            else:
                x, y = data(3 * bool(state) + step)
                summed = torch.zeros(())
                for a, b in zip(x.split(2), y.split(2), strict=True):
                    loss = nn.functional.mse_loss(model(a), b) * 0.25
                    loss.backward()
                    summed = summed + loss.detach()
                losses.append(summed.item())
            by_hand.step()
            by_hand.zero_grad()
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(stepped[name])
        state = by_hand.state_dict()
    return losses[3:], parameters


@pytest.mark.parametrize("from_main", [True, False], ids=["from main weights", "to main weights"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_goes_on_with_main_weights_or_without(
    ranks: int, optimizer: str, from_main: bool, tmp_path: Path
) -> None:
    losses, parameters = across_by_hand(optimizer, from_main)
    for theirs, held, _ in host_world.launch(load_across, ranks, args=(optimizer, from_main, str(tmp_path))):
        assert theirs == losses
        for name, tensor in held.items():
            assert torch.equal(tensor, parameters[name]), name


def load_without_main_weights(directory: str) -> list[bool]:
    ranks = pipex.current_world().ranks
    plain = pipex.Pipeline(
        pipex.split_model(layers(), ranks), pipex.build("1f1b", ranks, MICROBATCHES), nn.functional.mse_loss,
        optimizer=adam,
    )  # fmt: skip
    plain.step(*data(0))
    plain.save(directory)
    pipe = pipeline()
    pipe.load(directory)
    _, held, weights = found_in(pipe, [])
    return [torch.equal(tensor.float(), weight) for tensor, weight in zip(held.values(), weights, strict=True)]


def test_a_checkpoint_without_main_weights_gives_the_rounded_ones(tmp_path: Path) -> None:
    found = host_world.launch(load_without_main_weights, 2, args=(str(tmp_path),))
    assert all(map(all, found))
    assert sum(map(len, found)) == len(list(layers().parameters()))


def test_a_parameter_that_was_set_in_between_is_what_training_goes_on_with() -> None:
    pipe, other = pipeline(), pipeline()
    with torch.no_grad():
        for stage in (*pipe.local_stages, *other.local_stages):
            for parameter in stage.parameters():
                parameter.mul_(0.5)
    halved = by_hand_from_halves()
    assert pipe.step(*data(0)) == other.step(*data(0))
    _, held, _ = found_in(pipe, [])
    for name, tensor in held.items():
        assert torch.equal(tensor, halved[name]), name


def by_hand_from_halves() -> dict[str, Tensor]:
    model = layers()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    parameters = dict(model.named_parameters())
    main = {name: nn.Parameter(p.detach().float()) for name, p in parameters.items()}
    optimizer = adam(main.values())
    x, y = data(0)
    for a, b in zip(x.split(2), y.split(2), strict=True):
        (nn.functional.mse_loss(model(a), b) * 0.25).backward()
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            so_far = main[name].grad
            main[name].grad = parameter.grad.float() if so_far is None else so_far + parameter.grad.float()
            parameter.grad = None
    optimizer.step()
    return {name: weight.detach().to(parameters[name].dtype) for name, weight in main.items()}


# What is done to parameters and gradients, in every way and at every time.


def zero(grads_of: list[nn.Parameter]) -> None:
    for parameter in grads_of:
        parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)


def shorten(grads_of: list[nn.Parameter]) -> None:
    for parameter in grads_of:
        assert parameter.grad is not None
        parameter.grad.mul_(0.5)


def replace(grads_of: list[nn.Parameter]) -> None:
    for parameter in grads_of:
        assert parameter.grad is not None
        parameter.grad = parameter.grad.clamp(-1e-3, 1e-3)


def drop(grads_of: list[nn.Parameter]) -> None:
    for parameter in grads_of[::2]:
        parameter.grad = None


CHANGES = {change.__name__: change for change in (zero, shorten, replace, drop)}


def change_gradients(change: str, by_optimizer: bool) -> Found:
    pipe, losses = pipeline(clip_norm=0.01), []
    assert pipe.optimizer is not None
    for step in range(STEPS):
        losses.append(pipe.forward_backward(*data(step)))
        pipe.reduce_gradients()
        of_optimizer = [p for group in pipe.optimizer.param_groups for p in group["params"]]
        of_model = [p for stage in pipe.local_stages for p in stage.parameters()]
        CHANGES[change](of_optimizer if by_optimizer else of_model)
        pipe.update()
    return found_in(pipe, losses)


@pytest.mark.parametrize("by_optimizer", [False, True], ids=["of the model", "of the optimizer"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_done_to_gradients_between_the_halves_is_stepped_by(change: str, by_optimizer: bool) -> None:
    model = layers()
    parameters = dict(model.named_parameters())
    main = {name: nn.Parameter(p.detach().float()) for name, p in parameters.items()}
    optimizer = adam(main.values())
    losses = []
    for step in range(STEPS):
        losses.append(accumulate_by_hand(model, main, step))
        CHANGES[change](list(main.values()))
        nn.utils.clip_grad_norm_(main.values(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(main[name])
    theirs, held, weights = change_gradients(change, by_optimizer)
    assert theirs == losses
    for name, weight in zip(held, weights, strict=True):
        assert torch.equal(held[name], parameters[name]), name
        assert torch.equal(weight, main[name]), name


SETTERS = {
    "in place": lambda p: p.mul_(0.5),
    "through data": lambda p: p.data.fill_(0.25),
    "by new data": lambda p: setattr(p, "data", p.data * 2),
}


def set_parameters(how: str, when: str, directory: str) -> list[bool]:
    """Sets every parameter, without a step by the optimizer; are they what was set, main weights too?"""
    pipe = pipeline(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    pipe.step(*data(0))
    if when != "before":
        pipe.forward_backward(*data(1))
    if when == "between":
        pipe.reduce_gradients()
    parameters = [p for stage in pipe.local_stages for p in stage.parameters()]
    with torch.no_grad():
        for parameter in parameters:
            SETTERS[how](parameter)
    expected = [p.detach().clone() for p in parameters]
    if when == "before":
        pipe.save(directory)
        pipe.load(directory)
        pipe.forward_backward(*data(1))
    pipe.update()
    _, held, weights = found_in(pipe, [])
    return [torch.equal(p, e) for p, e in zip(held.values(), expected, strict=True)] + [
        torch.equal(w, e.float()) for w, e in zip(weights, expected, strict=True)
    ]


@pytest.mark.parametrize("when", ["before", "after the backward", "between"])
@pytest.mark.parametrize("how", SETTERS)
def test_a_parameter_may_be_set_in_any_way_at_any_time(how: str, when: str, tmp_path: Path) -> None:
    for found in host_world.launch(set_parameters, 2, args=(how, when, str(tmp_path))):
        assert all(found)


def test_a_main_weight_may_be_set_too() -> None:
    pipe = pipeline(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    assert pipe.optimizer is not None
    pipe.step(*data(0))
    weights = [p for group in pipe.optimizer.param_groups for p in group["params"]]
    with torch.no_grad():
        for weight in weights:
            weight.mul_(0.75)
    expected = [weight.detach().clone() for weight in weights]
    pipe.step(*data(1))
    _, held, _ = found_in(pipe, [])
    for weight, wanted, (name, parameter) in zip(weights, expected, held.items(), strict=True):
        assert torch.equal(weight, wanted), name
        assert torch.equal(parameter, wanted.to(parameter.dtype)), name


def tied_layers() -> nn.Sequential:
    """Of small integers: no gradient is rounded, whatever the order of additions."""
    torch.manual_seed(5)
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3))).bfloat16()
    for parameter in model.parameters():
        parameter.data.copy_(torch.randint(-1, 2, (4, 4)))
    model[2].weight = model[0].weight
    return model


def train_tied() -> Found:
    ranks = pipex.current_world().ranks
    pipe = pipex.Pipeline(
        pipex.split_model(tied_layers(), ranks), pipex.build("zb-h1", ranks, 2), lambda o, t: (o.float() * t).sum(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=2**-12), main_weights=True,
    )  # fmt: skip
    losses = [pipe.step(*integers(step)) for step in range(1)]
    return found_in(pipe, losses)


def integers(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randint(-1, 2, (2, 2, 4), generator=generator).float()
    return x.bfloat16(), y


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_tied_parameter_has_one_main_weight(ranks: int) -> None:
    exact = tied_layers().double()
    exact[2].weight = exact[0].weight
    x, y = integers(0)
    ((exact(x.double()) * y).sum() / 2).backward()
    expected = {name: (p - p.grad * 2**-12).detach() for name, p in exact.named_parameters()}
    for _, held, weights in host_world.launch(train_tied, ranks):
        for name, weight in zip(held, weights, strict=True):
            assert torch.equal(weight.double(), expected[name]), name


@pytest.mark.parametrize("main_weights", [False, True])
def test_a_parameter_with_a_main_grad_is_refused_by_name(main_weights: bool) -> None:
    model = layers()
    model[4].weight.main_grad = torch.zeros(8, 8)  # type: ignore[union-attr]
    plan = pipex.build("zb-h1", 1, MICROBATCHES)
    with pytest.raises(UnsupportedModule, match=r"4\.weight carries a main_grad, .* main_weights=True"):
        pipex.Pipeline(
            pipex.split_model(model, 1), plan, nn.functional.mse_loss, optimizer=adam, main_weights=main_weights
        )


def thaw() -> tuple[float, str, float]:
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)).bfloat16()
    model[2].bias.requires_grad_(False)
    world = pipex.current_world()
    pipe = pipex.Pipeline(pipex.split_model(model, world.ranks), pipex.build("1f1b", world.ranks, 2),
                          nn.functional.mse_loss, optimizer=adam, main_weights=True)  # fmt: skip
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    first = pipe.step(x, x)
    model[2].bias.requires_grad_(True)
    with pytest.raises(InputError) as refused:
        pipe.step(x, x)
    model[2].bias.requires_grad_(False)
    return first, str(refused.value), pipe.step(x, x)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_parameter_thawed_too_late_for_a_main_weight_is_named_and_the_run_goes_on(ranks: int) -> None:
    for first, refused, second in pipex.launch(thaw, ranks):
        assert "parameters without a main weight; got 2.bias; needed all that are trained" in refused
        assert second < first
