"""Under autocast: inputs as those of F.linear, selection as without it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear
from torch.testing import assert_close

from fastsae import SparseActs, ops

BF16 = torch.bfloat16
N, D, F, K = 12, 16, 40, 5


@pytest.fixture
def encoder():
    return torch.randn(N, D), torch.randn(F, D), torch.randn(F), torch.randn(D)


def encoders(x, W, b, c, threshold):
    return {
        "topk": SparseActs(*ops.encode_topk(x, W, b, K, b_dec=c), None, F),
        "absolute": SparseActs(*ops.encode_topk(x, W, b, K, b_dec=c, absolute=True), None, F),
        "group_max": SparseActs(*ops.encode_group_max(x, W, b, K, b_dec=c), None, F),
        "gradient": SparseActs(
            *ops.encode_gradient_topk(x, W, b, K, grad=x, W_dec=W, b_dec=c), None, F
        ),
        "batch_topk": ops.encode_batch_topk(x, W, b, K, b_dec=c).acts,
        "threshold": ops.encode_threshold(x, W, b, threshold, N * F, b_dec=c),
        "feature_topk": ops.encode_feature_topk(
            x, W, b, torch.full((F,), 2, dtype=torch.int32), N * F, b_dec=c
        ),
    }


@pytest.mark.parametrize("x_dtype", [torch.float32, BF16])
def test_encoders_cast_as_linear(encoder, x_dtype) -> None:
    x, W, b, c = encoder
    x = x.to(x_dtype)
    threshold = torch.tensor(0.5001)  # would be 0.5 in bfloat16
    want = encoders(*(t.to(BF16) for t in (x, W, b, c)), threshold)
    with torch.autocast("cpu", BF16):
        got = encoders(x, W, b, c, threshold)
        assert linear(x, W, b).dtype == BF16
    for name, acts in got.items():
        assert acts.values.dtype == BF16, name
        assert torch.equal(acts.to_dense(), want[name].to_dense()), name


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_decoder_and_its_gradients_cast_as_linear(encoder, dtype) -> None:
    x, W, _, c = encoder
    acts = SparseActs(*ops.encode_topk(x, W, None, K), None, F)
    lists = ops.group_by_latent(acts)

    def run(values, W, x, c):
        a = SparseActs(values, acts.indices, None, F)
        return (
            ops.sparse_decode(a, W, c),
            ops.sparse_decode_error(a, W, c, x).reconstruction,
            ops.sparse_decode_values_grad(x, a, W),
            *ops.sparse_weight_grad(values, lists, x),
        )

    want = run(*(t.to(BF16) for t in (acts.values, W, x, c)))
    with torch.autocast("cpu", BF16):
        got = run(acts.values.to(dtype), W, x, c)
    assert all(t.dtype == BF16 for t in got)
    assert_close(got, want, rtol=0, atol=0)


def test_selections_and_thresholds_are_not_cast(encoder) -> None:
    z = encoder[0] + 2e-4 * torch.randn(N, D)
    threshold = z.flatten().sort().values[100]
    with torch.autocast("cpu", BF16):
        assert torch.equal(
            ops.topk(z, 3).values, z.topk(3).values.gather(1, z.topk(3).indices.argsort(1))
        )
        batch = ops.batch_topk(z, 3, threshold_guess=threshold)
        assert torch.equal(batch.threshold, z.flatten().topk(3 * N).values[-1])
        kept = ops.threshold_select(z, threshold, N * D).to_dense()
        assert torch.equal(kept, z * (z > threshold))
        assert ops.encode_batch_topk(*encoder[:3], K).threshold.dtype == torch.float32


def test_float64_is_left_alone(encoder) -> None:
    x, W, b, c = (t.double() for t in encoder)
    want = ops.encode_topk(x, W, b, K, b_dec=c)
    with torch.autocast("cpu", BF16):
        got = ops.encode_topk(x, W, b, K, b_dec=c)
    assert torch.equal(got.values, want.values)


def test_gradients_arrive_in_the_dtype_of_the_parameters(encoder) -> None:
    x, W, b, c = (t.clone().requires_grad_() for t in encoder)
    with torch.autocast("cpu", BF16):
        acts = SparseActs(*ops.encode_topk(x, W, b, K, b_dec=c), None, F)
        ops.sparse_decode(acts, W, c).float().square().sum().backward()
    kept = acts.to_dense().detach() != 0
    others = [t.detach().clone().requires_grad_() for t in encoder]
    y, V, d, e = others
    with torch.autocast("cpu", BF16):
        z = linear(y.to(BF16) - e.to(BF16), V, d) * kept
        linear(z, V.t(), e).float().square().sum().backward()
    for got, want in zip((x, W, b, c), others, strict=True):
        assert got.grad.dtype == torch.float32
        assert_close(got.grad, want.grad, rtol=0, atol=0.03 * float(want.grad.abs().max()))


def test_compiles(encoder) -> None:
    x, W, b, c = encoder

    def f(x):
        acts = SparseActs(*ops.encode_topk(x, W, b, K, b_dec=c), None, F)
        return ops.sparse_decode(acts, W, c)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", BF16):
        assert torch.equal(compiled(x), f(x))
    assert compiled(x).dtype == torch.float32


def test_messages_name_every_dtype_once() -> None:
    a = SparseActs(torch.ones(1, 1).bfloat16(), torch.zeros(1, 1, dtype=torch.int32), None, 2)
    with pytest.raises(TypeError) as e:
        ops.sparse_decode(a, torch.randn(2, 3))
    assert str(e.value).endswith("dtype of W_dec, torch.float32, got torch.bfloat16")
    b = SparseActs(a.values.half(), a.indices, None, 2)
    with pytest.raises(TypeError, match=r"torch.bfloat16 or torch.float32, got torch.float16"):
        ops.sparse_decode(b, torch.randn(2, 3).bfloat16())
