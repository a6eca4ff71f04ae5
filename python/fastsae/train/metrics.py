"""Metrics of a run: what is measured, and where it is written."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from fastsae._files.read import read_bytes
from fastsae._files.write import reason, write_atomic
from fastsae._log import logger
from fastsae.data.source import ActivationSource
from fastsae.nn import SAE, ActivationScaler, SAEOutput
from fastsae.train.outliers import inlier_mask
from fastsae.train.precision import bad_rows

METRICS = "metrics.jsonl"
Row = dict[str, float]
TIMED = ("seconds", "tokens_per_second")
"""What differs in the rows of two runs that are the same to the last bit."""


@torch.no_grad()
def fvu_no_outliers(x: Tensor, reconstruction: Tensor, outlier_norm: float) -> Tensor:
    """Return the FVU `[]` over the rows of `x: [n, d]` that are no outliers, without a host sync.

    A pooled FVU that includes attention sinks says how well they are reconstructed and little else.
    """
    weight = inlier_mask(x, outlier_norm).unsqueeze(1).float()
    error = ((x.float() - reconstruction.float()).square() * weight).sum()
    mean = (x.float() * weight).sum(0) / weight.sum()
    return error / ((x.float() - mean).square() * weight).sum()


def step_metrics(out: SAEOutput, target: Tensor, outlier_norm: float) -> Row:
    """Return the numbers of one update; `target: [n, d_out]` in the units of the reconstruction."""
    values = {
        "loss": out.loss,
        "fvu": out.fvu,
        "mse": out.mse,
        "aux_loss": out.aux_loss,
        "sparsity_loss": out.sparsity_loss,
        "l0": out.acts.l0(),
        "fvu_no_outliers": fvu_no_outliers(target, out.reconstruction, outlier_norm),
    }
    numbers = torch.stack([value.detach().double() for value in values.values()]).tolist()
    return dict(zip(values, numbers, strict=True))


@torch.no_grad()
def validate(
    sae: SAE, data: ActivationSource, batch_size: int, scaler: ActivationScaler | None = None
) -> Row:
    """Return pooled metrics of `sae`, which takes scaled data, over all of `data`, in eval mode.

    val_fvu = sum |x - x_hat|^2 / sum |x - mean x|^2 over all rows, val_mse in squared units of x,
    val_l0 the mean number of active latents. Sums are in float64.
    """
    training = sae.training
    sae.eval()
    device, dtype = sae.W_enc_rows.device, sae.W_enc_rows.dtype
    scaler = scaler or ActivationScaler(sae.columns)
    shift: Tensor | None = None
    linear: Tensor | float = 0.0
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # squared error, x^2, active
    rows = 0
    try:
        for batch in data.batches(batch_size, seed=None):
            if bad := bad_rows(batch):
                raise ValueError(
                    f"validate: expected finite validation data, got {bad} of rows {rows} to "
                    f"{rows + len(batch)} with NaN or Inf"
                )
            x, target, _ = sae.columns.split(scaler.scale(batch.to(device, dtype)))
            acts = sae.encode_sparse(x)
            shift = target.mean(0) if shift is None else shift  # sum x^2 - (sum x)^2 / n is exact
            centered = (target - shift).double()
            linear = linear + centered.sum(0)
            error = (target - sae.reconstruct(x, acts)).double().square().sum()
            sums += torch.stack([error, centered.square().sum(), acts.row_counts().sum().double()])
            rows += x.shape[0]
    finally:
        sae.train(training)
    if rows == 0:
        raise ValueError(
            "validate: expected at least one row of validation data, got none; an iterator can be "
            "read once only"
        )
    sums[2] = sae.parallel.sum_over_latents(sums[2])
    error_sum, square_sum, active = sums.tolist()
    total = square_sum - float(torch.as_tensor(linear).square().sum()) / max(rows, 1)
    return {
        "val_fvu": error_sum / max(total, 1e-300),
        "val_mse": error_sum / scaler.error_scale**2 / max(rows, 1),
        "val_l0": active / max(rows, 1),
    }


class MetricsLog:
    """Keeps rows of metrics in memory, in `metrics.jsonl`, and for TensorBoard; a context.

    Args:
        out: folder of metrics.jsonl; None keeps them in memory only.
        tensorboard: also write out/tensorboard.
        start: rows of steps after this one, from a run that went further than its last checkpoint,
            are removed from the file.
        mark: what `mark()` returned when the checkpoint was written; the file is cut there.
        began: Unix time at which the run began. TensorBoard gets this plus `seconds` as the time of
            a row, so its relative axis counts seconds of training, over interruptions too.

    Raises:
        RuntimeError: on entering, when TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        out: Path | None,
        *,
        tensorboard: bool,
        start: int,
        mark: dict[str, Any] | None = None,
        began: float = 0.0,
    ) -> None:
        self.history: list[Row] = []
        self._out, self._tensorboard, self._start, self._mark = out, tensorboard, start, mark
        self._began = began
        self._file: int | None = None
        self._sum, self._size = xxhash.xxh3_128(), 0
        self._writer: Any = None

    def __enter__(self) -> MetricsLog:
        if self._out is None:
            return self
        if self._tensorboard:
            self._writer = _tensorboard_writer(self._out / "tensorboard", self._start)
        self._out.mkdir(parents=True, exist_ok=True)
        path = self._out / METRICS
        self.history, kept = _rows_until(path, self._start, self._mark)
        write_atomic(path, kept)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._count(kept)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)
        if self._writer is not None:
            self._writer.close()

    def add(self, row: Row) -> None:
        """Append one row; `step` is its place on the axis."""
        self.history.append(row)
        if self._file is not None:
            line = _as_line(row)
            try:
                os.write(self._file, line)
            except OSError as error:
                raise RuntimeError(
                    f"Trainer: could not write {METRICS} in {self._out} ({reason(error)})"
                ) from error
            self._count(line)
        if self._writer is not None:
            when = self._began + row["seconds"] if "seconds" in row else None
            for name, value in row.items():
                if name != "step":
                    self._writer.add_scalar(name, value, int(row["step"]), walltime=when)

    def mark(self) -> dict[str, Any]:
        """Return length and checksum of what the file holds now."""
        return {"bytes": self._size, "checksum": self._sum.hexdigest()}

    def _count(self, data: bytes) -> None:
        self._sum.update(data)
        self._size += len(data)


def is_marked(data: bytes, mark: dict[str, Any]) -> bool:
    """Return whether the content of a metrics file begins with what `MetricsLog.mark` saw."""
    size = mark["bytes"]
    return len(data) >= size and bool(xxhash.xxh3_128_hexdigest(data[:size]) == mark["checksum"])


def as_json_row(row: Row) -> dict[str, float | None]:
    """Return a row with None for what JSON has no number for."""
    return {name: value if math.isfinite(value) else None for name, value in row.items()}


def from_json_row(row: dict[str, Any]) -> Row:
    """Return the row that `as_json_row` made one of."""
    return {name: math.nan if value is None else value for name, value in row.items()}


def read_metrics(folder: Path) -> list[Row]:
    """Return the rows in the metrics.jsonl of a run; none where there is no such file."""
    try:
        data = read_bytes(folder / METRICS, "read_metrics")
    except FileNotFoundError:
        return []
    return [row for line in data.splitlines() if (row := _parsed(line)) is not None]


def _as_line(row: Row) -> bytes:
    return (json.dumps(as_json_row(row)) + "\n").encode()


def _rows_until(path: Path, step: int, mark: dict[str, Any] | None) -> tuple[list[Row], bytes]:
    """Return the rows of an earlier run up to `step`, and the part of the file that holds them.

    A file that is not what it was at the checkpoint is no reason to lose a run: what can be read of
    it stays, and a warning says how much.
    """
    if not step:
        return [], b""
    try:
        data = read_bytes(path, "Trainer")
    except FileNotFoundError:
        data = b""
    lines = data.splitlines()
    if mark is not None and is_marked(data, mark):
        data = data[: mark["bytes"]]
        return [from_json_row(json.loads(line)) for line in data.splitlines()], data
    found = [row for line in lines if (row := _parsed(line)) is not None]
    rows = [row for row in found if row["step"] <= step]
    if mark is not None:
        logger.warning(
            "Trainer: %s is not what it was at the checkpoint; %d of its %d lines are kept",
            path, len(rows), len(lines),
        )  # fmt: skip
    return rows, b"".join(map(_as_line, rows))


def _parsed(line: bytes) -> Row | None:
    """Return the row of a line, None if it is not one."""
    try:
        row = from_json_row(json.loads(line))
    except (ValueError, AttributeError, RecursionError):
        return None
    numbers = all(type(value) in (int, float) for value in row.values())
    return row if numbers and type(row.get("step")) is int else None


def _tensorboard_writer(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RuntimeError(
            "Trainer: expected the package tensorboard for tensorboard=True, got none; "
            "pip install 'fastsae[tensorboard]'"
        ) from error
    return SummaryWriter(str(folder), purge_step=start or None)
