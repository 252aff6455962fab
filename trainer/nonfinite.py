"""What follows a step whose loss or gradient norm is not finite: --on_nonfinite.

On the device such a step changes neither weights nor moments (trainer.loop.update), so what is saved stays
good. The host reads the step's report one step later. Under `end` it runs the step's micro-batches again and
looks where the first value that is not finite comes from: in the forward by the outputs of the modules, then
in the backward by the gradients.
"""

from __future__ import annotations

import math
import re
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from model.stage import forward_tick
from parallel.collectives import all_gather
from parallel.gradients import all_finite
from parallel.runtime import Runtime
from trainer.checkpoint.names import NonFinite, list_checkpoints
from trainer.pipelined import forward_backward_in_ticks
from trainer.reporting.console import say

if TYPE_CHECKING:
    from data.loader import Loader
    from trainer.build import TrainState
    from trainer.checkpoint.writer import Saver

Batch = dict[str, torch.Tensor]


class FiniteCheck:
    """Reads the report of each step one step late, and acts on one that is not finite.

    Every rank has a FiniteCheck. The report is the same on all ranks, so all of them end after the same step.
    """

    def __init__(self, runtime: Runtime, state: TrainState, loader: Loader, saver: Saver, forward_backward):
        """`forward_backward` is trainer.loop's."""
        self._runtime, self._state, self._loader, self._saver = runtime, state, loader, saver
        self._forward_backward, self._ends = forward_backward, state.config.on_nonfinite == "end"
        self._reads = self._ends or state.config.on_nonfinite == "skip" and runtime.rank == 0
        self._held: tuple[int, torch.Tensor] | None = None

    def hold(self, step: int, report: torch.Tensor) -> None:
        """Keep the report of the 1-based `step`, and look at that of the step before; raises as `flush`."""
        self.flush()
        if self._reads:
            self._held = (step, report)

    def flush(self) -> None:
        """Look at the report that is held: the host waits until the device has computed it.

        Where it is not finite, `skip` prints a warning. `end` waits until the last checkpoint is complete,
        and raises NonFinite on all ranks.
        """
        if self._held is None:
            return
        (step, report), self._held = self._held, None
        grad_norm, _, _, *means = values = self._runtime.read(report)
        if all(map(math.isfinite, values)):
            return
        named = zip(self._state.objective.FIGURES, means, strict=True)
        figures = ", ".join(f"{name} {mean:.4g}" for name, mean in named)
        what = f"step {step} is not finite: {figures}, gradient norm {grad_norm:.4g}"
        if not self._ends:
            say(f"warning: {what}: it is skipped, and changes nothing", sys.stderr)
            return
        if self._runtime.rank == 0:
            say(f"{what}: looking for the layer where it began ...", sys.stderr)
        where = self._where(step)
        self._saver.wait()
        present = list_checkpoints(Path(self._state.config.output_dir))
        kept = f"the last checkpoint is {present[-1][1]}" if present else "there is no checkpoint yet"
        raise NonFinite(
            f"{what}. {where}. Nothing was saved of this step; {kept}. A lower --learning_rate may help, or "
            "--on_nonfinite skip, which leaves such steps out"
        )

    def _where(self, step: int) -> str:
        """Where the values of the 1-based `step` cease to be finite, in words; the same on all ranks."""
        micro_batches = [
            {name: self._runtime.upload(tensor) for name, tensor in batch.items()}
            for batch in self._loader.step(step - 1)
        ]
        for number, batch in enumerate(micro_batches, 1):
            if name := self._first_output(batch):
                return f"It began in the forward of micro-batch {number}: the output of {name}"
        if name := self._first_gradient(micro_batches):
            return f"It began in the backward: the gradients of {name}"
        return "Run again, its outputs and gradients are finite: their sum overflows, or it was the device"

    def _first_output(self, batch: Batch) -> str | None:
        """The first module whose output is not finite in the forward of a micro-batch on any rank."""
        state, look = self._state, partial(self._runtime.mark_step, None, look_forward)
        if not state.schedule.ticks:
            return self._first(*look(state, batch)[1:])
        output, found = state.schedule.zero_activations, []
        for tick in state.schedule.ticks:
            output, names, flags = look(state, batch, tick, output)
            found.append(self._first(names, flags))
        return next(filter(None, found), None)

    def _first_gradient(self, micro_batches: list[Batch]) -> str | None:
        """The decoder layer, or the module beside those, whose gradients are the first that are not finite on
        any rank. The backward goes from the last layer to the first."""
        state = self._state

        def mark_step(name, *call):  # with the graphs of a step, where it has such
            return self._runtime.mark_step(name if state.config.graph_per_micro_batch else None, *call)

        for batch in micro_batches:
            if state.schedule.ticks:
                forward_backward_in_ticks(state, batch, mark_step)
            else:
                mark_step("micro_batch", self._forward_backward, state, batch)
        names, flags = self._runtime.mark_step(None, look_at_gradients, state)
        names = [re.sub(r"(layers\.\d+)\..*", r"\1", name.removesuffix(".weight")) for name in names]
        return self._first(names, flags, backward=True)

    def _first(self, names: list[str], flags: torch.Tensor, backward: bool = False) -> str | None:
        """The first name in the order of the stages whose flag is set on a rank; `backward`: the last one.

        `names` and `flags` [names] are this rank's. The flags are gathered by a graph of their own: to keep
        collectives in their order, torch_xla adds 0 x the result of the one before, which may be NaN.
        """
        flags = self._runtime.mark_step(None, all_gather, flags, self._state.mesh.world, 0)
        pipeline, layers = self._state.model.pipeline, self._state.model.config.num_hidden_layers
        ids, ranks = pipeline.layer_ids_of_stages(layers), torch.tensor(self._runtime.read(flags))
        found = []
        for stage, of_stage in enumerate(ranks.view(len(ids), -1, len(names)).amax(1)):
            layer_of = dict(zip(ids[pipeline.group.rank()], ids[stage], strict=True))  # of mine, the stage's
            for name, flag in zip(names, of_stage.tolist(), strict=True):
                if flag:
                    found.append(
                        re.sub(r"(?<=layers\.)\d+", lambda number, to=layer_of: str(to[int(number[0])]), name)
                    )
        # All stages compute the norm and the head after the last stage's layers.
        found.sort(key=lambda name: not name.startswith(("model.embed_tokens", "model.layers")))
        return found[-1 if backward else 0].replace(".base_layer", "") if found else None


@torch.no_grad()
def look_forward(
    state: TrainState,
    batch: Batch,
    tick: torch.Tensor | None = None,
    previous_output: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, list[str], torch.Tensor]:
    """The forward of a micro-batch, or one tick of it as in model.stage.forward_tick.

    Returns (this stage's output, the names of its modules in the order in which they ended, and flags
    [names], 1.0 where the output of a module is not finite).
    """
    found, output = {}, None

    def note(name, outputs):
        for each in outputs if isinstance(outputs, list) else [outputs]:
            found[name] = found.get(name, 0) + _not_finite(each)

    hooks = [
        module.register_forward_hook(lambda _, inputs, outputs, name=name: note(name, outputs))
        for name, module in state.model.named_modules()
        if name
    ]
    if tick is None:
        names = ("input_ids", "position_ids", "segment_ids", "row_seeds")
        hidden, rows = state.model.hidden_states(*(batch[name] for name in names)), batch
    else:
        hidden = output = forward_tick(state.model, batch, tick, previous_output).stage_output
        rows = state.model.pipeline.finished_microbatch(batch, tick)
    seeds = state.model.dropout_seeds(rows.get("row_seeds"), rows["labels"].shape[1])
    logits = state.model.head(hidden, len(rows["labels"]), seeds)
    for hook in hooks:
        hook.remove()
    note("lm_head", logits)
    note("the loss in trainer/objective.py", state.objective.loss_and_counts(state.model, hidden, rows)[0])
    return output, list(found), torch.cat(list(found.values()))


def look_at_gradients(state: TrainState) -> tuple[list[str], torch.Tensor]:
    """(the names of the trained parameters, and flags [names], 1.0 where the accumulated gradient is not
    finite)."""
    found = dict.fromkeys(state.buckets.parameters, 0)
    for bucket, grad_sum in zip(state.buckets.buckets, state.accumulator.grad_sums, strict=True):
        offset = 0
        for name, start, stop in bucket.pieces:
            found[name] = found[name] + _not_finite(grad_sum[:, offset : offset + stop - start])
            offset += stop - start
    return list(found), torch.cat(list(found.values()))


def _not_finite(values: torch.Tensor) -> torch.Tensor:
    """1.0 where a value is not finite, else 0.0; fp32 [1]."""
    return 1 - all_finite(values).float().reshape(1)
