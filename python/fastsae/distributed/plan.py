"""What a step over many processes will hold, send, and take, before anybody has rented them.

Bytes of memory and of collectives follow from the sizes, and are what a run has (a test counts).
The time is that of the ceilings of a machine: the encoder's flops, rows of entries from memory,
every parameter and average read and written once, and bytes over links; what runs at half of a
ceiling takes twice as long.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil

from fastsae.distributed.exchange import sends_entries

ARCHITECTURES = ("topk", "batchtopk", "matryoshka", "jumprelu", "transcoder")
GROUPS = 5
"""Prefixes of a Matryoshka SAE by default."""
COUNTS = {4: (2048, 2048, 1024), 8: (2048, 2048, 2048, 2048, 2048, 512)}
"""Bins of the histograms of a selection, by bytes of a number."""


@dataclass(frozen=True)
class Machine:
    """What one process can do at best."""

    flops: float
    """Per second, of the encoder's matmul."""
    memory: float
    """Bytes per second, read and written."""
    link: float
    """Bytes per second to another process."""
    latency: float
    """Seconds of a collective of few bytes."""


MACHINES = {
    # Data sheet of the H200 SXM: 989 dense bfloat16 TFLOP/s, 4.8 TB/s, NVLink 450 GB/s each way.
    # Between nodes 400 Gb/s for each GPU.
    "h200": Machine(flops=989e12, memory=4.8e12, link=450e9, latency=20e-6),
    "h200-nodes": Machine(flops=989e12, memory=4.8e12, link=50e9, latency=40e-6),
}


@dataclass(frozen=True)
class Collective:
    """One collective of a step."""

    kind: str
    """all_reduce or all_gather"""
    dimension: str
    """data or latent"""
    what: str
    numbers: float
    """That a process gives."""
    size: int
    """Bytes of a number."""

    @property
    def bytes(self) -> float:
        """Bytes that a process gives."""
        return self.numbers * self.size


@dataclass(frozen=True)
class Plan:
    """What `plan` returns."""

    data: int
    latent: int
    held: int
    """Latents of a process."""
    rows: int
    """Tokens of a data group, in a batch."""
    collectives: list[Collective] = field(repr=False)
    parameters: int
    """Bytes of a process: parameters,"""
    optimizer: int
    """Adam's two averages of them,"""
    batch: int
    """and of a batch: its rows, their reconstruction, error and gradient, and the code."""
    flops: float
    """Of a process and step."""
    gathered: float
    """Bytes of rows that entries of the code read: twice of W_dec, then of errors and of inputs."""

    @property
    def memory(self) -> int:
        """Bytes of a process."""
        return self.parameters + self.optimizer + self.batch

    @property
    def sent(self) -> float:
        """Bytes that a process gives to collectives in a step."""
        return sum(one.bytes for one in self.collectives)

    def wire_seconds(self, machine: Machine) -> float:
        """Seconds of the collectives of a step, as rings."""
        total = 0.0
        for one in self.collectives:
            size = self.data if one.dimension == "data" else self.latent
            passes = 2 * (size - 1) / size if one.kind == "all_reduce" else size - 1
            total += machine.latency + passes * one.bytes / machine.link
        return total

    def seconds(self, machine: Machine) -> dict[str, float]:
        """Return the seconds of a step by part, one after the other."""
        moved = 2 * (self.parameters + self.optimizer)
        return {
            "encoder": self.flops / machine.flops,
            "rows of entries": self.gathered / machine.memory,
            "update": moved / machine.memory,
            "collectives": self.wire_seconds(machine),
        }


def plan(
    d_in: int,
    d_sae: int,
    k: float,
    batch: int,
    *,
    data: int = 1,
    latent: int = 1,
    architecture: str = "topk",
    d_out: int | None = None,
    dtype_bytes: int = 4,
) -> Plan:
    """Return what a step takes of every process of a mesh.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        k: active latents per token; of JumpReLU, entries near a threshold count as well.
        batch: tokens of a step, on all processes together.
        data: groups that tokens are spread over.
        latent: processes that latents are spread over.
        architecture: one of `ARCHITECTURES`.
        d_out: width of a transcoder's target; None: d_in.
        dtype_bytes: of a parameter, 4 or 8.

    Raises:
        ValueError: a size below 1, a batch that is no multiple of `data`, fewer latents than
            processes, or another architecture.
    """
    sizes = {"d_in": d_in, "d_sae": d_sae, "batch": batch, "data": data, "latent": latent}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"plan: expected {name} >= 1, got {size}")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"plan: expected architecture in {', '.join(ARCHITECTURES)}, got {architecture!r}"
        )
    if not 0 < k <= d_sae:
        raise ValueError(f"plan: expected 0 < k <= d_sae = {d_sae}, got {k}")
    if batch % data:
        raise ValueError(
            f"plan: expected batch to be a multiple of {data} data groups, got {batch}"
        )
    held = ceil(d_sae / latent)
    if d_sae <= held * (latent - 1):
        raise ValueError(f"plan: expected d_sae for {latent} processes, got {d_sae}")
    out = d_in if d_out is None else d_out
    rows = batch // data
    entries = rows * k / latent
    weights = held * (d_in + out) + held + out
    found = _collectives(architecture, d_in, out, held, rows, k, entries, data, latent, dtype_bytes)
    numbers = rows * (d_in + 3 * out)
    return Plan(
        data=data,
        latent=latent,
        held=held,
        rows=rows,
        collectives=found,
        parameters=weights * dtype_bytes,
        optimizer=2 * weights * dtype_bytes,
        batch=int(numbers * dtype_bytes + entries * (2 * dtype_bytes + 4)),
        flops=2.0 * rows * d_in * held,
        gathered=entries * (3 * out + d_in) * dtype_bytes,
    )


def _collectives(
    architecture: str,
    d_in: int,
    d_out: int,
    held: int,
    rows: int,
    k: float,
    entries: float,
    data: int,
    latent: int,
    size: int,
) -> list[Collective]:
    """Return the collectives of a step of `Trainer`, without dead latents."""
    found: list[Collective] = []

    def add(kind: str, dimension: str, what: str, numbers: float, bytes_: int = size) -> None:
        if (data if dimension == "data" else latent) > 1:
            found.append(Collective(kind, dimension, what, numbers, bytes_))

    decodes = GROUPS if architecture == "matryoshka" else 1
    if architecture in ("topk", "transcoder"):
        add("all_gather", "latent", "candidates of each token", rows * min(k, held))
    if architecture in ("batchtopk", "matryoshka"):
        for bins in COUNTS[size]:
            add("all_reduce", "latent", "counts of candidates", bins, 8)
            add("all_reduce", "data", "counts of candidates", bins, 8)
        add("all_gather", "latent", "equal candidates of each token", rows, 4)
        add("all_gather", "data", "equal candidates of each token", rows * latent, 4)
    for _ in range(decodes):
        add("all_reduce", "latent", "reconstructions", rows * d_out)
    if architecture == "jumprelu":
        for what in ("penalty", "L0"):
            bytes_ = 4 if what == "L0" else size
            add("all_reduce", "latent", what, 1, bytes_)
            add("all_reduce", "data", what, 1, bytes_)
        add("all_gather", "data", "mean and variance of the batch", d_in + 1)
    for _ in range(2 if architecture == "matryoshka" else 1):
        add("all_reduce", "data", "squared error", 1)
        add("all_gather", "data", "mean and variance of the batch", d_out + 1)
    others = held if architecture == "jumprelu" else 0
    add("all_reduce", "data", "gradients of vectors", d_out + others)
    decoded = decodes * rows
    given, sums = rows * d_in + decoded * d_out, held * (d_in + d_out)
    if sends_entries(given, k * decoded / latent, sums, data):
        add("all_gather", "data", "numbers of entries", 2, 8)
        codes = 2 if decodes > 1 else 1
        every = entries * (decodes + 1) if codes > 1 else entries
        add("all_gather", "data", "places of entries", decoded + (codes - 1) * rows + every, 4)
        add("all_gather", "data", "entries", every if codes > 1 else 2 * entries)
        add("all_gather", "data", "rows", rows * d_in)
        add("all_gather", "data", "errors", decoded * d_out)
    else:
        for what, numbers in (("W_enc", d_in), ("W_dec", d_out), ("b_enc", 1)):
            add("all_reduce", "data", f"gradient of {what}", held * numbers)
    if architecture != "transcoder":
        add("all_reduce", "latent", "gradient of b_dec", d_in)
    add("all_reduce", "data", "how often latents fire", held, 4)
    return found
