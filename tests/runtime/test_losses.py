"""Losses as sums and counts: the token mean of one process, which does not use pipex, bit for bit."""

from __future__ import annotations

from functools import partial
from typing import Any

import host_world
import pytest
import torch
from torch import Tensor, nn

import pipex
from pipex.errors import InputError

SEQUENCE, VOCABULARY = 16, 13
IGNORED = -100
LABELS = {  # tokens of each micro-batch that are to be learned: prompts masked, and a micro-batch of nothing but prompt
    "prompts": (16, 8, 1, 4),
    "one without": (16, 0, 1, 4),
    "all": (32, 32, 32, 32),
}


def model() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, VOCABULARY)
    )


def data(step: int, labels: str) -> tuple[Tensor, Tensor]:
    """Two samples in each of four micro-batches."""
    ids = torch.randint(0, VOCABULARY, (8, SEQUENCE), generator=torch.Generator().manual_seed(step))
    target = ids.roll(-1, 1)
    for microbatch, count in enumerate(LABELS[labels]):
        target[2 * microbatch : 2 * microbatch + 2].view(-1)[: 2 * SEQUENCE - count] = IGNORED
    return ids, target


def total_of(target: Tensor) -> int:
    return int((target != IGNORED).sum())


def sum_of(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="sum")


def tokens(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return sum_of(output, target), (target != IGNORED).sum()


class Witness:
    """An optimizer's factory that keeps the gradients of every update."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def __call__(self, parameters: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        optimizer.register_step_pre_hook(
            lambda *_: self.seen.append({name: p.grad.clone() for name, p in parameters.named})
        )
        return optimizer


Found = tuple[list[float], list[dict[str, Tensor]]]


def train(family: str, labels: str, told: bool, calls: int, clip_norm: float | None) -> Found:
    ranks, witness = pipex.current_world().ranks, Witness()
    pipe = pipex.Pipeline(
        pipex.split_model(model(), ranks), pipex.build(family, ranks, 4), tokens, optimizer=witness, clip_norm=clip_norm
    )
    losses = []
    for step in range(3):
        batches = [data(10 * step + call, labels) for call in range(calls)]
        total = sum(total_of(target) for _, target in batches) if told else None
        losses += [pipe.forward_backward(*batch, total=total) for batch in batches]
        pipe.update()
        losses.append(pipe.evaluate(*data(step + 100, labels)))
    return losses, witness.seen


def one_process(labels: str, told: bool, calls: int, clip_norm: float | None) -> Found:
    """Divides the summed loss by the count; or, where it is not told that before, the gradients."""
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    losses: list[float] = []
    seen = []
    for step in range(3):
        batches = [data(10 * step + call, labels) for call in range(calls)]
        total = sum(total_of(target) for _, target in batches)
        for ids, target in batches:
            summed = torch.zeros(())
            for x, y in zip(ids.split(2), target.split(2), strict=True):
                loss = sum_of(net(x), y)
                (loss / total if told else loss).backward()
                summed = summed + loss.detach()
            losses.append((summed / (total if told else total_of(target))).item())
        if not told:
            for parameter in net.parameters():
                parameter.grad /= total
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip_norm)
        seen.append({name: p.grad.clone() for name, p in net.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
        ids, target = data(step + 100, labels)
        with torch.no_grad():
            summed = sum(
                (sum_of(net(x), y) for x, y in zip(ids.split(2), target.split(2), strict=True)), torch.zeros(())
            )
        losses.append((summed / total_of(target)).item())
    return losses, seen


def assert_same(
    family: str, ranks: int, labels: str, told: bool, calls: int = 1, clip_norm: float | None = None
) -> None:
    losses, gradients = one_process(labels, told, calls, clip_norm)
    names = set()
    for theirs, seen in host_world.launch(train, ranks, args=(family, labels, told, calls, clip_norm)):
        assert theirs == losses
        for expected, found in zip(gradients, seen, strict=True):
            names |= found.keys()
            for name, gradient in found.items():
                assert torch.equal(gradient, expected[name]), name
    assert names == gradients[0].keys()


@pytest.mark.parametrize("told", [True, False], ids=["told the total", "not told"])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_token_mean_has_the_bits_of_one_process(ranks: int, labels: str, told: bool) -> None:
    assert_same("1f1b", ranks, labels, told)


@pytest.mark.parametrize("told", [True, False], ids=["told the total", "not told"])
@pytest.mark.parametrize("family", ["gpipe", "1f1b", "zb-h1"])
def test_the_token_mean_of_several_calls_clipped(family: str, told: bool) -> None:
    assert_same(family, 2, "one without", told, calls=2, clip_norm=0.3)


@pytest.mark.parametrize("told", [True, False], ids=["told the total", "not told"])
@pytest.mark.parametrize("labels", LABELS)
def test_the_token_mean_is_that_of_the_whole_batch(labels: str, told: bool) -> None:
    """In float64 to rounding, beside cross_entropy's own mean."""
    net = model().double()
    ids, target = data(0, labels)
    whole = nn.functional.cross_entropy(net(ids).flatten(0, 1), target.flatten(), ignore_index=IGNORED)
    whole.backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}

    pipe = pipex.Pipeline(
        pipex.split_model(model().double(), 1), pipex.build("zb-h1", 1, 4), tokens,
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )  # fmt: skip
    loss = pipe.forward_backward(ids, target, total=total_of(target) if told else None)
    pipe.reduce_gradients()
    assert abs(loss - whole.item()) < 1e-14
    for name, parameter in pipe.local_stages[0].names.items():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-12, atol=1e-15)


def solo(loss: Any) -> pipex.Pipeline:
    optimizer = partial(torch.optim.SGD, lr=0.1)
    return pipex.Pipeline(pipex.split_model(model(), 1), pipex.build("1f1b", 1, 4), loss, optimizer=optimizer)


def test_nothing_counted_is_an_error_and_the_next_step_is_right() -> None:
    pipe, other = solo(tokens), solo(tokens)
    ids, target = data(0, "all")
    with pytest.raises(InputError, match="nothing was counted"):
        pipe.step(ids, torch.full_like(target, IGNORED))
    assert pipe.step(ids, target) == other.step(ids, target)
    assert pipe.step(*data(1, "prompts")) == other.step(*data(1, "prompts"))


@pytest.mark.parametrize(
    ("loss", "shown"),
    [
        (lambda o, t: (sum_of(o, t), "3"), "got .*, str"),
        (lambda o, t: (sum_of(o, t), True), "got .*, bool"),
        (lambda o, t: (sum_of(o, t),), "or its sum and count"),
        (lambda o, t: (sum_of(o, t), torch.ones(2)), "or its sum and count"),
        (lambda o, t: (sum_of(o, t), torch.tensor(3 + 0j)), r"got \(\(\), complex \(\)\); needed a real tensor"),
        (lambda o, t: sum_of(o, t) + 0j, r"got complex \(\); needed a real tensor"),
        (lambda o, t: (sum_of(o, t), -1), "a count that counts nothing"),
        (lambda o, t: (sum_of(o, t), float("nan")), "a count that counts nothing"),
        (
            lambda o, t: (sum_of(o, t), 3) if t[0, 0] == IGNORED else sum_of(o, t),
            "a mean for one micro-batch and a sum",
        ),
    ],
)
def test_a_sum_without_a_usable_count_is_refused(loss: Any, shown: str) -> None:
    target = data(0, "all")[1]
    target[:2] = IGNORED
    with pytest.raises(InputError, match=shown):
        solo(loss).step(data(0, "all")[0], target)


@pytest.mark.parametrize("total", [0, -2, float("inf"), float("nan"), "4", True, torch.ones(2)])
def test_a_total_that_cannot_divide_is_refused(total: Any) -> None:
    pipe = solo(tokens)
    with pytest.raises(InputError, match="total cannot divide a loss"):
        pipe.step(*data(0, "all"), total=total)
    pipe.step(*data(0, "all"), total=torch.tensor(128))


def test_a_total_of_means_is_refused() -> None:
    with pytest.raises(InputError, match="a loss function that returns a mean"):
        solo(lambda o, t: sum_of(o, t)).step(*data(0, "all"), total=128)


def test_means_and_sums_do_not_add_up() -> None:
    means = [True, False]
    pipe = solo(lambda o, t: sum_of(o, t) if means[0] else tokens(o, t))
    pipe.forward_backward(*data(0, "all"))
    means.reverse()
    pipe.forward_backward(*data(0, "all"))
    with pytest.raises(InputError, match="gradients of means and of sums"):
        pipe.update()
    assert pipe.step(*data(0, "all")) == solo(tokens).step(*data(0, "all"))
