"""Cross-layer transcoders against a dense one: every selection, every kind of decoders."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastsae import (
    BatchTopKCrossLayerTranscoder,
    BatchTopKTranscoder,
    CrossLayerTranscoder,
    JumpReLUCrossLayerTranscoder,
    JumpReLUTranscoder,
    ReLUCrossLayerTranscoder,
    ReLUTranscoder,
    Transcoder,
    reference,
)
from fastsae.nn import ActivationScaler, StepContext
from fastsae.nn.layer_decoders import DECODERS
from tests.nn.randomized import make, rows

L, D, F, N = 4, 5, 12, 30
TOPK = (CrossLayerTranscoder, "token"), (CrossLayerTranscoder, "layer")
BATCH = (BatchTopKCrossLayerTranscoder, "token"), (BatchTopKCrossLayerTranscoder, "layer")
PENALIZED = (JumpReLUCrossLayerTranscoder, "token"), (ReLUCrossLayerTranscoder, "token")
EVERY = pytest.mark.parametrize(("cls", "select"), [*TOPK, *BATCH, *PENALIZED])
KINDS = pytest.mark.parametrize("decoders", DECODERS)


def coder(cls, select="token", decoders="full", *, layers=L, k=3, **kwargs):
    """One with random numbers everywhere; output scales of tied decoders differ too."""
    rank = 2 if decoders == "low_rank" else None
    sae = make(cls, D, layers, F, k, select=select, decoders=decoders, rank=rank, **kwargs)
    if decoders == "tied":
        sae.output_scale.uniform_(0.5, 2)
    return sae


def dense_parts(sae):
    """The parameters as the reference takes them; all in the graph of those of `sae`."""
    size = (sae.n_layers, F)
    W_dec = reference.cross_layer_decoder(
        list(sae.W_decs),
        sae.decoders,
        list(sae.W_maps) if sae.decoders == "low_rank" else None,
        sae.output_scale if sae.decoders == "tied" else None,
    )
    return sae.W_enc_rows.unflatten(0, size), sae.b_enc.unflatten(0, size), W_dec


def dense_loss(sae, x, y):
    """The training loss, the code and the outputs, in the reference; no auxiliary loss."""
    W_enc, b_enc, W_dec = dense_parts(sae)
    z = reference.cross_layer_pre_activations(sae.layers(x), W_enc, b_enc)
    penalty = 0.0
    if isinstance(sae, CrossLayerTranscoder):
        f = reference.cross_layer_topk(z, sae.k, sae.select)
    elif isinstance(sae, BatchTopKCrossLayerTranscoder):
        f, _ = reference.cross_layer_batch_topk(z, sae.k, sae.select)
    elif isinstance(sae, JumpReLUCrossLayerTranscoder):
        threshold = (sae.unit * sae.log_threshold.exp()).unflatten(0, (sae.n_layers, F))
        f, active = reference.cross_layer_jumprelu(z, threshold, float(sae.bandwidth * sae.unit))
        penalty = sae.coefficient * active.sum() / len(x) / (sae.n_layers * D)
    else:
        f = z.relu()
        paid = (f / sae.unit).tanh() if sae.penalty == "tanh" else f / sae.unit
        penalty = sae.coefficient * paid.sum() / len(x) / (sae.n_layers * D)
    y_hat = reference.cross_layer_outputs(f, W_dec, sae.layers(sae.b_dec))
    return reference.cross_layer_fvu(y_hat, sae.layers(y)) + penalty, f, y_hat


def settled(sae, x, y):
    """Run what a first batch measures, so that later losses depend on nothing else."""
    if hasattr(sae, "unit"):
        sae.loss(x, y)
        sae.k = None
    if isinstance(sae, JumpReLUCrossLayerTranscoder):  # some are open, some near, some shut
        sae.log_threshold.data.uniform_(-2, 0)
        sae.bandwidth = 0.4
    return sae


def gradients(loss, sae):
    return dict(
        zip(
            [name for name, _ in sae.named_parameters()],
            torch.autograd.grad(loss, list(sae.parameters())),
            strict=True,
        )
    )


@KINDS
@EVERY
def test_values_and_all_gradients_are_those_of_a_dense_one(cls, select, decoders):
    sae = coder(cls, select, decoders)
    x, y = rows(N, L * D), rows(N, L * D)
    settled(sae, x, y)
    out = sae.loss(x, y)
    loss, f, y_hat = dense_loss(sae, x, y)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(out.loss, loss, **close)
    torch.testing.assert_close(out.acts.to_dense(), f.flatten(1), **close)
    torch.testing.assert_close(out.reconstruction, y_hat.flatten(1), **close)
    assert out.acts.indices.dtype == torch.int32
    assert 0.5 < float(out.acts.l0()) < L * F - 1
    ours, theirs = gradients(out.loss, sae), gradients(loss, sae)
    for name, expected in theirs.items():
        assert expected.abs().max() > 0, name
        bound = 1e-6 if name == "log_threshold" else 1e-12  # that one is float32 by itself
        torch.testing.assert_close(
            ours[name], expected, rtol=bound, atol=bound, msg=lambda m, n=name: f"{n}: {m}"
        )


@EVERY
def test_float32_is_near_float64(cls, select):
    exact = settled(coder(cls, select), x := rows(N, L * D), y := rows(N, L * D))
    single = settled(coder(cls, select).float(), x.float(), y.float())
    single.load_state_dict(exact.state_dict())
    a, b = exact.loss(x, y), single.loss(x.float(), y.float())
    torch.testing.assert_close(b.loss.double(), a.loss, rtol=1e-5, atol=1e-5)
    ours, theirs = gradients(b.loss, single), gradients(a.loss, exact)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name].double(), expected.double(), rtol=1e-4, atol=1e-4)


def test_the_tanh_penalty_is_the_written_one():
    sae = coder(ReLUCrossLayerTranscoder, penalty="tanh", coefficient=2.0)
    x, y = rows(N, L * D), rows(N, L * D)
    settled(sae, x, y)
    torch.testing.assert_close(sae.loss(x, y).loss, dense_loss(sae, x, y)[0], rtol=1e-12, atol=0)


def test_more_latents_for_multi_topk():
    sae, x, y = coder(CrossLayerTranscoder, multi_topk=True), rows(N, L * D), rows(N, L * D)
    loss = sae.loss(x, y).loss
    narrow = dense_loss(sae, x, y)[0]
    sae.k = 12
    wide = dense_loss(sae, x, y)[0]
    torch.testing.assert_close(loss, narrow + wide / 8, rtol=1e-12, atol=0)


@pytest.mark.parametrize("select", ["token", "layer"])
@pytest.mark.parametrize("cls", [CrossLayerTranscoder, BatchTopKCrossLayerTranscoder])
def test_equal_pre_activations_go_to_the_lowest_latent(cls, select):
    """Small integers: most entries are equal to others, in their layer and across layers."""
    torch.manual_seed(1)
    sae = cls(D, L, F, 3, select=select, dtype=torch.float64)
    with torch.no_grad():
        sae.W_enc_rows.copy_(torch.randint(-1, 2, sae.W_enc_rows.shape))
    x = torch.randint(-1, 2, (N, L * D)).double()
    W_enc, b_enc, _ = dense_parts(sae)
    z = reference.cross_layer_pre_activations(sae.layers(x), W_enc, b_enc)
    rule = (
        reference.cross_layer_topk
        if cls is CrossLayerTranscoder
        else lambda *given: reference.cross_layer_batch_topk(*given)[0]
    )
    assert torch.equal(sae.encode(x), rule(z, 3, select).flatten(1))
    assert len(z.unique()) < 15


@pytest.mark.parametrize("k", [1, F, F + 3, L * F])
@pytest.mark.parametrize("cls", [CrossLayerTranscoder, BatchTopKCrossLayerTranscoder])
def test_k_may_be_more_than_a_layer_has(cls, k):
    sae, x = coder(cls, k=k), rows(N, L * D)
    W_enc, b_enc, _ = dense_parts(sae)
    z = reference.cross_layer_pre_activations(sae.layers(x), W_enc, b_enc)
    f = (
        reference.cross_layer_topk(z, k)
        if cls is CrossLayerTranscoder
        else reference.cross_layer_batch_topk(z, k)[0]
    )
    torch.testing.assert_close(sae.encode(x), f.flatten(1), rtol=1e-12, atol=1e-12)


PAIRS = [
    (CrossLayerTranscoder, Transcoder),
    (BatchTopKCrossLayerTranscoder, BatchTopKTranscoder),
    (JumpReLUCrossLayerTranscoder, JumpReLUTranscoder),
    (ReLUCrossLayerTranscoder, ReLUTranscoder),
]


@pytest.mark.parametrize("decoders", ["full", "own", "tied"])
@pytest.mark.parametrize(("cls", "single"), PAIRS)
def test_one_layer_is_a_transcoder(cls, single, decoders):
    clt = make(cls, D, 1, F, 3, decoders=decoders)
    coder = single(D, D, F, 3, dtype=torch.float64)
    state = {name.replace("W_decs.0", "W_dec"): t for name, t in clt.state_dict().items()}
    state.pop("output_scale", None)
    coder.load_state_dict(state)
    x, y = rows(N, D), rows(N, D)
    for _ in range(2):  # thresholds and coefficients move alike as well
        a, b = clt.loss(x, y), coder.loss(x, y)
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.acts.to_dense(), b.acts.to_dense(), rtol=1e-12, atol=1e-12)
    ours = {n.replace("W_decs.0", "W_dec"): g for n, g in gradients(a.loss, clt).items()}
    for name, expected in gradients(b.loss, coder).items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-12, atol=1e-12)
    assert clt.k_aux == coder.k_aux
    clt.eval(), coder.eval()
    torch.testing.assert_close(clt(x), coder(x), rtol=1e-12, atol=1e-12)


def test_own_decoders_are_transcoders_side_by_side():
    sae, x, y = coder(CrossLayerTranscoder, "layer", "own"), rows(N, L * D), rows(N, L * D)
    out = sae.loss(x, y)
    for layer in range(L):
        single = Transcoder(D, D, F, 3, dtype=torch.float64)
        part = sae.dictionaries[layer]
        single.W_enc, single.b_enc = part.W_enc.t(), part.b_enc
        single.W_dec, single.b_dec = part.W_dec, sae.layers(sae.b_dec)[layer]
        given = sae.layers(x)[:, layer].contiguous()
        torch.testing.assert_close(sae.layers(out.reconstruction)[:, layer], single(given))


@KINDS
def test_dead_latents_reconstruct_together_what_is_left(decoders):
    sae = coder(CrossLayerTranscoder, "token", decoders, k=1, k_aux=2, auxk_alpha=0.5)
    x, y = rows(N, L * D), rows(N, L * D)
    dead = torch.zeros(L * F, dtype=torch.bool)
    dead[:5] = True  # of layer 0
    dead[2 * F] = True  # one of layer 2, where two are asked for
    out = sae.loss(x, y, context=StepContext(dead=dead))
    W_enc, b_enc, W_dec = dense_parts(sae)
    z = reference.cross_layer_pre_activations(sae.layers(x), W_enc, b_enc)
    masked = z.masked_fill(~dead.unflatten(0, (L, F)), -torch.inf)
    chosen = torch.zeros_like(z).scatter(2, masked.topk(2, dim=2).indices, 1.0)
    f = torch.where((chosen > 0) & dead.unflatten(0, (L, F)), z.relu(), 0)
    left = (sae.layers(y) - sae.layers(out.reconstruction)).detach()
    aux = reference.cross_layer_fvu(reference.cross_layer_outputs(f, W_dec), left)
    torch.testing.assert_close(out.aux_loss, aux, rtol=1e-12, atol=1e-12)
    expected = dense_loss(sae, x, y)[0] + aux / 2
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=1e-12)
    theirs = gradients(expected, sae)
    for name, gradient in gradients(out.loss, sae).items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-11, atol=1e-12)
    alive = StepContext(dead=torch.zeros(L * F, dtype=torch.bool))
    assert float(sae.loss(x, y, context=alive).aux_loss) == 0
    off = coder(CrossLayerTranscoder, "token", decoders, k=1, auxk_alpha=0)
    assert float(off.loss(x, y, context=StepContext(dead=dead)).aux_loss) == 0
    with pytest.raises(ValueError, match=r"expected dead to be bool \[48\], got torch.bool \[3\]"):
        sae.loss(x, y, context=replace(alive, dead=dead[:3]))


@KINDS
@EVERY
def test_scales_of_layers_fold_away(cls, select, decoders):
    a, b = (coder(cls, select, decoders) for _ in range(2))
    if decoders == "tied":
        b.output_scale.copy_(a.output_scale)
    scales = [2.0, 8, 0.5, 3, 0.1, 7, 1.5, 30]
    scaler = ActivationScaler(a.columns, scales)
    x, y = rows(N, L * D), rows(N, L * D)
    given, wanted, _ = a.columns.split(scaler.scale(torch.cat([x, y], 1)))
    for sae in (a, b):
        sae.loss(given, wanted)
        if cls is BatchTopKCrossLayerTranscoder:  # its threshold is the value of an entry, rounded
            sae.threshold *= 0.99
    scaler.fold_(b)
    a.eval(), b.eval()
    torch.testing.assert_close(b(x), scaler.unscale_target(a(given)))
    torch.testing.assert_close(b.encode(x), a.encode(given) / scaler.code_scale)
    scaler.unfold_(b)
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda m, n=name: f"{n}: {m}")


@KINDS
def test_a_latent_writes_rows_of_norm_1_together(decoders):
    sae = coder(CrossLayerTranscoder, decoders=decoders)
    before = dense_parts(sae)[2]
    counted = sae.W_decs[2] if decoders == "tied" else before[2]
    torch.testing.assert_close(sae.decoder_norms()[2 * F : 3 * F], counted.flatten(1).norm(dim=1))
    with torch.no_grad():
        sae.W_decs[1][3] = 0
    sae.normalize_decoder_()
    norms = sae.decoder_norms()
    assert norms[F + 3] == 0
    norms[F + 3] = 1
    torch.testing.assert_close(norms, torch.ones_like(norms))
    x, y = rows(N, L * D), rows(N, L * D)
    sae.loss(x, y).loss.backward()
    sae.remove_parallel_grad_()
    for W in sae.W_decs:
        along = (W.grad * W).sum(1)
        torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-12)
        assert W.grad.abs().max() > 0


@KINDS
def test_what_is_written_is_what_decoding_adds(decoders):
    sae = coder(CrossLayerTranscoder, decoders=decoders)
    code = torch.zeros(L * F, L * F, dtype=torch.float64).fill_diagonal_(1.0)
    each = sae.layers(sae.decode(code) - sae.b_dec)
    for layer in range(L):
        got = sae.written(layer)
        assert got.shape == (F, L - layer, D)
        torch.testing.assert_close(got, each[layer * F : (layer + 1) * F, layer:])
        assert not each[layer * F : (layer + 1) * F, :layer].any()


def test_folding_norms_changes_nothing_of_a_jumprelu():
    sae = coder(JumpReLUCrossLayerTranscoder).eval()
    x = rows(N, L * D)
    before, code = sae(x), sae.encode(x)
    norms = sae.decoder_norms()
    assert sae.fold_decoder_norm_()
    torch.testing.assert_close(sae(x), before)
    torch.testing.assert_close(sae.encode(x), code * norms)
    assert not coder(CrossLayerTranscoder).fold_decoder_norm_()


@EVERY
def test_tokens_of_any_number(cls, select):
    sae = coder(cls, select)
    x, y = rows(6, L * D), rows(6, L * D)
    settled(sae, x, y)
    sae.loss(x, y)
    sae.eval()
    assert sae(x.reshape(2, 3, L * D)).shape == (2, 3, L * D)
    torch.testing.assert_close(sae(x[:1]), sae(x)[:1], rtol=1e-12, atol=1e-12)
    none = sae.encode_sparse(x[:0])
    assert none.shape == (0, L * F)
    assert sae.decode(none).shape == (0, L * D)
    sae.train()
    assert sae.encode_sparse(x[:0]).shape == (0, L * F)


@pytest.mark.parametrize("select", ["token", "layer"])
def test_thresholds_of_batch_topk_are_calibrated(select):
    sae, x, y = coder(BatchTopKCrossLayerTranscoder, select), rows(400, L * D), rows(400, L * D)
    W_enc, b_enc, _ = dense_parts(sae)
    with pytest.raises(RuntimeError, match="expected a threshold in eval mode, got none yet"):
        sae.eval()(x)
    sae.train().loss(x, y)
    z = reference.cross_layer_pre_activations(sae.layers(x), W_enc, b_enc)
    smallest = reference.cross_layer_batch_topk(z, 3, select)[1]
    torch.testing.assert_close(sae.threshold.double(), smallest.detach(), rtol=1e-6, atol=0)
    assert sae.threshold.shape == (() if select == "token" else (L,))
    sae.threshold.fill_(100)
    sae.estimate_threshold_([x[:200], x[200:]])
    halves = [reference.cross_layer_batch_topk(half, 3, select)[1] for half in z.split(200)]
    mean = torch.stack(halves).mean(0).detach()
    torch.testing.assert_close(sae.threshold.double(), mean, rtol=1e-6, atol=0)
    sae.threshold.fill_(100)
    sae.calibrate_(x)
    sae.eval()
    kept = (z > sae.threshold.reshape(1, -1, 1)) * z
    torch.testing.assert_close(sae.encode(x), kept.flatten(1).detach())
    per_layer = sae.encode_sparse(x).counts().view(L, F).sum(1) / 400
    expected = per_layer.sum() if select == "token" else per_layer
    torch.testing.assert_close(expected, torch.full_like(expected, 3.0), rtol=0.01, atol=0)


def test_thresholds_of_jumprelu_start_and_are_calibrated_at_k():
    sae, x, y = coder(JumpReLUCrossLayerTranscoder), rows(400, L * D), rows(400, L * D)
    started = float(sae.loss(x, y).acts.l0())
    torch.manual_seed(2)
    sae.log_threshold.data += torch.rand(L * F)
    ratio = sae.threshold / sae.threshold[0]
    sae.calibrate_(x)
    sae.eval()
    assert float(sae.encode_sparse(x).l0()) == pytest.approx(3, abs=0.01)
    assert started == pytest.approx(3, abs=0.05)
    torch.testing.assert_close(sae.threshold / sae.threshold[0], ratio)


def test_parameters_lie_as_said():
    sae = coder(CrossLayerTranscoder)
    assert [tuple(W.shape) for W in sae.W_decs] == [(F, 20), (F, 15), (F, 10), (F, 5)]
    assert sum(p.numel() for p in sae.parameters()) == L * F * (D + 1) + 10 * F * D + L * D
    for layer, part in enumerate(sae.dictionaries):
        assert part.W_enc.data_ptr() == sae.W_enc_rows[layer * F].data_ptr()
        assert part.b_enc.data_ptr() == sae.b_enc[layer * F].data_ptr()
        assert part.W_dec is sae.W_decs[layer]
        assert part.W_enc.is_contiguous()
    counts = {kind: sum(W.numel() for W in coder(CrossLayerTranscoder, decoders=kind).W_decs)
              for kind in DECODERS}  # fmt: skip
    assert counts == {"full": 600, "own": 240, "tied": 240, "low_rank": 96}
    meta = CrossLayerTranscoder(D, L, F, 3, decoders="low_rank", rank=2, device="meta")
    assert all(p.is_meta for p in meta.parameters())


def test_casts_leave_what_selection_depends_on():
    sae, x, y = coder(BatchTopKCrossLayerTranscoder), rows(N, L * D), rows(N, L * D)
    sae.loss(x, y)
    before = sae.threshold.clone()
    sae = sae.to(torch.bfloat16)
    assert torch.equal(sae.threshold, before)
    assert sae.eval()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_layers": 0}, "n_layers to be an integer >= 1, got 0"),
        ({"d_model": 2.5}, "d_model to be an integer >= 1, got 2.5"),
        ({"d_transcoder": -1}, "d_transcoder to be an integer >= 1, got -1"),
        ({"k": 49}, "k to be an integer in 1..d_sae = 48, got k = 49"),
        ({"k": 13, "select": "layer"},
         "k <= d_transcoder = 12 for select='layer', got k = 13"),
        ({"select": "batch"}, "select to be token or layer, got 'batch'"),
        ({"decoders": "none"}, "decoders to be one of full, own, tied, low_rank, got 'none'"),
        ({"decoders": "low_rank"}, "rank to be an integer in 1..d_model = 5, got None"),
        ({"decoders": "low_rank", "rank": 6}, "rank to be an integer in 1..d_model = 5, got 6"),
        ({"rank": 2}, "rank for decoders='low_rank' alone, got 2 for 'full'"),
        ({"k_aux": 13}, "1 <= k_aux <= d_transcoder = 12, got k_aux = 13"),
        ({"apply_b_dec_to_input": True},
         "apply_b_dec_to_input to be False, as b_dec is of the outputs, got True"),
        ({"absolute": True}, "absolute to be False, got True"),
        ({"select_by_decoder_norm": True}, "select_by_decoder_norm to be False, got True"),
    ],
)  # fmt: skip
def test_errors_of_the_constructor_say_what_was_expected(arguments, message):
    given = {"d_model": D, "n_layers": L, "d_transcoder": F, "k": 3, **arguments}
    with pytest.raises(
        ValueError, match=f"^{re.escape(f'CrossLayerTranscoder: expected {message}')}$"
    ):
        CrossLayerTranscoder(**given)


def test_what_it_does_not_take():
    sae = coder(CrossLayerTranscoder)
    x = rows(N, L * D)
    with pytest.raises(ValueError, match=r"expected x to be \[..., d_in\] with d_in = 20"):
        sae(x[:, :5])
    with pytest.raises(ValueError, match="expected a target, the outputs of all layers, got None"):
        sae.loss(x)
    with pytest.raises(ValueError, match=r"target to be \[..., d_out\] with d_out = 20, got"):
        sae.loss(x, x[:, :5])
    with pytest.raises(ValueError, match="a decoder for each layer, W_decs, got one that reads"):
        _ = sae.W_dec
    with pytest.raises(ValueError, match=r"acts to be \[..., d_sae\] with d_sae = 48"):
        sae.decode(torch.ones(3, F, dtype=torch.float64))
    with pytest.raises(ValueError, match="expected select='token', as latents have thresholds"):
        JumpReLUCrossLayerTranscoder(D, L, F, 3, select="layer")
    sae.W_decs[1].requires_grad_(False)
    with pytest.raises(ValueError, match="all or none of W_decs to be frozen, got some"):
        _ = sae.trains_decoder


class Largest(TorchDispatchMode):
    """Remembers the most numbers of a tensor that an op returned."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.numbers = max(self.numbers, t.numel())
        return out


@KINDS
@pytest.mark.parametrize("cls", [CrossLayerTranscoder, BatchTopKCrossLayerTranscoder])
def test_nothing_is_dense_or_padded(cls, decoders):
    """Neither codes [n, L f], nor decoders with room for all layers, forwards or backwards."""
    layers, d, f, n = 8, 4, 400, 64
    rank = 2 if decoders == "low_rank" else None
    sae = cls(d, layers, f, 6, decoders=decoders, rank=rank)
    x, y = torch.randn(n, layers * d), torch.randn(n, layers * d)
    dead = torch.rand(layers * f) < 0.5
    with Largest() as seen:
        sae.loss(x, y, context=StepContext(dead=dead)).loss.backward()
    held = max(p.numel() for p in sae.parameters())
    assert seen.numbers <= max(held, n * layers * max(d, sae.k, sae.k_aux))
    assert seen.numbers < min(n * layers * f, layers * f * layers * d) / 4


def test_rows_start_where_the_data_are():
    """With y = x, what a latent writes to every layer is what a latent of that layer reads."""
    sae = CrossLayerTranscoder(D, L, F, 3, dtype=torch.float64)
    x = rows(200, L * D)
    sae.initialize_rows_(torch.cat([x, x], 1), seed=3)
    read = sae.W_enc_rows.unflatten(0, (L, F))
    torch.testing.assert_close(read.norm(dim=2), torch.ones(L, F, dtype=torch.float64))
    for layer in range(L):
        written = sae.written(layer) * (L - layer) ** 0.5
        torch.testing.assert_close(written, read[layer:].transpose(0, 1))
    assert sae.start_rows == F
    sae.initialize_from_data_(torch.cat([x + 5, x - 2], 1), "mean")
    torch.testing.assert_close(sae.b_dec, x.mean(0) - 2)
    z = torch.einsum("ld,lfd->lf", sae.layers((x + 5).mean(0)), read) + sae.b_enc.view(L, F)
    torch.testing.assert_close(z, torch.zeros_like(z), rtol=0, atol=1e-9)


@pytest.mark.parametrize("cls", [CrossLayerTranscoder, BatchTopKCrossLayerTranscoder])
def test_compiled_and_exported_it_is_the_same(cls):
    torch.compiler.reset()
    sae = coder(cls, auxk_alpha=0.1)
    x, y = rows(N, L * D), rows(N, L * D)
    sae.loss(x, y)
    context = StepContext(dead=torch.arange(L * F) % 3 == 0)

    def loss(x, y):
        return sae.loss(x, y, context=context).loss

    whole = torch.compile(loss, fullgraph=True, backend="aot_eager")
    state = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    eager = gradients(loss(x, y), sae)
    sae.load_state_dict(state)
    for name, gradient in gradients(whole(x, y), sae).items():
        torch.testing.assert_close(gradient, eager[name], msg=lambda m, n=name: f"{n}: {m}")
    sae.eval()
    exported = torch.export.export(sae, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    for n in (2, 9, N):
        torch.testing.assert_close(exported.module()(x[:n]), sae(x[:n]))
