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
    """A parameter that several stages hold: it stands in several pieces of the model, or there are two copies of it.

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


def ties_of(blueprint: Blueprint, counts: Sequence[int], copies: int = 1) -> tuple[Tie, ...]:
    """The parameters that several stages hold, frozen ones too: they may be thawed later.

    Args:
        counts: layers of each piece of the model.
        copies: of the model; stage s of the second one is the number of pieces further on.
    """
    stages = ranges_of(counts) * copies
    found = [(held.name, _holders(held, stages)) for held in blueprint.tensors if held.parameter]
    return tuple(Tie(name, holders) for name, holders in found if len(holders) > 1)


def ranges_of(counts: Sequence[int]) -> tuple[range, ...]:
    """The layers of each piece, from how many each has."""
    return tuple(range(*ends) for ends in pairwise(accumulate(counts, initial=0)))


def _holders(held: Held, stages: Sequence[range]) -> tuple[int, ...]:
    return tuple(stage for stage, layers in enumerate(stages) if any(layer in layers for layer in held.layers))


@dataclass(frozen=True)
class Layout:
    """Where a model's layers and tensors are while a plan runs.

    The model is cut into pieces, and each stage of the plan holds one. With two copies of the model (``bidirectional``)
    two stages on different ranks hold the same piece.

    Args:
        plan: the order, and the rank of each stage.
        blueprint: the model.
        counts: layers of each piece.

    Raises:
        InputError: the layers are not all in one piece each, or the plan has another number of pieces.
    """

    plan: Plan
    blueprint: Blueprint
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        pieces, layers = self.plan.placement.pieces, len(self.blueprint.layers)
        if len(self.counts) != pieces or min(self.counts) < 1 or sum(self.counts) != layers:
            raise InputError(
                "the layers are not all in one stage each", got=f"{list(self.counts)} layers in {len(self.counts)} "
                f"stages", needed=f"{pieces} counts of at least 1 with the sum {layers}",
            )  # fmt: skip

    def rank_of(self, stage: int) -> int:
        """The rank that holds a stage."""
        return self.plan.placement.rank_of(stage)

    def pieces_of(self, rank: int) -> tuple[int, ...]:
        """The pieces of the model that a rank holds, rising."""
        placement = self.plan.placement
        return tuple(sorted({placement.piece(stage) for stage in placement.stages_of(rank)}))

    @cached_property
    def layers(self) -> tuple[range, ...]:
        """Of each stage."""
        return ranges_of(self.counts) * len(self.plan.placement.pipes)

    @cached_property
    def batch_ranks(self) -> tuple[int, ...]:
        """The ranks that read the batch: those of each copy's first stage."""
        return tuple(self.rank_of(pipe[0]) for pipe in self.plan.placement.pipes)

    @cached_property
    def target_ranks(self) -> tuple[int, ...]:
        """The ranks that read the target, and compute losses: those of each copy's last stage."""
        return tuple(self.rank_of(pipe[-1]) for pipe in self.plan.placement.pipes)

    def holders(self, held: Held) -> tuple[int, ...]:
        """The stages that hold a tensor, rising."""
        return _holders(held, self.layers)

    @cached_property
    def ties(self) -> tuple[Tie, ...]:
        """As ``ties_of``."""
        return ties_of(self.blueprint, self.counts, len(self.plan.placement.pipes))

    @cached_property
    def tied_edges(self) -> tuple[tuple[int, int], ...]:
        """(source, destination) of the stages over which tied gradients travel: from every holder to every holder on
        another rank."""
        pairs = {(s, d) for tie in self.ties for s in tie.stages for d in tie.stages}
        return tuple(sorted((s, d) for s, d in pairs if self.rank_of(s) != self.rank_of(d)))

    @cached_property
    def owners(self) -> dict[str, int]:
        """By the names of tensors that several ranks hold, the rank of the first holder, which saves it."""
        holders = {held.name: list(map(self.rank_of, self.holders(held))) for held in self.blueprint.tensors}
        return {name: ranks[0] for name, ranks in holders.items() if len(set(ranks)) > 1}

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
        placement = self.plan.placement
        for rank in range(placement.ranks):
            parts = [f"rank {rank}", f"{self.nbytes(rank):,} bytes"]
            if (versions := self.plan.weight_versions[rank]) > 1:
                parts += [f"{versions} versions of what is trained"]
            parts += ["batch"] * (rank in self.batch_ranks) + ["target"] * (rank in self.target_ranks)
            yield ", ".join(parts)
            for stage in placement.stages_of(rank):
                sends = placement.after(stage)
                to = "" if sends is None else f" → stage {sends} on rank {self.rank_of(sends)}"
                first = placement.piece(stage)
                copy = "" if stage == first else f", a copy of stage {first} on rank {self.rank_of(first)}"
                yield f"  stage {stage}{to}{copy}"
                for layer in self.layers[stage]:
                    yield f"    {layer}: {self.blueprint.layer(layer)}"
        for tie in self.ties:
            if len({placement.piece(stage) for stage in tie.stages}) > 1:  # else its stages are copies
                ranks = ", ".join(str(self.rank_of(stage)) for stage in tie.stages)
                yield f"{tie.name} is tied between the stages {tie.between} (ranks {ranks}), whose gradients are added"
