"""Feature-choice sparse autoencoder: every latent takes its own largest entries of the batch.

Source: Ayonrinde 2024, "Adaptive sparse allocation with mutual choice & feature choice sparse
autoencoders" (arXiv 2411.02124). The paper's algorithm for the budgets is not public; budgets,
their schedule and the thresholds of inference are a reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastsae.nn.context import STEP, StepContext, updates_statistics
from fastsae.nn.known import Known
from fastsae.nn.parameters import plain
from fastsae.nn.threshold_sae import ThresholdSAE, factor_for_k, running_average
from fastsae.nn.zipf import SMALLEST_FIRES, budgets, fit_zipf
from fastsae.types import SparseActs, can_look


class FeatureChoiceSAE(ThresholdSAE):
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

    A token's code must not depend on its neighbors at inference, so `eval()` switches to the
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

    FLOAT32: ClassVar[tuple[str, ...]] = ("threshold", "density")

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
        super().__init__(d_in, d_sae, k, shape=(plain(d_sae),), **kwargs)
        if allocation not in ("uniform", "zipf"):
            self._fail(f"allocation to be uniform or zipf, got {allocation!r}")
        if mutual_choice_batches < 0 or refresh < 1:
            self._fail(
                "mutual_choice_batches >= 0 and refresh >= 1, got "
                f"{mutual_choice_batches} and {refresh}"
            )
        if not 0 < density_lr <= 1:
            self._fail(f"0 < density_lr <= 1, got {density_lr}")
        self.allocation, self.density_lr = allocation, plain(density_lr)
        self.mutual_choice_batches, self.refresh = plain(mutual_choice_batches), plain(refresh)
        device = self.b_enc.device
        self.register_buffer("density", torch.zeros_like(self.threshold))
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("budget", torch.zeros(d_sae, dtype=torch.int64, device=device))
        self._batches, self._total = Known(), Known()  # `batches_seen`, the sum of `budget`

    def budgets(self, n: int) -> Tensor:
        """Return m: int64 [d_sae] for a batch of n tokens; the sum is int(k n)."""
        parallel = self.parallel
        n, density = parallel.tokens(n), parallel.of_all_latents(self.density)
        if self.allocation == "uniform" or not bool(density.any()):
            share = torch.ones_like(density)
        else:
            # The average over batches remembers about n / density_lr tokens.
            fit = fit_zipf(density, SMALLEST_FIRES * self.density_lr / max(n, 1))
            share = torch.empty_like(fit.expected)
            share[fit.order] = fit.expected
        return parallel.of_own_latents(budgets(share, int(self.k * n), n))

    def _encode(self, x: Tensor, context: StepContext = STEP) -> SparseActs:
        return self._encode_batch(x, context) if self.training else self._encode_above_threshold(x)

    def _encode_batch(self, x: Tensor, context: StepContext = STEP) -> SparseActs:
        if self._seen(context) < self.mutual_choice_batches:
            return self.parallel.encode_batch_topk(
                x,
                self.W_enc_rows,
                self.b_enc,
                self.k,
                b_dec=self._input_bias(),
                compute_dtype=context.compute_dtype,
            ).acts
        budget = self._current_budget(x.shape[0], context)
        total = int(self.k * self.parallel.tokens(x.shape[0]))
        return self.parallel.encode_feature_topk(
            x,
            self.W_enc_rows,
            self.b_enc,
            budget,
            total,
            b_dec=self._input_bias(),
        )

    def _seen(self, context: StepContext) -> int:
        """Return `batches_seen`, without a wait where nothing but steps has changed it."""
        seen = self.batches_seen
        if can_look(seen) or torch.compiler.is_compiling():
            return int(seen)
        if not context.recorded and seen.is_cuda and torch.cuda.is_current_stream_capturing():
            return int(seen)  # refused there: nobody would count the replays
        return self._batches.of(seen)

    def _current_budget(self, n: int, context: StepContext) -> Tensor:
        """Return the budgets in force, after renewing them where that is due or n is another."""
        if self._renews(n, self._seen(context)):
            self.budget.copy_(self.budgets(n))
            self._total.set(self.budget, int(self.k * self.parallel.tokens(n)))
        return self.budget

    def _renews(self, n: int, seen: int) -> bool:
        """Return whether a feature choice of n tokens, after `seen` batches, renews the budgets."""
        if (seen - self.mutual_choice_batches) % self.refresh == 0:
            return True
        held = self._total.of(self.budget, lambda m: self.parallel.count(int(m.sum())))
        return held != int(self.k * self.parallel.tokens(n))

    def step_kind(self, n: int) -> tuple[Any, ...] | None:
        """See `SAE.step_kind`: how latents are chosen. The first step, and one that renews the
        budgets, cannot be recorded."""
        seen = self._seen(STEP)
        mutual = seen < self.mutual_choice_batches
        if seen == 0 or (not mutual and self._renews(n, seen)):
            return None
        return (mutual,)

    def count_replay(self) -> None:
        """See `SAE.count_replay`."""
        self._batches.count(self.batches_seen)

    def encode_for_training(self, x: Tensor, context: StepContext) -> SparseActs:
        """See `SAE.encode_for_training`: averages densities and thresholds."""
        learns = updates_statistics(self, loss_depends=True)
        acts = self._encode(x, context)
        if learns and acts.n:
            self._update_averages(acts.detach(), context)
        return acts

    @torch.no_grad()
    def _update_averages(self, acts: SparseActs, context: StepContext) -> None:
        """Average in the densities and the smallest kept values of a training batch."""
        seen = self._seen(context)
        counts, smallest = self._columns(acts, context)
        density = context.reduced(counts / self.parallel.tokens(acts.n), "mean")
        self.density.lerp_(density, self.density_lr if seen else 1.0)
        smallest = context.reduced(smallest, "min")
        self.threshold.copy_(running_average(self.threshold, smallest, self.density_lr))
        self.batches_seen += 1
        if not context.recorded:  # then nothing has happened yet
            self._batches.set(self.batches_seen, seen + 1)

    def _columns(self, acts: SparseActs, context: StepContext = STEP) -> tuple[Tensor, Tensor]:
        """Return of every latent how many entries are active and the smallest: [d_sae] each."""
        values, indices = acts.values.flatten().float(), acts.indices.flatten().long()
        active = values != 0
        counts = torch.zeros_like(self.density).index_add_(0, indices, active.float())
        smallest = torch.full_like(self.density, math.inf)
        smallest.scatter_reduce_(0, indices, torch.where(active, values, math.inf), "amin")
        counts = self.parallel.sum_over_tokens(counts)
        smallest = self.parallel.min_over_tokens(smallest)
        if self._seen(context) >= self.mutual_choice_batches:
            # A latent with room to spare would have taken anything positive.
            smallest = torch.where(counts >= self.budget, smallest, 0.0)
        return counts, smallest

    @torch.no_grad()
    def estimate_threshold_(self, batches: Iterable[Tensor]) -> None:
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
        self._check_threshold()
        rows = self._rows(x, "x")
        factor = factor_for_k(
            rows,
            self.W_enc_rows,
            self.b_enc,
            self._input_bias(),
            self.threshold,
            self.k,
            self.parallel,
        )
        if not bool(factor.isfinite()):
            self._fail("x to have positive pre-activations, got none")
        self.threshold.mul_(factor)

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments that `fastsae.load` rebuilds this module from."""
        own = ("allocation", "mutual_choice_batches", "refresh", "density_lr")
        return {**super().config(), **{key: getattr(self, key) for key in own}}
