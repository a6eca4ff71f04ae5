"""What --time-budget means: as many updates as fit into a time."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fastsae.cli.console import Duration, say

if TYPE_CHECKING:
    from fastsae.data import ActivationSource
    from fastsae.nn import SAE
    from fastsae.train import TrainConfig


def within(
    budget: Duration,
    sae: SAE,
    data: ActivationSource,
    config: TrainConfig,
    val: ActivationSource | None,
) -> TrainConfig:
    """Return `config` with as many steps as fit into the budget, and say how many these are."""
    from fastsae.train import rehearse

    rehearsal = rehearse(sae, data, config, budget.seconds, val=val)
    steps = rehearsal.steps_within(budget.seconds)
    say(f"--time-budget {budget.text}: {steps:,} updates of {1e3 * rehearsal.update:.3g} ms")
    return replace(config, steps=steps)
