"""A configuration of the same model, but narrow: for models that are too large for one process.

How a Hugging Face model's forward hangs together (which layers there are, of which kinds, what goes from one to the
next) does not depend on its widths. So the cut of a model of 400 billion parameters can be found, and verified, on one
of a few millions: same class, same layers, same kinds of layers.

Only widths shrink. What inputs are made of stays as it is (vocabularies, sizes of images and patches, mel bins, the
longest sequence), so that one ``sample`` fits both; so do numbers that say which layer is what.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

HEADS, KEY_HEADS, HEAD_DIM = 4, 2, 16
"""Some models turn a quarter of a head in rotary embeddings, in pairs, and others in three sections: 16 allows both."""

HIDDEN, INNER = HEADS * HEAD_DIM, 96
EXPERTS, RANK, STATE = 4, 16, 16
HASHED = 1024
"""Rows of tables that ids are hashed into; of any number."""


def shrunk(config: Any) -> Any:
    """A deep copy of a transformers configuration, nested ones in it too, whose widths are a few dozens.

    Args:
        config: a ``PreTrainedConfig``; read by its attributes alone, so that transformers need not be installed.
    """
    small = copy.deepcopy(config)
    for original, twin in _parts(config, small):
        for name, value in _numbers(original):
            new = _width(name, value, original)
            if new != value:
                setattr(twin, name, new)
        _settle(original, twin)
    return small


def _parts(config: Any, small: Any) -> Iterator[tuple[Any, Any]]:
    """The configuration and those nested in it, each with its copy."""
    yield config, small
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            yield from _parts(value, vars(small)[name])


def _numbers(config: Any) -> Iterator[tuple[str, Any]]:
    """Attributes that are numbers, or lists of numbers with one for each layer."""
    for name, value in vars(config).items():
        each = value if isinstance(value, (list, tuple)) else [value]
        if each and all(isinstance(one, int) and not isinstance(one, bool) for one in each) and name[0] != "_":
            yield name, value


Rule = Callable[[int, Any], int]
"""(value, configuration) -> new value"""


def _kept(value: int, config: Any) -> int:
    return value


def _least(limit: int) -> Rule:
    return lambda value, config: min(value, limit)


def _heads(value: int, config: Any) -> int:
    """A power of two, which divides the hidden width."""
    return min(1 << (value.bit_length() - 1), HEADS) if value > 0 else value


def _key_heads(value: int, config: Any) -> int:
    """As many as there are queries' stay as many."""
    heads = [number for name, number in _numbers(config) if re.fullmatch(QUERY_HEADS, name)]
    return min(value, HEADS if value in heads else KEY_HEADS)


def _times_hidden(value: int, config: Any) -> int:
    """Several times the hidden width stays so."""
    times, rest = divmod(value, _hidden_of(config))
    return HIDDEN * times if times and not rest and times <= 8 else min(value, HIDDEN)


def _beside_hidden(value: int, config: Any) -> int:
    """A projection is between this width and the hidden one only if they differ."""
    return HIDDEN if value == _hidden_of(config) else HIDDEN // 2


def _hidden_of(config: Any) -> int:
    for name in ("hidden_size", "d_model", "n_embd"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    return 1 << 60


QUERY_HEADS = r"(.*_)?(attention_heads|n_?heads?|num_heads|num_(key|value|mamba)_heads)(_per_layer)?"
KEPT = (
    r"_layers?|_id|_index|_idx|layer_.*|kernel_size|kernel_dim|patch_size|image_size|chunk_size|window_size|vocab_size"
)
KEYS = r"num_key_value_heads|num_kv_heads|kv_n_heads|multi_query_group_num|num_query_groups"
HEAD_DIMS = r"head_dim|head_size|headdim|d_head|dim_head|d_kv|kv_channels|rotary_dim"
INNERS = r"ffn_dim|ffn_hidden_size|d_ff|dff|dim_ff|n_inner|mlp_dim|intermediate_size(_mlp)?|feed_forward_size|d_inner"
HIDDENS = (
    r"hidden_size|d_model|n_embd|emb_dim|embed_dim|embedding_dim|hidden_dim|lru_width|proj_dim|projection_dim|output_dim"
    r"|out_hidden_size|input_embedding_size|output_embedding_size"
)

RULES: list[tuple[str, Rule]] = [
    (r"hidden_size_per_layer_input|ple_embed_dim", _least(8)),
    (rf".*({KEPT}|_mel_bins)", _kept),  # though their names look like widths'
    (rf"(.*_)?({KEYS})", _key_heads),
    (QUERY_HEADS, _heads),
    (rf"(.*_)?({HEAD_DIMS})", _least(HEAD_DIM)),
    (r"(num_|n_|moe_|local_|routed_)*experts|zero_expert_num", _least(EXPERTS)),
    (r"num_experts_per_tok(en)?|(moe_)?top_?k|moe_k|num_selected_experts", _least(2)),
    (r"n_group|num_expert_groups?|topk_group|n_groups|mamba_n_?groups", _least(1)),
    (rf"(.*_)?({INNERS})", _least(INNER)),
    (r"embedding_size|word_embed_proj_dim|intra_bottleneck_size|true_hidden_size", _beside_hidden),
    (r"attention_hidden_size|vision_output_dim", _times_hidden),
    (rf"(.*_)?({HIDDENS})", _least(HIDDEN)),
    (r"(.*_)?(rank|d_rel)", _least(RANK)),
    (r"(.*_)?(state_size|d_state)", _least(STATE)),
    (r".*(hash.*_vocab|ngram_vocab_size_base)", _least(HASHED)),
]
"""The first that the whole of a name matches."""


def _width(name: str, value: Any, config: Any) -> Any:
    for pattern, rule in RULES:
        if re.fullmatch(pattern, name):
            return [rule(one, config) for one in value] if isinstance(value, (list, tuple)) else rule(value, config)
    return value


def _settle(config: Any, small: Any) -> None:
    """What follows from other widths."""
    _settle_rotary(small)
    if hasattr(small, "qk_head_dim") and hasattr(small, "qk_nope_head_dim"):
        small.qk_head_dim = small.qk_nope_head_dim + small.qk_rope_head_dim
    if hasattr(small, "attention_hidden_size") and hasattr(small, "attention_head_dim"):
        small.attention_head_dim = small.attention_hidden_size // small.num_attention_heads
    # State space models: the hidden size, expanded, is heads of a width.
    if expand := getattr(small, "expand", None) or getattr(small, "mamba_expand", None):
        inner = int(expand * HIDDEN)
        if getattr(small, "mamba_d_ssm", None):
            inner = small.mamba_d_ssm = HIDDEN
        for heads, width in STATE_HEADS:
            if hasattr(config, heads) and hasattr(config, width):
                setattr(small, heads, inner // getattr(small, width))


STATE_HEADS = [
    ("num_heads", "head_dim"), ("mamba_n_heads", "mamba_d_head"), ("mamba_num_heads", "mamba_head_dim"),
    ("n_mamba_heads", "mamba_headdim"),
]  # fmt: skip


def _settle_rotary(small: Any) -> None:
    """Tables and sections of the pairs that are turned become as long as there are pairs."""
    parameters = getattr(small, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return
    pairs = int(HEAD_DIM * parameters.get("partial_rotary_factor", 1.0)) // 2
    for name in ("long_factor", "short_factor"):
        if parameters.get(name):
            parameters[name] = parameters[name][:pairs]
    if sections := parameters.get("mrope_section"):
        each = [max(1, section * pairs // sum(sections)) for section in sections]
        parameters["mrope_section"] = [pairs - sum(each[1:]), *each[1:]]
