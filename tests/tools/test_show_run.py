"""tools/show_run: the page of runs that ended, still run, were cut off, or have no step; and its charts."""

import fcntl
import json
import math
import os
import re
from dataclasses import asdict
from html.parser import HTMLParser

import pytest

from tools.show_run.__main__ import main
from tools.show_run.chart import MOST_POINTS, Curve, draw, medians, nice_ticks, thin
from tools.show_run.run import read_run
from trainer.config import Config


def write_lines(path, records, end=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + end)


def write_run(directory, steps, starts=(0,), end="", **flags):
    """An output directory with a line for each of `steps`, whose loss in step 7 is not finite."""
    directory.mkdir()
    config = asdict(Config(output_dir=str(directory), **flags))
    common = {"total_steps": 40, "world_size": 2, "device": "CPU", "trained_parameters": 5, "parameters": 20}
    write_lines(
        directory / "starts.jsonl",
        [{"step": step, "time": "now", "versions": {}, "flags": config} | common for step in starts],
    )
    write_lines(
        directory / "metrics.jsonl",
        [
            {
                "step": step,
                "loss": None if step == 7 else 3 / step,
                "grad_norm": 1.0,
                "step_seconds": 90.0 if step == 1 else 0.1,
                "mfu": None,
                "z_loss": 0.5,
                "compilations": 2 + (step >= 20),
            }
            for step in steps
        ],
        end,
    )
    return directory


def page_of(*runs):
    """The text of the page, whose tags are balanced enough for a browser, and which loads nothing."""
    output = runs[0] / "page.html"
    assert main([*map(str, runs), "--output", str(output)]) == 0
    text = output.read_text()
    open_tags = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag in ("svg", "figure", "table", "details", "body"):
                open_tags.append(tag)
            assert tag != "script" and not {"src", "href"} & {name for name, _ in attributes}

        def handle_endtag(self, tag):
            if tag in ("svg", "figure", "table", "details", "body"):
                assert open_tags.pop() == tag

    Reader().feed(text)
    assert not open_tags and not re.search(r"url\(|@import|nan|None", text)
    return text


def charts(text):
    return re.findall(r"<figcaption>(.*?) <small>", text)


def test_two_runs(tmp_path):
    a = write_run(tmp_path / "a", range(1, 41), starts=(0, 10), run_name="high <rate>")
    b = write_run(tmp_path / "b", range(1, 31), end='{"step": 31, "lo', learning_rate=1.0)
    write_lines(a / "eval.jsonl", [{"step": 0, "eval_loss": 4.0}, {"step": 40, "eval_loss": None}])
    write_lines(a / "samples.jsonl", [{"step": 0, "prompt": "<q>", "answer": "no", "expected": "yes & no"}])
    text = page_of(a, b)
    # mfu has no value in any run; z_loss is a figure that someone added
    assert charts(text) == ["Loss", "Evaluation loss", "Gradient norm", "Seconds of a step", "z_loss"]
    assert "ended after step 40 of 40" in text and "after step 30 of 40; 1 lines could not be read" in text
    assert "high &lt;rate&gt;" in text and "&lt;q&gt;" in text and "yes &amp; no" in text
    assert text.count('class="swatch c0"') == text.count('class="swatch c1"') == 1
    assert "5 of 20 parameters (25.00%)" in text
    # the first step's 90 seconds do not hide the others
    assert "cut off, up to 90<" in text
    assert text.count("step 7: not finite") == 2
    assert (
        "high &lt;rate&gt;: started again after step 10" in text
        and ": started again after step 0" not in text
    )
    assert text.count("b: graphs were compiled up to step 20<") == 4
    row = re.search(r"<tr><td>--learning_rate(.*?)</tr>", text)[1]
    assert row == '<td class="changed">0.0002<td class="changed">1.0'
    assert "--weight_decay" not in text[: text.index("<details><summary>all")]


def test_a_run_that_is_still_going(tmp_path):
    run = write_run(tmp_path / "run", range(1, 4))
    descriptor = os.open(run, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert "running, after step 3 of 40" in page_of(run)
    os.close(descriptor)
    assert read_run(run).state == "ended after step 3 of 40"


def test_an_evaluation_only(tmp_path):
    run = write_run(tmp_path / "run", [], do_train=False, do_eval=True)
    (run / "metrics.jsonl").unlink()
    write_lines(run / "eval.jsonl", [{"step": 0, "eval_loss": 4.0, "perplexity": 54.6}])
    text = page_of(run)
    assert "evaluation only" in text and charts(text) == ["Evaluation loss"]


def test_no_finite_value(tmp_path):
    assert charts(page_of(write_run(tmp_path / "run", [7])))[0] == "Loss"


def test_what_is_no_run(tmp_path, capsys):
    write_run(tmp_path / "empty", [], starts=())
    for path, problem in [
        ("nowhere", "does not exist"),
        ("empty", "has no metrics.jsonl, eval.jsonl or starts"),
    ]:
        assert main([str(tmp_path / path)]) == 1
        error = capsys.readouterr().err
        assert problem in error and error.startswith("error: ") and error.count("\n") == 1
    run = write_run(tmp_path / "run", [1])
    assert main([str(run), "--output", str(tmp_path / "no" / "page.html")]) == 1
    assert main([str(run)]) == 0 and (run / "run.html").exists()


def test_a_long_curve_keeps_its_extremes():
    points = [(step, math.sin(step)) for step in range(100_000)]
    points[51_234], points[70_001] = (51_234, 9.0), (70_001, None)
    found = thin(points)
    assert len(found) <= MOST_POINTS + 1 and {points[51_234], points[70_001]} <= set(found)
    assert found == sorted(found, key=lambda point: point[0]) and thin(points[:10]) == points[:10]
    line = [(step, 3.0 if step == 500 else None if step == 7 else step / 1000) for step in range(1000)]
    assert medians(line)[50] == pytest.approx((504.5, 0.5055)) and medians(line)[0] == (4, 0.004)
    assert not medians(line[:99])


def test_ticks():
    assert nice_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(5.7, 7.4) == [5.5, 6, 6.5, 7, 7.5]
    for points in ([(1, 0.0)], [(1, 1e-30), (2, 1e-30)], [(3, None)], [(1, -4e9), (2, 3e12)]):
        for clips in (True, False):
            assert "<svg" in draw("x", [Curve("a", 0, points)], "", clips)
    assert draw("x", [Curve("a", 0, [])], "", True) == ""
