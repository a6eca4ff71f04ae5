"""Train an SAE: `Trainer(sae, data, TrainConfig(...)).fit()`."""

from fastsae.train.batches import Batches, TensorData
from fastsae.train.checkpoint import latest
from fastsae.train.config import TrainConfig
from fastsae.train.dead import DeadLatents, UnderusedLatents
from fastsae.train.loop import Trainer, TrainResult
from fastsae.train.sgd_sai import SGDSaI

__all__ = [
    "Batches",
    "DeadLatents",
    "SGDSaI",
    "TensorData",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "UnderusedLatents",
    "latest",
]
