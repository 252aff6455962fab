"""The command line: questions from flags, files and the keyboard, and bad ones."""

import json
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from tests.model.test_generation import asked, save_lora
from tests.support.models import save_llama
from tests.support.on_ranks import ROOT
from tests.support.runs import environment, start
from tests.support.saved import TOKENIZER
from tools.generate import Terminal, main, read_prompts
from tools.merge_checkpoint.merging import merge
from trainer.config_derived import SAMPLE
from trainer.prompts import PromptFormat

PROGRAM = ("-m", "tools.generate")


@pytest.mark.process
def test_the_same_answer_from_a_checkpoint_by_two_ranks_and_from_the_keyboard(tmp_path):
    from transformers import AutoModelForCausalLM

    checkpoint, merged, questions = (
        save_lora(tmp_path),
        tmp_path / "merged",
        ["Who?", "Why is it so?", "What is 1 + 1?"],
    )
    merge(checkpoint, merged)
    reference, expected = AutoModelForCausalLM.from_pretrained(merged).eval(), ""
    for question in questions:
        ids = PromptFormat.of("instruction").encode(TOKENIZER, question)
        answer = TOKENIZER.decode(asked(reference, ids, 12, TOKENIZER.eos_token_id), skip_special_tokens=True)
        expected += f"### Instruction\n{question}\n### Answer\n{answer}\n"
    (tmp_path / "questions.txt").write_text("\n\n".join(questions))
    said = start(
        "--checkpoint",
        checkpoint,
        "--tensor_parallel_size",
        2,
        "--prompts",
        tmp_path / "questions.txt",
        "--batch_size",
        2,
        "--max_new_tokens",
        12,
        program=PROGRAM,
    )
    assert said.stdout == expected
    typed = subprocess.run(
        [sys.executable, *PROGRAM, "--model", merged, "--interactive", "--max_new_tokens", "12"],
        text=True,
        input="\n".join(questions),
        cwd=ROOT,
        capture_output=True,
        env=environment(),
        timeout=900,
    )
    assert typed.stdout.replace("> ", "") == expected + "\n", typed.stderr


def test_prompts_of_a_file(tmp_path):
    path, form = tmp_path / "prompts.jsonl", PromptFormat.of("instruction")
    path.write_text(
        '{"instruction": "Who?", "context": "He."}\n'
        '{"instruction": "Who?", "input": "He."}\n'
        '{"prompt": "Once"}\n'
    )
    (who, ids), again, (once, text) = read_prompts(path, form, TOKENIZER)
    assert (who, ids) == again == ("Who?", form.encode(TOKENIZER, "Who?", "He.")) and once == "Once"
    assert text == TOKENIZER("Once")["input_ids"]
    for line, problem in (
        ('{"prompt": 3}', "prompts.jsonl:1: .* are texts"),
        ("[1]", "an object with instruction"),
        ("{", "invalid"),
        ("", "holds no prompt"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no chat template"),
    ):
        path.write_text(line)
        with pytest.raises(ValueError, match=problem):
            read_prompts(path, form, TOKENIZER)


def test_chats_of_a_file_are_read_as_in_training(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(SAMPLE / "tiny")
    tokenizer.chat_template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}"
        "{{ '<' + message.role + '>' + message.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    path, form = tmp_path / "prompts.jsonl", PromptFormat.of("chat")
    question, tools = {"role": "user", "content": "Q"}, '[{"name": "add"}]'
    shared = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    path.write_text(
        json.dumps({"messages": [question], "system": "S", "tools": tools}) + "\n" + json.dumps(shared)
    )
    (asked, ids), (again, others) = read_prompts(path, form, tokenizer)
    assert asked == again == "Q" and tokenizer.decode(others) == "<user>Q<assistant>"
    assert tokenizer.decode(ids) == f"{tools}<system>S<user>Q<assistant>"


def test_answers_of_a_batch_are_printed_one_after_the_other(capsys):
    terminal, text = Terminal(["one", "two"], TOKENIZER, {2}, 40), "Größe: 🤗!"
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    seen = []
    for number, token in [(1, ids[0]), *((0, token) for token in ids), (1, ids[1]), (0, 2), (1, 2)]:
        terminal(number, token)
        seen.append(capsys.readouterr().out)
    assert (
        "".join(seen)
        == f"### Instruction\none\n### Answer\n{text}\n### Instruction\ntwo\n### Answer\n{text[:2]}\n"
    )
    assert "\ufffd" not in "".join(seen) and sum(map(bool, seen)) > 5


@pytest.mark.parametrize(
    "flags, problem",
    [
        (("--instruction", "a" * 3000), "tokens and --max_new_tokens 64 are more than the model's positions"),
        (("--instruction", "a", "--top_p", "0"), "--top_p 0.0: above 0, up to 1 was expected"),
        (("--instruction", "a", "--tensor_parallel_size", "3"), "not divisible"),
        (("--instruction", "a", "--max_new_tokens", "0"), "--max_new_tokens 0: at least 1"),
        (("--prompts", "nowhere.txt"), "--prompts nowhere.txt: no such file"),
    ],
)
def test_bad_input(tmp_path, capsys, monkeypatch, flags, problem):
    monkeypatch.setattr("tools.generate.prepare_environment", lambda world_size: None)
    save_llama(tmp_path)
    assert main(["--model", str(tmp_path), *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and problem in error


def test_what_is_no_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tools.generate.prepare_environment", lambda world_size: None)
    checkpoint = save_lora(tmp_path)
    save_llama(tmp_path / "base", num_key_value_heads=2, num_hidden_layers=2, seed=1)  # no longer the base
    assert main(["--checkpoint", str(checkpoint), "--instruction", "a"]) == 1
    assert "is not the model that" in capsys.readouterr().err
    assert main(["--model", str(checkpoint), "--instruction", "a"]) == 1
    assert "weights in safetensors were expected" in capsys.readouterr().err
