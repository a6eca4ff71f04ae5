"""Modules crossed with torch's features: right, or refused in one line."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

import fastsae
from fastsae import StepContext, TrainConfig, Trainer

D, F, K = 16, 64, 4
CLASSES = [
    fastsae.TopKSAE, fastsae.BatchTopKSAE, fastsae.JumpReLUSAE, fastsae.GatedSAE, fastsae.ReLUSAE,
    fastsae.MatryoshkaSAE, fastsae.HierarchicalTopKSAE, fastsae.FeatureChoiceSAE,
    fastsae.GroupMaxSAE, fastsae.SampledSAE,
]  # fmt: skip
classes = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def rows(n=40, seed=1):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def make(cls=fastsae.TopKSAE, **kwargs):
    torch.manual_seed(0)
    return cls(D, F, K, **kwargs)


# -- dtypes ------------------------------------------------------------------------------------


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def default_dtype(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@classes
def test_what_selection_depends_on_is_float32_whatever_the_default(cls, default_dtype):
    sae = make(cls)
    assert sae.W_enc.dtype == default_dtype  # as nn.Linear
    exact = {name: getattr(sae, name) for name in cls.FLOAT32}
    assert {name: t.dtype for name, t in exact.items()} == dict.fromkeys(exact, torch.float32)
    buffers = {n: b.dtype for n, b in sae.named_buffers() if b.is_floating_point()}
    assert set(buffers.values()) <= {torch.float32}


@classes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_casts_leave_it_exact(cls, dtype):
    sae = make(cls)
    sae.training_loss(rows())
    before = {name: getattr(sae, name).detach().clone() for name in cls.FLOAT32}
    sae.to(dtype)
    assert sae.W_dec.dtype == dtype
    for name, value in before.items():
        assert getattr(sae, name).dtype == torch.float32
        assert torch.equal(getattr(sae, name), value)


def test_a_control_moves_under_a_bfloat16_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        sae = make(fastsae.JumpReLUSAE, dtype=torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    twin = make(fastsae.JumpReLUSAE)
    for seed in range(20):
        sae.training_loss(rows(200, seed))
        twin.training_loss(rows(200, seed))
    assert sae.coefficient != 1
    assert torch.equal(sae.coefficient, twin.coefficient)


def test_thresholds_learn_in_bfloat16():
    sae = make(fastsae.JumpReLUSAE, dtype=torch.bfloat16, threshold=2.0)
    config = TrainConfig(lr=1e-3, batch_size=200, steps=60)
    Trainer(sae, rows(2000).bfloat16(), config).fit()
    assert sae.log_threshold.dtype == torch.float32
    assert sae.log_threshold.detach().unique().numel() > 60


def test_a_negative_threshold_keeps_nothing_negative():
    sae = make(fastsae.BatchTopKSAE).eval()
    sae.threshold.fill_(-1.0)
    x = rows()
    z = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()  # a relu comes first
    torch.testing.assert_close(sae.encode(x), torch.where(z > -1, z, 0))


# -- parametrizations, names, savers, optimizers -----------------------------------------------


class UnitRows(nn.Module):
    def forward(self, raw):
        return raw / raw.norm(dim=1, keepdim=True)

    def right_inverse(self, rows):
        return rows * 3


def test_a_parametrized_sae_is_saved_under_its_own_class(tmp_path):
    sae = make()
    parametrize.register_parametrization(sae, "W_dec", UnitRows())
    assert "ParametrizedTopKSAE" not in fastsae.SAE.registry
    fastsae.save(sae, tmp_path)
    back = fastsae.load(tmp_path)
    assert type(back) is fastsae.TopKSAE
    torch.testing.assert_close(back(rows()), sae(rows()), rtol=0, atol=0)


def test_a_parametrized_sae_trains():
    sae = make()
    parametrize.register_parametrization(sae, "W_dec", UnitRows())
    before = sae.W_dec.detach().clone()
    Trainer(sae, rows(400), TrainConfig(batch_size=40, steps=10, lr=1e-2)).fit()
    assert (sae.W_dec - before).abs().max() > 1e-3
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F))


def test_a_class_of_the_same_name_is_another_class(tmp_path):
    class TopKSAE(fastsae.TopKSAE):
        pass

    assert fastsae.SAE.registry["TopKSAE"] is fastsae.TopKSAE
    fastsae.save(TopKSAE(D, F, K), tmp_path / "theirs")
    fastsae.save(fastsae.TopKSAE(D, F, K), tmp_path / "plain")
    assert type(fastsae.load(tmp_path / "theirs")) is TopKSAE
    assert type(fastsae.load(tmp_path / "plain")) is fastsae.TopKSAE


@classes
def test_parameters_are_contiguous(cls):
    sae = make(cls)
    sae.training_loss(rows()).loss.backward()
    for name, p in sae.named_parameters():
        assert p.is_contiguous(), name
        assert p.grad is None or p.grad.is_contiguous(), name


def test_common_tools_take_an_sae(tmp_path):
    sae = make()
    save_file(sae.state_dict(), tmp_path / "x.safetensors")
    back = make(fastsae.TopKSAE)
    back.load_state_dict(load_file(tmp_path / "x.safetensors"))
    assert torch.equal(back.W_enc, sae.W_enc)
    vector = nn.utils.parameters_to_vector(sae.parameters())
    nn.utils.vector_to_parameters(vector * 2, back.parameters())
    assert torch.equal(back.W_enc, sae.W_enc * 2)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # torch's LBFGS
def test_lbfgs_takes_an_sae():
    sae, x = make(), rows()
    optimizer = torch.optim.LBFGS(sae.parameters(), max_iter=5)

    def closure():
        optimizer.zero_grad()
        loss = sae.training_loss(x).loss
        loss.backward()
        return loss

    before = closure().item()
    optimizer.step(closure)
    assert closure().item() < before


def test_a_state_dict_with_the_matrix_of_the_papers_loads():
    sae, other = make(), make(fastsae.TopKSAE)
    state = {**other.state_dict(), "W_enc": 2 * other.W_enc}
    del state["W_enc_rows"]
    sae.load_state_dict(state)
    assert torch.equal(sae.W_enc, 2 * other.W_enc)


@pytest.mark.parametrize("fused", [False, True])
def test_a_torch_optimizer_moves_the_encoder_where_its_gradient_is(fused):
    """A transposed parameter took steps of other entries with torch's fused Adam on the CPU."""
    sae = make()
    before = sae.W_enc.detach().clone()
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.1, fused=fused)
    gradient = torch.randn(D, F)
    sae.W_enc_rows.grad = gradient.t().contiguous()
    optimizer.step()
    torch.testing.assert_close(sae.W_enc, before - 0.1 * gradient.sign(), rtol=1e-4, atol=1e-4)


# -- activation checkpointing ------------------------------------------------------------------


@classes
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_loss_is_the_same_or_refused(cls, reentrant):
    sae = make(cls)
    twin = copy.deepcopy(sae)
    saes = (sae, twin)
    for seed in range(3):
        x = rows(seed=seed).requires_grad_()
        twin.training_loss(x).loss.backward()
        loss = checkpoint(lambda y: sae.training_loss(y).loss, x, use_reentrant=reentrant)
        if cls in (fastsae.FeatureChoiceSAE, *PENALIZED):
            message = f"^{cls.__name__}: expected training_loss outside of torch.utils.checkpoint"
            with pytest.raises(RuntimeError, match=message):
                loss.backward()
            return
        loss.backward()
    for (name, a), b in zip(*(s.state_dict().items() for s in saes), strict=True):
        assert torch.equal(a, b[1]), name
    for (name, p), q in zip(sae.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


PENALIZED = (fastsae.JumpReLUSAE, fastsae.GatedSAE, fastsae.ReLUSAE)


def test_a_penalty_that_does_not_move_can_be_recomputed():
    sae = make(fastsae.ReLUSAE)
    sae.k = None
    twin = copy.deepcopy(sae)
    for seed in range(2):
        x = rows(seed=seed)
        twin.training_loss(x).loss.backward()
        checkpoint(lambda y: sae.training_loss(y).loss, x, use_reentrant=False).backward()
    assert int(sae.batches_seen) == int(twin.batches_seen) == 2
    torch.testing.assert_close(sae.W_dec.grad, twin.W_dec.grad)


# -- compile, export, pytrees ------------------------------------------------------------------


def compiled(f):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("cls", [fastsae.TopKSAE, fastsae.BatchTopKSAE, fastsae.JumpReLUSAE])
def test_the_first_training_loss_compiles_whole(cls):
    sae = make(cls)
    twin, x = copy.deepcopy(sae), rows()
    expected = twin.training_loss(x)
    got = compiled(lambda y: sae.training_loss(y).loss)(x)
    torch.testing.assert_close(got, expected.loss)
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(getattr(sae, name), buffer, msg=name)


@pytest.mark.parametrize("dead_share", [0.0, 0.3, 1.0])
def test_a_loss_with_dead_latents_compiles_whole(dead_share):
    sae, x = make(), rows()
    dead = torch.rand(F, generator=torch.Generator().manual_seed(3)) < dead_share
    expected = sae.training_loss(x, StepContext(dead=dead))
    f = compiled(lambda y, mask: sae.training_loss(y, StepContext(dead=mask)))
    got = f(x, dead)
    torch.testing.assert_close(got.aux_loss, expected.aux_loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert (expected.aux_loss.item() > 0) is (dead_share > 0)


def test_eval_compiles_before_any_eager_call():
    sae = make(fastsae.BatchTopKSAE)
    sae.training_loss(rows())
    state = sae.state_dict()
    sae.eval()
    expected = sae(rows())
    fresh = make(fastsae.BatchTopKSAE)
    fresh.load_state_dict(state)
    torch.testing.assert_close(compiled(fresh.eval())(rows()), expected)


def test_eval_without_a_threshold_is_an_error_compiled_too():
    sae = make(fastsae.BatchTopKSAE).eval()
    with pytest.raises(RuntimeError, match="expected a threshold in eval mode, got none yet"):
        compiled(sae)(rows())


def test_shapes_without_data():
    sae = fastsae.BatchTopKSAE(D, F, K, device="meta").eval()
    assert sae(torch.empty(5, D, device="meta")).shape == (5, D)


@pytest.mark.parametrize("cls", [fastsae.TopKSAE, fastsae.BatchTopKSAE])
def test_an_output_is_a_pytree_and_exports(cls):
    sae = make(cls).train()
    out = sae.training_loss(rows())
    leaves, spec = tree_flatten(out)
    assert len(leaves) >= 8
    assert torch.equal(tree_unflatten(leaves, spec).loss, out.loss)

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.sae = sae

        def forward(self, x):
            return self.sae.training_loss(x)

    exported = torch.export.export(Loss(), (rows(),), strict=False)
    torch.testing.assert_close(exported.module()(rows()).loss, out.loss)


@pytest.mark.parametrize("shape", [(40, D), (5, 8, D)])
@classes
def test_the_loss_depends_on_the_reconstruction_that_is_returned(cls, shape):
    sae = make(cls)
    x = rows().reshape(shape)
    out = sae.loss(x)
    assert out.reconstruction.shape == x.shape
    grad = torch.autograd.grad(out.fvu, out.reconstruction, allow_unused=False)[0]
    flat = x.reshape(-1, D)
    expected = 2 * (out.reconstruction - x) / (flat - flat.mean(0)).square().sum()
    torch.testing.assert_close(grad, expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("cls", [fastsae.BatchTopKSAE, fastsae.JumpReLUSAE, fastsae.ReLUSAE])
def test_a_trace_that_would_drop_entries_is_refused(cls):
    sae = make(cls)
    sae.training_loss(rows())
    with pytest.raises(
        RuntimeError, match=r"got torch\.jit\.trace, which fixes the number of entries"
    ):
        torch.jit.trace(sae.eval(), (rows(),))


# -- wrong calls -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Sparse CSR")  # torch makes the nested tensor with one
def test_what_is_no_dense_tensor_is_refused_in_one_line():
    sae = make()
    nested = torch.nested.nested_tensor([torch.randn(2, D), torch.randn(3, D)], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"^TopKSAE: expected x to be a dense tensor, got a nested"):
        sae(nested)
    for layout in (torch.sparse_coo, torch.sparse_csr):
        x = rows().to_sparse(layout=layout)
        with pytest.raises(
            TypeError, match=f"^TopKSAE: expected x to be a dense tensor, got {layout}"
        ):
            sae(x)


def test_a_wrapper_is_refused_by_the_trainer():
    wrapper = nn.DataParallel(make())
    with pytest.raises(TypeError, match=r"expected sae to be an SAE, got DataParallel \(give the"):
        Trainer(wrapper, rows())
    with pytest.raises(TypeError, match=r"^Trainer: expected sae to be an SAE, got Linear$"):
        Trainer(nn.Linear(2, 2), rows())


# -- autocast ----------------------------------------------------------------------------------


@classes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_activations_of_any_dtype_enter_under_autocast(cls, dtype):
    """The code is that of the rounded inputs, as F.linear's would be; what selects is float32."""
    sae, x = make(cls), rows(64)
    sae.training_loss(x)
    before = {name: t.clone() for name, t in sae.named_buffers()}
    with torch.autocast("cpu", torch.bfloat16):
        out = sae.training_loss(x.to(dtype))
        assert sae.encode(x.to(dtype)).dtype == torch.bfloat16
    out.loss.backward()
    assert all(
        p.grad is not None and p.grad.dtype == p.dtype and p.grad.isfinite().all()
        for p in sae.parameters()
    )
    for name, buffer in sae.named_buffers():
        assert buffer.dtype == before[name].dtype, name
    sae.eval()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = sae(x.to(dtype))
    exact = sae(x.bfloat16().float())
    assert mixed.dtype == torch.bfloat16
    error = (mixed.float() - exact).square().sum() / exact.square().sum()
    assert error < 0.05, float(error)


@pytest.mark.parametrize("kwargs", [{"absolute": True}, {"multi_topk": True}], ids=str)
def test_variants_of_topk_take_autocast(kwargs):
    sae = make(fastsae.TopKSAE, **kwargs)
    with torch.autocast("cpu", torch.bfloat16):
        sae.training_loss(rows().bfloat16()).loss.backward()
    assert sae.W_enc_rows.grad.any()


def test_without_autocast_another_dtype_is_an_error():
    with pytest.raises(TypeError, match=r"^TopKSAE: expected x to be torch.float32 like the"):
        make()(rows().bfloat16())


# -- derivatives -------------------------------------------------------------------------------


def dense_topk(sae, x, absolute=False):
    z = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    indices = (z.abs() if absolute else z).topk(K).indices
    values = z.gather(1, indices)
    values = values if absolute else values.relu()
    return torch.zeros_like(z).scatter(1, indices, values) @ sae.W_dec + sae.b_dec


@pytest.mark.parametrize("absolute", [False, True])
def test_second_derivatives_are_those_of_the_dense_composition(absolute):
    sae = make(fastsae.TopKSAE, absolute=absolute, dtype=torch.float64)
    x = rows(6).double().requires_grad_()

    def second(f):
        g = torch.autograd.grad(f(x).pow(2).sum(), x, create_graph=True)[0]
        return torch.autograd.grad(g.square().sum(), [sae.W_dec, sae.W_enc_rows, sae.b_enc])

    for got, want in zip(second(sae), second(lambda y: dense_topk(sae, y, absolute)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("absolute", [False, True])
def test_torch_func_goes_through_modules(absolute):
    sae = make(fastsae.TopKSAE, absolute=absolute, dtype=torch.float64)
    x, v = rows(6).double(), rows(6, seed=2).double()
    _, tangent = torch.func.jvp(sae, (x,), (v,))
    _, expected = torch.func.jvp(lambda y: dense_topk(sae, y, absolute), (x,), (v,))
    torch.testing.assert_close(tangent, expected)
    gradient = torch.func.grad(lambda y: sae(y).pow(2).sum())(x)
    expected = torch.func.grad(lambda y: dense_topk(sae, y, absolute).pow(2).sum())(x)
    torch.testing.assert_close(gradient, expected)
    jacobian = torch.func.jacrev(lambda y: sae(y[None])[0])(x[0])
    expected = torch.func.jacrev(lambda y: dense_topk(sae, y[None], absolute)[0])(x[0])
    torch.testing.assert_close(jacobian, expected)


def test_second_derivatives_that_are_not_there_are_refused():
    sae = make(fastsae.HierarchicalTopKSAE)
    x = rows().requires_grad_()
    with pytest.raises(RuntimeError, match=r"expected create_graph=False, the loss has no second"):
        torch.autograd.grad(sae.training_loss(x).loss, sae.W_dec, create_graph=True)
