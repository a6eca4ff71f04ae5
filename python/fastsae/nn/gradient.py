"""Gradient sparse autoencoder: latents are chosen by their value and by their effect on the model.

Source: Olmo et al. 2024, "Features that make a difference: leveraging gradients for improved
dictionary learning" (arXiv 2411.10397). The paper's code is not public: the formula of the score is
theirs, its normalization is our addition.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae import ops
from fastsae.nn.context import STEP, StepContext
from fastsae.nn.loss import SAEOutput
from fastsae.nn.objective import dead_rows
from fastsae.nn.parameters import plain
from fastsae.nn.scaler import Columns
from fastsae.nn.topk import TopKSAE
from fastsae.types import SparseActs


class GradientSAE(TopKSAE):
    """TopK sparse autoencoder (g-SAE) whose selection also looks at the gradient g of the model.

        score = z + beta z a,   a_j = |<g, W_dec_j>|      relu(z) and its effect to first order
        f     = relu(z) at the k largest scores, else 0;  z = (x - b_dec) W_enc + b_enc

    g = dL/dx is the gradient of the summed next-token loss in the activation x. Values stay raw,
    and neither g nor W_dec gets a gradient through the score. Training data are x and g side by
    side, `[n, 2 d_in]`; `data.harvest(..., gradients=True)` stores both.

    At inference on text whose next token is the question, g is not known (and would leak it), so
    `encode(x)` selects by z alone; `encode_sparse(x, grad=g)` selects by the score. Report which
    one a number was measured with. See `SAE` for the other arguments.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        k: active latents per token.
        beta: weight of the gradient's part; 0 is TopK.
        normalize: `token` divides a by its mean over the latents of the token, so that beta = 1
            weighs both parts alike whatever the unit of g; `none` is the literal formula.

    Raises:
        ValueError: beta is negative or not finite, or another normalize.
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        *,
        beta: float = 1.0,
        normalize: str = "token",
        **kwargs: Any,
    ) -> None:
        super().__init__(d_in, d_sae, k, **kwargs)
        if not 0 <= beta < torch.inf:
            self._fail(f"0 <= beta < inf, got {beta}")
        if normalize not in ("token", "none"):
            self._fail(f"normalize to be token or none, got {normalize!r}")
        self.beta, self.normalize = plain(beta), normalize

    @property
    def columns(self) -> Columns:
        """The column blocks of a training batch: x and g."""
        return Columns((self.d_in,), extra=(self.d_in,))

    def training_loss(self, batch: Tensor, context: StepContext = STEP) -> SAEOutput:
        """Return the loss of x and g side by side, `[n, 2 d_in]`."""
        x, _, grad = self.columns.split(batch)
        return self.loss(x, grad=grad, context=context)

    def encode_sparse(self, x: Tensor, *, grad: Tensor | None = None) -> SparseActs:
        """Return the sparse code of `x: [..., d_in]`, leading dimensions flattened to rows.

        Args:
            x: activations.
            grad: dL/dx in the shape and dtype of x, or None for the selection by value alone.
        """
        rows = self._rows(x, "x")
        return self._scored(rows, grad)

    def loss(
        self,
        x: Tensor,
        target: Tensor | None = None,
        *,
        context: StepContext = STEP,
        grad: Tensor | None = None,
    ) -> SAEOutput:
        """Compute the loss of `SAE.loss` with the code that `encode_sparse(x, grad=grad)` gives."""
        rows, target = self._rows(x, "x"), x if target is None else target
        if (n := self._target_rows(target).shape[0]) != rows.shape[0]:
            self._fail(f"target to have {rows.shape[0]} rows like x, got {n}")
        acts = self._scored(rows, grad, context)
        return self.loss_of(rows, target, acts, dead_rows(self, context), context)

    def _scored(self, x: Tensor, grad: Tensor | None, context: StepContext = STEP) -> SparseActs:
        if grad is None:
            return self._largest(x, self.k, context)
        g = self._rows(grad, "grad")
        if g.shape != x.shape:
            self._fail(f"grad to have {x.shape[0]} rows like x, got {g.shape[0]}")
        if self.beta == 0:
            return self._largest(x, self.k, context)
        values, indices = ops.encode_gradient_topk(
            x,
            self.W_enc_rows,
            self.b_enc,
            self.k,
            grad=g,
            W_dec=self.W_dec,
            beta=self.beta,
            normalize=self.normalize == "token",
            b_dec=self._input_bias(),
            compute_dtype=context.compute_dtype,
        )
        return SparseActs(values, indices, None, self.d_sae)

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments that `fastsae.load` rebuilds this module from."""
        return {**super().config(), "beta": self.beta, "normalize": self.normalize}
