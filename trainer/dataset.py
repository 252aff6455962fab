"""The rows that a configuration trains on and evaluates with, and a summary of them."""

import hashlib
from dataclasses import replace

import numpy as np

from data.dates import pinned_date
from data.packing import Rows, pack
from data.selection import Chosen, cut, fit_pairs, split, weigh
from data.tokens import CHAT, NAMED, Tokens
from model.config import ModelConfig
from parallel.runtime import Peers, meet
from trainer.config import Config
from trainer.start.tokens import tokens_of


def check_row_length(config: Config, model_config: ModelConfig) -> None:
    """Raise ValueError where the model has fewer positions than a row has tokens."""
    if config.max_seq_length > model_config.max_positions:
        raise ValueError(
            f"--max_seq_length {config.max_seq_length} is more than the model's positions "
            f"({model_config.positions_field} {model_config.max_positions})"
        )


def build_rows(
    config: Config, tokenizer, model_config: ModelConfig, peers: Peers | None = None
) -> tuple[Rows, Rows | None, str]:
    """(training rows, held-out rows or None, summary): the data sets as rows of --max_seq_length tokens.

    `peers` (default: this process's) share the work of making the tokens. Raises ValueError for a record that
    cannot be used, and where nothing is left to train or to evaluate.
    """
    check_row_length(config, model_config)
    sources = tokens_of(config, tokenizer, peers or meet())
    _check_vocabulary(sources, model_config.vocab_size)
    chosen, held_out = [np.arange(len(source)) for source in sources], None
    if config.do_eval:
        chosen, held_out = split(sources, config.validation_split_percentage, config.seed)
    weights = config.dataset_weights or [1.0] * len(sources)
    chosen = weigh(chosen, weights, config.seed, config.trains_on_pairs)
    pad = _pad_token(tokenizer, model_config.vocab_size)
    summary = _describe_sources(config.datasets, sources)
    date = pinned_date(tokenizer)
    if date and any(source.meta["prompts"] == CHAT for source in sources):
        summary.append(f"data: the chat template writes today's date: it stays {date} for this run")
    train_rows, line = _fill_rows(config, sources, chosen, pad, "train")
    summary.append(line)
    if held_out is None:
        return train_rows, None, "\n".join(summary)
    eval_rows, line = _fill_rows(config, sources, held_out, pad, "evaluate")
    summary.append(line)
    most = max(train_rows.segments, eval_rows.segments)  # one shape, so that they share a graph
    train_rows, eval_rows = (replace(rows, segments=most) for rows in (train_rows, eval_rows))
    return train_rows, eval_rows, "\n".join(summary)


def _check_vocabulary(sources: list[Tokens], vocab_size: int) -> None:
    """Raise ValueError where the model has no embedding for a token."""
    highest = max(int(source.input_ids.max()) for source in sources)
    if highest >= vocab_size:
        raise ValueError(
            f"the tokenizer gives token {highest}, and the model's vocabulary has {vocab_size}: "
            "tokenizer and model do not belong together"
        )


def _pad_token(tokenizer, vocab_size: int) -> int:
    """The token that fills rows. Nothing attends to it, but it is embedded, so the model must have it."""
    pad = tokenizer.pad_token_id
    return tokenizer.eos_token_id if pad is None or pad >= vocab_size else pad


def _describe_sources(names: list[str], sources: list[Tokens]) -> list[str]:
    """Lines of the summary on each data set: examples, format, skipped records, unread fields, warnings."""
    lines = []
    for name, source in zip(names, sources, strict=True):
        guessed = " (guessed from its fields)" if source.meta["guessed"] else ""
        found = f"{len(source) // 2} pairs" if source.meta.get("pairs") else f"{len(source)} examples"
        lines.append(f"data: {name}: {found}, format {source.meta['format']}{guessed}")
        if source.note:
            lines.append(f"data: {name}: {source.note}")
        if source.meta["skipped"]:
            problems = "; ".join(source.meta["named"])
            lines.append(f"data: {name}: {source.meta['skipped']} records skipped: {problems}")
        if unread := source.meta.get("unread"):
            lines.append(f"data: {name}: fields that are not read: {', '.join(unread)}")
        for warning, found in source.meta.get("warnings", {}).items():
            examples = f"{found['examples']} of {len(source)} examples, the first: {found['first']}"
            lines.append(f"warning: {name}: {warning} ({examples})")
    return lines


def _fill_rows(
    config: Config, sources: list[Tokens], examples: Chosen, pad: int, purpose: str
) -> tuple[Rows, str]:
    """(rows of the examples, a line of the summary on them). `purpose`: train or evaluate."""
    if config.trains_on_pairs:
        return _fill_rows_with_pairs(config, sources, examples, pad, purpose)
    row_length = config.max_seq_length
    pieces, lost = cut(sources, examples, row_length, config.long_examples)
    if lost.never_trained and not config.skip_bad:
        source, number = lost.never_trained[0]
        raise ValueError(
            f"{sources[source].where(number)}: the example has no target token "
            f"({len(lost.never_trained)} such examples; --skip_bad leaves such records out)"
        )
    count = len(pieces.lengths)
    if not count:
        raise ValueError(
            f"no example has a target token within --max_seq_length {row_length}: "
            f"nothing is left to {purpose} on; raise it, or pass --long_examples split"
        )
    groups = (
        pack(pieces.lengths.tolist(), row_length) if config.packing else [[piece] for piece in range(count)]
    )
    rows = Rows(sources, pieces, groups, row_length, pad)
    total = sum(map(len, examples))
    kept = total - len(lost.without_target)
    line = (
        f"{purpose} on {kept} examples in {len(rows)} rows of {row_length} tokens, "
        f"{rows.efficiency:.1%} filled (an example a row would take {count / len(rows):.1f} times as many); "
        f"{lost.examples} longer than a row, {lost.tokens} tokens cut off"
    )
    if lost.without_target:
        line += (
            f"\ndata: {len(lost.without_target)} of {total} examples to {purpose} on are left out: no target "
            f"token is within --max_seq_length {row_length}: {_positions(sources, lost.without_target)}"
        )
    return rows, line


def _fill_rows_with_pairs(
    config: Config, sources: list[Tokens], examples: Chosen, pad: int, purpose: str
) -> tuple[Rows, str]:
    """As _fill_rows, of preference pairs: both answers of a pair are in one row."""
    row_length = config.max_seq_length
    pieces, left_out = fit_pairs(sources, examples, row_length, config.long_examples == "refuse")
    pairs = len(pieces.lengths) // 2
    if not pairs:
        raise ValueError(
            f"no pair fits into --max_seq_length {row_length}: nothing is left to {purpose} on; raise it"
        )
    packed = [[pair] for pair in range(pairs)]
    if config.packing:
        packed = pack(pieces.lengths.reshape(-1, 2).sum(1).tolist(), row_length)
    groups = [[piece for pair in row for piece in (2 * pair, 2 * pair + 1)] for row in packed]
    rows = Rows(sources, pieces, groups, row_length, pad, segments=max(map(len, groups)))
    line = (
        f"{purpose} on {pairs} preference pairs in {len(rows)} rows of {row_length} tokens, "
        f"{rows.efficiency:.1%} filled, at most {rows.segments // 2} a row"
    )
    if left_out:
        line += (
            f"\ndata: {len(left_out)} of {pairs + len(left_out)} pairs to {purpose} on are left out: longer "
            f"than --max_seq_length {row_length} together: {_positions(sources, left_out)}"
        )
    return rows, line


def _positions(sources: list[Tokens], examples: list[tuple[int, int]]) -> str:
    """Where the first NAMED of the examples (source, number) are in their data sets."""
    named = dict.fromkeys(examples)  # --dataset_weights may repeat an example
    positions = [sources[source].where(number) for source, number in list(named)[:NAMED]]
    return "; ".join(positions) + (" ..." if len(named) > NAMED else "")


def fingerprint(rows: Rows) -> str:
    """A hash of the rows: of their tokens, of the labels and of the order."""
    digest = hashlib.sha256(f"{rows.row_length} {rows.groups}".encode())
    for source in rows.tokens:
        digest.update(source.input_ids)
        digest.update(source.trained)
    for array in (rows.pieces.source, rows.pieces.start, rows.pieces.stop):
        digest.update(array)
    return digest.hexdigest()
