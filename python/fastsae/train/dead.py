"""Which latents have stopped firing, counted in tokens."""

from __future__ import annotations

import torch
from torch import Tensor


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

    def mask(self) -> Tensor:
        """Return the dead latents: bool `[d_sae]`."""
        return self.tokens_since_fired >= self.after_tokens
