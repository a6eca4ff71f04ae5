"""Several SAEs from one pass over a model: the columns of a source, site by site."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fastsae._files import checksum
from fastsae.data.source import ActivationSource
from fastsae.data.store import ActivationStore
from fastsae.data.stream import Stream


class SiteBatches:
    """What `by_site` returns: an iterator with the state of the source's batches."""

    def __init__(self, source: Stream | ActivationStore, batch_size: int, seed: int | None) -> None:
        self._source = source
        self._batches = source.batches(batch_size, seed=seed)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        return self._split(next(self._batches))

    def sample(self, n: int, seed: int = 0) -> dict[str, Tensor]:
        """Return at most `n` rows for `Trainer.prepare`, by site; no row is lost by it."""
        return self._split(self._source.sample(n, seed))

    def state_dict(self) -> dict[str, Any]:
        """Return the position; see `ActivationSource.batches`."""
        return dict(self._stateful().state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position that `state_dict` returned."""
        self._stateful().load_state_dict(state)

    def _stateful(self) -> Any:
        if not hasattr(self._batches, "state_dict"):
            raise ValueError("by_site: expected a seed for batches with a state, got None")
        return self._batches

    def _split(self, x: Tensor) -> dict[str, Tensor]:
        widths = self._source.widths
        return dict(zip(widths, x.split(list(widths.values()), 1), strict=True))


def by_site(
    source: Stream | ActivationStore, batch_size: int, *, seed: int | None = 0
) -> SiteBatches:
    """Return the batches of a source of several sites as a tensor for each of them.

        source = stream(model, tokenizer, texts, ["resid_post.3", "resid_post.7"])
        batches = by_site(source, 1024)
        for rows in itertools.islice(batches, steps):
            for site, trainer in trainers.items():
                trainer.step(rows[site])

    The model runs once for all sites, up to the last of them. Row i of every tensor is of the same
    token. A row that `max_norm_ratio` drops at one site is dropped at all.

    Args:
        source: a `Stream` or an `ActivationStore` of one site or several.
        batch_size: rows of a batch.
        seed: as in `ActivationSource.batches`; None: one pass in order, without a state.

    Returns:
        An iterator of `{site: [batch_size, d]}`, views of one tensor, with `sample`, `state_dict`
        and `load_state_dict`.

    Raises:
        TypeError: another source, which does not say what its columns are.
    """
    if not isinstance(source, Stream | ActivationStore):
        raise TypeError(
            f"by_site: expected source to be a Stream or an ActivationStore, got "
            f"{type(source).__name__}"
        )
    return SiteBatches(source, batch_size, seed)


@runtime_checkable
class _Sited(ActivationSource, Protocol):
    """A source that says which of its columns are of which site."""

    @property
    def widths(self) -> dict[str, int]:
        """Site -> its number of columns, in their order."""


def only_sites(source: ActivationSource, sites: str | Sequence[str]) -> SiteColumns:
    """Return some sites of a source of several: the same rows, with the columns of these.

    Args:
        source: a `Stream`, an `ActivationStore`, or another one with `widths`.
        sites: one or more of them, in the order in which their columns are to come.

    Returns:
        An `ActivationSource` that can do what the other one can, in the same order of rows. All of
        their columns are read.

    Raises:
        TypeError: the source does not say what its columns are.
        ValueError: it has no such site.
    """
    if not isinstance(source, _Sited):
        raise TypeError(
            f"only_sites: expected a source with widths, such as an ActivationStore, got "
            f"{type(source).__name__}"
        )
    names = (sites,) if isinstance(sites, str) else tuple(sites)
    for name in names or (None,):
        if name not in source.widths:
            known = ", ".join(source.widths)
            raise ValueError(f"only_sites: expected sites to be of {known}, got {name}")
    return (_SizedColumns if isinstance(source, Sized) else SiteColumns)(source, names)


class SiteColumns:
    """What `only_sites` returns."""

    def __init__(self, source: Any, sites: tuple[str, ...]) -> None:
        self.source, self.sites = source, sites
        self.widths: dict[str, int] = {site: source.widths[site] for site in sites}
        """Site -> its number of columns, in their order."""
        self.d_in = sum(source.widths[site] for site in sites)
        for name in ("sample", "fingerprint", "hold_back", "known_rows"):
            if hasattr(source, name):  # what a source need not have, this one has as well
                setattr(self, name, getattr(self, f"_{name}"))

    def batches(self, batch_size: int, *, seed: int | None = 0) -> Iterator[Tensor]:
        """See `ActivationSource.batches`."""
        return _ColumnBatches(self.source.batches(batch_size, seed=seed), self.columns)

    def columns(self, rows: Tensor) -> Tensor:
        """Return the columns of these sites of rows of the source."""
        widths = self.source.widths
        parts = dict(zip(widths, rows.split(list(widths.values()), 1), strict=True))
        chosen = [parts[site] for site in self.sites]
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen, 1)

    def _sample(self, n: int) -> Tensor:
        return self.columns(self.source.sample(n))

    def _fingerprint(self) -> str:
        return checksum.of_json([self.source.fingerprint(), self.sites])

    def _hold_back(self, n: int) -> tuple[SiteColumns, SiteColumns]:
        rest, held = self.source.hold_back(n)
        return only_sites(rest, self.sites), only_sites(held, self.sites)

    def _known_rows(self) -> int | None:
        rows: int | None = self.source.known_rows()
        return rows


class _SizedColumns(SiteColumns):
    def __len__(self) -> int:
        return len(self.source)


class _ColumnBatches:
    """Some columns of the batches of a source, with the state of these, if they have one."""

    def __init__(self, batches: Iterator[Tensor], columns: Callable[[Tensor], Tensor]) -> None:
        self._batches, self._columns = batches, columns

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        return self._columns(next(self._batches))

    def __getattr__(self, name: str) -> Any:
        if name in ("state_dict", "load_state_dict"):
            return getattr(self._batches, name)
        raise AttributeError(name)
