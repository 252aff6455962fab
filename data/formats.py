"""Records -> the text of an example and which of it is trained, in the formats that people have."""

import importlib
import inspect
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from data.sources import BadRecord, in_one_line

# Format -> the fields that it needs, and those that it may have. The first whose needs are met is guessed.
FORMATS = {
    "messages": (("messages",), ()),
    "prompt_completion": (("prompt", "completion"), ()),
    "dolly": (("instruction", "response"), ("context",)),
    "alpaca": (("instruction", "output"), ("input",)),
    "text": (("text",), ()),
}
ROLES = ("system", "user", "assistant", "tool")
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Rendered:
    """`prompt` is not trained, `text` is. A chat template's `text` is the whole, of which the characters in
    `spans` train.

    `question` is what a model is asked: the prompt, a chat up to its first answer, or of plain text the text.
    """

    prompt: str
    text: str
    question: str
    spans: tuple[tuple[int, int], ...] | None = None


def format_prompt(instruction: str, context: str = "") -> str:
    """The prompt up to the answer, as the LoRA tutorial for Trainium writes it."""
    parts = [
        f"### Instruction\n{instruction}",
        *([f"### Context\n{context}"] if context else []),
        "### Answer\n",
    ]
    return "\n\n".join(parts)


def guess_format(record: object, where: str) -> str:
    """The format whose fields the record has; raises BadRecord where there is none."""
    if not isinstance(record, dict):
        raise BadRecord(f"{where}: an object was expected; this is {type(record).__name__}")
    for name, (needed, _) in FORMATS.items():
        if all(record.get(field) is not None for field in needed):
            return name
    known = "; ".join(f"{name}: {', '.join(needed)}" for name, (needed, _) in FORMATS.items())
    raise BadRecord(
        f"{where}: the fields {', '.join(map(repr, record)) or '(none)'} are of no known format ({known}): "
        "name one by --format, or write a function for --format module:function"
    )


def load_function(name: str) -> tuple[Callable[[dict], dict], str]:
    """(the user's function of --format module:function, the source of its module); raises ValueError where
    there is none."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
        if not callable(found):
            raise TypeError(f"it is {type(found).__name__}")
        return found, inspect.getsource(inspect.getmodule(found))
    except (Exception, SystemExit) as error:  # importing runs the user's code
        raise ValueError(
            f"--format {name}: {module} has no function {function!r} that can be imported here ({error})"
        ) from None


def render(record: object, where: str, format_name: str, tokenizer) -> Rendered:
    """The example that a record of that format is; raises BadRecord for a field that is missing, empty or of
    another type."""
    if not isinstance(record, dict):
        raise BadRecord(
            f"{where}: an object with {', '.join(FORMATS[format_name][0])} was expected; this is "
            f"{type(record).__name__}"
        )
    needed, optional = FORMATS[format_name]
    if format_name == "messages":
        return _render_chat(record.get("messages"), 0, where, tokenizer)
    if format_name == "prompt_completion" and isinstance(record.get("prompt"), list):
        prompt, completion = record["prompt"], record.get("completion")
        if not isinstance(completion, list):
            raise BadRecord(f"{where}: the field 'prompt' is a list of messages; so must be 'completion'")
        return _render_chat([*prompt, *completion], len(prompt), where, tokenizer)
    fields = [_text(record, field, where, required=True) for field in needed]
    fields += [_text(record, field, where, required=False) for field in optional]
    if format_name == "text":
        return Rendered("", fields[0], fields[0])
    if format_name == "prompt_completion":
        return Rendered(*fields, fields[0])
    instruction, answer, context = fields
    prompt = format_prompt(instruction, context)
    return Rendered(prompt, answer, prompt)


def _text(record: dict, field: str, where: str, required: bool) -> str:
    value = record.get(field)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        problem = "is missing" if value is None else f"is {type(value).__name__}"
        raise BadRecord(f"{where}: the field {field!r} {problem}; a text was expected")
    if required and not value.strip():
        raise BadRecord(f"{where}: the field {field!r} is empty; a text was expected")
    if SURROGATE.search(value):  # JSON can escape half a pair, and no tokenizer takes it
        raise BadRecord(f"{where}: the field {field!r} has a lone surrogate; Unicode text was expected")
    return value


def _render_chat(messages: object, first: int, where: str, tokenizer) -> Rendered:
    """A chat by the tokenizer's template; the assistant's turns from message `first` on are trained, with
    what ends them.

    The template is not asked where they are (few say it): a turn is what it adds to the turns before and the
    generation prompt.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template, which --format messages needs: take an instruct model's tokenizer, "
            "or write prompt and completion"
        )
    if not isinstance(messages, list) or not messages:
        raise BadRecord(
            f"{where}: the field 'messages' is no list of messages; objects with role and content were expected"
        )
    for number, message in enumerate(messages):
        place = f"{where}, message {number}"
        if not isinstance(message, dict):
            raise BadRecord(
                f"{place}: an object with role and content was expected; this is {type(message).__name__}"
            )
        if message.get("role") not in ROLES:
            raise BadRecord(f"{place}: the role is {message.get('role')!r}; {', '.join(ROLES)} are known")
        _text(message, "content", place, required=True)
    trained = [number for number in range(first, len(messages)) if messages[number]["role"] == "assistant"]
    if not trained:
        raise BadRecord(f"{where}: no message of the assistant: nothing would be trained")

    def written(count: int, generation: bool = False, messages=messages) -> str:
        try:
            return tokenizer.apply_chat_template(
                messages[:count], tokenize=False, add_generation_prompt=generation
            )
        except Exception as error:  # a template's own errors, whatever they are
            raise BadRecord(f"{where}: the chat template fails: {in_one_line(error)}") from None

    def opening() -> str:
        """What the template writes before an answer that opens a chat: the same whatever is said (it renders
        no empty chat)."""
        return os.path.commonprefix(
            [written(1, messages=[{"role": "assistant", "content": content}]) for content in "01"]
        )

    whole, spans = written(len(messages)), {}
    if not whole:
        raise BadRecord(f"{where}: the chat template writes nothing")
    for number in (number for number, message in enumerate(messages) if message["role"] == "assistant"):
        after = written(number + 1)
        before = written(number, True) if number else opening()
        if not (whole.startswith(after) and after.startswith(before)):
            raise BadRecord(
                f"{where}, message {number}: the chat template writes the turns before an answer differently once "
                "the answer is there, so what it adds cannot be told; write prompt and completion instead"
            )
        spans[number] = (len(before), len(after))
    asked = [start for number, (start, _) in spans.items() if number]
    return Rendered(
        "", whole, whole[: asked[0]] if asked else whole, tuple(spans[number] for number in trained)
    )
