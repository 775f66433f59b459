"""A resumed run, cut otherwise, goes on with the bits of the uninterrupted one; another model is refused."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from pipex.errors import CheckpointError
from pipex.partition.split import split_model
from pipex.partition.stage import Stage
from pipex.state.checkpoint import Checkpoint
from pipex.state.model import check_model, forms_of, model_state, read_model_state
from pipex.state.optimizer import optimizer_state, read_optimizer_state
from pipex.state.save import commit, write_shard

Factory = Callable[[Iterable[Tensor]], Optimizer]

FACTORIES: list[Factory] = [
    partial(AdamW, lr=1e-2, betas=(0.8, 0.9)),
    partial(Adam, lr=1e-2, amsgrad=True),
    partial(SGD, lr=1e-2, momentum=0.9, nesterov=True),
    partial(SGD, lr=1e-2),
    partial(RMSprop, lr=1e-2, centered=True, momentum=0.5),
    lambda parameters: AdamW(parameters, lr=torch.tensor(1e-2)),
]
IDS = ["adamw", "adam amsgrad", "sgd momentum", "sgd", "rmsprop", "adamw tensor lr"]


def build(seed: int, width: int = 8) -> nn.Sequential:
    """Six layers, a frozen one and a buffer among them; the last weight is the first."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(width, width),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, width).requires_grad_(False),
        nn.LayerNorm(width),
        nn.Linear(width, width),
    )
    model[5].weight = model[0].weight
    return model


class Run:
    """Training of a model as ranks of one stage each, every stage with an optimizer of its own."""

    def __init__(self, seed: int, counts: Sequence[int], factory: Factory) -> None:
        self.model = build(seed)
        self.stages = split_model(self.model, len(counts), counts)
        # A parameter that stands in two stages is updated by the first, as there is one copy of it in this process.
        self.optimizers: dict[int, Optimizer] = {}
        updated = set[Tensor]()
        for stage in self.stages:
            own = [p for p in stage.parameters() if p not in updated]
            updated |= set(own)
            if own:
                self.optimizers[stage.index] = factory(own)

    def train(self, steps: range) -> None:
        for step in steps:
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
            self.model.zero_grad()
            F.mse_loss(self.model(x), x.flip(0)).backward()
            for optimizer in self.optimizers.values():
                optimizer.step()
                optimizer.param_groups[0]["lr"] *= 0.9

    def save(self, directory: Path, step: int) -> None:
        shards = []
        for stage in self.stages:
            optimizer = self.optimizers.get(stage.index)
            tensors, meta = optimizer_state(optimizer, stage.names) if optimizer else ({}, {})
            shards.append(write_shard(directory, step, stage.index, model_state(stage.names) | tensors, meta))
        commit(directory, step, shards, {})

    def load(self, directory: Path) -> None:
        checkpoint = Checkpoint.open(directory)
        check_model(checkpoint, forms_of(names_of(self.stages)))
        for stage in self.stages:
            read_model_state(checkpoint, stage.names)()
        for index, optimizer in self.optimizers.items():
            read_optimizer_state(checkpoint, optimizer, self.stages[index].names)()


def names_of(stages: Sequence[Stage]) -> dict[str, Tensor]:
    return {name: tensor for stage in stages for name, tensor in stage.names.items()}


def assert_same_state(a: Run, b: Run) -> None:
    ours, theirs = a.model.state_dict(), b.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    states = [{p: o.state[p] for o in run.optimizers.values() for p in o.state} for run in (a, b)]
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        left, right = states[0].get(p, {}), states[1].get(q, {})
        assert left.keys() == right.keys()
        for key, value in left.items():
            same = torch.equal(value, right[key]) if isinstance(value, Tensor) else value == right[key]
            assert same, key
            assert type(value) is type(right[key])


@pytest.mark.parametrize("factory", FACTORIES, ids=IDS)
@pytest.mark.parametrize(("before", "after"), [([2, 2, 2], [6]), ([6], [1, 1, 1, 1, 1, 1]), ([1, 5], [4, 2])])
def test_a_resumed_run_with_another_cut_is_bit_equal(
    tmp_path: Path, factory: Factory, before: list[int], after: list[int]
) -> None:
    straight = Run(0, before, factory)
    straight.train(range(5))
    straight.save(tmp_path, 5)
    resumed = Run(1, after, factory)
    resumed.train(range(2))  # what it did before loading must not matter
    resumed.load(tmp_path)
    assert_same_state(straight, resumed)
    options = [
        {k: v for k, v in run.optimizers[0].param_groups[0].items() if k != "params"} for run in (straight, resumed)
    ]
    assert options[0] == options[1]
    assert list(map(type, options[0].values())) == list(map(type, options[1].values()))

    straight.train(range(5, 9))
    resumed.train(range(5, 9))
    assert_same_state(straight, resumed)


def test_a_run_saved_before_its_first_step_resumes(tmp_path: Path) -> None:
    straight, resumed = Run(0, [3, 3], FACTORIES[0]), Run(1, [6], FACTORIES[0])
    straight.save(tmp_path, 0)
    resumed.train(range(2))
    resumed.load(tmp_path)
    straight.train(range(3))
    resumed.train(range(3))
    assert_same_state(straight, resumed)


def test_groups_keep_their_own_hyperparameters(tmp_path: Path) -> None:
    def factory(parameters: Iterable[Tensor]) -> Optimizer:
        parameters = list(parameters)
        vectors = [p for p in parameters if p.dim() == 1]
        return AdamW([{"params": vectors, "weight_decay": 0.0}, {"params": [p for p in parameters if p.dim() > 1]}])

    straight = Run(0, [6], factory)
    straight.save(tmp_path, 0)
    resumed = Run(0, [4, 2], factory)
    resumed.load(tmp_path)
    assert [group["weight_decay"] for o in resumed.optimizers.values() for group in o.param_groups] == [
        0.0,
        1e-2,
        0.0,
        1e-2,
    ]

    one_group = Run(0, [6], AdamW)
    with pytest.raises(CheckpointError, match=r"in one parameter group now.*; got weight_decay 0\.01 and 0\.0;"):
        one_group.load(tmp_path)


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    Run(0, [6], SGD).save(tmp_path, 0)
    with pytest.raises(CheckpointError, match=r"0\.weight was saved by another optimizer; got SGD; needed AdamW"):
        Run(0, [6], AdamW).load(tmp_path)


def test_a_parameter_without_saved_state_is_named(tmp_path: Path) -> None:
    def weights_only(parameters: Iterable[Tensor]) -> Optimizer:
        return SGD([p for p in parameters if p.dim() == 2])

    Run(0, [6], weights_only).save(tmp_path, 0)
    with pytest.raises(
        CheckpointError, match=r"no optimizer state of 0\.bias, 1\.weight, 1\.bias, 3\.bias, \.\.\. \(7"
    ):
        Run(0, [6], SGD).load(tmp_path)


def test_a_parameter_of_another_stage_is_refused() -> None:
    first, second = split_model(build(0), 2)
    with pytest.raises(CheckpointError, match="in no stage of this rank"):
        optimizer_state(SGD(second.parameters()), first.names)


def test_state_that_is_no_tensor_or_number_is_named() -> None:
    (stage,) = split_model(build(0), 1)
    optimizer = SGD(stage.parameters())
    optimizer.state[stage.layers[0].weight] = {"history": {}}
    with pytest.raises(CheckpointError, match="'history' of SGD cannot be saved; got dict"):
        optimizer_state(optimizer, stage.names)


def test_a_checkpoint_of_another_model_is_refused_with_the_differences(tmp_path: Path) -> None:
    Run(0, [3, 3], SGD).save(tmp_path, 0)
    checkpoint = Checkpoint.open(tmp_path)
    other = nn.Sequential(nn.Linear(8, 7), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8).double(), nn.Linear(8, 8))
    with pytest.raises(CheckpointError) as caught:
        check_model(checkpoint, forms_of(names_of(split_model(other, 2))))
    message = str(caught.value)
    assert f"the checkpoint in {tmp_path} is of another model" in message
    assert "unexpected: 5.bias" in message
    assert (
        "different: 0.weight is float32[8, 8], needed float32[7, 8], 0.bias is float32[8], needed float32[7]" in message
    )
    assert "3.weight is float32[8, 8], needed float64[8, 8]" in message
    assert "missing" not in message

    deeper = nn.Sequential(*build(0), *[nn.Linear(8, 8) for _ in range(3)])
    with pytest.raises(CheckpointError, match=r"missing: 6\.weight, 6\.bias, 7\.weight, 7\.bias, \.\.\. \(6 in all\)"):
        check_model(checkpoint, forms_of(names_of(split_model(deeper, 2))))


def test_a_model_that_does_not_fit_is_left_as_it_was(tmp_path: Path) -> None:
    Run(0, [3, 3], SGD).save(tmp_path, 0)
    model = build(1)
    model[4] = nn.LayerNorm(4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (stage,) = split_model(model, 1)
    with pytest.raises(CheckpointError, match=r"4\.weight is float32\[8\], needed float32\[4\]"):
        read_model_state(Checkpoint.open(tmp_path), stage.names)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
