"""An optimizer's state in a checkpoint, by parameter name, so that it fits any cut of the model.

For each parameter of the optimizer, the tensors of its state are saved as ``optimizer/<parameter>/<key>``, and one
meta entry ``optimizer/<parameter>`` holds the rest::

    {"class": "AdamW", "tensors": ["step", "exp_avg", ..], "values": {plain numbers}, "options": {"lr": .001, ..}}

``options`` are the hyperparameters of the parameter's group. They stand with each parameter because another cut makes
other groups.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from pipex.errors import CheckpointError
from pipex.state import model
from pipex.state.checkpoint import Checkpoint, Restore
from pipex.state.files import first_few
from pipex.state.manifest import shown

PREFIX = "optimizer/"
MAIN = "main/"
"""of main weights: float32 tensors that the optimizer had in place of the model's, under the same names"""

NOT_OPTIONS = ("params", "param_names")  # of a parameter group


def optimizer_state(
    optimizer: Optimizer, names: Mapping[str, Tensor], others: Container[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and meta to be saved.

    Args:
        names: ``Stage.names``, or more than the optimizer has parameters of.
        others: names whose state somebody else saves.

    Raises:
        CheckpointError: the optimizer has a parameter that is not in ``names``, or state that is neither a tensor
            nor a plain number.
    """
    tensors: dict[str, Tensor] = {}
    meta: dict[str, Any] = {}
    kind = type(optimizer).__name__
    for group, name, parameter in _parameters(optimizer, names):
        if name in others:
            continue
        state = optimizer.state.get(parameter, {})
        in_tensors = [key for key, value in state.items() if isinstance(value, Tensor)]
        tensors |= {f"{PREFIX}{name}/{key}": state[key].detach() for key in in_tensors}
        meta[PREFIX + name] = {
            "class": kind,
            "tensors": in_tensors,
            "values": {key: _plain(value, kind, key) for key, value in state.items() if key not in in_tensors},
            "options": {key: _plain(value, kind, key) for key, value in group.items() if key not in NOT_OPTIONS},
        }
    return tensors, meta


def read_optimizer_state(checkpoint: Checkpoint, optimizer: Optimizer, names: Mapping[str, Tensor]) -> Restore:
    """Reads state and hyperparameters of an optimizer over any subset of the saved parameters; what it returns restores
    them, bit for bit.

    Raises:
        CheckpointError: a parameter was not saved, or by another class of optimizer; parameters that are now in one
            group were saved with different hyperparameters; a file is damaged.
    """
    kind = type(optimizer).__name__
    parameters = _parameters(optimizer, names)
    missing = [name for _, name, _ in parameters if PREFIX + name not in checkpoint.meta]
    if missing:
        raise CheckpointError(
            f"the checkpoint in {checkpoint.directory} has no optimizer state of {first_few(missing)}"
        )
    saved = {name: _record(checkpoint, name) for _, name, _ in parameters}
    for name, record in saved.items():
        if record["class"] != kind:
            raise CheckpointError(
                f"the optimizer state of {name} was saved by another optimizer", got=record["class"], needed=kind
            )
    options = [_common_options(group, parameters, saved) for group in optimizer.param_groups]
    for group, values in zip(optimizer.param_groups, options, strict=True):
        _check_options(checkpoint, group, values)
    dtypes = {name: _dtype_of(checkpoint, name) for name in saved}
    tensors = checkpoint.load(f"{PREFIX}{name}/{key}" for name, record in saved.items() for key in record["tensors"])

    def restore() -> None:
        for group, values in zip(optimizer.param_groups, options, strict=True):
            _set_options(group, values)
        optimizer.state.clear()
        for group, name, parameter in parameters:
            record = saved[name]
            state = {key: tensors[f"{PREFIX}{name}/{key}"] for key in record["tensors"]}
            if state or record["values"]:
                placed = {key: _place(key, tensor, parameter, group, dtypes[name]) for key, tensor in state.items()}
                optimizer.state[parameter] = {**placed, **record["values"]}

    return restore


Parameters = list[tuple[dict[str, Any], str, Tensor]]


def _parameters(optimizer: Optimizer, names: Mapping[str, Tensor]) -> Parameters:
    """(group, name, parameter) of all parameters of the optimizer."""
    name_of = {id(tensor): name for name, tensor in names.items()}
    result: Parameters = []
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in name_of:
                raise CheckpointError(
                    "the optimizer has a parameter that is in no stage of this rank",
                    got=f"one of shape {list(parameter.shape)} in parameter group {number}",
                    needed="only parameters of its own stages",
                    fix="take one that was replaced or removed out of its group's params, and out of optimizer.state",
                )
            result.append((group, name_of[id(parameter)], parameter))
    return result


def _plain(value: Any, kind: str, key: str) -> Any:
    """The value as JSON; tuples become lists, and one-element tensors (a capturable learning rate) numbers."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, (list, tuple)):
        return [_plain(element, kind, key) for element in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(
        f"{key!r} of {kind} cannot be saved", got=type(value).__name__, needed="a tensor or a plain number"
    )


_RECORD = {"class": str, "tensors": list, "values": dict, "options": dict}


def _record(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """What was saved of a parameter; a checkpoint may come from anywhere, so its structure is looked at."""
    record: dict[str, Any] = checkpoint.meta[PREFIX + name]
    good = (
        isinstance(record, dict)
        and {key: type(value) for key, value in record.items()} == _RECORD
        and all(isinstance(key, str) for key in record["tensors"])
        and all(map(_is_plain, [*record["values"].values(), *record["options"].values()]))
        and not set(NOT_OPTIONS) & record["options"].keys()
    )
    if not good:
        raise CheckpointError(
            f"the optimizer state of {name} in {checkpoint.directory} cannot be read", got=shown(record),
            needed=f"an object of {', '.join(_RECORD)}", fix="use another checkpoint",
        )  # fmt: skip
    return record


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, list) else not isinstance(value, dict)


def _check_options(checkpoint: Checkpoint, group: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if key in group and not _is_like(value, group[key]):
            raise CheckpointError(
                f"{key} of the optimizer in {checkpoint.directory} cannot be used",
                got=shown(value), needed=f"something like {shown(group[key])}", fix="use another checkpoint",
            )  # fmt: skip


def _is_like(value: Any, current: Any) -> bool:
    """Whether an optimizer that has ``current`` can have ``value``. None stands for what torch chooses by itself,
    mostly a flag; a number may have come from a tensor of one element, and become one."""
    if isinstance(current, (list, tuple)):
        return isinstance(value, list) and len(value) == len(current) and all(map(_is_like, value, current))
    if current is None:
        return not isinstance(value, list)
    if isinstance(current, bool):
        return value is None or isinstance(value, bool)
    if isinstance(current, (int, float, Tensor)):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is type(current)


def _common_options(group: dict[str, Any], parameters: Parameters, saved: dict[str, Any]) -> dict[str, Any]:
    names = [name for owner, name, _ in parameters if owner is group]
    common: dict[str, Any] = saved[names[0]]["options"] if names else {}
    for name in names:
        for key, value in saved[name]["options"].items():
            if value != common.get(key):
                raise CheckpointError(
                    f"{names[0]} and {name} are in one parameter group now, but were saved with other hyperparameters",
                    got=f"{key} {common.get(key)} and {value}",
                    fix="build the optimizer with the parameter groups of the saved run",
                )
    return common


def _set_options(group: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        current = group.get(key)
        if isinstance(current, Tensor):
            current.fill_(value)
        else:
            group[key] = tuple(value) if isinstance(current, tuple) else value


def _dtype_of(checkpoint: Checkpoint, name: str) -> str:
    """What the optimizer that was saved had for this parameter: a main weight, or the parameter itself."""
    form = checkpoint.tensors.get(MAIN + name) or checkpoint.tensors.get(model.PREFIX + name, "")
    return form.partition("[")[0]


def _place(key: str, tensor: Tensor, parameter: Tensor, group: dict[str, Any], dtype: str) -> Tensor:
    # torch keeps the step count on the host unless the update runs in a CUDA graph or a fused kernel.
    if key == "step" and not (group.get("capturable") or group.get("fused")):
        return tensor
    # What had the dtype of its parameter, element by element or row by row, has that of the one which is there now: a
    # main weight where there was none, or the other way round. A scalar (a product of decays) has a dtype of its own.
    if tensor.dim() and str(tensor.dtype) == f"torch.{dtype}":
        return tensor.to(parameter.device, parameter.dtype)
    return tensor.to(parameter.device)
