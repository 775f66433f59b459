"""What transformers' models say of themselves, and collect beside their outputs. Nothing here imports transformers."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from typing import Any

from torch import Tensor, nn

from pipex.errors import UnsupportedModule

_CAPTURING = "transformers.utils.output_capturing"
_COLLECTOR = "_active_collector"


def collected() -> Mapping[str, list[Any]]:
    """What the model that is running has collected from within its layers until now, by name (router logits): models
    of experts hang hooks on their routers, which put what they find into lists that live as long as a forward."""
    module = sys.modules.get(_CAPTURING)  # no such model is running where it was not imported
    collector = getattr(module, _COLLECTOR, None)
    found = None if collector is None else collector.get()
    return {} if found is None else {name: entries for name, entries in found.items() if isinstance(entries, list)}


def layer_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """By path the module lists whose modules are wholes: those that a ``PreTrainedModel`` in the model does not want
    split (``_no_split_modules``), that its configuration's ``base_model_pp_plan`` names, or that checkpoint their
    activations one by one (``GradientCheckpointingLayer``); if there are none, those of as many modules as the
    configuration has layers. Of lists within each other the outermost."""
    found = list(_lists_of_wholes(model))
    if found:
        return found
    layers = {getattr(getattr(module, "config", None), "num_hidden_layers", None) for module in model.modules()}
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return [(name, module) for name, module in lists if len(module) in layers]


def _lists_of_wholes(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    whole = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    planned = {id(child) for module in model.modules() for child in _planned(module)}
    inside: str | None = None
    for name, module in model.named_modules():
        if (inside is None or not name.startswith(inside)) and isinstance(module, nn.ModuleList) and len(module):
            kinds = {type(child) for child in module}
            if id(module) in planned or all(kind.__name__ in whole or _checkpoints(kind) for kind in kinds):
                inside = f"{name}."
                yield name, module


def samples_elsewhere(batch: Mapping[str, Any]) -> str | None:
    """The name of what does not have its samples in dimension 0: positions in several axes (of images and text) are
    (axes, samples, length)."""
    positions = batch.get("position_ids")
    return "position_ids" if isinstance(positions, Tensor) and positions.dim() == 3 else None


def is_pretrained(model: nn.Module) -> bool:
    """Whether it is a ``PreTrainedModel`` of transformers."""
    module = sys.modules.get("transformers.modeling_utils")
    return module is not None and isinstance(model, module.PreTrainedModel)


def refuse_untied(modules: Sequence[nn.Module]) -> None:
    """Raises UnsupportedModule if a model says that two of its parameters are one, and they are two, in one of these
    modules or in several that have parts of copies of it."""
    found: dict[tuple[type, str], nn.Parameter] = {}
    ties: set[tuple[type, str, str]] = set()
    for module in (inner for outer in modules for inner in outer.modules()):
        said = list(_ties_said(module))
        ties.update((type(module), name, owner) for name, owner in said)
        if said:
            named = module.named_parameters(remove_duplicate=False)
            found |= {(type(module), name): parameter for name, parameter in named}
    for kind, name, owner in sorted(ties, key=str):
        one, other = found.get((kind, name)), found.get((kind, owner))
        if one is not None and other is not None and one is not other:
            raise UnsupportedModule(
                f"{name} and {owner} of {kind.__name__} are tied, as its configuration has it, and are two parameters",
                got="each trained apart", needed="one parameter",
                fix="cut one model, not copies of it; call model.tie_weights(); or set config.tie_word_embeddings to "
                "False",
            )  # fmt: skip


def _ties_said(module: nn.Module) -> Iterator[tuple[str, str]]:
    """What a model says is one parameter: names, each with that of its owner."""
    said = getattr(module, "all_tied_weights_keys", None)
    if isinstance(said, dict):
        yield from ((str(name), str(owner)) for name, owner in said.items())


def no_cache(model: nn.Module) -> dict[str, Any]:
    """What its forward is called with so that it keeps nothing for the next token."""
    configured = getattr(getattr(model, "config", None), "use_cache", None)
    knows = "use_cache" in signature(model.forward).parameters
    return {"use_cache": False} if knows or configured else {}


def _planned(module: nn.Module) -> Iterator[nn.Module]:
    plan = getattr(getattr(module, "config", None), "base_model_pp_plan", None)
    for name in plan or ():
        child = getattr(module, name, None)
        if isinstance(child, nn.ModuleList):
            yield child


def _checkpoints(kind: type) -> bool:
    return any(parent.__name__ == "GradientCheckpointingLayer" for parent in kind.__mro__)
