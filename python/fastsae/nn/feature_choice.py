"""Feature-choice sparse autoencoder: every latent takes its own largest entries of the batch.

Source: Ayonrinde 2024, "Adaptive sparse allocation with mutual choice & feature choice sparse
autoencoders" (arXiv 2411.02124). The paper's algorithm for the budgets is not public; budgets,
their schedule and the thresholds of inference are our reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastsae import ops
from fastsae.nn.sae import SAE
from fastsae.nn.thresholds import factor_for_k, threshold_room
from fastsae.nn.zipf import budgets, fit_zipf
from fastsae.types import SparseActs

SMALLEST_FIRES = 10
"""Tokens that a latent must have fired on, as far as the average remembers, to count in the fit."""


class FeatureChoiceSAE(SAE):
    """Sparse autoencoder in which latent j is active on m_j tokens of a batch, its strongest.

        training:   f_j = the m_j largest positive entries of z_j: [n],   sum_j m_j = int(k n)
        inference:  f_j = z_j where z_j > threshold_j, else 0
        z = (x - b_dec) W_enc + b_enc

    No latent can die, as each keeps its place in every batch. Budgets m_j are equal (`uniform`), or
    follow Zipf's law fitted to the densities of the latents (`zipf`): a moving average of the share
    of tokens on which each fires. They are renewed every `refresh` batches; int(k n) is met exactly
    by the largest remainder, and every latent has 1 if there are as many. A batch must be large for
    rare latents to get what they deserve: k n / d_sae is the mean budget.

    The first `mutual_choice_batches` training batches select by mutual choice instead (the int(k n)
    largest entries of the whole matrix): the progressive recipe. Densities are learned there; under
    feature choice they only mirror the budgets, so with 0 of them Zipf's budgets stay equal.

    A token's code must not depend on its neighbours at inference, so `eval()` switches to the
    buffer `threshold` [d_sae]: the moving average of the smallest value that latent j keeps, 0 for
    batches where it has fewer positive entries than its budget. See `SAE` for the other arguments.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        k: mean active latents per token; may be fractional.
        allocation: budgets: `uniform` or `zipf`.
        mutual_choice_batches: training batches before feature choice begins.
        refresh: training batches between two fits of the budgets.
        density_lr: rate of the moving averages of densities and thresholds.

    Raises:
        ValueError: k is not in (0, d_sae], density_lr not in (0, 1], or a choice is unknown.
        RuntimeError: encoding in eval mode before any training batch.
    """

    feature_major_update = True

    threshold: Tensor
    density: Tensor
    batches_seen: Tensor
    budget: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: float,
        *,
        allocation: str = "zipf",
        mutual_choice_batches: int = 200,
        refresh: int = 50,
        density_lr: float = 0.02,
        **kwargs: Any,
    ) -> None:
        super().__init__(d_in, d_sae, **kwargs)
        if not 0 < k <= d_sae:
            self._fail(f"0 < k <= d_sae = {d_sae}, got k = {k}")
        if allocation not in ("uniform", "zipf"):
            self._fail(f"allocation to be uniform or zipf, got {allocation!r}")
        if mutual_choice_batches < 0 or refresh < 1:
            self._fail(
                "mutual_choice_batches >= 0 and refresh >= 1, got "
                f"{mutual_choice_batches} and {refresh}"
            )
        if not 0 < density_lr <= 1:
            self._fail(f"0 < density_lr <= 1, got {density_lr}")
        self.k, self.allocation = k, allocation
        self.mutual_choice_batches, self.refresh = mutual_choice_batches, refresh
        self.density_lr = density_lr
        device = self.b_enc.device
        self.register_buffer("threshold", torch.full((d_sae,), math.inf, device=device))
        self.register_buffer("density", torch.zeros(d_sae, device=device))
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("budget", torch.zeros(d_sae, dtype=torch.int64, device=device))
        self._total: int | None = None  # the sum of `budget`

    def budgets(self, n: int) -> Tensor:
        """Return m: int64 [d_sae] for a batch of n tokens; the sum is int(k n)."""
        if self.allocation == "uniform" or not bool(self.density.any()):
            share = torch.ones_like(self.density)
        else:
            # The average over batches remembers about n / density_lr tokens.
            fit = fit_zipf(self.density, SMALLEST_FIRES * self.density_lr / max(n, 1))
            share = torch.empty_like(fit.expected)
            share[fit.order] = fit.expected
        return budgets(share, int(self.k * n), n)

    def _encode(self, x: Tensor) -> SparseActs:
        if self.training:
            return self._encode_batch(x)
        self._check_thresholds()
        capacity = threshold_room(x.shape[0], self.d_sae, self.k)
        return ops.encode_threshold(
            x, self._rows_enc(), self.b_enc, self.threshold, capacity, b_dec=self._input_bias()
        )

    def _check_thresholds(self) -> None:
        if not bool(self.threshold.isfinite().any()):
            raise RuntimeError(
                f"{type(self).__name__}: expected thresholds in eval mode, got none yet; call "
                "loss() on a batch in training mode, or select batch-wise with sae.train()"
            )

    def _encode_batch(self, x: Tensor) -> SparseActs:
        if int(self.batches_seen) < self.mutual_choice_batches:
            return ops.encode_batch_topk(
                x,
                self._rows_enc(),
                self.b_enc,
                self.k,
                b_dec=self._input_bias(),
                compute_dtype=self._product(),
            ).acts
        return ops.encode_feature_topk(
            x,
            self._rows_enc(),
            self.b_enc,
            self._current_budget(x.shape[0]),
            int(self.k * x.shape[0]),
            b_dec=self._input_bias(),
        )

    def _current_budget(self, n: int) -> Tensor:
        """Return the budgets in force, after renewing them where that is due or n is another."""
        if self._total is None:
            self._total = int(self.budget.sum())
        seen = int(self.batches_seen) - self.mutual_choice_batches
        if seen % self.refresh == 0 or self._total != int(self.k * n):
            self.budget.copy_(self.budgets(n))
            self._total = int(self.k * n)
        return self.budget

    def encode_for_loss(self, x: Tensor) -> SparseActs:
        if not self.training:
            return self._encode(x)
        acts = self._encode_batch(x)
        self._learn(acts.detach())
        return acts

    @torch.no_grad()
    def _learn(self, acts: SparseActs) -> None:
        """Average in the densities and the smallest kept values of a training batch."""
        if acts.n == 0:
            return
        counts, smallest = self._columns(acts)
        first = int(self.batches_seen) == 0
        self.density.lerp_(counts / acts.n, 1.0 if first else self.density_lr)
        moved = self.threshold + self.density_lr * (smallest - self.threshold)
        moved = torch.where(self.threshold.isfinite(), moved, smallest)
        self.threshold.copy_(torch.where(smallest.isfinite(), moved, self.threshold))
        self.batches_seen += 1

    def _columns(self, acts: SparseActs) -> tuple[Tensor, Tensor]:
        """Return of every latent how many entries are active and the smallest: [d_sae] each."""
        values, indices = acts.values.flatten().float(), acts.indices.flatten().long()
        active = values != 0
        counts = torch.zeros_like(self.density).index_add_(0, indices, active.float())
        smallest = torch.full_like(self.density, math.inf)
        smallest.scatter_reduce_(0, indices, torch.where(active, values, math.inf), "amin")
        if int(self.batches_seen) >= self.mutual_choice_batches:
            # A latent with room to spare would have taken anything positive.
            smallest = torch.where(counts >= self.budget, smallest, 0.0)
        return counts, smallest

    @torch.no_grad()
    def settle_(self, batches: Iterable[Tensor]) -> None:
        """Set the thresholds to their mean over training batches, for the weights as they are."""
        total, seen = torch.zeros_like(self.threshold), torch.zeros_like(self.threshold)
        for x in batches:
            rows = self._rows(x, "x")
            smallest = self._columns(self._encode_batch(rows))[1]
            found = smallest.isfinite()
            total += torch.where(found, smallest, 0.0)
            seen += found
        self.threshold.copy_(torch.where(seen > 0, total / seen.clamp_min(1), self.threshold))

    @torch.no_grad()
    def calibrate_(self, x: Tensor) -> None:
        """Scale all thresholds by one factor such that `x: [..., d_in]` keeps k latents per token.

        See `BatchTopKSAE.calibrate_`: measure on tokens that are neither trained nor calibrated on.

        Raises:
            RuntimeError: there are no thresholds yet.
            ValueError: nothing in x is positive.
        """
        self._check_thresholds()
        rows = self._rows(x, "x")
        factor = factor_for_k(
            rows, self._rows_enc(), self.b_enc, self._input_bias(), self.threshold, self.k
        )
        if not bool(factor.isfinite()):
            self._fail("x to have positive pre-activations, got none")
        self.threshold.mul_(factor)

    @torch.no_grad()
    def fold_input_scale_(self, scale: float) -> None:
        """See `SAE.fold_input_scale_`; the thresholds are divided as well."""
        super().fold_input_scale_(scale)
        self.threshold.div_(scale)

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments that `fastsae.load` rebuilds this module from."""
        own = ("k", "allocation", "mutual_choice_batches", "refresh", "density_lr")
        return {**super().config(), **{key: getattr(self, key) for key in own}}

    def export(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return SAELens' `jumprelu` with a threshold for every latent: the eval mode."""
        return {"architecture": "jumprelu"}, {"threshold": self.threshold.clone()}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        """Take the thresholds from a saved file; densities start anew."""
        self.threshold.copy_(tensors["threshold"])
        self.density.zero_()
        self.batches_seen.fill_(self.mutual_choice_batches)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FeatureChoiceSAE:
        # `.to(torch.bfloat16)` must not round what is measured.
        exact = {name: getattr(self, name) for name in ("threshold", "density")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in exact.items():
            if not tensor.is_meta:
                setattr(self, name, tensor.to(getattr(self, name).device))
        return self
