"""What a model of transformers, or a batch of it, is refused for: by name, and before anything is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import transformers as hf
from hf_zoo import Example

import pipex
from pipex.errors import InputError, UnsupportedModule


def llama() -> tuple[nn.Module, dict[str, Any]]:
    return made("llama")


def made(family: str, seed: int | None = None) -> tuple[nn.Module, dict[str, Any]]:
    example = Example(family, seed)
    model = example.model()
    return model, example.batch(model, 1, 4)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"use_cache": True}, "the sample asks for what is for generation; got use_cache"),
        ({"past_key_values": hf.DynamicCache()}, "the sample asks for what is for generation; got past_key_values"),
        ({"cache": hf.DynamicCache()}, "the sample asks for what is for generation; got cache"),
        ({"output_hidden_states": True}, "activations that are on all ranks; got output_hidden_states"),
        ({"output_attentions": True}, "activations that are on all ranks; got output_attentions"),
        ({"num_items_in_batch": 7}, "a count that the pipeline makes itself; got num_items_in_batch"),
        ({"input_ids": torch.full((4, 9), 1000)}, "LlamaForCausalLM cannot run on the sample; got IndexError"),
    ],
)
def test_a_sample_that_asks_for_more_than_training_does(more: dict[str, Any], said: str) -> None:
    model, batch = llama()
    with pytest.raises(InputError, match=said):
        pipex.split_model(model, 2, sample={**batch, **more})


def test_flags_that_are_off_and_arguments_that_are_none_do_no_harm() -> None:
    model, batch = llama()
    off = {"use_cache": False, "output_attentions": False, "cache": None, "position_ids": None}
    assert len(pipex.split_model(model, 2, sample={**batch, **off})) == 2


def test_a_configuration_that_caches_is_no_obstacle() -> None:
    """``use_cache=True`` is what configurations say by default."""
    model, batch = llama()
    model.config.use_cache = True
    assert len(pipex.split_model(model, 2, sample=batch)) == 2


@pytest.mark.parametrize("sample", [{}, {"input_ids": None}])
def test_a_sample_without_tensors(sample: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="the sample holds no tensor"):
        pipex.split_model(llama()[0], 2, sample=sample)


def test_no_sample() -> None:
    with pytest.raises(UnsupportedModule, match="got no sample; needed a batch"):
        pipex.split_model(llama()[0], 2)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_a_model_without_a_list_of_layers() -> None:
    with pytest.raises(UnsupportedModule, match=r"Plain has no list of layers that can be recognized.*layers="):
        pipex.split_model(Plain(), 2, sample={"x": torch.ones(2, 3)})


@pytest.mark.parametrize("names", [("model.nothing",), ("model.norm",), "model.layers"])
def test_layers_that_name_no_list(names: Any) -> None:
    model, batch = llama()
    with pytest.raises(InputError, match=r"layers (names no list of modules|must name lists of modules)"):
        pipex.split_model(model, 2, sample=batch, layers=names)


def test_a_cut_between_layers_that_share_what_does_not_travel() -> None:
    """Gemma 3n's last layers take keys and values of earlier ones out of a dict. A cut on either side of all of them is
    one of a kind that can be made."""
    model, batch = made("gemma3n", 1)
    assert model.config.num_kv_shared_layers
    with pytest.raises(UnsupportedModule, match=r"stage 1 cannot begin at .*layers"):
        pipex.split_model(model, 2, [3, 3], sample=batch)
    for counts in ([1, 5], [5, 1]):
        assert len(pipex.split_model(model, 2, counts, sample=batch)) == 2


class Box:
    def __init__(self, inside: Tensor) -> None:
        self.inside = inside


class Returning(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any], unwrap: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.linear, self.wrap, self.unwrap = nn.Linear(3, 3), wrap, unwrap

    def forward(self, x: Any) -> Any:
        return self.wrap(self.linear(x if isinstance(x, Tensor) and not x.is_sparse else self.unwrap(x)))


class Chain(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any], unwrap: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Returning(wrap, unwrap) for _ in range(3))
        self.unwrap = unwrap

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.unwrap(x)


CANNOT_TRAVEL: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor], str]] = {
    "an object": (Box, lambda box: box.inside, r"layers\.0 returns what cannot travel to another stage; got Box"),
    "a sparse tensor": (lambda x: x.to_sparse(), lambda x: x.to_dense(), r"layers\.0 returns.*got a torch\.sparse_coo"),
}


@pytest.mark.parametrize("kind", CANNOT_TRAVEL)
def test_a_layer_that_returns_what_cannot_travel(kind: str) -> None:
    *ways, words = CANNOT_TRAVEL[kind]
    with pytest.raises(UnsupportedModule, match=words):
        pipex.split_model(Chain(*ways), 2, sample={"x": torch.randn(2, 3)}, layers=("layers",))


CAN_TRAVEL: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "a tuple with None": (lambda x: (x, None), lambda pair: pair[0]),
    "a dict": (lambda x: {"x": x, "kind": "linear"}, lambda found: found["x"]),
    "a list": (lambda x: [x, 2 * x], lambda pair: pair[0] + pair[1]),
}


@pytest.mark.parametrize("kind", CAN_TRAVEL)
def test_a_layer_that_returns_containers_of_tensors(kind: str) -> None:
    assert pipex.split_model(Chain(*CAN_TRAVEL[kind]), 2, sample={"x": torch.randn(2, 3)}, layers=("layers",))


def test_layers_that_are_dropped_at_random() -> None:
    config = hf.BartConfig(
        vocab_size=96, d_model=32, encoder_layers=4, decoder_layers=4, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, pad_token_id=0,
        decoder_start_token_id=2, encoder_layerdrop=0.5, decoder_layerdrop=0.5,
    )  # fmt: skip
    model = hf.BartForConditionalGeneration(config).train()
    with pytest.raises(UnsupportedModule, match="layerdrop"):
        pipex.split_model(model, 2, sample=made("bart")[1])


def test_a_tie_that_a_copy_has_lost() -> None:
    model, batch = made("llama tied")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(UnsupportedModule, match="are tied, as its configuration has it, and are two parameters"):
        pipex.split_model(model, 2, sample=batch)


def test_a_compiled_model() -> None:
    model, batch = llama()
    with pytest.raises(UnsupportedModule, match="a forward that was set on the object"):
        pipex.split_model(torch.compile(model, backend="eager"), 2, sample=batch)


@pytest.mark.parametrize(
    ("stages", "balance", "words"),
    [
        (9, "uniform", "6 layers"),
        (2, [3, 9], "the layer counts do not fit"),
        (2, [6, 0], "the layer counts do not fit"),
    ],
)
def test_a_cut_into_more_than_there_is(stages: int, balance: Any, words: str) -> None:
    model, batch = llama()
    with pytest.raises(InputError, match=words):
        pipex.split_model(model, stages, balance, sample=batch)


def pipeline(model: nn.Module, sample: dict[str, Any]) -> pipex.Pipeline:
    plan = pipex.build("interleaved", 1, 2, chunks=2)
    return pipex.Pipeline(
        pipex.split_model(model, plan, sample=sample), plan, "model", optimizer=lambda ps: torch.optim.SGD(ps, 0.1)
    )


def test_the_models_own_loss_without_labels() -> None:
    model, batch = llama()
    del batch["labels"]
    with pytest.raises(InputError, match="loss_fn='model' is the loss that the model's own forward returns"):
        pipeline(model, batch)


OTHER = "the batch has other arguments than the sample"
WRONG_BATCHES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "without labels": (lambda batch: {name: t for name, t in batch.items() if name != "labels"}, OTHER),
    "with more": (lambda batch: {**batch, "position_ids": batch["input_ids"]}, OTHER),
    "with None": (lambda batch: {**batch, "attention_mask": None}, "of another kind than in the sample"),
    "positional": (lambda batch: tuple(batch.values()), OTHER),
    "empty": (lambda batch: {}, "nothing in the batch can be cut"),
    "two numbers of rows": (lambda batch: {**batch, "labels": batch["labels"][:3]}, "no common number of samples"),
    "a list of the wrong length": (lambda batch: [batch], "a list is a batch of ready micro-batches"),
}


@pytest.mark.parametrize("kind", WRONG_BATCHES)
def test_a_batch_that_is_not_like_the_sample(kind: str) -> None:
    """Nothing has begun then: the next batch is trained."""
    model, batch = llama()
    trained, other = pipeline(model, batch), pipeline(copy.deepcopy(model), batch)
    wrong, words = WRONG_BATCHES[kind]
    with pytest.raises(InputError, match=words):
        trained.step(wrong(batch))
    assert trained.step(batch) == other.step(batch)
    assert trained.steps == 1
