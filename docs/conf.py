"""The site: `make docs` builds it from these pages, the docstrings and the notebooks, which it executes."""

from nbclient import NotebookClient

from drmm_hf import __version__


project = "drmm-hf"
release = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["notebooks/runs"]

html_theme = "furo"
html_title = "drmm-hf"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False

myst_heading_anchors = 3

# Docstrings have single backticks for code, as those of transformers have.
default_role = "literal"
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"

nb_execution_mode = "cache"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_output_stderr = "remove"  # progress bars
NotebookClient.coalesce_streams = True  # what a command prints comes in pieces; myst-nb has no setting for it


def setup(app):
    """Leave out the fields of named tuples as members: their classes document them."""
    app.connect("autodoc-skip-member", lambda app, kind, name, value, skip, options: _is_field(value) or None)


def _is_field(value):
    return type(value).__name__ == "_tuplegetter"
