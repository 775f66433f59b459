"""Parameters that several stages use, against plain torch; and what would let their copies on the ranks drift apart.

With one micro-batch and two uses there are two gradients to add, so plain torch, which adds them in another order, has
the same bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import host_world
import pytest
import torch
import torch.nn.functional as F
from layer_kinds import SIZE, lin
from random_models import digest
from torch import Tensor, nn

import pipex
from pipex.errors import MessageMismatch, PipexError, UnsupportedModule
from pipex.runtime.tied import packed, unpacked

PLACES = [pytest.param("looped-bfs", 1, id="one rank"), pytest.param("1f1b", 2, id="two ranks"),
          pytest.param("zb-h1", 2, id="two ranks, split")]  # fmt: skip
sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)

Found = tuple[list[float], dict[str, str | None]]
"""The losses, and a digest of every parameter by name."""


def batch(step: int) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, 6, SIZE, SIZE, generator=torch.Generator().manual_seed(step))
    return x, y


def pipeline(model: nn.Sequential, family: str = "1f1b", microbatches: int = 1, **options: Any) -> pipex.Pipeline:
    """Of two stages."""
    ranks = pipex.current_world().ranks
    plan = pipex.build(family, ranks, microbatches, chunks=2 // ranks)
    return pipex.Pipeline(
        pipex.split_model(model, 2), plan, options.pop("loss", F.mse_loss), **{"optimizer": sgd, **options}
    )


def digests(pipe: pipex.Pipeline) -> dict[str, str | None]:
    return {name: digest(tensor) for stage in pipe.local_stages for name, tensor in stage.names.items()}


def assert_plain(found: list[Found], model: nn.Module, losses: list[float]) -> None:
    expected = {name: digest(parameter) for name, parameter in model.named_parameters()}
    for ours, parameters in found:
        assert ours == losses
        assert parameters == {name: expected[name] for name in parameters}
    assert set().union(*(parameters for _, parameters in found)) == set(expected)


def plain_step(model: nn.Module, update: torch.optim.Optimizer, step: int) -> float:
    x, y = batch(step)
    loss = F.mse_loss(model(x), y)
    loss.backward()
    update.step()
    update.zero_grad()
    return loss.item()


# Uses that come and go.


class Sided(nn.Module):
    """Adds a parameter in some of its forwards."""

    def __init__(self, side: nn.Parameter, uses: tuple[bool, ...]) -> None:
        super().__init__()
        self.inner, self.side, self.uses = lin(), side, list(uses)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.inner(x))
        return y + self.side if self.uses.pop(0) else y


def sided(first: tuple[bool, ...], second: tuple[bool, ...]) -> nn.Sequential:
    torch.manual_seed(0)
    side = nn.Parameter(torch.randn(SIZE))
    return nn.Sequential(Sided(side, first), Sided(side, second))


USES = ((True, False, True, False), (True, True, False, False))
"""Of the two layers in four steps: both, one on either side, none."""


def train_sided(family: str) -> tuple[Found, list[str]]:
    pipe = pipeline(sided(*USES), family)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        losses = [pipe.step(*batch(step)) for step in range(4)]
    return (losses, digests(pipe)), [str(warning.message).partition(";")[0] for warning in told]


@pytest.mark.parametrize(("family", "ranks"), PLACES)
def test_a_tied_parameter_that_no_use_reached_has_no_gradient(family: str, ranks: int) -> None:
    """With zeros in its place, as before, momentum and weight decay moved it, and nothing was said."""
    model = sided(*USES)
    update = sgd(model.parameters())
    losses = [plain_step(model, update, step) for step in range(4)]
    found = host_world.launch(train_sided, ranks, args=(family,))
    assert_plain([result for result, _ in found], model, losses)
    assert [told for _, told in found] == [["no gradient came to 0.side"]] * ranks


# Uses that a rank does not know of.


class Borrowing(nn.Module):
    """Uses a parameter that it does not hold."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.inner, self.borrowed = lin(), [weight]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inner(x), self.borrowed[0])


def stray(how: str) -> tuple[nn.Sequential, Callable[[Tensor, Tensor], Tensor]]:
    torch.manual_seed(0)
    first = lin()
    model = nn.Sequential(first, Borrowing(first.weight) if how == "borrowed" else lin())
    if how == "borrowed":
        return model, F.mse_loss
    return model, lambda o, t: F.mse_loss(o, t) + 0.1 * sum(p.square().sum() for p in model.parameters())


def train_stray(family: str, how: str) -> tuple[list[float], str, dict[str, str | None]]:
    model, loss = stray(how)
    pipe = pipeline(model, family, loss=loss)
    losses, problem, before = [], "", digests(pipe)
    try:
        losses = [pipe.step(*batch(step)) for step in range(3)]
    except PipexError as error:
        problem = f"{type(error).__name__} {error}"
    return losses, problem, digests(pipe) if losses else {n: d for n, d in digests(pipe).items() if before[n] != d}


@pytest.mark.parametrize("how", ["borrowed", "a penalty in the loss"])
@pytest.mark.parametrize("family", ["1f1b", "zb-h1"])
def test_a_gradient_on_a_rank_that_does_not_train_it_is_refused_by_name(family: str, how: str) -> None:
    """It was lost, and the rank went on with the parameter as it was in the beginning."""
    (_, first, moved), (_, second, moved_too) = host_world.launch(train_stray, 2, args=(family, how))
    words = "0.weight got a gradient on a rank without its stage 0"
    assert second.startswith(f"UnsupportedModule {words}")
    assert first.startswith("PeerFailed")
    assert words in first
    assert not moved  # on neither rank has the step been made
    assert not moved_too


@pytest.mark.parametrize("how", ["borrowed", "a penalty in the loss"])
def test_a_use_outside_of_its_stage_but_on_its_rank_trains_as_in_torch(how: str) -> None:
    model, loss_fn = stray(how)
    update, losses = sgd(model.parameters()), []
    for step in range(3):
        x, y = batch(step)
        loss = loss_fn(model(x), y)
        loss.backward()
        losses.append(loss.item())
        update.step()
        update.zero_grad()
    ((found, problem, parameters),) = host_world.launch(train_stray, 1, args=("looped-bfs", how))
    assert not problem
    assert_plain([(found, parameters)], model, losses)


def train_after_a_backward(_: int) -> Found:
    model = plain_layers()
    model(batch(5)[0]).sum().backward()
    model.zero_grad(set_to_none=False)
    pipe = pipeline(model)
    return [pipe.step(*batch(step)) for step in range(2)], digests(pipe)


def test_gradients_from_before_the_pipeline_are_no_strays() -> None:
    model = plain_layers()
    update = sgd(model.parameters())
    losses = [plain_step(model, update, step) for step in range(2)]
    assert_plain(host_world.launch(train_after_a_backward, 2, args=(0,)), model, losses)


# Ties that the pipeline was not made with.


def plain_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(lin(), lin())


def tie_later(giver: int, taker: int) -> None:
    model = plain_layers()
    pipe = pipeline(model, "1f1b" if pipex.current_world().ranks == 2 else "looped-bfs")
    pipe.step(*batch(0))
    model[taker].weight = model[giver].weight
    pipe.step(*batch(1))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("giver", "taker"), [(0, 1), (1, 0)])
def test_a_parameter_that_is_tied_between_steps_is_refused_by_name(giver: int, taker: int, ranks: int) -> None:
    words = r"0\.weight was tied when .* got one parameter of the stages 0, 1; needed ties that"
    with pytest.raises(PipexError, match=words):  # on the other rank it is a PeerFailed with these words
        host_world.launch(tie_later, ranks, args=(giver, taker))


def test_a_parameter_that_is_tied_after_the_cut_is_refused_by_name() -> None:
    model = plain_layers()
    stages = pipex.split_model(model, 2)
    model[1].weight = model[0].weight
    with pytest.raises(UnsupportedModule, match=r"0\.weight was tied when .* got one parameter of the stages 0, 1"):
        pipex.Pipeline(stages, pipex.build("looped-bfs", 1, 1, chunks=2), F.mse_loss, optimizer=sgd)


# What is frozen, thawed and hooked.


def tied_layers() -> nn.Sequential:
    model = plain_layers()
    model[1].weight = model[0].weight
    return model


def thaw(model: nn.Module, update: torch.optim.Optimizer) -> None:
    model[0].weight.requires_grad_(True)
    update.add_param_group({"params": [model[0].weight]})


def train_thawed(family: str) -> Found:
    model = tied_layers()
    model[0].weight.requires_grad_(False)
    pipe = pipeline(model, family)
    losses = []
    for step in range(4):
        if step == 2:
            thaw(model, pipe.optimizer)
        losses.append(pipe.step(*batch(step)))
    return losses, digests(pipe)


@pytest.mark.parametrize(("family", "ranks"), PLACES)
def test_a_tied_parameter_that_is_thawed_trains_as_in_torch(family: str, ranks: int) -> None:
    model = tied_layers()
    model[0].weight.requires_grad_(False)
    update, losses = sgd(p for p in model.parameters() if p.requires_grad), []
    for step in range(4):
        if step == 2:
            thaw(model, update)
        losses.append(plain_step(model, update, step))
    assert_plain(host_world.launch(train_thawed, ranks, args=(family,)), model, losses)


def freeze_on_one_rank(_: int) -> tuple[str, list[float]]:
    pipe = pipeline(tied_layers())
    losses = [pipe.step(*batch(0))]
    held, problem = [p for stage in pipe.local_stages for p in stage.parameters()], ""
    if pipe.world.rank == 0:
        held[0].requires_grad_(False)
    try:
        pipe.step(*batch(1))
    except PipexError as error:
        problem = f"{type(error).__name__} {error}"
    held[0].requires_grad_(False)
    losses.append(pipe.step(*batch(1)))  # with the same on both the pipeline goes on
    held[0].requires_grad_(True)
    losses.append(pipe.step(*batch(2)))
    return problem, losses


def test_a_tied_parameter_that_is_frozen_on_one_rank_is_refused_before_anything_has_begun() -> None:
    """The rank on which it was not frozen waited for a gradient until the time-out."""
    model = tied_layers()
    update, losses = sgd(model.parameters()), []
    for step in range(3):
        model[0].weight.requires_grad_(step != 1)
        losses.append(plain_step(model, update, step))
    words = (
        "ConfigMismatch the ranks disagree about which parameters of the stages 0, 1 are trained; "
        "got [] on rank 0, ['0.weight'] on rank 1"
    )
    for problem, found in host_world.launch(freeze_on_one_rank, 2, args=(0,)):
        assert problem.startswith(words)
        assert found == losses


def summed(output: Tensor, target: Tensor) -> tuple[Tensor, int]:
    return (output - target).square().sum(), output.numel()


def freeze_before_update(family: str, rank: int | None) -> Found:
    pipe = pipeline(tied_layers(), family, loss=summed, clip_norm=0.01)
    losses = []
    for step in range(2):
        losses.append(pipe.forward_backward(*batch(step)))
        if rank in (None, pipe.world.rank):
            for stage in pipe.local_stages:
                stage.requires_grad_(False)
        pipe.update()
        for stage in pipe.local_stages:
            stage.requires_grad_(True)
    return losses, digests(pipe)


@pytest.mark.parametrize(("family", "ranks"), PLACES)
@pytest.mark.parametrize("rank", [None, 0], ids=["everywhere", "on the first rank"])
def test_what_is_frozen_before_the_update_is_updated_as_in_torch(family: str, ranks: int, rank: int | None) -> None:
    """Its gradient was applied undivided and unclipped; a tied one that was frozen on one rank let the other wait."""
    model = tied_layers()
    update, losses = sgd(model.parameters()), []
    for step in range(2):
        x, y = batch(step)
        loss, count = summed(model(x), y)
        loss.backward()
        losses.append((loss.detach() / count).item())
        gradients = {p: p.grad for p in model.parameters()}
        for gradient in gradients.values():
            gradient.div_(count)
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        update.step()
        update.zero_grad()
    assert_plain(host_world.launch(freeze_before_update, ranks, args=(family, rank)), model, losses)


def train_hooked(kind: str, frozen: bool) -> tuple[list[float], float]:
    model = tied_layers()
    register = getattr(model[0].weight, kind)
    removed = register(lambda gradient: None)
    removed.remove()
    register(lambda gradient: None)
    model[0].weight.requires_grad_(not frozen)
    pipe = pipeline(model, "1f1b" if pipex.current_world().ranks == 2 else "looped-bfs")
    evaluated = pipe.evaluate(*batch(0))
    return [pipe.step(*batch(step)) for step in range(2)], evaluated


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_on_a_tied_parameter_is_refused_by_name(kind: str, ranks: int) -> None:
    """It saw the gradient of each stage instead of their sum."""
    words = r"0\.weight stands in the stages 0, 1, and its hooks would see the gradient of one of them at a time"
    with pytest.raises(PipexError, match=words):
        host_world.launch(train_hooked, ranks, args=(kind, False))
    assert len(host_world.launch(train_hooked, ranks, args=(kind, True))) == ranks  # nothing is refused while frozen


# Copies on several ranks.


def train_model(make: Callable[[int], nn.Sequential]) -> Found:
    model = make(pipex.current_world().rank)
    pipe = pipeline(model, "1f1b" if pipex.current_world().ranks > 1 else "looped-bfs")
    return [pipe.step(*batch(step)) for step in range(2)], digests(pipe)


def seeded_apart(rank: int) -> nn.Sequential:
    torch.manual_seed(rank)
    model = nn.Sequential(lin(), lin())
    model[1].weight = model[0].weight
    return model


class Projected(nn.Module):
    def __init__(self, projection: Tensor) -> None:
        super().__init__()
        self.inner = lin()
        self.register_buffer("projection", projection, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) @ self.projection


def projected_apart(rank: int) -> nn.Sequential:
    torch.manual_seed(rank)
    projection = torch.randn(SIZE, SIZE)
    return nn.Sequential(Projected(projection), Projected(projection))


def in_other_dtypes(rank: int) -> nn.Sequential:
    return tied_layers().to([torch.float32, torch.float64][rank])


def tied_on_one_rank(rank: int) -> nn.Sequential:
    return [tied_layers, plain_layers][rank]()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (seeded_apart, r"0\.weight of stage 0, 1 begins with .*; got torch\.float32 \(6, 6\), checksum \w+ on rank"),
        (projected_apart, r"what 0\.projection of stage 0, 1 begins with .* checksum \w+ on rank 0"),
        (in_other_dtypes, r"got torch\.float32 \(6, 6\), checksum \w+ on rank 0, torch\.float64 \(6, 6\)"),
        (tied_on_one_rank, r"layer 1; got Linear \(0\.weight float32\[6, 6\], .* on rank 0, Linear \(1\.weight"),
    ],
)  # fmt: skip
def test_copies_that_begin_differently_are_refused_by_name(make: Callable[[int], nn.Sequential], words: str) -> None:
    """Each rank trained its own for ever."""
    with pytest.raises(PipexError, match=words):
        host_world.launch(train_model, 2, args=(make,))


def untied_and_seeded_apart(rank: int) -> nn.Sequential:
    """Of every layer but its own a rank has something else, or nothing."""
    torch.manual_seed(0)
    layers = [lin(), lin()]
    layers[1 - rank] = nn.Linear(SIZE, SIZE, device="meta") if rank else lin()
    return nn.Sequential(*layers)


def test_what_a_rank_has_in_place_of_other_ranks_layers_does_not_matter() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(lin(), lin())
    update = sgd(model.parameters())
    losses = [plain_step(model, update, step) for step in range(2)]
    assert_plain(host_world.launch(train_model, 2, args=(untied_and_seeded_apart,)), model, losses)


def sharing_memory(_: int) -> nn.Sequential:
    model = plain_layers()
    model[1].weight.data = model[0].weight.data.t()
    return model


def buffer_of_a_parameter(_: int) -> nn.Sequential:
    first = lin()
    return nn.Sequential(first, Projected(first.weight.detach()))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (sharing_memory, r"0\.weight of stage 0 and 1\.weight of stage 1 share memory"),
        (buffer_of_a_parameter, r"0\.weight of stage 0 and 1\.projection of stage 1 share memory"),
    ],
)
def test_parameters_of_two_ranks_that_share_memory_are_refused_by_name(
    make: Callable[[int], nn.Sequential], words: str
) -> None:
    with pytest.raises(PipexError, match=rf"UnsupportedModule: {words}"):
        host_world.launch(train_model, 2, args=(make,))
    assert host_world.launch(train_model, 1, args=(make,))  # on one rank they are one


def views_of_one_buffer(_: int) -> nn.Sequential:
    """The weights are columns of one matrix, the biases lie behind each other."""
    model = plain_layers()
    weights, biases = torch.cat([m.weight.data for m in model], 1), torch.cat([m.bias.data for m in model])
    for layer, weight, bias in zip(model, weights.split(SIZE, 1), biases.split(SIZE), strict=True):
        layer.weight.data, layer.bias.data = weight, bias
    return model


@pytest.mark.parametrize("ranks", [1, 2])
def test_parameters_that_are_apart_in_one_buffer_train_as_in_torch(ranks: int) -> None:
    model = views_of_one_buffer(0)
    update = sgd(model.parameters())
    losses = [plain_step(model, update, step) for step in range(2)]
    assert_plain(host_world.launch(train_model, ranks, args=(views_of_one_buffer,)), model, losses)


def test_a_gradient_of_another_shape_is_named() -> None:
    parameter = nn.Parameter(torch.ones(2, 3))
    gradient = torch.ones(2, 3)
    assert unpacked(packed(gradient, parameter), parameter) is gradient
    assert unpacked(packed(None, parameter), parameter) is None
    empty = nn.Parameter(torch.ones(0))
    assert unpacked(packed(None, empty), empty) is None
    assert unpacked(packed(torch.ones(0), empty), empty) is not None
    with pytest.raises(MessageMismatch, match=r"got a gradient of shape \[3\]; needed \[2, 3\]"):
        unpacked(torch.ones(3), parameter)
