"""Which parameters are recorded, and what is known of them from one forward to the next."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.overrides import has_torch_function_unary
from torch.utils.hooks import RemovableHandle

from pipex.backward import recording
from pipex.backward.accumulate import Accumulator
from pipex.backward.fsdp import Sharded
from pipex.backward.fused import FusedProducts
from pipex.backward.mixed import Mixed
from pipex.backward.own import Own
from pipex.backward.passes import watchers
from pipex.backward.weights import Layer, Weight
from pipex.torch_internals import current_pass, dispatch_modes, require_split_backward


class Recordable:
    """The parameters of one stage, and what is known of them from one forward to the next.

    Args:
        parameters: the stage's parameters; frozen ones are skipped while they are, repeated ones (tied) count once.
        exact: whether W has autograd's bits, or may be made by fewer and faster products (``fused``); None: on the CPU
            only, where these are no faster.
        sharded: what FSDP2 holds of the stage.
        buffers: the stage's buffers.
        own: the stage's modules that make their weight gradients themselves.

    Raises:
        UnsupportedModule: this torch lacks what it needs.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        exact: bool | None = None,
        sharded: Sharded | None = None,
        buffers: Iterable[Tensor] = (),
        own: Own | None = None,
    ) -> None:
        require_split_backward()
        self._recordable = {id(p): p for p in parameters}
        # Kept, for an id says nothing once its tensor is gone.
        self.constants = self._recordable | {id(b): b for b in buffers}
        """By id, what belongs to the stage; of it, what requires no grad is made of no data"""
        self._weights: dict[int, Weight] = {}  # by id of the parameter
        self.layers: dict[int, Layer] = {}
        """By id of the weight, linear layers that have been recorded"""
        self.woven: set[int] = set()
        """ids of the parameters of which something is made that is a weight too; autograd sums what comes to them"""
        self.accumulators: dict[int, Accumulator] = {}  # of recorded parameters, by their id
        self.fused = FusedProducts(self.accumulators)
        self._exact = exact
        self.sharded = sharded
        self.own = own or Own()
        self.mixed = Mixed(self.accumulators)
        # Whether there is anything to record; else compilers that come by find torch's own functions.
        self.sees = bool(self.constants or self.own)
        if self.sees:
            recording.replace_methods_for(self)
        # For passes that nobody announces, until the first has ended: the watch, and by id the pass that came there.
        self._unproven: list[RemovableHandle] = []
        self._reached: dict[int, int] = {}

    def close(self) -> None:
        """Lets go of the parameters; another one takes over."""
        for handle in self._unproven:
            handle.remove()
        self._unproven.clear()
        self.stop_watching()

    def fuses(self, dy: Tensor) -> bool:
        """Whether the contract ``fused`` holds for an operation with this gradient."""
        return dy.is_cuda if self._exact is None else not self._exact

    def weight(self, parameter: Tensor) -> Weight | None:
        """A parameter as a weight; None where its gradient must not be deferred."""
        known = self._weights.get(id(parameter))
        # An operation that others would see, such as a selective checkpoint, is asked where there are none.
        if known is not None and (
            _is_set_to(parameter, known.alias) if dispatch_modes() else parameter.is_set_to(known.alias)
        ):
            return known
        if not self.has(parameter):
            return None
        # Where its memory alone is another, its accumulator is the same, and so are its uses. A plan with older weights
        # gives it other memory from one micro-batch to the next: watched anew at each, it would be watched for ever.
        first = known is None or (known.alias.dtype, known.alias.device) != (parameter.dtype, parameter.device)
        if first and id(parameter) not in self.woven:
            self._watch(parameter)
        self._weights[id(parameter)] = weight = Weight(parameter.detach(), parameter)
        return weight

    def has(self, leaf: Tensor) -> bool:
        """Whether it is one of the parameters whose gradients may be deferred."""
        if self.sharded is not None and id(leaf) not in self._recordable:
            self._recordable |= {id(parameter): parameter for parameter in self.sharded.gathered()}
        return id(leaf) in self._recordable and not _has_rules(leaf)

    def weave(self, parameter: Tensor) -> None:
        """Something that is made of this parameter is a weight."""
        if id(parameter) not in self.woven:
            self.woven.add(id(parameter))
            self.layers.clear()
            if id(parameter) not in self._weights:
                self._watch(parameter)
            self.accumulators.pop(id(parameter), None)  # so that autograd adds what comes to it, all at once

    def _watch(self, parameter: Tensor) -> None:
        """Sees which passes come to a recorded parameter nevertheless."""

        def reached(gradients: tuple[Tensor | None, ...]) -> None:
            if gradients[0] is not None:
                self._reached[id(parameter)] = current_pass()

        self.accumulators[id(parameter)] = accumulator = Accumulator(parameter)
        self._unproven.append(accumulator.node.register_prehook(reached))
        self.mixed.watch(accumulator.node, parameter)
        if id(parameter) in self.own.parameters:
            del self.accumulators[id(parameter)]
        watchers.add(self.mixed)

    def stop_watching(self) -> None:
        watchers.discard(self.mixed)
        self.mixed.clear()

    def forget(self, key: int) -> None:
        """The parameter is not recorded again."""
        self._recordable.pop(key, None)
        self._weights.pop(key, None)
        self.layers.clear()
        self.accumulators.pop(key, None)

    def pass_ended(self, graph_task: int) -> None:
        """A recorded parameter that this pass over a tape has come to is used in unrecorded operations too: it is not
        recorded again, so that all its gradients are summed by autograd, in autograd's order. What the first such pass
        shows holds for the others."""
        if self._unproven:
            for key, task in self._reached.items():
                if task == graph_task:
                    self.forget(key)
            for handle in self._unproven:
                handle.remove()
            self._unproven.clear()
            self._reached.clear()


def _is_set_to(parameter: Tensor, alias: Tensor) -> bool:
    """As torch's, which is a third of the time: whether its memory, shape and strides are those of its alias."""
    return (
        parameter.data_ptr() == alias.data_ptr()
        and parameter.shape == alias.shape
        and parameter.stride() == alias.stride()
        and parameter.dtype is alias.dtype
    )


def _has_rules(parameter: Tensor) -> bool:
    """Whether it is of a subclass that gives operations a meaning, and so gradients, of its own."""
    return has_torch_function_unary(parameter) or type(parameter).__torch_dispatch__ is not Tensor.__torch_dispatch__
