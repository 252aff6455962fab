"""What all tools have in common: a home directory in paths, and an end by Ctrl-C in order."""

import argparse
import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

import tools
from tests.support.on_ranks import ROOT
from tests.support.runs import environment
from tools import cli, generate
from tools.evaluate.__main__ import parse_arguments
from tools.inspect_checkpoint.__main__ import main as inspect


def test_paths_begin_in_the_home_directory(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    chosen = generate.parse(["--model=~/merged", "--prompts=~/questions.txt"])
    assert chosen.model == f"{tmp_path}/merged" and chosen.prompts == tmp_path / "questions.txt"
    chosen, _ = parse_arguments(["--checkpoint", "~/a", "b", "--model", "~/c", "owner/name", "--output=~/d"])
    assert list(map(str, chosen.checkpoint)) == [f"{tmp_path}/a", "b"] and chosen.output == tmp_path / "d"
    assert chosen.model == [f"{tmp_path}/c", "owner/name"]
    assert inspect(["~/nowhere"]) == 1
    assert f"error: {tmp_path}/nowhere is neither" in capsys.readouterr().err
    with pytest.raises(
        argparse.ArgumentTypeError, match="no home directory is known of ~nobody-of-this-name"
    ):
        cli.path("~nobody-of-this-name/x")


def test_bf16_of_the_environment_is_the_flag(monkeypatch):
    question = ["--model", "m", "--instruction", "Who?"]
    assert not generate.parse(question).bf16
    monkeypatch.setenv("MARKSTEP_BF16", "1")  # what tools/__init__.py leaves of XLA_USE_BF16
    assert generate.parse(question).bf16


@pytest.mark.process
def test_ctrl_c_ends_a_tool_without_a_traceback(tmp_path):
    pipe = tmp_path / "old.json"
    os.mkfifo(pipe)  # the tool waits for what stands in it
    command = [sys.executable, "-m", "tools.bench_step", "--compare", pipe]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    with open(pipe, "w"):  # waits until the tool reads
        for _ in range(30):  # a signal just before the read does not end it
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=2)
                break
    assert process.wait(timeout=60) == 130 and not process.stderr.read()


def test_other_errors_keep_their_traceback(capsys):
    try:
        raise LookupError("a bug")
    except LookupError as error:
        tools.end_quietly(LookupError, error, error.__traceback__)
    assert "Traceback" in capsys.readouterr().err
