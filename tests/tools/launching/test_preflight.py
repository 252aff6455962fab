"""Preflight's findings, one by one: a good machine has none, and each single change gives the one finding
that it should."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from parallel.buckets import BUCKET_BYTES
from parallel.runtime import on_neuron
from parallel.runtime.variables import CHANGES
from tests.support.on_ranks import ROOT
from tools.preflight import flags as preflight_flags
from tools.preflight import host as hosts
from tools.preflight.__main__ import main
from tools.preflight.findings import findings
from tools.preflight.host import Host
from tools.preflight.plan import Plan, plan_of
from trainer.config import parse

GB = 10**9
VERSIONS = {
    "torch": "2.9.1",
    "torch-xla": "2.9.0",
    "torch-neuronx": "2.9.0.2.13.24727+8e870898",
    "neuronx-cc": "2.24.5133.0+58f8de22",
    "libneuronxla": "2.2.16408.0+50c26cbd",
    "neuronx-distributed": "0.18.27753",
}
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "64",
    "NEURON_CC_FLAGS": "--model-type=transformer",
    "NEURON_COMPILE_CACHE_URL": "/shared/cache",
}
TRN1 = Host(
    on_neuron=True,
    environment=ENVIRONMENT,
    versions=VERSIONS,
    placeholders=frozenset(),
    commands=frozenset(hosts.COMMANDS),
    device_files=16,
    neuron_cores=32,
    users=(),
    efa=8,
    memory=500 * GB,
    shm=250 * GB,
    open_files=65536,
    free_bytes=lambda path: 1000 * GB,
    writable=lambda path: True,
)
FLAGS = "--tensor_parallel_size 8 --bf16 --max_seq_length 1024"


def plan(flags="", **changes):
    return replace(
        Plan(
            parse(f"{FLAGS} {flags}".split()),
            nproc=32,
            model_files=4,
            model_bytes=16 * GB,
            checkpoint_bytes=GB,
        ),
        **changes,
    )


def environment(**changes):
    return {"environment": ENVIRONMENT | changes}


def versions(**changes):
    return {"versions": VERSIONS | {name.replace("_", "-"): value for name, value in changes.items()}}


def without(values, name):
    return {key: value for key, value in values.items() if key != name}


def test_a_good_machine_and_a_cpu():
    assert {each.level for each in findings(TRN1, plan())} == {"ok"}
    nodes = replace(TRN1, **environment(FI_PROVIDER="efa"))
    assert {each.level for each in findings(nodes, plan(nnodes=4))} == {"ok"}
    cpu = replace(
        TRN1,
        on_neuron=False,
        versions={"torch": "2.9.1", "torch-xla": "2.9.0"},
        environment={"PJRT_DEVICE": "CPU"},
        open_files=1024,
        commands=frozenset(),
        neuron_cores=None,
        efa=0,
        memory=8 * GB,
        shm=0,
    )
    assert {each.level for each in findings(cpu, plan(model_bytes=GB))} == {"ok"}
    assert "rehearsed on this CPU" in str(findings(replace(cpu, device_files=0), plan(model_bytes=GB)))


FINDINGS = [
    # packages
    (versions(torch="2.8.0"), {}, "error", "torch 2.8.0; 2.9.* was expected"),
    (
        {"versions": without(VERSIONS, "torch-xla")},
        {},
        "error",
        "torch-xla is not installed; 2.9.* was expected",
    ),
    (versions(torch_neuronx="2.8.0.1"), {}, "error", "torch-neuronx 2.8.0.1; 2.9.* was expected"),
    (
        {"versions": without(VERSIONS, "neuronx-distributed")},
        {},
        "error",
        "neuronx-distributed is not installed",
    ),
    (versions(neuronx_distributed="0.16.25997"), {}, "warning", "older than 0.17"),
    (
        versions(neuronx_cc="1.0.post1") | {"placeholders": frozenset({"neuronx-cc"})},
        {},
        "error",
        "neuronx-cc 1.0.post1 is PyPI's placeholder",
    ),
    (
        versions(libneuronxla="2.2.17544.0"),
        {},
        "warning",
        "packages of several SDKs: neuronx-cc 2.24.5133.0+58f8de22 of 2.29, torch-neuronx",
    ),
    (
        {"on_neuron": False, "versions": {"torch": "2.9.0", "torch-xla": "2.9.0"}},
        {},
        "error",
        "16 Neuron devices, but no torch-neuronx",
    ),
    # devices
    ({"device_files": 0, "neuron_cores": None}, {}, "error", "there is no /dev/neuron0"),
    ({"neuron_cores": None}, {}, "warning", "neuron-ls does not tell"),
    ({"neuron_cores": 2}, {}, "error", "32 processes for 2 NeuronCores"),
    ({"users": (17, 18)}, {}, "warning", "processes 17, 18 have Neuron devices open"),
    ({}, {"nproc": 16}, "warning", "16 processes a node: collectives on trn1 take 1, 2, 8, 32"),
    (environment(FI_PROVIDER="efa") | {"efa": 0}, {"nnodes": 2}, "error", "no EFA interface"),
    (
        {"on_neuron": False, "environment": {"PJRT_DEVICE": "CPU"}},
        {"nnodes": 2},
        "error",
        "2 nodes without Neuron devices",
    ),
    # topology
    ({}, {"nproc": 2}, "error", "the world size 2 is not divisible by --tensor_parallel_size 8"),
    ({}, {"flags": "--world_size 16"}, "error", "--world_size 16, and 32 processes"),
    (environment(LOCAL_WORLD_SIZE="8"), {}, "warning", "LOCAL_WORLD_SIZE=8 is set, and the run will have 32"),
    (environment(WORLD_SIZE="64"), {}, "warning", "WORLD_SIZE=64 is set, and the run will have 32"),
    (
        environment(NEURON_RT_VISIBLE_CORES="0-7,9"),
        {},
        "error",
        "NEURON_RT_VISIBLE_CORES=0-7,9 names 9 cores for 32 processes",
    ),
    (environment(NEURON_RT_VISIBLE_CORES="all"), {}, "error", "names no cores"),
    (environment(NEURON_RT_NUM_CORES="8"), {}, "error", "NEURON_RT_NUM_CORES=8, and 32 processes"),
    # memory and disk
    (
        {"memory": 60 * GB},
        {},
        "warning",
        "60 GB of memory are available; processes take 32, and the base's slices up to 64",
    ),
    ({"memory": 20 * GB}, {}, "error", "20 GB of memory"),
    ({"shm": GB // 16}, {}, "warning", "/dev/shm has 0.1 GB"),
    ({"writable": lambda path: path != "output"}, {}, "error", "--output_dir output cannot be written to"),
    (
        {"free_bytes": lambda path: (1 if path == "output" else 1000) * GB},
        {},
        "error",
        "--output_dir output has 1.0 GB free; 2 checkpoints of this model take 2.0",
    ),
    (
        {"free_bytes": lambda path: (3 if path == "output" else 1000) * GB},
        {"flags": "--save_total_limit 3"},
        "error",
        "4 checkpoints of this model take 4.0",
    ),
    ({"open_files": 256}, {}, "error", "a process may open 256 files; 4 model files and 32 ranks need 324"),
    ({"open_files": 1024}, {}, "warning", "a process may open 1024 files; AWS advises 65536"),
    # compile cache
    (
        environment(NEURON_CC_FLAGS="--model-type=transformer --cache_dir=/old"),
        {},
        "warning",
        "--cache_dir=/old in NEURON_CC_FLAGS wins over NEURON_COMPILE_CACHE_URL=/shared/cache",
    ),
    (
        environment(NEURON_CC_FLAGS="--model-type=transformer --no_cache"),
        {},
        "warning",
        "every start compiles everything",
    ),
    (
        environment(NEURON_COMPILE_CACHE_URL="gs://bucket"),
        {},
        "error",
        "gs://bucket is neither a directory nor of the form s3://",
    ),
    (
        environment(NEURON_COMPILE_CACHE_URL="s3:///path"),
        {},
        "error",
        "neither a directory nor of the form s3://BUCKET/PATH",
    ),
    (
        environment(NEURON_COMPILE_CACHE_URL="neuron_cache"),
        {},
        "error",
        "the compile cache neuron_cache is relative",
    ),
    (
        {"writable": lambda path: path != "/shared/cache"},
        {},
        "error",
        "the compile cache /shared/cache cannot be written to",
    ),
    (
        environment(NEURON_COMPILE_CACHE_URL="", FI_PROVIDER="efa"),
        {"nnodes": 2},
        "warning",
        "/var/tmp/neuron-compile-cache is each node's own",
    ),
    (
        {"free_bytes": lambda path: (2 if path == "/shared/cache" else 1000) * GB},
        {},
        "warning",
        "the compile cache /shared/cache has 2.0 GB free",
    ),
    # variables and flags that contradict
    *(
        (environment(**{name: "1"}), {}, "warning", f"{name}=1 is set, and trainer/main.py takes it away")
        for name in CHANGES
    ),
    *(
        (environment(**{name: "141"}), {}, "error", f"{name}=141: buckets of more than 140 MB gave NaN")
        for name in preflight_flags.BUCKET_VARIABLES
    ),
    (environment(BUCKET_CAP_MB="much"), {}, "error", "BUCKET_CAP_MB=much"),
    ({}, {"bucket_bytes": 141 * 10**6}, "error", "BUCKET_BYTES in parallel/buckets.py is 141000000"),
    (environment(NEURON_EXTRACT_GRAPHS_ONLY="1"), {}, "error", "nothing would be executed"),
    (
        {"commands": frozenset({"neuron-ls"})},
        {"phase": "precompile"},
        "error",
        "neuron_parallel_compile is not on the PATH",
    ),
    ({"environment": without(ENVIRONMENT, "MALLOC_ARENA_MAX")}, {}, "warning", "MALLOC_ARENA_MAX is not set"),
    (environment(NEURON_CC_FLAGS=""), {}, "warning", "does not say --model-type=transformer"),
    ({}, {"nnodes": 2}, "error", "FI_PROVIDER=: between nodes it has to be efa"),
    (
        environment(NEURON_CC_FLAGS="--model-type transformer --distribution-strategy=llm-training"),
        {"flags": "--bf16 --packing false --max_seq_length 2048"},
        "error",
        "with NKI kernels, such as flash attention",
    ),
    (
        environment(NEURON_CC_FLAGS="--model-type transformer --distribution-strategy llm-training"),
        {},
        "warning",
        "this run has none, but the next may",
    ),
    (
        environment(NEURON_CC_FLAGS="--model-type transformer --distribution-strategy llm-training"),
        {"flags": "--max_seq_length 2048"},
        "warning",
        "this run has none",
    ),
    (
        environment(NEURON_CC_FLAGS="--model-type=transformer --auto-cast=matmult"),
        {"flags": "--bf16 false"},
        "warning",
        "--auto-cast=matmult",
    ),
    (
        environment(NEURON_CC_FLAGS="--model-type=transformer --native-int64=disabled"),
        {},
        "warning",
        "--native-int64 in NEURON_CC_FLAGS: neuronx-cc 2.24.5133.0+58f8de22 does not know it",
    ),
    (
        {},
        {"flags": "--packing false --max_seq_length 3000"},
        "warning",
        "--max_seq_length 3000 is no multiple of 2048",
    ),
]


@pytest.mark.parametrize(
    ("changes", "planned", "level", "what"), FINDINGS, ids=[each[3][:40] for each in FINDINGS]
)
def test_one_change_gives_one_finding(changes, planned, level, what):
    found = [each for each in findings(replace(TRN1, **changes), plan(**planned)) if each.level != "ok"]
    assert [each.level for each in found] == [level], found
    assert what in found[0].what and len(found[0].mend) > 10


def test_which_sdk():
    """The SDK is named; from 2.32 on, the one warning about it says that its support has ended."""
    said = str(findings(replace(TRN1, system_packages={"aws-neuronx-dkms": "2.27.4.0"}), plan()))
    assert "SDK 2.29: neuronx-cc 2.24.5133.0+58f8de22, torch-neuronx" in said
    assert "libneuronxla 2.2.16408.0+50c26cbd, aws-neuronx-dkms 2.27.4.0" in said
    strange = replace(TRN1, **versions(neuronx_cc="2.1.0", torch_neuronx="2.9.9", libneuronxla="1.0"))
    assert "the SDK is not known by its packages: neuronx-cc 2.1.0" in str(findings(strange, plan()))
    flags = environment(NEURON_CC_FLAGS=" ".join(["--model-type=transformer", *preflight_flags.INT64_FLAGS]))
    for compiler, named in (
        ("2.27.5334.0", "SDK 2.32 ("),
        ("2.28.7631.0", "SDK 2.33 ("),
        ("2.99.1", "an SDK after 2.31"),
    ):
        host = replace(TRN1, **versions(neuronx_cc=compiler, torch_neuronx="2.9.0.2.15.32035"))
        found = {
            each.what: each.level for each in findings(replace(host, **flags), plan()) if each.level != "ok"
        }
        [what] = found
        assert what.startswith(named) and "ended the support of PyTorch/XLA training" in what
        warned = [each.what for each in findings(host, plan()) if each.level == "warning"]
        assert [flag for flag in preflight_flags.INT64_FLAGS if flag in str(warned)] == [
            *preflight_flags.INT64_FLAGS
        ]


def test_system_packages(tmp_path, monkeypatch):
    for command in ("rpm", "dpkg-query"):  # where both are, Ubuntu's is asked
        (tmp_path / command).write_text(
            f"#!/bin/sh\necho aws-neuronx-dkms 2.27.{len(command)}\necho is not there\n"
        )
        (tmp_path / command).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert hosts.system_packages() == {"aws-neuronx-dkms": f"2.27.{len(command)}"}
    monkeypatch.setenv("PATH", "/nowhere")
    assert hosts.system_packages() == {}


def test_a_placeholder_of_torch_neuronx_is_named():
    """It cannot be imported, so ranks would not be NeuronCores."""
    host = replace(
        TRN1, on_neuron=False, placeholders=frozenset({"torch-neuronx"}), **versions(torch_neuronx="0.1")
    )
    errors = [each.what for each in findings(host, plan()) if each.level == "error"]
    assert errors == [
        "there are 16 Neuron devices, but no torch-neuronx",
        "torch-neuronx 0.1 is PyPI's placeholder, which has nothing in it",
    ]


@pytest.mark.process
def test_it_runs_without_torch():
    """Importing torch fails in this process, as where it is not installed."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['torch_xla'] = None\n"
        "from tools.preflight.__main__ import main; sys.exit(main(['--nproc_per_node', '4']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "4 ranks: TP1 x DP4 on 1 node" in done.stdout, done.stderr


def test_contradictions_that_are_none():
    """What looks like one of the above, and is none."""
    for changes, planned in [
        (environment(NEURON_RT_STOCHASTIC_ROUNDING_EN="1"), {"flags": "--stochastic_rounding"}),
        (environment(NEURON_RT_VISIBLE_CORES="0-15,16-31", NEURON_RT_NUM_CORES="32"), {}),
        (environment(NEURON_COMPILE_CACHE_URL="s3://bucket/path", XLA_USE_BF16="0", BUCKET_CAP_MB="130"), {}),
        (environment(NEURON_CC_FLAGS="--model-type=transformer --auto-cast=matmult"), {}),
        (
            environment(NEURON_EXTRACT_GRAPHS_ONLY="1") | {"writable": lambda path: path != "output"},
            {"phase": "precompile"},
        ),
        ({}, {"flags": "--packing false --max_seq_length 4096"}),
    ]:
        assert {each.level for each in findings(replace(TRN1, **changes), plan(**planned))} == {"ok"}


def test_what_is_read_from_the_machine(tmp_path):
    devices = [
        {"neuron_device": number, "nc_count": 2, "neuron_processes": [{"pid": 7, "command": "x"}]}
        for number in range(16)
    ]
    assert hosts.read_neuron_ls(json.dumps(devices)) == (32, (7,))
    trn2 = [{"nc_count": 8, "logical_neuroncore_config": 2, "neuron_processes": None}] * 16
    assert hosts.read_neuron_ls(json.dumps(trn2)) == (64, ())
    assert hosts.available_memory("MemTotal: 9 kB\nMemAvailable:   12 kB\n") == 12288
    assert hosts.is_placeholder("\nWRONG PACKAGE. Please install the package from Neuron Repository\n")
    assert not hosts.is_placeholder("A compiler") and not hosts.is_placeholder(None)
    assert hosts.existing(str(tmp_path / "a" / "b")) == tmp_path
    here = hosts.look()
    assert here.on_neuron == on_neuron()
    assert here.versions["torch"].startswith("2.9.") and here.memory > 0 and here.open_files > 0
    assert here.writable(str(tmp_path / "new")) and here.free_bytes(str(tmp_path / "new")) > 0


def test_a_plan_and_the_command(tmp_path, capsys, monkeypatch):
    tiny = plan_of(parse(["--lora_r", "0"]), 4, 1, "train")
    assert tiny.model_bytes == 0 and tiny.checkpoint_bytes > 10**6
    assert plan_of(parse([]), 4, 1, "train").checkpoint_bytes < tiny.checkpoint_bytes
    far = plan_of(parse(["--model_id", "owner/name"]), 32, 4, "train")
    assert far.world == 128 and far.model_bytes == 0 and far.bucket_bytes == tiny.bucket_bytes == BUCKET_BYTES
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    flags = ["--nproc_per_node", "4", "--output_dir", str(tmp_path)]
    assert main([*flags, "--tensor_parallel_size", "2"]) == 0
    assert "4 ranks: TP2 x DP2 on 1 node" in capsys.readouterr().out
    assert main([*flags, "--tensor_parallel_size", "3"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("error ") and "to mend: choose NPROC_PER_NODE (4)" in said[1]
    assert main(["--lora_target_modules", ",", *flags]) == 1
    assert "error: --lora_target_modules names no module" in capsys.readouterr().err
    for module, said in (
        ("torch_xla", "4 ranks"),
        ("transformers.hf_argparser", "error: "),
    ):  # None: importing it fails
        with monkeypatch.context() as patch:
            for name in ("parallel.buckets", "parallel.collectives"):
                patch.delitem(sys.modules, name)
            patch.setitem(sys.modules, module, None)
            main(flags)
        assert said in "".join(capsys.readouterr())
