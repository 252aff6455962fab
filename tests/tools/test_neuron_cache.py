"""Packing and unpacking compiled graphs: what is complete travels, what does not fit or is not whole is
refused."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from tests.support.on_ranks import ROOT
from tools.neuron_cache.__main__ import main
from tools.neuron_cache.archive import pack, unpack
from tools.neuron_cache.cache import cache_location, entries_of
from tools.neuron_cache.key import NOT_IN_THE_GRAPH, key_of
from tools.neuron_cache.listing import listing
from trainer.config import parse

COMPILER = "neuronxcc-2.24.5133.0+58f8de22"
FLAGS = "--world_size 32 --tensor_parallel_size 8 --bf16"
NEURON_CC = {"NEURON_CC_FLAGS": "--model-type=transformer --cache_dir=/a"}


def key(flags="", environment=NEURON_CC):
    return key_of(parse(f"{FLAGS} {flags}".split()), environment)


def entry(cache, name, *files, compiler=COMPILER):
    directory = cache / compiler / f"MODULE_{name}+d41d8cd9"
    directory.mkdir(parents=True)
    for file in files:
        (directory / file).write_bytes(
            b"" if file.endswith((".done", ".lock")) else f"{name} {file}".encode() * 1000
        )
    return directory


GRAPH = ("model.hlo_module.pb", "compile_flags.json")
COMPLETE = (*GRAPH, "model.neff", "model.done")


@pytest.fixture
def cache(tmp_path):
    cache = tmp_path / "cache"
    entry(cache, "1", *COMPLETE)
    entry(cache, "2", *COMPLETE, "model.hlo_module.pb.lock")
    entry(cache, "3", *GRAPH, "model.log")
    entry(cache, "4", *GRAPH, "model.hlo_module.pb.lock")
    entry(cache, "5", *GRAPH, "model.neff")
    entry(cache, "6", *COMPLETE, compiler="neuronxcc-2.8.0.25+a3ad0f342")
    return cache


def contents(cache):
    return {
        path.relative_to(cache).as_posix(): path.read_bytes() for path in cache.rglob("*") if path.is_file()
    }


def test_what_is_complete_travels(tmp_path, cache):
    said = pack(cache, tmp_path / "a.tar", key(), COMPILER)
    assert said == [
        f"left out: {COMPILER}/MODULE_2+d41d8cd9/model.hlo_module.pb.lock",
        f"left out: {COMPILER}/MODULE_3+d41d8cd9 (failed)",
        f"left out: {COMPILER}/MODULE_4+d41d8cd9 (locked)",
        f"left out: {COMPILER}/MODULE_5+d41d8cd9 (incomplete)",
        "left out: neuronxcc-2.8.0.25+a3ad0f342/MODULE_6+d41d8cd9 (another compiler)",
        f"{tmp_path / 'a.tar'}: 2 graphs, 0.1 MB of {COMPILER}",
    ]
    said = unpack(tmp_path / "a.tar", tmp_path / "new", key(), COMPILER)
    assert said == [f"{tmp_path / 'new'}: 2 graphs, 0.1 MB of {COMPILER}"]
    expected = {
        name: text for name, text in contents(cache).items() if "MODULE_1" in name or "MODULE_2" in name
    }
    assert contents(tmp_path / "new") == {
        name: text for name, text in expected.items() if not name.endswith(".lock")
    }
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [COMPILER]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "cache", "new"]
    assert pack(cache, tmp_path / "b.tar", key(), COMPILER)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_lists(tmp_path, cache):
    assert listing(cache) == [
        *(
            f"{COMPILER}: {each} MB"
            for each in ("2 complete, 0.1", "1 failed, 0.1", "1 incomplete, 0.1", "1 locked, 0.0")
        ),
        "neuronxcc-2.8.0.25+a3ad0f342: 1 complete, 0.1 MB",
    ]
    pack(cache, tmp_path / "a.tar", key(), COMPILER)
    said = listing(tmp_path / "a.tar")
    assert said[0] == f"{COMPILER}: 2 graphs, 0.1 MB" and f"    {'tensor_parallel_size':<30} 8" in said
    assert not any("output_dir" in line for line in said)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"compiler": "neuronxcc-2.25.0.0"}, f"compiler {COMPILER} there and neuronxcc-2.25.0.0 here"),
        ({"flags": "--world_size 64"}, "world_size 32 there and 64 here"),
        (
            {"flags": "--tensor_parallel_size 4 --max_seq_length 2048"},
            "max_seq_length 1024 there and 2048 here; tensor_parallel_size 8 there and 4 here",
        ),
        ({"flags": "--lora_r 0"}, "lora_r 16 there and 0 here"),
        ({"flags": "--model_id somebody/else"}, "model_id tiny there and else here"),
        (
            {"environment": {"NEURON_CC_FLAGS": "--model-type=generic"}},
            "NEURON_CC_FLAGS --model-type=transformer there and",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_mismatch_is_refused(tmp_path, cache, changed, message):
    pack(cache, tmp_path / "a.tar", key(), COMPILER)
    wanted = dict(changed)
    compiler = wanted.pop("compiler", COMPILER)
    with pytest.raises(ValueError, match="was made for something else, and would not be used") as caught:
        unpack(tmp_path / "a.tar", tmp_path / "new", key(**wanted), compiler)
    assert message in str(caught.value) and not (tmp_path / "new").exists()


def test_what_is_in_no_graph_does_not_matter(tmp_path, cache):
    pack(cache, tmp_path / "a.tar", key("--gradient_checkpointing true"), COMPILER)
    other = key(
        "--learning_rate 1 --output_dir x --max_steps 3 --gradient_checkpointing full --sequence_parallel",
        {"NEURON_CC_FLAGS": "--cache_dir /b --retry_failed_compilation --model-type=transformer"},
    )
    assert unpack(tmp_path / "a.tar", tmp_path / "new", other, COMPILER)
    with pytest.raises(ValueError, match="--world_size: the number of ranks"):
        key_of(parse([]), {})
    assert set(NOT_IN_THE_GRAPH) < set(vars(parse([])))


def test_what_is_there_stays(tmp_path, cache):
    pack(cache, tmp_path / "a.tar", key(), COMPILER)
    before = (tmp_path / "a.tar").read_bytes()
    with pytest.raises(ValueError, match=r"a.tar exists: choose another name"):
        pack(cache, tmp_path / "a.tar", key("--lora_r 8"), COMPILER)
    assert (tmp_path / "a.tar").read_bytes() == before
    mine = entry(tmp_path / "new", "1", "model.hlo_module.pb.lock")
    said = unpack(tmp_path / "a.tar", tmp_path / "new", key(), COMPILER)
    assert said[0] == f"kept: {mine} was there (locked)" and len(said) == 2
    assert list(entries_of(tmp_path / "new").values()) == ["locked", "complete"]


def rewrite(archive, change):
    """The archive's members, changed: `change(members)` edits a list of [TarInfo, bytes]."""
    with tarfile.open(archive) as tar:
        members = [[member, tar.extractfile(member).read()] for member in tar]
    change(members)
    with tarfile.open(archive, "w") as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def add(name, **attributes):
    def change(members):
        member = tarfile.TarInfo(name)
        for attribute, value in attributes.items():
            setattr(member, attribute, value)
        members.append([member, b""])

    return change


def edit_manifest(**values):
    def change(members):
        members[0][1] = json.dumps(json.loads(members[0][1]) | values).encode()

    return change


def flip(members):
    members[3][1] = members[3][1][:-1] + b"?"


ESCAPE = {"../../escape": {"bytes": 0, "sha256": ""}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip, "the bytes of .* are not those that were packed"),
        (lambda members: members.pop(), "model.neff is missing"),
        (add("../escape"), r"\.\./escape is not what its manifest says"),
        (add("/escape"), "/escape is not what"),
        (
            add(f"{COMPILER}/MODULE_9+1/model.neff", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
            "is not what its manifest says",
        ),
        (lambda members: members.append(members[2]), "is not what its manifest says"),
        (edit_manifest(files=ESCAPE), "is no archive of"),
        (edit_manifest(format="x"), "is no archive of"),
        (edit_manifest(version=2), "is of version 2; 1 was expected"),
        (lambda members: members.pop(0), "is no archive of"),
    ],
    ids=range(10),
)
def test_damage_is_refused(tmp_path, cache, change, message):
    archive = tmp_path / "in" / "a.tar"
    archive.parent.mkdir()
    pack(cache, archive, key(), COMPILER)
    rewrite(archive, change)
    with pytest.raises(ValueError, match=message):
        unpack(archive, tmp_path / "new", key(), COMPILER)
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())
    assert sorted(path.name for path in tmp_path.rglob("*escape*")) == []


def test_a_torn_archive_and_what_is_none(tmp_path, cache):
    pack(cache, tmp_path / "a.tar", key(), COMPILER)
    whole = (tmp_path / "a.tar").read_bytes()
    for size in (0, 100, 2000, len(whole) // 2):
        (tmp_path / "torn.tar").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is damaged|is no archive"):
            unpack(tmp_path / "torn.tar", tmp_path / "new", key(), COMPILER)
    for path, message in [
        ("s3://bucket/path", "copy it first"),
        (tmp_path / "none", "a Neuron compile cache was expected"),
    ]:
        with pytest.raises(ValueError, match=message):
            entries_of(Path(str(path)))
    entry(tmp_path / "failed", "1", "model.log")
    with pytest.raises(ValueError, match=f"has no graph that {COMPILER.replace('+', '.')} has completed"):
        pack(tmp_path / "failed", tmp_path / "f.tar", key(), COMPILER)
    (cache / COMPILER / "MODULE_1+d41d8cd9" / "link").symlink_to("/etc/passwd")
    assert f"left out: {COMPILER}/MODULE_1+d41d8cd9/link" in pack(cache, tmp_path / "g.tar", key(), COMPILER)


@pytest.mark.process
def test_a_kill_leaves_whole_graphs(tmp_path, cache):
    """Killed while it moves the first graph, which is then there whole or not at all; unpack can resume."""
    pack(cache, tmp_path / "a.tar", key(), COMPILER)
    code = """
import sys, time
from pathlib import Path
from tests.tools.test_neuron_cache import COMPILER, key
from tools.neuron_cache import archive

move = archive.move_entry

def slow(*arguments):
    print("moving", flush=True)
    move(*arguments)
    time.sleep(60)

archive.move_entry = slow
archive.unpack(Path(sys.argv[1]), Path(sys.argv[2]), key(), COMPILER)
"""
    command = [sys.executable, "-c", code, tmp_path / "a.tar", tmp_path / "new"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"moving\n"
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert set(entries_of(tmp_path / "new").values()) == {"complete"}
    unpack(tmp_path / "a.tar", tmp_path / "new", key(), COMPILER)
    assert list(entries_of(tmp_path / "new").values()) == ["complete", "complete"]


def test_the_command(tmp_path, cache, capsys, monkeypatch):
    monkeypatch.setattr("tools.neuron_cache.cache.version", lambda name: COMPILER.removeprefix("neuronxcc-"))
    archive, new = str(tmp_path / "a.tar"), str(tmp_path / "new")
    assert main(["pack", str(cache), archive, *FLAGS.split()]) == 0
    assert main(["unpack", archive, new, *FLAGS.split(), "--learning_rate", "1"]) == 0
    assert main(["list", new]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{COMPILER}: 2 complete, 0.1 MB"
    assert main(["unpack", archive, new]) == 1
    assert "--world_size: the number of ranks" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["unpack", archive, new, *FLAGS.split()]) == 1
    assert "neuronx-cc is not installed" in capsys.readouterr().err


def test_where_the_cache_is():
    assert cache_location({}) == ("/var/tmp/neuron-compile-cache", False)
    assert cache_location({"NEURON_COMPILE_CACHE_URL": "s3://b/p"}) == ("s3://b/p", False)
    for flags in ("--cache_dir=/c --x", "--x --cache_dir /c"):
        assert cache_location({"NEURON_COMPILE_CACHE_URL": "/d", "NEURON_CC_FLAGS": flags}) == ("/c", True)
