"""What an SAE costs the model: next-token cross entropy with the reconstruction in place.

    recovered = (CE_ablated - CE_sae) / (CE_ablated - CE_clean)

1 means that the model predicts text as well from the reconstruction as from the real activation;
0 means no better than from an ablation. The ablation by the mean is the honest yardstick: zero is
far from anything the model ever sees, so its CE is huge and 99 % recovered is cheap. `delta`, in
nats, needs no yardstick and is the number to compare SAEs of one model by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsae.eval.metrics import FVU
from fastsae.models.chunks import pad
from fastsae.models.probe import device_of, evaluating, options
from fastsae.models.resolve import resolve
from fastsae.models.splice import ablate, intervene, splice

Intervention = Callable[[Tensor], AbstractContextManager[None]]


@dataclass(frozen=True)
class CrossEntropy:
    """Mean next-token cross entropy, in nats per token, under four interventions."""

    clean: float
    sae: float
    mean: float
    zero: float
    tokens: int
    """Number of predictions that the means are over."""

    @property
    def delta(self) -> float:
        """Nats per token that the reconstruction costs: CE_sae - CE_clean."""
        return self.sae - self.clean

    @property
    def fraction_recovered_mean(self) -> float:
        """(CE_mean - CE_sae) / (CE_mean - CE_clean); nan when ablating changes nothing."""
        return _ratio(self.mean - self.sae, self.mean - self.clean)

    @property
    def fraction_recovered_zero(self) -> float:
        """(CE_zero - CE_sae) / (CE_zero - CE_clean); nan when ablating changes nothing."""
        return _ratio(self.zero - self.sae, self.zero - self.clean)

    def to_dict(self) -> dict[str, float]:
        """Return every number by name."""
        derived = ("delta", "fraction_recovered_mean", "fraction_recovered_zero")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


@torch.no_grad()
def cross_entropy(
    model: nn.Module,
    site: str | tuple[str, ...],
    sae: nn.Module,
    contexts: Sequence[Sequence[int]],
    *,
    mean: Tensor | None = None,
    batch_size: int = 8,
    drop_prefix: int = 1,
    max_norm: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> CrossEntropy:
    """Measure the model's cross entropy clean, through the SAE, and with the site ablated.

    Four passes over the contexts. Scored is the prediction made at every position that an
    intervention may touch, that is from `drop_prefix` on, except the last, which has no next token.

    Args:
        model: a causal language model of `transformers`.
        site: where the SAE belongs, see `fastsae.models.sites`; of a transcoder the site that it
            reads and the one that it replaces.
        sae: reconstructs `[n, d]`; in eval mode meanwhile.
        contexts: token lists, each with its prefix token first, e.g. `Chunk.ids`.
        mean: `[d]`, for the mean ablation; None takes the mean over these contexts.
        batch_size: contexts per forward pass.
        drop_prefix: positions at the start of each context that pass through.
        max_norm: rows of a larger norm pass through.
        progress: called with the number of contexts done, after every forward pass.

    Raises:
        ValueError: no context is long enough to predict anything, max_norm leaves no row, or what
            is given cannot be spliced in there.
    """
    names = (site,) if isinstance(site, str) else site
    if len(names) > 2:
        raise ValueError(
            f"cross_entropy: expected one site, or the two of a transcoder, got {', '.join(names)}"
        )
    sites = [resolve(model, name) for name in names]
    found = sites[0] if len(sites) == 1 else (sites[0], sites[1])
    source = None if len(sites) == 1 else sites[0]
    rules: dict[str, Any] = {"drop_prefix": drop_prefix, "max_norm": max_norm}
    seen = FVU()

    def watch(read: Tensor, own: Tensor) -> Tensor:
        seen.update(own.float(), own.float())
        return own

    def run(intervention: Intervention) -> tuple[float, int]:
        return mean_loss(
            "cross_entropy", model, contexts, intervention, batch_size, drop_prefix, progress
        )

    if mean is None:
        clean, tokens = run(
            lambda pads: intervene(model, sites[-1], watch, source, pads, drop_prefix, max_norm)
        )
        if not seen.rows:
            raise ValueError(
                f"cross_entropy: expected rows of a norm of at most max_norm = {max_norm} at "
                f"{site}, got none"
            )
        mean = seen.mean
    else:
        clean, tokens = run(lambda pads: nullcontext())
    through, _ = run(lambda pads: splice(model, found, sae, keep=pads, **rules))
    by_mean, _ = run(lambda pads: ablate(model, found, "mean", mean=mean, keep=pads, **rules))
    by_zero, _ = run(lambda pads: ablate(model, found, "zero", keep=pads, **rules))
    return CrossEntropy(clean, through, by_mean, by_zero, tokens)


@torch.no_grad()
def mean_loss(
    owner: str,
    model: nn.Module,
    contexts: Sequence[Sequence[int]],
    intervention: Intervention,
    batch_size: int,
    drop_prefix: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[float, int]:
    """Return the mean loss of a model in eval mode under an intervention, and of how many
    predictions.

    Args:
        owner: who asks, for errors.
        model: as in `cross_entropy`, like what is not said here.
        contexts: token lists.
        intervention: takes which tokens of a batch are padding, bool `[n, t]`, and returns what to
            be inside of during the pass.
        batch_size: contexts per forward pass.
        drop_prefix: positions at the start of each context whose predictions do not count.
        progress: called with the number of contexts done.

    Raises:
        ValueError: no context is long enough to predict anything.
    """
    if not any(len(ids) > drop_prefix + 1 for ids in contexts):
        raise ValueError(
            f"{owner}: expected a context of at least {drop_prefix + 2} tokens, got none"
        )
    total, tokens = 0.0, 0
    with evaluating(model):
        for at in range(0, len(contexts), batch_size):
            ids, real = pad(contexts[at : at + batch_size], 0)
            with intervention(~real):
                loss, count = _losses(model, ids, real, drop_prefix)
            total, tokens = total + loss, tokens + count
            if progress:
                progress(len(ids))
    return total / tokens, tokens


def _losses(model: nn.Module, ids: Tensor, real: Tensor, drop_prefix: int) -> tuple[float, int]:
    """Return the summed loss and the number of the predictions made from `drop_prefix` on."""
    device = device_of(model)
    logits = model(input_ids=ids.to(device), **options(model)).logits[:, drop_prefix:-1]
    scored = real[:, drop_prefix + 1 :].to(device)
    targets = ids[:, drop_prefix + 1 :].to(device)
    losses = F.cross_entropy(logits[scored].float(), targets[scored], reduction="sum")
    return float(losses), int(scored.sum())


def _ratio(a: float, b: float) -> float:
    return a / b if b else float("nan")
