"""An SAE from elsewhere is trained further from where it was: the first step does not spoil it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import fastsae
from fastsae import TrainConfig, Trainer, average_saes, nn
from tests.interop.test_peers import PEERS, entrance
from tests.nn.randomized import make, rows

CASES = [
    "saelens/standard", "saelens/gated", "saelens/jumprelu", "saelens/jumprelu_no_b_dec",
    "saelens/jumprelu_negative_thresholds", "saelens/batchtopk_exported", "saelens/topk_rescaled",
    "saelens/matching_pursuit_residual", "saelens/training_batchtopk",
    "dictionary_learning/AutoEncoder", "dictionary_learning/AutoEncoderNew",
    "dictionary_learning/JumpReluAutoEncoder", "dictionary_learning/GatedAutoEncoder",
    "sparsify/topk", "sparsify/groupmax", "gemma_scope/v1", "llama_scope/jumprelu",
    "llamascopium/topk_decoder_norm_not_included", "llamascopium/topk", "saev/relu",
]  # fmt: skip
OF_OTHER_NORMS = {
    "saelens/matching_pursuit_residual", "sparsify/groupmax",
    "llamascopium/topk_decoder_norm_not_included",
}  # fmt: skip
"""Cases whose rows are not of norm 1 and cannot be scaled without choosing other latents."""


def untouched(sae, x, **settings):
    """Do one update that is too small to be seen, and return the module."""
    config = TrainConfig(
        lr=1e-12, steps=1, batch_size=len(x), progress=False, calibration_rows=0, **settings
    )
    Trainer(sae, x, config).fit()
    return sae.eval()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_the_first_step_leaves_it_as_it_was(name, normalize, caplog):
    case = PEERS / name
    x = load_file(case / "expected.safetensors")["x"].float().repeat(20, 1)
    x = x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    sae = fastsae.load(entrance(case), dtype=torch.float32)
    with torch.no_grad():
        before, active = sae(x), sae.encode(x) != 0
        after = untouched(sae, x, normalize=normalize, clip_outliers=False)(x)
        same = (sae.encode(x) != 0) == active
    warned = "which become 1; its code" in caplog.text
    norms = fastsae.load(entrance(case)).W_dec.detach().norm(dim=1)
    if name in OF_OTHER_NORMS and float((norms - 1).abs().max()) > 1e-3:
        assert warned
        return
    assert not warned
    if isinstance(sae, nn.BatchTopKSAE):
        return  # its threshold is an average over batches, which moves
    if isinstance(sae, nn.JumpReLUSAE):
        assert float(same.float().mean()) > 0.999
    else:
        assert bool(same.all())
    assert float((after - before).abs().max()) <= 1e-4 * float(before.abs().max())


def test_thresholds_of_0_train_and_are_saved(tmp_path):
    case = PEERS / "saelens/jumprelu"
    sae = fastsae.load(case, dtype=torch.float32)
    assert bool((sae.threshold < 1e-30).any())
    x = load_file(case / "expected.safetensors")["x"].float().repeat(20, 1)
    config = TrainConfig(lr=1e-3, steps=20, batch_size=64, progress=False, out=tmp_path)
    Trainer(sae, x, config).fit()
    back = fastsae.load(tmp_path)
    assert torch.equal(back.encode(x), sae.encode(x))
    sae.k = 4
    with pytest.raises(ValueError, match="JumpReLUSAE: expected thresholds above 0, got"):
        sae.calibrate_(x)


def test_a_jumprelu_without_biases_keeps_its_thresholds():
    sae = nn.JumpReLUSAE(6, 16, dtype=torch.float64)
    x = 5 * rows(200, 6)
    with torch.no_grad():
        sae.log_threshold.copy_(torch.linspace(0.5, 3, 16).log())
    sae.thresholds_in_units = False
    before = sae.threshold.detach().clone()
    untouched(sae, x, b_dec_init="zeros", weight_init="random")
    torch.testing.assert_close(sae.threshold.detach(), before, rtol=1e-5, atol=0)


def test_new_thresholds_follow_the_unit():
    sae = nn.JumpReLUSAE(6, 16, threshold=0.5, dtype=torch.float64)
    x = 5 * rows(4000, 6)
    sae.loss(x)
    assert sae.threshold[0].item() == pytest.approx(0.5 * 5, rel=0.05)


@pytest.mark.parametrize(
    "build",
    [
        lambda: make(nn.ReLUSAE, 6, 16),
        lambda: make(nn.GatedSAE, 6, 16),
        lambda: make(nn.JumpReLUSAE, 6, 16),
        lambda: make(nn.TopKSAE, 6, 16, 3, select_by_decoder_norm=True),
        lambda: make(nn.ReLUTranscoder, 6, 4, 16),
    ],
)
def test_norms_are_folded_into_the_code(build):
    sae, x = build(), rows(50, 6)
    norm = sae.W_dec.detach().norm(dim=1)
    before, code = sae(x).detach(), sae.encode(x).detach()
    assert sae.fold_decoder_norm_()
    torch.testing.assert_close(sae(x), before)
    torch.testing.assert_close(sae.encode(x), code * norm)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(16, dtype=torch.float64))


def test_norms_that_choose_are_not_folded():
    sae = make(nn.TopKSAE, 6, 16, 3)
    before = sae.W_dec.detach().clone()
    assert not sae.fold_decoder_norm_()
    assert torch.equal(sae.W_dec, before)


def test_the_average_of_one_sae_is_itself():
    sae, x = make(nn.ReLUSAE, 6, 16).eval(), rows(50, 6)
    torch.testing.assert_close(average_saes([sae, sae])(x), sae(x))


def test_a_matching_pursuit_resumes_in_its_unit(tmp_path):
    def module():
        torch.manual_seed(0)
        return nn.MatchingPursuitSAE(8, 32, 4, residual_threshold=2.0)

    x = 10 * torch.randn(512, 8, generator=torch.Generator().manual_seed(1)) + 3
    config = TrainConfig(
        steps=12,
        batch_size=64,
        progress=False,
        checkpoint_every=5,
        keep_checkpoints=9,
        out=tmp_path,
    )
    whole = Trainer(module(), x, config).fit().sae
    assert float(whole.stop_norm) == pytest.approx(2, rel=1e-5)
    saved = sorted((tmp_path / "checkpoints").iterdir())[0]
    resumed = Trainer(module(), x, config).fit(resume=saved).sae
    assert torch.equal(resumed.W_dec, whole.W_dec)


def test_a_tied_matrix_stays_tied():
    sae = nn.MatchingPursuitSAE(8, 32, 4)
    state = sae.state_dict()
    moved = nn.MatchingPursuitSAE(8, 32, 4).to("meta").to_empty(device="cpu")
    moved.load_state_dict(state)
    assert moved.W_enc_rows is moved.W_dec
    assert sae.double().W_enc_rows is sae.W_dec


def test_formats_do_not_share_a_folder(tmp_path):
    sae = make(nn.TopKSAE, 6, 16, 3)
    fastsae.save(sae, tmp_path)
    for format in ("sparsify", "dictionary-learning"):
        with pytest.raises(ValueError, match="save: expected a folder without an SAE of another"):
            fastsae.save(sae, tmp_path, format=format)
    fastsae.save(sae, tmp_path / "other", format="sparsify")
    with pytest.raises(ValueError, match="save: expected a folder without an SAE of another"):
        fastsae.save(sae, tmp_path / "other")
    (tmp_path / "sae.safetensors").write_bytes((tmp_path / "other/sae.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"files of saelens, sparsify; give format="):
        fastsae.load(tmp_path)
    with pytest.raises(ValueError, match=r"load: expected the folder of an SAE of sparsify"):
        fastsae.load(tmp_path / "other" / "sae.safetensors")


def test_a_tensor_that_nobody_reads_is_refused(tmp_path):
    from safetensors.torch import save_file

    case = PEERS / "saelens/standard"
    (tmp_path / "cfg.json").write_bytes((case / "cfg.json").read_bytes())
    tensors = load_file(case / "sae_weights.safetensors")
    save_file(
        {**tensors, "finetuning_scaling_factor": torch.ones(32)},
        tmp_path / "sae_weights.safetensors",
    )
    with pytest.raises(ValueError, match="cannot be represented: finetuning_scaling_factor"):
        fastsae.load(tmp_path)
