"""tools.compare_runs: what it says of equal, similar and different runs, and of files that are none."""

import json

import pytest

from tools.compare_runs import main


def write(directory, losses, first=1, norm=2.0):
    directory.mkdir(exist_ok=True)
    lines = [
        json.dumps({"step": step, "loss": loss, "grad_norm": norm, "other": 1})
        for step, loss in enumerate(losses, first)
    ]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return directory


@pytest.fixture
def compare(tmp_path, capsys):
    def run(a, b, *flags):
        picture = tmp_path / "curves.png"
        picture.unlink(missing_ok=True)
        status = main([str(a), str(b), "--picture", str(picture), *flags])
        assert picture.exists() == (status < 2)
        assert not picture.exists() or picture.read_bytes()[:4] == b"\x89PNG"
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


def test_equal_similar_and_different(tmp_path, compare):
    a = write(tmp_path / "a", [7.0, 6.5, 6.0])
    near = write(tmp_path / "near", [7.0, 6.5 * (1 + 4e-6), 6.0])
    far = write(tmp_path / "far", [7.0, 6.5, 6.1, 5.9])
    assert compare(a, a / "metrics.jsonl", "--exact")[0] == 0
    status, text = compare(a, near)
    assert status == 0 and "agree in 3 steps, within 1e-05" in text
    assert "loss: largest relative difference 4.00e-06, at step 2" in text
    status, text = compare(a, near, "--exact")
    assert status == 1 and "the runs differ: 1 of 3 steps by more than 0, the first is 2" in text
    status, text = compare(a, far, "--tolerance", "1e-3")
    assert status == 1 and "the first is 3" in text and "far has 1 more step" in text
    assert compare(a, far, "--tolerance", "0.1")[0] == 0
    assert compare(a, write(tmp_path / "norm", [7.0, 6.5, 6.0], norm=2.1))[0] == 1
    nan = write(tmp_path / "nan", [7.0, float("nan"), 6.0])
    assert compare(a, nan, "--tolerance", "1e9")[0] == 1 and compare(nan, nan, "--exact")[0] == 0


def test_what_cannot_be_compared(tmp_path, compare):
    a = write(tmp_path / "a", [7.0, 6.5])
    later = write(tmp_path / "later", [7.0], first=8)
    assert "the runs have no step in common: one has 1 to 2, the other 8 to 8" in compare(a, later)[1]
    broken = write(tmp_path / "broken", [7.0])
    for text, problem in [
        ('{"step": 1}\n', "line 1: an object with step, loss and grad_norm was expected"),
        ("", "has no step yet"),
        ('{"step": 1, "loss": 1.0, "grad_norm": 1.0}\n{"st', "line 2"),
    ]:
        (broken / "metrics.jsonl").write_text(text)
        status, said = compare(a, broken)
        assert status == 2 and problem in said
    status, said = compare(a, tmp_path / "none")
    assert status == 2 and "does not exist" in said
