"""Sites by the names that TransformerLens gives them, which SAELens and its tools look for.

Names are those of TransformerLens 3.9; on SmolLM2 its bridge gives at each of them what fastsae
reads at the site, to rounding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

OF_BLOCKS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "mlp_in": "mlp.hook_in",
    "mlp_out": "hook_mlp_out",
    "attn_z": "attn.hook_z",
    "attn_out": "hook_attn_out",
}
OF_MODEL = {"embed": "hook_embed", "final": "ln_final.hook_out"}


def hook_name(site: str) -> str:
    """Return the hook of a site: `blocks.3.hook_resid_post` of `resid_post.3`; a site that has none
    as it is."""
    if site in OF_MODEL:
        return OF_MODEL[site]
    kind, _, layer = site.partition(".")
    if kind in OF_BLOCKS and layer.isdigit():
        return f"blocks.{layer}.{OF_BLOCKS[kind]}"
    return site


def site_of(hook: str) -> str:
    """Return the site of a hook, and what is none as it is."""
    by_name = {name: site for site, name in OF_MODEL.items()}
    if hook in by_name:
        return by_name[hook]
    match = re.fullmatch(r"blocks\.(\d+)\.(\S+)", hook)
    kinds = {name: kind for kind, name in OF_BLOCKS.items()}
    if match is None or match[2] not in kinds:
        return hook
    return f"{kinds[match[2]]}.{match[1]}"


def describe_sites(sites: Sequence[str], *, transcoder: bool = False) -> dict[str, Any]:
    """Return what the metadata of an SAE say of where it was trained.

    Args:
        sites: one, or several side by side.
        transcoder: whether they are input and output.
    """
    if transcoder:
        return {"hook_name": hook_name(sites[0]), "hook_name_out": hook_name(sites[1])}
    return {"hook_name": "+".join(hook_name(site) for site in sites)}


def sites_in(metadata: dict[str, Any]) -> list[str]:
    """Return the sites that an SAE was trained on, by its metadata; hooks or sites in them."""
    hooks = str(metadata.get("hook_name", "")).split("+")
    if out := metadata.get("hook_name_out"):
        hooks.append(str(out))
    return [site_of(hook) for hook in hooks]
