"""A short run of everything in this folder, and what it cannot do: full disks, two at once."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastsae
from fastsae._files import checksum
from fastsae._files.lock import locked
from fastsae._files.read import TensorFile, printable
from fastsae._files.write import PREFIX, staging, sweep, write_atomic, write_tensors
from fastsae.nn import TopKSAE

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_short_run_of_kills_and_mutations():
    command = [sys.executable, "-m", "tests.faults", "--kills", "16", "--mutations", "240"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["wrong"] for record in records] == [[]] * 7, done.stderr
    assert done.returncode == 0, done.stderr
    outcomes = records[-1]["outcomes"]
    assert outcomes["detected"] > 120


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def failing(original, number, calls):
    """Return `original` with a full disk at call `number`, counted from 0."""

    def fail(*arguments, **named):
        calls.append(1)
        if len(calls) == number + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments, **named)

    return fail


OPERATIONS = ("replace", "rename", "fsync", "mkdir", "chmod")


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_failing_operation_leaves_the_previous_save(name, tmp_path, monkeypatch):
    torch.manual_seed(0)
    old, new = TopKSAE(8, 16, k=2), TopKSAE(8, 32, k=5)
    fastsae.save(old, tmp_path)
    before = files(tmp_path)
    original = getattr(os, name)
    failed = 0
    for number in range(20):
        calls = []
        monkeypatch.setattr(os, name, failing(original, number, calls))
        try:
            fastsae.save(new, tmp_path)
        except RuntimeError as error:
            assert "could not write" in str(error)  # noqa: PT017
            assert "No space left on device" in str(error)  # noqa: PT017
        monkeypatch.setattr(os, name, original)
        failed += len(calls) > number
        got = fastsae.load(tmp_path)
        assert got.k in (2, 5)
        assert torch.equal(got.W_dec, (old if got.k == 2 else new).W_dec)
        assert sorted(files(tmp_path)) == sorted(before)
        assert not list(tmp_path.glob(f"{PREFIX}*"))
        fastsae.save(old, tmp_path)
    assert failed or name in ("rename", "mkdir")


def test_two_processes_in_one_folder(tmp_path):
    program = (
        "import sys, torch, fastsae\n"
        "sae = fastsae.TopKSAE(8, 16, k=2)\n"
        "config = fastsae.TrainConfig(batch_size=16, steps=4000, out=sys.argv[1], progress=False)\n"
        "print(fastsae.Trainer(sae, torch.randn(96, 8), config).fit().final['step'], flush=True)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "out")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    results = [process.communicate() for process in both]
    codes = sorted(process.returncode for process in both)
    if codes == [0, 1]:
        (refused,) = [err for (_, err), p in zip(results, both, strict=True) if p.returncode]
        assert "expected no other run in" in refused or "to hold no earlier run" in refused
    else:  # one was over before the other began, and left a run
        pytest.fail(f"{codes} {results}")


def test_a_lock_ends_with_its_process(tmp_path):
    program = (
        "import sys, time, pathlib\nfrom fastsae._files.lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1]), 'x'):\n"
        "    print('in', flush=True)\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "in\n"
        message = f"got process {child.pid}; wait for it"
        with pytest.raises(RuntimeError, match=message), locked(tmp_path, "y"):
            pass
        child.kill()
    with locked(tmp_path, "y"):
        assert (tmp_path / ".fastsae.lock").read_text() == f"{os.getpid()}\n"
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_swept_and_what_a_live_one_has_is_not(tmp_path):
    (tmp_path / f"{PREFIX}dead").mkdir()
    (tmp_path / f"{PREFIX}dead" / "half").write_text("x")
    (tmp_path / f"{PREFIX}file").write_text("x")
    with staging(tmp_path) as stage:
        sweep(tmp_path)
        assert list(tmp_path.iterdir()) == [stage]
        write_atomic(tmp_path / "a", "1")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_files_are_readable_by_others_as_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        fastsae.save(TopKSAE(8, 16, k=2), tmp_path)
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o644}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (7, 5), (1 << 20, 3)])
def test_tensor_files_hold_what_was_written(dtype, shape, tmp_path):
    x = (torch.rand(shape) * 100 - 50).to(dtype)
    seal = write_tensors(tmp_path / "a", {"x": x, "y": x.reshape(-1)[::2]}, {"b": [1, None]})
    file = TensorFile(tmp_path / "a", "test", seal)
    assert file.about == {"b": [1, None]}
    assert torch.equal(file.tensor("x"), x)
    assert torch.equal(file.tensor("y"), x.reshape(-1)[::2])
    assert (
        write_tensors(tmp_path / "b", {"x": x, "y": x.reshape(-1)[::2]}, {"b": [1, None]}) == seal
    )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_damage_has_an_offset(tmp_path):
    x = torch.arange(3 << 20, dtype=torch.float32)
    write_tensors(tmp_path / "a", {"x": x})
    data = bytearray((tmp_path / "a").read_bytes())
    place = len(data) - 4 * x.numel() + 2 * checksum.BLOCK + 5  # in its third block
    data[place] ^= 1
    (tmp_path / "a").write_bytes(data)
    file = TensorFile(tmp_path / "a", "test")
    with pytest.raises(ValueError, match=rf"other bytes from offset {place - 5}$"):
        file.tensor("x")


def test_text_from_files_cannot_steer_a_terminal():
    assert printable("a\x1b[31mb\nc\x00\x9bd\u202ee\u2066f") == (
        "a\\x1b[31mb\\nc\\x00\\x9bd\\u202ee\\u2066f"
    )
    assert printable("Ġ日本 \u3000👩‍🔬 naïve") == "Ġ日本 \u3000👩‍🔬 naïve"


@pytest.mark.parametrize("folder", ["sae", "run", "store"])
def test_verify_names_what_is_damaged(folder, tmp_path):
    from tests.faults.workloads import Fit, Harvest, Save

    makes = {"sae": Save, "run": Fit, "store": Harvest}
    path = tmp_path / folder
    makes[folder]().work(path)
    assert fastsae.verify(path).ok
    assert fastsae.verify(path).checked
    for file in [p for p in path.rglob("*") if p.is_file()]:
        data = file.read_bytes()
        changed = bytearray(data)
        changed[len(data) * 2 // 3] ^= 1
        file.write_bytes(changed)
        found = fastsae.verify(path)
        assert found.problems, file
        assert any(str(file) in line or str(file.parent) in line for line in found.problems), file
        file.write_bytes(data)
    assert fastsae.verify(path).ok


def test_verify_refuses_what_is_not_ours(tmp_path):
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(
            FileNotFoundError, match="expected a store, a run, a checkpoint, an SAE or contexts"
        ):
            fastsae.verify(place)
