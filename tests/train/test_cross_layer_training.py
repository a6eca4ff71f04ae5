"""The trainer finds a planted cross-layer transcoder, with every selection and kind of decoders."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

import fastsae
from fastsae import (
    BatchTopKCrossLayerTranscoder,
    CrossLayerTranscoder,
    JumpReLUCrossLayerTranscoder,
    ReLUCrossLayerTranscoder,
    TrainConfig,
    Trainer,
)

L, D, F, TRUE = 3, 16, 20, 10
SIZES = torch.tensor([1.0, 30, 5])
"""Of the layers: they are not alike in the units of the model."""
FITS = {"batch_size": 100, "epochs": 5, "progress": False}


def planted(n: int = 5000, *, own: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of sparse features next to what a cross-layer transcoder makes of them, and what each
    of its latents writes: [L, TRUE, L, D]."""
    torch.manual_seed(0)
    code = (torch.rand(n, L, TRUE) < 0.08) * (1 + torch.rand(n, L, TRUE))
    read = normalize(torch.randn(L, TRUE, D), dim=2)
    write = normalize(torch.randn(L, TRUE, L, D), dim=3)
    later = torch.eye(L) if own else torch.ones(L, L).triu()
    write = write * later[:, None, :, None]
    x = torch.einsum("nlf,lfd->nld", code, read) * SIZES[:, None] + 3
    y = torch.einsum("nlf,lfmd->nmd", code, write) * SIZES.flip(0)[:, None] - 1
    return torch.cat([x.flatten(1), y.flatten(1)], 1), write


def trained(sae, data, out=None, lr=3e-3):
    """The fraction of variance of held-out outputs that is left."""
    # A processor that multiplies bfloat16 would round, and come to another L0.
    config = TrainConfig(lr=lr, out=out, compute_dtype="float32", **FITS)
    return Trainer(sae, data[:4000], config, val=data[4000:]).fit().final["val_fvu"]


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (CrossLayerTranscoder, {}),
        (CrossLayerTranscoder, {"select": "layer", "k": 2}),
        (BatchTopKCrossLayerTranscoder, {}),
        (BatchTopKCrossLayerTranscoder, {"select": "layer", "k": 1.5}),
        (JumpReLUCrossLayerTranscoder, {}),
        (ReLUCrossLayerTranscoder, {"penalty": "tanh"}),
    ],
)
def test_a_planted_transcoder_is_found(cls, options, tmp_path):
    data, write = planted()
    options = {"k": 4, **options}
    untrained = trained(cls(D, L, F, **options), data, lr=1e-9)
    sae = cls(D, L, F, **options)
    assert trained(sae, data, tmp_path) < 0.4 < untrained - 0.1
    x, y, _ = sae.columns.split(data[4000:])
    left, total = (sae.layers(t).square().sum((0, 2)) for t in (y - sae(x), y - y.mean(0)))
    assert (left / total).max() < 0.6  # no layer is left to the others
    for layer in range(L):
        for later in range(layer, L):
            rows = normalize(sae.written(layer)[:, later - layer], dim=1)
            best = (rows @ write[layer, :, later].t()).amax(0)
            assert best.mean() > 0.75, (layer, later)
    k = sae.k * L if options.get("select") == "layer" else sae.k
    assert 0.4 * k < float(sae.encode_sparse(x).l0()) < 1.7 * k
    again = fastsae.load(tmp_path)
    assert type(again) is cls
    torch.testing.assert_close(again(x), sae(x))


@pytest.mark.parametrize(
    ("decoders", "lowest", "highest"),
    [("full", 0, 0.35), ("low_rank", 0, 0.4), ("tied", 0.5, 1), ("own", 0.5, 1)],
)
def test_what_decoders_can_write_shows(decoders, lowest, highest):
    """Two thirds of what the last layer puts out come from latents of earlier layers."""
    rank = 12 if decoders == "low_rank" else None
    sae = CrossLayerTranscoder(D, L, F, 4, decoders=decoders, rank=rank)
    assert lowest < trained(sae, planted()[0]) < highest


def test_own_decoders_are_enough_for_layers_that_write_alone():
    sae = CrossLayerTranscoder(D, L, F, 4, decoders="own")
    assert trained(sae, planted(own=True)[0]) < 0.35


@pytest.mark.parametrize("decoders", ["full", "own", "tied", "low_rank"])
def test_rows_keep_norm_1(decoders):
    data = planted(500)[0]
    rank = 4 if decoders == "low_rank" else None
    sae = CrossLayerTranscoder(D, L, F, 4, decoders=decoders, rank=rank)
    trainer = Trainer(sae, None, TrainConfig(batch_size=100, steps=10, lr=1e-2, progress=False))
    trainer.prepare(data)
    before = [W.detach().clone() for W in sae.W_decs]
    for _ in range(3):
        trainer.step(data[:100])
        norms = sae.decoder_norms()
        torch.testing.assert_close(norms, torch.ones_like(norms))
    assert all(not torch.equal(a, b) for a, b in zip(before, sae.W_decs, strict=True))


@pytest.mark.parametrize("alpha", [0.0, 1 / 32])
def test_the_auxiliary_loss_trains_latents_that_never_fire(alpha):
    data = planted(500)[0]
    sae = CrossLayerTranscoder(D, L, F, 1, auxk_alpha=alpha)
    config = TrainConfig(batch_size=100, steps=5, dead_after_tokens=100, progress=False)
    trainer = Trainer(sae, None, config)
    trainer.prepare(data)
    start = sae.W_enc_rows.detach().clone()
    silent = torch.ones(L * F, dtype=torch.bool)
    for _ in range(5):
        out = trainer.step(data[:100])
        silent &= ~out.acts.fired()
    assert (float(out.aux_loss) > 0) == (alpha > 0)
    moved = (sae.W_enc_rows != start).any(1)
    assert moved[~silent].all()
    assert bool(moved[silent].any()) == (alpha > 0)
