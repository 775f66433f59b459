"""Tiny random Hugging Face models of many families, and batches for them: nothing of pipex is in here.

``Example(family, seed)`` is a model with its batches. Without a seed each option of a family's configuration is its
first; with one it is drawn. Everything follows from family, seed and step, so that every process makes the same.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from hf_batches import (
    ANSWERS,
    AUDIO,
    CAUSAL,
    CAUSAL_AND_MORE,
    CLASSES,
    IMAGE,
    IMAGE_SIZE,
    IMAGES,
    MASKED,
    PAD,
    POSITIONS,
    QWEN_VISION,
    SEQ2SEQ,
    SEQUENCES,
    START,
    STOP,
    TOKENS,
    VISION,
    VOCABULARY,
    Batch,
    Kind,
)
from torch import Tensor, nn


class Pick:
    """Chooses the options of a configuration: the first ones, or by a seed."""

    def __init__(self, seed: int | None) -> None:
        self._chance = None if seed is None else random.Random(seed)

    def __call__(self, *options: Any) -> Any:
        return options[0] if self._chance is None else self._chance.choice(options)


FAMILIES: dict[str, tuple[Callable[[Pick], nn.Module], Kind]] = {}

LAYERS: dict[str, tuple[str, ...]] = {
    "albert": ("albert.encoder.albert_layer_groups",),
    "resnet": tuple(f"resnet.encoder.stages.{n}.layers" for n in range(3)),
}

TWELVE = (
    "gpt2", "llama", "llama tied", "qwen3", "mixtral", "qwen3 moe", "gemma", "bert", "t5", "bart", "llama lora",
    "llama checkpointing",
)  # fmt: skip
"""Families that every change must keep."""


@dataclass(frozen=True)
class Example:
    family: str
    seed: int | None = None

    def model(self) -> nn.Module:
        """Always the same, ready to train."""
        torch.manual_seed(self.seed or 0)
        model = FAMILIES[self.family][0](Pick(self.seed))
        for parameter in model.parameters():  # some begin at 0, and so would hide what does not reach them
            if parameter.requires_grad and not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        return model.train()

    @property
    def layers(self) -> tuple[str, ...] | None:
        """Names of its lists of layers, where the model does not say them."""
        return LAYERS.get(self.family)

    @property
    def is_mean(self) -> bool:
        """Whether the loss is nothing but a mean over tokens (or samples)."""
        return FAMILIES[self.family][1] not in (CAUSAL_AND_MORE, ANSWERS) and not self.norms_batches

    @property
    def norms_batches(self) -> bool:
        return self.family == "resnet"

    def batch(self, model: nn.Module, step: int, rows: int = 8) -> Batch:
        generator = torch.Generator().manual_seed(1000 * (self.seed or 0) + step)
        return FAMILIES[self.family][1].batch(model, generator, rows)

    def losses(self, output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """By plain torch, from the logits; or from the model's own loss where more than cross-entropy is in it."""
        return FAMILIES[self.family][1].losses(output, batch)


def family(name: str, kind: Kind) -> Callable[[Callable[[Pick], nn.Module]], Callable[[Pick], nn.Module]]:
    def register(build: Callable[[Pick], nn.Module]) -> Callable[[Pick], nn.Module]:
        FAMILIES[name] = build, kind
        return build

    return register


def common(pick: Pick, **more: Any) -> dict[str, Any]:
    """What most decoders' configurations say."""
    heads = pick(4, 2, 8)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": pick(32, 16, 48),
        "num_hidden_layers": pick(4, 2, 3, 5),
        "num_attention_heads": heads,
        "num_key_value_heads": pick(2, 1, heads),
        "intermediate_size": pick(64, 24),
        "max_position_embeddings": POSITIONS,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": pick(False, True),
        "attn_implementation": pick("sdpa", "eager"),
    }
    return {**sizes, **more}


def partly_frozen(model: nn.Module, pick: Pick) -> nn.Module:
    """Without gradients: nothing, embeddings, norms, or every second layer."""
    frozen = pick("nothing", "nothing", "embeddings", "norms", "layers")
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        even = any(part.isdigit() and int(part) % 2 == 0 for part in parts)
        if (
            (frozen == "embeddings" and "embed" in name)
            or (frozen == "norms" and "norm" in name)
            or (frozen == "layers" and even)
        ):
            parameter.requires_grad_(False)
    return model


def varied(model: nn.Module, pick: Pick) -> nn.Module:
    """As it is; or checkpointing, with low-rank adapters, or partly frozen."""
    way = pick("as it is", "checkpointing", "adapters", "partly frozen", "as it is")
    if way == "checkpointing":
        model.activation_checkpointing_enable()
    elif way == "adapters":
        return with_adapters(model, pick)
    elif way == "partly frozen":
        return partly_frozen(model, pick)
    return model


def with_adapters(model: nn.Module, pick: Pick, targets: Any = "all-linear") -> nn.Module:
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(r=pick(4, 2), target_modules=targets, lora_dropout=0.0, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that transformers deprecates, and of what it sets by itself
        return get_peft_model(model, adapters)


@family("gpt2", CAUSAL)
def gpt2(pick: Pick) -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=pick(32, 16), n_layer=pick(4, 2, 3), n_head=pick(4, 2), n_positions=POSITIONS,
        attn_pdrop=0, embd_pdrop=0, resid_pdrop=0, bos_token_id=1, eos_token_id=2,
        scale_attn_by_inverse_layer_idx=pick(False, True), attn_implementation=pick("sdpa", "eager"),
    )  # fmt: skip
    return varied(hf.GPT2LMHeadModel(config), pick)


@family("llama", CAUSAL)
def llama(pick: Pick) -> nn.Module:
    config = hf.LlamaConfig(**common(pick), attention_bias=pick(False, True), mlp_bias=pick(False, True))
    return varied(hf.LlamaForCausalLM(config), pick)


@family("llama tied", CAUSAL)
def llama_tied(pick: Pick) -> nn.Module:
    return varied(hf.LlamaForCausalLM(hf.LlamaConfig(**common(pick, tie_word_embeddings=True))), pick)


@family("llama lora", CAUSAL)
def llama_lora(pick: Pick) -> nn.Module:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**common(pick)))
    return with_adapters(model, pick, pick(["q_proj", "v_proj"], "all-linear", ["down_proj"]))


@family("llama checkpointing", CAUSAL)
def llama_checkpointing(pick: Pick) -> nn.Module:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**common(pick)))
    model.activation_checkpointing_enable(every_n_layers=pick(1, 2))
    return model


@family("qwen3", CAUSAL)
def qwen3(pick: Pick) -> nn.Module:
    window = pick({}, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1})
    return varied(hf.Qwen3ForCausalLM(hf.Qwen3Config(**common(pick), head_dim=pick(8, 16), **window)), pick)


@family("mixtral", CAUSAL)
def mixtral(pick: Pick) -> nn.Module:
    config = hf.MixtralConfig(
        **common(pick), num_local_experts=4, num_experts_per_tok=pick(2, 1), sliding_window=pick(None, 4)
    )
    return varied(hf.MixtralForCausalLM(config), pick)


@family("mixtral with the routers' loss", CAUSAL_AND_MORE)
def mixtral_routers(pick: Pick) -> nn.Module:
    config = hf.MixtralConfig(
        **common(pick), num_local_experts=4, num_experts_per_tok=pick(2, 1), output_router_logits=True,
        router_aux_loss_coef=pick(1.0, 0.01),
    )  # fmt: skip
    return hf.MixtralForCausalLM(config)


QWEN_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@family("qwen3 moe", CAUSAL)
def qwen3_moe(pick: Pick) -> nn.Module:
    config = hf.Qwen3MoeConfig(
        **common(pick), **QWEN_MOE, head_dim=8, decoder_sparse_step=pick(1, 2), mlp_only_layers=pick([], [0])
    )
    return varied(hf.Qwen3MoeForCausalLM(config), pick)


@family("qwen3 moe with the routers' loss", CAUSAL_AND_MORE)
def qwen3_moe_routers(pick: Pick) -> nn.Module:
    config = hf.Qwen3MoeConfig(
        **common(pick), **QWEN_MOE, head_dim=8, output_router_logits=True, decoder_sparse_step=pick(2, 1)
    )
    return hf.Qwen3MoeForCausalLM(config)


@family("gemma", CAUSAL)
def gemma(pick: Pick) -> nn.Module:
    return varied(hf.GemmaForCausalLM(hf.GemmaConfig(**common(pick, tie_word_embeddings=True), head_dim=8)), pick)


@family("gemma2", CAUSAL)
def gemma2(pick: Pick) -> nn.Module:
    """Soft-caps, and windows in every second layer."""
    config = hf.Gemma2Config(
        **common(pick, tie_word_embeddings=True, attn_implementation="eager"), head_dim=8,
        sliding_window=4, query_pre_attn_scalar=8, final_logit_softcapping=pick(0.5, 30.0), attn_logit_softcapping=0.5,
    )  # fmt: skip
    return varied(hf.Gemma2ForCausalLM(config), pick)


@family("gemma3", CAUSAL)
def gemma3(pick: Pick) -> nn.Module:
    """Two rotary tables, by the kind of layer."""
    config = hf.Gemma3TextConfig(
        **common(pick, tie_word_embeddings=True), head_dim=8, sliding_window=4, query_pre_attn_scalar=8,
        layer_types=None, sliding_window_pattern=pick(2, 3),
    )  # fmt: skip
    return varied(hf.Gemma3ForCausalLM(config), pick)


@family("gemma3n", CAUSAL)
def gemma3n(pick: Pick) -> nn.Module:
    """Inputs of their own for every layer, four streams instead of one, keys and values that later layers share."""
    layers = pick(4, 5)
    config = hf.Gemma3nTextConfig(
        **common(pick, num_hidden_layers=layers, intermediate_size=[64] * layers, tie_word_embeddings=True),
        head_dim=8, sliding_window=4, vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8,
        laurel_rank=4, num_kv_shared_layers=pick(0, 2), layer_types=["sliding_attention", "full_attention"] * 2
        + ["full_attention"] * (layers - 4), activation_sparsity_pattern=[0.5] + [0.0] * (layers - 1),
    )  # fmt: skip
    return hf.Gemma3nForCausalLM(config)


@family("deepseek v3", CAUSAL)
def deepseek_v3(pick: Pick) -> nn.Module:
    """Latent attention, dense layers first."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    config = hf.DeepseekV3Config(
        **common(pick, **heads), q_lora_rank=pick(16, None), kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=8, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=2, topk_group=1,
        moe_intermediate_size=16, first_k_dense_replace=pick(1, 2),
    )  # fmt: skip
    return varied(hf.DeepseekV3ForCausalLM(config), pick)


@family("gpt oss", CAUSAL)
def gpt_oss(pick: Pick) -> nn.Module:
    """Sinks in the attention, windows in every second layer, experts with biases."""
    config = hf.GptOssConfig(
        **common(pick, attn_implementation="eager"), head_dim=8, num_local_experts=4, num_experts_per_tok=2,
        sliding_window=4, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    return hf.GptOssForCausalLM(config)


@family("qwen3 next", CAUSAL)
def qwen3_next(pick: Pick) -> nn.Module:
    """Gated delta rule and attention, and experts."""
    kinds = ["linear_attention", "full_attention"]
    config = hf.Qwen3NextConfig(
        **common(pick, num_hidden_layers=4), **QWEN_MOE, head_dim=8, shared_expert_intermediate_size=16,
        linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
        layer_types=pick(kinds * 2, [kinds[0]] * 3 + [kinds[1]], kinds[::-1] * 2),
    )  # fmt: skip
    return hf.Qwen3NextForCausalLM(config)


@family("mamba2", CAUSAL)
def mamba2(pick: Pick) -> nn.Module:
    config = hf.Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=pick(4, 3), num_heads=8, head_dim=8, expand=2,
        state_size=8, n_groups=pick(2, 1), chunk_size=pick(8, 4), tie_word_embeddings=pick(False, True), pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return hf.Mamba2ForCausalLM(config)


@family("bamba", CAUSAL)
def bamba(pick: Pick) -> nn.Module:
    """Layers that return tuples."""
    config = hf.BambaConfig(
        **common(pick, num_hidden_layers=4, hidden_size=32), mamba_d_state=8, mamba_n_heads=8, mamba_d_head=8,
        mamba_n_groups=pick(1, 2), mamba_chunk_size=8, attn_layer_indices=pick([1], [0, 3], [2]),
    )  # fmt: skip
    return hf.BambaForCausalLM(config)


@family("zamba2", CAUSAL)
def zamba2(pick: Pick) -> nn.Module:
    """One block that several layers share, and which gets the embedding again."""
    mixed = ["mamba", "mamba", "hybrid", "mamba", "hybrid"]
    config = hf.Zamba2Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=pick(64, 24), mamba_d_state=8, n_mamba_heads=8, mamba_headdim=8, mamba_ngroups=1,
        chunk_size=8, num_mem_blocks=pick(1, 2), adapter_rank=4, use_shared_attention_adapter=pick(False, True),
        use_mem_rope=True,
        layers_block_type=pick(mixed, mixed[::-1], mixed[1:] + mixed[:1]), max_position_embeddings=POSITIONS,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return hf.Zamba2ForCausalLM(config)


@family("jamba", CAUSAL_AND_MORE)
def jamba(pick: Pick) -> nn.Module:
    """Hybrid, experts in every second layer, and the routers' loss."""
    config = hf.JambaConfig(
        **common(pick, num_hidden_layers=4), num_experts=4, num_experts_per_tok=2, attn_layer_period=2,
        attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=pick(1, 0), mamba_d_state=8, mamba_dt_rank=4,
        output_router_logits=True, router_aux_loss_coef=pick(0.1, 1.0),
    )  # fmt: skip
    return hf.JambaForCausalLM(config)


@family("opt", CAUSAL)
def opt(pick: Pick) -> nn.Module:
    """Embeddings narrower than the layers, a projection before and after them."""
    config = hf.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=pick(4, 3), ffn_dim=64, num_attention_heads=4,
        max_position_embeddings=POSITIONS, dropout=0, word_embed_proj_dim=pick(16, 32),
        do_layer_norm_before=pick(False, True), pad_token_id=0, bos_token_id=1, eos_token_id=2,
        attn_implementation=pick("sdpa", "eager"),
    )  # fmt: skip
    return varied(hf.OPTForCausalLM(config), pick)


@family("falcon", CAUSAL)
def falcon(pick: Pick) -> nn.Module:
    """An attention bias by position (alibi) that goes to every layer."""
    config = hf.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=pick(4, 3), num_attention_heads=4,
        ffn_hidden_size=64, alibi=pick(True, False), multi_query=pick(True, False), parallel_attn=pick(False, True),
        new_decoder_architecture=False, max_position_embeddings=POSITIONS, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return varied(hf.FalconForCausalLM(config), pick)


@family("bloom", CAUSAL)
def bloom(pick: Pick) -> nn.Module:
    config = hf.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=pick(4, 3), n_head=4, hidden_dropout=0, attention_dropout=0,
        apply_residual_connection_post_layernorm=pick(False, True), pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return varied(hf.BloomForCausalLM(config), pick)


@family("gpt neox", CAUSAL)
def gpt_neox(pick: Pick) -> nn.Module:
    sizes = common(pick)
    del sizes["num_key_value_heads"]
    config = hf.GPTNeoXConfig(**sizes, hidden_dropout=0, attention_dropout=0, use_parallel_residual=pick(True, False))
    return varied(hf.GPTNeoXForCausalLM(config), pick)


@family("llama sequences", SEQUENCES)
def llama_sequences(pick: Pick) -> nn.Module:
    return varied(hf.LlamaForSequenceClassification(hf.LlamaConfig(**common(pick), num_labels=CLASSES)), pick)


def encoder(pick: Pick, **more: Any) -> dict[str, Any]:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": pick(32, 16),
        "num_hidden_layers": pick(4, 3, 2),
        "num_attention_heads": pick(4, 2),
        "intermediate_size": 64,
        "max_position_embeddings": POSITIONS,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": CLASSES,
        "pad_token_id": PAD,
        "attn_implementation": pick("sdpa", "eager"),
    }
    return {**sizes, **more}


@family("bert", MASKED)
def bert(pick: Pick) -> nn.Module:
    return hf.BertForMaskedLM(hf.BertConfig(**encoder(pick)))


@family("bert sequences", SEQUENCES)
def bert_sequences(pick: Pick) -> nn.Module:
    """A pooler between the layers and the head."""
    return hf.BertForSequenceClassification(hf.BertConfig(**encoder(pick)))


@family("bert answers", ANSWERS)
def bert_answers(pick: Pick) -> nn.Module:
    """Two cross-entropies in one loss."""
    return hf.BertForQuestionAnswering(hf.BertConfig(**encoder(pick, num_labels=2)))


@family("modernbert", MASKED)
def modernbert(pick: Pick) -> nn.Module:
    config = hf.ModernBertConfig(
        **encoder(pick), embedding_dropout=0, mlp_dropout=0, attention_dropout=0, local_attention=4,
        bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    return hf.ModernBertForMaskedLM(config)


@family("deberta v2", TOKENS)
def deberta_v2(pick: Pick) -> nn.Module:
    """Relative embeddings, a parameter of the encoder, that every layer gets."""
    config = hf.DebertaV2Config(
        **encoder(pick, attn_implementation="eager"), relative_attention=True, pos_att_type=["c2p", "p2c"],
        position_buckets=4, max_relative_positions=POSITIONS, norm_rel_ebd="layer_norm",
        share_att_key=pick(True, False), position_biased_input=pick(False, True), conv_kernel_size=pick(0, 3),
        pooler_dropout=0,
    )  # fmt: skip
    return hf.DebertaV2ForTokenClassification(config)


@family("albert", MASKED)
def albert(pick: Pick) -> nn.Module:
    """One layer used many times."""
    config = hf.AlbertConfig(**encoder(pick), embedding_size=16, num_hidden_groups=pick(1, 2), inner_group_num=1)
    return hf.AlbertForMaskedLM(config)


@family("vit", IMAGES)
def vit(pick: Pick) -> nn.Module:
    config = hf.ViTConfig(
        hidden_size=pick(32, 16), num_hidden_layers=pick(4, 3), num_attention_heads=4, intermediate_size=64,
        image_size=IMAGE_SIZE, patch_size=4, num_labels=CLASSES, attn_implementation=pick("sdpa", "eager"),
    )  # fmt: skip
    return hf.ViTForImageClassification(config)


@family("resnet", IMAGES)
def resnet(pick: Pick) -> nn.Module:
    """Stages of layers in stages of layers, and batch norms."""
    config = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24], depths=pick([2, 2, 1], [1, 1, 2]),
        layer_type=pick("basic", "bottleneck"), num_labels=CLASSES,
    )  # fmt: skip
    return hf.ResNetForImageClassification(config)


@family("t5", SEQ2SEQ)
def t5(pick: Pick) -> nn.Module:
    """The first layer of either stack makes a position bias that the others get."""
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=pick(32, 16), d_kv=8, d_ff=64, num_layers=pick(2, 3),
        num_decoder_layers=pick(2, 3), num_heads=4, dropout_rate=0, pad_token_id=PAD, decoder_start_token_id=PAD,
        eos_token_id=2, feed_forward_proj=pick("relu", "gated-gelu"), tie_word_embeddings=pick(True, False),
        relative_attention_num_buckets=8,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


@family("bart", SEQ2SEQ)
def bart(pick: Pick) -> nn.Module:
    config = hf.BartConfig(
        vocab_size=VOCABULARY, d_model=pick(32, 16), encoder_layers=pick(2, 3), decoder_layers=pick(2, 3),
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, dropout=0,
        max_position_embeddings=POSITIONS, pad_token_id=PAD, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
        forced_eos_token_id=2, scale_embedding=pick(False, True), attn_implementation=pick("sdpa", "eager"),
    )  # fmt: skip
    return hf.BartForConditionalGeneration(config)


@family("whisper", AUDIO)
def whisper(pick: Pick) -> nn.Module:
    config = hf.WhisperConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=pick(2, 3), decoder_layers=pick(2, 3),
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, dropout=0,
        num_mel_bins=8, max_source_positions=8, max_target_positions=POSITIONS, pad_token_id=PAD, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, attn_implementation=pick("sdpa", "eager"),
    )  # fmt: skip
    return hf.WhisperForConditionalGeneration(config)


@family("llava", VISION)
def llava(pick: Pick) -> nn.Module:
    """A vision model whose features take the places of ids in a language model."""
    vision = hf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=pick(3, 2), num_attention_heads=4,
        image_size=IMAGE_SIZE, patch_size=8, projection_dim=32,
    )  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=vision, text_config=hf.LlamaConfig(**common(pick)), image_token_id=IMAGE,
        vision_feature_layer=pick(-1, -2), vision_feature_select_strategy="default", image_seq_length=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config)


@family("qwen2.5 vl", QWEN_VISION)
def qwen2_5_vl(pick: Pick) -> nn.Module:
    """Positions of three kinds, made of ids and image sizes; windows in the vision model."""
    vision = {
        "depth": pick(3, 2), "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32,
        "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16,
        "fullatt_block_indexes": [1], "in_channels": 3,
    }  # fmt: skip
    heads = {"num_attention_heads": 4, "num_key_value_heads": pick(2, 1, 4)}
    text_config = common(pick, hidden_size=32, **heads, tie_word_embeddings=False)
    text_config["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    config = hf.Qwen2_5_VLConfig(
        vision_config=vision, text_config=text_config, image_token_id=IMAGE, video_token_id=92,
        vision_start_token_id=START, vision_end_token_id=STOP, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.Qwen2_5_VLForConditionalGeneration(config)
