"""tools.evaluate: losses and answers against transformers', and a page that hostile text cannot break."""

import json
import math
from html.parser import HTMLParser

import pytest
import torch
import torch.nn.functional as F

from tests.model.test_generation import asked, save_lora
from tests.support.runs import start
from tools.evaluate.report import score, write_page
from tools.merge_checkpoint.merging import merge

HOSTILE = "</td><script>alert(1)</script> & \"'{}"
RECORDS = [
    {"instruction": HOSTILE, "response": "Yes."},
    {"instruction": "Two?", "context": "It is 3.", "response": HOSTILE},
    {"instruction": "Three?", "response": "Drei, natürlich."},
]


def test_scores():
    from rouge_score.rouge_scorer import RougeScorer

    plain = RougeScorer(["rougeL"])
    for expected, answer in (
        ("The capital is Paris.", "Paris is the capital"),
        ("a b c d e", "a c e f"),
        ("yes", "no"),
        ("a", ""),
    ):
        assert score(expected, answer)["rouge_l"] == plain.score(expected, answer)["rougeL"].fmeasure
    assert score(" Paris.\n", "Paris.")["exact_match"] and not score("Paris.", "paris.")["exact_match"]
    assert score("Как дела", "как дела?")["rouge_l"] == 1 and score("größer", "kleiner")["rouge_l"] == 0


class Tags(HTMLParser):
    """The elements of a page and the text in them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_hostile_texts_as_text():
    record = {
        "where": HOSTILE,
        "prompt": HOSTILE,
        "expected": HOSTILE,
        "answers": {HOSTILE: score(HOSTILE, HOSTILE)},
    }
    totals = {HOSTILE: {"loss": 1.0, "perplexity": math.e, "exact_match": 1.0, "rouge_l": 0.5}}
    page = Tags(write_page(totals, [record, record], [HOSTILE]))
    assert "script" not in page.tags and page.text.count(HOSTILE) == 1 + 1 + 2 * 5
    assert page.tags.count("table") == 3 and "100.0%" in page.text and "2.718" in page.text


@pytest.mark.process
def test_base_checkpoint_and_merged_model(tmp_path):
    """Every number and answer is that of transformers, and the two forms of the trained model agree."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint, data = save_lora(tmp_path), tmp_path / "data.jsonl"
    merge(checkpoint, tmp_path / "merged")
    data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    names = [f"base of {checkpoint}", str(checkpoint), str(tmp_path / "merged")]
    said = start(
        "--base",
        "--checkpoint",
        checkpoint,
        "--model",
        tmp_path / "merged",
        "--dataset",
        data,
        "--max_seq_length",
        160,
        "--max_new_tokens",
        8,
        "--tensor_parallel_size",
        2,
        "--output",
        tmp_path / "page",
        program=("-m", "tools.evaluate"),
        forked=False,
    )
    lines = [json.loads(line) for line in (tmp_path / "page" / "answers.jsonl").read_text().splitlines()]
    assert [line["where"] for line in lines] == [f"{data}:{number}" for number in (1, 2, 3)]
    assert [line["expected"] for line in lines] == [record["response"] for record in RECORDS]
    assert all(list(line["answers"]) == names for line in lines)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    for name, directory in zip(names, ("base", "merged", "merged"), strict=True):
        reference, total, targets = AutoModelForCausalLM.from_pretrained(tmp_path / directory).eval(), 0.0, 0
        for line in lines:
            prompt = tokenizer(line["prompt"])["input_ids"]
            answer = tokenizer(line["expected"], add_special_tokens=False)["input_ids"] + [
                tokenizer.eos_token_id
            ]
            with torch.no_grad():
                logits = reference(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
            total += F.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
            targets += len(answer)
            expected = asked(reference, prompt, 8, tokenizer.eos_token_id)
            assert line["answers"][name]["answer"] == tokenizer.decode(expected, skip_special_tokens=True)
        [shown] = [line for line in said.stdout.splitlines() if line.startswith(f"{name}: loss")]
        assert float(shown.split("loss ")[1].split(",")[0]) == pytest.approx(total / targets, rel=1e-3)
    assert HOSTILE in Tags((tmp_path / "page" / "index.html").read_text()).text
