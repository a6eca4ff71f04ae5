"""Runs whose decoder reads bfloat16 rows: what is read, the step by autograd, and never stale."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest
import torch

import fastsae
from fastsae import TrainConfig, Trainer, ops, reference
from fastsae.cli import recipe
from fastsae.nn import objective
from fastsae.ops import _rounded, _tape
from tests.conftest import EMULATED, emulated
from tests.ops.calls import NAMES
from tests.train.outside_writes import WRITES, in_place
from tests.train.test_fused_classes import CLASSES, build, rows

REFUSED = {name for name in CLASSES if "CLT" in name} | {"Hierarchical"}
READ = [name for name in CLASSES if name not in REFUSED]


@pytest.fixture(params=["cpu", "emulated"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Those of the CPU, and those of CUDA executed on the host."""
    if request.param == "cpu":
        yield "cpu"
        return
    if EMULATED is None:
        pytest.skip("built without FASTSAE_EMULATION=ON")
    with emulated(*NAMES):
        yield "emulated"


def trainer(name="TopK", decode_dtype="bfloat16", **settings) -> Trainer:
    torch.manual_seed(1)
    sae = build(name, torch.float32)
    settings = {"compute_dtype": "float32", "lr": 3e-3, "steps": 12, **settings}
    config = TrainConfig(
        batch_size=50, dead_after_tokens=60, progress=False, sparsity_warmup_steps=0,
        decode_dtype=decode_dtype, **settings,
    )  # fmt: skip
    return Trainer(sae, rows(sae), config)


def state_of(sae) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in sae.state_dict().items()}


def assert_same_bits(one, other) -> None:
    assert one.keys() == other.keys()
    for name, t in one.items():
        assert torch.equal(t, other[name]), name


class Watch:
    """What the decoders of steps read of W_dec, and those of dead latents."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.copies = self.whole = self.of_dead = 0
        copy, auxk_loss = _tape.decoder_copy, objective.auxk_loss

        def decoder_copy(W_dec):
            found = copy(W_dec)
            self.copies += found is not None
            self.whole += found is None
            assert found is None or torch.equal(found, W_dec.bfloat16())
            return found

        def of_dead(*arguments):
            before = self.copies
            out = auxk_loss(*arguments)
            assert self.copies == before
            self.of_dead += 1
            return out

        monkeypatch.setattr(_tape, "decoder_copy", decoder_copy)
        monkeypatch.setattr(objective, "auxk_loss", of_dead)


CLIPPED = {"optimizer": "adam_mini", "clip_grad_norm": 0.02}


@pytest.mark.parametrize(
    ("name", "settings"),
    [*((name, {}) for name in READ), ("TopK", CLIPPED), ("Matryoshka", CLIPPED)],
)
def test_every_decode_of_a_step_reads_the_copy(name, settings, kernels) -> None:
    """But those of dead latents, which have rows of their own; and it trains about as well."""
    found = []
    for dtype in ("float32", "bfloat16"):
        t = trainer(name, dtype, **settings)
        t.prepare()
        with pytest.MonkeyPatch.context() as patch:
            watch = Watch(patch)
            losses = [t.step(batch).loss.item() for batch in rows(t.sae).split(50)]
        found.append(losses[-1])
        if dtype == "float32":
            assert watch.copies == 0
        else:
            assert watch.copies >= 12
            assert watch.whole <= watch.of_dead
    assert found[0] != found[1]
    assert found[1] == pytest.approx(found[0], rel=0.05)


class RoundedByHand(fastsae.TopKSAE):
    """Plain torch in place of the decoder."""

    def decode(self, acts):
        if not torch.is_grad_enabled():  # where the encoder starts
            return super().decode(acts)
        copy = self.W_dec.detach().bfloat16()
        return reference.sparse_decode(acts, self.W_dec, self.b_dec, bf16_W_dec=copy)


@pytest.mark.parametrize("with_error", [True, False])
def test_a_step_is_that_of_autograd(with_error, kernels, monkeypatch) -> None:
    """Whose weights move by the gradient of the rounded ones."""
    monkeypatch.setattr(objective, "decodes_with_error", lambda *_: with_error)
    found = []
    for cls, dtype, update in (
        (fastsae.TopKSAE, "bfloat16", "fused"),
        (RoundedByHand, "float32", "autograd"),
        (fastsae.TopKSAE, "float32", "autograd"),
    ):
        if update == "autograd":
            monkeypatch.undo()
        torch.manual_seed(1)
        sae = cls(12, 60, 4, k_aux=16, apply_b_dec_to_input=True)
        config = TrainConfig(
            batch_size=50, steps=3, lr=1e-3, update=update, decode_dtype=dtype, warmup_steps=0,
            compute_dtype="float32", progress=False, normalize=False,
        )  # fmt: skip
        t = Trainer(sae, rows(sae), config)
        t.prepare()
        outs = [t.step(batch) for batch in rows(sae).split(50)[:3]]
        found.append(({n: p.detach().clone() for n, p in sae.named_parameters()}, outs[0].loss))
    (got, loss), (want, by_hand), (whole, unrounded) = found
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert loss.item() != pytest.approx(unrounded.item(), rel=1e-5)
    for name, p in got.items():
        assert (p - want[name]).norm() < 0.05 * (p - whole[name]).norm(), name


def test_the_copy_is_of_rows_of_norm_1(kernels) -> None:
    t = trainer()
    t.prepare()
    for batch in rows(t.sae).split(50):
        t.step(batch)
        (copies,) = t._update.copies
        assert copies.W_enc is None
        assert copies.W_dec.is_of(t.sae.W_dec)
        assert torch.equal(copies.W_dec.copy, t.sae.W_dec.bfloat16())
        norms = copies.W_dec.copy.float().norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=2**-8)


@pytest.mark.skipif(EMULATED is None, reason="built without FASTSAE_EMULATION=ON")
@pytest.mark.parametrize("name", ["TopK", "BatchTopK", "Matryoshka", "JumpReLU", "skip"])
def test_fifty_steps_are_alike_on_both_devices(name) -> None:
    found = []
    for kernels in ((), NAMES):
        with emulated(*kernels):
            found.append(trainer(name, steps=50, log_every=1).fit())
    for one, other in zip(found[0].history, found[1].history, strict=True):
        assert one["fvu"] == pytest.approx(other["fvu"], rel=2e-3)
    for key, p in found[0].sae.named_parameters():
        away = p - found[1].sae.get_parameter(key)
        assert away.norm() < 0.02 * p.norm(), key


@pytest.mark.parametrize("name", ["TopK", "Matryoshka"])
def test_a_resumed_run_has_the_same_bits(name, kernels, tmp_path) -> None:
    whole = trainer(name, out=tmp_path / "whole", checkpoint_every=5, keep_checkpoints=3)
    want = state_of(whole.fit().sae)
    at = min(p for p in (tmp_path / "whole" / "checkpoints").iterdir() if p.is_dir())
    again = trainer(name, out=tmp_path / "again")
    assert_same_bits(state_of(again.fit(resume=at).sae), want)
    other = trainer(name, "float32", out=tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"expected decode_dtype = 'bfloat16' as in .*, got 'float32'"
    ):
        other.fit(resume=at)


def by_the_module(sae, name):
    with torch.no_grad():
        getattr(sae, name)[3] *= 2
    sae.normalize_decoder_()


@pytest.mark.parametrize("write", [*WRITES, by_the_module], ids=lambda f: f.__name__)
def test_a_write_from_outside_is_noticed(write, kernels, monkeypatch) -> None:
    """As if there had been no copy to keep: one that is made in every decode."""
    made, refresh = [], _rounded.Rounded.refresh

    def counted(self, matrix):
        made.append(not self.is_of(matrix))
        refresh(self, matrix)

    def anew(self, matrix):
        self._of = None
        refresh(self, matrix)

    found = []
    for how in (counted, anew):
        monkeypatch.setattr(_rounded.Rounded, "refresh", how)
        t = trainer()
        t.prepare()
        for i, batch in enumerate(rows(t.sae).split(50)):
            before = t.sae.W_dec.detach().clone()
            if i in (0, 3, 7):
                write(t.sae, "W_dec")
                moved = not torch.equal(before, t.sae.W_dec)
                assert moved or write is by_the_module
            t.step(batch)
        found.append(state_of(t.sae))
    assert sum(made) == 3
    assert_same_bits(*found)


def test_a_write_inside_a_step_is_noticed(kernels, monkeypatch) -> None:
    """The decoder reads what is there then; a write between forward and backward is an error."""
    t = trainer()
    t.prepare()
    batches = rows(t.sae).split(50)
    t.step(batches[0])
    watch, loss = Watch(monkeypatch), t.sae.training_loss

    def moved(*arguments):
        in_place(t.sae, "W_dec")
        return loss(*arguments)

    t.sae.training_loss = moved
    t.step(batches[1])
    assert watch.copies

    def moved_after(*arguments):
        out = loss(*arguments)
        in_place(t.sae, "W_dec")
        return out

    t.sae.training_loss = moved_after
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        t.step(batches[2])


def test_nothing_but_a_step_reads_it() -> None:
    t = trainer()
    t.prepare()
    x = rows(t.sae)
    t.step(x[:50])
    acts = t.sae.encode_sparse(x[:50])
    got = t.sae.decode(acts)
    assert torch.equal(got, ops.sparse_decode(acts, t.sae.W_dec, t.sae.b_dec))
    rounded = ops.sparse_decode(acts, t.sae.W_dec.bfloat16().float(), t.sae.b_dec)
    assert not torch.equal(got, rounded)


def test_the_command_line_has_it() -> None:
    parser = argparse.ArgumentParser()
    recipe.add_options(parser)
    for given, expected in (([], "float32"), (["--decode-dtype", "bfloat16"], "bfloat16")):
        config = recipe.config_of(parser.parse_args(given), "out")
        assert config.decode_dtype == expected


def test_what_is_not_covered_is_refused() -> None:
    for settings, expected in (
        ({"mesh": (1, 2)}, r"mesh=None with decode_dtype='bfloat16', got \(1, 2\)"),
        ({"update": "autograd"}, r"a fused update with decode_dtype='bfloat16', got 'autograd'"),
        ({"decode_dtype": "float16"}, r"decode_dtype in float32, bfloat16, got 'float16'"),
        ({"decode_dtype": None}, r"decode_dtype to be a string, got None"),
    ):
        with pytest.raises(ValueError, match=f"TrainConfig: expected {expected}"):
            TrainConfig(**{"decode_dtype": "bfloat16", **settings})
    with pytest.raises(ValueError, match=r"decode_dtype='float32', because optimizer is sgd_sai"):
        trainer(optimizer="sgd_sai").prepare()
    t = trainer()
    t.sae.double()
    with pytest.raises(
        ValueError, match=r"decode_dtype='float32', because the parameters are torch.f"
    ):
        t.prepare(rows(t.sae))
    for name in REFUSED:
        with pytest.raises(ValueError, match=r"decode_dtype='float32', because the (errors|aux)"):
            trainer(name).prepare()
