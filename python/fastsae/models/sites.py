"""Sites: where in a language model an activation is read or replaced.

A site is a module of the model and one side of it, its input or its output. It is written

    resid_post.L   output of block L (the residual stream after it)
    mlp_in.L       input of the MLP of block L
    mlp_out.L      output of the MLP of block L
    attn_z.L       input of the attention output projection of block L (the heads, side by side)
    PATH[:in|:out] any module by its path in the model, e.g. model.layers.3.mlp:in; :out if unsaid

and works on any causal language model of `transformers` that keeps its blocks in one ModuleList.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
ATTN_NAMES = ("self_attn", "attn", "attention", "self_attention")
ATTN_OUT_NAMES = ("o_proj", "c_proj", "out_proj", "dense", "wo")
KINDS = ("resid_post", "mlp_in", "mlp_out", "attn_z")


@dataclass(frozen=True)
class Site:
    """A module of a model and one side of it.

    Args:
        name: as the user wrote it.
        module: the module to hook.
        side: "in" or "out".
    """

    name: str
    module: nn.Module
    side: str

    def hook(self, fn: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Call `fn` on the activation at every forward pass; what it returns replaces it.

        Args:
            fn: takes the activation `[..., d]`; returns its replacement, or None to leave it.

        Returns:
            A handle; `handle.remove()` takes the hook off.
        """
        if self.side == "out":

            def after(module: nn.Module, args: Any, output: Any) -> Any:
                new = fn(output[0] if isinstance(output, tuple) else output)
                if new is None:
                    return None
                return (new, *output[1:]) if isinstance(output, tuple) else new

            return self.module.register_forward_hook(after)

        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if args:
                new = fn(args[0])
                return None if new is None else ((new, *args[1:]), kwargs)
            name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
            new = fn(kwargs[name])
            return None if new is None else (args, {**kwargs, name: new})

        return self.module.register_forward_pre_hook(before, with_kwargs=True)


def resolve(model: nn.Module, name: str) -> Site:
    """Find a site in a model.

    Args:
        model: a causal language model of `transformers`, or any module for a plain path.
        name: a site as described at the top of this file.

    Raises:
        ValueError: the model has no such site; the message lists what it has.
    """
    match = re.fullmatch(r"(\w+)\.(\d+)", name)
    if match and match[1] in KINDS:
        kind, layer = match[1], int(match[2])
        path, blocks = find_blocks(model)
        if layer >= len(blocks):
            raise ValueError(
                f"site {name}: expected a layer in 0..{len(blocks) - 1}, got {layer} "
                f"({type(model).__name__} has {len(blocks)} layers in {path})"
            )
        block = blocks[layer]
        if kind == "resid_post":
            return Site(name, block, "out")
        if kind in ("mlp_in", "mlp_out"):
            return Site(name, _child(block, MLP_NAMES, name, "an MLP"), kind.removeprefix("mlp_"))
        attention = _child(block, ATTN_NAMES, name, "an attention module")
        return Site(name, _child(attention, ATTN_OUT_NAMES, name, "an output projection"), "in")
    path, _, side = name.partition(":")
    if side not in ("", "in", "out"):
        raise ValueError(f"site {name}: expected PATH:in or PATH:out, got :{side}")
    return Site(name, _walk(model, path, name), side or "out")


def describe(name: str) -> str:
    """Return a site in words, e.g. "the residual stream after block 15"."""
    kind, _, layer = name.partition(".")
    words = {
        "resid_post": "the residual stream after block",
        "mlp_in": "the input of the MLP of block",
        "mlp_out": "the output of the MLP of block",
        "attn_z": "the attention heads of block",
    }
    if kind in words and layer.isdigit():
        return f"{words[kind]} {layer}"
    path, _, side = name.partition(":")
    return f"the {side or 'out'}put of {path}"


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the path and the list of the transformer blocks of a model.

    It is the longest ModuleList of the text decoder (`model.get_decoder()`, where the model has
    towers for images or sound besides) that lies in no other ModuleList (experts do) and whose
    entries are all of one class.

    Raises:
        ValueError: there is none, or several are equally long.
    """
    decoder = _text_decoder(model)
    inside = {id(module) for module in decoder.modules()}
    found: list[tuple[str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        nested = any(path.startswith(outer + ".") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and len(module) and not nested:
            found.append((path, module))
    found = [
        (path, blocks)
        for path, blocks in found
        if id(blocks) in inside and len({type(b) for b in blocks}) == 1
    ]
    if not found:
        raise ValueError(
            f"expected {type(model).__name__} to keep its blocks in a ModuleList, found none; "
            "give the site as a module path, e.g. model.layers.3.mlp:in"
        )
    longest = max(len(blocks) for _, blocks in found)
    paths = [path for path, blocks in found if len(blocks) == longest]
    if len(paths) > 1:
        raise ValueError(
            f"expected {type(model).__name__} to have one list of text blocks, found "
            f"{', '.join(paths)}; give the site as a module path, e.g. {paths[0]}.0.mlp:in"
        )
    return next((path, blocks) for path, blocks in found if path == paths[0])


def _text_decoder(model: nn.Module) -> nn.Module:
    """Return the part of a model of several towers that predicts text; else the model."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    return decoder if isinstance(decoder, nn.Module) else model


def _child(parent: nn.Module, names: tuple[str, ...], site: str, what: str) -> nn.Module:
    children = dict(parent.named_children())
    for name in names:
        if name in children:
            return children[name]
    raise ValueError(
        f"site {site}: expected {what} named {', '.join(names)} in {type(parent).__name__}, "
        f"which has {', '.join(children) or 'no children'}; give the site as a module path"
    )


def _walk(model: nn.Module, path: str, site: str) -> nn.Module:
    module, done = model, type(model).__name__
    for part in path.split("."):
        children = dict(module.named_children())
        if part not in children:
            listed = ", ".join(list(children)[:12]) + (", ..." if len(children) > 12 else "")
            raise ValueError(
                f"site {site}: expected {', '.join(k + '.L' for k in KINDS)} or a module path; "
                f"{done} has no {part!r}, it has {listed or 'no children'}"
            )
        module, done = children[part], part if module is model else f"{done}.{part}"
    return module


def read_gradients(
    model: nn.Module, sites: Sequence[Site], tokens: Tensor, real: Tensor
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

    Returns:
        Two dicts by `site.name` of `[n, t, d]`, in the model's dtype and on its device.

    Raises:
        RuntimeError: a site is not reached by the forward pass, or the loss does not depend on it.
    """
    got: dict[str, Tensor] = {}

    def reader(name: str) -> Callable[[Tensor], Tensor]:
        def take(x: Tensor) -> Tensor:
            got[name] = x if x.requires_grad else x.detach().requires_grad_()
            return got[name]

        return take

    trainable = [p for p in model.parameters() if p.requires_grad]
    handles = [site.hook(reader(site.name)) for site in sites]
    try:
        for p in trainable:
            p.requires_grad_(False)
        with torch.enable_grad():
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
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
def read(model: nn.Module, sites: Sequence[Site], tokens: Tensor) -> dict[str, Tensor]:
    """Run the model on `tokens` and return its activations at `sites`.

    The forward pass ends as soon as the last site has fired: a site in the middle of the model
    costs half a pass, and the unembedding is never computed.

    Args:
        model: a causal language model of `transformers`.
        sites: from `resolve`; their names differ.
        tokens: `[n, t]`, int64, on the model's device.

    Returns:
        `{site.name: [n, t, d]}` in the model's dtype and on its device.

    Raises:
        RuntimeError: a site was not reached by the forward pass.
    """
    got: dict[str, Tensor] = {}

    def reader(name: str) -> Callable[[Tensor], None]:
        def take(x: Tensor) -> None:
            got[name] = x
            if len(got) == len(sites):
                raise _Stop

        return take

    handles = [site.hook(reader(site.name)) for site in sites]
    try:
        model(input_ids=tokens, use_cache=False)
    except _Stop:
        return got
    finally:
        for handle in handles:
            handle.remove()
    missing = ", ".join(site.name for site in sites if site.name not in got)
    raise RuntimeError(f"site {missing}: its module is not reached by the model's forward pass")
