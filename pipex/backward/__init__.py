"""The split backward: input gradients first, weight gradients when there is time.

splitter = Splitter(stage.parameters())
with splitter.record() as tape:            # a prepared forward
    outputs = stage(*inputs)
gradients = tape.backward_input(outputs, output_gradients, inputs)    # I, on the critical path
...
tape.backward_weight()                                                # W, any time later
"""

from pipex.backward.tape import Splitter, Tape

__all__ = ["Splitter", "Tape"]
