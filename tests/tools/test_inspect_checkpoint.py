"""inspect_checkpoint: what it says of checkpoints, output directories and models, and of two of them."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.support import saved
from tools.inspect_checkpoint.__main__ import main

SHAPES = {
    f"layers.{number}.{name}": each
    for number in range(3)
    for name, each in (("q.weight", ((8, 6), 0)), ("o.weight", ((6, 8), 1)), ("norm.weight", ((6,), None)))
}
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q"], "use_rslora": False}


def save(output, step=7, lora=None, **options):
    identity = {"base": "0123abcd", "lora": lora, "seed": 1}
    return saved.save(output, step, shapes=SHAPES, losses=[2.5], identity=identity, **options)


def flip(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def row(text, name):
    """The columns of the line that begins with `name`."""
    lines = [line.split() for line in text.splitlines() if line.startswith(name)]
    assert len(lines) == 1, text
    return lines[0]


def test_a_checkpoint_and_its_repeated_tensors(tmp_path, capsys):
    assert main([str(save(tmp_path, tp=2, dp=3, zero_1=True, lora=LORA))]) == 0
    text = capsys.readouterr().out
    for expected in (
        "step 7, epoch 1, row 3",
        "evaluation loss  2.5\n",
        "6: 2 tensor x 3 data parallel",
        "up to 3 pieces a slice",
        "LoRA: r: 4, lora_alpha: 8",
        "tiny",
        "0123abcd",
    ):
        assert expected in text
    assert row(text, "layers.{0..2}.q.weight")[1:] == ["8", "x", "6", "0", "2", "1", "6", "0.00", "hold"]
    assert row(text, "layers.{0..2}.o.weight")[4] == "1"
    assert row(text, "layers.{0..2}.norm.weight")[1:6] == ["6", "-", "1", "2", "3"]
    assert len(text.splitlines()) < 20


def test_every_damaged_tensor_is_reported(tmp_path, capsys):
    path = save(tmp_path, tp=2, dp=1)
    file = path / "rank-00001.safetensors"
    flip(file)  # of the last tensor, and of the first:
    flip(file, 8 + int.from_bytes(file.read_bytes()[:8], "little"))
    assert main([str(path)]) == 1
    text = capsys.readouterr().out
    assert "no, one piece a slice" in text and "all weights" in text
    assert text.count("rank-00001.safetensors is damaged: ") == 2
    assert (
        "the bytes of parameter/layers.0.q.weight" in text
        and "the bytes of exp_avg_sq/layers.2.o.weight" in text
    )
    assert (
        row(text, "layers.{0..2}.q.weight")[-4:]
        == row(text, "layers.{0..2}.o.weight")[-4:]
        == ["1", "of", "9", "damaged"]
    )
    assert row(text, "layers.{0..2}.norm.weight")[-1] == "hold"


def test_an_output_directory_has_a_line_a_checkpoint(tmp_path, capsys):
    for step in (9, 20, 30, 100):
        save(tmp_path, step, tp=1, dp=1)
    assert main([str(tmp_path)]) == 0
    flip(tmp_path / "checkpoint-20/rank-00000.safetensors")
    (tmp_path / "checkpoint-30/config.json").unlink()
    (tmp_path / "checkpoint-40.incomplete").mkdir()
    capsys.readouterr()
    assert main([str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == [
        f"checkpoint-{name}" for name in ("9", "20", "30", "40.incomplete", "100")
    ]
    for line, expected in zip(lines, ("2.5", "2.5", "-", "-", "2.5"), strict=True):
        assert line.split()[1] == expected
    for line, expected in zip(
        lines, ("complete", "damaged: ", "config.json is missing", "incomplete", "complete"), strict=True
    ):
        assert expected in line
    (tmp_path / "checkpoint-20").rename(tmp_path / "checkpoint-20.damaged-1")
    (tmp_path / "checkpoint-30").rename(tmp_path / "checkpoint-30.damaged-1")
    assert main([str(tmp_path)]) == 0


def test_topologies_that_hold_the_same_are_equal(tmp_path, capsys):
    a, b = save(tmp_path / "a", tp=2, dp=1), save(tmp_path / "b", tp=2, dp=3, zero_1=True)
    assert main([str(a), str(b)]) == 0
    text = capsys.readouterr().out
    assert "all 27 tensors are equal to the bit" in text
    assert row(text, "data_parallel_size")[1:] == ["1", "3"] and row(text, "config.zero_1")[1:] == [
        "false",
        "true",
    ]
    assert row(text, "layers.{0..2}.o.weight")[1:] == [
        "6",
        "x",
        "8",
        "float32",
        "both",
        "3",
        "of",
        "3",
        "0",
        "0",
    ]


def test_one_changed_value_is_found_with_its_size(tmp_path, capsys):
    a, b = (
        save(tmp_path / "a", tp=1, dp=1),
        save(tmp_path / "b", tp=2, changed="layers.1.norm.weight", by=0.5),
    )
    assert main([str(a), str(b)]) == 1
    text = capsys.readouterr().out
    relative = 0.5 * 6**0.5 / saved.whole("parameter", "layers.1.norm.weight", 7, SHAPES).norm()
    assert row(text, "layers.{0..2}.norm.weight")[2:] == [
        "float32",
        "both",
        "2",
        "of",
        "3",
        "0.5",
        f"{relative:.3g}",
    ]
    assert (
        row(text, "exp_avg/layers.{0..2}.norm.weight")[-5:] == ["3", "of", "3", "0", "0"]
        and "1 of 27 tensors differ" in text
    )


def write_model(path, tensors, **settings):
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(settings))
    return str(path)


def test_models(tmp_path, capsys):
    weights = {f"layers.{number}.w.weight": torch.ones(3, 5, dtype=torch.bfloat16) for number in (0, 1, 3)}
    a = write_model(
        tmp_path / "a",
        weights | {"scale": torch.tensor(2.0), "head.weight": torch.zeros(2)},
        theta=1,
        layers=4,
    )
    b = write_model(
        tmp_path / "b",
        {
            "layers.0.w.weight": torch.ones(3, 5, dtype=torch.bfloat16),
            "layers.1.w.weight": torch.ones(3, 5),
            "scale": torch.tensor(-0.0),
            "layers.3.w.weight": torch.ones(5, 3),
            "tail.weight": torch.full((2,), torch.nan),
        },
        theta=2,
        layers=4,
    )
    assert main([a]) == 0
    text = capsys.readouterr().out
    assert "5 tensors" in text and row(text, "layers.{0,1,3}.w.weight")[1:5] == ["3", "x", "5", "bfloat16"]
    assert row(text, "scale")[1:3] == ["scalar", "float32"]
    assert main([a, a]) == 0 and main([b, b]) == 0
    capsys.readouterr()
    assert main([a, b]) == 1
    text = capsys.readouterr().out
    assert row(text, "theta")[1:] == ["1", "2"] and "\nlayers " not in text
    assert row(text, "layers.0.w.weight")[-5:] == ["1", "of", "1", "0", "0"]
    assert "bfloat16 and float32 both 0 of 1 0 0" in " ".join(row(text, "layers.1.w.weight"))
    assert (
        "3 x 5 and 5 x 3" in " ".join(row(text, "layers.3.w.weight"))
        and row(text, "layers.3.w.weight")[-1] == "nan"
    )
    assert row(text, "scale")[-2:] == ["2", "1"]
    assert row(text, "head.weight")[3] == a and row(text, "tail.weight")[3] == b


@pytest.mark.parametrize(
    "name, problem",
    [
        ("none", "is neither a checkpoint nor a model"),
        ("checkpoint-1", "is no complete checkpoint"),
        (".", "is neither a checkpoint nor a model"),
    ],
)
def test_what_is_neither_is_an_error_of_one_line(tmp_path, capsys, name, problem):
    for arguments in ([tmp_path / name], [tmp_path / name, tmp_path / name]):
        assert main(list(map(str, arguments))) == 1
        said = capsys.readouterr()
        assert (
            said.out == ""
            and said.err.startswith("error: ")
            and problem in said.err
            and said.err.count("\n") == 1
        )
