"""What all tools have in common: a home directory in paths, and an end by Ctrl-C in order."""

import argparse
import configparser
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

import tools
from tests.support.on_ranks import ROOT
from tests.support.runs import environment
from tools import cli, command, generate
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


def test_each_program_is_a_command(capsys):
    assert command.main(["--help"]) == 0
    listed = re.findall(r"^  (\w+)  +\S", capsys.readouterr().out, re.MULTILINE)
    files = [*(ROOT / "tools").glob("*.py"), *(ROOT / "tools").glob("*/__main__.py")]
    programs = [path for path in files if '\nif __name__ == "__main__"' in path.read_text()]
    programs = sorted(path.relative_to(ROOT / "tools").parts[0].removesuffix(".py") for path in programs)
    renamed = {"merge_checkpoint": "merge"}
    assert listed == ["train", *sorted(renamed.get(name, name) for name in programs)]
    page = (ROOT / "docs" / "commands.md").read_text()
    rows = re.findall(r"^\| `markstep (\w+)` \| .* \| `(.*)` \|$", page, re.MULTILINE)
    assert [name for name, _ in rows] == listed
    in_clone = {f"python -m tools.{name}" for name in programs} | {"torchrun trainer/main.py"}
    assert {each for _, each in rows} == in_clone


def test_what_is_no_command(capsys):
    hints = {"mrge": "did you mean merge? ", "show-data": "did you mean show_data or show_run? ", "zzz": ""}
    for name, hint in hints.items():
        assert command.main([name]) == 2
        error = f"error: markstep {name}: no such command; {hint}`markstep --help` lists all\n"
        assert capsys.readouterr().err == error


def installed(directory):
    """The script `markstep` as pip writes it by setup.cfg."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    name, _, entry = setup["options.entry_points"]["console_scripts"].strip().partition(" = ")
    module, _, function = entry.partition(":")
    script = directory / name
    script.write_text(
        f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"
    )
    script.chmod(0o755)
    return script


@pytest.mark.process
def test_commands_run_in_a_folder_with_files_of_our_names(tmp_path):
    script, folder = installed(tmp_path), tmp_path / "user"
    (folder / "model").mkdir(parents=True)
    for file in ("tools.py", "data.py", "trainer.py", "parallel.py", "model/__init__.py"):
        (folder / file).write_text("raise SystemExit('imported from the folder: ' + __file__)")

    def run(*words):
        variables = environment() | {"PYTHONPATH": str(ROOT)}  # markstep is installed
        variables.pop("GLIBC_TUNABLES", None)
        return subprocess.run([script, *words], cwd=folder, env=variables, capture_output=True, text=True)

    begun = time.perf_counter()
    assert run("--help").stdout.startswith("usage: markstep COMMAND")
    assert time.perf_counter() - begun < 2  # 0.2 s on a machine that does nothing else
    helped = run("neuron_cache", "--help")
    assert helped.stdout.startswith("usage: markstep neuron_cache"), helped.stderr
    # Training starts itself once more, for huge pages, before it reads the flags.
    refused = run("train", "--no_such_flag", "a b")
    assert refused.returncode == 2
    assert refused.stderr == "error: unrecognized arguments: --no_such_flag a b; --help explains every flag\n"


@pytest.mark.process
def test_ctrl_c_ends_a_tool_without_a_traceback(tmp_path):
    pipe = tmp_path / "old.json"
    os.mkfifo(pipe)  # the tool waits for what stands in it
    command = [sys.executable, "-m", "tools.bench_step", "--compare", pipe]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    with open(pipe, "w"):  # waits until the tool reads
        for _ in range(6):  # a signal just before the read does not end it
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
                break
    assert process.wait(timeout=60) == 130 and not process.stderr.read()


def test_other_errors_keep_their_traceback(capsys):
    try:
        raise LookupError("a bug")
    except LookupError as error:
        tools.end_quietly(LookupError, error, error.__traceback__)
    assert "Traceback" in capsys.readouterr().err
