"""What torch.compile has compiled: its backward is one graph, which is cut in two where weight gradients may wait.

Every backend that goes through AOTAutograd (inductor, aot_eager, ...) hands it a compiler for backwards. A graph that
is compiled while a tape is open gets another one, which cuts the backward (``graph_cut``) and has both halves compiled:

    F   compiled(x, alias of the parameter)   as a recorded operation, so there is no path to the parameter; autograd's
                                              node is told which tape it belongs to
    I   the first half, which makes dx; the tape keeps what the second half reads
    W   the second half

What is compiled finds the functions that stand in the place of torch's while a tape is open, and its guards tell them
from torch's own: so a forward without a tape never runs a graph that is cut, nor the other way round, but for graphs
that use none of these functions. Whichever runs, the gradients are right: a graph that is cut runs both halves at once
where nobody waits, and parameters of one that is not get their gradients in I.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from pipex.backward import recording
from pipex.backward.graph_cut import Cut, Source, cut
from pipex.backward.passes import refuse_graph_of_gradients
from pipex.backward.root import anchored
from pipex.backward.torch_internals import (
    AOT_MODULE,
    BACKENDS,
    COMPILE,
    backwards_are_compiled,
    can_cut,
    compiled_nodes,
    is_parameter,
    is_wrapper,
    only_read,
    reported_strides,
    without_autocast,
    without_cache,
)
from pipex.backward.uses import Captor, Sums, Use
from pipex.backward.weights import Target
from pipex.errors import UnsupportedModule
from pipex.torch_internals import current_node, find, next_sequence_number, version

Half = Callable[[list[Any]], Sequence[Any]]
Compiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]

_NOTHING = torch.empty(0)
_CALL = "pipex"  # where a node of autograd has its _Call


class _Call(NamedTuple):
    """One forward of a compiled graph: the tape that it is on, and by input of the graph what its gradient goes to."""

    tape: Captor
    targets: Mapping[int, Target]


class CompiledUse(Use):
    """What a backward of a compiled graph has left.

    Args:
        tape: gets it.
        targets: by output of the backward.
        make: makes the outputs.
        reads: the tensors that it reads.
    """

    __slots__ = ("_make", "_reads", "_targets")

    def __init__(
        self,
        tape: Captor,
        targets: Mapping[int, Target],
        make: Callable[[], Mapping[int, Tensor | None]],
        reads: Sequence[Tensor],
    ) -> None:
        self._targets = targets
        self._make = make
        self._reads = [(tensor, version(tensor)) for tensor in reads]
        self.tape, self.x, self.version = tape, _NOTHING, 0

    @property
    def held(self) -> list[Tensor]:
        return [tensor for tensor, _ in self._reads]

    @property
    def targets(self) -> Sequence[Target]:
        return list(self._targets.values())

    def add_to(self, sums: Sums, dy: Tensor) -> None:
        for tensor, its_version in self._reads:
            if version(tensor) != its_version:
                raise RuntimeError(
                    f"a tensor that the deferred half of a compiled backward reads was modified in place; got version "
                    f"{version(tensor)} of a tensor of shape {tuple(tensor.shape)}, needed version {its_version}; use "
                    f"an out-of-place operation there"
                )
        made = self._make()
        for place, target in self._targets.items():
            gradient = made[place]
            if gradient is not None:
                sums.add(target, gradient)


class _Backward:
    """A compiled backward that is cut.

    Args:
        parts: the graphs.
        first, second: their compiled halves.
        later: the places of the outputs that may wait.
    """

    def __init__(self, parts: Cut, first: Half, second: Half, later: Sequence[int]) -> None:
        self._parts, self._first, self._second, self._later = parts, first, second, later
        self._boxed_call = True  # for torch: takes its arguments as a list, which it empties

    def __call__(self, inputs: list[Any]) -> list[Any]:
        parts, later = self._parts, self._later
        node = current_node()
        call: _Call | None = None if node is None else node.metadata.get(_CALL)
        waits = call is not None and len(call.targets) == len(later)
        saved = {s.place: inputs[s.place] for s in self._sources() if s.kind == "saved"}
        if waits:  # else autograd must see which gradients are one tensor, or it would have two in one memory
            saved = {place: _without_graph(value) for place, value in saved.items()}
        made_first = list(self._first(inputs))
        inputs.clear()
        kept, made = made_first[: parts.kept], made_first[parts.kept :]
        del made_first
        outputs = [kept[s.place] if s is not None and s.kind == "first" else None for s in parts.outputs]

        def found(source: Source) -> Any:
            return saved[source.place] if source.kind == "saved" else made[source.place]

        def make() -> dict[int, Tensor | None]:
            with without_autocast():  # as in a backward pass; nothing that it reads requires grad
                second = self._second([found(source) for source in parts.reads])
            sources = {place: parts.outputs[place] for place in later}
            return {
                place: None if s is None else second[s.place] if s.kind == "second" else found(s)
                for place, s in sources.items()
            }

        if call is None:  # a forward without a tape
            wanted = make()
            for place in later:
                outputs[place] = wanted[place]
        elif waits:
            reads = [x for x in map(found, self._sources()) if isinstance(x, Tensor)]
            call.tape.captured(CompiledUse(call.tape, call.targets, make, reads), _NOTHING)
        else:  # autograd adds some of them
            wanted = make()
            for place in later:
                outputs[place] = None if place in call.targets else wanted[place]
            left = {place: _without_graph(wanted[place]) for place in call.targets}
            call.tape.captured(CompiledUse(call.tape, call.targets, lambda: left, ()), _NOTHING)
        return outputs

    def _sources(self) -> list[Source]:
        """Of what is read after the first half."""
        direct = (self._parts.outputs[place] for place in self._later)
        return [*self._parts.reads, *(s for s in direct if s is not None and s.kind in ("saved", "made"))]


class _Graph:
    """A graph that is compiled while a tape is open.

    Args:
        examples: what stands for its inputs.
    """

    def __init__(self, examples: Sequence[Any]) -> None:
        self._examples = examples
        self._later: list[int] = []

    def forwards(self, compiler: Compiler) -> Compiler:
        """The same, and looks which inputs are parameters whose gradients may wait."""

        def compile(module: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
            places = only_read(len(self._examples)) or ()
            self._later = [place for place in places if is_parameter(self._examples[place])]
            self._examples = ()
            return compiler(module, examples)

        return compile

    def backwards(self, compiler: Compiler) -> Compiler:
        """Compiles both halves of the graph by this."""

        def compile(module: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
            if not self._later:
                return compiler(module, examples)
            parts = cut(module, examples, self._later)
            first: Half = _nothing
            second: Half = _nothing
            with reported_strides() as strides:
                if parts.first is not None:
                    first = _boxed(compiler(parts.first, examples))
            if parts.second is not None:
                second = _boxed(compiler(parts.second, _restrided(parts, strides)))
            backward: Callable[..., Any] = torch.compiler.disable(  # type: ignore[no-untyped-call]
                _Backward(parts, first, second, self._later)
            )
            return backward

        return compile

    def call(self, forward: Callable[..., Any], *args: Any) -> Any:
        """Runs it; on a tape with aliases in the place of parameters."""
        tape = recording.tape_now() if self._later else None
        if tape is None:
            return forward(*args)
        inputs, targets = list(args), {}
        for place in self._later:
            weight = tape.shared_weight(args[place])
            if weight is not None:
                inputs[place], targets[place] = weight
        if not targets:
            return forward(*args)
        if not any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            place = next(iter(targets))
            inputs[place] = anchored(inputs[place])
        since = next_sequence_number()
        outputs = forward(*inputs)
        for node in compiled_nodes([*outputs, *inputs], since):
            node.metadata[_CALL] = _Call(tape, targets)
            node.register_prehook(_refuse)
        return outputs


def _refuse(_: object) -> None:
    """Before a compiled backward, in which it is not seen any more.

    Raises:
        UnsupportedModule: the pass makes a graph of its gradients, or is compiled by itself.
    """
    refuse_graph_of_gradients()
    if backwards_are_compiled():
        raise UnsupportedModule(
            "a backward pass under compiled autograd comes to a compiled graph whose weight gradients wait",
            needed="a pass that autograd's engine runs, in which the graph's own backward is called",
            fix="leave torch._dynamo.config.compiled_autograd off; the backward of each graph is compiled in any case",
        )


def _without_graph(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _restrided(parts: Cut, strides: Sequence[tuple[Any, ...] | None] | None) -> list[Any]:
    """The examples for the second half, laid out as the first half makes them."""
    examples = list(parts.examples)
    for index, (source, example) in enumerate(zip(parts.reads, examples, strict=True)):
        if source.kind == "made" and isinstance(example, Tensor) and strides:
            its_own = strides[parts.kept + source.place]
            if its_own is not None and all(isinstance(stride, int) for stride in its_own):
                examples[index] = example.as_strided(example.shape, its_own)
    return examples


def _nothing(_: list[Any]) -> Sequence[Any]:
    return ()


def _boxed(compiled: Callable[..., Any]) -> Half:
    return compiled if hasattr(compiled, "_boxed_call") else lambda inputs: compiled(*inputs)


def compile(module: Any, examples: Sequence[Any], *args: Any, **options: Any) -> Callable[..., Any]:
    """In the place of AOTAutograd's ``aot_module_simplified``."""
    original = find(AOT_MODULE)
    known = not args and "fw_compiler" in options and isinstance(module, fx.GraphModule) and can_cut()
    if not known or any(map(is_wrapper, examples)):
        uncut: Callable[..., Any] = original(module, examples, *args, **options)
        return uncut
    graph = _Graph(list(examples))
    forwards, backwards = options["fw_compiler"], options.get("bw_compiler") or options["fw_compiler"]
    options |= {"fw_compiler": graph.forwards(forwards), "bw_compiler": graph.backwards(backwards)}
    with without_cache():
        forward = original(module, examples, **options)

    def run(*inputs: Any) -> Any:
        return graph.call(forward, *inputs)

    run.__dict__.update(forward.__dict__)
    return run


recording.replace_once_imported(BACKENDS, {COMPILE: compile})
