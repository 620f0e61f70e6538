"""Configurations of tiny backbones: the default one of any model type in transformers, made small by general rules."""

from __future__ import annotations

import re
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HIDDEN, HEADS, HEAD_DIM, VOCAB, LAYERS = 64, 2, 32, 128, 2
# The first pattern that a field's complete name matches says how large it may be; fields that match none stay.
SIZES = (
    (r"num_feat_extract_layers|num_adapter_layers|num_feature_levels", 99),
    (r"(num_|n_)?mamba_(n_|num_)?heads|n_mamba_heads", 4),
    (r".*(num_key_value_heads|num_kv_heads|num_query_groups)", 2),
    (r"linear_num_key_heads", 2),
    (r"(head_dim|d_kv|d_head|dim_head|attention_head_size|v_head_dim|mamba_\w*head_?dim|mamba_d_head)", HEAD_DIM),
    (r".*(key_head_dim|value_head_dim|qk_nope_head_dim|qk_rope_head_dim|swa_head_dim|global_head_dim)", HEAD_DIM),
    (r".*(attention_|sliding_attention_)?heads|.*n_heads?|num_heads|n_head", HEADS),
    (r".*(num_\w*layers|n_layers?|_layers|layers)|depth|num_blocks|n_layer|num_self_attends_per_block", LAYERS),
    (r"(num_|n_)(local_|routed_)?experts|moe_num_experts|num_experts_\w*pool", 4),
    (r"(num_experts_per_tok|moe_topk|top_k_experts|num_experts_per_token|moe_k|moe_top_k)", 2),
    (r"(n_group|topk_group|num_expert_group\w*|n_groups|mamba_n_groups)", 1),
    (r"rotary_dim", 16),
    (r"(q_lora_rank|o_lora_rank|kv_lora_rank)", 32),
    (r"(mamba_d_state|ssm_state_size|state_size)", 8),
    (r".*(vocab_size|codebook_size|_vocab)", VOCAB),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|ffn_size|mlp_dim|feedforward\w*|d_ff|n_inner|ff_dim)", 96),
    (r".*mlp_hidden_size", 96),
    (r"(\w+_)?(hidden_size|hidden_dim|embedding_size|embed_dim|emb_dim|n_embd|d_model|d_embed|dim|lru_width)", HIDDEN),
    (
        r"(projection_dim|out_hidden_size|output_hidden_size|word_embed_proj_dim|pooler_output_size|projection_size)",
        HIDDEN,
    ),
    (
        r"(projector_hidden_size|vector_quantization_hidden_dimension|output_dim|d_latents|cross_attention_hidden_size)",
        HIDDEN,
    ),
    (r"(num_conv_pos_embeddings|conv_pos_kernel_size)", 16),
    (r"max_source_positions", 50),
    (r"(num_latents|num_queries)", 12),
)
LAYER_COUNT = re.compile(r"(num_|num_hidden_|n_|encoder_|decoder_|num_decoder_|num_encoder_)?layers?|depth")
# What makes a backbone shallow, and leaves its hidden sizes.
SHALLOW = (
    (LAYER_COUNT.pattern, LAYERS),
    (r".*vocab_size|.*_vocab", VOCAB),
    (r"(num_|n_)(local_|routed_)?experts|moe_num_experts", 4),
    (r"(num_experts_per_tok|moe_topk|top_k_experts)", 2),
    (r"(n_group|topk_group|num_expert_group\w*)", 1),
)
LISTS = {"conv_dim": 32, "tdnn_dim": 16}  # every item becomes this
TOKEN_ID = re.compile(r"\w*(token_id|token_index|_bos_id|_eos_id|_patch_id|_start_id|_end_id|newline_id)s?$")
STAGES = {
    "depths",
    "embed_dim_per_stage",
    "in_channels",
    "hidden_sizes",
    "embed_dims",
    "num_heads",
    "num_attention_heads",
    "embed_dim",
    "depth",
}

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}
# The default, a timm model, needs a package more.
RESNET = {"model_type": "resnet", "depths": [1, 1, 1, 1], "out_features": ["stage4"]}
NO_TIMM = {"use_timm_backbone": False, "backbone_config": RESNET}
# What the rules get wrong: a field's sizes depend on each other in a way of that type alone.
SPECIAL: dict[str, dict[str, Any]] = {
    "funnel": {"architectures": ["FunnelModel"]},  # transformers maps the type to two classes
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), MROPE)},
    "deepseek_ocr2_text": {"num_experts_per_tok": 2},  # without a default
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 96},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "esm": {"vocab_size": VOCAB, "pad_token_id": 1, "mask_token_id": 2},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]],
        "downsample_rate": "1/2",
        "spatial_target_layers": [0, 0, 1, 1],
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM},
    "hunyuan_vl_text": {"head_dim": HEAD_DIM},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4},
    "conditional_detr": NO_TIMM,
    "dab-detr": NO_TIMM,
    "deformable_detr": {**NO_TIMM, "backbone_config": {**RESNET, "out_features": ["stage2", "stage3", "stage4"]}},
    "detr": NO_TIMM,
    "table-transformer": NO_TIMM,
    "xmod": {"default_language": "en_XX"},
    "ministral": {"head_dim": HEAD_DIM},
    "nemotron": {"num_key_value_heads": 2, "head_dim": HEAD_DIM},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "chameleon": {"vocabulary_map": {}},
    "emu3": {"vocabulary_map": {}},
    "autoformer": {"prediction_length": 4},
    "informer": {"prediction_length": 4},
    "time_series_transformer": {"prediction_length": 4},
}


def tiny_config(model_type: str, keep_sizes: bool = False) -> PreTrainedConfig:
    """Return the configuration of a small backbone of that type.

    Args:
        model_type: the type, as in transformers' mapping.
        keep_sizes: True to make it only shallow, and its vocabulary small: for types whose sizes depend on each other
            in ways that the rules do not know.
    """
    default = CONFIG_MAPPING[model_type]()
    return type(default)(**_arguments(default, keep_sizes))


def _arguments(default: PreTrainedConfig, keep_sizes: bool) -> dict[str, Any]:
    fields = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    # Where hidden sizes grow from layer to layer, they stay as they are too.
    sizes = SHALLOW if keep_sizes or _staged(fields) else SIZES
    layers = {v for k, v in fields.items() if LAYER_COUNT.fullmatch(k) and isinstance(v, int) and v > LAYERS}
    arguments = {}
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            own = _own_values(value) if keep_sizes else {}
            arguments[name] = type(value)(**{**own, **_arguments(value, keep_sizes)})
            continue
        if keep_sizes and name in ("image_size", "img_size", "rope_parameters", *LISTS):
            continue
        small = _small(name, value, fields, sizes, layers)
        if small is not None and small != value:
            arguments[name] = small
    return {**arguments, **SPECIAL.get(default.model_type, {})}


def _staged(fields: dict[str, Any]) -> bool:
    return any(isinstance(fields.get(name), list | tuple) for name in STAGES)


def _own_values(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields of a configuration within another that are not the default of its class."""
    default, fields = type(config)(), vars(config).items()
    return {
        name: value
        for name, value in fields
        if not name.startswith("_")
        and not isinstance(value, PreTrainedConfig)
        and value != getattr(default, name, None)
    }


def _small(name: str, value: Any, fields: dict[str, Any], sizes: tuple[tuple[str, int], ...], layers: set[int]) -> Any:
    """Return a smaller value for a field, or None to leave it at its default."""
    if isinstance(value, bool) or value is None:
        return None
    if name == "image_size" or name == "img_size":
        return _small_image(value, fields, sizes is SHALLOW)
    if TOKEN_ID.match(name):
        return _small_token_id(name, value)
    if isinstance(value, int):
        return next((min(value, size) for pattern, size in sizes if re.fullmatch(pattern, name)), None)
    if isinstance(value, list | tuple) and value and all(isinstance(item, int) for item in value):
        if name in LISTS:
            return [LISTS[name]] * len(value)
        if name in ("depths", "stage_numb_of_layers", "layers"):
            return [min(item, 2) for item in value]
        if (
            re.search(r"index|indices|idxs|(?<!proj_)layers", name)
            and max(value) >= LAYERS
            and layers
            and not _staged(fields)
        ):
            return sorted({min(item, LAYERS - 1) for item in value})
    if isinstance(value, list | tuple) and len(value) in layers and sizes is SIZES and not isinstance(value[0], dict):
        return [*value[: LAYERS - 1], value[-1]]
    if name == "rope_parameters" and isinstance(value, dict) and "rope_type" in value:
        return _small_rope(value, fields)
    return None


def _small_rope(rope: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Return sections of multimodal rotary embeddings that fit the small heads; others leave them alone."""
    fraction = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor") or 1)
    n_frequencies = int(HEAD_DIM * fraction) // 2
    third = n_frequencies // 3
    return {**rope, "mrope_section": [n_frequencies - 2 * third, third, third]}


def _small_image(size: int | list | tuple, fields: dict[str, Any], staged: bool) -> Any:
    patch = fields.get("patch_size") or 16
    patch = patch if isinstance(patch, int) else max(patch)
    side = 64 if staged else 4 * patch
    return [side] * len(size) if isinstance(size, list | tuple) else min(side, size)


def _small_token_id(name: str, value: Any) -> Any:
    """Return an id inside the small vocabulary, different for most names."""
    if isinstance(value, list | tuple):
        return [_small_token_id(name, item) for item in value]
    if not isinstance(value, int) or value < VOCAB - 64:
        return None
    return VOCAB - 1 - sum(map(ord, name)) % 60
