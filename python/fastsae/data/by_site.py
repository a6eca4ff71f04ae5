"""Several SAEs from one pass over a model: the columns of a source, site by site."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

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
