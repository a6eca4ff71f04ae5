"""What a language model is asked: to explain contexts, and to judge texts by an explanation."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from fastsae.analysis.examples import Context
from fastsae.interpret.clients import Client, Message
from fastsae.interpret.text import CLOSE, OPEN, Decode, active, marked, strengths

Explainer = Callable[[Sequence[Context], Decode], str]
"""Contexts in which a latent fires, to an explanation."""
Judge = Callable[[str, str, Sequence[str]], list[bool | None]]
"""Task ("detection" | "fuzzing"), explanation and texts, to a verdict on each text; None: it gave
no answer."""

EXPLAIN = f"""\
You study one feature of a language model. You are given pieces of text in which the feature is \
active. The tokens on which it is active are between {OPEN} and {CLOSE}; below each text they are \
listed with the strength of the feature there, from 1 to 10.
Find out what the marked tokens, or the text right before them, have in common, and say it in one \
short phrase that would help somebody else to find further examples. Prefer what the strongest \
examples share. Do not quote the texts, and do not speak of marks or strengths.
End with a line of this form:
EXPLANATION: the phrase"""

DETECTION = """\
A feature of a language model is active on: {explanation}
You are given {n} numbered texts. Decide for each of them whether the feature is active somewhere \
in it. Answer with a list of {n} numbers, 1 for active and 0 for not, such as [{form}], and with \
nothing else."""

FUZZING = """\
A feature of a language model is active on: {explanation}
You are given {n} numbered texts, in each of which some tokens are between {open} and {close}. \
Decide for each of them whether the marked tokens are those on which the feature is active. Answer \
with a list of {n} numbers, 1 if they are and 0 if not, such as [{form}], and with nothing else."""

TASKS = {"detection": DETECTION, "fuzzing": FUZZING}


def llm_explainer(client: Client) -> Explainer:
    """Return an explainer that asks a language model."""

    def explain(contexts: Sequence[Context], decode: Decode) -> str:
        return explanation_in(client(explain_messages(contexts, decode)))

    return explain


def explanation_in(answer: str) -> str:
    """Return what follows the last "EXPLANATION:" of an answer, else its last line."""
    answer = without_thoughts(answer)
    found = re.findall(r"explanation\s*[:\]]+[\s*:]*(.+)", answer, re.IGNORECASE)
    lines = [line for line in answer.strip().splitlines() if line.strip()]
    text = found[-1] if found else lines[-1] if lines else ""
    return str(text).strip().strip("*").strip()


def explain_messages(contexts: Sequence[Context], decode: Decode) -> list[Message]:
    """Return what a language model is asked to explain a latent."""
    largest = max(abs(context.acts[context.peak]) for context in contexts)
    parts = []
    for number, context in enumerate(contexts, 1):
        listed = ", ".join(
            f"{token!r} {strength}" for token, strength in strengths(context, decode, largest)
        )
        text = marked(context, decode, active(context))
        parts.append(f"Text {number}: {text}\nActive: {listed}")
    return [
        {"role": "system", "content": EXPLAIN},
        {"role": "user", "content": "\n\n".join(parts)},
    ]


def llm_judge(client: Client, texts_at_once: int = 5) -> Judge:
    """Return a judge that asks a language model, several texts per question."""

    def judge(task: str, explanation: str, texts: Sequence[str]) -> list[bool | None]:
        verdicts: list[bool | None] = []
        for at in range(0, len(texts), texts_at_once):
            part = texts[at : at + texts_at_once]
            answer = client(judge_messages(task, explanation, part))
            verdicts += parsed(answer, len(part))
        return verdicts

    return judge


def judge_messages(task: str, explanation: str, texts: Sequence[str]) -> list[Message]:
    """Return what a language model is asked about texts."""
    n = len(texts)
    form = ", ".join("10"[i % 2] for i in range(n))
    question = TASKS[task].format(explanation=explanation, n=n, form=form, open=OPEN, close=CLOSE)
    numbered = "\n\n".join(f"Text {i}: {text}" for i, text in enumerate(texts, 1))
    return [{"role": "system", "content": question}, {"role": "user", "content": numbered}]


def without_thoughts(answer: str) -> str:
    """Return what comes after `<think> ... </think>`; nothing if the answer was cut in there."""
    return answer.rpartition("</think>")[2].partition("<think>")[0]


def parsed(answer: str, n: int) -> list[bool | None]:
    """Return the verdicts in an answer: its last list of n digits 0 or 1; n times None without."""
    for found in reversed(re.findall(r"\[([01\s,]*)\]", without_thoughts(answer))):
        digits = re.findall(r"[01]", found)
        if len(digits) == n:
            return [digit == "1" for digit in digits]
    return [None] * n
