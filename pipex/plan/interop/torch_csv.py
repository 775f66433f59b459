"""The CSV of torch.distributed.pipelining, read strictly and written as torch writes it.

A file has one row per rank, in the order of the ranks, and one action per cell. An idle step is an empty cell. In
format ``compute_only`` there are compute actions alone and torch adds what its runtime needs; in ``compute_comms``
that is in the file:

    SEND_F, RECV_F, SEND_B, RECV_B   all of them or none; checked against the compute actions, then dropped
    UNSHARD, RESHARD, REDUCE_GRAD    dropped: they say when FSDP gathers, frees and reduces, and when torch divides
                                     the gradients by the number of micro-batches. A pipex plan needs none of them
    WAIT_SEND_F, WAIT_SEND_B,        all of them (torch 2.15 and later) or none (before); checked against what they
    WAIT_REDUCE_GRAD                 wait for, then dropped

Files for either kind of torch are read; written are those for the installed torch, or for the one that is named. A file
of compute actions is for all of them.

A plan has the compute actions only, so reading loses idle steps and the exact place of every other action; writing
``compute_comms`` puts them where torch does (``torch_lowering``). What the file cannot say (family, promise, ...) a
``sidecar`` beside it can; without one it is inferred.

What an editor or a spreadsheet does to a file is read as torch reads it: lines that end in CR LF (as torch writes
them), LF or CR, the last one perhaps in nothing; cells in quotes, or with blanks around them. Empty lines at the end,
to torch ranks without actions, are left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, get_args

from pipex.errors import InputError, PlanError
from pipex.plan.actions import COMPUTE, PER_STAGE, Action, Kind, parse_action, syntax_error
from pipex.plan.causality import RECEIVES, SENDS, Event
from pipex.plan.communication import communicate
from pipex.plan.interop.sidecar import plan_with_metadata
from pipex.plan.interop.torch_lowering import with_torch_actions
from pipex.plan.interop.torch_versions import WAITED_BY, versions_like, versions_of
from pipex.plan.memory import peak_memory
from pipex.plan.placement import Placement, PlacementName
from pipex.plan.plan import Orders, Plan, check_stages, plain_text
from pipex.plan.validator import validate

Format = Literal["compute_only", "compute_comms"]
"""torch's names; ``_load_csv`` expects the first unless told otherwise, ``_dump_csv`` writes the second."""

Rows = tuple[tuple[Action | None, ...], ...]
"""Per rank its cells; None is an idle step."""


def to_torch_csv(plan: Plan, format: Format = "compute_only", torch: str | None = None) -> str:
    """The plan for ``_PipelineScheduleRuntime._load_csv(path, format)``. torch refuses to load a
    plan without a backward, which can be written and read here all the same.

    ``torch`` is the version that is to load it, ``"2.15"`` for example, where that is not the one installed here.
    ``compute_only`` is the same for all.

    Raises:
        PlanError: the plan is not valid, or is not for torch's runtime, which has one pipe, changes the weights
            after all micro-batches, and holds every activation until it is used.
        InputError: ``format`` or ``torch`` is none.
    """
    if format not in get_args(Format):
        raise InputError("no format of torch's CSV", got=repr(format), needed=" or ".join(map(repr, get_args(Format))))
    versions = versions_like(torch)
    validate(plan)
    fix = "keep such a plan in pipex's own text form"
    if len(plan.placement.pipes) > 1:
        raise PlanError("torch's runtime has one copy of the model", got=f"placement {plan.placement.name}", fix=fix)
    if plan.update not in ("step", "never"):
        got = f"update {plan.update!r}"
        raise PlanError("torch's runtime changes the weights after all micro-batches", got=got, fix=fix)
    if plan.recomputed or plan.offloaded:
        name = "recomputed" if plan.recomputed else "offloaded"
        got = f"stage {min(plan.recomputed or plan.offloaded)} {name}"
        raise PlanError("torch's runtime holds every activation from F to its backward", got=got, fix=fix)
    return rows_text(plan.orders if format == "compute_only" else with_torch_actions(plan, versions))


def from_torch_csv(text: str | bytes, metadata: str | bytes | None = None) -> Plan:
    """The plan of a CSV in either format. ``metadata`` is the content of its sidecar.

    Without metadata, placement and micro-batches are those that fit the actions, the family is called ``torch-csv``,
    and the promise is what the orders hold. The result is what the text says, not yet a proven plan: call
    ``validate``.

    Raises:
        PlanSyntaxError: a cell or the metadata cannot be read; names the place.
        PlanError: an action is none of torch's; no placement fits the actions; the sends, receives and waits do not
            fit them; the metadata are of another plan, or for another torch.
    """
    rows = parse_rows(text)
    _check_torch_s_own(rows)
    orders = tuple(tuple(a for a in row if a and a.each[0].kind in COMPUTE) for row in rows)
    kinds = {a.kind for row in rows for a in row if a}
    plan = _inferred(orders) if metadata is None else plan_with_metadata(orders, versions_of(kinds), metadata)
    check_stages(plan, len(text))
    _check_held(plan, rows)
    if kinds & (SENDS | RECEIVES):
        _check_messages(plan, rows)
    if kinds & WAITED_BY.keys():
        _check_waits(rows)
    return plan


def parse_rows(text: str | bytes) -> Rows:
    """The cells of a CSV, idle steps and all: ``rows_text(parse_rows(text)) == text`` for what torch has written.

    Raises:
        PlanSyntaxError: names line and column of the first wrong character.
    """
    lines = _LINE_END.split(plain_text(text))
    while len(lines) > 1 and not lines[-1].strip(_BLANK):
        lines.pop()
    if not "".join(lines):
        raise syntax_error(1, 1, "", "a row of actions for each rank")
    return tuple(tuple(_cells(row, line)) for line, row in enumerate(lines, start=1))


_LINE_END = re.compile("\r\n|\n|\r")
_BLANK = " \t"
_CELL = re.compile('(?:"([^"]*)"[ \t]*|([^,]*))(?:,|$)')


def _cells(row: str, line: int) -> Iterator[Action | None]:
    begin = 0
    while begin < len(row):
        match = _CELL.match(row, begin)
        assert match is not None  # what is no quoted cell is one without quotes
        group = 2 if match[1] is None else 1
        action = match[group].strip(_BLANK)
        column = match.start(group) + len(match[group]) - len(match[group].lstrip(_BLANK)) + 1
        yield parse_action(action, line=line, column=column) if action else None
        begin = match.end()
    if row.endswith(","):
        yield None


def rows_text(rows: Rows | Orders) -> str:
    """The CSV of these cells, byte for byte what Python's csv module, and so torch, writes."""
    return "".join(",".join("" if cell is None else str(cell) for cell in row) + "\r\n" for row in rows)


def _check_torch_s_own(rows: Rows) -> None:
    for rank, row in enumerate(rows):
        for position, action in enumerate(row):
            if action and action.kind is Kind.UPDATE:
                problem = f"{Event(rank, position, action)} is an action that torch does not have"
                raise PlanError(problem, fix="keep such a plan in pipex's own text form")


def _inferred(orders: Orders) -> Plan:
    """The plan that these orders are of."""
    idle = next((rank for rank, order in enumerate(orders) if not order), None)
    if idle is not None:
        raise PlanError(f"rank {idle} of the CSV has no compute actions", needed="a stage on every rank")
    parts = [[part for action in order for part in action.each] for order in orders]
    placement = _placement_of([{part.stage for part in row} for row in parts])
    everything = [part for row in parts for part in row]
    # Every micro-batch enters at stage 0.
    microbatches = len({part.microbatch for part in everything if part.stage == 0 and part.kind is Kind.F})
    plan = Plan(
        "torch-csv",
        placement,
        microbatches,
        orders,
        peak_activations=(0,) * len(orders),
        update="step" if any(part.kind is not Kind.F for part in everything) else "never",
    )
    ones = [1] * placement.stages
    return replace(plan, peak_activations=tuple(map(int, peak_memory(plan, ones, ones))))


def _placement_of(stages_of: list[set[int]]) -> Placement:
    """The placement that puts these stages on these ranks; of several that do, the simplest."""
    counts = Counter(stage for stages in stages_of for stage in stages)
    if twice := [stage for stage in counts if counts[stage] > 1]:
        ranks = [rank for rank, stages in enumerate(stages_of) if min(twice) in stages]
        raise PlanError(f"stage {min(twice)} is on ranks {ranks[0]} and {ranks[1]}", needed="every stage on one rank")
    gap = next((stage for stage in range(len(counts)) if stage not in counts), None)
    if gap is not None:
        raise PlanError(f"the CSV has no stage {gap}", needed=f"all stages from 0 to {max(counts)}")
    chunks, extra = divmod(len(counts), len(stages_of))
    if extra:
        got = f"{len(counts)} stages on {len(stages_of)} ranks"
        raise PlanError("no placement fits the CSV", got=got, needed="the same number of stages on every rank")
    names: tuple[PlacementName, ...] = ("loop",) if chunks % 2 else ("loop", "v") if chunks == 2 else ("loop", "wave")
    placements = [Placement(name, len(stages_of), chunks) for name in names]
    for placement in placements:
        if all(set(placement.stages_of(rank)) == stages for rank, stages in enumerate(stages_of)):
            return placement
    rank, stages = next((r, s) for r, s in enumerate(stages_of) if all(set(p.stages_of(r)) != s for p in placements))
    legal = " or ".join(f"{', '.join(map(str, p.stages_of(rank)))} ({p.name})" for p in placements)
    raise PlanError("no placement fits the CSV", got=f"stages {sorted(stages)} on rank {rank}", needed=legal)


def _check_held(plan: Plan, rows: Rows) -> None:
    """What concerns a stage as a whole must at least be of one that the rank holds."""
    for rank, row in enumerate(rows):
        held = plan.placement.stages_of(rank)
        for position, action in enumerate(row):
            if action and action.kind in PER_STAGE and action.stage not in held:
                raise PlanError(f"{Event(rank, position, action)} is of a stage that the rank does not hold")


def _check_messages(plan: Plan, rows: Rows) -> None:
    """Every message is sent once, after it is made, and received once, before it is used; and two ranks agree on the
    order of their messages, which carry no name on their way."""
    ends = plan.placement.ends
    needed = [{a for a in order if a.kind in SENDS | RECEIVES} for order in communicate(plan)]
    way: dict[tuple[int, int], tuple[list[Event], list[Event]]] = {}
    for rank, row in enumerate(rows):
        seen: set[Action] = set()
        for position, action in enumerate(row):
            if action is None:
                continue
            event = Event(rank, position, action)
            if action.kind in SENDS | RECEIVES:
                if action not in needed[rank]:
                    raise PlanError(f"{event} moves nothing that the plan needs there")
                if action in seen:
                    raise PlanError(f"{event} was done before", needed="every message once")
                _check_beside(event, seen)
                edge = ends[action.stage, action.kind]
                ranks = plan.placement.rank_of(edge.source), plan.placement.rank_of(edge.destination)
                way.setdefault(ranks, ([], []))[action.kind in RECEIVES].append(event)
            seen.update((action, *action.each))
        if missing := needed[rank] - seen:
            raise PlanError(f"rank {rank} never runs {min(missing, key=str)}", needed="every send and receive, or none")
    for sent, received in way.values():
        for send, receive in zip(sent, received, strict=False):
            if ends[send.action[:2]] != ends[receive.action[:2]] or send.action.microbatch != receive.action.microbatch:
                raise PlanError(
                    f"{receive} is out of order",
                    got=f"the message of {send} next",
                    needed="the order sent: a message between two ranks carries no name",
                )
        if alone := sent[len(received) :] or received[len(sent) :]:
            raise PlanError(f"{alone[0]} has no other end", needed="both a send and a receive of every message")


_MAKERS = {Kind.SEND_F: (Kind.F,), Kind.SEND_B: (Kind.I, Kind.B)}
_USERS = {Kind.RECV_F: (Kind.F,), Kind.RECV_B: (Kind.I, Kind.B)}


def _check_beside(event: Event, seen: set[Action]) -> None:
    """A send stands after what makes the message, a receive before what uses it."""
    stage, kind, microbatch, _ = event.action
    if kind in SENDS and not any(Action(stage, maker, microbatch) in seen for maker in _MAKERS[kind]):
        raise PlanError(f"{event} comes before what makes the message")
    if kind in RECEIVES and any(Action(stage, user, microbatch) in seen for user in _USERS[kind]):
        raise PlanError(f"{event} comes after what uses the message")


def _check_waits(rows: Rows) -> None:
    """Every send and every REDUCE_GRAD is waited for once, after it, and no two reductions of a rank are under way at
    once: what torch 2.15 and later need of a file."""
    for rank, row in enumerate(rows):
        sent: set[Action] = set()
        reducing: Action | None = None
        for event in (Event(rank, position, action) for position, action in enumerate(row) if action):
            stage, kind, microbatch, _ = event.action
            if kind in SENDS:
                sent.add(event.action)
            elif kind in WAITED_BY and WAITED_BY[kind] in SENDS:
                send = Action(stage, WAITED_BY[kind], microbatch)
                if send not in sent:
                    raise _wait_error(f"{event} has nothing to wait for", f"{send} before it, and one wait for it")
                sent.remove(send)
            elif kind is Kind.REDUCE_GRAD:
                if reducing:
                    wait = Action(reducing.stage, Kind.WAIT_REDUCE_GRAD)
                    raise _wait_error(f"{event} comes while {reducing} is under way", f"{wait} before it")
                reducing = event.action
            elif kind is Kind.WAIT_REDUCE_GRAD:
                if reducing != (start := Action(stage, Kind.REDUCE_GRAD)):
                    raise _wait_error(f"{event} has nothing to wait for", f"{start} before it, and one wait for it")
                reducing = None
        if left := min(sent, key=str, default=reducing):
            raise _wait_error(f"rank {rank} never waits for {left}", "one wait after it")


def _wait_error(problem: str, needed: str) -> PlanError:
    return PlanError(problem, needed=f"{needed}, since a CSV with WAIT actions is for torch>=2.15")
