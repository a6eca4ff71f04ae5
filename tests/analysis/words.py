"""A tokenizer of words, and a small model that has learned the task of indirect objects."""

from __future__ import annotations

import re

import torch
from torch import nn
from torch.nn import functional as F

D = 32


class Words:
    """One token per word, with the space in front; long words are several."""

    bos_token_id = 1

    def __init__(self):
        self.known: dict[str, int] = {}

    def __call__(self, text, add_special_tokens=True):
        assert not add_special_tokens
        words = re.findall(r" ?\w{1,8}|[^\w ]", text)
        assert "".join(words) == text
        return {"input_ids": [self.known.setdefault(w, 3 + len(self.known)) for w in words]}

    def decode(self, ids):
        return "".join({i: w for w, i in self.known.items()}.get(i, "^") for i in ids)


def random_model(d: int = D, layers: int = 3, scale: float = 0.3) -> nn.Module:
    """Return a Llama of which nobody expects that it does a task."""
    import transformers as hf

    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=200, hidden_size=d, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=2, max_position_embeddings=64, initializer_range=scale,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


def answering_model(task, steps: int = 160) -> nn.Module:
    """Return a small Llama that was trained to answer the prompts of a task."""
    model = random_model(scale=0.1).train()
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    prompts = task.draw(400, seed=5)
    answers = prompts.candidates[prompts.right]
    lengths = torch.tensor([len(ids) for ids in prompts.ids])
    for step in range(steps):
        of = lengths.unique()[step % len(lengths.unique())]
        rows = (lengths == of).nonzero().flatten()[:48]
        tokens = torch.tensor([prompts.ids[row] for row in rows.tolist()])
        loss = F.cross_entropy(model(tokens).logits[:, -1], answers[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
