"""Cutting a model into stages."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from pipex.errors import ConfigMismatch, InputError
from pipex.partition.balance import Balance, layer_counts, pieces_of
from pipex.partition.layers import layers_of
from pipex.partition.profile import LossFunction, profile_layers
from pipex.partition.stage import Stage, cut
from pipex.plan import Plan
from pipex.plan.chain import check_stages
from pipex.plan.layer_costs import LayerCosts

Exchange = Callable[[bytes], Sequence[bytes]]
"""All-gather of byte strings in rank order, such as ``pipex.current_world().exchange``."""


def split_model(
    model: nn.Module,
    stages: int | Plan,
    balance: Balance = "uniform",
    *,
    sample: Tensor | Sequence[Tensor] | None = None,
    target: Any = None,
    loss_fn: LossFunction | None = None,
    exchange: Exchange | None = None,
) -> list[Stage]:
    """Cuts a model into contiguous stages; applied one after another they compute what the model computes.

    Every rank must cut alike. ``balance="profile"`` therefore needs ``exchange`` in a run of several ranks, where all
    then call this function together: each measures, and all cut by what rank 0 has measured. The other balances, layer
    costs included, need no talk.

    Args:
        model: an ``nn.Sequential``, or a module with an attribute ``pipeline_layers`` (see ``layers_of``).
        stages: number of stages, at most the number of layers; or the plan that they are for, which also says which
            stages share a rank and in which order they work. Of a plan with two copies of the model the stages of one.
        balance: ``"uniform"``: layer counts differ by at most one, and the first stages get the extra layers;
            ``"parameters"``: the largest stage has as few parameters as any contiguous cut allows;
            ``"profile"``: the fullest rank has as little to do as it can be made, by the times that the layers take
            here (``profile_layers``); given a plan, the cut with which its simulated step is shortest;
            ``LayerCosts``: the same from costs that were measured before (``pipex profile --out FILE``, read by
            ``LayerCosts.read``);
            a list of ints: the layer count of each stage.
        sample, target, loss_fn: for ``"profile"``: one micro-batch, its target, and (output, target) -> loss.
        exchange: for ``"profile"`` in a run of several ranks: ``pipex.current_world().exchange``.

    Raises:
        InputError: more stages than layers, or a balance that does not fit.
        UnsupportedModule: the model does not name its layers, or a parameter or buffer of it is in none of them.
        ConfigMismatch: with ``exchange``, another rank is doing something else.
    """
    layers = layers_of(model)
    if balance == "profile":
        check_stages(len(layers), pieces_of(stages))
        balance = _profile(model, sample, target, loss_fn, exchange)
    elif any(value is not None for value in (sample, target, loss_fn, exchange)):
        raise InputError(
            "sample, target, loss_fn and exchange are for balance='profile'",
            got="another balance",
            fix="leave them out",
        )
    parts = cut(layers, layer_counts(layers, stages, balance), model)
    assert [layer for part in parts for layer in part.layers] == layers, "every layer lands exactly once, in order"
    return parts


def _profile(
    model: nn.Module,
    sample: Tensor | Sequence[Tensor] | None,
    target: Any,
    loss_fn: LossFunction | None,
    exchange: Exchange | None,
) -> LayerCosts:
    if sample is None or target is None or loss_fn is None:
        raise InputError(
            "balance='profile' has nothing to measure with",
            got=", ".join(n for n, v in (("sample", sample), ("target", target), ("loss_fn", loss_fn)) if v is not None)
            or "none of them",
            needed="sample, target and loss_fn",
            fix="pass one micro-batch, or layer costs as the balance",
        )
    costs = profile_layers(model, sample, target, loss_fn)
    if exchange is None:
        return costs
    said = [json.loads(payload or "[null]") for payload in exchange(json.dumps([_CALL, costs.to_text()]).encode())]
    for rank, (call, *_) in enumerate(said):
        if call != _CALL:
            raise ConfigMismatch(
                "the ranks disagree about the call",
                got=f"{call or 'the end of its run'} on rank {rank}",
                needed=f"{_CALL} on every rank",
            )
    return LayerCosts.from_text(said[0][1])


_CALL = "split_model(balance='profile')"  # in the form in which the runtime's own calls announce themselves
