"""From a record, in one of the usual formats, to the text of an example and its trained part."""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

from data.sources import BadRecord, in_one_line

# {format: (required fields, optional fields)}. `auto` takes the first format whose required fields are there.
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
    """The text of an example: `prompt`, which is not trained, followed by `text`, which is.

    A chat is a `text` without a prompt, in which only the characters in `spans` are trained. `question` is
    what a model would be prompted with: the prompt, the chat up to its first answer, or the whole plain text.
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
    """The first format whose required fields the record has; raises BadRecord where there is none."""
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
    """The user's function of --format module:function, and the source code of the modules that it is in.

    Modules in the folder where the user stands come first, as with `python -m`. Raises ValueError where there
    is no such function.
    """
    module, _, function = name.partition(":")
    here, imported = os.getcwd(), None
    sys.path.insert(0, here)
    try:
        importlib.invalidate_caches()
        imported = importlib.import_module(module)
        found = getattr(imported, function)
        if not callable(found):
            raise TypeError(f"it is {type(found).__name__}")
        modules = dict.fromkeys([imported, inspect.getmodule(found) or imported])
        return found, "".join(map(inspect.getsource, modules))
    except (Exception, SystemExit) as error:  # importing runs the user's code
        file = getattr(imported, "__file__", None)
        raise ValueError(
            f"--format {name}: {module}{f' ({file})' if file else ''} has no function {function!r} that can "
            f"be imported in {here} ({error})"
        ) from None
    finally:
        sys.path.remove(here)
        if here not in sys.path:
            sys.path.append(here)  # last, for what the function itself imports


def render(record: object, where: str, format_name: str, tokenizer) -> Rendered:
    """The example in a record of a format.

    Raises BadRecord where a field is missing, empty or of another type, and ValueError where the tokenizer
    has no chat template for a format that needs one. `where` is the record's position.
    """
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
    """The text in a field, "" for an optional field that is missing; raises BadRecord for anything else."""
    value = record.get(field)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        problem = "is missing" if value is None else f"is {type(value).__name__}"
        raise BadRecord(f"{where}: the field {field!r} {problem}; a text was expected")
    if required and not value.strip():
        raise BadRecord(f"{where}: the field {field!r} is empty; a text was expected")
    if SURROGATE.search(value):  # JSON can escape half a pair; no tokenizer accepts it
        raise BadRecord(f"{where}: the field {field!r} has a lone surrogate; Unicode text was expected")
    return value


def _render_chat(messages: object, first: int, where: str, tokenizer) -> Rendered:
    """A chat in the tokenizer's template. Trained are the assistant's messages from number `first` on.

    With a message, the end that the template gives it is trained.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template, which --format messages needs: take an instruct model's "
            "tokenizer, or write prompt and completion"
        )
    _check_messages(messages, where)
    trained = [number for number in range(first, len(messages)) if messages[number]["role"] == "assistant"]
    if not trained:
        raise BadRecord(f"{where}: no message of the assistant: nothing would be trained")
    whole = _apply_template(messages, where, tokenizer)
    if not whole:
        raise BadRecord(f"{where}: the chat template writes nothing")
    spans = _answer_spans(messages, whole, where, tokenizer)
    prompted = [start for number, (start, _) in spans.items() if number]
    question = whole[: prompted[0]] if prompted else whole
    return Rendered("", whole, question, tuple(spans[number] for number in trained))


def _check_messages(messages: object, where: str) -> None:
    """Raise BadRecord unless this is a list of messages with a role and a text as content."""
    if not isinstance(messages, list) or not messages:
        raise BadRecord(
            f"{where}: the field 'messages' is no list of messages; "
            "objects with role and content were expected"
        )
    for number, message in enumerate(messages):
        position = f"{where}, message {number}"
        if not isinstance(message, dict):
            raise BadRecord(
                f"{position}: an object with role and content was expected; this is {type(message).__name__}"
            )
        if message.get("role") not in ROLES:
            raise BadRecord(f"{position}: the role is {message.get('role')!r}; {', '.join(ROLES)} are known")
        _text(message, "content", position, required=True)


def _answer_spans(messages: list[dict], whole: str, where: str, tokenizer) -> dict[int, tuple[int, int]]:
    """{number of an assistant's message: (start, stop) of its characters in the chat's text `whole`}.

    Few templates say where a message is. So it is what the template adds to the messages before it and the
    generation prompt. Raises BadRecord where the template does not add to that text, but changes it.
    """
    spans = {}
    for number in (number for number, message in enumerate(messages) if message["role"] == "assistant"):
        after = _apply_template(messages[: number + 1], where, tokenizer)
        if number:
            before = _apply_template(messages[:number], where, tokenizer, add_generation_prompt=True)
        else:
            before = _opening(where, tokenizer)
        if not (whole.startswith(after) and after.startswith(before)):
            raise BadRecord(
                f"{where}, message {number}: the chat template writes the turns before an answer differently "
                "once the answer is there, so what it adds cannot be told; "
                "write prompt and completion instead"
            )
        spans[number] = (len(before), len(after))
    return spans


def _opening(where: str, tokenizer) -> str:
    """What the template writes before an answer that opens a chat.

    Templates fail on empty chats, so it is what two such chats have in common.
    """
    chats = [[{"role": "assistant", "content": content}] for content in "01"]
    return os.path.commonprefix([_apply_template(chat, where, tokenizer) for chat in chats])


def _apply_template(messages: list[dict], where: str, tokenizer, add_generation_prompt: bool = False) -> str:
    """The text of a chat; raises BadRecord where the template fails."""
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # templates raise errors of their own
        raise BadRecord(f"{where}: the chat template fails: {in_one_line(error)}") from None
