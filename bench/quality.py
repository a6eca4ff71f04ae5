"""Compare SAEs of a long run at the old rate with those of a short one by default, at equal FVU.

    python -m bench.quality DATA STRINGS [--steps 45 128] [--seeds 0 1 2] [--model smollm2]

DATA is safetensors with `acts` [n, d], `token_ids`, `chunk_ids` and `pos_ids` (parts of speech),
and in its metadata `n_train`; STRINGS is JSON, token id -> string. Both runs train a TopK SAE (k
32) with batches of 512. On the other rows are measured

    FVU
    CE           the share of the cross entropy lost to mean ablation that a splice recovers
    probing      of each part of speech that at least 1 % of the tokens have, the area under the ROC
                 curve of the one latent that tells it best on training rows, and of a logistic
                 regression on the five that do; means over parts of speech
    absorption   of tokens that begin with a letter, which a linear probe of the activations finds,
                 the share on which none of the three latents fires that tell the letter best on
                 training rows; mean over letters. An absorbed feature is one that a latent for a
                 special case stands in for.

and each number is printed by seed, with mean and standard deviation of both runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from fastsae import TopKSAE, TrainConfig, Trainer
from fastsae.eval import cross_entropy
from fastsae.models import load_model
from fastsae.models.chunks import prefix_token

SHARE = 0.01
OLD: dict[str, Any] = {"betas": (0.9, 0.999), "weight_init": "random", "clip_outliers": False}
OLD |= {"warmup_steps": 51, "decay_fraction": 0.2}


class Data:
    """Activations, what their tokens are, and which are held out; rows of huge norm are not."""

    def __init__(self, path: Path, strings: Path) -> None:
        with safe_open(path, "pt") as file:
            acts, n = file.get_tensor("acts").float(), int(file.metadata()["n_train"])
            tokens, chunks = file.get_tensor("token_ids"), file.get_tensor("chunk_ids")
            pos = file.get_tensor("pos_ids").long()
        norm = acts.norm(dim=1)
        usual, train = norm <= 3 * norm[:n].median(), torch.arange(len(acts)) < n
        self.train, self.val = acts[usual & train], acts[usual & ~train]
        text = {int(key): value for key, value in json.loads(strings.read_text()).items()}
        first = torch.tensor([_letter(text[int(token)]) for token in tokens])
        self.labels = {
            "pos": (pos[usual & train], pos[usual & ~train]),
            "letter": (first[usual & train], first[usual & ~train]),
        }
        held = chunks[~train].unique().tolist()
        self.contexts = [tokens[(chunks == chunk) & ~train].tolist() for chunk in held]


def _letter(token: str) -> int:
    """Return the letter that a word begins with, 0 to 25; -1 where no word begins."""
    first = token[1:2].lower() if token[:1] in (" ", "\u0120") else ""
    return ord(first) - ord("a") if "a" <= first <= "z" else -1


def train(data: Data, seed: int, steps: int, old: bool) -> TopKSAE:
    """Return an SAE of the old run, or of the default one."""
    torch.manual_seed(seed)
    sae = TopKSAE(data.train.shape[1], 4 * data.train.shape[1], k=32)
    settings = {"lr": 2e-4 / (sae.d_sae / 2**14) ** 0.5, **OLD} if old else {}
    config = TrainConfig(batch_size=512, steps=steps, seed=seed, progress=False, **settings)
    Trainer(sae, data.train, config).fit()
    return sae


@torch.no_grad()
def dense(sae: TopKSAE, x: Tensor) -> Tensor:
    """Return all latents `[n, d_sae]`."""
    acts = sae.encode_sparse(x)
    return torch.zeros(len(x), sae.d_sae).scatter_(1, acts.indices.long(), acts.values)


def auc(score: Tensor, label: Tensor) -> Tensor:
    """Return the areas under the ROC curves of the columns of `score: [n, m]`; ties count half."""
    above, below = score[label], score[~label]
    areas = []
    for column in range(score.shape[1]):
        low = below[:, column].sort().values
        at = above[:, column].contiguous()
        left = torch.searchsorted(low, at)
        right = torch.searchsorted(low, at, right=True)
        areas.append((left + right).double().mean() / 2 / len(low))
    return torch.stack(areas)


def best(f: Tensor, label: Tensor, count: int) -> Tensor:
    """Return the latents that tell a label best, by the difference of their means in deviations."""
    difference = f[label].mean(0) - f[~label].mean(0)
    return (difference / f.std(0).clamp_min(1e-6)).topk(count).indices


def logistic(x: Tensor, label: Tensor, decay: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Return weights and bias of a logistic regression on standardized columns."""
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    z, y = (x - mean) / std, label.float()
    weight = torch.zeros(x.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")
    balance = (len(y) - y.sum()) / y.sum()

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = z @ weight[1:] + weight[0]
        loss = F.binary_cross_entropy_with_logits(logits, y, pos_weight=balance)
        loss = loss + decay * weight[1:].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = weight.detach()
    return found[1:] / std, found[0] - (found[1:] * mean / std).sum()


def probing(data: Data, f: Tensor, g: Tensor) -> tuple[float, float]:
    """Return the mean areas of one latent and of five, for latents of training and other rows."""
    known, unknown = data.labels["pos"]
    one, five = [], []
    for part in range(int(known.max()) + 1):
        label, test = known == part, unknown == part
        if min(float(label.float().mean()), float(test.float().mean())) < SHARE:
            continue
        candidates = best(f, label, 5)
        single = candidates[auc(f[:, candidates], label).argmax()]
        one.append(float(auc(g[:, single : single + 1], test)))
        weight, bias = logistic(f[:, candidates], label)
        five.append(float(auc((g[:, candidates] @ weight + bias)[:, None], test)))
    return statistics.fmean(one), statistics.fmean(five)


def absorption(data: Data, f: Tensor, g: Tensor) -> float:
    """Return the mean share of tokens of a letter on which no latent of the letter fires."""
    known, unknown = data.labels["letter"]
    shares = []
    for letter in range(26):
        label, test = known == letter, unknown == letter
        if min(float(label.float().mean()), float(test.float().mean())) < SHARE:
            continue
        weight, bias = logistic(data.train, label)
        found = test & (data.val @ weight + bias > 0)
        latents = best(f, label, 3)
        shares.append(float((g[found][:, latents] == 0).all(1).float().mean()))
    return statistics.fmean(shares)


def measure(data: Data, sae: TopKSAE, model: Any, tokenizer: Any) -> dict[str, float]:
    """Return every number of one SAE."""
    f, g = dense(sae, data.train), dense(sae, data.val)
    one, five = probing(data, f, g)
    with torch.no_grad():
        error = (data.val - sae(data.val)).square().sum()
    numbers = {"FVU": float(error / (data.val - data.val.mean(0)).square().sum())}
    limit = 3 * float(data.train.norm(dim=1).median())
    contexts = [[prefix_token(tokenizer), *ids] for ids in data.contexts]
    ce = cross_entropy(model, "resid_post.15", sae, contexts, max_norm=limit)
    numbers |= {"CE": ce.fraction_recovered_mean, "probing 1": one, "probing 5": five}
    return numbers | {"absorption": absorption(data, f, g)}


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("strings", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=int, nargs="+", default=[45], help="of the short runs")
    parser.add_argument("--old-steps", type=int, default=1024)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    data, (model, tokenizer) = Data(args.data, args.strings), load_model(args.model)
    lengths = [args.old_steps, *args.steps]
    found: list[list[dict[str, float]]] = [[] for _ in lengths]
    for seed in args.seeds:
        for i, steps in enumerate(lengths):
            sae = train(data, seed, steps, old=i == 0)
            found[i].append(measure(data, sae, model, tokenizer))
            told = ", ".join(f"{key} {value:.4f}" for key, value in found[i][-1].items())
            print(f"{'default' if i else 'old'}, {steps} steps, seed {seed}: {told}", flush=True)
    heads = " | ".join(f"{steps} updates" for steps in args.steps)
    print(f"\n| | {args.old_steps} updates, old | {heads} |\n|---|{'---|' * len(lengths)}")
    for key in found[0][0]:
        cells = []
        for runs in found:
            values = [run[key] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.fmean(values):.4f} ± {spread:.4f}")
        print(f"| {key} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
