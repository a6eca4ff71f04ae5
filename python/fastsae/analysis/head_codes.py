"""Discrete codes of attention heads: which heads, and which pairs of them, do a task.

    code[e, h] = argmax_f f(x[e, h])                               one integer for head h, example e
    node[h]    = # codes of h that occur in positives, and in no negative
    edge[i, j] = # pairs (code_i, code_j) of one example that occur in positives, and in no negative

x [examples, heads, d_model] holds what every head of a model writes into the residual stream, mean
over positions; negatives are prompts of the task with what it needs corrupted. Scores rank heads
(the paper takes a softmax over them, which keeps the order), and `roc_auc` compares the ranking
with a circuit known by other means:

    sae = train_code_sae(x)
    auc = roc_auc(node_scores(head_codes(sae, x), positive), in_circuit)

Source: O'Neill and Bui 2024, "Sparse autoencoders enable scalable and reliable circuit
identification in language models" (arXiv 2405.12522).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.nn import SAE, TopKSAE
from fastsae.train import TrainConfig, Trainer


def train_code_sae(
    x: Tensor,
    d_sae: int = 200,
    k: int = 1,
    *,
    examples: int = 10,
    steps: int = 500,
    lr: float = 1e-3,
    seed: int = 0,
) -> TopKSAE:
    """Train a small SAE on the heads of a few random examples, all of them in every update.

    The paper has an L1 loss of weight 0.02 instead of TopK, and the same 200 latents, 10 examples
    and 500 updates of Adam at 1e-3. In its results more examples gave worse scores (AUC of nodes on
    indirect object identification: about 0.87 with 10 examples, 0.78 with 250).

    Args:
        x: `[examples, heads, d]`, float32.
        d_sae: number of latents.
        k: active latents per head; codes are the largest one.
        examples: how many to train on; all where there are fewer.
        steps: number of updates.
        lr: learning rate.
        seed: of the choice of examples. The SAE starts from torch's own generator.

    Returns:
        The SAE, in eval mode, for rows like those of x.

    Raises:
        ValueError: x is not `[examples, heads, d]`, or empty, or all its rows are equal.
    """
    _check_heads("train_code_sae", x)
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:examples]
    rows = x[chosen.to(x.device)].flatten(0, 1)
    if not rows.numel():
        raise ValueError(f"train_code_sae: expected at least one head's row, got {[*x.shape]}")
    sae = TopKSAE(x.shape[2], d_sae, k, device=x.device)
    config = TrainConfig(lr=lr, batch_size=len(rows), steps=steps, seed=seed, progress=False)
    Trainer(sae, rows, config).fit()
    return sae


@torch.no_grad()
def head_codes(sae: SAE, x: Tensor) -> Tensor:
    """Return the strongest latent of every head's output, lowest index first among equals.

    Args:
        sae: any SAE of `[.., d]`; put into eval mode.
        x: `[examples, heads, d]`, in the dtype and on the device of the SAE.

    Returns:
        int64 `[examples, heads]`; -1 where nothing is active.

    Raises:
        ValueError: x is not `[examples, heads, d]` with d = d_in, or on another device.
        TypeError: x has another dtype.
    """
    _check_heads("head_codes", x)
    acts = sae.eval().encode_sparse(x)
    values, row = acts.values.flatten(), acts.rows().flatten()  # padding has the row n
    largest = values.new_zeros(acts.n + 1).scatter_reduce_(0, row, values, "amax")
    wins = (values > 0) & (values == largest[row])
    latent = torch.where(wins, acts.indices.flatten().long(), sae.d_sae)
    codes = latent.new_full((acts.n + 1,), sae.d_sae).scatter_reduce_(0, row, latent, "amin")
    return torch.where(codes < sae.d_sae, codes, -1)[: acts.n].view(x.shape[:2])


def node_scores(codes: Tensor, positive: Tensor, *, normalize: bool = False) -> Tensor:
    """Return for every head how many of its codes occur in positives and in no negative.

    Args:
        codes: int64 `[examples, heads]`; negative ones are no code and count for nothing.
        positive: bool `[examples]`.
        normalize: divide by how many codes the head has in all examples; 0 where it has none.

    Returns:
        float32 `[heads]`.

    Raises:
        TypeError: codes are not int64, or positive is not bool.
        ValueError: a shape does not fit.
    """
    _check_codes("node_scores", codes, positive)
    scores = _only_in_positives(codes, positive)
    if normalize:
        scores /= _only_in_positives(codes, torch.ones_like(positive)).clamp_min(1)
    return scores


def edge_scores(codes: Tensor, positive: Tensor) -> Tensor:
    """Return for all pairs of heads how many pairs of codes occur in positives and in no negative.

    Args:
        codes: int64 `[examples, heads]`; a pair with a negative one counts for nothing.
        positive: bool `[examples]`.

    Returns:
        float32 `[heads, heads]`, symmetric, 0 on the diagonal.

    Raises:
        TypeError: codes are not int64, or positive is not bool.
        ValueError: a shape does not fit.

    Cost: sorts [examples, heads] numbers for every head.
    """
    _check_codes("edge_scores", codes, positive)
    heads, size = codes.shape[1], _size(codes)
    scores = torch.zeros(heads, heads, device=codes.device)
    for i in range(heads - 1):
        a, b = codes[:, i : i + 1], codes[:, i + 1 :]
        pairs = torch.where((a >= 0) & (b >= 0), a * size + b, -1)
        scores[i, i + 1 :] = _only_in_positives(pairs, positive)
    return scores + scores.t()


def roc_auc(scores: Tensor, labels: Tensor) -> float:
    """Return the area under the ROC curve: how often a positive scores above a negative.

        auc = (# pairs with s_positive > s_negative + # equal pairs / 2) / # pairs

    Exact, ties included (the Mann-Whitney statistic): pairs are counted in integers.

    Args:
        scores: `[n]`, any real dtype.
        labels: bool `[n]`.

    Raises:
        TypeError: labels are not bool.
        ValueError: another shape, a NaN among scores, or labels of one class only.

    Cost: one sort of the negatives.
    """
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(
            "roc_auc: expected scores and labels to be [n], "
            f"got {[*scores.shape]} and {[*labels.shape]}"
        )
    if labels.dtype != torch.bool:
        raise TypeError(f"roc_auc: expected labels to be bool, got {labels.dtype}")
    if bool(scores.isnan().any()):
        raise ValueError(f"roc_auc: expected scores without NaN, got {int(scores.isnan().sum())}")
    above, below = scores[labels].contiguous(), scores[~labels].sort().values
    pairs = len(above) * len(below)
    if not pairs:
        raise ValueError(
            f"roc_auc: expected labels of both classes, got {len(above)} True of {len(labels)}"
        )
    smaller = torch.searchsorted(below, above)
    not_larger = torch.searchsorted(below, above, right=True)
    return int((smaller + not_larger).sum()) / (2 * pairs)


def _size(codes: Tensor) -> int:
    """Return one more than the largest code, at least 1."""
    return max(int(codes.max()), 0) + 1 if codes.numel() else 1


def _only_in_positives(codes: Tensor, positive: Tensor) -> Tensor:
    """Count in each column of `codes: [examples, c]` the codes of positives no negative has."""
    size, columns = _size(codes), codes.shape[1]
    keys = codes + size * torch.arange(columns, device=codes.device)
    held = codes >= 0
    ours = keys[held & positive.unsqueeze(1)].unique()
    theirs = keys[held & ~positive.unsqueeze(1)]
    only = ours[~torch.isin(ours, theirs)]
    return torch.bincount(only // size, minlength=columns).float()


def _check_heads(owner: str, x: Tensor) -> None:
    if x.ndim != 3:
        raise ValueError(f"{owner}: expected x to be [examples, heads, d], got {[*x.shape]}")


def _check_codes(owner: str, codes: Tensor, positive: Tensor) -> None:
    if codes.ndim != 2:
        raise ValueError(f"{owner}: expected codes to be [examples, heads], got {[*codes.shape]}")
    if positive.shape != codes.shape[:1]:
        raise ValueError(
            f"{owner}: expected positive to be [examples] with examples = {len(codes)}, "
            f"got {[*positive.shape]}"
        )
    for name, x, dtype in (("codes", codes, torch.int64), ("positive", positive, torch.bool)):
        if x.dtype != dtype:
            raise TypeError(f"{owner}: expected {name} to be {dtype}, got {x.dtype}")
