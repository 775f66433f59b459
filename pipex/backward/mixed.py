"""Parameters that a forward uses in recorded and in other operations: a weight in a linear layer and in a penalty.

Autograd adds the gradients of all uses in the order in which a pass comes to them, and then adds that sum to ``.grad``.
If W made those of the recorded uses and autograd those of the others, each in its own time, the same numbers would be
added in another order. So such a parameter is not recorded, once that is known. It becomes known when the first pass
begins, and by then other micro-batches may be under way. Over these autograd's own contributions are taken where they
leave the operation that made them, and left to W in their place among the recorded ones:

      parameter ◄──[taken]── square ◄── penalty ◄─┐
          ·                                       ├─ loss        W: dW of the linear layer and what was taken, in the
          · (no path)                             │                 order of the pass; then added to .grad, once
        alias ◄────────────── linear ◄────────────┘
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, Protocol
from weakref import WeakSet

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from pipex.backward.accumulate import Silence
from pipex.backward.uses import Captor, Use
from pipex.backward.weights import reachable
from pipex.torch_internals import sequence_number


class GivenUse(Use):
    """A use whose gradient autograd has made already."""

    __slots__ = ("parameter",)

    def __init__(self, tape: Captor, parameter: Tensor) -> None:
        self.parameter = parameter
        super().__init__(tape, parameter.new_empty(0))

    @property
    def targets(self) -> Sequence[Tensor]:
        return [self.parameter]

    def add_to(self, sums: Any, dy: Tensor) -> None:
        sums.add(self.parameter, dy)


class Forward(Captor, Protocol):
    """A tape: the nodes that were made while it was open have these numbers."""

    first_node: int
    end_node: int


class Mixed:
    """Watches a stage's recorded parameters until it is known which of them are used in other operations too.

    Args:
        accumulators: of parameters whose gradients W makes itself; one that is found is taken out, since what autograd
            has made may be somebody else's memory.
    """

    def __init__(self, accumulators: MutableMapping[int, Any]) -> None:
        self._known = accumulators
        self.found: set[int] = set()
        """ids of the parameters that are"""
        self._accumulators: dict[Any, Tensor] = {}  # by autograd's node
        self._made: set[Any] = set()  # nodes
        self._under_way: WeakSet[Any] = WeakSet()
        self._passed = False
        self._taking: list[RemovableHandle] = []
        self._silence = Silence()  # for one pass

    @property
    def watching(self) -> bool:
        """Whether it is not known yet."""
        return bool(self._accumulators)

    def watch(self, node: Any, parameter: Tensor) -> None:
        """Takes the accumulator of a parameter that is about to be recorded for the first time."""
        self._accumulators[node] = parameter
        self._passed = False

    def weave(self, node: Any) -> None:
        """Takes the node of a weight that is made of watched parameters; its graph is W's, and must be there for it."""
        self._made.add(node)

    def begin(self, tape: Forward) -> None:
        """A forward was recorded; it is under way until its W."""
        self._under_way.add(tape)

    def end(self, tape: Forward) -> None:
        """Its W begins, at the end of the pass itself where nothing waits."""
        self._silence.end()
        self._under_way.discard(tape)
        self._passed = True

    @property
    def settled(self) -> bool:
        """Whether no forward waits for its W, and one has had it."""
        return self._passed and not self._under_way

    def clear(self) -> None:
        """Watches no more."""
        self.found.clear()
        self._accumulators.clear()
        self._made.clear()
        self._under_way.clear()

    def take(self, roots: Sequence[Any]) -> bool:
        """Called before a pass from these nodes; says whether W goes through a part of its graph again."""
        nodes = list(reachable(roots))
        users = {}
        for node in nodes:
            places = [n for n, (following, _) in enumerate(node.next_functions) if following in self._accumulators]
            if places:
                users[node] = places
        # The tape that the pass goes over, if it is one of ours: nodes of the loss come after its end, and are its too.
        tape = next(filter(None, map(self._tape_of, nodes)), None) if users else None
        if tape is not None:
            for node, places in users.items():
                self._take_from(node, places, self._tape_of(node) or tape)
        return not self._made.isdisjoint(nodes)

    def pass_ended(self) -> None:
        """Called after an announced pass."""
        for handle in self._taking:  # W may come by here
            handle.remove()
        self._taking.clear()
        self._silence.end()

    def takes(self, parameter: Tensor) -> bool:
        """Whether a gradient of this output of a forward is to be left to W: it is a parameter that is watched."""
        watched = any(parameter is known for known in self._accumulators.values())
        if watched:
            self._find(parameter)
        return watched

    def _find(self, parameter: Tensor) -> None:
        self.found.add(id(parameter))
        self._known.pop(id(parameter), None)

    def _take_from(self, node: Any, places: Sequence[int], tape: Forward) -> None:
        parameters = {place: self._accumulators[node.next_functions[place][0]] for place in places}
        for parameter in parameters.values():  # the pass comes to it without a gradient; its hooks run in W
            self._silence.of(parameter)

        def take(inputs: tuple[Tensor | None, ...], _: object) -> tuple[Tensor | None, ...]:
            kept = list(inputs)
            for place, parameter in parameters.items():
                gradient, kept[place] = inputs[place], None
                if gradient is not None:  # else it is of a module that makes it in W
                    self._find(parameter)
                    tape.captured(GivenUse(tape, parameter), gradient)
            return tuple(kept)

        self._taking.append(node.register_hook(take))

    def _tape_of(self, node: Any) -> Forward | None:
        number = sequence_number(node)
        return next((tape for tape in self._under_way if tape.first_node <= number < tape.end_node), None)
