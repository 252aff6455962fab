"""From a record, in one of the usual formats, to the text of an example."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from data.chats import Rendered, render_chat
from data.messages import WEIGHTS, Chat, is_quoted, read_chat, read_text, texts_in
from data.sources import BadRecord

SYSTEM, TOOLS = ("system", "system_prompt"), ("tools",)
# {format: (required fields, optional fields)}, each as the names that data sets give it. `auto` takes the
# first format whose required fields are there.
FORMATS = {
    "messages": ((("messages", "conversations", "conversation"),), (TOOLS, SYSTEM)),
    "prompt_completion": ((("prompt",), ("completion",)), ()),  # of messages: tools and system too
    "dolly": ((("instruction",), ("response",)), (("context", "input"),)),
    "alpaca": ((("instruction",), ("output",)), (("input", "context"),)),
    "text": ((("text",),), ()),
}
OURS = ("data", "model", "parallel", "tools", "trainer")
DECISIVE = (*SYSTEM, "history", *TOOLS, "functions", "input", "context")  # an answer depends on these fields


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
        if all(record.get(name_in(record, names)) is not None for names in needed):
            return name
    known = "; ".join(f"{name}: {_names(needed)}" for name, (needed, _) in FORMATS.items())
    if {"chosen", "rejected"} <= record.keys():
        raise BadRecord(f"{where}: a chosen and a rejected answer: --objective dpo trains on such pairs")
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
        return found, "".join([*map(inspect.getsource, modules), *_sources_beside(imported)])
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


def _sources_beside(module: ModuleType) -> list[str]:
    """The source code of what was imported from a module's folder, or from one within it."""
    folder = os.path.dirname(module.__file__) + os.sep
    files = {
        file
        for name, each in list(sys.modules.items())
        if (file := getattr(each, "__file__", None)) and name.split(".")[0] not in OURS
    }
    return [
        Path(file).read_text(encoding="utf-8")
        for file in sorted(files)
        if file.startswith(folder) and file.endswith(".py") and "site-packages" not in file
    ]


def render(record: object, where: str, format_name: str, tokenizer) -> Rendered:
    """The example in a record of a format.

    Raises BadRecord where a field is missing, empty or of another type, where a field that decides the answer
    is not read, nor quoted in the example, and where the chat template does not write what the record says;
    ValueError where the tokenizer has no chat template for a format that needs one. `where` is the record's
    position.
    """
    needed, optional = FORMATS[format_name]
    if not isinstance(record, dict):
        raise BadRecord(
            f"{where}: an object with {_names(needed)} was expected; this is {type(record).__name__}"
        )
    of_messages = format_name == "prompt_completion" and isinstance(record.get("prompt"), list)
    if of_messages:
        optional = (TOOLS, SYSTEM)
    fields = [name_in(record, names) for names in (*needed, *optional)]
    if format_name == "messages" or of_messages:
        rendered = _render_messages(record, fields, where, tokenizer)
    else:
        texts = [read_text(record, field, where, number < len(needed)) for number, field in enumerate(fields)]
        rendered = _render_texts(texts, format_name)
    unread = [name for name in record if name not in fields and any(texts_in(record[name]))]
    decisive = [name for name in unread if name in DECISIVE]
    for name in decisive:
        if not is_quoted(record[name], rendered.question):
            raise BadRecord(
                f"{where}: the field {name!r} decides the answer, and --format {format_name} does not read "
                "it: write messages, or put it into the prompt by a function (--format module:function)"
            )
    for name in WEIGHTS:
        if name in record and not record[name] and name not in fields:
            raise BadRecord(
                f"{where}: {name!r} is {record[name]!r}, so it is not to be trained on: leave it out"
            )
    unread = [name for name in unread if not isinstance(record[name], int)]
    return replace(rendered, unread=(*unread, *rendered.unread))


def chat_of(record: dict, where: str) -> Chat | None:
    """The chat in a record that has messages, or else None; raises BadRecord for one that cannot be read."""
    ((messages,), others) = FORMATS["messages"]
    messages, tools, system = (record.get(name_in(record, names)) for names in (messages, *others))
    if messages is None:
        return None
    return read_chat(messages, tools, read_text({"system": system}, "system", where, required=False), where)


def _render_messages(record: dict, fields: list[str], where: str, tokenizer) -> Rendered:
    """The example in a record of messages; `fields` are those of messages, or of prompt and completion, then
    of tools and system."""
    *chats, tools, system = fields
    messages, first = record.get(chats[0]), 0
    if len(chats) == 2:
        if not isinstance(record.get(chats[1]), list):
            raise BadRecord(f"{where}: the field 'prompt' is a list of messages; so must be 'completion'")
        first = len(messages)
        messages = [*messages, *record[chats[1]]]
    chat = read_chat(messages, record.get(tools), read_text(record, system, where, required=False), where)
    return render_chat(chat, first + chat.added, where, tokenizer)


def _render_texts(texts: list[str], format_name: str) -> Rendered:
    """The example in the texts of the fields of a format."""
    if format_name == "text":
        return Rendered("", texts[0], texts[0])
    if format_name == "prompt_completion":
        return Rendered(*texts, texts[0])
    instruction, answer, context = texts
    prompt = format_prompt(instruction, context)
    return Rendered(prompt, answer, prompt)


def name_in(record: dict, names: tuple[str, ...]) -> str:
    """Of a field's names, the first with a value that is not empty, or with an empty one, or the first."""
    filled = [name for name in names if any(texts_in(record.get(name)))]
    present = [name for name in names if record.get(name) is not None]
    return (filled or present or names)[0]


def _names(fields: tuple[tuple[str, ...], ...]) -> str:
    """The names of fields, for messages to the user."""
    return ", ".join(" or ".join(names) for names in fields)
