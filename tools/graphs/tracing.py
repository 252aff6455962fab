"""The graphs of trainer.loop.run, captured where a rank would execute them: one rank, no values, no device
memory.

The loop is run as it stands, by a Runtime whose mark_step takes the pending graph as HLO and then gives every
tensor of it a placeholder, a tensor of the device that has a shape and no data. What the loop makes on the
host is on the meta device, and a placeholder once it is moved; so weights cost nothing. Batches are real.
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
    """A graph: its HLO as text, and as a serialised HloModuleProto where that was asked for; for how long
    Python traced it, torch_xla lowered it to the text and, where that was asked for, XLA compiled it."""

    text: str
    proto: bytes | None
    trace_seconds: float
    lowering_seconds: float
    compile_seconds: float | None


class _Done(Exception):
    """Enough steps were traced."""


class _Tracer(Runtime):
    """`traced` gets every new graph; after `mark_steps` calls the loop is left."""

    def __init__(self, runtime: Runtime, world_size: int, mark_steps: int, keep_proto: bool, compiles: bool):
        super().__init__(runtime.rank, world_size, runtime.device)
        self.traced: dict[bytes, Traced] = {}
        self._left, self._keep_proto, self._compiles = mark_steps, keep_proto, compiles
        self._begun = time.perf_counter()

    def barrier(self):
        """There is nobody to wait for."""

    def watch_graphs(self, on_recompile):
        """The graphs are what is asked for."""

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
                tensor.data = placeholder(tensor)  # a view of it is taken of the placeholder, too
            # As a sync does: a token from collective to collective keeps their order within a graph, not
            # beyond.
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
    """A tensor of the same shape and type on the current XLA device, without data."""
    from torch_xla.core.xla_builder import create_placeholder_tensor

    return create_placeholder_tensor(tensor.shape, tensor.dtype)


class _WithoutData(TorchFunctionMode):
    """Moves a tensor of the meta device to an XLA device as a placeholder."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        if function is torch.Tensor.to and arguments[0].is_meta:
            target = keywords.get("device", arguments[1] if len(arguments) > 1 else None)
            if isinstance(target, torch.device) and target.type == "xla":
                return placeholder(arguments[0])
        return function(*arguments, **keywords)


def devices(world_size: int) -> int:
    """How many devices are needed to trace one rank of so many.

    A graph that is not executed needs two, so that collectives are issued; one that is compiled needs all.
    XLA:CPU's runtime does not tell several hundred devices apart.
    """
    return world_size if world_size <= MANY else 2


def trace(
    config: Config,
    model_config: ModelConfig,
    world_size: int,
    keep_proto: bool = False,
    compiles: bool = False,
) -> list[Traced]:
    """The graphs of two steps of rank 0, each once, in the order in which they come up. The world must have
    been prepared (parallel.runtime.prepare_environment, for `devices`), and `config` must ask for random
    weights."""
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

    with (
        tempfile.TemporaryDirectory() as directory
    ):  # in which the loop tidies up what earlier runs have left
        job = _job(replace(config, output_dir=directory), model_config, Path(directory))
        launch(program, devices(world_size))
    return found


def _job(config, model_config, directory):
    """A job of one row of zeros, which never ends by itself; nothing of the step's graph depends on values."""
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
