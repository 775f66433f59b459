"""Main weights: float32 copies of parameters of fewer bits, which the optimizer updates in their place.

A bfloat16 weight of 1 cannot become 1.001, and a sum of a hundred bfloat16 gradients is good to two digits. So the
gradients of such a parameter are added up in float32, whichever way they come (``grad_dtype`` tells autograd, and the
split backward goes by it), and the optimizer steps on the float32 copy, which is then rounded into the parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pipex.errors import UnsupportedModule
from pipex.partition import Stage
from pipex.torch_internals import version

SHORT = (torch.bfloat16, torch.float16)


class MainWeights:
    """The main weights of a rank's parameters.

    Args:
        stages: this rank's, whose parameters' gradients become float32.
        parameters: what this rank's optimizer updates.
    """

    def __init__(self, stages: Sequence[Stage], parameters: Iterable[nn.Parameter]) -> None:
        for stage in stages:
            for parameter in stage.parameters():
                if parameter.dtype in SHORT:
                    parameter.grad_dtype = torch.float32
        self._pairs = [(p, nn.Parameter(p.detach().float())) for p in parameters if p.dtype in SHORT]
        self._of = {id(p): main for p, main in self._pairs}
        self._taken: list[Tensor | None] = [None] * len(self._pairs)
        self._written = self._versions()

    def named(self, names: Mapping[int, str]) -> dict[str, nn.Parameter]:
        """The main weights by the names of their parameters, which are given by id."""
        return {names[id(parameter)]: main for parameter, main in self._pairs if id(parameter) in names}

    def of(self, parameter: nn.Parameter) -> nn.Parameter:
        """What the optimizer updates in the parameter's place: itself if it has bits enough."""
        return self._of.get(id(parameter), parameter)

    def lacks(self, parameter: nn.Parameter) -> bool:
        """Whether it has fewer bits, and no main weight."""
        return parameter.dtype in SHORT and id(parameter) not in self._of

    def take_gradient(self, parameter: nn.Parameter) -> None:
        """That of one parameter, before they are complete: so it can be seen whether somebody has cleared it."""
        main = self.of(parameter)
        if main is not parameter:
            index = next(i for i, (p, _) in enumerate(self._pairs) if p is parameter)
            main.grad = self._taken[index] = parameter.grad

    def take_gradients(self) -> None:
        """The gradients of the parameters become those of their main weights: the same tensors, not copies.

        Called again, it takes what has been put in the place of either meanwhile."""
        for index, (parameter, main) in enumerate(self._pairs):
            if parameter.grad is self._taken[index]:
                parameter.grad = main.grad
            else:
                main.grad = parameter.grad
            self._taken[index] = main.grad

    def follow(self) -> None:
        """Main weights of parameters that somebody has set become these: by ``load_state_dict``, through ``.data``, ..

        By value, since ``.data`` leaves no trace; and not where the main weight alone has been written to.
        """
        # One answer for all of them: each is a wait for the GPU.
        differ = [(p.detach() != main.detach().to(p.dtype)).any() for p, main in self._pairs]
        for index, differs in enumerate(torch.stack(differ).tolist() if differ else ()):
            parameter, main = self._pairs[index]
            written, main_written = self._written[index]
            if differs and version(parameter) == written and version(main) != main_written:
                continue
            if differs:
                main.data.copy_(parameter.detach())
            self._written[index] = version(parameter), version(main)

    def round(self) -> None:
        """After the optimizer's step, or a load: the parameters become their main weights."""
        with torch.no_grad():
            for parameter, main in self._pairs:
                parameter.copy_(main)
        self._written = self._versions()

    def _versions(self) -> list[tuple[int, int]]:
        return [(version(parameter), version(main)) for parameter, main in self._pairs]

    def forget_gradients(self) -> None:
        """The main weights have no gradients of their own any more."""
        for _, main in self._pairs:
            main.grad = None
        self._taken = [None] * len(self._pairs)


def refuse_main_grad(stages: Sequence[Stage]) -> None:
    """Raises UnsupportedModule if a parameter brings a ``main_grad``: only some of its gradients would go there."""
    for stage in stages:
        for name, tensor in stage.names.items():
            if hasattr(tensor, "main_grad"):
                raise UnsupportedModule(
                    f"{name} carries a main_grad, which no optimizer of this pipeline would see",
                    got="an attribute main_grad", needed="gradients in .grad",
                    fix="delete it, and let Pipeline(..., main_weights=True) keep float32 gradients and weights",
                )  # fmt: skip
