"""Compare all architectures on the same real activations with the same budget.

    python -m bench.architectures FILE --out RESULTS.jsonl      # trains what RESULTS lacks
    python -m bench.architectures --report RESULTS.jsonl        # prints the table

FILE is safetensors with `acts` [n, d], the residual stream after block 15 of the demo's model, side
columns `token_ids` and `chunk_ids` [n] and, in its metadata, `n_train`, the number of training
rows; the rest is held out. Rows above 3 times the median norm are left out. What FILE lacks is read
from the model once and stored next to RESULTS: gradients for the gradient SAE, input and output of
the MLP for transcoders, two more layers for crosscoders.

Each line of RESULTS is one run. Metrics are those of the inference rule on every second held-out
row, after the others have set the thresholds of classes that can be calibrated to L0 = k; ce is the
next-token cross entropy of the held-out texts with the reconstruction in place. Transcoders and
crosscoders have other targets, so their FVU is comparable only with others of their kind. An
interrupted run continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastsae
from fastsae import SAE, SparseActs, TrainConfig, Trainer
from fastsae.eval import metrics
from fastsae.models import read, read_gradients, resolve
from fastsae.models.load import SMOLLM2, load_model
from fastsae.models.splice import ablate, replace

STEPS, BATCH = 512, 512
SITE, LAYERS = "resid_post.15", ("resid_post.10", "resid_post.15", "resid_post.20")
PREFIX = 1  # the token in front of every chunk, whose row is in no file

Make = Callable[[int, int, float], SAE]

HELD_OUT = 0.85
"""Share of the target L0 to train for where inference has no threshold: more latents fire on new
tokens than on the few that were fitted."""


FAST = 0.02
"""`control_lr` of classes that would not reach the target L0 in so few updates."""


def _make(cls: str, ask: float = 1.0, **options: Any) -> Make:
    return lambda d_in, d_sae, k: getattr(fastsae, cls)(d_in, d_sae, ask * k, **options)


ARCHITECTURES: dict[str, Make] = {
    "TopK": _make("TopKSAE"),
    "TopK, no aux": _make("TopKSAE", auxk_alpha=0.0),
    "TopK, zipf": _make("TopKSAE", aux="zipf"),
    "TopK, multi": _make("TopKSAE", multi_topk=True),
    "AbsTopK": _make("TopKSAE", absolute=True),
    "GroupMax": _make("GroupMaxSAE"),
    "HierarchicalTopK": _make("HierarchicalTopKSAE"),
    "BatchTopK": _make("BatchTopKSAE"),
    "Sampled": _make("SampledSAE", pool=16.0),
    "Matryoshka": _make("MatryoshkaSAE"),
    "FeatureChoice, uniform": _make("FeatureChoiceSAE", allocation="uniform"),
    "FeatureChoice, zipf": _make("FeatureChoiceSAE", allocation="zipf"),
    "JumpReLU": _make("JumpReLUSAE"),
    "Gated": _make("GatedSAE", HELD_OUT, control_lr=FAST),
    "ReLU, p-anneal": _make("ReLUSAE", HELD_OUT, penalty="p_anneal", control_lr=FAST),
    "ReLU, tanh": _make("ReLUSAE", HELD_OUT, penalty="tanh"),
    "ReLU, L1": _make("ReLUSAE", HELD_OUT),
}
"""SAEs of one site: how each is made from d_in, d_sae and the target L0."""


def _transcoder(cls: str, **options: Any) -> Make:
    return lambda d, d_sae, k: getattr(fastsae, cls)(d, d, d_sae, k, **options)


def _crosscoder(cls: str) -> Make:
    return lambda d, d_sae, k: getattr(fastsae, cls)(d, len(LAYERS), d_sae, k)


OTHERS: dict[str, Make] = {
    "Gradient": _make("GradientSAE"),
    "Transcoder, TopK": _transcoder("Transcoder"),
    "Transcoder, TopK, skip": _transcoder("Transcoder", skip=True),
    "Transcoder, BatchTopK": _transcoder("BatchTopKTranscoder"),
    "Transcoder, JumpReLU": _transcoder("JumpReLUTranscoder"),
    "SAE of the MLP's output, TopK": _make("TopKSAE"),
    "CrossCoder, BatchTopK": _crosscoder("CrossCoder"),
    "CrossCoder, TopK": _crosscoder("TopKCrossCoder"),
}
"""SAEs that train on something other than the activations of the site."""


def build(name: str, d_in: int, d_sae: int, k: float) -> SAE:
    """Return a fresh module of the architecture `name`."""
    return (ARCHITECTURES | OTHERS)[name](d_in, d_sae, k)


class Source:
    """The rows of FILE, what is read from the model besides, and the model."""

    def __init__(self, file: Path, cache: Path, with_model: bool) -> None:
        self.with_model = with_model
        with safe_open(file, "pt") as f:
            self.acts: Tensor = f.get_tensor("acts").float()
            self.n_train = int(f.metadata()["n_train"])
            ids, chunk = f.get_tensor("token_ids"), f.get_tensor("chunk_ids")
        self.contexts = torch.stack(
            [F.pad(ids[chunk == i].long(), (1, 0), value=PREFIX) for i in chunk.unique()]
        )
        self.cache = cache
        norm = self.acts.norm(dim=1)
        self.usual = norm <= 3 * norm[: self.n_train].median()

    @cached_property
    def model(self) -> nn.Module:
        """The model of the demo."""
        return load_model(SMOLLM2)[0].eval()

    @cached_property
    def extra(self) -> dict[str, Tensor]:
        """Gradients of the loss at SITE, the MLP's input and output, and LAYERS; by row."""
        if not self.cache.exists():
            names = (*LAYERS, "mlp_in.15", "mlp_out.15")
            found, site = [resolve(self.model, name) for name in names], resolve(self.model, SITE)
            parts: dict[str, list[Tensor]] = {name: [] for name in (*names, "grad")}
            for tokens in self.contexts.split(4):
                for name, x in read(self.model, found, tokens).items():
                    parts[name].append(x[:, 1:].flatten(0, 1))
                everything = torch.ones_like(tokens, dtype=torch.bool)
                grad = read_gradients(self.model, [site], tokens, everything)[1][SITE]
                parts["grad"].append(grad[:, 1:].flatten(0, 1))
            save_file({name: torch.cat(rows) for name, rows in parts.items()}, self.cache)
        return load_file(self.cache)

    def columns(self, name: str) -> Tensor:
        """Return what the architecture `name` trains on: `[n, columns]`."""
        if name == "Gradient":
            return torch.cat([self.acts, self.extra["grad"]], 1)
        if name.startswith("Transcoder"):
            return torch.cat([self.extra["mlp_in.15"], self.extra["mlp_out.15"]], 1)
        if name.startswith("SAE of the MLP"):
            return self.extra["mlp_out.15"]
        if name.startswith("CrossCoder"):
            return torch.cat([self.extra[layer] for layer in LAYERS], 1)
        return self.acts

    def split(self, name: str) -> tuple[Tensor, Tensor]:
        """Return training and held-out rows of `columns`, without outliers."""
        x, n = self.columns(name), self.n_train
        return x[:n][self.usual[:n]], x[n:][self.usual[n:]]

    @torch.no_grad()
    def cross_entropy(self, intervention: AbstractContextManager[None]) -> float:
        """Return the mean next-token loss of the held-out contexts inside `intervention`."""
        total, count = 0.0, 0
        with intervention:
            for tokens in self.contexts[self.n_train // (self.contexts.shape[1] - 1) :].split(6):
                logits = self.model(input_ids=tokens, use_cache=False).logits[:, 1:-1]
                targets = tokens[:, 2:]
                loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
                total, count = total + float(loss), count + targets.numel()
        return total / count

    @cached_property
    def limits(self) -> tuple[float, float]:
        """The cross entropy as it is, and with SITE replaced by its mean."""
        mean = self.acts[: self.n_train][self.usual[: self.n_train]].mean(0)
        return (
            self.cross_entropy(nullcontext()),
            self.cross_entropy(ablate(self.model, SITE, "mean", mean=mean)),
        )

    def recovered(self, fn: Callable[[Tensor], Tensor], site: str = SITE) -> float:
        """Return (CE_mean - CE) / (CE_mean - CE_clean) with rows replaced by `fn`."""
        clean, by_mean = self.limits
        return (by_mean - self.cross_entropy(replace(self.model, site, fn))) / (by_mean - clean)


def train(
    name: str, seed: int, data: Tensor, k: float, steps: int, expansion: int
) -> tuple[SAE, dict[str, Any]]:
    """Train one architecture; return it and the facts of its training run."""
    torch.manual_seed(seed)
    width = data.shape[1]
    for kind, blocks in (("Transcoder", 2), ("Gradient", 2), ("CrossCoder", len(LAYERS))):
        width = width // blocks if name.startswith(kind) else width
    sae = build(name, width, expansion * width, k)
    config = TrainConfig(
        batch_size=BATCH, steps=steps, compute_dtype="float32", seed=seed, progress=False
    )
    start = time.perf_counter()
    result = Trainer(sae, data, config).fit()
    return sae, {
        "architecture": name,
        "seed": seed,
        "steps": steps,
        "k": k,
        "expansion": expansion,
        "fvu_train": result.final["fvu"],
        "dead": result.final["dead"] / sae.d_sae,
        "seconds": time.perf_counter() - start,
        "parameters": sum(p.numel() for p in sae.parameters()),
    }


@torch.no_grad()
def scores(sae: SAE, x: Tensor, y: Tensor, acts: SparseActs) -> dict[str, float]:
    """Return the metrics of a code of held-out inputs x: how well it reconstructs y, and how."""
    return {
        "fvu": metrics.fvu(y, sae.reconstruct(x, acts)),
        "l0": float(acts.l0()),
        "silent": float((acts.counts() == 0).float().mean()),
    }


def measure(
    name: str, seed: int, source: Source, k: float, steps: int, expansion: int = 4
) -> list[dict[str, Any]]:
    """Train one architecture and return its result lines, one per inference rule."""
    rows, held_out = source.split(name)
    sae, known = train(name, seed, rows, k, steps, expansion)
    x, y, _ = sae.columns.split(held_out)
    if calibrate := getattr(sae, "calibrate_", None):
        calibrate(x[::2])
    x, y = x[1::2], y[1::2]
    lines = [known | scores(sae, x, y, sae.encode_sparse(x))]
    if source.with_model and (name in ARCHITECTURES or name == "Gradient"):
        lines[0]["recovered"] = source.recovered(lambda rows: sae(rows).detach())
    if isinstance(sae, fastsae.GradientSAE):
        grad = held_out[1::2, sae.d_in :]
        scored = sae.encode_sparse(x, grad=grad)
        line = known | {"architecture": "Gradient, scored"} | scores(sae, x, y, scored)
        every = iter(held_out[:, sae.d_in :].split(6 * (source.contexts.shape[1] - 1)))
        if source.with_model:
            line["recovered"] = source.recovered(
                lambda rows: sae.decode(sae.encode_sparse(rows, grad=next(every))).detach()
            )
        lines.append(line)
    if isinstance(sae, fastsae.MatryoshkaSAE):
        for groups in (1, 3):
            sae.active_groups = groups
            label = f"Matryoshka, first {sum(sae.groups[:groups])} latents"
            lines.append(known | {"architecture": label} | scores(sae, x, y, sae.encode_sparse(x)))
    if name in ("BatchTopK", "TopK"):
        lines += [known | line for line in reading(name, sae, x, k)]
    return lines


def reading(name: str, sae: SAE, x: Tensor, k: float) -> list[dict[str, Any]]:
    """Evaluate a trained dictionary in other ways: pursuit, fewer latents, a prefix."""
    if name == "TopK":
        start = time.perf_counter()
        acts = fastsae.gradient_pursuit(sae, x[:512], int(k))
        seconds = time.perf_counter() - start
        small = scores(sae, x[:512], x[:512], sae.encode_sparse(x[:512]))
        return [
            {"architecture": "TopK, pursuit (512 rows)", "seconds": seconds}
            | scores(sae, x[:512], x[:512], acts),
            {"architecture": "TopK, encoder (512 rows)"} | small,
        ]
    acts = sae.encode_sparse(x)
    lines = []
    for latents in (72, 504):
        values = torch.where(acts.indices < latents, acts.values, 0)
        part = SparseActs(values, acts.indices, acts.offsets, acts.d_sae)
        label = f"BatchTopK, first {latents} latents"
        lines.append({"architecture": label} | scores(sae, x, x, part))
    return lines


def report(rows: list[dict[str, Any]]) -> str:
    """Return the table: means over seeds, and half the range of the FVU."""
    lines = [
        "| architecture | parameters | seeds | FVU | L0 | dead | silent | CE recovered | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    known = [*ARCHITECTURES, *OTHERS]

    def place(name: str) -> int:
        """Return the sort key of a row: other evaluations of an architecture come after it."""
        longest = max((k for k in known if name.startswith(k)), key=len)
        return known.index(longest)

    for name in sorted(dict.fromkeys(row["architecture"] for row in rows), key=place):
        own = [row for row in rows if row["architecture"] == name]

        def mean(key: str, form: str, own: list[dict[str, Any]] = own) -> str:
            found = [row[key] for row in own if key in row]
            return format(statistics.fmean(found), form) if found else ""

        fvu = [row["fvu"] for row in own]
        half = (max(fvu) - min(fvu)) / 2
        cells = (
            *(
                name,
                mean("parameters", ",.0f"),
                len(own),
                f"{mean('fvu', '.4f')} ± {half:.4f}",
                mean("l0", ".1f"),
            ),
            *(mean("dead", ".1%"), mean("silent", ".1%"), mean("recovered", ".1%")),
            mean("seconds", ".0f"),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def read_results(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a results file; none if there is none."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def main() -> None:
    """Train what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?", help="activations")
    parser.add_argument("--out", type=Path, help="results, one line a run")
    parser.add_argument("--report", type=Path, help="print the table of these results")
    every = [*ARCHITECTURES, *OTHERS]
    parser.add_argument("--only", nargs="*", default=every, help="architectures")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument(
        "--no-model", action="store_true", help="leave out the cross entropy, which takes longest"
    )
    parser.add_argument("--expansion", type=int, default=4, help="d_sae / d_in")
    parser.add_argument("--k", type=float, default=32, help="wanted L0")
    arguments = parser.parse_args()
    if arguments.report:
        print(report(read_results(arguments.report)))
        return
    if arguments.file is None or arguments.out is None:
        parser.error("expected FILE and --out, or --report")
    source = Source(
        arguments.file, arguments.out.with_suffix(".safetensors"), not arguments.no_model
    )
    results = read_results(arguments.out)
    keys = ("architecture", "seed", "steps", "expansion")
    done = {tuple(row[key] for key in keys) for row in results}
    for seed in arguments.seeds:
        for name in arguments.only:
            if (name, seed, arguments.steps, arguments.expansion) in done:
                continue
            rows = measure(name, seed, source, arguments.k, arguments.steps, arguments.expansion)
            with arguments.out.open("a") as out:
                out.writelines(json.dumps(row) + "\n" for row in rows)
            text = f"FVU {rows[0]['fvu']:.4f}, L0 {rows[0]['l0']:.1f}"
            print(f"{name}, seed {seed}: {text}, {rows[0]['seconds']:.0f} s", flush=True)
    print(report(read_results(arguments.out)))


if __name__ == "__main__":
    main()
