"""Training an SAE that was trained before, and settings whose types come from elsewhere."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import fastsae
from fastsae import TrainConfig, Trainer
from fastsae.data import TensorSource
from tests.interop.older import strip_checksums

D, F, K = 8, 32, 4
SAES = {
    cls.__name__: (lambda cls=cls: cls(D, F, K), D)
    for cls in (
        fastsae.TopKSAE, fastsae.BatchTopKSAE, fastsae.FeatureChoiceSAE, fastsae.MatryoshkaSAE,
        fastsae.JumpReLUSAE, fastsae.GatedSAE, fastsae.ReLUSAE, fastsae.GroupMaxSAE,
    )
}  # fmt: skip
SAES["Transcoder"] = (lambda: fastsae.Transcoder(D, 6, F, K, skip=True), D + 6)
SAES["CrossCoder"] = (lambda: fastsae.CrossCoder(D, 3, F, K), 3 * D)
SAES["CrossLayer"] = (lambda: fastsae.CrossLayerTranscoder(D, 2, F, K), 4 * D)
SAES["TiedCrossLayer"] = (
    lambda: fastsae.CrossLayerTranscoder(D, 2, F, K, decoders="tied"),
    4 * D,
)
SAES["JumpReLUCrossLayer"] = (lambda: fastsae.JumpReLUCrossLayerTranscoder(D, 2, F, K), 4 * D)


def data(width, n=1024):
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(width, width, generator=generator)
    return 5 * torch.randn(n, width, generator=generator).relu() @ mixing + 3


@pytest.mark.parametrize("name", SAES)
@pytest.mark.parametrize("start", ["geometric_median", "mean", "zeros"])
def test_a_step_of_no_size_changes_nothing(name, start):
    torch.manual_seed(0)
    make, width = SAES[name]
    sae, x = make(), data(width)
    Trainer(sae, x, TrainConfig(batch_size=128, steps=20)).fit()
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    config = TrainConfig(lr=1e-12, steps=1, batch_size=128, b_dec_init=start)
    Trainer(sae, x, config).fit()
    for name, p in sae.named_parameters():
        if name != "log_threshold":  # every batch moves that towards k
            torch.testing.assert_close(p, before[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("name", SAES)
def test_preparing_and_finishing_changes_nothing(name):
    """Scaling an SAE and scaling it back are inverse, also where matrices change."""
    torch.manual_seed(0)
    make, width = SAES[name]
    sae, x = make(), data(width)
    Trainer(sae, x, TrainConfig(batch_size=128, steps=5)).fit()
    given = sae.columns.split(x[:7]).x
    before = sae(given)
    trainer = Trainer(sae, x, TrainConfig(batch_size=128, steps=5))
    trainer.prepare()
    assert trainer.scaler.scales != [1.0] * len(trainer.scaler.scales)
    trainer.finish()
    torch.testing.assert_close(sae(given), before, rtol=1e-4, atol=1e-4)


def test_a_fresh_module_starts_from_the_data():
    x = data(D)
    sae = fastsae.TopKSAE(D, F, K)
    Trainer(sae, x, TrainConfig(lr=1e-12, steps=1, batch_size=128, b_dec_init="mean")).fit()
    torch.testing.assert_close(sae.b_dec, x.mean(0), rtol=0.1, atol=0.1)


def test_numbers_from_numpy_are_numbers(tmp_path):
    sae = fastsae.BatchTopKSAE(np.int64(D), np.int32(F), np.float32(4), k_aux=np.int64(2))
    config = TrainConfig(
        batch_size=np.int64(64), steps=np.int32(3), lr=np.float64(1e-3), seed=np.uint32(1),
        betas=(np.float32(0.5), torch.tensor(0.75)), out=tmp_path,
    )  # fmt: skip
    Trainer(sae, data(D), config).fit()
    assert json.loads((tmp_path / "cfg.json").read_text())["d_sae"] == F
    assert type(fastsae.load(tmp_path).k) is float
    Trainer(fastsae.BatchTopKSAE(D, F, 4.0, k_aux=2), data(D), config).fit(resume=True)


def test_what_cannot_be_saved_is_refused_before_the_first_update(tmp_path):
    sae = fastsae.TopKSAE(D, F, K)
    before = sae.W_dec.detach().clone()
    sae.metadata["layer"] = object()
    with pytest.raises(TypeError, match=r"^save: expected metadata and arguments of TopKSAE to be"):
        Trainer(sae, data(D), TrainConfig(batch_size=64, steps=3, out=tmp_path)).fit()
    assert torch.equal(sae.W_dec, before)
    assert not list(tmp_path.iterdir())


def test_a_sample_is_no_stride():
    """8,192 contexts of 128 rows each: a sample of 8,192 rows holds about all 128 positions."""
    source = TensorSource(torch.arange(8192 * 128.0)[:, None])
    positions = (source.sample(8192) % 128).unique()
    assert len(positions) == 128  # the chance that one of them is missing is 1e-26
    assert len(source.sample(8192).unique()) == 8192


def test_a_folder_edited_elsewhere_is_refused(tmp_path):
    fastsae.save(fastsae.TopKSAE(D, F, K), tmp_path)
    strip_checksums(tmp_path)
    file = tmp_path / "cfg.json"
    for key, value in (("k", 6), ("dtype", "float64"), ("apply_b_dec_to_input", False)):
        cfg = json.loads(file.read_text())
        kept = cfg[key]
        cfg[key] = value
        file.write_text(json.dumps(cfg))
        with pytest.raises(ValueError, match=rf"^load: expected .*{key}.* got .*; change both, or"):
            fastsae.load(tmp_path)
        file.write_text(json.dumps(cfg | {key: kept}))
    assert fastsae.load(tmp_path).k == K


@pytest.mark.parametrize("decoders", ["full", "tied", "low_rank", None])
def test_layers_of_different_size_are_trained_again_from_where_they_were(decoders, caplog):
    """Rows have norm 1 in the units of training, and other norms in those of the model."""
    torch.manual_seed(0)
    if decoders is None:
        sae, sizes = fastsae.TopKCrossCoder(D, 4, F, K), [1, 30, 5, 0.1]
    else:
        rank = 4 if decoders == "low_rank" else None
        sae = fastsae.CrossLayerTranscoder(D, 2, F, K, decoders=decoders, rank=rank)
        sizes = [1, 30, 5, 0.1]
    x = data(4 * D) * torch.tensor(sizes).repeat_interleave(D)
    Trainer(sae, x, TrainConfig(batch_size=128, steps=20, progress=False)).fit()
    given = sae.columns.split(x[:20]).x
    before = sae(given)
    if decoders != "tied":  # whose scales are apart
        assert (sae.decoder_norms() - 1).abs().max() > 0.5
    Trainer(sae, x, TrainConfig(lr=1e-12, steps=1, batch_size=128, progress=False)).fit()
    scale = before.abs().mean(0)
    torch.testing.assert_close(sae(given) / scale, before / scale, rtol=1e-3, atol=1e-3)
    assert "have norms from" not in caplog.text
