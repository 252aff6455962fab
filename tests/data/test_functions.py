"""--format module:function: where the function is found, and what is said of what it returns."""

import json
import sys

import pytest
from transformers import AutoTokenizer

from data.formats import load_function
from data.tokens import tokenize
from trainer.config_derived import SAMPLE

RECORD = {"q": "1", "a": "2"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folder where the user stands; imports from it are forgotten afterwards."""
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield tmp_path / "folder"
    for name in set(sys.modules) - known:
        del sys.modules[name]


def tokens_of(folder, name, record=RECORD):
    (folder / "a.jsonl").write_text(json.dumps(record) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(SAMPLE / "tiny")
    tokens = tokenize(str(folder / "a.jsonl"), tokenizer, format_name=name, cache=folder)
    return tokenizer.decode(tokens.input_ids)


def test_a_module_where_the_user_stands(here):
    (here / "mine18.py").write_text(
        "def record(it):\n    from other18 import convert\n    return convert(it)\n"
    )
    (here / "other18.py").write_text(
        "def convert(it):\n    return {'prompt': it['q'], 'completion': it['a']}\n"
    )
    (here / "within18").mkdir()
    (here / "within18" / "deep.py").write_text("from other18 import convert as record\n")
    before = list(sys.path)
    assert tokens_of(here, "mine18:record") == tokens_of(here, "within18.deep:record") == "<s>12</s>"
    assert sys.path == [*before, str(here)]  # behind what markstep imports


def test_it_wins_over_an_installed_module_of_that_name(here):
    (here / "this.py").write_text("def record(it):\n    return {'text': 'mine'}\n")
    assert "this" not in sys.modules and tokens_of(here, "this:record") == "<s>mine</s>"


def test_the_error_says_what_was_imported_and_where(here):
    (here / "data.py").write_text("def record(it):\n    return it\n")
    (here / "fails18.py").write_text("import no_such_thing\n")
    for name, problem in [
        ("data:record", r"data \(.*data/__init__.py\) has no function 'record'"),
        (
            "none18:record",
            f"none18 has no function 'record' .* imported in {here} .*No module named 'none18'",
        ),
        ("fails18:record", "fails18 .*No module named 'no_such_thing'"),
    ]:
        with pytest.raises(ValueError, match=problem):
            load_function(name)
        assert str(here) in sys.path[-1:] and sys.path.count(str(here)) == 1


def test_a_change_of_its_module_is_seen(here):
    """Also of a function that was made by another one, whose own module is not the user's."""
    text = (
        "from functools import partial\nrecord = partial(lambda end, it: {{'text': it['q'] + end}}, {!r})\n"
    )
    (here / "made18.py").write_text(text.format("one"))
    assert tokens_of(here, "made18:record") == "<s>1one</s>"
    (here / "made18.py").write_text(text.format("three"))
    del sys.modules["made18"]
    assert tokens_of(here, "made18:record") == "<s>1three</s>"


def test_a_change_beside_its_module_is_seen(here, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # files of one size, made within a second
    (here / "mine19.py").write_text(
        "import beside19\ndef record(it):\n    return {'prompt': it['q'], 'completion': beside19.END}\n"
    )
    for end in "56":
        (here / "beside19.py").write_text(f"END = '{end}'\n")
        for name in ("mine19", "beside19"):
            sys.modules.pop(name, None)  # as in a new process
        assert tokens_of(here, "mine19:record") == f"<s>1{end}</s>"


@pytest.mark.parametrize(
    "returned, problem",
    [
        ("None", "an object was expected; this is NoneType"),
        ("'text'", "an object was expected; this is str"),
        ("[it]", "an object was expected; this is list"),
        ("{}", "the fields (none) are of no known format"),
        ("{'prompt': '1', 'completion': 2}", "the field 'completion' is int"),
        ("{'instruction': '1', 'response': ' '}", "the field 'response' is empty"),
        ("{'text': ''}", "the field 'text' is empty"),
    ],
)
def test_a_bad_return_value_is_called_that_of_the_function(here, returned, problem):
    (here / "bad18.py").write_text(f"def record(it):\n    return {returned}\n")
    with pytest.raises(ValueError) as caught:
        tokens_of(here, "bad18:record")
    assert f"a.jsonl:1, as --format bad18:record returns it: {problem}" in str(caught.value)
    assert "\n" not in str(caught.value)
    (here / "bad18.py").write_text("def record(it):\n    return it['none']\n")
    del sys.modules["bad18"]
    with pytest.raises(ValueError, match="a.jsonl:1: --format bad18:record raises KeyError: 'none'"):
        tokens_of(here, "bad18:record")
