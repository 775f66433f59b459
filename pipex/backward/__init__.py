"""The split backward: input gradients first, weight gradients when there is time.

splitter = Splitter(stage.parameters())
with splitter.record() as tape:            # a prepared forward
    outputs = stage(*inputs)
gradients = tape.backward_input(outputs, output_gradients, inputs)    # I, on the critical path
...
tape.backward_weight()                                                # W, any time later

For torch.distributed.pipelining: ``drop_in()`` for all its schedules; ``dw_builder(module)`` for one stage, through
torch's public seam; ``stage_backward``, ``stage_backward_input`` and ``stage_backward_weight`` with torch's signatures.
"""

from __future__ import annotations

from pipex.backward.dw_builder import dw_builder
from pipex.backward.splitter import Splitter
from pipex.backward.stage_backward import stage_backward, stage_backward_input, stage_backward_weight
from pipex.backward.tape import Tape

__all__ = [
    "Splitter",
    "Tape",
    "dw_builder",
    "stage_backward",
    "stage_backward_input",
    "stage_backward_weight",
]
