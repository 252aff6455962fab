"""Files, folders and hub data sets as users have them, intact and broken."""

import json
from unittest import mock

import datasets
import pytest

from data.sources import BadRecord, Source

RECORDS = [
    {"instruction": "What?", "response": 'a, "b"\n\nc'},
    {"instruction": "Wo\u2028?", "response": "ä 🤗"},
]


def write(directory, suffix):
    path, frame = directory / f"records{suffix}", datasets.Dataset.from_list(RECORDS)
    if suffix == ".jsonl":
        path.write_text(
            "\n\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS), encoding="utf-8-sig"
        )
    elif suffix == ".json":
        path.write_text(json.dumps(RECORDS, indent=1), encoding="utf-8")
    elif suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_records(tmp_path, suffix):
    found = list(Source(str(write(tmp_path, suffix))))
    assert [record for _, record in found] == RECORDS
    assert len({where for where, _ in found}) == 2 and all(f"records{suffix}" in where for where, _ in found)


def test_folders_text_and_json_lines_of_another_name(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("two\nlines\n")
    (tmp_path / "a.json").write_text('{"text": "x"}\n{"text": "y"}\n')
    (tmp_path / "notes.md").write_text("no data")
    assert list(Source(str(tmp_path))) == [
        (f"{tmp_path}/a.json:1", {"text": "x"}),
        (f"{tmp_path}/a.json:2", {"text": "y"}),
        (f"{tmp_path}/sub/b.txt", {"text": "two\nlines\n"}),
    ]


def test_what_save_to_disk_wrote(tmp_path):
    datasets.Dataset.from_list(RECORDS).save_to_disk(tmp_path / "plain")
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(RECORDS)})
    splits.save_to_disk(tmp_path / "splits")
    for name in ("plain", "splits"):
        assert [record for _, record in Source(str(tmp_path / name))] == RECORDS
    datasets.DatasetDict({"test": splits["train"]}).save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match="has the splits test: a split named train was expected"):
        Source(str(tmp_path / "other"))


def test_the_hub_is_asked_for_ids_only():
    frame = datasets.Dataset.from_list(RECORDS)
    with mock.patch("datasets.load_dataset", return_value=frame) as load:
        assert list(Source("owner/name", streaming=True)) == [
            ("owner/name row 0", RECORDS[0]),
            ("owner/name row 1", RECORDS[1]),
        ]
        load.assert_called_once_with("owner/name", split="train", streaming=True)
    with mock.patch("datasets.load_dataset", return_value=frame.to_iterable_dataset()):
        assert [record for _, record in Source("owner/name", streaming=True)] == RECORDS
    with mock.patch("datasets.load_dataset", side_effect=AssertionError("the hub was asked")):
        for name in ("none.jsonl", "NONE.JSONL", "./none", "~/none", "a/b/c", "two words"):
            with pytest.raises(ValueError, match="no such file; a file, a folder or a hub id was expected"):
                Source(name)


@pytest.mark.parametrize("failure, reason", [("off\nline", "off line"), ("", "ConnectionError")])
def test_a_hub_that_fails(failure, reason):
    for name in ("owner/name", "name", "x" * 300):
        with (
            mock.patch("datasets.load_dataset", side_effect=ConnectionError(failure)),
            pytest.raises(ValueError) as caught,
        ):
            Source(name)
        assert str(caught.value).endswith(
            f"{name}: neither a file nor a reachable hub data set has that name: {reason}"
        )


def test_the_fingerprint_is_that_of_the_contents(tmp_path):
    path = write(tmp_path, ".jsonl")
    before = Source(str(path)).fingerprint()
    moved = path.rename(tmp_path / "moved.jsonl")
    assert Source(str(moved)).fingerprint() == before == Source(str(tmp_path)).fingerprint()
    moved.write_bytes(moved.read_bytes() + b"\n")
    assert Source(str(moved)).fingerprint() != before
    frames = [datasets.Dataset.from_list(records) for records in (RECORDS, RECORDS[:1])]
    for name, frame in zip("ab", frames, strict=True):
        frame.save_to_disk(tmp_path / name)
    assert Source(str(tmp_path / "a")).fingerprint() != Source(str(tmp_path / "b")).fingerprint()


@pytest.mark.parametrize(
    "name, content, problem",
    [
        ("a.jsonl", b'{"a": 1}\r\n\n{"b": ', "a.jsonl:3: invalid JSON"),
        ("a.jsonl", b"[" * 200000, "a.jsonl:1: invalid JSON"),
        ("a.jsonl", b"{}\n\xff\n{}", "a.jsonl:2: invalid UTF-8 at byte 0 of the line"),
        ("a.json", b'[{"a": 1}, {', "a.json: invalid JSON"),
        ("a.json", b'["\xff"]', "a.json: invalid UTF-8 at byte 2"),
        ("a.csv", b"a,b\n1,2\n3\n", "a.csv:3: 1 fields; 2 were expected"),
        ("a.csv", b"a,b\n1,2,3\n", "a.csv:2: 3 fields; 2 were expected"),
        ("a.csv", b"a,b,a\n1,2,3\n", "a.csv:1: two columns of one name"),
        ("a.csv", b'a,b\n1,"2\n', "a.csv:2: invalid CSV"),
        ("a.csv", b"a\n\xff\n", "a.csv:2: invalid UTF-8"),
        ("a.parquet", b"PAR1", "a.parquet: invalid Parquet"),
        ("a.txt", b"\xff", "a.txt: invalid UTF-8 at byte 0"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "z.jsonl").write_text("{}")
    *_, (_, last) = Source(str(tmp_path))
    assert last == {}  # what follows in other files is read
    found = [record for _, record in Source(str(tmp_path)) if isinstance(record, BadRecord)]
    assert len(found) == 1 and str(found[0]).startswith(f"{tmp_path}/{problem}") and "\n" not in str(found[0])


def test_what_is_no_source(tmp_path):
    (tmp_path / "a.md").touch()
    for name, problem in [
        ("a.md", "a file that ends in .jsonl, .json"),
        ("none.csv", "no such file"),
        (".", "the folder has no file"),
    ]:
        with pytest.raises(ValueError, match=problem):
            Source(f"{tmp_path}/{name}")
