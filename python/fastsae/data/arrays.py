"""Activations that other programs stored: .npy, safetensors, datasets of vectors.

Files are mapped into memory, so that only what is read of them takes any.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae._files import checksum
from fastsae._files.read import TensorFile, printable
from fastsae.data.source import ActivationSource, IterableSource, TensorSource
from fastsae.data.store import ActivationStore

MANIFEST = "manifest.json"


def open_activations(data: Any, column: str | None = None) -> ActivationSource:
    """Return the rows of activations in a file, a folder or a dataset as a source.

        source = fastsae.data.open_activations("cached", "blocks.15.hook_resid_post")
        Trainer(sae, source).fit()

    Rows come as float32 (float64 if they are), whatever they are stored in; those of a context
    `[t, d]` one after the other. Files stay on disk and are mapped.

    Args:
        data: a folder of `harvest`; a `.npy` file `[n, d]` or `[n, t, d]`; a `.safetensors` file;
            a folder of `datasets.save_to_disk`, such as the cached activations of SAELens; a
            `datasets.Dataset`, or a streaming one, whose rows come in their order.
        column: the site of a harvest, the tensor of a safetensors file, the column of a dataset;
            may be left out where there is one that holds numbers with a fraction.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: the file is of another kind, has no such column, or its rows are no vectors of
            one width.
        ModuleNotFoundError: a dataset without `datasets` installed.
    """
    if not isinstance(data, str | os.PathLike):
        return _of_dataset(data, column)
    path = Path(data)
    if not path.exists():
        raise FileNotFoundError(f"open_activations: expected {path}, found none")
    if (path / MANIFEST).exists():
        return ActivationStore(path, column)
    if path.suffix == ".npy":
        return MappedSource([_rows(_npy(path), str(path))])
    if path.suffix == ".safetensors":
        return _of_safetensors(path, column)
    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        return _of_dataset(_saved_dataset(path), column)
    raise ValueError(
        f"open_activations: expected a folder of harvest or of datasets, a .npy or a .safetensors "
        f"file, got {path}"
    )


class MappedSource(TensorSource):
    """The rows of several matrices `[m, d_in]`, one below the other, which stay where they are.

    Half-precision rows come as float32. See `TensorSource` for the rest.

    Raises:
        ValueError: no matrix, or one that is not floating or of another width.
    """

    def __init__(self, pieces: list[Tensor]) -> None:
        if not pieces or len({piece.shape[1:] for piece in pieces}) != 1:
            got = [[*piece.shape] for piece in pieces[:3]]
            raise ValueError(f"MappedSource: expected matrices of one width, got {got}")
        super().__init__(pieces[0])
        self._pieces = pieces
        lengths = torch.tensor([len(piece) for piece in pieces])
        self._ends = lengths.cumsum(0)
        self._spans = [(0, int(self._ends[-1]))] if int(self._ends[-1]) else []

    def batches(self, batch_size: int, *, seed: int | None = 0) -> Iterator[Tensor]:
        """See `ActivationSource.batches`."""
        if seed is None:
            return self._in_order(batch_size)
        return super().batches(batch_size, seed=seed)

    def fingerprint(self) -> str:
        """Return a checksum of all rows."""
        return checksum.of_json([checksum.of_rows(piece) for piece in self._pieces])

    def _in_order(self, batch_size: int) -> Iterator[Tensor]:
        for start, stop in self._spans:
            for at in range(start, stop, batch_size):
                yield self._take(torch.arange(at, min(at + batch_size, stop)))

    def _take(self, rows: Tensor) -> Tensor:
        dtype = torch.float64 if self._pieces[0].dtype == torch.float64 else torch.float32
        out = torch.empty(len(rows), self.d_in, dtype=dtype)
        owner = torch.bucketize(rows, self._ends, right=True)
        for i in owner.unique().tolist():
            piece, mine = self._pieces[i], owner == i
            out[mine] = piece[rows[mine] - (int(self._ends[i]) - len(piece))].to(dtype)
        return out


class _Column:
    """The vectors of a column of a streaming dataset, in their order, as often as it is iterated.

    Args:
        dataset: yields dictionaries.
        column: the vectors, `[d]` or `[t, d]` in each.
    """

    def __init__(self, dataset: Iterable[dict[str, Any]], column: str) -> None:
        self._dataset, self._column = dataset, column

    def __iter__(self) -> Iterator[Tensor]:
        for row in self._dataset:
            value = torch.as_tensor(row[self._column])
            yield _rows(value if value.ndim > 1 else value.unsqueeze(0), self._column)


def _rows(x: Tensor, where: str) -> Tensor:
    """Return `x: [n, d]` or `[n, t, d]` as rows."""
    if x.ndim not in (2, 3) or not x.is_floating_point():
        raise ValueError(
            f"open_activations: expected floating [n, d] or [n, t, d] in {where}, got {x.dtype} "
            f"{[*x.shape]}"
        )
    return x.flatten(0, -2)


def _npy(path: Path) -> Tensor:
    import numpy as np

    try:  # "c": torch wants memory that it may write to, and the file stays as it is
        return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
    except (ValueError, OSError, TypeError, EOFError) as error:
        got = printable(str(error)).splitlines()[0]
        if "pickle" in got:  # what numpy takes everything for that is none; it advises to load it
            got = "objects, or another kind of file"
        raise ValueError(
            f"open_activations: expected {path} to be a .npy file of numbers, got {got}"
        ) from None


def _of_safetensors(path: Path, column: str | None) -> ActivationSource:
    file = TensorFile(path, "open_activations")
    floating = [name for name, kind in file.dtypes.items() if kind in ("F64", "F32", "F16", "BF16")]
    name = _chosen(column, floating, str(path), "tensor")
    return MappedSource([_rows(file.tensor(name, verify=False), f"{name} of {path}")])


def _chosen(column: str | None, names: list[str], where: str, what: str) -> str:
    if column is None and len(names) == 1:
        return names[0]
    if column not in names:
        raise ValueError(
            f"open_activations: expected column to be a {what} of vectors in {where}: "
            f"{', '.join(names) or 'none'}; got {column}"
        )
    return column


def _saved_dataset(path: Path) -> Any:
    try:
        import datasets
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"open_activations: expected the package datasets, which reads {path}: "
            "pip install datasets"
        ) from None
    found = datasets.load_from_disk(str(path))
    if isinstance(found, dict):
        raise ValueError(
            f"open_activations: expected one split, got {', '.join(found)} in {path}; give the "
            "folder of one"
        )
    return found


def _of_dataset(dataset: Any, column: str | None) -> ActivationSource:
    features = getattr(dataset, "features", None)
    if features is None:
        raise TypeError(
            f"open_activations: expected a path or a dataset of `datasets`, got "
            f"{type(dataset).__name__}"
        )
    name = _chosen(column, [n for n, f in features.items() if _holds_vectors(f)], "it", "column")
    if not hasattr(dataset, "flatten_indices"):  # streaming
        return IterableSource(_Column(dataset.with_format("torch"), name))
    if dataset._indices is not None:  # selected or shuffled rows are not in the order of the file
        dataset = dataset.flatten_indices()
    pieces = [_arrow(chunk, name) for chunk in dataset.data.column(name).chunks if len(chunk)]
    return MappedSource(pieces)


def _holds_vectors(feature: Any) -> bool:
    """Return whether a column holds lists of numbers with a fraction, or lists of those."""
    while True:
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        if inner is None:
            break
        feature = inner
        if "float" in str(getattr(feature, "dtype", "")):
            return True
    return hasattr(feature, "shape") and "float" in str(getattr(feature, "dtype", ""))


def _arrow(chunk: Any, name: str) -> Tensor:
    """Return a chunk of a column of lists of numbers, or of lists of those, as rows; not copied."""
    chunk = getattr(chunk, "storage", chunk)  # of an extension type, such as Array2D
    width = None
    while hasattr(chunk, "flatten") and chunk.type.num_fields:
        lengths = set(chunk.value_lengths().unique().to_pylist())
        width, chunk = lengths, chunk.flatten()
    if not width or len(width) != 1 or None in width or chunk.null_count:
        raise ValueError(
            f"open_activations: expected vectors of one width in column {name}, got widths "
            f"{sorted(map(str, width or ()))[:5]} and {chunk.null_count} missing numbers"
        )
    values = torch.utils.dlpack.from_dlpack(chunk)
    return values.view(-1, width.pop())


__all__ = ["MappedSource", "open_activations"]
