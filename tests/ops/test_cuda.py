"""What only a GPU can show: graphs, streams, devices, no host in between, the same bits again."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.ops.calls import Call, calls, check, has_kernel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CALLS = calls()


@pytest.fixture(params=CALLS, ids=str)
def call(request: pytest.FixtureRequest) -> Call:
    """Every call of every operator that has a CUDA kernel, on the GPU."""
    if not has_kernel(request.param.op, device="cuda"):
        pytest.skip(f"{request.param.op} has no CUDA kernel yet")
    return request.param.to("cuda")


def same_bits(call: Call, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """Raise where two results differ in a bit that the operator promises."""
    check(Call(call.op, call.case, call.arguments), got, want)


def test_equals_the_cpu_and_repeats(call) -> None:
    first = call()
    check(call, first, call.to("cpu")())
    for _ in range(3):
        same_bits(call, call(), first)


def test_captured_in_a_graph(call) -> None:
    want = call()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()  # what is set up once is set up before
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for _ in range(2):
        for t in out:
            t.zero_()
        graph.replay()
        torch.cuda.synchronize()
        same_bits(call, out, want)


def test_runs_on_the_current_stream(call) -> None:
    want = call()
    clones = (a.clone() if isinstance(a, Tensor) else a for a in call.arguments)
    late = replace(call, arguments=tuple(clones))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        # The arguments arrive late, on that stream only: another stream would read zeros.
        for a in late.arguments:
            if isinstance(a, Tensor):
                a.zero_()
        torch.cuda._sleep(20_000_000)
        for to, source in zip(late.arguments, call.arguments, strict=True):
            if isinstance(to, Tensor):
                to.copy_(source)
        out = late()
    side.synchronize()
    same_bits(call, out, want)


def test_does_not_wait_for_the_gpu(call) -> None:
    call()
    with warnings.catch_warnings():  # torch says once that the mode is a prototype
        warnings.simplefilter("ignore")
        try:
            torch.cuda.set_sync_debug_mode("error")
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # That sees torch's own waits only. Behind other work the call still comes back.
    start, returned = torch.cuda.Event(), torch.cuda.Event()
    torch.cuda._sleep(100_000_000)
    start.record()
    call()
    waited = start.query()
    returned.record()
    returned.synchronize()
    assert not waited, f"{call}: expected to return before the GPU is done, got a wait"


def _on_hopper(op: str, *arguments: object) -> tuple[Tensor, ...]:
    """Return what the op does in the way "hopper", which has to run its product."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the product that selects is for compute capability 9.0")
    call = Call(op, "", arguments, way="hopper")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        out = call()
    assert any("hopper_product_kernel" in event.name for event in seen.events())
    return out


def _rounded(n: int, d: int, m: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return x, W, b, x W^T + b in float64, and what d + 1 roundings may add to each."""
    x, W = (torch.randn(rows, d, device="cuda").bfloat16().float() for rows in (n, m))
    b = torch.randn(m, device="cuda")
    exact = x.double() @ W.double().t() + b.double()
    most = (x.double().abs() @ W.double().abs().t() + b.double().abs()) * (d + 1) * 2.0**-24
    return x, W, b, exact, most


@pytest.mark.parametrize("shape", [(300, 776, 5000, 32), (129, 64, 4097, 500), (1, 8, 700, 1)])
def test_selection_within_the_product(shape) -> None:
    """The way "hopper", on numbers whose sums are rounded: within what d roundings may do."""
    n, d, m, k = shape
    x, W, b, exact, most = _rounded(n, d, m)
    values, indices = _on_hopper("encode_topk", x, W, b, None, k, None, False, False, True)
    at = indices.long()
    assert (at.diff() > 0).all()
    assert ((values - exact.gather(1, at)).abs() <= most.gather(1, at)).all()
    # Whatever was left out is not larger than what was taken by more than both roundings.
    least = (exact + most).gather(1, at).amin(1)
    left = (exact - most).scatter(1, at, float("-inf")).amax(1)
    assert (left <= least).all()


@pytest.mark.parametrize("shape", [(300, 776, 5000, 32), (129, 64, 4097, 500), (1, 8, 700, 1)])
def test_selection_in_the_whole_matrix_within_the_product(shape) -> None:
    n, d, m, k = shape
    x, W, b, exact, most = _rounded(n, d, m)
    values, indices, offsets, threshold = _on_hopper(
        "encode_batch_topk", x, W, b, None, k * n, None, True, None
    )
    assert offsets[-1] == k * n
    rows = torch.repeat_interleave(torch.arange(n, device="cuda"), offsets.diff())
    at = rows * m + indices.long()
    assert (at.diff() > 0).all()
    assert ((values - exact.flatten()[at]).abs() <= most.flatten()[at]).all()
    assert values.amin() == threshold
    left = (exact - most).flatten().index_fill(0, at, float("-inf"))
    assert left.amax() <= (exact + most).flatten()[at].amin()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_arguments(call) -> None:
    want = call()
    with torch.cuda.device(0):
        out = call.to("cuda:1")()
        assert torch.cuda.current_device() == 0
    assert all(t.device.index == 1 for t in out)
    same_bits(call, tuple(t.to("cuda:0") for t in out), want)
