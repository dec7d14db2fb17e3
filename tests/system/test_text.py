"""Other people's text: harmless on a terminal and in Markdown, still readable; and streams that are there."""

from __future__ import annotations

import io
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.system.streams import PrintableStream
from evomerge.system.text import code, code_block, markdown, one_line, plain, printable
from tests.frame import environment


@given(st.text())
def test_plain_text_moves_no_terminal_and_is_plain_already(text: str) -> None:
    shown = plain(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200e\u200f]", shown)
    assert plain(shown) == shown
    shown.encode()  # nothing that no stream can take


def test_ordinary_text_stays_as_it_is() -> None:
    text = "Überraschung: 模型\tv2, emoji 👩\u200d🔬\nsecond line"
    assert plain(text) == text
    assert markdown("Qwen2.5-0.5B_instruct") == "Qwen2.5-0.5B_instruct"
    assert code("org/name@main") == "`org/name@main`"


@pytest.mark.parametrize(
    "text", ["a\n\n# Heading", "<script>x</script>", "[x](javascript:y)", "a|b", "\x1b[2Jx", "# x", "1. x", "*x*"]
)
def test_markdown_of_a_name_is_a_name(text: str) -> None:
    shown = markdown(text)
    assert "\n" not in shown
    assert "<" not in shown
    assert not re.search(r"(?<!\\)[*\[\]|`]", shown)
    assert not re.match(r"#|\d+\.", shown)


def test_long_names_are_shortened_in_the_middle() -> None:
    assert one_line("a" * 500 + "end", 20).endswith("aaaaaend")
    assert len(one_line("x" * 10**7)) <= 200


@given(st.text(alphabet="`\n~ax"))
def test_nothing_ends_a_code_block(text: str) -> None:
    lines = code_block(text, "yaml").splitlines()
    fence = lines[-1]
    assert lines[0] == f"{fence}yaml"
    assert set(fence) == {"`"}
    assert not any(line.strip().startswith(fence) for line in lines[1:-1])


def test_a_stream_filters_whoever_writes() -> None:
    raw = io.StringIO()
    print("error: \x1b]0;title\x07 postgresql://u:secret@host/db", file=PrintableStream(raw))
    assert raw.getvalue() == "error: ]0;title postgresql://***@host/db\n"
    assert printable("a\r\nb") == "a\nb"


def test_closed_streams_are_replaced_and_no_file_gets_their_number() -> None:
    code = "import evomerge.system.streams as s; s.prepare_streams(); print('x'); print(open('/dev/null').fileno())"
    shell = f'exec {sys.executable} -c "{code}" 2>&- <&-'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env=environment(), check=True)
    assert int(done.stdout.split()[1]) > 2
