"""The schedule of torch.distributed.pipelining that stands beside one of pipex's, and its order as a pipex plan.

The schedules of one name are the same order on both sides, looped-bfs excepted, where torch's backward begins with the
last micro-batch. Where torch has no schedule of that name, the one of as many chunks per rank stands there: 1F1B beside
the zero-bubble schedules of one chunk, of which torch has none, and ZBV beside those that hold less in the same V.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from torch.distributed.pipelining import schedules

from pipex import plan as plans
from pipex.errors import InputError
from pipex.plan.interop import from_torch_csv

TORCH_NAMES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "zb-h1": "1F1B",
    "zb-h2": "1F1B",
    "interleaved": "Interleaved1F1B",
    "looped-bfs": "LoopedBFS",
    "interleaved-zb": "InterleavedZeroBubble",
    "zbv": "ZBVZeroBubble",
    "v-half": "ZBVZeroBubble",
    "v-min": "ZBVZeroBubble",
    "dualpipev": "DualPipeV",
}
"""pipex's name of a schedule -> torch's, as ``get_schedule_class`` takes it."""


def torch_schedule(
    name: str, stages: Sequence[Any], microbatches: int, loss_fn: Callable[..., Any] | None = None
) -> Any:
    """torch's schedule beside the one of this name, for a rank's ``PipelineStage``s.

    Raises:
        InputError: torch has none, or the number of micro-batches does not fit it.
    """
    if name not in TORCH_NAMES:
        needed = f"one of {', '.join(TORCH_NAMES)}"
        raise InputError("not a schedule that can stand beside one of torch's", got=repr(name), needed=needed)
    make = schedules.get_schedule_class(TORCH_NAMES[name])
    rank_s = stages[0] if issubclass(make, schedules.PipelineScheduleSingle) else list(stages)
    try:
        return make(rank_s, microbatches, loss_fn=loss_fn)
    except ValueError as error:
        problem = f"torch's {TORCH_NAMES[name]} cannot stand beside {name} with these sizes"
        raise InputError(problem, got=str(error), needed="another number of micro-batches or ranks") from None


def torch_plan(name: str, ranks: int, microbatches: int) -> plans.Plan:
    """The order of torch's schedule beside ours of this name, proven and for the same sizes.

    Raises:
        InputError: as ``torch_schedule``.
        PlanError: the sizes do not fit our schedule, or torch's order is no legal one.
    """
    chunks = plans.build(name, ranks, microbatches).placement.chunks
    schedule = torch_schedule(name, stages_of_rank_0(ranks, chunks), microbatches)
    rows = [[action for action in row if action is not None] for _, row in sorted(schedule.pipeline_order.items())]
    if TORCH_NAMES[name] == "1F1B":
        rows = [_counted_from_0(row) for row in rows]
    plan = from_torch_csv("".join(",".join(map(str, row)) + "\n" for row in rows))
    plans.validate(plan)
    return plan


def stages_of_rank_0(ranks: int, chunks: int) -> list[Any]:
    """All that torch's schedules ask of a rank's stages before they run; real ones need a process group."""
    return [
        SimpleNamespace(
            stage_index=index, num_stages=ranks * chunks, group_size=ranks, group_rank=0, is_first=index == 0,
            is_last=False, submod=None, group=None, device="cpu", has_backward=True,
        )
        for index in range(chunks)
    ]  # fmt: skip


def _counted_from_0(row: Sequence[Any]) -> list[Any]:
    """The same with a row's F numbered as they run. 1F1B of torch 2.11 to 2.15 runs rightly, but in the order that it
    tells the last rank counts its F from 1."""
    numbers = iter(range(len(row)))
    return [
        action._replace(microbatch_index=next(numbers)) if action.computation_type.value == "F" else action
        for action in row
    ]
