"""What the environment may not change: numbers and graphs; and what a container's environment lacks."""

import os
import subprocess
import sys
from dataclasses import asdict

import pytest

from parallel.runtime import devices, environment, requested_world_size
from parallel.runtime.variables import CHANGES, asks_for_bf16, take_away
from tests.support.on_ranks import ROOT
from tests.support.runs import environment as shell
from tests.support.runs import read, start
from trainer.config import Config, parse


@pytest.fixture
def variables(monkeypatch):
    """The environment, which is empty."""
    found = {}
    monkeypatch.setattr(os, "environ", found)
    return found


def left(variables):
    return {name: value for name, value in variables.items() if name != "PYTEST_CURRENT_TEST"}


def test_variables_that_change_numbers_or_graphs_are_taken_away_and_named(variables, capsys):
    variables |= dict.fromkeys(CHANGES, "1") | {"PATH": "/bin"}
    assert set(take_away()) == set(CHANGES)
    assert left(variables) == {"PATH": "/bin", "MARKSTEP_BF16": "1"}
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("=")[0] for line in lines] == [f"warning: {name}" for name in CHANGES]
    assert ["it is read as --bf16" in line for line in lines] == [True] * 2 + [False] * (len(CHANGES) - 2)
    assert not take_away() and not capsys.readouterr().err and asks_for_bf16()


@pytest.mark.parametrize("value", ["", "0", "false", "False", "no", "OFF"])
def test_a_variable_that_is_off_says_nothing(variables, capsys, value):
    variables["XLA_USE_BF16"] = value
    assert not take_away() and not left(variables) and not asks_for_bf16()
    assert not capsys.readouterr().err


@pytest.mark.parametrize("local_rank, lines", [("0", 1), ("3", 0)])
def test_one_process_of_a_machine_names_them(variables, capsys, local_rank, lines):
    variables |= {"LOCAL_RANK": local_rank, "RANK": "7", "XLA_USE_BF16": "1"}
    take_away()
    assert len(capsys.readouterr().err.splitlines()) == lines and asks_for_bf16()


@pytest.mark.parametrize("name", ["XLA_USE_BF16", "XLA_DOWNCAST_BF16"])
def test_bf16_of_the_environment_is_the_flag(variables, name, tmp_path):
    assert not parse([]).bf16
    variables[name] = "True"  # torch_xla itself knows 1 and true only, and would train in fp32
    take_away()
    assert asdict(parse([])) == asdict(Config(bf16=True))
    assert not parse(["--bf16", "false"]).bf16
    preset = tmp_path / "flags.txt"
    preset.write_text("--bf16 false")
    assert not parse(["--preset", str(preset)]).bf16


@pytest.mark.process
def test_a_run_under_the_tutorials_variables_is_that_of_the_flag(tmp_path):
    flags = [
        "--max_steps",
        3,
        "--max_seq_length",
        64,
        "--lora_r",
        0,
        "--learning_rate",
        2e-5,
        "--save_steps",
        9,
    ]
    start(*flags, "--bf16", "--output_dir", tmp_path / "flag", forked=False)
    found = subprocess.run(
        [sys.executable, "trainer/main.py", *map(str, flags), "--output_dir", str(tmp_path / "variable")],
        env=shell() | {"XLA_USE_BF16": "1", "XLA_DOWNCAST_BF16": "1", "XLA_USE_32BIT_LONG": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0 and found.stderr.count("is taken out of the environment") == 3, found.stderr
    same = [
        [(line["loss"], line["grad_norm"]) for line in read(tmp_path / name)] for name in ("flag", "variable")
    ]
    assert same[0] == same[1] and len(same[0]) == 3


def test_a_platforms_world_size_is_not_torchruns(variables, capsys):
    """Kubeflow and SageMaker set these for a machine, whoever starts the program on it."""
    variables |= {"PJRT_DEVICE": "CPU", "WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "pod-0"}
    assert requested_world_size(4) == 4 and requested_world_size(None) == 1
    assert requested_world_size(None, default=2) == 2
    assert not environment.leaves_at_once() and not capsys.readouterr().err
    variables |= {"WORLD_SIZE": "2"}
    assert requested_world_size(4) == 4
    assert "WORLD_SIZE=2 is not read" in capsys.readouterr().err
    variables |= {"WORLD_SIZE": "two", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "two"}
    with pytest.raises(ValueError, match="WORLD_SIZE=two in the environment: an integer above 0"):
        requested_world_size(None)


def test_neuron_cores_without_torchrun_are_refused(variables, monkeypatch):
    monkeypatch.setattr(devices, "on_neuron", lambda: True)
    variables |= {"WORLD_SIZE": "1", "RANK": "0"}
    with pytest.raises(ValueError, match="torchrun --nproc_per_node=N"):
        requested_world_size(None)


def test_a_user_without_a_name_or_a_home(variables, monkeypatch, capsys, tmp_path):
    def unknown(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    environment.provide_home()
    home = tmp_path / f"markstep-home-{os.getuid()}"
    assert left(variables) == {"LOGNAME": f"uid-{os.getuid()}", "HOME": str(home)}
    assert home.is_dir() and f"caches go to {home}" in capsys.readouterr().err
    environment.provide_home()
    assert not capsys.readouterr().err
    home.chmod(0o777)  # somebody else may write there
    del variables["HOME"]
    environment.provide_home()
    assert variables["HOME"].startswith(f"{home}-")


def test_paths_begin_in_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = parse(
        ["--output_dir=~/x", "--dataset", "~/a.jsonl", "owner/name", "--model_id=~", "--resume=latest"]
        + ["--data_cache_dir=~/tokens", "--adapter_name_or_path=~/adapter"]
    )
    assert config.output_dir == f"{tmp_path}/x" and config.dataset == [f"{tmp_path}/a.jsonl", "owner/name"]
    assert config.model_id == str(tmp_path) and config.resume == "latest"
    assert (
        config.data_cache_dir == f"{tmp_path}/tokens" and config.adapter_name_or_path == f"{tmp_path}/adapter"
    )
    (tmp_path / "mine.txt").write_text("--output_dir ~/y")
    assert parse(["--preset=~/mine.txt"]).output_dir == f"{tmp_path}/y"


def test_a_home_that_is_not_known_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse(["--output_dir=~nobody-of-this-name/x"])
    assert capsys.readouterr().err.startswith(
        "error: ~nobody-of-this-name/x: no home directory is known of ~nob"
    )
