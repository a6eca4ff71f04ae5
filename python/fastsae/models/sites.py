"""Sites: where in a model an activation is read or replaced.

A site is a module of the model and one side of it, its input or its output. It is written

    resid_pre.L    input of block L (the residual stream before it)
    resid_mid.L    the stream between attention and MLP, where one follows the other
    resid_post.L   output of block L (the residual stream after it)
    mlp_in.L       input of the MLP of block L
    mlp_out.L      output of the MLP of block L
    mlp_write.L    what the MLP of block L adds to the stream: mlp_out, or what is made of it
    attn_z.L       input of the attention output projection of block L (the heads, side by side)
    head.L.H       the columns of head H of attn_z.L
    attn_out.L     output of the attention of block L
    attn_write.L   what the attention of block L adds to the stream
    router.L       logits of the router of the experts of block L
    expert.L.E     output of expert E of block L, where experts are modules; NaN for other tokens
    embed          output of the token embedding
    final          input of the unembedding: the stream after the last norm
    PATH[:in|:out] any module by its path in the model, e.g. model.layers.3.mlp:in; :out if unsaid

Blocks are found by `find_blocks`, and what is found is checked by running the model on a few tokens
(`check_sites`): a name that the model has nothing true for is refused.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastsae.models.blocks import look_up
from fastsae.models.experts import Guard, find_expert, hook_expert
from fastsae.models.probe import Handle, first_tensor, with_first
from fastsae.models.threads import not_elsewhere

MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "mlp_block", "shared_mlp")
MLP_LINEAR = ("fc1", "fc2")
"""Families whose MLP is no module: its first and its last linear map."""
ATTN_NAMES: tuple[str, ...] = ("self_attn", "attn", "attention", "self_attention")
ATTN_NAMES += ("multi_head_attention", "norm_attn_norm.attn")
ATTN_OUT_NAMES = ("o_proj", "c_proj", "out_proj", "dense", "wo", "Wo")
ROUTER_NAMES = ("gate", "router")
BLOCK_KINDS = {
    "resid_pre": "the residual stream before block",
    "resid_mid": "the residual stream between attention and MLP of block",
    "resid_post": "the residual stream after block",
    "mlp_in": "the input of the MLP of block",
    "mlp_out": "the output of the MLP of block",
    "mlp_write": "what the MLP adds to the residual stream in block",
    "attn_z": "the attention heads of block",
    "attn_out": "the output of the attention of block",
    "attn_write": "what the attention adds to the residual stream in block",
    "router": "the logits of the router of experts in block",
}
"""Kinds of sites of a block, in words."""
MODEL_KINDS = {
    "embed": "the output of the token embedding",
    "final": "the residual stream after the last norm",
}


class Base(NamedTuple):
    """An input of a module that is added to what a site's module gives."""

    module: nn.Module
    key: int | str
    """The argument, by position or name."""
    sign: int


@dataclass(frozen=True)
class Site:
    """A place in a model where an activation `[n, t, d]` is read or replaced.

        value = (scale * x)[..., columns] + sign * base

    for the x that the module takes or gives.

    Args:
        name: as the user wrote it.
        module: the module to hook.
        side: "in" or "out".
        block: the block it lies in, whose input says n and t where the module sees rows `[n t, d]`.
        columns: those that are meant; None: all.
        scale: of the module's tensor.
        base: what is added; None: nothing.
        in_place: whether the model changes the tensor later.
        mixture: what routes tokens to the module, where that is an expert: x is NaN then for tokens
            that are not routed to it, and the module takes no others.
        read_only: why replacing it would do nothing; empty where it does.
    """

    name: str
    module: nn.Module
    side: str
    block: nn.Module | None = None
    columns: slice | None = None
    scale: float = 1.0
    base: Base | None = None
    in_place: bool = False
    mixture: nn.Module | None = None
    read_only: str = ""

    def hook(self, fn: Callable[[Tensor], Tensor | None], guard: Guard = not_elsewhere) -> Handles:
        """Call `fn` on the activation at every forward pass; what it returns replaces it.

        Args:
            fn: takes the activation `[..., d]`; returns its replacement, or None to leave it.
            guard: in which threads, see `models.threads`.

        Returns:
            A handle; `handle.remove()` takes the hook off.
        """
        if self.mixture is not None:
            return Handles(hook_expert(self.module, self.mixture, self.name, fn, guard))
        seen = threading.local()  # what this pass has seen; another thread may run another one
        handles: list[Handle] = []
        if self.block is not None and self.block is not self.module:
            handles.append(
                self.block.register_forward_pre_hook(_note(seen, guard), with_kwargs=True)
            )
        if self.base is not None:
            base, key = self.base.module, self.base.key
            handles.append(
                base.register_forward_pre_hook(_note(seen, guard, key), with_kwargs=True)
            )

        def change(x: Tensor) -> Tensor | None:
            rows = x
            lead = getattr(seen, "lead", None)
            if lead is not None and x.ndim == 2 and x.shape[0] == lead[0] * lead[1]:
                rows = x.view(*lead, -1)
            value = rows if self.columns is None else rows[..., self.columns]
            value = value if self.scale == 1 else value * self.scale
            if self.base is not None:
                added = self.base.sign * seen.base.reshape(value.shape)
                value = value + added
            new = fn(value)
            if new is None:
                return None
            new = new if self.base is None else new - added
            new = new if self.scale == 1 else new / self.scale
            if self.columns is not None:
                whole = rows.clone()
                whole[..., self.columns] = new
                new = whole
            return new.reshape(x.shape)

        if self.side == "out":

            @guard
            def after(module: nn.Module, args: Any, output: Any) -> Any:
                x = first_tensor(output)
                if x is None:
                    raise TypeError(
                        f"site {self.name}: expected {type(module).__name__} to give a tensor or a "
                        f"tuple that begins with one, got {type(output).__name__}"
                    )
                new = change(x)
                return None if new is None else with_first(output, new)

            handles.append(self.module.register_forward_hook(after))
            return Handles(handles)

        @guard
        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            key = first_key(args, kwargs)
            if isinstance(key, int):
                new = change(args[key])
                return None if new is None else ((*args[:key], new, *args[key + 1 :]), kwargs)
            new = change(kwargs[key])
            return None if new is None else (args, {**kwargs, key: new})

        handles.append(self.module.register_forward_pre_hook(before, with_kwargs=True))
        return Handles(handles)


class Handles:
    """Several hooks that come off together."""

    def __init__(self, handles: list[Handle]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Take them off."""
        for handle in self._handles:
            handle.remove()


def first_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str:
    """Return which argument a module works on: the first one, else hidden_states, else a tensor."""
    if args:
        return 0
    if "hidden_states" in kwargs:
        return "hidden_states"
    return next((name for name, x in kwargs.items() if isinstance(x, Tensor)), next(iter(kwargs)))


def _note(seen: threading.local, guard: Guard, key: int | str | None = None) -> Callable[..., None]:
    """Return a hook that remembers an argument of a module; without a key, the shape of rows."""

    @guard
    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if key is not None:
            seen.base = args[key] if isinstance(key, int) else kwargs[key]
            return
        where = first_key(args, kwargs)
        x = args[where] if isinstance(where, int) else kwargs[where]
        seen.lead = x.shape[:2] if isinstance(x, Tensor) and x.ndim == 3 else None

    return before


def is_named(name: str) -> bool:
    """Return whether a site has one of the names above; else it is a path."""
    return name in MODEL_KINDS or parse(name) is not None


def parse(name: str) -> tuple[str, int, int | None] | None:
    """Return kind, layer and head of a site of a block; None for another site."""
    match = re.fullmatch(r"(\w+)\.(\d+)(?:\.(\d+))?", name)
    if match is None:
        return None
    kind, layer, head = match[1], int(match[2]), match[3]
    if kind in ("head", "expert") and head is not None:
        return kind, layer, int(head)
    return (kind, layer, None) if kind in BLOCK_KINDS and head is None else None


def describe(name: str) -> str:
    """Return a site in words, e.g. "the residual stream after block 15"."""
    if name in MODEL_KINDS:
        return MODEL_KINDS[name]
    if (parsed := parse(name)) is not None:
        kind, layer, head = parsed
        if head is not None:
            return f"{kind} {head} of block {layer}"
        return f"{BLOCK_KINDS[kind]} {layer}"
    path, _, side = name.partition(":")
    return f"the {side or 'out'}put of {path}"


def locate(model: nn.Module, name: str) -> Site:
    """Return where a named site should be; unlike `resolve`, nothing is checked.

    Kinds that are made of others (resid_mid, mlp_write, attn_write) are not located here.
    """
    if name in MODEL_KINDS:
        return _of_model(model, name)
    parsed = parse(name)
    assert parsed is not None
    kind, layer, head = parsed
    block = block_of(model, name, layer)
    if kind == "resid_pre":
        return Site(name, block, "in")
    if kind == "resid_post":
        return Site(name, block, "out")
    if kind in ("mlp_in", "mlp_out"):
        first, last = mlp_of(block, name)
        side = kind.removeprefix("mlp_")
        if first is not last:
            module = first if side == "in" else last
            return Site(name, module, side, block)
        return Site(name, first, side, block)
    if kind == "router":
        mlp, _ = mlp_of(block, name)
        return Site(name, _child(mlp, ROUTER_NAMES, name, "a router"), "out", block)
    if kind == "expert" and head is not None:
        mixture, _ = mlp_of(block, name)
        return Site(name, find_expert(mixture, name, head), "out", block, mixture=mixture)
    attention = _attention(block, name)
    if kind == "attn_out":
        return Site(name, attention, "out", block)
    children = dict(attention.named_children())
    if not any(x in children for x in ATTN_OUT_NAMES) and "attention" in children:
        attention = children["attention"]
    out = _child(attention, ATTN_OUT_NAMES, name, "an output projection")
    if head is None:
        return Site(name, out, "in", block)
    return Site(name, out, "in", block, _columns(model, attention, out, name, head))


def block_of(model: nn.Module, name: str, layer: int) -> nn.Module:
    """Return block `layer`, if there is one that takes part in a forward pass."""
    path, blocks, ran = look_up(model)
    if layer >= len(blocks):
        raise ValueError(
            f"site {name}: expected a layer in 0..{len(blocks) - 1}, got {layer} "
            f"({type(model).__name__} has {len(blocks)} layers in {path})"
        )
    if not ran[layer]:
        raise ValueError(
            f"site {name}: expected a block that takes part in a forward pass, got {path}.{layer} "
            f"({type(blocks[layer]).__name__}), which does not run on tokens alone"
        )
    return blocks[layer]


def mlp_of(block: nn.Module, name: str) -> tuple[nn.Module, nn.Module]:
    """Return the first and the last module of the MLP of a block; mostly the same."""
    children = dict(block.named_children())
    if not any(x in children for x in MLP_NAMES) and all(x in children for x in MLP_LINEAR):
        return children[MLP_LINEAR[0]], children[MLP_LINEAR[1]]
    mlp = _child(block, MLP_NAMES, name, "an MLP")
    return mlp, mlp


def _attention(block: nn.Module, name: str) -> nn.Module:
    """Return the attention of a block; some families mix such blocks with recurrent ones."""
    mixed = getattr(block, "temporal_block", None)  # recurrent_gemma
    if isinstance(mixed, nn.Module) and hasattr(mixed, "o_proj"):
        return mixed
    return _child(block, ATTN_NAMES, name, "an attention module")


def _of_model(model: nn.Module, name: str) -> Site:
    method = {"embed": "get_input_embeddings", "final": "get_output_embeddings"}[name]
    module = getattr(model, method, lambda: None)()
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"site {name}: expected {type(model).__name__}.{method}() to give a module, got "
            f"{type(module).__name__}; give the site as a module path"
        )
    return Site(name, module, "in" if name == "final" else "out")


def _columns(model: nn.Module, attention: nn.Module, out: nn.Module, name: str, head: int) -> slice:
    """Return the columns of a head in the input of the output projection."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    of = (attention, getattr(attention, "config", None), text)
    names = ("num_heads", "num_attention_heads", "n_heads", "n_head")
    counts = (getattr(x, key, None) for x in of for key in names)
    heads = next((n for n in counts if isinstance(n, int) and n > 0), None)
    width = getattr(out, "in_features", None)
    if width is None and getattr(out, "weight", None) is not None:
        width = out.weight.shape[0]  # type: ignore[index]  # Conv1D: [in, out]
    if heads is None or not isinstance(width, int) or width % heads:
        raise ValueError(
            f"site {name}: expected the number of heads and a width that it divides, got {heads} "
            f"heads and a width of {width}"
        )
    if head >= heads:
        raise ValueError(f"site {name}: expected a head in 0..{heads - 1}, got {head}")
    size = width // heads
    return slice(head * size, (head + 1) * size)


def _child(parent: nn.Module, names: tuple[str, ...], site: str, what: str) -> nn.Module:
    children = dict(parent.named_children())
    for name in names:
        first, _, rest = name.partition(".")
        if first in children and (not rest or hasattr(children[first], rest)):
            return children[first].get_submodule(rest) if rest else children[first]
    raise ValueError(
        f"site {site}: expected {what} named {', '.join(names)} in {type(parent).__name__}, "
        f"which has {', '.join(children) or 'no children'}; give the site as a module path"
    )


def by_path(model: nn.Module, name: str) -> Site:
    """Return the site of a plain path; nothing is checked but that there is such a module."""
    path, _, side = name.partition(":")
    if side not in ("", "in", "out"):
        raise ValueError(f"site {name}: expected PATH:in or PATH:out, got :{side}")
    module, done = model, type(model).__name__
    for part in path.split("."):
        children = dict(module.named_children())
        if part not in children:
            listed = ", ".join(list(children)[:12]) + (", ..." if len(children) > 12 else "")
            kinds = [f"{kind}.L" for kind in BLOCK_KINDS] + ["head.L.H", "expert.L.E", *MODEL_KINDS]
            raise ValueError(
                f"site {name}: expected {', '.join(kinds)} or a module path; {done} has no "
                f"{part!r}, it has {listed or 'no children'}"
            )
        module, done = children[part], part if module is model else f"{done}.{part}"
    return Site(name, module, side or "out")
