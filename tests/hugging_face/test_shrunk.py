"""Narrow models: the layers of the wide ones, run by the inputs of the wide ones, small enough for any process."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from inspect import signature
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers as hf
from cases import sampled
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

import pipex
from pipex.hugging_face.shrunk import HIDDEN, shrunk

WITHOUT_A_DEFAULT = {
    "cohere_compass_text", "dbrx", "deepseek_v2", "dots1", "gemma3n", "gemma4_assistant", "granitemoehybrid",
    "hunyuan_v1_dense", "hunyuan_v1_moe", "lfm2_moe", "ministral", "nemotron", "qwen4_exp", "qwen4_exp_text",
    "reformer",
}  # fmt: skip
"""Configurations whose defaults transformers 5.24 cannot make a model of, or cannot run it, or not without pillow."""

WITH_OTHER_INPUTS = {"gemma4_unified_assistant", "git", "musicgen", "musicgen_melody", "xmod"}
"""Models that do not run on ids alone."""

NOT_YET = {"blt", "dots3_note", "dots3_note_text"}
"""Models whose widths depend on each other in ways of their own."""


def kinds() -> Iterator[Any]:
    yield from sorted(CAUSAL.keys() - WITHOUT_A_DEFAULT - WITH_OTHER_INPUTS - NOT_YET)


def made(config: Any, name: str, device: str) -> nn.Module:
    """A model of the class that transformers has for it; of a composite one the language model."""
    kind = getattr(hf, CAUSAL[name])
    for inner in ("text_config", "decoder"):
        if type(getattr(config, inner, None)) is kind.config_class:
            config = getattr(config, inner)
    with torch.device(device):
        return kind._from_config(config)


def modules(model: nn.Module) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_modules() if "expert" not in name}


@pytest.mark.parametrize("name", sampled(kinds(), 8, name="narrow models"))
def test_a_narrow_model_has_the_layers_of_the_wide_one_and_runs(name: str) -> None:
    config = hf.CONFIG_MAPPING[name]()
    before = copy.deepcopy(config).to_dict()
    narrow_config = shrunk(config)
    assert config.to_dict() == before
    wide, narrow = made(config, name, "meta"), made(narrow_config, name, "cpu")
    assert modules(narrow) == modules(wide)
    numbers = sum(p.numel() for p in narrow.parameters())
    assert numbers < 100e6
    assert numbers <= sum(p.numel() for p in wide.parameters())
    ids = torch.randint(3, 90, (2, 8))
    cache = {"use_cache": False} if "use_cache" in signature(narrow.forward).parameters else {}
    loss = narrow(input_ids=ids, labels=ids, **cache).loss
    loss.backward()
    assert loss.isfinite()


def test_widths_shrink_and_what_inputs_are_made_of_stays() -> None:
    wide = hf.LlamaConfig(
        vocab_size=128256, hidden_size=16384, num_hidden_layers=126, num_attention_heads=128, num_key_value_heads=8,
        intermediate_size=53248, max_position_embeddings=131072,
    )  # fmt: skip
    narrow = shrunk(wide)
    assert (narrow.hidden_size, narrow.num_hidden_layers, narrow.vocab_size) == (HIDDEN, 126, 128256)
    assert narrow.max_position_embeddings == 131072
    assert narrow.num_attention_heads % narrow.num_key_value_heads == 0
    assert 1 < narrow.num_key_value_heads < narrow.num_attention_heads
    assert type(narrow) is type(wide)


def test_nested_configurations_shrink_too_and_images_stay() -> None:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(hidden_size=1024, num_hidden_layers=3, num_attention_heads=16, image_size=28,
                                          patch_size=14, intermediate_size=4096, projection_dim=768),
        text_config=hf.LlamaConfig(hidden_size=4096, num_hidden_layers=2, vocab_size=200), image_token_id=199,
    )  # fmt: skip
    narrow = shrunk(config)
    assert (narrow.vision_config.image_size, narrow.vision_config.num_hidden_layers) == (28, 3)
    assert narrow.vision_config.hidden_size == narrow.text_config.hidden_size == HIDDEN
    ids = torch.cat([torch.full((2, 4), 199), torch.randint(3, 90, (2, 5))], 1)
    batch = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 28, 28), "labels": ids}
    model = hf.LlavaForConditionalGeneration(narrow)
    assert len(pipex.split_model(model, 3, sample=batch)) == 3


def test_sections_of_rotary_embeddings_shrink_with_the_heads() -> None:
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    text = {"hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": 2,
            "rope_parameters": rope}  # fmt: skip
    model = hf.Qwen2_5_VLForConditionalGeneration(shrunk(hf.Qwen2_5_VLConfig(text_config=text)))
    ids = torch.randint(3, 90, (2, 8))
    assert model(input_ids=ids, labels=ids, use_cache=False).loss.isfinite()


def test_a_model_without_values_is_cut_as_a_narrow_one_of_its_layers() -> None:
    """Units and what travels are those of the model with values, though that one is never made."""
    config = hf.MixtralConfig(hidden_size=4096, num_hidden_layers=6, vocab_size=1000, num_local_experts=8)
    with torch.device("meta"):
        model = hf.MixtralForCausalLM(config)
    ids = torch.randint(3, 90, (2, 8))
    stages = pipex.split_model(model, 4, sample={"input_ids": ids, "labels": ids})
    assert [len(stage.layers) for stage in stages] == [2, 2, 2, 2]
    assert all(parameter.is_meta for stage in stages for parameter in stage.parameters())
    assert {name for stage in stages for name in stage.names} == set(model.state_dict())
