"""What every format turns its files into: the tensors and settings of one SAE, and the SAE of them.

A format reads its files into a `Weights`, whose methods are the steps that formats share (fold a
scale, fold norms), computed in float64 and rounded once in the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae._files.read import printable
from fastsae.nn import (
    SAE,
    BatchTopKSAE,
    BatchTopKTranscoder,
    GatedSAE,
    GroupMaxSAE,
    GroupMaxTranscoder,
    JumpReLUSAE,
    JumpReLUTranscoder,
    NormalizedSAE,
    ReLUSAE,
    ReLUTranscoder,
    TopKSAE,
    Transcoder,
)
from fastsae.nn.transcoder import TranscoderMixin

MOST_LISTED, LONGEST = 12, 300
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SMALLEST_THRESHOLD = 1e-37
"""What a threshold of 0 or less becomes in a JumpReLU, whose logarithm is finite; nothing is active
at or below 0 anyway."""
TRANSCODERS: dict[type[SAE], type[SAE]] = {
    ReLUSAE: ReLUTranscoder,
    JumpReLUSAE: JumpReLUTranscoder,
    TopKSAE: Transcoder,
    BatchTopKSAE: BatchTopKTranscoder,
    GroupMaxSAE: GroupMaxTranscoder,
}
"""The transcoder that selects as an SAE does."""


@dataclass(frozen=True)
class Options:
    """How the caller wants to have it."""

    device: torch.device | str = "cpu"
    dtype: torch.dtype | None = None
    """Of the parameters; None: as stored."""
    layer: int | None = None
    """Which one of a file or folder with several."""
    k: int | None = None
    """Active latents, where files do not say."""
    threshold: float | None = None
    """Of all latents, where files do not say."""
    allow_pickle: bool = False
    """Whether a file may run code while it is read."""


@dataclass
class Weights:
    """One SAE as a file has it: `f = select((x - b_dec) W_enc + b_enc)`, `f W_dec + b_dec`."""

    where: Path
    """The file, for messages."""
    W_enc: Tensor
    """[d_in, d_sae]"""
    W_dec: Tensor
    """[d_sae, d_out]"""
    b_enc: Tensor
    """[d_sae]"""
    b_dec: Tensor
    """[d_out]"""
    threshold: Tensor | None = None
    """[] or [d_sae]: latents are active above it, and above 0."""
    inclusive: bool = False
    """Whether they are active at the threshold as well."""
    b_mag: Tensor | None = None
    """[d_sae], of a gated SAE, like r_mag; b_enc is then the gate's."""
    r_mag: Tensor | None = None
    W_skip: Tensor | None = None
    """[d_out, d_in]"""
    apply_b_dec_to_input: bool = True
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        stored = self.W_enc.dtype
        self.stored_dtype = stored if stored in FLOATS else torch.float32
        for name in ("W_enc", "W_dec"):
            tensor = getattr(self, name)
            if tensor.ndim != 2 or not is_plain(tensor):
                raise self.wrong(f"{name} to be a floating matrix", tensor)
        self.d_in, self.d_sae = self.W_enc.shape
        self.d_out = self.W_dec.shape[1]
        shapes = {"W_dec": (self.d_sae, self.d_out), "b_enc": (self.d_sae,), "b_dec": (self.d_out,)}
        shapes |= {"b_mag": (self.d_sae,), "r_mag": (self.d_sae,)}
        shapes |= {"W_skip": (self.d_out, self.d_in)}
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is not None and (tensor.shape != shape or not is_plain(tensor)):
                raise self.wrong(f"{name} to be floating {[*shape]}", tensor)
        threshold = self.threshold
        if threshold is not None and (
            threshold.shape not in ((), (self.d_sae,)) or not is_plain(threshold)
        ):
            raise self.wrong(f"threshold to be floating, [] or [{self.d_sae}]", threshold)

    def wrong(self, expected: str, got: Any) -> ValueError:
        """Return the error that says what was expected of the file."""
        if isinstance(got, Tensor):
            got = f"{str(got.dtype).removeprefix('torch.')} {[*got.shape]}"
        return ValueError(f"load: expected {expected} in {self.where}, got {got}")

    def expect_width(self, d_model: int) -> None:
        """Raise ValueError unless inputs and outputs are as wide as the file says."""
        if (self.d_in, self.d_out) != (d_model, d_model):
            raise self.wrong(f"[d_in, d_out] = {[d_model, d_model]}", [self.d_in, self.d_out])

    def norms(self) -> Tensor:
        """Return the norms of the rows of W_dec: [d_sae], float64."""
        norms: Tensor = torch.linalg.vector_norm(self.W_dec.double(), dim=1)
        return norms

    def fold_norms(self) -> None:
        """Make rows of W_dec norm 1, and the code larger by what they had; rows of zeros stay.

        Pre-activations are multiplied by the norms, thresholds are not: they are what the scaled
        ones are compared with.
        """
        norm = self.norms()
        norm = torch.where(norm > 0, norm, 1)
        self.W_enc = self.W_enc.double() * norm
        self.b_enc = self.b_enc.double() * norm
        self.W_dec = self.W_dec.double() / norm.unsqueeze(1)
        if self.b_mag is not None:
            self.b_mag = self.b_mag.double() * norm

    def compare_by_norm(self) -> None:
        """Make thresholds those of pre-activations, where the file compares these times the norms
        of rows of W_dec with them; with a row of zeros, a latent is never active."""
        if self.threshold is None:
            raise self.wrong("a threshold", "none")
        norm = self.norms()
        never = torch.full_like(norm, torch.inf)
        self.threshold = torch.where(norm > 0, self.threshold.double() / norm, never)

    def fold_scale(self, scale_in: float, scale_out: float | None = None) -> None:
        """Make an SAE of `scale_in * x` with outputs `scale_out * y` one of x and y; same code."""
        scale_out = scale_in if scale_out is None else scale_out
        if scale_in != scale_out:  # b_dec could only be of one of them
            self._shift_input()
        self.W_enc = self.W_enc.double() * scale_in
        self.W_dec = self.W_dec.double() / scale_out
        self.b_dec = self.b_dec.double() / scale_out
        if self.W_skip is not None:
            self.W_skip = self.W_skip.double() * (scale_in / scale_out)

    def build(
        self,
        cls: type[SAE],
        options: Options,
        *,
        normalize_activations: str = "none",
        reshape_activations: str = "none",
        transcoder: bool = False,
        **arguments: Any,
    ) -> SAE | NormalizedSAE:
        """Return the module in eval mode.

        Args:
            cls: of SAEs; with `transcoder`, with W_skip or with another width of the output, the
                transcoder that selects as it does.
            options: dtype and device.
            normalize_activations: as of `NormalizedSAE`.
            reshape_activations: as of `NormalizedSAE`.
            transcoder: whether x is not what is reconstructed.
            arguments: of the class, besides sizes.

        Raises:
            ValueError: there is no such class.
        """
        if transcoder or self.W_skip is not None or self.d_out != self.d_in:
            if cls not in TRANSCODERS:
                raise self.wrong(f"an SAE, as there is no transcoder of {cls.__name__}", "one")
            cls = TRANSCODERS[cls]
            self._shift_input()
            arguments |= {"d_out": self.d_out, "skip": self.W_skip is not None}
        else:
            arguments["apply_b_dec_to_input"] = self.apply_b_dec_to_input
        dtype = options.dtype or self.stored_dtype
        with torch.random.fork_rng(devices=[]):
            try:
                sae = cls(d_in=self.d_in, d_sae=self.d_sae, dtype=dtype, **arguments)
            except (TypeError, ValueError) as error:
                raise ValueError(f"load: {self.where}: {error}") from None
        with torch.no_grad():
            self._fill(sae)
        sae.metadata = self.metadata
        sae = sae.to(options.device).eval()
        if normalize_activations == "none" and reshape_activations == "none":
            return sae
        return NormalizedSAE(sae, normalize_activations, reshape_activations).eval()

    def _shift_input(self) -> None:
        """Put what is subtracted from x into b_enc; a transcoder's b_dec is of the output alone."""
        if self.apply_b_dec_to_input and self.d_out != self.d_in:
            raise self.wrong(f"W_dec to be [d_sae, {self.d_in}], as b_dec is of x", self.W_dec)
        if self.apply_b_dec_to_input:
            shift = self.b_dec.double() @ self.W_enc.double()
            self.b_enc = self.b_enc.double() - shift
            self.apply_b_dec_to_input = False

    def _threshold(self) -> Tensor | None:
        """Return what latents are active above."""
        if self.threshold is None or not self.inclusive:
            return self.threshold
        exact = self.threshold.float()
        return torch.nextafter(exact, torch.full_like(exact, -torch.inf))

    def _fill(self, sae: SAE) -> None:
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            setattr(sae, name, getattr(self, name))
        threshold = self._threshold()
        if isinstance(sae, JumpReLUSAE):
            if threshold is None:
                raise self.wrong("a threshold", "none")
            # Nothing is active at or below 0, whatever a threshold below it says.
            sae.log_threshold.copy_(threshold.double().clamp_min(SMALLEST_THRESHOLD).log())
            sae.thresholds_in_units = False
        elif isinstance(sae, BatchTopKSAE):
            if threshold is None or threshold.ndim:
                raise self.wrong("one threshold for all latents", threshold)
            sae.threshold.copy_(threshold.clamp_min(0))
        if isinstance(sae, GatedSAE):
            if self.b_mag is None or self.r_mag is None:
                raise self.wrong("b_mag and r_mag", "none")
            sae.b_mag.copy_(self.b_mag)
            sae.r_mag.copy_(self.r_mag)
        if isinstance(sae, TranscoderMixin) and self.W_skip is not None:
            sae.W_skip.copy_(self.W_skip)


def take(tensors: Mapping[str, Tensor], names: Mapping[str, str], where: Path) -> dict[str, Any]:
    """Return tensors of a file under other names.

    Args:
        tensors: of the file.
        names: of a `Weights`, by what they are called in the file.
        where: the file.

    Raises:
        ValueError: one is missing.
    """
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(
            f"load: expected {where} to hold {', '.join(missing)}, got {listed(tensors)}"
        )
    return {own: tensors[name] for name, own in names.items()}


def transposed(matrix: Tensor, name: str, where: Path) -> Tensor:
    """Return the transpose of a matrix of a file.

    Raises:
        ValueError: it is none.
    """
    if matrix.ndim != 2:
        raise ValueError(f"load: expected {name} to be a matrix in {where}, got {[*matrix.shape]}")
    return matrix.t()


def is_held(tensor: Tensor) -> bool:
    """Return whether a tensor of a file holds all its numbers, in memory; pickled ones may not."""
    strided = tensor.layout == torch.strided and not tensor.is_quantized
    return strided and tensor.device.type == "cpu"


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor of a file holds floating numbers, all of them, in memory."""
    return is_held(tensor) and tensor.is_floating_point()


def listed(names: Iterable[str]) -> str:
    """Return the names of what a file holds for one line of a message."""
    held = sorted(printable(name) for name in names)
    text = ", ".join(held[:MOST_LISTED]) + (", ..." if len(held) > MOST_LISTED else "")
    return text[:LONGEST] or "nothing"


def facts(**values: Any) -> dict[str, str]:
    """Return what a file says of its model: the values that are text."""
    return {name: value for name, value in values.items() if isinstance(value, str) and value}


def refuse(where: Path, what: str) -> ValueError:
    """Return the error of a file that no class computes."""
    return ValueError(f"load: {where} cannot be represented: {printable(what)[:LONGEST]}")
