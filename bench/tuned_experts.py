"""Experts that stand out for one of two languages, switched off; and latents of an SAE likewise.

    python -m bench.tuned_experts [--seeds 3]

A mixture of 3 layers with 16 experts each, 2 for a token, learns to continue characters of two
languages: English (the topics of Python's help) and the same with every letter moved by 13. Experts
are ranked by how much more active they are in the second language on some contexts; the top ones
are switched off, and the loss on other contexts of either language is compared with that of
controls: as many experts that are as active. Latents of a TopK SAE at the first block are ranked
and ablated in the same way.

Source: Dahlke et al. 2025 (arXiv 2502.11096), where experts of a large model are ranked by how
much they have to do with refusals. The languages and the sizes are ours.
"""

from __future__ import annotations

import argparse
import codecs
import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import fastsae
from fastsae.analysis import (
    Activity,
    contrast,
    expert_activity,
    latent_activity,
    steer,
    tune_experts,
)
from fastsae.models import read, resolve
from fastsae.models.text import python_topics

CONTEXT, STEPS, BATCH, SITE = 48, 400, 16, "resid_post.0"
TOP = (2, 4, 8)
CONTROLS = 3


def languages() -> list[Tensor]:
    """Return contexts of English and of the other language: int64 `[n, CONTEXT]`, 0 first."""
    text = " ".join(python_topics())[:400_000].lower()
    found = []
    for words in (text, codecs.encode(text, "rot13")):
        ids = torch.tensor([1 + min(ord(c), 126) - 10 for c in words if ord(c) >= 10])
        rows = ids[: len(ids) // (CONTEXT - 1) * (CONTEXT - 1)].view(-1, CONTEXT - 1)
        found.append(F.pad(rows, (1, 0)))
    return found


def train(rows: Tensor, seed: int) -> nn.Module:
    """Return a small mixture trained on contexts of both languages."""
    torch.manual_seed(seed)
    config = transformers.MixtralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, num_local_experts=16, num_experts_per_tok=2,
        max_position_embeddings=64, router_aux_loss_coef=0.01, output_router_logits=True,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, STEPS)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        batch = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.config.output_router_logits = False
    trained: nn.Module = model.train(False)
    return trained


@torch.no_grad()
def loss(model: nn.Module, rows: Tensor) -> float:
    """Return nats per character."""
    logits = model(input_ids=rows, use_cache=False).logits[:, 1:-1]
    return float(F.cross_entropy(logits.flatten(0, 1), rows[:, 2:].flatten()))


def changes(
    model: nn.Module, held_out: Sequence[Tensor], change: AbstractContextManager[None]
) -> Tensor:
    """Return by how much the loss on the other language and on English rises: `[2]`."""
    clean = [loss(model, rows) for rows in held_out]
    with change:
        return torch.tensor([loss(model, rows) for rows in held_out]) - torch.tensor(clean)


def measure(seed: int) -> dict[str, Tensor]:
    """Return the rises of the loss, on the other language and on English, by what was changed."""
    english, other = (x[torch.randperm(len(x), generator=_seeded(1))] for x in languages())
    model = train(torch.cat([english[600:], other[600:]]), seed)
    held_out = other[:100], english[:100]
    ranked_on = [x[200:250].tolist() for x in (other, english)]
    found = {"loss": torch.tensor([loss(model, rows) for rows in held_out])}

    x = read(model, [resolve(model, SITE)], torch.cat([english[300:600], other[300:600]]))[SITE]
    torch.manual_seed(seed)
    sae = fastsae.TopKSAE(d_in=64, d_sae=512, k=8)
    config = fastsae.TrainConfig(epochs=10, batch_size=512, seed=seed, progress=False)
    fastsae.Trainer(sae, x[:, 1:].flatten(0, 1), config).fit()

    activities: dict[str, list[Activity]] = {
        "experts": [expert_activity(model, p) for p in ranked_on],
        "latents": [latent_activity(model, sae, p, site=SITE) for p in ranked_on],
    }
    for kind, (target, rest) in activities.items():
        ranking = contrast(target, rest)

        def off(units: list[Any], kind: str = kind) -> AbstractContextManager[None]:
            if kind == "experts":
                return tune_experts(model, off=units)
            return steer(model, sae, units, site=SITE, how="ablate")

        top = ranking.top(TOP[-1], by="auroc")
        found[f"{kind} off, top {TOP[-1]} by AUROC"] = changes(model, held_out, off(top))
        for n in TOP:
            top = ranking.top(n)
            found[f"{kind} off, top {n}"] = changes(model, held_out, off(top))
            drawn = [ranking.controls(top, s) for s in range(CONTROLS)]
            rises = [changes(model, held_out, off(units)) for units in drawn]
            found[f"{kind} off, {n} controls"] = torch.stack(rises).mean(0)
        if kind == "experts":
            best = dict(reversed(ranking.top(len(ranking.units))))  # of each layer the first
            change = tune_experts(model, on=sorted(best.items()))
            found["experts on, the top one of each layer"] = changes(model, held_out, change)
    return found


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3)
    results = [measure(seed) for seed in range(parser.parse_args().seeds)]
    print("nats per character, mean (smallest to largest): other language | English")
    for name in results[0]:
        parts = []
        for column in range(2):
            values = [float(found[name][column]) for found in results]
            parts.append(
                f"{statistics.mean(values):+.3f} ({min(values):+.3f} to {max(values):+.3f})"
            )
        print(f"{name:40} {' | '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()
