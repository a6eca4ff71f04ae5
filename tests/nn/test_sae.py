"""What every SAE class shares: parameters and their layout, checks, decoder geometry, folding."""

import copy
import re

import pytest
import torch

from fastsae import ops
from fastsae.nn import ActivationScaler, BatchTopKSAE, MutualChoiceSAE, TopKSAE

CLASSES = [TopKSAE, BatchTopKSAE]
both = pytest.mark.parametrize("cls", CLASSES)


def feature_major(t):
    return t.shape == (16, 48) and t.t().is_contiguous()


@both
def test_starts_tied_with_unit_rows_and_zero_biases(cls):
    sae = cls(16, 48, k=4)
    assert torch.equal(sae.W_enc, sae.W_dec.t())
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(48))
    assert sae.b_enc.abs().max() == 0
    assert sae.b_dec.abs().max() == 0
    assert [*sae.W_enc.shape, *sae.W_dec.shape] == [16, 48, 48, 16]


@pytest.mark.parametrize(
    ("d_in", "d_sae", "k_aux"),
    [(768, 4096, 512), (576, 2304, 256), (512, 999, 256), (768, 100, 100)],
)
def test_default_aux_k_is_the_power_of_two_closest_to_half_the_width(d_in, d_sae, k_aux):
    assert TopKSAE(d_in, d_sae, k=4).k_aux == k_aux


def test_the_dtype_is_that_of_torch_unless_it_is_given():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        sae = BatchTopKSAE(16, 48, k=4)
    finally:
        torch.set_default_dtype(before)
    assert {p.dtype for p in sae.parameters()} == {torch.float64}
    assert sae.threshold.dtype == torch.float32
    assert BatchTopKSAE(16, 48, k=4, dtype=torch.bfloat16).W_dec.dtype == torch.bfloat16


def test_W_enc_stays_feature_major():
    sae = TopKSAE(16, 48, k=4)
    adam = torch.optim.Adam(sae.parameters(), fused=True)
    sae.loss(torch.randn(8, 16)).loss.backward()
    assert sae.W_enc_rows.is_contiguous()
    assert feature_major(sae.W_enc_rows.grad.t())
    adam.step()
    state = adam.state[sae.W_enc_rows]
    assert all(feature_major(state[key].t()) for key in ("exp_avg", "exp_avg_sq"))
    other = TopKSAE(16, 48, k=4)
    other.load_state_dict(copy.deepcopy(sae.state_dict()))
    assert torch.equal(other.W_enc, sae.W_enc)
    for module in (sae, other, copy.deepcopy(sae), copy.deepcopy(sae).to(torch.bfloat16)):
        assert feature_major(module.W_enc)


def test_a_row_major_W_enc_gives_the_same_code():
    sae = TopKSAE(16, 48, k=4)
    x = torch.randn(8, 16)
    before = sae.encode(x)
    state = sae.state_dict()
    state["W_enc_rows"] = state["W_enc_rows"].t().contiguous().t()
    sae.load_state_dict(state, assign=True)
    assert sae.W_enc.is_contiguous()
    assert not sae.W_enc_rows.is_contiguous()
    torch.testing.assert_close(sae.encode(x), before)


def test_a_state_dict_with_the_matrix_of_the_papers_is_converted():
    sae, other = TopKSAE(16, 48, k=4), TopKSAE(16, 48, k=4)
    state = sae.state_dict()
    assert "W_enc" not in state
    state["W_enc"] = state.pop("W_enc_rows").t().contiguous()
    other.load_state_dict(state)
    assert torch.equal(other.W_enc, sae.W_enc)
    assert other.W_enc_rows.is_contiguous()


@pytest.mark.parametrize("name", ["W_enc", "W_enc_rows", "W_dec", "b_enc", "b_dec"])
def test_assigning_a_tensor_copies_it_into_the_parameter(name):
    sae = TopKSAE(16, 48, k=4)
    held = "W_enc_rows" if name == "W_enc" else name
    parameter, before = getattr(sae, held), getattr(sae, name)
    value = torch.randn_like(before).contiguous()
    setattr(sae, name, value)
    assert getattr(sae, held) is parameter
    assert torch.equal(before, value)  # a view, or the parameter itself
    assert torch.equal(getattr(sae, name), value)
    assert feature_major(sae.W_enc)
    with pytest.raises(ValueError, match=rf"TopKSAE: expected {name} to be \[.*\], got \[7, 3\]"):
        setattr(sae, name, torch.zeros(7, 3))


def test_assigning_a_parameter_replaces_it():
    a, b = TopKSAE(16, 48, k=4), TopKSAE(16, 48, k=4)
    a.W_dec = b.W_dec
    assert a.W_dec is b.W_dec


@both
def test_leading_dimensions_are_flattened(cls):
    sae = cls(16, 48, k=4)
    x = torch.randn(3, 5, 16)
    flat = x.reshape(15, 16)
    assert sae.encode(x).shape == (3, 5, 48)
    assert torch.equal(sae.encode(x).reshape(15, 48), sae.encode(flat))
    assert torch.equal(sae(x).reshape(15, 16), sae(flat))
    assert torch.equal(sae.loss(x).loss, sae.loss(flat).loss)
    assert sae.loss(x).reconstruction.shape == x.shape
    assert sae(flat[0]).shape == (16,)
    assert sae(flat[:0]).shape == (0, 16)


@both
def test_forward_is_decode_of_encode(cls):
    sae = cls(16, 48, k=4)
    sae.b_dec = torch.randn(16)
    x = torch.randn(7, 16)
    dense, sparse = sae.encode(x), sae.encode_sparse(x)
    torch.testing.assert_close(sae.decode(dense), sae(x))
    torch.testing.assert_close(sae.decode(sparse), sae(x))
    torch.testing.assert_close(sae(x), dense @ sae.W_dec + sae.b_dec)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(32, 12), ValueError,
         "TopKSAE: expected x to be [..., d_in] with d_in = 16, got [32, 12]"),
        (torch.zeros(()), ValueError,
         "TopKSAE: expected x to be [..., d_in] with d_in = 16, got []"),
        (torch.zeros(2, 16).half(), TypeError,
         "TopKSAE: expected x to be torch.float32 like the parameters, got torch.float16"),
        (torch.zeros(2, 16, device="meta"), ValueError,
         "TopKSAE: expected x to be on cpu, got meta"),
        ([[0.0] * 16], TypeError, "TopKSAE: expected x to be a torch.Tensor, got list"),
    ],
)  # fmt: skip
def test_input_errors(x, error, message):
    sae = TopKSAE(16, 48, k=4)
    for call in (sae, sae.encode, sae.encode_sparse, sae.loss):
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            call(x)


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (TopKSAE, {"k": 0}, "TopKSAE: expected k to be an integer in 1..d_sae = 48, got k = 0"),
        (TopKSAE, {"k": 49}, "TopKSAE: expected k to be an integer in 1..d_sae = 48, got k = 49"),
        (TopKSAE, {"k": 1.5}, "TopKSAE: expected k to be an integer in 1..d_sae = 48, got k = 1.5"),
        (BatchTopKSAE, {"k": 0}, "BatchTopKSAE: expected 0 < k <= d_sae = 48, got k = 0"),
        (BatchTopKSAE, {"k": 48.1}, "BatchTopKSAE: expected 0 < k <= d_sae = 48, got k = 48.1"),
        (BatchTopKSAE, {"k": 4, "threshold_lr": 0},
         "BatchTopKSAE: expected 0 < threshold_lr <= 1, got 0"),
        (TopKSAE, {"k": 4, "k_aux": 99},
         "TopKSAE: expected 1 <= k_aux <= d_sae = 48, got k_aux = 99"),
        (TopKSAE, {"k": 4, "auxk_alpha": -1}, "TopKSAE: expected auxk_alpha >= 0, got -1"),
    ],
)  # fmt: skip
def test_constructor_errors(cls, arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        cls(16, 48, **arguments)


def test_sizes_below_one_and_acts_of_another_width():
    with pytest.raises(ValueError, match="expected d_in to be an integer >= 1, got 0"):
        TopKSAE(0, 4, k=1)
    for sizes in ((16.5, 32), ("16", 32), (16, True)):
        with pytest.raises(
            ValueError, match=r"expected d_\w+ to be an integer >= 1, got (16.5|'16'|True)"
        ):
            TopKSAE(*sizes, 4)
    with pytest.raises(
        ValueError, match=r"expected dtype to be a floating torch.dtype, got torch\.int"
    ):
        TopKSAE(16, 32, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"expected acts to be \[\.\.\., d_sae\] with d_sae = 48"):
        TopKSAE(16, 48, k=4).decode(torch.zeros(3, 16))


@both
def test_decoder_rows_get_norm_one_and_zero_rows_stay(cls):
    sae = cls(16, 48, k=4)
    direction = torch.randn(48, 16)
    sae.W_dec = 5 * direction
    with torch.no_grad():
        sae.W_dec[7] = 0
    sae.normalize_decoder_()
    alive = torch.arange(48) != 7
    norms = sae.W_dec.norm(dim=1)
    torch.testing.assert_close(norms[alive], torch.ones(47))
    assert norms[7] == 0
    cosine = torch.cosine_similarity(sae.W_dec, direction)
    torch.testing.assert_close(cosine[alive], torch.ones(47))


def test_parallel_gradient_is_removed_and_the_rest_stays():
    sae = TopKSAE(16, 48, k=4, dtype=torch.float64)
    with torch.no_grad():
        sae.W_dec *= torch.linspace(0.5, 3, 48).unsqueeze(1)  # works off the unit sphere too
        sae.W_dec[3] = 0
    grad = torch.randn(48, 16, dtype=torch.float64)
    sae.W_dec.grad = grad.clone()
    sae.remove_parallel_grad_()
    assert (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() < 1e-12
    removed = grad - sae.W_dec.grad
    row = torch.arange(48) != 3
    cosine = torch.cosine_similarity(removed[row], sae.W_dec.detach()[row]).abs()
    torch.testing.assert_close(cosine, torch.ones(47, dtype=torch.float64))
    assert torch.equal(sae.W_dec.grad[3], grad[3])


@pytest.mark.parametrize("scale", [0.1, 7.3])
@both
def test_folding_the_input_scale(cls, scale):
    sae = cls(16, 48, k=4, dtype=torch.float64)
    sae.b_enc = 0.1 * torch.randn(48, dtype=torch.float64)
    sae.b_dec = torch.randn(16, dtype=torch.float64)
    x = torch.randn(9, 16, dtype=torch.float64)
    sae.loss(scale * torch.randn_like(x))  # gives a BatchTopK its threshold
    folded = copy.deepcopy(sae)
    ActivationScaler(folded.columns, [scale]).fold_(folded)
    for mode in (True, False):
        sae.train(mode)
        folded.train(mode)
        assert sae.encode(scale * x).count_nonzero() > 0
        torch.testing.assert_close(folded.encode(x) * scale, sae.encode(scale * x))
        torch.testing.assert_close(folded(x) * scale, sae(scale * x))
    assert torch.equal(folded.W_dec, sae.W_dec)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected 1 scales above 0 and finite, got"):
            ActivationScaler(folded.columns, [wrong]).fold_(folded)


def test_geometric_median_against_facts_that_define_it():
    sae = TopKSAE(3, 4, k=1, dtype=torch.float64)
    x = torch.randn(50, 3, dtype=torch.float64)
    sae.initialize_b_dec_(x)
    away = sae.b_dec - x  # at the minimum of sum |x - y| the unit vectors add up to zero
    assert (away / away.norm(dim=1, keepdim=True)).sum(0).norm() < 1e-3
    x[:4] = 1e6  # fewer than half of the rows cannot carry it away
    sae.initialize_b_dec_(x)
    assert sae.b_dec.norm() < 1
    sae.initialize_b_dec_(x.reshape(5, 10, 3), "mean")
    torch.testing.assert_close(sae.b_dec.detach(), x.mean(0))
    sae.initialize_b_dec_(torch.ones(5, 3, dtype=torch.float64))
    assert sae.b_dec.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("method", ["geometric_median", "mean"])
def test_b_dec_is_not_set_from_bad_rows(method):
    sae = TopKSAE(3, 4, k=1)
    x = torch.randn(6, 3)
    x[2, 1] = torch.nan
    x[5, 0] = torch.inf
    with pytest.raises(ValueError, match="expected finite rows, got 2 of 6 with NaN or Inf"):
        sae.initialize_b_dec_(x, method)
    with pytest.raises(ValueError, match="at least one row, got none"):
        sae.initialize_b_dec_(x[:0], method)
    with pytest.raises(ValueError, match="geometric_median or mean, got 'median'"):
        sae.initialize_b_dec_(x[:1], "median")
    assert sae.b_dec.abs().max() == 0


@both
def test_bfloat16_parameters_keep_statistics_in_float32(cls):
    sae = cls(16, 48, k=4, dtype=torch.bfloat16)
    exact = copy.deepcopy(sae).float()
    x = torch.randn(64, 16).bfloat16()
    out, full = sae.loss(x), exact.loss(x.float())
    assert out.reconstruction.dtype == torch.bfloat16
    assert out.loss.dtype == out.fvu.dtype == out.mse.dtype == torch.float32
    torch.testing.assert_close(out.fvu, full.fvu, rtol=0.02, atol=0)
    out.loss.backward()
    assert sae.W_enc_rows.grad.dtype == torch.bfloat16


@both
def test_compiles_without_a_graph_break(cls):
    sae = cls(16, 48, k=4)
    x = torch.randn(6, 16)
    compiled = torch.compile(sae, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), sae(x))
    loss = torch.compile(lambda x: sae.loss(x).loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(loss(x), sae.loss(x).loss)


def test_functional_call_swaps_parameters():
    sae = TopKSAE(16, 48, k=4)
    x = torch.randn(6, 16)
    doubled = {name: 2 * p for name, p in sae.named_parameters()}
    out = torch.func.functional_call(sae, doubled, (x,))
    torch.testing.assert_close(out, 4 * sae(x))


def test_mutual_choice_is_batch_topk():
    assert MutualChoiceSAE is BatchTopKSAE
    assert isinstance(BatchTopKSAE(4, 8, 1.5).encode_sparse(torch.ones(2, 4)), ops.SparseActs)
