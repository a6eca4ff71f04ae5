"""Tiny models of images and sound, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}
IMAGE: dict[str, Any] = {"image_size": 16, "patch_size": 4, **SHAPE}
FRONT = {
    "vit": ["class"],
    "deit": ["class", "class"],
    "dinov2": ["class"],
    "dinov2_with_registers": ["class"] + ["register"] * 4,
    "dinov3_vit": ["class"] + ["register"] * 3,
    "clip_vision_model": ["class"],
    "siglip_vision_model": [],
}
"""Family -> rows in front of the 16 patches."""


def image_model(family: str) -> nn.Module:
    """Return an encoder of images 16 x 16, cut into 16 patches."""
    import transformers as hf

    torch.manual_seed(0)
    more = {"dinov2_with_registers": {"num_register_tokens": 4}}
    more |= {"dinov3_vit": {"num_register_tokens": 3}}
    config: Any = hf.AutoConfig.for_model(family, **IMAGE, **more.get(family, {}))
    model: nn.Module = hf.AutoModel.from_config(config).eval()
    return model


def whisper_encoder() -> nn.Module:
    """Return the encoder of a Whisper model: 100 frames of 8 numbers become 50 rows."""
    import transformers as hf

    torch.manual_seed(0)
    config = hf.WhisperConfig(
        d_model=16, encoder_layers=3, encoder_attention_heads=2, encoder_ffn_dim=24,
        decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=24, num_mel_bins=8,
        max_source_positions=50, vocab_size=64, init_std=0.3, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model: nn.Module = hf.WhisperModel(config).get_encoder().eval()
    return model


def wav2vec2() -> nn.Module:
    """Return a Wav2Vec2 that makes one row of 20 samples or so."""
    import transformers as hf

    torch.manual_seed(0)
    config = hf.Wav2Vec2Config(
        **SHAPE, conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 4),
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )  # fmt: skip
    return hf.Wav2Vec2Model(config).eval()
