"""What a rank can do, one action at a time, and the text form that torch.distributed.pipelining uses for it.

    cell   := simple | "(" simple ";" simple {";" simple} ")OVERLAP_F_B"
    simple := stage kind [micro-batch]                                    2F0   3SEND_F1   1UNSHARD

All but UPDATE are torch's. A SEND and its WAIT_SEND name the stage that sends, a RECV the stage that receives.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import NamedTuple

from pipex.errors import PlanSyntaxError


class Kind(Enum):
    """What an action does; the value is its text."""

    F = "F"
    """forward"""
    I = "I"  # noqa: E741 - the field's letter
    """input gradient"""
    W = "W"
    """weight gradient"""
    B = "B"
    """input and weight gradient together"""
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"
    WAIT_SEND_F = "WAIT_SEND_F"
    WAIT_SEND_B = "WAIT_SEND_B"
    UNSHARD = "UNSHARD"
    RESHARD = "RESHARD"
    REDUCE_GRAD = "REDUCE_GRAD"
    WAIT_REDUCE_GRAD = "WAIT_REDUCE_GRAD"
    UPDATE = "UPDATE"
    """the optimizer's step of one stage, with the gradients of all micro-batches since its last one up to this one"""
    OVERLAP_F_B = "OVERLAP_F_B"
    """a forward and a backward run as one; the action's ``parts``"""

    # Members are single objects. Enum's own hash is a Python function, a seventh of the time of proving a plan.
    __hash__ = object.__hash__


COMPUTE = frozenset({Kind.F, Kind.I, Kind.W, Kind.B})
IN_ORDERS = COMPUTE | {Kind.UPDATE}
"""The kinds that a plan's orders consist of."""
PER_STAGE = frozenset({Kind.UNSHARD, Kind.RESHARD, Kind.REDUCE_GRAD, Kind.WAIT_REDUCE_GRAD})
"""Kinds that concern a stage as a whole and name no micro-batch."""

NONE = -1
"""Stands for the stage or the micro-batch of an action that has none."""


class Action(NamedTuple):
    """One step of one rank.

    Attributes:
        stage: the stage it belongs to; ``NONE`` for OVERLAP_F_B.
        kind: what it does.
        microbatch: which micro-batch; ``NONE`` for OVERLAP_F_B and the kinds of ``PER_STAGE``.
        parts: the actions that an OVERLAP_F_B joins; empty for all others.
    """

    stage: int
    kind: Kind
    microbatch: int = NONE
    parts: tuple[Action, ...] = ()

    @property
    def each(self) -> tuple[Action, ...]:
        """The simple actions it consists of: its parts, or itself."""
        return self.parts or (self,)

    def __repr__(self) -> str:
        if self.parts:
            return f"({';'.join(map(str, self.parts))}){self.kind.value}"
        return f"{self.stage}{self.kind.value}{self.microbatch if self.microbatch != NONE else ''}"


# Numbers have one spelling, so that reading and writing a text gives it back; nine digits are more than any plan has.
_NUMBER = "(0|[1-9][0-9]{0,8}|)"
_SIMPLE = re.compile(f"{_NUMBER}([A-Z_]*){_NUMBER}")
_SIMPLE_KINDS = {kind.value: kind for kind in Kind if kind is not Kind.OVERLAP_F_B}
_COMPOUND_END = f"){Kind.OVERLAP_F_B.value}"


def parse_action(text: str, *, line: int = 1, column: int = 1) -> Action:
    """Reads one action; the reverse of ``str(action)``, and nothing else is accepted.

    ``line`` and ``column`` (from 1) say where ``text`` begins in its file and are used in error messages only.

    Raises:
        PlanSyntaxError: ``text`` is no action; names the place of the first wrong character.
    """
    if not text.startswith("("):
        return _parse_simple(text, line, column)
    if not text.endswith(_COMPOUND_END):
        raise syntax_error(line, column, text, f"'(' closed by '{_COMPOUND_END}'")
    parts = []
    inside = column + 1
    for part in text[1 : -len(_COMPOUND_END)].split(";"):
        action = _parse_simple(part, line, inside)
        if action.kind not in COMPUTE:
            raise syntax_error(line, inside, part, "one of F, I, W and B inside OVERLAP_F_B")
        parts.append(action)
        inside += len(part) + 1
    if len(parts) < 2:
        raise syntax_error(line, column, text, "at least two actions inside OVERLAP_F_B")
    return Action(NONE, Kind.OVERLAP_F_B, NONE, tuple(parts))


def _parse_simple(text: str, line: int, column: int) -> Action:
    match = _SIMPLE.match(text)
    assert match is not None  # every part of the pattern may be empty
    stage, name, microbatch = match.groups()
    kind = _SIMPLE_KINDS.get(name)

    def wrong(group: int, needed: str) -> PlanSyntaxError:
        return syntax_error(line, column + match.start(group), text, needed)

    if not stage:
        raise wrong(1, "a stage number first, as in 2F0")
    if kind is None:
        raise wrong(2, f"one of {', '.join(_SIMPLE_KINDS)} after the stage")
    if not microbatch and kind not in PER_STAGE:
        raise wrong(3, f"a micro-batch number after {name}")
    if microbatch and kind in PER_STAGE:
        raise wrong(3, f"nothing after {name}, which has no micro-batch")
    if match.end() != len(text):
        raise syntax_error(line, column + match.end(), text, "the end of the action")
    return Action(int(stage), kind, int(microbatch) if microbatch else NONE)


def syntax_error(line: int, column: int, text: str, needed: str) -> PlanSyntaxError:
    """The error for a text that cannot be read from this place (both counted from 1) on."""
    shown = text if len(text) <= 60 else text[:57] + "..."
    return PlanSyntaxError(f"cannot read the plan at line {line}, column {column}", got=repr(shown), needed=needed)
