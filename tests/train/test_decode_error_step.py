"""Which training steps decode by sparse_decode_error, and that they are the steps they replace."""

import pytest
import torch

import fastsae
from fastsae import TrainConfig, Trainer, ops
from fastsae.nn import objective
from fastsae.nn.context import STEP
from fastsae.ops import _tape
from fastsae.train.fused_update import FusedUpdate
from fastsae.types import SparseActs, StepTensors
from tests.train.test_fused_classes import CLASSES, build, rows, run

# Whose loss is the fvu of one sum of rows, whose entries of value 0 get no gradient.
ONE_GATHER = {
    "TopK", "AbsTopK", "uncentered", "BatchTopK", "FeatureChoice", "Sampled", "GroupMax",
    "Gradient", "ReLU", "tanh", "Transcoder", "GroupMaxTranscoder", "CrossCoder", "ReLUCrossCoder",
}  # fmt: skip


@pytest.fixture
def count(monkeypatch) -> dict[str, int]:
    """How often training calls the op, and the gradient that it saves."""
    found = {"sparse_decode_error": 0, "sparse_decode_values_grad": 0}

    def counting(name, op):
        def call(*arguments):
            found[name] += 1
            return op(*arguments)

        return call

    for name in found:
        op = getattr(torch.ops.fastsae, name)
        monkeypatch.setattr(torch.ops.fastsae, name, counting(name, op))
    return found


@pytest.mark.parametrize("name", CLASSES)
def test_which_classes(name, count) -> None:
    sae = build(name, torch.float32)
    trainer = Trainer(sae, rows(sae), TrainConfig(steps=1, batch_size=50, progress=False))
    trainer.prepare()
    trainer.step(rows(sae)[:50])
    assert count["sparse_decode_error"] == (name in ONE_GATHER)
    if name in ONE_GATHER:
        assert count["sparse_decode_values_grad"] == 0


@pytest.mark.parametrize("settings", [{}, {"clip_grad_norm": 0.02}])
@pytest.mark.parametrize("name", sorted(ONE_GATHER))
def test_twelve_steps_are_the_same(name, settings, monkeypatch) -> None:
    one = run(name, "fused", **settings)
    monkeypatch.setattr(objective, "decodes_with_error", lambda *_: False)
    two = run(name, "fused", **settings)
    expected = dict(two.sae.named_parameters())
    for parameter, p in one.sae.named_parameters():
        torch.testing.assert_close(p, expected[parameter], rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(one.history, two.history, strict=True):
        assert mine["fvu"] == pytest.approx(theirs["fvu"], rel=1e-10)
        assert mine["aux_loss"] == pytest.approx(theirs["aux_loss"], rel=1e-10)


def opened(sae):
    moved = StepTensors(sae.W_enc_rows, sae.W_dec, sae.b_enc, sae.b_dec)
    return _tape.opened([moved], sae.apply_b_dec_to_input)


def test_rule() -> None:
    sae, x = fastsae.TopKSAE(5, 20, 3), torch.randn(7, 5)
    acts, rule = sae.encode_sparse(x), objective.decodes_with_error
    assert not rule(sae, x, acts)  # no step is under way: the loss is one of the reconstruction
    with opened(sae):
        assert rule(sae, x, acts)
        assert not rule(sae, x, acts.detach())
        assert not rule(sae, x.double(), acts)
        with torch.autocast("cpu", torch.bfloat16):
            assert not rule(sae, x, acts)
        full = SparseActs.full(torch.rand(7, 20, requires_grad=True))
        assert not rule(sae, x, full)
        assert not rule(fastsae.TopKSAE(5, 20, 3), x, acts)  # another dictionary's step
        sae.parallel = type("Spread", (), {"is_alone": False})()
        assert not rule(sae, x, acts)
    coder = fastsae.Transcoder(5, 4, 20, 3, skip=True)
    y, acts = torch.randn(7, 4), coder.encode_sparse(x)
    with opened(coder):
        assert not rule(coder, y, acts)
        coder.skip = False
        assert rule(coder, y, acts)


def test_dense_codes_are_left_to_matmuls() -> None:
    n, d_sae = 300, 2000
    sae = fastsae.ReLUSAE(256, d_sae)
    x = torch.randn(n, 256)
    for share, expected in ((0.05, True), (0.5, False)):
        dense = torch.where(torch.rand(n, d_sae) < share, torch.rand(n, d_sae), 0)
        acts = SparseActs.from_dense(dense.requires_grad_())
        with opened(sae):
            assert objective.decodes_with_error(sae, x, acts) is expected, share


def test_cuda_is_off_until_it_is_asked_for(monkeypatch) -> None:
    sae, x = fastsae.TopKSAE(5, 20, 3), torch.randn(7, 5)
    acts = sae.encode_sparse(x)

    class OnCuda:
        """The same module, said to be on a GPU."""

        W_dec = type(
            "W", (), {"device": torch.device("cuda"), "dtype": x.dtype, "shape": (20, 5)}
        )()
        adds_rows, parallel = True, sae.parallel

    monkeypatch.setattr(_tape, "is_open", lambda: True)
    monkeypatch.setattr(_tape, "of", lambda _: object())
    assert not objective.decodes_with_error(OnCuda(), x, acts)
    before = objective.set_cuda_decode_error(True)
    assert before is False
    assert objective.decodes_with_error(OnCuda(), x, acts)
    assert objective.set_cuda_decode_error(before) is True
    assert not objective.decodes_with_error(OnCuda(), x, acts)


def test_loss_of_a_module_remains_one_of_its_reconstruction() -> None:
    sae, x = fastsae.TopKSAE(5, 20, 3), torch.randn(7, 5)
    out = sae.loss(x)
    (grad,) = torch.autograd.grad(out.fvu, out.reconstruction)
    want = 2 * (out.reconstruction - x) / (x - x.mean(0)).square().sum()
    torch.testing.assert_close(grad, want)


def test_a_step_returns_what_the_module_gives(count) -> None:
    sae = build("TopK", torch.float32)
    batch = rows(sae)[:50]
    with torch.no_grad():
        before = ops.sparse_decode(sae.encode_sparse(batch), sae.W_dec, sae.b_dec)
    out = FusedUpdate(sae, TrainConfig(steps=1)).step(batch, STEP, 1e-3)
    assert count["sparse_decode_error"] == 1
    assert not out.reconstruction.requires_grad
    assert torch.equal(out.reconstruction, before)
