"""The training files of a folder are those that `datasets` would take."""

import json
from contextlib import suppress
from pathlib import Path

import datasets
import pytest
from datasets.data_files import get_data_patterns, resolve_pattern

from data.sources import Source
from data.splits import training_files


def folder_of(directory, *names):
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) + "\n")
    return directory


def read(source):
    return [record["text"] for _, record in source]


@pytest.mark.parametrize(
    "names",
    [
        [
            "data/train-00000-of-00002.jsonl",
            "data/train-00001-of-00002.jsonl",
            "data/test-00000-of-00001.jsonl",
        ],
        ["data/train-00000-of-00001-1a2b.jsonl", "data/dev-00000-of-00001.jsonl", "data/notes.jsonl"],
        ["train.jsonl", "validation.jsonl", "test.jsonl"],
        ["train.jsonl", "validation.jsonl", "extra.jsonl"],
        ["my_train_0.jsonl", "my_train_1.jsonl", "my-dev.jsonl"],
        ["sub/training.v2.jsonl", "sub/evaluation.jsonl"],
        ["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"],
        ["en-train/x/a.jsonl", "valid 2/a.jsonl", "top.jsonl"],
        ["dev/train.jsonl", "train/dev.jsonl"],
        ["train.jsonl", "eval.jsonl", "train_test.jsonl"],
        ["a.jsonl", "sub/b.jsonl"],
        ["trainer.jsonl", "protest.jsonl", "latest/a.jsonl", "values.jsonl"],
    ],
)
def test_names_mean_what_they_mean_to_datasets(tmp_path, names):
    directory = folder_of(tmp_path / "set", *names)
    expected = set()
    for pattern in get_data_patterns(str(directory))["train"]:
        with suppress(FileNotFoundError):
            expected |= set(resolve_pattern(pattern, str(directory)))
    files = sorted(directory.rglob("*.jsonl"))
    chosen, note = training_files(directory, files)
    assert [str(file) for file in chosen] == sorted(expected)
    left = [file for file in files if file not in chosen]
    assert bool(note) == bool(left)
    assert all(str(file.relative_to(directory)) in note for file in left)


def test_only_train_is_read_and_said(tmp_path):
    directory = folder_of(tmp_path, "train.jsonl", "Validation.jsonl", "test/a.jsonl", "TEST.jsonl")
    source = Source(str(folder_of(tmp_path / "set", "Train.jsonl", "Validation.jsonl", "TEST.jsonl")))
    assert read(source) == ["Train.jsonl"]
    assert source.note == (
        "1 of 3 files are read, its split train by their names; left out: TEST.jsonl, Validation.jsonl"
    )
    with pytest.raises(ValueError, match="of the splits test; files of a split named train were expected"):
        Source(str(directory))  # the folder test decides, as in datasets
    before = Source(str(tmp_path / "set")).fingerprint()
    folder_of(tmp_path / "set", "Validation.jsonl", "dev.jsonl")
    assert Source(str(tmp_path / "set")).fingerprint() == before


def test_splits_of_other_names_are_not_guessed(tmp_path):
    names = [f"data/{split}-00000-of-00001.jsonl" for split in ("train_sft", "test_sft")]
    with pytest.raises(ValueError, match="splits test_sft, train_sft; files of a split named train"):
        Source(str(folder_of(tmp_path, *names)))
    assert len(read(Source(str(tmp_path / "data")))) == 1  # by the names alone, as in datasets


CARD = """---
license: mit
configs:
{}
---
# A data set
"""
MAIN = (
    "- config_name: main\n  data_files:\n  - {split: train, path: main/part-*}\n"
    "  - {split: test, path: main/t*}"
)
OTHER = "- config_name: other\n  data_dir: other"


def test_the_card_wins(tmp_path):
    names = [
        "main/part-1.jsonl",
        "main/part-2.jsonl",
        "main/t.jsonl",
        "other/train.jsonl",
        "other/test.jsonl",
    ]
    directory = folder_of(tmp_path, *names)
    for configs, expected in [
        (MAIN, ["main/part-1.jsonl", "main/part-2.jsonl"]),
        (f"{MAIN}\n{OTHER}\n  default: true", ["other/train.jsonl"]),
        (
            "- config_name: default\n  data_files: '**/t*.jsonl'",
            ["main/t.jsonl", "other/test.jsonl", "other/train.jsonl"],
        ),
    ]:
        (directory / "README.md").write_text(CARD.format(configs))
        reference = datasets.load_dataset(str(directory), split="train", cache_dir=str(tmp_path / ".cache"))
        assert read(Source(str(directory))) == expected == sorted(reference["text"])
    (directory / "README.md").write_text(CARD.format(f"{MAIN}\n{OTHER}"))
    with pytest.raises(ValueError, match=r"lists several configurations \(main, other\): name the folder or"):
        Source(str(directory))
    (directory / "README.md").write_text(
        CARD.format("- {config_name: main, data_files: [{split: test, path: 'm*'}]}")
    )
    with pytest.raises(ValueError, match=r"by its README.md, its files are of the splits \(none\)"):
        Source(str(directory))
    for text in ("---\n: [\n---\n", "# No front matter\n", CARD.format("- 3")):
        (directory / "README.md").write_text(text)
        assert read(Source(str(directory))) == ["other/train.jsonl"]


def test_what_save_to_disk_and_the_hub_have_beside_train(tmp_path):
    frame = datasets.Dataset.from_list([{"text": "a"}])
    datasets.DatasetDict({"train": frame, "test": frame}).save_to_disk(tmp_path / "saved")
    source = Source(str(tmp_path / "saved"))
    assert read(source) == ["a"] and source.note == "its split train is read; left out: test"


def test_descriptions_of_a_data_set_are_no_data(tmp_path):
    directory = folder_of(tmp_path, "records.json", "dataset_infos.json", "config.json")
    assert read(Source(str(directory))) == ["records.json"]


def test_the_path_of_the_folder_itself_says_nothing(tmp_path, monkeypatch):
    directory = folder_of(tmp_path / "test" / "dev", "a.jsonl", "b.jsonl")
    monkeypatch.chdir(directory)
    assert len(read(Source("."))) == len(read(Source(str(directory)))) == 2
    assert training_files(Path("."), [Path("a.jsonl")]) == ([Path("a.jsonl")], "")
