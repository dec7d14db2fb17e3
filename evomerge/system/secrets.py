"""Passwords and tokens, taken out of whatever is shown, compared or kept where others may read.

They come in URLs (before the ``@``, or in the query), in the headers of requests, and in variables of the environment.
"""

from __future__ import annotations

import os
import re
from urllib.parse import unquote, unquote_plus

HIDDEN = "***"
"""What stands for a secret."""

_NAME = r"[\w.-]*(?:passw(?:or)?d|passphrase|pwd|secret|credentials?|api[-_]?key|access[-_]?key|private[-_]?key|" + (
    r"sslkey|signature|authorization|(?<![a-z])token(?!\w))"
)
_USER_INFO = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)([^\s/?#@'\"<>]*(?::[^\s'\"<>]*)?)@")
_QUERY = re.compile(rf"(?i)([?&;]{_NAME}=)([^&\s'\"<>;]+)")
_SETTING = re.compile(r"(?i)\b((?:pg|ssl|db)?passw(?:or)?d\s*[=:]\s*)('[^']*'|\"[^\"]*\"|[^\s&'\",;)]+)")
_HEADER = re.compile(
    r"(?i)\b((?:proxy-)?authorization|x-api-key|api-key|x-auth-token|set-cookie|cookie)"
    r"(['\"]?\s*[:=]\s*['\"]?)((?:(?:bearer|basic|token|digest)\s+)?[^\s'\",;}\]]+)"
)
_BEARER = re.compile(r"(?i)\b(bearer\s+)([\w.~+/=-]{8,})")
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|AKIA[0-9A-Z]{12,})\b")
_VARIABLE = re.compile(r"(?i)(passw(or)?d|passphrase|secret|token|credential|api_?key|access_?key|private_?key)$")
_SHORTEST = 8  # characters of a variable's value that is looked for: fewer occur in text by chance


def masked(text: str, *urls: str) -> str:
    """Puts ``***`` in the place of every secret in a text.

    Args:
        text: The text.
        urls: URLs whose secrets may stand in it without the rest of the URL, as in the message of a driver.
    """
    for secret in sorted({*_of_environment(), *(s for url in urls for s in secrets_of(url))}, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    if "://" in text:
        text = _USER_INFO.sub(rf"\1{HIDDEN}@", text)
    text = _QUERY.sub(rf"\1{HIDDEN}", text)
    text = _SETTING.sub(rf"\1{HIDDEN}", text)
    text = _HEADER.sub(rf"\1\2{HIDDEN}", text)
    text = _BEARER.sub(rf"\1{HIDDEN}", text)
    return _TOKEN.sub(HIDDEN, text)


def secrets_of(url: str) -> tuple[str, ...]:
    """Finds the secrets in a URL, as they are written and decoded: the password, and secret parts of the query."""
    match = _USER_INFO.match(url)
    user, _, password = match[2].partition(":") if match else ("", "", "")
    parts = [password or ("" if not match else user)]
    parts += [m[2] for m in _QUERY.finditer(url)]
    forms = {form for part in parts for form in (part, unquote(part), unquote_plus(part)) if form}
    return tuple(sorted(forms))


def has_secret(text: str) -> bool:
    """Tells whether there is anything in a text that `masked` hides."""
    return masked(text) != text


def is_secret_name(variable: str) -> bool:
    """Tells whether a variable of the environment is one whose value `masked` hides."""
    return bool(_VARIABLE.search(variable))


def _of_environment() -> list[str]:
    """The values of variables whose names say that they are secret."""
    return [value for name, value in os.environ.items() if _VARIABLE.search(name) and len(value) >= _SHORTEST]
