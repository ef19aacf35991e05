"""Every ```python block of the README, CONTRIBUTING and docs runs, in order, one namespace a page.

A block that is not to be run carries another tag (```text, ```bash), so nothing that looks like a promise is untested.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import sdekit

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts),
]
FENCE = re.compile(r"^(?P<indent> *)```python *\n(?P<code>.*?)^(?P=indent)``` *$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[int, str]]:
    """The python blocks of a page: line number of the first code line (from 1), and the code, dedented."""
    found = []
    for match in FENCE.finditer(text):
        indent = len(match["indent"])
        code = "".join(line[indent:] if line.strip() else "\n" for line in match["code"].splitlines(keepends=True))
        found.append((text.count("\n", 0, match.start("code")) + 1, code))
    return found


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page.read_text(encoding="utf-8"))], ids=lambda p: str(p.relative_to(ROOT))
)
def test_the_code_on_this_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, code in blocks(page.read_text(encoding="utf-8")):
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


def test_blocks_are_found_with_their_line_and_without_their_indent():
    page = "a\n```python\nx = 1\n```\n- item\n  ```python\n  if x:\n      y = 2\n\n  ```\n```text\nno\n```\n"
    assert blocks(page) == [(3, "x = 1\n"), (7, "if x:\n    y = 2\n\n")]


def test_links_between_pages_lead_somewhere():
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
            if not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)} -> {target}")
    assert not broken


def test_every_public_name_is_in_the_api_pages():
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "api").glob("*.md")))
    listed = set(re.findall(r"sdekit\.(\w+)$", text, re.MULTILINE))
    assert set(sdekit.__all__) - {"__version__"} - listed == set()
