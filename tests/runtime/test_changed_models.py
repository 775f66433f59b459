"""Models that are changed after they were split: trained, saved, and loaded by one that was changed before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import host_world
import pytest
import torch
from plain_loop import LOSS, assert_same, backward, data, layers, parameters_of, pipeline, plain
from torch import Tensor, nn

import pipex
from pipex.errors import CheckpointError, PeerFailed
from pipex.state import Checkpoint


class Adapter(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.extra = base, nn.Linear(8, 8)
        with torch.no_grad():
            for parameter in self.extra.parameters():
                parameter.fill_(0.125)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.extra(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.twin = nn.Linear(8, 8), nn.Linear(8, 8)
        self.twin.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.twin(torch.tanh(self.inner(x)))


def model() -> nn.Sequential:
    made = layers()
    torch.manual_seed(4)
    made[2] = Block()
    return made


Change = Callable[[Any], "tuple[list[Tensor], list[nn.Parameter]]"]
"""Changes layers; returns parameters that are gone, and new ones."""


def wrap(layers: Any) -> tuple[list[Tensor], list[nn.Parameter]]:
    layers[4] = Adapter(layers[4])
    return [], list(layers[4].extra.parameters())


def wrap_inside(layers: Any) -> tuple[list[Tensor], list[nn.Parameter]]:
    layers[2].inner = Adapter(layers[2].inner)
    return [], list(layers[2].inner.extra.parameters())


def remove(layers: Any) -> tuple[list[Tensor], list[nn.Parameter]]:
    gone = layers[4].bias
    layers[4].bias = None
    return [gone], []


def add(layers: Any) -> tuple[list[Tensor], list[nn.Parameter]]:
    layers[4].extra = nn.Parameter(torch.full((3,), 0.5))  # which nothing trains
    layers[4].extra.requires_grad_(False)
    layers[2].inner.register_buffer("extra", torch.ones(2))
    return [], []


def replace(layers: Any) -> tuple[list[Tensor], list[nn.Parameter]]:
    gone = layers[4].weight
    layers[4].weight = nn.Parameter(gone.detach() * 0.5)
    return [gone], [layers[4].weight]


def untie(layers: Any) -> tuple[list[Tensor], list[nn.Parameter]]:
    layers[2].twin.weight = nn.Parameter(layers[2].twin.weight.detach() * 0.5)
    return [], [layers[2].twin.weight]


CHANGES: dict[str, Change] = {c.__name__: c for c in (wrap, wrap_inside, remove, add, replace, untie)}


class All:
    """The layers of all stages of a pipeline, as those of its model."""

    def __init__(self, pipe: pipex.Pipeline) -> None:
        self._at = [(stage.layers, i) for stage in pipe.stages for i in range(len(stage.layers))]

    def __getitem__(self, position: int) -> Any:
        layers, inside = self._at[position]
        return layers[inside]

    def __setitem__(self, position: int, layer: nn.Module) -> None:
        layers, inside = self._at[position]
        layers[inside] = layer


def adapt(optimizer: torch.optim.Optimizer, gone: list[Tensor], new: list[nn.Parameter]) -> None:
    for group in optimizer.param_groups:
        group["params"][:] = [p for p in group["params"] if not any(p is other for other in gone)]
    for parameter in gone:
        optimizer.state.pop(parameter, None)
    if new:
        optimizer.add_param_group({"params": new})


def held_here(pipe: pipex.Pipeline, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    here = {id(p) for stage in pipe.local_stages for p in stage.parameters()}
    return [p for p in parameters if id(p) in here]


def change_and_save(change: str, directory: str) -> Any:
    pipe = pipeline("1f1b", model)
    assert pipe.optimizer is not None
    values: list[Any] = [pipe.step(*data(0))]
    gone, new = CHANGES[change](All(pipe))
    adapt(pipe.optimizer, gone, held_here(pipe, new))
    values.append(pipe.step(*data(1)))
    pipe.save(directory)
    return [*values, pipe.step(*data(2))], parameters_of(pipe)


def load_changed(change: str, directory: str) -> Any:
    def changed() -> nn.Sequential:
        made = model()
        CHANGES[change](made)
        return made

    pipe = pipeline("1f1b", changed)
    assert pipe.optimizer is not None
    pipe.load(directory)
    return [pipe.step(*data(2))], parameters_of(pipe)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_model_that_is_changed_is_saved_by_the_names_that_it_has_unsplit(
    ranks: int, change: str, tmp_path: Path
) -> None:
    unsplit, values = model(), []
    optimizer = torch.optim.AdamW(unsplit.parameters(), lr=1e-2)
    for step in range(3):
        if step == 1:
            adapt(optimizer, *CHANGES[change](unsplit))
        values.append(backward(unsplit, data(step), LOSS))
        optimizer.step()
        optimizer.zero_grad()
    _, expected = plain(unsplit, [])
    expected |= dict(unsplit.named_buffers())
    assert_same(host_world.launch(change_and_save, ranks, args=(change, str(tmp_path))), (values, expected))
    saved = {n.removeprefix("model/") for n in Checkpoint.open(tmp_path).tensors if n.startswith("model/")}
    assert saved == expected.keys()
    assert_same(host_world.launch(load_changed, 3, args=(change, str(tmp_path))), (values[2:], expected))


def save_with_what_is_gone(directory: str) -> Any:
    pipe = pipeline("1f1b", model)
    assert pipe.optimizer is not None
    _, new = replace(All(pipe))
    adapt(pipe.optimizer, [], held_here(pipe, new))
    pipe.step(*data(0))
    with pytest.raises(CheckpointError) as error:
        pipe.save(directory)
    pipe.step(*data(1))
    return str(error.value)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_replaced_parameter_that_the_optimizer_still_has_is_named_with_what_to_do(ranks: int, tmp_path: Path) -> None:
    for text in host_world.launch(save_with_what_is_gone, ranks, args=(str(tmp_path),)):
        assert "in no stage of this rank; got one of shape [8, 8] in parameter group 0;" in text
        assert "take one that was replaced or removed out of its group's params" in text


def save_more_layers(directory: str) -> Any:
    pipe = pipeline("1f1b")
    pipe.local_stages[-1].layers.append(nn.Identity())
    with pytest.raises(CheckpointError) as error:
        pipe.save(directory)
    pipe.step(*data(1))
    return str(error.value)


def test_a_stage_with_other_layers_is_not_saved_under_wrong_names(tmp_path: Path) -> None:
    for text in host_world.launch(save_more_layers, 2, args=(str(tmp_path),)):
        assert "has other layers than when the model was split; got 4 of them; needed 3" in text


def save_namesakes(directory: str) -> str:
    twice = nn.Linear(6, 6)
    stages = pipex.split_model(nn.Sequential(twice, nn.Tanh(), twice), 1)
    pipe = pipex.Pipeline(stages, pipex.build("1f1b", 1, 2), LOSS, optimizer=torch.optim.SGD)
    stages[0].layers[0], stages[0].layers[2] = nn.Linear(6, 6), nn.Linear(6, 6)
    with pytest.raises(CheckpointError) as error:
        pipe.save(directory)
    return str(error.value)


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    assert (
        "two tensors of stage 0 are called 0.weight" in host_world.launch(save_namesakes, 1, args=(str(tmp_path),))[0]
    )


def parametrize_a_tie() -> None:
    def tied() -> nn.Sequential:
        made = layers()
        made[4].weight = made[2].weight
        return made

    pipe = pipeline("1f1b", tied)
    pipe.step(*data(0))
    nn.utils.parametrizations.spectral_norm(All(pipe)[4])
    pipe.step(*data(1))


def test_a_tied_parameter_that_is_moved_is_refused_by_name() -> None:
    with pytest.raises(
        PeerFailed, match=r"UnsupportedModule: 2\.weight stands in several .* was weight of layer 4; got"
    ):
        host_world.launch(parametrize_a_tie, 2)
