"Settings of Sphinx, which `docs/build.py` calls."

import re
from functools import cache
from pathlib import Path

import plotly
from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.pycode import ModuleAnalyzer
from sphinx.util import logging

ROOT = Path(__file__).parents[1]

project = "mbs"
version = release = re.search(r'__version__ = "(.*)"', (ROOT / "mbs/__init__.py").read_text(encoding="utf-8"))[1]
copyright = "the mbs authors"
extensions = ["myst_nb", "sphinx.ext.viewcode"]

nb_execution_mode = "off"  # pages show the stored outputs of the notebooks
nb_render_markdown_format = "gfm"  # of outputs; includes tables
nb_code_prompt_show = "Show the {type}"
nb_code_prompt_hide = "Hide the {type}"
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist", "attrs_inline", "attrs_block"]
myst_heading_anchors = 3

viewcode_follow_imported_members = False  # True would import the package
highlight_language = "text"  # of blocks without a language; most are shell commands
add_module_names = False
maximum_signature_line_length = 88
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"mbs {version}"
html_static_path = ["static", str(Path(plotly.__file__).parent / "package_data/plotly.min.js")]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_math_renderer = "mathml"
html_show_search_summary = False  # True would fetch pages, which browsers refuse on file://
html_copy_source = False
html_show_sphinx = False


def to_mathml(text, display):
    "Convert TeX to MathML, which browsers draw without a script, a font or the network."
    # latex2mathml knows neither \big nor \arg, and draws | and \lvert as operators with space around them
    known = re.sub(r"\\[bB]ig+[lr]?(?=[\\|])", "", text).replace(r"\arg", r"\operatorname{arg}")
    known = re.sub(r"(?<!\\)\||\\[lr]vert", r"\\vert ", known)
    found = convert(known, display=display)
    if "\\" in found:
        logging.getLogger(__name__).warning("this formula uses a command that latex2mathml does not know: %s", text)
    return found


def visit_inline(translator, node):
    translator.body.append(to_mathml(node.astext(), "inline"))
    raise SkipNode


def visit_block(translator, node):
    translator.body.append(f'<div class="math">{to_mathml(node.astext(), "block")}</div>')
    raise SkipNode


@cache
def find_definitions(module):
    "Return the source of a module and the places of its definitions, without importing it."
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    analyzer = ModuleAnalyzer.for_string(path.read_text(encoding="utf-8"), module, str(path))
    analyzer.find_tags()
    return analyzer.code, analyzer.tags


def setup(app):
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    app.connect("viewcode-find-source", lambda app, module: find_definitions(module))
