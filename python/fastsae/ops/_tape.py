"""What a training step records in place of gradients of matrices.

The gradient of an encoder or a decoder matrix is a sum of rows of activations, weighted by the
entries of a code. `sparse_adam_step_` forms these sums itself, latent by latent, so that whoever
calls it needs the entries and not the sum: while a tape is recording, the backward of an op that is
given one of its matrices hands them over, and gives that matrix no gradient. What the tape cannot
take remains a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fastsae.ops._rounded import Copies
from fastsae.types import StepTensors


class Entries(NamedTuple):
    """One sum: that of latent `indices[j]` has `values[j]` times the row of `x` that j is in."""

    values: Tensor
    indices: Tensor
    offsets: Tensor | None
    x: Tensor
    """[n, d], b_dec not subtracted"""
    code: Tensor | None = None
    """Of an encoder, what it returned, like `values`: these are 0 wherever it is."""


class Tape:
    """The sums that one step leaves for the two matrices of a dictionary."""

    def __init__(
        self, parameters: StepTensors, centered: bool, buffers: dict[str, Tensor] | None = None
    ) -> None:
        self.parameters = parameters
        self.buffers = {} if buffers is None else buffers
        """Memory that stays from step to step: new pages cost more than what is written to them."""
        self.centered = centered
        """Whether b_dec is subtracted from what is encoded."""
        self.encoder: list[Entries] = []
        """With what b_enc gets, and b_dec if `centered`."""
        self.decoder: list[Entries] = []
        self.recording = False
        self.copies = Copies()
        """Of W_enc for an encoder that rounds it, and of W_dec for its decoder."""
        self.rows: tuple[Tensor, list[Tensor]] | None = None
        """Latents, and copies of their rows of W_enc, W_dec and b_enc: leaves of the graph."""

    def buffer(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return uninitialized memory, the same in every step of a run."""
        size = math.prod(shape)
        held = self.buffers.get(name)
        if held is None or held.numel() < size or held.dtype != like.dtype:
            held = self.buffers[name] = like.new_empty(size)
        return held[:size].view(*shape)

    def copy_rows(self, latents: Tensor) -> list[Tensor]:
        """Return leaves with the rows of `latents: [e]`, whose gradients the step takes as such.

        They stand for their part of b_dec in the encoder too, which needs no gradient of its own.
        """
        assert self.rows is None, "one auxiliary loss in a step"
        tensors = (self.parameters.W_enc, self.parameters.W_dec, self.parameters.b_enc)
        leaves = [t.detach().index_select(0, latents).requires_grad_() for t in tensors]
        self.rows = latents, leaves
        return leaves


_open: dict[int, Tape] = {}
"""By the address of a matrix: a backward may run in another thread."""


@contextmanager
def opened(
    dictionaries: Sequence[StepTensors], centered: bool, buffers: dict[str, Tensor] | None = None
) -> Iterator[list[Tape]]:
    """Open a tape for each dictionary of a training step.

    Args:
        dictionaries: their parameters.
        centered: whether b_dec is subtracted from what is encoded.
        buffers: what a step has left for the next one.

    Raises:
        RuntimeError: another step is under way on one of the matrices.
    """
    tapes = [Tape(parameters, centered, buffers) for parameters in dictionaries]
    places = {_place(W): tape for tape in tapes for W in tape.parameters[:2]}
    if len(places) != 2 * len(tapes) or places.keys() & _open.keys():
        raise RuntimeError("fastsae: expected one step at a time, on two matrices of their own")
    _open.update(places)
    try:
        yield tapes
    finally:
        for place in places:
            del _open[place]


@contextmanager
def recorded(tapes: Sequence[Tape]) -> Iterator[None]:
    """Record what a backward inside leaves."""
    for tape in tapes:
        tape.recording = True
    try:
        yield
    finally:
        for tape in tapes:
            tape.recording = False


def is_open() -> bool:
    """Return whether a training step with tapes is under way."""
    return bool(_open)


def of(matrix: Tensor) -> Tape | None:
    """Return the open tape of a matrix, if it has one."""
    tape = _open.get(_place(matrix)) if _open else None
    known = tape is not None and any(matrix.shape == own.shape for own in tape.parameters[:2])
    return tape if known else None


def rounded(matrix: Tensor) -> Tensor:
    """Return the bfloat16 copy of a matrix that is to be rounded, or itself where there is none or
    it is not of what the matrix holds."""
    tape = of(matrix)
    copy = None if tape is None else tape.copies.W_enc
    return matrix if copy is None or not copy.is_of(matrix) else copy.copy


def decoder_copy(W_dec: Tensor) -> Tensor | None:
    """Return the bfloat16 copy of W_dec that its decoder reads in this step, made anew where it is
    not of what W_dec holds; None where the decoder reads W_dec."""
    tape = of(W_dec)
    if tape is None or tape.copies.W_dec is None:
        return None
    if _place(W_dec) != _place(tape.parameters.W_dec):
        return None
    tape.copies.W_dec.refresh(W_dec)
    return tape.copies.W_dec.copy


def take_decoder(
    W_dec: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None, grad: Tensor
) -> bool:
    """Record that W_dec gets the sum of `values` times the rows of `grad`; False without a tape."""
    tape = _recording(W_dec)
    if tape is None or _place(tape.parameters.W_dec) != _place(W_dec):
        return False
    if values.numel() or offsets is not None:
        tape.decoder.append(Entries(values, indices, offsets, grad))
    return True


def take_encoder(
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    grad: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    x: Tensor,
    code: Tensor,
) -> bool:
    """Record that all three get what the gradient `grad` of `(x - b_dec) W_enc^T + b_enc` in these
    entries, which is 0 where their values `code` are, gives them; False without a tape, or where it
    would have to give something else."""
    tape = _recording(W_enc)
    if tape is None or b_enc is None:
        return False
    own = tape.parameters
    known = _place(W_enc) == _place(own.W_enc) and _place(b_enc) == _place(own.b_enc)
    if not known or (b_dec is not None and _place(b_dec) != _place(own.b_dec)):
        return False
    if tape.centered is not (b_dec is not None):
        return False
    tape.encoder.append(Entries(grad, indices, offsets, x, code))
    return True


def _recording(matrix: Tensor) -> Tape | None:
    tape = of(matrix)
    # A backward that builds a graph of its own is part of somebody's loss.
    return None if tape is None or not tape.recording or torch.is_grad_enabled() else tape


def _place(t: Tensor) -> int:
    return 0 if torch.compiler.is_compiling() else t.data_ptr()
