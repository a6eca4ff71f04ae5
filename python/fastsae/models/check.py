"""Is a site what its name says? Found out by running the model on a few tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastsae.models.blocks import look_up, noise_like
from fastsae.models.probe import Call, Hook, Probe
from fastsae.models.sites import Base, Site, block_of, by_path, is_named, locate, mlp_of, parse
from fastsae.models.threads import only_here

WRITES = {"mlp_out": "mlp_write", "attn_out": "attn_write"}
"""Sites whose value is added to the stream, and the name of what is really added."""
MADE = {"mlp_write": "mlp_out", "attn_write": "attn_out", "resid_mid": "attn_out"}
"""Sites that are made of others."""


def tolerance(dtype: torch.dtype) -> float:
    """Return by what share two sums of a few terms may differ: 32 times the resolution of their
    type, but 4 times where that is coarse, or else a quarter would be nothing in bfloat16."""
    resolution = torch.finfo(dtype).eps
    return resolution * (32 if resolution < 1e-6 else 4)


@dataclass(frozen=True)
class SiteReport:
    """What a site is in one model."""

    name: str
    path: str
    """Of the module, and its side."""
    fires: int
    """How often in a forward pass; 1 for a true site."""
    shape: tuple[int, ...]
    """Of what it gives for 2 contexts of 8 tokens."""
    shape_ok: bool
    """Whether that is [n, t, d], in floating point."""
    in_place: bool
    """Whether the model changes the tensor later; `read` keeps it as it was."""
    identity: bool
    """Whether replacing it by itself leaves the output as it is."""
    reaches: bool
    """Whether replacing it by something else changes the output."""
    causal: bool
    """Whether a row depends on nothing to its right."""
    masked: bool = True
    """Whether a row does not depend on padding to its right, with an attention mask where rows are
    not causal."""
    written: str | None = None
    """How an output of attention or MLP gets into the residual stream: "exact", as it is; "scaled";
    "indirect", through other modules; "residual inside": it is the stream already; "partial": a
    second branch reads the same input and is added too. None for other sites."""
    scale: float | None = None
    """What it is multiplied by then; None where that differs by column, or is not known."""
    between: tuple[str, ...] = ()
    """Modules of the block that lie in between, or the second branches."""
    ok: bool = True
    """Whether the site is true."""
    why: str = ""
    """Why not; or what one should know."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(self).items()}


def check_sites(
    model: nn.Module, names: str | Sequence[str], inputs: dict[str, Any] | None = None
) -> dict[str, SiteReport]:
    """Find out what sites are in a model, by running it on a few tokens.

    Args:
        model: a model of `transformers`.
        names: sites as in `fastsae.models.sites`; paths too.
        inputs: arguments of a forward pass; None makes some up.

    Returns:
        A report of each, also of sites that `resolve` refuses; those that cannot even be located
        have `ok` False and say in `why` what was expected.

    Raises:
        ValueError: the model does not run on the inputs.
    """
    names = [names] if isinstance(names, str) else list(names)
    if inputs is not None and any(parse(name) is not None for name in names):
        look_up(model, inputs)
    probe = Probe(model, inputs)
    return {name: _report(model, name, probe, inputs is not None)[1] for name in names}


_kept: WeakKeyDictionary[nn.Module, dict[str, tuple[tuple[int, ...], Site, SiteReport]]]
_kept = WeakKeyDictionary()


def checked(model: nn.Module, name: str) -> Site:
    """Return a named site, checked.

    Raises:
        ValueError: there is none, or it is something else.
    """
    site, report = _report(model, name)
    if site is None or not report.ok:
        raise ValueError(report.why)
    return site


def _report(
    model: nn.Module, name: str, probe: Probe | None = None, anew: bool = False
) -> tuple[Site | None, SiteReport]:
    """Return a site and its report, as they were found before, if the model has not changed."""
    known = _kept.setdefault(model, {})
    if name in known and not anew:
        modules, site, report = known[name]
        if modules == _modules(model):
            return site, report
    try:
        site, report = _examine(model, probe or Probe(model), name)
    except ValueError as error:
        return None, _nothing(name, str(error))
    if report.ok:
        known[name] = _modules(model), site, report
    return site, report


def _modules(model: nn.Module) -> tuple[int, ...]:
    return tuple(id(module) for module in model.modules())


def _nothing(name: str, why: str) -> SiteReport:
    return SiteReport(name, "", 0, (), False, False, False, False, False, ok=False, why=why)


def _examine(model: nn.Module, probe: Probe, name: str) -> tuple[Site, SiteReport]:
    parsed = parse(name)
    kind = name if parsed is None else parsed[0]
    if kind in MADE:
        assert parsed is not None
        return _made(model, probe, name, kind, parsed[1])
    site = locate(model, name) if is_named(name) else by_path(model, name)
    report = _basics(model, probe, site)
    site = replace(site, in_place=report.in_place)
    if report.ok and not report.reaches and site.mixture is None:
        site = replace(site, read_only=report.why)
    if kind in WRITES and report.ok:
        assert parsed is not None
        report = _Write(model, probe, site, parsed[1]).judge(report)
    return site, report


def path_of(model: nn.Module, site: Site) -> str:
    """Return the path of a site's module, and its side."""
    found = (path for path, module in model.named_modules() if module is site.module)
    return f"{next(found, '')}:{site.side}"


class _Seen:
    """What a site gave in one forward pass."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.live: Tensor | None = None
        self.version = 0

    def take(self, x: Tensor) -> None:
        self.values.append(x.clone())
        self.live, self.version = x, x._version


def _basics(model: nn.Module, probe: Probe, site: Site) -> SiteReport:
    """Return what can be said of any site."""
    seen, seen_again = _Seen(), _Seen()
    clean = probe.clean
    if not torch.equal(clean, probe.run([lambda: site.hook(seen.take)])):
        return _nothing(
            site.name,
            f"site {site.name}: expected a model that gives the same output for the same tokens "
            "again, got another one",
        )
    path = path_of(model, site)
    if not seen.values:
        why = (
            f"site {site.name}: expected a module that takes part in a forward pass, got {path}, "
            "which never runs"
        )
        return replace(_nothing(site.name, why), path=path)
    x = seen.values[0]
    lead = _lead(probe.inputs)
    shape_ok = x.ndim == 3 and x.is_floating_point() and (lead is None or x.shape[:2] == lead)
    same = probe.run([lambda: site.hook(lambda v: v.clone())])
    plain = site.scale == 1 and site.base is None
    identity = torch.equal(same, clean) if plain else _close(same, clean)
    other = probe.run([lambda: site.hook(lambda v: v + noise_like(v))])
    facts: dict[str, Any] = {
        "name": site.name,
        "path": path,
        "fires": len(seen.values),
        "shape": tuple(x.shape),
        "shape_ok": shape_ok,
        "in_place": seen.live is not None and seen.live._version != seen.version,
        "identity": identity,
        "reaches": not torch.equal(other, clean),
        "causal": True,
    }
    if shape_ok and "input_ids" in probe.inputs:
        half = x.shape[1] // 2
        probe.run([lambda: site.hook(seen_again.take)], input_ids=_other_end(probe.inputs, half))
        share = max(torch.finfo(x.dtype).eps / 2, tolerance(torch.float32))  # of the same shapes
        before, now = (v.values[0][:, :half].nan_to_num() for v in (seen, seen_again))
        facts["causal"] = _close(now, before, share)
        facts["masked"] = facts["causal"] or _masked(probe, site)
    report = SiteReport(**facts)
    idle = site.mixture is not None and bool(x.isnan().all())
    problem = ""
    if report.fires != 1:
        problem = (
            f"a module that runs once in a forward pass, got {path}, which runs {report.fires} "
            "times"
        )
    elif not shape_ok:
        wanted = "[n, t, d]" if lead is None else f"[{lead[0]}, {lead[1]}, d]"
        problem = f"{wanted} in floating point, got {[*x.shape]} from {path}"
    elif not identity:
        problem = f"an activation that can be replaced by itself, got {path}, which cannot"
    elif not report.reaches and not idle and (parse(site.name) or ("",))[0] != "router":
        problem = f"an activation that the output depends on, got {path}"
    if problem:
        return replace(report, ok=False, why=f"site {site.name}: expected {problem}")
    if idle:
        return replace(report, why="no token of the check was routed to it")
    if not report.reaches:
        return replace(report, why="the output does not depend on it, so it can only be read")
    if not report.causal:
        how = "needs an attention mask" if report.masked else "changes them, with a mask too"
        return replace(report, why=f"rows depend on tokens to their right; padding {how}")
    return report


def _masked(probe: Probe, site: Site) -> bool:
    """Return whether an attention mask hides padding from the rows of a site."""
    ids = probe.inputs["input_ids"]
    short, mask = ids[:, :-3], torch.ones_like(ids)
    mask[:, -3:] = 0
    seen: list[Tensor] = []
    try:
        probe.run([lambda: site.hook(lambda v: seen.append(v.clone()))], input_ids=short)
        probe.run([lambda: site.hook(lambda v: seen.append(v.clone()))], attention_mask=mask)
    except ValueError:  # there may be no such argument
        return False
    return _close(seen[0].nan_to_num(), seen[1][:, :-3].nan_to_num())


def _lead(inputs: dict[str, Any]) -> torch.Size | None:
    """Return [n, t] of the tokens; None for images and sound."""
    ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    return ids.shape if isinstance(ids, Tensor) else None


def _other_end(inputs: dict[str, Any], start: int) -> Tensor:
    """Return the tokens with others from `start` on: those of another context, in reverse."""
    ids: Tensor = inputs["input_ids"].clone()
    ids[:, start:] = ids.roll(1, 0).flip(1)[:, start:]
    return ids


def _close(x: Tensor, y: Tensor, share: float | None = None) -> bool:
    """Return whether rows are equal up to rounding."""
    size = torch.maximum(x.double().norm(dim=-1), y.double().norm(dim=-1)).clamp_min(1e-30)
    error = (x.double() - y.double()).norm(dim=-1) / size
    return bool((error <= (tolerance(x.dtype) if share is None else share)).all())


class _Write:
    """How what attention or MLP of a block gives gets into the residual stream.

    Seeded noise is added at the site, and everything in the block that runs later and is not on the
    way, such as the MLP after attention, is held as it was. Then the block's output moves by that
    noise, by a multiple of it, or by something else.
    """

    def __init__(self, model: nn.Module, probe: Probe, site: Site, layer: int) -> None:
        self.probe, self.site = probe, site
        block = block_of(model, site.name, layer)
        self.block = block
        self.names = {id(m): path for path, m in block.named_modules() if path}
        self.calls, _ = probe.record(dict(block.named_modules()))
        self.stream = next(call for call in self.calls if call.module is block)
        self.own = next(call for call in self.calls if call.module is site.module)

    def judge(self, report: SiteReport) -> SiteReport:
        """Return the report with `written` and what goes with it."""
        name = report.name
        kind, _, layer = name.partition(".")
        write = f"{WRITES[kind]}.{layer}"
        if (key := self.residual_argument()) is not None or self.is_output():
            offered = "" if key is None else f"; {write} is what it adds"
            return replace(
                report,
                written="residual inside",
                ok=False,
                why=f"site {name}: expected what is added to the residual stream, got "
                f"{report.path}, which adds the stream itself{offered}",
            )
        way = self.way(self.own)
        exact, scale = self.moves(self.site, self.own, way)
        if not exact:
            between = tuple(self.names[id(call.module)] for call in way) or self.later(way)
            why = f"between it and the residual stream: {', '.join(between) or 'something'}"
            return replace(report, written="indirect", between=between, why=why)
        beside = self.beside()
        if beside:
            return replace(
                report,
                written="partial",
                scale=scale,
                between=beside,
                why=f"{', '.join(beside)} reads the same input and is added too"
                + ("" if scale == 1 else f", all times {scale:.4g}" if scale else ", all scaled"),
            )
        if scale == 1:
            return replace(report, written="exact", scale=1.0)
        by = f"{scale:.4g}" if scale is not None else "a number for each column"
        return replace(report, written="scaled", scale=scale, why=f"it is added times {by}")

    def residual_argument(self) -> int | str | None:
        """Return which argument of the module is the stream that it adds; None if it adds none."""
        if self.own.output is None:
            return None
        first = next(iter(self.own.inputs), None)
        others = [key for key in self.own.inputs if key != first]
        if not others:
            return None
        changed, _ = self.probe.record(
            {"own": self.site.module},
            [
                lambda: Site("", self.block, "in").hook(lambda v: v + noise_like(v)),
                _holding(self.own),
            ],
        )
        call = changed[0]
        if call.output is None or call.output.shape != self.own.output.shape:
            return None
        moved = call.output - self.own.output
        for key in others:
            before, after = self.own.inputs[key], call.inputs.get(key)
            if after is None or before.shape != moved.shape or torch.equal(before, after):
                continue
            if self.equal(moved, after - before, call.output):
                return key
        return None

    def is_output(self) -> bool:
        """Return whether the module gives what the block gives."""
        out, block = self.own.output, self.stream.output
        return (
            out is not None
            and block is not None
            and out.shape == block.shape
            and bool(torch.equal(out, block))
        )

    def way(self, own: Call) -> list[Call]:
        """Return the calls that the value of one passes through as it is, one after the other."""
        found: list[Call] = []
        value, after = own.output, own.ended
        while value is not None:
            # The outermost of those that take it: what is inside of it is its own affair.
            taking = [
                call
                for call in self.calls
                if call.began > after and any(_same(value, x) for x in call.inputs.values())
            ]
            if not taking or taking[0].output is None:
                break
            found.append(taking[0])
            value, after = taking[0].output, taking[0].ended
        return found

    def held(self, own: Call, way: Sequence[Call]) -> list[Call]:
        """Return calls of children of the block that began after one and are not on its way."""
        children = {id(module) for module in self.block.children()}
        on = {id(call.module) for call in way}
        return [
            call
            for call in self.calls
            if id(call.module) in children
            and call.began > own.ended
            and call.inputs
            and not on & {id(module) for module in call.module.modules()}
        ]

    def moves(self, site: Site, own: Call, way: Sequence[Call]) -> tuple[bool, float | None]:
        """Return whether the block's output moves with a site, up to a factor, and this factor.

        1.0 where it is exactly as much; None where it differs by column.
        """
        added: list[Tensor] = []

        def add(x: Tensor) -> Tensor:
            assert self.stream.output is not None
            big = self.stream.output.float().square().mean(-1, keepdim=True).sqrt()
            step = noise_like(torch.ones_like(x), 1) * big.reshape(*x.shape[:-1], 1).to(x.dtype)
            added.append((x + step) - x)
            return x + step

        hooks: list[Hook] = [lambda: site.hook(add)]
        hooks += [_holding(call) for call in self.held(own, way)]
        calls, _ = self.probe.record({"block": self.block}, hooks)
        out, before = calls[0].output, self.stream.output
        if out is None or before is None or not added or added[0].numel() != out.numel():
            return False, None  # several streams, in some families
        moved, step = (out - before).double(), added[0].double().reshape(out.shape)
        factor = float((moved * step).sum() / step.square().sum())
        columns = (moved * step).sum((0, 1)) / step.square().sum((0, 1))
        if float(columns.abs().max()) <= 1e-6 or not self.equal(moved, columns * step, out):
            return False, None
        # The averages over rows are known better than single numbers.
        share = tolerance(out.dtype)
        if not self.equal(moved, factor * step, out) or bool(
            ((columns - factor).abs() > share * abs(factor)).any()
        ):
            return True, None
        return True, 1.0 if abs(factor - 1) <= max(share / 4, 1e-5) else factor

    def equal(self, moved: Tensor, wanted: Tensor, out: Tensor) -> bool:
        """Return whether a change of the output is the one expected, up to its rounding."""
        size = out.double().norm(dim=-1) + wanted.double().norm(dim=-1)
        error = (moved.double() - wanted.double()).norm(dim=-1)
        return bool((error <= tolerance(out.dtype) * size).all())

    def value_of(self, site: Site) -> Tensor:
        """Return the value of a site of the block."""
        seen: list[Tensor] = []
        self.probe.run([lambda: site.hook(lambda x: seen.append(x.clone()))])
        return seen[0]

    def is_same(self, x: Tensor, y: Tensor) -> bool:
        """Return whether two tensors hold the same rows, up to rounding."""
        if x.numel() != y.numel() or x.shape[-1] != y.shape[-1]:
            return False
        return self.equal(x - y.reshape(x.shape).to(x), torch.zeros_like(x), x)

    def adds_up(self, written: Site) -> bool:
        """Return whether a value and the stream give the block's output, or what a later module
        takes, perhaps with what one other module of the block gives."""
        value, out, begin = self.value_of(written), self.stream.output, self.own.began
        assert out is not None
        before = [next(iter(self.stream.inputs.values()))]
        before += [x for call in self.calls for x in call.inputs.values()]
        others = [call.output for call in self.calls if call.output is not None]
        after = [out]
        after += [x for call in self.calls if call.began > begin for x in call.inputs.values()]
        shaped = [
            x for x in before if x.numel() == value.numel() and x.shape[-1] == value.shape[-1]
        ]
        if any(self.is_same(x.reshape(value.shape) + value, y) for x in shaped for y in after):
            return True
        start = before[0].reshape(value.shape) if before[0].numel() == value.numel() else None
        return start is not None and any(
            self.is_same(start + value + x.reshape(value.shape), y)
            for x in others
            if x.numel() == value.numel() and x.shape[-1] == value.shape[-1]
            for y in after
        )

    def later(self, way: Sequence[Call]) -> tuple[str, ...]:
        """Return children of the block that run later and take something that the site changes."""
        before = {self.names[id(call.module)]: call for call in self.held(self.own, way)}
        changed, _ = self.probe.record(
            {name: call.module for name, call in before.items()},
            [lambda: self.site.hook(lambda v: v + noise_like(v))],
        )
        return tuple(
            dict.fromkeys(
                call.name
                for call in changed
                if any(
                    not _same(x, before[call.name].inputs.get(key))
                    for key, x in call.inputs.items()
                )
            )
        )

    def beside(self) -> tuple[str, ...]:
        """Return other modules of the block that read the same input and are added likewise."""
        if not self.own.inputs:
            return ()
        mine = next(iter(self.own.inputs.values()))
        found = []
        for call in self.calls:
            path = self.names.get(id(call.module), "")
            if not path or "." in path or call.output is None or call.module is self.site.module:
                continue
            if any(module is self.site.module for module in call.module.modules()):
                continue
            if path.partition(".")[0] in _OTHERS or "norm" in type(call.module).__name__.lower():
                continue
            if not any(_same(mine, x) for x in call.inputs.values()):
                continue
            other = Site(path, call.module, "out", self.block)
            if self.moves(other, call, self.way(call))[0]:
                found.append(path)
        return tuple(found)


_OTHERS = {"self_attn", "attn", "attention", "self_attention", "norm_attn_norm", "mlp", "ffn"}
_OTHERS |= {"feed_forward"}
"""Children of blocks that are never a second branch of each other: attention and MLP."""


def _holding(call: Call) -> Hook:
    """Return a hook that makes a module take as its first tensor what it took in `call`.

    What it takes besides, such as the residual stream that some MLPs add, is left alone.
    """
    key, held = next(iter(call.inputs.items()))

    @only_here
    def hold(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if isinstance(key, int):
            return (*args[:key], held, *args[key + 1 :]), kwargs
        return args, {**kwargs, key: held}

    return lambda: call.module.register_forward_pre_hook(hold, with_kwargs=True)


def _same(x: Tensor | None, y: Tensor | None) -> bool:
    """Return whether two tensors hold the same rows."""
    if x is None or y is None or x.numel() != y.numel() or x.shape[-1:] != y.shape[-1:]:
        return False
    return torch.equal(x.reshape(-1), y.reshape(-1).to(x))


def _made(
    model: nn.Module, probe: Probe, name: str, kind: str, layer: int
) -> tuple[Site, SiteReport]:
    """Return a site that is made of an output of attention or MLP, and its report."""
    source = f"{MADE[kind]}.{layer}"
    inner = locate(model, source)
    report = _basics(model, probe, inner)
    if not report.ok:
        raise ValueError(report.why.replace(f"site {source}:", f"site {name}:"))
    write = _Write(model, probe, inner, layer)
    key = write.residual_argument()
    if key is not None:
        base = Base(inner.module, key, -1)
        found: Site | None = replace(inner, name=name, base=base)
    elif write.is_output():
        found = None
    else:
        found = _added(write, inner, name)
    if found is None:
        raise ValueError(
            f"site {name}: expected a module whose output is added to the residual stream, found "
            f"none after {report.path}"
        )
    if kind == "resid_mid":
        found = _middle(write, found, name)
        return found, _basics(model, probe, found)
    report = _basics(model, probe, found)
    if not write.adds_up(found):
        raise ValueError(
            f"site {name}: expected what is added to the residual stream as it is, got "
            f"{report.path}, which does not add up with what else the block adds or scales"
        )
    own = next(call for call in write.calls if call.module is found.module)
    way = write.way(own) if found.base is None else []  # the stream itself is read by others
    if write.moves(found, own, way) != (True, 1.0):
        raise ValueError(f"site {name}: expected what is added as it is, got {report.path}")
    return found, replace(report, written="exact", scale=1.0)


def _added(write: _Write, inner: Site, name: str) -> Site | None:
    """Return the site of what is added: the module, or the last one that its value passes."""
    way = write.way(write.own)
    exact, scale = write.moves(inner, write.own, way)
    if exact and (beside := write.beside()):
        raise ValueError(
            f"site {name}: expected one module that gives what is added to the residual stream, "
            f"found {', '.join(beside)} beside {write.names[id(inner.module)]}"
        )
    if exact and scale is not None:
        return replace(inner, name=name, scale=scale)
    for i in range(len(way) - 1, -1, -1):
        later = Site(name, way[i].module, "out", write.block)
        exact, scale = write.moves(later, way[i], way[i + 1 :])
        if exact and scale is not None:
            return replace(later, scale=scale)
    return None


def _middle(write: _Write, added: Site, name: str) -> Site:
    """Return the stream between attention and MLP, as block input plus what attention adds."""
    if added.base is not None:  # attention gives the stream itself
        return replace(added, base=None)
    first, _ = mlp_of(write.block, name)
    seen: list[Tensor] = []
    site = Site(name, first, "in", write.block)
    write.probe.run(
        [lambda: added.hook(lambda v: v + noise_like(v)), lambda: site.hook(seen.append)]
    )
    before = next((call for call in write.calls if call.module is first), None)
    if before is None or not seen or any(_same(seen[0], x) for x in before.inputs.values()):
        raise ValueError(
            f"site {name}: expected an MLP that comes after attention, got one beside it, which "
            "does not read what attention adds"
        )
    key = next(iter(write.stream.inputs))
    site = replace(added, name=name, base=Base(write.block, key, 1))
    value = write.value_of(site)
    after = [
        x for call in write.calls if call.began > write.own.ended for x in call.inputs.values()
    ]
    if not any(write.is_same(value, x) for x in after):
        raise ValueError(
            f"site {name}: expected a stream of the block's input and what attention adds, got "
            "another one: something else is added or scaled in between"
        )
    return site
