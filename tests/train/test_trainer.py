"""The loop: what a step leaves behind, what it refuses, and exact continuation."""

import copy
import errno
import json
import os
import re
import signal
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastsae import load, save
from fastsae.data.source import EpochBatches, TensorSource
from fastsae.nn import BatchTopKSAE, TopKSAE
from fastsae.train import TrainConfig, Trainer, latest
from fastsae.train import checkpoint as checkpoint_module
from fastsae.train.metrics import TIMED

D_IN, D_SAE = 8, 64


def rows(n=400, seed=3):
    g = torch.Generator().manual_seed(seed)
    basis = torch.randn(12, D_IN, generator=g)
    return torch.rand(n, 12, generator=g).pow(4) @ basis + 2 + torch.randn(D_IN, generator=g)


def make(cls=TopKSAE, seed=0, **arguments):
    torch.manual_seed(seed)
    return cls(D_IN, D_SAE, **{"k": 3, "k_aux": 8, **arguments})


def settings(**arguments):
    return TrainConfig(
        **{"batch_size": 20, "steps": 50, "lr": 3e-3, "log_every": 10, "dead_after_tokens": 100}
        | {"progress": False}
        | arguments
    )


class Watched(TensorSource):
    """Data that call `act(i)` before batch i of the whole run."""

    def __init__(self, x, act):
        super().__init__(x)
        self.act = act

    def batches(self, batch_size, *, seed=0):
        return Watcher(super().batches(batch_size, seed=seed), self.act)


class Watcher:
    """An iterator of batches with a state, from the first batch of a run on."""

    def __init__(self, batches, act):
        self.batches, self.act, self.count = batches, act, 0
        self.state_dict, self.load_state_dict = batches.state_dict, batches.load_state_dict

    def __iter__(self):
        return self

    def __next__(self):
        replaced = self.act(self.count)
        self.count += 1
        batch = next(self.batches)
        return batch if replaced is None else replaced


def same_tensors(a, b):
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("cls", [TopKSAE, BatchTopKSAE])
def test_training_works_and_reports(cls, tmp_path):
    x, val = rows(), rows(200, seed=3)[100:]
    sae = make(cls)
    before = float((x - sae(x)).detach().square().sum() / (x - x.mean(0)).square().sum())
    result = Trainer(sae, x, settings(steps=200, out=tmp_path), val=val).fit()
    assert [row["step"] for row in result.history] == list(range(10, 201, 10))
    assert result.final["tokens"] == 200 * 20
    assert result.final["lr"] == pytest.approx(3e-3 / 40)  # last of the 40 steps of decay
    error = (x - sae(x)).detach().square().sum() / (x - x.mean(0)).square().sum()
    assert error < 0.5 * before
    assert result.final["fvu"] == pytest.approx(float(error), rel=0.5)
    error = (val - sae(val)).detach()
    fvu = error.square().sum() / (val - val.mean(0)).square().sum()
    assert result.final["val_fvu"] == pytest.approx(float(fvu), rel=1e-4)
    assert result.final["val_mse"] == pytest.approx(float(error.square().sum(1).mean()), rel=1e-4)
    assert result.final["val_l0"] == pytest.approx(float(sae.encode_sparse(val).l0()))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert not sae.training
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history
    assert torch.equal(load(tmp_path)(val), sae(val))


def test_each_step_projects_updates_and_normalises(monkeypatch):
    sae = make()
    trainer = Trainer(sae, rows(), settings(clip_grad_norm=1e-3, update="autograd"))
    trainer.prepare()
    x = next(trainer.data.batches(20))
    seen = []
    optimizer = trainer._update.optimizer
    step = optimizer.step
    monkeypatch.setattr(optimizer, "step", lambda: seen.append(
        ((sae.W_dec.grad * sae.W_dec).sum(1).abs().max(),
         torch.nn.utils.get_total_norm([p.grad for p in sae.parameters()]),
         sae.W_dec.norm(dim=1))) or step())  # fmt: skip
    for _ in range(3):
        trainer.step(x)
    assert len(seen) == 3
    for parallel, norm, rows_before in seen:
        assert parallel < 1e-8
        assert norm == pytest.approx(1e-3, rel=1e-3)
        torch.testing.assert_close(rows_before, torch.ones(D_SAE))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert trainer.steps_done == 3


@pytest.mark.parametrize("unit", [1e-3, 40.0])
def test_normalised_training_does_not_see_the_unit_of_the_data(unit):
    x = rows().double()
    plain, scaled = make(dtype=torch.float64), make(dtype=torch.float64)
    mse = Trainer(plain, x, settings()).fit().final["mse"]
    assert Trainer(scaled, unit * x, settings()).fit().final["mse"] == pytest.approx(unit**2 * mse)
    torch.testing.assert_close(scaled.W_enc, plain.W_enc)
    torch.testing.assert_close(scaled.b_dec, unit * plain.b_dec)
    torch.testing.assert_close(scaled.b_enc, unit * plain.b_enc)


def test_the_scale_makes_the_spread_d_in_and_ignores_outliers():
    x = rows()
    wild = torch.cat([x, 1e5 * torch.ones(4, D_IN)])
    scales = []
    for data in (x, wild):
        trainer = Trainer(make(), data, settings())
        trainer.prepare()
        scales.append(trainer.scaler.scales[0])
    spread = (scales[0] * (x - x.mean(0))).square().sum(1).mean()
    assert spread == pytest.approx(D_IN, rel=1e-4)
    assert scales[1] == pytest.approx(scales[0], rel=1e-6)
    assert trainer.sae.b_dec.abs().max() < 100


@pytest.mark.parametrize("start", ["geometric_median", "mean", "zeros"])
def test_b_dec_starts_where_it_is_told(start):
    x, sae = rows(), make()
    expected = {"mean": x.mean(0), "zeros": torch.zeros(D_IN)}
    trainer = Trainer(sae, x, settings(b_dec_init=start))
    trainer.prepare()
    trainer.finish()
    if start == "geometric_median":
        away = torch.nn.functional.normalize(sae.b_dec - x, dim=1)
        assert away.sum(0).norm() < 0.05
    else:
        torch.testing.assert_close(sae.b_dec.detach(), expected[start])


@pytest.mark.parametrize("start", ["geometric_median", "mean", "zeros"])
@pytest.mark.parametrize("name", ["b_dec", "b_enc"])
def test_biases_that_are_not_zero_are_kept(name, start):
    sae = make()
    setattr(sae, name, torch.full_like(getattr(sae, name), 0.7))
    before = copy.deepcopy(sae.state_dict())
    trainer = Trainer(sae, rows(), settings(b_dec_init=start))
    trainer.prepare()
    assert trainer.scaler.scales[0] != 1
    trainer.finish()
    for key, tensor in sae.state_dict().items():
        torch.testing.assert_close(tensor, before[key])


def test_without_rows_held_back_the_threshold_is_that_of_the_last_batches():
    x = rows(4000)
    config = settings(steps=200, lr=1e-2, calibration_rows=0)
    sae = Trainer(make(BatchTopKSAE), x, config).fit().sae
    l0 = sae.encode_sparse(x).l0()
    assert l0 == pytest.approx(3, rel=0.03)


def test_auxk_revives_dead_latents():
    x = rows(2000)
    counts = {}
    for alpha in (0.0, 1 / 32):
        sae = make(auxk_alpha=alpha)
        sae.initialize_b_dec_(x, "mean")
        sae.b_enc = torch.where(torch.arange(D_SAE) < 40, -50.0, 0.0)
        result = Trainer(sae, x, settings(steps=300, lr=1e-2)).fit()
        assert result.history[2]["dead"] >= 30
        assert (max(row["aux_loss"] for row in result.history) > 0) == (alpha > 0)
        counts[alpha] = result.final["dead"]
    assert counts[0.0] >= 30


def test_a_batch_with_nan_changes_nothing(tmp_path):
    def poison(i):
        if i == 30:
            bad = rows(20)
            bad[3, 1], bad[11, 0] = torch.nan, torch.inf
            return bad
        return None

    clean, sae = make(BatchTopKSAE), make(BatchTopKSAE)
    config = settings(out=tmp_path / "a", checkpoint_every=10)
    with pytest.raises(ValueError, match="at step 30, got 2 of 20 rows with NaN or Inf; nothing"):
        Trainer(sae, Watched(rows(), poison), config).fit()
    assert latest(tmp_path / "a/checkpoints").name == "step_000000030"

    def stop(i):
        if i == 30:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        Trainer(clean, Watched(rows(), stop), settings(out=tmp_path / "b")).fit()
    for name, tensor in clean.state_dict().items():
        assert torch.equal(sae.state_dict()[name], tensor), name


def test_nan_in_the_sample_stops_before_anything_starts(tmp_path):
    x = rows()
    x[0, 0] = torch.nan
    sae = make()
    before = copy.deepcopy(sae.state_dict())
    with pytest.raises(ValueError, match="at step 0, got 1 of 400 rows"):
        Trainer(sae, x, settings(out=tmp_path)).fit()
    assert all(torch.equal(before[k], v) for k, v in sae.state_dict().items())


def test_constant_data_and_diverging_weights_are_errors(tmp_path):
    with pytest.raises(ValueError, match="expected activations that vary, got equal rows"):
        Trainer(make(), torch.ones(40, D_IN), settings()).fit()
    sae = make()
    config = settings(lr=1e30, out=tmp_path, checkpoint_every=1, log_every=1)
    with pytest.raises(RuntimeError, match=r"expected (a finite loss|finite weights), got"):
        Trainer(sae, rows(), config).fit()
    found = latest(tmp_path / "checkpoints")
    assert found is None or all(p.isfinite().all() for p in load(found).parameters())


@pytest.mark.parametrize("cls", [TopKSAE, BatchTopKSAE])
@pytest.mark.parametrize("stop_at", [7, 33, 40])
def test_a_resumed_run_is_the_same_to_the_last_bit(cls, stop_at, tmp_path):
    def crash(i):
        if i == stop_at:
            raise RuntimeError("crash")

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    result = Trainer(make(cls), rows(), settings(out=whole, checkpoint_every=6)).fit()
    assert max(row["dead"] for row in result.history) > 0
    assert max(row["aux_loss"] for row in result.history) > 0
    config = settings(out=cut, checkpoint_every=6)
    with pytest.raises(RuntimeError, match="crash"):
        Trainer(make(cls), Watched(rows(), crash), config).fit()
    resumed = Trainer(make(cls, seed=99), rows(), config).fit(resume=True)
    for name in ("checkpoints/step_000000050/state.safetensors", "sae_weights.safetensors"):
        assert same_tensors(whole / name, cut / name), name
    keep = [{k: v for k, v in row.items() if k not in TIMED} for row in result.history]
    again = [{k: v for k, v in row.items() if k not in TIMED} for row in resumed.history]
    assert again == keep


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_finishes_the_step_and_leaves_a_checkpoint(name, tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # something may have started us under nohup

    def send(i):
        if i == 17:
            os.kill(os.getpid(), getattr(signal, name))

    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    Trainer(make(), rows(), settings(out=whole)).fit()
    with pytest.raises(KeyboardInterrupt, match=f"{name} at step 18 of 50; .* fit.resume=True"):
        Trainer(make(), Watched(rows(), send), settings(out=cut)).fit()
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert latest(cut / "checkpoints").name == "step_000000018"
    Trainer(make(seed=5), rows(), settings(out=cut)).fit(resume=True)
    assert same_tensors(whole / "sae_weights.safetensors", cut / "sae_weights.safetensors")


def test_a_signal_during_a_validation_leaves_a_checkpoint_too(tmp_path):
    class Slow(TensorSource):
        def batches(self, batch_size, *, seed=0):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().batches(batch_size, seed=seed)

    config = settings(out=tmp_path, eval_every=20)
    with pytest.raises(KeyboardInterrupt, match="SIGTERM at step 20 of 50"):
        Trainer(make(), rows(), config, val=Slow(rows())).fit()
    assert latest(tmp_path / "checkpoints").name == "step_000000020"


def test_a_signal_without_a_folder_says_that_nothing_was_saved():
    def send(i):
        if i == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt, match=r"nothing was saved, because config\.out is None"):
        Trainer(make(), Watched(rows(), send), settings()).fit()


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    original = checkpoint_module.write_tensors

    def fill(i):
        if i == 25:
            monkeypatch.setattr(checkpoint_module, "write_tensors", full)

    def full(file, tensors):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    config = settings(out=tmp_path, checkpoint_every=10)
    message = r"^checkpoint: could not write .*step_000000030 \(No space .*step_000000020$"
    with pytest.raises(RuntimeError, match=message) as caught:
        Trainer(make(), Watched(rows(), fill), config).fit()
    assert isinstance(caught.value.__cause__, OSError)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_000000010", "step_000000020"]
    monkeypatch.setattr(checkpoint_module, "write_tensors", original)
    assert Trainer(make(), rows(), config).fit(resume=True).final["step"] == 50


def test_a_folder_with_another_run_is_not_overwritten(tmp_path):
    Trainer(make(), rows(), settings(out=tmp_path)).fit()
    with pytest.raises(ValueError, match=r"hold no earlier run, got .*; fit\(resume=True\)"):
        Trainer(make(), rows(), settings(out=tmp_path)).fit()
    finished = Trainer(make(seed=7), rows(), settings(out=tmp_path)).fit(resume=True)
    assert finished.final["step"] == 50
    assert torch.equal(finished.sae.W_enc, load(tmp_path).W_enc)
    for other, message in (
        (Trainer(make(), rows(), settings(out=tmp_path, lr=1e-3)), "expected lr = 0.003 .* 0.001"),
        (Trainer(make(), rows(380), settings(out=tmp_path)), "expected rows = 400 .* got 380"),
        (Trainer(make(k=5), rows(), settings(out=tmp_path)), "expected k = 3 .* got 5"),
        (Trainer(make(BatchTopKSAE), rows(), settings(out=tmp_path)), "expected class = 'TopKSAE'"),
    ):
        with pytest.raises(ValueError, match=message):
            other.fit(resume=True)


def test_data_that_end_early_are_an_error():
    class Short(TensorSource):
        def batches(self, batch_size, *, seed=0):
            return EpochBatches(lambda epoch, start: iter(self.x[:60].split(batch_size)), 20)

    with pytest.raises(RuntimeError, match="expected 20 batches in epoch 0, got 3"):
        Trainer(make(), Short(rows()), settings()).fit()


def test_half_precision_data_train_a_float32_module():
    result = Trainer(make(), rows().half(), settings()).fit()
    assert result.sae.W_enc.dtype == torch.float32
    assert result.final["fvu"] < 1


def test_tensorboard_files_and_the_message_without_the_package(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    Trainer(make(), rows(), settings(out=tmp_path / "a", tensorboard=True)).fit()
    assert list((tmp_path / "a/tensorboard").glob("events*"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    sae, x = make(), rows()
    with pytest.raises(RuntimeError, match=r"pip install 'fastsae\[tensorboard\]'"):
        Trainer(sae, x, settings(out=tmp_path / "b", tensorboard=True, b_dec_init="mean")).fit()
    torch.testing.assert_close(sae.b_dec.detach(), x.mean(0))  # back in the unit of the data


def test_progress_is_quiet_unless_asked_for(capfd):
    Trainer(make(), rows(), settings(progress=None)).fit()
    assert capfd.readouterr().err == ""
    Trainer(make(), rows(), settings(progress=True)).fit()
    assert "50/50" in capfd.readouterr().err


def test_sgd_sai_learns_planted_directions():
    g = torch.Generator().manual_seed(6)
    directions = torch.nn.functional.normalize(torch.randn(24, 16, generator=g), dim=1)
    active = torch.rand(4400, 24, generator=g).topk(2).indices
    code = torch.zeros(4400, 24).scatter_(1, active, 1 + torch.rand(4400, 2, generator=g))
    x = 30 * (code @ directions) + 100
    sae = TopKSAE(16, 48, k=2)
    config = TrainConfig(batch_size=100, steps=400, optimizer="sgd_sai", progress=False)
    assert Trainer(sae, x[:4000], config, val=x[4000:]).fit().final["val_fvu"] < 0.5


@pytest.mark.parametrize("cls", [TopKSAE, BatchTopKSAE])
@pytest.mark.parametrize("stop_at", [7, 33])
def test_a_resumed_run_of_sgd_sai_is_the_same_to_the_last_bit(cls, stop_at, tmp_path):
    def crash(i):
        if i == stop_at:
            raise RuntimeError("crash")

    def config(out):
        return settings(optimizer="sgd_sai", lr=None, out=out, checkpoint_every=6)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    Trainer(make(cls), rows(), config(whole)).fit()
    with pytest.raises(RuntimeError, match="crash"):
        Trainer(make(cls), Watched(rows(), crash), config(cut)).fit()
    Trainer(make(cls, seed=99), rows(), config(cut)).fit(resume=True)
    for name in ("checkpoints/step_000000050/state.safetensors", "sae_weights.safetensors"):
        assert same_tensors(whole / name, cut / name), name
    state = load_file(whole / "checkpoints/step_000000050/state.safetensors")
    assert state["update.W_enc_rows.gsnr"] > 1
    assert state["update.W_dec.momentum"].any()


def test_the_state_of_sgd_sai_is_half_of_adams():
    count = {}
    for name in ("adam", "sgd_sai"):
        trainer = Trainer(make(), rows(), settings(optimizer=name))
        trainer.prepare()
        state = trainer.state_dict()["update"]
        tensors = [t for held in state.values() if isinstance(held, dict) for t in held.values()]
        count[name] = sum(t.numel() for t in tensors if t.ndim)  # but one number per parameter
    assert 2 * count["sgd_sai"] == count["adam"] > 2 * 2 * D_IN * D_SAE


def test_another_optimizer_is_an_error(tmp_path):
    with pytest.raises(
        ValueError, match=r"^TrainConfig: .* in adam, adam_mini, sgd_sai, got 'lion'$"
    ):
        TrainConfig(optimizer="lion")
    Trainer(make(), rows(), settings(out=tmp_path)).fit()
    other = Trainer(make(), rows(), settings(out=tmp_path, optimizer="sgd_sai"))
    with pytest.raises(ValueError, match=r"expected optimizer = 'adam' as in .* 'sgd_sai'"):
        other.fit(resume=True)
    assert Trainer(make(), rows(), settings(out=tmp_path)).fit(resume=True).final["step"] == 50


def test_a_checkpoint_of_a_development_version_is_refused_in_one_line(tmp_path):
    Trainer(make(), rows(), settings(out=tmp_path)).fit()
    about = latest(tmp_path / "checkpoints") / "state.json"
    header = json.loads(about.read_text())
    for found, shown in ((None, "one of a development version"), (1, "1")):
        header.pop("format", None)
        about.write_text(json.dumps(header if found is None else {**header, "format": found}))
        with pytest.raises(ValueError, match=f"a checkpoint of format 4 in .*, got {shown};") as e:
            Trainer(make(), rows(), settings(out=tmp_path)).fit(resume=True)
        assert "\n" not in str(e.value)


def test_other_data_of_the_same_size_do_not_continue_a_run(tmp_path):
    def crash(i):
        if i == 20:
            raise RuntimeError("crash")

    config = settings(out=tmp_path, checkpoint_every=6)
    trainer = Trainer(make(), rows(), config)
    step = trainer._step
    trainer._step = lambda x: step(x) if trainer.steps_done < 20 else crash(20)
    with pytest.raises(RuntimeError, match="crash"):
        trainer.fit()
    x = rows()
    x[-1, -1] += 1e-3
    with pytest.raises(
        ValueError, match=r"expected the same data as in .*step_000000018, got data"
    ):
        Trainer(make(), x, config).fit(resume=True)
    assert Trainer(make(), rows(), config).fit(resume=True).final["step"] == 50


def test_a_failing_last_validation_loses_nothing(tmp_path):
    class Gone(TensorSource):
        def batches(self, *arguments, **named):
            raise OSError("the file has gone")

    config = settings(out=tmp_path / "cut")
    with pytest.raises(OSError, match="the file has gone"):
        Trainer(make(), rows(), config, val=Gone(rows())).fit()
    assert latest(tmp_path / "cut/checkpoints").name == "step_000000050"
    resumed = Trainer(make(seed=3), rows(), config, val=rows()).fit(resume=True)
    whole = Trainer(make(), rows(), settings(out=tmp_path / "whole"), val=rows()).fit()
    assert torch.equal(resumed.sae.W_dec, whole.sae.W_dec)
    untimed = [{k: v for k, v in r.final.items() if "second" not in k} for r in (resumed, whole)]
    assert untimed[0] == untimed[1]
    assert "val_fvu" in untimed[0]


@pytest.mark.parametrize(
    ("val", "message"),
    [
        (lambda x: x[:0], "expected val to have at least one row, got none"),
        (lambda x: x.index_put((torch.tensor(7), torch.tensor(2)), torch.tensor(torch.nan)),
         "expected finite validation data, got 1 of rows 0 to"),
    ],
)  # fmt: skip
def test_validation_data_that_measure_nothing_are_refused(val, message):
    with pytest.raises(ValueError, match=message):
        Trainer(make(), rows(), settings(), val=val(rows())).fit()


def test_damaged_metrics_do_not_block_a_run(tmp_path, caplog):
    def crash(i):
        if i == 40:
            raise RuntimeError("crash")

    config = settings(out=tmp_path, checkpoint_every=6, log_every=5)
    with pytest.raises(RuntimeError, match="crash"):
        Trainer(make(), Watched(rows(), crash), config).fit()
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], b"\xff\xfe", b"{}", b"[" * 99999, *lines[2:]]))
    history = Trainer(make(), rows(), config).fit(resume=True).history
    assert [row["step"] for row in history] == [5, 15, 20, 25, 30, 35, 40, 45, 50]
    assert re.search(
        r"metrics.jsonl is not what it was .*; 6 of its 10 lines are kept", caplog.text
    )
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()][-1] == 50


def test_a_folder_that_another_run_has_is_refused(tmp_path):
    def second(i):
        if i == 3:
            pattern = rf"expected no other run in .*, got process {os.getpid()} \(this one\)"
            with pytest.raises(RuntimeError, match=pattern):
                Trainer(make(), rows(), settings(out=tmp_path)).fit()

    assert (
        Trainer(make(), Watched(rows(), second), settings(out=tmp_path)).fit().final["step"] == 50
    )
    assert not (tmp_path / ".fastsae.lock").exists()


def test_an_sae_in_the_folder_is_not_replaced(tmp_path):
    sae = make()
    save(sae, tmp_path)
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"expected out to hold no SAE, got .*sae_weights"):
            Trainer(make(), rows(), settings(out=tmp_path)).fit(resume=resume)
    assert torch.equal(load(tmp_path).W_dec, sae.W_dec)


def test_links_in_the_folder_are_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("metrics.jsonl", "cfg.json.tmp", "run.json.tmp"):
        (out / name).symlink_to(outside)
    Trainer(make(), rows(), settings(out=out)).fit()
    assert outside.read_text() == "mine"
    assert not (out / "metrics.jsonl").is_symlink()


def test_a_checkpoint_in_the_middle_says_so_when_it_is_loaded(tmp_path, caplog):
    Trainer(make(), rows(), settings(out=tmp_path, checkpoint_every=20)).fit()
    load(tmp_path)
    load(tmp_path / "checkpoints/step_000000050")
    assert caplog.text == ""
    load(tmp_path / "checkpoints/step_000000040")
    assert "step_000000040 is of step 40 of 50 of a run" in caplog.text


def test_a_run_continues_from_the_checkpoint_that_is_given(tmp_path):
    config = settings(out=tmp_path, checkpoint_every=20)
    whole = Trainer(make(), rows(), config).fit()
    older = tmp_path / "checkpoints/step_000000040"
    again = Trainer(make(seed=4), rows(), config).fit(resume=older)
    assert torch.equal(whole.sae.W_dec, again.sae.W_dec)


def test_a_failed_start_leaves_a_trainer_that_takes_no_step():
    x = torch.randn(64, 8)
    x[3, 2] = torch.nan
    sae = TopKSAE(8, 32, 4)
    trainer = Trainer(sae, None, TrainConfig(batch_size=16, steps=2))
    before = {name: t.clone() for name, t in sae.state_dict().items()}
    with pytest.raises(ValueError, match="expected finite activations"):
        trainer.prepare(x)
    with pytest.raises(RuntimeError, match=r"expected a step after prepare\(\)"):
        trainer.step(x[8:24])
    trainer.finish()
    assert all(torch.equal(before[name], t) for name, t in sae.state_dict().items())


def started(sae, **settings):
    trainer = Trainer(sae, None, TrainConfig(batch_size=64, steps=20, **settings))
    trainer.prepare(torch.randn(512, 8) @ torch.randn(8, 8))
    return trainer


def test_a_look_at_inference_does_not_change_training():
    a, b = (started(BatchTopKSAE(8, 32, 4)) for _ in range(2))
    b.sae.load_state_dict(a.sae.state_dict())
    b.scaler = a.scaler
    for i in range(6):
        x = torch.randn(64, 8)
        a.step(x)
        b.step(x)
        if i == 2:
            b.sae.eval()
    for name, tensor in a.sae.state_dict().items():
        assert torch.equal(b.sae.state_dict()[name], tensor), name


@pytest.mark.parametrize("update", ["fused", "autograd"])
def test_a_step_is_the_same_in_any_surroundings(update):
    torch.manual_seed(0)
    a = started(TopKSAE(8, 32, 4), update=update, compute_dtype="float32")
    b = started(copy.deepcopy(a.sae), update=update, compute_dtype="float32")
    b.sae.load_state_dict(a.sae.state_dict())
    b.scaler = a.scaler
    x = torch.randn(64, 8)
    a.step(x)
    b.sae.training_loss(x).loss.mul(1000).backward()  # for a log, say
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        b.step(x)
    for name, tensor in a.sae.state_dict().items():
        assert torch.equal(b.sae.state_dict()[name], tensor), name


def test_fit_after_steps_is_refused():
    trainer = started(TopKSAE(8, 32, 4))
    trainer.step(torch.randn(64, 8))
    with pytest.raises(RuntimeError, match=r"expected fit\(\) before any step, got it after 1"):
        trainer.fit()


def test_every_validation_reads_all_rows():
    x = torch.randn(640, 8) @ torch.randn(8, 8)
    config = TrainConfig(batch_size=64, steps=9, eval_every=3)
    rows = {}
    for name, val in (("tensor", x[:200]), ("list", [*x[:200].split(70), x[:0]])):
        torch.manual_seed(0)
        rows[name] = Trainer(TopKSAE(8, 32, 4), x, config, val=val).fit().history
    for a, b in zip(*rows.values(), strict=True):
        assert a["val_fvu"] == pytest.approx(b["val_fvu"], rel=1e-6)
    once = Trainer(TopKSAE(8, 32, 4), x, config, val=iter([x[:200]]))
    with pytest.raises(ValueError, match="at least one row of validation data, got none"):
        once.fit()


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (np.zeros((4, 8), np.float32), TypeError, "to be a floating-point Tensor, got ndarray"),
        ([[0.0] * 8], TypeError, "to be a floating-point Tensor, got list"),
        (torch.ones(4, 8).long(), TypeError, "to be a floating-point Tensor, got torch.int64"),
        (torch.ones(4, 8) + 1j, TypeError, "to be a floating-point Tensor, got torch.complex64"),
        (torch.ones(4, 9), ValueError, "expected rows [n, 8] with n >= 1, got [4, 9]"),
        (torch.ones(8), ValueError, "expected rows [n, 8] with n >= 1, got [8]"),
        (torch.ones(2, 4, 8), ValueError, "expected rows [n, 8] with n >= 1, got [2, 4, 8]"),
        (torch.ones(0, 8), ValueError, "expected rows [n, 8] with n >= 1, got [0, 8]"),
    ],
)
def test_what_is_no_batch_is_refused_and_changes_nothing(batch, error, message):
    trainer = started(TopKSAE(8, 32, 4))
    trainer.step(torch.randn(64, 8))
    before = {name: t.clone() for name, t in trainer.sae.state_dict().items()}
    for call in (trainer.step, Trainer(TopKSAE(8, 32, 4), None, trainer.config).prepare):
        with pytest.raises(error, match=re.escape(message)) as e:
            call(batch)
        assert "\n" not in str(e.value)
    assert trainer.steps_done == 1
    assert all(torch.equal(before[name], t) for name, t in trainer.sae.state_dict().items())


def test_the_state_of_another_run_is_refused_and_changes_nothing():
    state = started(TopKSAE(8, 32, 4)).state_dict()
    trainer = started(TopKSAE(8, 32, 8))
    trainer.step(torch.randn(64, 8))
    before = {name: t.clone() for name, t in trainer.sae.state_dict().items()}
    with pytest.raises(ValueError, match=r"^Trainer: expected k = 4 as in the state, got 8$"):
        trainer.load_state_dict(state)
    assert trainer.steps_done == 1
    assert all(torch.equal(before[name], t) for name, t in trainer.sae.state_dict().items())
    trainer.step(torch.randn(64, 8))
    trainer.finish()
    assert not trainer.sae.training
