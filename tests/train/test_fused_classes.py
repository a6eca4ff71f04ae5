"""Every class is trained by the fused update as by autograd and torch's optimizer."""

import pytest
import torch

import fastsae
from fastsae import TrainConfig, Trainer, ops
from fastsae.nn.crosscoder import CrossCoderMixin
from fastsae.nn.transcoder import TranscoderMixin
from fastsae.ops import _tape
from fastsae.types import SparseActs, StepTensors

D, F, K = 12, 60, 4
CLASSES = {
    "TopK": (fastsae.TopKSAE, {}),
    "MultiTopK": (fastsae.TopKSAE, {"multi_topk": True}),
    "AbsTopK": (fastsae.TopKSAE, {"absolute": True}),
    "MultiAbsTopK": (fastsae.TopKSAE, {"absolute": True, "multi_topk": True}),
    "by norm": (fastsae.TopKSAE, {"select_by_decoder_norm": True, "multi_topk": True}),
    "uncentered": (fastsae.TopKSAE, {"apply_b_dec_to_input": False}),
    "BatchTopK": (fastsae.BatchTopKSAE, {}),
    "FeatureChoice": (fastsae.FeatureChoiceSAE, {}),
    "Sampled": (fastsae.SampledSAE, {}),
    "GroupMax": (fastsae.GroupMaxSAE, {}),
    "Matryoshka": (fastsae.MatryoshkaSAE, {}),
    "Hierarchical": (fastsae.HierarchicalTopKSAE, {}),
    "Gradient": (fastsae.GradientSAE, {}),
    "JumpReLU": (fastsae.JumpReLUSAE, {"auxk_alpha": 0.1}),
    "Gated": (fastsae.GatedSAE, {"auxk_alpha": 0.1}),
    "ReLU": (fastsae.ReLUSAE, {"auxk_alpha": 0.1}),
    "tanh": (fastsae.ReLUSAE, {"penalty": "tanh"}),
    "Transcoder": (fastsae.Transcoder, {}),
    "skip": (fastsae.Transcoder, {"skip": True, "multi_topk": True}),
    "BatchTopKTranscoder": (fastsae.BatchTopKTranscoder, {"skip": True}),
    "GroupMaxTranscoder": (fastsae.GroupMaxTranscoder, {}),
    "JumpReLUTranscoder": (fastsae.JumpReLUTranscoder, {}),
    "ReLUTranscoder": (fastsae.ReLUTranscoder, {"skip": True}),
    "CrossCoder": (fastsae.CrossCoder, {}),
    "ReLUCrossCoder": (fastsae.ReLUCrossCoder, {}),
}


def build(name, dtype=torch.float64):
    cls, options = CLASSES[name]
    sizes = (D, F)
    if issubclass(cls, CrossCoderMixin):
        sizes = (D // 3, 3, F)
    elif issubclass(cls, TranscoderMixin):
        sizes = (D, 7, F)
    return cls(*sizes, K, dtype=dtype, k_aux=16, **options)


def rows(sae, n=600):
    g = torch.Generator().manual_seed(5)
    basis = torch.randn(40, sum(sae.columns.widths), generator=g)
    return ((torch.rand(n, 40, generator=g) < 0.08).float() @ basis + 1).to(sae.W_dec.dtype)


def run(name, update, **settings):
    torch.manual_seed(1)
    sae = build(name)
    config = TrainConfig(
        batch_size=50, steps=12, lr=3e-3, dead_after_tokens=60, log_every=1, update=update,
        compute_dtype="float32", progress=False, sparsity_warmup_steps=0, **settings,
    )  # fmt: skip
    trainer = Trainer(sae, rows(sae), config)
    return trainer.fit()


@pytest.mark.parametrize("settings", [{}, {"clip_grad_norm": 0.02}, {"optimizer": "adam_mini"}])
@pytest.mark.parametrize("name", CLASSES)
def test_equals_autograd_in_float64(name, settings) -> None:
    fused, other = (run(name, update, **settings) for update in ("fused", "autograd"))
    # Where thresholds are float32, so is the number that clips them.
    tolerance = 1e-6 if "JumpReLU" in name and "clip_grad_norm" in settings else 1e-9
    expected = dict(other.sae.named_parameters())
    for parameter, p in fused.sae.named_parameters():
        torch.testing.assert_close(p, expected[parameter], rtol=tolerance, atol=tolerance)
        assert p.grad is None
    for mine, theirs in zip(fused.history, other.history, strict=True):
        assert mine["fvu"] == pytest.approx(theirs["fvu"], rel=1e-6)
        assert mine["aux_loss"] == pytest.approx(theirs["aux_loss"], rel=1e-6)
    if fused.sae.auxk_alpha and name not in ("Gated", "ReLU"):  # whose codes are large
        assert any(row["dead"] > 0 for row in fused.history)


@pytest.mark.parametrize("name", CLASSES)
def test_no_gradient_of_a_matrix_exists(name, monkeypatch) -> None:
    sae = build(name, torch.float32)
    trainer = Trainer(sae, rows(sae), TrainConfig(steps=3, batch_size=50, progress=False))
    given, step = [], ops.sparse_adam_step_

    def watched(*arguments, more_grads, **options):
        given.append(more_grads)
        return step(*arguments, more_grads=more_grads, **options)

    monkeypatch.setattr(ops, "sparse_adam_step_", watched)
    trainer.fit()
    assert trainer.steps_done == 3
    assert len(given) == 3
    assert all(g.W_enc is None and g.W_dec is None for g in given)


def parts():
    torch.manual_seed(0)
    sae = fastsae.TopKSAE(5, 20, 3, dtype=torch.float64)
    return sae, StepTensors(sae.W_enc_rows, sae.W_dec, sae.b_enc, sae.b_dec)


def test_a_tape_takes_what_a_backward_leaves_and_nothing_else() -> None:
    sae, parameters = parts()
    x = torch.randn(9, 5, dtype=torch.float64)
    expected = torch.autograd.grad(sae.loss(x).loss, parameters)
    with _tape.opened(parameters, centered=True) as tape:
        loss = sae.loss(x).loss
        unrecorded = torch.autograd.grad(loss, parameters, retain_graph=True)
        torch.testing.assert_close(unrecorded, expected)  # nobody's step yet
        with tape.recorded():
            twice = torch.autograd.grad(loss, parameters, create_graph=True)
            torch.testing.assert_close(twice, expected)  # part of somebody's loss
            assert not tape.encoder
            assert not tape.decoder
            grads = torch.autograd.grad(sae.loss(x).loss, parameters, allow_unused=True)
    assert grads[0] is grads[1] is grads[2] is None
    for sums, want in ((tape.encoder, expected[0]), (tape.decoder, expected[1])):
        (one,) = sums
        dense = SparseActs(one.values, one.indices, one.offsets, 20).to_dense()
        rows = one.x - sae.b_dec if sums is tape.encoder else one.x
        torch.testing.assert_close(dense.t() @ rows, want)
    torch.testing.assert_close(torch.autograd.grad(sae.loss(x).loss, parameters), expected)


def test_another_bias_or_matrix_keeps_its_gradient() -> None:
    sae, parameters = parts()
    x = torch.randn(9, 5, dtype=torch.float64)
    other = torch.zeros(20, dtype=torch.float64, requires_grad=True)
    with _tape.opened(parameters, centered=True) as tape, tape.recorded():
        out = ops.encode_topk(x, sae.W_enc_rows, other, 3, b_dec=sae.b_dec).values.sum()
        found = torch.autograd.grad(out, [sae.W_enc_rows, other, sae.b_dec])
        assert not tape.encoder
        out = ops.encode_topk(x, sae.W_enc_rows, sae.b_enc, 3).values.sum()
        found = torch.autograd.grad(out, [sae.W_enc_rows, sae.b_enc])
        assert not tape.encoder
        doubled = ops.encode_topk(x, 2 * sae.W_enc_rows, sae.b_enc, 3, b_dec=sae.b_dec)
        found = torch.autograd.grad(doubled.values.sum(), [sae.W_enc_rows, sae.b_enc, sae.b_dec])
        assert not tape.encoder
    assert all(bool(g.any()) for g in found)


def test_one_step_at_a_time() -> None:
    _, parameters = parts()
    again = _tape.opened(parameters, centered=True)
    expected = pytest.raises(RuntimeError, match="expected one step at a time")
    with _tape.opened(parameters, centered=True), expected:
        again.__enter__()
    with _tape.opened(parameters, centered=True):
        pass
