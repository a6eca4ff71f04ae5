"""What the state of a run holds, and whether one can be continued here."""

from __future__ import annotations

from typing import Any

import torch

from fastsae.train.checkpoint import check_alike, check_same_run

STATE_KEYS = {
    "about",
    "step",
    "tokens",
    "scales",
    "limits",
    "sae",
    "update_kind",
    "update",
    "dead",
    "rng",
}
STATE_KEYS |= {"data", "recent_from", "metrics", "pending"}


def check_state(
    state: dict[str, Any],
    where: str,
    *,
    about: dict[str, Any],
    kind: str,
    steps: int,
    ours: dict[str, Any],
    clock: dict[str, Any],
) -> None:
    """Raise ValueError unless `state` is one of this run.

    Args:
        state: what `Trainer.state_dict` returned.
        where: it comes from.
        about: what must be the same for a run and its continuation.
        kind: of the update that applies here.
        steps: of the whole run.
        ours: tensors and numbers of this run, whose shapes and dtypes the state has to have.
        clock: likewise; earlier versions kept none.
    """
    missing = STATE_KEYS - state.keys()
    if missing:
        raise ValueError(f"Trainer: expected {', '.join(sorted(missing))} in {where}, got none")
    check_same_run(where, state["about"], about)
    if kind != state["update_kind"]:
        raise ValueError(
            f"Trainer: expected the state of a {kind}, which applies here, got that of a "
            f"{state['update_kind']}; set update= to the one that the run began with"
        )
    step, tokens = state["step"], state["tokens"]
    if type(step) is not int or not 0 <= step <= steps:
        raise ValueError(f"Trainer: expected step in 0..{steps} in {where}, got {step!r}")
    if type(tokens) is not int or tokens < step:
        raise ValueError(f"Trainer: expected tokens >= {step} in {where}, got {tokens!r}")
    for name, value in ours.items():
        check_alike(state[name], value, name, where)
    for name in ("scales", "limits"):
        if not all(value > 0 for value in state[name]):
            raise ValueError(f"Trainer: expected {name} > 0 in {where}, got {state[name]}")
    check_alike(state.get("clock", clock), clock, "clock", where)
    check_alike(state["rng"].get("cpu"), torch.get_rng_state(), "rng.cpu", where)
