"""How Sphinx builds the guide: `sphinx-build -W docs OUT`."""

import re
import tomllib
from pathlib import Path

from sphinx.ext.napoleon import GoogleDocstring

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = PROJECT["name"]
version = release = PROJECT["version"]
copyright = "the authors of cacheblend-jax"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "notebooks/*.py"]

default_role = "literal"  # docstrings write `names` as Markdown does
myst_heading_anchors = 4
nb_execution_mode = "off"  # CI runs the notebook by itself; pages show its stored outputs
autodoc_typehints_format = "short"
maximum_signature_line_length = 88  # longer ones get a line for each argument
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_use_ivar = True  # attributes are documented in classes' docstrings

html_theme = "furo"
html_title = project
html_theme_options = {
    "source_repository": PROJECT["urls"]["Repository"],
    "source_branch": "main",
    "source_directory": "docs/",
}

SEVERAL_NAMES = re.compile(r":ivar \w+(, \w+)+:")


def properties_as_methods(app, what, name, obj, options, lines):
    """Parses properties' docstrings as methods': napoleon takes what stands before their first colon for a type."""
    if what == "property":
        parsed = GoogleDocstring(lines, app.config, app, "method", name, obj, options)
        lines[:] = ["..", "", *str(parsed).splitlines()]  # an empty comment: it finds no colon in the first line


def keep_names_together(app, what, name, obj, options, lines):
    """Joins `hits, misses`, what Sphinx would take for a type and a name."""
    lines[:] = [SEVERAL_NAMES.sub(lambda match: match[0].replace(", ", ","), line) for line in lines]


def short_arrays(app, what, name, obj, options, signature, returned):
    """Writes `Array` for where jaxlib keeps it."""
    return tuple(part and part.replace("jaxlib._jax.", "") for part in (signature, returned))


def setup(app):
    """Connects the above: one before napoleon (whose priority is 500), and one after it."""
    app.connect("autodoc-process-signature", short_arrays)
    app.connect("autodoc-process-docstring", properties_as_methods, priority=400)
    app.connect("autodoc-process-docstring", keep_names_together, priority=600)
