"""Build tiny, randomly initialized models of the model families that transformers knows.

    python -m bench.tiny_models [NAME ...]      # builds and runs each, prints one line per model

Every model is made from its config class alone: one table of field names sets all sizes (width 32,
4 blocks, 4 heads of 16, 2 key-value heads, 4 experts, vocabulary 97), a second one corrects single
families. Sliding windows, multipliers and the like are switched on and small enough to matter for 7
tokens, and all parameters are random, so that no part of a block is the identity.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import time
import warnings
from collections import Counter
from math import prod
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

BLOCKS, BATCH, TOKENS, VOCAB = 4, 2, 7, 97

Fields = dict[str, Any]


class NotBuilt(Exception):
    """Say why a model cannot be built."""


_FIELDS_BY_VALUE = {
    "97": "vocab_size decoder_vocab_size unpadded_vocab_size vocab_size_per_layer_input "
    "output_vocab_size audio_vocab_size",
    "32": "hidden_size d_model n_embd emb_dim embedding_dim word_embed_proj_dim embed_dim "
    "projection_dim out_hidden_size attention_hidden_size lru_width backbone_hidden_size "
    "hidden_size_global image_size adapter_in_dim adapter_out_dim adapter_input_size",
    "24": "embedding_size input_embedding_size output_embedding_size moe_intermediate_size "
    "shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
    "moe_shared_expert_intermediate_size shared_experts_intermediate_size router_hidden_size",
    "4": "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers depth "
    "num_blocks num_encoder_layers num_decoder_layers num_layers_per_stack "
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
    "encoder_attention_heads attention_heads num_encoder_attention_heads "
    "num_decoder_attention_heads swa_num_attention_heads "
    "sliding_window sliding_window_size attention_window_size window_size local_attention "
    "attention_chunk_size index_topk keep_window_size chunk_size mamba_chunk_size "
    "num_experts num_local_experts n_routed_experts moe_num_experts time_step_rank mamba_dt_rank "
    "rel_extent type_vocab_size linear_num_value_heads linear_num_heads index_n_heads",
    "16": "head_dim swa_head_dim dim_head d_head kv_channels attention_head_size "
    "q_lora_rank kv_lora_rank qk_head_dim index_head_dim adapter_rank "
    "hidden_size_per_layer_input laurel_rank",
    "48": "intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff d_inner "
    "ffn_hidden_size feed_forward_size intermediate_size_mlp dense_intermediate_size mlp_dim "
    "prefix_dense_intermediate_size",
    "64": "max_position_embeddings n_positions n_ctx max_seq_len max_source_positions "
    "max_target_positions context_length original_max_position_embeddings relative_max_distance",
    "2": "num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok moe_topk "
    "moe_k top_k_experts n_group sliding_window_pattern linear_num_key_heads mamba_ngroups "
    "mamba_n_groups n_groups eos_token_id decoder_start_token_id",
    "1": "topk_group n_shared_experts num_shared_experts moe_num_shared_experts "
    "first_k_dense_replace num_dense_layers bos_token_id",
    "0": "pad_token_id",
    "8": "qk_rope_head_dim qk_nope_head_dim rotary_dim mamba_d_state state_size mamba_n_heads "
    "mamba_d_head mamba_num_heads mamba_head_dim ssm_state_size linear_key_head_dim "
    "linear_value_head_dim linear_head_dim d_rel patch_size",
    "12": "v_head_dim",
    "94": "image_token_id image_token_index audio_token_id",
    "95": "video_token_id boi_token_id boi_token_index boa_token_id vision_start_token_id",
    "96": "eoi_token_id eoi_token_index eoa_token_id eoa_token_index vision_end_token_id",
    "0.22": "residual_multiplier",
    "0.3": "attention_multiplier",
    "1.5": "embedding_multiplier routed_scaling_factor route_scale router_scaling_factor "
    "moe_routed_scaling_factor logits_scaling",
    "True": "use_sliding_window enable_moe_block",
}
_FIELDS: Fields = {
    field: ast.literal_eval(value)
    for value, fields in _FIELDS_BY_VALUE.items()
    for field in fields.split()
}


def _rope(*kinds: str) -> Fields:
    return {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in kinds}


_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}

_DROP: Any = object()
"""Leaves the field to the config class."""

_FAMILIES: dict[str, Fields] = {
    "bailing_hybrid": {"head_dim": 16},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 97, "use_cache": False},
    "cohere2_moe": {"mlp_layer_types": ["dense", "sparse"] * 2},
    "cohere_compass_text": {"rope_parameters": _rope("sliding_attention", "full_attention")},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 2.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_top_k": 2},
    },
    "deepseek_v4": {"head_dim": 16, "o_groups": 2, "o_lora_rank": 8, "num_key_value_heads": 1},
    "dory": {"layer_types": _DROP, "n_input_layers": 1, "n_output_layers": 1},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "distilbert": {"dim": 32, "hidden_dim": 48},
    "dots3_note_audio_encoder": {"downsample_hidden_size": 8},
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense", "sparse"] * 2},
    "dots3_note_text": {
        "head_dim": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 12,
    },
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "lm_head_multiplier": 0.5,
        "mlp_multipliers": [0.8, 0.6],
        "key_multiplier": 0.7,
        "attention_in_multiplier": 0.9,
        "attention_out_multiplier": 0.4,
        "ssm_multipliers": [0.5, 0.6, 0.7, 0.8, 0.9],
        "ssm_in_multiplier": 1.2,
        "ssm_out_multiplier": 0.3,
    },
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4_text": {"global_head_dim": 24},
    "gemma4_unified_text": {"global_head_dim": 24},
    "got_ocr2_vision": {"output_channels": 8, "global_attn_indexes": [1, 3]},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "helium": {"head_dim": 8},
    "hrm_text": {"num_layers_per_stack": _DROP},
    "inkling_text": {"mlp_layer_types": ["dense", "sparse"] * 2},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 3,
        "expert_layer_offset": 0,
    },
    "laguna": {"num_attention_heads_per_layer": [4, 8, 4, 8]},
    "lfm2": {"block_multiple_of": 8, "layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 2},
    "minimax": {
        "block_size": 4,
        **{f"{part}_alpha_factor": 3.5 for part in ("full_attn", "linear_attn", "mlp")},
        **{f"{part}_beta_factor": 0.7 for part in ("full_attn", "linear_attn", "mlp")},
    },
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "mlp_layer_types": ["dense", "sparse"] * 2,
        "index_block_size": 2,
        "index_topk_blocks": 1,
    },
    "phi4_multimodal_audio": {"nemo_conv_channels": 16, "ext_pw_out_channel": 32},
    "qwen2_5_vl_text": {"rope_parameters": _MROPE},
    "qwen2_vl_text": {"rope_parameters": _MROPE},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 16,
        "ple_layer_ids": [1],
        "ngram_vocab_size_base": 97,
        "heads_per_ngram": 2,
        "make_ngram_vocab_size_divisible_by": 4,
        "split_ngram_parts": 1,
    },
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"] * 2,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [8, 24],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 97,
        "shape_vocab_size": 97,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "rwkv": {"rescale_every": 2},
    "t5": {"d_ff": 48, "d_kv": 16},
    "xlnet": {"d_head": 8},
    "xlstm": {"qk_dim_factor": 2.0, "v_dim_factor": 2.0, "ffn_round_up_to_multiple_of": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64},
    "zamba2": {
        "num_key_value_heads": 4,
        "num_mem_blocks": 2,
        "use_shared_attention_adapter": True,
    },
    "zaya": {
        "num_experts_per_tok": 1,
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        "sliding_window": 4,
    },
}
"""What the table gets wrong, by `model_type`; a dict corrects a sub-config."""

_CAUSAL = "AutoModelForCausalLM"

_VARIANTS: dict[str, tuple[str, Fields]] = {
    "falcon:new": (_CAUSAL, {"new_decoder_architecture": True}),
    "falcon:sequential": (_CAUSAL, {"parallel_attn": False}),
    "gpt_neox:sequential": (_CAUSAL, {"use_parallel_residual": False}),
    "stablelm:parallel": (_CAUSAL, {"use_parallel_residual": True}),
    "opt:postnorm": (_CAUSAL, {"do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    "bert:decoder": (_CAUSAL, {"is_decoder": True}),
    "doge:moe": (_CAUSAL, {"is_moe": True}),
    "granitemoehybrid:dense": (_CAUSAL, {"num_local_experts": 0}),
    **{
        f"{name}:{variant}": (auto, {})
        for variant, auto, names in (
            (
                "vlm",
                "AutoModelForImageTextToText",
                "llava qwen2_vl qwen2_5_vl qwen3_vl paligemma mllama mistral3 idefics3 smolvlm "
                "internvl",
            ),
            ("seq2seq", "AutoModelForSeq2SeqLM", "bart t5"),
            ("speech", "AutoModelForSpeechSeq2Seq", "whisper"),
            (
                "masked",
                "AutoModelForMaskedLM",
                "bert roberta electra distilbert albert modernbert deberta-v2 esm",
            ),
            (
                "vision",
                "AutoModel",
                "vit dinov2 dinov2_with_registers dinov3_vit clip_vision_model "
                "siglip_vision_model vit_mae",
            ),
        )
        for name in names.split()
    },
}
"""Name of the auto class and corrections by variant."""

_ASSISTANT = "drafts for another model, whose keys and values it takes as input"
_MUSIC = "AutoModelForCausalLM gives its decoder the config of the whole model"

NOT_BUILT: dict[str, str] = {
    "gemma3n": "its vision tower needs timm",
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
    "musicgen": _MUSIC,
    "musicgen_melody": _MUSIC,
}
"""Why a model cannot be built."""


def _config(cls: Any, changes: Fields) -> Any:
    """Return a tiny config of class `cls` with `changes`."""
    fields = set(inspect.signature(cls.__init__).parameters)
    for base in cls.__mro__:
        if base.__module__.startswith("transformers.models."):
            fields |= set(base.__annotations__)
    default = cls()
    values = {field: _FIELDS[field] for field in fields & set(_FIELDS)}
    if "kv_lora_rank" in fields:  # latent attention: as many key-value heads as heads
        values.pop("head_dim", None)
        values["num_key_value_heads"] = 4
    changes = _FAMILIES.get(cls.model_type, {}) | changes
    n_layers = getattr(default, "num_hidden_layers", None)
    for field in fields - set(values):
        value = getattr(default, field, None)
        if isinstance(value, (list, tuple)) and n_layers and len(value) == n_layers:
            kinds = list(dict.fromkeys(value))  # one value per block: alternate those there are
            if kinds == ["full_attention"] and "sliding_window" in fields:
                kinds = ["sliding_attention", "full_attention"]
            values[field] = [kinds[i % len(kinds)] for i in range(BLOCKS)]
    for field in cls.sub_configs:
        sub = getattr(default, field, None)
        if sub is not None:
            change = changes.pop(field, {})
            values[field] = _config(type(sub), change) if isinstance(change, dict) else change
    values |= changes
    return cls(**{field: value for field, value in values.items() if value is not _DROP})


@torch.no_grad()
def _randomize(model: nn.Module, seed: int) -> None:
    """Draw all parameters: no weight is zero, no norm or scale is the identity."""
    rng = torch.Generator().manual_seed(seed)
    for module in model.modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, param in module.named_parameters(recurse=False):
            noise = torch.randn(param.shape, generator=rng)
            if name.endswith("bias"):
                values = 0.2 * noise
            elif is_norm or "norm" in name:
                values = 1 + 0.3 * noise
            elif param.ndim < 2:  # scales, gates, decay rates
                values = 0.5 + torch.rand(param.shape, generator=rng)
            elif isinstance(module, nn.Embedding):
                values = noise
            else:
                is_conv = "Conv" in type(module).__name__
                fan_in = prod(param.shape[1:]) if is_conv else param.shape[-1]
                values = 0.7 * noise / fan_in**0.5
            param.copy_(values)
        for name, buffer in module.named_buffers(recurse=False):
            if re.search("(correction|expert|balancing|logits)_bias", name):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=rng))
            elif name == "layer_scalar":
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=rng))


def families() -> list[str]:
    """Return the names of all models: the model types that AutoModelForCausalLM maps, variants."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) + list(_VARIANTS)


def build(name: str, seed: int = 0) -> nn.Module:
    """Return the tiny model `name` in eval mode with random parameters, or raise NotBuilt."""
    if name in NOT_BUILT:
        raise NotBuilt(NOT_BUILT[name])
    auto, changes = _VARIANTS.get(name, (_CAUSAL, {}))
    try:
        config = _config(CONFIG_MAPPING[name.split(":")[0]], changes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = getattr(transformers, auto).from_config(config)
    except Exception as error:
        raise NotBuilt(_line(error)) from error
    model = model.float().eval()
    _randomize(model, seed)
    return model


def example(model: nn.Module) -> dict[str, Tensor]:
    """Return random inputs for a forward pass of `model`."""
    rng = torch.Generator().manual_seed(0)
    config: Any = model.config
    # Special tokens (0 to 2, 94 to 96) are left out.
    ids = torch.randint(3, 94, (BATCH, TOKENS), generator=rng)
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values":
        shape = (BATCH, config.num_channels, config.image_size, config.image_size)
        images = {main: torch.randn(shape, generator=rng)}
        if "noise" in inspect.signature(model.forward).parameters:  # orders the patches to mask
            n_patches = (config.image_size // config.patch_size) ** 2
            images["noise"] = torch.rand(BATCH, n_patches, generator=rng)
        return images
    inputs = {"input_ids": ids}
    if main == "input_features":
        frames = 2 * config.max_source_positions
        inputs = {main: torch.randn(BATCH, config.num_mel_bins, frames, generator=rng)}
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        inputs["decoder_input_ids"] = ids.flip(1)
    return inputs


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    quiet: Any = transformers.logging.set_verbosity_error
    quiet()
    counts: Counter[str] = Counter()
    for name in args.names or families():
        start, kind, result = time.perf_counter(), "-", "ok"
        try:
            model = build(name)
            kind = type(model).__name__
            with torch.no_grad():
                out = model(**example(model))
            first = next(x for x in out.values() if isinstance(x, Tensor))
            if not first.isfinite().all():
                raise ValueError("output is not finite")
        except NotBuilt as error:
            result = f"not built: {error}"
        except Exception as error:
            result = f"does not run: {_line(error)}"
        counts[result.split(":")[0]] += 1
        print(f"{name:28} {kind:40} {time.perf_counter() - start:6.2f} s  {result}", flush=True)
    print(", ".join(f"{n} {what}" for what, n in counts.most_common()))


if __name__ == "__main__":
    main()
