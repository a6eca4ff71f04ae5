"""Damaged, hostile and mistaken files of every format: one clear line each, and nothing runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import struct
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastsae
from fastsae.interop.load import formats

PEERS = Path(__file__).parent / "peers"
BASES = {
    "saelens/jumprelu": {},
    "saelens/gated": {},
    "saelens/topk_rescaled": {},
    "saelens/matching_pursuit": {},
    "saelens/jumprelu_skip_transcoder": {},
    "saelens/training_matryoshka_batchtopk": {},
    "saelens/training_topk_scaled": {},
    "saelens/training_jumprelu_whitened": {},
    "saelens_legacy/finetuning_scaling_factor": {},
    "saelens_legacy/topk": {},
    "sparsify/topk": {},
    "sparsify/transcode_skip": {},
    "dictionary_learning/AutoEncoder": {},
    "dictionary_learning/BatchTopKSAE": {},
    "dictionary_learning/MatryoshkaBatchTopKSAE": {},
    "dictionary_learning/GatedAutoEncoder": {},
    "dictionary_learning/AutoEncoderTopK_interrupted": {},
    "openai/topk": {},
    "gemma_scope/v1": {},
    "gemma_scope/v2_skip": {},
    "llama_scope/transcoder": {},
    "llama_scope/r1_distill": {},
    "llamascopium/topk": {},
    "llamascopium/jumprelu_transcoder": {},
    "llamascopium/jumprelu_pt": {},
    "circuit_tracer/jumprelu_skip": {"layer": 0},
    "saev/relu": {},
    "overcomplete/jump": {},
    "overcomplete/ra_topk": {"k": 4},
    "overcomplete/sae_batch_norm": {},
    "hypothesaes/matryoshka_batch_topk": {},
    "hypothesaes/topk": {},
}
"""Cases that load, and what `load` is told of them."""
OPTIONAL = {"activation_scaler.json", "config.json of gemma_scope", "config.yaml"}
"""Files that need not be there."""
SPARE = {"layer_1.safetensors", "trainer_state.pt", "runner_cfg.json", "sparsity.safetensors"}
SPARE |= {"activations_store_state.safetensors"}
"""Files that nobody reads here."""
GARBAGE = {
    "openai/topk": {"stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"},
    "hypothesaes/topk": {"threshold"},
    "overcomplete/sae_batch_norm": {"encoder.final_block.1.num_batches_tracked"},
    "dictionary_learning/AutoEncoderTopK_interrupted": {"threshold"},
}
"""Tensors that nobody reads."""
MAY_BE_MISSING = {
    "circuit_tracer/jumprelu_skip": {"W_skip", "activation_function.threshold"},
    "gemma_scope/v2_skip": {"affine_skip_connection"},
    "overcomplete/jump": {"thresholds"},
    "saelens_legacy/finetuning_scaling_factor": {"scaling_factor", "finetuning_scaling_factor"},
}
"""Tensors without which a file is one of another kind."""


def has_a_meaning(name: str, key: str, what: str, tensor: torch.Tensor) -> bool:
    """Return whether a file with another tensor is still one."""
    if key in GARBAGE.get(name, ()):
        return True
    if what == "missing":
        return key in MAY_BE_MISSING.get(name, ())
    if what == "number":  # one threshold for all latents
        return "threshold" in key
    if what == "another_rank":  # still one number
        return key.startswith("dataset_average_activation_norm")
    if what == "integers":
        return not tensor.is_floating_point()
    return (name, key, what) == ("gemma_scope/v1", "W_enc", "shorter")  # d_in need not be d_out


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """Fail where something waits, for a pipe or forever."""

    def stop(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


class Hang(BaseException):
    """What no reader catches; TimeoutError would be an OSError."""


class Probe:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def copy(name: str, tmp_path: Path, what: str = "case") -> Path:
    """Return a copy of a case, without what is expected of it, in a folder called `what`."""
    folder = tmp_path / what
    shutil.copytree(PEERS / name, folder, ignore=shutil.ignore_patterns("expected.safetensors"))
    return folder


def entrance(folder: Path) -> Path:
    """Return what a user would give to `load`."""
    held = list(folder.iterdir())
    single = len(held) == 1 and not held[0].is_dir() and held[0].suffix in (".pt", ".npz")
    return held[0] if single else folder


def files_of(name: str) -> list[str]:
    """Return the files of a case that are read."""
    root = PEERS / name
    files = [str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()]
    return sorted(f for f in files if f != "expected.safetensors" and f not in SPARE)


def is_optional(name: str, file: str) -> bool:
    return file in OPTIONAL or f"{file} of {name.split('/')[0]}" in OPTIONAL


def complaint(path: Path, **options) -> str | None:
    """Return what `load` says; None where it loads. Anything but one clear line fails."""
    try:
        fastsae.load(path, **options)
        return None
    except (ValueError, FileNotFoundError) as error:
        kind, text = type(error), str(error)
    assert kind in (ValueError, FileNotFoundError), text
    assert text.startswith("load: "), text
    shown = text.replace(str(path), "")
    assert not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in shown), text
    assert len(shown) < 900, text
    return text


def refused(path: Path, **options) -> str:
    text = complaint(path, **options)
    assert text is not None, "expected an error, got an SAE"
    return text


# Whole files.

OTHERS = {
    "safetensors": PEERS / "saelens/jumprelu/expected.safetensors",
    "pt": PEERS / "openai/relu/autoencoder.pt",
    "npz": PEERS / "gemma_scope/v1/params.npz",
    "json": PEERS / "saelens/jumprelu/cfg.json",
}


def other(file: Path) -> Path:
    """Return a file of another kind."""
    return OTHERS["pt" if file.suffix != ".pt" else "safetensors"]


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def replace_by_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def replace_by_dangling_link(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


def replace_by_loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


def cut(file: Path, share: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])


WHOLE: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "half": lambda file: cut(file, 0.5),
    "tenth": lambda file: cut(file, 0.1),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "noise": lambda file: file.write_bytes(np.random.default_rng(0).bytes(file.stat().st_size)),
    "another": lambda file: shutil.copy(other(file), file),
    "text": lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"),
}
MISSING: dict[str, Callable[[Path], object]] = {
    "removed": lambda file: file.unlink(),
    "folder": replace_by_folder,
    "pipe": replace_by_pipe,
    "dangling": replace_by_dangling_link,
    "loop": replace_by_loop,
}
FILES = [(name, file) for name in BASES for file in files_of(name)]


def ids(pairs: list) -> list[str]:
    return ["-".join(map(str, pair)) for pair in pairs]


@pytest.mark.parametrize("name", BASES)
def test_the_cases_load_before_they_are_damaged(tmp_path, name):
    assert complaint(entrance(copy(name, tmp_path)), **BASES[name]) is None


@pytest.mark.parametrize(("name", "file"), FILES, ids=ids(FILES))
def test_a_damaged_file(tmp_path, name, file):
    for what, damage in WHOLE.items():
        folder = copy(name, tmp_path, what)
        path = entrance(folder)
        damage(folder / file)
        assert complaint(path, **BASES[name]) is not None, what


@pytest.mark.parametrize(("name", "file"), FILES, ids=ids(FILES))
def test_a_file_that_is_none(tmp_path, name, file):
    for what, damage in MISSING.items():
        folder = copy(name, tmp_path, what)
        path = entrance(folder)
        damage(folder / file)
        text = complaint(path, **BASES[name])
        assert text is not None or is_optional(name, file), what


# The insides of binary files.

BINARY = [(name, file) for name, file in FILES if not file.endswith((".json", ".yaml"))]


@pytest.mark.parametrize(("name", "file"), BINARY, ids=ids(BINARY))
def test_a_file_that_was_cut_anywhere(tmp_path, name, file):
    folder = copy(name, tmp_path)
    path, whole = entrance(folder), (folder / file).read_bytes()
    places = {*range(1, 9), *range(9, len(whole), max(1, len(whole) // 16)), len(whole) - 1}
    for place in sorted(places):
        (folder / file).write_bytes(whole[:place])
        refused(path, **BASES[name])


@pytest.mark.parametrize(("name", "file"), BINARY, ids=ids(BINARY))
def test_flipped_bits(tmp_path, name, file):
    """A flip in numbers, or in what is not read, may load: these formats have no checksums."""
    folder = copy(name, tmp_path)
    path, whole = entrance(folder), (folder / file).read_bytes()
    rng = np.random.default_rng(len(whole))
    head = min(len(whole), 1024)
    places = [*rng.integers(0, head, 40), *rng.integers(len(whole) - head, len(whole), 20)]
    complaints = 0
    for place in places:
        data = bytearray(whole)
        data[place] ^= 1 << int(rng.integers(8))
        (folder / file).write_bytes(data)
        complaints += complaint(path, **BASES[name]) is not None
    assert complaints


# Tensors.


def read_tensors(file: Path, name: str) -> tuple[dict, Callable[[dict], object]]:
    """Return the tensors of a file, and what writes others in their place."""
    if file.suffix == ".safetensors":
        return load_file(file), lambda tensors: save_file(tensors, file)
    if file.suffix == ".npz":
        held = {key: torch.from_numpy(array) for key, array in np.load(file).items()}
        return held, lambda tensors: np.savez(file, **{k: t.numpy() for k, t in tensors.items()})
    data = file.read_bytes()
    line = data[: data.index(b"\n") + 1] if name.startswith("saev") else b""
    whole = torch.load(io.BytesIO(data[len(line) :]), weights_only=True)
    key = next((key for key in ("state_dict", "sae", "ae") if key in whole), None)
    held = dict(whole if key is None else whole[key])

    def write(tensors: dict) -> None:
        stream = io.BytesIO()
        torch.save(tensors if key is None else {**whole, key: tensors}, stream)
        file.write_bytes(line + stream.getvalue())

    return held, write


def without_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:-1].clone() if tensor.ndim else torch.stack([tensor, tensor, tensor])


TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "missing": lambda tensor: None,
    "shorter": without_last,
    "another_rank": lambda tensor: tensor[None, None].clone(),
    "integers": lambda tensor: tensor.to(torch.int32),
    "bools": lambda tensor: tensor > 0,
    "empty": lambda tensor: tensor.new_zeros(0),
    "number": lambda tensor: tensor.new_ones(()) if tensor.ndim else torch.ones(2),
}


@pytest.mark.parametrize(("name", "file"), BINARY, ids=ids(BINARY))
def test_tensors_that_are_others(tmp_path, name, file):
    folder = copy(name, tmp_path)
    path = entrance(folder)
    tensors, write = read_tensors(folder / file, name)
    wrong = []
    for key, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        for what, damage in TENSORS.items():
            changed = damage(tensor)
            others = {k: t for k, t in tensors.items() if k != key}
            write(others if changed is None else {**others, key: changed})
            text = complaint(path, **BASES[name])
            if text is None and not has_a_meaning(name, key, what, tensor):
                wrong.append((key, what))
    assert wrong == []


ODD: dict[str, Callable[[], object]] = {
    "sparse": lambda: torch.zeros(32, 12).to_sparse(),
    "meta": lambda: torch.zeros(32, 12, device="meta"),
    "complex": lambda: torch.zeros(32, 12, dtype=torch.complex64),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(32, 12), 0.1, 0, torch.quint8),
    "text": lambda: "a text",
    "list": lambda: [[0.0] * 12] * 32,
    "none": lambda: None,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ODD)
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("openai/relu/autoencoder.pt", "encoder.weight"),
        ("overcomplete/sae/sae.pt", "encoder.final_block.0.weight"),
        ("overcomplete/sae/sae.pt", "dictionary._weights"),
        ("dictionary_learning/AutoEncoderTopK/ae.pt", "encoder.weight"),
    ],
)
def test_tensors_of_other_kinds(tmp_path, name, key, what):
    folder = copy(str(Path(name).parent), tmp_path)
    file = folder / Path(name).name
    tensors, write = read_tensors(file, name)
    write({**tensors, key: ODD[what]()})
    refused(entrance(folder))


def test_a_module_that_is_a_dictionary_of_other_things(tmp_path):
    for number, value in enumerate(([1, 2], 3, "pre_bias latent_bias", {"pre_bias": 1}, None)):
        file = tmp_path / f"{number}.pt"
        torch.save(value, file)
        refused(file)
        for format in ("openai", "hypothesaes", "overcomplete", "saev"):
            refused(file, format=format)


# Settings.

WRONG = [None, "x", "", [], [1], {}, {"a": 1}, -1, 0, 1.5, True, 10**30, -1e300]
"""What a number, a text or an object may be replaced by."""
SETTINGS: dict[str, list[tuple[str, list]]] = {
    "saelens/jumprelu": [
        ("architecture", [None, 3, [], {}, "temporal", "x\n\x1b[31m"]),
        ("normalize_activations", ["x", 3, [], {}]),
        ("reshape_activations", ["x", 3, [1], {"a": 1}]),
        ("metadata", [3, "x", [1]]),
    ],
    "saelens/topk_rescaled": [("k", WRONG)],
    "saelens/training_topk_scaled": [("k", [1.5, 1000])],
    "saelens/training_matryoshka_batchtopk": [
        ("k", [None, "x", [], 0, -1, 10**30, True]),
        ("matryoshka_widths", [*WRONG, ["a"], [None, 3], [1.5, 32], [32, 16], [[1], 32], [10**30]]),
    ],
    "saelens/matching_pursuit": [
        ("residual_threshold", [None, "x", [], {}, -1, True]),
        ("max_iterations", ["x", [], {}, -1, 0, 1.5, True]),
    ],
    "saelens_legacy/topk": [
        ("activation_fn_str", [3, [1], {"a": 1}, "gelu"]),
        ("activation_fn_kwargs", [None, 3, [], {}, {"k": None}, {"k": "x"}, {"k": -1}, {"k": 1.5}]),
        ("architecture", [3, [1], {"a": 1}, "x"]),
        ("normalize_activations", [3, [1], "x"]),
    ],
    "sparsify/topk": [("k", WRONG), ("activation", [None, 3, [], {}, "relu"])],
    "dictionary_learning/BatchTopKSAE": [("trainer", WRONG)],
    "llama_scope/transcoder": [
        ("act_fn", [None, 3, [], {}, "gelu"]),
        ("jump_relu_threshold", [None, "x", [], {}, -1, True, -1e300]),
        ("norm_activation", [3, [], {}, "batch-wise", "token-wise"]),
        (
            "dataset_average_activation_norm",
            [3, "x", [], {}, {"in": 1}, {"in": 0, "out": 1}, {"in": "x", "out": 1}, {"in": -1}],
        ),
        ("use_glu_encoder", [True]),
    ],
    "llama_scope/r1_distill": [
        ("hook_point_in", [None, 3, [], {}, "elsewhere"]),
        ("act_fn", [None, 3, [], {}, "gelu", "x\n\x1b[31m"]),
    ],
    "llamascopium/topk": [
        ("top_k", WRONG),
        ("act_fn", [None, 3, [], {}, "gelu"]),
        ("sae_type", [None, 3, [], {}, "clt", "crosscoder", "lorsa"]),
        ("norm_activation", [3, [], {}, "batch-wise"]),
        ("hook_point_out", [3, [], "elsewhere"]),
    ],
    "gemma_scope/v2_skip": [("architecture", [None, 3, [], {}, "topk"])],
}
CASES = [
    (name, key, value)
    for name, keys in SETTINGS.items()
    for key, values in keys
    for value in values
]


@pytest.mark.parametrize(("name", "key", "value"), CASES, ids=[str(i) for i in range(len(CASES))])
def test_a_setting_that_is_another(tmp_path, name, key, value):
    folder = copy(name, tmp_path)
    file = next(folder / f for f in ("cfg.json", "config.json", "hyperparams.json")
                if (folder / f).exists())  # fmt: skip
    about = json.loads(file.read_text())
    if key == "k" and key not in about:
        assert "activation_fn_kwargs" in about
    file.write_text(json.dumps({**about, key: value}))
    refused(folder, **BASES[name])


@pytest.mark.parametrize("value", WRONG, ids=str)
@pytest.mark.parametrize("key", ["k_active_neurons", "prefix_lengths", "config", "state_dict"])
def test_a_setting_of_hypothesaes_that_is_another(tmp_path, key, value):
    folder = copy("hypothesaes/matryoshka_batch_topk", tmp_path)
    file = next(folder.iterdir())
    held = torch.load(file, weights_only=True)
    if key in held:
        held[key] = value
    else:
        held["config"][key] = value
    torch.save(held, file)
    text = complaint(file)
    assert text is not None or (key, value) in (
        ("prefix_lengths", None),
        ("k_active_neurons", 1),
    )


@pytest.mark.parametrize("value", [*WRONG, 3], ids=str)
def test_a_setting_of_openai_that_is_another(tmp_path, value):
    file = next(copy("openai/topk", tmp_path).iterdir())
    held = torch.load(file, weights_only=True)
    for wrong in ({"activation": value}, {"activation_state_dict": value},
                  {"activation_state_dict": {"k": value, "postact_fn": "ReLU"}},
                  {"activation_state_dict": {"k": 4, "postact_fn": value}}):  # fmt: skip
        if wrong.get("activation_state_dict") == {"k": 3, "postact_fn": "ReLU"}:
            continue
        torch.save({**held, **wrong}, file)
        refused(file)


@pytest.mark.parametrize("value", [torch.tensor([1, 2]), torch.tensor(0), torch.tensor(10**15),
                                   torch.tensor(-4), torch.tensor(float("nan"))],
                         ids=str)  # fmt: skip
def test_a_number_of_dictionary_learning_that_is_another(tmp_path, value):
    for name, key in (("AutoEncoderTopK", "k"), ("MatryoshkaBatchTopKSAE", "group_sizes")):
        folder = tmp_path / name
        shutil.copytree(PEERS / "dictionary_learning" / name, folder)
        held = torch.load(folder / "ae.pt", weights_only=True)
        torch.save({**held, key: value}, folder / "ae.pt")
        refused(folder)


@pytest.mark.parametrize("value", ["x", [1], torch.tensor([1.0, 2.0]), float("nan"), {}], ids=str)
def test_a_factor_of_an_interrupted_run_that_is_none(tmp_path, value):
    folder = copy("dictionary_learning/AutoEncoderTopK_interrupted", tmp_path)
    held = torch.load(folder / "ae.pt", weights_only=True)
    torch.save({**held, "norm_factor": value}, folder / "ae.pt")
    refused(folder)


TEXTS = ["", "null", "[]", "3", '"x"', '{"a":', "{]", "[" * 200_000, "{'k': 3}"]
TEXTS += ['{"k": ' + "9" * 6000 + "}"]
EMPTY = ["\ufeff{}", '{"k": NaN, "trainer": NaN}']
"""Objects without a setting, which is as good as no file where there may be none."""
JSON = [(name, file) for name, file in FILES if file.endswith(".json")]


@pytest.mark.parametrize(("name", "file"), JSON, ids=ids(JSON))
def test_json_that_is_none(tmp_path, name, file):
    folder = copy(name, tmp_path)
    for text in TEXTS + EMPTY:
        (folder / file).write_text(text)
        found = complaint(folder, **BASES[name])
        allowed = text in EMPTY and name.startswith("gemma_scope")
        assert found is not None or allowed, text[:30]


YAML = {
    "a_list": "- 1\n- 2\n",
    "a_number": "3\n",
    "tabs": "model_kind:\n\t- x\n",
    "an_object": "model_kind: !!python/object/apply:os.mkdir [MARK]\n",
    "a_class": "!!python/object/new:os.mkdir [MARK]\n",
    "a_date": "model_kind: 2020-99-99\n",
    "open_quote": 'model_kind: "x\n',
    "list_as_key": "? [a, b]\n: model_kind\n",
    "deep": "model_kind: " + "[" * 3_000 + "\n",
    "no_utf8": b"model_kind: \xff\xfe\xff\n",
    "nul": "model_kind: \x00\n",
    "large": "model_kind: x\n" + "# a comment\n" * 20_000,
    "another_kind": "model_kind: cross_layer_transcoder\n",
    "kind_of_list": "model_kind: [1, 2]\n",
    "kind_with_escapes": 'model_kind: "x\\n\\e[31m"\n',
    "unknown_alias": "model_kind: *x\n",
    "two_documents": "model_kind: transcoder_set\n---\nx: 3\n",
}


@pytest.mark.parametrize("what", YAML)
def test_yaml_that_is_none(tmp_path, what):
    folder = copy("circuit_tracer/relu", tmp_path)
    mark, text = tmp_path / "mark", YAML[what]
    data = text if isinstance(text, bytes) else text.replace("MARK", str(mark)).encode()
    (folder / "config.yaml").write_bytes(data)
    refused(folder, layer=0)
    assert not mark.exists()


def test_yaml_is_counted_with_its_aliases(tmp_path, monkeypatch):
    folder = copy("circuit_tracer/relu", tmp_path)
    monkeypatch.setattr("fastsae._files.read.LARGEST_YAML", 1000)
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]", "b: &b [*a, *a, *a, *a, *a, *a, *a, *a]"]
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text("\n".join([config, *lines]))
    fastsae.load(folder, layer=0)
    lines += [f"c{i}: *b" for i in range(20)]
    (folder / "config.yaml").write_text("\n".join([config, *lines]))
    refused(folder, layer=0)


# Sizes that are not there.


def safetensors_with(header: object, length: int | None = None, data: bytes = bytes(64)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


HEADED = ("jumprelu", "topk", "r1_distill", "transcoder", "v2_skip", "jumprelu_skip")
F32 = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}
HEADERS = {
    "long_header": safetensors_with({}, 1 << 40),
    "longest_header": safetensors_with({}, (1 << 64) - 1),
    "large_shape": safetensors_with({"W_enc": {**F32, "shape": [1 << 40, 1 << 40]}}),
    "large_offsets": safetensors_with({"W_enc": {**F32, "data_offsets": [0, 1 << 60]}}),
    "overflowing": safetensors_with({"W_enc": {**F32, "shape": [1 << 62, 4]}}),
    "backwards": safetensors_with({"W_enc": {**F32, "data_offsets": [64, 0]}}),
    "negative": safetensors_with({"W_enc": {**F32, "shape": [-4, -4]}}),
    "hole": safetensors_with({"W_enc": {**F32, "data_offsets": [8, 72]}}, data=bytes(72)),
    "overlap": safetensors_with({"W_enc": F32, "W_dec": F32}),
    "no_object": safetensors_with([1, 2, 3]),
    "unknown_dtype": safetensors_with({"W_enc": {**F32, "dtype": "F3"}}),
    "no_utf8": safetensors_with(b'{"\xff": 3}'),
    "twice": safetensors_with(b'{"W_enc": 3, "W_enc": 3}'),
    "no_tensors": safetensors_with({}, data=b""),
    "escapes": safetensors_with({"a\nb\x1b[31m\u202e": F32}),
    "many_names": safetensors_with(
        {f"t{i}": {**F32, "shape": [0], "data_offsets": [0, 0]} for i in range(5000)}, data=b""
    ),
    "seal": safetensors_with({"__metadata__": {"fastsae": "0123 {"}, "W_enc": F32}),
    "seal_of_junk": safetensors_with({"__metadata__": {"fastsae": "junk"}, "W_enc": F32}),
}


SAFETENSORS = [
    (name, file)
    for name, file in BINARY
    if file.endswith(".safetensors") and name.split("/")[1] in HEADED
]


@pytest.mark.parametrize(("name", "file"), SAFETENSORS, ids=ids(SAFETENSORS))
def test_a_header_of_safetensors_that_lies(tmp_path, name, file):
    folder = copy(name, tmp_path)
    for what, data in HEADERS.items():
        (folder / file).write_bytes(data)
        assert complaint(folder, **BASES[name]) is not None, what


def npy(header: str, data: bytes = bytes(64), version: bytes = b"\x01\x00") -> bytes:
    text = header.encode() + b" " * 8 + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + data


def described(shape: object = "(4, 4)", descr: object = "'<f4'", order: object = False) -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


ARRAYS = {
    "large_shape": npy(described("(1099511627776, 1048576)")),
    "larger_shape": npy(described(f"({10**30}, {10**30})")),
    "negative_shape": npy(described("(-4, -4)")),
    "short_data": npy(described("(4, 5)")),
    "shape_of_text": npy(described("('a', 4)")),
    "objects": npy(described(descr="'|O'")),
    "records": npy(described(descr="[('a', '<f4'), ('b', '|O')]")),
    "integers": npy(described(descr="'<i4'")),
    "longdouble": npy(described("(2, 2)", descr="'<f16'")),
    "text": npy(described("(4,)", descr="'<U4'")),
    "unknown_dtype": npy(described(descr="'x9'")),
    "code": npy("__import__('os').mkdir('MARK')"),
    "no_header": b"\x93NUMPY\x01\x00",
    "no_magic": b"junk",
    "version_9": npy(described(), version=b"\x09\x00"),
    "empty": b"",
    "missing_key": npy("{'descr': '<f4', 'shape': (4, 4), }"),
}


@pytest.mark.parametrize("what", ARRAYS)
def test_an_array_that_lies(tmp_path, what):
    folder = copy("gemma_scope/v1", tmp_path)
    with zipfile.ZipFile(folder / "params.npz") as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    held["W_enc.npy"] = ARRAYS[what].replace(b"MARK", str(tmp_path / "mark").encode())
    with zipfile.ZipFile(folder / "params.npz", "w") as archive:
        for name, data in held.items():
            archive.writestr(name, data)
    refused(folder)
    refused(folder / "params.npz")
    assert not (tmp_path / "mark").exists()


def repacked(file: Path, change: Callable[[str, bytes], bytes], **options) -> None:
    """Write the parts of a zip again."""
    with zipfile.ZipFile(file) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, data in held.items():
            archive.writestr(name, change(name, data))


def test_zip_bombs_are_refused_or_small(tmp_path):
    folder = copy("gemma_scope/v1", tmp_path)
    repacked(
        folder / "params.npz",
        lambda name, data: bytes(1 << 26) if name == "W_enc.npy" else data,
        compression=zipfile.ZIP_DEFLATED,
    )
    refused(folder)


def test_a_pickle_whose_storage_is_larger_than_its_record(tmp_path):
    file = next(copy("openai/relu", tmp_path).iterdir())

    def shorten(name: str, data: bytes) -> bytes:
        return data[:16] if "/data/" in name else data

    repacked(file, shorten)
    refused(file)


def test_a_pickle_with_a_tensor_larger_than_its_storage(tmp_path):
    """Numbers behind the storage would be those of other memory."""
    file = next(copy("openai/relu", tmp_path).iterdir())

    def stretch(name: str, data: bytes) -> bytes:
        # BININT1 32, BININT1 12, TUPLE2: the shape of the encoder, as [200, 12].
        return data.replace(b"K\x20K\x0c\x86", b"K\xc8K\x0c\x86") if "data.pkl" in name else data

    before = file.read_bytes()
    repacked(file, stretch)
    assert file.read_bytes() != before
    refused(file)


# Pickles that would run code.


def pickled(value: object, how: str) -> bytes:
    stream = io.BytesIO()
    if how == "plain":
        pickle.dump(value, stream)
    else:
        torch.save(value, stream, _use_new_zipfile_serialization=how == "zip")
    return stream.getvalue()


HOSTILE = {
    "dictionary_learning/AutoEncoderTopK": "ae.pt",
    "openai/topk": "autoencoder.pt",
    "llamascopium/jumprelu_pt": "sae_weights.pt",
    "saev/relu": "sae.pt",
    "overcomplete/sae": "sae.pt",
    "hypothesaes/topk": "SAE_M=32_K=4.pt",
}


@pytest.mark.parametrize("how", ["zip", "legacy", "plain"])
@pytest.mark.parametrize("place", ["alone", "inside", "instead"])
@pytest.mark.parametrize("name", HOSTILE)
def test_no_pickle_runs(tmp_path, name, place, how):
    folder, mark = copy(name, tmp_path), tmp_path / "mark"
    file = folder / HOSTILE[name]
    data = file.read_bytes()
    line = data[: data.index(b"\n") + 1] if name.startswith("saev") else b""
    held = torch.load(io.BytesIO(data[len(line) :]), weights_only=True)
    probe = Probe(mark)
    value = {
        "alone": probe,
        "inside": {**held, "more": probe},
        "instead": {**held, next(iter(held)): probe},
    }[place]
    file.write_bytes(line + pickled(value, how))
    refused(entrance(folder))
    formats = ("openai", "saev", "hypothesaes", "overcomplete", "saelens", "llamascopium")
    for format in formats:
        complaint(file, format=format)
        complaint(folder, format=format)
    assert not mark.exists()


def test_the_probe_would_make_a_file(tmp_path):
    pickle.loads(pickle.dumps(Probe(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


def test_no_array_of_objects_is_unpickled(tmp_path):
    folder, mark = copy("gemma_scope/v1", tmp_path), tmp_path / "mark"
    held = dict(np.load(folder / "params.npz"))
    held["W_enc"] = np.array([Probe(mark)], dtype=object)
    np.savez(folder / "params.npz", **held)
    refused(folder)
    assert not mark.exists()


def test_a_whole_module_by_name_is_not_unpickled(tmp_path):
    """A name of the library in the file is enough to be taken for it, and not to be run."""
    mark, file = tmp_path / "mark", tmp_path / "sae.pt"
    torch.save({"overcomplete.sae": 3, "dictionary._weights": Probe(mark)}, file)
    assert "a whole module" in refused(file)
    assert not mark.exists()


# One format under the name of another.

NAMES = [
    "ae.pt",
    "sae_weights.safetensors",
    "sae.safetensors",
    "params.npz",
    "params.safetensors",
    "layer_0.safetensors",
    "sae_weights.pt",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("config", ["config.json", "cfg.json", "hyperparams.json", "config.yaml"])
def test_files_of_another_format_under_this_name(tmp_path, name, config):
    (tmp_path / config).write_text('{"model_kind": "transcoder_set", "trainer": {}}')
    for source, file in OTHERS.items():
        shutil.copy(file, tmp_path / name)
        text = complaint(tmp_path)
        assert text is not None or (name, source) == ("params.npz", "npz"), source


@pytest.mark.parametrize(
    "format",
    [candidate.NAME for candidate in formats()],
)
def test_a_format_that_was_named_of_files_that_are_of_another(tmp_path, format):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", format=format)
    refused(tmp_path / "nothing", format=format)
    for name in BASES:
        if name.split("/")[0].split("_")[0][:4] == format[:4]:
            continue
        for path in (PEERS / name).iterdir():
            complaint(path, format=format)
        complaint(PEERS / name, format=format)


def test_an_unknown_file_of_torch_save_is_described(tmp_path):
    torch.save({"weights\n\x1b[31m": torch.zeros(3)}, tmp_path / "x.pt")
    assert "weights" in refused(tmp_path / "x.pt")
