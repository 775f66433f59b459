"""Cuts a batch into micro-batches.

A batch is a tensor, a tuple or a dict; the first stage takes a tuple as its positional arguments and a dict as its
keyword arguments. A target is anything of these too, and reaches the loss function as what it is. In either, tuples,
lists and dicts may stand in each other.

What is cut: tensors with N rows (dimension 0), where N is the one number of rows in the batch that is not 1.
What every micro-batch gets as it is: tensors of one row (a (1, S) table of positions) or without dimensions, None,
whatever is no tensor, and what is marked as ``Whole``. Tensors of yet another number of rows are refused.

A list in place of a batch is no argument: it holds one micro-batch after the other, ready, and of any shapes. Each
weighs as many samples as its first tensor has rows; not counting a tensor that has 1 row in every micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipex.errors import InputError
from pipex.partition.stage import Keywords


@dataclass(frozen=True, slots=True)
class Whole:
    """Marks a value that every micro-batch gets as it is, though its number of rows may look like the batch's."""

    value: Any


@dataclass(frozen=True, slots=True)
class Cut:
    """How a batch becomes micro-batches.

    Attributes:
        samples: of each micro-batch; nothing where all of the batch goes to every micro-batch.
        rows: of the tensors that are cut; None where the micro-batches are ready.
        forms: of the batch, or of each ready micro-batch, in words.
    """

    samples: tuple[int, ...]
    rows: int | None
    forms: tuple[str, ...]


def look(value: Any, what: str, microbatches: int, *, fewer: bool = False) -> Cut:
    """Finds out what is to be cut, by the rule above.

    Args:
        what: "batch" or "target", for messages.
        microbatches: of the plan.
        fewer: whether there may be fewer, and any number of ready ones: where the plan's order need not be kept.

    Raises:
        InputError: it cannot be cut, or is a list of another number of micro-batches.
    """
    tensors = list(_tensors(value))
    if any(tensor.is_meta for tensor in tensors):
        raise InputError(f"a tensor of the {what} has no values", got="one on the meta device",
                         needed="tensors in memory")  # fmt: skip
    if isinstance(value, list):
        if not value or (len(value) != microbatches and not fewer):
            raise InputError(
                f"a list is a {what} of ready micro-batches", got=f"{len(value)} of them",
                needed=f"{microbatches}, as many as the plan has",
                fix="pass a tuple, or a dict, if these are the arguments of one batch",
            )  # fmt: skip
        ready = _samples(value)
        if what == "batch" and not any(ready):
            raise InputError("the ready micro-batches of the batch are all empty", got="0 samples",
                             needed="at least one in all", fix="leave such a batch out")  # fmt: skip
        return Cut(ready, None, tuple(map(_form, value)))
    for tensor in tensors:
        if tensor.layout is not torch.strided or tensor.is_nested:
            raise InputError(
                f"a tensor of the {what} cannot be cut",
                got="a nested tensor" if tensor.is_nested else f"a {tensor.layout} tensor", needed="a dense one",
                fix="pass a list of ready micro-batches",
            )  # fmt: skip
    rows = {tensor.shape[0] for tensor in tensors if tensor.dim()}
    more = sorted(rows - {1})
    if len(more) > 1:
        raise InputError(
            f"the tensors of the {what} have no common number of samples",
            got=f"{_form(value)}: {' and '.join(map(str, more))} rows",
            needed="one size of dimension 0 (and 1 for what all micro-batches get)",
            fix="mark what is not to be cut as pipex.Whole(...)",
        )  # fmt: skip
    if not rows:
        return Cut((), 1, (_form(value),))
    most = max(rows)
    return Cut(
        tuple(sizes(most, max(1, min(most, microbatches)) if fewer else microbatches, what)), most, (_form(value),)
    )


def check_keywords(batch: Any) -> None:
    """Raises InputError if a dict in place of a batch's arguments has keys that are no names."""
    for piece in batch if isinstance(batch, list) else (batch,):
        if isinstance(piece, Mapping) and not all(isinstance(key, str) for key in piece):
            raise InputError("the batch's dict holds keyword arguments of the first stage", got=f"keys {list(piece)}",
                             needed="names")  # fmt: skip


def sizes(samples: int, microbatches: int, what: str = "batch") -> list[int]:
    """Samples of each micro-batch, largest first, differing by at most one: 10 in 4 gives 3, 3, 2, 2.

    Raises:
        InputError: fewer samples than micro-batches.
    """
    if samples < microbatches:
        raise InputError(
            f"the {what} is too small for the plan",
            got=f"{samples} samples for {microbatches} micro-batches", needed="at least one sample per micro-batch",
            fix="use a larger batch or a plan with fewer micro-batches",
        )  # fmt: skip
    base, larger = divmod(samples, microbatches)
    return [base + 1] * larger + [base] * (microbatches - larger)


def cut(value: Any, how: Cut, microbatches: int, device: torch.device) -> list[Any]:
    """The micro-batches, each of the batch's own structure, on ``device``.

    Args:
        how: what ``look`` has found.
    """
    if how.rows is None:
        return [_map(piece, lambda t: t.to(device)) for piece in value]
    return list(_pieces(value, how, microbatches, device))


def unmarked(batch: Any) -> list[tuple[Any, ...]]:
    """A batch as inputs of the first stage, uncut and without marks; of ready micro-batches each of them."""
    pieces = batch if isinstance(batch, list) else [batch]
    return [as_arguments(_map(piece, lambda tensor: tensor)) for piece in pieces]


def as_arguments(piece: Any) -> tuple[Any, ...]:
    """A micro-batch as inputs of the first stage."""
    if isinstance(piece, Tensor):
        return (piece,)
    if isinstance(piece, Mapping):
        return (Keywords(piece),)
    return tuple(piece) if isinstance(piece, (tuple, list)) else (piece,)


def _pieces(value: Any, how: Cut, microbatches: int, device: torch.device) -> Sequence[Any]:
    if isinstance(value, Tensor):
        tensor = value.to(device)
        if not tensor.dim() or tensor.shape[0] != how.rows:
            return [tensor] * microbatches
        # Not as views each is a tensor of its own to autograd: what a layer writes into one of them in place does not
        # spoil what was saved of another.
        split = torch.split if tensor.requires_grad else torch.unsafe_split_with_sizes
        return split(tensor, list(how.samples))
    if isinstance(value, Whole):
        return [_map(value.value, lambda t: t.to(device))] * microbatches
    if not isinstance(value, (Mapping, tuple, list)) or not len(value):
        return [value] * microbatches
    children = value.values() if isinstance(value, Mapping) else value
    columns = zip(*(_pieces(child, how, microbatches, device) for child in children), strict=True)
    return [_like(value, row) for row in columns]


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The value with every tensor in it changed, and no mark left."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Whole):
        return _map(value.value, change)
    if isinstance(value, (Mapping, tuple, list)):
        children = value.values() if isinstance(value, Mapping) else value
        return _like(value, [_map(child, change) for child in children])
    return value


def _like(value: Any, children: Sequence[Any]) -> Any:
    """A container as ``value`` is, of other children."""
    if isinstance(value, Mapping):
        return dict(zip(value, children, strict=True))
    if hasattr(value, "_fields"):  # a named tuple
        return type(value)(*children)
    return list(children) if isinstance(value, list) else tuple(children)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors that may have to be cut, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for child in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(child)


def _samples(pieces: Sequence[Any]) -> tuple[int, ...]:
    """Of each ready micro-batch: the rows of the first tensor that has not 1 row everywhere."""
    rows = [[tensor.size(0) for tensor in _tensors(piece) if tensor.dim()] for piece in pieces]
    if len(set(map(len, rows))) > 1:  # of different structures: each by itself
        return tuple(next((number for number in its if number != 1), 1) for its in rows)
    return next((column for column in zip(*rows, strict=True) if set(column) != {1}), (1,) * len(pieces))


def _form(value: Any) -> str:
    """The value in words: ``(float32[8, 6], None)``."""
    if isinstance(value, Tensor) and value.is_nested:
        return f"nested {str(value.dtype).removeprefix('torch.')}[{value.size(0)}, ...]"
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, Whole):
        return f"Whole({_form(value.value)})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_form(child)}' for key, child in value.items())}}}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_form, value))})"
    return "None" if value is None else type(value).__name__
