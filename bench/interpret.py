"""Are latents easier to put into words than neurons? Explanations of both, scored alike.

    python -m bench.interpret STORE [--site resid_post.15] [--latents 150] [--seeds 0 1 2]
    python -m bench.interpret STORE --intervene --model smollm2 --site resid_post.20

The first form explains latents of the training text and scores the explanations on windows of it
that were not shown, of

    SAE        a TopK SAE of 4 d latents (k 32), trained for 1,024 updates by default
    untrained  the same SAE as it starts, with random rows
    neurons    the dimensions of the activation, standardized, each with both signs as a latent of
               its own, and only the 32 largest of a token active

with explainer and judge by keywords, or by an LLM (--llm, --url of `fastsae interpret`). "shuffled"
are the scores of the SAE's explanations given to other latents: chance.

The second form adds latents at the end of prompts such that the next token changes by 0.5 nats,
explains each by the tokens that become likelier after half of the prompts, and asks the model
itself how much likelier that explanation is after texts that the steered model wrote for the other
half. Random directions of the same effect, and explanations of other latents, stand beside it.

Every number is printed for each seed, with mean and standard deviation.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae import SAE, TopKSAE, TrainConfig, Trainer
from fastsae.cli.interpret import who
from fastsae.data import ActivationStore
from fastsae.interpret import Intervention, interpret, judge_scorers, sample_contexts
from fastsae.models import load_model
from fastsae.models.chunks import chunks
from fastsae.models.load import SMOLLM2, load_tokenizer
from fastsae.models.text import python_topics

K = 32


def trained(store: ActivationStore, seed: int, steps: int) -> TopKSAE:
    """Return an SAE trained by default."""
    torch.manual_seed(seed)
    sae = TopKSAE(store.d_in, 4 * store.d_in, K)
    Trainer(sae, store, TrainConfig(steps=steps, batch_size=512, seed=seed, progress=False)).fit()
    return sae


def neurons(store: ActivationStore) -> TopKSAE:
    """Return the standardized dimensions as latents, both signs."""
    x = store.sample(20_000)
    d = x.shape[1]
    sae = TopKSAE(d, 2 * d, K)
    with torch.no_grad():
        scale = torch.diag(1 / x.std(0))
        sae.W_enc = torch.cat([scale, -scale], 1)
        sae.W_dec = torch.cat([torch.eye(d), -torch.eye(d)])
        sae.b_dec.copy_(x.mean(0))
    return sae


def score(
    sae: SAE, store: ActivationStore, decode: Any, args: argparse.Namespace, seed: int
) -> dict[str, dict[str, float]]:
    """Return mean scores of explanations, and of those of other latents."""
    explain, judge = who(args)
    sample = sample_contexts(sae, store, seed=seed)
    fires = (sample.counts >= 100).nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    chosen = fires[torch.randperm(len(fires), generator=generator)[: args.latents]].tolist()
    scorers = judge_scorers(judge, seed)
    rules = {"negatives": args.negatives, "seed": seed}
    found = interpret(sae, store, sample, decode, explain, scorers, latents=chosen, **rules)
    words = [x.explanation for x in found if x.explanation]
    others = iter([*words[1:], *words[:1]])
    shuffled = interpret(
        sae, store, sample, decode, lambda *_: next(others), scorers,
        latents=[x.latent for x in found if x.explanation], **rules,
    )  # fmt: skip
    return {"own": _means(found), "shuffled": _means(shuffled)}


def _means(found: list[Any]) -> dict[str, float]:
    names = {name for x in found for name in x.scores}
    values = {name: [x.scores[name].value for x in found if name in x.scores] for name in names}
    answered = {name: [x for x in values[name] if x == x] for name in sorted(names)}  # nan: nothing
    return {name: statistics.fmean(each) for name, each in answered.items() if each}


def words_for(raised: list[list[int]], decode: Any, n: int = 5) -> str:
    """Return the tokens that rise after most prompts, as words."""
    counts = Counter(token for tokens in raised for token in tokens)
    return ", ".join(decode([token]).strip() for token, _ in counts.most_common(n))


def intervene(store: ActivationStore, args: argparse.Namespace, seed: int) -> dict[str, float]:
    """Return the mean intervention score of latents, of random directions, and of wrong words."""
    model, tokenizer = load_model(args.model)
    decode = tokenizer.decode
    text = (c.ids for c in chunks(tokenizer, python_topics(), 48, prefix=0) if len(c.ids) == 48)
    prompts = [ids[:24] for ids in islice(text, 20)]
    sae = trained(store, seed, args.steps)
    random = TopKSAE(store.d_in, sae.d_sae, K)
    with torch.no_grad():
        rows = torch.randn(sae.d_sae, store.d_in)
        random.W_dec = rows / rows.norm(dim=1, keepdim=True)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(sae.d_sae, generator=generator)[: args.latents].tolist()
    out: dict[str, list[float]] = {"latents": [], "other words": [], "random": []}
    told: list[tuple[int, float, str]] = []
    for name, each in (("latents", sae), ("random", random)):
        shown = Intervention(model, each, args.site, prompts[::2])
        held = Intervention(model, each, args.site, prompts[1::2])
        for latent in chosen:
            effect = shown.effect(latent)
            if effect is None:
                continue
            words = words_for(effect.raised, decode)
            args_of = (effect.strength, model, tokenizer, decode)
            out[name].append(held.score(latent, words, *args_of))
            if name == "latents":
                if told:
                    out["other words"].append(held.score(latent, told[-1][2], *args_of))
                told.append((latent, effect.strength, words))
    return {name: statistics.fmean(values) for name, values in out.items()}


def spread(values: list[float]) -> str:
    """Return mean and standard deviation, and the values."""
    each = " ".join(f"{x:.3f}" for x in values)
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} +- {deviation:.3f}  ({each})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--site", default="resid_post.15")
    parser.add_argument("--latents", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1024)
    parser.add_argument("--negatives", default="random", choices=("random", "neighbors"))
    parser.add_argument("--llm")
    parser.add_argument("--url")
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--intervene", action="store_true")
    args = parser.parse_args()
    store = ActivationStore(args.store, args.site)
    if args.intervene:
        runs = [intervene(store, args, seed) for seed in args.seeds]
        for name in runs[0]:
            print(f"{name:12} {spread([run[name] for run in runs])}", flush=True)
        return
    decode = load_tokenizer(store.manifest.model).decode
    kinds: dict[str, Any] = {
        "SAE": lambda seed: trained(store, seed, args.steps),
        "untrained": lambda seed: _untrained(store, seed),
        "neurons": lambda seed: neurons(store),
    }
    for kind, make in kinds.items():
        found = [score(make(seed), store, decode, args, seed) for seed in args.seeds]
        for whose in ("own", "shuffled"):
            for name in found[0][whose]:
                values = [run[whose][name] for run in found]
                print(f"{kind:10} {whose:9} {name:10} {spread(values)}", flush=True)


def _untrained(store: ActivationStore, seed: int) -> TopKSAE:
    torch.manual_seed(seed)
    sae = TopKSAE(store.d_in, 4 * store.d_in, K)
    mean: Tensor = store.sample(20_000).mean(0)
    with torch.no_grad():
        sae.b_dec.copy_(mean)
    return sae


if __name__ == "__main__":
    main()
