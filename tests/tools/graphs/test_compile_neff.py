"""tools.compile_neff with a stand-in of the compiler, which checks what it is given."""

import json
import os
import sys

import pytest

from tests.support.on_ranks import run_program
from tools.compile_neff import __main__ as command
from tools.compile_neff import compiler

# Reads the flags and the HloModuleProto as the real one does: instructions and computations whose ids do not
# fit 32 bits are what it refuses. FAIL names a graph and a level that fail.
STAND_IN = """#!{python}
import os, sys, time
words = sys.argv[1:]
if words == ["--version"]:
    print("NeuronX Compiler version {version}\\n\\nPython version 3.11.2")
    sys.exit()
options = dict(word.split("=") for word in words if "=" in word)
assert words[0] == "compile" and options.pop("--framework") == "XLA", words
level, output, target = (options.pop("--" + name) for name in ("optlevel", "output", "target"))
assert target in ("trn1", "trn2") and os.listdir() == [], os.listdir()

def fields(data):
    position = 0
    def number():
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
    while position < len(data):
        tag = number()
        if tag & 7 == 0:
            yield tag >> 3, number()
        else:
            length = number() if tag & 7 == 2 else 8 if tag & 7 == 1 else 4
            yield tag >> 3, data[position : position + length]
            position += length

module = open(words[1], "rb").read()
computations = [list(fields(value)) for number, value in fields(module) if number == 3]
instructions = [dict(fields(value)) for each in computations for number, value in each if number == 2]
ids = [dict(each)[5] for each in computations] + [each[35] for each in instructions]
assert len(instructions) > 50 and len(set(ids)) == len(ids) and 0 < max(ids) < 2**31, max(ids)
print("flags", sorted(options.items()), [word for word in words[2:] if "=" not in word])
if os.environ.get("FAIL") == os.path.basename(words[1]).split(".")[0] + level:
    print("2024-05-10T23:47:40Z Traceback")
    print("2024-05-10T23:47:40Z [XCG815]  Estimated peak HBM usage (22.839451) exceeds 16GB.")
    sys.exit(70)
memory = b"1" * (60 << 20)
metrics = '{{"sg00": {{"hlo": {{"HloMacCount": 1024}}, "PostSchedEstLatency": [7, 9.5]}}}}'
open("global_metric_store.json", "w").write(metrics)
open("log-neuron-cc.txt", "w").write("details\\n")
open(output, "wb").write(module + b"NEFF" * int(level))
"""
JOB = (
    "--model tiny --world_size 4 --tensor_parallel_size 2 --max_seq_length 128 "
    "--gradient_accumulation_steps 2"
)


def stand_in(directory, version="2.24.5133.0+58f8de22"):
    path = directory / "neuronx-cc"
    path.write_text(STAND_IN.format(python=sys.executable, version=version))
    path.chmod(0o755)
    return path


def run(*words, **environment):
    words = ["-m", "tools.compile_neff", *JOB.split(), *map(str, words)]
    clean = {name: value for name, value in os.environ.items() if name != "NEURON_CC_FLAGS"}
    return run_program(words, environment=clean | environment)


@pytest.mark.process
def test_two_graphs_at_two_levels(tmp_path):
    """Two graphs at two levels, of which one fails: the others are compiled, and the exit status is 1."""
    path = f"{stand_in(tmp_path).parent}{os.pathsep}{os.environ['PATH']}"
    output, report = tmp_path / "neff", tmp_path / "report.json"
    done = run("--optlevel", 1, 2, "--output", output, "--json", report, PATH=path, FAIL="update2")
    assert done.returncode == 1, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    found = [row[:2] for row in rows if row[0] in ("micro_batch", "update") and row[1] in "12"]
    assert found == [["micro_batch", "1"], ["micro_batch", "2"], ["update", "1"], ["update", "2"]]
    graphs = json.loads(report.read_text())["graphs"]
    assert list(graphs) == ["micro_batch", "update"] and graphs["micro_batch"]["instructions"] > 100
    for name, levels in graphs.items():
        hlo = (output / f"{name}.hlo.pb").stat().st_size
        for level in (1, 2):
            each, log = levels[f"O{level}"], (output / f"{name}.O{level}.log").read_text()
            assert "('--auto-cast', 'none'), ('--model-type', 'transformer')" in log
            assert "['--enable-saturate-infinity']" in log
            if (name, level) == ("update", 2):
                assert each["neff_bytes"] is None and each["estimated_hbm_gb"] == 22.839451
                continue
            assert each["neff_bytes"] == hlo + 4 * level and each["error"] == "" and "details" in log
            assert (each["macs"], each["estimated_latency"], each["estimated_hbm_gb"]) == (1024, 9.5, None)
            assert 60 << 20 < each["peak_bytes"] < 200 << 20  # the compiler's, not that of the tracing
    assert f"error: update, level 2 failed ({output}/update.O2.log):\n    [XCG815]" in done.stderr
    assert "failed" in done.stdout and "22.84 GB" in done.stdout
    assert {path.suffix for path in output.iterdir()} == {
        ".pb",
        ".neff",
        ".log",
    }  # what it left behind is gone


def test_errors_before_anything_is_traced(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "report_step", None)  # calling it would fail
    monkeypatch.setenv("PATH", "/nowhere")
    words = JOB.split()
    assert command.main([*words, "--output", str(tmp_path / "new")]) == 1
    said = capsys.readouterr().err
    assert "error: neuronx-cc is not on the PATH: `pip install neuronx-cc` from AWS" in said
    assert "no Neuron device is needed" in said and said.count("\n") == 1
    given = ["--compiler", str(stand_in(tmp_path))]
    (tmp_path / "other").touch()
    for more, expected in (
        (["--compiler", str(tmp_path / "other")], "a program of the name neuronx-cc was expected"),
        ([*given, "--output", str(tmp_path)], "exists, and is not empty"),
        ([*given, "--json", "/nowhere/a.json"], "--json /nowhere/a.json cannot be written"),
        ([*given, "--output", str(tmp_path / "x"), "--tensor_parallel_size", "3"], "4 is not divisible"),
    ):
        assert command.main([*words, *more]) == 1
        assert expected in capsys.readouterr().err, more
    assert not (tmp_path / "new").exists() and not (tmp_path / "x").exists()


def test_flags_are_those_of_the_launch_scripts(tmp_path, monkeypatch):
    monkeypatch.delenv("NEURON_CC_FLAGS", raising=False)
    flags = ["--model-type=transformer", "--enable-saturate-infinity", "--auto-cast=none"]
    assert compiler.compiler_flags(stand_in(tmp_path)) == flags
    newer = compiler.compiler_flags(stand_in(tmp_path, "2.28.7631.0"))
    assert newer == [*flags, "--native-int64=disabled", "--implicit-integer-downcast=all"]
    monkeypatch.setenv("NEURON_CC_FLAGS", "--cache_dir=/x --retry_failed_compilation --model-type generic")
    assert compiler.compiler_flags(stand_in(tmp_path)) == ["--model-type", "generic"]


def test_what_the_compiler_says():
    assert compiler.estimates("", "no JSON") == dict.fromkeys(
        ("estimated_latency", "macs", "estimated_hbm_gb")
    )
    text = "INFO HloMacCount: 5\nHloMacCount = 7e3\n"
    assert compiler.estimates(text, "[]")["macs"] == 7000
    assert compiler.why("a\n2024-05-10T23:47:40Z ERROR one\nb\nERROR two\n") == "ERROR one\nERROR two"
    assert compiler.why("a\n05/31/2021 03:56:37 PM [NCC_EVRF035] bad\nERROR two\n") == "[NCC_EVRF035] bad"
    assert compiler.why("1\n2\n3\n4\n5\n\n") == "2\n3\n4\n5" and compiler.why("") == ""
