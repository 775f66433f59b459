"""How much of a stage's weight gradients waits for W, seen once: in its first split micro-batch.

A weight whose accumulator gets a gradient while I runs does not wait, for whatever reason: an operation that is not
recorded, a regime in which none is. Shares are of elements, in parameters of two dimensions or more, since the work on
a weight's gradient grows with these; biases and norms, whose gradients are sums, count for nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from pipex.backward.passes import watchers
from pipex.backward.weights import reachable
from pipex.errors import outside

LITTLE = 0.5
"""Below this share, a plan that splits backwards does not do what it was chosen for."""


class Waiting:
    """Looks at one stage.

    Args:
        module: the stage.
        index: its number, for people.
    """

    def __init__(self, module: nn.Module, index: int = 0) -> None:
        self._module = module
        self.index = index
        self._names: dict[int, str] = {}  # by id of the parameter
        self._elements: dict[str, int] = {}  # of every weight
        self._at_once: set[str] = set()  # the names of those that do not wait
        self._handles: list[Any] = []
        self.seen = False

    def look(self) -> AbstractContextManager[None]:
        """Around I of a split micro-batch; costs nothing after the first."""
        return _NOTHING if self.seen else self._looking()

    @contextmanager
    def _looking(self) -> Iterator[None]:
        named = self._module.named_parameters()
        self._elements = {name: p.numel() for name, p in named if p.requires_grad and p.dim() > 1}
        watchers.add(self)
        try:
            yield
            self.seen = True
        finally:
            watchers.discard(self)
            self._names.clear()

    def take(self, roots: Sequence[Any]) -> bool:
        """Called before a pass from these nodes of the graph, of which nothing need be retained."""
        for node in reachable(roots):
            leaf = getattr(node, "variable", None)
            if isinstance(leaf, nn.Parameter) and leaf.dim() > 1:
                self._handles.append(node.register_prehook(self._on_arrival(leaf)))
        return False

    def pass_ended(self) -> None:
        """Called after the pass."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _on_arrival(self, parameter: Tensor) -> Callable[[tuple[Tensor | None, ...]], None]:
        def arrived(gradients: tuple[Tensor | None, ...]) -> None:
            if gradients[0] is not None:  # else W will bring it
                self._at_once.add(self._name_of(parameter))

        return arrived

    def _name_of(self, parameter: Tensor) -> str:
        if id(parameter) not in self._names:  # under FSDP a module has other parameters while it is used
            self._names.update((id(p), name) for name, p in self._module.named_parameters())
        return self._names.get(id(parameter), "")

    @property
    def weights(self) -> int:
        """Elements of all weights that are trained."""
        return sum(self._elements.values())

    @property
    def waiting(self) -> int:
        """Elements of those whose gradients wait."""
        return sum(count for name, count in self._elements.items() if name not in self._at_once)

    @property
    def share(self) -> float:
        """1 where the stage has no weights."""
        return self.waiting / self.weights if self.weights else 1.0

    @property
    def first(self) -> str | None:
        """The name of the first module whose weight does not wait, or of the weight if it is in none."""
        name = next((name for name in self._elements if name in self._at_once), None)
        return name and (name.rpartition(".")[0] or name)


def warn_if_few_wait(stages: Iterable[Waiting]) -> bool:
    """Warns if most weight gradients of a rank are made in I. Returns whether one of its stages was seen."""
    seen = [stage for stage in stages if stage.seen]
    weights, waiting = sum(stage.weights for stage in seen), sum(stage.waiting for stage in seen)
    if waiting < LITTLE * weights:
        stage = next(stage for stage in seen if stage.first is not None)
        warnings.warn(
            f"the plan splits backwards, but of the weight gradients of this rank only {waiting / weights:.0%} wait "
            f"for W; the first module whose do not is {stage.first} of stage {stage.index}; `pipex profile` says what "
            "waits of every layer, and a plan without W (1f1b, interleaved) needs nothing to wait",
            stacklevel=outside(),
        )
    return bool(seen)


_NOTHING: AbstractContextManager[None] = nullcontext()
