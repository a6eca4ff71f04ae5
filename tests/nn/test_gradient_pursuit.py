"""Gradient pursuit: planted codes, a dense reference, steps per token, and what stops a token."""

from itertools import pairwise

import pytest
import torch

from fastsae.nn import BatchTopKSAE, TopKSAE
from fastsae.nn.gradient_pursuit import gradient_pursuit
from tests.properties import given, settings, st


def with_decoder(rows, b_dec=None):
    """An SAE in float64 with these decoder rows."""
    rows = rows.double()
    sae = TopKSAE(rows.shape[1], rows.shape[0], 1, dtype=torch.float64)
    sae.W_dec = rows
    sae.b_dec = torch.randn(rows.shape[1]).double() if b_dec is None else b_dec
    return sae


def unit(d_sae, d_in):
    return torch.nn.functional.normalize(torch.randn(d_sae, d_in).double(), dim=1)


def dense_pursuit(x, D, b_dec, k, only_positive=False):
    """The same on dense codes [n, d_sae], after the paper: every token does all steps.

    There the best latent joins whatever the sign of its inner product, unless `only_positive`.
    """
    goal = x - b_dec
    w = torch.zeros(x.shape[0], D.shape[0], dtype=x.dtype)
    out = w.clone()
    for step in range(int(k.max())):
        residual = goal - w @ D
        inner = residual @ D.t()
        support = w != 0
        best = inner.max(1)
        support[torch.arange(len(w)), best.indices] |= (best.values > 0) | (not only_positive)
        gradient = inner * support
        c = gradient @ D
        alpha = (c * residual).sum(1) / (c * c).sum(1)
        w = (w + alpha.nan_to_num(0, 0, 0)[:, None] * gradient).clamp(min=0)
        out = torch.where((step < k)[:, None], w, out)
    return out


def error(sae, x, acts):
    return (x - sae.decode(acts)).norm(dim=1)


def test_three_steps_find_three_latents_of_an_orthonormal_dictionary():
    sae = with_decoder(torch.linalg.qr(torch.randn(24, 24).double()).Q)
    planted = torch.zeros(50, 24).double()
    place = torch.rand(50, 24).topk(3, 1).indices
    planted.scatter_(1, place, torch.rand(50, 3).double() + 0.5)
    x = planted @ sae.W_dec.detach() + sae.b_dec.detach()
    acts = gradient_pursuit(sae, x, 3)
    assert acts.values.shape == acts.indices.shape == (50, 3)
    assert acts.indices.dtype == torch.int32
    torch.testing.assert_close(acts.to_dense(), planted, rtol=0, atol=1e-12)
    assert (gradient_pursuit(sae, x, 2).row_counts() == 2).all()
    # More steps than latents: what is left over is rounding.
    torch.testing.assert_close(gradient_pursuit(sae, x, 6).to_dense(), planted, rtol=0, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(2, 10), st.integers(0, 2**31))
def test_codes_equal_those_of_a_dense_reference(n, d_in, seed):
    torch.manual_seed(seed)
    # So many directions that some latent has a positive inner product with every residual.
    sae = with_decoder(unit(12 * d_in, d_in))
    x = 3 * torch.randn(n, d_in).double()
    k = torch.randint(0, 9, (n,))
    with torch.no_grad():
        want = dense_pursuit(x, sae.W_dec, sae.b_dec, k)
    acts = gradient_pursuit(sae, x, k)
    torch.testing.assert_close(acts.to_dense(), want, rtol=1e-9, atol=1e-9)
    assert (acts.row_counts() <= k).all()
    assert not (acts.values < 0).any()
    assert not acts.indices[acts.values == 0].any()


def test_a_weight_that_reaches_zero_leaves_the_code(isa):
    """Coherent directions that do not reach every residual: all that can happen does."""
    common = torch.nn.functional.normalize(torch.randn(3), dim=0)
    rows = torch.nn.functional.normalize(torch.randn(30, 3) + 2 * common, dim=1)
    sae = with_decoder(rows)
    D, b_dec = sae.W_dec.detach(), sae.b_dec.detach()
    x = b_dec + 3 * torch.randn(500, 3).double()
    codes = [gradient_pursuit(sae, x, k).to_dense() for k in range(20)]
    for k, code in enumerate(codes):
        want = dense_pursuit(x, D, b_dec, torch.full((500,), k), only_positive=True)
        torch.testing.assert_close(code, want, rtol=0, atol=1e-9)
    acts = gradient_pursuit(sae, x, 19)
    assert not acts.indices[acts.values == 0].any()
    left = [(before > 0) & (after == 0) for before, after in pairwise(codes)]
    assert torch.stack(left).any(2).sum() > 20
    refined = ((x - b_dec - codes[-2] @ D) @ D.t()).amax(1) <= 0
    refined &= (codes[-1] != codes[-2]).any(1)
    assert refined.sum() > 20


def test_the_error_does_not_grow_with_the_steps():
    """Before a weight is clamped it cannot, as every step ends at the best point of a line."""
    sae = with_decoder(unit(96, 12))
    x = 3 * torch.randn(200, 12).double()
    clamped = torch.zeros(200, dtype=torch.bool)
    before = error(sae, x, gradient_pursuit(sae, x, 0))
    codes = torch.zeros(200, 96).double()
    for k in range(1, 8):
        acts = gradient_pursuit(sae, x, k)
        after, dense = error(sae, x, acts), acts.to_dense()
        clamped |= ((codes > 0) & (dense == 0)).any(1)
        assert (after <= before + 1e-12)[~clamped].all()
        before, codes = after, dense
    assert not clamped.all()
    assert after.mean() < 0.5 * (x - sae.b_dec).norm(dim=1).mean()


def test_every_token_takes_its_own_number_of_steps():
    sae = with_decoder(unit(64, 8))
    x = torch.randn(6, 8).double()
    k = torch.tensor([2, 0, 5, 1, 5, 3])
    acts = gradient_pursuit(sae, x, k)
    assert acts.values.shape == (6, 5)
    for row, steps in enumerate(k.tolist()):
        alone = gradient_pursuit(sae, x[row : row + 1], steps).to_dense()
        torch.testing.assert_close(acts.to_dense()[row : row + 1], alone, rtol=0, atol=1e-12)
    assert acts.row_counts()[1] == 0
    assert torch.equal(gradient_pursuit(sae, x, k.int()).to_dense(), acts.to_dense())
    three = gradient_pursuit(sae, x.reshape(2, 3, 8), 3)
    assert torch.equal(three.to_dense(), gradient_pursuit(sae, x, torch.full((6,), 3)).to_dense())
    nothing = gradient_pursuit(sae, x, 0)
    assert nothing.values.shape == (6, 0)
    assert torch.equal(sae.decode(nothing), sae.b_dec.expand(6, 8))
    assert gradient_pursuit(sae, x[:0], 4).shape == (0, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pursuit_reconstructs_better_than_the_encoder(device, isa, dtype):
    sae = TopKSAE(16, 96, 6, dtype=dtype, device=device)
    x = torch.randn(300, 16, dtype=dtype, device=device)
    acts = gradient_pursuit(sae, x, sae.encode_sparse(x).row_counts())
    assert acts.values.dtype == dtype
    assert not acts.values.requires_grad
    encoded = error(sae, x, sae.encode_sparse(x))
    assert (error(sae, x, acts) < encoded).double().mean() > 0.95
    assert error(sae, x, acts).mean() < 0.6 * encoded.mean()


def test_steps_that_an_sae_with_uneven_codes_asks_for():
    sae = BatchTopKSAE(16, 96, 4)
    x = torch.randn(80, 16) * torch.rand(80, 1)
    counts = sae.encode_sparse(x).row_counts()
    assert counts.unique().numel() > 3
    acts = gradient_pursuit(sae, x, counts)
    assert acts.values.shape == (80, int(counts.max()))
    assert (acts.row_counts() <= counts).all()


def test_a_token_that_nothing_points_towards_stays(isa):
    """Orthogonal, opposed, zero and tiny residuals, and one that is NaN."""
    sae = with_decoder(torch.eye(6)[:3], torch.ones(6).double())
    offsets = torch.zeros(5, 6).double()
    offsets[0, 4] = 2
    offsets[1, :3] = -1
    offsets[3, 1] = 1e-200
    offsets[4, 0] = torch.nan
    acts = gradient_pursuit(sae, 1 + offsets, 3)
    assert torch.equal(acts.values, torch.zeros(5, 3).double())
    assert torch.equal(acts.indices, torch.zeros(5, 3).int())
    sae.b_dec = torch.zeros(6)
    tiny = gradient_pursuit(sae, offsets[3:4], 2).to_dense()  # its square is 0
    assert tiny.isfinite().all()
    mixed = torch.tensor([[-1.0, 2, -3, 0, 0, 5]]).double()
    assert gradient_pursuit(sae, mixed, 3).to_dense().tolist() == [[0, 2, 0]]


def test_errors():
    sae, x = TopKSAE(4, 8, 2), torch.randn(3, 4)
    cases = [
        (-1, ValueError, "gradient_pursuit: expected 0 <= k <= d_sae = 8, got k = -1"),
        (9, ValueError, "gradient_pursuit: expected 0 <= k <= d_sae = 8, got k = 9"),
        (torch.tensor([1, -2, 9]), ValueError, "d_sae = 8, got k = -2"),
        (torch.tensor([1, 2, 9]), ValueError, "d_sae = 8, got k = 9"),
        (
            torch.ones(2).int(),
            ValueError,
            r"gradient_pursuit: expected k to be \[n\] with n = 3, got \[2\]",
        ),
        (
            torch.ones(3),
            TypeError,
            "gradient_pursuit: expected k to hold integers, got torch.float32",
        ),
        (
            torch.ones(3).bool(),
            TypeError,
            "gradient_pursuit: expected k to hold integers, got torch.bool",
        ),
        (2.0, TypeError, "gradient_pursuit: expected k to be an int or a Tensor, got float"),
        (True, TypeError, "gradient_pursuit: expected k to be an int or a Tensor, got bool"),
    ]
    for k, error_type, message in cases:
        with pytest.raises(error_type, match=message):
            gradient_pursuit(sae, x, k)
    with pytest.raises(
        ValueError, match=r"gradient_pursuit: expected x to be \[..., d_in\] with d_in = 4"
    ):
        gradient_pursuit(sae, torch.randn(3, 5), 1)
    with pytest.raises(
        TypeError, match=r"gradient_pursuit: expected x to be torch.float32 like the param"
    ):
        gradient_pursuit(sae, x.double(), 1)
    with pytest.raises(
        TypeError, match="gradient_pursuit: expected parameters in float32 or float64, got"
    ):
        gradient_pursuit(sae.bfloat16(), x.bfloat16(), 1)
