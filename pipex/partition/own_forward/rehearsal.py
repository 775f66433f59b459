"""What a unit needs of what earlier ones have made.

The code between the calls is run alone: calls return what was recorded, or what is not a number. If all that the
unit's own calls are given is then the same as in the record, the unit does not need what was left out. Whatever is
computed from what is not a number is none either, so what is needed is what alone changes something if left out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from pipex.errors import PipexError, UnsupportedModule, headline
from pipex.partition.own_forward.conventions import collected
from pipex.partition.own_forward.crossing import Form, Leaf
from pipex.partition.own_forward.gates import Gate, Left
from pipex.partition.own_forward.record import Record, Seed, clone
from pipex.partition.own_forward.stage_tree import Places, StageTree
from pipex.partition.own_forward.tree import Parted, junk
from pipex.torch_internals import parameters_of, tree_leaves, tree_unflatten

Batch = Callable[[Collection[int]], tuple[tuple[Any, ...], dict[str, Any]]]
"""The sample's arguments, without the values of these of its leaves."""


@dataclass(frozen=True, slots=True)
class Need:
    """What a unit needs.

    Attributes:
        made: by earlier calls.
        given: leaves of the batch whose values it does not need.
        held: paths of outer modules and containers' parameters that it reads beside its calls.
    """

    made: frozenset[Leaf]
    forms_only: frozenset[int]
    held: frozenset[str]


class _Differs(BaseException):
    """A call was given something else than in the record."""


@dataclass(slots=True)
class _Rehearsed:
    record: Record
    chain: Sequence[Form]
    begin: int
    end: int
    without: Collection[Leaf]
    seed: Seed
    _at: int = 0

    def call(self, gate: Gate, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        number = self._at
        self._at += 1
        if number >= len(self.chain) or self.chain[number].path != gate.path:
            raise _Differs
        called, form = self.record.calls[number], self.chain[number]
        if number >= self.begin and not same(tree_leaves((args, kwargs)), called.arguments):
            raise _Differs
        if number == self.end - 1 and self.end < len(self.chain):
            raise Left
        for name, entries in called.beside.items():
            collected()[name].extend(self._left(Leaf(number, name, n), entry) for n, entry in enumerate(entries))
        if form.last:  # as in the record, in which the calls have drawn from other numbers since the unit began
            self.seed(len(self.record.units) + 1 + form.unit)
        leaves = [self._left(Leaf(number, "", n), clone(leaf)) for n, leaf in enumerate(called.output)]
        return leaves[0] if form.single else tree_unflatten(leaves, form.spec)

    def _left(self, leaf: Leaf, value: Any) -> Any:
        if leaf in self.without and isinstance(value, Tensor):
            return junk(value.shape, value.dtype, value.device)
        return value


class Rehearsal:
    """Args:
    model: that was recorded.
    batch: the sample.
    floats: its leaves that are floating-point tensors.
    seed: that the model was recorded with.
    """

    def __init__(
        self, model: nn.Module, parted: Parted, places: Places, record: Record, chain: Sequence[Form], batch: Batch,
        floats: Iterable[int], seed: Seed,
    ) -> None:  # fmt: skip
        self._seed = seed
        self._places, self._record, self._chain, self._batch = places, record, chain, batch
        self._floats = frozenset(floats)
        self._model = model
        self._modules = {path: _finding(m) for path, m in (*parted.layers.items(), *parted.outer.items())}
        self._parameters = {
            f"{path}.{name}" if path else name: parameter
            for path, container in parted.containers.items()
            for name, parameter in parameters_of(container).items()
            if parameter is not None
        }
        self._outer = frozenset(parted.outer)
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._trees: dict[frozenset[str], StageTree] = {}

    def need(self, unit: int) -> Need:
        """What the unit needs.

        Raises:
            UnsupportedModule: with all that there is, its calls are given something else than in the record.
        """
        calls = self._record.units[unit]
        begin, end = calls.start, calls.stop
        own = {self._chain[call].path for call in calls}
        could_hold = (self._outer | self._parameters.keys()) - own
        before = [leaf for call in range(begin) for leaf in self._chain[call].tensors(call)]
        last = [leaf for leaf in before if leaf.call == begin - 1 and not leaf.name]

        def works(made: Iterable[Leaf], given: Iterable[int], held: Collection[str]) -> bool:
            without = set(before).difference(made)
            return self._same(begin, end, without, self._floats.difference(given), own | set(held)) is None

        # What most layers need is tried first.
        made: Collection[Leaf] = last
        given: Collection[int] = () if unit else self._floats
        held: Collection[str] = ()
        if not works(made, given, held):
            if (problem := self._same(begin, end, set(), set(), own | could_hold)) is not None:
                raise UnsupportedModule(
                    f"the model cannot be cut before {self._chain[begin].path}", got=problem,
                    needed="a forward whose calls depend on the batch and on what earlier calls have returned alone",
                    fix="keep it in one stage with what it shares more with (balance=), or switch off what it keeps "
                    "beside (caches)",
                )  # fmt: skip
            made, given, held = before, self._floats, could_hold
            made = _needed(made, lambda some: works(some, given, held), key=lambda leaf: leaf.call)
            given = _needed(given, lambda some: works(made, some, held))
            held = _needed(held, lambda some: works(made, given, some))
        elif len(last) > 1:
            made = _needed(last, lambda some: works(some, given, held))
        return Need(frozenset(made), self._floats.difference(given), frozenset(held))

    def _same(
        self, begin: int, end: int, without: Collection[Leaf], forms_only: Collection[int], held: Collection[str]
    ) -> str | None:
        """Runs the code between the calls; what is not as recorded, or nothing."""
        key = frozenset(held)
        if key not in self._trees:
            self._trees[key] = StageTree(
                self._places, {p: find for p, find in self._modules.items() if p in key},
                {p: parameter for p, parameter in self._parameters.items() if p in key}, self._device,
            )  # fmt: skip
        tree = self._trees[key]
        args, kwargs = self._batch(forms_only)
        tree.train(True)
        tree.cross(_Rehearsed(self._record, self._chain, begin, end, without, self._seed))
        self._seed(0)
        try:
            with torch.no_grad():
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
        if end < len(self._chain):
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
        elif one is _MISSING or other is _MISSING or (isinstance(one, _PLAIN) and one != other):
            return False
    return True


_MISSING = object()
_PLAIN = (bool, int, float, str, type(None))


def _finding(module: nn.Module) -> Callable[[], nn.Module]:
    return lambda: module


def _needed(
    all_of: Iterable[Any], works: Callable[[Collection[Any]], bool], key: Callable[[Any], Any] = lambda one: one
) -> set[Any]:
    """What alone cannot be left out; groups of many are tried together first."""
    groups: dict[Any, set[Any]] = {}
    for one in all_of:
        groups.setdefault(key(one), set()).add(one)
    whole = {one for group in groups.values() for one in group}

    def search(keys: Sequence[Any]) -> set[Any]:
        left_out = {one for one_key in keys for one in groups[one_key]}
        if not left_out or works(whole - left_out):
            return set()
        if len(keys) == 1:
            group = sorted(left_out)
            return left_out if len(group) == 1 else {one for one in group if not works(whole - {one})}
        half = len(keys) // 2
        return search(keys[:half]) | search(keys[half:])

    return search(sorted(groups))
