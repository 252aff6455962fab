"""What a model will be trained on, as a page for a browser: how long the examples are, the packed rows, and
the text of one row.

    python -m tools.show_data --model_id DIR --dataset FILE ... [--output show_data.html] [--row 0]

The tool takes every flag of trainer/main.py and reads the data by its code, so it shows what the same flags
train on. The page is one file, which loads nothing. The exit status is 1 where training would refuse the
data, or there is no such row.
"""

import base64
import html
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.packing import Rows
from data.tokens import IGNORED
from model.config import ModelConfig
from model.weights.hub import resolve
from tools import cli
from tools.extras import require
from tools.html_page import build_page, write_file
from trainer.config import parse
from trainer.dataset import build_rows
from trainer.prompts import keep_date
from trainer.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_ROWS = 64
PALETTE = ("#1f77b4", "#d95f02", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#c2187c", "#a08a00", "#008b9a")
TRAINED, SPECIAL = 1, 2  # bits of a token's mark
STYLE = """body { font-family: sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222; \
background: #fff }
img { max-width: 100% }  h3 { font-size: .85em; font-weight: normal; margin: 0 0 .4em }
.text, pre { white-space: pre-wrap; overflow-wrap: anywhere; font-family: monospace; margin: 0 }
.segment { border-left: .5em solid; padding-left: .8em; margin: 1.2em 0 }
span { color: #777 }  mark { color: #000; background: #ffe08a; font-weight: bold }  \
.special { outline: 1px solid #999 }"""
BODY = """<pre>{summary}</pre>
<h2>Lengths of the examples</h2>
<p>In tokens, as they are in the data: before they are cut to the row, and with those held out.</p>
<img alt="histogram of lengths" src="{histogram}">
<h2>Rows</h2>
<p>{shown} of {count} rows, in the order of packing, which training shuffles. \
A colour is an example, dark where tokens are
predicted, light where they are only read; white is padding.</p>
<img alt="rows by example" src="{bars}">
<h2>Row {row}</h2>
<p><mark>predicted: trained on</mark> <span>read, not predicted</span> \
<span class="special">special token</span></p>
{segments}
<p>{padding} of {row_length} tokens are padding.</p>"""


def trained_tokens(row: dict[str, np.ndarray]) -> np.ndarray:
    """bool [row_length]: the tokens that are some position's target.

    Labels are shifted, so a row's first token is never one.
    """
    return np.concatenate([[False], row["labels"][:-1] != IGNORED])


def draw_lengths(lengths: np.ndarray, row_length: int) -> "Figure":
    """A histogram of lengths [examples], on logarithmic scales where lengths or counts are far apart."""
    from matplotlib.figure import Figure

    shortest, longest, median = int(lengths.min()), int(lengths.max()), float(np.median(lengths))
    wide = max(longest, row_length) > 10 * median
    # Whole steps: bins that hold one length more than their neighbours would look like a comb.
    step = -(-(longest + 1 - shortest) // 60)
    edges = np.arange(shortest, longest + 1 + step, step)
    if wide:
        edges = np.unique(np.rint(np.geomspace(shortest, longest + 1, 60)))
    axes = (figure := Figure(figsize=(10, 3.5), layout="constrained")).subplots()
    counts, *_ = axes.hist(lengths, bins=edges - 0.5, color="#7f9fbf")
    if wide:
        axes.set_xscale("log")
    if counts.max() > 100 * counts[counts > 0].min():
        axes.set_yscale("log")
    for name, value, colour, style in (
        ("median", median, "#2ca02c", "-"),
        ("mean", float(lengths.mean()), "#d95f02", "--"),
        ("longest", longest, "#9467bd", "-."),
        ("row", row_length, "black", ":"),
    ):
        axes.axvline(value, color=colour, linestyle=style, label=f"{name} {value:,.1f}".removesuffix(".0"))
    axes.set(xlabel="tokens", ylabel="examples")
    figure.legend(loc="outside right upper")
    return figure


def draw_rows(rows: list[dict[str, np.ndarray]]) -> "Figure":
    """Rows as horizontal bars; each of their arrays is [row_length]."""
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure

    dark = np.array([[1, 1, 1], *map(to_rgb, PALETTE)])
    # [trained or not, padding and palette, RGB]
    colours = (255 * np.stack([dark, 0.3 * dark + 0.7])).astype(np.uint8)
    image = np.stack([colours[1 - trained_tokens(row), colour_of(row["segment_ids"])] for row in rows])
    figure = Figure(figsize=(10, 1 + 0.16 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(image, aspect="auto", extent=(0, image.shape[1], len(rows) - 0.5, -0.5))
    axes.hlines(np.arange(len(rows) - 1) + 0.5, 0, image.shape[1], colors="white", linewidth=1)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="token", ylabel="row")
    return figure


def colour_of(segment):
    """The index in (padding, *PALETTE) of each segment number; segments count from 1, padding is 0."""
    return np.where(segment, (segment - 1) % len(PALETTE) + 1, 0)


def picture(figure: "Figure") -> str:
    """The figure as a PNG in a data URL."""
    figure.savefig(png := io.BytesIO(), format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def runs(ids: np.ndarray, marks: np.ndarray, tokenizer) -> Iterator[tuple[str, int]]:
    """(text, mark) of each stretch of equal marks [tokens] in ids [tokens].

    The texts together are the text of all ids. A token by itself would lose its space, or be part of a
    character, so it is always ids[:n] that are decoded. A character in two stretches goes to the later one.
    """

    def decode(count):
        return tokenizer.decode(
            ids[:count].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    whole, start = decode(len(ids)), 0
    for end in [*np.flatnonzero(marks[1:] != marks[:-1]) + 1, len(ids)]:
        stop = max(start, len(os.path.commonprefix([whole, decode(end)])))
        if stop > start:
            yield whole[start:stop], int(marks[end - 1])
        start = stop


def write_text(ids: np.ndarray, trained: np.ndarray, tokenizer) -> str:
    """The HTML of a segment's text, from its ids [tokens] and which of them are trained [tokens]."""
    special = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]
    text = []
    for part, mark in runs(ids, TRAINED * trained + SPECIAL * np.isin(ids, special), tokenizer):
        tag, shown_as = "mark" if mark & TRAINED else "span", " class=special" if mark & SPECIAL else ""
        text.append(f"<{tag}{shown_as}>{html.escape(part)}</{tag}>")
    return "".join(text)


def write_segments(rows: Rows, index: int, tokenizer) -> Iterator[str]:
    """The HTML of each segment of row `index`: the record it comes from, and its text."""
    row = rows.row(index)
    for segment, piece in enumerate(rows.groups[index], 1):
        here = row["segment_ids"] == segment
        ids, trained = row["input_ids"][here], trained_tokens(row)[here]
        source, start = rows.tokens[rows.pieces.source[piece]], rows.pieces.start[piece]
        example = int(np.searchsorted(source.offsets, start, side="right")) - 1
        first, length = (
            start - source.offsets[example] + 1,
            source.offsets[example + 1] - source.offsets[example],
        )
        position = f"tokens {first} to {first + len(ids) - 1} of {length}"
        title = f"{segment}. {source.where(example)}: {position}, {trained.sum()} predicted"
        yield (
            f'<div class="segment" style="border-color: {PALETTE[colour_of(segment) - 1]}">'
            f"<h3>{html.escape(title)}</h3>"
            f'<div class="text">{write_text(ids, trained, tokenizer)}</div></div>'
        )


def write_page(rows: Rows, index: int, summary: str, tokenizer) -> str:
    """The page, with the text of row `index`; raises ValueError where there is no such row."""
    if not 0 <= index < len(rows):
        raise ValueError(
            f"--row {index}: there are {len(rows)} rows to train on, so 0 to {len(rows) - 1} was expected"
        )
    lengths = np.concatenate([np.diff(source.offsets) for source in rows.tokens])
    padding = int((rows.row(index)["segment_ids"] == 0).sum())
    first = [rows.row(number) for number in range(min(len(rows), SHOWN_ROWS))]
    body = BODY.format(
        summary=html.escape(summary),
        shown=len(first),
        count=len(rows),
        row=index,
        padding=padding,
        histogram=picture(draw_lengths(lengths, rows.row_length)),
        bars=picture(draw_rows(first)),
        segments="\n".join(write_segments(rows, index, tokenizer)),
        row_length=rows.row_length,
    )
    return build_page("Training data", STYLE, body, images=True)


def main(arguments: list[str] | None = None) -> int:
    parser = cli.parser("show_data", __doc__, trainer_flags=True)
    parser.epilog = "All other flags are those of trainer/main.py; its --help explains them."
    parser.add_argument(
        "--output", type=cli.path, default=Path("show_data.html"), help="the page; default show_data.html"
    )
    parser.add_argument(
        "--row", type=int, default=0, help="the row whose text is shown; default 0, the first"
    )
    chosen, others = parser.parse_known_args(arguments)
    config = parse(others)
    try:
        require("matplotlib")
        directory = resolve(config.model_directory)
        model_config, tokenizer = ModelConfig.from_pretrained(directory), load_tokenizer(directory)
        keep_date(tokenizer)
        rows, _, summary = build_rows(config, tokenizer, model_config)
        write_file(chosen.output, write_page(rows, chosen.row, summary, tokenizer))
    except ValueError as error:
        return cli.fail(error)
    print(chosen.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
