"""Take apart the errors of SAEs of three widths on a harvest: `fastsae.analysis.dark_matter`.

    fastsae harvest --model smollm2 --text TEXT.jsonl --out STORE --val-fraction 0.15 \\
        --site resid_post.15 --site resid_post.5 --site mlp_out.15
    python -m bench.dark_matter STORE TEXT.jsonl --out results.jsonl --page dark-matter.html

Trains TopK SAEs at the first site, and one at each earlier site, for every seed. Linear maps are
fitted on rows of the split they were trained on; every number is of rows held out, or of texts that
the harvest held out. Rows above 3 times the median norm are left out. A line of the results is one
SAE; the page is about the first seed. --report prints the table of results that are there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsae import TopKSAE, TrainConfig, Trainer
from fastsae.analysis import DarkMatter, SAEError, dark_matter
from fastsae.data import ActivationStore
from fastsae.eval import norm_limit
from fastsae.models.chunks import chunks, held_out, spread
from fastsae.models.load import load_model
from fastsae.models.text import read_files
from fastsae.report import write_dark_matter


def train(store: ActivationStore, d_sae: int, k: int, steps: int, seed: int) -> TopKSAE:
    """Return a trained SAE of a site."""
    torch.manual_seed(seed)
    sae = TopKSAE(store.d_in, d_sae, k)
    config = TrainConfig(batch_size=512, steps=steps, seed=seed, progress=False)
    Trainer(sae, store, config).fit()
    return sae.eval()


def rows(path: str, sites: Sequence[str], split: str, n: int) -> list[Tensor]:
    """Return about n random rows of the usual norms, of every site at the same tokens."""
    store = ActivationStore(path, sites, split=split)
    parts = store.sample(n).split(list(store.widths.values()), 1)
    usual = parts[0].norm(dim=1) <= norm_limit(parts[0])
    kept = [part[usual] for part in parts]
    order = torch.randperm(len(kept[0]), generator=torch.Generator().manual_seed(0))
    return [part[order] for part in kept]


def contexts_of(text: str, tokenizer: Any, store: ActivationStore, n: int) -> list[list[int]]:
    """Return n contexts of the texts that the harvest held out."""
    documents, counts = read_files([text]), store.manifest.documents
    share = counts["val"] / (counts["train"] + counts["val"])
    fraction = round(share * 100) / 100
    unseen = [doc for i, doc in enumerate(documents) if held_out(i, fraction)]
    if len(unseen) != counts["val"]:
        raise ValueError(
            f"expected the {counts['val']} held-out texts in {text}, got {len(unseen)}"
        )
    cut = chunks(tokenizer, unseen, store.manifest.context, store.manifest.prefix_id)
    return spread([chunk.ids for chunk in cut], n)


@torch.no_grad()
def outputs(sae: TopKSAE, x: Tensor) -> Tensor:
    """Return what an SAE gives for all rows."""
    return torch.cat([sae(part) for part in x.split(4096)])


def run(
    args: argparse.Namespace, seed: int, model: nn.Module, contexts: list[list[int]]
) -> DarkMatter:
    """Train the SAEs of one seed and take their errors apart."""
    sites = [args.site, *args.earlier]
    fit, unseen = (
        rows(args.store, sites, split, n)
        for split, n in (("train", args.fit), ("val", args.held_out))
    )
    here = ActivationStore(args.store, args.site)
    saes = [train(here, d_sae, args.k, args.steps, seed) for d_sae in args.widths]
    earlier = {
        f"SAE of {args.site} itself": (outputs(saes[-1], fit[0]), outputs(saes[-1], unseen[0]))
    }
    for site, x, y in zip(args.earlier, fit[1:], unseen[1:], strict=True):
        sae = train(ActivationStore(args.store, site), args.widths[-1], args.k, args.steps, seed)
        earlier[f"SAE of {site}"] = outputs(sae, x), outputs(sae, y)
    return dark_matter(
        saes, fit[0], unseen[0], pursuit_rows=args.pursuit_rows, earlier=earlier,
        model=model, site=args.site, contexts=contexts, max_norm=norm_limit(fit[0]),
    )  # fmt: skip


def line(found: DarkMatter, i: int, seed: int, seconds: float) -> dict[str, Any]:
    """Return the numbers of one SAE in JSON types."""
    sae: SAEError = found.saes[i]
    numbers: dict[str, Any] = {"seed": seed, "d_sae": sae.d_sae, "l0": sae.l0, "seconds": seconds}
    numbers |= asdict(sae.anatomy)
    tokens = sae.tokens
    share = tokens.nonlinear.square().sum() / tokens.error.square().sum()
    numbers["nonlinear_share"] = float(share)
    numbers["correlation"] = float(found.correlation[0, i])
    numbers |= {"r2_by_norm": found.r2_by_norm[i], "r2_by_parts": found.r2_by_parts[i]}
    if sae.cost is not None:
        numbers |= {f"ce_{name}": value for name, value in asdict(sae.cost).items()}
        numbers["recovered_by_linear"] = sae.cost.recovered_by_linear
        numbers["recovered_by_nonlinear"] = sae.cost.recovered_by_nonlinear
    if sae.pursuit is not None:
        for name in ("own", "pursuit"):
            anatomy = asdict(getattr(sae.pursuit, name))
            numbers |= {f"{name}: {key}": value for key, value in anatomy.items()}
    for name, output in sae.earlier.items():
        numbers |= {f"{name}: {key}": value for key, value in asdict(output).items()}
    return numbers


def report(lines: list[dict[str, Any]]) -> str:
    """Return the table: mean over seeds ± half the range, a column for each width."""
    widths = sorted({row["d_sae"] for row in lines})
    out = ["| | " + " | ".join(f"{d_sae:,}" for d_sae in widths) + " |"]
    out.append("|---" * (len(widths) + 1) + "|")
    for key in lines[0]:
        if key in ("seed", "d_sae", "seconds"):
            continue
        cells = []
        for d_sae in widths:
            found = [row[key] for row in lines if row["d_sae"] == d_sae]
            half = (max(found) - min(found)) / 2
            cells.append(f"{statistics.fmean(found):.4f} ± {half:.4f}")
        out.append(f"| {key} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", nargs="?")
    parser.add_argument("text", nargs="?", help="what the store was harvested from")
    parser.add_argument("--out", type=Path, help="results, one line an SAE")
    parser.add_argument("--page", help="an HTML page about the first seed")
    parser.add_argument("--report", type=Path, help="print the table of these results")
    parser.add_argument("--site", default="resid_post.15")
    parser.add_argument("--earlier", nargs="*", default=["resid_post.5", "mlp_out.15"])
    parser.add_argument("--widths", type=int, nargs="*", default=[1024, 2048, 4096])
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--steps", type=int, default=512)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--fit", type=int, default=40_000, help="rows to fit on")
    parser.add_argument("--held-out", type=int, default=15_000, help="rows to test on")
    parser.add_argument("--pursuit-rows", type=int, default=8_000)
    parser.add_argument("--contexts", type=int, default=32)
    args = parser.parse_args()
    if args.report:
        print(report([json.loads(text) for text in args.report.read_text().splitlines()]))
        return
    if args.store is None or args.text is None or args.out is None:
        parser.error("expected STORE, TEXT and --out, or --report")
    model, tokenizer = load_model("smollm2")
    contexts = contexts_of(
        args.text, tokenizer, ActivationStore(args.store, args.site), args.contexts
    )
    lines: list[dict[str, Any]] = []
    for seed in args.seeds:
        start = time.perf_counter()
        found = run(args, seed, model, contexts)
        seconds = time.perf_counter() - start
        if seed == args.seeds[0] and args.page:
            facts = {
                "Model": "SmolLM2-135M",
                "Site": args.site,
                "Updates": f"{args.steps:,} of 512 tokens",
            }
            facts |= {"Rows": f"{args.fit:,} to fit, {args.held_out:,} held out", "Seed": str(seed)}
            write_dark_matter(args.page, found, title=f"Dark matter at {args.site}", facts=facts)
        lines += [line(found, i, seed, seconds) for i in range(len(found.saes))]
        args.out.write_text("".join(json.dumps(row) + "\n" for row in lines))
        print(f"seed {seed}: {seconds:.0f} s", flush=True)
    print(report(lines))


if __name__ == "__main__":
    main()
