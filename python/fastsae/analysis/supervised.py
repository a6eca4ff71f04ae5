"""Supervised dictionaries: activations of a task as sums of vectors, one for each attribute.

    a_hat = mean a + sum_i u_{i=v_i}            v_i: the value of attribute i in the prompt

    mean code    u_{i=v} = mean of a over the prompts with a_i = v, minus mean a
    MSE code     the u that minimize sum |a - a_hat|^2, by least squares

They say how well a dictionary can do that knows the attributes, at this site of this model: what an
SAE is compared with. Where attributes are independent, the two codes agree in the limit.

Source: Makelov et al. 2024, "Towards principled evaluations of sparse autoencoders for
interpretability and control" (arXiv 2405.08366), section 3. Ours: MSE codes are moved to mean 0
over the prompts, attribute by attribute, as mean codes are; a_hat does not depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

CODES = ("mse", "mean")


@dataclass(frozen=True)
class SupervisedDictionary:
    """What `supervised_dictionary` fitted; float64, on the CPU."""

    mean: Tensor
    """`[d]`, mean activation."""
    vectors: dict[str, Tensor]
    """By attribute `[values, d]`; nan for a value that no prompt had."""

    def reconstruct(self, attributes: Mapping[str, Tensor]) -> Tensor:
        """Return a_hat of prompts: float64 `[n, d]`.

        Args:
            attributes: of each one its value in every prompt, int64 `[n]`.

        Raises:
            ValueError: not the attributes of the dictionary, or a value that no prompt had.
        """
        if set(attributes) != set(self.vectors):
            raise ValueError(
                f"supervised: expected attributes {', '.join(self.vectors)}, got "
                f"{', '.join(attributes)}"
            )
        return self.mean + sum(self.vector(name, x) for name, x in attributes.items())

    def edit(self, x: Tensor, attribute: str, old: Tensor, new: Tensor) -> Tensor:
        """Return activations with another value of one attribute: float64 `[n, d]`.

            a - u_{i=old} + u_{i=new}

        Args:
            x: `[n, d]`, activations.
            attribute: which.
            old: int64 `[n]`, the value that each prompt has.
            new: int64 `[n]`, the one to give it.
        """
        return x.double().cpu() - self.vector(attribute, old) + self.vector(attribute, new)

    def vector(self, attribute: str, values: Tensor) -> Tensor:
        """Return u of values of an attribute: float64 `[n, d]`."""
        found = self.vectors[attribute][values.cpu()]
        if bool(found.isnan().any()):
            missing = values.cpu()[found.isnan().any(1)][0]
            raise ValueError(
                f"supervised: expected values of {attribute} that were fitted, got {int(missing)}"
            )
        return found

    def norms(self) -> dict[str, float]:
        """Return the root mean square norm of the vectors of each attribute, values alike."""
        return {
            name: float(u[~u.isnan().any(1)].square().sum(1).mean().sqrt())
            for name, u in self.vectors.items()
        }


def supervised_dictionary(
    x: Tensor,
    attributes: Mapping[str, Tensor],
    *,
    sizes: Mapping[str, int] | None = None,
    code: str = "mse",
) -> SupervisedDictionary:
    """Fit a supervised dictionary.

    Args:
        x: `[n, d]`, activations of n prompts; n should be many times the number of all values.
        attributes: of each one its value in every prompt, int64 `[n]`, from 0 on.
        sizes: how many values each attribute has; None: one more than the largest.
        code: "mse" | "mean".

    Raises:
        ValueError: another code, or a shape or value that does not fit.

    Numerics: float64. Least squares by a pseudo-inverse of the normal equations, since the one-hot
    columns of an attribute always depend on those of another; a_hat is unique, and so are
    differences of vectors of one attribute, where prompts connect its values.
    """
    if code not in CODES:
        raise ValueError(f"supervised: expected code to be mse or mean, got {code!r}")
    if x.ndim != 2 or not len(x) or not attributes:
        raise ValueError(
            f"supervised: expected x to be [n, d] with n > 0, and attributes, got {[*x.shape]} and "
            f"{len(attributes)} attributes"
        )
    a = x.detach().double().cpu()
    hot = {
        name: _one_hot(name, values.cpu(), len(a), None if sizes is None else sizes[name])
        for name, values in attributes.items()
    }
    mean = a.mean(0)
    centered = a - mean
    counts = {name: z.sum(0) for name, z in hot.items()}
    if code == "mean":
        vectors = {name: (z.T @ centered) / counts[name][:, None] for name, z in hot.items()}
        return SupervisedDictionary(mean, vectors)
    z = torch.cat(list(hot.values()), 1)
    z = z - z.mean(0)
    u = torch.linalg.pinv(z.T @ z, rtol=1e-10, hermitian=True) @ (z.T @ centered)
    vectors = {}
    for name, part in zip(hot, u.split([x.shape[1] for x in hot.values()]), strict=True):
        share = counts[name] / len(a)
        own = part - share @ part
        vectors[name] = torch.where((share > 0)[:, None], own, torch.nan)
    return SupervisedDictionary(mean, vectors)


def _one_hot(name: str, values: Tensor, n: int, size: int | None) -> Tensor:
    """Return float64 `[n, size]`."""
    if values.dtype != torch.int64 or values.shape != (n,):
        raise ValueError(
            f"supervised: expected {name} to be int64 [{n}], got {values.dtype} {[*values.shape]}"
        )
    size = int(values.max()) + 1 if size is None else size
    if int(values.min()) < 0 or int(values.max()) >= size:
        raise ValueError(
            f"supervised: expected values of {name} in 0..{size - 1}, got "
            f"{int(values.min())}..{int(values.max())}"
        )
    return F.one_hot(values, size).double()
