"""Windows in which a latent is silent: at random, or those of its nearest neighbors.

That a latent is silent in a window is looked up in the code of all of its tokens, encoded anew: the
sample keeps some of the windows in which a latent fires, and not all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastsae.analysis.examples import Context
from fastsae.data import ActivationStore
from fastsae.interpret.sample import ContextSample
from fastsae.models.probe import evaluating
from fastsae.nn import SAE, NormalizedSAE

POOL = 512
"""Windows at random, the same for all latents."""
NEIGHBORS = 10


class Silent:
    """Finds windows in which a latent does not fire.

    Args:
        sae: the SAE of the sample.
        store: the store of the sample.
        sample: windows and what was kept of them.
        seed: of the windows at random.

    Raises:
        ValueError: the sample is of another SAE or store.
    """

    def __init__(
        self,
        sae: SAE | NormalizedSAE,
        store: ActivationStore,
        sample: ContextSample,
        seed: int = 0,
    ) -> None:
        for name in sample.not_of(sae, store):
            raise ValueError(f"interpret: expected a sample of this {name}, got another one's")
        self.sae, self.store, self.sample = sae, store, sample
        generator = torch.Generator().manual_seed(seed)
        self.pool: list[int] = torch.randperm(sample.windows, generator=generator)[:POOL].tolist()
        self._pooled = set(self.pool)
        self._fired: dict[int, Tensor] = {}
        """Latents that fire in windows of the pool, as far as they were looked at."""

    def random(self, latent: int, n: int) -> list[Context]:
        """Return up to `n` of the windows at random in which a latent is silent."""
        return self._silent(self.pool, latent, n)

    def neighbors(self, latent: int, n: int) -> list[Context]:
        """Return up to `n` windows in which the latents of the most similar decoder rows fire, and
        this one does not; a window or more of each, in turns."""
        W = self.sae.W_dec.detach().flatten(1)
        cosine = F.cosine_similarity(W, W[latent].unsqueeze(0), dim=1)
        cosine[latent] = -torch.inf
        near = cosine.topk(min(NEIGHBORS, len(cosine) - 1)).indices.tolist()
        kept = [self.sample.kept("drawn", i) or self.sample.kept("top", i) for i in near]
        longest = max(map(len, kept), default=0)
        turns = [windows[i][0] for i in range(longest) for windows in kept if i < len(windows)]
        return self._silent(list(dict.fromkeys(turns)), latent, n)

    def _silent(self, windows: list[int], latent: int, n: int) -> list[Context]:
        found: list[Context] = []
        for at in range(0, len(windows), n):
            part = windows[at : at + n]
            for window, fired in zip(part, self._codes(part), strict=True):
                if len(found) < n and not bool((fired == latent).any()):
                    ids = self.sample.token_ids(window)
                    found.append(Context(ids, [0.0] * len(ids), 0))
            if len(found) == n:
                break
        return found

    @torch.no_grad()
    def _codes(self, windows: list[int]) -> list[Tensor]:
        """Return the latents that fire in each window."""
        new = [window for window in windows if window not in self._fired]
        codes = {}
        if new:
            rows = [self.store.rows(self.sample.rows(window)) for window in new]
            with evaluating(self.sae):
                x = torch.cat(rows).to(self.sae.W_enc_rows)
                acts = self.sae.encode_sparse(self.sae.columns.split(x).x)
            active = acts.values != 0
            row, latents = acts.rows()[active].cpu(), acts.indices[active].cpu()
            ends = torch.tensor([len(x) for x in rows]).cumsum(0)
            owner = torch.searchsorted(ends, row, right=True)
            codes = {window: latents[owner == i].unique() for i, window in enumerate(new)}
            self._fired |= {window: codes[window] for window in new if window in self._pooled}
        return [self._fired[w] if w in self._fired else codes[w] for w in windows]
