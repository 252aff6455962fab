"""The tokens of a job are made once: by one process where machines share the cache, else by one a machine."""

import json
import shutil
import time
from dataclasses import replace

import pytest

from data import token_cache
from data import tokens as module
from data.token_cache import cache_directory
from parallel.runtime import SharedError
from tests.support.processes import in_processes
from trainer.config import Config
from trainer.config_derived import SAMPLE
from trainer.start.facts import agree_on_rows
from trainer.start.tokens import OfSeveral, tokens_of
from trainer.tokenizer import load_tokenizer


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(50)))
    return path


@pytest.fixture
def counted(monkeypatch):
    """The directories in which tokens are made, and those whose bytes are checked."""
    made, checked = [], []
    write, read = module._write_examples, token_cache._describe

    def slow(directory, examples):
        made.append(directory)
        time.sleep(0.3)
        return write(directory, examples)

    def counting(file):
        if file.name == "input_ids.bin" and "." not in file.parent.name:
            checked.append(file.parent)
        return read(file)

    monkeypatch.setattr(module, "_write_examples", slow)
    monkeypatch.setattr(token_cache, "_describe", counting)
    return made, checked


def job(data, cache_of, world_size=4):
    """The tokens that each process has; cache_of(peers): its --data_cache_dir."""
    tokenizers = [load_tokenizer(SAMPLE / "tiny") for _ in range(world_size)]

    def process(peers):
        config = replace(Config(), dataset=[str(data)], data_cache_dir=str(cache_of(peers)))
        (found,) = tokens_of(config, tokenizers[peers.rank], peers)
        agree_on_rows(peers, config.datasets, FakeRows([found]), "rows")
        return found

    return in_processes(process, world_size)


@pytest.fixture
def own_disks(monkeypatch, tmp_path):
    """A machine sees only what is in the folder of its name."""
    monkeypatch.setattr(
        OfSeveral, "_sees", lambda self, path: path.is_relative_to(tmp_path / self._peers.host)
    )
    return lambda peers: tmp_path / peers.host


class FakeRows:
    def __init__(self, tokens):
        self.tokens = tokens


def test_a_shared_cache_has_them_made_once(data, counted, tmp_path):
    made, checked = counted
    cache = cache_directory(str(tmp_path / "cache"))
    found = job(data, lambda peers: cache)
    assert len(made) == 1
    assert len({each.directory for each in found}) == 1
    assert len(checked) == 2  # by the first process of each machine
    again = job(data, lambda peers: cache)
    assert len(made) == 1 and len(checked) == 4
    assert [each.input_ids.tolist() for each in again] == [found[0].input_ids.tolist()] * 4


def test_each_machine_makes_its_own_at_the_same_time(data, counted, own_disks):
    made, checked = counted
    begun = time.monotonic()
    found = job(data, own_disks)
    assert time.monotonic() - begun < 0.6  # neither waited for the other, which takes 0.3 s
    assert len(made) == 2 == len(checked)
    assert [each.directory.parent.name for each in found] == ["host-0", "host-0", "host-1", "host-1"]


def test_one_machine_has_them_already(data, counted, own_disks):
    made, _ = counted
    job(data, own_disks, 2)
    found = job(data, own_disks)
    assert len(made) == 2 and not any(isinstance(each, ValueError) for each in found)


def test_the_others_open_what_a_place_of_last_resort_has(monkeypatch, data, counted, tmp_path):
    """Each machine's first process turned to a temporary directory of its own."""
    made, _ = counted
    temporary = tmp_path / "temporary"

    def places(cache):
        yield tmp_path / "not" / "there" / "x"
        own = temporary / f"{len(list(temporary.iterdir()))}"
        own.mkdir()
        yield own

    def refuse(*_):
        raise PermissionError(13, "Permission denied", "x")

    temporary.mkdir()
    write = module.write_entry
    monkeypatch.setattr(module, "places", places)
    monkeypatch.setattr(
        module, "write_entry", lambda entry, *rest: (refuse if "not" in entry.parts else write)(entry, *rest)
    )
    found = job(data, lambda peers: tmp_path, 2)
    assert len(made) == 1 and found[0].directory == found[1].directory
    assert found[0].directory.parent == temporary / "0"


def test_damage_in_a_shared_cache_is_mended_by_one(data, counted, tmp_path):
    made, _ = counted
    cache = cache_directory(str(tmp_path / "cache"))
    expected = job(data, lambda peers: cache)[0].input_ids.tolist()
    (entry,) = [path for path in cache.iterdir() if path.is_dir()]
    file = entry / "input_ids.bin"
    content = file.read_bytes()
    file.unlink()  # the mapped one stays as it is
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    found = job(data, lambda peers: cache)
    assert [each.input_ids.tolist() for each in found] == [expected] * 4
    assert len(made) == 2


def test_other_data_on_one_machine_are_named(data, tmp_path):
    other = tmp_path / "other" / data.name
    other.parent.mkdir()
    shutil.copy(data, other)
    other.write_text(other.read_text().replace("text 49", "text 50"))
    found = {}
    for number, path in enumerate((data, other)):
        cache = cache_directory(str(tmp_path / f"cache-{number}"))
        found[number] = module.tokenize(str(path), load_tokenizer(SAMPLE / "tiny"), cache=cache)

    def process(peers):
        agree_on_rows(peers, [str(data)], FakeRows([found[peers.rank // 2]]), "rows")

    errors = in_processes(process, 4)
    assert all(isinstance(error, SharedError) for error in errors)
    assert f"tokens of {data} of rank 2 on host-1 is" in str(errors[0])
    assert "the data, or the token cache (--data_cache_dir), differs there" in str(errors[0])
