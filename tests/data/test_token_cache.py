"""The cache of tokens: users share it, damage is found, and what killed runs left goes away."""

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from data import token_cache, tokens
from data.token_cache import LOCK, OLD_SECONDS, cache_directory
from data.tokens import tokenize
from tests.support.on_ranks import ROOT
from trainer.config_derived import SAMPLE

NOBODY = 65534
KEY = "0123456789abcdef" * 2


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(SAMPLE / "tiny")


@pytest.fixture
def shared():
    """A directory that every user can reach and write to, unlike tmp_path."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o777)
        yield Path(directory)


@contextmanager
def another_user(home):
    """Within the context this process has the rights of a user who owns nothing but `home`."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    home.mkdir(exist_ok=True)
    os.chown(home, NOBODY, NOBODY)
    os.environ["XDG_CACHE_HOME"], before = str(home), os.environ.get("XDG_CACHE_HOME")
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.environ.pop("XDG_CACHE_HOME")
        if before:
            os.environ["XDG_CACHE_HOME"] = before


@contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def data_in(directory, *texts):
    path = directory / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts or ("one", "two")))
    os.chmod(path, 0o644)
    return str(path)


def entries(cache):
    return sorted(path for path in cache.iterdir() if path.is_dir())


@pytest.mark.parametrize("mask, directory, file", [(0o022, 0o755, 0o644), (0o002, 0o775, 0o664)])
def test_an_entry_has_the_permissions_of_the_umask(tokenizer, tmp_path, mask, directory, file):
    cache = tmp_path / "cache"
    with umask(mask):
        tokenize(data_in(tmp_path), tokenizer, cache=cache_directory(str(cache)))
    (entry,) = entries(cache)
    assert stat.S_IMODE(entry.stat().st_mode) == directory
    assert {stat.S_IMODE(path.stat().st_mode) for path in entry.iterdir()} == {file}
    assert {path.name for path in entry.iterdir()} == {
        *("input_ids.bin", "trained.bin", "offsets.bin", "groups.bin", "where.txt", "meta.json")
    }


def test_a_second_user_reads_the_entry_of_the_first(tokenizer, shared, capsys):
    cache, data = shared / "cache", data_in(shared)
    with umask(0o022):  # the second user may not write to the cache
        first = tokenize(data, tokenizer, cache=cache_directory(str(cache)))
    with another_user(shared / "home"):
        again = tokenize(data, tokenizer, cache=cache_directory(str(cache)))
    assert again.directory == first.directory and not list((shared / "home").iterdir())
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_what_another_user_keeps_away_is_made_elsewhere(tokenizer, shared, capsys, mask):
    """The directory cannot be written (umask 022), or the entry not be read either (077, directory open)."""
    cache, data, home = shared / "cache", data_in(shared), shared / "home"
    with umask(mask):
        first = tokenize(data, tokenizer, cache=cache_directory(str(cache)))
    if mask == 0o077:
        cache.chmod(0o777)
    else:
        data = data_in(shared, "three", "four")
    with another_user(home):
        again = tokenize(data, tokenizer, cache=cache_directory(str(cache)))
    assert again.directory.parent == home / "markstep" / "tokens"
    assert tokenizer.decode(again.input_ids).count("<s>") == 2
    said = capsys.readouterr().err
    assert f"cannot be kept in {cache}" in said and "Permission denied" in said
    assert entries(cache) == [first.directory] and tokenize(data_in(shared), tokenizer, cache=cache)


def test_damage_of_equal_size_is_found(tokenizer, tmp_path, capsys):
    data, cache = data_in(tmp_path), cache_directory(str(tmp_path / "cache"))
    expected = tokenize(data, tokenizer, cache=cache)
    (entry,) = entries(cache)
    files = {path: path.read_bytes() for path in entry.iterdir()}
    for path, content in files.items():
        capsys.readouterr()
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        again = tokenize(data, tokenizer, cache=cache)
        said = capsys.readouterr().err
        assert f"in {entry} are damaged ({path.name} is not what was written): they are made anew" in said
        assert again.input_ids.tolist() == expected.input_ids.tolist() and entries(cache) == [entry]
        assert {path: path.read_bytes() for path in entry.iterdir()} == files
    capsys.readouterr()
    tokenize(data, tokenizer, cache=cache)
    assert "warning" not in capsys.readouterr().err


TOKENIZES = """
import sys, time
from data import tokens
from trainer.tokenizer import load_tokenizer
def records(*_):
    yield "here", tokens.Rendered("", "text", "text")
    print("begun", flush=True)
    time.sleep(60)
tokens._rendered = records
from data.token_cache import cache_directory
from pathlib import Path
tokens.tokenize(sys.argv[1], load_tokenizer(Path(sys.argv[2])), cache=cache_directory(sys.argv[3]))
"""


@pytest.mark.process
def test_what_a_killed_run_left_is_removed(tmp_path):
    cache = tmp_path / "cache"
    process = subprocess.Popen(
        [sys.executable, "-c", TOKENIZES, data_in(tmp_path), SAMPLE / "tiny", cache],
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        assert process.stdout.readline() == b"begun\n"
        (partial,) = entries(cache)
        cache_directory(str(cache))
        assert entries(cache) == [partial]  # its process is alive
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert entries(cache) == [partial]
    cache_directory(str(cache))
    assert entries(cache) == []


def test_only_what_is_surely_dead_is_removed(tmp_path, monkeypatch):
    """Without this kernel's name in its lock, a partial entry may be another machine's for a day."""
    boot = tmp_path / "boot_id"
    boot.write_bytes(b"this kernel\n")
    monkeypatch.setattr(token_cache, "BOOT_ID", boot)
    cache = tmp_path / "cache"
    kinds = {"this": b"this kernel\n", "other": b"other kernel\n", "early": b"", "old": None}

    def make():
        for number, (kind, content) in enumerate(kinds.items()):
            directory = cache / f"{KEY}.{kind}{number:0{8 - len(kind)}d}"
            directory.mkdir(parents=True)
            if content is not None:
                (directory / LOCK).write_bytes(content)

    make()
    mine = cache / "0123.incomplete"
    mine.mkdir()
    (cache / KEY).mkdir()
    cache_directory(str(cache))
    left = {path.name.partition(".")[2].rstrip("0123456789") for path in entries(cache)}
    assert left == {"other", "early", "old", "incomplete", ""}
    for path in cache.rglob("*"):
        os.utime(path, (0, path.stat().st_mtime - OLD_SECONDS - 60))
    cache_directory(str(cache))
    assert entries(cache) == sorted([mine, cache / KEY])


def test_of_two_runs_that_make_one_entry_the_late_one_reads_the_other(tokenizer, tmp_path, monkeypatch):
    data, cache = data_in(tmp_path), cache_directory(str(tmp_path / "cache"))
    write, made = tokens._write_examples, []

    def write_late(directory, examples):
        monkeypatch.setattr(tokens, "_write_examples", write)
        made.append(tokenize(data, tokenizer, cache=cache))
        return write(directory, examples)

    monkeypatch.setattr(tokens, "_write_examples", write_late)
    late = tokenize(data, tokenizer, cache=cache)
    assert entries(cache) == [late.directory] == [made[0].directory]
    assert late.input_ids.tolist() == made[0].input_ids.tolist()
