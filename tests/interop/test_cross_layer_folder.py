"""Cross-layer transcoders in fastsae's own folder."""

from __future__ import annotations

import pytest
import torch

import fastsae
from fastsae import (
    BatchTopKCrossLayerTranscoder,
    CrossLayerTranscoder,
    JumpReLUCrossLayerTranscoder,
    ReLUCrossLayerTranscoder,
)
from fastsae.nn.layer_decoders import DECODERS

L, D, F = 3, 6, 10
CLASSES = (
    CrossLayerTranscoder,
    BatchTopKCrossLayerTranscoder,
    JumpReLUCrossLayerTranscoder,
    ReLUCrossLayerTranscoder,
)


def coder(cls, decoders="full", dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    rank = 2 if decoders == "low_rank" else None
    sae = cls(D, L, F, 4, decoders=decoders, rank=rank, dtype=dtype, **kwargs)
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(0.1 * torch.randn_like(p))
        if decoders == "tied":
            sae.output_scale.copy_(torch.tensor([0.3, 2.0, 1.7]))
    x = torch.randn(50, L * D).to(dtype)
    sae.loss(x, x)
    return sae.eval(), x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("decoders", DECODERS)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_folder_brings_back_the_same_module(tmp_path, cls, decoders, dtype):
    sae, x = coder(cls, decoders, dtype)
    sae.metadata = {"model_name": "a model"}
    fastsae.save(sae, tmp_path)
    again = fastsae.load(tmp_path)
    assert type(again) is cls
    assert not again.training
    assert again.config() == sae.config()
    assert again.metadata == sae.metadata
    for name, tensor in sae.state_dict().items():
        same = again.state_dict()[name]
        assert same.dtype == tensor.dtype
        if name == "log_threshold":  # the file has thresholds
            torch.testing.assert_close(same, tensor, rtol=0, atol=1e-6)
            again.log_threshold.data.copy_(tensor)
        else:
            assert torch.equal(same, tensor), name
    assert torch.equal(again(x), sae(x))
    assert torch.equal(again.encode(x), sae.encode(x))


@pytest.mark.parametrize("cls", [CrossLayerTranscoder, BatchTopKCrossLayerTranscoder])
def test_k_of_each_layer_comes_back(tmp_path, cls):
    sae, x = coder(cls, select="layer")
    fastsae.save(sae, tmp_path)
    again = fastsae.load(tmp_path)
    assert again.select == "layer"
    assert torch.equal(again(x), sae(x))
    if cls is BatchTopKCrossLayerTranscoder:
        assert again.threshold.shape == (L,)
        assert len(again.threshold.unique()) == L


@pytest.mark.parametrize("format", ["saelens", "sparsify", "dictionary-learning"])
def test_other_formats_have_no_place_for_it(tmp_path, format):
    sae, _ = coder(BatchTopKCrossLayerTranscoder)
    with pytest.raises(ValueError, match=r"^save: expected .* got BatchTopKCrossLayerTranscoder"):
        fastsae.save(sae, tmp_path / "x", format=format)
    assert not (tmp_path / "x").exists()
