"""SAELens' trainer with our classes and with its own: the same numbers, files and refusals."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import types
import warnings
from itertools import product

import pytest
import torch
from safetensors.torch import load_file

from tests.interop.dropin.common import (
    TOLERANCES,
    assert_same,
    assert_same_gradients,
    assert_same_state,
    peer,
    rows,
)

lens = peer("sae_lens")

from sae_lens import registry  # noqa: E402
from sae_lens.config import SAETrainerConfig  # noqa: E402
from sae_lens.saes.sae import TrainStepInput  # noqa: E402
from sae_lens.training import sae_trainer  # noqa: E402

from fastsae.interop.dropin import _peers  # noqa: E402
from fastsae.interop.dropin import sae_lens as fast  # noqa: E402

N, D, F, K = 48, 16, 96, 6
WIDTHS = [12, 40, 96]
OPTIONS = {
    "TopK": {"k": K},
    "BatchTopK": {"k": 5.5},
    "MatryoshkaBatchTopK": {"k": 5.5, "matryoshka_widths": WIDTHS},
    "JumpReLU": {"jumprelu_init_threshold": 2.0, "jumprelu_bandwidth": 0.5},
}
TOPKS = ("TopK", "BatchTopK", "MatryoshkaBatchTopK")


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    monkeypatch.setattr(fast, "MOST_OPEN", 0.5)  # these SAEs are small and not sparse
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
    fast.unregister()


def pair(name, dtype=torch.float64, **options):
    """Return our SAE and theirs with the same weights, where no bias is 0 and norms differ."""
    made = {"d_in": D, "d_sae": F, "dtype": str(dtype).removeprefix("torch.")}
    made |= copy.deepcopy(OPTIONS[name]) | options
    config = getattr(lens, f"{name}TrainingSAEConfig")
    torch.manual_seed(0)
    theirs = getattr(lens, f"{name}TrainingSAE")(config(**copy.deepcopy(made)))
    with torch.no_grad():
        theirs.W_enc.copy_(0.4 * torch.randn(D, F, dtype=torch.float64))
        theirs.W_dec.copy_(0.3 * torch.randn(F, D, dtype=torch.float64))
        theirs.b_enc.copy_(0.1 * torch.randn(F, dtype=torch.float64))
        theirs.b_dec.copy_(0.1 * torch.randn(D, dtype=torch.float64))
        if name == "JumpReLU":
            theirs.threshold.mul_(1 + 0.2 * torch.rand(F))
    ours = getattr(fast, f"{name}TrainingSAE")(config(**copy.deepcopy(made)))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def step_input(x, dead=None, l0=0.3):
    mask = None if dead is None else torch.arange(F) % F < dead
    return TrainStepInput(x, {"l0": l0}, mask, 0, False)


def outputs(ours, theirs, x, dead=None):
    """Return both outputs of a training step after a backward pass; ours is a fast one."""
    given = step_input(x, dead)
    assert fast.why_not_fast(ours, given) == ""
    if isinstance(ours, lens.JumpReLUTrainingSAE):
        with torch.no_grad():
            ours.training_forward_pass(given)  # counts
    found = [sae.training_forward_pass(given) for sae in (ours, theirs)]
    assert isinstance(found[0], fast.StepOutput)
    for output in found:
        output.loss.backward()
    return found


def assert_same_outputs(ours, theirs):
    assert list(ours.losses) == list(theirs.losses)
    assert ours.loss.requires_grad == theirs.loss.requires_grad
    for name, loss in theirs.losses.items():
        assert_same(ours.losses[name], loss, name)
    for name in ("loss", "sae_out", "sae_in", "feature_acts", "hidden_pre"):
        assert_same(getattr(ours, name), getattr(theirs, name), name)
    assert ours.feature_acts.is_sparse
    assert ours.feature_acts.detach().bool().float().sum() > 0
    assert list(ours.metrics) == list(theirs.metrics)
    for name, metric in theirs.metrics.items():
        # The threshold is float64 whatever the values are.
        assert_same(ours.metrics[name], metric, name, TOLERANCES[theirs.sae_out.dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dead", [None, 0, 3, 20, 90])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("name", TOPKS)
def test_step_of_selected_codes(name, rescale, dead, dtype):
    options = {"rescale_acts_by_decoder_norm": rescale, "aux_loss_coefficient": 0.7}
    ours, theirs = pair(name, dtype, **options)
    found = outputs(ours, theirs, rows(N, D, dtype), dead)
    assert_same_outputs(*found)
    assert dead in (None, 0) or bool(found[1].losses["auxiliary_reconstruction_loss"] > 0)
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("dead", [None, 5, 90])
@pytest.mark.parametrize("rescale", [True, False])
def test_matryoshka_auxiliary_loss_of_each_level(rescale, dead):
    options = {"rescale_acts_by_decoder_norm": rescale, "use_matryoshka_aux_loss": True}
    ours, theirs = pair("MatryoshkaBatchTopK", **options)
    assert_same_outputs(*outputs(ours, theirs, rows(N, D), dead))
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("k", [0.25, 40.0, 96.0])
@pytest.mark.parametrize("name", ["BatchTopK", "MatryoshkaBatchTopK"])
def test_budget_below_one_a_token_and_above_what_is_positive(name, k):
    ours, theirs = pair(name, k=k)
    assert_same_outputs(*outputs(ours, theirs, rows(N, D)))
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("name", TOPKS)
def test_input_not_centered(name):
    ours, theirs = pair(name, apply_b_dec_to_input=False)
    assert_same_outputs(*outputs(ours, theirs, rows(N, D), 20))
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dead", [None, 0, 10])
@pytest.mark.parametrize("ste_to_input", [False, True])
@pytest.mark.parametrize("mode", ["step", "tanh", "quadratic"])
def test_jumprelu_step(mode, ste_to_input, dead, dtype):
    options = {"jumprelu_sparsity_loss_mode": mode, "jumprelu_ste_to_input": ste_to_input}
    options |= {"target_l0": 7.0, "pre_act_loss_coefficient": 0.2}
    ours, theirs = pair("JumpReLU", dtype, **options)
    found = outputs(ours, theirs, rows(N, D, dtype), dead)
    assert_same_outputs(*found)
    assert list(found[1].losses) == ["mse_loss", "l0_loss", "pre_act_loss"]
    assert_same_gradients(ours, theirs)


def test_jumprelu_clamps_thresholds_and_leaves_pre_act_loss_out():
    ours, theirs = pair("JumpReLU")
    for sae in (ours, theirs):
        sae.threshold.data[::7] = -1.0
    assert_same_outputs(*outputs(ours, theirs, rows(N, D), 10))
    assert float(ours.threshold.detach().min()) == 0
    assert_same_state(ours, theirs)
    assert_same_gradients(ours, theirs)


def test_jumprelu_is_sparse_only_while_few_are_open(monkeypatch):
    ours, theirs = pair("JumpReLU")
    x = step_input(rows(N, D))
    assert type(ours.training_forward_pass(x)) is lens.saes.sae.TrainStepOutput
    count = ours._open
    z = ours.process_sae_in(x.sae_in) @ ours.W_enc + ours.b_enc
    assert count == int((z > ours.threshold - 0.5001 * ours.bandwidth).sum())
    assert type(ours.training_forward_pass(x)) is fast.StepOutput
    assert ours._open == count
    # More entries than there is room for: their own step, and a new count.
    with torch.no_grad():
        for sae in (ours, theirs):
            sae.threshold.fill_(0.0)
    found = ours.training_forward_pass(x), theirs.training_forward_pass(x)
    assert type(found[0]) is type(found[1])
    assert_same(found[0].loss, found[1].loss, "loss")
    assert ours._open > 1.5 * count + 4 * N
    monkeypatch.setattr(fast, "MOST_OPEN", 1 / 32)
    assert ours._room(x.sae_in) == 0


def trainers(ours, theirs, batches, optimizer=None, **options):
    """Return SAELens' trainer of both."""
    config = {"lr": 3e-3, "lr_end": 1e-3, "dead_feature_window": 1, "lr_warm_up_steps": 2}
    config |= {"train_batch_size_samples": N, "total_training_samples": N * len(batches), **options}
    made = []
    for sae, adam in ((ours, optimizer or fast.FusedAdam), (theirs, torch.optim.Adam)):
        sae_trainer.Adam = adam
        made.append(lens.SAETrainer(SAETrainerConfig(**config), sae, iter(batches)))
    sae_trainer.Adam = torch.optim.Adam
    return made


# Every float32 step adds rounding, which Adam turns into a share of the rate where a gradient is
# next to 0; float64 leaves 8 digits after 12 steps.
AFTER_STEPS = {torch.float64: 1e-8, torch.float32: 2e-3}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("optimizer", [fast.FusedAdam, torch.optim.Adam])
@pytest.mark.parametrize("name", list(OPTIONS))
def test_steps_of_their_trainer(name, optimizer, dtype):
    options = {"l0_warm_up_steps": 3} if name == "JumpReLU" else {}
    ours, theirs = pair(name, dtype, **options)
    batches = [rows(N, D, dtype, seed) for seed in range(12)]
    mine, other = trainers(ours, theirs, batches, optimizer)
    dead = 0
    for x in batches:
        dead += int(other.dead_neurons.sum())
        given, expected = mine.step(x), other.step(x)
        assert_same(given.loss, expected.loss, "loss", AFTER_STEPS[dtype])
    assert type(given) is fast.StepOutput
    assert_same_state(ours, theirs, AFTER_STEPS[dtype])
    assert dead > 0 or name == "JumpReLU"  # so the auxiliary losses counted
    assert torch.equal(mine.n_forward_passes_since_fired, other.n_forward_passes_since_fired)
    assert torch.equal(mine.act_freq_scores, other.act_freq_scores)


@pytest.mark.parametrize("normalize", ["expected_average_only_in", "covariance_whitening"])
@pytest.mark.parametrize("name", TOPKS)
def test_fit_with_statistics_that_are_folded_in(name, normalize):
    ours, theirs = pair(name, normalize_activations=normalize)
    batches = [rows(N, D, seed=seed) for seed in range(14)]
    options = {"n_batches_for_norm_estimate": 4, "total_training_samples": N * 10}
    mine, other = trainers(ours, theirs, batches, **options)
    mine.fit(), other.fit()
    assert_same_state(ours, theirs, 1e-8)
    assert ours.cfg.normalize_activations == "none"
    assert ours.cfg.metadata.l0 == pytest.approx(theirs.cfg.metadata.l0)


@pytest.mark.parametrize("name", list(OPTIONS))
def test_folders_are_the_same(name, tmp_path):
    ours, theirs = pair(name, torch.float32)
    for sae in (ours, theirs):
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(0.7)
    for kind in ("save_model", "save_inference_model"):
        for sae, folder in ((ours, "ours"), (theirs, "theirs")):
            getattr(sae, kind)(tmp_path / folder)
        configs = [json.loads((tmp_path / f / "cfg.json").read_text()) for f in ("ours", "theirs")]
        assert configs[0] == configs[1]
        weights = [load_file(tmp_path / f / "sae_weights.safetensors") for f in ("ours", "theirs")]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])
    inference = lens.SAE.load_from_disk(tmp_path / "ours")
    x = rows(N, D, torch.float32)
    assert_same(inference(x), lens.SAE.load_from_disk(tmp_path / "theirs")(x), "reconstruction")


@pytest.mark.parametrize("name", list(OPTIONS))
def test_both_read_the_folders_of_the_other(name, tmp_path):
    ours, theirs = pair(name, torch.float32)
    ours.save_model(tmp_path / "ours")
    theirs.save_model(tmp_path / "theirs")
    as_theirs = lens.TrainingSAE.load_from_disk(tmp_path / "ours")
    fast.register()
    as_ours = lens.TrainingSAE.load_from_disk(tmp_path / "theirs")
    assert type(as_theirs) is type(theirs)
    assert type(as_ours) is type(ours)
    assert_same_state(as_ours, as_theirs, 0)  # a loaded topk_threshold is no longer float64
    assert torch.equal(as_ours.W_enc, theirs.W_enc)
    assert as_ours.W_enc.t().is_contiguous()
    if name == "JumpReLU":
        as_ours._open = as_theirs._open = 0
    assert_same_outputs(*outputs(as_ours, as_theirs, rows(N, D, torch.float32), 10))
    as_ours.zero_grad(), ours.load_weights_from_checkpoint(tmp_path / "theirs")
    assert ours.W_enc.t().is_contiguous()
    assert_same_state(ours, theirs, 0)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("name", ["TopK", "MatryoshkaBatchTopK"])
def test_checkpoints_of_a_trainer_continue_in_the_other(name, swap, tmp_path):
    ours, theirs = pair(name)
    batches = [rows(N, D, seed=seed) for seed in range(10)]
    mine, other = trainers(ours, theirs, batches)
    for x in batches[:5]:
        mine.step(x), other.step(x)
    writer, reader = (mine, other) if swap else (other, mine)
    writer.sae.save_model(tmp_path)
    writer.save_trainer_state(tmp_path)
    for x in batches[5:]:
        writer.step(x)
    reader.sae.load_weights_from_checkpoint(tmp_path)
    reader.load_trainer_state(tmp_path)
    assert reader.optimizer.param_groups[0]["fused"] == (True if reader is mine else None)
    for x in batches[5:]:
        reader.step(x)
    assert_same_state(reader.sae, writer.sae, 1e-8)


def test_encode_decode_and_forward_are_theirs():
    for name in OPTIONS:
        ours, theirs = pair(name)
        x = rows(N, D)
        for call in ("encode", "forward"):
            assert_same(getattr(ours, call)(x), getattr(theirs, call)(x), f"{name} {call}")
        assert not ours.encode(x).is_sparse
        assert_same(ours.decode(theirs.encode(x)), theirs(x), f"{name} decode")


def test_code_has_a_gradient_as_theirs():
    ours, theirs = pair("TopK")
    found = [s.training_forward_pass(step_input(rows(N, D))) for s in (ours, theirs)]
    for output in found:
        dense = output.feature_acts.to_dense() if output.feature_acts.is_sparse else None
        code = output.feature_acts if dense is None else dense
        (output.loss + code.square().sum() + output.hidden_pre.sum()).backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("name", list(OPTIONS))
def test_torch_compile_leaves_the_fast_step_alone(name):
    """`compile_sae` of their runner compiles `training_forward_pass`."""
    ours, theirs = pair(name)
    ours.training_forward_pass(step_input(rows(N, D), 20))  # counts, in JumpReLU
    for buffer in ("topk_threshold",) if hasattr(ours, "topk_threshold") else ():
        getattr(ours, buffer).zero_()
    compiled = torch.compile(ours.training_forward_pass, backend="eager")
    given = compiled(step_input(rows(N, D), 20))
    expected = theirs.training_forward_pass(step_input(rows(N, D), 20))
    given.loss.backward(), expected.loss.backward()
    assert_same_outputs(given, expected)
    assert_same_gradients(ours, theirs)
    torch.compiler.reset()


def test_pre_activations_of_an_earlier_step_are_refused():
    ours, _ = pair("TopK")
    output = ours.training_forward_pass(step_input(rows(N, D)))
    read = ours.training_forward_pass(step_input(rows(N, D)))
    before = read.hidden_pre
    with torch.no_grad():
        ours.W_enc.mul_(2)
    assert read.hidden_pre is before
    with pytest.raises(RuntimeError, match="expected hidden_pre to be read before the weights"):
        _ = output.hidden_pre


@pytest.mark.parametrize("name", TOPKS)
def test_where_their_own_code_runs(name):
    ours, theirs = pair(name)
    x = rows(N, D)
    seen = []
    ours.hook_sae_acts_pre.add_hook(lambda value, hook: seen.append(value.shape))
    assert "hook_sae_acts_pre" in fast.why_not_fast(ours, step_input(x))
    given, expected = (sae.training_forward_pass(step_input(x, 20)) for sae in (ours, theirs))
    assert type(given) is type(expected)
    assert seen == [(N, F)]
    assert_same(given.loss, expected.loss, "loss")
    ours.reset_hooks()
    assert fast.why_not_fast(ours, step_input(x)) == ""
    with torch.autocast("cpu", torch.bfloat16):
        assert fast.why_not_fast(ours, step_input(x)).startswith("autocast")
    assert "shape [2, 24, 16]" in fast.why_not_fast(ours, step_input(x.view(2, 24, D)))
    half, their_half = pair(name, torch.bfloat16)
    x16 = x.to(torch.bfloat16)
    assert fast.why_not_fast(half, step_input(x16)).startswith("dtype torch.bfloat16")
    found = [s.training_forward_pass(step_input(x16)).loss for s in (half, their_half)]
    assert torch.equal(*found)


def test_auxiliary_loss_with_layer_norm_is_refused_as_theirs():
    ours, theirs = pair("TopK", normalize_activations="layer_norm")
    assert "layer_norm" in fast.why_not_fast(ours, step_input(rows(N, D)))
    for sae in (ours, theirs):
        with pytest.raises(ValueError, match="does not support activation normalization"):
            sae.training_forward_pass(step_input(rows(N, D), 20))
        sae.training_forward_pass(step_input(rows(N, D))).loss.backward()
    assert_same_gradients(ours, theirs)


def test_hooks_on_input_and_reconstruction_stay_fast():
    ours, theirs = pair("TopK")
    for sae in (ours, theirs):
        sae.hook_sae_input.add_hook(lambda value, hook: value * 1.5)
        sae.hook_sae_recons.add_hook(lambda value, hook: value + 1)
    assert_same_outputs(*outputs(ours, theirs, rows(N, D), 20))
    assert_same_gradients(ours, theirs)


def test_register_and_unregister():
    before = dict(registry.SAE_TRAINING_CLASS_REGISTRY)
    fast.register()
    fast.register()
    for name in OPTIONS:
        config = getattr(lens, f"{name}TrainingSAEConfig")(d_in=D, d_sae=F, **OPTIONS[name])
        made = lens.TrainingSAE.from_dict(config.to_dict())
        assert type(made) is getattr(fast, f"{name}TrainingSAE")
        assert type(made.cfg) is type(config)
        assert isinstance(made, getattr(lens, f"{name}TrainingSAE"))
    assert sae_trainer.Adam is fast.FusedAdam
    fast.register(fused_adam=False)
    assert sae_trainer.Adam is torch.optim.Adam
    fast.unregister()
    assert before == registry.SAE_TRAINING_CLASS_REGISTRY
    assert sae_trainer.Adam is torch.optim.Adam


@pytest.mark.parametrize("change", ["option", "signature", "class", "optimizer"])
def test_another_version_is_refused_whole(change, monkeypatch):
    if change == "option":
        config = dataclasses.make_dataclass(
            "NewConfig", [("sparkle", int, 0)], bases=(lens.JumpReLUTrainingSAEConfig,)
        )
        entry = (lens.JumpReLUTrainingSAE, config)
        monkeypatch.setitem(registry.SAE_TRAINING_CLASS_REGISTRY, "jumprelu", entry)
    elif change == "signature":
        other = lambda self, step_input, more: None  # noqa: E731
        monkeypatch.setattr(lens.JumpReLUTrainingSAE, "training_forward_pass", other)
    elif change == "class":
        entry = (lens.GatedTrainingSAE, lens.JumpReLUTrainingSAEConfig)
        monkeypatch.setitem(registry.SAE_TRAINING_CLASS_REGISTRY, "jumprelu", entry)
    else:
        monkeypatch.setattr(sae_trainer, "Adam", torch.optim.AdamW)
    before = dict(registry.SAE_TRAINING_CLASS_REGISTRY)
    with pytest.raises(
        ImportError, match=r"^fastsae's drop-in for sae-lens: expected .*, got "
    ) as e:
        fast.register()
    assert "\n" not in str(e.value)
    assert before == registry.SAE_TRAINING_CLASS_REGISTRY


def test_a_missing_peer_is_one_line(monkeypatch):
    found = _peers.Peer("some-library", "1.2")
    with pytest.raises(ImportError, match=r"pip install some-library==1\.2$") as error:
        found.module("a_library_that_is_not_there")
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "half_a_library", types.ModuleType("half_a_library"))
    with pytest.raises(ImportError, match=r"expected half_a_library\.Part, got nothing"):
        found.module("half_a_library", "Part")


@pytest.mark.parametrize(("transposed", "fused"), list(product([False, True], [False, True])))
def test_fused_adam_is_adam(transposed, fused):
    """With any layout of gradient and parameter, and with a state that plain Adam saved."""
    torch.manual_seed(0)
    start, gradients = torch.randn(5, 7, dtype=torch.float64), torch.randn(6, 5, 7).double()
    p, q = (torch.nn.Parameter(start.clone()) for _ in range(2))
    if transposed:
        p.data = p.data.t().contiguous().t()
    ours, theirs = (
        fast.FusedAdam([p], lr=0.1, weight_decay=0.1),
        torch.optim.Adam([q], lr=0.1, weight_decay=0.1),
    )
    for i, gradient in enumerate(gradients):
        p.grad = gradient.t().contiguous().t() if fused else gradient.clone()
        q.grad = gradient.clone()
        ours.step(), theirs.step()
        if i == 2:
            saved = copy.deepcopy((ours.state_dict(), theirs.state_dict()))
            assert saved[0]["param_groups"][0]["fused"] is None
            assert saved[0]["state"][0]["exp_avg"].is_contiguous()
            ours.load_state_dict(saved[1])
            theirs.load_state_dict(saved[0])
            assert ours.state[p]["exp_avg"].stride() == p.stride()
    assert_same(p, q, "parameter", 1e-12)
