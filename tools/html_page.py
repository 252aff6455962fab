"""Pages for a browser that are one file, and load and run nothing."""

import os
from contextlib import suppress
from pathlib import Path

# The policy forbids the page, whatever texts it shows, to run or to load anything.
PAGE = """<!DOCTYPE html>
<html><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'{images}">
<title>{title}</title><style>
{style}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""


def build_page(title: str, style: str, body: str, images: bool = False) -> str:
    """The HTML of a page. `style`: its CSS; `images`: whether the body has pictures in data URLs."""
    return PAGE.format(title=title, style=style, body=body, images="; img-src data:" if images else "")


def write_file(path: Path, text: str) -> None:
    """Write a text file, which gets its name when it is complete; raises ValueError where that cannot be."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # A file name in the text may be no Unicode.
        partial.write_text(text, encoding="utf-8", errors="replace")
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise ValueError(f"--output {path} cannot be written: {error.strerror}") from None
