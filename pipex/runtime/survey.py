"""What a stage consists of at the moment: users freeze, thaw, add and replace parts of it between steps.

One walk over the modules of the stage at the beginning of every step finds it out anew.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pipex.partition import Stage
from pipex.torch_internals import buffers_of, children_of, hooks_on_all_modules, parts_of

_CONTIGUOUS: tuple[type[nn.Module], ...] = (nn.Linear, nn.LayerNorm)
"""These do not write to their input, and give a contiguous one a contiguous gradient."""

_NEVER_DRAW = frozenset({
    *_CONTIGUOUS, nn.Sequential, nn.Identity, nn.Flatten, nn.Unflatten, nn.Embedding, nn.EmbeddingBag, nn.Bilinear,
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.MaxPool1d,
    nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.RMSNorm,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid,
    nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Softplus, nn.Softsign, nn.Softmax, nn.LogSoftmax, nn.GLU,
})  # fmt: skip
"""torch's own, without a random operation in any mode. A layer of other modules may draw; one of these with a hook, a
forward of its own or a parametrization (which gives it another type) too."""


@dataclass(frozen=True, slots=True)
class Survey:
    """Attributes:
    parameters: each once, in model order, frozen ones too.
    drawing: positions of the layers that may draw random numbers.
    plain: whether it begins with a layer for which ``Received`` has less to do.
    """

    parameters: list[nn.Parameter]
    drawing: frozenset[int]
    plain: bool


def keeps_nothing(module: nn.Module) -> bool:
    """Whether its own forward is known to change nothing that it keeps: one of torch's modules without buffers, hooks
    or a forward of its own, and no embedding that renormalizes its rows. What is inside of it counts for itself."""
    _, _, before, after = parts_of(module)
    own = before or after or hooks_on_all_modules() or "forward" in vars(module)
    changes = own or buffers_of(module) or getattr(module, "max_norm", None) is not None
    return type(module).__module__.startswith("torch.nn.modules.") and not changes


def survey(stage: Stage) -> Survey:
    """Walks over the stage."""
    parameters: dict[int, nn.Parameter] = {}
    seen: set[int] = set()
    hooked = hooks_on_all_modules()
    drawing = set()
    for position, layer in enumerate(children_of(stage.layers).values()):
        todo = [layer]
        while todo:  # as layer.modules(), but one that is used twice comes twice
            module = todo.pop()
            if module is None:
                continue
            held, children, before, after = parts_of(module)
            if type(module) not in _NEVER_DRAW or before or after or hooked or "forward" in vars(module):
                drawing.add(position)
            if children:
                todo += reversed(children.values())
            if id(module) not in seen:
                seen.add(id(module))
                for parameter in held.values():
                    if parameter is not None:
                        parameters[id(parameter)] = parameter
    plain = 0 not in drawing and type(_first(stage.layers[0])) in _CONTIGUOUS
    return Survey(list(parameters.values()), frozenset(drawing), plain)


def _first(layer: nn.Module) -> nn.Module:
    while type(layer) is nn.Sequential and len(layer):
        layer = layer[0]
    return layer
