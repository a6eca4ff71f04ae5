"""What `import fastsae` costs and brings in, and what it says when a library is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

import fastsae
from fastsae import _host, _library


def python(code: str, *options: str) -> str:
    command = [sys.executable, *options, "-c", code]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light(tmp_path: Path) -> None:
    code = (
        "import sys, time\nt = time.process_time()\nimport torch\n"
        "own = time.process_time()\nimport fastsae\n"
        "print((time.process_time() - own) / (own - t))\n"
        "print([m for m in ('transformers', 'datasets', 'matplotlib', 'tensorboard')"
        " if m in sys.modules])"
    )
    # From bytecode, as what pip installs has it: the first run writes it.
    cached = "-X", f"pycache_prefix={tmp_path}"
    share, heavy = min(python(code, *cached).split("\n") for _ in range(4))
    assert heavy == "[]"
    assert float(share) < 0.25  # of what torch takes


def test_ops_work_without_the_host_module() -> None:
    python(
        "import sys\nsys.modules['fastsae._host'] = None\n"
        "import torch, fastsae\n"
        "assert fastsae.ops.topk(torch.tensor([[1.0, 2.0]]), 1).indices.item() == 1"
    )


def test_build_info_names_the_version() -> None:
    assert _host.build_info()["version"] == fastsae.__version__
    assert _host.build_info()["torch_target"] == "2.11"


def test_isa_is_chosen_by_the_environment() -> None:
    code = "import fastsae\nfrom fastsae import _host\nprint(_host.isa())"
    wanted = "import os\nos.environ['FASTSAE_ISA'] = 'scalar'\n"
    assert python(wanted + code) == "scalar"
    with pytest.raises(ValueError, match=r"set_isa: expected scalar, avx2 or avx512.*got sse"):
        _host.set_isa("sse")


def test_a_missing_library_says_how_to_build_it(monkeypatch) -> None:
    monkeypatch.setattr(fastsae, "__path__", [])
    with pytest.raises(RuntimeError, match=r"libfastsae_cpu\.so.*pip install --no-build-isolation"):
        _library.load_cpu()


def test_a_broken_library_says_what_is_wrong(tmp_path) -> None:
    path = tmp_path / "libfastsae_cpu.so"
    path.write_bytes(b"not a library")
    with pytest.raises(RuntimeError, match=r"expected libfastsae_cpu\.so to load in torch"):
        _library._load("libfastsae_cpu.so", path)


def test_ops_without_a_native_kernel_run_in_plain_torch() -> None:
    # On the meta device nothing runs, but every op must have an implementation for any device.
    import torch

    for op in ("topk", "batch_topk", "encode_topk", "sparse_decode", "group_by_latent"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(
            f"fastsae::{op}", "CompositeExplicitAutograd"
        )
        assert _library.has_kernel(op, "cpu")


def test_an_op_without_its_cuda_kernel_says_so_once() -> None:
    on_a_gpu = (SimpleNamespace(is_cuda=True), 3)
    with pytest.warns(
        RuntimeWarning, match=r"no_such_op runs on cuda as plain torch.*libfastsae_cuda"
    ):
        _library.warn_if_slow("no_such_op", on_a_gpu)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _library.warn_if_slow("no_such_op", on_a_gpu)
        _library.warn_if_slow("another", (SimpleNamespace(is_cuda=False),))
