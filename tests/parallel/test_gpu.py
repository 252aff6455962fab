"""PJRT_DEVICE=GPU: what is checked before a run, and all of its path, on stand-ins for driver and plugin."""

import ctypes
import json
import os
import subprocess
import sys

import pytest

from parallel.runtime import devices, gpu, leaves_at_once, prepare_environment, requested_world_size
from tests.support import gpu as stand_ins
from tests.support.on_ranks import ROOT
from tests.support.runs import environment, read, start
from tools.compare_runs import compare, read_metrics

GIB = 2**30


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gpu")
    return directory, stand_ins.build(directory)


@pytest.fixture
def card(built, monkeypatch):
    """A machine with a GPU, in this process."""
    directory, variables = built
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(gpu, "DRIVER", str(directory / "libcuda.so.1"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    return monkeypatch


def test_a_gpu_that_can_be_used(card):
    assert gpu.check() == ("NVIDIA Test", 80 * GIB, 80 * GIB, (12, 8))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    assert devices.on_gpu() and devices.ranks_are_processes()
    assert gpu.memory_fraction() == 0.92


# The stand-ins read the environment by C's getenv, which sees what os.environ is given.
@pytest.mark.parametrize(
    "changes, problem",
    [
        (
            {"MARKSTEP_TEST_MINOR": "115"},
            r"has version 0\.115 .* torch_xla 2\.9 has 0\.75.*jax-cuda12-pjrt==0",
        ),
        ({"MARKSTEP_TEST_MINOR": "54"}, r"has version 0\.54"),
        ({"PJRT_LIBRARY_PATH": "/none.so"}, "PJRT_LIBRARY_PATH=/none.so: no such file"),
        ({"PJRT_LIBRARY_PATH": "setup.cfg"}, "setup.cfg is no PJRT plugin that can be loaded"),
        ({"MARKSTEP_TEST_GPUS": "0"}, r"shows no GPU \(CUDA_VISIBLE_DEVICES=3\)"),
        ({"MARKSTEP_TEST_INIT": "999"}, "cuInit returns 999"),
        ({"MARKSTEP_TEST_CUDA": "11080"}, r"of CUDA 11\.8; the plugin needs 12"),
        (
            {"MARKSTEP_TEST_FREE": "70"},
            r"NVIDIA Test\) has 70\.0 of 80\.0 GiB free, and a run takes 92% of it",
        ),
        ({"MARKSTEP_TEST_FREE": "0"}, "no memory left at all: end the other programs"),
        ({gpu.FRACTION: "much"}, f"{gpu.FRACTION}=much: a number above 0"),
        ({gpu.FRACTION: "1.5"}, "a number above 0 and up to 1"),
    ],
)
def test_a_gpu_that_cannot_be_used(card, changes, problem):
    for name, value in changes.items():
        card.setenv(name, value)
    with pytest.raises(ValueError, match=problem) as raised:
        prepare_environment(1)
    assert "\n" not in str(raised.value)


def test_a_part_of_the_memory_can_be_had(card):
    card.setenv("MARKSTEP_TEST_FREE", "70")
    card.setenv(gpu.FRACTION, "0.8")
    assert gpu.check().free == 70 * GIB


def test_no_driver(card):
    card.setattr(gpu, "DRIVER", "libcuda-of-no-machine.so.1")
    with pytest.raises(ValueError, match="of NVIDIA's driver is not there"):
        gpu.check()


def test_the_installed_plugin(monkeypatch, tmp_path):
    monkeypatch.delenv("PJRT_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(
        ValueError, match=r'no PJRT plugin for CUDA is installed: `pip install -e "\.\[gpu\]"`'
    ):
        gpu.find_plugin()
    library = tmp_path / "jax_plugins" / "xla_cuda12" / "xla_cuda_plugin.so"
    library.parent.mkdir(parents=True)
    library.touch()
    sys.path_importer_cache.pop(str(tmp_path), None)
    assert gpu.find_plugin() == library


def test_the_platform_has_another_name(built):
    """torch_xla aborts at "cuda"."""
    api = gpu.load_plugin(built[0] / "plugin.so")
    assert platform_name(api) == b"cuda"
    kept = gpu.rename_platform(api)
    assert platform_name(api) == b"gpu" and kept


def platform_name(api):
    """By a call as XLA makes it."""
    function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
    slot = ctypes.c_void_p.from_address(api + gpu.FUNCTIONS + 8 * gpu.PLATFORM_NAME).value
    arguments = (ctypes.c_size_t * 5)(40)
    assert function(slot)(ctypes.addressof(arguments)) is None
    return ctypes.string_at(arguments[3], arguments[4])


def test_one_gpu_is_one_rank(monkeypatch):
    monkeypatch.setattr(os, "environ", {"PJRT_DEVICE": "GPU"})
    assert requested_world_size(None) == requested_world_size(1) == 1
    with pytest.raises(
        ValueError, match="4 ranks, and PJRT_DEVICE=GPU runs one .* PJRT_DEVICE=CPU rehearses"
    ):
        requested_world_size(4)
    os.environ |= {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    assert not leaves_at_once()
    with pytest.raises(ValueError, match="2 ranks, and PJRT_DEVICE=GPU"):
        requested_world_size(None)


@pytest.mark.parametrize("given, hint", [("CUDA", "an NVIDIA GPU is GPU"), ("TPU", "CPU, GPU or NEURON")])
def test_a_device_that_is_not_known(monkeypatch, given, hint):
    monkeypatch.setenv("PJRT_DEVICE", given)
    with pytest.raises(ValueError, match=f"PJRT_DEVICE={given}: .*{hint}"):
        prepare_environment(1)


def test_memory_that_runs_out_is_one_line():
    with (
        pytest.raises(
            MemoryError, match=r"small for this run \(Out of memory .* 9 bytes\): --gradient"
        ) as raised,
        gpu.naming_memory(),
    ):
        raise RuntimeError("Bad StatusOr: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore\nlines")
    assert "\n" not in str(raised.value)
    with pytest.raises(RuntimeError, match="another"), gpu.naming_memory():
        raise RuntimeError("another")


FLAGS = ["--max_seq_length", 64, "--max_steps", 6, "--save_steps", 3, "--on_recompile", "error"]


@pytest.mark.process
def test_the_command_says_why_it_cannot_start(built, tmp_path):
    found = subprocess.run(
        [sys.executable, "trainer/main.py", "--output_dir", str(tmp_path / "out")],
        env=environment() | built[1] | {"MARKSTEP_TEST_MINOR": "90"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 1 and found.stderr.startswith("error: ") and not (tmp_path / "out").exists()
    assert len(found.stderr.splitlines()) == 1 and "0.90" in found.stderr


@pytest.mark.process
def test_a_run_through_the_plugin_is_that_of_the_cpu(built, tmp_path):
    """Alone and under torchrun, with replay and donation; and a checkpoint goes there and back."""
    card = environment() | built[1] | stand_ins.on_xla_cpu()
    card.pop("XLA_FLAGS", None)  # those of other tests have flags that another version of XLA does not know
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]

    def train(name, *flags, launcher=()):
        command = [
            sys.executable,
            *launcher,
            "trainer/main.py",
            *FLAGS,
            "--output_dir",
            tmp_path / name,
            *flags,
        ]
        done = subprocess.run(list(map(str, command)), env=card, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]

    start(*FLAGS, "--output_dir", tmp_path / "cpu")
    train("gpu")
    train("torchrun", "--resume", tmp_path / "cpu" / "checkpoint-3", launcher=torchrun)
    start(*FLAGS, "--output_dir", tmp_path / "back", "--resume", tmp_path / "gpu" / "checkpoint-3")
    expected = read_metrics(tmp_path / "cpu")
    for name, steps in (("gpu", 6), ("torchrun", 3), ("back", 3)):
        differences = compare(expected, read_metrics(tmp_path / name))
        assert len(differences) == steps
        assert max(max(each.values()) for _, each in differences) < 1e-6, name
    # build, and the step; replayed from the third one on
    assert [line["compilations"] for line in read(tmp_path / "gpu")][-1] == json.loads(
        (tmp_path / "cpu" / "metrics.jsonl").read_text().splitlines()[-1]
    )["compilations"]
