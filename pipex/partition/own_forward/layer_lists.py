"""Between which modules a model may be cut: what transformers' models say of themselves, or what the user says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from pipex.errors import InputError, UnsupportedModule
from pipex.partition.conventions import layer_lists


def layer_paths(model: nn.Module, lists: Sequence[str] | None) -> list[str]:
    """The names of the layers, in the order in which they stand in the model.

    Args:
        lists: names of module lists; None: those of ``conventions.layer_lists``.

    Raises:
        InputError: one of the names is not that of a list of modules.
        UnsupportedModule: nothing says which lists there are.
    """
    found = list(layer_lists(model) if lists is None else _named(model, lists))
    if not found:
        raise UnsupportedModule(
            f"{type(model).__name__} has no list of layers that can be recognized",
            got=f"module lists {_lists(model)}",
            needed="a PreTrainedModel with _no_split_modules or base_model_pp_plan, or the names of module lists",
            fix='name them: split_model(..., layers=("encoder.layers", "decoder.layers"))',
        )
    return [f"{name}.{child}" for name, module in found for child, _ in module.named_children()]


def _named(model: nn.Module, lists: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(lists, str):
        raise InputError("layers must name lists of modules", got=repr(lists), needed="a sequence of names")
    for name in lists:
        try:
            module = model.get_submodule(name)
        except AttributeError:
            module = None
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not len(module):
            raise InputError(
                f"layers names no list of modules of {type(model).__name__}", got=repr(name),
                needed=f"names of lists with modules, such as {_lists(model)[:8]}",
            )  # fmt: skip
        yield name, module


def _lists(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
