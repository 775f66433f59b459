"""Every private name of torch that pipex uses, and why: nothing else in pipex touches one (tests/test_house.py).

All of these are in every torch of the range below, where ``make test-torch`` has run (docs/torch-versions.md); a name
that only newer ones have says so. What a torch lacks is not missed before it is needed: ``import pipex`` and plans work
with any torch, the split backward, and so training, with one that has the names below which are for no other user, and
``drop_in()`` with one that has what it replaces, too. A name that is for another user is missed by that one alone.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from copy import copy
from datetime import timedelta
from functools import partial
from operator import attrgetter, methodcaller
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # sees operations, not modules
from torch.utils._pytree import TreeSpec as TreeSpec  # what arguments and outputs consist of
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves  # the tensors of what they return
from torch.utils._pytree import tree_unflatten as tree_unflatten

from pipex.errors import UnsupportedModule

OLDEST, NEWEST = "2.11", "2.15"
"""The range of torch that pipex accepts; pyproject.toml asks for the same."""


class Name(NamedTuple):
    """A private name: where it stands, and for what is replaced its first parameters."""

    path: str
    parameters: tuple[str, ...] = ()


def find(path: str) -> Any:
    """What this torch has under the dotted name.

    Raises:
        AttributeError: nothing.
    """
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AttributeError(path)


def differences(names: Iterable[Name]) -> list[str]:
    """What this torch lacks of these, or has with other parameters."""
    found = []
    for path, parameters in names:
        try:
            here = find(path)
        except AttributeError:
            found.append(f"no {path}")
            continue
        if parameters:
            has = tuple(inspect.signature(here).parameters)
            if has[: len(parameters)] != parameters:
                found.append(f"{path}({', '.join(has)}) in place of ({', '.join(parameters)})")
    return found


FIX = "install a torch of that range"


def refusal(what: str, cause: str, fix: str) -> UnsupportedModule:
    """The error for something that does not work with this torch; says version, range and what differs."""
    return UnsupportedModule(
        f"{what} does not work with torch {torch.__version__}", got=cause,
        needed=f"torch {OLDEST} to {NEWEST}, the range that pipex accepts", fix=fix,
    )  # fmt: skip


SPLIT_BACKWARD = "the split backward"
_lacking: list[str] = []  # of what that uses


def _private(path: str, user: str = SPLIT_BACKWARD) -> Any:
    """The object of that name; where this torch has none, a function that refuses to be called by its user."""
    try:
        return find(path)
    except AttributeError:
        return _refusing(path, user)


def _attribute(owner: str, name: str, user: str = SPLIT_BACKWARD) -> Callable[[Any], Any]:
    """A function that reads this attribute of an object of class ``owner``."""
    try:
        find(f"{owner}.{name}")
    except AttributeError:
        return _refusing(f"{owner}.{name}", user)
    return attrgetter(name)  # in C: a third of the time of a function of ours


def _refusing(path: str, user: str) -> Callable[..., Any]:
    if user == SPLIT_BACKWARD:
        _lacking.append(f"no {path}")

    def refuse(*_: object) -> Any:
        raise refusal(user, f"no {path}", FIX)

    return refuse


def require_split_backward() -> None:
    """Called before the first prepared forward.

    Raises:
        UnsupportedModule: this torch lacks what the split backward uses.
    """
    if _lacking:
        raise refusal(SPLIT_BACKWARD, "; ".join(_lacking), FIX)


# Autograd: which pass is running, and what it comes to.

current_pass: Callable[[], int] = _private("torch._C._current_graph_task_id")  # -1 outside of any
current_node: Callable[[], Any] = _private("torch._C._current_autograd_node")  # the operation that a pass is at
# Whether the running pass adds to .grad of a leaf.
will_execute: Callable[[Any], bool] = _private("torch._C._will_engine_execute_node")
# To know later which nodes were made since.
next_sequence_number: Callable[[], int] = _private("torch.autograd._get_sequence_nr")
# Work at the end of a pass (queue_callback), and accumulators as roots without autograd.backward's checks of gradients
# that are right by construction (run_backward): 7 instead of 18 µs for a small parameter.
engine: Any = _private("torch.autograd.Variable._execution_engine")

# What stands around an operation, asked before it is recorded.

any_autocast: Callable[[], bool] = _private("torch._C._is_any_autocast_enabled")  # for any device; no public one is
# Whether saved tensors are packed (checkpointing, offload).
top_saved_tensors_hooks: Callable[[bool], Any] = _private("torch._C._autograd._top_saved_tensors_default_hooks")
# What checkpoints that are not reentrant are made by; in torch.utils.checkpoint and, once that is imported, in
CHECKPOINT = "_checkpoint_without_reentrant_generator"
COMPOSABLE_CHECKPOINT = "torch.distributed._composable.checkpoint_activation"
make_checkpoint = _private(f"torch.utils.checkpoint.{CHECKPOINT}")

functorch_active: Callable[[], bool] = _private("torch._C._are_functorch_transforms_active")  # torch.func is at work
# How many modes are on, in this thread.
function_modes: Callable[[], int] = _private("torch._C._len_torch_function_stack", "a pipeline")
profiling: Callable[[], bool] = _private("torch._C._autograd._profiler_enabled")
dispatch_modes: Callable[[], int] = _private("torch._C._len_torch_dispatch_stack")
_private("torch.autograd.forward_ad._current_level")  # forward-mode derivatives are at work; -1 if not
forward_derivatives_level: Callable[[], int] = partial(getattr, torch.autograd.forward_ad, "_current_level")
_compiled_call: Callable[[nn.Module], Any] = _attribute("torch.nn.Module", "_compiled_call_impl")  # by module.compile()


def is_compiled(module: nn.Module) -> bool:
    """Whether the module itself, not one within it, was compiled by torch.compile or by its own ``compile``."""
    dynamo = sys.modules.get("torch._dynamo")  # without which nothing is; it takes a second to import
    return _compiled_call(module) is not None or (dynamo is not None and isinstance(module, dynamo.OptimizedModule))


# Tensors and nodes.

version: Callable[[Tensor], int] = _attribute("torch.Tensor", "_version")  # autograd's check for in-place changes
base: Callable[[Tensor], Tensor | None] = _attribute("torch.Tensor", "_base")  # what a view is of
# The memory of another tensor without being a view of it.
unsafe_view: Callable[[Tensor, Sequence[int]], Tensor] = _private(
    "torch.ops.aten._unsafe_view.default._op", "a pipeline"
)
# What F.grouped_mm calls, and models did before that was there; what bilinear layers are made of.
GROUPED_MM = "_grouped_mm"
grouped_mm: Callable[..., Tensor] = _private(f"torch.{GROUPED_MM}", "a pipeline")
trilinear: Callable[..., Tensor] = _private("torch._trilinear", "a pipeline")
is_view: Callable[[Tensor], bool] = _private("torch.Tensor._is_view")  # views must not be detached in place
# Whether somebody waits for a gradient, and who waits for .grad.
hooks_of: Callable[[Tensor], dict[Any, Any] | None] = _attribute("torch.Tensor", "_backward_hooks")
post_accumulate_hooks: Callable[[Tensor], dict[int, Callable[[Tensor], None]] | None] = _attribute(
    "torch.Tensor", "_post_accumulate_grad_hooks"
)
_private("torch.autograd.graph.Node._sequence_nr")  # which of two nodes is older
sequence_number: Callable[[Any], int] = methodcaller("_sequence_nr")


# Leaves the versions of these tensors (a tuple of them) as they are, whatever is written to them.
preserving_versions: Callable[[tuple[Tensor, ...]], AbstractContextManager[None]] = _private(
    "torch.autograd._unsafe_preserve_version_counter", "a plan with older weights"
)


def set_hooks(tensor: Tensor, hooks: dict[Any, Any] | None) -> None:
    """Replaces the hooks that autograd has been told of (``Tensor._backward_hooks``)."""
    tensor._backward_hooks = hooks


def add_hooks(tensor: Tensor, hooks: dict[Any, Any]) -> Any:
    """Puts the first hooks on a tensor with a graph; returns its node. This is Tensor.register_hook without a handle to
    remove them, which takes as long as ten such dicts."""
    tensor._backward_hooks = hooks
    node: Any = tensor.grad_fn
    node._register_hook_dict(tensor)
    return node


def hook_dict(tensor: Tensor) -> dict[Any, Any]:
    """The hooks on a tensor with a graph, to add to and to take from."""
    hooks: dict[Any, Any] | None = hooks_of(tensor)
    if hooks is None:
        hooks = OrderedDict()
        add_hooks(tensor, hooks)
    return hooks


# What nodes have saved: each is there on the nodes of that name only, and on none if the name is another's.

raw_self: Callable[[Any], Any] = attrgetter("_raw_saved_self")
raw_other: Callable[[Any], Any] = attrgetter("_raw_saved_other")
saved_self: Callable[[Any], Any] = attrgetter("_saved_self")
saved_other: Callable[[Any], Any] = attrgetter("_saved_other")
saved_approximate: Callable[[Any], str] = attrgetter("_saved_approximate")

# FSDP2 (``fully_shard``, and ``replicate``, which is made of it): what stands behind a module that it was applied to.


def sharded_states(module: nn.Module) -> list[Any]:
    """Of the module and of those within it, from the outside in; none where FSDP2 was never imported."""
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    parts = [] if fsdp is None else [part for part in module.modules() if isinstance(part, fsdp)]
    return list(dict.fromkeys(part._get_fsdp_state() for part in parts))  # several modules may have one together


def sharded_groups(state: Any) -> list[Any]:
    """The parameters of a state, by what is gathered and reduced together."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]  # torch 2.12 and older


def unsharded_parameter(sharded: Any) -> Tensor | None:
    """What the forward uses: one leaf for good, whose memory comes and goes; None before it was gathered first."""
    found: Tensor | None = getattr(sharded, "_unsharded_param", None)
    return found


context_of: Callable[[Any], Any] = attrgetter("_state_ctx")  # what the states of one root have in common
is_root: Callable[[Any], bool] = attrgetter("_is_root")
finish_reductions: Callable[[Any], None] = methodcaller("_root_post_backward_final_callback")  # of a root


has_python_reducer: Callable[[nn.Module], bool] = attrgetter("_use_python_reducer")  # of DDP: compiled_autograd's

# What a module consists of: public are generators that take five times as long.

children_of: Callable[[nn.Module], dict[str, nn.Module | None]] = attrgetter("_modules")
parameters_of: Callable[[nn.Module], dict[str, nn.Parameter | None]] = attrgetter("_parameters")
buffers_of: Callable[[nn.Module], dict[str, Tensor | None]] = attrgetter("_buffers")
parts_of: Callable[
    [nn.Module],
    tuple[dict[str, nn.Parameter | None], dict[str, nn.Module | None], dict[int, Any], dict[int, Any]],
] = attrgetter("_parameters", "_modules", "_forward_pre_hooks", "_forward_hooks")

AnyModule = TypeVar("AnyModule", bound=nn.Module)

# Names of the buffers that no checkpoint holds.
non_persistent_of: Callable[[nn.Module], set[str]] = attrgetter("_non_persistent_buffers_set")


def with_children(module: AnyModule, children: dict[str, nn.Module | None]) -> AnyModule:
    """A shallow copy that has other children."""
    found = copy(module)
    found._modules = children
    return found


_hooks_of_module: Callable[[nn.Module], tuple[dict[int, Any], ...]] = attrgetter(
    "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"
)


def has_hooks(module: nn.Module) -> bool:
    """Whether some were registered for the forwards or backwards of the module."""
    return any(_hooks_of_module(module))


def hooks_on_all_modules() -> bool:
    """Whether some were registered for the forwards of all modules."""
    module = importlib.import_module("torch.nn.modules.module")
    return bool(module._global_forward_pre_hooks or module._global_forward_hooks)


# Many tensors in one call, and tensors from and to other rooms.

foreach_add: Callable[[list[Tensor], list[Tensor]], None] = _private("torch._foreach_add_")
foreach_norm: Callable[[list[Tensor]], Iterable[Tensor]] = _private("torch._foreach_norm", "clipping of gradients")
# torch.from_dlpack does this after 150 ns of asking what kind of object it was given.
from_dlpack: Callable[[object], Tensor] = _private("torch._C._from_dlpack", "a transport through shared memory")
# The same for all views; a tensor subclass that wraps others has no address.
storage_id: Callable[[Any], int] = _attribute("torch.UntypedStorage", "_cdata", "a pipeline")

_found_infinite = _private("torch.amp.GradScaler._found_inf_per_device", "a gradient scaler")


def found_infinite(scaler: Any, optimizer: Any) -> dict[Any, Tensor]:
    """Per device whether ``unscale_`` has met an infinite gradient of the optimizer; what the scaler goes by, to be
    written to, so that ranks can agree on it."""
    found: dict[Any, Tensor] = _found_infinite(scaler, optimizer)
    return found


# Keeps a GPU busy for so many of its cycles.
gpu_sleep: Callable[[int], None] = _private("torch.cuda._sleep", "a measurement on a GPU")


def gloo_options(device: Any, *, threads: int, timeout: timedelta) -> Any:
    """Of a ``ProcessGroupGloo`` made without torch's default group, which no public name makes with options."""
    options = torch.distributed.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices, options._threads, options._timeout = [device], threads, timeout
    return options


def nccl_options(*, timeout: timedelta) -> Any:
    """Of a ``ProcessGroupNCCL`` made without torch's default group; ``timeout`` as of ``gloo_options``."""
    options = torch.distributed.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return options


def import_compiler() -> None:
    """Imports what the first optimizer of a process imports, and what takes it a second."""
    importlib.import_module("torch._dynamo")


# torch.distributed.pipelining, for ``drop_in()``. Public in name, but not documented, are also the attributes of stages
# (submod, stage_index, has_backward, dw_builder, dw_runner, chunks) and of schedules (rank, pipeline_order,
# pipeline_order_with_comms): whether those of stages still mean the same, the trial of drop_in() finds out.

STAGE = "torch.distributed.pipelining.stage"
SCHEDULES = "torch.distributed.pipelining.schedules"

REPLACED = (
    Name(f"{STAGE}._PipelineStageBase.forward_one_chunk", ("self", "fwd_chunk_id", "args", "kwargs")),  # F
    Name(
        f"{STAGE}._PipelineStageBase.backward_one_chunk",  # I and B
        ("self", "bwd_chunk_id", "loss", "full_backward", "last_backward"),
    ),
    Name(f"{STAGE}._PipelineStageBase.backward_weight_one_chunk", ("self", "bwd_chunk_id", "last_backward")),  # W
    # A tied parameter is divided once.
    Name(f"{STAGE}._PipelineStageBase.scale_grads", ("self", "grad_scale_factor")),
    # Which micro-batches are split.
    Name(f"{SCHEDULES}.PipelineScheduleMulti._step_microbatches", ("self",)),
    Name(f"{SCHEDULES}._PipelineScheduleRuntime._step_microbatches", ("self",)),
    # Compiled stages are right.
    Name(f"{SCHEDULES}._check_torch_compile_compatibility", ("stages", "schedule_name")),
    Name(f"{STAGE}.stage_backward", ("stage_output", "output_grads", "input_values")),  # B
    Name(
        f"{STAGE}.stage_backward_input",  # I
        ("stage_outputs_or_loss", "output_grads", "input_values", "weights"),
    ),
    Name(f"{STAGE}.stage_backward_weight", ("weights", "param_groups")),  # W
    # A stage looks at its shapes by a forward and a backward.
    Name(f"{STAGE}.PipelineStage._prepare_forward_infra", ("self", "num_microbatches", "args")),
)
"""What ``drop_in()`` replaces; a new function must be called as the old one was."""

stages_of: Callable[[Any], list[Any]] = attrgetter("_stages")
"""The stages of a schedule on this rank."""


def prepare_alone(stage: Any) -> None:
    """Does for a stage without neighbours, made with ``input_args`` and ``output_args``, what a schedule does before
    the first forward."""
    if hasattr(stage, "_stage_meta"):  # torch 2.13 on
        stage._stage_meta.inputs = ()
    else:
        stage._prepare_forward_infra(1, ())


def weight_on_the_way_to_a_mode() -> Any:
    """The ``weight`` of the ``l1_loss`` that calls a TorchFunctionMode: torch 2.13 hands on all arguments but it."""
    code = torch.nn.functional.l1_loss.__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get("weight")
