"""The sections of a report, in words for somebody who sees an SAE for the first time."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fastsae.analysis.examples import Latent
from fastsae.data import ActivationStore
from fastsae.eval import CrossEntropy, EvalResult
from fastsae.models.sites import describe
from fastsae.nn import SAE
from fastsae.report.html import figure_list, plot_list, table_rows
from fastsae.report.plots import alignment, firing_frequency, time_curve, training_curve


def lead(sae: SAE, store: ActivationStore) -> str:
    """Say in two sentences what this is."""
    k = getattr(sae, "k", None)
    active = f"at most {k}" if isinstance(k, int) else "a few"
    return (
        f"At every token, {escape(store.manifest.model)} holds {sae.d_in} numbers in "
        f"{escape(describe(store.site))} that nobody can read. This sparse autoencoder (SAE) "
        f"rewrites them as a sum of {active} out of {sae.d_sae:,} learned directions, its "
        "<b>latents</b>; below is how little the model loses by that, and what single latents "
        "respond to."
    )


def figures(result: EvalResult, ce: CrossEntropy | None) -> str:
    """Return the few numbers to look at first."""
    shown = [
        (f"{100 * (1 - result.fvu):.1f}%", "of the variance of held-out activations explained"),
        (f"{result.l0:.1f}", f"of {result.d_sae:,} latents active per token, on average"),
        (f"{result.dead:,}", f"dead latents (never active on {result.rows:,} held-out tokens)"),
    ]
    if ce is not None:
        share = f"{100 * ce.fraction_recovered_mean:.1f}%"
        shown.insert(0, (share, "of the model's predictive power here survives the rewrite"))
    return figure_list(shown)


def numbers(sae: SAE, result: EvalResult, ce: CrossEntropy | None) -> str:
    """Return the table of metrics, each with a line that says what it means."""
    rows: list[tuple[str, str, str]] = []

    def add(name: str, value: str, meaning: str) -> None:
        rows.append((name, value, meaning))

    if ce is not None:
        add(
            "Cross entropy, untouched model",
            f"{ce.clean:.3f}",
            f"nats per token over {ce.tokens:,} predictions of held-out text; lower is better",
        )
        add("… through the SAE", f"{ce.sae:.3f}", f"with the rewrite in place: {ce.delta:+.3f}")
        add("… through the mean", f"{ce.mean:.3f}", "every token gets the average activation")
        add("… through zeros", f"{ce.zero:.3f}", "every token gets zeros instead")
        add(
            "Recovered, against the mean",
            f"{100 * ce.fraction_recovered_mean:.1f}%",
            "(mean - SAE) / (mean - untouched): 100% is a perfect rewrite, 0% a useless one",
        )
        add(
            "Recovered, against zeros",
            f"{100 * ce.fraction_recovered_zero:.1f}%",
            "the same with zeros: often quoted, and flattering, as zeros do more harm",
        )
    add("FVU", f"{result.fvu:.4f}", "fraction of variance unexplained: 0 is perfect, 1 the mean")
    if result.outliers:
        add(
            "FVU without outliers",
            f"{result.fvu_inliers:.4f}",
            f"without {result.outliers:,} tokens of a norm above {result.max_norm:.0f}, "
            "3 times the median",
        )
    add("L0", f"{result.l0:.2f}", "latents active per token; fewer is sparser")
    add(
        "Dead latents",
        f"{result.dead:,} of {result.d_sae:,}",
        f"active on none of {result.rows:,} held-out tokens: wasted, or rare",
    )
    add("Squared error", f"{result.mse:,.1f}", f"per token, summed over {sae.d_in} dimensions")
    return table_rows(rows)


def plots(sae: SAE, result: EvalResult, history: Sequence[dict[str, float]]) -> str:
    """Return the plots with their captions."""
    low, high = (float(norm) for norm in sae.W_dec.detach().float().norm(dim=1).aminmax())
    shown = [
        (
            firing_frequency(result.frequency),
            "Each latent is counted once. A heap at the far right would be latents that fire on "
            "everything and mean nothing.",
        ),
        (
            alignment(sae),
            "At 1, a latent writes the very direction that makes it fire; it reads a different "
            "one where that tells it apart from similar latents. "
            f"Writing directions have lengths {low:.3f} to {high:.3f}.",
        ),
    ]
    if history:
        curve = training_curve(history, result.fvu)
        shown.insert(0, (curve, "The error on the text it learns from falls; the dashed line is "
                         "the trained SAE on held-out text."))  # fmt: skip
    if (timed := time_curve(history)) is not None:
        shown.insert(1, (timed, "How good the SAE was after how much training, on text it has not "
                         "seen; the numbers are updates. The learning rate falls at the end of a "
                         "run, so a run that ends early is better than this one was at that "
                         "time."))  # fmt: skip
    return plot_list(shown)


def about(latents: Sequence[Latent], n: int, store: ActivationStore, promoted: bool) -> str:
    """Say which latents are shown, and how to read them."""
    if not latents:
        return (
            "<p>No latent fires on 0.02% to 2% of the tokens and at least 20 times; "
            "use more text.</p>"
        )
    text = {"train": "training", "val": "held-out"}[store.split]
    how = (
        "Each line is a piece of text in which the latent fires, strongest first, lined up at the "
        "token where it peaks (outlined; its activation is on the left). The fuller the shade, the "
        "stronger; hover over a token for the value. ↵ is a line break."
    )
    which = (
        f"These are the {len(latents)} most selective latents over {n:,} tokens of {text} text: "
        "their strongest activations (the ones shown) are the most times larger than their average "
        "one. Only latents that fire on 0.02% to 2% of the tokens, at least 20 times, and not "
        "mainly on the first token of a context take part; near-copies of a latent already listed, "
        "and repeated text, are left out."
    )
    lens = (
        "“Promotes” lists the next tokens that a latent's direction raises most when the rest of "
        "the model is skipped (logit lens): a hint, not a proof."
    )
    return f"<p>{how}</p><p class='soft'>{which}{' ' + lens if promoted else ''}</p>"
