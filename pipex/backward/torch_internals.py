"""Private names of torch that the split backward uses for its compiler and for DTensors, and why (as
``pipex.torch_internals``, which has the others).

All are looked up when somebody has imported a compiler or DTensors. Without one of these names nothing of that kind
waits.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from operator import attrgetter
from typing import Any

from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator
from torch.autograd.function import BackwardCFunction

from pipex.torch_internals import find, sequence_number

# DTensors: what this rank has of one. The public to_local() leaves a node in the graph, and an exchange unfinished.
_PART = "_local_tensor"
part_of: Callable[[Any], Tensor] = attrgetter(_PART)


def dtensor_class() -> Any:
    """None before somebody has imported it, who has one then, and where its part has another name."""
    found = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return found if hasattr(found, _PART) else None


def changes_parts(node: Any) -> bool:
    """Whether a node of a graph is of one of DTensor's own Functions: they make a DTensor of parts, take parts of one,
    or give it other placements, and do nothing else."""
    function = getattr(node, "_forward_cls", None)  # of a node of a Function the class that its author wrote
    return getattr(function, "__module__", "").startswith("torch.distributed.tensor.")


# The compiler.

# Every backend that goes through AOTAutograd has this called by its name in this module.
BACKENDS = "torch._dynamo.backends.common"
COMPILE = "aot_module_simplified"
AOT_MODULE = f"torch._functorch.aot_autograd.{COMPILE}"


def _there(path: str) -> bool:
    try:
        find(path)
    except AttributeError:
        return False
    return True


def can_cut() -> bool:
    """Whether this torch has what it takes, and nothing stands against it: CUDA graphs write over what an earlier run
    has made, which W of another micro-batch reads. Else the gradients of what is compiled are made in I."""
    return all(map(_there, _NEEDED)) and not find("torch._inductor.config.triton.cudagraphs")


_NEEDED = (
    "torch._C._DisableAutocast",
    "torch._functorch.config.enable_autograd_cache",
    "torch._functorch.config.enable_remote_autograd_cache",
    "torch._guards.TracingContext.report_output_strides",
    "torch.utils._python_dispatch.is_traceable_wrapper_subclass",
    "torch._inductor.config.triton.cudagraphs",
)


def import_backends() -> None:
    """What backends import when they are first used. They keep functions of torch that they find then, and know some of
    them by their names, so it must not happen while ours stand there."""
    importlib.import_module(BACKENDS)
    importlib.import_module("torch._inductor.pattern_matcher")


def without_cache() -> AbstractContextManager[None]:
    """Compiled backwards are neither taken from AOTAutograd's cache nor put there."""
    patch = find("torch._functorch.config.patch")
    context: AbstractContextManager[None] = patch(enable_autograd_cache=False, enable_remote_autograd_cache=False)
    return context


def reported_strides() -> AbstractContextManager[list[tuple[Any, ...] | None] | None]:
    """What a compiler tells in here of the outputs of a graph: their strides, if they are others than the graph's."""
    context: AbstractContextManager[list[tuple[Any, ...] | None] | None]
    context = find("torch._guards.TracingContext").report_output_strides()
    return context


def without_autocast() -> AbstractContextManager[None]:
    """On all devices."""
    context: AbstractContextManager[None] = find("torch._C._DisableAutocast")()
    return context


def is_wrapper(tensor: Any) -> bool:
    """Whether it is of a subclass that wraps others (DTensor), of which AOTAutograd makes several inputs."""
    found: bool = find("torch.utils._python_dispatch.is_traceable_wrapper_subclass")(tensor)
    return found


def only_read(inputs: int) -> set[int] | None:
    """Which inputs of the graph that is being compiled have a gradient at their place in its backward and are in no
    output; None where the places differ. Called while its forward is compiled.

    From now on the backward that it belongs to leaves what the forward has saved as it is, unless it says so: W may
    read that later (inductor gives the memory of "donated" tensors to others).
    """
    context = find("torch._guards.TracingContext").try_get()
    metadata = None if context is None else context.fw_metadata
    if metadata is None or not all(hasattr(metadata, name) for name in _OF_METADATA):
        return None
    if metadata.is_rng_op_functionalized or metadata.num_backward_tokens or len(metadata.input_info) != inputs:
        return None
    metadata.bw_donated_idxs = []
    returned = {
        output.base_idx for output in metadata.output_info if output.output_type.name in ("alias_of_input", "is_input")
    }
    return {
        place
        for place, info in enumerate(metadata.input_info)
        if not (info.mutates_data or info.mutates_metadata) and place not in returned
    }


# What AOTAutograd knows of a graph.
_OF_METADATA = ("is_rng_op_functionalized", "num_backward_tokens", "input_info", "output_info", "bw_donated_idxs")


def compiled_nodes(tensors: list[Any], since: int) -> Iterator[Any]:
    """autograd's nodes of compiled graphs, of those made since a sequence number, that the tensors come from."""
    todo = [t.grad_fn for t in tensors if isinstance(t, Tensor) and t.grad_fn is not None]
    seen = set()
    while todo:
        node = todo.pop()
        if node in seen or hasattr(node, "variable") or sequence_number(node) < since:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction) and hasattr(getattr(node, "_forward_cls", None), "_aot_id"):
            yield node
        else:
            todo += [following for following, _ in node.next_functions if following is not None]


def backwards_are_compiled() -> bool:
    """Whether compiled autograd is on. It takes the backwards of compiled graphs apart, uncut."""
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return module is not None and (module.compiled_autograd_enabled or module.in_compiled_autograd_region)


def is_parameter(tensor: Any) -> bool:
    """Of an example for the compiler too, which stands for one."""
    return isinstance(tensor, nn.Parameter) and tensor.requires_grad


def run_uncompiled(functions: Iterable[Callable[..., Any]]) -> None:
    """Tells the compiler not to begin at one of these, nor at what it calls; they run as they are where it has given up
    what they are called from. Traced as a part of something else they are as any other."""
    if not all(map(_there, _STRATEGIES)):
        return  # then each is compiled by itself
    strategy, action, set_strategy = map(find, _STRATEGIES)
    for function in functions:
        set_strategy(function.__code__, strategy(action.SKIP, action.SKIP))


_STRATEGIES = tuple(
    f"torch._C._dynamo.eval_frame.{name}" for name in ("_FrameExecStrategy", "_FrameAction", "set_code_exec_strategy")
)


def is_mutable(target: Callable[..., Any] | str) -> bool:
    """Whether an operation of a graph writes to its operands."""
    schema = getattr(target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def must_run_in_order(node: fx.Node) -> bool:
    """Whether an operation of a graph draws random numbers, or sets where they are drawn from, or asserts."""
    return node.is_impure() or (isinstance(node.target, HigherOrderOperator) and "rng" in str(node.target))
