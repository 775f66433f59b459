"""What a batch may be: every structure trains as plain torch does with the micro-batches cut by hand."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import host_world
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pipex
from pipex.errors import ConfigMismatch, InputError, PeerFailed
from pipex.runtime import microbatch
from pipex.runtime.microbatch import Whole

CPU = torch.device("cpu")


def nested(*rows: int, layout: torch.layout = torch.strided) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls them a prototype
        return torch.nested.nested_tensor([torch.ones(n, 2) for n in rows], layout=layout)


NESTED, JAGGED = nested(1, 4), nested(1, 2, 5, layout=torch.jagged)


def cut(value: Any, microbatches: int) -> list[Any]:
    return microbatch.cut(value, microbatch.look(value, "batch", microbatches), microbatches, CPU)


class Pair(NamedTuple):
    ids: Tensor
    note: str


def test_what_is_cut_and_what_is_not() -> None:
    x, table, scalar = torch.arange(10).view(5, 2), torch.arange(2).view(1, 2), torch.tensor(7)
    thing = object()
    batch = {"x": x, "table": table, "nested": (scalar, [x, None], Pair(x, "as it is"), {"k": thing}), "n": 3, "e": ()}
    first, second = cut(batch, 2)
    for piece, rows in ((first, x[:3]), (second, x[3:])):
        assert list(piece) == list(batch)
        assert torch.equal(piece["x"], rows)
        assert piece["table"] is table
        found_scalar, found_list, pair, inner = piece["nested"]
        assert found_scalar is scalar
        assert torch.equal(found_list[0], rows)
        assert found_list[1] is None
        assert isinstance(pair, Pair)
        assert torch.equal(pair.ids, rows)
        assert pair.note == "as it is"
        assert inner == {"k": thing}
        assert (piece["n"], piece["e"]) == (3, ())


def test_what_is_marked_whole_goes_to_every_micro_batch() -> None:
    x, square = torch.arange(8).view(4, 2), torch.arange(16).view(4, 4)
    for a, b in cut((x, Whole(square)), 2):
        assert len(a) == 2
        assert b is square
    for _, held in cut((x, Whole({"any": [square, torch.ones(3)]})), 2):
        assert held["any"][0] is square


def test_a_batch_of_one_sample_is_one_micro_batch() -> None:
    (piece,) = cut((torch.ones(1, 3), torch.ones(1, 2)), 1)
    assert [tuple(t.shape) for t in piece] == [(1, 3), (1, 2)]


def test_ready_micro_batches_are_left_alone() -> None:
    pieces = [torch.ones(2, 5), (torch.ones(3), "text"), {"x": torch.eye(3).to_sparse()}, NESTED, (JAGGED,)]
    for found, piece in zip(cut(pieces, 5), pieces, strict=True):
        assert type(found) is type(piece)
    assert cut(pieces, 5)[0] is pieces[0]
    assert microbatch.look(pieces, "batch", 5).samples == (2, 3, 3, 2, 3)
    assert microbatch.look(pieces, "batch", 5).forms[3:] == ("nested float32[2, ...]", "(nested float32[3, ...])")


def test_a_layer_that_writes_into_its_micro_batch_spoils_no_other() -> None:
    """Views of one batch share what autograd checks; these do not, and write to the batch's memory all the same."""
    batch = torch.ones(4, 2)
    weight = torch.ones(2, 2, requires_grad=True)
    first, second = cut(batch, 2)
    output = first @ weight
    second.mul_(3)
    output.sum().backward()
    assert weight.grad is not None
    assert torch.equal(batch, torch.tensor([[1.0, 1], [1, 1], [3, 3], [3, 3]]))


class Two(nn.Module):
    def forward(self, x: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        return x * scale, x


class Sum(nn.Module):
    def forward(self, x: Tensor, y: Tensor, scale: float = 0.0) -> Tensor:
        return x + y + scale


def test_keywords_are_the_first_layer_s_alone() -> None:
    (stage,) = pipex.split_model(nn.Sequential(Two(), Sum()), 1)
    inputs = microbatch.as_arguments({"x": torch.ones(2), "scale": 3.0})
    assert torch.equal(stage(*inputs), torch.full((2,), 4.0))


@pytest.mark.parametrize(
    ("batch", "microbatches", "shown"),
    [
        (
            (torch.ones(4, 2), torch.ones(6, 2)),
            2,
            r"no common number of samples; got \(float32\[4, 2\], .* 4 and 6 rows",
        ),
        (torch.ones(3, 2), 4, "3 samples for 4 micro-batches"),
        (torch.ones(0, 2), 1, "0 samples for 1 micro-batches"),
        (torch.eye(4).to_sparse(), 2, "got a torch.sparse_coo tensor; needed a dense one"),
        ({"x": NESTED}, 2, "got a nested tensor; needed a dense one; pass a list of ready micro-batches"),
        (torch.ones(4, 2, device="meta"), 2, "a tensor of the batch has no values; got one on the meta device"),
        ([torch.ones(2), torch.ones(2, device="meta")], 2, "has no values; got one on the meta device"),
        ([torch.ones(2), torch.ones(2)], 3, "a list is a batch of ready micro-batches; got 2 of them; needed 3"),
    ],
)
def test_a_batch_that_cannot_be_cut_is_named(batch: Any, microbatches: int, shown: str) -> None:
    with pytest.raises(InputError, match=shown):
        cut(batch, microbatches)


class First(nn.Module):
    """As a language model's first stage is called: with keywords, some of them None, and a table that is not cut."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(11, 6), nn.Embedding(50, 6)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        scale: float = 1.0, nothing: None = None,
    ) -> Tensor:  # fmt: skip
        x = self.embed(input_ids)
        places = torch.arange(x.shape[1])[None] if position_ids is None else position_ids
        x = x + self.place(places)
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        assert nothing is None
        return x * scale


def model() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(First(), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 11))


def loss(output: Tensor, target: Any) -> Tensor:
    """``target``: labels, or labels and what they weigh, in a tuple or in a dict."""
    if isinstance(target, dict):
        target = target["labels"], target["weight"]
    labels, weight = target if isinstance(target, tuple) else (target, 1.0)
    return nn.functional.cross_entropy(output.flatten(0, 1), labels.flatten()) * weight


def ids(step: int, samples: int = 6, length: int = 5) -> Tensor:
    return torch.randint(0, 11, (samples, length), generator=torch.Generator().manual_seed(step))


Call = tuple[tuple[Any, ...], dict[str, Any]]


def case(name: str, step: int) -> tuple[Any, Any, list[tuple[Call, Any]]]:
    """Batch and target, and by hand for each of 3 micro-batches the call of the first layer and the target."""
    x, y, table = ids(step), ids(step + 50), torch.arange(5)[None]
    mask = (ids(step + 90) > 2).float()
    rows = [slice(0, 2), slice(2, 4), slice(4, 6)]
    if name == "tensor":
        return x, y, [(((x[r],), {}), y[r]) for r in rows]
    if name == "tuple with None":
        return (x, None, table), y, [(((x[r], None, table), {}), y[r]) for r in rows]
    if name == "keywords":
        batch = {"position_ids": table, "attention_mask": mask, "input_ids": x, "nothing": None, "scale": 0.5}
        return (
            batch,
            {"labels": y, "weight": torch.tensor(0.25)},
            [(((), {**batch, "attention_mask": mask[r], "input_ids": x[r]}), (y[r], 0.25)) for r in rows],
        )
    if name == "ready":
        pieces = [ids(step + m, samples=2, length=4 + 3 * m) for m in range(3)]
        targets = [ids(step + 20 + m, samples=2, length=4 + 3 * m) for m in range(3)]
        return pieces, targets, [(((piece,), {}), wanted) for piece, wanted in zip(pieces, targets, strict=True)]
    assert name == "ready keywords"
    pieces = [{"input_ids": ids(step + m, 2, 7 - m), "attention_mask": None} for m in range(3)]
    targets = [(ids(step + 20 + m, 2, 7 - m), 0.5) for m in range(3)]
    return pieces, targets, [(((), piece), wanted) for piece, wanted in zip(pieces, targets, strict=True)]


NAMES = ("tensor", "tuple with None", "keywords", "ready", "ready keywords")


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


Found = tuple[list[float], dict[str, Tensor]]


def train(names: Sequence[str], family: str, only_where_needed: bool) -> Found:
    world = pipex.current_world()
    pipe = pipex.Pipeline(
        pipex.split_model(model(), world.ranks), pipex.build(family, world.ranks, 3), loss, optimizer=sgd
    )
    losses = []
    for step, name in enumerate(names):
        batch, target, _ = case(name, step)
        if only_where_needed:
            batch, target = batch if world.rank == 0 else None, target if world.rank == world.ranks - 1 else None
        losses += [pipe.step(batch, target), pipe.evaluate(batch, target)]
    return losses, {name: tensor.detach() for stage in pipe.local_stages for name, tensor in stage.names.items()}


@pytest.mark.parametrize("only_where_needed", [False, True], ids=["everywhere", "where needed"])
@pytest.mark.parametrize(("family", "ranks"), [("1f1b", 1), ("zb-h1", 2), ("1f1b", 3)])
@pytest.mark.parametrize("names", [*((name, name) for name in NAMES), NAMES], ids=[*NAMES, "one after another"])
def test_every_structure_of_a_batch(names: Sequence[str], family: str, ranks: int, only_where_needed: bool) -> None:
    net = model()
    optimizer = sgd(net.parameters())
    losses = []
    for step, name in enumerate(names):
        for training in (True, False):
            summed = torch.zeros(())
            for (args, keywords), wanted in case(name, step)[2]:
                part = loss(net[1:](net[0](*args, **keywords)), wanted) * (2 / 6)
                if training:
                    part.backward()
                summed = summed + part.detach()
            losses.append(summed.item())
            if training:
                optimizer.step()
                optimizer.zero_grad()
    found = host_world.launch(train, ranks, args=(names, family, only_where_needed))
    expected = dict(net.named_parameters())
    for theirs, held in found:
        assert theirs == losses
        for parameter, tensor in held.items():
            assert torch.equal(tensor, expected[parameter]), parameter
    assert set().union(*(held for _, held in found)) == expected.keys()


def lengths() -> list[float]:
    pipe = pipex.Pipeline(
        pipex.split_model(model(), pipex.current_world().ranks), pipex.build("1f1b", pipex.current_world().ranks, 50),
        loss, optimizer=sgd,
    )  # fmt: skip
    return [
        pipe.step([ids(m, 1, m + 1) for m in range(50)], [ids(m + 9, 1, m + 1) for m in range(50)]) for _ in range(2)
    ]


def test_fifty_ready_micro_batches_of_fifty_lengths() -> None:
    net = model()
    optimizer = sgd(net.parameters())
    losses = []
    for _ in range(2):
        summed = torch.zeros(())
        for m in range(50):
            part = loss(net(ids(m, 1, m + 1)), ids(m + 9, 1, m + 1)) * (1 / 50)
            part.backward()
            summed = summed + part.detach()
        losses.append(summed.item())
        optimizer.step()
        optimizer.zero_grad()
    assert host_world.launch(lengths, 2) == [losses] * 2


def few_and_many() -> list[float]:
    pipe = pipeline()
    lists = [ids(m, 1, m + 1) for m in range(7)], [ids(m + 9, 1, m + 1) for m in range(7)]
    found = [pipe.evaluate(ids(0, samples), ids(1, samples)) for samples in (1, 2, 5)]
    found += [pipe.evaluate(*lists), pipe.evaluate(lists[0][:2], lists[1][:2]), pipe.step(ids(0), ids(1))]
    with pytest.raises(InputError, match="7 and 6 micro-batches"):
        pipe.evaluate(lists[0], lists[1][1:])
    with pytest.raises(InputError, match="0 samples"):
        pipe.evaluate(ids(0, 0), ids(0, 0))
    return [*found, pipe.evaluate(*lists)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_evaluation_needs_no_micro_batches_of_the_plan(ranks: int) -> None:
    net = model()

    def mean(pieces: list[tuple[Tensor, Tensor]], samples: int) -> float:
        summed = torch.zeros(())
        for x, y in pieces:
            summed = summed + loss(net(x), y).detach() * (len(x) / samples)
        return summed.item()

    expected = [mean(list(zip(ids(0, n).tensor_split(min(n, 3)), ids(1, n).tensor_split(min(n, 3)), strict=True)), n)
                for n in (1, 2, 5)]  # fmt: skip
    ready = [(ids(m, 1, m + 1), ids(m + 9, 1, m + 1)) for m in range(7)]
    cut_by_hand = list(zip(ids(0).split(2), ids(1).split(2), strict=True))
    expected += [mean(ready, 7), mean(ready[:2], 2), mean(cut_by_hand, 6)]
    optimizer = sgd(net.parameters())
    for x, y in cut_by_hand:
        (loss(net(x), y) * (2 / 6)).backward()
    optimizer.step()
    assert host_world.launch(few_and_many, ranks) == [[*expected, mean(ready, 7)]] * ranks


def pipeline() -> pipex.Pipeline:
    ranks = pipex.current_world().ranks
    return pipex.Pipeline(pipex.split_model(model(), ranks), pipex.build("1f1b", ranks, 3), loss, optimizer=sgd)


@pytest.mark.parametrize(
    ("batch", "target", "shown"),
    [
        ([ids(0), ids(1), ids(2)], ids(3), "a list of ready micro-batches, a target that is to be cut"),
        (ids(0), [ids(0, 2), ids(1, 2), ids(2, 2)], "a target that is a list of ready micro-batches"),
        ([ids(0), ids(1)], [ids(0), ids(1)], "got 2 of them; needed 3, as many as the plan has"),
        ({"input_ids": ids(0), 3: None}, ids(0), "keyword arguments of the first stage; got keys"),
        ({"input_ids": ids(0), "attention_mask": ids(0, 5)}, ids(0), "5 and 6 rows"),
        (ids(0), torch.ones(1, 5), "the target is too small for the plan; got 1 samples"),
        ("text", ids(0), "nothing in the batch can be cut into micro-batches; got str"),
        ((torch.tensor(3.0), None), ids(0), "nothing in the batch can be cut"),
        (ids(0).numpy(), ids(0), "nothing in the batch can be cut into micro-batches; got ndarray"),
        ([ids(0, 0)] * 3, [ids(0, 0)] * 3, "the ready micro-batches of the batch are all empty; got 0 samples"),
    ],
)
def test_a_batch_that_does_not_fit_is_an_error_and_the_next_step_is_right(batch: Any, target: Any, shown: str) -> None:
    pipe, other = pipeline(), pipeline()
    with pytest.raises(InputError) as error:
        pipe.step(batch, target)
    assert shown in str(error.value)
    x = {"input_ids": ids(0), "position_ids": torch.arange(5)[None]}
    assert pipe.step(x, ids(1)) == other.step(x, ids(1))


class Ambiguous:
    """As an array is, of more than one element: neither true nor false."""

    def __bool__(self) -> bool:
        raise ValueError("the truth value is ambiguous")

    def __len__(self) -> int:
        raise TypeError("no length")


def test_what_has_no_truth_value_goes_to_every_micro_batch() -> None:
    array, thing, x = np.arange(3), Ambiguous(), torch.arange(4).view(4, 1)
    for piece in cut({"x": x, "more": (array, thing, (), [array])}, 2):
        found, same, _, (inner,) = piece["more"]
        assert found is array
        assert inner is array
        assert same is thing


def all_empty() -> list[str]:
    pipe, found = pipeline(), []
    for call in (pipe.step, pipe.evaluate):
        with pytest.raises(InputError) as error:
            call([ids(0, 0)] * 3, [ids(0, 0)] * 3)
        found.append(str(error.value))
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_ready_micro_batches_without_a_sample_are_refused_everywhere(ranks: int) -> None:
    for texts in host_world.launch(all_empty, ranks):
        assert all("are all empty; got 0 samples; needed at least one" in text for text in texts)


def test_a_ready_micro_batch_weighs_as_what_is_cut() -> None:
    table, x = torch.arange(5)[None], ids(0, 5)
    pieces = cut((table, x), 2)
    assert microbatch.look(pieces, "batch", 2).samples == microbatch.look((table, x), "batch", 2).samples == (3, 2)
    both = [(torch.ones(n, 3), torch.ones(16, 3)) for n in (1, 3, 1)]
    assert microbatch.look(both, "batch", 3).samples == (1, 3, 1)
    assert microbatch.look(both[:1] * 3, "batch", 3).samples == (16, 16, 16)  # alike, whichever tensor it is
    assert microbatch.look([(Whole(torch.eye(7)), ids(0, 1)), ids(1, 0), None], "batch", 3).samples == (1, 0, 1)


def differ() -> None:
    rank = pipex.current_world().rank
    pipeline().step({"input_ids": ids(0), "scale": None if rank else 1.0}, ids(0))


def test_ranks_with_other_structures_are_told_both() -> None:
    with pytest.raises(PeerFailed, match=ConfigMismatch.__name__) as error:
        host_world.launch(differ, 2)
    assert "scale: float" in str(error.value)
    assert "scale: None" in str(error.value)
