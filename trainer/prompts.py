"""How a model is prompted and where its answers end: as in training, by a file next to its weights."""

import json
import os
import re
from dataclasses import asdict, dataclass
from datetime import date as calendar
from pathlib import Path

from data.dates import pin_date, writes_date
from data.encoding import encode_prompts
from data.formats import format_prompt
from data.tokens import CHAT, INSTRUCTION
from model.weights.hub import in_one_line, read_json
from parallel.runtime import meet

FILE, GENERATION = "prompt_format.json", "generation_config.json"


@dataclass(frozen=True)
class PromptFormat:
    """The text of a prompt, with and without a context; {instruction} and {context} stand in it.

    Of a `chat`, it is the user's message in the tokenizer's chat template. `date` (YYYY-MM-DD) is what the
    template writes as today's date; None where it writes none.
    """

    chat: bool
    prompt: str
    prompt_with_context: str
    date: str | None = None

    @classmethod
    def of(cls, kind: str, date: str | None = None) -> "PromptFormat":
        """The format of training examples of that kind (`prompts` in the meta of Tokens)."""
        if kind == INSTRUCTION:
            texts = format_prompt("{instruction}"), format_prompt("{instruction}", "{context}")
        else:
            texts = "{instruction}", "{instruction}\n\n{context}"
        return cls(kind == CHAT, *texts, date)

    @classmethod
    def read(cls, directory: Path, tokenizer) -> "PromptFormat":
        """The format of a checkpoint or merged model; raises ValueError where the file is damaged.

        A directory without such a file is prompted by its chat template, or else by the instruction format.
        """
        path = Path(directory) / FILE
        if not path.is_file():
            return cls.of(CHAT if tokenizer.chat_template else INSTRUCTION)
        values = read_json(path)
        if set(values) - {"date"} != set(cls.__annotations__) - {"date"} or not all(
            isinstance(value, bool if name == "chat" else str) for name, value in values.items()
        ):
            raise ValueError(
                f"{path} is damaged: chat (true or false), prompt, prompt_with_context and perhaps date "
                "(texts) were expected"
            )
        return cls(**values)

    def write(self, directory: Path) -> None:
        """Write `directory`/prompt_format.json; `date` stands in it where there is one."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        (Path(directory) / FILE).write_text(json.dumps(values, indent=1), encoding="utf-8")

    def encode(self, tokenizer, instruction: str, context: str = "") -> list[int]:
        """The ids of the prompt's tokens, the same as in training."""
        values = {"instruction": instruction, "context": context}
        text = re.sub(
            r"\{(instruction|context)\}",
            lambda field: values[field[1]],
            self.prompt_with_context if context else self.prompt,
        )
        if self.chat:
            return chat_ids(tokenizer, [{"role": "user", "content": text}])
        return text_ids(tokenizer, text)


def keep_date(tokenizer, directory: Path | None = None) -> None:
    """Have a tokenizer whose chat template writes today's date write one date from here on, in all processes.

    It is the date in the prompt_format.json of `directory`, a checkpoint or merged model, or else today's, as
    the first process sees it. Raises ValueError where the file is damaged, or the template asks for
    the date in a way that cannot be pinned.
    """
    if not writes_date(tokenizer):
        return
    known = PromptFormat.read(directory, tokenizer).date if directory else None
    if known and not _is_date(known):
        raise ValueError(f"{directory / FILE} is damaged: the date is {known!r}; YYYY-MM-DD was expected")
    pin_date(tokenizer, meet().share(f"date ({directory})", known or calendar.today().isoformat()))


def _is_date(text: str) -> bool:
    try:
        return calendar.fromisoformat(text).isoformat() == text  # newer Pythons take 20261126, too
    except ValueError:
        return False


def text_ids(tokenizer, text: str) -> list[int]:
    """The token ids of a prompt that is a text."""
    return encode_prompts([text], tokenizer)[0]


def chat_ids(tokenizer, messages: list[dict], tools: list[dict] | None = None) -> list[int]:
    """The token ids of a chat up to the beginning of the answer; `tools` are what it may call.

    Raises ValueError where the tokenizer has no chat template, or it fails on these messages.
    """
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template, which a prompt of messages needs")
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template's own errors, whatever they are
        raise ValueError(f"the chat template fails: {in_one_line(error)}") from None
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def read_generation_config(directory: Path) -> dict:
    """The contents of `directory`/generation_config.json, or {} where there is none.

    Raises ValueError where the file is no JSON object.
    """
    path = Path(directory) / GENERATION
    return read_json(path) if path.is_file() else {}


def end_tokens(directory: Path, tokenizer, vocab_size: int) -> set[int]:
    """The ids of the tokens that end an answer.

    These are the ones that generation_config.json (or config.json) lists, the tokenizer's end of text, and
    the special token with which the chat template ends the assistant's message. Raises ValueError where
    eos_token_id is neither a number nor a list of numbers.
    """
    listed = read_generation_config(directory).get("eos_token_id")
    if listed is None:
        listed = read_json(Path(directory) / "config.json").get("eos_token_id")
    ends = listed if isinstance(listed, list) else [listed]
    if not all(end is None or isinstance(end, int) for end in ends):
        raise ValueError(
            f"{directory}: eos_token_id is {listed!r}; a number, or a list of them, was expected"
        )
    ends = {*ends, tokenizer.eos_token_id, _turn_end(tokenizer)}
    return {end for end in ends if end is not None and 0 <= end < vocab_size}


def generation_config(directory: Path, tokenizer, vocab_size: int) -> dict:
    """The contents of a generation_config.json with which other programs end answers as in training."""
    base = {
        name: value
        for name, value in read_json(Path(directory) / "config.json").items()
        if name in ("bos_token_id", "pad_token_id") and value is not None
    }
    ends = sorted(end_tokens(directory, tokenizer, vocab_size))
    return base | read_generation_config(directory) | {"eos_token_id": ends[0] if len(ends) == 1 else ends}


def _turn_end(tokenizer) -> int | None:
    """The first special token that the chat template writes after an answer."""
    if tokenizer.chat_template is None:
        return None
    try:
        chats = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}], tokenize=False
            )
            for answer in "01"
        ]
    except Exception:  # the template does not accept these messages
        return None
    after_answer = os.path.commonprefix([chat[::-1] for chat in chats])[::-1]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = tokenizer(after_answer, add_special_tokens=False)["input_ids"]
    return next((number for number in ids if number in special), None)
