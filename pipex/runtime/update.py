"""The second half of a step: gradients become an update, on all ranks or on none.

Every rank decides by what all ranks have found: the norm of all gradients, and whether one of them was infinite.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from math import isfinite

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from pipex.errors import InputError, outside
from pipex.partition import Stage
from pipex.runtime.agreement import compare, share
from pipex.runtime.commit import Gradients
from pipex.runtime.loss import BatchLoss, disproportion
from pipex.runtime.main_weights import MainWeights
from pipex.runtime.versions import Versions
from pipex.torch_internals import found_infinite
from pipex.transport.interface import Links, World


class Parameters(list[nn.Parameter]):
    """What an optimizer's factory gets: the parameters of this rank, in model order.

    Attributes:
        named: the same as (name in the model, parameter), for parameter groups by name; torch's optimizers take these
            pairs too.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        super().__init__(parameter for _, parameter in named)
        self.named = list(named)


OptimizerFactory = Callable[[Parameters], Optimizer]


def cleared() -> InputError:
    """The error where somebody has cleared gradients that something else belongs to."""
    return InputError(
        "the gradients of forward_backward were cleared, but not all that belongs to them",
        got="no gradient where there was one (optimizer.zero_grad(), say)",
        needed="those of all calls since the last update, or none of their counts and tied sums either",
        fix="call the pipeline's own zero_grad() to drop them, on every rank",
    )


class Update:
    """What this rank does from the last backward on.

    Args:
        world: the ranks.
        gradients: this rank's.
        stages: this rank's.
        main_weights: whether there are some.
        factory: makes the optimizer; None if nothing is updated.
        clip_norm: the largest norm of all gradients together.
        scaler: of the losses; an enabled one.
    """

    def __init__(
        self, world: World, gradients: Gradients, stages: Sequence[Stage], main_weights: bool,
        factory: OptimizerFactory | None, clip_norm: float | None, scaler: GradScaler | None,
    ) -> None:  # fmt: skip
        self._world, self._gradients = world, gradients
        self._main = MainWeights(stages, gradients.trained) if main_weights else None
        self._stages = stages
        self._clip_norm, self._scaler = clip_norm, scaler
        self._tied = gradients.cross_ranks
        self._warned: set[int] = set()
        self.counts: list[float | None] = []
        """of each forward_backward so far: what its gradients are to be divided by, or None"""
        self._counted: list[Sequence[float]] = []  # by each of these calls
        self._total: float | None = None  # of these calls
        self._scales: list[torch.Tensor] = []  # of their losses
        self._one = torch.ones((), device=world.device)
        self._found: object = None  # where the scaler keeps what it has found in the gradients
        self._has_gradient: nn.Parameter | None = None
        self.reduced = False
        self.optimizer = None if factory is None else self._build(factory)
        self.norm: float | None = None
        """of all gradients at the last update, before clipping; None if nothing has asked for it"""

    @property
    def _names(self) -> dict[int, str]:
        """Of this rank's parameters, by id, as they are now."""
        return {id(tensor): name for stage in self._stages for name, tensor in stage.names.items()}

    @property
    def main(self) -> dict[str, nn.Parameter]:
        """The main weights by name, as the parameters are now."""
        if self._main is None:
            return {}
        self._main.follow()
        return self._main.named(self._names)

    def add(self, loss: BatchLoss, total: float | None) -> None:
        """Notes a forward_backward: its loss, and what its sums were divided by."""
        self.counts.append(loss.divisor)
        self._counted.append(loss.counts)
        self._total = total
        if self._scaler is not None:
            self._scales.append(self._scaler.scale(self._one))  # kept as a tensor: to ask for it waits for the GPU
        if self._has_gradient is None or self._has_gradient.grad is None:
            self._has_gradient = next((p for p in self._gradients.trained if p.grad is not None), None)
        if self._main is not None and self._has_gradient is not None:
            self._main.take_gradient(self._has_gradient)

    def check_total(self, total: float | None, training: bool) -> None:
        """Raises InputError if a forward_backward is told another total than those whose gradients it adds to; the same
        on every rank."""
        if training and self.counts and total != self._total:
            raise InputError("total= is the count over all calls before an update", got=f"{total} after {self._total}",
                             needed="the same in each of them", fix="leave it out of all if it is not known before "
                             "the first: sums are divided by the counts of all calls then")  # fmt: skip

    def dropped(self) -> bool:
        """Whether somebody has cleared the gradients, but not what else there is of the calls that made them."""
        held = self._has_gradient
        if not self.counts or self.reduced or held is None:
            return False
        main = self._main
        if held.grad is None:
            return all(p.grad is None for p in self._gradients.trained)
        return main is not None and all(main.of(p).grad is None for p in (held, *self._gradients.trained))

    def check(self) -> None:
        """Raises InputError if no update can be made of what the backwards have left; it is forgotten then. The same on
        every rank."""
        if not self.counts:
            raise InputError("there are no gradients", got="no forward_backward since the last update")
        counts = [count for count in self.counts if count is not None]
        means = len(self.counts) - len(counts)
        if counts and not sum(counts):
            problem = InputError("nothing was counted, so there is no mean to train by", got="counts that add up to 0",
                                 needed="at least one", fix="leave such a batch out")  # fmt: skip
        elif counts and means:
            problem = InputError("gradients of means and of sums were added up", got=f"{means} and {len(counts)} calls",
                                 needed="one or the other", fix="update in between")  # fmt: skip
        elif several := disproportion(self._counted):
            problem = several
        elif (scale := self._other_scale()) is not None:
            problem = InputError("the gradient scaler was updated between forward_backward and update", got=scale,
                                 needed="one scale", fix="give each pipeline a scaler of its own")  # fmt: skip
        else:
            return
        self.zero_grad()
        raise problem

    def _other_scale(self) -> str | None:
        if self._scaler is None or not self._scales or self.reduced:
            return None
        now = self._scaler.scale(self._one)
        then = next((scale for scale in self._scales if not torch.equal(scale, now)), None)
        return None if then is None else f"losses scaled by {then.item()}, and a scale of {now.item()} now"

    def without_main(self) -> list[str]:
        """Names of what has fewer bits, is trained and has no main weight."""
        if self._main is None:
            return []
        lacking = [p for p in self._gradients.trained if self._main.lacks(p)]
        names = self._names if lacking else {}
        return [names.get(id(p), "a new parameter") for p in lacking]

    def reduce(self, step: int, links: Links) -> None:
        """Completes the gradients, once. Collective where parameters are tied."""
        if self.reduced:
            return
        if self.dropped():
            raise cleared()
        self._gradients.reduce_ties(step, links)
        self._name_those_without()
        if self._tied:
            links.flush()
            share(self._world, "the end of a step", None)  # past it, what was received on any rank has really arrived
        counts = [count for count in self.counts if count is not None]
        if counts:
            self._gradients.divide(sum(counts))
        if self._main is not None:
            self._main.take_gradients()
        if self._scaler is not None and self.optimizer is not None:
            self._scaler.scale(torch.zeros((), device=self._world.device))  # a scaler begins with the first loss
            self._scaler.unscale_(self.optimizer)
            self._found = found_infinite(self._scaler, self.optimizer)
        self.reduced = True

    def apply(self, skip_nonfinite: bool) -> bool:
        """Clips and makes the optimizer's step. Returns whether it was made; then on all ranks."""
        if self._main is not None:  # what was done since reduce_gradients
            self._main.follow()
            self._main.take_gradients()
        norm = None
        if self._clip_norm is not None or skip_nonfinite:
            norm = self._gradients.norm()
        self.norm = None if norm is None else norm.item()
        leave_out = skip_nonfinite and self.norm is not None and not isfinite(self.norm)
        if self._clip_norm is not None and norm is not None and not leave_out:
            self._gradients.clip(self._clip_norm, norm)
        made = self._step(leave_out)
        if made and self._main is not None:
            self._main.round()
        self._forget()
        return made

    def within(self, versions: Versions) -> None:
        """An update of this rank's stage alone, while micro-batches are under way."""
        self._name_those_without()
        if self.optimizer is not None:
            versions.update(self.optimizer.step)
        self._gradients.clear()

    def loaded(self) -> None:
        """Parameters and optimizer are those of a checkpoint now."""
        self.zero_grad()
        if self._main is not None:
            self._main.round()

    def zero_grad(self) -> None:
        """Forgets all gradients before an update has been made of them."""
        scaler = self._scaler
        if self.reduced and scaler is not None and self.optimizer is not None:
            scaler.update(scaler.get_scale())  # forgets that it has unscaled gradients, and nothing else
        self._forget()

    def _forget(self) -> None:
        self.counts.clear()
        self._counted.clear()
        self._scales.clear()
        self.reduced = False
        self._gradients.clear()
        if self._main is not None:
            self._main.forget_gradients()

    def _step(self, leave_out: bool) -> bool:
        scaler, optimizer = self._scaler, self.optimizer
        if scaler is None or optimizer is None:
            if optimizer is not None and not leave_out:
                optimizer.step()
            return not leave_out
        # One rank's infinite gradient is everybody's: all skip the step and lower the scale, or none does. A rank whose
        # parameters had no gradients has made no check, and takes part in this one all the same.
        found = found_infinite(scaler, optimizer)
        if found is not self._found:
            raise InputError("the gradient scaler was updated between reduce_gradients and update",
                             got="a scaler that does not know these gradients", needed="the one that unscaled them",
                             fix="give each pipeline a scaler of its own")  # fmt: skip
        any_here = any(bool(value) for value in found.values())
        every = share(self._world, "the gradient scaler", {"scale": scaler.get_scale(), "infinite": any_here})
        compare([{"scale": said["scale"]} for said in every])  # else gradients would be those of different losses
        infinite = leave_out or any(said["infinite"] for said in every)
        for device in found or (self._world.device,):
            found[device] = torch.full((), float(infinite), device=device)
        scaler.step(optimizer)
        scaler.update()
        return not infinite

    def _build(self, factory: OptimizerFactory) -> Optimizer:
        """The optimizer. A rank without parameters has one as well, for schedulers: made for a parameter that is taken
        out again, since no optimizer of torch begins without."""
        names = self._names
        named = [(names.get(id(p), f"unnamed.{i}"), p) for i, p in enumerate(self._gradients.trained)]
        if self._main is not None:
            named = [(name, self._main.of(p)) for name, p in named]
        nothing = ("none", nn.Parameter(torch.zeros(1, 1, device=self._world.device)))
        parameters = Parameters(named or [nothing])
        try:
            optimizer = factory(parameters)
        except ValueError as error:
            if "empty parameter list" not in str(error):
                raise
            raise InputError(
                f"the optimizer's factory has chosen none of rank {self._world.rank}'s parameters",
                got=", ".join(name for name, _ in named) or "a rank on which nothing is trained",
                needed="an optimizer on every rank",
                fix="freeze what is not to be trained before the pipeline is made (requires_grad_(False)), and give "
                "the optimizer all parameters that the factory gets",
            ) from error
        if not isinstance(optimizer, Optimizer):
            raise InputError("the optimizer's factory must return an optimizer", got=type(optimizer).__name__,
                             needed="a torch.optim.Optimizer",
                             fix="pass e.g. optimizer=lambda parameters: torch.optim.AdamW(parameters)")  # fmt: skip
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not held.intersection(map(id, parameters)):
            raise InputError("the optimizer has none of the parameters that its factory got",
                             got=f"others on rank {self._world.rank}", needed="those of the argument",
                             fix="pass e.g. optimizer=lambda parameters: torch.optim.AdamW(parameters)")  # fmt: skip
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise InputError("the optimizer calls the forward again by itself, which a pipeline cannot do",
                             got=f"{type(optimizer).__name__}, whose step needs a closure",
                             needed="an optimizer that goes by the gradients")  # fmt: skip
        if not named:
            parameters.clear()
            parameters.named.clear()
            for group in optimizer.param_groups:
                group["params"].clear()
                if "param_names" in group:
                    group["param_names"].clear()
        return optimizer

    def _name_those_without(self) -> None:
        """Warns of each trainable parameter that the backwards have left without a gradient, once."""
        new = [p for p in self._gradients.without() if id(p) not in self._warned]
        if new:
            self._warned |= {id(p) for p in new}
            known = self._names
            names = ", ".join(known.get(id(p), "a new parameter") for p in new)
            warnings.warn(
                f"no gradient came to {names}; if this is meant, freeze it, else look for where the forward leaves it "
                "out or detaches it",
                stacklevel=outside(),
            )
