"""Ways to extend an SAE: each is trained as autograd would, or refused in one line."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

import fastsae
from fastsae import SparseActs, StepContext, TrainConfig, Trainer
from fastsae.nn.objective import total_loss
from fastsae.train import make_update, why_not_fused
from fastsae.train.autograd_update import AutogradUpdate
from fastsae.train.fused_update import FusedUpdate

D, F, K, N = 16, 64, 4, 128


class Gain(fastsae.TopKSAE):
    """Another parameter, and decode overridden."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.d_in))

    def decode(self, acts):
        return super().decode(acts) * self.gain


class Reconstruct(fastsae.BatchTopKSAE):
    def reconstruct(self, x, acts):
        return super().reconstruct(x, acts) + 0.3 * x


class Penalty(fastsae.TopKSAE):
    def sparsity_loss(self, acts: SparseActs, context: StepContext):
        return 0.1 * self.W_enc.abs().mean()


class Loss(fastsae.TopKSAE):
    def loss_of(self, x, target, acts, dead, context):
        out = super().loss_of(x, target, acts, dead, context)
        out.loss = out.loss + self.b_enc.square().sum()
        return out


class TrainingLoss(fastsae.TopKSAE):
    def training_loss(self, batch, context=StepContext()):  # noqa: B008
        return super().training_loss(batch * 2, context)


class Encode(fastsae.TopKSAE):
    def _encode(self, x, context=StepContext()):  # noqa: B008
        return super()._encode(x.tanh(), context)


class InputBias(fastsae.TopKSAE):
    def _input_bias(self):
        return None


class NoUnitRows(fastsae.TopKSAE):
    def normalize_decoder_(self):
        pass


class TrainedBuffer(fastsae.TopKSAE):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("tilt", torch.zeros(self.d_in, requires_grad=True))


class Submodule(fastsae.TopKSAE):
    """A module in front of the encoder, by way of `loss`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.front = nn.Linear(self.d_in, self.d_in)

    def loss(self, x, target=None, *, context=StepContext()):  # noqa: B008
        return super().loss(self.front(x), x, context=context)


class Tied(fastsae.TopKSAE):
    """The encoder is the decoder: one parameter under two names."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.W_enc_rows = self.W_dec


class SameInit(fastsae.TopKSAE):
    """Nothing but another constructor: the fused update applies."""

    def __init__(self, d_in, d_sae, k):
        super().__init__(d_in, d_sae, k=k, auxk_alpha=0.0)

    def config(self):
        return {name: super(SameInit, self).config()[name] for name in ("d_in", "d_sae", "k")}


def patched_instance():
    sae = fastsae.TopKSAE(D, F, k=K)
    plain = sae.decode
    sae.decode = lambda acts: plain(acts) * 2
    return sae


def tensor_hook():
    sae = fastsae.TopKSAE(D, F, k=K)
    sae.W_dec.register_hook(lambda grad: grad * 0)
    return sae


def forward_hook():
    sae = fastsae.TopKSAE(D, F, k=K)
    sae.register_forward_hook(lambda *_: None)
    return sae


def parametrized():
    sae = fastsae.TopKSAE(D, F, k=K)

    class UnitRows(nn.Module):
        def forward(self, rows):
            return rows / rows.norm(dim=1, keepdim=True)

    nn.utils.parametrize.register_parametrization(sae, "W_dec", UnitRows())
    return sae


def frozen():
    sae = fastsae.TopKSAE(D, F, k=K)
    sae.W_dec.requires_grad_(False)
    return sae


def half():
    return fastsae.TopKSAE(D, F, k=K, dtype=torch.bfloat16)


UNFUSED = {
    "parameter": (lambda: Gain(D, F, k=K), "Gain overrides decode"),
    "reconstruct": (lambda: Reconstruct(D, F, k=K), "Reconstruct overrides reconstruct"),
    "penalty": (lambda: Penalty(D, F, k=K), "Penalty overrides sparsity_loss"),
    "loss_of": (lambda: Loss(D, F, k=K), "Loss overrides loss_of"),
    "training_loss": (lambda: TrainingLoss(D, F, k=K), "TrainingLoss overrides training_loss"),
    "encode": (lambda: Encode(D, F, k=K), "Encode overrides _encode"),
    "input_bias": (lambda: InputBias(D, F, k=K), "InputBias overrides _input_bias"),
    "unit_rows": (lambda: NoUnitRows(D, F, k=K), "NoUnitRows overrides normalize_decoder_"),
    "buffer": (lambda: TrainedBuffer(D, F, k=K), "tilt is a buffer that requires a gradient"),
    "submodule": (lambda: Submodule(D, F, k=K), "Submodule overrides loss"),
    "tied": (lambda: Tied(D, F, k=K), "is shared with another parameter"),
    "instance": (patched_instance, "decode is replaced on this TopKSAE"),
    "tensor hook": (tensor_hook, "W_dec has a hook"),
    "forward hook": (forward_hook, "TopKSAE has hooks"),
    "parametrized": (parametrized, "ParametrizedTopKSAE"),
    "frozen": (frozen, "W_dec is frozen"),
    "bfloat16": (half, "the parameters are torch.bfloat16"),
}


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8 * N, D, generator=generator) @ torch.randn(D, D, generator=generator)


def by_hand(sae, steps, lr=3e-3):
    """Train as the trainer does, with nothing of it: the loss, torch's Adam, unit rows."""
    parameters = [p for p in sae.parameters() if p.requires_grad]
    adam = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.999), eps=6.25e-10)
    sae.train()
    for x in data().split(N)[:steps]:
        adam.zero_grad()
        sae.training_loss(x.to(sae.b_enc.dtype)).loss.backward()
        if sae.W_dec.requires_grad:
            sae.remove_parallel_grad_()
        adam.step()
        if sae.W_dec.requires_grad:
            sae.normalize_decoder_()
    return sae


def driven(sae, steps, **settings):
    """Train with the trainer, step by step, on the same batches without a scale."""
    config = TrainConfig(
        lr=3e-3, batch_size=N, steps=steps, warmup_steps=0, decay_fraction=0.0, normalize=False,
        b_dec_init="zeros", weight_init="random", clip_outliers=False, betas=(0.9, 0.999),
        compute_dtype="float32", dead_after_tokens=10**9, **settings,
    )  # fmt: skip
    trainer = Trainer(sae, None, config)
    trainer.prepare(data())
    for x in data().split(N)[:steps]:
        trainer.step(x)
    return sae


def same(a, b, tolerance=2e-5):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=tolerance, atol=tolerance), name


@pytest.mark.parametrize("way", UNFUSED)
def test_every_way_trains_as_a_loop_by_hand(way):
    torch.manual_seed(0)
    sae = UNFUSED[way][0]()
    if way in ("instance", "tensor hook", "parametrized", "buffer"):  # not to be copied
        torch.manual_seed(0)
        twin = UNFUSED[way][0]()
    else:
        twin = copy.deepcopy(sae)
    start = [p.detach().clone() for p in sae.parameters()]
    same(driven(sae, 6), by_hand(twin, 6), 2e-2 if way == "bfloat16" else 2e-5)
    moved = [not torch.equal(a, b) for a, b in zip(start, sae.parameters(), strict=True)]
    assert any(moved)
    if way == "parameter":
        assert moved[-1]


@pytest.mark.parametrize("way", UNFUSED)
def test_the_fused_update_is_refused_in_one_line(way, caplog):
    make, reason = UNFUSED[way]
    sae = make()
    with pytest.raises(ValueError, match=r"^Trainer: expected update='fused' to apply, but ") as e:
        make_update(sae, TrainConfig(update="fused"))
    assert reason in str(e.value)
    assert "\n" not in str(e.value)
    assert isinstance(make_update(sae, TrainConfig()), AutogradUpdate)


def test_it_says_once_that_a_subclass_takes_autograd(caplog):
    with caplog.at_level(logging.WARNING, "fastsae"):
        driven(Gain(D, F, k=K), 3)
    assert [r.getMessage() for r in caplog.records] == [
        "Trainer: training with update='autograd', because Gain overrides decode"
    ]


def test_a_method_replaced_on_the_class_is_noticed(monkeypatch):
    plain = fastsae.TopKSAE.decode
    monkeypatch.setattr(fastsae.TopKSAE, "decode", lambda self, acts: plain(self, acts) * 2)
    reason = why_not_fused(fastsae.TopKSAE(D, F, k=K), TrainConfig())
    assert reason == f"decode of TopKSAE is replaced by one of {__name__}"


def test_a_subclass_with_nothing_new_is_fused():
    for sae in (SameInit(D, F, K), fastsae.TopKSAE(D, F, k=K), fastsae.BatchTopKSAE(D, F, k=K)):
        assert isinstance(make_update(sae, TrainConfig()), FusedUpdate)
    torch.manual_seed(0)
    sae = SameInit(D, F, K)
    twin = copy.deepcopy(sae)
    same(driven(sae, 6, update="fused"), by_hand(twin, 6))


def test_a_parametrization_that_breaks_unit_rows_is_refused():
    sae = fastsae.TopKSAE(D, F, k=K)

    class Twice(nn.Module):
        def forward(self, rows):
            return 2 * rows

    nn.utils.parametrize.register_parametrization(sae, "W_dec", Twice())
    with pytest.raises(RuntimeError, match="expected the parametrization of W_dec to keep rows at"):
        driven(sae, 1)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_a_hook_computes_is_refused():
    sae = fastsae.TopKSAE(D, F, k=K)
    nn.utils.spectral_norm(sae, "W_dec")
    with pytest.raises(TypeError, match="expected W_dec to be a parameter, or parametrized"):
        driven(sae, 1)


def test_what_a_subclass_adds_is_saved_and_loaded(tmp_path):
    sae = Gain(D, F, k=K)
    with torch.no_grad():
        sae.gain.uniform_(0.5, 2)
    fastsae.save(sae, tmp_path)
    back = fastsae.load(tmp_path)
    assert type(back) is Gain
    torch.testing.assert_close(back.gain, sae.gain, rtol=0, atol=0)
    x = torch.randn(5, D)
    torch.testing.assert_close(back(x), sae(x), rtol=0, atol=0)


def test_what_a_class_would_not_make_again_is_not_saved(tmp_path):
    sae = fastsae.TopKSAE(D, F, k=K)
    sae.register_parameter("gain", nn.Parameter(torch.ones(D)))
    with pytest.raises(ValueError, match=r"^save: expected TopKSAE to hold nothing .* got gain;"):
        fastsae.save(sae, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_starting_fault():
    """The reproduction: 48 updates, and a parameter that only the subclass has."""
    moved = {}
    for update in ("autograd", "auto"):
        torch.manual_seed(0)
        x = torch.randn(4096, 32) @ torch.randn(32, 32) * 3
        torch.manual_seed(0)
        sae = Gain(32, 128, k=8)
        Trainer(sae, x, TrainConfig(epochs=3, batch_size=256, update=update)).fit()
        moved[update] = float((sae.gain.detach() - 1).abs().max())
    assert moved["autograd"] > 0.01
    assert moved["auto"] == moved["autograd"]


def test_total_loss_is_what_a_subclass_needs():
    """A loss of one's own from the documented pieces."""

    class Own(fastsae.TopKSAE):
        def loss_of(self, x, target, acts, dead, context):
            x_hat = self.reconstruct(x, acts)
            return total_loss(self, x, target, acts, x_hat, (x_hat**4).mean(), dead)

    sae = Own(D, F, k=K)
    x = torch.randn(10, D)
    out = sae.training_loss(x)
    expected = (x - out.reconstruction).square().sum() / (x - x.mean(0)).square().sum()
    torch.testing.assert_close(out.loss, expected + (out.reconstruction**4).mean())


class Masked(fastsae.TopKSAE):
    """A buffer that is not saved, and an argument that config() holds."""

    def __init__(self, d_in, d_sae, k, temperature=1.0, **kwargs):
        super().__init__(d_in, d_sae, k, **kwargs)
        self.temperature = temperature
        self.register_buffer("mask", torch.ones(self.d_in), persistent=False)

    def decode(self, acts):
        return super().decode(acts) * self.mask * self.temperature

    def config(self):
        return {**super().config(), "temperature": self.temperature}


class Forgetful(Masked):
    def config(self):
        config = super().config()
        del config["temperature"]
        return config

    def __init__(self, d_in, d_sae, k, temperature=1.0, **kwargs):
        super().__init__(d_in, d_sae, k, temperature, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_a_constructor_makes_is_there_after_loading(dtype, tmp_path):
    sae = Masked(D, F, K, temperature=1.5, dtype=dtype)
    fastsae.save(sae, tmp_path)
    x = torch.randn(5, D, dtype=dtype)
    assert torch.equal(fastsae.load(tmp_path)(x), sae(x))
    gain = Gain(D, F, k=K).to(dtype)
    fastsae.save(gain, tmp_path / "gain")
    assert fastsae.load(tmp_path / "gain").gain.dtype == dtype


def test_an_argument_that_config_does_not_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="hold every argument of its constructor, got none for"):
        fastsae.save(Forgetful(D, F, K, temperature=1.5), tmp_path)


def test_an_overridden_reconstruction_is_that_of_forward():
    sae = Reconstruct(D, F, k=K)
    x = torch.randn(20, D)
    torch.testing.assert_close(sae(x), sae.training_loss(x).reconstruction)


def test_it_says_which_parameters_keep_their_unit(caplog):
    class Knows(Gain):
        def rescale_code_(self, scaler):
            super().rescale_code_(scaler)

    with caplog.at_level(logging.WARNING, "fastsae"):
        for cls in (Gain, Knows, fastsae.TopKSAE):
            Trainer(cls(D, F, k=K), data(), TrainConfig(batch_size=N, steps=1)).fit()
    said = [m for m in map(logging.LogRecord.getMessage, caplog.records) if " scaled " in m]
    assert len(said) == 1
    assert "gain of Gain stay as they are when the scale is folded in" in said[0]
