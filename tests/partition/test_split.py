"""Stages put together again are the model."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from pipex.errors import InputError, UnsupportedModule
from pipex.layout import Tie
from pipex.partition import tied
from pipex.partition.balance import Balance
from pipex.partition.split import split_model
from pipex.partition.stage import Stage, as_stages


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(torch.tanh(self.linear(x)))


class Pair(nn.Module):
    """Takes and returns two tensors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x) + carry, carry * 2


class Model(nn.Module):
    """Seven layers: embed, four blocks, norm, head; the head's weight is the embedding's."""

    pipeline_layers: Sequence[str] = ("embed", "blocks", "tail.norm", "head")

    def __init__(self, width: int = 6, tie: bool = True) -> None:
        super().__init__()
        self.head = nn.Linear(width, 11, bias=False)  # registered first: its name is the canonical one
        self.embed = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(4))
        self.tail = nn.ModuleDict({"norm": nn.LayerNorm(width)})
        if tie:
            self.embed.weight = self.head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.tail["norm"](x))


def composed(stages: Sequence[Stage], x: Tensor) -> Tensor:
    for stage in stages:
        x = stage(*x) if isinstance(x, tuple) else stage(x)
    return x


CUTS = [(1, "uniform"), (3, "uniform"), (7, "uniform"), (2, "parameters"), (3, [5, 1, 1]), (4, [1, 1, 1, 4])]


@pytest.mark.parametrize(("stages", "balance"), CUTS)
def test_stages_one_after_another_equal_the_model_bit_for_bit(stages: int, balance: Balance) -> None:
    torch.manual_seed(0)
    model = Model().eval()
    tokens = torch.randint(11, (5,))
    assert torch.equal(composed(split_model(model, stages, balance), tokens), model(tokens))


@pytest.mark.parametrize(("stages", "balance"), CUTS)
def test_every_layer_lands_exactly_once_and_in_order(stages: int, balance: Balance) -> None:
    model = Model()
    parts = split_model(model, stages, balance)
    layers = [model.embed, *model.blocks, model.tail["norm"], model.head]
    assert [id(layer) for part in parts for layer in part.layers] == [id(layer) for layer in layers]
    assert [(part.index, part.count) for part in parts] == [(index, stages) for index in range(stages)]
    assert [layers[part.first_layer] for part in parts] == [part.layers[0] for part in parts]


@pytest.mark.parametrize(("stages", "balance"), CUTS)
def test_names_are_those_of_the_unsplit_model(stages: int, balance: Balance) -> None:
    model = Model()
    together = {name: tensor for part in split_model(model, stages, balance) for name, tensor in part.names.items()}
    state = model.state_dict(keep_vars=True)
    del state["embed.weight"]  # tied, and called by the first of its names
    assert together.keys() == state.keys()
    assert all(together[name] is state[name] for name in state)


def test_names_follow_tensors_that_are_replaced() -> None:
    stage = split_model(Model(), 2)[0].double()
    assert stage.names["blocks.0.norm.running_mean"] is stage.layers[1].norm.running_mean
    assert {tensor.dtype for name, tensor in stage.names.items() if "num_batches" not in name} == {torch.float64}


def test_buffers_that_are_not_saved_have_no_name() -> None:
    layer = nn.Linear(2, 2)
    layer.register_buffer("mask", torch.ones(2), persistent=False)
    assert split_model(nn.Sequential(layer), 1)[0].names.keys() == {"0.weight", "0.bias"}


def test_a_tied_parameter_stays_one_object_and_is_reported_with_its_stages() -> None:
    parts = split_model(Model(), 3)
    assert parts[0].names["head.weight"] is parts[2].names["head.weight"]
    assert tied(parts) == (Tie("head.weight", (0, 2)),)
    assert tied(split_model(Model(tie=False), 3)) == ()


def test_a_parameter_used_twice_in_one_stage_is_not_tied_across_stages() -> None:
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU())
    whole, first, second = split_model(model, 1), *split_model(model, 2)
    assert tied(whole) == ()
    assert list(whole[0].names) == ["0.weight", "0.bias"]
    assert tied([first, second]) == (Tie("0.weight", (0, 1)), Tie("0.bias", (0, 1)))
    x = torch.randn(2, 3)
    assert torch.equal(composed([first, second], x), model(x))


def test_a_tuple_is_passed_on_as_positional_arguments() -> None:
    torch.manual_seed(0)
    layers = [Pair(4) for _ in range(3)]
    x, carry = torch.randn(2, 4), torch.randn(2, 4)
    expected = (x, carry)
    for layer in layers:
        expected = layer(*expected)
    (stage,) = split_model(nn.Sequential(*layers), 1)
    assert all(map(torch.equal, stage(x, carry), expected))
    two = split_model(nn.Sequential(*layers), 2)
    assert all(map(torch.equal, two[1](*two[0](x, carry)), expected))


def test_a_sequential_with_a_forward_of_its_own_is_one_layer() -> None:
    class Residual(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    class Net(nn.Module):
        pipeline_layers = ("body", "head")

        def __init__(self) -> None:
            super().__init__()
            self.body = Residual(nn.Linear(3, 3), nn.ReLU())
            self.head = nn.Linear(3, 2)

    assert [len(part.layers) for part in split_model(Net(), 2)] == [1, 1]
    with pytest.raises(UnsupportedModule, match="Residual does not say what its layers are"):
        split_model(Residual(nn.Linear(3, 3)), 1)


class Contained(nn.Module):
    pipeline_layers = ("first", "body", "list")

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nn.Linear(3, 3))
        self.body = nn.Linear(3, 3)
        self.list = nn.ModuleList([nn.Sequential(nn.Linear(3, 3))])


def set_forward(module: nn.Module) -> None:
    module.forward = lambda x: x * 2  # type: ignore[method-assign]


HANGS: dict[str, tuple[str, Callable[[nn.Module], object]]] = {
    "forward hook": ("a hook", lambda m: m.register_forward_hook(lambda m, x, y: y * 2)),
    "forward pre-hook": ("a hook", lambda m: m.register_forward_pre_hook(lambda m, x: None)),
    "backward hook": ("a hook", lambda m: m.register_full_backward_hook(lambda m, dx, dy: None)),
    "backward pre-hook": ("a hook", lambda m: m.register_full_backward_pre_hook(lambda m, dy: None)),
    "forward": ("a forward that was set on the object", set_forward),
}


@pytest.mark.parametrize("kind", HANGS)
def test_what_hangs_on_a_container_that_is_taken_apart_is_refused(kind: str) -> None:
    got, hang = HANGS[kind]
    for called, model, container in (
        ("the model", whole := Contained(), whole),
        ("the model", sequential := nn.Sequential(nn.Linear(3, 3)), sequential),
        ("first", holder := Contained(), holder.first),
    ):
        hang(container)
        with pytest.raises(UnsupportedModule, match=f"{called} is taken apart into its layers.*; got {got}; needed"):
            split_model(model, 1)
    model = Contained()
    for layer in (model.first[0], model.first[0][0], model.body, model.list[0]):
        hang(layer)  # these are called
    split_model(model, 2)


def test_a_model_that_names_no_layers_is_refused() -> None:
    with pytest.raises(UnsupportedModule, match=r"Linear does not say what its layers are.*pipeline_layers"):
        split_model(nn.Linear(2, 2), 1)


@pytest.mark.parametrize(
    ("outside", "add"),
    [
        ("position", lambda model: model.register_parameter("position", nn.Parameter(torch.zeros(3)))),
        ("mask", lambda model: model.register_buffer("mask", torch.zeros(3), persistent=False)),
        ("extra.weight", lambda model: model.add_module("extra", nn.Linear(2, 2))),
    ],
)
def test_a_tensor_in_no_layer_is_named(outside: str, add: Callable[[Model], None]) -> None:
    model = Model()
    add(model)
    with pytest.raises(UnsupportedModule, match=rf"Model cannot be split; got {outside} in none of its layers"):
        split_model(model, 2)


def test_a_layer_name_that_is_no_submodule_is_named() -> None:
    model = Model()
    model.pipeline_layers = ("embed", "block")
    with pytest.raises(InputError, match=r"got 'block'; needed names out of \['head', 'embed', 'blocks', 'tail'\]"):
        split_model(model, 2)


def test_more_stages_than_layers_is_refused_with_both_numbers() -> None:
    with pytest.raises(InputError, match="7 layers cannot be cut into 8 stages"):
        split_model(Model(), 8)


def test_plain_modules_become_stages_of_one_layer_named_by_stage() -> None:
    first, second = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 3)
    second.weight = first[0].weight
    stages = as_stages([first, second])
    assert [(s.index, s.count, s.first_layer, len(s.layers)) for s in stages] == [(0, 2, 0, 1), (1, 2, 1, 1)]
    assert [list(stage.names) for stage in stages] == [["0.0.weight", "0.0.bias"], ["0.0.weight", "1.bias"]]
    assert tied(stages) == (Tie("0.0.weight", (0, 1)),)
    x = torch.randn(2, 3)
    assert torch.equal(composed(stages, x), second(first(x)))


def test_stages_of_a_split_pass_through_as_they_are() -> None:
    parts = split_model(Model(), 3)
    assert [id(stage) for stage in as_stages(parts)] == [id(part) for part in parts]


def test_stages_that_are_not_one_whole_split_are_refused() -> None:
    parts = split_model(Model(), 3)
    for wrong in ([], parts[:2], [parts[1], parts[0], parts[2]], [parts[0], nn.Linear(2, 2), parts[2]]):
        with pytest.raises(InputError):
            as_stages(wrong)
