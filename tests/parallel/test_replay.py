"""Replayed graphs: equal to traced ones to the bit, and never stale, whatever a researcher plants into the
loop."""

import contextlib
import io
import json
import re
import types
from pathlib import Path

import pytest

from tests.support.on_ranks import ROOT, on_ranks
from tests.support.runs import prepare_on_a_rank

LOOP = ROOT / "trainer" / "loop.py"
FLAGS = ["--max_seq_length", "64", "--max_steps", "12", "--learning_rate", "5e-3", "--logging_steps", "1"]
STEP, BACKWARD, UPDATE = (
    "runtime.begin_step(step + 1)",
    "loss_sum.backward()",
    "counts = all_reduce(accumulator.counts, mesh.dp)",
)
SCALED = (BACKWARD, "loss_sum = loss_sum * state.scale")
COUNTS, SCALED_LATE = (
    "state.calls += 1",
    (BACKWARD, "loss_sum = loss_sum * 2.5 if state.calls > 6 else loss_sum"),
)
ZEROS = (
    "for each in state.buckets.parameters.values(): each.grad = None if each.requires_grad else each * 0.0"
)
# What is planted: lines of the loop with what is put before them, and what has to be said of it (a pattern;
# empty where nothing needs to be said). Steps 0, 1 and 4 are traced, and step 6 would be replayed.
CAUSES = {
    "nothing": ([], ""),
    "a number of the state that changes once": (
        [(STEP, "state.scale = 2.5 if step == 6 else 1.5"), SCALED],
        r"step 7.*TrainState.scale was changed: a Python number.* changes \(used at parallel/loss.py:\d+",
    ),
    "a number that changes in every step": (
        [(STEP, "state.scale = 1.0 + 0.3 * step"), SCALED],
        r"traced every time.*TrainState.scale was changed: a Python number.*\(used at parallel/loss.py:\d+",
    ),
    "a learning rate that is a Python number": (
        [
            (STEP, "state.lr = 1e-3 / (step + 1)"),
            (UPDATE, "scalars = torch.cat([(scalars[:2] * 0 + state.lr), scalars[2:]])"),
        ],
        r"traced every time.*TrainState.lr was changed: a Python number.*\(used at trainer/loop.py:\d+",
    ),
    "a variable of the module": (
        [
            (STEP, "globals().update(FACTOR=3.5 if step == 6 else 1.5)"),
            (BACKWARD, "loss_sum = loss_sum * FACTOR"),
        ],
        r"step 7.*planted.FACTOR was changed: a Python number.*\(used at parallel/loss.py:\d+",
    ),
    "a branch": (
        [
            (STEP, "state.clips = step != 6"),
            (BACKWARD, "loss_sum = loss_sum if state.clips else loss_sum.sigmoid()"),
        ],
        r"step 7.*compiles a new graph: aten::sigmoid.*\(trainer/loop.py:\d+\) is new",
    ),
    "a number that the function counts": (
        [(STEP, "state.calls = vars(state).get('calls', 0)"), (BACKWARD, COUNTS), SCALED_LATE],
        r"traced every time.*the function changes TrainState.calls, which a replay would not do",
    ),
    "a random number": (
        [(BACKWARD, "loss_sum = loss_sum * state.random.uniform(1, 2)")],
        r"traced every time.*a Python number.* changes \(used at parallel/loss.py:\d+",
    ),
    "random numbers of the device": (
        [
            (STEP, "torch_xla.manual_seed(7) if step == 0 else None"),
            (
                BACKWARD,
                "loss_sum = loss_sum * (1 + torch.rand(1, device=state.model.stage_index.device)).sum()",
            ),
        ],
        r"traced every time.*a Python number.* changes \(used at",
    ),
    "a tensor that is made anew": (
        [
            (STEP, "state.factor = torch.tensor([1.0 + (step == 6)]).to(runtime.device)"),
            (BACKWARD, "loss_sum = loss_sum * state.factor.sum()"),
        ],
        r"TrainState.factor was changed: a tensor that it uses is another one \(used at trainer/loop.py:\d+",
    ),
    "a parameter that is another one": (
        [(STEP, "swap(state, runtime) if step == 6 else None")],
        r"step 7.*dictionary.weight was changed: a tensor that it uses is another.*\(used at model/norm.py",
    ),
    "a parameter that is frozen": (
        [(STEP, "state.buckets.parameters[FROZEN].requires_grad_(step < 6)"), (BACKWARD, ZEROS)],
        r"step 7.*compiles a new graph",
    ),
    "state that was changed outside": (
        [(STEP, "state.optimizer.exp_avg[0].mul_(0.5) if step == 6 else None")],
        r"step 7.*compiles a new graph: aten::mul.*\(trainer/optimizer.py:\d+\) is new",
    ),
    "state that is restored": (
        [(STEP, "restore(state, runtime) if step == 6 else None")],
        r"step 7.* was changed: a tensor that it uses is another one \(used at trainer/optimizer.py:\d+",
    ),
    "a tensor that shares its data with state": (
        [
            (STEP, "state.shared = vars(state).get('shared') or [state.optimizer.exp_avg[0].detach()]"),
            (BACKWARD, "loss_sum = loss_sum * (1 + state.shared[0].sum())"),
        ],
        r"step 2.*compiles a new graph",
    ),
    "a setting of the model": (
        [(STEP, "state.model.model.norm.eps = 0.25 if step == 6 else 1e-5")],
        r"step 7.*compiles a new graph: a Python number.*\(at model/norm.py:\d+",
    ),
    "a hook": (
        [(STEP, "hook(state) if step == 6 else None")],
        r"step 7.*compiles a new graph: aten::mul.*tests/parallel/test_replay.py|loop.py",
    ),
    "another shape": (
        [
            (BACKWARD, "pass"),
            (
                "report, stop_requests = train_step(",
                "batches = Cropped(batches, step) if step == 6 else batches",
            ),
        ],
        r"step 7.*compiles a new graph: .*s64\[1,32\].*\(trainer/loop.py:\d+",
    ),
    "a value that is read": (
        [(BACKWARD, "loss_sum = loss_sum * (1.0 + (loss_sum.item() > 400))")],
        r"traced every time.*a value is read in it \(trainer/loop.py:\d+\)",
    ),
    "a tensor that is kept": (
        [(BACKWARD, "state.kept = loss_sum.detach() * 2")],
        r"traced every time.*a tensor outlives the call.*aten::mul.*\(trainer/loop.py:\d+\)",
    ),
}
HEAD = """
import random
import torch_xla

def swap(state, runtime):
    norm = state.model.model.norm
    weight = (norm.weight.detach().cpu() * 1.5).to(runtime.device)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)

def restore(state, runtime):
    old = state.optimizer.exp_avg[0]
    state.optimizer.exp_avg[0] = (old.cpu() * 0.5).to(runtime.device)

def hook(state):
    state.model.model.norm.register_forward_hook(lambda module, inputs, output: output * 1.5)

FROZEN = "model.layers.0.self_attn.q_proj.lora_B.weight"

class Cropped:
    def __init__(self, batches, step):
        self.__dict__.update(vars(batches))
        self.batches = batches
    def step(self, step, last):
        for batch in self.batches.step(step, last):
            yield {name: each[..., :32] if each.dim() > 1 else each for name, each in batch.items()}
"""


def planted(cause):
    """The loop with the cause's lines."""
    text = LOOP.read_text().replace("Batch = dict", f"{HEAD}\nBatch = dict", 1)
    text = text.replace(
        STEP, f"state.random = vars(state).get('random') or random.Random(5)\n        {STEP}", 1
    )
    for before, line in CAUSES[cause][0]:
        at = text.index(before)
        indent = " " * (at - text.rindex("\n", 0, at) - 1)
        text = f"{text[:at]}{line}\n{indent}{text[at:]}"
    return text


def runs(runtime, causes, output):
    """{cause: what rank 0 warned of when graphs were replayed}; each cause is trained with and without
    replay."""
    said = {}
    for cause in causes:
        for replay in ("false", "true"):
            loop = types.ModuleType("planted")
            exec(compile(planted(cause), str(LOOP), "exec"), loop.__dict__)
            flags = [*FLAGS, "--replay", replay, "--output_dir", f"{output}/{cause}/{replay}"]
            job = prepare_on_a_rank(runtime, flags)
            runtime.barrier()
            errors = io.StringIO()
            with contextlib.redirect_stderr(errors) if runtime.rank == 0 else contextlib.nullcontext():
                loop.run(runtime, job)
                runtime.barrier()
            said[cause] = re.findall("warning: (.*)", errors.getvalue())
    return said


def losses(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    output = tmp_path_factory.mktemp("replay")
    found, _ = on_ranks(runs, 2, causes=list(CAUSES), output=str(output))
    return found, Path(output)


@pytest.mark.process
@pytest.mark.parametrize("cause", CAUSES)
def test_what_is_replayed_is_what_would_have_been_traced(said, cause):
    found, output = said
    traced, replayed = (losses(output / cause / replay) for replay in ("false", "true"))
    assert len(traced) == 12 and replayed == traced, found[cause]
    expected = CAUSES[cause][1]
    assert any(re.search(expected, each) for each in found[cause]) if expected else not found[cause]
