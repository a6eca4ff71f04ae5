"""Time harvests against a bare forward pass, and against the buffers of other libraries.

    python -m bench.harvest TEXT.jsonl [--model smollm2] [--layer 15] [--context 128] [--batch 16]
        [--tokens 16384] [--rounds 5]

All run the same model over the same documents, with the same context and batch, and are asked for
the output of the same block:

    bare        the forward pass, left at the block; nothing is kept
    harvest     `fastsae.data.harvest` to a folder, float16, checksums included
    stream      `fastsae.data.stream`, rows of one buffer after the other
    sae-lens    `ActivationsStore.next_batch` over a `TransformerBridge`
    dictionary  `dictionary_learning.buffer.ActivationBuffer` over nnsight

What counts is the real tokens (no padding) that the model's embedding has seen, by the second.
Rounds alternate between the contenders; reported are ratios of medians. What is not installed is
left out: pip install sae-lens dictionary-learning datasets
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from fastsae.data import harvest, stream
from fastsae.models import load_model, read, resolve
from fastsae.models.text import read_files


class Counter:
    """Counts the tokens that a model embeds.

    Args:
        model: a model of `transformers`.
        pad: the id of padding, which does not count.
    """

    def __init__(self, model: Any, pad: int) -> None:
        self.tokens, self._pad = 0, pad
        model.get_input_embeddings().register_forward_pre_hook(self._see)

    def _see(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.tokens += int((args[0] != self._pad).sum())


def bare(args: argparse.Namespace, model: nn.Module, tokenizer: Any, texts: list[str]) -> Any:
    """Return a function that runs one batch of full contexts up to the block."""
    site = resolve(model, f"resid_post.{args.layer}")
    ids = itertools.chain.from_iterable(tokenizer(text)["input_ids"] for text in endless(texts))
    size = args.batch * args.context

    def step() -> None:
        tokens = torch.tensor(list(itertools.islice(ids, size))).view(args.batch, -1)
        read(model, [site], tokens)

    return step


def ours(args: argparse.Namespace, model: nn.Module, tokenizer: Any, texts: list[str]) -> Any:
    """Return a function that harvests `--tokens` rows into a new folder."""
    documents = endless(texts)

    def step() -> None:
        with tempfile.TemporaryDirectory() as folder:
            harvest(
                model, tokenizer, documents, f"resid_post.{args.layer}", folder,
                context=args.context, batch_size=args.batch, max_tokens=args.tokens,
            )  # fmt: skip

    return step


def live(args: argparse.Namespace, model: nn.Module, tokenizer: Any, texts: list[str]) -> Any:
    """Return a function that takes one batch of rows of a stream."""
    source = stream(
        model, tokenizer, texts, f"resid_post.{args.layer}",
        context=args.context, batch_size=args.batch, buffer_rows=args.tokens,
    )  # fmt: skip
    batches = source.batches(512)
    return lambda: next(batches)


def saelens(args: argparse.Namespace, model: nn.Module, tokenizer: Any, texts: list[str]) -> Any:
    """Return a function that takes one batch of SAELens' store."""
    datasets: Any = import_module("datasets")
    bridges: Any = import_module("transformer_lens.model_bridge")
    stores: Any = import_module("sae_lens.training.activations_store")
    bridge = bridges.TransformerBridge.boot_transformers(
        "HuggingFaceTB/SmolLM2-135M", hf_model=model, tokenizer=tokenizer, device="cpu"
    )
    width = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    store = stores.ActivationsStore(
        model=bridge,
        dataset=datasets.Dataset.from_dict({"text": texts}),
        streaming=False,
        hook_name=f"blocks.{args.layer}.hook_resid_post",
        hook_head_index=None,
        context_size=args.context,
        d_in=width,
        n_batches_in_buffer=max(2, args.tokens // (args.batch * args.context)),
        total_training_tokens=10**9,
        store_batch_size_prompts=args.batch,
        train_batch_size_tokens=512,
        prepend_bos=True,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
    )
    return store.next_batch


def dictionary(args: argparse.Namespace, model: nn.Module, tokenizer: Any, texts: list[str]) -> Any:
    """Return a function that takes one batch of dictionary_learning's buffer."""
    nnsight: Any = import_module("nnsight")
    buffers: Any = import_module("dictionary_learning.buffer")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    wrapped = nnsight.LanguageModel(model, tokenizer=tokenizer)
    width = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    buffer = buffers.ActivationBuffer(
        endless(texts),
        wrapped,
        wrapped.model.layers[args.layer],
        d_submodule=width,
        n_ctxs=args.tokens // args.context,
        ctx_len=args.context,
        refresh_batch_size=args.batch,
        out_batch_size=512,
    )
    return lambda: next(buffer)


CONTENDERS: dict[str, Callable[..., Any]] = {
    "bare": bare,
    "harvest": ours,
    "stream": live,
    "sae-lens": saelens,
    "dictionary": dictionary,
}


def endless(texts: list[str]) -> Iterator[str]:
    """Yield texts again and again."""
    return itertools.cycle(texts)


def rate(step: Callable[[], object], counter: Counter, tokens: int) -> float:
    """Return tokens per second of so many calls as embed `tokens` tokens at least."""
    before, start = counter.tokens, time.perf_counter()
    while counter.tokens - before < tokens:
        step()
    return (counter.tokens - before) / (time.perf_counter() - start)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    args = parser.parse_args()
    texts = [text for text in read_files([args.text]) if len(text) > 2000]
    steps, counters = {}, {}
    for name in args.only:
        model, tokenizer = load_model(args.model)  # hooks of one library stay out of the others
        try:
            steps[name] = CONTENDERS[name](args, model, tokenizer, texts)
        except ModuleNotFoundError as error:
            print(f"{name}: left out, {error}")
            continue
        pad = tokenizer.pad_token_id if name == "dictionary" else -1
        counters[name] = Counter(model, -1 if pad is None else pad)
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(args.rounds + 1):
        for name, step in steps.items():
            speed = rate(step, counters[name], args.tokens)
            if round_:  # the first one warms up
                rates[name].append(speed)
    middle = {name: statistics.median(found) for name, found in rates.items()}
    for name, found in rates.items():
        against = ", ".join(
            f"{middle[name] / other:.2f}x {peer}" for peer, other in middle.items() if peer != name
        )
        print(
            f"{name:10} {middle[name]:6.0f} tokens/s ({min(found):.0f}-{max(found):.0f})  {against}"
        )


if __name__ == "__main__":
    main()
