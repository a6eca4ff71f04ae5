"""From the name of a site to the site, checked."""

from __future__ import annotations

from torch import nn

from fastsae.models.check import checked
from fastsae.models.sites import Site, by_path, is_named


def resolve(model: nn.Module, name: str) -> Site:
    """Find a site in a model, and check that it is what its name says.

    A check takes about ten forward passes of eight tokens; its verdict is kept with the model. A
    plain path is not checked.

    Args:
        model: a model of `transformers`, or any module for a plain path.
        name: a site as described in `fastsae.models.sites`.

    Raises:
        ValueError: the model has no such site, or what it has under this name is something else;
            the message says what.
    """
    if not is_named(name):
        return by_path(model, name)
    return checked(model, name)
