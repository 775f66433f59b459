"""Megatron-LM's layout string (``--pipeline-model-parallel-layout``): which layers each stage holds.

    layout := {item | "(" item {item} ")*" number | ","}
    item   := unit ["*" number]
    unit   := "E" embedding | "t" transformer | "m" multi-token prediction | "L" loss | "|" next stage

``"Et*3|(tt|)*29,m|L"`` is DeepSeek-V3 on 16 ranks with 2 stages each: the embedding and three layers, 29 stages of two
layers, one of the multi-token prediction, one of the loss. Stages lie on the ranks in a loop, and may be empty. Commas
mean nothing.

Source: Megatron-LM's guide "Custom Pipeline Model Parallel Layout" and its pipeline_parallel_layer_layout.py, whose
rules hold here too; groups do not nest in either. Stricter here: a number is at least 1, and stands right behind what
it repeats.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from pipex.errors import PlanError, PlanSyntaxError
from pipex.plan.placement import Placement

LayerKind = Literal["embedding", "transformer", "mtp", "loss"]

_KINDS: dict[str, LayerKind] = {"E": "embedding", "t": "transformer", "m": "mtp", "L": "loss"}
_LETTERS = {kind: letter for letter, kind in _KINDS.items()}

_MAX_UNITS = 100_000
"""Layers and stages of a layout, and characters of its text: more than any model has, and quick to count."""


@dataclass(frozen=True)
class Layout:
    """The layers of every stage.

    Attributes:
        ranks: number of ranks P.
        stages: per stage the kinds of its layers, in order. P × V of them.

    Raises:
        PlanError: the stages are not P × V, or break a rule of Megatron-LM: embedding first, loss last, each once; the
            mtp layers after all transformer layers, in one stage, which is the last of its rank.
    """

    ranks: int
    stages: tuple[tuple[LayerKind, ...], ...]

    def __post_init__(self) -> None:
        count = len(self.stages)
        if self.ranks < 1:
            raise PlanError("too few ranks for the layout", got=self.ranks, needed="at least 1")
        if not count or count % self.ranks:
            above = max(1, -(-count // self.ranks)) * self.ranks
            nearest = f"{above} stages" if count < self.ranks else f"{above - self.ranks} or {above} stages"
            raise PlanError(f"the layout does not fit {self.ranks} ranks", got=f"{count} stages", needed=nearest)
        layers = [kind for stage in self.stages for kind in stage]
        for kind, at in (("embedding", 0), ("loss", len(layers) - 1)):
            places = [place for place, layer in enumerate(layers) if layer == kind]
            if places != [at]:
                where = "first" if kind == "embedding" else "last"
                got = f"it as layer {places[0]} of {len(layers)}" if len(places) == 1 else f"{len(places)} of them"
                raise PlanError(f"bad {kind} in the layout", got=got, needed=f"one, {where} of all layers")
        holders = [stage for stage, kinds in enumerate(self.stages) if "mtp" in kinds]
        if not holders:
            return
        if len(holders) > 1:
            raise PlanError("bad mtp in the layout", got=f"it in {len(holders)} stages", needed="all in one stage")
        if "transformer" in layers[layers.index("mtp") :]:
            raise PlanError("bad mtp in the layout", got="a transformer layer after it", needed="it after all of them")
        if holders[0] < count - self.ranks:
            needed = f"it in one of the stages {count - self.ranks} to {count - 1}, the last of their ranks"
            raise PlanError("bad mtp in the layout", got=f"it in stage {holders[0]}", needed=needed)

    @property
    def placement(self) -> Placement:
        """Stage s is on rank s mod P."""
        return Placement("loop", self.ranks, len(self.stages) // self.ranks)

    @property
    def counts(self) -> list[int]:
        """Layers per stage, for ``pipex.split_model(model, stages, balance=counts)`` of a model whose layers are those
        of the layout, embedding and loss (the output head) included. ``split_model`` refuses empty stages."""
        return [len(stage) for stage in self.stages]

    @staticmethod
    def from_text(text: str, ranks: int) -> Layout:
        """Reads a layout string.

        Raises:
            PlanSyntaxError: it cannot be read; names the column of the first wrong character, counted from 1.
            PlanError: the layers or the number of ranks do not fit.
        """
        if len(text) > _MAX_UNITS:
            raise PlanSyntaxError(
                "the layout is too long", got=f"{len(text)} characters", needed=f"{_MAX_UNITS} at most"
            )
        return Layout(ranks, tuple(tuple(_KINDS[letter] for letter in stage) for stage in _expanded(text).split("|")))

    def to_text(self) -> str:
        """The layout string; ``Layout.from_text(layout.to_text(), layout.ranks) == layout``."""
        *before, last = map(_stage_text, self.stages)
        runs = [(text, len(list(group))) for text, group in groupby(before)]
        items = [f"{text}|" if times == 1 else f"({text}|)*{times}," for text, times in runs]
        return "".join([*items, last]).removesuffix(",")


def _stage_text(stage: tuple[LayerKind, ...]) -> str:
    runs = [(_LETTERS[kind], len(list(group))) for kind, group in groupby(stage)]
    items = [letter * times if times < 3 else f"{letter}*{times}," for letter, times in runs]
    return "".join(items).removesuffix(",")


_TIMES = re.compile(r"\*([1-9][0-9]{0,8})")


def _expanded(text: str) -> str:
    """The layout with every repetition written out, and no commas."""
    whole: list[str] = []
    group: list[str] | None = None
    opened = at = length = 0

    def wrong(needed: str) -> PlanSyntaxError:
        got = repr(text[at : at + 20]) if at < len(text) else "the end"
        return PlanSyntaxError(f"cannot read the layout at column {at + 1}", got=got, needed=needed)

    def repeated(unit: str, times_needed: bool) -> str:
        """``unit`` as often as the text says from here on, or once."""
        nonlocal at, length
        times = _TIMES.match(text, at)
        if times is None:
            if times_needed or text.startswith("*", at):
                raise wrong("'*' and a number, at least 1")
            length += len(unit)
            return unit
        # What a group repeats was counted once already.
        length += len(unit) * (int(times[1]) - times_needed)
        if length > _MAX_UNITS:
            raise wrong(f"at most {_MAX_UNITS} layers and stages in all")
        at = times.end()
        return unit * int(times[1])

    while at < len(text):
        letter = text[at]
        into = whole if group is None else group
        if letter in _KINDS or letter == "|":
            at += 1
            into.append(repeated(letter, times_needed=False))
        elif letter == ",":
            at += 1
        elif letter == "(" and group is None:
            group, opened = [], at
            at += 1
        elif letter == ")" and group:
            at += 1
            whole.append(repeated("".join(group), times_needed=True))
            group = None
        else:
            raise wrong(f"one of {', '.join(_KINDS)}, '|', ',', or a group such as (tt|)*2 in no other group")
    if group is not None:
        at = opened
        raise wrong("a group that is closed, as in (tt|)*2")
    return "".join(whole)
