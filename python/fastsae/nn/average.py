"""Average SAEs that were fine-tuned from one checkpoint into one that costs no more than each.

Source: the idea of Zimmer et al. 2023, "Sparse model soups" (arXiv 2306.16788): copies retrained
from one sparse model can be averaged weight by weight. Applying it to SAEs is our addition.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsae.nn.loss import upcast
from fastsae.nn.sae import SAE

NEAR = 0.5
"""Mean cosine of matching decoder rows above which SAEs count as fine-tunes of one checkpoint. Rows
of independent runs have a mean cosine near 0, those of fine-tunes one near 1."""


def average_saes(saes: Sequence[SAE]) -> SAE:
    """Return the average of fine-tunes of one checkpoint, with decoder rows of norm 1.

        p = mean_i p_i for every parameter;   W_dec <- W_dec / |rows of W_dec|

    Latent j must be the same latent in all of them. Independent runs find theirs in another order,
    and averaging those means nothing, so SAEs whose decoder rows do not match are refused.

    Floating-point buffers (thresholds, densities) are averaged too, and stay +inf where any is; all
    else is that of the first SAE. The average of thresholds is not the threshold of the average:
    for classes that select batch-wise call `estimate_threshold_` on training batches, or
    `calibrate_` on held-out tokens, before using the result.

    Args:
        saes: of one class and config; at least one. They are not changed.

    Returns:
        A new SAE in eval mode, on the device and in the dtype of the first.

    Raises:
        TypeError: not an SAE.
        ValueError: none at all, another class or config, or a mean cosine of matching rows of
            W_dec, with those of the first, that is not above 0.5.

    Numerics: sums in float32 (float64 for float64), one tensor at a time.
    Source: Zimmer et al. 2023, for pruned networks.
    """
    _check(saes)
    merged = copy.deepcopy(saes[0])
    parts = [sae.state_dict() for sae in saes]
    for name, held in merged.state_dict().items():
        if held.is_floating_point():
            held.copy_(_mean([part[name] for part in parts]))
    merged.normalize_decoder_()
    norms = _mean([torch.linalg.vector_norm(upcast(sae.W_dec.detach()), dim=1) for sae in saes])
    if bool(((norms - 1).abs() > 1e-3).any()):  # of SAEs that were trained elsewhere
        merged.W_dec = merged.W_dec.detach() * norms.to(merged.W_dec).unsqueeze(1)
    return merged.eval()


def _mean(tensors: list[Tensor]) -> Tensor:
    """Return the mean of tensors of one shape, on the device of the first."""
    total = upcast(torch.zeros_like(tensors[0]))
    for t in tensors:
        total += t.to(total.device)
    return total / len(tensors)


def _check(saes: Sequence[SAE]) -> None:
    if len(saes) == 0:
        raise ValueError("average_saes: expected at least one SAE, got none")
    for sae in saes:
        if not isinstance(sae, SAE):
            raise TypeError(
                f"average_saes: expected every item to be an SAE, got {type(sae).__name__}"
            )
    first, config = saes[0], saes[0].config()
    for i, sae in enumerate(saes[1:], start=1):
        if type(sae) is not type(first):
            raise ValueError(
                f"average_saes: expected SAEs of one class, {type(first).__name__}, "
                f"got {type(sae).__name__} for saes[{i}]"
            )
        for key, value in sae.config().items():
            if value != config[key]:
                raise ValueError(
                    f"average_saes: expected SAEs of one config, {key} = {config[key]!r}, "
                    f"got {value!r} for saes[{i}]"
                )
        if not (cosine := _mean_cosine(first.W_dec, sae.W_dec)) > NEAR:
            raise ValueError(
                "average_saes: expected fine-tunes of one checkpoint, with a mean cosine of "
                f"matching rows of W_dec > {NEAR}, got {cosine:.3f} for saes[{i}]; independent "
                "runs have their latents in another order"
            )


@torch.no_grad()
def _mean_cosine(a: Tensor, b: Tensor) -> float:
    """Return the mean cosine of row i of `a: [d_sae, d_in]` with row i of `b`."""
    a, b = upcast(a), upcast(b).to(a.device)
    return float(torch.cosine_similarity(a, b, dim=1).mean())
