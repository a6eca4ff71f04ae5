"""What each part of an SAE's error costs the model downstream.

    percent recovered = (CE_sae - CE_part) / (CE_sae - CE_clean)

CE_part is the cross entropy with the linear or the nonlinear part of the error added to the
reconstruction. If a part costs in proportion to its size, it recovers its share of the error.

Source: Engels et al. 2024, "Decomposing the dark matter of sparse autoencoders" (arXiv 2410.14670),
section 6.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

from fastsae.analysis.error import LinearError
from fastsae.eval.cross_entropy import mean_loss
from fastsae.models.probe import evaluating
from fastsae.models.sites import Site
from fastsae.models.splice import intervene, read_and_replaced
from fastsae.nn import SAE


@dataclass(frozen=True)
class ErrorCost:
    """Mean next-token cross entropy, in nats per token, under four interventions."""

    clean: float
    """Of the model as it is."""
    sae: float
    """With the reconstruction in place."""
    linear_added: float
    """With the reconstruction and the linear error: what is missing is the nonlinear error."""
    nonlinear_added: float
    """With the reconstruction and the nonlinear error: what is missing is the linear error."""
    tokens: int
    """Number of predictions that the means are over."""

    @property
    def recovered_by_linear(self) -> float:
        """Share of the loss that adding the linear error takes back; nan where none is lost."""
        return self._recovered(self.linear_added)

    @property
    def recovered_by_nonlinear(self) -> float:
        """Share of the loss that adding the nonlinear error takes back; nan where none is lost."""
        return self._recovered(self.nonlinear_added)

    def _recovered(self, loss: float) -> float:
        lost = self.sae - self.clean
        return (self.sae - loss) / lost if lost else float("nan")


def error_cost(
    model: nn.Module,
    site: str | Site | tuple[str | Site, str | Site],
    sae: SAE,
    linear: LinearError,
    contexts: Sequence[Sequence[int]],
    *,
    batch_size: int = 8,
    drop_prefix: int = 1,
    max_norm: float | None = None,
) -> ErrorCost:
    """Measure the model's cross entropy with either part of an SAE's error put back.

    Four passes over the contexts, whose text should be other than that of the fit.

    Args:
        model: a causal language model of `transformers`.
        site: where the SAE belongs; of a transcoder the site that it reads and the one that it
            replaces.
        sae: in eval mode meanwhile.
        linear: from `fit_linear_error`, on rows of that site.
        contexts: token lists, each with its prefix token first, e.g. `Chunk.ids`.
        batch_size: contexts per forward pass.
        drop_prefix: positions at the start of each context that pass through; predictions made
            there do not count. The paper has 200.
        max_norm: rows of a larger norm pass through.

    Raises:
        ValueError: no context is long enough to predict anything, or the SAE does not fit the site.
    """
    source, target = read_and_replaced("error_cost", site, sae)

    def loss(change: Callable[[Tensor, Tensor], Tensor] | None) -> tuple[float, int]:
        return mean_loss(
            "error_cost",
            model,
            contexts,
            lambda pads: (
                nullcontext()
                if change is None
                else intervene(model, target, change, source, pads, drop_prefix, max_norm)
            ),
            batch_size,
            drop_prefix,
        )

    def reconstruct(x: Tensor) -> Tensor:
        return sae(x.to(sae.W_enc_rows))  # type: ignore[no-any-return]

    def part(x: Tensor) -> Tensor:
        return x.to(linear.vector) @ linear.vector

    with evaluating(sae):
        clean, tokens = loss(None)
        by_sae, _ = loss(lambda read, own: reconstruct(read))
        with_linear, _ = loss(lambda read, own: reconstruct(read) + part(read))
        with_nonlinear, _ = loss(lambda read, own: own - part(read))
    return ErrorCost(clean, by_sae, with_linear, with_nonlinear, tokens)
