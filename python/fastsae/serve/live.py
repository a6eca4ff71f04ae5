"""The model behind an SAE: the code of a text that was just typed, and the logits of latents."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsae.analysis import promoted_tokens
from fastsae.data.contexts import weights_checksum
from fastsae.data.shards import Manifest
from fastsae.models import read, resolve
from fastsae.models.chunks import chunks
from fastsae.models.probe import device_of, evaluating
from fastsae.nn import SAE, NormalizedSAE

MOST_TOKENS = 1024
REMEMBERED = 8
"""Texts whose codes are kept."""


@dataclass(frozen=True)
class Code:
    """The active latents of each token of a text."""

    token_ids: list[int]
    encoded: list[bool]
    """Whether the token is one that the SAE is for: a harvest would have stored it."""
    token: Tensor
    """Of each active entry, its place in `token_ids`, ascending: int64 `[m]`."""
    latent: Tensor
    """int64 `[m]`"""
    act: Tensor
    """float32 `[m]`"""

    def of(self, latent: int) -> list[float]:
        """Return the activation of a latent on every token."""
        acts = torch.zeros(len(self.token_ids))
        here = self.latent == latent
        acts[self.token[here]] = self.act[here]
        return acts.tolist()


class Live:
    """A model that runs on what is typed, as it ran for the harvest.

    Args:
        load: returns the model and its tokenizer; called once, by `start` or when it is needed.
        sae: what the activations are for.
        sites: where the columns of the harvest are from, in their order.
        manifest: of the harvest: how contexts are cut, and which tokens were left out.
    """

    def __init__(
        self,
        load: Callable[[], tuple[nn.Module, Any]],
        sae: SAE | NormalizedSAE,
        sites: Sequence[str],
        manifest: Manifest,
    ) -> None:
        self.sae, self.manifest, self.sites = sae, manifest, tuple(sites)
        self._lock = threading.Lock()
        self._codes: OrderedDict[str, Code] = OrderedDict()
        self._load, self._lock_load = load, threading.Lock()
        self._loaded: Future[tuple[nn.Module, Any]] = Future()

    def start(self) -> tuple[nn.Module, Any]:
        """Return the model and its tokenizer, loaded by the first call.

        Raises:
            Exception: whatever kept the model from being loaded.
        """
        with self._lock_load:
            if not self._loaded.done():
                try:
                    self._loaded.set_result(self._load())
                except Exception as error:
                    self._loaded.set_exception(error)
        return self._loaded.result()

    @property
    def note(self) -> str | None:
        """What one should know about the model; None: nothing, or it is not here yet."""
        if not self._loaded.done() or self._loaded.exception() is not None:
            return None
        harvested = self.manifest.settings.get("weights")
        if harvested in (None, weights_checksum(self._loaded.result()[0])):
            return None
        return (
            "The weights of this model, or their dtype, are not those of the harvest: what it does "
            "here may differ from what the SAE was trained on."
        )

    @torch.no_grad()
    def encode(self, text: str) -> Code:
        """Return the code of a text, cut into contexts as by `harvest`.

        Raises:
            ValueError: no token, more than `MOST_TOKENS`, or a site that the model has not.
            Exception: whatever kept the model from being loaded.
        """
        with self._lock:
            if text not in self._codes:
                self._codes[text] = self._encode(text)
                if len(self._codes) > REMEMBERED:
                    self._codes.popitem(last=False)
            self._codes.move_to_end(text)
            return self._codes[text]

    def _encode(self, text: str) -> Code:
        model, tokenizer = self.start()
        manifest = self.manifest
        contexts = [c.ids for c in chunks(tokenizer, [text], manifest.context, manifest.prefix_id)]
        ids = [i for context in contexts for i in context[1:]]
        if not 0 < len(ids) <= MOST_TOKENS:
            raise ValueError(f"live: expected text of 1 to {MOST_TOKENS} tokens, got {len(ids)}")
        parts = [self._rows(model, context) for context in contexts]
        x, encoded = (torch.cat(part) for part in zip(*parts, strict=True))
        with evaluating(self.sae):
            acts = self.sae.encode_sparse(x[encoded].to(self.sae.W_enc_rows))
        active = acts.values != 0
        place = encoded.nonzero().flatten()[acts.rows()[active].cpu()]
        latent, value = acts.indices[active].long().cpu(), acts.values[active].float().cpu()
        return Code(ids, encoded.tolist(), place, latent, value)

    def _rows(self, model: nn.Module, context: list[int]) -> tuple[Tensor, Tensor]:
        """Return what the SAE reads at the tokens after the first `[t, d]`, and at which of them a
        harvest would have stored it: bool `[t]`."""
        names = self.sites[: len(self.sae.columns.inputs)]
        tokens = torch.tensor([context], device=device_of(model))
        with evaluating(model):
            found = read(model, [resolve(model, name) for name in names], tokens)
        rows = [found[name][0].float() for name in names]
        kept = ~rows[0].isnan().any(-1)
        kept[: self.manifest.drop_prefix] = False
        if (most := self.manifest.max_norm.get(names[0])) is not None:
            kept &= rows[0].norm(dim=-1) <= most
        return torch.cat(rows, -1)[1:].cpu(), kept[1:].cpu()

    def logits(self, directions: Tensor, n: int) -> tuple[list[list[int]], list[list[int]]] | None:
        """Return the `n` tokens whose logits each direction raises most, and lowers most; None
        where the logit lens says nothing: see `fastsae.analysis.promoted_tokens`."""
        model, columns = self.start()[0], self.sae.columns
        site = self.sites[: len(columns.inputs) + len(columns.targets)][-1]
        both = torch.cat([directions, -directions])  # the final norm is odd
        with self._lock:
            found = promoted_tokens(model, site, both.to(device_of(model)), n)
        return None if found is None else (found[: len(directions)], found[len(directions) :])
