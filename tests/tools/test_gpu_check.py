"""gpu_check: the CPU beside itself, and that a figure which is not as it should be is a failure."""

import json

import pytest

from tests.support.runs import read
from tools.bench_peers.__main__ import _parse
from tools.gpu_check.__main__ import Check, main, speed_command


@pytest.mark.process
def test_the_cpu_agrees_with_itself(tmp_path, capsys):
    flags = ["--device", "CPU", "--output_dir", str(tmp_path)]
    assert main(["fp32", "bf16", "resume", "merge", *flags]) == 0, capsys.readouterr().err
    lines = capsys.readouterr().out.splitlines()
    figures = [line for line in lines if line.startswith("ok  ")]
    assert len(figures) == 2 + 1 + 2 * 2 + 2
    assert all(": 0 (at most 1e-06)" in line for line in (*figures[:2], *figures[3:7])), figures
    found = float(figures[2].split(": ")[2].split()[0])
    assert "bf16" in figures[2] and 0 < found < 0.2
    # runs that are there are compared again; this one is not as it was
    file = tmp_path / "lora-device" / "metrics.jsonl"
    rows = read(tmp_path / "lora-device")
    rows[3]["loss"] *= 1 + 2e-6
    file.write_text("\n".join(map(json.dumps, rows)))
    assert main(["fp32", *flags]) == 1
    assert "FAIL fp32: loss, largest relative difference of 10 steps: 2e-06" in capsys.readouterr().out


def check(tmp_path, *flags):
    from unittest.mock import patch

    with patch.object(Check, "fp32", lambda self: found.append(self)):
        found = []
        assert main(["fp32", "--output_dir", str(tmp_path), *flags]) == 0
    return found[0]


def test_speed_takes_the_least_recomputation_that_fits(tmp_path, capsys, monkeypatch):
    made = check(tmp_path, "--rows", "4", "--model", "llama3.2-1b")
    asked = []

    def run(where, *command):
        asked.append(command[command.index("--gradient_checkpointing") + 1])
        if asked[-1] == "none":
            raise ValueError("error: the GPU's memory is too small")
        ours = {"tokens_per_second": 150.0, "target_tokens_per_second": 1, "padded_tokens_per_second": 1}
        plain = {"seconds": [1.0], "tokens": 120, "target_tokens": 1, "positions": 1}
        (tmp_path / "speed-4.json").write_text(json.dumps([{"markstep": ours, "plain_cuda": plain}]))
        return "a table"

    monkeypatch.setattr(made, "run", run)
    made.speed()
    said = capsys.readouterr().out
    assert asked == ["none", "selective"] and "4 rows, recomputed none: does not fit" in said
    assert "FAIL 4 rows: tokens/s to the plain loop's: 1.25 (at least 1.3)" in said and made.failed == 1


def test_the_command_of_speed_is_one_of_bench_peers(tmp_path):
    chosen = check(tmp_path).chosen
    parsed, settings = _parse([*map(str, speed_command(chosen, 4, "full")[2:])])
    assert settings["rows"] == 4 and settings["row_length"] == 2048 and parsed.model == "llama3-8b"
    assert settings["bf16"] and settings["gradient_checkpointing"] == "full"


def test_a_part_that_there_is_not(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["fp16", "--output_dir", str(tmp_path)])
    assert "fp16: fp32, bf16, resume, merge, speed were expected" in capsys.readouterr().err
