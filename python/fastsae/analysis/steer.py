"""Steering: act on latents of an SAE while the model that it belongs to runs or generates.

    x' = x + (f' - f) W_dec          f, f': the code of x before and after

The reconstruction is never put in the place of x: what the SAE does not explain, its error, stays.
So a change of nothing (0 added, 1 times, a latent that does not fire ablated) is the model itself,
to the bit.

    add       f' = f + strength      strength in units of the code, or of `unit`
    scale     f' = strength f
    clamp     f' = strength
    ablate    f' = 0

Sources: Templeton et al. 2024, "Scaling monosemanticity", clamps latents at every token and keeps
the error. Turner et al. 2023 (arXiv 2308.10248) adds a direction to the residual stream without
regard to what is there: that is `add`, which therefore never encodes. Ours: the other three words
in one formula, the first token left alone by default, and one rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastsae.models import Site
from fastsae.models.probe import evaluating
from fastsae.models.splice import intervene, read_and_replaced
from fastsae.nn import SAE, NormalizedSAE
from fastsae.nn.layer_decoders import LayerDecoders
from fastsae.types import SparseActs

HOW = ("add", "scale", "clamp", "ablate")

Sites = str | Site | tuple[str | Site, str | Site]
Numbers = float | Sequence[float] | Tensor
Change = Callable[[Tensor, Tensor], Tensor | None]
"""Takes the rows that are read and those to replace; see `models.splice.intervene`."""


@contextmanager
def steer(
    model: nn.Module,
    sae: SAE | NormalizedSAE,
    latents: int | Sequence[int] | Tensor,
    *,
    site: Sites,
    how: str = "add",
    strength: Numbers | None = None,
    unit: Numbers = 1.0,
    keep: Tensor | None = None,
    drop_prefix: int = 1,
    max_norm: float | None = None,
) -> Iterator[None]:
    """Change latents at `site` in every forward pass inside the block.

        with fastsae.analysis.steer(model, sae, 7, site="resid_post.15", strength=40.0):
            model.generate(...)

    Positions are those in the context, as in `models.replace`: caches, prefill in chunks, padding
    on the left and beams give what one pass over the whole text would. The SAE is in eval mode
    inside the block. Blocks nest; where they share a site the inner one acts last, on what the
    outer one made.

    Args:
        model: a causal language model of `transformers`; calls go through it.
        sae: reads one site. Of a `NormalizedSAE` the code is that of the normalized activation, and
            the change is put back to the scale of each token.
        latents: one, or `[m]` different ones.
        site: where the SAE belongs, see `fastsae.models.sites`; of a transcoder the site that it
            reads, and the one that it replaces, where its own error is kept likewise.
        how: "add" | "scale" | "clamp" | "ablate". Latents that do not fire are added to and clamped
            as well.
        strength: one number, or `[m]`; none for "ablate". A tensor may require grad.
        unit: what strengths of "add" and "clamp" are multiples of: one number or `[m]`, such as the
            largest value of each latent, see `firing`.
        keep: bool `[batch, t]`, True where nothing is changed; positions past t are changed. All
            True for the prompt changes only what is generated.
        drop_prefix: positions at the start of each context that pass through.
        max_norm: rows of a larger norm pass through.

    Raises:
        ValueError: latents outside 0..d_sae - 1 or twice, another word, a strength that is missing,
            of another shape or not finite, or an SAE or site that do not fit each other.
        TypeError: no SAE, or latents that are no integers.

    Gradients: through x, the code and the strength, as in the formula.
    Numerics: the change is computed in float32, in float64 where the SAE or the model is, and the
    sum is rounded once to the dtype of x. Rows whose code does not change keep their bits; where a
    site is computed out of two tensors (`attn_write` and the like in some models), if no row does.
    Cost: "add" 2 m d flops per token; the others encode as well.
    """
    source, target = fitting("steer", site, sae)
    chosen = checked_latents("steer", latents, sae.d_sae)
    amount = _amounts(how, strength, unit, len(chosen))
    fn = change(sae, how, amount, chosen)
    with evaluating(sae), intervene(model, target, fn, source, keep, drop_prefix, max_norm):
        yield


def fitting(
    owner: str, site: Sites, sae: SAE | NormalizedSAE
) -> tuple[str | Site | None, str | Site]:
    """Return the site to read, None for the same, and the one to change."""
    inner = sae.sae if isinstance(sae, NormalizedSAE) else sae
    if not isinstance(inner, SAE):
        raise TypeError(f"{owner}: expected an SAE or a NormalizedSAE, got {type(inner).__name__}")
    if isinstance(inner, LayerDecoders):
        raise ValueError(
            f"{owner}: expected an SAE that writes to one site, got {type(inner).__name__}, whose "
            "latents write to several layers"
        )
    return read_and_replaced(owner, site, sae)


def checked_latents(owner: str, latents: int | Sequence[int] | Tensor, d_sae: int) -> Tensor:
    """Return latents as int64 `[m]`, on the CPU."""
    given = latents.tolist() if hasattr(latents, "tolist") else latents
    found = [given] if isinstance(given, int) else list(given)
    if wrong := [x for x in found if type(x) is not int]:
        raise TypeError(f"{owner}: expected latents to be integers, got {wrong[0]!r}")
    if outside := [x for x in found if not 0 <= x < d_sae]:
        raise ValueError(f"{owner}: expected a latent in 0..{d_sae - 1}, got {outside[0]}")
    if twice := [x for x in found if found.count(x) > 1]:
        raise ValueError(f"{owner}: expected latents that differ, got {twice[0]} twice")
    return torch.tensor(found, dtype=torch.int64)


def _amounts(how: str, strength: Numbers | None, unit: Numbers, m: int) -> Tensor:
    """Return the strength of every latent in units of the code: float64 `[m]`."""
    if how not in HOW:
        raise ValueError(f"steer: expected how to be add, scale, clamp or ablate, got {how!r}")
    if (strength is None) != (how == "ablate"):
        wanted = "no strength" if how == "ablate" else "a strength"
        raise ValueError(f"steer: expected {wanted} for {how!r}, got {strength}")
    one = isinstance(unit, int | float) and unit == 1
    if how in ("scale", "ablate") and not one:
        raise ValueError(f"steer: expected a unit only for 'add' and 'clamp', got one for {how!r}")
    amount = _of_latents("strength", 0.0 if strength is None else strength, m)
    return amount if one else amount * _of_latents("unit", unit, m).to(amount.device)


def _of_latents(name: str, given: Numbers, m: int) -> Tensor:
    """Return a number for each latent: float64 `[m]`."""
    numbers = torch.as_tensor(given, dtype=torch.float64)
    if numbers.ndim and numbers.shape != (m,):
        raise ValueError(
            f"steer: expected {name} to be one number or [{m}], got {[*numbers.shape]}"
        )
    if not bool(numbers.isfinite().all()):
        raise ValueError(f"steer: expected {name} to be finite, got {numbers.tolist()}")
    return numbers.expand(m)


def change(
    sae: SAE | NormalizedSAE,
    how: str,
    amount: Tensor,
    latents: Tensor,
    vectors: Tensor | None = None,
) -> Change:
    """Return what computes x' of rows of x; None where no row changes.

    Args:
        sae: in eval mode where this is called.
        how: as in `steer`.
        amount: `[m]`, float64.
        latents: `[m]`.
        vectors: `[m, d]`, for "add": what is added in the place of rows of W_dec.
    """

    def fn(read: Tensor, own: Tensor) -> Tensor | None:
        if vectors is None:
            W = sae.W_dec.index_select(0, latents.to(sae.W_dec.device)).to(own.device)
        else:
            W = vectors.to(own.device)
        wide = torch.promote_types(torch.promote_types(own.dtype, W.dtype), torch.float32)
        by = amount.to(own.device, wide)
        if how == "add":
            moved = by.expand(len(own), -1)
        else:
            acts = sae.encode_sparse(read.to(sae.W_enc_rows.dtype))
            f = values_of(acts, latents).to(wide)
            moved = {"scale": f * (by - 1), "clamp": by - f, "ablate": -f}[how]
        changed = (moved != 0).any(1, keepdim=True)
        if not bool(changed.any()):
            return None
        step = moved @ W.to(wide)
        if isinstance(sae, NormalizedSAE):
            step = step * sae.output_scale(read)
        x = own.to(wide)
        return torch.where(changed, x + step, x)

    return fn


def values_of(acts: SparseActs, latents: Tensor) -> Tensor:
    """Return the values of some latents in a code, 0 where they do not fire: `[n, m]`."""
    device, m = acts.values.device, len(latents)
    slot = torch.full((acts.d_sae,), m, device=device)
    slot[latents.to(device)] = torch.arange(m, device=device)
    places = (acts.rows(), slot[acts.indices.long()])  # padding in row n, other latents in column m
    found = acts.values.new_zeros(acts.n + 1, m + 1)
    return found.index_put(places, acts.values, accumulate=True)[:-1, :-1]
