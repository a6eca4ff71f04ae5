"""What the processes of these tests compute, and one process alone as well."""

import torch

import fastsae
from fastsae import TrainConfig
from fastsae.nn import StepContext
from fastsae.nn.objective import AUX_ROOM
from fastsae.nn.transcoder import TranscoderMixin

D, F, K, N, STEPS = 16, 61, 6, 64, 100
"""61 latents: two or four processes do not have equally many."""
K_AUX = 4
"""More are dead than a step trains."""
CLASSES = {
    "TopK": (fastsae.TopKSAE, {}),
    "AbsTopK": (fastsae.TopKSAE, {"absolute": True}),
    "BatchTopK": (fastsae.BatchTopKSAE, {}),
    "FeatureChoice": (fastsae.FeatureChoiceSAE, {"mutual_choice_batches": 20, "refresh": 15}),
    "Matryoshka": (fastsae.MatryoshkaSAE, {}),
    "JumpReLU": (fastsae.JumpReLUSAE, {"auxk_alpha": 0.1}),
    "ReLU": (fastsae.ReLUSAE, {"penalty": "p_anneal"}),
    "Gated": (fastsae.GatedSAE, {"auxk_alpha": 0.1}),
    "Transcoder": (fastsae.Transcoder, {"skip": True}),
    "BatchTopKTranscoder": (fastsae.BatchTopKTranscoder, {}),
}
BY_FOUR = ("TopK", "BatchTopK", "FeatureChoice", "Matryoshka", "JumpReLU", "Transcoder")
"""Those that four processes train as well, which takes longer where there are fewer cores."""
BESIDE = ("JumpReLU", "BatchTopK")
"""Whose checkpoints a thread writes."""
CONFIG = TrainConfig()


def build(name, dtype=torch.float64):
    """Return an SAE, and batches of its columns."""
    torch.manual_seed(0)
    cls, options = CLASSES[name]
    transcodes = issubclass(cls, TranscoderMixin)
    sae = cls(D, *([D] if transcodes else []), F, K, dtype=dtype, k_aux=K_AUX, **options)
    width = sum(sae.columns.widths)
    batches = [torch.randn(N, width, dtype=dtype) for _ in range(STEPS)]
    return sae.train(), batches


def dead_latents():
    """Return latents that the auxiliary loss trains in every step."""
    dead = torch.rand(F, generator=torch.Generator().manual_seed(1)) < 0.3
    assert int(dead.sum()) > AUX_ROOM * K_AUX
    return dead


def context(dead, turn):
    """Return what a step knows."""
    return StepContext(dead=dead, turn=turn, progress=0.5)


def matrices():
    """Return matrices that selection is tried on, by name: few values, so that many are equal."""
    draw = torch.Generator().manual_seed(2)
    few = torch.randint(-2, 4, (N, F), generator=draw)
    one = torch.zeros(N, F)
    one[3, 60] = 2.0
    return {
        "float32": torch.randn(N, F, generator=draw),
        "float64": torch.randn(N, F, generator=draw, dtype=torch.float64),
        "ties": few.float(),
        "ties64": few.double(),
        "one value": torch.ones(N, F),
        "one positive": one,
        "nothing positive": -torch.ones(N, F),
        "tiny": few.float() * 1e-42,  # denormal
        "huge": few.double() * 1e300,
    }


def run(name, out, mesh):
    """Return an SAE, rows to train and to validate on, and the settings of a short run."""
    sae, _ = build(name)
    draw = torch.Generator().manual_seed(3)
    rows = [
        torch.randn(count, sum(sae.columns.widths), generator=draw, dtype=torch.float64)
        for count in (4096, 256)
    ]
    config = TrainConfig(
        steps=60,
        batch_size=N,
        dead_after_tokens=256,
        log_every=10,
        checkpoint_every=20,
        async_checkpoints=name in BESIDE,
        calibration_rows=128,
        out=out,
        mesh=mesh,
        progress=False,
    )
    return sae, *rows, config
