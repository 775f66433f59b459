"""One forward of a model on a sample, call by call of what is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from pipex.errors import UnsupportedModule
from pipex.hugging_face.conventions import collected
from pipex.partition.own_forward.arguments import Arguments
from pipex.partition.own_forward.kept import Kept, changed, clone, kept_by, own_state, refuse_changes
from pipex.partition.own_forward.tree import Parted
from pipex.torch_internals import TreeSpec, tree_flatten, tree_leaves, version

Seed = Callable[[int], None]
"""Seeds what follows, by the number of the call that comes next."""


@dataclass(slots=True)
class Called:
    """One call of a layer or an outer module. Tensors are clones, without a graph.

    Attributes:
        path: of the module.
        layer: whether it is one.
        arguments: the leaves of (args, kwargs).
        output, spec: its leaves, and what they are of.
        beside: by name what the model has collected from within the call (router logits).
        written: leaves of the output that the model's code between the calls has worked on in place.
    """

    path: str
    layer: bool
    arguments: list[Any]
    output: list[Any] = field(default_factory=list)
    spec: TreeSpec | None = None
    beside: dict[str, list[Tensor | None]] = field(default_factory=dict)
    written: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Record:
    """Attributes:
    calls: in order.
    units: what a cut has one or the other side of, as ranges of calls: each layer's, and the outer modules' between.
    output: the leaves of what the model has returned.
    live: what it has returned, with its graph.
    set_within: by path and name, what layers and outer modules keep that the forward has set.
    """

    calls: tuple[Called, ...]
    units: tuple[range, ...]
    output: list[Any]
    live: Any
    set_within: frozenset[tuple[str, str]]


def record(model: nn.Module, parted: Parted, arguments: Arguments, seed: Seed) -> Record:
    """Runs the model as it is. Modules are called by the first of their paths.

    Args:
        seed: called with the number of the call that comes next.

    Raises:
        UnsupportedModule: none of the layers was called by the model's forward, or what runs beside them keeps what
            each forward changes.
    """
    layers = {id(module) for module in parted.layers.values()}
    at_first = kept_by(parted.layers | parted.outer)
    chain = _order(model, parted, *arguments.sample())
    arguments.look()
    beside = kept_by(parted.loose) | _kept_by_containers(parted)
    if not any(layer for _, layer in chain):
        raise UnsupportedModule(
            f"the forward of {type(model).__name__} calls none of its layers",
            got=f"{len(parted.layers)} layers such as {next(iter(parted.layers))}", needed="calls such as layer(...)",
            fix="name other lists with layers=, or leave the model whole",
        )  # fmt: skip
    units = units_of([layer for _, layer in chain])
    calls: list[Called] = []
    marks: dict[str, int] = {}
    watched: dict[tuple[int, int], tuple[Tensor, int]] = {}  # with the version that a call has left

    def look() -> None:
        for (call, number), (leaf, left) in watched.items():
            if version(leaf) != left:
                calls[call].written.add(number)

    def before(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        look()
        calls.append(Called(path, id(module) in layers, [clone(leaf) for leaf in tree_leaves((args, kwargs))]))
        marks.clear()
        marks.update({name: len(entries) for name, entries in collected().items()})

    def after(output: Any) -> None:
        call = calls[-1]
        leaves, call.spec = tree_flatten(output)
        call.output = [clone(leaf) for leaf in leaves]
        made = {(len(calls) - 1, n): leaf for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        for place, leaf in ({place: leaf for place, (leaf, _) in watched.items()} | made).items():
            watched[place] = leaf, version(leaf)
        call.beside = {
            name: [clone(entry) for entry in entries[marks.get(name, 0) :]]
            for name, entries in collected().items()
            if len(entries) > marks.get(name, 0)
        }
        seed(len(calls))

    seed(0)
    with _watched(parted, before, after):
        args, kwargs = arguments.sample()
        live = model(*args, **kwargs)
    look()
    refuse_changes(beside, kept_by(parted.loose) | _kept_by_containers(parted))
    if [(call.path, call.layer) for call in calls] != chain:
        raise UnsupportedModule(
            f"the forward of {type(model).__name__} calls other layers the second time",
            got=_first_difference(chain, calls),
            needed="the same calls in every forward", fix="switch off what drops layers at random (layerdrop)",
        )  # fmt: skip
    set_within = frozenset(changed(at_first, kept_by(parted.layers | parted.outer)))
    return Record(tuple(calls), units, [clone(leaf) for leaf in tree_leaves(live)], live, set_within)


def _kept_by_containers(parted: Parted) -> Kept:
    """Not by what is in them."""
    return {
        (path, name): clone(value)
        for path, container in parted.containers.items()
        for name, value in own_state(container).items()
    }


def units_of(layers: Sequence[bool]) -> tuple[range, ...]:
    """Ranges of a chain of calls; ``layers`` says of each whether it is a layer's."""
    units: list[range] = []
    for layer, group in groupby(enumerate(layers), key=lambda pair: pair[1]):
        numbers = [number for number, _ in group]
        units += [range(n, n + 1) for n in numbers] if layer else [range(numbers[0], numbers[-1] + 1)]
    return tuple(units)


def _order(model: nn.Module, parted: Parted, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Of a forward that is not looked into: what will be called, and whether it is a layer."""
    found: list[tuple[str, bool]] = []
    layers = {id(module) for module in parted.layers.values()}
    with _watched(parted, lambda path, module, *_: found.append((path, id(module) in layers)), lambda _: None):
        model(*args, **kwargs)
    return found


def _first_difference(chain: Sequence[tuple[str, bool]], calls: Sequence[Called]) -> str:
    for number, ((path, _), call) in enumerate(zip(chain, calls, strict=False)):
        if path != call.path:
            return f"{call.path} as call {number}, and {path} before"
    return f"{len(calls)} calls, and {len(chain)} before"


@contextmanager
def _watched(
    parted: Parted, before: Callable[[str, nn.Module, Any, Any], None], after: Callable[[Any], None]
) -> Iterator[None]:
    """Around forwards: what is called from outside of all that is cut, not from within it."""
    depth = 0

    def enter(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal depth
            depth += 1
            if depth == 1:
                before(path, module, args, kwargs)

        return hook

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal depth
        depth -= 1
        if not depth:
            after(output)

    with ExitStack() as hooks:
        for path, module in (*parted.layers.items(), *parted.outer.items()):
            handle = module.register_forward_pre_hook(enter(path), prepend=True, with_kwargs=True)
            hooks.callback(handle.remove)
            hooks.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
        yield
