"""Cutting a model into stages."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from pipex.errors import ConfigMismatch, InputError, UnsupportedModule
from pipex.hugging_face.conventions import is_pretrained
from pipex.partition.balance import Balance, layer_counts, pieces_of
from pipex.partition.layers import layers_of, names_layers
from pipex.partition.own_forward.split import split_by_forward
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
    sample: Any = None,
    layers: Sequence[str] | None = None,
    verify: bool = True,
    target: Any = None,
    loss_fn: LossFunction | None = None,
    exchange: Exchange | None = None,
) -> list[Stage]:
    """Cuts a model into contiguous stages; applied one after another they compute what the model computes.

    A model that does not name its layers, such as a ``PreTrainedModel``, is cut by its own forward, which every stage
    runs with the other stages' layers taken out: ``sample`` is then a batch as those of training. What balances count
    as its layers are units: the embedding, or whatever comes before the layers, each layer, and norm, head and loss.

    Every rank must cut alike. ``balance="profile"`` therefore needs ``exchange`` in a run of several ranks, where all
    then call this function together: each measures, and all cut by what rank 0 has measured. The other balances, layer
    costs included, need no talk.

    Args:
        model: an ``nn.Sequential``, a module with an attribute ``pipeline_layers`` (see ``layers_of``), or one with
            lists of layers (see ``layers``).
        stages: number of stages, at most the number of layers; or the plan that they are for, which also says which
            stages share a rank and in which order they work. Of a plan with two copies of the model the stages of one.
        balance: ``"uniform"``: layer counts differ by at most one, and the first stages get the extra layers;
            ``"parameters"``: the largest stage has as few parameters as any contiguous cut allows;
            ``"profile"``: the fullest rank has as little to do as it can be made, by the times that the layers take
            here (``profile_layers``); given a plan, the cut with which its simulated step is shortest;
            ``LayerCosts``: the same from costs that were measured before (``pipex profile --out FILE``, read by
            ``LayerCosts.read``);
            a list of ints: the layer count of each stage.
        sample: of a model that is cut by its own forward, a batch: its keyword arguments in a dict, or positional ones.
            Its names, and what of it is no tensor, are to be those of every batch, and it should have what they have:
            labels, padding. For ``"profile"`` one micro-batch.
        layers: the names of the module lists between whose elements such a model may be cut. None: those that
            transformers does not want split, or checkpoints, or has a pipeline plan for.
        verify: whether such a model's stages are compared with it, forward and backward on the sample: bit for bit, but
            for the rounding that ``verified`` of the stages names; of a model without values a narrow one is compared.
        target, loss_fn: for ``"profile"``: the sample's target, and (output, target) -> loss; may be left out where the
            model is cut by its own forward and returns its loss.
        exchange: for ``"profile"`` in a run of several ranks: ``pipex.current_world().exchange``.

    Raises:
        InputError: more stages than layers, or a balance that does not fit.
        UnsupportedModule: the model does not name its layers, or a parameter or buffer of it is in none of them; or
            stages that run its own forward do not compute what it does: says which tensor differs.
        ConfigMismatch: with ``exchange``, another rank is doing something else.
    """
    pretrained = is_pretrained(model)
    own_forward = layers is not None or (sample is not None and (pretrained or not names_layers(model)))
    if pretrained and not own_forward:
        raise UnsupportedModule(
            f"{type(model).__name__} does more in its forward than to apply its layers", got="no sample",
            needed="a batch, to cut it by its own forward",
            fix="pass sample=dict(input_ids=..., attention_mask=..., labels=...)",
        )  # fmt: skip
    if balance == "profile":
        if not own_forward:
            check_stages(len(layers_of(model)), pieces_of(stages))
        balance = _profile(model, sample, target, loss_fn, layers, exchange, needs_target=not own_forward)
    elif any(value is not None for value in (None if own_forward else sample, target, loss_fn, exchange)):
        raise InputError(
            f"{'' if own_forward else 'sample, '}target, loss_fn and exchange are for balance='profile'",
            got="another balance",
            fix="leave them out",
        )
    if own_forward:
        return list(split_by_forward(model, lambda units: layer_counts(units, stages, balance), sample, layers, verify))
    named = layers_of(model)
    parts = cut(named, layer_counts(named, stages, balance), model)
    assert [layer for part in parts for layer in part.layers] == named, "every layer lands exactly once, in order"
    return parts


def _profile(
    model: nn.Module, sample: Any, target: Any, loss_fn: LossFunction | None, layers: Sequence[str] | None,
    exchange: Exchange | None, *, needs_target: bool,
) -> LayerCosts:  # fmt: skip
    needed = {"sample": sample, "target": target, "loss_fn": loss_fn}
    if any(value is None for value in needed.values()) and (needs_target or sample is None):
        raise InputError(
            "balance='profile' has nothing to measure with",
            got=", ".join(name for name, value in needed.items() if value is not None) or "none of them",
            needed="sample, target and loss_fn",
            fix="pass one micro-batch, or layer costs as the balance",
        )
    costs = profile_layers(model, sample, target, "model" if loss_fn is None else loss_fn, layers=layers)
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
