"""How Sphinx makes a site of these pages: ``sphinx-build -W -c docs . site`` in the root of a checkout."""

from __future__ import annotations

import kasmina_core

project = "Kasmina"
author = "The Kasmina authors"
copyright = "The Kasmina authors, MIT licence"
version = release = kasmina_core.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
default_role = "py:obj"  # `MorphogeneticModel` in a docstring is a link

# The source is the whole checkout, so that links hold there as in the site.
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "blueprint_kits/kasmina-*/*.md",
]
exclude_patterns = ["**/node_modules", "**/.venv"]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autosummary_generate = False
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"Kasmina {release}"
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["site.css"]
