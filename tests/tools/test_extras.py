"""A tool whose package is missing says in one line which pip extra installs it, before it does anything."""

import json
import sys

import pytest

from tools import compare_runs, show_data
from tools.evaluate.__main__ import prepare
from tools.extras import require


def test_what_is_installed_passes():
    require("matplotlib")
    require("rouge_score")


@pytest.fixture
def without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    return 'error: matplotlib is not installed: `pip install -e ".[plots]"` in the repository\'s directory\n'


def test_compare_runs_needs_matplotlib(without_matplotlib, tmp_path, capsys):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(json.dumps({"step": 1, "loss": 1.0, "grad_norm": 1.0}))
    assert compare_runs.main([str(metrics), str(metrics)]) == 2
    assert capsys.readouterr() == ("", without_matplotlib)


def test_show_data_needs_matplotlib(without_matplotlib, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert show_data.main(["--output", str(page)]) == 1
    assert capsys.readouterr() == ("", without_matplotlib) and not page.exists()


def test_evaluate_needs_rouge_score(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(
        ValueError, match=r'^rouge-score is not installed: `pip install -e "\.\[evaluation\]"`'
    ):
        prepare(None, None)
