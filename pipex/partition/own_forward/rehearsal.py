"""What a unit needs of what earlier ones have made.

The code between the calls is run alone: calls return what was recorded, or what is not a number. If all that the
unit's own calls are given is then the same as in the record, the unit does not need what was left out. Whatever is
computed from what is not a number is none either, so that nothing of use comes from it unseen.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from math import inf, nan
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pipex.errors import PipexError, UnsupportedModule, headline
from pipex.hugging_face.conventions import collected
from pipex.partition.own_forward.arguments import form_of
from pipex.partition.own_forward.crossing import Form, Leaf, is_same
from pipex.partition.own_forward.gates import Gate, Left
from pipex.partition.own_forward.kept import clone
from pipex.partition.own_forward.record import Record, Seed
from pipex.partition.own_forward.stage_tree import Places, StageTree
from pipex.partition.own_forward.tree import Parted, nothing, tensors_of_containers
from pipex.torch_internals import tree_leaves, tree_unflatten

Found = TypeVar("Found")

Batch = Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
"""The sample's arguments."""

_INSTEAD = (nan, 0.0, inf, -inf)
"""In place of what is not there: what spoils all that is computed from it; and what makes conditions true and false, of
which the sample shows one way only."""


@dataclass(frozen=True, slots=True)
class Need:
    """What a unit needs.

    Attributes:
        made: by earlier calls, with values.
        forms: likewise, without.
        held: paths of outer modules and containers' tensors that it reads beside its calls.
    """

    made: frozenset[Leaf]
    forms: frozenset[Leaf]
    held: frozenset[str]

    @staticmethod
    def both(one: Need, other: Need) -> Need:
        """What is needed in either of two modes."""
        return Need(one.made | other.made, one.forms | other.forms, one.held | other.held)


class _Differs(BaseException):
    """A call was given something else than in the record."""


@dataclass(slots=True)
class _Rehearsed:
    record: Record
    chain: Sequence[Form]
    calls: range
    without: Collection[Leaf]
    forms: Collection[Leaf]
    instead: float
    device: torch.device
    seed: Seed
    _at: int = 0

    def call(self, gate: Gate, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        number = self._at
        self._at += 1
        if number >= len(self.chain) or self.chain[number].path != gate.path:
            raise _Differs
        called, form = self.record.calls[number], self.chain[number]
        if number >= self.calls.start and not same(tree_leaves((args, kwargs)), called.arguments):
            raise _Differs
        if number == self.calls.stop - 1 and self.calls.stop < len(self.chain):
            raise Left
        for name, entries in called.beside.items():
            for n, entry in enumerate(entries):
                missing = Leaf(number, name, n) in self.without
                collected()[name].append(nothing(self.device, self.instead) if missing else entry)
        self.seed(number + 1)
        leaves = []
        for n, value in enumerate(called.output):
            leaf = Leaf(number, "", n)
            if leaf not in self.without:
                leaves.append(clone(value))
            elif leaf in self.forms:
                leaves.append(form_of(value, self.instead))
            else:
                leaves.append(nothing(self.device, self.instead))
        return leaves[0] if form.single else tree_unflatten(leaves, form.spec)


class Rehearsal:
    """Args:
    model: that was recorded.
    batch: the sample.
    seed: that the model was recorded with.
    """

    def __init__(
        self, model: nn.Module, parted: Parted, places: Places, record: Record, chain: Sequence[Form], batch: Batch,
        seed: Seed,
    ) -> None:  # fmt: skip
        self._seed = seed
        self._forms: frozenset[Leaf] = frozenset()  # that the unit before needs
        self._places, self._record, self._chain, self._batch = places, record, chain, batch
        self._modules = {path: _finding(m) for path, m in (*parted.layers.items(), *parted.outer.items())}
        self._tensors = {path: _finding(tensor) for path, tensor in tensors_of_containers(parted).items()}
        self._outer = frozenset(parted.outer)
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._trees: dict[frozenset[str], StageTree] = {}

    def need(self, unit: int) -> Need:
        """What the unit needs.

        Raises:
            UnsupportedModule: with all that there is, its calls are given something else than in the record.
        """
        calls = self._record.units[unit]
        own = {self._chain[call].path for call in calls}
        before = frozenset(leaf for call in range(calls.start) for leaf in self._chain[call].tensors(call))
        last = frozenset(leaf for leaf in before if leaf.call == calls.start - 1 and not leaf.name)
        always = frozenset(leaf for leaf in before if not self._can_be_missed(leaf))
        all_there_is = Need(before, before, self._outer.union(self._tensors).difference(own))

        def works(need: Need) -> bool:
            return self._problem(calls, before, need, own) is None

        # What most layers need is tried first.
        found = Need(last | always, self._forms, frozenset())
        if works(found):
            if len(last) <= 1:
                return found
            return replace(found, made=always | _needed(last, lambda made: works(replace(found, made=made | always))))
        if (problem := self._problem(calls, before, all_there_is, own)) is not None:
            raise UnsupportedModule(
                f"the model cannot be cut before {self._chain[calls.start].path}", got=problem,
                needed="a forward whose calls depend on the batch and on what earlier calls have returned alone",
                fix="keep it in one stage with what it shares more with (balance=), or switch off what it keeps beside "
                "(caches)",
            )  # fmt: skip
        found = all_there_is
        found = replace(found, made=always | _needed(found.made, lambda made: works(replace(found, made=made))))
        found = replace(found, held=_needed(found.held, lambda held: works(replace(found, held=held))))
        found = replace(found, forms=_needed(found.forms, lambda forms: works(replace(found, forms=forms))))
        self._forms = found.forms
        return found

    def _can_be_missed(self, leaf: Leaf) -> bool:
        """Not of integers and truth values: any of them could be what the code compares it with."""
        called = self._record.calls[leaf.call]
        tensor = (called.beside[leaf.name] if leaf.name else called.output)[leaf.number]
        return isinstance(tensor, Tensor) and (tensor.is_floating_point() or tensor.is_complex())

    def _problem(self, calls: range, before: frozenset[Leaf], need: Need, own: Collection[str]) -> str | None:
        """Runs the code between the calls; says what is not as recorded.

        Args:
            calls: of the unit.
            before: all that was made before.
            need: what there is of that.
            own: paths of what the unit calls.
        """
        key = need.held.union(own)
        if key not in self._trees:
            self._trees[key] = StageTree(
                self._places, {p: find for p, find in self._modules.items() if p in key},
                {p: find for p, find in self._tensors.items() if p in key}, self._device,
            )  # fmt: skip
        tree = self._trees[key]
        return next(filter(None, (self._problem_with(value, tree, calls, before, need) for value in _INSTEAD)), None)

    def _problem_with(
        self, instead: float, tree: StageTree, calls: range, before: frozenset[Leaf], need: Need
    ) -> str | None:
        """``instead``: of values that are not there."""
        args, kwargs = self._batch()
        tree.follow(training=tree.root.training)
        forms, without = need.forms - need.made, before - need.made
        tree.cross(_Rehearsed(self._record, self._chain, calls, without, forms, instead, self._device, self._seed))
        self._seed(0)
        try:
            with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # they are of the rehearsal
                output = tree.root(*args, **kwargs)
        except Left:
            return None
        except _Differs:
            return "other arguments than in one process"
        except PipexError:
            raise
        except Exception as error:
            return headline(error)
        finally:
            tree.cross(None)
        if calls.stop < len(self._chain):
            return "a forward that ends before its call"
        return None if same(tree_leaves(output), self._record.output) else "another output than in one process"


def same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether leaves are the same, tensors bit for bit; what is neither a tensor nor plain is not looked into."""
    for one, other in zip_longest(some, others, fillvalue=_MISSING):
        if isinstance(one, Tensor) or isinstance(other, Tensor):
            if not isinstance(one, Tensor) or not isinstance(other, Tensor):
                return False
            if one.shape != other.shape or one.dtype != other.dtype or not torch.equal(one, other):
                return False
        elif one is _MISSING or other is _MISSING or not is_same(one, other):
            return False
    return True


_MISSING = object()


def _finding(one: Found) -> Callable[[], Found]:
    return lambda: one


def _needed(all_of: frozenset[Any], works: Callable[[frozenset[Any]], bool]) -> frozenset[Any]:
    """A part of it that works and of which nothing can be left out; the last ones are left out first."""
    left = all_of

    def leave_out(some: Sequence[Any]) -> None:
        nonlocal left
        if not some:
            return
        if works(left.difference(some)):
            left = left.difference(some)
        elif len(some) > 1:
            half = len(some) // 2
            leave_out(some[half:])
            leave_out(some[:half])

    leave_out(sorted(all_of))
    return left
