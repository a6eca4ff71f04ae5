"""Check what fastsae says of the sites of every model family against hooks set by hand.

    python -m bench.families [NAME ...] [--out RESULTS.jsonl] [--write docs/models.md]

Every family of `bench.tiny_models` is asked for its blocks and for sites of its second and its last
block. What fastsae gives is compared with what torch's own hooks see:

    resid_post    is the input of the next block, and what transformers calls hidden_states
    mlp_out       moves the block's output as `written` says, when noise is added to it
    *_write       resid_pre + attn_write + mlp_write = resid_post
    resid_mid     resid_pre + attn_write, and resid_post - mlp_write
    all           rows do not depend on padding, if read as a harvest reads them; replacing by
                  itself changes nothing, by zeros changes the output

A site is then right, refused with a reason, or wrong. The command fails if any is wrong. With
--write, the table between two marks in that file is replaced.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.tiny_models import NotBuilt, build, families
from fastsae.models import SiteReport, check_sites, find_blocks, read, resolve
from fastsae.models.probe import example_inputs, first_tensor, options, with_first

SHOWN = ("resid_post", "resid_mid", "mlp_in", "mlp_out", "mlp_write", "attn_z", "attn_write")
MARKS = ("<!-- families -->", "<!-- end of families -->")
Result = dict[str, Any]


def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the output of a model: logits, or its first tensor."""
    with torch.no_grad():
        output: Any = model(**inputs, **options(model))
    logits: Tensor = getattr(output, "logits", None)  # type: ignore[assignment]
    return next(iter(output.values())) if logits is None else logits


def close(x: Tensor, y: Tensor, tolerance: float = 1e-4) -> bool:
    """Return whether x and y differ by less than a share of the largest row of them."""
    size = max(float(x.norm(dim=-1).max()), float(y.norm(dim=-1).max()), 1e-12)
    return x.shape == y.shape and float((x - y).norm(dim=-1).max()) <= tolerance * size


class Family:
    """One model, its blocks, and what is wrong with its sites."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model = build(name)
        self.inputs = example_inputs(self.model)
        self.path, self.blocks = find_blocks(self.model)
        self.clean = run(self.model, self.inputs)
        self.wrong: dict[str, str] = {}

    def value(self, site: str) -> Tensor:
        """Return a site's value in a full pass, by fastsae."""
        seen: list[Tensor] = []
        handle = resolve(self.model, site).hook(lambda x: seen.append(x.clone()))
        run(self.model, self.inputs)
        handle.remove()
        return seen[0]

    def check(self, layer: int, reports: dict[str, SiteReport]) -> None:
        """Note what of a block is wrong."""
        for name, report in reports.items():
            if not report.ok:
                if not report.why:
                    self.wrong[name] = "refused without a reason"
                continue
            if problem := self.any_site(name, report):
                self.wrong[name] = problem
        ok = {name for name, report in reports.items() if report.ok}
        values = {name: self.value(name) for name in ok}
        post, pre = f"resid_post.{layer}", f"resid_pre.{layer}"
        attention, mlp, middle = (f"{x}.{layer}" for x in ("attn_write", "mlp_write", "resid_mid"))
        if post in ok and not self.is_stream(layer, values[post]):
            self.wrong[post] = "not the input of the next block"
        if {post, pre, attention, mlp} <= ok and reports[f"mlp_out.{layer}"].written != "partial":
            total = values[pre] + values[attention] + values[mlp]
            if not close(total, values[post]):
                self.sums_to_something_else(layer, values[post] - total)
        if {middle, attention, pre} <= ok and not close(
            values[middle], values[pre] + values[attention]
        ):
            self.wrong[middle] = "not resid_pre + attn_write"
        out = reports[f"mlp_out.{layer}"]
        if out.ok:
            seen = self.moves(layer)
            partly = out.written == "partial" and seen in ("exact", "scaled")
            if seen != out.written and not partly:
                self.wrong[f"mlp_out.{layer}"] = f"said to be {out.written}, is {seen}"

    def is_stream(self, layer: int, x: Tensor) -> bool:
        """Return whether x is what the next block takes, or, at the end, what the block gives."""
        seen: list[Tensor] = []

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            seen.extend(a.clone() for a in (*args, *kwargs.values()) if isinstance(a, Tensor))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            seen.append(first_tensor(output))  # type: ignore[arg-type]

        if layer + 1 < len(self.blocks):
            handle = self.blocks[layer + 1].register_forward_pre_hook(before, with_kwargs=True)
        else:
            handle = self.blocks[layer].register_forward_hook(after)
        run(self.model, self.inputs)
        handle.remove()
        same = any(torch.equal(a, x) or torch.equal(2 * a, x) for a in seen if a.shape == x.shape)
        return same or not seen  # the next one may not run on text alone

    def any_site(self, name: str, report: SiteReport) -> str:
        """Return what is wrong with a site, whichever it is."""
        site = resolve(self.model, name)
        handle = site.hook(lambda x: x.clone())
        same = run(self.model, self.inputs)
        handle.remove()
        if not close(same, self.clean, 1e-5):
            return "replacing it by itself changes the output"
        handle = site.hook(torch.zeros_like)
        zero = run(self.model, self.inputs)
        handle.remove()
        if torch.equal(zero, self.clean) and not site.read_only:
            return "replacing it by zeros changes nothing"
        if set(self.inputs) == {"input_ids"}:
            return self.padding(name, report)
        return ""

    def padding(self, name: str, report: SiteReport) -> str:
        """Return whether padding changes the rows of a site, read as a harvest does."""
        ids = self.inputs["input_ids"]
        if not report.masked:
            return ""  # a harvest refuses
        site, mask = resolve(self.model, name), torch.ones_like(ids)
        mask[:, 5:] = 0
        alone = read(self.model, [site], ids[:, :5])[name]
        whole = read(self.model, [site], ids, attention_mask=None if report.causal else mask)[name]
        return "" if close(alone, whole[:, :5]) else "rows depend on padding"

    def moves(self, layer: int) -> str:
        """Return how the output of a block moves with its MLP's output, whatever its module."""
        module = resolve(self.model, f"mlp_out.{layer}").module
        outs: list[Tensor] = []
        noise: list[Tensor] = []

        def note(block: nn.Module, args: Any, output: Any) -> None:
            outs.append(first_tensor(output).clone())  # type: ignore[union-attr]

        def add(mlp: nn.Module, args: Any, output: Any) -> Any:
            x = first_tensor(output)
            assert x is not None
            generator = torch.Generator().manual_seed(1)
            noise.append(torch.randn(x.shape, generator=generator) * outs[0].std())
            return with_first(output, x + noise[0])

        handle = self.blocks[layer].register_forward_hook(note)
        run(self.model, self.inputs)
        adding = module.register_forward_hook(add)
        run(self.model, self.inputs)
        adding.remove()
        handle.remove()
        if noise[0].numel() != outs[0].numel():
            return "indirect"  # the stream is several
        moved, step = outs[1] - outs[0], noise[0].reshape(outs[0].shape)
        if close(moved, step):
            return "exact"
        columns = (moved * step).sum((0, 1)) / step.square().sum((0, 1))
        return "scaled" if close(moved, columns * step) else "indirect"

    def sums_to_something_else(self, layer: int, rest: Tensor) -> None:
        """A block may add more than attention and MLP; then the rest must not come from the two."""
        names = [f"attn_write.{layer}", f"mlp_write.{layer}"]
        for name in names:
            if rest.norm() < 1e-6:
                self.wrong[name] = "does not add up"
        self.more = getattr(self, "more", set()) | {layer}


def measure(name: str) -> Result:
    """Return what is said of a family, and what of it is wrong."""
    result: Result = {"family": name, "transformers": version("transformers")}
    try:
        family = Family(name)
    except NotBuilt as reason:
        return result | {"not_built": str(reason)}
    except ValueError as reason:
        return result | {"blocks": None, "why": str(reason)}
    last = len(family.blocks) - 1
    said: dict[str, Result] = {}
    for layer in (1, last):
        reports = check_sites(family.model, [f"{kind}.{layer}" for kind in ("resid_pre", *SHOWN)])
        said |= {site: report.to_dict() for site, report in reports.items()}
        family.check(layer, reports)
    more = sorted(getattr(family, "more", ()))
    return result | {"blocks": family.path, "sites": said, "wrong": family.wrong, "more": more}


def cell(result: Result, kind: str) -> str:
    """Return what a table says of a kind of site."""
    reports = [r for site, r in result["sites"].items() if site.partition(".")[0] == kind]
    told = []
    for report in reports:
        if not report["ok"]:
            told.append("residual inside" if report["written"] == "residual inside" else "-")
        elif kind == "mlp_out" and report["written"] != "exact":
            scale, between = report["scale"], ", ".join(report["between"])
            by = "" if scale in (None, 1.0) else f" {scale:.3g}"
            told.append(f"{report['written']}{by}" + (f" ({between})" if between else ""))
        else:
            told.append("yes")
    return "; ".join(dict.fromkeys(told))


def table(results: list[Result]) -> str:
    """Return a row for each family."""
    lines = [f"| family | blocks | {' | '.join(SHOWN)} | causal |", "|---" * (len(SHOWN) + 3) + "|"]
    for result in results:
        if "not_built" in result:
            continue
        if result["blocks"] is None:
            why = re.sub(r"^expected \S+ ", "", result["why"]).split(";")[0].split(" (")[0]
            lines.append(
                f"| {result['family']} | refused: expected {why} |" + " |" * (len(SHOWN) + 1)
            )
            continue
        causal = all(r["causal"] for r in result["sites"].values() if r["ok"])
        cells = [cell(result, kind) for kind in SHOWN]
        told = "yes" if causal else "no"
        lines.append(f"| {result['family']} | {result['blocks']} | {' | '.join(cells)} | {told} |")
    return "\n".join(lines)


def main() -> int:
    """Measure, print the table and the counts; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out", type=Path, help="results, one line a family; kept ones stay")
    parser.add_argument("--write", type=Path, help="put the table into this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    kept = args.out.read_text().splitlines() if args.out and args.out.exists() else []
    results = {result["family"]: result for result in map(json.loads, kept)}
    for name in args.names or families():
        if name in results and not args.names:
            continue
        results[name] = measure(name)
        print(name, results[name].get("blocks"), results[name].get("wrong", ""), file=sys.stderr)
        if args.out:
            args.out.write_text("".join(json.dumps(r) + "\n" for r in results.values()))
    done = list(results.values())
    text = table(done)
    built = [result for result in done if "not_built" not in result]
    refused = [result for result in built if result["blocks"] is None]
    wrong = {
        f"{r['family']} {site}": why for r in built for site, why in r.get("wrong", {}).items()
    }
    print(text)
    print(f"\n{len(built)} families, {len(refused)} refused as a whole, {len(wrong)} wrong sites")
    for site, why in wrong.items():
        print(f"  {site}: {why}")
    if args.write:
        before, _, rest = args.write.read_text().partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        args.write.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
