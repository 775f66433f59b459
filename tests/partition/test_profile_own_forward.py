"""What the units of a model cost that is cut by its own forward: embedding and head are priced in."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hf_zoo import Example
from torch import Tensor, nn

from pipex import plan as plans
from pipex.errors import InputError, UnsupportedModule
from pipex.partition import profile, profile_layers, split_model
from pipex.partition.stage import Keywords
from pipex.plan.layer_costs import Layer, LayerCosts

WIDTH, ROWS = 32, 2


def llama(name: str = "llama") -> tuple[nn.Module, dict[str, Tensor]]:
    example = Example(name)
    model = example.model()
    return model, example.batch(model, step=0, rows=ROWS)


def parameters_of(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def test_a_decoder_s_units_are_its_embedding_its_layers_and_norm_and_head_with_the_loss() -> None:
    model, batch = llama()
    costs = profile_layers(model, batch, passes=1)
    assert [layer.name for layer in costs.layers] == [
        "model.embed_tokens", *(f"model.layers.{n}" for n in range(4)), "model.norm, lm_head",
    ]  # fmt: skip
    embed, *layers, head = costs.layers
    assert embed.parameters == parameters_of(model.model.embed_tokens)
    assert [layer.parameters for layer in layers] == [parameters_of(layer) for layer in model.model.layers]
    assert head.parameters == parameters_of(model.model.norm) + parameters_of(model.lm_head)
    tokens = batch["input_ids"].numel()
    hidden = tokens * WIDTH * 4
    # What travels is hidden states and the batch; past the first layer also what the embedding returned, as one element
    # in its form.
    travels = hidden + sum(tensor.nbytes for tensor in batch.values())
    assert [layer.output for layer in (embed, *layers)] == [travels, *([travels + 4] * 4)]
    assert head.output == 4  # the loss
    assert head.deferred == hidden + tokens * model.config.vocab_size * 4  # the head's input, and the logits' gradient
    assert all(layer.time > 0 for layer in costs.layers)


def test_time_spent_in_the_head_and_in_the_embedding_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(profile, "perf_counter", lambda: now[0])

    def takes(seconds: float) -> Any:
        def backward(_: Tensor) -> None:
            now[0] += 10 * seconds

        def forward(module: nn.Module, inputs: Any, output: Tensor) -> None:
            now[0] += seconds
            if output.requires_grad:
                output.register_hook(backward)

        return forward

    model, batch = llama()
    for module, seconds in ((model.model.embed_tokens, 3.0), (model.model.layers[2], 5.0), (model.lm_head, 7.0)):
        module.register_forward_hook(takes(seconds))
    costs = profile_layers(model, batch, passes=1)
    assert [layer.forward for layer in costs.layers] == [3, 0, 0, 5, 0, 7]
    assert [layer.input_gradient for layer in costs.layers] == [30, 0, 0, 50, 0, 70]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers for it
@pytest.mark.parametrize("family", ["t5", "llama lora", "llama tied", "bert"])
def test_other_kinds_are_measured_and_stay_as_they_are(family: str) -> None:
    model, batch = llama(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    costs = profile_layers(model, batch, passes=1)
    assert torch.get_rng_state().equal(state)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert [layer.name for layer in costs.layers] == [
        ", ".join(unit.names_of_modules) for stage in split_model(model, len(costs.layers), sample=batch)
        for unit in stage.layers
    ]  # fmt: skip


def test_a_frozen_embedding_has_no_backward_and_what_it_gives_gets_no_gradient() -> None:
    seen = []
    model, batch = llama()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].requires_grad))
    model.model.layers[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].requires_grad))
    costs = profile_layers(model, batch, passes=1)
    assert costs.layers[0].deferred == 0
    assert seen[-2:] == [False, True]


def test_balances_take_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = llama()
    heavy = LayerCosts(tuple(Layer(str(n), *([cost] * 3), 1, 1, 1, 1) for n, cost in enumerate([1, 1, 1, 1, 1, 9])))
    plan = plans.build("zb-h1", 2, 4)
    assert [len(s.layers) for s in split_model(model, plan, heavy, sample=batch)] == [5, 1]
    monkeypatch.setattr("pipex.partition.split.profile_layers", lambda *_, layers: heavy)
    assert [len(s.layers) for s in split_model(model, 2, "profile", sample=batch)] == [5, 1]
    short = LayerCosts(heavy.layers[:4])
    with pytest.raises(InputError, match="costs of 4 layers for a model of 6"):
        split_model(model, plan, short, sample=batch)


def test_profiling_is_a_balance() -> None:
    model, batch = llama()
    by_logits = {"target": 0, "loss_fn": lambda output, _: output.logits.mean()}
    for options in ({}, by_logits):
        outputs: Any = (Keywords(batch),)
        for stage in split_model(model, 3, "profile", sample=batch, **options):
            outputs = stage(*outputs)
        assert torch.equal(outputs.loss, copy.deepcopy(model)(**batch).loss)


def test_what_cannot_be_measured_is_named() -> None:
    model, batch = llama()
    unlabelled = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with pytest.raises(InputError, match=r"output has no loss; got CausalLMOutputWithPast; .*put labels"):
        profile_layers(model, unlabelled)
    with pytest.raises(InputError, match="target, loss_fn and exchange are for balance='profile'"):
        split_model(model, 2, sample=batch, target=0)
    with pytest.raises(UnsupportedModule, match="no list of layers"):
        profile_layers(nn.Bilinear(2, 2, 2), {"input1": torch.ones(1, 2), "input2": torch.ones(1, 2)})
