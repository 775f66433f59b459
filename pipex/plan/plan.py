"""The plan: what every rank does in one step, in order, as immutable data with a strict text form.

The text has one line of metadata, then one line per rank with its actions in torch's CSV cells:

    # pipex plan 1: family=1f1b placement=loop ranks=2 chunks=1 microbatches=2 update=step peak_activations=2,1
    0F0,0F1,0B0,0B1
    1F0,1B0,1F1,1B1

A plan that holds less than it could says so at the end of its first line, as in ``recomputed=0 offloaded=1,2``.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import cast, get_args

from pipex.errors import PlanError, PlanSyntaxError
from pipex.plan.actions import Action, Kind, parse_action, syntax_error
from pipex.plan.placement import Edge, Placement, PlacementName
from pipex.plan.versions import Update, versions_held, versions_used

Orders = tuple[tuple[Action, ...], ...]
"""Per rank its actions, in the order in which it runs them."""


@dataclass(frozen=True)
class Plan:
    """One step of a whole pipeline. ``validate`` proves that it can run and keeps its promise.

    Attributes:
        family: name of the schedule: lower-case letters, digits and dashes.
        placement: which rank holds which stage.
        microbatches: micro-batches per step M, at least 1.
        orders: per rank its compute actions (F, I, W, B) and UPDATEs in order; ``communicate`` adds the sends and
            receives.
        peak_activations: the promise: per rank the most activations held at once, in activations of one
            micro-batch at one stage (``placement.chunks`` of them are one micro-batch of the whole rank), each
            from the start of its F to the end of its B or W.
        update: when the weights change.
        recomputed: stages of which only the input is held between F and I (or B), which begins with another forward.
            They count in the promise from the start of I.
        offloaded: stages of which nothing is held between F and I: what F made is copied to host memory, and back
            before I. They count in the promise outside of the time that ``offload`` gives them.

    Raises:
        PlanError: a field does not fit the others.
    """

    family: str
    placement: Placement
    microbatches: int
    orders: Orders
    peak_activations: tuple[int, ...]
    update: Update = "step"
    recomputed: tuple[int, ...] = ()
    offloaded: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(_FAMILY, self.family):
            raise PlanError("bad family name", got=repr(self.family), needed="lower-case letters, digits and dashes")
        if self.microbatches < 1:
            raise PlanError("too few micro-batches", got=self.microbatches, needed="at least 1")
        for name, rows in (("orders", len(self.orders)), ("peak_activations", len(self.peak_activations))):
            if rows != self.placement.ranks:
                raise PlanError(f"wrong number of {name}", got=rows, needed=f"{self.placement.ranks}, one per rank")
        for name, stages in (("recomputed", self.recomputed), ("offloaded", self.offloaded)):
            if type(stages) is not tuple or any(type(stage) is not int for stage in stages):
                raise PlanError(f"bad list of stages {name}", got=repr(stages), needed="a tuple of their numbers")
        if self.recomputed or self.offloaded:
            self._check_spared()

    def _check_spared(self) -> None:
        """Raises PlanError unless both are lists of stages, rising, that can be recomputed or offloaded."""
        for name, stages in (("recomputed", self.recomputed), ("offloaded", self.offloaded)):
            for before, stage in zip((-1, *stages), stages, strict=False):
                if not 0 <= stage < self.placement.stages:
                    needed = f"0 to {self.placement.stages - 1}"
                    raise PlanError(f"a stage that is not there is {name}", got=stage, needed=needed)
                if stage <= before:
                    problem = f"stage {stage} comes twice or late among the stages {name}"
                    raise PlanError(problem, got=",".join(map(str, stages)), needed="each once, rising")
        if both := set(self.recomputed) & set(self.offloaded):
            raise PlanError(f"stage {min(both)} is recomputed and offloaded", needed="one of them")
        if self.update in ("never", "microbatch"):
            # Without a backward nothing waits. And what is stashed per micro-batch are its weights besides, one
            # version per activation promised: for those of an activation that is away nobody would have room.
            stage = min(self.recomputed + self.offloaded)
            problem = f"stage {stage} is recomputed or offloaded in a plan with update={self.update}"
            raise PlanError(problem, needed="update=step or update=delayed")

    @property
    def edges(self) -> tuple[Edge, ...]:
        """All edges of the placement."""
        return self.placement.edges

    def pipe_of(self, microbatch: int) -> range:
        """The stages that the micro-batch passes: the pipe in which it has an F; the first, where it has none."""
        return self.placement.pipes[self.copy_of(microbatch)]

    def copy_of(self, microbatch: int) -> int:
        """The number of that pipe, and so of the copy of the model."""
        return self._pipe_numbers.get(microbatch, 0) if len(self.placement.pipes) > 1 else 0

    @cached_property
    def _pipe_numbers(self) -> dict[int, int]:
        parts = [part for order in self.orders for action in order for part in action.each if part.kind is Kind.F]
        last_first = reversed(list(enumerate(self.placement.pipes)))
        return {part.microbatch: number for number, pipe in last_first for part in parts if part.stage in pipe}

    @property
    def weight_versions(self) -> tuple[int, ...]:
        """Per rank the most versions of a stage's weights that it needs at once."""
        return tuple(versions_held(order, self.update) for order in self.orders)

    @cached_property
    def versions(self) -> dict[tuple[int, int], int]:
        """(stage, micro-batch) -> which version of the stage's weights all its actions use: how many updates they have
        had since the step began. -1 is the version before the one with which it began."""
        return {key: version for order in self.orders for key, version in versions_used(order, self.update).items()}

    @property
    def asynchronous(self) -> bool:
        """Whether weights change while micro-batches are under way."""
        return self.update in ("microbatch", "delayed")

    @cached_property
    def groups(self) -> tuple[range, ...]:
        """The micro-batches of each update, in order."""
        ends = {part.microbatch + 1 for order in self.orders for part in order if part.kind is Kind.UPDATE}
        return tuple(range(*bounds) for bounds in pairwise(sorted({0, self.microbatches, *ends})))

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that differ between different plans; ranks compare them before the first step."""
        return hashlib.blake2b(self.to_text().encode(), digest_size=16).digest()

    def to_text(self) -> str:
        """The text form; ends with a line feed."""
        header = (
            f"# pipex plan 1: family={self.family} placement={self.placement.name} ranks={self.placement.ranks} "
            f"chunks={self.placement.chunks} microbatches={self.microbatches} "
            f"update={self.update} peak_activations={','.join(map(str, self.peak_activations))}"
        )
        for name, stages in (("recomputed", self.recomputed), ("offloaded", self.offloaded)):
            if stages:
                header += f" {name}={','.join(map(str, stages))}"
        return "\n".join([header, *(",".join(map(str, order)) for order in self.orders), ""])

    @staticmethod
    def from_text(text: str | bytes) -> Plan:
        """Reads the text form; ``Plan.from_text(text).to_text() == text`` for every text that is accepted.

        The result is what the text says, not yet a proven plan: call ``validate``.

        Raises:
            PlanSyntaxError: a line cannot be read; names line and column. Or the text is longer than ``MAX_TEXT``.
            PlanError: the lines do not fit together.
        """
        text = plain_text(text)
        lines = text.split("\n")
        match = _HEADER.fullmatch(lines[0])
        if match is None:
            edited = lines[0].startswith(BYTE_ORDER_MARK) or lines[0].endswith("\r")
            needed = (
                "no byte-order mark, and line feeds alone" if edited else f"a first line such as '{_HEADER_EXAMPLE}'"
            )
            raise syntax_error(1, 1, lines[0], needed)
        if lines[-1]:
            raise syntax_error(len(lines), len(lines[-1]) + 1, lines[-1], "a line feed at the end")
        fields = match.groupdict()
        plan = Plan(
            family=fields["family"],
            placement=Placement(
                cast(PlacementName, fields["placement"]), ranks=int(fields["ranks"]), chunks=int(fields["chunks"])
            ),
            microbatches=int(fields["microbatches"]),
            orders=tuple(_parse_row(row, line) for line, row in enumerate(lines[1:-1], start=2)),
            peak_activations=_numbers(fields["peaks"]),
            update=cast(Update, fields["update"]),
            recomputed=_numbers(fields["recomputed"]),
            offloaded=_numbers(fields["offloaded"]),
        )
        check_stages(plan, len(text))
        return plan


MAX_WORK = 1 << 18
"""Most micro-batches times stages of a plan that is built: 64 ranks with 8 chunks and 512 micro-batches, some 800,000
actions, which take seconds to prove and simulate."""


def check_size(ranks: int, chunks: int, microbatches: int) -> None:
    """Refuses a plan that no machine would hold before any of it is made.

    Raises:
        PlanError: there are more than ``MAX_WORK`` micro-batches on stages.
    """
    if ranks * chunks * microbatches > MAX_WORK:
        got = f"{microbatches} micro-batches on {ranks} ranks with {chunks} chunks each"
        raise PlanError("the plan is too large", got=got, needed=f"a product of at most {MAX_WORK}")


BYTE_ORDER_MARK = "\xef\xbb\xbf"
"""That of UTF-8, as ``plain_text`` shows it."""

MAX_TEXT = 1 << 24
"""Longest text of a plan, in characters: some two million actions. A longer one is refused unread."""


def plain_text(text: str | bytes) -> str:
    """The text of a plan's file. A byte that is no ASCII becomes a character that no plan has, and so is refused at
    its place.

    Raises:
        PlanSyntaxError: the text is longer than ``MAX_TEXT``.
    """
    if len(text) > MAX_TEXT:
        raise PlanSyntaxError("the plan is too long", got=f"{len(text)} characters", needed=f"{MAX_TEXT} at most")
    return text if isinstance(text, str) else text.decode("latin-1")


def check_stages(plan: Plan, characters: int) -> None:
    """Refuses a number of stages that no loop over them would end with. A text that is a valid plan has an action of
    every stage, and so more characters than stages.

    Raises:
        PlanError: there are more stages than characters.
    """
    if plan.placement.stages > characters:
        got = f"{plan.placement.stages} stages in {characters} characters"
        raise PlanError("the plan has more stages than actions", got=got)


def _parse_row(row: str, line: int) -> tuple[Action, ...]:
    actions = []
    column = 1
    for cell in row.split(",") if row else ():
        actions.append(parse_action(cell, line=line, column=column))
        column += len(cell) + 1
    return tuple(actions)


def _numbers(text: str | None) -> tuple[int, ...]:
    return () if text is None else tuple(map(int, text.split(",")))


_FAMILY = "[a-z0-9-]+"
_NUMBER = "(?:0|[1-9][0-9]{0,8})"
_NUMBERS = f"{_NUMBER}(?:,{_NUMBER})*"
_HEADER = re.compile(
    f"# pipex plan 1: family=(?P<family>{_FAMILY}) placement=(?P<placement>{'|'.join(get_args(PlacementName))}) "
    f"ranks=(?P<ranks>{_NUMBER}) chunks=(?P<chunks>{_NUMBER}) microbatches=(?P<microbatches>{_NUMBER}) "
    f"update=(?P<update>{'|'.join(get_args(Update))}) peak_activations=(?P<peaks>{_NUMBERS})"
    f"(?: recomputed=(?P<recomputed>{_NUMBERS}))?(?: offloaded=(?P<offloaded>{_NUMBERS}))?"
)
_HEADER_EXAMPLE = (
    "# pipex plan 1: family=1f1b placement=loop ranks=2 chunks=1 microbatches=2 update=step peak_activations=2,1"
)
