"""This project's docstrings as Markdown, for the API reference: `Args:` and the like as lists."""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"^(Args|Returns|Raises|Attributes|Source): ?(.*)$")


def to_markdown(text: str) -> str:
    """A docstring whose sections are lists: each line of a section's own indentation is an entry,
    what is indented further goes on with it."""
    found: list[str] = []
    inside = False
    for line in text.splitlines():
        if section := SECTION.match(line):
            inside = not section[2]
            found += ["", f"**{section[1]}**" + (f": {section[2]}" if section[2] else ""), ""]
        elif inside and re.match(r" {4}\S", line):
            name, colon, rest = line.strip().partition(": ")
            entry = f"`{name}`: {rest}" if colon and "`" not in name else line.strip()
            found.append(f"- {entry}")
        elif inside and line.startswith("     "):
            found[-1] += f" {line.strip()}"
        else:
            inside = False
            found.append(line)
    return "\n".join(found)


class Sections(griffe.Extension):
    """Rewrites every docstring that the reference shows."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called once an object was read."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
