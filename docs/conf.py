"""The documentation as a site: `make docs` builds it into build/docs, with warnings as errors and without a network."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import effkern  # noqa: E402

project = "effkern"
version = release = effkern.__version__
copyright = "the effkern contributors, Apache-2.0"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    # Beside this file.
    "docstrings",
    "figures",
    "formulas",
    "outside",
]
needs_sphinx = "8.1"
exclude_patterns = ["_static"]

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3

# Blocks of docstrings are formulas.
highlight_language = "none"
# Quotes and points of code stay as they are.
smartquotes = False

html_theme = "furo"
html_title = f"effkern {version}"
html_static_path = ["_static"]
html_css_files = ["effkern.css"]
html_math_renderer = "svg"
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    f"{theme}_css_variables": {f"color-brand-{part}": colour for part in ("primary", "content", "visited")}
    for theme, colour in (("light", "#14724e"), ("dark", "#4fc796"))
}
pygments_style = "friendly"
pygments_dark_style = "github-dark"

add_module_names = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_display_short_literal_types = True
# Beyond it every parameter has a line of its own.
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False
