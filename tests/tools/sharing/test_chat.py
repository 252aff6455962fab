"""tools.generate --chat: the conversation in the chat template, what does not fit, and the answers."""

import contextlib
import io
import sys
from unittest import mock

import pytest
from transformers import AutoTokenizer

from model.generation import bucket_of
from tests.model.test_generation import asked
from tests.support.models import save_llama
from tests.support.on_ranks import on_ranks
from tools import generate
from tools.chat import Conversation, typed_turns
from trainer.config_derived import SAMPLE

TEMPLATE = (
    "{% for message in messages %}{{ '<' + message.role + '>' + message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer_of(template=TEMPLATE):
    tokenizer = AutoTokenizer.from_pretrained(SAMPLE / "tiny")
    tokenizer.chat_template = template
    return tokenizer


def ids_of(text):
    return tokenizer_of()(text, add_special_tokens=False)["input_ids"]


def typed(monkeypatch, conversation, *lines, answer="A"):
    """The texts of the prompts that the lines make."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    texts = []
    for ids in typed_turns(conversation):
        texts.append(tokenizer_of().decode(ids))
        conversation.answered(ids_of(answer))
    return texts


def test_a_turn_has_all_turns_before_it(monkeypatch, capsys):
    lines = ["one", "", "  two ", "/reset", "three", "/exit", "four"]
    texts = typed(monkeypatch, Conversation(tokenizer_of(), 100, "Be kind."), *lines)
    system = "<system>Be kind.<user>"
    expected = ["one<assistant>", "one<assistant>A<user>two<assistant>", "three<assistant>"]
    assert texts == [system + text for text in expected]
    said = capsys.readouterr()
    assert said.out == "" and said.err == "(the conversation starts anew)\n"  # and no prompt, in a pipe


def test_the_oldest_turns_go_and_that_is_said(monkeypatch, capsys):
    system, turn = "<system>S", "<user>Q<assistant>A"
    most = len(ids_of(system + 2 * turn + "<user>Q<assistant>"))
    conversation = Conversation(tokenizer_of(), most, "S")
    texts = typed(monkeypatch, conversation, *"QQQQ", "Q" * 200, "Q")
    assert texts == [system + min(turns, 2) * turn + "<user>Q<assistant>" for turns in range(5)]
    gone = "(the conversation is too long: the model no longer sees the 1 oldest question and answer)"
    first, refused, second = capsys.readouterr().err.splitlines()
    assert first == second == gone
    assert refused.endswith(f"at most {most}: it is not asked, and the conversation stays as it was)")


def test_what_cannot_be_a_chat():
    with pytest.raises(ValueError, match="--chat needs a chat template, and .*; --interactive asks"):
        Conversation(AutoTokenizer.from_pretrained(SAMPLE / "tiny"), 100)
    with pytest.raises(ValueError, match="--system has about .* tokens; a conversation has at most 20"):
        Conversation(tokenizer_of(), 20, "kind " * 30)
    silent = "{% for message in messages %}{% if message.role != 'system' %}{{ message.content }}{% endif %}"
    with pytest.raises(ValueError, match="--system: the model's chat template does not write"):
        Conversation(tokenizer_of(silent + "{% endfor %}"), 100, "Be kind.")
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}?"
    with pytest.raises(ValueError, match="the chat template fails: No system role"):
        Conversation(tokenizer_of(refusing), 100, "Be kind.")


def test_flags(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tools.generate.prepare_environment", lambda world_size: None)
    save_llama(tmp_path)
    assert generate.main(["--model", str(tmp_path), "--chat"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --chat needs a chat template") and error.count("\n") == 1
    with pytest.raises(SystemExit):
        generate.parse(["--model", "m", "--interactive", "--system", "Be kind."])
    assert "--system is the system message of --chat" in capsys.readouterr().err
    lengths = [
        generate.parse(["--model", "m", *more]).max_new_tokens
        for more in (["--chat"], ["--interactive"], ["--chat", "--max_new_tokens", "9"])
    ]
    assert lengths == [256, 64, 9]


def chats(runtime, model, lines, flags):
    """(what is printed, the number of graphs) of a conversation; rank 0 reads the lines."""
    with mock.patch.object(sys, "stdin", io.StringIO("\n".join(lines))):
        chosen = generate.parse(["--model", model, "--chat", *flags])
        source, *others = generate.prepare(chosen, runtime.world_size)
        out = io.StringIO()
        # stdout is one for all ranks
        with contextlib.redirect_stdout(out) if runtime.rank == 0 else contextlib.nullcontext():
            runtime.barrier()
            generate.answer(runtime, source, chosen, *others)
            runtime.barrier()
    return out.getvalue(), runtime.compilations()


@pytest.mark.process
def test_a_conversation_of_two_ranks_is_that_of_transformers(tmp_path):
    reference = save_llama(tmp_path, num_hidden_layers=2)
    tokenizer_of().save_pretrained(tmp_path)
    lines, text, expected, lengths = ["Who?", "Why?", "How?", "No."], "", [], []
    for line in lines:
        text += f"<user>{line}<assistant>"
        lengths.append(len(ids_of(text)))
        said = tokenizer_of().decode(
            asked(reference, ids_of(text), 12, tokenizer_of().eos_token_id), skip_special_tokens=True
        )
        expected.append(said)
        text += said.strip()
    flags = ["--tensor_parallel_size", "2", "--max_new_tokens", "12"]
    (out, compilations), _ = on_ranks(chats, 2, model=str(tmp_path), lines=lines, flags=flags)
    assert out == "".join(f"{said}\n" for said in expected)
    buckets = {bucket_of(length, 512) for length in lengths}
    assert len(buckets) < len(lines) and compilations == len(buckets) + 1  # a prefill each, and decoding
