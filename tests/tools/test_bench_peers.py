"""bench_peers: the arithmetic of its report, and two sides that train on the same tokens."""

import json

import numpy as np
import pytest

from data.packing import Pieces, pack
from tools.bench_peers import runs
from tools.bench_peers.__main__ import main, model_of
from tools.bench_peers.inputs import MODEL, make, read, save_rows
from tools.bench_peers.peers import figures, full_rows
from tools.bench_peers.runs import run
from tools.bench_peers.table import gpu_table, rates, table
from tools.graphs.models import PRESETS, read_model

TINY = MODEL | {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
SETTINGS = {
    "row_length": 64,
    "rows": 2,
    "micro_batch": 1,
    "steps": 2,
    "warmup": 2,
    "bf16": False,
    "gradient_checkpointing": "none",
    "device": "cpu",
}


def markstep(tokens, positions, mfu):
    return {
        "tokens_per_second": tokens,
        "target_tokens_per_second": tokens / 2,
        "padded_tokens_per_second": positions,
        "mfu": mfu,
        "peak_memory_bytes": 3e9,
    }


def peer(tokens, positions, *seconds):
    rates = {"tokens": tokens, "target_tokens": tokens / 4, "positions": positions}
    return {"seconds": list(seconds), **rates, "memory_bytes": 5e9}


def test_rates_are_of_the_warm_steps():
    found = figures(
        [10.0, 13.0, 15.0, 19.0], 2, [[5] * 12, [5] * 18], [[-100] * 12, [-100] * 6 + [5] * 12], 36
    )
    assert found["seconds"] == [3, 2, 4]
    assert rates(found) == {"tokens": 10, "target_tokens": 4, "positions": 12}


def test_ratios_are_taken_within_a_round():
    rounds = [
        {"markstep": markstep(900, 1000, 0.8), "plain": peer(400, 500, 1, 1, 7)},
        {"markstep": markstep(300, 400, 0.4), "plain": peer(400, 500, 4, 4)},
        {"markstep": markstep(600, 800, 0.8), "plain": peer(400, 500, 2)},
    ]
    *_, ours, plain = table(rounds)
    assert ours == "| markstep, packed | 600 | 300 | 1 (1 - 1) | 80% | 3.00 |"
    # 400, 100, 200 tokens/s: 2.25, 3 and 3 times as slow; 500, 125, 250 positions/s at a peak of 1250, 1000
    # and 1000
    assert plain == "| plain loop on torch_xla, full rows | 200 | 50 | 3 (2.25 - 3) | 25% | 5.00 |"


def test_the_table_of_a_gpu():
    ours = markstep(900, 1000, 0.5) | {
        "step_seconds": 0.5,
        "step_trace_seconds": 1.5,
        "gemm_flops_per_second": 8e14,
        "first_step_seconds": 60.0,
        "peak_device_memory_bytes": 21e9,
    }
    plain = peer(400, 500, 0.5, 1, 3) | {"first_step_seconds": 20.0, "memory_bytes": 31e9}
    *_, traced, replayed, other, peak = gpu_table([{"markstep": ours, "plain_cuda": plain}])
    assert traced == (
        "| markstep, traced every step | 300 | 150 | 3 (3 - 3) | 1.5000 | 133 | 17% | 21.00 | 60.0 |"
    )
    assert replayed == "| markstep, packed | 900 | 450 | 1 (1 - 1) | 0.5000 | 400 | 50% | 21.00 | 60.0 |"
    assert other == (
        "| plain loop on torch, the same rows | 400 | 100 | 2.25 (2.25 - 2.25) | 1.0000 | 200 | 25% | 31.00 "
        "| 20.0 |"
    )
    assert peak == "GEMM peak: 800 TFLOP/s"


def test_a_preset_is_a_model_of_transformers(tmp_path):
    """markstep reads of its config.json what it knows of the preset."""
    for name in PRESETS:
        (tmp_path / "config.json").write_text(json.dumps(model_of(name)))
        assert read_model(str(tmp_path)) == read_model(name)


def test_what_is_left_out_on_a_gpu(monkeypatch):
    """torch has no CUDA here."""
    monkeypatch.setattr(runs, "on_gpu", lambda: True)
    monkeypatch.setattr(runs, "_ask", lambda python, program: "peft" if "find_spec" in program else "")
    assert runs.sides_here() == ["markstep", "plain_cuda", "trl"]
    assert runs.missing("markstep") == []
    assert runs.missing("plain_cuda", "python") == ["peft", "a torch that finds CUDA"]


@pytest.mark.process
@pytest.mark.parametrize("bf16, recomputed", [(False, "none"), (True, "full")])
def test_the_plain_loop_of_a_gpu_trains_on_markstep_s_rows(tmp_path, bf16, recomputed):
    settings = SETTINGS | {"bf16": bf16, "gradient_checkpointing": recomputed}
    make(tmp_path, TINY, settings, examples=50)
    save_rows(tmp_path)
    tokens, _ = read(tmp_path)
    found = np.load(tmp_path / "rows.npz")
    trained = found["labels"] >= 0
    assert (found["labels"][trained] == found["input_ids"][trained]).all()
    assert found["lengths"].sum() == len(tokens.input_ids)
    plain = run("plain_cuda", tmp_path, settings)
    assert plain["positions"] == 128 and len(plain["seconds"]) == 2 and plain["memory_bytes"] > 1e8
    assert (
        plain["tokens"] == 2 * found["lengths"].mean() and plain["target_tokens"] == 2 * trained.sum(1).mean()
    )
    assert abs(plain["loss"] - np.log(96)) < 0.5 and plain["first_step_seconds"] > 0


@pytest.mark.process
def test_two_sides_on_the_same_tokens(tmp_path):
    make(tmp_path, TINY, SETTINGS, examples=50)
    tokens, settings = read(tmp_path)
    assert (
        settings == SETTINGS
        and len(tokens) == 50
        and max(np.diff(tokens.offsets)) == 64
        and not tokens.trained.all()
    )
    ids, labels = full_rows(tokens, 64)
    assert (labels[labels != -100] == ids[labels != -100]).all() and (labels != -100).sum() == tokens.trained[
        : ids.size
    ].sum()
    ours, plain = run("markstep", tmp_path, SETTINGS), run("plain", tmp_path, SETTINGS)
    assert (
        plain["tokens"] == plain["positions"] == 128
        and plain["recompilations"] == 0
        and len(plain["seconds"]) == 2
    )
    assert plain["target_tokens"] == 2 * (labels != -100).sum(1).mean()
    assert abs(plain["loss"] - np.log(96)) < 0.5 and plain["instructions"] > 500
    one_graph = SETTINGS | {"micro_batch": 2}
    make(tmp_path, TINY, one_graph, examples=50)
    at_once = run("plain", tmp_path, one_graph)
    assert abs(at_once["loss"] - plain["loss"]) < 1e-3 and at_once["instructions"] < plain["instructions"]
    # rows are as full as the packing of the same examples makes them
    pieces = Pieces(np.zeros(50, np.int64), tokens.offsets[:-1], tokens.offsets[1:])
    filled = len(tokens.input_ids) / (64 * len(pack(pieces.lengths.tolist(), 64)))
    rate = rates(ours)
    assert filled - 0.2 < rate["tokens"] / rate["positions"] <= 1 and ours["mfu"] > 0


@pytest.mark.process
def test_bad_input_is_refused(tmp_path, capsys):
    for flags in (
        ["--tokens", "1000"],
        ["--rounds", "0"],
        ["--max_seq_length", "0"],
        ["--per_device_train_batch_size", "3"],
        ["--per_device_train_batch_size", "0"],
        ["--json", str(tmp_path / "none" / "file")],
    ):
        with pytest.raises(SystemExit):
            main(flags)
        assert "was expected" in capsys.readouterr().err
    make(tmp_path, TINY | {"num_attention_heads": 0}, SETTINGS, examples=2)
    assert json.loads((tmp_path / "settings.json").read_text()) == SETTINGS
    with pytest.raises(ValueError, match="plain ended with status 1"):
        run("plain", tmp_path, SETTINGS)
