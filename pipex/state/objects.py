"""What else training goes on from, such as a learning-rate scheduler: anything with ``state_dict`` and
``load_state_dict``.

Each rank saves its own. The tensors of a state are called ``state/<rank>/<name>/<number>``, and one meta entry
``state/<rank>/<name>`` holds the rest as JSON, in which an object of one key stands for what JSON lacks::

    {"tensor": 0}    {"tuple": [..]}    {"dict": [[key, value], ..]}    {"Counter": [[key, value], ..]}

A run on as many ranks gives every rank its own back. On another number of ranks there is no saying which state is
whose, so then all that were saved must be the same, and every rank goes on from that one.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from pipex.errors import CheckpointError
from pipex.state.checkpoint import Checkpoint, Restore
from pipex.state.manifest import shown

PREFIX = "state/"
DEEPEST = 30
"""Containers within each other; each takes up to three of those that a manifest may have."""


class Stateful(Protocol):
    """Saves what ``state_dict`` returns: numbers, texts, None and tensors, in lists, tuples and dicts."""

    def state_dict(self) -> Any:
        """What ``load_state_dict`` goes on from."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Goes on from it."""


def object_state(objects: Mapping[str, Stateful], rank: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and meta to be saved.

    Raises:
        CheckpointError: an object has no state, or its state holds what cannot be saved; names the place.
    """
    tensors: dict[str, Tensor] = {}
    meta: dict[str, Any] = {}
    for name, thing in objects.items():
        _check_stateful(name, thing)
        found: list[Tensor] = []
        meta[_key(rank, name)] = _pack(thing.state_dict(), name, found, DEEPEST)
        tensors |= {f"{_key(rank, name)}/{number}": tensor for number, tensor in enumerate(found)}
    return tensors, meta


def read_object_state(checkpoint: Checkpoint, objects: Mapping[str, Stateful], rank: int, ranks: int) -> Restore:
    """Reads the saved states of these objects, for one of ``ranks`` ranks; what it returns hands them over.

    Raises:
        CheckpointError: an object has no ``load_state_dict``, or nothing was saved under its name; the ranks that saved
            had different states, and were another number; a file is damaged.
    """
    for name, thing in objects.items():
        _check_stateful(name, thing)
    states = {name: _read(checkpoint, name, rank, ranks) for name in objects}

    def restore() -> None:
        for name, thing in objects.items():
            try:
                thing.load_state_dict(states[name])
            except Exception as error:
                raise CheckpointError(
                    f"{type(thing).__name__} does not take the state {name!r} in {checkpoint.directory}",
                    got=f"{type(error).__name__}: {error}", fix="load without it",
                ) from error  # fmt: skip

    return restore


def _key(rank: int, name: str) -> str:
    return f"{PREFIX}{rank}/{name}"


def _check_stateful(name: str, thing: object) -> None:
    if not (callable(getattr(thing, "state_dict", None)) and callable(getattr(thing, "load_state_dict", None))):
        raise CheckpointError(
            f"the state {name!r} can be neither saved nor loaded", got=f"an object of class {type(thing).__name__}",
            needed="one with the methods state_dict and load_state_dict", fix="put plain values into meta instead",
        )  # fmt: skip


def _pack(value: Any, place: str, tensors: list[Tensor], deeper: int) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value.detach())
        return {"tensor": len(tensors) - 1}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if type(value) not in (list, tuple, dict, OrderedDict, Counter) or not deeper:
        raise CheckpointError(
            f"the state {place} cannot be saved",
            got=type(value).__name__ if deeper else f"containers more than {DEEPEST} deep",
            needed="numbers, texts, None and tensors, in lists, tuples and dicts",
            fix="let state_dict leave it out, or turn it into these",
        )
    if isinstance(value, dict):
        pairs = [
            [_pack(key, f"{place}, a key", tensors, deeper - 1), _pack(inner, f"{place}[{key!r}]", tensors, deeper - 1)]
            for key, inner in value.items()
        ]
        return {"Counter" if isinstance(value, Counter) else "dict": pairs}
    items = [_pack(inner, f"{place}[{index}]", tensors, deeper - 1) for index, inner in enumerate(value)]
    return items if isinstance(value, list) else {"tuple": items}


def _read(checkpoint: Checkpoint, name: str, rank: int, ranks: int) -> Any:
    savers = [saver for saver in range(checkpoint.ranks) if _key(saver, name) in checkpoint.meta]
    if not savers:
        raise CheckpointError(
            f"the checkpoint in {checkpoint.directory} has no state {name!r}",
            fix="load without it, or from a checkpoint that was saved with it",
        )
    if ranks == checkpoint.ranks and rank in savers:
        return _unpack(checkpoint, name, *_saved(checkpoint, name, rank))
    first, *others = (_saved(checkpoint, name, saver) for saver in savers)
    if not all(_same(first, other) for other in others):
        raise CheckpointError(
            f"the ranks that saved {name!r} in {checkpoint.directory} had different states of it",
            got=f"rank {rank} of {ranks}", needed=f"as many ranks as saved it, {checkpoint.ranks}",
            fix="load without it, or save only what is the same on all ranks",
        )  # fmt: skip
    return _unpack(checkpoint, name, *first)


Saved = tuple[Any, dict[int, Tensor]]
"""A state as JSON, and the tensors that it holds by number."""


def _saved(checkpoint: Checkpoint, name: str, rank: int) -> Saved:
    key = _key(rank, name)
    packed = checkpoint.meta[key]
    numbers = list(_numbers(packed))
    tensors = checkpoint.load(f"{key}/{number}" for number in numbers)
    return packed, {number: tensors[f"{key}/{number}"] for number in numbers}


def _numbers(packed: Any) -> Iterator[int]:
    for tag, inner in packed.items() if isinstance(packed, dict) else [("list", packed)]:
        if tag == "tensor" and type(inner) is int:
            yield inner
        for value in inner if isinstance(inner, list) else ():
            yield from _numbers(value)


def _same(one: Saved, other: Saved) -> bool:
    def as_bytes(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1).view(torch.uint8)  # NaN is not equal to itself

    return json.dumps(one[0]) == json.dumps(other[0]) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(as_bytes(a), as_bytes(b))
        for a, b in ((tensor, other[1][number]) for number, tensor in one[1].items())
    )


def _unpack(checkpoint: Checkpoint, name: str, packed: Any, tensors: dict[int, Tensor]) -> Any:
    def unpack(value: Any) -> Any:
        if isinstance(value, list):
            return [unpack(inner) for inner in value]
        if not isinstance(value, dict):
            return value
        ((tag, inner),) = value.items()
        if tag == "tensor":
            return tensors[inner]
        return _CONTAINERS[tag](unpack(inner) if isinstance(inner, list) else None)

    try:
        return unpack(packed)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"the state {name!r} in {checkpoint.directory} cannot be read",
            got=shown(packed),
            fix="use another checkpoint",
        ) from error


_CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "tuple": tuple,
    "dict": dict,
    "Counter": lambda pairs: Counter(dict(pairs)),
}
