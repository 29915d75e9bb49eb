"Settings of Sphinx. `docs/build.py` makes the pages and calls it."

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

nb_execution_mode = "off"  # pages show what the notebooks store
nb_render_markdown_format = "gfm"  # of outputs: tables, too
nb_code_prompt_show = "Show the {type}"
nb_code_prompt_hide = "Hide the {type}"
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist", "attrs_inline", "attrs_block"]
myst_heading_anchors = 3

viewcode_follow_imported_members = False  # it would import the package to see where a name comes from
highlight_language = "text"  # of blocks that do not say; most are shell
add_module_names = False
maximum_signature_line_length = 88
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"mbs {version}"
html_static_path = ["static", str(Path(plotly.__file__).parent / "package_data/plotly.min.js")]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_search_summary = False  # it would fetch pages, which browsers refuse on file://
html_copy_source = False
html_show_sphinx = False


def mathml(text, display):
    "TeX as MathML, which browsers draw by themselves: no script, no font, no network."
    known = re.sub(r"\\[bB]ig+[lr]?(?=[\\|])", "", text).replace(
        r"\arg", r"\operatorname{arg}"
    )  # latex2mathml takes neither
    known = re.sub(r"(?<!\\)\||\\[lr]vert", r"\\vert ", known)  # and sets these as operators, with space around them
    found = convert(known, display=display)
    if "\\" in found:
        logging.getLogger(__name__).warning("this formula uses a command that latex2mathml does not know: %s", text)
    return found


def inline(translator, node):
    translator.body.append(mathml(node.astext(), "inline"))
    raise SkipNode


def block(translator, node):
    translator.body.append(f'<div class="math">{mathml(node.astext(), "block")}</div>')
    raise SkipNode


@cache
def analysed(module):
    "Source of a module and where its definitions are, so that nothing needs to be imported."
    path = ROOT / f"{module.replace('.', '/')}.py"
    analyzer = ModuleAnalyzer.for_string(path.read_text(encoding="utf-8"), module, str(path))
    analyzer.find_tags()
    return analyzer.code, analyzer.tags


def setup(app):
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    app.connect("viewcode-find-source", lambda app, module: analysed(module))
