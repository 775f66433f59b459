"""How much of a stage's weight gradients is made in W: counted in operations, by what autograd does without a split.

    n_I   products of a backward for the inputs alone, every parameter frozen
    n_B   products of a whole backward; n_B - n_I make weight gradients
    I     products of the I under test: those above n_I did not wait

A product is a GEMM, a convolution or a scatter into an embedding, whatever its size. Sums over rows, for biases and
norms, are none: W may or may not make them, and they cost little.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from pipex.torch_internals import TorchDispatchMode

PRODUCTS = frozenset({
    "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "addr", "addbmm", "_scaled_mm", "_grouped_mm", "_bilinear",
    "_trilinear", "convolution", "embedding_dense_backward", "_embedding_bag_dense_backward",
})  # fmt: skip


class Products(TorchDispatchMode):
    """Counts the products that run inside ``with``, those of backward passes included.

    One call of a convolution's backward is as many as it makes: for the input and for the weight. An outer product is a
    multiplication whose result is larger than either factor.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            self.count += 1
        elif name == "convolution_backward":
            for_input, for_weight, _ = args[-1] if "output_mask" not in (kwargs or {}) else kwargs["output_mask"]
            self.count += for_input + for_weight
        elif name == "mul" and isinstance(result, Tensor):
            self.count += all(isinstance(f, Tensor) and result.numel() > f.numel() > 1 for f in args)
        return result


class Shares(NamedTuple):
    """Products of one micro-batch: of a backward for its inputs alone, of a whole one, and of I and W."""

    for_inputs: int
    whole: int
    in_input: int
    in_weight: int

    @property
    def deferred(self) -> float:
        """The share of the weight gradients' products that waited for W; 1 where there are none."""
        of_weights = self.whole - self.for_inputs
        return 1.0 if of_weights == 0 else 1 - (self.in_input - self.for_inputs) / of_weights
