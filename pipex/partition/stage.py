"""A stage: a contiguous block of a model's layers, which keeps the model's own tensor names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import ref

from torch import Tensor, nn

from pipex.errors import InputError, UnsupportedModule
from pipex.hugging_face import Card, card_of
from pipex.hugging_face.conventions import refuse_untied
from pipex.layout import ranges_of
from pipex.partition.layers import canonical_names, module_names
from pipex.torch_internals import with_children


class Keywords(dict[str, Any]):
    """Keyword arguments of a stage's first layer; the last one of the stage's inputs."""


class Stage(nn.Module):
    """Layers ``first_layer`` to ``first_layer + len(layers) - 1`` of a model, as stage ``index`` of ``count``.

    The layers are the model's own modules, not copies: a parameter that is tied across layers stays one object.
    """

    before_layer: Callable[[int], object] | None = None
    """called in a forward ahead of each layer, with the layer's position in here"""
    draws_between: bool = False
    """whether what runs between the layers may draw random numbers too: then every call of ``before_layer`` counts"""
    card: Card | None = None
    """of a model of transformers or PEFT: how its files are written and read"""
    model: ref[nn.Module] | None = None
    """that model, as long as somebody else holds it"""
    loss_seen: bool | None = None
    """whether the model has returned a loss for the sample that it was cut by; None where stages do not run the model's
    own forward"""
    loss_problem: str = ""
    """what keeps that loss from being a mean over all micro-batches"""
    own_loss: bool = False
    """whether the last stage returns the model's own loss (``OwnLoss``) in place of the model's output"""

    def __init__(self, index: int, count: int, first_layer: int, layers: Sequence[nn.Module], model: nn.Module) -> None:
        """``model``: what the layers are of, and the tensors called by."""
        super().__init__()
        self.index = index
        self.count = count
        self.first_layer = first_layer
        self.layers = nn.ModuleList(layers)
        self._layers = len(layers)
        # Paths, not tensors: Module.to() replaces buffers, and may replace parameters.
        canonical, modules = canonical_names(model), module_names(model)
        self._canonical = {path: canonical[id(tensor)] for path, tensor in _tensors(self.layers).items()}
        named = self.layers.named_modules(remove_duplicate=False)
        self._modules_canonical = {path: modules[id(m)] for path, m in named if path and id(m) in modules}
        self._paths: dict[str, str] = {}  # of a tied one the first
        for path, name in self._canonical.items():
            self._paths.setdefault(name, path)

    @property
    def names(self) -> dict[str, Tensor]:
        """The name that the unsplit model has for each parameter and persistent buffer of this stage (such as
        ``blocks.3.attn.weight``) -> the tensor. A tied one stands once, under the first of its names.

        What was put into a module after the split is called by where it stands in there, as in a model that was changed
        alike and then split.

        Raises:
            UnsupportedModule: layers were added or taken out, or different tensors would be called alike.
        """
        if len(self.layers) != self._layers:
            raise UnsupportedModule(
                f"stage {self.index} has other layers than when the model was split", got=f"{len(self.layers)} of them",
                needed=f"{self._layers}", fix="wrap a layer, or change the model before it is split",
            )  # fmt: skip
        persistent = self.layers.state_dict().keys()
        named: dict[str, Tensor] = {}
        seen: set[int] = set()
        for path, tensor in _tensors(self.layers).items():
            if id(tensor) in seen or not (isinstance(tensor, nn.Parameter) or path in persistent):
                continue
            seen.add(id(tensor))
            name = self._canonical.get(path)
            if name is None or self._paths[name] != path:  # new, or tied no longer to what it was called by
                name = self._name_of_new(path)
            if named.setdefault(name, tensor) is not tensor:
                raise UnsupportedModule(
                    f"two tensors of stage {self.index} are called {name}", got=f"another one at layers.{path}",
                    needed="a name for each", fix="change modules that are used twice before the model is split",
                )  # fmt: skip
        return named

    def called(self, path: str) -> str:
        """The model's name of what stands at a path in the layers."""
        return self._canonical.get(path) or self._name_of_new(path)

    def _name_of_new(self, path: str) -> str:
        """By the canonical name of the nearest module around it that was there when the model was split."""
        module, rest = path, ""
        while module not in self._modules_canonical:
            module, _, last = module.rpartition(".")
            rest = f".{last}{rest}"
        return self._modules_canonical[module] + rest

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter that the unsplit model calls so.

        Raises:
            UnsupportedModule: it has been moved, or is none any more.
        """
        path = self._paths[name]
        try:
            return self.layers.get_parameter(path)
        except AttributeError:
            position, _, inside = path.partition(".")
            raise UnsupportedModule(
                f"{name} stands in several stages, and was {inside} of layer {self.first_layer + int(position)}",
                got="no parameter of that name in there", needed="one that stays where it is",
                fix="parametrize, wrap or remove it before the pipeline is made",
            ) from None  # fmt: skip

    @property
    def behind(self) -> int:
        """The number by which what follows the last stage is seeded."""
        return self.first_layer + len(self.layers)

    def check_inputs(self, inputs: tuple[Any, ...], *, whole: bool) -> None:
        """Raises InputError if a batch cannot be the first stage's inputs, as far as that can be told ahead.

        Args:
            whole: whether it is still to be cut into micro-batches, along dimension 0.
        """

    def forward(self, *inputs: Any) -> Any:
        """Applies the layers in order. A tuple that a layer returns is passed on as positional arguments."""
        outputs: Any = inputs
        keywords: Mapping[str, Any] = {}
        if inputs and isinstance(inputs[-1], Keywords):
            outputs, keywords = inputs[:-1], inputs[-1]
        before = self.before_layer
        for position, layer in enumerate(self.layers):
            if before is not None:
                before(position)
            outputs = layer(*outputs, **keywords) if isinstance(outputs, tuple) else layer(outputs)
            keywords = {}
        return outputs

    def without_layers(self, layers: nn.ModuleList) -> Stage:
        """A copy that has these, without tensors, in place of its layers."""
        return with_children(self, {"layers": layers})

    def extra_repr(self) -> str:
        last = self.first_layer + len(self.layers) - 1
        return f"stage {self.index} of {self.count}, layers {self.first_layer} to {last}"


def cut(layers: Sequence[nn.Module], counts: Sequence[int], model: nn.Module) -> list[Stage]:
    """All layers of a model as stages of so many layers each."""
    ranges = ranges_of(counts)
    stages = [Stage(index, len(ranges), r.start, layers[r.start : r.stop], model) for index, r in enumerate(ranges)]
    introduce(stages, model)
    return stages


def introduce(stages: Sequence[Stage], model: nn.Module) -> None:
    """Tells stages what model of transformers or PEFT they are of, if they are."""
    if (card := card_of(model)) is not None:
        for stage in stages:
            stage.card, stage.model = card, ref(model)


def as_stages(modules: Sequence[nn.Module]) -> list[Stage]:
    """Plain modules as stages, one layer each; tensors are called ``<stage index>.<name in the module>``.

    The stages that ``split_model`` returned are passed through.

    Raises:
        InputError: no module is given, or stages are not all the stages of one split in order.
        UnsupportedModule: they are of copies of a model, in which what it says is tied is not.
    """
    if not modules:
        raise InputError("a pipeline needs at least one stage", got="none")
    stages = [module for module in modules if isinstance(module, Stage)]
    if not stages:
        refuse_untied(modules)
        model = nn.ModuleList(modules)
        return cut(modules, [1] * len(modules), model)
    if [(stage.index, stage.count) for stage in stages] != [(index, len(modules)) for index in range(len(modules))]:
        raise InputError(
            "these are not all the stages of one split, in order",
            got=[f"{s.index} of {s.count}" if isinstance(s, Stage) else type(s).__name__ for s in modules],
            needed=f"stages 0 to {stages[0].count - 1}",
            fix="pass the whole list that split_model returned",
        )
    return stages


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by path, a tied one under each of its paths."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
