"""The rows that a configuration trains on and evaluates with, and the report of them."""

import hashlib

import numpy as np

from data.packing import Rows, pack
from data.selection import cut, split, weigh
from data.tokens import NAMED, cache_directory, tokenize
from model.config import ModelConfig
from trainer.config import Config


def build_rows(config: Config, tokenizer, model_config: ModelConfig) -> tuple[Rows, Rows | None, str]:
    """(rows to train on, rows held out or None, what to say of them).

    Raises ValueError for a record that cannot be used, and where nothing is left to train or to evaluate.
    """
    if config.max_seq_length > model_config.max_position_embeddings:
        raise ValueError(
            f"--max_seq_length {config.max_seq_length} is more than the model's positions "
            f"(max_position_embeddings {model_config.max_position_embeddings})"
        )
    cache = cache_directory(config.data_cache_dir)
    tokens = [
        tokenize(
            name,
            tokenizer,
            format_name=config.format,
            train_on_prompt=config.train_on_prompt,
            max_samples=config.max_samples,
            skip_bad=config.skip_bad,
            streaming=config.streaming,
            cache=cache,
        )
        for name in config.datasets
    ]
    highest = max(int(source.input_ids.max()) for source in tokens)
    if highest >= model_config.vocab_size:
        raise ValueError(
            f"the tokenizer gives token {highest}, and the model's vocabulary has {model_config.vocab_size}: "
            "tokenizer and model do not belong together"
        )
    chosen, held_out = [np.arange(len(source)) for source in tokens], None
    if config.do_eval:
        chosen, held_out = split(tokens, config.validation_split_percentage, config.seed)
    chosen = weigh(chosen, config.dataset_weights or [1.0] * len(tokens), config.seed)
    pad = tokenizer.pad_token_id
    if pad is None or pad >= model_config.vocab_size:  # what pads is never looked at, but it is embedded
        pad = tokenizer.eos_token_id
    said = []
    for name, source in zip(config.datasets, tokens, strict=True):
        guessed = " (guessed from its fields)" if source.meta["guessed"] else ""
        said.append(f"data: {name}: {len(source)} examples, format {source.meta['format']}{guessed}")
        if source.meta["skipped"]:
            said.append(
                f"data: {name}: {source.meta['skipped']} records skipped: {'; '.join(source.meta['named'])}"
            )

    def rows(examples, what):
        """`what`: train or evaluate."""
        pieces, lost = cut(tokens, examples, config.max_seq_length, config.long_examples)
        places = [tokens[source].where(number) for source, number in lost.without_target[:NAMED]]
        if places and not config.skip_bad:
            raise ValueError(
                f"{places[0]}: no target token is left within --max_seq_length {config.max_seq_length} "
                f"({len(lost.without_target)} such examples): raise it, pass --long_examples split, or leave them "
                "out by --skip_bad"
            )
        if not len(pieces.lengths):
            raise ValueError(
                f"no example has a target token within --max_seq_length {config.max_seq_length}: nothing is left to "
                f"{what}"
            )
        groups = (
            pack(pieces.lengths.tolist(), config.max_seq_length)
            if config.packing
            else [[index] for index in range(len(pieces.lengths))]
        )
        made = Rows(tokens, pieces, groups, config.max_seq_length, pad)
        padded = len(pieces.lengths) / len(made)
        said.append(
            f"{what} on {sum(map(len, examples))} examples in {len(made)} rows of {config.max_seq_length} tokens, "
            f"{made.efficiency:.1%} filled (an example a row would take {padded:.1f} times as many); {lost.examples} "
            f"longer than a row, {lost.tokens} tokens cut off, {len(lost.without_target)} left out without a target"
            + "".join(f"; {where}" for where in places)
        )
        return made

    train = rows(chosen, "train")
    return train, rows(held_out, "evaluate") if held_out is not None else None, "\n".join(said)


def fingerprint(rows: Rows) -> str:
    """A hash of the rows: of their tokens, of what trains, and of their order."""
    digest = hashlib.sha256(f"{rows.row_length} {rows.groups}".encode())
    for source in rows.tokens:
        digest.update(source.input_ids)
        digest.update(source.trained)
    for array in (rows.pieces.source, rows.pieces.start, rows.pieces.stop):
        digest.update(array)
    return digest.hexdigest()
