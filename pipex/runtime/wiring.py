"""The edges of a pipeline: announced, and opened as large as its batches need them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pipex.plan as plans
from pipex.plan import Orders, Plan
from pipex.runtime.announce import Forms, announce
from pipex.runtime.intake import Agreed
from pipex.runtime.stage_runner import StageRunner
from pipex.transport.interface import EdgeSpec, Form, Links, World
from pipex.transport.local import LocalEdge


class Wiring:
    """This rank's ends of all edges.

    Args:
        world: the ranks.
        digest: of the plan that all ranks were given.
        plan: the plan as it runs, with nothing fused.
        orders: its orders, sends and receives included.
        runners: this rank's stages by index.
        tied: the edges of tied parameters.
    """

    def __init__(
        self, world: World, digest: bytes, plan: Plan, orders: Orders, runners: Mapping[int, StageRunner],
        tied: Sequence[EdgeSpec],
    ) -> None:  # fmt: skip
        self._world, self._digest, self._plan, self._orders, self._runners = world, digest, plan, orders, runners
        self._tied = tied
        self._announced: dict[str, dict[int, Forms]] = {}
        self._open_for = ""
        self._specs: list[EdgeSpec] = []
        self._links: Links | None = None

    @property
    def links(self) -> Links:
        """This rank's ends of the edges, those between two stages of this rank included."""
        assert self._links is not None, "no batch was announced yet"
        return self._links

    def forms(self, training: bool, agreed: Agreed, inputs: Sequence[tuple[Any, ...]]) -> list[Forms]:
        """Collective: the messages of each micro-batch; they fit the edges from here on.

        Args:
            inputs: the micro-batches; empty where this rank does not hold the first stage.
        """
        every = len(agreed.forms) > 1  # they are ready, and each has a form of its own
        kinds = [f"{training} {agreed.forms[m if every else 0]} {n}" for m, n in enumerate(agreed.samples)]
        found: dict[str, Forms] = {}
        for microbatch, kind in enumerate(kinds):
            if kind not in found:
                found[kind] = self._forms(kind, {0: inputs[microbatch] if inputs else None})[0]
        return [found[kind] for kind in kinds]

    def _forms(self, kind: str, samples: Mapping[int, tuple[Any, ...] | None]) -> dict[int, Forms]:
        """Collective: the messages of a kind of batch, by micro-batch size; they fit the edges from here on.

        Args:
            kind: the same for batches that have the same messages, and on every rank.
            samples: as of ``announce``, the largest first.
        """
        if kind not in self._announced:
            self._announced[kind] = announce(
                self._world, self._plan.placement, self._runners, samples, self._world.device
            )
        if kind != self._open_for:
            self._open(self._announced[kind][next(iter(samples))])
            self._open_for = kind
        return self._announced[kind]

    def close(self) -> None:
        """Frees the buffers. Safe to repeat."""
        if self._links is not None:
            self._links.close()
            self._links = None

    def _open(self, forms: Forms) -> None:
        """Opens all edges, in one global order, unless the open ones are large enough."""
        specs = self._edges(forms)
        if self._links is not None:
            if all(_fits(spec.form, opened.form) for spec, opened in zip(specs, self._specs, strict=True)):
                return
            specs = [replace(s, form=_larger(s.form, o.form)) for s, o in zip(specs, self._specs, strict=True)]
            self.close()
        between = [spec for spec in specs if spec.source_rank != spec.destination_rank]
        self._links, self._specs = self._world.open(between, self._digest, self._orders), specs
        for spec in specs:
            if spec.source_rank == spec.destination_rank == self._world.rank:
                edge = spec.source, spec.destination, spec.kind
                self._links.senders[edge] = self._links.receivers[edge] = LocalEdge(spec, self._digest)

    def _edges(self, forms: Forms) -> list[EdgeSpec]:
        slots, alive = plans.slots_needed(self._plan), plans.alive(self._plan)
        rank_of = self._plan.placement.rank_of
        specs = list(self._tied)
        for edge in (*self._plan.edges, *self._plan.placement.edges_within_ranks):
            form = (forms.activation if edge.kind == "activation" else forms.gradient)[edge.destination]
            source, destination = rank_of(edge.source), rank_of(edge.destination)
            specs.append(EdgeSpec(*edge, source, destination, slots.get(edge, 1), alive.get(edge, 1), form))
        return specs


def _fits(form: Form, opened: Form) -> bool:
    return len(form) == len(opened) and all(f.nbytes <= o.nbytes for f, o in zip(form, opened, strict=True))


def _larger(form: Form, opened: Form) -> Form:
    """Room for both, so that batches of two shapes in turn do not open edges again and again."""
    if len(form) != len(opened):
        return form
    return tuple(f if f.nbytes >= o.nbytes else o for f, o in zip(form, opened, strict=True))
