"""The base of every sparse autoencoder: encode, decode, and a loss without units.

    z     = (x - b_dec) W_enc + b_enc          pre-activations, never held as [n, d_sae]
    f     = select(relu(z))                    what a subclass chooses
    x_hat = f W_dec + b_dec
    loss  = fvu(x_hat, x) + auxk_alpha * aux_loss(dead latents) + sparsity_loss(f)

Source: Gao et al. 2024 (arXiv 2406.04093), section 2 and appendix A.2.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastsae import ops
from fastsae.nn.auxk import LatentRows, auxk_loss
from fastsae.nn.init import center
from fastsae.nn.loss import SAEOutput, unexplained, upcast
from fastsae.nn.parameters import Parameters
from fastsae.types import SparseActs


class SAE(Parameters, ABC):
    """A sparse autoencoder; subclasses say which latents stay active.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        dtype: of the four parameters.
        device: of the four parameters.
        k_aux: dead latents that reconstruct the residual of each token; None takes the power of
            two closest to d_in / 2 (Gao et al. 2024, appendix B.1).
        auxk_alpha: weight of that auxiliary loss; 0 turns it off.
        aux: whom it revives in training: `auxk`, the dead latents, or `zipf`, also those that fire
            far less than Zipf's law expects of their rank (`train.UnderusedLatents`).

    Raises:
        ValueError: a size below 1, k_aux above d_sae, a negative auxk_alpha, or another aux.
    """

    registry: ClassVar[dict[str, type[SAE]]] = {}
    FILE_NAMES: ClassVar[dict[str, str]] = {}
    """Parameters whose name in the weights file is another."""
    FOLDS_MATRICES: ClassVar[bool] = False
    """Whether `fold_input_scales_` changes W_enc or W_dec."""
    feature_major_update: bool = False
    """Whether the gradients of all parameters follow from those of the code, of the reconstruction
    and of the dead rows, as `loss_of` has them: what `sparse_adam_step_` needs."""

    def __init_subclass__(cls, register: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if register:
            SAE.registry[cls.__name__] = cls

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        k_aux: int | None = None,
        auxk_alpha: float = 1 / 32,
        aux: str = "auxk",
    ) -> None:
        super().__init__(d_in, d_sae, dtype, device)
        if k_aux is None:
            k_aux = min(d_sae, 2 ** max(0, round(math.log2(d_in / 2))))
        if not 1 <= k_aux <= d_sae:
            self._fail(f"1 <= k_aux <= d_sae = {d_sae}, got k_aux = {k_aux}")
        if not auxk_alpha >= 0:
            self._fail(f"auxk_alpha >= 0, got {auxk_alpha}")
        if aux not in ("auxk", "zipf"):
            self._fail(f"aux to be auxk or zipf, got {aux!r}")
        self.k_aux, self.auxk_alpha, self.aux = k_aux, auxk_alpha, aux
        self.compute_dtype: torch.dtype | None = None
        """What the encoder's product may round its factors to in training mode; see
        `ops.encode_topk`. Not saved: inference is exact."""
        self.sparsity_scale = 1.0
        """What `sparsity_loss` is multiplied by; the trainer raises it from 0 to 1 at the start."""
        self.progress = 0.0
        """How much of a run is done, 0..1, for losses that change; the trainer sets it."""
        self.metadata: dict[str, Any] = {}
        """Free-form facts saved along (model_name, hook_name, ...); JSON types only."""

    @abstractmethod
    def _encode(self, x: Tensor) -> SparseActs:
        """Select the active latents of `x: [n, d_in]`."""

    def encode_for_loss(self, x: Tensor) -> SparseActs:
        """Return the code of `x: [n, d_in]`, and learn from it what gradients do not teach."""
        return self._encode(x)

    def _product(self) -> torch.dtype | None:
        return self.compute_dtype if self.training else None

    def settle_(self, batches: Iterable[Tensor]) -> None:
        """Fix, from training inputs `[n, d_in]`, what inference needs beside the parameters."""

    @property
    def data_widths(self) -> tuple[int, ...]:
        """The column blocks of a training batch: here the activations alone, `(d_in,)`."""
        return (self.d_in,)

    def split(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is encoded and what is reconstructed of a training batch `[n, columns]`."""
        return batch, batch

    def batch_loss(self, batch: Tensor, dead: Tensor | None) -> SAEOutput:
        """Return the loss of a training batch; see `loss`."""
        return self.loss(batch, dead=dead)

    def encode_sparse(self, x: Tensor) -> SparseActs:
        """Return the sparse code of `x: [..., d_in]`, leading dimensions flattened to rows."""
        return self._encode(self._rows(x, "x"))

    def encode(self, x: Tensor) -> Tensor:
        """Return the dense code `[..., d_sae]` of `x: [..., d_in]`."""
        return self.encode_sparse(x).to_dense().reshape(*x.shape[:-1], self.d_sae)

    def decode(self, acts: Tensor | SparseActs) -> Tensor:
        """Return `acts W_dec + b_dec`: `[..., d_in]`, or `[n, d_in]` for sparse acts."""
        if acts.shape[-1] != self.d_sae:
            self._fail(f"acts to be [..., d_sae] with d_sae = {self.d_sae}, got {[*acts.shape]}")
        if isinstance(acts, SparseActs):
            return ops.sparse_decode(acts, self.W_dec, self.b_dec)
        return acts @ self.W_dec + self.b_dec

    def reconstruct(self, x: Tensor, acts: SparseActs) -> Tensor:
        """Return the reconstruction `[n, d_in]` from the code `acts` of `x: [n, d_in]`."""
        return self.decode(acts)

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction of `x: [..., d_in]`, in the same shape."""
        return self.decode(self.encode_sparse(x)).reshape(x.shape)

    def loss(
        self, x: Tensor, target: Tensor | None = None, *, dead: Tensor | None = None
    ) -> SAEOutput:
        """Compute the training loss of a batch.

            fvu      = sum |x - x_hat|^2 / sum |x - mean x|^2
            aux_loss = sum |e - e_hat|^2 / sum |e - mean e|^2,   e = x - x_hat, detached

        e_hat decodes the `min(k_aux, number dead)` largest dead latents of each token, without a
        bias. The denominators are constants of the batch, so the loss has no unit and the step size
        that Adam needs does not depend on the scale of x.

        Args:
            x: [..., d_in], in the dtype and on the device of the parameters.
            target: what to reconstruct, same shape; None means x.
            dead: bool [d_sae], the latents that the auxiliary loss revives; None or none True means
                that nothing is computed for it. On a GPU, counting them waits for the device.

        Raises:
            ValueError: wrong shape or device.
            TypeError: not a tensor, or another dtype.

        Gradients: the four parameters. The auxiliary term reaches the encoder and decoder rows of
        selected dead latents, and b_dec through the encoder's input.
        Numerics: sums in float32 (float64 for float64). A batch whose rows are all equal has no
        variance; its fvu is a very large finite number.
        Source: Gao et al. 2024, section 2.1 and appendix A.2; OpenAI's train.py.
        """
        rows = self._rows(x, "x")
        goal = rows if target is None else self._goal(target)
        if goal.shape[0] != rows.shape[0]:
            self._fail(f"target to have {rows.shape[0]} rows like x, got {goal.shape[0]}")
        out = self.loss_of(rows, goal, self.encode_for_loss(rows), self.dead_rows(dead))
        out.reconstruction = out.reconstruction.reshape((x if target is None else target).shape)
        return out

    def dead_rows(self, dead: Tensor | None) -> LatentRows | None:
        """Return the rows of dead latents that the auxiliary loss works on, None without any.

        Args:
            dead: bool [d_sae] or None.
        """
        if dead is None:
            return None
        if dead.shape != (self.d_sae,) or dead.dtype != torch.bool:
            self._fail(f"dead to be bool [{self.d_sae}], got {dead.dtype} {[*dead.shape]}")
        latents = dead.nonzero().squeeze(1) if self.auxk_alpha else dead.new_empty(0)
        if latents.numel() == 0:
            return None
        return LatentRows(
            latents,
            self._rows_enc().index_select(0, latents),
            self.W_dec.index_select(0, latents),
            self.b_enc.index_select(0, latents),
        )

    def loss_of(
        self, x: Tensor, target: Tensor, acts: SparseActs, dead: LatentRows | None
    ) -> SAEOutput:
        """Return the loss of `x, target: [n, d_in]` for a code that is already there.

        `loss` is this after encoding; an update that forms no gradients of the parameters takes
        those of `acts.values`, of `dead` and of the reconstruction from here.
        """
        cost = self.sparsity_loss(acts)
        sparsity = None if cost is None else self.sparsity_scale * cost
        return self._assemble(x, target, acts, self.decode(acts), sparsity, dead)

    def _assemble(
        self,
        x: Tensor,
        target: Tensor,
        acts: SparseActs,
        reconstruction: Tensor,
        sparsity: Tensor | None,
        dead: LatentRows | None,
    ) -> SAEOutput:
        """Return the loss of a reconstruction that is already there."""
        error = upcast(target) - upcast(reconstruction)
        squared = error.square().sum()
        fvu = unexplained(squared, target)
        loss, zero = fvu, fvu.new_zeros(())
        aux = zero
        if dead is not None:
            k = min(self.k_aux, dead.latents.shape[0])
            aux = auxk_loss(x, self._input_bias(), error.detach(), dead, k)
            loss = loss + self.auxk_alpha * aux
        if sparsity is not None:
            loss = loss + sparsity
        return SAEOutput(
            loss=loss,
            reconstruction=reconstruction,
            acts=acts,
            fvu=fvu,
            mse=squared.detach() / max(x.shape[0], 1),
            aux_loss=aux,
            sparsity_loss=zero if sparsity is None else sparsity,
        )

    def sparsity_loss(self, acts: SparseActs) -> Tensor | None:
        """Return what the code `acts` costs in the loss; None where selection bounds it."""
        return None

    def _input_bias(self) -> Tensor | None:
        """Return what is subtracted from x before the encoder."""
        return self.b_dec

    def _goal(self, target: Tensor) -> Tensor:
        """Check `target` and flatten its leading dimensions."""
        return self._rows(target, "target")

    def start_(self, batch: Tensor, method: str) -> None:
        """Set the biases from training rows, before the first update; see `init_b_dec`."""
        self.init_b_dec(batch, method)

    @torch.no_grad()
    def init_b_dec(self, x: Tensor, method: str = "geometric_median") -> None:
        """Set b_dec to the centre of `x: [..., d_in]`: its `geometric_median` or its `mean`.

        The geometric median minimises the mean distance to the rows, so a few rows of huge norm
        (attention sinks) hardly move it, whereas they drag the mean along.

        Raises:
            ValueError: x is empty or holds NaN or Inf, or the method is another.
        """
        self.b_dec.copy_(center(self._rows(x, "x"), method))

    @torch.no_grad()
    def fold_input_scale_(self, scale: float) -> None:
        """Turn an SAE trained on `scale * x` into one for `x`, which reconstructs the same rows.

        Divides b_enc and b_dec (and what a subclass measures in units of the activations) by
        `scale`; both matrices stay, so decoder rows keep their norm:
        sae_new(x) = sae_old(scale * x) / scale, and the code is divided by scale as well.

        Raises:
            ValueError: scale is not a positive finite number.
        """
        if not 0 < scale < math.inf:
            self._fail(f"0 < scale < inf, got {scale}")
        self.b_enc.div_(scale)
        self.b_dec.div_(scale)

    @torch.no_grad()
    def input_scales(self, batch: Tensor) -> list[float]:
        """Return what training multiplies each block of columns by: its mean squared distance from
        the mean becomes its width.

        Args:
            batch: [n, columns], raw rows.

        Raises:
            ValueError: all rows of a block are equal.
        """
        return [self._input_scale(block) for block in batch.split(self.data_widths, 1)]

    def _input_scale(self, block: Tensor) -> float:
        x = upcast(block)
        spread = float((x - x.mean(0)).square().sum(1).mean())
        if spread == 0:
            self._fail("activations that vary, got equal rows")
        return math.sqrt(x.shape[1] / spread)

    def fold_input_scales_(self, scales: Sequence[float]) -> None:
        """Undo `input_scales`: see `fold_input_scale_`, with a scale for each block of columns."""
        self.fold_input_scale_(scales[0])

    def error_scale(self, scales: Sequence[float]) -> float:
        """Return what the error of a reconstruction was multiplied by, given all scales."""
        return scales[0]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `sae_weights.safetensors` and `cfg.json` into the folder `path`; see `nn.io`."""
        from fastsae.nn.io import save

        save(self, path)

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments that `fastsae.load` rebuilds this module from."""
        keys = ("d_in", "d_sae", "k_aux", "auxk_alpha", "aux")
        return {key: getattr(self, key) for key in keys}

    @abstractmethod
    def export(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what SAELens needs besides the four parameters: keys of cfg.json, and tensors."""

    def learned(self) -> dict[str, Any]:
        """Return what training learned beside the tensors: JSON values for cfg.json; nothing."""
        return {}

    def restore(self, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        """Take from a saved file what is not one of the four parameters; nothing here.

        Args:
            tensors: of the weights file.
            learned: what `learned` returned.
        """

    def extra_repr(self) -> str:
        """Show the constructor arguments in `repr`."""
        return ", ".join(f"{key}={value}" for key, value in self.config().items())
