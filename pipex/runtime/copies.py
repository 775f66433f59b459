"""What several ranks have a copy of, looked at once, when a pipeline is made.

Every rank that holds a stage with a tied parameter, or a shared buffer, has a copy of its own; that these are one
tensor rests on an equal beginning and equal updates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from pipex.errors import UnsupportedModule
from pipex.layout import Held, Layout
from pipex.partition import Stage, tensors_of
from pipex.runtime.copying import checksum
from pipex.runtime.memory import has_bytes, overlapping


def said_of_copies(stages: Sequence[Stage], layout: Layout, rank: int) -> dict[str, str]:
    """What this rank tells the others when a pipeline is made, so that copies begin as equals.

    Args:
        stages: of the model.

    Raises:
        UnsupportedModule: tensors that are not one share memory, and that of different ranks.
    """
    tensors = tensors_of(stages)
    _refuse_lazy(tensors, layout)
    held = [_Copied(one, tensors[one.name], layout.holders(one), layout) for one in layout.blueprint.tensors]
    _refuse_overlaps(held)
    return {
        f"what {one.called} begins with (seed the ranks alike)": _content(one.tensor)
        for one in held
        if rank in one.ranks and len(one.ranks) > 1  # other ranks never use theirs, which may be anything
    }


class _Copied:
    """A tensor of the model, and who holds it."""

    def __init__(self, held: Held, tensor: Tensor, stages: Sequence[int], layout: Layout) -> None:
        self.tensor = tensor
        self.written = held.parameter
        self.ranks = frozenset(map(layout.rank_of, stages))
        self.called = f"{held.name} of stage {', '.join(map(str, stages))}"


def _refuse_lazy(tensors: Mapping[str, Tensor], layout: Layout) -> None:
    """Raises UnsupportedModule if ranks would give a tensor of several of them its first value each for itself."""
    for held in layout.blueprint.tensors:
        ranks = sorted(set(map(layout.rank_of, layout.holders(held))))
        if len(ranks) > 1 and nn.parameter.is_lazy(tensors[held.name]):
            raise UnsupportedModule(
                f"{held.name} has no shape yet, and the ranks {', '.join(map(str, ranks))} hold it",
                got="a lazy module, of which each rank would draw its own values", needed="the same values on all",
                fix="run a forward of the model once before it is cut",
            )  # fmt: skip


def _content(tensor: Tensor) -> str:
    if nn.parameter.is_lazy(tensor):
        return "nothing yet"
    form = f"{tensor.dtype} {tuple(tensor.shape)}"
    if not has_bytes(tensor):
        return form
    return f"{form}, checksum {checksum(tensor):08x}"


def _refuse_overlaps(held: Iterable[_Copied]) -> None:
    """Raises UnsupportedModule if a parameter lies in memory of something that other ranks hold."""
    for one, other in overlapping((one.tensor, one) for one in held):
        if (one.written or other.written) and one.ranks != other.ranks:
            raise UnsupportedModule(
                f"{one.called} and {other.called} share memory, but not a rank",
                got="two tensors that are updated apart from each other",
                needed="one parameter, which both layers hold, or memory of their own",
                fix="assign the parameter itself (head.weight = embed.weight, not .data)",
            )
