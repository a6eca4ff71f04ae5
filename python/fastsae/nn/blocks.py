"""What SAEs have in common whose data are several blocks of columns, each with its own scale."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsae.nn.sae import SAE
from fastsae.types import SparseActs


class BlockwiseSAE(SAE, register=False):
    """The base of `TranscoderRule` and `CrossCoderRule`.

    Scales of blocks change matrices, not biases alone. A module that was never trained has no units
    yet: its matrices are what training should start from, so there folding does nothing.
    """

    FOLDS_MATRICES = True

    trained: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trained = torch.zeros((), dtype=torch.bool, device=self.b_enc.device)
        self.register_buffer("trained", trained)

    def encode_for_loss(self, x: Tensor) -> SparseActs:
        if self.training:
            self.trained.fill_(True)
        return super().encode_for_loss(x)

    @torch.no_grad()
    def fold_input_scales_(self, scales: Sequence[float]) -> None:
        """Turn a module trained on blocks times `scales` into one for raw data.

        Raises:
            ValueError: a scale is not a positive finite number.
        """
        if not all(0 < scale < math.inf for scale in scales):
            self._fail(f"scales above 0 and finite, got {[*scales]}")
        if bool(self.trained):
            self._fold(scales)

    @abstractmethod
    def _fold(self, scales: Sequence[float]) -> None: ...

    def learned(self) -> dict[str, Any]:
        """Return what training learned beside the tensors."""
        return {**super().learned(), "trained": bool(self.trained)}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        """Take from a saved module whether it was trained."""
        super().restore(tensors, learned)
        self.trained.fill_(learned["trained"])
