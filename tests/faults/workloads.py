"""What is killed and damaged: small cases of everything that writes files.

A workload prepares a folder, works in it, and is asked afterwards what the folder holds. It never
runs in the process that forks, so that no thread of torch exists there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastsae
from fastsae import TrainConfig, Trainer
from fastsae.data import ActivationStore, harvest
from fastsae.nn import BatchTopKSAE, TopKSAE
from fastsae.train.metrics import TIMED
from tests.models.tiny import DOCUMENTS, CharTokenizer, tiny_model

SITE = "resid_post.1"
OLDER = Path(__file__).parent.parent / "interop" / "saved_by_development_version" / "TopKSAE"


def rows(n: int = 96, seed: int = 0, d: int = 8) -> Tensor:
    """Return the same rows in every process."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def digest(folder: Path, leave_out: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the content of all files below `folder`, by name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in leave_out
    }


def names(folder: Path) -> list[str]:
    """Return all names below `folder`."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


class Workload:
    """One case. `work` may be killed at any moment; `again` is what a user runs next."""

    name = ""

    def prepare(self, folder: Path) -> None:
        """Make the state before the work."""

    def work(self, folder: Path) -> None:
        """Do it."""
        raise NotImplementedError

    def again(self, folder: Path) -> None:
        """Do it again after a kill."""
        self.work(folder)

    def between(self, folder: Path) -> str | None:
        """Return what is wrong right after a kill, None if nothing is."""
        return None

    def result(self, folder: Path) -> Any:
        """Return what has to be the same however often the work was killed."""
        return digest(folder)


class Save(Workload):
    """A save over another one: one of the two loads, always."""

    name = "save"

    def sae(self, new: bool) -> fastsae.SAE:
        """Return the old or the new module: other classes, sizes and numbers."""
        torch.manual_seed(new)
        return BatchTopKSAE(8, 24, k=5) if new else TopKSAE(8, 16, k=2)

    def prepare(self, folder: Path) -> None:
        fastsae.save(self.sae(False), folder)

    def work(self, folder: Path) -> None:
        fastsae.save(self.sae(True), folder)

    def between(self, folder: Path) -> str | None:
        got = fastsae.load(folder)
        for new in (False, True):
            sae = self.sae(new)
            if type(sae) is type(got) and got.config() == sae.config():
                same = all(
                    torch.equal(a, b)
                    for a, b in zip(
                        got.state_dict().values(), sae.state_dict().values(), strict=True
                    )
                )
                return None if same else "a mixture of two saves"
        return f"loads as {got}"


class Upgrade(Save):
    """A folder of a version without checksums, written again by this one."""

    name = "convert"

    def prepare(self, folder: Path) -> None:
        shutil.copytree(OLDER, folder, dirs_exist_ok=True)

    def work(self, folder: Path) -> None:
        fastsae.save(fastsae.load(folder), folder)

    def between(self, folder: Path) -> str | None:
        got, old = fastsae.load(folder), fastsae.load(OLDER)
        right = torch.equal(got.W_dec, old.W_dec) and got.config() == old.config()
        return None if right else "another SAE"


class Harvest(Workload):
    """A harvest: continued where it was, to the same bytes."""

    name = "harvest"

    def __init__(self) -> None:
        self.model = tiny_model()

    def harvest(self, folder: Path, **settings: Any) -> None:
        """Harvest into `folder`."""
        harvest(
            self.model, CharTokenizer(), DOCUMENTS * 2, SITE, folder, context=20, batch_size=3,
            shard_rows=60, val_fraction=0.3, **settings,
        )  # fmt: skip

    def work(self, folder: Path) -> None:
        self.harvest(folder)

    def again(self, folder: Path) -> None:
        with suppress(FileExistsError):  # the kill came after the end
            self.harvest(folder)

    def between(self, folder: Path) -> str | None:
        try:
            store = ActivationStore(folder)
        except FileNotFoundError:
            return None
        except ValueError as error:
            return None if "interrupted" in str(error) else str(error)
        return None if store.manifest.complete else "incomplete, and opened without a word"


class Replace(Harvest):
    """A harvest over a complete one, which stays until the new one is whole."""

    name = "harvest --overwrite"

    def prepare(self, folder: Path) -> None:
        harvest(
            self.model, CharTokenizer(), DOCUMENTS, SITE, folder, context=16, shard_rows=50,
        )  # fmt: skip
        (folder / "notes.txt").write_text("mine")

    def work(self, folder: Path) -> None:
        self.harvest(folder, overwrite=True)

    def again(self, folder: Path) -> None:
        if ActivationStore(folder).manifest.context == 20:
            Harvest.again(self, folder)
        else:
            self.work(folder)

    def between(self, folder: Path) -> str | None:
        store = ActivationStore(folder)
        want = sum(map(len, DOCUMENTS)) * (2 if store.manifest.context == 20 else 1)
        got = sum(len(ActivationStore(folder, split=split).rows()) for split in ("train", "val"))
        return None if got == want else f"{got} rows instead of {want}"

    def result(self, folder: Path) -> Any:
        store = [ActivationStore(folder, split=split) for split in ("train", "val")]
        numbers = [hashlib.sha256(s.rows().numpy().tobytes()).hexdigest() for s in store]
        return numbers, len(names(folder)), (folder / "notes.txt").read_text()


class Stateful:
    """A stream with a state: batch i is always the same one."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        self.at += 1
        return rows(24, seed=self.at)

    def state_dict(self) -> dict[str, int]:
        """Return the position."""
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position."""
        self.at = state["at"]


class Fit(Workload):
    """A training run with checkpoints, metrics and validation."""

    name = "fit"

    def data(self) -> Any:
        """Return what is trained on."""
        return rows()

    def trainer(self, folder: Path, seed: int = 0) -> Trainer:
        """Return a trainer with fresh weights."""
        torch.manual_seed(seed)
        config = TrainConfig(
            batch_size=16, steps=11, checkpoint_every=3, log_every=2, eval_every=4, out=folder,
            progress=False, keep_checkpoints=2, calibration_rows=16,
        )  # fmt: skip
        return Trainer(BatchTopKSAE(8, 16, k=3), self.data(), config, val=rows(20, seed=9))

    def work(self, folder: Path) -> None:
        self.trainer(folder).fit()

    def again(self, folder: Path) -> None:
        self.trainer(folder, seed=5).fit(resume=True) if checkpoint_in(folder) else self.work(
            folder
        )

    def between(self, folder: Path) -> str | None:
        return None

    def result(self, folder: Path) -> Any:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        log = [{**json.loads(line), **dict.fromkeys(TIMED, 0)} for line in lines]
        # Of time, and of what holds a time.
        timed = ("metrics.jsonl", "state.json", "run.json")
        return digest(folder, timed), log, names(folder)


class Stream(Fit):
    """The same from a stream that has a state."""

    name = "stream"

    def data(self) -> Any:
        return Stateful()


def checkpoint_in(folder: Path) -> bool:
    """Return whether there is a checkpoint to continue from."""
    return any((folder / "checkpoints").glob("step_*"))


ALL: tuple[type[Workload], ...] = (Save, Upgrade, Harvest, Replace, Fit, Stream)


def quiet() -> None:
    """Keep warnings of fastsae off the terminal."""
    logging.getLogger("fastsae").addHandler(logging.NullHandler())
    logging.getLogger("fastsae").propagate = False
