"""The site: sphinx-build -W --keep-going -b html docs docs/_build"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jaxft

project = "jaxft"
author = "the authors of jaxft"
copyright = "2026, the authors of jaxft"
release = version = jaxft.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "jaxft"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "undoc-members": False}
autodoc_preserve_defaults = True
autodoc_type_aliases = {"Augment": "Augment", "Order": "Order"}
suppress_warnings = ["ref.python"]  # short names of arguments that several classes have
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # fields are documented once, by the class
