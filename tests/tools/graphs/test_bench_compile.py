"""tools/bench_compile and its reading of graphs, compared with counts by hand and with a real run."""

import json
import os
import re
from math import prod

import pytest

from parallel.graph.hlo import BYTES, Graph
from tests.support.on_ranks import run_program
from tools.graphs.memory import MARGIN
from tools.graphs.models import PRESETS
from tools.graphs.peak import find_peak
from trainer.config_derived import SAMPLE

TOKENS = 128
SPMD = "--tensor_parallel_size 2 --gradient_accumulation_steps 2"  # the flags of the real run
STAGES = "--pipeline_parallel_size 2 --per_device_train_batch_size"
CASES = {
    **{f"lora tp{tp}": f"--tensor_parallel_size {tp}" for tp in (1, 2, 4)},
    **{f"full tp{tp}": f"--tensor_parallel_size {tp} --lora_r 0" for tp in (1, 2, 4)},
    "lora whole sequences": "--tensor_parallel_size 2 --sequence_parallel false",
    "lora some": "--tensor_parallel_size 2 --lora_target_modules gate_proj,k_proj",
    "lora o_proj": "--lora_target_modules o_proj",
    "lora recomputed": "--tensor_parallel_size 4 --gradient_checkpointing full",
    "lora recomputed alone": "--gradient_checkpointing full",
    "full recomputed": "--tensor_parallel_size 2 --lora_r 0 --gradient_checkpointing full",
    "two blocks of queries": "--tensor_parallel_size 2 --max_seq_length 512",
    "divided optimizer": "--tensor_parallel_size 2 --lora_r 0 --zero_1",
    "three layers": "--tensor_parallel_size 2",
    "stages": f"--tensor_parallel_size 2 {STAGES} 4 --num_microbatches 2",
    "more ticks": f"--tensor_parallel_size 2 {STAGES} 8 --num_microbatches 4",
    "stages in one graph": f"{STAGES} 3 --mark_step step",
    "full stages recomputed": f"{STAGES} 3 --lora_r 0 --gradient_checkpointing",
    "accumulation in one graph": SPMD + " --mark_step step",
    "accumulation": SPMD + " --compile",
    "memory lora": "--tensor_parallel_size 2 --max_seq_length 1024 --compile",
    "memory full": "--tensor_parallel_size 2 --max_seq_length 512 --lora_r 0 --compile",
    "memory recomputed": (
        "--tensor_parallel_size 2 --max_seq_length 1024 --gradient_checkpointing full --compile"
    ),
}
# Traces all cases in one process, and reads back what --save_hlo wrote. Arguments: the cases' command lines,
# and a directory.
PROGRAM = """
import json, sys
from pathlib import Path
from tools.bench_compile import main
for arguments in json.loads(sys.argv[1]):
    assert main(arguments) == 0
import torch_xla
for path in Path(sys.argv[2]).glob("*.hlo.pb"):
    computation = torch_xla._XLAC._xla_op_computation_from_module_proto(path.name, path.read_bytes())
    path.with_suffix(".txt").write_text(torch_xla._XLAC._xla_computation_text(computation))
"""


def run(command, dump=None):
    """The finished process; with `dump`, XLA writes into that directory what it compiles."""
    flags = os.environ["XLA_FLAGS"] + (f" --xla_dump_to={dump} --xla_dump_hlo_as_text" if dump else "")
    return run_program(command, environment=os.environ | {"XLA_FLAGS": flags})


def compiled(dump, ending="before_optimizations.txt"):
    """What XLA wrote of each module, in the order in which it compiled them."""
    return [path.read_text() for path in sorted(dump.glob(f"*{ending}"))]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """{case: its report}; `directory` has the dump of what --compile compiled and what --save_hlo wrote."""
    directory = tmp_path_factory.mktemp("bench_compile")
    deeper = json.loads((SAMPLE / "tiny" / "config.json").read_text()) | {"num_hidden_layers": 3}
    (directory / "config.json").write_text(json.dumps(deeper))
    lines = []
    for case, flags in CASES.items():
        model = directory / "config.json" if case == "three layers" else "tiny"
        lines.append(
            [
                "--model",
                str(model),
                "--world_size",
                "4",
                "--json",
                str(directory / f"{case}.json"),
                *([] if "--max_seq_length" in flags else ["--max_seq_length", str(TOKENS)]),
                *flags.split(),
                *(["--save_hlo", str(directory)] if case == "accumulation" else []),
            ]
        )
    done = run(["-c", PROGRAM, json.dumps(lines), str(directory)], directory / "dump")
    assert done.returncode == 0, done.stderr[-3000:]
    return {case: json.loads((directory / f"{case}.json").read_text()) for case in CASES} | {
        "directory": directory
    }


@pytest.mark.process
def test_products_are_those_of_the_formula(reports):
    """The same to the last FLOP, where 2 % would do."""
    assert {case: reports[case]["step_flops"] for case in CASES} == {
        case: reports[case]["formula_flops"] for case in CASES
    }


@pytest.mark.process
def test_ticks_share_graphs(reports):
    """The graphs of ticks do not grow with the number of ticks; and the bytes that they keep, by hand."""
    few, more = (reports[case] for case in ("stages", "more ticks"))
    assert [graph["runs_per_step"] for each in (few, more) for graph in each["graphs"].values()] == [
        3,
        3,
        1,
        5,
        5,
        1,
    ]
    for name in ("forward", "backward"):
        one, other = (each["graphs"][name] for each in (few, more))
        for what in ("dot_flops", "collectives", "output_bytes", "peak_bytes"):
            assert one[what] == other[what], (name, what)
        changed = {
            kind for kind, count in one["operations"].items() if other["operations"].get(kind) != count
        }
        assert changed <= {
            "constant",
            "parameter",
        }  # 1, the number of the last of two micro-batches, is a constant
    assert more["kept_bytes"] / 5 == few["kept_bytes"] / 3 == few["graphs"]["forward"]["output_bytes"]
    # Kept are the input of a stage's only layer and its output, and for the embedding ids and a mask.
    assert reports["full stages recomputed"]["kept_bytes"] == 4 * TOKENS * (2 * 64 * 4 + 8 + 4)
    state = sum(few["state_bytes"].values())
    assert few["most_bytes"] == state + few["kept_bytes"] + few["graphs"]["backward"]["peak_bytes"]
    assert set(reports["stages in one graph"]["graphs"]) == {"step"}


@pytest.mark.process
def test_products_of_a_full_training_by_hand(reports):
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 192) + 512 * 64  # two layers and the head
    scores = 2 * 8 * TOKENS * TOKENS * 8
    assert reports["full tp1"]["step_flops"] == 6 * TOKENS * weights + 2 * 7 * scores


@pytest.mark.process
def test_collectives_of_a_layer_by_hand(reports):
    two, three = (reports[case]["graphs"]["step"]["collectives"] for case in ("lora tp2", "three layers"))
    layer = {
        what: (three[what]["count"] - two[what]["count"], three[what]["bytes"] - two[what]["bytes"])
        for what in three
    }
    # Four messages in the forward, whose duals the backward sends: hidden states, and r more features for
    # each LoRA layer.
    rows = 4 * TOKENS * ((64 + 3 * 16) + (64 + 16) + (64 + 2 * 16) + (64 + 16))
    # A is replicated in q, k, v, gate and up, and B in o and down: their gradients are parts of a sum.
    replicated = 5 * 16 * 64 + 2 * 64 * 16
    divided = 3 * 32 * 16 + 2 * 96 * 16 + 16 * 32 + 16 * 96
    assert layer == {
        "all-gather over tp": (4, rows),
        "reduce-scatter over tp": (4, rows),
        "all-reduce over tp": (0, 4 * replicated),
        "all-reduce over dp": (0, 4 * (replicated + divided)),
        "all-reduce over world": (0, 0),
    }


@pytest.mark.process
def test_inputs_and_outputs_of_a_layer_by_hand(reports):
    """Two norms, seven weights and fourteen LoRA factors, which alone are updated."""
    two, three = (reports[case]["graphs"]["step"] for case in ("lora tp2", "three layers"))
    assert (three["inputs"] - two["inputs"], three["outputs"] - two["outputs"]) == (2 + 7 + 14, 14)


@pytest.mark.process
@pytest.mark.parametrize("case", ["lora tp2", "full tp4", "divided optimizer"])
def test_what_a_core_holds_is_input_of_the_graph(reports, case):
    held = reports[case]["state_bytes"]
    batch = 5 * 1024  # four rows of integers, frequencies, ranks and scalars
    other_inputs = (
        reports[case]["graphs"]["step"]["input_bytes"]
        - held["parameters"]
        - held["master_weights"]
        - held["moments"]
    )
    assert 4 * 1024 <= other_inputs < batch


@pytest.mark.process
def test_a_real_run_compiles_the_same_graphs(reports, tmp_path):
    done = run(
        [
            "trainer/main.py",
            "--world_size",
            "4",
            "--max_seq_length",
            str(TOKENS),
            "--max_steps",
            "2",
            "--output_dir",
            str(tmp_path / "out"),
            *SPMD.split(),
        ],
        tmp_path / "dump",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ours, real = compiled(reports["directory"] / "dump"), compiled(tmp_path / "dump")
    assert len(real) == 2 and ours[:2] == real
    # The report describes these graphs, and --save_hlo wrote them.
    for text, (name, graph) in zip(real, reports["accumulation"]["graphs"].items(), strict=True):
        saved = Graph((reports["directory"] / f"{name}.hlo.txt").read_text())
        assert Graph(text).operations == saved.operations == graph["operations"]
        assert find_peak(Graph(text)).bytes == find_peak(saved).bytes >= graph["peak_bytes"]


@pytest.mark.process
@pytest.mark.parametrize("number", [0, 2, 3, 4], ids=["micro-batch", "lora", "full", "recomputed"])
def test_peak_is_near_what_xla_allocates(reports, number):
    """In fp32: XLA:CPU widens bf16. It takes barriers away, and no result overwrites an input here."""
    dump = reports["directory"] / "dump"
    allocated = int(
        re.search(r"Total bytes used: (\d+)", compiled(dump, "memory-usage-report.txt")[number])[1]
    )
    graph = Graph(compiled(dump)[number])
    said = graph.input_bytes + find_peak(graph, keeps_barriers=False).bytes
    assert allocated / MARGIN <= said <= 1.05 * allocated


@pytest.mark.process
@pytest.mark.parametrize("case", ["lora tp2", "full tp4", "accumulation", "stages", "memory recomputed"])
def test_what_lives_at_the_peak(reports, case):
    """The kinds add up to all that lives, and the largest tensors are named."""
    report = reports[case]
    for name, graph in report["graphs"].items():
        sizes, state = graph["at_peak"]["bytes"], report["state_bytes"]
        assert sizes["weights"] == state["parameters"]
        assert sizes["optimizer"] == state["master_weights"] + state["moments"]
        largest = graph["at_peak"]["largest"]
        assert [each["bytes"] for each in largest] == sorted(
            (each["bytes"] for each in largest), reverse=True
        )
        for each in largest[:3]:
            assert each["bytes"] == each["count"] * prod(each["shape"]) * BYTES[each["dtype"]]
            assert each["module"] or each["line"] or each["kind"] == "work", (name, each)
    most = max(sum(graph["at_peak"]["bytes"].values()) for graph in report["graphs"].values())
    assert report["most_bytes"] <= most < report["most_bytes"] + 50_000  # the batch, what the next stage sent


@pytest.mark.process
def test_the_layers_activations_are_named(reports):
    """Both layers keep the MLP's products, [tokens, 192 / 2]; recomputed, neither does."""

    def kept(case):
        return [
            each
            for each in reports[case]["graphs"]["step"]["at_peak"]["largest"]
            if each["kind"] == "kept activations" and each["module"].startswith("model.layers.*.mlp")
        ]

    products = [each for each in kept("lora tp2") if each["shape"] == [TOKENS, 96]]
    assert products and all(each["count"] % 2 == 0 for each in products)
    assert all(each["line"].startswith(("model/", "parallel/")) for each in products)
    assert not kept("memory recomputed")


@pytest.mark.process
def test_recomputation_is_seen_to_save_memory(reports):
    """In what layers keep: most of the peak are the scores of one layer, which live either way."""
    one, other = (reports[f"memory {case}"]["graphs"]["step"] for case in ("lora", "recomputed"))
    kept, recomputed = (each["at_peak"]["bytes"]["kept activations"] for each in (one, other))
    assert recomputed < 0.5 * kept, (kept, recomputed)
    assert other["peak_bytes"] < one["peak_bytes"]


BY_HAND = """HloModule m
%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(f32[] %x, f32[] %y)
}

ENTRY %main (p0: f32[8,4], p1: bf16[4]) -> (f32[2,8,8], f32[16]) {
  %p0 = f32[8,4]{1,0} parameter(0)
  %zero = f32[] constant(0)
  %wide = f32[2,8,4]{2,1,0} broadcast(f32[8,4]{1,0} %p0), dimensions={1,2}
  %left = f32[2,8,4]{2,1,0} negate(f32[2,8,4]{2,1,0} %wide)
  %flat = f32[64]{0} reshape(f32[2,8,4]{2,1,0} %left)
  %dot = f32[2,8,8]{2,1,0} dot(f32[2,8,4]{2,1,0} %left, f32[2,8,4]{2,1,0} %wide), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={2}
  %sums = (f32[64]{0}, f32[]) all-reduce(f32[64]{0} %flat, f32[] %zero), replica_groups={{0,1},{2,3}}, to_apply=%add
  %first = f32[64]{0} get-tuple-element((f32[64]{0}, f32[]) %sums), index=0
  %part = f32[16]{0} reduce-scatter(f32[64]{0} %first), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
  ROOT %out = (f32[2,8,8]{2,1,0}, f32[16]{0}) tuple(f32[2,8,8]{2,1,0} %dot, f32[16]{0} %part)
}
"""  # noqa: E501  (XLA prints an instruction on one line)


def test_a_module_by_hand():
    graph = Graph(BY_HAND)
    assert len(graph.instructions) == 10 and graph.operations["dot"] == 1
    assert graph.dot_flops == 2 * (2 * 8 * 8) * 4
    assert [(each.opcode, each.replica_groups, each.bytes) for each in graph.collectives] == [
        ("all-reduce", [[0, 1], [2, 3]], 256),
        ("reduce-scatter", [[0, 1, 2, 3]], 256),
    ]
    assert (graph.input_bytes, graph.output_bytes) == (128, 512 + 64)
    # Beside the results live at the all-reduce %left (named %flat, and read for the last time), and %sums of
    # 64 and of one.
    assert find_peak(graph).bytes == 512 + 64 + 256 + 256 + 4


@pytest.mark.parametrize(
    "text, message",
    [
        ("HloModule m\n", "no ENTRY computation"),
        ("ENTRY %m () -> f32[] {\n  what\n}\n", "not an HLO instruction: what"),
        (
            "ENTRY %m () -> f32[] {\n  ROOT %w = f32[] while(f32[] %p), condition=%c, body=%b\n}\n",
            "a computation of its own",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Graph(text)


BAD = {
    "--model llama9": (
        f"--model llama9: {', '.join(PRESETS)}, tiny, a directory or a config.json was expected"
    ),
    "--model llama3-8b --world_size 6 --tensor_parallel_size 4": (
        "the world size 6 is not divisible by --tensor_parallel_size 4"
    ),
    "--model llama3-8b --tensor_parallel_size 3 --world_size 3": (
        "the model's num_attention_heads 32 is not divisible by"
    ),
    "--model llama3-8b --max_seq_length 8193": "--max_seq_length 8193 is more than the model's positions",
    "--model llama3-8b --model_id x": "--model_id is not taken here: --model names the model",
    "--model llama3-8b --do_train false": "--do_train false leaves no step to trace",
    "--model tiny --lora_target_modules x": "--lora_target_modules: the model has no linear layer 'x'",
    "--model tiny --json nowhere/report.json": (
        "--json nowhere/report.json cannot be written: a file in a directory that exists"
    ),
    "--model tiny --save_hlo README.md": "--save_hlo README.md cannot be made: File exists",
}


@pytest.mark.process
def test_bad_input_is_one_line():
    program = (
        "import sys; from tools.bench_compile import main; "
        "print([main(each.split()) for each in sys.argv[1:]])"
    )
    done = run(["-c", program, *BAD])
    assert done.stdout == f"{[1] * len(BAD)}\n", done.stderr
    for said, message in zip(done.stderr.splitlines(), BAD.values(), strict=True):
        assert said.startswith(f"error: {message}")
