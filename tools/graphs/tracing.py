"""Captures the graphs of trainer.loop.train_step where a rank would execute them.

One rank is traced, without values and without device memory. The step runs unchanged, with a Runtime of its
own. Its mark_step takes the pending graph as HLO, and then replaces the data of every pending tensor by a
placeholder, which is a tensor of the device with a shape and no data. Tensors that are created on the host
are on the meta device, and become placeholders when they are moved to the device; so weights take no memory.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from data.loader import BEGINNING
from data.packing import Pieces, Rows
from data.tokens import Tokens
from model.config import ModelConfig
from parallel.graph import backend
from parallel.graph.live import live_tensors
from parallel.runtime import Runtime, launch
from tools.graphs.memory import GRADIENTS, KEPT, OPTIMIZER, WEIGHTS
from tools.graphs.places import Places
from trainer.build import TrainState, build_state
from trainer.config import Config
from trainer.job import Job
from trainer.loop import make_loaders, train_step
from trainer.lora_settings import lora_config

MANY = 64
ANSWER = 128  # tokens of an answer with its prompt, of which a row of preference pairs is assumed to be full


@dataclass(frozen=True)
class Input:
    """What an input of a graph is: a tensor of the state, WEIGHTS, OPTIMIZER or GRADIENTS, with its `name`;
    or, KEPT, what an earlier graph returned, `made` = (number of the graph, number of its result)."""

    kind: str
    name: str = ""
    made: tuple[int, int] | None = None


@dataclass(frozen=True)
class Traced:
    """A graph: its HLO as text and, if requested, as a serialised HloModuleProto.

    `inputs`: what its parameters are, by their numbers; of batches and constants nothing is known.
    `overwritten`: the number of a result -> that of the parameter whose new data it is. The seconds are those
    in which Python traced it (in the second step, without its places), torch_xla lowered it to text and, if
    requested, XLA:CPU compiled it.
    """

    text: str
    proto: bytes | None
    inputs: dict[int, Input]
    overwritten: dict[int, int]
    trace_seconds: float
    lowering_seconds: float
    compile_seconds: float | None


class _Tracer(Runtime):
    """A rank that collects its graphs in `traced` where another one would execute them."""

    def __init__(self, runtime: Runtime, world_size: int, keep_proto: bool, compiles: bool):
        super().__init__(runtime.rank, world_size, runtime.device)
        self.replay_graphs(False)
        self.traced: dict[bytes, Traced] = {}
        self.state: TrainState | None = None
        self._keep_proto, self._compiles = keep_proto, compiles
        self._inputs: dict[int, Input] = {}  # by the handle of their data
        self._handles: dict[int, int] = {}  # of the data that tensors of the state (by id) had before
        self._begun = time.perf_counter()

    def _end_graph(self, name, before=None, record=None):
        seconds = time.perf_counter() - self._begun
        outputs = backend.pending_outputs(live_tensors(self.world_size)[self.rank])
        if outputs:
            key = backend.graph_hash([same[0] for same in outputs])
            if key in self.traced:
                self.traced[key] = replace(self.traced[key], trace_seconds=seconds)
            else:
                self.traced[key] = self._take(outputs, seconds)
            for tensor in chain.from_iterable(outputs):
                tensor.data = placeholder(tensor)  # its views are views of the placeholder from now on
            backend.end_graph(self.device, backend.random_seed(self.device))
            graph = list(self.traced).index(key)
            self._inputs |= {
                _data_handle(same[0]): Input(KEPT, made=(graph, number))
                for number, same in enumerate(outputs)
            }
        for kind, name, tensor in state_tensors(self.state):
            self._handles[id(tensor)] = _data_handle(tensor)
            self._inputs[self._handles[id(tensor)]] = Input(kind, name)
        self._begun = time.perf_counter()

    def _take(self, outputs, trace_seconds):
        pending = [same[0] for same in outputs]
        handles = [backend.data_handle(data) for _, data in backend.graph_inputs(pending)]
        numbers = {handle: number for number, handle in enumerate(handles)}
        overwritten = {
            output: numbers[self._handles[id(tensor)]]
            for output, same in enumerate(outputs)
            for tensor in same
            if self._handles.get(id(tensor)) in numbers
        }
        begun = time.perf_counter()
        text = backend.hlo_text(pending)
        lowered = time.perf_counter()
        with backend.without_lines():
            proto = backend.hlo_proto(pending) if self._keep_proto else None
            compiling = time.perf_counter()
            if self._compiles:
                backend.compile_graph(pending)
            compile_seconds = time.perf_counter() - compiling if self._compiles else None
        return Traced(
            text,
            proto,
            {number: self._inputs[handle] for number, handle in enumerate(handles) if handle in self._inputs},
            overwritten,
            trace_seconds,
            lowered - begun,
            compile_seconds,
        )


def _data_handle(tensor: torch.Tensor) -> int:
    """The handle that the data of a tensor, which is not pending, has as an input of a graph.

    The tensor's own handle is another one as soon as an operation has read it.
    """
    [(_, data)] = backend.graph_inputs([tensor])
    return backend.data_handle(data)


def state_tensors(state: TrainState) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(kind, name, tensor) of what a step changes in place, or only reads, and what lives between steps."""
    for name, parameter in state.model.named_parameters():
        yield WEIGHTS, name, parameter
    for name in ("weights", "exp_avg", "exp_avg_sq"):
        for number, tensor in enumerate(getattr(state.optimizer, name)):
            yield OPTIMIZER, f"{name}.{number}", tensor
    for number, tensor in enumerate(state.accumulator.grad_sums or ()):
        yield GRADIENTS, f"grad_sums.{number}", tensor


def placeholder(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape and dtype on the current XLA device, without data."""
    from torch_xla.core.xla_builder import create_placeholder_tensor

    return create_placeholder_tensor(tensor.shape, tensor.dtype)


class _WithoutData(TorchFunctionMode):
    """Makes Tensor.to turn a tensor of the meta device into a placeholder on an XLA device."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        if function is torch.Tensor.to and arguments[0].is_meta:
            target = keywords.get("device", arguments[1] if len(arguments) > 1 else None)
            if isinstance(target, torch.device) and target.type == "xla":
                return placeholder(arguments[0])
        return function(*arguments, **keywords)


def devices(world_size: int) -> int:
    """The number of devices that are needed to trace one of `world_size` ranks.

    Two are enough to trace: torch_xla then issues collectives. To compile a graph, all are needed. XLA:CPU's
    runtime confuses devices where there are several hundred, so large worlds have two.
    """
    return world_size if world_size <= MANY else 2


def trace(
    config: Config,
    model_config: ModelConfig,
    world_size: int,
    keep_proto: bool = False,
    compiles: bool = False,
) -> tuple[list[Traced], Places]:
    """(the graphs of two steps of rank 0, each once, in the order of their first execution; where their
    operations were recorded).

    parallel.runtime.prepare_environment must have been called, with the number of `devices`. `config` must
    have random weights.
    """
    found: list[Traced] = []
    places = Places()

    def program(runtime):
        if runtime.rank == 0:
            tracer = _Tracer(runtime, world_size, keep_proto, compiles)
            with _WithoutData(), torch.device("meta"):
                _two_steps(tracer, job, places)
            found.extend(tracer.traced.values())

    with tempfile.TemporaryDirectory() as directory:
        job = _job(config, model_config, Path(directory))
        launch(program, devices(world_size))
    return found, places


def _two_steps(tracer: _Tracer, job: Job, places: Places) -> None:
    """Build the state of the loop, and call its step twice: first with, then without recording places."""
    tracer.state = state = build_state(tracer, job)
    tracer.mark_step("build")
    state.model.train()
    loader, _ = make_loaders(state, job, BEGINNING)
    for step in range(2):
        micro_batches = [
            {name: tensor.to(tracer.device) for name, tensor in batch.items()} for batch in loader.step(step)
        ]
        scalars = state.optimizer.scalars(step, job.config.learning_rate).to(tracer.device)
        stop_request = torch.zeros(1).to(tracer.device)
        with nullcontext() if step else places.recording(state.model):
            train_step(tracer, state, micro_batches, scalars, stop_request)


def _job(config, model_config, directory):
    """A job that trains on one row of zeros without end; the graphs of a step do not depend on values.

    A row of preference pairs is one pair, and has room for answers of ANSWER tokens.
    """
    length = config.max_seq_length
    ends = np.array([0, length])
    if config.trains_on_pairs:
        ends = np.array([0, length // 2, length])
    tokens = Tokens(
        np.zeros(length, np.int32), np.ones(length, bool), ends, np.zeros(1, np.uint64), directory, {}
    )
    pieces = Pieces(np.zeros(len(ends) - 1, np.int64), ends[:-1], ends[1:])
    rows = Rows([tokens], pieces, [list(range(len(ends) - 1))], length, pad_token_id=0)
    if config.trains_on_pairs:
        segments = max(2, length // ANSWER // 2 * 2)
        rows = replace(rows, segments=segments, values=np.zeros(2, np.float32))
    return Job(
        config=config,
        model_directory=directory,
        model_config=model_config,
        tokenizer=None,
        lora=lora_config(config, model_config),
        adapter=None,
        train_rows=rows,
        eval_rows=None,
        total_steps=10**9,
        summary="tracing two steps of rank 0 ...",
        resume=None,
        identity={},
        deadline=None,
    )
