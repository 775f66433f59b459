"""Measures what every layer of a model costs one micro-batch, on this machine.

A copy of the model runs whole training passes: F of all layers in order, I of all in reverse, W of all, each layer with
a split backward of its own (``pipex.backward``), as it would run in a stage. Whole passes, rather than one layer at a
time, spread a disturbance of the machine over all layers alike and leave the caches as a stage leaves them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from time import perf_counter
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from pipex.backward import Splitter
from pipex.backward.waiting import Waiting
from pipex.errors import InputError, UnsupportedModule, headline
from pipex.hugging_face.conventions import is_pretrained
from pipex.partition.layers import layers_of, names_layers
from pipex.partition.own_forward.loss import loss_in
from pipex.partition.own_forward.split import split_by_forward
from pipex.partition.own_forward.units import Unit
from pipex.partition.stage import Keywords
from pipex.plan.layer_costs import Layer, LayerCosts
from pipex.torch_internals import tree_flatten, tree_unflatten

LossFunction = Callable[[Any, Any], Tensor]

WARM_UP = 2
"""Passes that do not count: the first ones choose algorithms, fill caches and allocate the gradients."""


class LayerSplit(NamedTuple):
    """What becomes of a layer's backward when it is split.

    Attributes:
        weights: elements of its weights that are trained (``pipex.backward.waiting``).
        waiting: those of them whose gradients wait for W.
        whole: seconds of one whole backward, beside which those of I and W stand.
    """

    weights: int
    waiting: int
    whole: float


def profile_layers(
    model: nn.Module, sample: Any, target: Any = None, loss_fn: LossFunction | Literal["model"] = "model", *,
    layers: Sequence[str] | None = None, passes: int = 10,
) -> LayerCosts:  # fmt: skip
    """The costs of the model's layers: the shortest times over ``passes`` passes of one micro-batch.

    What disturbs a measurement only ever adds to it. With three busy processes per core, medians of equal layers
    differed by a factor of 4 and lower quartiles by up to 6, since the scheduler interrupts at regular intervals; the
    shortest of 10 by 1.3.

    Needs memory for a second copy of the model, its gradients, and the activations of one micro-batch. The model, the
    random number generators and the modes stay as they are; a layer runs in the mode in which it is found.

    Args:
        model: as for ``split_model``, on the device to measure on. Of one that is cut by its own forward the units are
            measured, each with what that forward does around its layers on every stage.
        sample: the input of one micro-batch, of the size that training will use: a tensor, or several; of a model that
            is cut by its own forward, a batch as ``split_model`` takes it.
        target: its target.
        loss_fn: (output, target) -> a loss of one element; or "model": what the model's output has as its loss. Its
            costs count to the last layer.
        layers: as for ``split_model``.
        passes: at least 1.

    Returns:
        seconds, with as many threads as torch has now; bytes. A tensor that two layers keep counts in both.

    Raises:
        InputError: no passes, no layers, no tensors in the sample, no loss or one of several elements.
        UnsupportedModule: the model has no layers to be found, cannot be copied, or a layer returns no tensors.
    """
    return _profile(model, sample, target, loss_fn, layers, passes, beside_whole=False)[0]


def profile_split(
    model: nn.Module, sample: Any, target: Any, loss_fn: LossFunction | Literal["model"], *, passes: int = 10
) -> tuple[LayerCosts, list[LayerSplit]]:
    """``profile_layers``, and what the split does to each layer: whole backwards are measured in between."""
    return _profile(model, sample, target, loss_fn, None, passes, beside_whole=True)


def _profile(
    model: nn.Module, sample: Any, target: Any, loss_fn: LossFunction | Literal["model"],
    layers: Sequence[str] | None, passes: int, *, beside_whole: bool,
) -> tuple[LayerCosts, list[LayerSplit]]:  # fmt: skip
    if passes < 1:
        raise InputError("nothing would be measured", got=f"passes={passes}", needed="at least 1")
    if layers is None and names_layers(model) and not is_pretrained(model):
        inputs = _tensors_of(sample)
        names, modules = _names(model), list(_copy(nn.ModuleList(layers_of(model)), model))
    else:
        names, modules, inputs = _units(model, sample, layers)
    if not names:
        raise InputError("the model has no layers", needed="at least one")
    modules[-1] = _WithLoss(modules[-1], _loss_of_output if loss_fn == "model" else loss_fn, target)
    device = inputs[0].device
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda), torch.enable_grad():
        run = _Passes(modules, names, inputs)
        sizes = run.sizes()
        seconds, wholes = [], []
        for _ in range(WARM_UP + passes):
            seconds.append(run.seconds())
            if beside_whole:
                wholes.append(run.whole_seconds())
        seconds, wholes = seconds[WARM_UP:], wholes[WARM_UP:]
    costs = []
    for index, name in enumerate(names):
        forward, input_gradient, weight_gradient = (min(one[kind][index] for one in seconds) for kind in range(3))
        costs.append(Layer(name, forward, input_gradient, weight_gradient, *sizes[index]))
    splits = (
        [
            LayerSplit(waiting.weights, waiting.waiting, min(column))
            for waiting, column in zip(run.waiting, zip(*wholes, strict=True), strict=True)
        ]
        if beside_whole
        else []
    )
    return LayerCosts(tuple(costs), about=_about(inputs)), splits


class _WithLoss(nn.Module):
    """The last layer, and the loss."""

    def __init__(self, layer: nn.Module, loss_fn: LossFunction, target: Any) -> None:
        super().__init__()
        self.layer = layer
        self.loss_fn = loss_fn
        self.target = target

    def forward(self, *inputs: Any) -> Tensor:
        loss = self.loss_fn(self.layer(*inputs), self.target)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise InputError("the loss function must return a loss", got=got, needed="a tensor with one element")
        return loss.reshape(())


class _Passes:
    """Training passes; the gradients add up in ``.grad``, as over the micro-batches of a step."""

    def __init__(self, layers: list[nn.Module], names: list[str], inputs: tuple[Tensor, ...]) -> None:
        self._inputs = inputs
        self._layers = layers
        self._names = names
        self._splitters = [Splitter.of(layer) for layer in layers]
        self.waiting = [Waiting(layer) for layer in layers]

    def seconds(self) -> tuple[list[float], list[float], list[float]]:
        """Of F, I and W, per layer."""
        clocks = [_Clock(self._inputs[0].device) for _ in range(3)]
        forward, backward, weight = clocks
        runs = list(self._forward(forward))
        self._backward(runs, backward)
        for run in runs:
            with weight:
                run.tape.backward_weight()
        f, i, w = (clock.seconds() for clock in clocks)
        return f, i[::-1], w

    def whole_seconds(self) -> list[float]:
        """Of a whole backward, per layer."""
        clock = _Clock(self._inputs[0].device)
        runs = list(self._forward(_Clock(self._inputs[0].device), split=False))
        self._backward(runs, clock, split=False)
        return clock.seconds()[::-1]

    def sizes(self) -> list[tuple[int, int, int, int]]:
        """Bytes per layer: activation, deferred, parameters, output."""
        clock = _Clock(self._inputs[0].device)
        runs = list(self._forward(clock))
        # A tensor that repeats a few elements travels as these.
        outputs = [sum(min(y.nbytes, y.untyped_storage().nbytes()) for y in run.outputs) for run in runs]
        activations = [run.kept_for_backward() for run in runs]
        self._backward(runs, clock)
        parameters = [sum(p.nbytes for p in run.layer.parameters()) for run in runs]
        return list(zip(activations, [run.kept_for_weight() for run in runs], parameters, outputs, strict=True))

    def _forward(self, clock: _Clock, *, split: bool = True) -> Iterable[_Run]:
        values = self._inputs
        for index, (layer, splitter) in enumerate(zip(self._layers, self._splitters, strict=True)):
            run = _Run(layer, splitter, values, first=index == 0)
            with clock:
                output = run.forward(split)
            values = run.outputs = _tensors(output, self._names[index])
            yield run

    def _backward(self, runs: Sequence[_Run], clock: _Clock, *, split: bool = True) -> None:
        gradients: Sequence[Tensor | None] = [None]
        for run, waiting in zip(reversed(runs), reversed(self.waiting), strict=True):
            roots, seeds = run.roots(gradients)
            with waiting.look() if split else nullcontext(), clock:
                found = run.backward(roots, seeds, split)
            gradients = [torch.zeros_like(x) if g is None else g for g, x in zip(found, run.leaves, strict=True)]
            run.outputs = run.arguments = ()


class _Run:
    """One layer in one pass."""

    def __init__(self, layer: nn.Module, splitter: Splitter, values: Sequence[Tensor], *, first: bool) -> None:
        self.layer = layer
        self.splitter = splitter
        self.tape = splitter.record()
        self.inputs = [x.detach().requires_grad_(not first and x.requires_grad) for x in values]
        self.leaves = [x for x in self.inputs if x.requires_grad]
        self.arguments = self._arguments()
        self.outputs: tuple[Tensor, ...] = ()

    def forward(self, split: bool) -> Any:
        with self.tape if split else self.splitter.whole():
            return self.layer(*self.arguments)

    def roots(self, gradients: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor | None]]:
        """Where the backward starts, from the gradients of the outputs that need one."""
        return [y for y in self.outputs if y.requires_grad], list(gradients)

    def backward(self, roots: list[Tensor], seeds: list[Tensor | None], split: bool) -> Sequence[Tensor | None]:
        """I, or a whole backward; the gradients of the inputs that need one."""
        if split and roots:
            return self.tape.backward_input(roots, seeds, self.leaves)
        if roots:
            torch.autograd.backward(roots, seeds)
        return [x.grad for x in self.leaves]

    def kept_for_backward(self) -> int:
        """Bytes that the layer keeps from F to I: its input, and what autograd saves; not its output, which counts as
        the next layer's input."""
        kept = list(arguments := self._arguments())

        def pack(tensor: Tensor) -> Tensor:
            kept.append(tensor.detach())
            return kept[-1]

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = self.layer(*arguments)
        outputs = output if isinstance(output, tuple) else (output,)
        return _bytes(kept, without=[*self.layer.parameters(), *self.layer.buffers(), *outputs])

    def kept_for_weight(self) -> int:
        """Bytes that the tape keeps from I to W."""
        return _bytes(self.tape.held, without=self.layer.parameters())

    def _arguments(self) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in self.inputs)  # a layer may work in place, which a leaf forbids


class _Clock:
    """Seconds of what runs inside ``with``, one measurement each time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def __enter__(self) -> None:
        self._mark()

    def __exit__(self, *_: object) -> None:
        self._mark()

    def _mark(self) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append(event)
        else:
            self._marks.append(perf_counter())

    def seconds(self) -> list[float]:
        pairs = list(zip(self._marks[::2], self._marks[1::2], strict=True))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]
        return [end - begin for begin, end in pairs]


def _names(model: nn.Module) -> list[str]:
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(layer)] for layer in layers_of(model)]


def _tensors_of(sample: Any) -> tuple[Tensor, ...]:
    inputs = (sample,) if isinstance(sample, Tensor) else tuple(sample)
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise InputError(
            "the sample is not made of tensors",
            got=", ".join(type(x).__name__ for x in inputs) or "nothing",
            needed="a tensor or a tuple of tensors",
        )
    return inputs


def _units(
    model: nn.Module, sample: Any, layers: Sequence[str] | None
) -> tuple[list[str], list[nn.Module], tuple[Tensor, ...]]:
    """Of a model that is cut by its own forward names, a stage for each unit, and what the first one gets."""
    copied = _copy(model, model)
    stages = split_by_forward(copied, lambda units: [1] * len(units), sample, layers, verify=False)
    names = [", ".join(unit.names_of_modules) for stage in stages for unit in stage.layers if isinstance(unit, Unit)]
    first = _OnBatch(stages[0], sample)
    return names, [first, *stages[1:]], first.tensors


class _OnBatch(nn.Module):
    """A model's first stage, called with the tensors of a batch."""

    def __init__(self, stage: nn.Module, sample: Any) -> None:
        super().__init__()
        self.stage = stage
        self._leaves, self._form = tree_flatten(sample)
        self.tensors = tuple(leaf for leaf in self._leaves if isinstance(leaf, Tensor))

    def forward(self, *tensors: Tensor) -> Any:
        left = iter(tensors)
        batch = tree_unflatten([next(left) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves], self._form)
        if isinstance(batch, Mapping):
            return self.stage(Keywords(batch))
        return self.stage(*batch) if isinstance(batch, (tuple, list)) else self.stage(batch)


def _loss_of_output(output: Any, _: Any) -> Any:
    loss = loss_in(output)
    if loss is None:
        raise InputError("the model's output has no loss", got=type(output).__name__, needed="one with loss",
                         fix="put labels into the sample, or pass target and loss_fn")  # fmt: skip
    return loss


_Module = TypeVar("_Module", bound=nn.Module)


def _copy(module: _Module, model: nn.Module) -> _Module:
    """All of it, tied parameters still tied; no gradients, no hooks of parameters."""
    try:
        return copy.deepcopy(module)
    except (RuntimeError, TypeError) as error:
        raise UnsupportedModule(
            f"{type(model).__name__} cannot be copied, and so not be measured without changing it",
            got=headline(error), fix="leave out what cannot be copied (a lock, a tensor with a history, ...)",
        ) from error  # fmt: skip


def _tensors(output: Any, name: str) -> tuple[Tensor, ...]:
    tensors = output if isinstance(output, tuple) else (output,)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise UnsupportedModule(
                f"the model cannot be cut after layer {name}", got=type(tensor).__name__,
                needed="a tensor or a tuple of tensors", fix="make it one layer with the layers that need its output",
            )  # fmt: skip
    return tensors


def _bytes(tensors: Iterable[Tensor], without: Iterable[Tensor]) -> int:
    """Of the memory behind the tensors, each piece once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in without}
    pieces = {storage.data_ptr(): storage.nbytes() for t in tensors for storage in [t.untyped_storage()]}
    return sum(nbytes for address, nbytes in pieces.items() if address not in known)


def _about(inputs: Sequence[Tensor]) -> str:
    device = inputs[0].device
    threads = torch.get_num_threads()
    cpu = f"cpu, {threads} thread{'s' if threads > 1 else ''}"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    forms = ", ".join(f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for x in inputs)
    return f"{where}, torch {torch.__version__}, micro-batch {forms}"
