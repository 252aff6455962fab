"""What lies in a directory that somebody else has made is neither run nor copied from elsewhere."""

import json
import os
import shutil

import pytest

from model.config import ModelConfig
from tests.support.saved import forge, list_files
from tests.trainer.test_faults import save_tiny
from tools.merge_checkpoint.merging import merge
from tools.model_source import ModelSource
from trainer.checkpoint.model_files import copy_known_files
from trainer.config_derived import SAMPLE
from trainer.tokenizer import load_tokenizer

CODE = """
open({marker!r}, "w").write("ran")
from transformers import LlamaConfig, PreTrainedTokenizerFast
class T(PreTrainedTokenizerFast): pass
class C(LlamaConfig): model_type = "own"
"""
TOKENIZER = ["own.T", "own.T"]


@pytest.fixture
def model(tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(SAMPLE / "tiny", directory)
    (directory / "own.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    return directory


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def nobody_answers(monkeypatch):
    def ask(*_):
        pytest.fail("it asks on the terminal")

    monkeypatch.setattr("builtins.input", ask)


@pytest.mark.parametrize("answer", ["y", "n"])
def test_a_tokenizer_of_its_own_code(model, monkeypatch, tmp_path, answer):
    monkeypatch.setattr("builtins.input", lambda *_: answer)
    edit(model / "tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": TOKENIZER})
    with pytest.raises(ValueError, match="it names code of its own .auto_map., and code .* is never run"):
        load_tokenizer(model)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("code", ["own.C", "somebody/else--own.C"])
def test_a_config_of_its_own_code(model, nobody_answers, tmp_path, code):
    edit(model / "config.json", model_type="own", auto_map={"AutoConfig": code})
    with pytest.raises(
        ValueError, match="config.json: .*model_type is 'own'.*never runs code that comes with a model"
    ):
        ModelConfig.from_pretrained(model)
    assert not (tmp_path / "ran").exists()


def test_a_llama_that_names_code_too_is_a_llama(model, nobody_answers, tmp_path):
    edit(model / "config.json", auto_map={"AutoConfig": "own.C", "AutoTokenizer": TOKENIZER})
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.T"]})
    assert ModelConfig.from_pretrained(model).vocab_size == len(load_tokenizer(model))
    assert not (tmp_path / "ran").exists()


def link_a_file(checkpoint, secret):
    (checkpoint / "vocab.txt").symlink_to(secret / "key.txt")


def link_a_listed_file(checkpoint, secret):
    shutil.move(checkpoint / "tokenizer.json", secret / "tokenizer.json")
    (checkpoint / "tokenizer.json").symlink_to(secret / "tokenizer.json")


def link_a_folder(checkpoint, secret):
    (checkpoint / "additional_chat_templates").symlink_to(secret)


def unlisted(checkpoint, secret):
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")


def pipe(checkpoint, secret):
    os.mkfifo(checkpoint / "merges.txt")
    forge(
        checkpoint, lambda manifest: manifest["files"].update({"merges.txt": {"bytes": 0, "checksum": "0"}})
    )


@pytest.mark.parametrize(
    "change, listed, problem",
    [
        (link_a_file, False, "vocab.txt is not part of the checkpoint"),
        (link_a_file, True, "vocab.txt is a symbolic link to .*key.txt"),
        (link_a_listed_file, False, "tokenizer.json is a symbolic link to"),
        (link_a_folder, False, "additional_chat_templates/x.jinja is not part of the checkpoint"),
        (
            unlisted,
            False,
            "chat_template.jinja is not part of the checkpoint, whose manifest does not list it",
        ),
        (pipe, False, "merges.txt is missing"),
    ],
)
def test_merging_copies_what_was_saved_and_no_more(tmp_path, change, listed, problem):
    checkpoint, _ = save_tiny(tmp_path / "out", 3)
    secret = tmp_path / "secret"
    secret.mkdir()
    for name in ("key.txt", "x.jinja"):
        (secret / name).write_text("private")
    change(checkpoint, secret)
    if listed:
        list_files(checkpoint)
    with pytest.raises(ValueError, match=problem):
        merge(checkpoint, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_other_names_are_not_copied(tmp_path, capsys):
    """Names that begin as a tokenizer's do, folders, and what lies in them."""
    checkpoint, _ = save_tiny(tmp_path / "out", 3)
    (checkpoint / "token_of_the_hub").write_text("hf_secret")
    (checkpoint / "tokenization_own.py").write_text("pass")
    (checkpoint / "vocabulary").symlink_to(SAMPLE)
    (checkpoint / "merges.d").mkdir()
    (checkpoint / "notes.txt").write_text("mine")
    merge(checkpoint, tmp_path / "merged")
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names - {"special_tokens_map.json"} == {  # which transformers 5 does not write
        *("config.json", "generation_config.json", "model.safetensors", "prompt_format.json"),
        *("tokenizer.json", "tokenizer_config.json", "README.md"),
    }
    list_files(checkpoint)
    capsys.readouterr()
    merge(checkpoint, tmp_path / "again")
    assert names == {path.name for path in (tmp_path / "again").iterdir()}
    assert "notes.txt is not copied: no model or tokenizer reads it" in capsys.readouterr().err


def test_the_links_of_the_hubs_cache_are_followed(tmp_path):
    """Of a model from the hub, to which neuronx-distributed's checkpoints need a config and a tokenizer."""
    cache, output = tmp_path / "models--owner--name", tmp_path / "output"
    snapshot = cache / "snapshots" / "0123"
    for folder in (cache / "blobs", snapshot, output):
        folder.mkdir(parents=True)
    shutil.copy(SAMPLE / "tiny" / "tokenizer.json", cache / "blobs" / "abcd")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/abcd")
    (snapshot / "vocab.txt").symlink_to("tokenizer.json")
    copy_known_files(snapshot, output)
    for name in ("tokenizer.json", "vocab.txt"):
        assert (output / name).read_bytes() == (SAMPLE / "tiny" / "tokenizer.json").read_bytes()
    (snapshot / "merges.txt").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="merges.txt is a symbolic link to /etc/passwd: a regular file"):
        copy_known_files(snapshot, output)
    assert not (output / "merges.txt").exists()


def test_a_flipped_bit_is_found_before_a_question_is_answered(tmp_path):
    """By generate and evaluate, which open their models here; that of a moment does not matter to them."""
    checkpoint, _ = save_tiny(tmp_path, 3)
    file = checkpoint / "rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    for place, problem in ((begin + 5, "the bytes of parameter/"), (len(content) - 5, None)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        if problem:
            with pytest.raises(ValueError, match=f"rank-00001.safetensors is damaged: {problem}"):
                ModelSource.of_checkpoint(checkpoint)
        else:
            ModelSource.of_checkpoint(checkpoint)
