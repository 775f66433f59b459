"""``loss_fn="model"`` in the runtime, beside one process that does not use pipex.

The stages here apply layers of which the last one computes the loss, from labels that have travelled with the
activations.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from types import SimpleNamespace
from typing import Any

import host_world
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pipex
from pipex.errors import ConfigMismatch, InputError, PeerFailed
from pipex.partition import Stage
from pipex.partition.own_forward.loss import Means
from pipex.plan.memory import with_promise

ROWS, SEQUENCE, VOCABULARY, WIDTH, BLOCKS = 8, 6, 13, 8, 4
IGNORED = -100
COUNTS = (9, 4, 0, 2)  # tokens of each of four micro-batches that are to be learned


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        return (self.table(ids),) if labels is None else (self.table(ids), labels)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, *labels: Tensor) -> tuple[Tensor, ...]:
        return x + F.gelu(self.linear(x)), *labels


class Head(nn.Module):
    """``more``: in the loss: nothing, the ``squares`` of what comes in, or a ``second`` mean over other tokens."""

    def __init__(self, more: str) -> None:
        super().__init__()
        self.linear, self.more = nn.Linear(WIDTH, VOCABULARY), more

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.linear(x)
        if labels is None:
            return SimpleNamespace(logits=logits, loss=None)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        if self.more == "squares":
            loss = loss + 0.1 * x.square().mean()
        if self.more == "second":
            loss = loss + F.cross_entropy(logits[:, 1:].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss)


class OwnForward(Stage):
    """As a stage that runs the model's own forward."""

    def forward(self, *inputs: Any) -> Any:
        with Means() as means:
            output = super().forward(*inputs)
        return means.of(output) if self.own_loss else output


def layers(more: str) -> list[nn.Module]:
    torch.manual_seed(4)
    return [Embedding(), *(Block() for _ in range(BLOCKS)), Head(more)]


def stages(count: int, more: str = "", seen: bool | None = True) -> list[Stage]:
    model = nn.Sequential(*layers(more))
    parts = pipex.split_model(model, count)
    for part in parts:
        part.__class__ = OwnForward
        part.loss_seen = seen
    return parts


def data(step: int, counts: tuple[int, ...] = COUNTS) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (ROWS, SEQUENCE), generator=torch.Generator().manual_seed(step))
    labels = ids.roll(-1, 1)
    per = ROWS // len(counts)
    for microbatch, count in enumerate(counts):
        labels[per * microbatch : per * (microbatch + 1)].view(-1)[: per * SEQUENCE - count] = IGNORED
    return {"ids": ids, "labels": labels}


def plan_of(family: str, ranks: int) -> pipex.Plan:
    """``recomputed``: 1F1B whose last stage is; it computes its loss twice."""
    if family == "recomputed":
        return with_promise(dataclasses.replace(pipex.build("1f1b", ranks, 4), recomputed=(ranks - 1,)))
    return pipex.build(family, ranks, 4)


Found = tuple[list[float], list[dict[str, Tensor]]]


def train(family: str, more: str, total: bool, scaled: bool) -> Found:
    """Only the first rank (of each copy) gets the batch, and no rank a target."""
    world = pipex.current_world()
    plan = plan_of(family, world.ranks)
    seen: list[dict[str, Tensor]] = []

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        made = torch.optim.SGD(parameters, lr=0.1)
        made.register_step_pre_hook(
            lambda *_: seen.append({name: p.grad.clone() for name, p in parameters.named if p.grad is not None})
        )
        return made

    pipe = pipex.Pipeline(
        stages(plan.placement.pieces, more), plan, "model", optimizer=optimizer,
        scaler=torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None,
    )  # fmt: skip
    first = world.rank in {plan.placement.rank_of(pipe[0]) for pipe in plan.placement.pipes}
    losses = []
    for step in range(3):
        batch = data(step) if first else None
        losses.append(pipe.step(batch, total=sum(COUNTS) if total else None))
        losses.append(pipe.evaluate(batch))
    return losses, seen


def one_process(more: str, total: bool) -> Found:
    """Sums of losses by hand. With more in it, a loss is that of its micro-batch times its count."""
    model = nn.Sequential(*layers(more))
    embedding, *blocks, head = model
    losses, seen = [], []

    def sum_of(microbatch: int, batch: dict[str, Tensor]) -> Tensor:
        rows = slice(2 * microbatch, 2 * microbatch + 2)
        x = embedding.table(batch["ids"][rows])
        for block in blocks:
            (x,) = block(x)
        target, logits = batch["labels"][rows].flatten(), head.linear(x).flatten(0, 1)
        summed = F.cross_entropy(logits, target, reduction="sum")
        return summed + 0.1 * x.square().mean() * COUNTS[microbatch] if more else summed

    for step in range(3):
        value = torch.zeros(())
        for microbatch in range(4):
            loss = sum_of(microbatch, data(step))
            (loss / sum(COUNTS) if total else loss).backward()
            value = value + loss.detach()
        losses.append((value / sum(COUNTS)).item())
        for parameter in model.parameters():
            if not total:
                parameter.grad /= sum(COUNTS)
        seen.append({name: p.grad.clone() for name, p in model.named_parameters()})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(parameter.grad, alpha=-0.1)
                parameter.grad = None
            losses.append((sum(sum_of(m, data(step)) for m in range(4)) / sum(COUNTS)).item())
    return losses, seen


@pytest.mark.parametrize("more", ["", "squares"], ids=["tokens", "with more in it"])
@pytest.mark.parametrize("total", [False, True], ids=["not told", "told the total"])
@pytest.mark.parametrize(
    ("family", "ranks"),
    [("1f1b", 1), ("1f1b", 2), ("zb-h1", 3), ("zbv", 2), ("interleaved", 2), ("dualpipe", 2), ("recomputed", 2)],
)
def test_the_loss_is_the_mean_over_the_tokens_of_all_micro_batches(
    family: str, ranks: int, total: bool, more: str
) -> None:
    losses, gradients = one_process(more, total)
    exact = family != "dualpipe" and not more  # two copies add up in another order; loss × count is rounded once more
    names = set()
    for theirs, seen in host_world.launch(train, ranks, args=(family, more, total, False)):
        torch.testing.assert_close(theirs, losses, rtol=0 if exact else 1e-6, atol=0)
        assert len(seen) == 3
        for expected, found in zip(gradients, seen, strict=True):
            names |= found.keys()
            for name, gradient in found.items():
                torch.testing.assert_close(
                    gradient, expected[name], rtol=0 if exact else 1e-5, atol=0 if exact else 1e-7, msg=name
                )
    assert names == gradients[0].keys()


def test_scaled_gradients_are_the_same() -> None:
    plain, scaled = (host_world.launch(train, 2, args=("1f1b", "", False, scale)) for scale in (False, True))
    for (losses, seen), (theirs, found) in zip(plain, scaled, strict=True):
        assert losses == theirs
        for expected, gradients in zip(seen, found, strict=True):
            assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())


# What cannot be.


def solo(more: str = "", seen: bool | None = True, family: str = "1f1b", loss: Any = "model") -> pipex.Pipeline:
    return pipex.Pipeline(stages(1, more, seen), pipex.build(family, 1, 4), loss,
                          optimizer=partial(torch.optim.SGD, lr=0.1))  # fmt: skip


@pytest.mark.parametrize(
    ("made", "shown"),
    [
        (partial(solo, seen=None), "got stages that apply its layers one after another.*sample"),
        (partial(solo, seen=False), "got none in what it has returned for the sample; needed a sample with labels"),
        (partial(solo, family="pipedream"), "got loss_fn='model', a mean over all micro-batches.*output.loss"),
        (partial(solo, loss="tokens"), "loss_fn must be a function; got 'tokens'; needed .* or 'model'"),
    ],
)
def test_what_has_no_loss_of_its_own_is_refused(made: Any, shown: str) -> None:
    with pytest.raises(InputError, match=shown):
        made()


@pytest.mark.parametrize(
    ("batch", "target", "shown"),
    [
        (data(0), data(0)["labels"], "takes the labels out of the batch; got a target; needed none"),
        ({**data(0), "num_items_in_batch": 9}, None, "num_items_in_batch, by which each .* leave it out"),
        ([{**data(0), "num_items_in_batch": torch.tensor(9)}] * 4, None, "num_items_in_batch"),
    ],
)
@pytest.mark.parametrize("call", ["step", "forward_backward", "evaluate"])
def test_a_batch_that_says_the_loss_twice_is_refused_and_the_next_is_right(
    call: str, batch: Any, target: Any, shown: str
) -> None:
    pipe = solo()
    with pytest.raises(InputError, match=shown):
        getattr(pipe, call)(batch, target)
    assert pipe.step(data(0)) == solo().step(data(0))


def test_a_batch_without_labels_is_refused() -> None:
    with pytest.raises(InputError, match=r"the model returned no loss.*put the labels into the batch"):
        solo().step({"ids": data(0)["ids"]})


def test_a_function_still_needs_a_target() -> None:
    pipe = solo(loss=lambda output, target: F.cross_entropy(output.logits.flatten(0, 1), target.flatten()))
    with pytest.raises(InputError, match="holds the last stage and needs the target"):
        pipe.step(data(0))
    pipe.step({"ids": data(0)["ids"]}, data(0)["labels"].clamp(0))


def test_stages_that_had_the_models_loss_can_have_a_function() -> None:
    parts, plan = stages(1), pipex.build("1f1b", 1, 4)
    pipex.Pipeline(parts, plan, "model")
    pipe = pipex.Pipeline(parts, plan, lambda output, target: output.loss)
    full = data(0, (12, 12, 12, 12))
    assert pipe.evaluate(full, full["labels"]) == pytest.approx(solo().evaluate(full), rel=1e-6)


def test_nothing_to_learn_in_a_whole_batch_is_an_error() -> None:
    with pytest.raises(InputError, match="nothing was counted"):
        solo().step(data(0, (0, 0, 0, 0)))


EVEN, OTHER, UNEVEN = (12, 12, 12, 12), (9, 9, 9, 9), (12, 9, 12, 12)
"""A second mean counts 10 for 12, and 8 for 9."""


def test_several_means_in_one_proportion_are_one() -> None:
    """Its loss is the sum of two means over everything, each by itself."""
    pipe = solo("second")
    batch = data(0, EVEN)
    logits = nn.Sequential(*layers("second")[:-1])
    with torch.no_grad():
        x = logits[0].table(batch["ids"])
        for block in list(logits)[1:]:
            (x,) = block(x)
        expected = layers("second")[-1](x, batch["labels"]).loss
    assert pipe.step(batch) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("call", ["step", "evaluate"])
def test_several_means_of_other_proportions_are_refused(call: str) -> None:
    with pytest.raises(
        InputError, match=r"several means.*got means of 12/10, 9/8, 12/10, 12/10 losses.*pass a loss_fn"
    ):
        getattr(solo("second"), call)(data(0, UNEVEN))


def test_several_means_of_other_proportions_in_other_calls_are_refused() -> None:
    pipe = solo("second")
    pipe.forward_backward(data(0, EVEN))
    pipe.forward_backward(data(1, OTHER))
    with pytest.raises(InputError, match=r"several means.*got means of 48/40, 36/32 losses"):
        pipe.update()
    assert pipe.step(data(0, EVEN)) == solo("second").step(data(0, EVEN))


def rank_two_copies(counts: tuple[int, ...]) -> float:
    pipe = pipex.Pipeline(stages(2, "second"), pipex.build("dualpipe", 2, 4), "model",
                          optimizer=partial(torch.optim.SGD, lr=0.1))  # fmt: skip
    return pipe.step(data(0, counts))


def test_two_copies_tell_each_other_what_their_means_have_counted() -> None:
    assert host_world.launch(rank_two_copies, 2, args=(EVEN,)) == pytest.approx(
        [solo("second").step(data(0, EVEN))] * 2
    )
    with pytest.raises(PeerFailed, match="several means"):
        host_world.launch(rank_two_copies, 2, args=(UNEVEN,))


def rank_with_other_losses() -> None:
    other = (lambda output, target: output.loss) if pipex.current_world().rank else "model"
    pipex.Pipeline(stages(2), pipex.build("1f1b", 2, 4), other)


def test_ranks_with_other_losses_are_told() -> None:
    with pytest.raises((ConfigMismatch, PeerFailed), match="loss_fn"):
        host_world.launch(rank_with_other_losses, 2)
