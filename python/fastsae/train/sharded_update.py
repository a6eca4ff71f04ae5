"""The fused update of an SAE that is spread over processes.

Every process moves the latents it holds, by the entries of all tokens. Where the batch is split
too, the entries go round with the rows that they weigh, or, if that is less, the sums of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastsae.distributed import Layout
from fastsae.distributed.exchange import gather_codes, gather_rows, sends_entries
from fastsae.nn import SAE
from fastsae.ops._tape import Tape
from fastsae.train.fused_update import FusedUpdate, Sums, gradients_of, plus, sums_of
from fastsae.types import LatentGradients, MoreGradients, SparseActs, StepTensors

if TYPE_CHECKING:
    from fastsae.train.config import TrainConfig


class ShardedUpdate(FusedUpdate):
    """`FusedUpdate` of the latents here.

    Args:
        sae: after `distributed.shard_`.
        config: as in `FusedUpdate`.
    """

    def __init__(self, sae: SAE, config: TrainConfig) -> None:
        super().__init__(sae, config)
        assert isinstance(sae.parallel, Layout)
        self.layout = sae.parallel

    def _of_all_tokens(self, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        present = [g for g in grads if g is not None]
        if self.layout.data.size == 1 or not present:
            return grads
        every = self.layout.data.sum(torch.cat([g.reshape(-1) for g in present]))
        parts = iter(every.split([g.numel() for g in present]))
        return [None if g is None else next(parts).view_as(g).to(g.dtype) for g in grads]

    @torch.no_grad()
    def _sums(
        self,
        tape: Tape,
        parameters: StepTensors,
        more: MoreGradients,
        extra: LatentGradients | None,
    ) -> tuple[Sums, bool]:
        # All that b_dec gets is found here, so that the kernel has nothing to add to it.
        W_enc, _, _, b_dec = parameters
        if tape.centered:
            tape.encoder = [one._replace(x=one.x - b_dec) for one in tape.encoder]
        sums = sums_of(tape, parameters, more)
        if self._sends_entries(sums, parameters):
            sums = self._gathered(sums)
            acts, grad_values = sums[:2]
            of_b_enc = _latent_sums(acts, grad_values, W_enc.shape[0])
        else:
            sums, of_b_enc = self._reduced(tape, parameters, more)
        if tape.centered:
            *rest, more = sums
            of_input = of_b_enc @ W_enc
            if extra is not None:
                of_input = of_input + extra.b_enc @ W_enc[extra.latents.long()]
            assert more.b_dec is not None
            more = more._replace(b_dec=more.b_dec - self.layout.latent.sum(of_input))
            sums = (*rest, more)  # type: ignore[assignment]
        return sums, False

    def _sends_entries(self, sums: Sums, parameters: StepTensors) -> bool:
        """Return whether gathering entries moves fewer bytes than adding up gradients.

        By sizes that are the same on all processes.
        """
        data, latent = self.layout.data, self.layout.latent
        _, _, x, grad_output, _ = sums
        k = getattr(self.sae, "k", None) or self.layout.d_sae
        entries = k * len(grad_output) / latent.size
        # Shares differ by a latent.
        of_matrices = self.layout.share * (x.shape[1] + grad_output.shape[1])
        return data.size == 1 or sends_entries(
            x.numel() + grad_output.numel(), entries, of_matrices, data.size
        )

    def _gathered(self, sums: Sums) -> Sums:
        """Return the sums over the tokens of all data groups."""
        acts, grad_values, x, grad_output, more = sums
        data = self.layout.data
        if data.size == 1:
            return sums
        acts, grad_values = gather_codes(acts, grad_values, data)
        return acts, grad_values, gather_rows(x, data), gather_rows(grad_output, data), more

    def _reduced(
        self, tape: Tape, parameters: StepTensors, more: MoreGradients
    ) -> tuple[Sums, Tensor]:
        """Return no entries and the gradients of all tokens instead, and that of b_enc alone."""
        plain = Tape(parameters, centered=False)
        plain.encoder, plain.decoder = tape.encoder, tape.decoder
        *nothing, own = gradients_of(plain, parameters, MoreGradients())
        W_enc, W_dec, b_enc = (
            self.layout.data.sum(torch.zeros_like(p) if g is None else g)
            for p, g in zip(parameters[:3], own[:3], strict=True)
        )
        more = more._replace(
            W_enc=plus(more.W_enc, W_enc),
            W_dec=plus(more.W_dec, W_dec),
            b_enc=plus(more.b_enc, b_enc),
        )
        return (*nothing, more), b_enc  # type: ignore[return-value]


def _latent_sums(acts: SparseActs, grad_values: Tensor | SparseActs, d_sae: int) -> Tensor:
    """Return the sum of the gradients of each latent's entries: [d_sae]."""
    if isinstance(grad_values, SparseActs):
        acts, values = grad_values, grad_values.values
    else:
        values = grad_values.where(acts.values != 0, 0)
    values, indices = values.reshape(-1), acts.indices.reshape(-1)
    if acts.offsets is not None:
        entry = torch.arange(len(values), device=values.device)
        values = values.where(entry < acts.offsets[-1], 0)
    return values.new_zeros(d_sae).index_add_(0, indices.long(), values)
