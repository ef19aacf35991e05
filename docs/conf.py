"""Sphinx configuration. Built with warnings as errors: `make docs`."""

from __future__ import annotations

import re
from importlib.metadata import version as installed_version

from sphinx.application import Sphinx

project = "sdekit"
author = "the sdekit authors"
copyright = "the sdekit authors, Apache License 2.0"
release = installed_version("sdekit")
version = release

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
root_doc = "index"

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Source"]

html_theme = "furo"
html_title = f"sdekit {release}"
napoleon_use_ivar = True

# Docstrings here are plain text with `names` and formulas, read in the source more than in a browser: what
# reStructuredText would take for markup is escaped, names are set as code, and indented formulas keep their columns.
_SPANS = re.compile(r"(`[^`]+`)")
_MARKUP = re.compile(r"[*|\\]|(?<=\w)_(?!\w)")


def _plain(line: str) -> str:
    parts = _SPANS.split(line)
    return "".join(f"`{part}`" if part.startswith("`") else _MARKUP.sub(r"\\\g<0>", part) for part in parts)


def _as_plain_text(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Rewrites a docstring in place, before napoleon reads its sections."""
    out: list[str] = []
    formula = False
    for line in lines:
        indented = line.startswith("    ")
        if what == "module" and indented and not formula and out and not out[-1]:
            out += ["::", ""]
            formula = True
        elif line and not indented:
            formula = False
        out.append(line if formula else _plain(line))
    lines[:] = out


def setup(app: Sphinx) -> None:
    """Hooks the rewriting in before napoleon, whose priority is 500."""
    app.connect("autodoc-process-docstring", _as_plain_text, priority=100)
