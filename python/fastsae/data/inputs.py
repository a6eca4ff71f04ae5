"""Models with inputs of their own: images, sound, text with images, as a processor gives them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor, nn

from fastsae._files.checksum import as_bytes
from fastsae._log import logger
from fastsae.data.contexts import NORM_ROWS, Rows, usual_norms
from fastsae.models.check import check_sites
from fastsae.models.kinds import KINDS, kinds_of, real_rows
from fastsae.models.probe import device_of
from fastsae.models.read import read
from fastsae.models.resolve import resolve

PROBED = 2
"""Samples of the first batch on which sites are checked."""


@dataclass(frozen=True)
class ModelInputs:
    """Batches of arguments for a model, which `harvest` takes in the place of texts.

        def batches():
            for paths in chunks_of(64):
                yield processor(images=[Image.open(path) for path in paths], return_tensors="pt")

        harvest(vit, None, ModelInputs(batches, kinds="patch"), "resid_post.8", "acts")

    A batch is a mapping from the names of arguments to tensors whose first dimension counts samples
    (images, clips, texts); a sample is a document. Rows where the attention mask is 0 are not
    stored. "keep", bool `[n, t]`, is no argument of the model: it says which rows are wanted.
    """

    batches: Iterable[Mapping[str, Any]] | Callable[[], Iterable[Mapping[str, Any]]]
    """An iterable, which is read once, or a function that returns one."""
    kinds: str | Sequence[str] | None = None
    """Which rows are stored: those of "patch", "class", "register", "frame" or "text", or of
    several of these; None: all."""
    drop_prefix: int = 0
    """Rows at the start of each sample that are not stored."""

    def __post_init__(self) -> None:
        for kind in self.wanted or ():
            if kind not in KINDS[1:]:
                raise ValueError(
                    f"ModelInputs: expected kinds of {', '.join(KINDS[1:])}, got {kind!r}"
                )
        if self.drop_prefix < 0:
            raise ValueError(f"ModelInputs: expected drop_prefix >= 0, got {self.drop_prefix}")

    @property
    def wanted(self) -> tuple[str, ...] | None:
        """The kinds to store."""
        if self.kinds is None:
            return None
        return (self.kinds,) if isinstance(self.kinds, str) else tuple(self.kinds)


class Batch(NamedTuple):
    """One batch of inputs, and the number of its first sample."""

    inputs: dict[str, Any]
    first: int
    samples: int


class InputBatches:
    """Batches of inputs, with a count and a checksum of those that were taken.

    Raises:
        TypeError: a batch is no mapping of names to tensors.
        ValueError: a batch has tensors without samples.
    """

    def __init__(self, given: ModelInputs, main: str) -> None:
        batches = given.batches() if callable(given.batches) else given.batches
        self._batches, self._main = iter(batches), main
        self._ahead: deque[Batch] = deque()
        self._next_sample = self.count = 0
        self._number = 0
        self._sum = xxhash.xxh3_128()

    def __iter__(self) -> Iterator[Batch]:
        while batch := self._ahead.popleft() if self._ahead else self._next():
            self.count += 1
            for name, value in sorted(batch.inputs.items()):
                about = f"{value.dtype} {[*value.shape]}" if isinstance(value, Tensor) else value
                self._sum.update(f"{name} {about} ".encode())
                if isinstance(value, Tensor):
                    self._sum.update(as_bytes(value.cpu().contiguous()))
            yield batch

    def peek(self) -> Iterator[Batch]:
        """Yield batches that will be taken later, those that were looked at before first."""
        yield from list(self._ahead)
        while batch := self._next():
            self._ahead.append(batch)
            yield batch

    def checksum(self) -> str:
        """Return what stands for the inputs so far."""
        return self._sum.hexdigest()

    def _next(self) -> Batch | None:
        given = next(self._batches, None)
        if given is None:
            return None
        number, self._number = self._number, self._number + 1
        if not isinstance(given, Mapping):
            raise TypeError(
                f"harvest: expected batch {number} to be a mapping of names to tensors, got "
                f"{type(given).__name__}"
            )
        inputs = {str(name): value for name, value in given.items() if value is not None}
        main = inputs.get(self._main, inputs.get("input_ids"))
        if not isinstance(main, Tensor) or main.ndim < 2:
            got = [*main.shape] if isinstance(main, Tensor) else ", ".join(inputs) or "nothing"
            raise TypeError(
                f"harvest: expected {self._main} in batch {number} to be a tensor [n, ...], got "
                f"{got}"
            )
        ids = inputs.get("input_ids")
        samples = len(ids if isinstance(ids, Tensor) else main)
        batch = Batch(inputs, self._next_sample, samples)
        self._next_sample += samples
        return batch


class InputReader:
    """Reads the activations of a model for batches of inputs, at sites that the first one checks.

    Args:
        model: a model of `transformers`.
        sites: see `fastsae.models.sites`.
        given: says which rows are wanted.
        batches: those to read, of which the first ones are looked at.

    Raises:
        ValueError: there are none, or the model has no such site.
    """

    def __init__(
        self, model: nn.Module, sites: Sequence[str], given: ModelInputs, batches: InputBatches
    ) -> None:
        self.model, self.given = model, given
        first = next(batches.peek(), None)
        if first is None:
            raise ValueError("harvest: expected at least one batch of inputs, got none")
        reports = check_sites(model, sites, _few(self._arguments(first), first.samples))
        for name, report in reports.items():
            if not report.ok:
                raise ValueError(f"harvest: {report.why}")
            if report.why:
                logger.info("harvest: %s: %s", name, report.why)
        self.sites = [resolve(model, name) for name in sites]
        if routed := [site.name for site in self.sites if site.mixture is not None]:
            raise ValueError(
                "harvest: expected sites with a row for each token with ModelInputs, got "
                f"{routed[0]}"
            )
        self.checks = {name: report.to_dict() for name, report in reports.items()}
        self.max_norm: dict[str, float] = {}
        self._unmasked = [name for name, report in reports.items() if not report.masked]
        self._kinds: dict[Any, Tensor] = {}

    def limit_norms(self, batches: InputBatches, ratio: float) -> None:
        """Set `max_norm` to a multiple of the median norm of the rows that come first."""
        norms: dict[str, list[Tensor]] = {site.name: [] for site in self.sites}
        for batch in batches.peek():
            for name, x in self.read(batch).acts.items():
                norms[name].append(x.float().norm(dim=1))
            if sum(map(len, norms[self.sites[0].name])) >= NORM_ROWS:
                break
        self.max_norm = usual_norms(norms, ratio)

    def read(self, batch: Batch) -> Rows:
        """Return the rows of a batch, sample by sample.

        Raises:
            ValueError: an activation is not finite, or rows are not those of samples.
        """
        inputs = self._arguments(batch)
        acts = read(self.model, self.sites, inputs)
        shape = self._shape(acts, batch)
        real = real_rows(self.model, inputs, shape)
        if self._unmasked and not bool(real.all()):
            raise ValueError(
                f"harvest: expected rows of {self._unmasked[0]} that do not depend on padding, got "
                f"those of {type(self.model).__name__}, which do; give samples without padding"
            )
        kinds = self._kinds_of(inputs, shape)
        positions = (real.long().cumsum(1) - 1).clamp_min(0)
        late = positions >= self.given.drop_prefix
        keep = real & late & self._wanted(batch, kinds)
        kept = torch.ones(int(keep.sum()), dtype=torch.bool)
        rows = {name: x[keep.to(x.device)].cpu() for name, x in acts.items()}
        for name, x in rows.items():
            norm = x.float().norm(dim=1)
            if not norm.isfinite().all():
                raise ValueError(f"harvest: site {name} gave an activation that is not finite")
            if name in self.max_norm:
                kept &= norm <= self.max_norm[name]
        ids = inputs.get("input_ids")
        tokens = torch.full(shape, -1)
        if isinstance(ids, Tensor) and tuple(ids.shape) == shape:
            tokens = ids.cpu()
        documents = torch.arange(batch.first, batch.first + batch.samples)
        dropped = {
            "prefix": int((real & ~late).sum()),
            "skipped": int((real & late).sum() - keep.sum()),
            "norm": int((~kept).sum()),
        }
        return Rows(
            tokens[keep][kept],
            documents.unsqueeze(1).expand(shape)[keep][kept],
            positions[keep][kept],
            {name: x[kept] for name, x in rows.items()},
            dropped,
            kinds[keep][kept],
        )

    def _arguments(self, batch: Batch) -> dict[str, Any]:
        """Return what the model takes, where it is, in its dtype."""
        device = device_of(self.model)
        parameters = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        dtype = next(parameters, torch.float32)

        def there(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.to(device, dtype) if x.is_floating_point() else x.to(device)

        return {name: there(x) for name, x in batch.inputs.items() if name != "keep"}

    def _shape(self, acts: dict[str, Tensor], batch: Batch) -> tuple[int, int]:
        """Return n and t of the rows, the same at all sites."""
        first = self.sites[0].name
        for name, x in acts.items():
            if x.ndim != 3 or len(x) != batch.samples or x.shape[:2] != acts[first].shape[:2]:
                raise ValueError(
                    f"harvest: expected rows [{batch.samples}, t, d] at {name}, as many as at "
                    f"{first}, got {[*x.shape]}"
                )
        return len(acts[first]), acts[first].shape[1]

    def _kinds_of(self, inputs: dict[str, Any], shape: tuple[int, int]) -> Tensor:
        """Return the kinds of rows `[n, t]`; those of images of one size are found once."""
        if "input_ids" in inputs:
            return kinds_of(self.model, inputs, shape)
        sizes = tuple((name, x.shape[1:]) for name, x in inputs.items() if isinstance(x, Tensor))
        if (sizes, shape[1]) not in self._kinds:
            self._kinds[sizes, shape[1]] = kinds_of(self.model, inputs, (1, shape[1]))
        return self._kinds[sizes, shape[1]].expand(shape)

    def _wanted(self, batch: Batch, kinds: Tensor) -> Tensor:
        """Return which rows the caller wants."""
        wanted = torch.ones(kinds.shape, dtype=torch.bool)
        if self.given.wanted is not None:
            if not bool(kinds.all()):
                raise ValueError(
                    f"harvest: expected kinds of {type(self.model).__name__} that can be told, got "
                    "unknown ones; leave kinds out, and say which rows to keep in the batches"
                )
            codes = torch.tensor([KINDS.index(kind) for kind in self.given.wanted])
            wanted &= torch.isin(kinds, codes.to(kinds.dtype))
        keep = batch.inputs.get("keep")
        if keep is not None:
            keep = torch.as_tensor(keep)
            if keep.shape != kinds.shape or keep.dtype != torch.bool:
                raise ValueError(
                    f"harvest: expected keep to be bool {[*kinds.shape]}, got {keep.dtype} "
                    f"{[*keep.shape]}"
                )
            wanted &= keep.cpu()
        return wanted


def _few(inputs: dict[str, Any], samples: int) -> dict[str, Any]:
    """Return the first samples of a batch, or all where tensors do not count samples."""
    tensors = [x for x in inputs.values() if isinstance(x, Tensor)]
    if any(x.ndim == 0 or len(x) != samples for x in tensors):
        return inputs
    return {name: x[:PROBED] if isinstance(x, Tensor) else x for name, x in inputs.items()}
