"""What a stage's gates do while it runs: the calls before it are past, its own run, and behind them it ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipex.errors import UnsupportedModule
from pipex.hugging_face.conventions import collected
from pipex.partition.own_forward.gates import Gate, Left
from pipex.partition.own_forward.record import Called, Record
from pipex.torch_internals import TreeSpec, tree_leaves, tree_unflatten


class Leaf(NamedTuple):
    """A tensor that a call has made: a leaf of its output by number, or the n-th of what was collected beside.

    Attributes:
        call: its number in the chain.
        name: of the collection; empty for the output.
        number: in it.
    """

    call: int
    name: str
    number: int


@dataclass(frozen=True, slots=True)
class Form:
    """What every call of the chain looks like, on every stage.

    Attributes:
        path: of the gate.
        layer: whether it is a layer's.
        spec: of its output.
        single: whether that is one tensor and nothing else.
        leaves: of the output: None for a tensor, else the value itself in a tuple.
        beside: what is collected under each name: whether it is a tensor, or None.
        written: as ``Called.written``: every stage's own code does so, each on what the call has returned.
    """

    path: str
    layer: bool
    spec: TreeSpec
    single: bool
    leaves: tuple[tuple[Any] | None, ...]
    beside: Mapping[str, tuple[bool, ...]]
    written: frozenset[int]

    @classmethod
    def of(cls, called: Called) -> Form:
        assert called.spec is not None, "the call has returned"
        leaves = tuple(None if isinstance(leaf, Tensor) else (leaf,) for leaf in called.output)
        beside = {name: tuple(entry is not None for entry in entries) for name, entries in called.beside.items()}
        single = called.spec.is_leaf() and leaves == (None,)
        return cls(called.path, called.layer, called.spec, single, leaves, beside, frozenset(called.written))

    def tensors(self, call: int) -> list[Leaf]:
        """All tensors that the call makes."""
        output = [Leaf(call, "", number) for number, leaf in enumerate(self.leaves) if leaf is None]
        beside = [(name, n) for name, entries in self.beside.items() for n, is_one in enumerate(entries) if is_one]
        return output + [Leaf(call, name, n) for name, n in beside]

    def is_of(self, leaves: Sequence[Any], beside: Mapping[str, Sequence[Any]]) -> bool:
        """Whether a call has made what it made of the sample, but for the values of tensors. What is neither a tensor
        nor plain is not looked into."""
        return (
            len(leaves) == len(self.leaves)
            and all(
                isinstance(leaf, Tensor) if one is None else type(leaf) is type(one[0]) and is_same(leaf, one[0])
                for leaf, one in zip(leaves, self.leaves, strict=True)
            )
            and all(tuple(isinstance(e, Tensor) for e in beside[name]) == many for name, many in self.beside.items())
        )


def forms_of(record: Record) -> tuple[Form, ...]:
    """Of the recorded calls.

    Raises:
        UnsupportedModule: one of them returns what neither travels nor is the same for every batch.
    """
    for call in (called for unit in record.units[:-1] for called in (record.calls[n] for n in unit)):
        for leaf in call.output:
            sparse = isinstance(leaf, Tensor) and (leaf.is_nested or leaf.layout is not torch.strided)
            if sparse or not isinstance(leaf, (Tensor, *_PLAIN, torch.dtype, torch.device)):
                raise UnsupportedModule(
                    f"{call.path} returns what cannot travel to another stage",
                    got=f"a {leaf.layout} tensor" if sparse else type(leaf).__name__,
                    needed="dense tensors, numbers, None, and tuples, lists and dicts of them",
                    fix="return tensors from it, or name other lists of layers (layers=)",
                )  # fmt: skip
    return tuple(map(Form.of, record.calls))


@dataclass(slots=True)
class Crossing:
    """One forward of a stage.

    Attributes:
        chain: all calls.
        begin, end: the stage's own.
        received: what is there of past calls: what they made, or its form.
        wanted: by call, of what the stage is to keep what the call makes.
        nothing: stands for what a past call made and nobody needs.
        seed: as ``record.Seed``, or None.
        at_end: called once the last layer of the chain is done.
    """

    chain: Sequence[Form]
    begin: int
    end: int
    received: Mapping[Leaf, Tensor]
    wanted: Mapping[int, Collection[Leaf]]
    nothing: Tensor
    seed: Callable[[int], None] | None = None
    at_end: Callable[[], object] | None = None
    made: dict[Leaf, Tensor] = field(default_factory=dict)
    _at: int = 0

    def call(self, gate: Gate, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Raises UnsupportedModule if the forward calls what the sample's did not."""
        number = self._at
        self._at += 1
        form = self.chain[number] if number < len(self.chain) else None
        if form is None or form.path != gate.path:
            raise UnsupportedModule(
                f"the model's forward calls {gate.path} here",
                got=f"another order of calls than the sample's, from number {number} on",
                needed=f"{form.path if form else 'no call any more'}, as with the sample the model was split with",
                fix="split it with a sample that is like the batches, and switch off what drops layers at random",
            )  # fmt: skip
        if number < self.begin:
            output = self._past(number, form)
        else:
            output = self._own(number, form, gate, args, kwargs)
            if number == self.end - 1 and self.end < len(self.chain):
                raise Left
        if self.seed is not None:
            self.seed(number + 1)
        if self.at_end is not None and form.layer and not any(later.layer for later in self.chain[number + 1 :]):
            self.at_end()
        return output

    def _own(self, number: int, form: Form, gate: Gate, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before = {name: len(entries) for name, entries in collected().items()} if form.beside else {}
        output = gate.real(*args, **kwargs)
        if self.end == len(self.chain):
            return output
        leaves = [output] if isinstance(output, Tensor) else tree_leaves(output)
        beside = {name: collected()[name][before.get(name, 0) :] for name in form.beside}
        if not form.is_of(leaves, beside):
            raise UnsupportedModule(
                f"{gate.path} returned something else than with the sample, which later stages do not see",
                got=_words(leaves), needed=_words([Tensor if leaf is None else leaf[0] for leaf in form.leaves]),
                fix="split the model with a sample that is like the batches, or bring these into one form",
            )  # fmt: skip
        for leaf in self.wanted.get(number, ()):
            tensor = beside[leaf.name][leaf.number] if leaf.name else leaves[leaf.number]
            self.made[leaf] = tensor.clone() if not leaf.name and leaf.number in form.written else tensor
        return output

    def _past(self, number: int, form: Form) -> Any:
        for name, entries in form.beside.items():
            for n, is_one in enumerate(entries):
                collected()[name].append(self.received.get(Leaf(number, name, n), self.nothing) if is_one else None)
        leaves: list[Any] = []
        for n, constant in enumerate(form.leaves):
            found = self.received.get(Leaf(number, "", n), self.nothing)
            leaves.append(found.clone() if n in form.written else found if constant is None else constant[0])
        return leaves[0] if form.single else tree_unflatten(leaves, form.spec)


def is_same(one: object, other: object) -> bool:
    """Of leaves that are no tensors, as far as they are plain."""
    return not isinstance(one, _PLAIN) or one == other


_PLAIN = (bool, int, float, str, type(None))


def _words(leaves: Sequence[Any]) -> str:
    return ", ".join("a tensor" if leaf is Tensor or isinstance(leaf, Tensor) else repr(leaf)[:40] for leaf in leaves)
