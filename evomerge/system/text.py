"""Other people's text before it reaches a terminal, a card or a page: readable, on its line, and no markup.

Names of models, licences, keys of YAML and what a model writes come from whoever made the file. A control character
in them moves a terminal's cursor or sets its title, a bidirectional mark shows the words in another order, a line
break starts a heading, a bracket a link or a script.
"""

from __future__ import annotations

import re

from evomerge.system.secrets import masked

# Control characters but tab and line feed; format characters (bidirectional marks, tags, byte order marks, joiners
# left alone, which scripts need); half a surrogate pair, which no stream can encode.
_UNREADABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u180e\u200b\u200e\u200f\u202a-\u202e"
    "\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff]"
)
_LINE_BREAKS = re.compile("\r\n?|[\u2028\u2029\x85]")
# Markdown's own marks, and what HTML begins with. In the middle of a word most of them mean nothing.
_MARKDOWN = re.compile(r"([\\`*\[\]|~]|(?<!\w)_|_(?!\w)|^[#>+=-]|^\d+(?=[.)]\s))")
_HTML = str.maketrans({"<": "&lt;", ">": "&gt;", "&": "&amp;"})
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_LONGEST = 200


def plain(text: str) -> str:
    """Takes out of a text what moves a terminal or hides: control characters but tabs and line breaks, and marks."""
    return _UNREADABLE.sub("", _LINE_BREAKS.sub("\n", text))


def printable(text: str) -> str:
    """Makes a text fit for a terminal or a log: `plain`, and without the secrets in it."""
    return plain(masked(text))


def one_line(text: str, limit: int = _LONGEST) -> str:
    """Puts a name on one line of readable characters, shortened in the middle where it is longer than `limit`."""
    line = " ".join(plain(text[: 100 * limit]).split())
    if len(line) <= limit:
        return line
    half = (limit - 3) // 2
    return f"{line[:half]}...{line[-half:]}"


def markdown(text: str, limit: int = _LONGEST) -> str:
    """Writes a name as Markdown that shows it as it is, on one line: neither HTML nor Markdown in it has an effect."""
    return _MARKDOWN.sub(r"\\\1", one_line(text, limit)).translate(_HTML)


def without_html(text: str) -> str:
    """Makes a text of several lines one that no browser reads as HTML."""
    return _TAG.sub("&lt;", text)


def code(text: str, limit: int = _LONGEST) -> str:
    """Writes a name as a code span of Markdown."""
    line = one_line(text, limit).replace("`", "'")
    return f"`{line}`"


def code_block(text: str, language: str = "") -> str:
    """Writes a text as a code block of Markdown that nothing in the text can end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{plain(text).strip()}\n{fence}"
