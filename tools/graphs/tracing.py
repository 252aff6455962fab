"""Captures the graphs of trainer.loop.run where a rank would execute them.

One rank is traced, without values and without device memory. The loop runs unchanged, with a Runtime of its
own. Its mark_step takes the pending graph as HLO, and then replaces the data of every pending tensor by a
placeholder, which is a tensor of the device with a shape and no data. Tensors that the loop creates on the
host are on the meta device, and become placeholders when they are moved to the device; so weights take no
memory. Batches have values.
"""

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from data.packing import Pieces, Rows
from data.tokens import Tokens
from model.config import ModelConfig
from parallel.graph.live import live_tensors
from parallel.runtime import Runtime, launch
from trainer.config import Config
from trainer.job import Job, lora_config

MANY = 64


@dataclass(frozen=True)
class Traced:
    """A graph: its HLO as text and, if requested, as a serialised HloModuleProto.

    The seconds are those in which Python traced it, torch_xla lowered it to text and, if requested, XLA:CPU
    compiled it.
    """

    text: str
    proto: bytes | None
    trace_seconds: float
    lowering_seconds: float
    compile_seconds: float | None


class _Done(Exception):
    """Ends the loop when enough steps were traced."""


class _Tracer(Runtime):
    """Collects every new graph in `traced`, and ends the loop by an exception after `mark_steps` calls."""

    def __init__(self, runtime: Runtime, world_size: int, mark_steps: int, keep_proto: bool, compiles: bool):
        super().__init__(runtime.rank, world_size, runtime.device)
        self.traced: dict[bytes, Traced] = {}
        self._left, self._keep_proto, self._compiles = mark_steps, keep_proto, compiles
        self._begun = time.perf_counter()

    def barrier(self):
        """Return at once: no other rank runs."""

    def watch_graphs(self, on_recompile):
        """Do nothing: every graph is collected, so none is unexpected."""

    def mark_step(self, place=None, step=None):
        import torch_xla

        backend, begun = torch_xla._XLAC, time.perf_counter()
        tensors = live_tensors(self.world_size)[self.rank]
        pending = [
            tensor
            for tensor, needed in zip(
                tensors, backend._check_tensor_need_materialization(tensors), strict=True
            )
            if needed
        ]
        if pending:
            key = backend._get_graph_hash(pending)
            if key not in self.traced:
                self.traced[key] = self._take(backend, pending, begun - self._begun)
            for tensor in pending:
                tensor.data = placeholder(tensor)  # its views are views of the placeholder from now on
            # As torch_xla.sync does: the token that orders collectives must not reach the next graph.
            backend._set_all_reduce_token(str(self.device), None)
        self._left -= 1
        if not self._left:
            raise _Done
        self._begun = time.perf_counter()

    def _take(self, backend, pending, trace_seconds):
        begun = time.perf_counter()
        text = backend._get_xla_tensors_hlo(pending)
        lowered = time.perf_counter()
        proto = backend._get_xla_tensors_hlo_proto(pending) if self._keep_proto else None
        compiling = time.perf_counter()
        if self._compiles:
            backend._xla_warm_up_cache(pending, [])
        compile_seconds = time.perf_counter() - compiling if self._compiles else None
        return Traced(text, proto, trace_seconds, lowered - begun, compile_seconds)


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
) -> list[Traced]:
    """The graphs of two steps of rank 0, each once, in the order of their first execution.

    parallel.runtime.prepare_environment must have been called, with the number of `devices`. `config` must
    have random weights.
    """
    from trainer.loop import run

    mark_steps = 1 + 2 * config.mark_steps  # the first ends the building, which leaves no graph
    found: list[Traced] = []

    def program(runtime):
        if runtime.rank:
            return
        tracer = _Tracer(runtime, world_size, mark_steps, keep_proto, compiles)
        try:
            with _WithoutData(), torch.device("meta"):
                run(tracer, job)
        except _Done:
            found.extend(tracer.traced.values())

    # The loop deletes what earlier runs left in its output directory: it gets an empty one.
    with tempfile.TemporaryDirectory() as directory:
        job = _job(replace(config, output_dir=directory), model_config, Path(directory))
        launch(program, devices(world_size))
    return found


def _job(config, model_config, directory):
    """A job that trains on one row of zeros without end; the graphs of a step do not depend on values."""
    length = config.max_seq_length
    ends = np.array([0, length])
    tokens = Tokens(
        np.zeros(length, np.int32), np.ones(length, bool), ends, np.zeros(1, np.uint64), directory, {}
    )
    rows = Rows([tokens], Pieces(np.zeros(1, np.int64), ends[:1], ends[1:]), [[0]], length, pad_token_id=0)
    return Job(
        config=config,
        model_directory=directory,
        model_config=model_config,
        tokenizer=None,
        lora=lora_config(config),
        adapter=None,
        train_rows=rows,
        eval_rows=None,
        total_steps=10**9,
        summary="tracing two steps of rank 0 ...",
        resume=None,
        identity={},
        deadline=None,
    )
