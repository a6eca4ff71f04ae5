"""How much memory training from a running model takes, in a process of its own.

    python -m bench.stream_memory [--model smollm2] [--site resid_post.5] [--buffer-rows 131072]

The model is saved first, so that what loading a packed file leaves behind does not count. A child
process loads it, trains on a stream until both halves of the buffer were full twice, and reports
its largest resident set against what has to be there:

    base       the process with all libraries and the code of the model, before it is loaded
    model      parameters and buffers
    buffer     rows of both halves
    SAE        parameters, and the state of the optimizer
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def resident(name: str = "VmRSS") -> int:
    """Return the resident set of this process, or with VmHWM the largest so far, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def forget_peak() -> None:
    """Begin to count the largest resident set anew."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(args: argparse.Namespace) -> None:
    """Train and print, in a process that has done nothing else."""
    import torch
    import transformers

    import fastsae
    from fastsae.data import stream

    config = transformers.AutoConfig.from_pretrained(args.folder)
    transformers.AutoModelForCausalLM._model_mapping[type(config)]  # imports what loading imports
    fastsae.Trainer  # noqa: B018
    torch.set_num_threads(1)
    torch.zeros(64, 64) @ torch.zeros(64, 64)
    gc.collect()
    base = resident()
    loader: Any = transformers.AutoModelForCausalLM
    model = loader.from_pretrained(args.folder, dtype=torch.float32).eval()
    size = sum(x.nbytes for x in [*model.parameters(), *model.buffers()])
    loaded = resident()
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    documents = [torch.randint(10, vocabulary, (2048,), generator=generator) for _ in range(256)]
    source = stream(
        model, None, documents, args.site, prefix_id=0, buffer_rows=args.buffer_rows, threads=1,
        max_norm_ratio=3.0,
    )  # fmt: skip
    sae = fastsae.TopKSAE(source.d_in, args.d_sae, k=32)
    steps = 2 * args.buffer_rows // args.batch
    config = fastsae.TrainConfig(steps=steps, batch_size=args.batch, progress=False)
    buffer = args.buffer_rows * source.d_in * 4
    trainer = fastsae.Trainer(sae, source, config)
    forget_peak()
    trainer.fit()
    peak = resident("VmHWM")
    weights = sum(p.nbytes for p in sae.parameters())
    parts = {"base": base, "model": size, "buffer": buffer, "SAE": 3 * weights}
    needed = sum(parts.values())
    print(", ".join(f"{name} {n / 1e6:.0f} MB" for name, n in parts.items()))
    print(f"resident after loading {loaded / 1e6:.0f} MB, at most {peak / 1e6:.0f} MB in training")
    own = (peak - base) / (needed - base)
    print(f"against the sum: {peak / needed:.2f}; both less base: {own:.2f}")


def main() -> None:
    """Save the model, and measure in a child."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--site", default="resid_post.5")
    parser.add_argument("--buffer-rows", type=int, default=2**17)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        measure(args)
        return
    from fastsae.models import load_model

    with tempfile.TemporaryDirectory() as folder:
        model: Any = load_model(args.model)[0]
        if hasattr(model.config, "quantization_config"):  # of the file; the weights are float32
            del model.config.quantization_config
            model.hf_quantizer, model.is_quantized = None, False
        model.save_pretrained(folder)
        del model
        command = [sys.executable, "-m", "bench.stream_memory", *sys.argv[1:], "--folder", folder]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
