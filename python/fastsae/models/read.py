"""Read activations, and the loss's gradients there, in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastsae.models.eager import uncompiled
from fastsae.models.probe import options
from fastsae.models.sites import Site
from fastsae.models.threads import only_here


def read_gradients(
    model: nn.Module,
    sites: Sequence[Site],
    tokens: Tensor,
    real: Tensor,
    *,
    attention_mask: Tensor | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run the model on `tokens`; return activations at `sites` and the loss's gradients there.

        g_t = d (sum of the next-token cross entropies of the text) / d x_t

    The sum, not the mean, so that g does not shrink with the batch; what x_t does to all later
    predictions of its text is part of it. Costs a whole forward pass, and a backward pass down to
    the first site.

    Args:
        model: a causal language model of `transformers`.
        sites: from `resolve`; their names differ.
        tokens: `[n, t]`, int64, on the model's device.
        real: bool `[n, t]`, False where padding is.
        attention_mask: as in `read`.

    Returns:
        Two dicts by `site.name` of `[n, t, d]`, in the model's dtype and on its device.

    Raises:
        RuntimeError: a site is not reached by the forward pass, or the loss does not depend on it.
    """
    got: dict[str, Tensor] = {}

    def reader(name: str) -> Callable[[Tensor], Tensor]:
        def take(x: Tensor) -> Tensor:
            got[name] = x if x.requires_grad else x.detach().requires_grad_()
            return got[name].clone()  # some models change it in place

        return take

    trainable = [p for p in model.parameters() if p.requires_grad]
    handles = [site.hook(reader(site.name), only_here) for site in sites]
    try:
        for p in trainable:
            p.requires_grad_(False)
        with torch.enable_grad(), uncompiled(model):
            output = model(input_ids=tokens, **_masked(attention_mask), **options(model))
            logits = output.logits[:, :-1]
            scored = real[:, 1:]
            loss = nn.functional.cross_entropy(
                logits[scored].float(), tokens[:, 1:][scored], reduction="sum"
            )
            missing = ", ".join(site.name for site in sites if site.name not in got)
            if missing:
                raise RuntimeError(
                    f"site {missing}: its module is not reached by the model's forward pass"
                )
            grads = torch.autograd.grad(loss, [got[site.name] for site in sites])
    finally:
        for handle in handles:
            handle.remove()
        for p in trainable:
            p.requires_grad_(True)
    by_name = dict(zip([site.name for site in sites], grads, strict=True))
    return {name: x.detach() for name, x in got.items()}, by_name


class _Stop(Exception):
    """Leaves a forward pass once every requested activation is in hand."""


@torch.no_grad()
def read(
    model: nn.Module,
    sites: Sequence[Site],
    inputs: Tensor | Mapping[str, Tensor],
    *,
    attention_mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """Run the model on some inputs and return its activations at `sites`.

    The forward pass ends as soon as the last site has fired: a site in the middle of the model
    costs half a pass, and the unembedding is never computed. Activations are those that the site
    had, also where the model changes them in place later.

        read(vit, [resolve(vit, "resid_post.5")], {"pixel_values": images})

    Args:
        model: a model of `transformers`.
        sites: from `resolve`; their names differ.
        inputs: tokens `[n, t]`, int64; or arguments of the forward pass by name, as a processor
            gives them. On the model's device.
        attention_mask: `[n, t]`, 0 at padding; needed where a row depends on what is right of it.

    Returns:
        `{site.name: [n, t, d]}` in the model's dtype and on its device; t counts patches and class
        tokens in models of images. Rows of an expert are NaN for tokens not routed to it.

    Raises:
        RuntimeError: a site was not reached by the forward pass.
    """
    given = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    given |= _masked(attention_mask)
    got, kept = _read(model, sites, given, set())
    changed = {name for name, version in kept.items() if got[name]._version != version}
    return _read(model, sites, given, changed)[0] if changed else got


def _read(
    model: nn.Module, sites: Sequence[Site], inputs: dict[str, Tensor], copied: set[str]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return the activations, copies of some of them, and the versions that the others had."""
    got: dict[str, Tensor] = {}
    versions: dict[str, int] = {}

    def reader(name: str, copies: bool) -> Callable[[Tensor], None]:
        def take(x: Tensor) -> None:
            copies_now = copies or x.is_inference()  # those have no versions
            got[name] = x.clone() if copies_now else x
            if not copies_now:
                versions[name] = x._version
            if len(got) == len(sites):
                raise _Stop

        return take

    handles = [
        site.hook(reader(site.name, site.in_place or site.name in copied), only_here)
        for site in sites
    ]
    try:
        with uncompiled(model):
            model(**inputs, **options(model))
    except _Stop:
        return got, versions
    finally:
        for handle in handles:
            handle.remove()
    missing = ", ".join(site.name for site in sites if site.name not in got)
    raise RuntimeError(f"site {missing}: its module is not reached by the model's forward pass")


def _masked(mask: Tensor | None) -> dict[str, Tensor]:
    return {} if mask is None else {"attention_mask": mask}
