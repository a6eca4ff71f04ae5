"""Encoders that meet their pre-activations in blocks: what blocks, lists and bounds find hard."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fastsae import _library, reference
from tests.conftest import EMULATED, ENCODE_WAYS, devices, encoding, on_device
from tests.ops.inputs import KINDS, matrix, same

WAYS = [*ENCODE_WAYS, "overlap:7x192"]
needs_emulation = pytest.mark.skipif(EMULATED is None, reason="built without FASTSAE_EMULATION=ON")


@pytest.fixture(params=[d for d in devices() if d != "cpu"])
def gpu(request: pytest.FixtureRequest):
    """A GPU or the emulated one: (its name, what torch calls it)."""
    with on_device(request.param) as device:
        yield request.param, device


@pytest.fixture(params=WAYS)
def device(request: pytest.FixtureRequest, gpu: tuple[str, str]):
    """A GPU that meets pre-activations in blocks."""
    with encoding(request.param, gpu[0]):
        yield gpu[1]


def pre_activations(kind: str, n: int, m: int, dtype=torch.float32, device="cpu"):
    """Return x, W, b and x W^T + b: of integers but for b, whose kind decides about each row."""
    x = torch.randint(-1, 2, (n, 8)).to(dtype)
    W = torch.randint(-2, 3, (m, 8)).to(dtype)
    b = -matrix("ascending", 1, m, dtype)[0] if kind == "descending" else matrix(kind, 1, m, dtype)
    b = b.reshape(m)
    pre = x @ W.t() + b  # one rounding, whoever computes it
    return tuple(t.to(device) for t in (x, W, b, pre))


# The only block, whole blocks, a rest that is one column or no whole vector; k at both ends, of
# both kernels, and more than a block has latents.
SHAPES = (
    (1, 1, 1),
    (3, 60, 60),
    (33, 129, 1),
    (5, 256, 64),
    (9, 1003, 7),
    (5, 1000, 65),
    (2, 600, 128),
    (4, 515, 200),
    (3, 300, 300),
)


@pytest.mark.parametrize("kind", [*KINDS, "descending"])
@pytest.mark.parametrize("absolute", [False, True])
def test_topk(device, kind, absolute) -> None:
    for n, m, k in SHAPES:
        x, W, b, pre = pre_activations(kind, n, m, device=device)
        for mask in (None, torch.rand(m, device=device) < 0.1):
            score = pre.abs() if absolute else pre
            if mask is not None:
                score = score.masked_fill(~mask, float("-inf"))
            want = reference.topk(score, k).indices
            kept = pre.gather(1, want.long())
            if mask is not None:
                kept = torch.where(mask[want.long()], kept, 0)
            for bf16_product in (False, True):  # of integers: the same
                arguments = (x, W, b, None, k, mask, False, absolute, bf16_product)
                values, indices = torch.ops.fastsae.encode_topk(*arguments)
                assert torch.equal(indices, want), (n, m, k)
                assert same(values, kept), (n, m, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "descending"])
def test_whole_matrix(device, kind, dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for n, m, budget in ((1, 1, 1), (33, 129, 7), (9, 1003, 90), (5, 600, 3000), (3, 60, 0)):
        x, W, b, _ = pre_activations(kind, n, m, dtype, device)
        pre = x.to(wide) @ W.to(wide).t() + b.to(wide)
        mask = torch.rand(m, device=device) < 0.5
        for some in (None, mask):
            values, indices, offsets, threshold = torch.ops.fastsae.encode_batch_topk(
                x, W, b, None, budget, some, False, None
            )
            chosen = pre if some is None else pre.masked_fill(~some, -1)
            want = reference.batch_topk(chosen, budget / n)
            assert torch.equal(offsets, want.acts.offsets), (n, m)
            size = int(offsets[-1])
            assert torch.equal(indices[:size], want.acts.indices[:size]), (n, m)
            assert same(values[:size], want.acts.values[:size].to(dtype)), (n, m)
            assert not values[size:].any()
            assert same(threshold, want.threshold.to(wide)), (n, m)
        thresholds = torch.randint(-3, 4, (m,), device=device).to(wide)
        for theta in (torch.tensor(-0.5, dtype=wide, device=device), thresholds):
            for capacity in (budget, n * m):
                values, indices, offsets = torch.ops.fastsae.encode_threshold(
                    x, W, b, None, theta, capacity, False
                )
                kept = reference.threshold_select(pre, theta, capacity)
                assert torch.equal(offsets, kept.offsets), (n, m)
                size = int(offsets[-1])
                assert torch.equal(indices[:size], kept.indices[:size]), (n, m)
                assert same(values[:size], kept.values[:size].to(dtype)), (n, m)


def test_no_rows(device) -> None:
    x, W, b, _ = pre_activations("normal", 0, 300, device=device)
    values, indices = torch.ops.fastsae.encode_topk(x, W, b, None, 5, None, True, False, False)
    assert values.shape == indices.shape == (0, 5)
    kept = torch.ops.fastsae.encode_batch_topk(x, W, b, None, 7, None, False, None)
    assert kept[0].shape == (0,)
    assert kept[2].tolist() == [0]


def test_lists_do_not_remember_an_earlier_call(device) -> None:
    # The second call gets the memory of the first one, which is full of better candidates.
    for k in (7, 65):
        for scale in (1000.0, 1.0):
            x, W, b, pre = pre_activations("normal", 40, 1003, device=device)
            got = torch.ops.fastsae.encode_topk(
                x, scale * W, scale * b, None, k, None, False, False, False
            )
            assert torch.equal(got[1], reference.topk(scale * pre, k).indices)


def test_the_setting(gpu) -> None:
    library = EMULATED if gpu[0] == "emulated" else None
    before = _library.set_cuda_encode("blocks:16x128", library)
    assert _library.set_cuda_encode("overlap", library) == "blocks:16x128"
    for wrong in (
        "",
        "row",
        "rows:1x64",
        "blocks:",
        "blocks:4x65",
        "blocks:0x64",
        "blocks:1x8256",
        "hopper:2x64",
    ):
        with pytest.raises(ValueError, match=r"expected way to be rows, hopper, blocks, ov"):
            _library.set_cuda_encode(wrong, library)
    assert _library.set_cuda_encode(before, library) == "overlap"
    assert before == "rows"  # what nobody measured is not the default


@needs_emulation
@pytest.mark.parametrize(
    ("said", "got"), [("overlap", "overlap"), ("hopper", "hopper"), ("fast", "rows")]
)
def test_the_environment(said, got) -> None:
    code = (
        "import sys, torch\nfrom pathlib import Path\nfrom fastsae import _library\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "print(_library.set_cuda_encode('rows', Path(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(EMULATED)],
        env={**os.environ, "FASTSAE_CUDA_ENCODE": said},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == got
    complains = "expected FASTSAE_CUDA_ENCODE to be rows, hopper, blocks" in done.stderr
    assert complains == (said == "fast")
