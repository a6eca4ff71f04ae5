r"""SAEs judged by a task: indirect objects in SmolLM2-135M, next to a supervised dictionary.

    python -m bench.ioi --out ioi.jsonl --cache ioi.safetensors
    python -m bench.ioi --out ioi.jsonl --cache ioi.safetensors --site resid_post.20 \
        --contexts 0 --edit Pos

One JSON line per number; docs/judge.md has the table. It harvests 1,536 prompts to fit on, takes 96
others, and measures at the last token: how much of the logit difference reconstructions keep, how
often an edit of k latents makes the model answer as the activation of the changed prompt does, and
which values of the attributes have a latent of their own. SAEs have three seeds: of the task (the
rows that the supervised dictionary is fitted on) and of text (activations at the same site).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastsae
from fastsae.analysis import (
    IOITask,
    SupervisedDictionary,
    TaskRuns,
    approximation,
    attribute_f1,
    edit_success,
    share_found,
    sparse_edit,
    splitting,
    supervised_dictionary,
    task_activations,
    union_f1,
)
from fastsae.analysis.ioi import NAMES, IOIPrompts
from fastsae.models import load_model, read, resolve
from fastsae.models.chunks import chunks
from fastsae.models.text import python_topics

FIT, HELD_OUT, NAMES_USED = 1536, 96, 24
SITES = ("resid_post.16", "resid_post.20", "resid_post.24", "attn_z.20")
EDITS = (1, 2, 4, 8, 16)
SEEDS = (0, 1, 2)


def harvest(model: Any, prompts: IOIPrompts, path: Path | None) -> dict[str, Tensor]:
    """Return activations of all sites at the last token; kept in a file where one is named."""
    if path is not None and path.exists():
        kept = load_file(path)
        if torch.equal(kept.pop("fields"), prompts.fields):
            return kept
    x = task_activations(model, prompts, SITES, "end")
    if path is not None:
        save_file({**x, "fields": prompts.fields}, path)
    return x


def train(x: Tensor, seed: int, epochs: int) -> fastsae.TopKSAE:
    """Return a TopK SAE of 1,024 latents, 16 of them active."""
    torch.manual_seed(seed)
    sae = fastsae.TopKSAE(d_in=x.shape[1], d_sae=1024, k=16)
    config = fastsae.TrainConfig(
        epochs=epochs, batch_size=256, seed=seed, start_seed=seed, progress=False
    )
    fastsae.Trainer(sae, x, config).fit()
    return sae.eval()


def text_rows(model: Any, tokenizer: Any, site: str, contexts: int) -> Tensor:
    """Return activations of text: `[n, d]`."""
    cut = (chunk.ids for chunk in chunks(tokenizer, python_topics(), 64, prefix=0))
    ids = torch.tensor(list(islice((x for x in cut if len(x) == 64), contexts)))
    where = resolve(model, site)
    return torch.cat([read(model, [where], part)[site][:, 1:] for part in ids.split(8)]).flatten(
        0, 1
    )


def approximated(
    runs: TaskRuns, site: str, x: Tensor, x_hat: Tensor, mean: Tensor
) -> dict[str, Any]:
    found = approximation(runs, site, x, x_hat, mean)
    error = (x.double() - x_hat.double()).square().sum() / (x.double() - mean).square().sum()
    return {
        "sufficiency": found.sufficiency.value,
        "sufficiency_interval": [found.sufficiency.low, found.sufficiency.high],
        "necessity": found.necessity.value,
        "necessity_interval": [found.necessity.low, found.necessity.high],
        "fvu": float(error),
        "clean": found.clean,
        "ablated": found.ablated,
    }


def edited(
    runs: TaskRuns,
    site: str,
    x: Tensor,
    other: IOIPrompts,
    target: Tensor,
    attribute: str,
    made: SupervisedDictionary,
    saes: dict[tuple[str, int], fastsae.TopKSAE],
) -> Iterator[dict[str, Any]]:
    """Yield how often each edit of an attribute succeeds."""
    prompts = runs.prompts
    old, new = prompts.attributes[attribute], other.attributes[attribute]
    edits = {
        "none": x,
        "mean": made.mean.expand_as(x),
        "supervised": made.edit(x, attribute, old, new),
    }
    magnitude: dict[str, float] = {}
    for (kind, seed), sae in saes.items():
        for k in EDITS:
            for how in ("greedy", "random"):
                edit = sparse_edit(sae, x, target, k, how=how, seed=seed)
                edits[f"{kind} {how} {k} {seed}"] = edit.x
                magnitude[f"{kind} {how} {k} {seed}"] = float(edit.magnitude.nanmean())
        with torch.no_grad():
            edits[f"{kind} all all {seed}"] = x + (sae(target) - sae(x))
    for name, success in edit_success(runs, site, target, edits).items():
        yield {
            "edit": name,
            "attribute": attribute,
            "success": float(success.double().mean()),
            "magnitude": magnitude.get(name),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--site", default="resid_post.24", choices=SITES)
    parser.add_argument("--cache", type=Path, help="safetensors file that keeps activations")
    parser.add_argument("--contexts", type=int, default=100, help="of text; 0: no SAEs of text")
    parser.add_argument("--edit", nargs="*", default=["IO"], choices=("IO", "S", "Pos"))
    args = parser.parse_args()
    model, tokenizer = load_model("smollm2")
    task = IOITask(tokenizer, names=NAMES[:NAMES_USED], prefix=0)
    prompts = task.draw(FIT + 128, seed=0)
    rows = harvest(model, prompts, args.cache)
    fit, held_out = prompts.subset(torch.arange(FIT)), prompts.subset(FIT + torch.arange(HELD_OUT))
    runs = TaskRuns(model, held_out, "end")

    with args.out.open("a") as out:

        def say(**record: Any) -> None:
            print(json.dumps(record), file=out, flush=True)

        clean = runs.logits()
        difference = held_out.logit_difference(clean)
        say(
            what="task",
            prompts=len(held_out),
            accuracy=float((difference > 0).double().mean()),
            first=float((clean.argmax(1) == held_out.right).double().mean()),
            logit_difference=float(difference.mean()),
        )
        three = {name: held_out.attributes[name] for name in ("IO", "S", "Pos")}
        for site, code, attributes in (
            (args.site, "mse", held_out.attributes),
            (args.site, "mean", held_out.attributes),
            (args.site, "mse", three),
            *((x, "mse", held_out.attributes) for x in SITES if x != args.site),
        ):
            x, own = rows[site][:FIT], rows[site][FIT : FIT + HELD_OUT]
            made = supervised_dictionary(x, {k: fit.attributes[k] for k in attributes}, code=code)
            result = approximated(runs, site, own, made.reconstruct(attributes), made.mean)
            norms = made.norms()
            say(what="supervised", site=site, code=code, norms=norms, **result)

        made = supervised_dictionary(rows[args.site][:FIT], fit.attributes)
        x = rows[args.site]
        own = x[FIT : FIT + HELD_OUT]
        data = {"task": (x[:FIT], 60)}
        if args.contexts:
            data["text"] = text_rows(model, tokenizer, args.site, args.contexts), 15
        saes = {
            (kind, seed): train(own_rows, seed, epochs)
            for kind, (own_rows, epochs) in data.items()
            for seed in SEEDS
        }
        for (kind, seed), sae in saes.items():
            with torch.no_grad():
                result = approximated(runs, args.site, own, sae(own), made.mean)
                active = sae.encode(x[:FIT]) > 0
            say(what="sae", kind=kind, seed=seed, alive=int(active.any(0).sum()), **result)
            for name, values in fit.attributes.items():
                f1 = attribute_f1(active, values, len(fit.values[name]))
                unions = [union_f1(active, values == v).f1 for v in values.unique().tolist()]
                say(
                    what="f1",
                    kind=kind,
                    seed=seed,
                    attribute=name,
                    found_50=share_found(f1, 0.5),
                    found_80=share_found(f1, 0.8),
                    mean_best=float(f1.amax(0).mean()),
                    mean_union=sum(unions) / len(unions),
                    norm=made.norms()[name],
                    first_value=splitting(active, values == 0)._asdict(),
                )
        for attribute in args.edit:
            other = held_out.changed(attribute)
            target = task_activations(model, other, [args.site], "end")[args.site]
            for record in edited(runs, args.site, own, other, target, attribute, made, saes):
                say(what="edit", **record)


if __name__ == "__main__":
    main()
