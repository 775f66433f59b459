"""Fused pairs: a forward beside a backward, with the bits of plain torch, whatever the model's code does meanwhile."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import device_world
import host_world
import pytest
import torch
import torch.nn.functional as F
from cases import case, sampled
from fused_pairs import Seen, batch, core_to_spare, cores, one_rank
from layer_kinds import KEEPING, KINDS
from random_models import WEIGHT_AGAIN, Model, Plain
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from trained_models import Cell, compare, train

import pipex
from pipex.partition import as_stages
from pipex.plan import Plan, unfused, validate
from pipex.plan.actions import parse_action
from pipex.runtime.pairs import Pairs
from pipex.runtime.shared_state import watch


@pytest.fixture(autouse=True)
def _one_core_to_spare(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from core_to_spare(monkeypatch)


# The numbers are those of plain torch.

Found = dict[str, Any]


def rank_train(cell: Cell, models: Sequence[Model], steps: int, together: bool = True) -> list[Found]:
    """Also how many pairs have run at once in the last step, and why others have not."""
    made: list[pipex.Pipeline] = []

    class Noted(pipex.Pipeline):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    before, pipex.Pipeline = pipex.Pipeline, Noted  # type: ignore[misc]
    try:
        with cores(lambda rank: 1 + together):
            found = [train(cell, model, steps) for model in models]
    finally:
        pipex.Pipeline = before  # type: ignore[misc]
    for result, pipeline in zip(found, made, strict=True):
        result["pairs"] = pipeline.pairs
    return found


def copies(cell: Cell) -> list[int]:
    """Of the model, which one a micro-batch passes: of DualPipe's the second half the second one."""
    family, _, _, microbatches = cell
    return [int(family == "dualpipe" and m >= microbatches // 2) for m in range(microbatches)]


def assert_as_plain(
    cell: Cell, models: Sequence[Model], *, steps: int = 3, launch: Callable[..., list[Any]] = host_world.launch
) -> list[list[Pairs]]:
    """Returns what became of the pairs, by model and rank."""
    ranks = launch(rank_train, cell[1], args=(cell, models, steps))
    for number, model in enumerate(models):
        with case(cell, model):
            compare([rank[number] for rank in ranks], Plain(model, copies(cell)).train(steps))
    return [[Pairs(*rank[number]["pairs"]) for rank in ranks] for number in range(len(models))]


CELLS: list[Cell] = [
    ("dualpipev", 1, 2, 4), ("dualpipev", 2, 2, 5), ("dualpipev", 4, 2, 8), ("dualpipe", 2, 2, 6), ("dualpipe", 4, 2, 8)
]  # fmt: skip


def spread(kinds: Sequence[str], cell: Cell) -> Model:
    """These kinds of layers, by turns on all stages."""
    family, ranks, _, microbatches = cell
    stages = ranks if family == "dualpipe" else 2 * ranks
    pieces = [("linear", *kinds[stage::stages], *kinds[:stage:stages]) for stage in range(stages)]
    return Model(5, tuple(map(tuple, pieces)), microbatches, 2 * microbatches + 1)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_every_bit_is_that_of_plain_torch(cell: Cell) -> None:
    """Dropout, a tied weight, several tensors between stages; and no pair is kept apart."""
    kinds = ["dropout", "one tensor more", "layer norm", "mlp", "merging", "attention", WEIGHT_AGAIN, "residual"]
    (ranks,) = assert_as_plain(cell, [spread(kinds, cell)], steps=10)
    for rank in ranks:
        assert rank.at_once == rank.all > 0, rank


def test_every_bit_through_device_memory(simulated_cuda: Path) -> None:
    """Slots are given back by the thread that has done the backward."""
    launch = partial(device_world.launch, library=simulated_cuda, settings="seed=3,queues=2,delay=300,poison=1")
    cell: Cell = ("dualpipev", 2, 2, 5)
    (ranks,) = assert_as_plain(cell, [spread(["dropout", "mlp", "layer norm"], cell)], launch=launch)
    assert all(rank.at_once == rank.all for rank in ranks)


def test_every_bit_where_backwards_run_code_of_the_model() -> None:
    cell: Cell = ("dualpipev", 2, 2, 5)
    kinds = ("checkpointed dropout", "custom Function", "backward hook", "channels last")
    assert_as_plain(cell, [spread([kind, "dropout"] * 4, cell) for kind in kinds])


OF_ALL_KINDS = [
    (cell, kind)
    for cell in CELLS
    for kind in sorted(KINDS.keys() - {"hook on an activation"})  # it asks for inputs that require grad
    if cell[0] == "dualpipev" or kind not in KEEPING
]


@pytest.mark.long
@pytest.mark.parametrize(("cell", "kind"), sampled(OF_ALL_KINDS, 8, name="pairs", stratum=lambda one: one[0]), ids=str)
def test_layers_of_every_kind(cell: Cell, kind: str) -> None:
    assert_as_plain(cell, [spread([kind, "dropout", "linear", "noise on some data"], cell)])


@pytest.mark.nightly
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_over_many_steps(cell: Cell) -> None:
    """Under threads that take turns a hundred times as often as Python has them."""
    kinds = ["dropout", "checkpointed dropout", "mlp", "one tensor more", "merging", "stochastic depth", WEIGHT_AGAIN]
    for _ in range(5):
        assert_as_plain(cell, [spread(kinds, cell), spread(["attention", "layer norm", "dropout"], cell)], steps=20)


# What happens in a pair, seen by the model's own code.


def test_both_parts_run_at_the_same_time() -> None:
    """Forwards of the last stage end only when the backward beside them has come to the first stage. That one tells by
    a function in C, which needs no Python to be called."""
    come: list[Tensor] = []
    met: list[bool] = []

    def meet() -> None:
        if met:  # the first forward has no backward beside it
            wait_until(lambda: len(come) == len(met))
        met.append(len(come) == len(met))

    torch.manual_seed(0)
    pipeline = one_rank(Seen(backward=come.append), Seen(meet))
    pipeline.step(*batch())
    assert met == [True] * 4
    assert pipeline.pairs == (5, 5, "")


def wait_until(true: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(2000):
        if true():
            break
        pause.wait(0.005)


def test_the_models_code_never_runs_in_two_threads() -> None:
    """A forward goes on only when the hook of the backward beside it runs, or has not come in a while; each draws."""
    running = 0
    most = 0
    drawn: list[float] = []

    @contextmanager
    def here() -> Iterator[None]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        yield
        running -= 1

    def forward() -> None:
        with here():
            pause = threading.Event()
            for _ in range(10):
                if running > 1:
                    break
                pause.wait(0.003)
            drawn.append(torch.rand(()).item())

    def backward(dy: Tensor) -> Tensor:
        with here():
            drawn.append(torch.rand(()).item())
            return dy + 0.1 * torch.randn_like(dy)

    def trained(together: bool) -> tuple[list[float], list[float], Pairs]:
        drawn.clear()
        torch.manual_seed(0)
        with cores(lambda rank: 1 + together):
            pipeline = one_rank(Seen(forward, backward), Seen(forward, backward))
            losses = [pipeline.step(*batch()) for _ in range(3)]
        return losses, list(drawn), pipeline.pairs

    *numbers, (at_once, _, why) = trained(together=True)
    assert why == "a hook, a custom Function or a checkpointed region in a backward has waited for the forward"
    assert at_once == 0
    assert numbers == list(trained(together=False)[:2])
    assert most == 1


def test_the_order_of_events_is_the_plans_and_their_times_are_both_parts_own() -> None:
    events: list[pipex.Event] = []
    come: list[Tensor] = []
    forwards = count()

    def meet() -> None:
        if next(forwards) == 1:  # in the first pair
            wait_until(lambda: len(come) == 1)

    torch.manual_seed(0)
    pipeline = one_rank(Seen(backward=come.append), Seen(meet), observer=events.append)
    pipeline.step(*batch())
    compute = [event for event in events if event.kind in "FBIW"]
    order = [str(part) for action in pipeline.layout.plan.orders[0] for part in action.each]
    assert [event.name for event in compute] == order
    by_name = {event.name: event for event in compute}
    forward, backward = by_name["1F1"], by_name["0B0"]
    assert max(forward.begin, backward.begin) < min(forward.end, backward.end)


# Pairs that run one part after the other, and why.


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def hand_made(order: str, microbatches: int) -> Plan:
    like = pipex.build("dualpipev", 1, microbatches)
    actions = tuple(map(parse_action, order.split()))
    return Plan("by-hand", like.placement, microbatches, (actions,), (2 * microbatches,))


@pytest.mark.parametrize(
    ("pair", "words", "peak"),
    [
        ("(0F1;1B0)OVERLAP_F_B 0B0 1F1 1B1 0B1", "", 3),
        ("(0F1;1I0)OVERLAP_F_B 1W0 0B0 1F1 1B1 0B1", r"\(0F1;1I0\)\S+ is not a forward and a whole backward", 3),
        ("0F1 (1F1;1B0)OVERLAP_F_B 0B0 1B1 0B1", r"\(1F1;1B0\)OVERLAP_F_B is of one stage", 4),
    ],
)
def test_pairs_that_are_not_a_forward_and_the_backward_of_another_stage(pair: str, words: str, peak: int) -> None:
    def trained(plan: Plan) -> tuple[list[float], Pairs]:
        torch.manual_seed(0)
        pipeline = one_rank(Seen(), Seen(), plan)
        losses = [pipeline.step(*batch()) for _ in range(3)]
        assert pipeline.peak_activations == peak  # in the pair: its forward's beside what its backward frees
        return losses, pipeline.pairs

    losses, found = trained(hand_made(f"0F0 1F0 {pair}", 2))
    peak = 3
    assert losses == trained(hand_made("0F0 1F0 0F1 1B0 0B0 1F1 1B1 0B1", 2))[0]
    assert found.at_once == (not words)
    assert found.all == 1
    assert re.fullmatch(words, found.why)


@pytest.mark.parametrize(
    ("around", "words"),
    [
        (
            partial(torch.autocast, "cpu", torch.bfloat16),
            "autocast is on, and keeps its casts for all threads together",
        ),
        (partial(torch.device, "cpu"), "a mode or the profiler of torch's is on, and sees one thread alone"),
        (Passing, "a mode or the profiler of torch's is on, and sees one thread alone"),
        (torch.profiler.profile, "a mode or the profiler of torch's is on, and sees one thread alone"),
    ],
)
def test_what_torch_keeps_for_a_thread_or_for_all(
    around: Callable[[], AbstractContextManager[Any]], words: str
) -> None:
    def trained(cores_here: int) -> tuple[list[float], Pairs]:
        torch.manual_seed(0)
        with cores(lambda rank: cores_here):
            pipeline = one_rank(Seen(), Seen())
            with around():
                losses = [pipeline.step(*batch()) for _ in range(3)]
        return losses, pipeline.pairs

    losses, found = trained(2)
    assert found == (0, 5, words)
    assert losses == trained(1)[0]


def rank_says(threads: int, of_last: int) -> list[Any]:
    with cores(lambda rank: of_last if rank == 1 else 8):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        plan = pipex.build("dualpipev", 2, 4)
        stages = [Seen() for _ in range(4)]
        pipeline = pipex.Pipeline(stages, plan, F.mse_loss, optimizer=partial(torch.optim.SGD, lr=0.1))
        losses = [pipeline.step(*batch()) for _ in range(2)]
        torch.set_num_threads(1)
        return [losses, *pipeline.pairs]


@pytest.mark.parametrize(
    ("threads", "of_last", "words"),
    [
        (1, 2, ""),
        (1, 1, "rank 1 has one core"),
        (4, 8, ""),
        (4, 7, "rank 1 has 7 cores, and every operation takes 4; torch.set_num_threads(3) before the pipeline is made "
               "leaves some for a second one"),
    ],
)  # fmt: skip
def test_all_ranks_take_pairs_apart_where_one_has_no_cores_for_them(threads: int, of_last: int, words: str) -> None:
    losses, *rest = zip(*host_world.launch(rank_says, 2, args=(threads, of_last)), strict=True)
    assert losses[0] == losses[1]
    assert rest == [(0, 0) if words else (3, 3), (3, 3), (words, words)]


def test_a_plan_without_pairs_has_none() -> None:
    torch.manual_seed(0)
    pipeline = one_rank(Seen(), Seen(), pipex.build("interleaved", 1, 4, chunks=2))
    pipeline.step(*batch())
    assert pipeline.pairs == (0, 0, "")


def test_a_module_in_both_stages_of_a_rank_is_watched_whether_pairs_are_fused_or_not() -> None:
    """Whether its uses come in the order of one process is seen in the forwards of pairs too."""
    norm = nn.BatchNorm1d(4)
    stages = as_stages([nn.Sequential(nn.Linear(4, 4), norm) for _ in range(2)])
    header = ("# pipex plan 1: family=by-hand placement=loop ranks=1 chunks=2 microbatches=3 update=step "
              "peak_activations=6\n")  # fmt: skip
    in_order = Plan.from_text(f"{header}0F0,1F0,(0F1;1B0)OVERLAP_F_B,0B0,1F1,1B1,0B1,0F2,1F2,1B2,0B2\n")
    early = Plan.from_text(f"{header}0F0,1F0,0F1,(0F2;1B0)OVERLAP_F_B,1F1,(1F2;1B1)OVERLAP_F_B,0B0,1B2,0B1,0B2\n")
    for plan, watched in ((in_order, False), (early, True)):
        validate(plan)
        for form in (plan, unfused(plan)):
            assert (watch(stages, form, 0) is not None) is watched
