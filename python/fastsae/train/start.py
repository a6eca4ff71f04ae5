"""Where a run starts: the unit of its activations, limits of their norm, fresh rows and biases."""

from __future__ import annotations

from torch import Tensor
from torch.nn.utils import parametrize

from fastsae._log import logger
from fastsae.interop.folder import OWN
from fastsae.nn import SAE, ActivationScaler
from fastsae.nn.init import some_rows
from fastsae.train.config import TrainConfig
from fastsae.train.outliers import inlier_mask, norm_limits

UNIT = 1e-3
"""How far from 1 the norm of a row may be that has norm 1; of 16 bits it is rounded."""
SCALE_ROWS = 1024
"""Rows of the sample that the length of new encoder rows is fitted on."""


def _takes_rows(sae: SAE, config: TrainConfig) -> bool:
    return config.weight_init == "data" and sae.is_fresh


def start_rows(sae: SAE, config: TrainConfig) -> int:
    """Return how many rows of the data a start is made from: new matrices need theirs."""
    return max(config.sample_rows, sae.start_rows if _takes_rows(sae, config) else 0)


def start_(
    sae: SAE, sample: Tensor, config: TrainConfig, few_rows: int | None = None
) -> tuple[ActivationScaler, list[float]]:
    """Start `sae` from a sample, and return the scale of its data and the limits of their norm.

    Afterwards the module takes scaled activations. One whose biases are not all zero has been
    trained before, and keeps them.

    Args:
        sae: the module.
        sample: raw rows `[n, columns]`, all finite.
        config: of the run.
        few_rows: everything but new matrices is made from so many of them; None: from all.

    Raises:
        ValueError: rows are all equal.
    """
    fresh = not (bool(sae.b_enc.any()) or bool(sae.b_dec.any()))
    takes_rows = _takes_rows(sae, config)
    many = sample[inlier_mask(sae.columns.split(sample).x, config.outlier_norm)]
    seed = config.seed if config.start_seed is None else config.start_seed
    few = many if few_rows is None else some_rows(many, few_rows, seed)
    scaler = ActivationScaler(sae.columns)
    if config.normalize:
        scaler = ActivationScaler.estimate(sae.columns, few)
        if not fresh or sae.holds_units:
            scaler.unfold_(sae)
    _unit_rows_(sae)
    many, few = scaler.scale(many), scaler.scale(few)
    limits = norm_limits(sae.columns, few, config.outlier_norm)
    sae.train()
    if takes_rows:
        sae.initialize_rows_(many, seed)
    if fresh and config.b_dec_init != "zeros":
        sae.initialize_from_data_(few, config.b_dec_init)
    if takes_rows:
        sae.fit_encoder_scale_(some_rows(few, SCALE_ROWS, seed))
    if scaler.scales != [1.0] * len(scaler.scales):
        _mention_units(sae)
    return scaler, limits


def _unit_rows_(sae: SAE) -> None:
    """Make rows of the decoder norm 1, as updates keep them; say so where the code changes."""
    norms = sae.decoder_norms()
    norms = norms[norms > 0]
    if bool(((norms - 1).abs() <= UNIT).all()) or parametrize.is_parametrized(sae, "W_dec"):
        return
    if not sae.fold_decoder_norm_():
        logger.warning(
            "Trainer: rows of W_dec of %s have norms from %.3g to %.3g, which become 1; its code "
            "and its reconstruction are others then",
            type(sae).__name__,
            float(norms.min()),
            float(norms.max()),
        )


def _mention_units(sae: SAE) -> None:
    """Log which parameters folding the scale leaves alone, since it does not know them."""
    own = [name for name, _ in sae.named_parameters() if name.split(".")[0] not in OWN]
    own = [name for name in own if not name.startswith("parametrizations.")]
    if own and type(sae).rescale_code_.__module__.startswith("fastsae."):
        logger.warning(
            "Trainer: training on scaled activations; %s of %s stay as they are when the scale "
            "is folded in, so override rescale_code_ if they have a unit, or set "
            "normalize=False",
            ", ".join(own),
            type(sae).__name__,
        )
