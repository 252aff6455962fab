"""The comparison with transformers runs, and its sides agree."""

import re

import pytest

from tests.support.models import save_llama
from tests.support.runs import start

pytestmark = pytest.mark.process


def test_both_sides_answer_alike(tmp_path):
    save_llama(tmp_path, num_hidden_layers=1)
    said = start(
        "--model",
        tmp_path,
        "--batch_size",
        8,
        "--max_new_tokens",
        4,
        "--rounds",
        1,
        program=("-m", "tools.bench_generate"),
        forked=False,
    ).stdout
    assert "20 of 20 answers equal" in said
    tokens, theirs = (
        float(re.search(rf"{side} +([\d.]+) tokens/s", said)[1]) for side in ("markstep", "transformers")
    )
    assert tokens > 0 and theirs > 0 and re.search(r", [23] graphs", said)
