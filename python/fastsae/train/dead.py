"""Which latents have stopped firing, counted in tokens, or fire less than they should."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.nn.zipf import SMALLEST_FIRES, underused


class DeadLatents:
    """Tokens since each latent was last active.

    Active means a value other than 0 in the code, so a latent that a TopK selects with value 0 does
    not count as alive. One active entry resets its counter.

    Args:
        d_sae: number of latents.
        after_tokens: a latent is dead when that many tokens have passed without it.
        device: of the counters.
    """

    def __init__(
        self, d_sae: int, after_tokens: int, device: torch.device | str | None = None
    ) -> None:
        self.after_tokens = after_tokens
        self.tokens_since_fired = torch.zeros(d_sae, dtype=torch.int64, device=device)

    def update(self, fired: Tensor, tokens: int) -> None:
        """Count a batch: `fired: [d_sae]` bool, from `SparseActs.fired()`, over `tokens` tokens."""
        self.tokens_since_fired += tokens
        self.tokens_since_fired.masked_fill_(fired, 0)

    def count(self, counts: Tensor, tokens: int) -> None:
        """Count a batch: `counts: [d_sae]`, from `SparseActs.counts()`, over `tokens` tokens."""
        self.update(counts > 0, tokens)

    def mask(self) -> Tensor:
        """Return the dead latents: bool `[d_sae]`."""
        return self.tokens_since_fired >= self.after_tokens

    def to_revive(self) -> Tensor:
        """Return the latents that the auxiliary loss works on: the dead ones, bool `[d_sae]`."""
        return self.mask()

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps."""
        return {"tokens_since_fired": self.tokens_since_fired}


class UnderusedLatents(DeadLatents):
    """The same, and what fires less than Zipf's law expects of its rank.

    The densities of latents are averaged over batches, a law is fitted to them (see `nn.zipf`), and
    `to_revive` adds the latents below `ratio` times the fitted line. With a `ratio` of 0 these are
    the dead ones only, and the auxiliary loss is AuxK.

    Args:
        d_sae: number of latents.
        after_tokens: as in `DeadLatents`.
        device: of the counters.
        ratio: share of what is expected under which a latent is underused.
        rate: of the moving average of the densities.

    Source: a reconstruction of aux_zipf_loss, Ayonrinde 2024 (arXiv 2411.02124); the paper's own
    formula is not public.
    """

    def __init__(
        self,
        d_sae: int,
        after_tokens: int,
        device: torch.device | str | None = None,
        *,
        ratio: float = 0.1,
        rate: float = 0.02,
    ) -> None:
        super().__init__(d_sae, after_tokens, device)
        self.ratio, self.rate = ratio, rate
        self.density = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self.batch_tokens = torch.zeros((), dtype=torch.int64, device=device)

    def count(self, counts: Tensor, tokens: int) -> None:
        """See `DeadLatents.count`."""
        super().count(counts, tokens)
        share = counts.double() / tokens
        first = self.batch_tokens == 0
        self.density.copy_(torch.where(first, share, self.density.lerp(share, self.rate)))
        self.batch_tokens.fill_(tokens)

    def to_revive(self) -> Tensor:
        """Return the dead and the underused latents: bool `[d_sae]`."""
        smallest = SMALLEST_FIRES * self.rate / self.batch_tokens.double().clamp(min=1)
        return self.mask() | underused(self.density, self.ratio, smallest)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps."""
        return {**super().tensors(), "density": self.density, "batch_tokens": self.batch_tokens}
