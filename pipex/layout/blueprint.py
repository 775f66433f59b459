"""A model without tensors."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from pipex.errors import InputError


@dataclass(frozen=True, slots=True)
class Held:
    """A parameter or buffer.

    Attributes:
        name: in the unsplit model; of one that stands in several places the first.
        form: dtype and shape in words, such as ``float32[8, 64]``.
        nbytes: of its elements.
        parameter: whether it is one, or else a buffer.
        layers: where it stands, rising.
    """

    name: str
    form: str
    nbytes: int
    parameter: bool
    layers: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.form}"


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A model: what its layers are called, and what they hold, in model order.

    Raises:
        InputError: a tensor stands in no layer, or two are called alike.
    """

    layers: tuple[str, ...]
    tensors: tuple[Held, ...]

    def __post_init__(self) -> None:
        for held in self.tensors:
            rising = sorted(set(held.layers))
            if not rising or list(held.layers) != rising or rising[0] < 0 or rising[-1] >= len(self.layers):
                raise InputError(f"{held.name} stands where no layer is", got=f"layers {list(held.layers)}",
                                 needed=f"some of 0 to {len(self.layers) - 1}, rising")  # fmt: skip
        names = Counter(held.name for held in self.tensors)
        if twice := [name for name, times in names.items() if times > 1]:
            raise InputError("two tensors of a model are called alike", got=twice[0], needed="a name for each")

    def layer(self, number: int) -> str:
        """A layer in words: what it is, and all that it holds."""
        own = ", ".join(str(held) for held in self.tensors if number in held.layers)
        return f"{self.layers[number]} ({own})" if own else self.layers[number]
