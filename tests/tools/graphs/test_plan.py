"""tools/plan: the formula by hand, extrapolated traces compared with whole ones, and AWS's published rows."""

import json
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.support.on_ranks import run_program
from tools.graphs.memory import state_of
from tools.graphs.models import rank_model, read_model
from tools.graphs.report import rank_0_mesh
from tools.plan import extrapolate, sweep
from tools.plan.__main__ import main
from tools.plan.instances import FAST, INSTANCES, SLOW, Instance
from tools.plan.output import describe
from tools.plan.roofline import estimate
from tools.plan.step_report import estimate_step
from trainer.config import Config
from trainer.reporting.flops import micro_batch_flops

ROUND = Instance(
    cores=4,
    bf16_flops=1e12,
    fp32_flops=1e11,
    memory_bytes=10**9,
    memory_bandwidth=1e9,
    link_bandwidth=1e9,
    network_bandwidth=1e9,
    price=36.0,
)
# TP2 x DP4 on two nodes of four cores: two groups over dp have two ranks each on a node.
REPORT = {
    "tensor_parallel_size": 2,
    "data_parallel_size": 4,
    "pipeline_parallel_size": 1,
    "ticks": 1,
    "state_bytes": {"parameters": 10**8, "gradients": 10**8, "master_weights": 10**8, "moments": 10**8},
    "graphs": {
        "micro_batch": {
            "runs_per_step": 3,
            "instructions": 10**5,
            "inputs": 300,
            "outputs": 100,
            "dot_flops": 10**12,
            "input_bytes": 2 * 10**8,
            "output_bytes": 10**8,
            "overwritten_bytes": 0,
            "peak_bytes": 2 * 10**8,
            "collectives": {"all-gather over tp": {"count": 10, "bytes": 10**8}},
        },
        "update": {
            "runs_per_step": 1,
            "instructions": 10**4,
            "inputs": 500,
            "outputs": 300,
            "dot_flops": 0,
            "input_bytes": 3 * 10**8,
            "output_bytes": 3 * 10**8,
            "overwritten_bytes": 10**8,  # not in the peak
            "peak_bytes": 3 * 10**8,
            "collectives": {"all-reduce over dp": {"count": 1, "bytes": 10**8}},
        },
    },
}


def test_a_step_by_hand():
    each = estimate(REPORT, ROUND, rows=24, length=100, bf16=True, replays=True)
    for end, assumed in enumerate((FAST, SLOW)):
        inside = 3 * (0.05 / assumed.link + 10 * assumed.link_latency)  # half of 0.1 GB at 1 GB/s
        # 2 x 3/4 of 0.1 GB; on a node the ranks of two groups share its network.
        outside = max(0.15 / assumed.link, 2 * 0.15 / assumed.network) + assumed.network_latency
        assert each.parts["compute"][end] == pytest.approx(3 / assumed.products)
        assert each.parts["memory"][end] == pytest.approx(
            0.8 / assumed.memory
        )  # the update's; a micro-batch's hides
        assert each.parts["network"][end] == pytest.approx(inside + outside)
    fast, slow = each.seconds
    assert fast == pytest.approx(sum(pair[0] for pair in each.parts.values())) and fast < slow
    # A micro-batch's products take 1 s where its memory takes 0.5 and its messages 0.05; the update is bound
    # by memory.
    assert each.roofline_seconds == pytest.approx(3 + 0.8) and each.binds == "compute"
    assert each.tokens_per_second_per_node == (2400 / 2 / fast, 2400 / 2 / slow)
    assert each.cost(36.0)[0] == pytest.approx(1e6 * 36 / 3600 / (1200 / fast))
    assert each.peak_share[0] == pytest.approx(3 / fast)
    assert estimate(REPORT, ROUND, 24, 100, bf16=False, replays=True).parts["compute"][1] == pytest.approx(
        30 / SLOW.products
    )
    # Gradients are held between the graphs of a step.
    assert (each.held_bytes, each.most_bytes, each.fits) == (4 * 10**8, 7 * 10**8, "yes")


def test_stages_by_hand():
    """TP2 x PP2 x DP2 on two nodes of four cores, a stage on each: messages between them use the network."""
    tick = {
        "runs_per_step": 4,
        "instructions": 10**3,
        "inputs": 10,
        "outputs": 10,
        "dot_flops": 10**12,
        "input_bytes": 10**8,
        "output_bytes": 10**7,
        "overwritten_bytes": 0,
        "peak_bytes": 10**8,
        "collectives": {"collective-permute over pp": {"count": 1, "bytes": 10**8}},
    }
    sums = {
        "all-reduce over tp x pp": {"count": 2, "bytes": 10**8},
        "all-reduce over dp": {"count": 1, "bytes": 10**8},
    }
    graphs = {"forward": tick, "backward": tick, "update": REPORT["graphs"]["update"] | {"collectives": sums}}
    report = REPORT | {"data_parallel_size": 2, "pipeline_parallel_size": 2, "ticks": 4, "graphs": graphs}
    each = estimate(report, ROUND, 12, 100, True, False)
    for end, assumed in enumerate((FAST, SLOW)):
        sent = 4 * 0.1 / assumed.network + assumed.network_latency  # by all four ranks of a node
        among = max(0.15 / assumed.link, 2 * 0.15 / assumed.network) + 2 * assumed.network_latency
        inside = 0.1 / assumed.link + assumed.link_latency
        assert each.parts["network"][end] == pytest.approx(8 * sent + among + inside)
        assert each.parts["compute"][end] == pytest.approx(8 / assumed.products)
    assert each.bubble == 1 / 4 and each.flops == 3 / 4 * 8e12
    # Four ticks keep 10 MB each.
    assert each.most_bytes == max(4 * 10**8 + 4 * 10**7 + 10**8, 7 * 10**8)


def test_the_host_by_hand():
    """Three micro-batches of 100,000 operations and 400 tensors, and an update of 10,000 and 800."""
    traced, replayed = (estimate(REPORT, ROUND, 24, 100, True, replays) for replays in (False, True))
    assert traced.operations == 310_000
    for end, assumed in enumerate((FAST, SLOW)):
        host = 310_000 * assumed.trace_operation
        assert traced.host_trace_seconds[end] == replayed.host_trace_seconds[end] == pytest.approx(host)
        host = 4 * assumed.replay_graph + 2000 * assumed.replay_tensor
        assert traced.host_replay_seconds[end] == replayed.host_replay_seconds[end] == pytest.approx(host)
    assert FAST.trace_operation < SLOW.trace_operation and FAST.replay_tensor < SLOW.replay_tensor
    assert (
        (traced.seconds, traced.binds) == (traced.device_seconds, "compute") == (replayed.seconds, "compute")
    )


# The device needs about 7 to 10 s, 8 million operations 80 to 144.
@pytest.mark.parametrize(
    "operations, binds, words", [(10**4, "compute", "does not wait"), (2 * 10**6, "host", "waits")]
)
def test_a_step_that_waits_for_its_host(operations, binds, words):
    graphs = {name: graph | {"instructions": operations} for name, graph in REPORT["graphs"].items()}
    report = REPORT | {"graphs": graphs}
    traced, replayed = (estimate(report, ROUND, 24, 100, True, replays) for replays in (False, True))
    assert traced.device_seconds == replayed.device_seconds == replayed.seconds
    assert traced.seconds == tuple(map(max, traced.device_seconds, traced.host_trace_seconds))
    assert (traced.binds, replayed.binds) == (binds, "compute")
    lines = [line for line in describe(traced, None).splitlines() if line.startswith("host, ")]
    assert f"the step {words} for its host" in lines[0]
    assert "does not wait for its host; --replay false traces every step" in lines[1]
    assert f"({4 * operations:,} operations of 10 to " in lines[0]
    assert "; so it is run" in describe(replayed, None)


@pytest.fixture
def forked_traces(monkeypatch):
    """Traces run in forked processes, which start at once."""

    def run(command, input, stderr, **_):
        program = f"import io, sys; sys.stdin = io.StringIO(sys.argv.pop())\n{command[2]}"
        done = run_program(["-c", program, input])
        stderr.write(done.stderr)
        return done

    monkeypatch.setattr(extrapolate, "subprocess", SimpleNamespace(run=run, PIPE=subprocess.PIPE))


@pytest.mark.process
def test_traces_of_stages_are_extrapolated(monkeypatch, forked_traces):
    """From 2 and 4 layers a stage and three micro-batches; compared with a trace of all 6 and five."""
    model = replace(read_model("tiny"), num_hidden_layers=11)
    config = Config(
        lora_r=0,
        tensor_parallel_size=2,
        pipeline_parallel_size=2,
        max_seq_length=128,
        world_size=4,
        per_device_train_batch_size=5,
        gradient_accumulation_steps=2,
    )
    (extrapolated,) = extrapolate.reports([config], model)
    monkeypatch.setattr(extrapolate, "DEPTHS", (6,))
    monkeypatch.setattr(extrapolate, "TRACED_TICKS", 5)
    (whole,) = extrapolate.reports([config], model)
    assert [graph["runs_per_step"] for graph in extrapolated["graphs"].values()] == [12, 12, 1]
    for name, graph in whole["graphs"].items():
        other = extrapolated["graphs"][name]
        for key in ("runs_per_step", "dot_flops", "outputs", "output_bytes", "collectives"):
            assert other[key] == graph[key], (name, key)
        # the batch; and x passes by the padding layer
        for key in ("instructions", "inputs", "input_bytes", "peak_bytes"):
            assert other[key] == pytest.approx(graph[key], rel=0.05), (name, key)


@pytest.mark.parametrize("memory, fits", [(87 * 10**7, "yes"), (86 * 10**7, "perhaps"), (4 * 10**8, "no")])
def test_fits(memory, fits):
    """At most 700 MB live, and a margin of 23 % is asked for."""
    assert estimate(REPORT, replace(ROUND, memory_bytes=memory), 1, 1, True, False).fits == fits


@pytest.mark.process
def test_traces_are_extrapolated(monkeypatch, forked_traces):
    """From 2 and 4 layers at DP2 with two micro-batches; compared with a trace of all 6 at DP4 with three."""
    model = replace(read_model("tiny"), num_hidden_layers=6)
    config = Config(
        lora_r=0,
        zero_1=True,
        tensor_parallel_size=2,
        max_seq_length=128,
        gradient_accumulation_steps=3,
        world_size=8,
    )
    monkeypatch.setattr(extrapolate, "TRACED_RANKS", 1)
    (extrapolated,) = extrapolate.reports([config], model)
    monkeypatch.setattr(extrapolate, "TRACED_RANKS", 8)
    monkeypatch.setattr(extrapolate, "DEPTHS", (6,))
    (whole,) = extrapolate.reports([config], model)
    assert extrapolated["state_bytes"] == whole["state_bytes"]
    for name, graph in whole["graphs"].items():
        other = extrapolated["graphs"][name]
        # Partial gradients are reduced over tp in this rank's part, which was larger.
        ours, theirs = (each["collectives"].pop("all-reduce over tp") for each in (other, graph))
        assert theirs["count"] == ours["count"] and theirs["bytes"] <= ours["bytes"] <= 2 * theirs["bytes"]
        assert other["instructions"] == pytest.approx(graph["instructions"], rel=0.01)
        for key in (
            "runs_per_step",
            "inputs",
            "outputs",
            "dot_flops",
            "input_bytes",
            "output_bytes",
            "collectives",
        ):
            assert other[key] == graph[key], (name, key)
        assert (
            graph["peak_bytes"] <= other["peak_bytes"] <= 1.5 * graph["peak_bytes"]
        )  # at DP2, more of the state
    assert extrapolated["graphs"]["micro_batch"]["peak_bytes"] == whole["graphs"]["micro_batch"]["peak_bytes"]


# Rows a second in AWS's tables (training_data_decoder.csv), SDK 2.16 to 2.24, global batch 1024, micro-batch
# 1, ZeRO-1; the tutorial of neuronx-distributed that they name has sequence parallelism and selective
# checkpointing.
PUBLISHED = {
    "llama2-7b": (
        dict(tensor_parallel_size=8, max_seq_length=4096, gradient_accumulation_steps=16, world_size=512),
        (93.3, 94.7, 92.93, 101.3, 95.14),
    ),
    "llama3.1-8b": (
        dict(tensor_parallel_size=32, max_seq_length=8192, gradient_accumulation_steps=32, world_size=1024),
        (49.47, 53.51, 41.99, 47.95),
    ),
}


@pytest.mark.process
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rows_are_in_the_range(name):
    flags, published = PUBLISHED[name]
    config, model = (
        Config(bf16=True, lora_r=0, zero_1=True, gradient_checkpointing="selective", **flags),
        read_model(name),
    )
    (report,) = extrapolate.reports([config], model)
    slow, fast = sorted(estimate_step(report, config, model, INSTANCES["trn1.32xlarge"]).rows_per_second)
    assert slow <= min(published) and max(published) <= fast
    assert fast / slow < 1.6  # a range that says something
    # By hand: two messages of [tokens, hidden] each way and layer, and two for embedding and logits.
    tokens = config.max_seq_length * 4096 * 2
    assert report["graphs"]["micro_batch"]["collectives"]["all-gather over tp"] == {
        "count": 130,
        "bytes": 130 * tokens,
    }


def counted(configs, model):
    """Reports without a trace, whose peaks grow with the micro-batch."""
    for config in configs:
        mesh = rank_0_mesh(config)
        rank = rank_model(config, model, mesh)
        graph = {
            "instructions": 1000,
            "inputs": 10,
            "outputs": 10,
            "dot_flops": micro_batch_flops(rank, config),
            "input_bytes": 10**9,
            "output_bytes": 10**9,
            "overwritten_bytes": 10**9,
            "collectives": {},
            "peak_bytes": config.per_device_train_batch_size // config.pipeline_microbatches * 9 * 10**9,
            "runs_per_step": config.gradient_accumulation_steps,
        }
        yield {
            "tensor_parallel_size": mesh.tp.size(),
            "data_parallel_size": mesh.dp.size(),
            "ticks": config.ticks,
            "pipeline_parallel_size": mesh.pp.size(),
            "graphs": {"micro_batch": graph},
            "state_bytes": vars(state_of(rank, config, mesh)),
        }


def test_sweep(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sweep, "reports", counted)
    assert (
        main(
            [
                "--model",
                "tiny",
                "--tensor_parallel_size",
                "8",
                "--gradient_accumulation_steps",
                "16",
                "--sweep",
                "--bf16",
                "--picture",
                str(tmp_path / "plan.png"),
                "--json",
                str(tmp_path / "plan.json"),
            ]
        )
        == 0
    )
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "plan.json").read_text())["estimates"]
    rows = [
        each["world_size"]
        // each["tensor_parallel_size"]
        // each["pipeline_parallel_size"]
        * each["per_device_train_batch_size"]
        * each["gradient_accumulation_steps"]
        for each in found
    ]
    assert set(rows) == {64}
    # 8 heads, two layers, 2 to 16 rows for each data parallel rank, and at most 8 pipeline micro-batches.
    assert {
        (each["tensor_parallel_size"], each["pipeline_parallel_size"], each["num_microbatches"])
        for each in found
    } == {(1, 1, 1), (2, 1, 1), (4, 1, 1), (8, 1, 1), (1, 2, 4), (2, 2, 8), (4, 2, 8), (8, 2, 8)}
    assert {each["bubble"] for each in found} == {0, 1 / 5, 1 / 9}
    # 18 GB more than what is held are not sure to fit, so no micro-batch of 4 was tried.
    assert {
        (each["per_device_train_batch_size"] // each["num_microbatches"], each["fits"]) for each in found
    } == {(1, "yes"), (2, "perhaps")}
    assert [each["fits"] for each in found] == sorted((each["fits"] for each in found), reverse=True)
    times = [sum(each["seconds"]) for each in found if each["fits"] == "yes"]
    assert times == sorted(times)
    assert "This is a model" in capsys.readouterr().out


def test_a_report_of_other_flags_is_refused(monkeypatch, tmp_path, capsys):
    flags = ["--model", "tiny", "--tensor_parallel_size", "8", "--report", str(tmp_path / "report.json")]
    config = Config(tensor_parallel_size=8, world_size=32)
    (report,) = counted([config], read_model("tiny"))
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert main([*flags, "--price", "10"]) == 0
    assert "at 10.00 USD an hour and node" in capsys.readouterr().out
    assert main([*flags, "--max_seq_length", "2048"]) == 1
    assert capsys.readouterr().err.startswith("error: the report is of another step: FLOPs ")
    del report["graphs"]["micro_batch"]["outputs"]
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert main(flags) == 1
    assert "the report is an old one, without inputs, instructions, outputs" in capsys.readouterr().err
    (tmp_path / "report.json").write_text("[]")
    assert main(flags) == 1
    assert capsys.readouterr().err == "error: the report is none of tools.bench_compile\n"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--nodes 0", "--nodes 0: at least 1 was expected"),
        ("--price -1", "--price -1.0: USD an hour and node"),
        ("--world_size 16", "--world_size 16: 1 x trn1.32xlarge have 32 cores"),
        ("--tensor_parallel_size 3", "the world size 32 is not divisible by --tensor_parallel_size 3"),
        ("--tensor_parallel_size 16", "the model's num_attention_heads 8 is not divisible by"),
        ("--sweep --report x.json", "--report is of one topology"),
        ("--report nowhere.json", "--report nowhere.json: the --json of tools.bench_compile was expected"),
        ("--picture nowhere/plan.png", "--picture nowhere/plan.png cannot be written"),
        ("--json nowhere/plan.json", "--json nowhere/plan.json cannot be written"),
        ("--resume latest", "--resume is not taken here"),
    ],
)
def test_bad_input_is_one_line(flags, message, capsys):
    assert main(["--model", "tiny", *flags.split()]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}") and said.count("\n") == 1
