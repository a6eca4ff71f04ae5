"""A logistic head on sparse codes: the dictionary learns what labels need, too.

Source: Lee, Lyu and Yao 2022, "Supervised dictionary learning with auxiliary covariates"
(arXiv 2206.06774).
"""

from __future__ import annotations

from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsae import ops
from fastsae.nn.loss import upcast
from fastsae.types import SparseActs, accumulator_dtype


class SupervisedHead(nn.Module):
    """Logistic regression on the code of an SAE and on covariates that the SAE never sees.

        logits = f weight + bias + c covariate_weight
        loss   = mean cross-entropy of softmax(logits), or of sigmoid(logits) with one class

    Train it with an SAE, so that the code explains both the activations and the labels, while what
    the covariates c explain of the labels (position, source, ...) need not enter the dictionary:

        out = sae.loss(x)
        (out.loss + weight * head.loss(out.acts, y)).backward()

    `weight` is the inverse of the paper's xi. The gradient reaches the encoder through the values
    of the code, for the latents that are active. All parameters start at 0, so the first step
    trains the head alone.

    Args:
        d_sae: number of latents.
        classes: number of classes; 1 means binary, labels 0 and 1.
        covariates: number of covariates.
        dtype: of the parameters; that of the SAE.
        device: of the parameters.

    Raises:
        ValueError: d_sae or classes below 1, or covariates below 0.

    Source: Lee et al. 2022, the feature-based model, its a = beta^T h with h = f.
    """

    weight: Tensor
    """[d_sae, classes], one row per latent."""
    bias: Tensor
    """[classes]"""
    covariate_weight: Tensor
    """[covariates, classes]"""

    def __init__(
        self,
        d_sae: int,
        classes: int,
        covariates: int = 0,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if min(d_sae, classes) < 1 or covariates < 0:
            self._fail(
                "d_sae >= 1, classes >= 1 and covariates >= 0, "
                f"got {d_sae}, {classes} and {covariates}"
            )
        self.d_sae, self.classes, self.covariates = d_sae, classes, covariates

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))

        self.weight = zeros(d_sae, classes)
        self.bias = zeros(classes)
        self.covariate_weight = zeros(covariates, classes)

    def forward(self, acts: SparseActs, covariates: Tensor | None = None) -> Tensor:
        """Return the logits of n tokens, without a dense code.

        Args:
            acts: code of n tokens over d_sae latents; values in the dtype of the parameters, or in
                float32 for 16-bit ones.
            covariates: [n, covariates] in the dtype of the parameters; None without any.

        Returns:
            [n, classes] in the dtype of the parameters.

        Raises:
            TypeError: not the stated type or dtype.
            ValueError: shapes or devices do not fit.

        Gradients: the three parameters, `acts.values` and covariates; see `ops.sparse_decode`.
        """
        if not isinstance(acts, SparseActs):
            self._fail_type(f"acts to be SparseActs, got {type(acts).__name__}")
        if acts.d_sae != self.d_sae:
            self._fail(f"acts over d_sae = {self.d_sae} latents, got {acts.d_sae}")
        dtype = self.weight.dtype
        if acts.values.dtype not in (dtype, accumulator_dtype(dtype)):
            self._fail_type(f"acts.values to be {dtype} like weight, got {acts.values.dtype}")
        logits = ops.sparse_decode(acts, self.weight, self.bias)
        if covariates is None:
            if self.covariates:
                self._fail(f"covariates to be [{acts.n}, {self.covariates}], got None")
            return logits
        self._check("covariates", covariates, (acts.n, self.covariates), dtype)
        return logits + covariates @ self.covariate_weight

    def loss(self, acts: SparseActs, labels: Tensor, covariates: Tensor | None = None) -> Tensor:
        """Return the cross-entropy in nats, mean over tokens.

        Args:
            acts: as in `forward`.
            labels: int64 [n], each in 0..classes - 1, or 0..1 with one class.
            covariates: as in `forward`.

        Returns:
            [] in float32 (float64 for float64); 0 without tokens.

        Raises:
            TypeError: labels are not int64, and as in `forward`.
            ValueError: labels are not [n] or out of range, and as in `forward`. On a GPU, looking
                waits for the device.
        """
        logits = upcast(self(acts, covariates))
        self._check("labels", labels, (acts.n,), torch.int64)
        self._check_range(labels)
        if self.classes == 1:
            logit, label = logits.squeeze(1), labels.to(logits.dtype)
            total = F.binary_cross_entropy_with_logits(logit, label, reduction="sum")
        else:
            total = F.cross_entropy(logits, labels, reduction="sum")
        return total / max(acts.n, 1)

    def _check(self, name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if not isinstance(x, Tensor):
            self._fail_type(f"{name} to be a torch.Tensor, got {type(x).__name__}")
        if x.dtype != dtype:
            self._fail_type(f"{name} to be {dtype}, got {x.dtype}")
        if x.shape != shape:
            self._fail(f"{name} to be {[*shape]}, got {[*x.shape]}")
        if x.device != self.weight.device:
            self._fail(f"{name} to be on {self.weight.device}, got {x.device}")

    def _check_range(self, labels: Tensor) -> None:
        if labels.numel() == 0:
            return
        low, high = (int(end) for end in labels.aminmax())
        most = max(self.classes - 1, 1)
        if low < 0 or high > most:
            self._fail(f"labels in 0..{most}, got {low}..{high}")

    def _fail(self, expectation: str) -> NoReturn:
        raise ValueError(f"SupervisedHead: expected {expectation}")

    def _fail_type(self, expectation: str) -> NoReturn:
        raise TypeError(f"SupervisedHead: expected {expectation}")

    def extra_repr(self) -> str:
        """Show the constructor arguments in `repr`."""
        return f"d_sae={self.d_sae}, classes={self.classes}, covariates={self.covariates}"
