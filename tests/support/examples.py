"""Tokens made on the spot, without a tokenizer."""

from pathlib import Path

import numpy as np

from data.packing import Pieces, Rows
from data.tokens import Tokens


def tokens_of(examples, directory=Path("nowhere"), format_name="dolly"):
    """Tokens of [(ids, trained)], in which no two examples share a prompt."""
    offsets = np.cumsum([0, *(len(ids) for ids, _ in examples)])
    meta = {"format": format_name, "plain_text": format_name == "text"}
    return Tokens(
        np.concatenate([np.zeros(0), *(ids for ids, _ in examples)]).astype(np.int32),
        np.concatenate([np.zeros(0), *(trained for _, trained in examples)]).astype(bool),
        offsets.astype(np.int64),
        np.arange(len(examples), dtype=np.uint64),
        directory,
        meta,
    )


def rows_of(examples, groups, row_length, pad=0):
    """Rows of whole examples [(ids, trained)], `groups` of them a row."""
    tokens = tokens_of(examples)
    pieces = Pieces(np.zeros(len(examples), np.int64), tokens.offsets[:-1], tokens.offsets[1:])
    return Rows([tokens], pieces, groups, row_length, pad)
