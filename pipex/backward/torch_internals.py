"""Private names of torch for DTensors in the split backward; ``pipex.torch_internals`` has the others. Without them the
gradients of DTensors do not wait."""

from __future__ import annotations

import sys
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from torch import Tensor

# What this rank has of one. The public to_local() leaves a node in the graph, and an exchange unfinished.
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
