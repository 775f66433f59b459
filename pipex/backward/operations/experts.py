"""Products of groups of rows, ragged or not, with one weight each: what ``F.grouped_mm`` calls."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pipex.backward.recording import Recorder
from pipex.backward.uses import Captor, Sums, Use
from pipex.backward.weights import Target, Weight
from pipex.torch_internals import grouped_mm as torch_grouped_mm


class GroupedUse(Use):
    """y = x W, with the weight of its group for each row of x.

    x is [rows, in] or [groups, rows, in], W [groups, in, out].
    """

    __slots__ = ("_by_columns", "_offsets", "weight")

    def __init__(self, tape: Captor, x: Tensor, weight: Weight, offsets: Tensor | None) -> None:
        self.weight: Target = weight.target
        self._offsets = offsets
        self._by_columns = weight.alias.stride(-2) == 1 and weight.alias.stride(-1) == weight.alias.shape[-2]
        super().__init__(tape, x)

    @property
    def held(self) -> list[Tensor]:
        return [self.input()] if self._offsets is None else [self.input(), self._offsets]

    @property
    def targets(self) -> Sequence[Target]:
        return [self.weight]

    def add_to(self, sums: Sums, dy: Tensor) -> None:
        x, dy = self.input(), dy.contiguous()  # the kernel refuses an expanded gradient
        if self._by_columns:
            found = torch_grouped_mm(dy.transpose(-2, -1), x, offs=self._offsets).transpose(-2, -1)
        else:
            found = torch_grouped_mm(x.transpose(-2, -1), dy, offs=self._offsets)
        sums.add(self.weight, found)


def grouped_mm(tape: Recorder, rows: Tensor, experts: Tensor, offsets: Tensor | None) -> Tensor:
    """F.grouped_mm of rows and a batch of matrices."""
    weight = tape.weight(experts) if experts.dim() == 3 else None
    if weight is None:
        return torch_grouped_mm(rows, experts, offs=offsets)
    use = GroupedUse(tape, rows, weight, offsets)
    return tape.product(use, lambda rows, experts: torch_grouped_mm(rows, experts, offs=offsets), rows, weight.alias)
