"""The recompile guard, on the loop itself: causes of new graphs planted into its text, each found and named
with its line."""

import contextlib
import io
import os
import re
import types

import pytest

from parallel.runtime import ProcessRuntime
from tests.support.on_ranks import ROOT, on_ranks, run_program
from tests.support.runs import SHORT, column, prepare_on_a_rank, read, several_runs, start

pytestmark = pytest.mark.process

LOOP = ROOT / "trainer" / "loop.py"
FLAGS = ["--max_seq_length", "64", "--max_steps", "4", "--replay", "false"]
STEP, BATCH, BACKWARD, REDUCTION = (
    "runtime.begin_step(step + 1)",
    "hidden = model.hidden_states(",
    "loss_sum.backward()",
    "counts = all_reduce(accumulator.counts, mesh.dp)",
)
# The line of the loop before which a cause is planted, and the cause. A global AT has the step, which counts
# from 0 (reported steps count from 1), and the learning rate.
CAUSES = {
    "shape": (
        BATCH,
        "batch = "
        "{name: each.cpu()[..., :32].to(each.device) if AT.step == 3 else each "
        "for name, each in batch.items()}",
    ),
    "dtype": (
        BATCH,
        "batch['position_ids'] = "
        "batch['position_ids'].cpu().to([torch.int64, torch.int32][AT.step == 3]).to(batch['labels'].device)",
    ),
    "number": (REDUCTION, "accumulator.counts = torch.pow(accumulator.counts, 1 + AT.rate)"),
    "index": (
        REDUCTION,
        "accumulator.counts = accumulator.counts + 0 * torch.ones(9).to(scalars.device)[AT.step]",
    ),
    "branch": (BACKWARD, "loss_sum = loss_sum.sigmoid() if AT.step == 3 else loss_sum"),
    "kept": (REDUCTION, "AT.kept = accumulator.counts if AT.step == 3 else None"),
    "read": (BACKWARD, "loss_sum.item() if AT.step == 3 else None"),
}


def planted(cause):
    """(the text of the loop with the cause, its line)."""
    before, line = CAUSES[cause]
    # On the line that it follows, so that the numbers of lines stay what they are.
    text = LOOP.read_text().replace("import torch\n", "import torch, threading; AT = threading.local()\n", 1)
    text = text.replace(
        STEP, f"{STEP}; AT.step, AT.rate = step, learning_rate(config, step, job.total_steps)"
    )
    at = text.index(before)
    indent = " " * (at - text.rindex("\n", 0, at) - 1)
    return f"{text[:at]}{line}\n{indent}{text[at:]}", text[:at].count("\n") + 1


def line_of(path, text):
    """`path:number` of the first line of the file that has the text."""
    number, *_ = [
        number for number, line in enumerate((ROOT / path).read_text().splitlines(), 1) if text in line
    ]
    return f"{path}:{number}"


def warnings(runtime, runs, output):
    """What rank 0 said of each run: [its cause, whether lines are recorded in steps that are known too]."""
    said = []
    for cause, always in runs:
        os.environ["XLA_IR_DEBUG"] = str(int(always))
        loop = types.ModuleType("planted")
        exec(compile(planted(cause)[0], str(LOOP), "exec"), loop.__dict__)
        job = prepare_on_a_rank(runtime, [*FLAGS, "--output_dir", f"{output}/{cause}-{always}"])
        runtime.barrier()
        with (
            contextlib.redirect_stderr(io.StringIO())
            if runtime.rank == 0
            else contextlib.nullcontext() as errors
        ):
            loop.run(runtime, job)
            runtime.barrier()
        said.append(errors and re.findall("warning: (.*)", errors.getvalue()))
    return said


def new_graph(step, change):
    return f'step {step}: mark_step("step") compiles a new graph: {change}'


def test_what_changed_is_named_and_its_line(tmp_path):
    """A branch at a step after those for which lines are recorded by default has its line where they always
    are."""
    runs = [(cause, False) for cause in ("number", "index", "branch", "kept", "read")]
    runs += [(cause, True) for cause in ("branch", "shape", "dtype")]
    number, index, [near], [kept], [read], [branch], [shape], [dtype] = on_ranks(
        warnings, 2, runs=runs, output=str(tmp_path)
    )[0]
    lines = {cause: f"trainer/loop.py:{planted(cause)[1]}" for cause in CAUSES}

    rates = ["1.0002", "1.00015", "1.0001", "1.00005"]
    assert number == [
        new_graph(
            step + 1,
            f"a Python number is {rates[step]} where it was {rates[step - 1]} (used at {lines['number']})",
        )
        for step in (1, 2, 3)
    ]
    cut = [
        f"xla::generic_slice f32[1], slice={{[{step}:{step + 1}]}} ({lines['index']})" for step in range(4)
    ]
    assert index == [
        new_graph(step + 1, f"{cut[step]} is new, {cut[step - 1]} is gone") for step in (1, 2, 3)
    ]

    assert branch.startswith(new_graph(4, f"aten::sigmoid f32[] ({lines['branch']}) is new, "))
    assert near.startswith(new_graph(4, "aten::sigmoid f32[] (after trainer/objective.py:"))
    assert "; XLA_IR_DEBUG=1 finds the line) is new, " in near
    made = line_of("trainer/objective.py", "torch.stack([target_tokens")
    assert kept == new_graph(
        4, f"a tensor is alive at its end that was not, aten::stack f32[3], dimensions={{0}} ({made})"
    )
    assert read.startswith(
        'step 4: mark_step("step"): a graph was compiled before it, because a value was read'
    )

    flattened = line_of("model/llama.py", "labels.t().flatten(),")
    change = f"an input is s64[1,32] where it was s64[1,64] (made at {lines['shape']}, used at {flattened})"
    assert shape == new_graph(4, change)
    use = line_of("model/llama.py", "rotary_cos_sin(position_ids.t()")
    assert dtype == new_graph(
        4, f"an input is s32[1,64] where it was s64[1,64] (made at {lines['dtype']}, used at {use})"
    )


def test_a_whole_run_has_no_new_graph(tmp_path):
    """Micro-batches, evaluations, two saves, and the run that goes on: a new graph would be an error."""
    flags = [
        *SHORT,
        "--gradient_accumulation_steps",
        "2",
        "--do_eval",
        "--eval_steps",
        "1",
        "--save_steps",
        "2",
        "--on_recompile",
        "error",
        "--output_dir",
        str(tmp_path),
    ]
    on_ranks(
        several_runs,
        2,
        commands=[[*flags, "--max_steps", "4"], [*flags, "--max_steps", "6", "--resume", "latest"]],
    )
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]


def test_two_hundred_steps_compile_three_graphs(tmp_path):
    """Two of a step with micro-batches and one of evaluations; a save has none. All are there after the first
    step."""
    start(
        *SHORT,
        "--gradient_accumulation_steps",
        2,
        "--do_eval",
        "--eval_steps",
        50,
        "--save_steps",
        100,
        "--max_steps",
        200,
        "--output_dir",
        tmp_path,
    )
    assert column(tmp_path, "compilations") == [3] * 200
    assert [line["step"] for line in read(tmp_path, "eval.jsonl")] == [0, 50, 100, 150, 200]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-100", "checkpoint-200"]


def test_a_new_graph_ends_the_run(tmp_path):
    program = (
        "import sys, trainer.loop as loop, trainer.main as main, tests.parallel.test_guard as test\n"
        "exec(compile(test.planted('number')[0], loop.__file__, 'exec'), loop.__dict__)\n"
        "sys.exit(main.main())"
    )
    flags = [*FLAGS, "--world_size", "2", "--on_recompile", "error", "--output_dir", tmp_path]
    done = run_program(["-c", program, *flags])
    assert done.returncode == 1, done.stderr
    [said] = re.findall(r"error: (.*)", done.stderr)
    assert said.startswith(new_graph(2, "a Python number is 1.00015 where it was 1.0002 ("))
    assert not re.search("Traceback|warning: step", done.stderr)


def grown(runtime):
    """A mark_step of a process (as on Neuron) whose tensor grows; what rank 0 prints under warn, and under
    ignore."""
    import torch

    said = []
    for action in ("warn", "ignore"):
        process = ProcessRuntime(0, 1, runtime.device)
        process.watch_graphs(action)
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            for length in (3, 3, 5, 3):
                x = torch.ones(length).to(runtime.device) * 2
                process.mark_step("micro_batch")
                del x
        said.append(errors.getvalue())
    return said


def test_a_process_says_it_once_or_not():
    at = line_of("tests/parallel/test_guard.py", "x = torch.ones(length)" + ".to")
    change = f"an input is f32[5] where it was f32[3] (made at {at}, used at {at})"
    assert on_ranks(grown, 1) == [
        [f'warning: before step 1: mark_step("micro_batch") compiles a new graph: {change}\n', ""]
    ]
