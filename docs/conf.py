"""The documentation site: `make docs` builds it into build/docs."""

import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "subspace3d"
author = "The subspace3d maintainers"
copyright = author
release = version = metadata.version("subspace3d")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "generated"]
exclude_patterns = ["_ext", "_static"]

# guide pages are Markdown that the repository's own site shows as well: anchors are made as it makes them
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
# examples are Python, commands and file layouts are text
highlight_language = "text"

# `name` in a docstring is code
default_role = "literal"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
# what a class overrides without a word of its own is PyTorch's or PEFT's, and described there
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
# browsers draw MathML themselves, so that the site loads nothing from elsewhere
html_math_renderer = "mathml"
html_title = f"subspace3d {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
