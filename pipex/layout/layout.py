"""Plan × Blueprint: which rank holds which layers and tensors, and who sends to whom."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate, pairwise

from pipex.errors import InputError
from pipex.layout.blueprint import Blueprint, Held
from pipex.plan import Plan


@dataclass(frozen=True, slots=True)
class Tie:
    """A parameter that stands in several stages.

    Attributes:
        name: its canonical name in the model.
        stages: its holders, in the order in which their gradients are summed; the first one owns it (checkpoints,
            gradient norm).
    """

    name: str
    stages: tuple[int, ...]

    @property
    def between(self) -> str:
        """Its stages in words."""
        return ", ".join(map(str, self.stages))


def ties_of(blueprint: Blueprint, counts: Sequence[int]) -> tuple[Tie, ...]:
    """The parameters that stand in several stages, frozen ones too: they may be thawed later.

    Args:
        counts: layers of each stage.
    """
    stages = ranges_of(counts)
    found = [(held.name, _holders(held, stages)) for held in blueprint.tensors if held.parameter]
    return tuple(Tie(name, holders) for name, holders in found if len(holders) > 1)


def ranges_of(counts: Sequence[int]) -> tuple[range, ...]:
    """The layers of each stage, from how many each has."""
    return tuple(range(*ends) for ends in pairwise(accumulate(counts, initial=0)))


def _holders(held: Held, stages: Sequence[range]) -> tuple[int, ...]:
    return tuple(stage for stage, layers in enumerate(stages) if any(layer in layers for layer in held.layers))


@dataclass(frozen=True)
class Layout:
    """Where a model's layers and tensors are while a plan runs.

    Args:
        plan: of one pipe: the order, and the rank of each stage.
        blueprint: the model.
        counts: layers of each stage.

    Raises:
        InputError: the layers are not all in one stage each, or the plan has another number of stages.
    """

    plan: Plan
    blueprint: Blueprint
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        stages, layers = self.plan.placement.stages, len(self.blueprint.layers)
        if len(self.plan.placement.pipes) > 1:
            raise InputError("a layout is for plans with one copy of the model", got=f"{self.plan.family}, which has "
                             f"{len(self.plan.placement.pipes)}", needed="another plan")  # fmt: skip
        if len(self.counts) != stages or min(self.counts) < 1 or sum(self.counts) != layers:
            raise InputError(
                "the layers are not all in one stage each", got=f"{list(self.counts)} layers in {len(self.counts)} "
                f"stages", needed=f"{stages} counts of at least 1 with the sum {layers}",
            )  # fmt: skip

    def rank_of(self, stage: int) -> int:
        """The rank that holds a stage."""
        return self.plan.placement.rank_of(stage)

    @cached_property
    def layers(self) -> tuple[range, ...]:
        """Of each stage."""
        return ranges_of(self.counts)

    @cached_property
    def batch_rank(self) -> int:
        """The rank that reads the batch."""
        return self.rank_of(0)

    @cached_property
    def target_rank(self) -> int:
        """The rank that reads the target, and computes the loss."""
        return self.rank_of(self.plan.placement.stages - 1)

    def holders(self, held: Held) -> tuple[int, ...]:
        """The stages that hold a tensor, rising."""
        return _holders(held, self.layers)

    @cached_property
    def ties(self) -> tuple[Tie, ...]:
        """As ``ties_of``."""
        return ties_of(self.blueprint, self.counts)

    @cached_property
    def tied_edges(self) -> tuple[tuple[int, int], ...]:
        """(source, destination) of the stages over which tied gradients travel: from every holder to every holder on
        another rank."""
        pairs = {(s, d) for tie in self.ties for s in tie.stages for d in tie.stages}
        return tuple(sorted((s, d) for s, d in pairs if self.rank_of(s) != self.rank_of(d)))

    def nbytes(self, rank: int) -> int:
        """Of the parameters and buffers that a rank holds, each once."""
        own = set(self.plan.placement.stages_of(rank))
        return sum(held.nbytes for held in self.blueprint.tensors if own.intersection(self.holders(held)))

    @cached_property
    def digest(self) -> bytes:
        """16 bytes; other layouts have others."""
        return blake2b("\n".join([self.plan.digest.hex(), *self.lines()]).encode(), digest_size=16).digest()

    def lines(self) -> Iterator[str]:
        """The layout in words: a line for each rank, stage, layer and tie."""
        for rank in range(self.plan.placement.ranks):
            parts = [f"rank {rank}", f"{self.nbytes(rank):,} bytes"]
            parts += ["batch"] * (rank == self.batch_rank) + ["target"] * (rank == self.target_rank)
            yield ", ".join(parts)
            for stage in self.plan.placement.stages_of(rank):
                sends = self.plan.placement.after(stage)
                to = "" if sends is None else f" → stage {sends} on rank {self.rank_of(sends)}"
                yield f"  stage {stage}{to}"
                for layer in self.layers[stage]:
                    yield f"    {layer}: {self.blueprint.layer(layer)}"
        for tie in self.ties:
            ranks = ", ".join(str(self.rank_of(stage)) for stage in tie.stages)
            yield f"{tie.name} is tied between the stages {tie.between} (ranks {ranks}), whose gradients are added"
