"""A model run on a few tokens, to see what its modules take and give."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastsae.models.eager import uncompiled
from fastsae.models.threads import only_here, probing

ROWS, TOKENS = 2, 8
"""Contexts of a probe, and tokens of each."""


class Handle(Protocol):
    """A hook, or several, that can be taken off."""

    def remove(self) -> None:
        """Take it off."""


Hook = Callable[[], Handle]
"""Sets a hook."""


@dataclass
class Call:
    """What one module took and gave in a forward pass, as it was then."""

    name: str
    module: nn.Module
    inputs: dict[int | str, Tensor] = field(default_factory=dict)
    """Floating-point arguments by position or name."""
    output: Tensor | None = None
    began: int = -1
    ended: int = -1
    """When, counted over all calls."""


class Probe:
    """Runs a model on the same few tokens again and again, in eval mode.

    Args:
        model: any module; a causal language model of `transformers`, if no inputs are given.
        inputs: arguments of its forward pass; None makes some up.

    Raises:
        ValueError: the model cannot be run on them, or gives no floating-point tensor.
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Any] | None = None) -> None:
        self.given = model
        self.model: nn.Module = getattr(model, "_orig_mod", model)  # of a compiled one
        self.inputs = example_inputs(self.model) if inputs is None else inputs
        self._kwargs = options(self.model)
        self._runs = 0

    @cached_property
    def clean(self) -> Tensor:
        """The output of the model as it is."""
        return self.run()

    def run(self, hooks: Sequence[Hook] = (), **changed: Any) -> Tensor:
        """Return the output of the model, with hooks set meanwhile.

        Args:
            hooks: each sets one.
            changed: inputs that replace those of the probe.
        """
        with probing(), evaluating(self.model), uncompiled(self.given):
            return self._run(hooks, changed)

    def _run(self, hooks: Sequence[Hook], changed: dict[str, Any]) -> Tensor:
        handles = [hook() for hook in hooks]
        device = device_of(self.model)
        cuda = range(torch.cuda.device_count()) if device.type == "cuda" else []
        self._runs += 1
        try:
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                torch.autocast(device.type, enabled=False),
                torch.random.fork_rng(cuda),
            ):
                torch.manual_seed(self._runs)  # what is random shall differ
                output = self.model(**{**self.inputs, **self._kwargs, **changed})
        except Exception as error:
            what = ", ".join(f"{name} {[*x.shape]}" for name, x in self.inputs.items())
            raise ValueError(
                f"expected {type(self.model).__name__} to run on {what}, got "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        return final_tensor(output, type(self.model).__name__)

    def record(
        self,
        modules: dict[str, nn.Module],
        hooks: Sequence[Hook] = (),
        **changed: Any,
    ) -> tuple[list[Call], Tensor]:
        """Return every call of some modules in the order in which they began, and the output."""
        calls: list[Call] = []
        open_calls: list[Call] = []
        clock = iter(range(1 << 62))

        def begin(name: str) -> Callable[..., None]:
            @only_here
            def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
                given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
                inputs = {key: x.clone() for key, x in given if _is_float(x)}
                calls.append(Call(name, module, inputs, began=next(clock)))
                open_calls.append(calls[-1])

            return hook

        @only_here
        def end(module: nn.Module, args: Any, output: Any) -> None:
            call = open_calls.pop()
            first = first_tensor(output)
            call.output = None if first is None else first.clone()
            call.ended = next(clock)

        def on(name: str, module: nn.Module) -> list[Hook]:
            # Last among the hooks of their module, so that they see what others put there.
            return [
                lambda: module.register_forward_pre_hook(begin(name), with_kwargs=True),
                lambda: module.register_forward_hook(end),
            ]

        own = [hook for name, module in modules.items() for hook in on(name, module)]
        return calls, self.run([*hooks, *own], **changed)


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """Return inputs for a forward pass: tokens, or what else the model says that it takes."""
    generator = torch.Generator().manual_seed(0)
    config: Any = getattr(model, "config", None)
    name = getattr(model, "main_input_name", "input_ids")
    device = device_of(model)
    if name == "pixel_values":
        own = getattr(config, "vision_config", config)
        size = getattr(own, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        shape: tuple[int, ...] = (ROWS, getattr(own, "num_channels", 3), height, width)
        return {name: torch.randn(shape, generator=generator).to(device)}
    if name == "input_features":
        shape = (ROWS, getattr(config, "num_mel_bins", 80), 2 * config.max_source_positions)
        inputs = {name: torch.randn(shape, generator=generator).to(device)}
    elif name == "input_values":
        return {name: torch.randn(ROWS, 4000, generator=generator).to(device)}
    else:
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        inputs = {"input_ids": _tokens(text, config, generator).to(device)}
    if getattr(config, "is_encoder_decoder", False):
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        inputs["decoder_input_ids"] = _tokens(text, config, generator).to(device)
    return inputs


def _tokens(text: Any, config: Any, generator: torch.Generator) -> Tensor:
    """Return ids `[ROWS, TOKENS]` of ordinary tokens: none that a config names."""
    count = getattr(text, "vocab_size", None)
    count = count if isinstance(count, int) and count > 0 else 64
    named = {
        value
        for of in (text, config)
        for key, value in vars(of or object).items()
        if ("token" in key) and isinstance(value, int)
    }
    usual = torch.tensor([i for i in range(min(count, 4096)) if i not in named] or [0])
    return usual[torch.randint(len(usual), (ROWS, TOKENS), generator=generator)]


def options(model: nn.Module) -> dict[str, Any]:
    """Return arguments that keep a forward pass from remembering anything, if it takes them."""
    takes = inspect.signature(model.forward).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    config = getattr(model, "config", None)
    if "use_cache" in takes or (anything and hasattr(config, "use_cache")):
        return {"use_cache": False}
    return {}


def device_of(model: nn.Module) -> torch.device:
    """Return where inputs of a model go, also where its weights are kept elsewhere meanwhile."""
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    kept = (p.device for p in model.parameters() if not p.is_meta)
    return next(kept, torch.device("cpu"))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode meanwhile, and each of its modules back into its own."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def first_tensor(output: Any) -> Tensor | None:
    """Return what a module gives: a floating-point tensor, or the first entry of its tuple.

    None of a named tuple: reformer has two streams in one.
    """
    if isinstance(output, tuple | list) and len(output) and not hasattr(output, "_fields"):
        output = output[0]
    return output if _is_float(output) else None


def with_first(output: Any, new: Tensor) -> Any:
    """Return `output` with its first tensor replaced."""
    if isinstance(output, list):
        return [new, *output[1:]]
    return (new, *output[1:]) if isinstance(output, tuple) else new


def final_tensor(output: Any, name: str) -> Tensor:
    """Return the logits of a model's output, else the first floating-point tensor in it."""
    logits: Tensor | None = getattr(output, "logits", None)
    if logits is not None and _is_float(logits):
        return logits
    many: Any = [output] if isinstance(output, Tensor) else output
    found: Tensor
    for found in many.values() if hasattr(many, "values") else many:
        if _is_float(found) and found.ndim:
            return found
    raise ValueError(
        f"expected {name} to give a floating-point tensor, got {type(output).__name__}"
    )


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
