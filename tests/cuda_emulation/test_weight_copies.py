"""A bfloat16 copy of W_enc that the update writes: the same bits as converting, and never stale."""

from __future__ import annotations

import sys

import pytest
import torch

from fastsae import TrainConfig, Trainer
from fastsae.ops import _rounded, _tape
from fastsae.train import captured_step, update
from tests.conftest import EMULATED, emulated
from tests.ops.calls import NAMES
from tests.train.outside_writes import WRITES, in_place
from tests.train.recorded_graph import RecordedGraph
from tests.train.test_fused_classes import CLASSES, build, rows

pytestmark = pytest.mark.skipif(
    EMULATED is None, reason="built without FASTSAE_EMULATION=ON (make test turns it on)"
)
DENSE = {"Gated", "JumpReLU", "ReLU", "tanh", "JumpReLUTranscoder", "ReLUTranscoder"}
DENSE |= {"ReLUCrossCoder", "JumpReLU CLT", "ReLU CLT", "Gradient"}
OF_OTHERS = {"by norm"}  # multiplies other rows than those of W_enc


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch):
    """All kernels of CUDA, and an encoder that would convert."""
    monkeypatch.setattr(update, "converts_weights", lambda _: True)
    with emulated(*NAMES):
        yield monkeypatch


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every encoder that may round: whether it has read the copy."""
    found, rounded = [], _tape.rounded

    def watched(matrix):
        out = rounded(matrix)
        found.append(out.dtype == torch.bfloat16)
        return out

    monkeypatch.setattr(_tape, "rounded", watched)
    return found


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a copy was made anew: one number for each that was."""
    found, refresh = [], _rounded.Rounded.refresh

    def watched(self, matrix):
        found.append(0) if not self.is_of(matrix) else None
        refresh(self, matrix)

    monkeypatch.setattr(_rounded.Rounded, "refresh", watched)
    return found


def trainer(name="TopK", copies=True, **settings) -> Trainer:
    torch.manual_seed(1)
    sae = build(name, torch.float32)
    settings = {"update": "fused", "compute_dtype": "bfloat16", "lr": 3e-3, **settings}
    config = TrainConfig(
        batch_size=50, steps=12, dead_after_tokens=60, progress=False, sparsity_warmup_steps=0,
        weight_copies=copies, **settings,
    )  # fmt: skip
    return Trainer(sae, rows(sae), config)


def state_of(sae) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in sae.state_dict().items()}


def assert_same_bits(one, other) -> None:
    assert one.keys() == other.keys()
    for name, t in one.items():
        assert torch.equal(t, other[name]), name


@pytest.mark.parametrize("settings", [{}, {"optimizer": "adam_mini", "clip_grad_norm": 0.02}])
@pytest.mark.parametrize("name", CLASSES)
def test_bits_are_those_of_converting(name, settings, as_on_cuda, asked) -> None:
    if "CLT" in name:
        settings = {key: value for key, value in settings.items() if key != "clip_grad_norm"}
    want = state_of(trainer(name, False, **settings).fit().sae)
    assert not any(asked)
    asked.clear()
    assert_same_bits(state_of(trainer(name, **settings).fit().sae), want)
    if name not in OF_OTHERS | DENSE:
        assert any(asked)


def test_the_copy_is_made_once_and_read_in_every_step(as_on_cuda, asked, made) -> None:
    t = trainer()
    t.prepare()
    asked.clear()
    for batch in rows(t.sae).split(50):
        t.step(batch)
    assert len(asked) >= 12
    assert all(asked)
    assert len(made) == 1
    (copies,) = t._update.copies
    assert torch.equal(copies.W_enc.copy, t.sae.W_enc_rows.bfloat16())


def through_the_property(sae, name):
    sae.W_enc = sae.W_enc * 1.01


def of_a_view(sae, name):
    with torch.no_grad():
        sae.W_enc.div_(0.99)


@pytest.mark.parametrize(
    "write", [*WRITES, through_the_property, of_a_view], ids=lambda f: f.__name__
)
def test_a_write_from_outside_is_noticed(write, as_on_cuda, made) -> None:
    found = []
    for copies in (False, True):
        made.clear()
        t = trainer(copies=copies)
        t.prepare()
        for i, batch in enumerate(rows(t.sae).split(50)):
            before = t.sae.W_enc_rows.detach().clone()
            if i in (0, 3, 7):
                write(t.sae, "W_enc_rows")
                assert not torch.equal(before, t.sae.W_enc_rows)
            t.step(batch)
        found.append(state_of(t.sae))
        assert len(made) == (3 if copies else 0)
    assert_same_bits(*found)


def test_a_write_inside_a_step_is_noticed(as_on_cuda, asked) -> None:
    t = trainer()
    t.prepare()
    batches = rows(t.sae).split(50)
    t.step(batches[0])
    asked.clear()
    loss = t.sae.training_loss

    def moved(*arguments):
        in_place(t.sae, "W_enc_rows")
        return loss(*arguments)

    t.sae.training_loss = moved
    t.step(batches[1])
    assert asked
    assert not any(asked)


def test_a_resumed_run_goes_on_with_the_same_bits(as_on_cuda, tmp_path) -> None:
    whole = trainer(out=tmp_path / "whole", checkpoint_every=5, keep_checkpoints=3)
    want = state_of(whole.fit().sae)
    at = min(p for p in (tmp_path / "whole" / "checkpoints").iterdir() if p.is_dir())
    for copies in (True, False):  # free to change: it changes no bit
        again = trainer(copies=copies, out=tmp_path / str(copies))
        assert_same_bits(state_of(again.fit(resume=at).sae), want)


@pytest.mark.parametrize("adam_dtype", ["float32", "bfloat16"])
def test_a_recorded_step_reads_what_was_written_meanwhile(adam_dtype, as_on_cuda, made) -> None:
    """Replays, writes from outside between them, and random bits of a number on the device."""
    for name, module in list(sys.modules.items()):
        if name.startswith("fastsae.") and hasattr(module, "can_look"):
            as_on_cuda.setattr(module, "can_look", lambda _: False)
    as_on_cuda.setattr(captured_step, "can_record", lambda _: True)
    as_on_cuda.setattr(captured_step, "make_graph", lambda _: RecordedGraph())
    found = []
    for capture in (False, True):
        made.clear()
        t = trainer(copies=capture, capture=capture, adam_dtype=adam_dtype)
        t.prepare()
        for i, batch in enumerate(rows(t.sae).split(50)):
            if i in (0, 7, 10):
                in_place(t.sae, "W_enc_rows")
            t.step(batch)
        averages = {name: m.clone() for name, m in t._update.exp_avg_sq.items()}
        found.append({**state_of(t.sae), **{f"{name} squares": m for name, m in averages.items()}})
        assert len(made) == (3 if capture else 0)
    assert t._captured.replays >= 6
    assert_same_bits(*found)


def both_in_place(sae):
    with torch.no_grad():
        sae.W_enc_rows.mul_(1.01)
        sae.W_dec[3] += 0.5


def test_both_matrices_have_copies(as_on_cuda, asked) -> None:
    """One changes nothing that is trained, the other does; recorded steps read what is there."""
    for name, module in list(sys.modules.items()):
        if name.startswith("fastsae.") and hasattr(module, "can_look"):
            as_on_cuda.setattr(module, "can_look", lambda _: False)
    as_on_cuda.setattr(captured_step, "can_record", lambda _: True)
    as_on_cuda.setattr(captured_step, "make_graph", lambda _: RecordedGraph())
    found = {}
    for copies, capture, decode_dtype in (
        (False, False, "bfloat16"), (True, False, "bfloat16"), (True, True, "bfloat16"),
        (True, False, "float32"),
    ):  # fmt: skip
        t = trainer(copies=copies, capture=capture, decode_dtype=decode_dtype)
        t.prepare()
        for i, batch in enumerate(rows(t.sae).split(50)):
            if i in (0, 7, 10):
                both_in_place(t.sae)
            t.step(batch)
        found[copies, capture, decode_dtype] = state_of(t.sae)
        (made,) = t._update.copies
        for rounded, W in ((made.W_enc, t.sae.W_enc_rows), (made.W_dec, t.sae.W_dec)):
            assert rounded is None or torch.equal(rounded.copy, W.bfloat16())
        assert not capture or t._captured.replays >= 6
    want, *same, whole = found.values()
    for one in same:
        assert_same_bits(one, want)
    assert not torch.equal(whole["W_dec"], want["W_dec"])


def test_what_has_no_use_for_copies_is_refused(monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"weight_copies=False, because the encoder of cpu rounds"):
        trainer().prepare()
    for settings, expected in (
        ({"compute_dtype": "float32"}, r"compute_dtype='bfloat16' with weight_copies, got 'float3"),
        ({"compute_dtype": "auto"}, r"compute_dtype='bfloat16' with weight_copies, got 'auto'"),
        ({"update": "autograd"}, r"a fused update with weight_copies, got 'autograd'"),
        ({"mesh": (1, 2)}, r"mesh=None with weight_copies, got \(1, 2\)"),
    ):
        with pytest.raises(ValueError, match=f"TrainConfig: expected {expected}"):
            trainer(**settings)
    monkeypatch.setattr(update, "converts_weights", lambda _: True)
    with pytest.raises(ValueError, match=r"weight_copies=False, because optimizer is sgd_sai"):
        trainer(update="auto", optimizer="sgd_sai").prepare()
    t = trainer()
    t.sae.double()
    with pytest.raises(
        ValueError, match=r"weight_copies=False, because the parameters are torch.f"
    ):
        t.prepare(rows(t.sae))


def test_an_encoder_reads_a_rounded_matrix() -> None:
    """The same bits as of one that it rounds itself; only where it would."""
    cuda = torch.ops.fastsae_emulated
    x, W = torch.randn(40, 24), torch.randn(64, 24)
    b = torch.randn(64)
    one, other = (
        cuda.encode_topk(x, w, b, None, 5, None, True, False, True) for w in (W, W.bfloat16())
    )
    for got, want in zip(one, other, strict=True):
        assert torch.equal(got, want)
    for module, rounds in ((cuda, False), (torch.ops.fastsae, True), (torch.ops.fastsae, False)):
        with pytest.raises(RuntimeError, match="expected W_enc to have the dtype of x"):
            module.encode_topk(x, W.bfloat16(), b, None, 5, None, True, False, rounds)
