"""bench_step: the figures of a real run agree with each other and with those of the run's own metrics."""

import gzip
import json
from collections import Counter

import pytest

from tests.support.runs import start
from tools.bench_step.__main__ import main
from tools.bench_step.measure import Parts

FLAGS = [
    "--world_size",
    2,
    "--tensor_parallel_size",
    2,
    "--max_seq_length",
    128,
    "--per_device_train_batch_size",
    2,
    "--gradient_accumulation_steps",
    2,
    "--steps",
    4,
]


@pytest.mark.process
def test_figures_of_a_run(tmp_path):
    start(
        *FLAGS,
        "--replay",
        "false",
        "--json",
        tmp_path / "old.json",
        program=("-m", "tools.bench_step"),
        forked=False,
    )
    said = start(
        *FLAGS,
        "--gradient_checkpointing",
        "--json",
        tmp_path / "new.json",
        "--compare",
        tmp_path / "old.json",
        "--profile",
        tmp_path / "trace",
        program=("-m", "tools.bench_step"),
    ).stdout
    old, new = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("old", "new"))
    for found in (old, new):
        assert found["compilations"] == 2 and found["padded_tokens_per_second"] > found["tokens_per_second"]
        assert found["tokens_per_second"] > found["target_tokens_per_second"] > 0
        # 2 micro-batches of 2 rows, on 2 ranks that share each row
        assert abs(found["padded_tokens_per_second"] * found["step_seconds"] - 2 * 2 * 128) < 1e-6
        assert found["step_seconds_least"] <= found["step_seconds"] <= found["step_seconds_most"]
        assert abs(found["hfu"] * found["gemm_flops_per_second"] / found["flops_per_second"] - 1) < 1e-9
        assert found["host_trace_seconds"] > 0 and found["device_seconds"] > 0
        assert found["first_step_seconds"] > found["step_trace_seconds"] > 0
        assert "peak_device_memory_bytes" not in found  # a CPU does not tell
    replayed = {"host_replay_seconds", "python_replay_seconds", "step_replay_seconds"}
    assert set(new) - set(old) == replayed and set(old) <= set(new)
    for how in ("trace", "replay"):
        assert 0 < new[f"python_{how}_seconds"] < new[f"host_{how}_seconds"]
    assert 0 < new["host_replay_seconds"] < new["host_trace_seconds"] / 2
    assert new["step_seconds_least"] <= new["step_replay_seconds"] <= new["step_seconds_most"]
    assert 1 < old["hfu"] / old["mfu"] < 1.1  # attention's scores are computed twice
    assert 1.2 < new["hfu"] / new["mfu"] < 1.6  # and the layers' forward
    flops = [found["mfu"] * found["gemm_flops_per_second"] * found["step_seconds"] for found in (old, new)]
    assert abs(flops[0] / flops[1] - 1) < 1e-9
    ratio = new["step_seconds"] / old["step_seconds"]
    assert f"{ratio:6.3f} of the old" in next(
        line for line in said.splitlines() if line.startswith("step_seconds ")
    )
    assert str(tmp_path / "trace" / "step.trace.json.gz") in said
    check_trace(tmp_path / "trace" / "step.trace.json.gz")


def check_trace(file):
    """Two steps of 2 micro-batches and an update, on 2 ranks."""
    with gzip.open(file) as opened:
        events = [each for each in json.load(opened)["traceEvents"] if each.get("ph") == "X"]
    count = Counter(each["name"].split(".")[0] for each in events)
    assert count["mark_step"] == count["host tracing"] == 2 * 3
    assert count["PjRtCpuExecutable::ExecuteHelper"] == 2 * 2 * 3
    # of 2 layers: 7 products with a weight and twice 7 with factors, and 2 of attention
    assert count["dot"] >= 2 * 2 * 2 * 2 * (3 * 7 + 2)
    phases = sorted(
        (each["ts"], each["name"]) for each in events if each["name"] in ("mark_step", "host tracing")
    )
    assert [name for _, name in phases] == ["host tracing", "mark_step"] * 6


def test_bad_input_is_refused(tmp_path, capsys):
    for flags, problem in [
        (["--steps", "0"], "at least 1 was expected"),
        (["--compare", str(tmp_path / "none")], "is damaged"),
        (["--profile", "/proc/none"], "--profile /proc/none cannot be written"),
    ]:
        assert main(flags) == 1
        assert problem in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--no_such_flag"])


def test_the_steps_of_a_run():
    parts = Parts.create(warmup=3, steps=4, recorded=2, replays=True)
    assert parts == Parts(range(3, 7), range(7, 11), range(11, 13), range(14, 18), range(18, 22))
    assert parts.total == 22
    parts = Parts.create(warmup=3, steps=4, recorded=2, replays=False)
    assert parts.traced == parts.waited and parts.traced_free == parts.free and parts.total == 13
