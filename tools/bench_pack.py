"""Packing measured beside trl's: seconds, rows, and how full the rows are, for lengths such as dolly's.

    python -m tools.bench_pack [--examples 15000] [--row_length 2048] [--rounds 5] [--seed 0]

Each side gets the same examples in memory, which are cut to the row's length before. Ours returns the numbers
of each row's examples. trl packs a datasets.Dataset with the columns input_ids and labels, as its SFTTrainer
does, and moves the tokens. Sides called "and rows" also build the inputs of a step, one row at a time: by
data.packing.Rows, or by trl's padding-free collator.
"""

import os
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from data.packing import Pieces, Rows, pack
from data.tokens import IGNORED, Tokens
from tools import cli
from tools.example_lengths import draw_lengths


def draw(examples: int, row_length: int, seed: int) -> Tokens:
    """Examples of random tokens, cut to the row; the second half of each is trained on."""
    rng = np.random.default_rng(seed)
    lengths = draw_lengths(rng, examples)
    print(
        f"{examples} examples: median {np.median(lengths):.0f}, mean {lengths.mean():.0f}, longest "
        f"{lengths.max()} tokens"
    )
    lengths = np.minimum(lengths, row_length)
    offsets = np.append(0, lengths.cumsum())
    trained = np.arange(offsets[-1]) >= np.repeat(offsets[:-1] + lengths // 2, lengths)
    return Tokens(
        rng.integers(1, 8192, offsets[-1], np.int32),
        trained,
        offsets,
        np.zeros(examples, np.uint64),
        Path(),
        {},
    )


def our_sides(tokens: Tokens, row_length: int) -> dict[str, tuple]:
    """{name: (the function that is timed, the number of tokens in its result)} of our packing."""
    pieces = Pieces(np.zeros(len(tokens), np.int64), tokens.offsets[:-1], tokens.offsets[1:])

    def packing(build: bool) -> list[list[int]]:
        groups = pack(pieces.lengths.tolist(), row_length)
        rows = Rows([tokens], pieces, groups, row_length, pad_token_id=0) if build else []
        for index in range(len(rows)):
            rows.row(index)
        return groups

    def kept(groups: list[list[int]]) -> int:
        return int(pieces.lengths[np.concatenate(groups)].sum())

    return {"ours": (partial(packing, False), kept), "ours and rows": (partial(packing, True), kept)}


def trl_sides(tokens: Tokens, row_length: int) -> dict[str, tuple]:
    """The same as our_sides for trl: its default, which packs every 1000 examples, and all at once.

    Raises ImportError where trl is not installed.
    """
    # trl imports accelerate, which would take the XLA device.
    os.environ.update(USE_TORCH_XLA="0", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    import datasets
    import pyarrow
    import torch
    from trl import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    torch.set_num_threads(1)  # with more, trl is slower: its tensors are small
    print(
        "versions: "
        + ", ".join(f"{name} {version(name)}" for name in ("trl", "datasets", "pyarrow", "torch", "numpy"))
    )
    columns = {
        "input_ids": tokens.input_ids,
        "labels": np.where(tokens.trained, tokens.input_ids, IGNORED).astype(np.int64),
    }
    dataset = datasets.Dataset(
        pyarrow.table(
            {
                name: pyarrow.ListArray.from_arrays(tokens.offsets.astype(np.int32), values)
                for name, values in columns.items()
            }
        )
    )
    collate = DataCollatorForLanguageModeling(
        pad_token_id=0, padding_free=True, pad_to_multiple_of=row_length
    )

    def packing(strategy: str, batch: int | None = 1000, build: bool = False) -> datasets.Dataset:
        packed = pack_dataset(
            dataset, row_length, strategy, {"batch_size": batch, "load_from_cache_file": False}
        )
        for index in range(len(packed) if build else 0):
            collate([packed[index]])
        return packed

    def kept(packed: datasets.Dataset) -> int:
        return sum(map(len, packed.with_format("arrow")["input_ids"]))

    return {
        "trl bfd": (partial(packing, "bfd"), kept),
        "trl bfd, all at once": (partial(packing, "bfd", None), kept),
        "trl wrapped": (partial(packing, "wrapped"), kept),
        "trl bfd and rows": (partial(packing, "bfd", 1000, True), kept),
    }


def main(arguments: list[str] | None = None) -> int:
    """The tool; returns its exit status."""
    parser = cli.parser("bench_pack", __doc__)
    for name, default in (("examples", 15000), ("row_length", 2048), ("rounds", 5), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    chosen = parser.parse_args(arguments)
    if min(chosen.examples, chosen.row_length, chosen.rounds) < 1 or chosen.seed < 0:
        parser.error("--examples, --row_length and --rounds: at least 1 was expected; --seed: at least 0")
    row_length, tokens = chosen.row_length, draw(chosen.examples, chosen.row_length, chosen.seed)
    sides, total = our_sides(tokens, row_length), int(tokens.offsets[-1])
    try:
        sides.update(trl_sides(tokens, row_length))
    except (ImportError, RuntimeError) as error:
        print(f"ours alone is measured; for trl beside it: pip install trl ({error!r})")
    try:
        seconds, rows = measure(sides, total, chosen.rounds)
    except ValueError as error:
        return cli.fail(error)
    bound = -(-total // row_length)
    print(
        f"{total} tokens when cut, at least {bound} rows; {chosen.rounds} rounds, ratios within a round: "
        "median (min - max)"
    )
    print(
        f"{'':<20} {'seconds':>8} {'min':>7} {'max':>7} {'to ours':>21} {'to ours and rows':>21}   rows  "
        "/ least   full"
    )
    for name, values in seconds.items():
        ratios = [np.sort(np.divide(values, seconds[ours])) for ours in ("ours", "ours and rows")]
        spreads = [f"{np.median(ratio):.3g} ({ratio[0]:.3g} - {ratio[-1]:.3g})" for ratio in ratios]
        print(
            f"{name:<20} {np.median(values):>8.3f} {min(values):>7.3f} {max(values):>7.3f} "
            f"{spreads[0]:>21} {spreads[1]:>21} "
            f"{rows[name]:>6} {rows[name] / bound:>8.4f} {total / (rows[name] * row_length):.2%}"
        )
    return 0


def measure(
    sides: dict[str, tuple], total: int, rounds: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """({side: its seconds in each round}, {side: its rows}), after a round for warming up.

    Raises ValueError where the rows of a side have not all `total` tokens.
    """
    seconds, rows = {name: [] for name in sides}, {}
    for number in range(1 + rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:  # no side always runs after the same one
            packing, kept = sides[name]
            begin = time.perf_counter()
            result = packing()
            seconds[name].append(time.perf_counter() - begin)
            rows[name] = len(result)
            if kept(result) != total:
                raise ValueError(f"{name}: its rows have {kept(result)} of {total} tokens")
            del result  # else its release would count for the next side
    return {name: values for name, (_, *values) in seconds.items()}, rows


if __name__ == "__main__":
    sys.exit(main())
