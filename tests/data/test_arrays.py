"""Activations stored by other programs, read as a source."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastsae.data import open_activations
from fastsae.nn import TopKSAE
from fastsae.train import TrainConfig, Trainer

datasets = pytest.importorskip("datasets")
HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def x():
    """40 contexts of 6 tokens, exact in half precision."""
    return torch.randint(-64, 64, (40, 6, 8), generator=torch.Generator().manual_seed(0)) / 16


def cached(x):
    """The layout of SAELens' cached activations: contexts of one hook, with their tokens."""
    features = datasets.Features(
        {
            HOOK: datasets.Array2D(tuple(x.shape[1:]), "float32"),
            "token_ids": datasets.Sequence(datasets.Value("int32"), length=x.shape[1]),
        }
    )
    rows = {HOOK: list(x.numpy()), "token_ids": [[1] * x.shape[1]] * len(x)}
    return datasets.Dataset.from_dict(rows, features=features)


def written(kind, x, folder):
    """Write `x` in a format, and return what to open and the column."""
    if kind == "npy":
        np.save(folder / "x.npy", x.numpy().astype("float16"))
        return folder / "x.npy", None
    if kind == "safetensors":
        tensors = {"acts": x.to(torch.bfloat16), "tokens": torch.zeros(240, dtype=torch.int64)}
        save_file(tensors, folder / "x.safetensors")
        return folder / "x.safetensors", None
    if kind == "cached":
        cached(x).save_to_disk(folder / "cached", num_shards=3)
        return folder / "cached", HOOK
    if kind == "vectors":
        return datasets.Dataset.from_dict({"v": x.flatten(0, 1).tolist()}), "v"
    return cached(x).to_iterable_dataset(), HOOK


@pytest.mark.parametrize("kind", ["npy", "safetensors", "cached", "vectors", "streaming"])
def test_every_row_comes_once_and_in_order(kind, x, tmp_path):
    source = open_activations(*written(kind, x, tmp_path))
    rows = torch.cat(list(source.batches(7, seed=None)))
    assert source.d_in == 8
    assert rows.dtype == (torch.float64 if kind == "vectors" else torch.float32)
    assert torch.equal(rows.float(), x.flatten(0, 1))


@pytest.mark.parametrize("kind", ["npy", "safetensors", "cached", "vectors"])
def test_shuffled_epochs_hold_every_row(kind, x, tmp_path):
    source = open_activations(*written(kind, x, tmp_path))
    batches = source.batches(60, seed=3)
    epoch = torch.cat([next(batches) for _ in range(4)]).float()
    rows = x.flatten(0, 1)
    assert not torch.equal(epoch, rows)
    order = np.lexsort(epoch.T.numpy()), np.lexsort(rows.T.numpy())
    assert torch.equal(epoch[order[0]], rows[order[1]])
    rest, held = source.hold_back(64)
    assert (len(rest), len(held)) == (176, 64)
    parts = torch.cat([p for s in (rest, held) for p in s.batches(50, seed=None)]).float()
    assert torch.equal(parts[np.lexsort(parts.T.numpy())], rows[order[1]])


def test_selected_rows_of_a_dataset_are_those(x):
    chosen = [30, 2, 17]
    source = open_activations(cached(x).select(chosen), HOOK)
    assert torch.equal(torch.cat(list(source.batches(5, seed=None))), x[chosen].flatten(0, 1))


def test_a_run_on_a_file_is_the_run_on_its_rows(x, tmp_path):
    path, _ = written("npy", x, tmp_path)
    found = []
    for data in (open_activations(path), x.flatten(0, 1)):
        torch.manual_seed(0)
        sae = TopKSAE(8, 16, k=2)
        Trainer(sae, data, TrainConfig(steps=5, batch_size=32, calibration_rows=0)).fit()
        found.append(sae.W_dec.detach())
    assert torch.equal(*found)


def ragged():
    return datasets.Dataset.from_dict({"v": [[1.0, 2.0], [1.0]]})


@pytest.mark.parametrize(
    ("make", "column", "message"),
    [
        (lambda d, x: d / "none.npy", None, "expected .*none.npy, found none"),
        (lambda d, x: (d / "x.txt", (d / "x.txt").write_text("1"))[0], None,
         "expected a folder of harvest or of datasets, a .npy or a .safetensors file"),
        (lambda d, x: (d / "x.npy", (d / "x.npy").write_bytes(b"\x93NUMPY"))[0], None,
         "to be a .npy file of numbers"),
        (lambda d, x: (d / "x.npy", np.save(d / "x.npy", np.arange(6).reshape(2, 3)))[0], None,
         r"expected floating \[n, d\] or \[n, t, d\] in .*x.npy, got torch.int64 \[2, 3\]"),
        (lambda d, x: written("safetensors", x, d)[0], "other",
         "expected column to be a tensor of vectors in .*: acts; got other"),
        (lambda d, x: cached(x), "token_ids", f"a column of vectors in it: {HOOK}; got token_ids"),
        (lambda d, x: ragged(), "v", r"vectors of one width in column v, got widths \['1', '2'\]"),
    ],
)  # fmt: skip
def test_what_holds_no_vectors_is_refused(make, column, message, x, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=f"^open_activations: .*{message}"):
        open_activations(make(tmp_path, x), column)


def test_objects_are_never_unpickled(tmp_path):
    file = tmp_path / "x.npy"
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"to be a \.npy file of numbers"):
        open_activations(file)
