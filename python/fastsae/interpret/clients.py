"""Who is asked: any function of messages, an HTTP server that speaks OpenAI's protocol, a model.

client(messages) -> str        messages: [{"role": "system" | "user", "content": str}, ...]
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from http.client import HTTPException, IncompleteRead
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

import torch
from torch import nn

from fastsae.models.probe import device_of, evaluating

Message = dict[str, str]
Client = Callable[[Sequence[Message]], str]

AGAIN = {408, 409, 429, 500, 502, 503, 504}
"""Answers of a server that may be another one later."""
LARGEST = 1 << 24
"""Bytes of an answer."""


def openai_client(
    model: str,
    url: str = "https://api.openai.com/v1",
    *,
    api_key: str | None = None,
    max_tokens: int = 200,
    temperature: float = 0.0,
    timeout: float = 60.0,
    tries: int = 5,
    wait: float = 1.0,
) -> Client:
    """Return a client of a server with OpenAI's chat completions (vLLM, llama.cpp, OpenAI, ...).

    Args:
        model: name of the model on that server.
        url: where `/chat/completions` is.
        api_key: None: the environment variable OPENAI_API_KEY, or no key.
        max_tokens: most tokens of an answer.
        temperature: of sampling; 0: the likeliest.
        timeout: seconds to wait for an answer.
        tries: of a request that fails for a reason that may pass.
        wait: seconds before the second try, doubled before each further one.

    Raises:
        ValueError: another kind of URL, no tries, or a key that cannot be sent.

    The client raises RuntimeError for a request that is refused or fails `tries` times, and for an
    answer of another form; keys are never part of a message.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"openai_client: expected url to start with http(s)://, got {url!r}")
    if tries < 1:
        raise ValueError(f"openai_client: expected tries >= 1, got {tries}")
    key = (os.environ.get("OPENAI_API_KEY", "") if api_key is None else api_key).strip()
    if not (key.isascii() and key.isprintable()):  # what it is, nobody is told
        raise ValueError("openai_client: expected api_key to be printable ASCII, got others in it")
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    where = f"{url.rstrip('/')}/chat/completions"
    open_url = build_opener(_Stay).open

    def client(messages: Sequence[Message]) -> str:
        body = {"model": model, "messages": list(messages), "temperature": temperature}
        data = json.dumps({**body, "max_tokens": max_tokens}).encode()
        pause = wait
        for left in reversed(range(tries)):
            try:
                until = time.monotonic() + timeout
                with open_url(Request(where, data, headers), timeout=timeout) as answer:
                    return _content(_read(answer, until), where)
            except HTTPError as error:
                problem = f"{error.code} {error.reason}"
                if error.code not in AGAIN:
                    break
            except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
                problem = str(getattr(error, "reason", error)) or type(error).__name__
            if left:
                time.sleep(pause)
                pause *= 2
        raise RuntimeError(f"openai_client: expected an answer from {where}, got {problem}")

    return client


class _Stay(HTTPRedirectHandler):
    """Goes nowhere else, since the key would be sent there."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Refuse."""


def _read(answer: Any, until: float) -> bytes:
    """Return what a server sends, however slowly it does."""
    data = b""
    while part := answer.read1(1 << 16):
        data += part
        if len(data) > LARGEST:
            raise RuntimeError(f"openai_client: expected an answer of {LARGEST} bytes, got more")
        if time.monotonic() > until:
            raise TimeoutError("timed out")
    if answer.length:  # bytes that were promised
        raise IncompleteRead(data, answer.length)
    return data


def _content(data: bytes, where: str) -> str:
    try:
        content = json.loads(data)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        content = None
    if not isinstance(content, str):
        raise RuntimeError(
            f"openai_client: expected choices[0].message.content from {where}, got "
            f"{data[:80].decode(errors='replace')!r}"
        )
    return content


def transformers_client(model: nn.Module, tokenizer: Any, *, max_new_tokens: int = 100) -> Client:
    """Return a client that asks a local causal language model for the likeliest answer.

    Args:
        model: of `transformers`, with `generate`.
        tokenizer: its own; with a chat template if it has one, else messages are put one under the
            other.
        max_new_tokens: most tokens of an answer.
    """
    generate: Callable[..., torch.Tensor] = model.generate  # type: ignore[assignment]

    @torch.no_grad()
    def client(messages: Sequence[Message]) -> str:
        if getattr(tokenizer, "chat_template", None):
            text = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            text = "\n\n".join(message["content"] for message in messages)
            ids = tokenizer(f"{text}\n\n")["input_ids"]
        tokens = torch.tensor([ids], device=device_of(model))
        with evaluating(model):
            out = generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=max_new_tokens,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
        return str(tokenizer.decode(out[0, len(ids) :].tolist(), skip_special_tokens=True))

    return client
