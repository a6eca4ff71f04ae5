"""What the rows of a model are about: text, class tokens, registers, patches of images, sound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastsae.models.blocks import look_up
from fastsae.models.probe import evaluating
from fastsae.models.read import read
from fastsae.models.sites import Site

KINDS = ("unknown", "text", "class", "register", "patch", "frame")
"""By their codes. "class" is any learned token that is no register, also that of distillation;
"frame" a piece of sound."""
MAIN = {"pixel_values": "patch", "input_features": "frame", "input_values": "frame"}
"""Main input of a model -> kind of the rows that are made of it."""
PLACEHOLDERS = {"image": "patch", "video": "patch", "audio": "frame"}
"""Tokens of a text in whose place an image or sound is put -> their kind."""


def kinds_of(model: nn.Module, inputs: Mapping[str, Any], shape: tuple[int, int]) -> Tensor:
    """Return the kind of every row that a model gives for some inputs.

    Of a text, placeholders of images are told by their ids, as the config names them. Of images and
    sound, rows that are the same for different inputs, before the first block, are learned tokens:
    registers, as many as the config says, come after class tokens; all others are patches or
    frames. Where blocks are not found, kinds are unknown.

    Args:
        model: a model of `transformers`.
        inputs: arguments of its forward pass, on its device.
        shape: n and t of the rows.

    Returns:
        `[n, t]`, uint8, places in `KINDS`; on the CPU.
    """
    ids = inputs.get("input_ids")
    if isinstance(ids, Tensor) and ids.shape == shape:
        return _of_text(model, ids.cpu())
    name = getattr(model, "main_input_name", "input_ids")
    unknown = torch.zeros(shape, dtype=torch.uint8)
    if name not in MAIN or not isinstance(inputs.get(name), Tensor):
        return unknown
    learned = _learned(model, name, inputs, shape[1])
    if learned is None:
        return unknown
    kinds = torch.full((shape[1],), KINDS.index(MAIN[name]), dtype=torch.uint8)
    config: Any = getattr(model, "config", None)
    count = getattr(getattr(config, "vision_config", config), "num_register_tokens", None) or 0
    places = learned.nonzero().flatten()
    if count > len(places):
        kinds[places] = KINDS.index("unknown")
    else:
        kinds[places[: len(places) - count]] = KINDS.index("class")
        kinds[places[len(places) - count :]] = KINDS.index("register")
    return kinds.expand(shape).clone()


def real_rows(model: nn.Module, inputs: Mapping[str, Any], shape: tuple[int, int]) -> Tensor:
    """Return which rows are no padding, as the mask among the inputs says.

    A mask of sound counts samples or frames before the model has made fewer of them: the model says
    which of its rows are made of real ones, or a row is real where one of its frames is.

    Args:
        model: a model of `transformers`.
        inputs: as in `kinds_of`; "attention_mask" or "pixel_attention_mask" is `[n, m]`.
        shape: n and t of the rows.

    Returns:
        bool `[n, t]`, on the CPU.

    Raises:
        ValueError: the mask is of a shape that does not say so.
    """
    names = ("attention_mask", "pixel_attention_mask")
    name = next((name for name in names if isinstance(inputs.get(name), Tensor)), None)
    if name is None:
        return torch.ones(shape, dtype=torch.bool)
    mask = inputs[name]
    if tuple(mask.shape) == shape:
        return mask.bool().cpu()  # type: ignore[no-any-return]
    n, t = shape
    ours: Any = getattr(model, "_get_feature_vector_attention_mask", None)
    if ours is not None and mask.ndim == 2:
        made: Tensor = ours(t, mask)
        if tuple(made.shape) == shape:
            return made.bool().cpu()
    if mask.ndim == 2 and len(mask) == n and mask.shape[1] % t == 0:
        return mask.view(n, t, -1).bool().any(-1).cpu()  # type: ignore[no-any-return]
    raise ValueError(
        f"harvest: expected {name} [{n}, {t}], or [{n}, m] for a multiple m of {t}, got "
        f"{[*mask.shape]}"
    )


def _of_text(model: nn.Module, ids: Tensor) -> Tensor:
    kinds = torch.full(ids.shape, KINDS.index("text"), dtype=torch.uint8)
    config: Any = getattr(model, "config", None)
    for what, kind in PLACEHOLDERS.items():
        for ending in ("token_id", "token_index"):
            token = getattr(config, f"{what}_{ending}", None)
            if isinstance(token, int):
                kinds[ids == token] = KINDS.index(kind)
    return kinds


def _learned(model: nn.Module, name: str, inputs: Mapping[str, Any], t: int) -> Tensor | None:
    """Return which of t rows do not depend on the main input, None where nobody knows."""
    given: Tensor = inputs[name][:1]
    generator = torch.Generator().manual_seed(0)
    other = torch.randn((2, *given.shape[1:]), generator=generator).to(given)
    try:
        block = look_up(model).modules[0]
        site = Site("first", block, "in")
        with evaluating(model):
            x = read(model, [site], {name: other})["first"]
    except (ValueError, RuntimeError):  # no blocks, or they need more inputs
        return None
    if x.ndim != 3 or x.shape[1] != t:
        return None
    return (x[0] == x[1]).all(-1).cpu()
