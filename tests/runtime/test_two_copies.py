"""Plans with two copies of the model, down and up the ranks: DualPipe and Chimera."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import host_world
import pytest
import torch
import torch.nn.functional as F
from cases import case
from layer_kinds import KEEPING, KINDS, SIZE
from random_models import WEIGHT_AGAIN, Model, Plain
from runnable_plans import is_legal
from safetensors import safe_open
from torch import Tensor, nn
from trained_models import Cell, compare, rank_train

import pipex
from pipex.errors import PeerFailed, PipexError
from pipex.plan import Plan

CELLS = [
    (family, ranks, 2, microbatches)
    for family, ranks, microbatches in product(("dualpipe", "chimera"), (2, 4), range(2, 9))
    if is_legal(family, ranks, 2, microbatches)
]


def down(family: str, ranks: int, microbatches: int) -> set[int]:
    """What passes the copy down the ranks: of DualPipe the first half of all (arXiv 2412.19437, figure 5), of Chimera
    the first half of every P (arXiv 2107.06925, 3.2)."""
    size = microbatches if family == "dualpipe" else ranks
    units = [range(begin, min(begin + size, microbatches)) for begin in range(0, microbatches, size)]
    return {m for unit in units for m in unit[: (len(unit) + 1) // 2]}


def of_cell(cell: Cell) -> tuple[Model, list[int]]:
    """A model with a tied weight, dropout and several tensors between stages; and the copy of each micro-batch."""
    family, ranks, _, microbatches = cell
    kinds = [("linear", "dropout"), ("one tensor more",), ("merging", "residual"), ("layer norm", WEIGHT_AGAIN)]
    pieces = kinds if ranks == 4 else [sum(kinds[:2], ()), sum(kinds[2:], ())]
    first = down(family, ranks, microbatches)
    return Model(5, tuple(pieces), microbatches, 2 * microbatches + 1), [
        int(m not in first) for m in range(microbatches)
    ]


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_bit_of_ten_steps_is_that_of_plain_torch(ranks: int) -> None:
    """Losses, gradients, parameters, evaluation: two to eight micro-batches, where the schedule has them."""
    torch.set_num_threads(1)
    cells = [cell for cell in CELLS if cell[1] == ranks]
    assert {cell[0] for cell in cells} == {"dualpipe", "chimera"}
    results = host_world.launch(rank_train, ranks, args=([(cell, of_cell(cell)[0]) for cell in cells], 10))
    for number, cell in enumerate(cells):
        model, copies = of_cell(cell)
        with case(cell, model):
            compare([result[number] for result in results], Plain(model, copies).train(10))


def stage(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False))


CHUNKS, ROWS, TOKENS, HIDDEN = 20, 3, 16, 32
"""Those of DualPipe's own example (deepseek-ai/DualPipe, examples/example_dualpipe.py) are 20, 3, 256 and 512."""


def of_the_example(ranks: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(233)
    model = nn.Sequential(*(stage(HIDDEN) for _ in range(ranks)))
    return model, *torch.randn(2, CHUNKS * ROWS, TOKENS, HIDDEN)


def rank_example() -> tuple[list[tuple[int, float]], dict[str, Tensor]]:
    """By micro-batch the losses that this rank computes; and its gradients."""
    world = pipex.current_world()
    model, x, y = of_the_example(world.ranks)
    plan = pipex.build("dualpipe", world.ranks, CHUNKS)
    found: list[tuple[int, float]] = []

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        loss = F.mse_loss(output, target)
        found.append((next(n for n, piece in enumerate(y.chunk(CHUNKS)) if torch.equal(piece, target)), loss.item()))
        return loss

    pipeline = pipex.Pipeline(
        pipex.split_model(model, plan), plan, loss_fn, optimizer=partial(torch.optim.SGD, lr=0.1)
    )  # fmt: skip
    pipeline.forward_backward(x, y)
    pipeline.reduce_gradients()
    return found, {n: t.grad for s in pipeline.local_stages for n, t in s.names.items() if t.grad is not None}


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_example_of_dualpipe_gives_the_losses_of_its_loop(ranks: int) -> None:
    torch.set_num_threads(1)
    results = host_world.launch(rank_example, ranks)
    model, x, y = of_the_example(ranks)
    losses = []
    for piece, wanted in zip(x.chunk(CHUNKS), y.chunk(CHUNKS), strict=True):
        loss = F.mse_loss(model(piece), wanted)
        loss.backward()
        losses.append(loss.item())
    assert sorted(pair for found, _ in results for pair in found) == list(enumerate(losses))
    assert {m for m, _ in results[0][0]} == set(
        range(CHUNKS // 2, CHUNKS)
    )  # up the ranks: the second half ends on rank 0
    for _, gradients in results:
        assert len(gradients) == 4
        for name, gradient in gradients.items():  # ours are those of the mean over all micro-batches
            torch.testing.assert_close(gradient * CHUNKS, model.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


def simple_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(KINDS["mlp"]() for _ in range(4)))


def data(step: int) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, 8, SIZE, SIZE, generator=torch.Generator().manual_seed(step))
    return x, y


def sum_and_count(output: Tensor, target: Tensor) -> tuple[Tensor, int]:
    return F.mse_loss(output, target, reduction="sum"), target.numel()


def pipeline_of(plan: Plan, model: nn.Module, loss_fn: Any = F.mse_loss) -> pipex.Pipeline:
    return pipex.Pipeline(
        pipex.split_model(model, plan), plan, loss_fn, optimizer=partial(torch.optim.AdamW, lr=0.01), clip_norm=0.1
    )  # fmt: skip


def rank_with_data_at_the_ends() -> list[float]:
    world = pipex.current_world()
    pipeline = pipeline_of(pipex.build("chimera", 4, 4), simple_model(), sum_and_count)
    return [pipeline.step(*data(step) if world.rank in (0, 3) else (None, None)) for step in range(3)]


def test_sums_and_counts_of_both_copies_are_put_together() -> None:
    """The ranks at the ends alone read the batch and the target."""
    torch.set_num_threads(1)
    model = simple_model()
    update = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for step in range(3):
        loss = F.mse_loss(model(data(step)[0]), data(step)[1])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        update.step()
        update.zero_grad()
        losses.append(loss.item())
    for found in host_world.launch(rank_with_data_at_the_ends, 4):
        assert found == pytest.approx(losses, rel=1e-5)


def rank_save_and_load(directory: str) -> list[Any]:
    """Three steps with two copies, three with one, three with two; each goes on from the last one's checkpoint."""
    losses: list[Any] = []
    for number, family in enumerate(("dualpipe", "1f1b", "dualpipe")):
        model = simple_model()
        if number:
            for parameter in model.parameters():
                nn.init.zeros_(parameter)
        pipeline = pipeline_of(pipex.build(family, 2, 4), model)
        if number:
            pipeline.load(directory)
        losses.append([pipeline.step(*data(step)) for step in range(3 * number, 3 * number + 3)])
        pipeline.save(directory)
        pipeline.close()
    return losses


def rank_go_on() -> list[float]:
    pipeline = pipeline_of(pipex.build("dualpipe", 2, 4), simple_model())
    return [pipeline.step(*data(step)) for step in range(9)]


def test_a_checkpoint_goes_on_with_one_copy_and_with_two(tmp_path: Path) -> None:
    first, second, third = host_world.launch(rank_save_and_load, 2, args=(str(tmp_path),))[0]
    saved = [set(safe_open(file, "pt").keys()) for file in tmp_path.glob("*.safetensors")]
    assert len(saved) == 2
    assert all(saved)
    assert not set.intersection(*saved)  # what both ranks hold is saved once
    through = host_world.launch(rank_go_on, 2)[0]
    assert first == through[:3]
    assert second + third == pytest.approx(through[3:], rel=1e-5)  # sums of one copy have other bits


def rank_refused(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(KINDS["linear"](), KINDS[kind]())
    pipeline = pipeline_of(pipex.build("chimera", 2, 4), model)
    for step in range(3):
        pipeline.step(*data(step))


@pytest.mark.parametrize("kind", sorted(KEEPING))
def test_what_would_see_half_of_the_micro_batches_is_refused(kind: str) -> None:
    with pytest.raises(PeerFailed, match=r"UnsupportedModule: .*(keeps what its forward changes|hooks would see)"):
        host_world.launch(rank_refused, 2, args=(kind,))


def add_a_parameter(model: nn.Sequential) -> None:
    model[0].inner.bias = nn.Parameter(torch.zeros(SIZE))


def seed_apart(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[1].inner[0].weight.add_(pipex.current_world().rank)


def rank_changed(change: Callable[[nn.Sequential], None], before: bool) -> float:
    model = nn.Sequential(KINDS["linear without bias"](), *simple_model()[:3])
    if before:
        change(model)
    pipeline = pipeline_of(pipex.build("chimera", 2, 4), model)
    pipeline.step(*data(0))
    change(model)
    return pipeline.step(*data(1))


@pytest.mark.parametrize(
    ("change", "before", "words"),
    [
        (
            add_a_parameter,
            False,
            "UnsupportedModule: 0.inner.bias was added when there were copies of the model already",
        ),
        (seed_apart, True, r"ConfigMismatch: .*1\.inner\.0\.weight of stage 0, 2 begins with"),
    ],
)
def test_copies_that_would_go_apart_are_refused(change: Any, before: bool, words: str) -> None:
    with pytest.raises(PipexError, match=words):
        host_world.launch(rank_changed, 2, args=(change, before))


def rank_without_a_target() -> None:
    x, y = data(0)
    pipeline_of(pipex.build("chimera", 2, 4), simple_model()).step(x, None if pipex.current_world().rank == 0 else y)


def test_a_rank_at_an_end_needs_both_batch_and_target() -> None:
    with pytest.raises(PipexError, match="rank 0 holds the last stage and needs the target"):
        host_world.launch(rank_without_a_target, 2)


class KeepingLoss(nn.Module):
    """Normalizes by what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(()))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        loss = F.mse_loss(output, target)
        self.scale.lerp_(loss.detach(), 0.1)
        return loss / self.scale


def lazy() -> nn.Sequential:
    return nn.Sequential(nn.LazyLinear(SIZE), nn.Linear(SIZE, SIZE))


def rank_with(loss_fn: Any, make: Callable[[], nn.Module]) -> float:
    torch.manual_seed(0)
    return pipeline_of(pipex.build("chimera", 2, 4), make(), loss_fn).step(*data(0))


@pytest.mark.parametrize(
    ("loss_fn", "make", "words"),
    [
        (KeepingLoss(), simple_model, "KeepingLoss is the loss function, or in it, and keeps what it changes; got a"),
        (F.mse_loss, lazy, r"0\.weight has no shape yet, and the ranks 0, 1 hold it"),
    ],
)
def test_what_each_copy_would_keep_for_itself_is_refused(loss_fn: Any, make: Any, words: str) -> None:
    with pytest.raises(PeerFailed, match=f"UnsupportedModule: {words}"):
        host_world.launch(rank_with, 2, args=(loss_fn, make))


def test_a_loss_module_that_keeps_nothing_is_one_like_any_other() -> None:
    plain = host_world.launch(rank_with, 2, args=(F.mse_loss, simple_model))
    assert host_world.launch(rank_with, 2, args=(nn.MSELoss(), simple_model)) == plain


def rank_apart(how: str, directory: str) -> None:
    rank = pipex.current_world().rank
    pipeline = pipeline_of(pipex.build("chimera", 2, 4), simple_model())
    pipeline.step(*data(rank if how == "batches" else 0))
    if how == "rates":
        pipeline.optimizer.param_groups[0]["lr"] *= 1 + rank
    pipeline.step(*data(1))
    pipeline.save(directory)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("batches", "ConfigMismatch: the ranks disagree about what the batch holds, as checksums"),
        (
            "rates",
            r"CheckpointError: no checkpoint was saved .* the copies of \d\.inner\.0\.\w+ on the ranks 0 and 1 are not",
        ),
    ],
)
def test_ranks_that_go_apart_are_told(how: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(PeerFailed, match=words):
        host_world.launch(rank_apart, 2, args=(how, str(tmp_path)))
