"""tools.show_data: what the page holds of a row, what it marks, and what it refuses."""

import html
import json
import re

import numpy as np
import pytest

from data.formats import format_prompt
from tools.show_data import draw_lengths, main, picture, runs
from trainer.config_derived import SAMPLE
from trainer.tokenizer import load_tokenizer


@pytest.fixture
def show(tmp_path, monkeypatch, capsys):
    """flags -> (exit status, the page or None, what was said)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        page = tmp_path / "data.html"
        status = main(["--output", str(page), *map(str, flags)])
        assert not (tmp_path / "output").exists() and not list(tmp_path.glob(".data.html*"))
        captured = capsys.readouterr()
        return (
            status,
            page.read_text(encoding="utf-8") if page.exists() else None,
            captured.out + captured.err,
        )

    return run


def segments(page):
    """(line of its record, text, marked text) of each segment on the page, markup removed."""
    for line, text in re.findall(
        r'<h3>[^<]*:(\d+): tokens [^<]*</h3><div class="text">(.*?)</div>', page, re.DOTALL
    ):
        marked = "".join(re.findall(r"<mark[^>]*>(.*?)</mark>", text, re.DOTALL))
        yield int(line), html.unescape(re.sub("<[^>]*>", "", text)), html.unescape(marked)


def test_a_row_of_the_sample(show, tmp_path):
    status, page, said = show("--max_seq_length", 64, "--row", 20, "--output_dir", tmp_path / "output")
    assert status == 0 and str(tmp_path / "data.html") in said
    records = [
        json.loads(line) for line in (SAMPLE / "instructions.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    found = list(segments(page))
    assert len(found) == 2
    for line, text, marked in found:
        record = records[line - 1]
        assert text == f"<s>{format_prompt(record['instruction'], record['context'])}{record['response']}</s>"
        assert marked == f"{record['response']}</s>"
        assert (
            page.count(html.escape(record["instruction"])) == page.count(html.escape(record["response"])) == 1
        )
    assert "train on 139 examples in 72 rows of 64 tokens" in page and "64 of 72 rows" in page
    assert (
        page.count('src="data:image/png;base64,') == page.count("src=") == 2
        and "http:" not in page
        and "https:" not in page
    )
    assert re.search(r"\d+ of 64 tokens are padding", page)


def test_records_cannot_write_markup(show, tmp_path):
    records = [
        {
            "prompt": "<script>alert('é')</script>\n & \"世界🙂\" ->",
            "completion": "  </div><mark>ünï</mark> {row} 🙂",
        },
        {"prompt": "<!-- a", "completion": "b -->"},
    ]
    file = tmp_path / "some<script>.jsonl"
    file.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    status, page, _ = show("--dataset", file, "--max_seq_length", 256, "--row", 0)
    assert status == 0 and "<script" not in page and "<!--" not in page
    expected = [
        (line, f"<s>{record['prompt']}{record['completion']}</s>", f"{record['completion']}</s>")
        for line, record in enumerate(records, 1)
    ]
    assert list(segments(page)) == expected
    # Overwritten, and with all trained but the first token of each example, which nothing predicts.
    status, page, _ = show("--dataset", file, "--max_seq_length", 256, "--train_on_prompt")
    assert [marked for _, _, marked in segments(page)] == [
        text.removeprefix("<s>") for _, text, _ in expected
    ]


def test_a_piece_of_a_split_document(show, tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"text": "One text that is much longer than a row. " * 4}))
    status, page, _ = show("--dataset", file, "--max_seq_length", 16, "--row", 1)
    ((_, text, marked),) = segments(page)
    assert status == 0 and "tokens 17 to 32 of " in page and "15 predicted" in page
    assert 0 < len(marked) < len(text) and text.endswith(marked)


@pytest.mark.parametrize("row", [72, -1])
def test_a_row_that_is_none(show, row):
    status, page, said = show("--max_seq_length", 64, "--row", row)
    assert status == 1 and page is None
    assert f"error: --row {row}: there are 72 rows to train on, so 0 to 71 was expected\n" in said


def test_what_training_refuses(show, tmp_path):
    status, page, said = show("--dataset", tmp_path / "none.jsonl")
    assert status == 1 and page is None and said.startswith("error: --dataset") and said.count("\n") == 1
    (tmp_path / "file").touch()
    status, _, said = show("--output", tmp_path / "file" / "page.html")
    assert status == 1 and "page.html cannot be written: Not a directory" in said


def test_runs_keep_every_character():
    tokenizer = load_tokenizer(SAMPLE / "tiny")
    ids = np.array(tokenizer("é世界🙂  two  spaces\n\t☃ 'n't ,")["input_ids"] + [tokenizer.eos_token_id])
    whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    for seed in range(20):
        marks = np.random.default_rng(seed).integers(0, 2, len(ids))
        assert "".join(text for text, _ in runs(ids, marks, tokenizer)) == whole and "\ufffd" not in whole


@pytest.mark.parametrize(
    "lengths, row, scales",
    [
        ([5], 8, ("linear", "linear")),
        ([1, 2, 3000], 64, ("log", "linear")),
        ([10] * 500 + [20], 32, ("linear", "log")),
    ],
)
def test_scales_of_the_histogram(lengths, row, scales):
    figure = draw_lengths(np.array(lengths), row)
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_yscale()) == scales
    assert sum(bar.get_height() for bar in axes.patches) == len(lengths)
    assert picture(figure).startswith("data:image/png;base64,")
