"""What the layers of a model cost, one by one: a ``CostModel`` that cuts the model for every placement.

Its file is one JSON object; times in seconds, sizes in bytes:

    {
     "format": "pipex layer costs 1",
     "about": "cpu, 1 thread",
     "latency": 0.0,
     "bandwidth": null,
     "layers": [
      {"name": "embed", "forward": 1e-4, "input_gradient": 5e-5, "weight_gradient": 8e-5,
       "activation": 2048, "deferred": 18432, "parameters": 81920, "output": 16384},
      ...
     ]
    }
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from itertools import accumulate, pairwise
from math import inf
from pathlib import Path
from typing import Any

from pipex.errors import InputError
from pipex.plan.costs import Costs, check_cost
from pipex.plan.cut import Cut, cut
from pipex.plan.placement import Edge, Placement
from pipex.reading import read_file

FORMAT = "pipex layer costs 1"
LARGEST = 1 << 25
"""Bytes of a file: a hundred thousand layers."""


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer costs one micro-batch. Embedding and head are layers like all others.

    Attributes:
        name: as the model calls it; need not be unique.
        forward, input_gradient, weight_gradient: seconds of F, I and W; the last layer's with the loss.
        activation: bytes held from the start of F to the end of I: the layer's input and what its graph saves.
        deferred: bytes held from the end of I to the end of W.
        parameters: bytes of its parameters.
        output: bytes of its output, which travels where the model is cut after it; its gradient has as many.
    """

    name: str
    forward: float
    input_gradient: float
    weight_gradient: float
    activation: float
    deferred: float
    parameters: float
    output: float

    @property
    def time(self) -> float:
        """Seconds of F, I and W together."""
        return self.forward + self.input_gradient + self.weight_gradient


_NUMBERS = tuple(field.name for field in fields(Layer))[1:]


@dataclass(frozen=True)
class LayerCosts:
    """The layers of a model in order, and the links between ranks.

    Attributes:
        layers: at least one.
        latency: seconds that a message takes besides its bytes.
        bandwidth: bytes per second between two ranks; None: bytes take no time.
        about: where the numbers are from, for people.
        state: bytes kept per byte of parameters, with gradients and what the optimizer keeps. It is the training's and
            not the model's, so the file does not have it. None: not said, and no limit counts weights.

    Raises:
        InputError: no layers, or a number that is none, negative, or so large or small that sums and ratios of it
            would not be; names layer and number.
    """

    layers: tuple[Layer, ...]
    latency: float = 0.0
    bandwidth: float | None = None
    about: str = ""
    state: float | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise InputError("no layers in the layer costs", needed="at least one")
        for index, layer in enumerate(self.layers):
            for name in _NUMBERS:
                _check(f"{name} of layer {index} ({layer.name})", getattr(layer, name))
        _check("latency", self.latency)
        if self.state is not None:
            _check("state", self.state)
        if self.bandwidth is not None:
            if self.bandwidth == 0:
                raise InputError("bad cost: bandwidth", got=0, needed="bytes per second above 0, or null for no limit")
            _check("bandwidth", self.bandwidth)
            for index, layer in enumerate(self.layers):
                for name in ("output", "parameters"):
                    cost = getattr(layer, name) / self.bandwidth
                    _check(f"{name} / bandwidth of layer {index} ({layer.name})", cost)

    @property
    def times(self) -> tuple[float, ...]:
        """Per layer the seconds of F, I and W together."""
        return tuple(layer.time for layer in self.layers)

    def on(self, placement: Placement) -> Costs:
        """The costs per stage of ``placement``, for the cut with the smallest bottleneck (``pipex.plan.cut``). Times
        in seconds, memory in bytes. The same cut on every machine.

        Raises:
            InputError: fewer layers than stages.
        """
        return self.of(placement, best_cut(self, placement).counts)

    def of(self, placement: Placement, counts: Sequence[int]) -> Costs:
        """The costs per stage of a given cut: layers per stage of one pipe, as ``Cut.counts``."""
        ends = list(accumulate(counts, initial=0))
        pipe = [self.layers[begin:end] for begin, end in pairwise(ends)]
        assert len(pipe) == len(placement.pipes[0])
        assert ends[-1] == len(self.layers)
        stages = pipe * len(placement.pipes)
        first, last = ({pipe[end] for pipe in placement.pipes} for end in (0, -1))
        return Costs(
            forward=[sum(layer.forward for layer in stage) for stage in stages],
            input_gradient=[sum(layer.input_gradient for layer in stage) for stage in stages],
            weight_gradient=[sum(layer.weight_gradient for layer in stage) for stage in stages],
            hop={edge: self._hop(stages, edge) for edge in placement.edges},
            activation=[
                # A stage keeps its output too, to start I from it; the last one has a loss instead.
                sum(layer.activation for layer in stage) + (0 if index in last else stage[-1].output)
                for index, stage in enumerate(stages)
            ],
            deferred=[sum(layer.deferred for layer in stage) for stage in stages],
            # Of the batch it is known only that the first layer holds it.
            inputs=[
                stage[0].activation if index in first else stages[index - 1][-1].output
                for index, stage in enumerate(stages)
            ],
            weights=None if self.state is None else [self.state * size for size in map(_parameters, stages)],
            exchange=self._exchange(placement, stages),
        )

    def _exchange(self, placement: Placement, stages: Sequence[Sequence[Layer]]) -> float:
        """A rank sends the gradients of all its stages to the one that holds the other copies, and gets as many."""
        if len(placement.pipes) == 1:
            return 0.0
        sizes = [sum(_parameters(stages[s]) for s in placement.stages_of(rank)) for rank in range(placement.ranks)]
        return self.latency + max(sizes) / (inf if self.bandwidth is None else self.bandwidth)

    def _hop(self, stages: Sequence[Sequence[Layer]], edge: Edge) -> float:
        # A gradient is as large as the activation that it answers.
        sender = edge.source if edge.kind == "activation" else edge.destination
        return self.latency + stages[sender][-1].output / (inf if self.bandwidth is None else self.bandwidth)

    def to_text(self) -> str:
        """The file's content, one layer per line."""
        head = {"format": FORMAT, "about": self.about, "latency": self.latency, "bandwidth": self.bandwidth}
        layers = ",\n".join(f"  {json.dumps(asdict(layer))}" for layer in self.layers)
        return f'{json.dumps(head, indent=1)[:-2]},\n "layers": [\n{layers}\n ]\n}}\n'

    @staticmethod
    def from_text(text: str, source: str = "the layer costs") -> LayerCosts:
        """Reads what ``to_text`` writes, and nothing else; ``source`` says in errors what was read.

        Raises:
            InputError: it is no such JSON object, a key is missing, unknown or doubled, or a number is out of range.
        """
        try:
            content = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{source} cannot be read as JSON", got=str(error), needed=f"a {FORMAT!r} object"
            ) from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            got = repr(content.get("format")) if isinstance(content, dict) else type(content).__name__
            raise InputError(f"{source} is of another format", got=got, needed=f"an object with the format {FORMAT!r}")
        _check_keys(source, content, ("format", "about", "latency", "bandwidth", "layers"))
        if not isinstance(content["about"], str):
            raise InputError(f"about in {source} is no text", got=content["about"], needed="a string")
        if not isinstance(content["layers"], list):
            raise InputError(f"layers in {source} is no list", got=type(content["layers"]).__name__, needed="a list")
        layers = []
        for index, layer in enumerate(content["layers"]):
            name = layer.get("name") if isinstance(layer, dict) else None
            if not isinstance(name, str):
                raise InputError(f"layer {index} in {source} has no name", needed="an object with the key name")
            _check_keys(f"layer {index} ({name}) in {source}", layer, ("name", *_NUMBERS))
            layers.append(Layer(**layer))
        return LayerCosts(tuple(layers), content["latency"], content["bandwidth"], content["about"])

    def write(self, path: str | Path) -> None:
        """Writes the file.

        Raises:
            InputError: it cannot be written.
        """
        try:
            Path(path).write_text(self.to_text(), encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write {path}", got=error.strerror, fix="choose another place") from None

    @staticmethod
    def read(path: str | Path) -> LayerCosts:
        """Reads the file.

        Raises:
            InputError: it cannot be read, or is not what ``write`` writes.
        """
        try:
            text = read_file(path, LARGEST).decode()
        except OSError as error:
            raise InputError(f"cannot read {path}", got=error.strerror, fix="check the path") from None
        except UnicodeDecodeError:
            raise InputError(f"{path} is no text", needed=f"a file of format {FORMAT!r}") from None
        return LayerCosts.from_text(text, str(path))


@lru_cache(maxsize=256)  # a planner asks for the same placements again and again
def best_cut(costs: LayerCosts, placement: Placement) -> Cut:
    """The cut for the stages of ``placement`` with the smallest bottleneck, in seconds; see ``pipex.plan.cut``.

    Raises:
        InputError: fewer layers than stages.
    """
    return cut(costs.times, placement)


def _parameters(stage: Sequence[Layer]) -> float:
    return sum(layer.parameters for layer in stage)


def _check(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"bad cost: {name}", got=repr(value)[:60], needed="a number")
    check_cost(name, value)


def _check_keys(what: str, found: Mapping[str, Any], needed: Sequence[str]) -> None:
    if missing := [key for key in needed if key not in found]:
        raise InputError(f"{what} lacks {missing[0]}", got=", ".join(found), needed=", ".join(needed))
    if unknown := [key for key in found if key not in needed]:
        raise InputError(f"{what} has an unknown key", got=unknown[0], needed=", ".join(needed))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key stands twice among {', '.join(key for key, _ in pairs)}")
    return found


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")
