"""Reads the messages of a chat, in the spellings that data sets have, as chat templates expect them."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from data.sources import BadRecord

ROLES = ("system", "user", "assistant", "tool", "ipython")  # the last: Llama 3's name for a tool's result
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
MAY_BE_EMPTY = ("system", "tool", "ipython")
# Keys of an answer that say whether it trains, as OpenAI, axolotl and others call it.
WEIGHTS = ("weight", "train", "trainable", "loss")
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Chat:
    """A chat as `apply_chat_template` takes it.

    An answer that is only a call has no content. `untrained` has the numbers of the answers that the record
    keeps from training. `added` is 1 where a system message was put before those of the record.
    """

    messages: list[dict]
    tools: list[dict] | None
    untrained: frozenset[int]
    added: int


def read_chat(messages: object, tools: object, system: str, where: str) -> Chat:
    """The chat of a record: its messages, its tools (or None), and the text of its system field (or "").

    Keys without a value are left out: Arrow gives all objects of a column the same keys. Read are messages
    of role and content or (ShareGPT) from and value, content as a list of text parts, and tools and calls as
    JSON texts. Raises BadRecord for anything else. `where` is the record's position.
    """
    if not isinstance(messages, list) or not messages:
        raise BadRecord(
            f"{where}: the field 'messages' is no list of messages; "
            "objects with role and content were expected"
        )
    read, untrained, found_tools = [], [], [_read_objects(tools, "tools", where)]
    for number, message in enumerate(messages):
        position = f"{where}, message {number}"
        message = _read_message(message, position)
        found_tools.append(_read_objects(message.pop("tools", None), "tools", position))
        weight = min(_read_weight(message.pop(key, 1), key, position) for key in WEIGHTS)
        if message["role"] == "assistant" and not weight:
            untrained.append(number)
        read.append(message)
    found_tools = [found for found in found_tools if found]
    if any(found != found_tools[0] for found in found_tools[1:]):
        raise BadRecord(f"{where}: the record and its messages have different tools; one list was expected")
    added = _add_system(read, system, where)
    return Chat(read, found_tools[0] if found_tools else None, frozenset(n + added for n in untrained), added)


def read_text(record: dict, field: str, where: str, required: bool) -> str:
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


def without_nulls(value: object) -> object:
    """The value without the keys, at any depth, whose value is None; elements of lists stay."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def texts_in(value: object) -> Iterator[str]:
    """The texts and whole numbers in a value, at any depth, keys too; none for an empty one."""
    if isinstance(value, dict):
        for key, each in value.items():
            if each is not None:
                yield str(key)
                yield from texts_in(each)
    elif isinstance(value, list):
        for each in value:
            yield from texts_in(each)
    elif isinstance(value, (str, int)) and not isinstance(value, bool) and str(value).strip():
        yield str(value)


def is_written(value: object, squeezed: str) -> bool:
    """Whether a text has all texts in a value, white space aside, as they are or as JSON escapes them.

    The text comes from `squeeze`.
    """
    return all(any(squeeze(form) in squeezed for form in _forms(each)) for each in texts_in(value))


def is_quoted(value: object, text: str) -> bool:
    """Whether the text has all texts in a value, as whole words, with any white space between words."""
    words = (map(re.escape, each.split()) for each in texts_in(value))
    return all(re.search(r"(?<!\w)" + r"\s+".join(each) + r"(?!\w)", text) for each in words)


def squeeze(text: str) -> str:
    """The text without white space."""
    return "".join(text.split())


def calls_of(message: dict) -> list[dict]:
    """The calls of an answer: objects with a name and arguments."""
    return [call.get("function", call) for call in message.get("tool_calls", ())]


def _forms(text: str) -> Iterator[str]:
    """The text, and how it stands in JSON, and in JSON that is itself a text in JSON."""
    yield text
    for ascii_only in (False, True):
        escaped = json.dumps(text, ensure_ascii=ascii_only)[1:-1]
        yield escaped
        yield json.dumps(escaped, ensure_ascii=ascii_only)[1:-1]


def _read_message(message: object, position: str) -> dict:
    """A message with a known role and a text as content; the content of a mere call may be missing."""
    if not isinstance(message, dict):
        raise BadRecord(
            f"{position}: an object with role and content was expected; this is {type(message).__name__}"
        )
    message = without_nulls(message)
    if "role" not in message and isinstance(speaker := message.pop("from", None), str):
        message = {
            "role": SHAREGPT_ROLES.get(speaker, speaker),
            **({"content": message.pop("value")} if "value" in message else {}),
            **message,
        }
    role = message.get("role")
    if role not in ROLES:
        raise BadRecord(f"{position}: the role is {role!r}; {', '.join(ROLES)} are known")
    if "function_call" in message:
        raise BadRecord(f"{position}: 'function_call' is an older form, which is not read; write tool_calls")
    calls = _read_objects(message.pop("tool_calls", None), "tool_calls", position)
    if calls and not all(isinstance(call.get("function", call), dict) for call in calls):
        raise BadRecord(f"{position}: a function in 'tool_calls' is no object with name and arguments")
    if calls:
        message["tool_calls"] = calls
    message["content"] = _join_parts(message.get("content"), position)
    is_call = role == "assistant" and bool(calls)
    text = read_text(message, "content", position, required=not is_call and role not in MAY_BE_EMPTY)
    if is_call and not text.strip():
        del message["content"]
    else:
        message["content"] = text
    return message


def _join_parts(content: object, position: str) -> object:
    """The text of a list of text parts; what is no list stays."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise BadRecord(f"{position}: a part of the content is {kind!r}; parts of type 'text' are read")
    return "".join(read_text(part, "text", position, required=False) for part in content)


def _read_objects(value: object, field: str, where: str) -> list[dict] | None:
    """A list of objects, which, or each of which, may be a JSON text; None for an empty one."""
    if isinstance(value, str) and not value.strip():
        return None
    try:
        value = json.loads(value) if isinstance(value, str) else without_nulls(value)
        if isinstance(value, list):
            value = [json.loads(each) if isinstance(each, str) else each for each in value]
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{where}: the field {field!r} is invalid JSON ({error})") from None
    if value is not None and not (isinstance(value, list) and all(isinstance(each, dict) for each in value)):
        raise BadRecord(f"{where}: the field {field!r} is no list of objects, nor one as a JSON text")
    return value or None


def _read_weight(value: object, key: str, position: str) -> int:
    """0 or 1."""
    if value not in (0, 1):
        raise BadRecord(f"{position}: {key!r} is {value!r}; 0 (not trained) or 1 was expected")
    return int(value)


def _add_system(messages: list[dict], system: str, where: str) -> int:
    """Put the text of the system field before the messages; returns how many messages that adds."""
    if not system.strip():
        return 0
    if messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
        return 1
    if squeeze(messages[0]["content"]) not in ("", squeeze(system)):
        raise BadRecord(
            f"{where}: the record has a system field, and its messages begin with another system message; "
            "one of them was expected"
        )
    messages[0]["content"] = system
    return 0
