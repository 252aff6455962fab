"""The page of one or more runs: a legend, curves, evaluations, answers, starts and flags."""

import html
import json
from collections.abc import Iterable
from dataclasses import fields

from tools.html_page import build_page
from tools.show_run.chart import Curve, draw
from tools.show_run.run import Run
from trainer.config import Config

COLOURS = 8  # of the style; a ninth run has the first again
STYLE = """:root { color-scheme: light dark; --text: #1c1e21; --back: #fff; --faint: #6b7280; --grid: #e3e5e8;
--box: #f6f7f9; --bad: #c62828; --mark: #b7791f;
--c0: #1f6feb; --c1: #d9480f; --c2: #2b8a3e; --c3: #9c36b5; --c4: #0c8599; --c5: #a61e4d; --c6: #5c6b00;
--c7: #5f3dc4 }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --back: #15181c; --faint: #9aa4b0;
--grid: #2c3138; --box: #1d2127; --bad: #ff7b72; --mark: #e3b341; --c0: #6cb0ff; --c1: #ff9f5a; --c2: #69db7c;
--c3: #e599f7; --c4: #66d9e8; --c5: #faa2c1; --c6: #d8e05a; --c7: #b197fc } }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 82em; margin: 1.5em auto; padding: 0 1em;
color: var(--text); background: var(--back) }
h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin: 1.8em 0 .5em }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(24em, 1fr)); gap: 1em }
figure { margin: 0; padding: .6em .6em .2em; background: var(--box); border-radius: 8px }
figcaption { font-weight: 600 } small { color: var(--faint); font-weight: 400 }
svg { width: 100%; height: auto; display: block } svg text { font-size: 12px; fill: var(--faint) }
.grid { stroke: var(--grid) } .curve { fill: none; stroke-width: 1.6; stroke-linejoin: round }
.faint { opacity: .25; stroke-width: 1 }
.restart { fill: none; stroke-dasharray: 4 4; stroke-width: 1.2 } .compiled { fill: var(--mark) }
.cross { stroke: var(--bad); stroke-width: 1.8; fill: none }
table { border-collapse: collapse; margin: .4em 0; display: block; overflow-x: auto }
td, th { padding: .25em .7em; text-align: left;
vertical-align: top; border-bottom: 1px solid var(--grid) } th { white-space: nowrap }
.number { font-variant-numeric: tabular-nums } .text { white-space: pre-wrap;
font-family: ui-monospace, monospace; font-size: .9em; overflow-wrap: anywhere }
.changed { background: var(--box); font-weight: 600 }
td:has(.swatch) { white-space: nowrap }
.swatch { display: inline-block; width: 1.6em; height: .35em; vertical-align: middle; margin-right: .5em }
details { margin: .5em 0 } summary { cursor: pointer }
""" + "\n".join(
    f"circle.c{n} {{ fill: var(--c{n}) }} path.c{n} {{ stroke: var(--c{n}) }} "
    f".swatch.c{n} {{ background: var(--c{n}) }}"
    for n in range(COLOURS)
)

# (key of metrics.jsonl, title, unit, whether it is clipped); other keys with numbers follow as they are.
CHARTS = (
    ("loss", "Loss", "of a step: mean per target token, or per pair", False),
    ("eval_loss", "Evaluation loss", "of held-out rows", False),
    ("grad_norm", "Gradient norm", "before clipping", True),
    ("learning_rate", "Learning rate", "", False),
    ("tokens_per_second", "Tokens per second", "of all ranks, without padding", True),
    ("mfu", "MFU", "share of the devices' peak", True),
    ("step_seconds", "Seconds of a step", "", True),
    ("host_seconds", "Host seconds of a step", "rank 0, in mark_step", True),
    ("data_wait_seconds", "Waiting for data", "seconds of a step", True),
    ("save_stall_seconds", "Waiting for a save", "seconds of a step", False),
    ("host_memory_bytes", "Host memory", "bytes, process of rank 0", True),
    ("device_memory_bytes", "Device memory", "bytes in use on rank 0", True),
)
UNITS = {"target_tokens", "pairs"}
NO_CHART = {"step", "epoch", "compilations", "perplexity", "device_memory_peak_bytes", *UNITS}


def build(runs: list[Run]) -> str:
    """The HTML of the page."""
    body = [
        _table(
            ["run", "", "loss", "evaluation loss", "trained", "ranks", "directory"],
            map(_row, runs, _numbers(runs)),
        ),
        "<p><small>A dashed line is a restart, a triangle above a chart a step by which graphs were compiled "
        "anew, a cross a value that is not finite. Points show their values under the mouse; a long curve is "
        "the median of neighbouring steps, before all values.</small></p>",
        '<div class="charts">',
        *(_chart(runs, *chart) for chart in (*CHARTS, *_others(runs))),
        "</div>",
        *_evaluations(runs),
        *_answers(runs),
        *_starts(runs),
        *_flags(runs),
    ]
    return build_page(" · ".join(run.name for run in runs), STYLE, "\n".join(body))


def _numbers(runs: list[Run]) -> list[int]:
    return [number % COLOURS for number in range(len(runs))]


def _row(run: Run, number: int) -> list[str]:
    """A run's row in the legend."""
    start, last = run.starts[-1] if run.starts else {}, run.metrics[-1] if run.metrics else {}
    evaluation = run.evaluations[-1] if run.evaluations else {}
    trained = ""
    if start:
        share = start["trained_parameters"] / start["parameters"]
        trained = f"{start['trained_parameters']:,} of {start['parameters']:,} parameters ({share:.2%})"
    unread = f"; {run.unread} lines could not be read" if run.unread else ""
    return [
        f'<span class="swatch c{number}"></span>{html.escape(run.name)}',
        html.escape(run.state + unread),
        _value(last.get("loss")) if last else "",
        _value(evaluation.get("eval_loss")) if evaluation else "",
        trained,
        html.escape(f"{start['world_size']} x {start['device']}") if start else "",
        html.escape(str(run.path)),
    ]


def _chart(runs: list[Run], key: str, title: str, unit: str, clips: bool) -> str:
    curves = []
    for number, run in zip(_numbers(runs), runs, strict=True):
        lines = run.evaluations if key == "eval_loss" else run.metrics
        points = [(line["step"], _finite(line[key])) for line in lines if key in line]
        if any(value is not None for _, value in points) or key in ("loss", "eval_loss"):
            curves.append(Curve(run.name, number, points, run.restarts, run.recompilations))
    return draw(title, curves, unit, clips)


def _others(runs: list[Run]) -> list[tuple[str, str, str, bool]]:
    """Charts of figures that are not in CHARTS: those that someone has added to trainer/objective.py."""
    known = {key for key, *_ in CHARTS} | NO_CHART
    keys = dict.fromkeys(key for run in runs for line in run.metrics[-1:] for key in line if key not in known)
    return [(key, key, "", False) for key in keys]


def _evaluations(runs: list[Run]) -> Iterable[str]:
    columns = {
        "step": "step",
        "epoch": "epoch",
        "eval_loss": "loss",
        "perplexity": "perplexity",
        "eval_rewards/accuracies": "accuracy",
        "eval_rewards/margins": "margin",
        "target_tokens": "target tokens",
        "pairs": "pairs",
    }
    lines = [(run.name, line) for run in runs for line in run.evaluations]
    columns = {key: head for key, head in columns.items() if any(key in line for _, line in lines)}
    if lines:
        yield "<h2>Evaluations</h2>"
        yield _table(
            ["run", *columns.values()],
            [
                [html.escape(name), *(_value(line[key]) if key in line else "" for key in columns)]
                for name, line in lines
            ],
        )


def _answers(runs: list[Run]) -> Iterable[str]:
    """Each prompt once, with the answers to it."""
    found = {}
    for run in runs:
        for sample in run.samples:
            question = str(sample.get("prompt")), str(sample.get("expected"))
            found.setdefault(question, []).append((run.name, sample["step"], str(sample.get("answer"))))
    if found:
        yield "<h2>Answers</h2>"
    for number, ((prompt, expected), answers) in enumerate(found.items()):
        rows = [[html.escape(name), _value(step), _text(answer)] for name, step, answer in answers]
        rows.append(["expected", "", _text(expected)])
        yield f"<details{'' if number else ' open'}><summary>{_text(prompt)}</summary>"
        yield _table(["run", "step", "answer"], rows) + "</details>"


def _starts(runs: list[Run]) -> Iterable[str]:
    rows = [
        [
            html.escape(run.name),
            html.escape(str(start.get("time"))),
            _value(start["step"]),
            html.escape(", ".join(f"{name} {number}" for name, number in start.get("versions", {}).items())),
        ]
        for run in runs
        for start in run.starts
    ]
    if rows:
        yield "<h2>Starts</h2>" + _table(["run", "time", "after step", "versions"], rows)


def _flags(runs: list[Run]) -> Iterable[str]:
    """The flags that are not at their default in a run, then all of them."""
    runs = [run for run in runs if run.starts]
    if not runs:
        return
    defaults = {each.name: each.default for each in fields(Config)}
    names = list(dict.fromkeys(name for run in runs for name in run.flags))
    given = [name for name in names if any(run.flags.get(name) != defaults.get(name) for run in runs)]
    yield "<h2>Configuration</h2>" + _flag_table(runs, given)
    yield f"<details><summary>all {len(names)} flags</summary>{_flag_table(runs, names)}</details>"


def _flag_table(runs: list[Run], names: list[str]) -> str:
    rows = []
    for name in names:
        values = [json.dumps(run.flags.get(name), ensure_ascii=False).strip('"') for run in runs]
        kind = "changed" if len(set(values)) > 1 else ""
        rows.append([f"--{html.escape(name)}", *(_cell(html.escape(value), kind) for value in values)])
    return _table(["flag", *(html.escape(run.name) for run in runs)], rows)


def _table(heads: list[str], rows: Iterable[list[str]]) -> str:
    """A table of cells that are HTML."""
    lines = ["".join(cell if cell.startswith("<td") else _cell(cell) for cell in row) for row in rows]
    head = "".join(f"<th>{each}" for each in heads)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _cell(content: str, kind: str = "") -> str:
    return f'<td class="{kind}">{content}' if kind else f"<td>{content}"


def _value(value) -> str:
    """A cell with a number; null is one that is not finite."""
    number = _finite(value)
    text = "not finite" if number is None else f"{value:,}" if isinstance(value, int) else f"{value:.5g}"
    return _cell(text, "number")


def _text(text: str) -> str:
    return f'<span class="text">{html.escape(text)}</span>'


def _finite(value) -> float | None:
    return value if isinstance(value, int | float) else None
