"""Schedulers and other objects with a state, saved and restored with the checkpoint."""

from __future__ import annotations

import json
import random
import warnings
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import host_world
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from pipex.errors import CheckpointError
from pipex.state import Checkpoint, commit, object_state, read_object_state, write_shard
from tests.runtime.test_pipeline import data, pipeline


class Held:
    """Has a state; takes another."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def save(directory: Path, states: list[Any]) -> None:
    """A checkpoint of as many ranks as states."""
    saved = [object_state({"it": Held(state)}, rank) for rank, state in enumerate(states)]
    commit(directory, 1, [write_shard(directory, 1, rank, *parts) for rank, parts in enumerate(saved)], {})


def load(directory: Path, rank: int, ranks: int) -> Any:
    held = Held(None)
    read_object_state(Checkpoint.open(directory), {"it": held}, rank, ranks)()
    return held.state


STATES: dict[str, Any] = {
    "numbers": {"a": 1, "b": 0.1, "c": True, "d": None, "e": "text", "f": -(2**80), "g": float("inf"), "h": 1e-320},
    "no dict": 3,
    "nothing": {},
    "nested": [[], {}, (), ((1, 2), [3, {"x": (4,)}])],
    "keys": {0: "a", True: "b", None: "c", "1": "d", 1.5: "e", (2, "x"): "f", "tensor": 0, "dict": 1},
    "counter": Counter({30: 1, 80: 2}),
    "random": random.Random(3).getstate(),
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_a_state_comes_back_as_it_was(state: Any, tmp_path: Path) -> None:
    save(tmp_path, [state])
    found = load(tmp_path, 0, 1)
    assert repr(found) == repr(state)  # types and order too
    assert found == state


def test_tensors_in_it_come_back_with_their_bits(tmp_path: Path) -> None:
    tensors = [torch.randn(3, 4).t(), torch.tensor(float("nan")), torch.ones(2, dtype=torch.bool), torch.empty(0, 2)]
    save(tmp_path, [OrderedDict(a=tensors[:2], b=({"c": tensors[2]}, tensors[3]))])
    found = load(tmp_path, 0, 1)
    assert type(found) is dict
    for read, saved in zip([*found["a"], found["b"][0]["c"], found["b"][1]], tensors, strict=True):
        assert (read.dtype, read.shape) == (saved.dtype, saved.shape)
        assert repr(read.tolist()) == repr(saved.tolist())


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"a": [1, {2}]}, r"the state it\['a'\]\[1\] cannot be saved; got set"),
        ({"a": b"x"}, r"the state it\['a'\] cannot be saved; got bytes"),
        ({"a": {(1, b"x"): 2}}, r"the state it\['a'\], a key\[1\] cannot be saved; got bytes"),
        (defaultdict(int), "the state it cannot be saved; got defaultdict"),
        (lambda: None, "the state it cannot be saved; got function"),
        ({"a": torch.eye(2).to_sparse()}, "the tensor state/0/it/0 cannot be saved"),
    ],
)
def test_what_cannot_be_saved_is_named_by_its_place(state: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        save(tmp_path, [state])


def test_a_state_that_holds_itself_is_refused(tmp_path: Path) -> None:
    state: list[Any] = []
    state.append(state)
    with pytest.raises(CheckpointError, match="got containers more than 30 deep"):
        save(tmp_path, [state])
    deep: Any = 1
    for _ in range(30):
        deep = {"a": deep}
    save(tmp_path, [deep])
    assert load(tmp_path, 0, 1) == deep


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_what_is_the_same_on_all_ranks_is_for_any_number_of_them(ranks: int, tmp_path: Path) -> None:
    state = {"step": 3, "x": torch.tensor([float("nan"), 1.0])}
    save(tmp_path, [state, state, state])
    for rank in range(ranks):
        assert repr(load(tmp_path, rank, ranks)) == repr(state)


OTHERS: dict[str, tuple[Any, Any]] = {
    "number": (1, 2),
    "bits of a tensor": (torch.tensor(0.0), torch.tensor(-0.0)),
    "shape": (torch.zeros(2), torch.zeros(2, 1)),
    "type": (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
}


@pytest.mark.parametrize("states", OTHERS.values(), ids=OTHERS)
def test_what_differs_between_ranks_goes_back_to_as_many(states: tuple[Any, Any], tmp_path: Path) -> None:
    save(tmp_path, [*states])
    assert [repr(load(tmp_path, rank, 2)) for rank in range(2)] == [*map(repr, states)]
    for ranks in (1, 3):
        with pytest.raises(CheckpointError, match=f"different states of it; got rank 0 of {ranks}; needed as many"):
            load(tmp_path, 0, ranks)


def test_a_state_that_was_not_saved_is_named(tmp_path: Path) -> None:
    save(tmp_path, [1])
    with pytest.raises(CheckpointError, match="has no state 'other'; load without it"):
        read_object_state(Checkpoint.open(tmp_path), {"other": Held(None)}, 0, 1)


def test_an_object_without_a_state_is_named() -> None:
    with pytest.raises(
        CheckpointError, match="the state 'it' can be neither saved nor loaded; got an object of class int"
    ):
        object_state({"it": 3}, 0)  # type: ignore[dict-item]


# Every scheduler of torch goes on as if nothing had been.

Made = Callable[[torch.optim.Optimizer], Any]
SCHEDULERS: dict[str, Made] = {
    "step": lambda o: lr_scheduler.StepLR(o, 2),
    "multi-step": lambda o: lr_scheduler.MultiStepLR(o, [2, 4, 4], 0.5),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "constant": lambda o: lr_scheduler.ConstantLR(o, total_iters=4),
    "linear": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 6, 2.0),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, 2, mode="triangular2", cycle_momentum=False),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, 10),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


def go_on(made: Made, directory: Path, resume: bool) -> list[float]:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([parameter], 1e-2)
    scheduler = made(optimizer)
    rates = []
    if resume:
        load_both(directory, optimizer, scheduler)
    for step in range(3, 8) if resume else range(8):
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()
        if step == 2 and not resume:
            save_both(directory, optimizer, scheduler)
    return rates if resume else rates[3:]


def save_both(directory: Path, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    tensors, meta = object_state({"scheduler": scheduler, "optimizer": optimizer}, 0)
    commit(directory, 3, [write_shard(directory, 3, 0, tensors, meta)], {})


def load_both(directory: Path, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    read_object_state(Checkpoint.open(directory), {"scheduler": scheduler, "optimizer": optimizer}, 0, 1)()


@pytest.mark.parametrize("made", SCHEDULERS.values(), ids=SCHEDULERS)
def test_every_scheduler_of_torch_goes_on(made: Made, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the optimizer has made no step yet: this one was loaded
        expected = go_on(made, tmp_path, resume=False)
        assert go_on(made, tmp_path, resume=True) == expected
    assert len(set(expected)) > 1 or made in (SCHEDULERS["constant"],)


# In one call with the pipeline, on any number of ranks.


def run(directory: str, ends: int, resume: bool) -> list[Any]:
    pipe = pipeline()
    assert pipe.optimizer is not None
    scheduler = lr_scheduler.MultiStepLR(pipe.optimizer, [2, 4], 0.1)
    mine = Held(pipe.world.rank)
    objects = {"scheduler": scheduler, "mine": mine}
    if resume:
        if pipe.world.ranks != 2:
            del objects["mine"]  # another on each rank
        assert pipe.load(directory, state=objects) == {"note": 1}
    losses = []
    while pipe.steps < ends:
        losses.append(pipe.step(*data(8, pipe.steps)))
        scheduler.step()
    if not resume and ends == 3:
        pipe.save(directory, {"note": 1}, state=objects)
    return [losses, scheduler.get_last_lr(), mine.state]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_run_with_a_scheduler_goes_on_bit_for_bit(ranks: int, tmp_path: Path) -> None:
    host_world.launch(run, 2, args=(str(tmp_path), 3, False))
    whole = host_world.launch(run, 2, args=(str(tmp_path), 6, False))[0]
    for rank, (losses, rate, mine) in enumerate(host_world.launch(run, ranks, args=(str(tmp_path), 6, True))):
        assert losses == whole[0][3:]
        assert rate == whole[1] != [1e-2]
        assert mine == rank


def load_what_differs(directory: str) -> str:
    pipe = pipeline()
    mine = Held("before")
    with pytest.raises(CheckpointError) as caught:
        pipe.load(directory, state={"mine": mine})
    assert (pipe.steps, mine.state) == (0, "before")
    pipe.step(*data(8, 0))
    return str(caught.value)


def test_a_state_that_fits_no_other_number_of_ranks_changes_nothing(tmp_path: Path) -> None:
    host_world.launch(run, 2, args=(str(tmp_path), 3, False))
    for said in host_world.launch(load_what_differs, 3, args=(str(tmp_path),)):
        assert "the ranks that saved 'mine' in" in said


def save_what_cannot_be(directory: str) -> str:
    pipe = pipeline()
    state = {"it": Held({1} if pipe.world.rank else 1)}
    with pytest.raises(CheckpointError) as caught:
        pipe.save(directory, state=state)
    pipe.step(*data(8, 0))
    return str(caught.value)


def test_a_state_that_one_rank_cannot_save_is_said_on_all(tmp_path: Path) -> None:
    said = host_world.launch(save_what_cannot_be, 2, args=(str(tmp_path),))
    assert said[0] == said[1]
    assert "rank 1: the state it cannot be saved; got set" in said[0]
    assert list(tmp_path.iterdir()) == []


def test_an_object_that_does_not_take_its_state_is_named(tmp_path: Path) -> None:
    pipe = pipeline("gpipe")
    model = nn.Linear(3, 3)
    pipe.save(tmp_path, state={"ema": model})
    with pytest.raises(CheckpointError, match=r"Linear does not take the state 'ema' in .*; got RuntimeError: Error"):
        pipe.load(tmp_path, state={"ema": nn.Linear(3, 4)})
    again, other = pipeline("gpipe"), nn.Linear(3, 3)
    again.load(tmp_path, state={"ema": other})
    assert torch.equal(other.weight, model.weight)


def test_states_are_json_and_safetensors(tmp_path: Path) -> None:
    save(tmp_path, [{"a": (1, torch.ones(2))}])
    meta = json.loads((tmp_path / "checkpoint.json").read_text())["checkpoint"]["shards"][0]["meta"]
    assert meta == {"state/0/it": {"dict": [["a", {"tuple": [1, {"tensor": 0}]}]]}}
    tensor: Tensor = Checkpoint.open(tmp_path).load(["state/0/it/0"])["state/0/it/0"]
    assert tensor.tolist() == [1.0, 1.0]
