"""What a model's forward is called with: tensors, which are others in every batch, and constants, as in the sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

from torch import Tensor

from pipex.errors import InputError
from pipex.partition.own_forward.tree import junk
from pipex.partition.stage import Keywords
from pipex.torch_internals import tree_flatten, tree_unflatten, version

ACTIVATIONS = ("output_hidden_states", "output_attentions")
"""Arguments that ask a model for all that travels between its layers."""

CACHES = ("use_cache", "past_key_values", "cache", "cache_params")
"""Arguments for what a model keeps from token to token."""


class Arguments:
    """Of the sample that a model is split with.

    Args:
        sample: keyword arguments by name, positional ones as a sequence, or one tensor.
        always: keyword arguments that every call gets besides.

    Raises:
        InputError: there is no tensor among them, or they ask for what a pipeline does not have.
    """

    def __init__(self, sample: Any, always: Mapping[str, Any]) -> None:
        args, kwargs = _parted(sample)
        for name in ACTIVATIONS:
            if kwargs.get(name):
                raise _asked(name, "activations that are on all ranks", "look into a layer with a hook")
        for name in CACHES:
            value = kwargs.get(name)
            if value is not None and value is not False and not isinstance(value, Tensor):
                raise _asked(name, "what is for generation", "generate with what the trained model was saved as")
        if "num_items_in_batch" in kwargs:
            raise _asked("num_items_in_batch", "a count that the pipeline makes itself", "give it labels alone")
        self._always = dict(always)
        self.names = list(kwargs)
        """of the keyword arguments"""
        leaves, self._spec = tree_flatten((args, kwargs))
        self._constants = {n: leaf for n, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
        self._given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.tensors = [tensor.detach().clone() for tensor in self._given]
        """of the sample"""
        self._written: frozenset[int] = frozenset()  # which of them the forward works on in place
        if not self.tensors:
            raise InputError("the sample holds no tensor", got=type(sample).__name__,
                             needed="a batch as those of training")  # fmt: skip

    def look(self) -> None:
        """Called after the first forward on the sample: sees what it has worked on in place, of which every stage needs
        a copy of its own."""
        self._written |= {n for n, tensor in enumerate(self.tensors) if version(tensor)}
        self.tensors = [tensor.detach().clone() for tensor in self._given]

    def let_go(self) -> None:
        """Keeps of the sample no more than its forms."""
        self.tensors, self._given = list(map(form_of, self.tensors)), []

    def call(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a forward on these."""
        left = (tensor.clone() if n in self._written else tensor for n, tensor in enumerate(tensors))
        leaves = [self._constants[n] if n in self._constants else next(left) for n in range(self._spec.num_leaves)]
        args, kwargs = tree_unflatten(leaves, self._spec)
        return args, kwargs | self._always

    def sample(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The sample itself."""
        return self.call(self.tensors)

    def of(self, inputs: Sequence[Any]) -> list[Tensor]:
        """The tensors of a batch: the inputs of the first stage.

        Raises:
            InputError: they are not what the sample was.
        """
        args, kwargs = tuple(inputs), {}
        if inputs and isinstance(inputs[-1], Keywords):
            args, kwargs = tuple(inputs[:-1]), dict(inputs[-1])
        if kwargs.keys() != set(self.names) or len(args) != len(self._spec.children()[0].children()):
            raise InputError(
                "the batch has other arguments than the sample that the model was split with",
                got=_words(args, kwargs), needed=_words(*tree_unflatten([0] * self._spec.num_leaves, self._spec)),
                fix="bring every batch into one form, and split the model with a sample of it",
            )  # fmt: skip
        leaves, spec = tree_flatten((args, {name: kwargs[name] for name in self.names}))
        constants = {n: leaf for n, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
        if spec != self._spec or constants.keys() != self._constants.keys():
            raise InputError(
                "an argument of the batch is of another kind than in the sample that the model was split with",
                got=_kinds(args, kwargs), needed=_kinds(*self.call(self.tensors)),
                fix="split the model with a sample that is like the batches",
            )  # fmt: skip
        for n, value in constants.items():
            if value is not self._constants[n] and value != self._constants[n]:
                raise InputError(
                    "what is no tensor is to be as in the sample, since the other ranks do not see the batch",
                    got=repr(value), needed=repr(self._constants[n]), fix="split the model with a sample that has it",
                )  # fmt: skip
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def form_of(tensor: Tensor, value: float = nan) -> Tensor:
    """One element that is not a number, or another value, in place of all of a tensor's."""
    return junk(tensor.shape, tensor.dtype, tensor.device, value)


def _asked(name: str, what: str, fix: str) -> InputError:
    return InputError(f"the sample asks for {what}", got=name, needed="what a step of training needs",
                      fix=f"leave it out, and {fix}")  # fmt: skip


def _parted(sample: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(sample, Mapping):
        return (), dict(sample)
    return (sample,) if isinstance(sample, Tensor) else tuple(sample), {}


def _words(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    return ", ".join([*(["positional"] * len(args)), *sorted(kwargs)]) or "nothing"


def _kinds(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    named = [*((str(n), value) for n, value in enumerate(args)), *kwargs.items()]
    return ", ".join(f"{name}: {type(value).__name__}" for name, value in named)
