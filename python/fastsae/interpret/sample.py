"""Contexts of all latents of an SAE, sampled in one pass over a store.

    window    a stretch of `width` tokens of one context; its activation is the largest one in it,
              in magnitude where a code has signs
    top       the windows of the largest activation, for each latent
    drawn     a uniform sample of the windows in which it fires, from which quantiles are made

Memory is that of the windows kept, d_sae (top + drawn) (2 width + 16) bytes, whatever the number of
tokens. A window whose tokens are the very same as those of an earlier one counts for the
statistics, and is not kept.

Source: Paulo et al. 2024, "Automatically interpreting millions of features in large language
models" (arXiv 2410.13928), windows and quantiles. Ours: one pass that keeps n windows of each
latent instead of all activations.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fastsae._files import checksum
from fastsae._files.read import TensorFile
from fastsae._files.write import publish, staging, write_tensors
from fastsae.analysis.examples import Context
from fastsae.data import ActivationStore
from fastsae.interpret.kept import Candidates, Kept
from fastsae.interpret.windows import Windows
from fastsae.models.chunks import spread
from fastsae.models.probe import evaluating
from fastsae.nn import SAE, NormalizedSAE
from fastsae.types import SparseActs

FORMAT = 1
CONTEXTS = "contexts.safetensors"
"""What commands call the file of a sample."""
CANDIDATES = 1 << 19
"""Looked at together."""
EDGES = 2.0 ** (torch.arange(-20, 30) / 2)
"""Between the bins of the histograms of activations: 2^-10, 2^-9.5, ... 2^14.5. The first bin holds
what is below, the last one what is above."""


class ContextSample:
    """Windows of text for every latent, with its activations there; made by `sample_contexts`."""

    def __init__(self, tensors: dict[str, Tensor], about: dict[str, str | int]) -> None:
        self._tensors, self.about = tensors, about
        self.counts = tensors["counts"]
        """On how many tokens each latent fires: int64 `[d_sae]`."""
        self.largest = tensors["largest"]
        """Largest activation: float32 `[d_sae]`, 0 where a latent never fires."""
        self.mean = tensors["mean"]
        """Mean activation where a latent fires: float32 `[d_sae]`."""
        self.histogram = tensors["histogram"]
        """How many activations lie between which `EDGES`, by size: int32 `[d_sae, 51]`."""
        self._bounds = tensors["bounds"]

    def __repr__(self) -> str:
        return (
            f"ContextSample: {self.d_sae} latents over {self.tokens} tokens, "
            f"{self._tensors['top.window'].shape[1]} top and "
            f"{self._tensors['drawn.window'].shape[1]} drawn windows of {self.width} tokens each"
        )

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.counts)

    @property
    def tokens(self) -> int:
        """Tokens that were encoded."""
        return len(self._tensors["token_ids"])

    @property
    def windows(self) -> int:
        """Windows of all of them."""
        return len(self._bounds) - 1

    @property
    def width(self) -> int:
        """Most tokens of a window."""
        return self._tensors["top.shape"].shape[2]

    def top(self, latent: int, n: int | None = None) -> list[Context]:
        """Return the windows of the largest activations of a latent, strongest first."""
        return [context for _, context in self.kept("top", latent)][:n]

    def drawn(self, latent: int) -> list[Context]:
        """Return a uniform sample of the windows in which a latent fires, strongest first."""
        return [context for _, context in self.kept("drawn", latent)]

    def split(self, latent: int) -> tuple[list[Context], list[Context]]:
        """Return contexts to explain a latent with, and others to score the explanation on.

        A random half of the drawn windows is for either; windows that are also among the top ones
        are only to explain with, after which the rest of the top ones follows. Strongest first in
        each part.
        """
        order = self._tensors["drawn.key"][latent]
        drawn = self.kept("drawn", latent)
        first = set(order[: len(drawn)].argsort()[: (len(drawn) + 1) // 2].tolist())
        top = dict(self.kept("top", latent))
        explain = {w: c for i, (w, c) in enumerate(drawn) if i in first or w in top}
        score = [c for w, c in drawn if w not in explain]
        rest = [c for w, c in top.items() if w not in explain]
        return [*explain.values(), *rest], score

    def quantiles(self, latent: int, quantiles: int = 5, n: int = 4) -> list[list[Context]]:
        """Return up to `n` windows out of each of several equal parts of the drawn windows, the
        strongest part first; in a part, those at equal distances."""
        return [spread(part, n) for part in parts(self.drawn(latent), quantiles)]

    def kept(self, name: str, latent: int) -> list[tuple[int, Context]]:
        """Return the windows of "top" or "drawn", with their numbers, strongest first."""
        if not 0 <= latent < self.d_sae:
            raise ValueError(
                f"ContextSample: expected a latent in 0..{self.d_sae - 1}, got {latent}"
            )
        windows = self._tensors[f"{name}.window"][latent].tolist()
        scales = self._tensors[f"{name}.scale"][latent].tolist()
        shapes = self._tensors[f"{name}.shape"][latent].double()
        found = []
        for window, scale, shape in zip(windows, scales, shapes, strict=True):
            if window >= 0:
                ids = self.token_ids(window)
                acts = (shape * scale).tolist()[: len(ids)]
                peak = max(range(len(acts)), key=lambda i: abs(acts[i]))
                found.append((window, Context(ids, acts, peak)))
        return found

    def token_ids(self, window: int) -> list[int]:
        """Return the tokens of a window."""
        a, b = self._bounds[window : window + 2].tolist()
        return list(self._tensors["token_ids"][a:b].tolist())

    @property
    def bounds(self) -> Tensor:
        """Window w holds rows bounds[w] to bounds[w + 1] of the store: int64 `[windows + 1]`."""
        return self._bounds

    @property
    def all_token_ids(self) -> Tensor:
        """The token of every row that was encoded: int32 `[tokens]`."""
        return self._tensors["token_ids"]

    def windows_of(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return the windows of "top" or "drawn" of all latents, on the disk where it was opened.

        Returns:
            window: int32 `[d_sae, n]`, -1 where there is none.
            scale: float32 `[d_sae, n]`, the largest absolute activation.
            shape: float16 `[d_sae, n, width]`, activations over scale.
        """
        window, scale, shape = (self._tensors[f"{name}.{x}"] for x in ("window", "scale", "shape"))
        return window, scale, shape

    def rows(self, window: int) -> slice:
        """Return the rows of a window in the store."""
        return slice(*self._bounds[window : window + 2].tolist())

    def not_of(self, sae: SAE | NormalizedSAE, store: ActivationStore) -> list[str]:
        """Return which of "sae" and "store" are not those that this was sampled from."""
        marks = {"sae": fingerprint(sae), "store": store.fingerprint()}
        return [name for name, mark in marks.items() if self.about.get(name) != mark]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, atomically."""
        path = Path(path)
        with staging(path.parent) as stage:
            write_tensors(stage / path.name, self._tensors, self.about)
            publish(stage, path.parent, [path.name])

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = False) -> Self:
        """Open a saved sample; windows are read from the disk when they are asked for.

        Args:
            path: what `save` wrote.
            verify: compare all of it with its checksums, which reads all of it.

        Raises:
            FileNotFoundError, ValueError: it is not there, damaged, or another file.
        """
        file = TensorFile(Path(path), "ContextSample.open")
        about = file.about if isinstance(file.about, dict) else {}
        if about.get("contexts") != FORMAT:
            raise ValueError(
                f"ContextSample.open: expected {path} to hold contexts of format {FORMAT}, got "
                f"{about.get('contexts', 'another file')}"
            )
        return cls({name: file.tensor(name, verify=verify) for name in file.shapes}, about)


def spread_by_strength(contexts: list[Context], n: int) -> list[Context]:
    """Return up to `n` contexts at equal distances from the strongest to the weakest."""
    return spread(sorted(contexts, key=lambda c: -abs(c.acts[c.peak])), n)


def parts(items: list[Context], n: int) -> list[list[Context]]:
    """Return `n` slices of a list, of lengths that differ by at most one."""
    return [items[i * len(items) // n : (i + 1) * len(items) // n] for i in range(n)]


@torch.no_grad()
def sample_contexts(
    sae: SAE | NormalizedSAE,
    store: ActivationStore,
    *,
    width: int = 32,
    top: int = 16,
    drawn: int = 64,
    max_rows: int | None = None,
    batch_size: int = 4096,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> ContextSample:
    """Encode a store once, and keep windows of text for every latent.

    Args:
        sae: reads the rows of the store; in eval mode meanwhile.
        store: rows in the order of the text.
        width: tokens per window.
        top: windows of the largest activations to keep of each latent. Of equal ones the first.
        drawn: windows to draw, each window in which a latent fires with the same probability.
        max_rows: rows of the store to use; None: all.
        batch_size: rows at a time.
        seed: of the draw, which depends on it, the window and the latent only.
        progress: called with the number of rows after each batch.

    Raises:
        ValueError: a number below 1 (top and drawn: below 0), no rows, rows of another width, or
            an activation that is not finite.

    Numerics: the largest absolute activation of a window in float32, the others as float16
    multiples of it; statistics in float64 and integers.
    Cost: beside encoding, a sort of the active entries of each batch.
    """
    _check(sae, store, width, top, drawn, max_rows, batch_size)
    windows = Windows(store, width, max_rows)
    sampler = _Sampler(sae.d_sae, windows, width, top, drawn, seed)
    device, dtype = sae.W_enc_rows.device, sae.W_enc_rows.dtype
    with evaluating(sae):
        for first, last in _batches(windows.bounds, batch_size):
            a, b = windows.bounds[[first, last]].tolist()
            x = store.rows(slice(a, b)).to(device, dtype)
            sampler.look(sae.encode_sparse(sae.columns.split(x).x), a)
            if progress:
                progress(b - a)
    about: dict[str, str | int] = {
        "contexts": FORMAT,
        "sae": fingerprint(sae),
        "store": store.fingerprint(),
        "model": store.manifest.model,
        "site": store.site,
        "top": top,
        "drawn": drawn,
        "seed": seed,
    }
    return ContextSample(sampler.tensors(), about)


def fingerprint(sae: SAE | NormalizedSAE) -> str:
    """Return a checksum of the class, the settings and all parameters of an SAE."""
    state = {name: checksum.of_rows(x.flatten()) for name, x in sae.state_dict().items()}
    if isinstance(sae, NormalizedSAE):
        around = [sae.normalize_activations, sae.reshape_activations]
        return checksum.of_json([type(sae.sae).__name__, sae.sae.config(), state, around])
    return checksum.of_json([type(sae).__name__, sae.config(), state])


def _batches(bounds: Tensor, batch_size: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of windows with about `batch_size` rows, at least one window each."""
    first = 0
    while first < len(bounds) - 1:
        full = int(torch.searchsorted(bounds, bounds[first] + batch_size, right=True)) - 1
        last = max(full, first + 1)
        yield first, last
        first = last


class _Sampler:
    """What is kept while the codes of a store go by."""

    def __init__(
        self, d_sae: int, windows: Windows, width: int, top: int, drawn: int, seed: int
    ) -> None:
        self.windows, self.width, self.seed = windows, width, seed
        self.top, self.drawn = Kept(d_sae, top, width), Kept(d_sae, drawn, width)
        self.counts = torch.zeros(d_sae, dtype=torch.int64)
        self.sums = torch.zeros(d_sae, dtype=torch.float64)
        self.largest = torch.full((d_sae,), -torch.inf)
        self.histogram = torch.zeros(d_sae, len(EDGES) + 1, dtype=torch.int32)
        self._waiting: list[tuple[Tensor, Tensor, Candidates]] = []

    def look(self, acts: SparseActs, at: int) -> None:
        """Take the code of rows from `at` on, which begin and end with windows."""
        values = acts.values.float()
        if not bool(values.isfinite().all()):
            raise ValueError(
                f"sample_contexts: expected activations that are finite in float32, got others in "
                f"rows {at}..{at + acts.n - 1}"
            )
        active = values != 0
        value = values[active].cpu()
        latent = acts.indices[active].long().cpu()
        row = acts.rows()[active].cpu() + at
        self._count(latent, value)
        bounds, d_sae = self.windows.bounds, len(self.counts)
        window = torch.searchsorted(bounds, row, right=True) - 1
        order = (window * d_sae + latent).argsort(stable=True)
        pair, which, lengths = (window * d_sae + latent)[order].unique_consecutive(
            return_inverse=True, return_counts=True
        )
        value, column = value[order], (row - bounds[window])[order]
        scale = torch.segment_reduce(value.abs(), "max", lengths=lengths)
        slot, window = pair % d_sae, pair // d_sae
        by_strength, by_chance = -scale.double(), uniform(pair, self.seed)
        good = (by_strength < self.top.bound[slot]) | (by_chance < self.drawn.bound[slot])
        good &= ~self.windows.repeated[window]
        place = good.cumsum(0) - 1
        kept = good[which]
        shape = torch.zeros(int(good.sum()), self.width, dtype=torch.float16)
        shape[place[which[kept]], column[kept]] = (value[kept] / scale[which[kept]]).half()
        found = Candidates(slot[good], window[good].int(), scale[good], shape)
        self._waiting.append((by_strength[good], by_chance[good], found))
        if sum(len(keys) for keys, _, _ in self._waiting) > CANDIDATES:
            self._settle()

    def _count(self, latent: Tensor, value: Tensor) -> None:
        self.counts += torch.bincount(latent, minlength=len(self.counts))
        self.sums.index_add_(0, latent, value.double())
        self.largest.scatter_reduce_(0, latent, value, "amax")
        bins = torch.bucketize(value.abs(), EDGES, right=True)
        ones = torch.ones(len(latent), dtype=torch.int32)
        flat = self.histogram.view(-1)
        flat.index_add_(0, latent * self.histogram.shape[1] + bins, ones)

    def _settle(self) -> None:
        if not self._waiting:
            return
        by_strength = torch.cat([keys for keys, _, _ in self._waiting])
        by_chance = torch.cat([keys for _, keys, _ in self._waiting])
        parts = [found for _, _, found in self._waiting]
        found = Candidates(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
        self._waiting.clear()
        self.top.take(by_strength, found)
        self.drawn.take(by_chance, found)

    def tensors(self) -> dict[str, Tensor]:
        """Return what is to be saved."""
        self._settle()
        fired = self.counts > 0
        out = {
            "counts": self.counts,
            "largest": self.largest.where(fired, 0.0),
            "mean": (self.sums / self.counts.clamp(min=1)).float(),
            "histogram": self.histogram,
            "bounds": self.windows.bounds,
            "token_ids": self.windows.token_ids,
            "documents": self.windows.documents,
            "positions": self.windows.positions,
        }
        for name, kept in (("top", self.top), ("drawn", self.drawn)):
            kept.sort((-kept.scale).masked_fill(kept.window < 0, torch.inf))
            out |= {f"{name}.window": kept.window, f"{name}.scale": kept.scale}
            out[f"{name}.shape"] = kept.shape
        # Random order of the drawn ones, to split them: see `split`.
        out["drawn.key"] = self.drawn.keys.float()
        return out


def uniform(pair: Tensor, seed: int) -> Tensor:
    """Return a number in [0, 1) for each int64, as good as random: float64.

    Source: the finalizer of SplitMix64 (Steele, Lea and Flood 2014).
    """
    with np.errstate(over="ignore"):
        x = pair.numpy().astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % (1 << 64))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return torch.from_numpy((x >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _check(
    sae: SAE | NormalizedSAE, store: ActivationStore, width: int, top: int, drawn: int,
    max_rows: int | None, batch_size: int,
) -> None:  # fmt: skip
    owner = "sample_contexts"
    for name, value, least in (
        ("width", width, 1),
        ("top", top, 0),
        ("drawn", drawn, 0),
        ("max_rows", 1 if max_rows is None else max_rows, 1),
        ("batch_size", batch_size, 1),
    ):
        if value < least:
            raise ValueError(f"{owner}: expected {name} >= {least}, got {value}")
    if not len(store):
        raise ValueError(f"{owner}: expected a store with rows, got none in {store.path}")
    if sum(sae.columns.widths) != store.d_in:
        raise ValueError(
            f"{owner}: expected rows of {sum(sae.columns.widths)} numbers like the SAE's, got "
            f"{store.d_in} in {store.path}"
        )
