"""The date that chat templates write as today's: one for a whole run, wherever and whenever it goes on.

Templates call strftime_now("%d %b %Y"), a function of transformers that reads the clock. Newer versions take
no other function in its place, so a call is replaced, in the text of the template, by what it would return.
"""

import ast
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

CLOCK = "strftime_now"
CALL = re.compile(CLOCK + r"""\s*\(\s*(?:format\s*=\s*)?("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')\s*,?\s*\)""")
CONSTANT = "2000-01-01"  # for texts that are only compared


def writes_date(tokenizer) -> bool:
    """Whether a chat template of the tokenizer asks for the date."""
    return any(CLOCK in template for template in _templates(tokenizer))


def pinned_date(tokenizer) -> str | None:
    """The date that `pin_date` has given the tokenizer; None where it is today's, or no template asks."""
    return getattr(tokenizer, "pinned_date", None)


def pin_date(tokenizer, date: str) -> None:
    """Make `date` (YYYY-MM-DD) today for the tokenizer's chat templates; the time of day is midnight.

    The templates that it is saved with stay as they are. Raises ValueError for what is no date, and for a
    template that asks for the date in another way than above.
    """
    now = datetime.strptime(date, "%Y-%m-%d")
    for template in _templates(tokenizer):
        if CLOCK + "(" in re.sub(r"\s", "", CALL.sub("", template)):
            raise ValueError(
                f"the chat template calls {CLOCK} with a format that is no text, so its date cannot be kept "
                f'for a whole run: {CLOCK}("%d %b %Y") was expected'
            )
    apply = type(tokenizer).apply_chat_template

    def apply_dated(conversation, tools=None, documents=None, chat_template=None, **settings):
        template = _write_date(tokenizer.get_chat_template(chat_template, tools), now)
        return apply(
            tokenizer, conversation, tools=tools, documents=documents, chat_template=template, **settings
        )

    tokenizer.apply_chat_template, tokenizer.pinned_date = apply_dated, date


@contextmanager
def on_constant_date(tokenizer) -> Iterator[None]:
    """Within the context, a tokenizer with a pinned date writes CONSTANT: equal texts on every day."""
    date = pinned_date(tokenizer)
    pin_date(tokenizer, CONSTANT)
    try:
        yield
    finally:
        pin_date(tokenizer, date)


def _templates(tokenizer) -> list[str]:
    """The tokenizer's chat templates: it has none, one, or several by name."""
    templates = tokenizer.chat_template or {}
    return list(templates.values()) if isinstance(templates, dict) else [templates]


def _write_date(template: str, now: datetime) -> str:
    """The template with `now` in place of each call for the date."""
    return CALL.sub(lambda call: json.dumps(now.strftime(ast.literal_eval(call[1]))), template)
