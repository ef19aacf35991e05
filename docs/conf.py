"""Sphinx configuration. Built with warnings as errors: `make docs`."""

from __future__ import annotations

from importlib.metadata import version as installed_version

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
