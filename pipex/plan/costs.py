"""What the actions of a plan cost, per stage, or per rank for any placement.

Measured stages give ``Costs``. Comparing schedules whose placements differ needs costs that fit all of them: that is a
``CostModel``, of which ``RankCosts`` is the simplest, and the profile of a model's layers another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from pipex.errors import InputError
from pipex.plan.placement import Edge, Placement
from pipex.plan.plan import MAX_WORK, Plan


class CostModel(Protocol):
    """Knows what every stage costs, however the model is placed."""

    def on(self, placement: Placement) -> Costs:
        """The costs per stage of ``placement``. Raises InputError when the model does not fit it."""


@dataclass(frozen=True)
class Costs:
    """What the actions of a plan cost. Times share one unit, memory another.

    Attributes:
        forward, input_gradient, weight_gradient: time of F, I, W per stage; B takes that of I and W together.
        hop: time per edge from the producer's end to the message's arrival.
        activation: memory per stage of one micro-batch from the start of F to the end of I or B.
        deferred: memory per stage of one micro-batch from the end of I to the end of W.
        overlap: an OVERLAP_F_B takes this share of what its parts take one after another.
        inputs: memory per stage of one micro-batch's input, which stays from F to I where a stage is recomputed; None:
            nothing worth counting.
        recompute: time per stage by which a recomputed stage's I or B is longer; None: that of F.
        offload: time per stage of copying what one micro-batch holds to host memory, and of copying it back; None: such
            copies take no time.
        weights: memory per stage of its weights, with their gradients and what an optimizer keeps; None: not said, and
            no limit counts them.
        exchange: time from the last action of two ranks that hold the two copies of the same layers to the sum of
            their gradients, each way at once; where there is one copy, of no account.
    """

    forward: Sequence[float]
    input_gradient: Sequence[float]
    weight_gradient: Sequence[float]
    hop: Mapping[Edge, float]
    activation: Sequence[float]
    deferred: Sequence[float]
    overlap: float = 1.0
    inputs: Sequence[float] | None = None
    recompute: Sequence[float] | None = None
    offload: Sequence[float] | None = None
    weights: Sequence[float] | None = None
    exchange: float = 0.0

    @property
    def recomputation(self) -> Sequence[float]:
        """``recompute``, or what stands for it."""
        return self.forward if self.recompute is None else self.recompute

    def spared(self, recomputed: Iterable[int], offloaded: Iterable[int]) -> Costs:
        """Those of plans with such stages, as far as one number per stage says them: I is longer by recomputation, and
        ``activation`` is what is held between F and I. Copies take no time, and I no memory for itself."""
        activation, input_gradient = list(self.activation), list(self.input_gradient)
        for stage in recomputed:
            activation[stage] = 0.0 if self.inputs is None else min(self.inputs[stage], activation[stage])
            input_gradient[stage] += self.recomputation[stage]
        for stage in offloaded:
            activation[stage] = 0.0
        return replace(self, activation=activation, input_gradient=input_gradient)

    @staticmethod
    def uniform(
        plan: Plan,
        forward: float = 1.0,
        input_gradient: float = 1.0,
        weight_gradient: float = 1.0,
        hop: float = 0.0,
        activation: float = 1.0,
        deferred: float = 1.0,
    ) -> Costs:
        """The same costs for every stage and every edge. The default memory counts activations from F to W."""
        stages = plan.placement.stages
        return Costs(
            forward=[forward] * stages,
            input_gradient=[input_gradient] * stages,
            weight_gradient=[weight_gradient] * stages,
            hop=dict.fromkeys(plan.edges, hop),
            activation=[activation] * stages,
            deferred=[deferred] * stages,
        )

    def on(self, placement: Placement) -> Costs:
        """These costs; raises InputError unless they have one entry per stage and edge of ``placement``."""
        self._check(placement)
        return self

    def check(self, plan: Plan) -> None:
        """Raises InputError unless there is one finite cost, not below zero, per stage and edge of ``plan``."""
        self._check(plan.placement)

    def weights_held(self, placement: Placement) -> tuple[float, ...]:
        """Per rank the memory of all its weights, those of both copies; 0 where that is not said."""
        if self.weights is None:
            return (0.0,) * placement.ranks
        return tuple(sum(self.weights[s] for s in placement.stages_of(rank)) for rank in range(placement.ranks))

    def _check(self, placement: Placement) -> None:
        stages = placement.stages
        for name in ("forward", "input_gradient", "weight_gradient", "activation", "deferred"):
            _check_stages(name, getattr(self, name), stages)
        for name in ("inputs", "recompute", "offload", "weights"):
            if (values := getattr(self, name)) is not None:
                _check_stages(name, values, stages)
        for edge in placement.edges:
            if edge not in self.hop:
                raise InputError(f"no hop cost for the {edge}", needed="one per edge of the plan")
            check_cost(f"hop of the {edge}", self.hop[edge])
        check_cost("overlap", self.overlap)
        check_cost("exchange", self.exchange)


def _check_stages(name: str, values: Sequence[float], stages: int) -> None:
    if len(values) != stages:
        raise InputError(f"wrong number of costs {name}", got=len(values), needed=f"{stages}, one per stage")
    for stage, value in enumerate(values):
        check_cost(f"{name} of stage {stage}", value)


INPUT_SHARE = 1 / 34
"""Of what a rank holds of one micro-batch, the input of a stage: a transformer layer holds 34 bytes for each element of
its hidden state of 2 bytes (arXiv 2205.05198, section 4.1, with attention that keeps no scores), so that the input is
1/17 of one layer, and less than half of that of a rank with more than two."""


@dataclass(frozen=True)
class RankCosts:
    """Costs of whole ranks, which the stages of a rank share evenly. Times share one unit, memory another.

    Under the placement ``bidirectional`` every stage is a whole rank's share of the model: the layers that cost
    ``forward[r]`` stand on rank r and, as the other pipe's stage P+r, on rank P-1-r.

    Attributes:
        ranks: number of ranks P.
        forward, input_gradient, weight_gradient: per rank the time of F, I, W of one micro-batch, over all its chunks;
            or per stage, which fits placements with as many stages only.
        hop: time from the producer's end to the message's arrival, the same on all edges.
        activation, deferred: likewise the memory of one micro-batch, as in ``Costs``.
        overlap, exchange: as in ``Costs``.
        inputs: likewise the memory of a stage's input, as in ``Costs``; the same for each of a rank's chunks, however
            many there are.
        recompute, offload: likewise the times of recomputing and of copying out or back one micro-batch, as in
            ``Costs``. Without ``offload``, what copies take is unknown, and a search offloads nothing.
        weights: likewise the memory of the weights in one copy of the model; None: not said.
    """

    ranks: int
    forward: tuple[float, ...]
    input_gradient: tuple[float, ...]
    weight_gradient: tuple[float, ...]
    hop: float
    activation: tuple[float, ...]
    deferred: tuple[float, ...]
    overlap: float = 1.0
    inputs: tuple[float, ...] | None = None
    recompute: tuple[float, ...] | None = None
    offload: tuple[float, ...] | None = None
    weights: tuple[float, ...] | None = None
    exchange: float = 0.0

    @staticmethod
    def of(
        ranks: int,
        forward: float | Sequence[float] = 1.0,
        input_gradient: float | Sequence[float] = 1.0,
        weight_gradient: float | Sequence[float] = 1.0,
        hop: float = 0.0,
        activation: float | Sequence[float] = 1.0,
        deferred: float | Sequence[float] | None = None,
        overlap: float = 1.0,
        inputs: float | Sequence[float] | None = None,
        recompute: float | Sequence[float] | None = None,
        offload: float | Sequence[float] | None = None,
        weights: float | Sequence[float] | None = None,
        exchange: float = 0.0,
    ) -> RankCosts:
        """From one number for all ranks, one per rank, or one per stage. Without ``deferred``, an activation is held
        whole until W; without ``inputs``, they are ``INPUT_SHARE`` of the activation of a rank, or of a stage where
        that is given.

        Raises:
            InputError: a number of values that is neither 1 nor a multiple of ``ranks``, or a value that is negative or
                not finite.
        """

        if not 1 <= ranks <= MAX_WORK:
            raise InputError("bad number of ranks of the costs", got=ranks, needed=f"1 to {MAX_WORK}")

        def each(name: str, value: float | Sequence[float]) -> tuple[float, ...]:
            values = tuple(value) if isinstance(value, Sequence) else (value,) * ranks
            if not values or len(values) % ranks:
                needed = f"1, {ranks} (one per rank) or a multiple of it (one per stage)"
                raise InputError(f"wrong number of costs {name}", got=len(values), needed=needed)
            for place, cost in enumerate(values):
                check_cost(f"{name}, number {place}", cost)
            return values

        check_cost("hop", hop)
        check_cost("overlap", overlap)
        check_cost("exchange", exchange)
        held = each("activation", activation)
        return RankCosts(
            ranks=ranks,
            forward=each("forward", forward),
            input_gradient=each("input_gradient", input_gradient),
            weight_gradient=each("weight_gradient", weight_gradient),
            hop=hop,
            activation=held,
            deferred=each("deferred", activation if deferred is None else deferred),
            overlap=overlap,
            inputs=tuple(INPUT_SHARE * cost for cost in held) if inputs is None else each("inputs", inputs),
            recompute=None if recompute is None else each("recompute", recompute),
            offload=None if offload is None else each("offload", offload),
            weights=None if weights is None else each("weights", weights),
            exchange=exchange,
        )

    def on(self, placement: Placement) -> Costs:
        """The costs per stage of ``placement``.

        Raises:
            InputError: it has another number of ranks, or of stages than there are costs per stage.
        """
        if placement.ranks != self.ranks:
            raise InputError("the costs are of another number of ranks", got=self.ranks, needed=placement.ranks)
        shares = placement.chunks // len(placement.pipes)  # a pipe's stages on one rank share that rank's costs
        # A piece costs what it costs the rank that holds it in the first pipe.
        holder = [placement.rank_of(placement.piece(stage)) for stage in range(placement.stages)]

        def share(costs: Sequence[float], shares: int = shares) -> list[float]:
            if len(costs) == self.ranks:
                return [costs[rank] / shares for rank in holder]
            if len(costs) != placement.stages:
                needed = f"{self.ranks}, one per rank, or {placement.stages}, one per stage"
                raise InputError("the costs are of another number of stages", got=len(costs), needed=needed)
            return list(costs)

        return Costs(
            forward=share(self.forward),
            input_gradient=share(self.input_gradient),
            weight_gradient=share(self.weight_gradient),
            hop=dict.fromkeys(placement.edges, self.hop),
            activation=share(self.activation),
            deferred=share(self.deferred),
            overlap=self.overlap,
            inputs=None if self.inputs is None else share(self.inputs, 1),
            recompute=None if self.recompute is None else share(self.recompute),
            offload=None if self.offload is None else share(self.offload),
            weights=None if self.weights is None else share(self.weights),
            exchange=self.exchange,
        )


def check_cost(name: str, value: float) -> None:
    """Refuses what is far from all costs, so that no sum and no ratio of them leaves the floats.

    Raises:
        InputError: it is not 0, and not from 1e-100 to 1e100.
    """
    if not (value == 0 or 1e-100 <= value <= 1e100):
        raise InputError(f"bad cost: {name}", got=repr(value)[:60], needed="0, or a number from 1e-100 to 1e100")
