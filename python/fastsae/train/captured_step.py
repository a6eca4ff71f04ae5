"""A training step as one CUDA graph: recorded once, then started by one call of the driver.

What differs from step to step lies on the device, in tensors that the recorded kernels read: the
batch, the learning rate and the number of the step. Everything else that a step changes, it changes
in place. So a replay does what the step itself would, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fastsae._log import logger
from fastsae.nn import SAE, SAEOutput, StepContext
from fastsae.train.dead import DeadLatents
from fastsae.train.fused_update import FusedUpdate
from fastsae.train.update import Update, base_of
from fastsae.types import SparseActs

CAPTURED = {"TopKSAE", "BatchTopKSAE", "MatryoshkaSAE", "HierarchicalTopKSAE", "SampledSAE"}
CAPTURED |= {"GradientSAE", "GroupMaxSAE", "FeatureChoiceSAE"}
CAPTURED |= {"JumpReLUSAE", "ReLUSAE", "GatedSAE"}
CAPTURED |= {"Transcoder", "BatchTopKTranscoder", "GroupMaxTranscoder"}
CAPTURED |= {"JumpReLUTranscoder", "ReLUTranscoder"}
CAPTURED |= {"CrossCoder", "TopKCrossCoder", "ReLUCrossCoder"}
CAPTURED |= {"CrossLayerTranscoder", "BatchTopKCrossLayerTranscoder"}
CAPTURED |= {"JumpReLUCrossLayerTranscoder", "ReLUCrossLayerTranscoder"}
"""Classes whose recorded steps ask the device nothing: no number is read, no shape depends on one,
and what `SAE.step_kind` does not tell is on the device. All that have a fused step."""
WARM_UP = 3
"""Steps of a kind before one is recorded: libraries set themselves up in the first ones."""


class Graph(Protocol):
    """Records what a function starts on the device, and starts it again."""

    def warm_up(self, run: Callable[[], SAEOutput]) -> SAEOutput:
        """Run a function where it is going to be recorded."""

    def record(self, run: Callable[[], SAEOutput]) -> SAEOutput:
        """Record a function, which changes nothing; return where its results are going to be."""

    def replay(self) -> None:
        """Start what was recorded."""


class CudaGraph:
    """A `Graph` of CUDA, on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def warm_up(self, run: Callable[[], SAEOutput]) -> SAEOutput:
        """See `Graph.warm_up`."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            out = run()
        current.wait_stream(self._stream)
        return out

    def record(self, run: Callable[[], SAEOutput]) -> SAEOutput:
        """See `Graph.record`."""
        self._graph = None  # its memory is free for the next one
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: another one reads and copies the batches to come.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            out = run()
        self._graph = graph
        return out

    def replay(self) -> None:
        """See `Graph.replay`."""
        assert self._graph is not None
        self._graph.replay()


@dataclass
class StepInputs:
    """What a step is given: plain numbers, or tensors that a recorded step reads."""

    x: Tensor
    """[n, columns], scaled."""
    lr: float | Tensor
    """Learning rate; [] float64."""
    number: int | Tensor
    """Of the step, from 1; [] int64."""
    sparsity_scale: float | Tensor
    """See `StepContext`; [] float64."""
    progress: float | Tensor
    """See `StepContext`; [] float64."""
    may_have_dead: bool
    """Whether latents can be dead by now."""
    recorded: bool = False
    """Whether the step is being recorded."""


NUMBERS = {
    "lr": torch.float64,
    "number": torch.int64,
    "sparsity_scale": torch.float64,
    "progress": torch.float64,
}
"""What differs from step to step besides the batch, and what holds it on the device."""
Move = Callable[[Tensor, StepContext], SAEOutput]
"""Moves the parameters by a batch; its rate is known."""
Run = Callable[[StepInputs, Move], SAEOutput]
"""Does a step with a given move, and leaves what it reads and writes besides where it is."""


class CapturedStep:
    """Does the steps of a run, and records one as soon as `WARM_UP` of a kind have been done.

    A kind is what a recorded step cannot be told: the shape of the batch, whether latents can be
    dead, what `SAE.step_kind` says, the settings of the module, and where its parameters lie. A
    step of another kind than the recorded one is done as without a graph; when it comes `WARM_UP`
    times in a row, it is recorded in its place. Steps that cannot be recorded do not count in this.

    Args:
        run: gives what does a step, or None when that is gone.
        sae: the module.
        update: of its parameters; it counts the steps.
        dead: counters of its latents.
        graph: records.
    """

    def __init__(
        self,
        run: Callable[[], Run | None],
        sae: SAE,
        update: FusedUpdate,
        dead: DeadLatents,
        graph: Graph,
    ) -> None:
        self._run, self._sae, self._update, self._dead = run, sae, update, dead
        self._graph = graph
        self._seen: tuple[Any, ...] | None = None
        self._count = 0  # steps of this kind in a row
        self._recorded: tuple[Any, ...] | None = None  # the kind
        self._inputs: StepInputs | None = None
        self._out: SAEOutput | None = None
        self._held: list[Tensor] = []  # memory that the graph knows by its address
        self.replays = 0
        """Steps that were replayed."""

    def step(self, given: StepInputs) -> SAEOutput:
        """Do one step with plain numbers; its result is overwritten by the next one."""
        out = self._step(given)
        self._update.count += 1
        return out

    def _step(self, given: StepInputs) -> SAEOutput:
        kind = self._kind(given)
        if kind is None:
            return self._graph.warm_up(lambda: self._do(given))
        if kind != self._recorded:
            self._count = self._count + 1 if kind == self._seen else 1
            self._seen = kind
            if self._count <= WARM_UP:
                return self._graph.warm_up(lambda: self._do(given))
            self._update.refresh_copies()  # not as a part of what is recorded
            self._record(given, kind)
        self._seen = None
        assert self._inputs is not None
        assert self._out is not None
        self._set(given)
        self._update.refresh_copies()
        self._graph.replay()
        self._sae.count_replay()
        self.replays += 1
        return replace(self._out)

    def _do(self, given: StepInputs) -> SAEOutput:
        run = self._run()
        assert run is not None
        return run(given, partial(self._update.move, lr=given.lr, number=given.number))

    def _record(self, given: StepInputs, kind: tuple[Any, ...]) -> None:
        device = given.x.device
        self._recorded, self._out = None, None
        held: dict[str, Any] = {
            name: torch.ones((), dtype=dtype, device=device) for name, dtype in NUMBERS.items()
        }
        held["x"] = torch.empty_like(given.x, memory_format=torch.contiguous_format)
        inputs = self._inputs = replace(given, recorded=True, **held)
        self._set(given)
        self._held = list(self._update.buffers.values())
        self._out = self._graph.record(lambda: self._do(inputs))
        self._held += self._update.buffers.values()
        self._recorded = kind

    def _set(self, given: StepInputs) -> None:
        """Write what a recorded step reads, without a wait: numbers travel with the kernel."""
        inputs = self._inputs
        assert inputs is not None
        inputs.x.copy_(given.x)
        for name in NUMBERS:
            getattr(inputs, name).fill_(getattr(given, name))

    def _kind(self, given: StepInputs) -> tuple[Any, ...] | None:
        """Return the kind of a step; None: it cannot be recorded."""
        sae, update = self._sae, self._update
        own = sae.step_kind(given.x.shape[0])
        if own is None:
            return None
        config = update.config
        tensors = [*sae.parameters(), *sae.buffers(), *self._dead.tensors().values()]
        tensors += [*update.exp_avg.values(), *update.exp_avg_sq.values()]
        return (
            given.x.shape,
            given.may_have_dead,
            own,
            config.betas,
            config.eps,
            config.clip_grad_norm,
            tuple((t.data_ptr(), t.requires_grad) for t in tensors),
            str(sae.config()),
        )


def own_copy(out: SAEOutput) -> SAEOutput:
    """Return a result that the next step leaves alone."""
    found = {field.name: getattr(out, field.name) for field in fields(out)}
    acts = out.acts
    offsets = None if acts.offsets is None else acts.offsets.clone()
    found = {name: t.clone() for name, t in found.items() if isinstance(t, Tensor)}
    copy = SparseActs(acts.values.clone(), acts.indices.clone(), offsets, acts.d_sae)
    return SAEOutput(acts=copy, **found)


def make_captured_step(
    run: Callable[[], Run | None], sae: SAE, update: Update, dead: DeadLatents
) -> CapturedStep | None:
    """Return what records the steps of a run, or None, and say in the log why not."""
    why = why_not_captured(sae, update)
    if why is not None:
        logger.info("Trainer: training without a CUDA graph, because %s", why)
        return None
    assert isinstance(update, FusedUpdate)
    return CapturedStep(run, sae, update, dead, make_graph(sae.W_enc_rows.device))


def why_not_captured(sae: SAE, update: Update) -> str | None:
    """Return why the steps of a run cannot be recorded; None: they can."""
    base = base_of(sae)
    name = type(sae).__name__ if base is None else base.__name__
    if type(update) is not FusedUpdate:
        return f"the update is {type(update).__name__}"
    if name not in CAPTURED:
        return f"steps of {name} are not known to ask the device nothing"
    if update.others and update.config.optimizer != "adam":
        return f"{', '.join(update.others)} moves by {update.config.optimizer} outside of a kernel"
    if not can_record(sae.W_enc_rows.device):
        return f"{sae.W_enc_rows.device.type} has no graphs"
    return None


def can_record(device: torch.device) -> bool:
    """Return whether there is a `Graph` for a device."""
    return device.type == "cuda"


def make_graph(device: torch.device) -> Graph:
    """Return the `Graph` of a device."""
    return CudaGraph(device)
