"""How Sphinx builds the documentation site from this folder; `make docs` calls it.

The pages are plain Markdown, so that they also read well in the repository: what only the site
needs, its navigation and the API out of the docstrings, is in this file and in api.md.
"""

project = "vqbeam"
extensions = ["myst_nb", "autoapi.extension", "sphinx.ext.napoleon", "sphinx_copybutton"]
html_theme = "furo"
html_title = "vqbeam"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_search_summary = False  # a page opened as a file may not fetch the others
html_show_copyright = False
html_show_sphinx = False

nb_execution_mode = "off"  # the notebooks are stored with their outputs, and the tests execute them
myst_heading_anchors = 3

# The sources are read, not imported, so that the site needs no TensorFlow.
autoapi_dirs = ["../configs", "../pipelines", "../vqvae"]
autoapi_generate_api_docs = False
add_module_names = False
autodoc_typehints = "signature"
default_role = "code"  # docstrings have single backticks
smartquotes = False  # flags begin with two hyphens

# Captions of the navigation and their pages, in order.
NAVIGATION = {
    "Start": ["own-images", "how-it-works", "troubleshooting"],
    "How to": ["sampling", "studio", "report", "continuing", "hub", "export"],
    "Notebooks": ["notebooks/images-to-new-ones", "notebooks/inside-a-vqvae"],
    "In depth": ["data", "quantizers", "prior", "gradients", "evaluation"],
    "Python": ["python", "api"],
    "Results": ["results", "performance"],
    "Beam and cloud": ["engines", "dataflow", "scale"],
    "Tests": ["faults", "mutants"],
}


def add_navigation(app, docname, source):
    """Adds the hidden tables of contents to the start page."""
    if docname == "index":
        for caption, pages in NAVIGATION.items():
            lines = [f":caption: {caption}", ":hidden:", "", *pages]
            source[0] += "\n\n```{toctree}\n" + "\n".join(lines) + "\n```\n"


def setup(app):
    """Registers the navigation with Sphinx."""
    app.connect("source-read", add_navigation)
