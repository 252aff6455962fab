"""A chat template that writes today's date writes one date for a whole run, and asks with it afterwards."""

import json
import shutil
from datetime import date, datetime
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from data.dates import pinned_date
from data.tokens import tokenize
from tests.support.on_ranks import on_ranks
from tests.support.runs import run_one
from tools.merge_checkpoint.merging import merge
from tools.model_source import ModelSource
from trainer import prompts
from trainer.checkpoint.reader import Checkpoint
from trainer.config import parse
from trainer.config_derived import SAMPLE
from trainer.dataset import fingerprint
from trainer.job import prepare
from trainer.prompts import FILE, PromptFormat, chat_ids, keep_date

# As Llama 3.2's begins.
DATED = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}"
    "{%- endif %}{%- endif %}{{ bos_token }}Today Date: {{ date_string }}\n"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
QUESTION = [{"role": "user", "content": "What is 1?"}]


def set_day(monkeypatch, day):
    """Today is `day`, for markstep and for transformers."""

    class Day(date):
        @classmethod
        def today(cls):
            return cls.fromisoformat(day)

    class Now(datetime):
        @classmethod
        def now(cls, *_):
            return cls.fromisoformat(day)

    monkeypatch.setattr(prompts, "calendar", Day)
    monkeypatch.setattr(chat_template_utils, "datetime", Now)


@pytest.fixture
def model(tmp_path):
    """The embedded model, with a template that writes the date."""
    shutil.copytree(SAMPLE / "tiny", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def data(tmp_path):
    chats = [
        [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"{n}."}]
        for n in range(40)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return path


def flags(tmp_path, model, data, day, *more):
    given = {
        "--model_id": model,
        "--dataset": data,
        "--output_dir": tmp_path / "out",
        "--data_cache_dir": tmp_path / f"cache of {day}",  # as on a machine without the tokens
        "--max_seq_length": 64,
        "--max_steps": 2,
        "--save_steps": 1,
    }
    return [str(each) for pair in given.items() for each in pair] + ["--random_weights", "--do_eval", *more]


def test_the_held_out_part_is_the_same_on_every_day(tmp_path, model, data, monkeypatch):
    jobs = []
    for day in ("2026-11-26", "2026-12-01"):
        set_day(monkeypatch, day)
        jobs.append(prepare(parse(flags(tmp_path, model, data, day)), 1))
        assert f"the chat template writes today's date: it stays {day} for this run" in jobs[-1].summary
    for rows in ("train_rows", "eval_rows"):
        first, second = (
            [getattr(job, rows).tokens[0].where(n) for n in numbers_of(getattr(job, rows))] for job in jobs
        )
        assert first == second
    assert fingerprint(jobs[0].train_rows) != fingerprint(jobs[1].train_rows)  # the dates stand in them


def numbers_of(rows):
    return np.searchsorted(rows.tokens[0].offsets, np.sort(rows.pieces.start), side="right") - 1


def test_a_template_without_a_date_is_left_alone(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(SAMPLE / "tiny")
    for template in (None, "{{ messages }}", {"default": "{{ messages }}"}):
        tokenizer.chat_template = template
        keep_date(tokenizer)
        assert pinned_date(tokenizer) is None
    PromptFormat.of("chat").write(tmp_path)
    assert set(json.loads((tmp_path / FILE).read_text())) == {"chat", "prompt", "prompt_with_context"}


def test_templates_by_name_and_other_formats_of_the_date(monkeypatch):
    set_day(monkeypatch, "2026-11-26")
    tokenizer = AutoTokenizer.from_pretrained(SAMPLE / "tiny")
    tokenizer.chat_template = {
        "default": "{% macro day() %}{{ strftime_now( '%Y-%m-%d %H:%M' ) }}{% endmacro %}{{ day() }}",
        "tool_use": '{{ strftime_now(format="%B\\n\\"%-d\\"") }}',
    }
    keep_date(tokenizer)
    set_day(monkeypatch, "2026-12-01")
    assert tokenizer.apply_chat_template(QUESTION, tokenize=False) == "2026-11-26 00:00"
    assert (
        tokenizer.apply_chat_template(QUESTION, chat_template="tool_use", tokenize=False) == 'November\n"26"'
    )


def test_a_template_whose_date_cannot_be_kept_is_refused():
    tokenizer = AutoTokenizer.from_pretrained(SAMPLE / "tiny")
    tokenizer.chat_template = "{% set form = '%Y' %}{{ strftime_now (form) }}"
    with pytest.raises(
        ValueError, match="the chat template calls strftime_now with a format that is no text"
    ):
        keep_date(tokenizer)


def test_a_date_that_is_none(tmp_path, model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    for text in ("yesterday", "2026-13-01", "20261126"):
        PromptFormat.of("chat", text).write(tmp_path)
        with pytest.raises(ValueError, match=f"the date is '{text}'; YYYY-MM-DD was expected"):
            keep_date(tokenizer, tmp_path)


def train(runtime, command, day):
    with pytest.MonkeyPatch.context() as patch:
        set_day(patch, day)
        run_one(runtime, command)


@pytest.mark.process
def test_the_date_of_the_start_is_that_of_the_run_and_of_its_answers(tmp_path, model, data, monkeypatch):
    """A run resumes on another day, on a machine without its tokens; checkpoint and merged model are asked
    with the date of the training."""
    on_ranks(train, 1, command=flags(tmp_path, model, data, "2026-11-26"), day="2026-11-26")
    more = flags(tmp_path, model, data, "2026-12-01", "--resume", "latest", "--max_steps", "3")
    on_ranks(train, 1, command=more, day="2026-12-01")
    checkpoint = tmp_path / "out" / "checkpoint-3"
    assert Checkpoint(checkpoint).step == 3
    set_day(monkeypatch, "2026-12-02")
    merge(checkpoint, tmp_path / "merged")
    tokens = tokenize(str(data), dated_tokenizer(model), cache=tmp_path)
    expected = tokens.input_ids[: int(np.argmax(tokens.trained))].tolist()
    assert "Today Date: 26 Nov 2026" in dated_tokenizer(model).decode(expected)
    for source in (ModelSource.of_checkpoint(checkpoint), ModelSource.of_model(tmp_path / "merged")):
        assert source.prompts.date == "2026-11-26"
        assert source.prompts.encode(source.tokenizer, "What is 0?") == expected
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.chat_template == DATED  # as the base model has it
    assert "02 Dec 2026" in merged.decode(chat_ids(merged, QUESTION))


def dated_tokenizer(model: Path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    with pytest.MonkeyPatch.context() as patch:
        set_day(patch, "2026-11-26")
        keep_date(tokenizer)
    return tokenizer
