"""The folder of an SAE of fastsae: that of SAELens >= 6, with what fastsae adds.

`sae_weights.safetensors` holds W_enc [d_in, d_sae], W_dec [d_sae, d_in], b_enc, b_dec and what the
architecture has besides, such as threshold [d_sae]. `cfg.json` holds SAELens' keys; fastsae's class
and its constructor arguments are under `metadata.fastsae`, which SAELens carries along. A class
that SAELens has no architecture for is written under a name that it refuses, not under a wrong one.
Nothing is ever unpickled.

The weights file is the save: it holds the checksums of its tensors and the content of `cfg.json`,
and takes its place with one rename. `cfg.json` names the weights file that it belongs to, so one of
another save is noticed, and the content inside the weights file serves. A folder that SAELens saved
again has no checksums, but what fastsae said of the module, whatever was changed: where its keys
say something else, it is read as SAELens reads it.
"""

from __future__ import annotations

import inspect
import json
import os
from functools import singledispatch
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from fastsae._files import checksum
from fastsae._files.read import (
    TensorFile,
    field,
    note_without_checksums,
    printable,
    read_json,
)
from fastsae._files.write import as_json, publish, reason, staging, write_file, write_tensors
from fastsae._log import logger
from fastsae.interop import saelens
from fastsae.interop.weights import SMALLEST_THRESHOLD, Options
from fastsae.nn import (
    SAE,
    BatchTopKSAE,
    FeatureChoiceSAE,
    GatedSAE,
    GroupMaxSAE,
    JumpReLUSAE,
    MatchingPursuitSAE,
    NormalizedSAE,
    ReLUSAE,
    TopKSAE,
)
from fastsae.nn.cross_layer_base import CrossLayerMixin
from fastsae.nn.loss import upcast
from fastsae.nn.normalized import KINDS, SHAPES
from fastsae.nn.penalized import PenalizedSAE
from fastsae.nn.transcoder import TranscoderMixin

NAME = "fastsae"
WEIGHTS = saelens.WEIGHTS
CONFIG = saelens.CONFIG
LAYOUT_VERSION = "6.0.0"
"""Version of SAELens whose layout this is; newer ones migrate it."""
DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}
FOUR = {"W_enc_rows", "W_dec", "b_enc", "b_dec"}
OWN = FOUR | {"threshold", "density", "budget", "batches_seen", "coefficient", "unit"}
OWN |= {"log_threshold", "r_mag", "b_mag", "W_skip", "stop_norm"}
OWN |= {"W_decs", "W_maps", "output_scale"}
"""Parameters, lists of them and buffers of fastsae's classes: written as SAELens has them, or made
anew."""
UNIT = 1e-6
"""How far from 1 a norm may be that is 1."""
RENAMED = {"aux_k": "k_aux", "aux_alpha": "auxk_alpha"}
"""Constructor arguments that development versions of 0.1.0 saved under other names."""


class Architecture(NamedTuple):
    """How a class of fastsae looks to SAELens."""

    cfg: dict[str, Any]
    """Keys of cfg.json, `architecture` among them."""
    tensors: dict[str, Tensor]
    """Tensors of the weights file besides the four parameters."""


@singledispatch
def architecture(sae: SAE) -> Architecture:
    """Return what SAELens has for `sae`; here a name that it does not know."""
    return Architecture({"architecture": class_name(sae)}, {})


@architecture.register
def _(sae: TopKSAE) -> Architecture:
    unit = _has_unit_rows(sae)
    if sae.select_by_decoder_norm and not unit:
        return Architecture({"architecture": "topk_by_decoder_norm", "k": sae.k}, {})
    name = "abstopk" if sae.absolute else "topk"
    # With rows of norm 1 both are the same, and tools of SAELens fold what is rescaled.
    return Architecture(
        {"architecture": name, "k": sae.k, "rescale_acts_by_decoder_norm": unit}, {}
    )


@architecture.register
def _(sae: MatchingPursuitSAE) -> Architecture:
    keys = ("residual_threshold", "max_iterations", "stop_on_duplicate_support")
    cfg = {key: getattr(sae, key) for key in keys}
    return Architecture({"architecture": "matching_pursuit", **cfg}, {})


@architecture.register
def _(sae: GroupMaxSAE) -> Architecture:
    return Architecture({"architecture": "groupmax", "k": sae.k}, {})


@architecture.register(BatchTopKSAE)
@architecture.register(FeatureChoiceSAE)
@architecture.register(JumpReLUSAE)
def _(sae: BatchTopKSAE | FeatureChoiceSAE | JumpReLUSAE) -> Architecture:
    # Not by `clone`, which on the meta device takes a second to import what it needs.
    threshold = sae.threshold.new_empty(sae.d_sae).copy_(sae.threshold.detach())
    return Architecture({"architecture": "jumprelu"}, {"threshold": threshold})


@architecture.register
def _(sae: CrossLayerMixin) -> Architecture:
    names = [name for name in ("threshold", "output_scale") if hasattr(sae, name)]
    tensors = {name: getattr(sae, name).detach() for name in names}
    return Architecture({"architecture": class_name(sae), "d_out": sae.d_out}, tensors)


@architecture.register
def _(sae: GatedSAE) -> Architecture:
    return Architecture({"architecture": "gated"}, {"r_mag": sae.r_mag, "b_mag": sae.b_mag})


@architecture.register
def _(sae: ReLUSAE) -> Architecture:
    return Architecture({"architecture": "standard"}, {})


def _has_unit_rows(sae: SAE) -> bool:
    """Return whether rows of the decoder have norm 1, within the rounding of float32."""
    if sae.W_dec.is_meta:
        return False
    norms = torch.linalg.vector_norm(upcast(sae.W_dec.detach()), dim=1)
    return bool(((norms - 1).abs() <= UNIT).all())


def class_name(sae: SAE) -> str:
    """Return the name under which the class of `sae` is registered; torch derives classes of its
    own from it (parametrize, fully_shard), which do not count."""
    names = {cls: name for name, cls in SAE.registry.items()}
    for cls in type(sae).__mro__:
        if cls in names:
            return names[cls]
    raise TypeError(f"save: expected a registered SAE class, got {type(sae).__name__}")


def matches(path: Path) -> bool:
    """Return whether `path` is a folder that fastsae wrote, even if damaged since."""
    if not (path / WEIGHTS).is_file():
        return False
    try:
        if TensorFile(path / WEIGHTS, "load").about is not None:
            return True
        if not (path / CONFIG).exists():
            return False
        metadata = read_json(path / CONFIG, "load").get("metadata")
    except ValueError:
        return True
    return isinstance(metadata, dict) and "fastsae" in metadata


def write(sae: SAE | NormalizedSAE, path: str | os.PathLike[str]) -> str:
    """Write `sae` into the folder `path`, which is made if needed.

    A crash or a full disk at any moment leaves a folder that loads, as the previous save or as this
    one.

    Returns:
        A checksum of all that was written.

    Raises:
        TypeError: `sae.metadata` or a constructor argument is not JSON.
        ValueError: the module holds a parameter or buffer that its class does not make.
        RuntimeError: a file cannot be written.
    """
    folder = Path(path)
    tensors, cfg = contents(sae)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with staging(folder) as stage:
            seal = write_files(stage, tensors, cfg)
            publish(stage, folder, [WEIGHTS, CONFIG])
    except (OSError, SafetensorError) as error:
        raise RuntimeError(
            f"save: could not write {folder} ({reason(error)}); what was there before is kept"
        ) from error
    return seal


def write_files(stage: Path, tensors: dict[str, Tensor], cfg: dict[str, Any]) -> str:
    """Write what `contents` returned into a new folder; return the seal of the weights file."""
    seal = write_tensors(stage / WEIGHTS, tensors, cfg)
    own = {**cfg["metadata"]["fastsae"], "weights": seal}
    cfg = {**cfg, "metadata": {**cfg["metadata"], "fastsae": own}}
    own["checksum"] = checksum.of_json(cfg)
    write_file(stage / CONFIG, as_json(cfg))
    return seal


def contents(
    sae: SAE | NormalizedSAE, progress: dict[str, int] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of the weights file and the content of `cfg.json`.

    Args:
        sae: for raw activations.
        progress: {"step": done, "steps": of the whole run} of a module in training.

    Raises:
        TypeError, ValueError: as in `write`.
    """
    around = _around(sae)
    sae = sae.sae if isinstance(sae, NormalizedSAE) else sae
    if not sae.parallel.is_alone:
        raise ValueError(
            "save: expected an SAE in one piece, got one that is spread over processes; "
            "distributed.unshard_(sae) on all of them brings it together"
        )
    form = _form(sae)
    tensors = {name: _held(sae, own) for own, name in _parameter_names(sae).items()}
    cfg = {
        **_keys(sae, form),
        **around,
        "device": "cpu",
        "metadata": {
            **sae.metadata,
            "sae_lens_version": LAYOUT_VERSION,
            "fastsae": {
                "class": class_name(sae),
                "config": sae.config(),
                "learned": {name: getattr(sae, name).item() for name in _numbers(sae)},
                **({"around": around} if around else {}),
                **({"training": progress} if progress else {}),
            },
        },
    }
    try:
        cfg = json.loads(json.dumps(cfg, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"save: expected metadata and arguments of {type(sae).__name__} to be JSON ({error})"
        ) from None
    return tensors | form.tensors | _extra(sae), cfg


def read(path: Path, options: Options = Options()) -> SAE | NormalizedSAE:  # noqa: B008
    """Read the module that `write` wrote: same class, arguments, dtype and threshold, in eval mode;
    see `load`."""
    file, cfg, weights, resaved = _open(path)
    sae, learned = _build(file, cfg, options.device)
    around = _read_around(cfg, file)
    if resaved and not _says_the_same(sae, around, cfg, weights):
        logger.warning(
            "load: %s was saved by SAELens after fastsae, with other settings, which are followed",
            path,
        )
        return saelens.read(path, options)
    if weights.seal is None and not resaved:
        _check_keys(file, cfg, _fixed_keys(sae) | around)
    _load(sae, learned, file, weights, options)
    sae = sae.to(options.dtype) if options.dtype is not None else sae
    return NormalizedSAE(sae, **around).eval() if around else sae.eval()


def _says_the_same(
    sae: SAE, around: dict[str, str], cfg: dict[str, Any], weights: TensorFile
) -> bool:
    """Return whether the keys of a folder, and its thresholds, are those of the module."""
    keys = _fixed_keys(sae) | around
    if any(cfg.get(key) != value for key, value in keys.items()):
        return False
    if isinstance(sae, TopKSAE) and cfg.get("rescale_acts_by_decoder_norm"):
        norms = torch.linalg.vector_norm(weights.tensor("W_dec").double(), dim=1)
        if bool(((norms - 1).abs() > UNIT).any()):
            return False
    if isinstance(sae, BatchTopKSAE):
        threshold = weights.tensor("threshold")
        return bool((threshold == threshold.flatten()[0]).all())
    return True


def _around(sae: SAE | NormalizedSAE) -> dict[str, str]:
    """Return what is done around an SAE, by the keys of cfg.json; empty where nothing is."""
    if not isinstance(sae, NormalizedSAE):
        return {}
    keys = ("normalize_activations", "reshape_activations")
    return {key: getattr(sae, key) for key in keys}


def _read_around(cfg: dict[str, Any], file: Path) -> dict[str, str]:
    own = cfg["metadata"]["fastsae"].get("around")
    if own is None:
        return {}
    if not isinstance(own, dict):
        raise ValueError(f"load: expected around in {file} to be an object, got {own!r}")
    keys = {"normalize_activations": KINDS, "reshape_activations": SHAPES}
    return {
        key: field(own, key, str, file, "load", choices=choices) for key, choices in keys.items()
    }


def _load(
    sae: SAE, learned: dict[str, Any], file: Path, weights: TensorFile, options: Options
) -> None:
    """Fill `sae` from the weights file."""
    device = options.device
    form, names = _form(sae), _parameter_names(sae)
    expected = {name: _held(sae, own).shape for own, name in names.items()}
    expected |= {name: t.shape for name, t in (form.tensors | _extra(sae)).items()}
    for name, shape in expected.items():
        got = weights.shapes.get(name)
        if got != [*shape]:
            raise ValueError(
                f"load: expected {name} to be {[*shape]} in {weights.path}, got "
                f"{'none' if got is None else got}"
            )
    tensors = {name: tensor.to(device) for name, tensor in weights.tensors().items()}
    for name in names.values():
        if (dtype := tensors[name].dtype) != sae.W_enc_rows.dtype:
            raise ValueError(
                f"load: expected {name} in {sae.W_enc_rows.dtype}, as dtype in {file} says, got "
                f"{dtype}; change both, or neither"
            )
    if sae.W_enc_rows.is_meta:
        sae.to_empty(device=device)
    with torch.no_grad():
        for own, name in names.items():
            if "." in own:
                _held(sae, own).copy_(tensors[name])
            else:
                setattr(sae, own, tensors[name])
        for name, held in _extra(sae).items():
            held.data = tensors[name].to(held.device)
        _restore(sae, tensors, learned, file)


def _open(folder: Path) -> tuple[Path, dict[str, Any], TensorFile, bool]:
    """Return the file that says what the folder holds, its content, the open weights file, and
    whether SAELens has saved both again."""
    file = folder / CONFIG
    if not (folder / WEIGHTS).exists():
        raise FileNotFoundError(f"load: expected {folder} to hold {WEIGHTS}, found none")
    weights = TensorFile(folder / WEIGHTS, "load")
    inside = weights.about if isinstance(weights.about, dict) else None
    if not file.exists():
        if inside is None:
            raise FileNotFoundError(f"load: expected {folder} to hold {CONFIG}, found none")
        logger.warning("load: no %s; took the copy of it in %s", file, weights.path)
        return weights.path, inside, weights, False
    cfg = read_json(file, "load")
    own = cfg["metadata"].get("fastsae") if isinstance(cfg.get("metadata"), dict) else None
    seal = own.pop("checksum", None) if isinstance(own, dict) else None
    if seal is None and inside is None:
        note_without_checksums(folder, "load", "fastsae.save(fastsae.load(path), path)")
        return file, cfg, weights, False
    if seal is None:  # of a version without, which a save was about to replace
        logger.warning("load: %s is of another save; took the copy in %s", file, weights.path)
        return file, inside or {}, weights, False
    if seal != checksum.of_json(cfg) and inside is None:
        return file, cfg, weights, True
    if seal != checksum.of_json(cfg):
        raise ValueError(
            f"load: expected {file} as it was saved, got one that was damaged or edited; delete it "
            f"to load the copy of it in {weights.path}"
        )
    if inside is None:
        raise ValueError(f"load: expected {weights.path} to have the checksums of {file}, got none")
    if own is None or own.get("weights") != weights.seal:
        logger.warning("load: %s is of another save; took the copy in %s", file, weights.path)
    return file, inside, weights, False


def _form(sae: SAE) -> Architecture:
    """Return what SAELens has for exactly this class: for one from elsewhere, an unknown name."""
    name = class_name(sae)
    if "." in name:
        return Architecture({"architecture": name}, {})
    form = architecture(sae)
    if isinstance(sae, TranscoderMixin):  # SAELens knows those of ReLU and JumpReLU
        rule = "" if isinstance(sae, ReLUSAE) else f"{form.cfg['architecture']}_"
        skip = {"W_skip": sae.W_skip} if sae.skip else {}
        kind = f"{rule}{'skip_' if sae.skip else ''}transcoder"
        cfg = {"architecture": kind, "apply_b_dec_to_input": False, "d_out": sae.d_out}
        form = Architecture(form.cfg | cfg, form.tensors | skip)
    return form


def _parameter_names(sae: SAE) -> dict[str, str]:
    """Return the names in the file of the four parameters; SAELens calls a gate's bias b_gate, and
    matching pursuit has no encoder."""
    if isinstance(sae, MatchingPursuitSAE):
        return {"W_dec": "W_dec", "b_dec": "b_dec"}
    if isinstance(sae, CrossLayerMixin):
        lists = [name for name, _ in sae.named_parameters() if "." in name]
        return {name: name for name in ("W_enc_rows", *lists, "b_enc", "b_dec")}
    b_enc = "b_gate" if isinstance(sae, GatedSAE) else "b_enc"
    return {"W_enc": "W_enc", "W_dec": "W_dec", "b_enc": b_enc, "b_dec": "b_dec"}


def _held(sae: SAE, name: str) -> Tensor:
    """Return a parameter, or one of a list by its place: `W_decs.0`."""
    return sae.get_parameter(name) if "." in name else getattr(sae, name)


def _keys(sae: SAE, form: Architecture) -> dict[str, Any]:
    """Return the keys of cfg.json that follow from the module, and from where it was trained."""
    hook = str(sae.metadata.get("hook_name", ""))
    return {
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.W_enc_rows.dtype).removeprefix("torch."),
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": "none",
        # Heads are two dimensions in TransformerLens, and side by side here.
        "reshape_activations": "hook_z" if hook.endswith(".hook_z") else "none",
        **form.cfg,
    }


def _fixed_keys(sae: SAE) -> dict[str, Any]:
    """Return the keys of cfg.json that do not depend on the numbers in the weights."""
    keys = _keys(sae, _form(sae))
    keys.pop("rescale_acts_by_decoder_norm", None)
    return keys


def _numbers(sae: SAE) -> list[str]:
    """Return the buffers of one number each that go into cfg.json."""
    return ["coefficient", "unit", "batches_seen"] if isinstance(sae, PenalizedSAE) else []


def _extra(sae: SAE) -> dict[str, Tensor]:
    """Return parameters and buffers of a class from elsewhere that fastsae's classes do not have.

    Raises:
        ValueError: the class is one of fastsae, which would not make them again.
    """
    inside = "." not in class_name(sae)
    known = OWN if inside else {*FOUR, *_numbers(sae)}
    _check_arguments(sae)
    extra = {
        name: tensor
        for name, tensor in sae.state_dict(keep_vars=True).items()
        if name.split(".")[0] not in known and not name.startswith("parametrizations.")
    }
    if extra and inside:
        raise ValueError(
            f"save: expected {class_name(sae)} to hold nothing that its class does not make, got "
            f"{', '.join(extra)}; a subclass whose constructor makes them is saved and loaded"
        )
    return extra


def _check_arguments(sae: SAE) -> None:
    """Raise ValueError where the constructor has an argument that config() does not hold."""
    if "." not in class_name(sae):
        return
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(type(sae).__init__).parameters.values()
    named = {p.name for p in found if p.kind in kinds} - {"self", "dtype", "device"}
    if missing := named - sae.config().keys():
        raise ValueError(
            f"save: expected config() of {type(sae).__name__} to hold every argument of its "
            f"constructor, got none for {', '.join(sorted(missing))}"
        )


def _restore(sae: SAE, tensors: dict[str, Tensor], learned: dict[str, Any], file: Path) -> None:
    """Set from a file what is not one of the four parameters."""
    for name in _numbers(sae):
        getattr(sae, name).fill_(field(learned, name, float, file, "load"))
    if "." in class_name(sae):
        return
    if isinstance(sae, CrossLayerMixin) and sae.decoders == "tied":
        sae.output_scale.copy_(tensors["output_scale"])
    if isinstance(sae, CrossLayerMixin) and isinstance(sae, BatchTopKSAE):
        sae.threshold.copy_(tensors["threshold"])
    elif isinstance(sae, BatchTopKSAE):
        lowest, highest = tensors["threshold"].aminmax()
        if lowest != highest:
            raise ValueError(
                f"load: expected one threshold for all latents of {class_name(sae)}, got "
                f"{lowest:.6g} to {highest:.6g}"
            )
        sae.threshold.copy_(lowest)
    if isinstance(sae, FeatureChoiceSAE):
        sae.threshold.copy_(tensors["threshold"])
        sae.density.zero_()
        sae.budget.zero_()
        sae.batches_seen.fill_(sae.mutual_choice_batches)
    if isinstance(sae, JumpReLUSAE):
        # SAELens trains thresholds below 0, which are as good as 0.
        threshold = tensors["threshold"].float() / sae.unit
        sae.log_threshold.copy_(threshold.clamp_min(SMALLEST_THRESHOLD).log())
        start = torch.tensor(0.1 if sae.initial_threshold is None else sae.initial_threshold)
        untouched = bool(torch.isclose(threshold.cpu(), start).all()) and not sae.batches_seen
        sae.thresholds_in_units = untouched
    if isinstance(sae, GatedSAE):
        sae.r_mag.copy_(tensors["r_mag"])
        sae.b_mag.copy_(tensors["b_mag"])
    if isinstance(sae, TranscoderMixin) and sae.skip:
        sae.W_skip.copy_(tensors["W_skip"])


def _build(
    file: Path, cfg: dict[str, Any], device: torch.device | str
) -> tuple[SAE, dict[str, Any]]:
    """Return the module that `cfg` from `file` describes, and what it had learned besides its
    tensors. A class of fastsae comes without storage, on the meta device.
    """
    try:
        metadata = dict(cfg["metadata"])
        own = metadata.pop("fastsae")
        cls, dtype = _class_named(own["class"]), DTYPES[cfg["dtype"]]
        arguments = {RENAMED.get(name, name): value for name, value in own["config"].items()}
        inside = "." not in own["class"] and cls.__module__.startswith("fastsae.")
        inside &= cls is not MatchingPursuitSAE  # whose matrices are one parameter
        with torch.random.fork_rng(devices=[]):
            sae = cls(**arguments, dtype=dtype, device="meta" if inside else device)
        learned = dict(own.get("learned", {}))
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        names = ", ".join(sorted(name for name in SAE.registry if "." not in name))
        raise ValueError(
            f"load: expected {file} to describe one of {names}, or of your own classes, under "
            f"metadata.fastsae, got {_summary(cfg)} ({type(error).__name__}: {error})"
        ) from error
    if training := own.get("training"):
        step, steps = (field(training, name, int, file, "load") for name in ("step", "steps"))
        if step < steps:
            logger.warning("load: %s is of step %d of %d of a run", file.parent, step, steps)
    metadata.pop("sae_lens_version", None)
    sae.metadata = metadata
    return sae, learned


def _class_named(name: str) -> type[SAE]:
    """Return the registered class of that name; development versions saved no module with it."""
    if name in SAE.registry:
        return SAE.registry[name]
    found = [cls for cls in SAE.registry.values() if cls.__name__ == name]
    if len(found) != 1:
        raise KeyError(name)
    return found[0]


def _check_keys(file: Path, cfg: dict[str, Any], keys: dict[str, Any]) -> None:
    for key, value in keys.items():
        if key in cfg and cfg[key] != value:
            raise ValueError(
                f"load: expected {key} = {value!r} in {file}, as metadata.fastsae says, got "
                f"{cfg[key]!r}; change both, or neither"
            )


def _summary(cfg: Any) -> str:
    """Return what an unreadable configuration says about its kind."""
    if not isinstance(cfg, dict):
        return type(cfg).__name__
    metadata = cfg.get("metadata")
    own = metadata.get("fastsae") if isinstance(metadata, dict) else None
    return printable(f"architecture = {cfg.get('architecture')!r}, fastsae = {own!r}")[:200]
