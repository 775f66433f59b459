"""Which layers a model consists of, and what its tensors are called."""

from __future__ import annotations

from typing import TypeGuard

from torch import Tensor, nn

from pipex.errors import InputError, UnsupportedModule
from pipex.torch_internals import has_hooks


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The model's layers, in the order in which ``model.forward`` applies them.

    A model says what its layers are in one of two ways:

    - it has an attribute ``pipeline_layers: Sequence[str]``, names of submodules in the order of application. An entry
      that is an ``nn.ModuleList`` or ``nn.Sequential`` stands for the layers in it;
    - it is an ``nn.Sequential``: its layers are its children.

    A subclass of ``nn.Sequential`` with a forward of its own is one layer, not a list of layers.

    ``model.forward`` must equal applying the layers one after another, a tuple being passed on as positional
    arguments. This cannot be checked here. What can be checked is that no tensor of the model is left outside, and that
    nothing hangs on the modules that the layers are taken out of, and so are not called themselves.

    Raises:
        UnsupportedModule: the model does not name its layers, a parameter or buffer of it is in no layer, or the model
            or a container of layers has hooks or a forward of its own.
        InputError: ``pipeline_layers`` names something that is not a submodule.
    """
    names = getattr(model, "pipeline_layers", None)
    if names is not None:
        layers = [layer for name in names for layer in _expand(model, name)]
    elif _is_plain_sequential(model):
        layers = list(model)  # unlike children(), keeps the second use of a module that stands twice
    else:
        raise UnsupportedModule(
            f"{type(model).__name__} does not say what its layers are",
            needed="an nn.Sequential (with its own forward), or an attribute pipeline_layers with the names of its "
            "submodules in order",
            fix='write e.g. pipeline_layers = ("embed", "blocks", "head"), or pass sample=, a batch, to split a model '
            "with lists of layers by its own forward",
        )
    _check_bare(model, "the model")
    _check_covered(model, layers)
    return layers


def names_layers(model: nn.Module) -> bool:
    """Whether the model says what its layers are, as ``layers_of`` has it."""
    return getattr(model, "pipeline_layers", None) is not None or _is_plain_sequential(model)


def canonical_names(model: nn.Module) -> dict[int, str]:
    """id of each parameter and buffer -> its name in the model; a tied one is called by the first of its names in
    ``named_parameters()`` (``named_buffers()``) order."""
    tensors: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    return {id(tensor): name for name, tensor in tensors}


def module_names(model: nn.Module) -> dict[int, str]:
    """id of each module -> its name in the model, the first one if it has several."""
    return {id(module): name for name, module in model.named_modules()}


def _is_plain_sequential(module: nn.Module) -> TypeGuard[nn.Sequential]:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _expand(model: nn.Module, name: str) -> list[nn.Module]:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise InputError(
            f"pipeline_layers of {type(model).__name__} names no submodule",
            got=repr(name),
            needed=f"names out of {[child for child, _ in model.named_children()]}",
        ) from None
    if isinstance(module, nn.ModuleList):
        return list(module)
    if _is_plain_sequential(module):
        _check_bare(module, name)
        return list(module)
    return [module]


def _check_bare(module: nn.Module, called: str) -> None:
    own = "forward" in vars(module)
    if own or has_hooks(module):
        raise UnsupportedModule(
            f"{called} is taken apart into its layers, and what hangs on it would not run",
            got="a forward that was set on the object" if own else "a hook", needed="neither",
            fix="register the hook on a layer, or make what has it one layer: a module of yours that has it inside",
        )  # fmt: skip


def _check_covered(model: nn.Module, layers: list[nn.Module]) -> None:
    covered = {id(tensor) for layer in layers for tensor in [*layer.parameters(), *layer.buffers()]}
    outside = [name for identity, name in canonical_names(model).items() if identity not in covered]
    if outside:
        raise UnsupportedModule(
            f"{type(model).__name__} cannot be split",
            got=f"{outside[0]} in none of its layers ({len(outside)} such in all)",
            needed="every parameter and buffer inside a layer",
            fix="move it into a module that pipeline_layers names",
        )
