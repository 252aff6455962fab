"""Score the answers of models, and write what was found as JSON lines and as a page for a browser.

Of an answer, exact match ignores white space around it. ROUGE-L (https://aclanthology.org/W04-1013) is the
F-measure of rouge-score, here of words in Unicode's sense, case ignored.
"""

import html
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tools.html_page import build_page, write_file

STYLE = """body { font-family: sans-serif; max-width: 90em; margin: 2em auto; padding: 0 1em; color: #222; \
background: #fff }
table { border-collapse: collapse; width: 100%; table-layout: fixed; margin: .6em 0 2em }
th, td { border: 1px solid #bbb; padding: .4em .6em; text-align: left; vertical-align: top; \
overflow-wrap: anywhere }
.text { white-space: pre-wrap; font-family: monospace }  .number { text-align: right }
.exact { background: #d8f0d8 }  small { color: #666 }  \
h3 { font-size: .9em; font-weight: normal; margin: 0 }"""
BODY = """<p>{count} examples of {datasets}; green answers are the expected ones, word for word.</p>
<table><tr><th>model{columns}</tr>
{totals}
</table>
{answers}"""


# Names of a model's figures -> (the head of their column, their format).
COLUMNS = {
    "loss": ("loss", ".4f"),
    "perplexity": ("perplexity", ".4g"),
    "preferred": ("prefers the chosen answer", ".1%"),
    "preferred_more": ("more than the first model", ".1%"),
    "exact_match": ("exact match", ".1%"),
    "rouge_l": ("ROUGE-L", ".3f"),
}


class Measured(NamedTuple):
    """Of one model: the loss per target token, its answers, and of preference pairs the log-probability of
    each answer, fp32 [2 x pairs]."""

    loss: float
    answers: list[str]
    logps: np.ndarray | None = None


def loss_of_chosen(rows, logps: np.ndarray) -> float:
    """The loss per target token of the chosen answers, whose log-probabilities are every second one."""
    pieces, targets = rows.pieces, 0
    for source, start, stop in zip(pieces.source[::2], pieces.start[::2], pieces.stop[::2], strict=True):
        targets += int(
            rows.tokens[source].trained[start + 1 : stop].sum()
        )  # nothing predicts the first token
    return -float(logps[::2].sum(dtype=np.float64)) / targets


def preferences(logps: np.ndarray | None, first: np.ndarray | None) -> dict[str, float]:
    """The share of pairs whose chosen answer is the more probable one; and that in which it is more so than
    under the first model: DPO's reward accuracy with that one as the reference."""
    if logps is None:
        return {}
    margins, reference = (each[::2] - each[1::2] for each in (logps, first))
    found = {"preferred": float((margins > 0).mean())}
    return found if logps is first else found | {"preferred_more": float((margins > reference).mean())}


class Words:
    """A tokenizer for rouge-score, whose own keeps only a-z and 0-9: nothing is left of other scripts."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def score(expected: str, answer: str) -> dict:
    """exact_match (bool) and rouge_l (0 to 1) of an answer."""
    from rouge_score.rouge_scorer import RougeScorer

    scores = RougeScorer(["rougeL"], tokenizer=Words()).score(expected, answer)
    return {
        "answer": answer,
        "exact_match": answer.strip() == expected.strip(),
        "rouge_l": scores["rougeL"].fmeasure,
    }


def summarise(loss: float, scores: list[dict], preferred: dict[str, float]) -> dict:
    """A model's loss and perplexity, what it prefers, and the means of its answers' scores."""
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        **preferred,
        "exact_match": sum(each["exact_match"] for each in scores) / len(scores),
        "rouge_l": sum(each["rouge_l"] for each in scores) / len(scores),
    }


def write_page(totals: dict[str, dict], records: list[dict], datasets: list[str]) -> str:
    """The page of the models' summaries, and of the records that answers.jsonl has."""
    columns = {key: value for key, value in COLUMNS.items() if any(key in each for each in totals.values())}
    lines = []
    for name, each in totals.items():
        cells = "".join(
            f'<td class="number">{format(each[key], style) if key in each else ""}'
            for key, (_, style) in columns.items()
        )
        lines.append(f"<tr><td>{html.escape(name)}{cells}</tr>")
    body = BODY.format(
        count=len(records),
        datasets=html.escape(", ".join(datasets)),
        columns="".join(f"<th>{head}" for head, _ in columns.values()),
        totals="\n".join(lines),
        answers="\n".join(write_record(record) for record in records),
    )
    return build_page("Models side by side", STYLE, body)


def write_record(record: dict) -> str:
    """The HTML of one example: its prompt, the expected answer, and each model's answer with its score."""
    head = "".join(f"<th>{html.escape(name)}" for name in ("prompt", "expected", *record["answers"]))
    texts = "".join(f'<td class="text">{html.escape(record[name])}' for name in ("prompt", "expected"))
    for each in record["answers"].values():
        kind = "text exact" if each["exact_match"] else "text"
        texts += f'<td class="{kind}">{html.escape(each["answer"])}'
        texts += f"\n<small>ROUGE-L {each['rouge_l']:.2f}</small>"
    return f"<h3>{html.escape(record['where'])}</h3><table><tr>{head}</tr><tr>{texts}</tr></table>"


def write_results(output: Path, sources: list, measured: dict, rows, questions, datasets: list[str]) -> None:
    """Write answers.jsonl and index.html to `output`, and print a line a model.

    `measured`: {name of a source: what was found}.
    """
    records, totals, tokenizer = [], {}, sources[0].tokenizer
    for each in questions:
        prompt, expected = (
            tokenizer.decode(ids, skip_special_tokens=True) for ids in (each.prompt, each.expected)
        )
        where = rows.tokens[each.source].where(each.example)
        records.append({"where": where, "prompt": prompt, "expected": expected, "answers": {}})
    for source in sources:
        loss, answers, logps = measured[source.name]
        scores = [score(record["expected"], answer) for record, answer in zip(records, answers, strict=True)]
        for record, each in zip(records, scores, strict=True):
            record["answers"][source.name] = each
        first = measured[sources[0].name].logps
        totals[source.name] = summarise(loss, scores, preferences(logps, first))
        line = ", ".join(
            f"{name.replace('_', ' ')} {value:.4g}" for name, value in totals[source.name].items()
        )
        print(f"{source.name}: {line}")
    write_file(
        output / "answers.jsonl", "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    )
    write_file(output / "index.html", write_page(totals, records, datasets))
    print(output / "index.html")
