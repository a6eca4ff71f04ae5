"""Metrics of a run: what is measured, and where it is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from fastsae.data.source import ActivationSource
from fastsae.nn import SAE, ActivationScaler, SAEOutput

Row = dict[str, float]


def inlier_mask(x: Tensor, outlier_norm: float) -> Tensor:
    """Return which rows of `x: [n, d]` have a norm of at most `outlier_norm` medians: bool [n]."""
    norm: Tensor = torch.linalg.vector_norm(x.float(), dim=1)
    return norm <= outlier_norm * norm.median()


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

    Raises:
        RuntimeError: on entering, when TensorBoard is asked for and not installed.
    """

    def __init__(self, out: Path | None, *, tensorboard: bool, start: int) -> None:
        self.history: list[Row] = []
        self._out, self._tensorboard, self._start = out, tensorboard, start
        self._file: TextIO | None = None
        self._writer: Any = None

    def __enter__(self) -> MetricsLog:
        if self._out is None:
            return self
        if self._tensorboard:
            self._writer = _tensorboard_writer(self._out / "tensorboard", self._start)
        self._out.mkdir(parents=True, exist_ok=True)
        path = self._out / "metrics.jsonl"
        self.history = _rows_until(path, self._start)
        path.write_text("".join(json.dumps(row) + "\n" for row in self.history))
        self._file = path.open("a")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()

    def add(self, row: Row) -> None:
        """Append one row; `step` is its place on the axis."""
        self.history.append(row)
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        if self._writer is not None:
            for name, value in row.items():
                if name != "step":
                    self._writer.add_scalar(name, value, int(row["step"]))


def _rows_until(path: Path, step: int) -> list[Row]:
    """Return the rows of an earlier run up to `step`; a line cut short by a crash is dropped."""
    rows: list[Row] = []
    for line in path.read_text().splitlines() if step and path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["step"] <= step:
            rows.append(row)
    return rows


def _tensorboard_writer(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RuntimeError(
            "Trainer: expected the package tensorboard for tensorboard=True, got none; "
            "pip install 'fastsae[tensorboard]'"
        ) from error
    return SummaryWriter(str(folder), purge_step=start or None)
