"""The cases of the benches at tiny shapes, the timer a stand-in: no typo waits for a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch

from bench import cub, gpu, report, timing
from bench.ops import all_cases
from bench.timing import Result
from tests.ops.calls import NAMES

SHAPES = {"A": (12, 16, 64, 4), "B": (9, 24, 80, 3)}
CEILINGS = {"copy_gbs": 10.0, "gemm_gflops_float32": 100.0}


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    def medians(works, device, seconds):
        for work in works.values():
            work()
        return {name: [0.5 if name == "ours" else 1.0] for name in works}

    monkeypatch.setattr(timing, "medians", medians)
    monkeypatch.setattr(torch, "compile", lambda f: f)


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_every_case_runs(name, on_gpu) -> None:
    results = [
        timing.run(case, CEILINGS, "cpu", 0)
        for case in all_cases(name, SHAPES[name], "cpu", on_gpu)
    ]
    ops = {r.op.split()[0] for r in results}
    only_on_gpu = {"sparse_adam_step_"}
    assert ops == (set(NAMES) | {"training"} if on_gpu else set(NAMES) - only_on_gpu)
    for r in results:
        assert r.ratio == 2.0
        for target in r.targets:
            assert target in ("copy", "gather") or target in r.ratios, (r.op, target)


def test_ceilings() -> None:
    assert set(timing.ceilings("cpu", scale=512)) == {
        "copy_gbs",
        "gemm_gflops_float32",
        "gemm_gflops_bfloat16",
    }


def test_a_run_becomes_a_record_and_a_table(tmp_path) -> None:
    lines = [{"ceilings": CEILINGS}, *gpu.measure(SHAPES, "cpu", CEILINGS, time.time() + 100)]
    about = {**gpu.machine("cpu"), "gpu": "Some GPU 80GB", "commit": "abc"}
    about |= {"date": "2026-01-01", "time": "2359"}
    steps = [
        {"step": "tests", "ok": False, "seconds": 3.0, "why": "1 failed", "failures": ["FAILED x"]},
        {"step": "memcheck", "ok": None, "why": "not installed"},
    ]
    record = gpu.collect(lines, steps, about)
    assert not record["failed"]
    assert not record["dropped"]
    file = gpu.write(record, tmp_path)
    assert file.name == "some-gpu-80gb-2026-01-01-2359-abc.json"
    text = report.gpu(json.loads(file.read_text()))
    assert "MISS: " in text
    assert "- tests: FAIL, 3 s: 1 failed" in text
    assert "- encode_topk (overlap), A: n 12, d 16, d_sae 64, k 4: times of others" in text
    assert not gpu.is_good(record)


def test_what_fails_or_has_no_time_is_reported(monkeypatch) -> None:
    def broken(*_):
        raise ValueError("no such kernel")

    monkeypatch.setattr(timing, "run", broken)
    lines = list(gpu.measure({"A": SHAPES["A"]}, "cpu", CEILINGS, time.time() + 100))
    assert {line["why"] for line in lines if "failed" in line} == {"ValueError: no such kernel"}
    lines = list(gpu.measure(SHAPES, "cpu", CEILINGS, time.time() - 1))
    assert len([line for line in lines if "dropped" in line]) == 10


def test_some_benches_alone_and_in_their_order() -> None:
    every = [(name, module.__name__) for name, module in gpu.groups(SHAPES)]
    assert len(every) == len(set(every)) == len(SHAPES) * 5
    assert every[0] == ("A", "bench.ops.bench_step")
    some = gpu.groups(SHAPES, ["select", "adam"])
    names = [(name, module.__name__.rpartition("_")[2]) for name, module in some]
    assert names == [(name, part) for name in SHAPES for part in ("adam", "select")]
    with pytest.raises(SystemExit, match="only of step, adam, encode, decode, select, got adma"):
        gpu.groups(SHAPES, ["adma"])


def test_two_runs_side_by_side() -> None:
    def run(**ms: float) -> dict:
        rows = [{"op": op, "shape": "A", "dtype": "float32", "ours_ms": t} for op, t in ms.items()]
        return {"machine": {**gpu.machine("cpu"), "copy_gbs": 1.0}, "results": rows}

    text = report.beside(run(topk=3.0, gone=1.0), run(topk=2.0, new=1.0))
    assert "| `topk` | A | float32 | 3.000 | 2.000 | **1.50** |" in text
    assert "gone" not in text
    assert "new" not in text


def test_where_the_headers_of_cub_are(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CCCL_INCLUDE", str(tmp_path))
    assert cub.include() != tmp_path
    header = tmp_path / "cub/device/device_topk.cuh"
    header.parent.mkdir(parents=True)
    header.write_text("#error wrong header")
    assert cub.include() == tmp_path
    monkeypatch.setattr(cub.shutil, "which", lambda name, path: None)
    with pytest.raises(RuntimeError, match=r"bench\.cub: expected nvcc, found none"):
        cub.compile_into(tmp_path / "x.so", "sm_90", tmp_path)


def test_a_way_that_fails_is_left_out() -> None:
    def fails() -> None:
        raise RuntimeError("out of memory")

    case = timing.Case("topk", "A", int, {"good": int, "bad": fails}, int, parts={"part": fails})
    case.targets = {"copy": 0.8, "good": 2.0, "bad": 4.0}
    lines = list(gpu.drop_broken_ways(case, "topk", 0))
    assert set(case.torch) == {"good"}
    assert set(case.targets) == {"copy", "good"}
    assert not case.parts
    assert [line["left_out"] for line in lines if "left_out" in line] == ["topk: bad", "topk: part"]


def test_the_time_is_compared_with_targets() -> None:
    r = Result("op", "A", "float32", 1.0, 3.0, "torch", 3.0, 0.7, 0.7, 0.0, 5)
    r.ratios, r.targets = {"torch": 3.0}, {"copy": 0.8, "torch": 2.0, "gather": 0.1}
    assert r.missed() == ["copy 0.70 < 0.8", "gather 0.00 < 0.1"]


def test_steps_end_in_time() -> None:
    ok = gpu.run_step("s", [sys.executable, "-c", "print('hello')"], 60, {})
    assert ok["ok"]
    assert ok["why"] == "hello"
    late = gpu.run_step("s", [sys.executable, "-c", "import time; time.sleep(60)"], 5, {})
    assert late["ok"] is False
    assert late["why"] == "stopped after 5 s"


def test_a_bench_that_hangs_is_killed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "SILENCE", 0.2)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert gpu._wait(process, tmp_path / "lines", time.time() + 30) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes minutes on a GPU")
def test_without_a_gpu_the_benches_fail_in_one_line(tmp_path) -> None:
    (line,) = gpu.run_benches(tmp_path / "lines", time.time() + 60)
    assert line["failed"] == "the ceilings"
    assert "ended with 1" in line["why"]
