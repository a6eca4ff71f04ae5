"""dictionary_learning: `trainSAE` writes ae.pt and config.json, the trainers' SAEs are filled."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from .common import D_IN, D_SAE, Case, Cases, Compute, K, default_dtype, read_json, write_json

LAYER = {"layer": 8, "lm_name": "EleutherAI/pythia-70m-deduped", "submodule_name": "resid_post_8"}
COMMON = {"steps": 10_000, "activation_dim": D_IN, "dict_size": D_SAE, "device": "cpu", **LAYER}


def make(out: Path) -> None:
    """Make every case."""
    os.environ.setdefault("WANDB_MODE", "disabled")
    cases = Cases(out, "dictionary_learning", "dictionary-learning")
    make_classes(cases)
    make_loaded_otherwise(cases)
    make_interrupted(cases)


class Batches(list):
    """Batches of activations with the settings that an ActivationBuffer has."""

    config: ClassVar = {
        "d_submodule": D_IN,
        "io": "out",
        "n_ctxs": 100,
        "ctx_len": 128,
        "refresh_batch_size": 512,
        "out_batch_size": 8192,
        "device": "cpu",
    }


def fill(case: Case, ae: nn.Module, unit: bool) -> nn.Module:
    """Give every parameter generic values, and decoder rows of norm 1 if they are trained so."""
    rows = case.rows()
    if unit:
        rows = rows / rows.norm(dim=1, keepdim=True)
    values = {
        "encoder.weight": case.encoder(),
        "encoder.bias": case.randn(D_SAE) + 0.5,
        "decoder.weight": rows.t(),
        "W_enc": case.encoder().t(),
        "W_dec": rows,
        "b_enc": case.randn(D_SAE) + 0.5,
        "threshold": case.thresholds(),
        "r_mag": 0.3 * case.randn(D_SAE),
        "gate_bias": case.randn(D_SAE) + 0.3,
        "mag_bias": case.randn(D_SAE) + 0.3,
    }
    for name in ("bias", "b_dec", "decoder_bias", "decoder.bias"):
        values[name] = case.randn(D_IN)
    for name, parameter in ae.named_parameters():
        parameter.data = values[name].contiguous()
    return ae


def train(
    case: Case,
    trainer: type,
    cfg: dict,
    change: Callable[[nn.Module], None] = lambda ae: None,
    unit: bool = False,
) -> object:
    """Let `trainSAE` save what a trainer has before its first step; returns the trainer."""
    from dictionary_learning.training import trainSAE

    made = []

    def filled(**config: object) -> object:
        made.append(trainer(**config))
        fill(case, made[0].ae, unit)
        change(made[0].ae)
        return made[0]

    configs = [{"trainer": filled, **COMMON, **cfg}]
    with tempfile.TemporaryDirectory() as scratch:
        data = Batches([torch.zeros(2, D_IN)])
        with quiet():
            trainSAE(data, configs, steps=0, save_dir=scratch, device="cpu")
        for file in (Path(scratch) / "trainer_0").iterdir():
            shutil.copy(file, case.folder / file.name)
    return made[0]


@contextlib.contextmanager
def quiet():
    """Swallow what the peer prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def set_threshold(value: float) -> Callable[[nn.Module], None]:
    """Set the threshold that is a buffer of the SAE."""

    def change(ae: nn.Module) -> None:
        ae.threshold.fill_(value)

    return change


def raise_thresholds(ae: nn.Module) -> None:
    """Some thresholds below 0."""
    ae.threshold.data[1::2] -= 0.7


def make_classes(cases: Cases) -> None:
    """Each class as its own `from_pretrained` loads it by default."""
    from dictionary_learning import dictionary, trainers
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    batch_topk = (trainers.BatchTopKTrainer, batch_top_k.BatchTopKSAE, {"k": K})
    matryoshka = (
        matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer,
        matryoshka_batch_top_k.MatryoshkaBatchTopKSAE,
        {"k": K, "group_fractions": [0.25, 0.25, 0.5]},
    )
    jumprelu = (trainers.JumpReluTrainer, dictionary.JumpReluAutoEncoder, {})
    gated = (trainers.GatedSAETrainer, dictionary.GatedAutoEncoder, {})
    topk = (trainers.TopKTrainer, top_k.AutoEncoderTopK, {"k": K})
    for name, (trainer, cls, cfg), options, notes in (
        ("GatedAutoEncoder", gated, {}, ""),
        ("JumpReluAutoEncoder", jumprelu, {}, ""),
        (
            "JumpReluAutoEncoder_negative_thresholds",
            jumprelu,
            {"change": raise_thresholds},
            ", some thresholds below 0 (there it is a relu)",
        ),
        ("AutoEncoderTopK", topk, {"unit": True}, ", decoder of norm 1 as trained"),
        ("AutoEncoderTopK_norms", topk, {}, ", decoder not of norm 1"),
        (
            "BatchTopKSAE",
            batch_topk,
            {"unit": True, "change": set_threshold(0.8125)},
            ", threshold 0.8125, decoder of norm 1 as trained",
        ),
        (
            "BatchTopKSAE_norms",
            batch_topk,
            {"change": set_threshold(0.8125)},
            ", threshold 0.8125, decoder not of norm 1",
        ),
        ("BatchTopKSAE_no_threshold", batch_topk, {}, ", threshold -1 (never set: a relu)"),
        (
            "MatryoshkaBatchTopKSAE",
            matryoshka,
            {"unit": True, "change": set_threshold(0.8125)},
            ", threshold 0.8125, groups 8 8 16",
        ),
        ("MatryoshkaBatchTopKSAE_no_threshold", matryoshka, {}, ", threshold -1 (a relu)"),
    ):
        case = cases(name)
        train(case, trainer, cfg, **options)
        ae = cls.from_pretrained(case.folder / "ae.pt")
        case.expect_module(case.x(), ae, cls.__name__ + notes)


def make_loaded_otherwise(cases: Cases) -> None:
    """AutoEncoder is normalized when loaded; AutoEncoderNew has no trainer that names it."""
    from dictionary_learning import dictionary, trainers

    case = cases("AutoEncoder")
    train(case, trainers.StandardTrainer, {})
    at32, at64 = normalized(case, torch.float32), normalized(case, torch.float64)
    case.expect(case.x(), at32, at64, "AutoEncoder, its decoder normalized by from_pretrained")

    case = cases("AutoEncoder_not_normalized")
    train(case, trainers.StandardTrainer, {})
    ae = dictionary.AutoEncoder.from_pretrained(case.folder / "ae.pt", normalize_decoder=False)
    what = "AutoEncoder, from_pretrained(normalize_decoder=False)"
    case.expect_module(case.x(), ae, what, normalize_decoder="False")

    for name in ("AutoEncoderNew", "AutoEncoderNew_misnamed"):
        case = cases(name)
        train(case, trainers.StandardTrainer, {"dict_class": dictionary.AutoEncoderNew})
        what = "AutoEncoderNew; config.json says AutoEncoder, as StandardTrainer writes always"
        if name == "AutoEncoderNew":
            cfg = read_json(case.folder / "config.json")
            cfg["trainer"]["dict_class"] = name
            write_json(case.folder / "config.json", cfg)
            what = "AutoEncoderNew; config.json says so (by hand, as older versions wrote)"
        ae = dictionary.AutoEncoderNew.from_pretrained(case.folder / "ae.pt")
        case.expect_module(case.x(), ae, what)


def normalized(case: Case, dtype: torch.dtype) -> Compute:
    """An AutoEncoder as loaded by default, its norms folded in the precision asked for."""
    from dictionary_learning.dictionary import AutoEncoder

    ae = AutoEncoder.from_pretrained(case.folder / "ae.pt", normalize_decoder=False).to(dtype)
    with torch.no_grad(), default_dtype(dtype), quiet():
        torch.manual_seed(0)
        ae.normalize_decoder()

    def compute(x: Tensor) -> tuple[Tensor, Tensor]:
        return ae.encode(x), ae(x)

    return compute


def make_interrupted(cases: Cases) -> None:
    """ae.pt of a run that was interrupted: {step, ae, optimizer, config, norm_factor}.

    Only `trainSAE(backup_steps=...)` of the repository (60ec6bf, August 2025) writes it; it is
    written here by hand in the same way. Its biases and threshold are for activations divided by
    norm_factor, and `scale_biases(norm_factor)`, which ends a run, makes them right.
    """
    from dictionary_learning import trainers
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    for name, cls, trainer, threshold in (
        ("BatchTopKSAE", BatchTopKSAE, trainers.BatchTopKTrainer, 0.8125),
        ("AutoEncoderTopK", AutoEncoderTopK, trainers.TopKTrainer, -1.0),
    ):
        case = cases(f"{name}_interrupted")
        state = train(case, trainer, {"k": K}, set_threshold(threshold), unit=True)
        interrupted = {
            "step": 1000,
            "ae": state.ae.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "config": state.config,
            "norm_factor": 1.75,
        }
        torch.save(interrupted, case.folder / "ae.pt")

        def compute(dtype: torch.dtype, cls: type = cls, saved: dict = interrupted) -> Compute:
            ae = cls(D_IN, D_SAE, K)
            ae.load_state_dict(saved["ae"])
            ae.to(dtype).scale_biases(saved["norm_factor"])
            return lambda x: (ae.encode(x), ae(x))

        what = f"{name} of an interrupted run, norm_factor 1.75 not yet folded"
        case.expect(case.x(), compute(torch.float32), compute(torch.float64), what)
