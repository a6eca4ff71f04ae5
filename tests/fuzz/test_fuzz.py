"""A short run of the fuzzing, the same calls every time, and whether it finds what is wrong."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from fastsae import ops, reference
from fastsae.types import TopK
from tests.fuzz import checks, driver, inputs, oracle


@pytest.fixture(autouse=True)
def _filled() -> Iterator[None]:
    """Fill what torch.empty returns: what a kernel forgets to write is not right by accident."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def where(device: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels of the CPU, or the emulated ones in their place; the oracle is on the CPU."""
    name = request.node.callspec.params["device"]
    if name == "cuda":
        pytest.skip("the oracle takes tensors of the CPU")
    monkeypatch.setattr(checks, "emulated", name == "emulated")
    return name


def many_rows(calls: int) -> None:
    for index in range(calls):
        checks.call(1, "topk", index)


def test_rows_of_topk(where, isa) -> None:
    many_rows(6 if where == "emulated" else 200)


def test_other_ops(where, isa) -> None:
    for index in range(25 if where == "emulated" else 300):
        checks.call(1, "ops", index)


@pytest.mark.parametrize("name", checks.NAMED)
def test_named(where, isa, name) -> None:
    checks.NAMED[name]()


def test_no_latent_in_the_mask_keeps_nothing(where, isa) -> None:
    for n, dtype in ((32, torch.float32), (1, torch.bfloat16), (1, torch.float16)):
        x, W = torch.ones(n, 3, dtype=dtype), torch.ones(5, 3, dtype=dtype)
        mask = torch.zeros(5, dtype=torch.bool)
        acts, threshold = ops.encode_batch_topk(x, W, None, 2, mask=mask)
        assert threshold.item() == float("inf")
        assert not acts.offsets.any()
        assert not acts.values.any()


# Wrong on purpose: each has to be found.
def positive_zeros(x, k, *, sorted=False) -> TopK:
    got = reference.topk(x, k, sorted=sorted)
    return TopK(got.values + 0.0, got.indices)


def highest_index(x, k, *, sorted=False) -> TopK:
    values, indices = reference.topk(x.flip(-1), k, sorted=True)
    return TopK(values, (x.shape[-1] - 1 - indices).int())


def smallest_nan(x, k, *, sorted=False) -> TopK:
    indices = reference.topk(x.nan_to_num(nan=-torch.inf), k, sorted=sorted).indices
    return TopK(x.gather(-1, indices.long()), indices)


def zeros_in_order(x, k, *, sorted=False) -> TopK:
    small = torch.where(x == 0, x.signbit() * -1e-30, x.double())
    indices = reference.topk(small, k, sorted=sorted).indices
    return TopK(x.gather(-1, indices.long()), indices)


@pytest.mark.parametrize(
    "bug", [positive_zeros, highest_index, smallest_nan, zeros_in_order], ids=lambda f: f.__name__
)
def test_bugs_of_topk_are_found(monkeypatch, bug: Callable[..., TopK]) -> None:
    monkeypatch.setattr(ops, "topk", bug)
    with pytest.raises(checks.Wrong, match="topk of"):
        many_rows(100)


def test_the_oracle_by_hand() -> None:
    f = oracle.F32
    row = np.array([[1, -0.0, np.nan, 0, np.inf, -np.inf, 1]], np.float32)
    bits = row.view(np.uint32)
    assert oracle.topk(bits, f, 7, sorted=True).tolist() == [[2, 4, 0, 6, 1, 3, 5]]
    assert oracle.topk(bits, f, 3, sorted=False).tolist() == [[0, 2, 4]]
    kept, threshold = oracle.batch_topk(bits, f, 2)
    assert (kept.columns.tolist(), kept.offsets.tolist(), threshold) == ([0, 4], [0, 2], 1.0)
    kept = oracle.feature_topk(np.array([[1.0], [2.0], [2.0]], np.float32).view(np.uint32), f, 1)
    assert kept.rows.tolist() == [1]


def test_sorts_of_the_oracle_agree() -> None:
    # The fast one of up to 32 bits, and the stable one, which float64 takes.
    rng = checks.generator(0, "topk", 0)
    for f in (oracle.F32, oracle.BF16, oracle.F16):
        bits, _ = inputs.matrix(rng, 50, 300, f)
        wide = oracle.numbers(bits, f).view(np.uint64)
        fast, stable = (oracle.topk(b, g, 40, True) for b, g in ((bits, f), (wide, oracle.F64)))
        assert np.array_equal(fast, stable)


def test_a_crash_names_its_call(tmp_path, capfd) -> None:
    # The third call of the other ops ends its process, and the fifth never returns.
    script = tmp_path / "calls.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from tests.fuzz import driver\n"
        "def call(stream, index):\n"
        "    if (stream, index) == ('ops', 2):\n"
        "        os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    if (stream, index) == ('ops', 4):\n"
        "        time.sleep(60)\n"
        "    if (stream, index) == ('topk', 1):\n"
        "        raise ValueError('not this')\n"
        "    return 10\n"
        "progress = driver.Progress(Path(sys.argv[2]))\n"
        "progress.read()\n"
        "driver.work(call, 30, 6, progress, 'again')\n"
    )
    environment = {"PYTHONPATH": os.getcwd()}
    got = driver.supervise(driver.python(str(script)), environment, "again", 1.5, 10)
    assert got.crashed == ["ops:2", "ops:4"]
    assert (got.progress.rows, got.progress.topk_calls, got.progress.calls) == (30, 4, 6)
    assert (got.progress.wrong, got.good) == (1, False)
    out = capfd.readouterr().out
    assert "wrong: topk:1: ValueError: not this\n  again --call topk:1\n" in out
    assert "crash: ops:2: the process was ended by SIGSEGV\n  again --call ops:2\n" in out
    assert "crash: ops:4: the process did not return\n" in out
