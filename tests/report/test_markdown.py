"""Text that others chose stays text: checked by rendering it with a CommonMark parser."""

import html
import re

import pytest
from markdown_it import MarkdownIt  # a dependency of rich

from hf_lowrank.report.markdown import Markdown, code, escape, fenced, one_line, slug

NASTY = [
    "**bold** _it_ __init__ `code` ~~no~~",
    "[link](http://evil.example) ![img](x.png) [^1]",
    "<script>alert(1)</script> <!-- c --> &amp; &lt;",
    "a | b || c",
    "{{ 7*7 }} {% raw %} {# c #}",
    r"back\slash \* \| end\ ",
    "# heading #",
    "$x^2$ $$y$$",
    "me@example.org www.example.org https://example.org",
    "``two` ticks```",
    "ends in tick`",
]


def shown(rendered: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", rendered)).strip()


@pytest.mark.parametrize("text", NASTY)
def test_escape_shows_the_text(text: str) -> None:
    parser = MarkdownIt("gfm-like", {"linkify": False})
    text = one_line(text)
    rendered = parser.render(f"x {escape(text)}")
    assert shown(rendered) == f"x {text}"
    assert not re.search(r"<(?!/?p>)", rendered), "nothing but the paragraph is markup"
    assert shown(parser.render(f"# x {escape(text)}")) == f"x {text}"


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize("form", [escape, code])
def test_one_table_cell(text: str, form: type) -> None:
    parser = MarkdownIt("gfm-like", {"linkify": False})
    text = one_line(text)
    rendered = parser.render(f"| a | b |\n| --- | --- |\n| {form(text)} | last |\n")
    cells = re.findall(r"<td>(.*?)</td>", rendered, re.DOTALL)
    assert [shown(cell) for cell in cells] == [text, "last"]


def test_one_line() -> None:
    assert one_line("a\n---\r\n\x00\x1b[31mb\u2028c\u202ed\ud800") == "a --- [31mb cd?"
    assert escape("a\n\n# b") == r"a \# b"
    one_line("\ud800").encode()


def test_escape_leaves_markdown() -> None:
    assert escape(escape("a*b")) == escape("a*b")
    assert escape(Markdown("*a*")) == "*a*"


@pytest.mark.parametrize("text", ["```\n# out", "````", "a\n---\nb", "  two  spaces kept"])
def test_fence_holds(text: str) -> None:
    rendered = MarkdownIt().render(fenced(text, "bash"))
    assert rendered == f'<pre><code class="language-bash">{html.escape(text)}\n</code></pre>\n'


def test_slug() -> None:
    assert slug("My Run: *galore* (r=32)\n") == "my-run-galore-r-32"
    assert slug("a--b..c") == "a-b-c"
    assert slug("日本") == "run"
    assert len(slug("x" * 500)) == 80
