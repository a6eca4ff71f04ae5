"""Train an SAE: `Trainer(sae, data, TrainConfig(...)).fit()`, or step by step."""

from fastsae.train.budget import Rehearsal, rehearse, steps_within
from fastsae.train.checkpoint import latest, settings_of
from fastsae.train.config import TrainConfig
from fastsae.train.dead import DeadLatents, UnderusedLatents
from fastsae.train.gap import Gap
from fastsae.train.lane import Run, RunResult
from fastsae.train.many import train_many
from fastsae.train.sgd_sai import SGDSaI
from fastsae.train.trainer import Trainer, TrainResult
from fastsae.train.update import Update, make_update, why_not_fused

__all__ = [
    "DeadLatents",
    "Gap",
    "Rehearsal",
    "Run",
    "RunResult",
    "SGDSaI",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "UnderusedLatents",
    "Update",
    "latest",
    "make_update",
    "rehearse",
    "settings_of",
    "steps_within",
    "train_many",
    "why_not_fused",
]
