"The site builds without warnings, links resolve, every name has an entry, and a browser draws pages without a network."

import ast
import importlib
import inspect
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))  # the programs in docs/ are not a package
DEMANDED = bool(os.environ.get("CI")) or os.environ.get("MBS_BROWSER") == "1"  # a missing browser is a failure
FILES = [p.relative_to(ROOT).with_suffix("") for p in sorted((ROOT / "mbs").rglob("*.py"))]
MODULES = [".".join(p.parts) for p in FILES if not p.stem.startswith("_")]
SIX = [
    "index.html",
    "reference.html",
    "reference/pseudo_labels.html",
    "reference/feature_distillation.html",
    "tutorials/background_shift.html",
    "equations.html",
]


class Page(HTMLParser):
    "Anchors and links of a page, and the files that it loads."

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.loads = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        self.anchors |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag == "a" and a.get("href"):
            self.links.append(a["href"])
        elif tag == "link" and a.get("href"):
            self.loads.append(a["href"])
        elif a.get("src"):
            self.loads.append(a["src"])


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The site, built once."
    out = tmp_path_factory.mktemp("docs")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, DOCS / "build.py", "--out", out], capture_output=True, text=True, timeout=600
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = done.stdout[-2000:] + done.stderr[-4000:]
    assert done.returncode == 0 and not done.stderr, said  # with -W a warning of Sphinx is an error
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 120
    return out / "html"


@pytest.fixture(scope="session")
def pages(site):
    return {p: Page(p) for p in sorted(site.rglob("*.html"))}


def test_links_resolve(site, pages):
    broken = []
    for path, page in pages.items():
        for link in page.links + page.loads:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not target.is_file():
                broken.append(f"{path.relative_to(site)}: {link}")
            elif url.fragment and target in pages and unquote(url.fragment) not in pages[target].anchors:
                broken.append(f"{path.relative_to(site)}: no anchor {link}")
    assert not broken, "\n".join(broken[:20])
    assert sum(len(p.links) for p in pages.values()) > 5000 and site / "index.html" in pages


def test_pages_load_nothing_from_elsewhere(site, pages):
    assert [
        (p.relative_to(site), x)
        for p, page in pages.items()
        for x in page.loads
        if urlsplit(x).netloc or urlsplit(x).scheme not in ("", "data")
    ] == []


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_has_an_entry(name, pages):
    "Every name in `__all__` has an entry; functions and classes have a docstring."
    module = importlib.import_module(name)
    anchors = set().union(*(page.anchors for page in pages.values()))
    for public in module.__all__ if hasattr(module, "__all__") else []:
        assert f"{name}.{public}" in anchors, f"{name}.{public} is not in the reference"
        value = getattr(module, public)
        if inspect.isfunction(value) or (inspect.isclass(value) and value.__module__ == name):
            assert (value.__doc__ or "").strip(), f"{name}.{public} has no docstring"


def test_reference_agrees_with_the_source(pages, site):
    "Entries have signatures, comments of parameters, fields and methods; code in the text is a link."
    text = (site / "reference/pseudo_labels.html").read_text(encoding="utf-8")
    assert (
        "relabel where the teacher’s probability is at least this" in text
        and "training labels, dtype of" in text
        and "_modules/mbs/pseudo_labels.html#selective_pseudo_labels" in text
    )
    assert "run folder under outputs/" in (site / "reference/settings.html").read_text(encoding="utf-8")
    assert {"mbs.run.Run.confusion", "mbs.protocol.Step.to_channels"} <= {
        a for page in pages.values() for a in page.anchors
    }
    assert "reference/protocol.html#mbs.protocol.Step.to_channels" in pages[site / "equations.html"].links
    assert "#| " not in text and "nbdev_export" not in text


def describe(source, owner=""):
    "Return the entry of the function that `source` defines."
    from reference import describe_function, read_comments

    return describe_function(ast.parse(source).body[0], "mbs.m", read_comments(source), owner)


def test_entry_has_every_parameter_of_a_signature():
    source = (
        'def f(self, a, # first\n  b:int|None=None, c=2, # both\n  *rest, k:str="x", **m)->int: # out\n    "Doc."\n'
    )
    entry = describe(source, "C.")
    assert "{py:method} C.f(a, b: int | None = None, c=2, *rest, k: str = 'x', **m) -> int" in entry
    assert "**Returns** out" in entry
    assert "| `a` |  | first |" in entry and "| `c` |  | both |" in entry and r"| `b` | `int \| None` |  |" in entry
    entry = describe("def g(a:int)->'B': # out\n    'Doc.'\n")
    assert "{py:function} g(a: int) -> B" in entry and "**Returns** out" in entry and "| `a`" not in entry


def test_table_without_notes_is_left_out():
    from reference import make_table

    assert make_table([("a", "int", "", "")], "parameter") == ""


def test_entry_reads_comments_as_the_formatter_leaves_them():
    "Each comment belongs to its parameter, also behind a wrapped default; the one behind the colon to the result."
    entry = describe(
        """
def f(
    # about both of the next
    target: Tensor,  # labels
    mode: Literal["a", "b"] = (
        "a"  # which way
    ),
    size: tuple = (
        1,
        2,
    ),  # height and width
    *,
    last: bool = False,
) -> tuple[
    int,
    str,
]:  # number and name
    # why this is so
    "Do it."
    return 1, ""  # not in the entry
"""
    )
    assert [line for line in entry.splitlines() if line.startswith("| `")] == [
        "| `target` | `Tensor` | labels |",
        "| `mode` | `Literal['a', 'b']` | which way |",
        "| `size` | `tuple` | height and width |",
        "| `last` | `bool` |  |",
    ]
    assert "**Returns** number and name\n" in entry and "next" not in entry and "why" not in entry
    silent = describe('def f(\n    a: int,  # first\n) -> int:\n    # why\n    "Do it."\n')
    assert "| `a` | `int` | first |" in silent and "**Returns**" not in silent


def test_entry_of_a_command_has_the_help_of_its_options(tmp_path):
    "The help is a text, or the name of a constant of the module."
    from reference import Module

    source = """
__all__ = ['f']
_SIZE_HELP = "How large."


def f(
    a: Annotated[int, Option(help=_SIZE_HELP)] = 1,
    b: Annotated[int, Option(help="How long.")] = 2,
):
    "Do it."
"""
    (tmp_path / "m.py").write_text(source, encoding="utf-8")
    entry, names = Module(tmp_path / "m.py", "m").describe(source)
    assert names == ["f"] and "| `a` | `int` | How large. |" in entry and "| `b` | `int` | How long. |" in entry


def test_entry_reads_comments_behind_wrapped_fields():
    from reference import describe_class, read_comments

    source = """
class C:
    "Doc."

    mode: str = (
        "last"  # which one
    )
    share: float = Field(
        0.1, gt=0
    )  # of all
    _hidden: int = 0  # internal
"""
    entry = describe_class(ast.parse(source).body[0], "mbs.m", read_comments(source))
    assert "| `mode` | `str` | which one |" in entry and "| `share` | `float` | of all |" in entry
    assert "share: float = 0.1" in entry and "_hidden" not in entry


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    "A repository whose only module, `mbs.explore.evidence`, is in a package; return the site of it."
    import build

    cells = [
        new_markdown_cell("# Evidence\n> A promise."),
        new_code_cell("#| default_exp explore.evidence"),
        new_markdown_cell("#| export\nThe paper: p = e / Σ e, computed by `weigh`."),
        new_code_cell("#| export\nimport math"),
        new_code_cell('#| export\ndef weigh(\n    a: int,  # first\n) -> int:  # second\n    "Weigh it."'),
        new_code_cell('#| export\ndef _helper():\n    "Help."'),
        new_code_cell("#| hide\nassert True"),
        new_markdown_cell("See [this](61a_evidence.ipynb), `mbs.explore.evidence.weigh` and `61a_evidence`."),
    ]
    sources = {
        "mbs/__init__.pyi": "from .explore import weigh as weigh\n",
        "mbs/explore/__init__.py": "from .evidence import weigh\n",
        "mbs/explore/evidence.py": "__all__ = ['weigh']\n\ndef weigh(a): 'Weigh it.'\n\ndef _helper(): 'Help.'\n",
    }
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "nbs").mkdir()
    kernel = dict(name="python3", display_name="python3", language="python")
    nbformat.write(new_notebook(cells=cells, metadata=dict(kernelspec=kernel)), tmp_path / "nbs/61a_evidence.ipynb")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    return build.Site(tmp_path / "pages")


def test_notebook_of_a_package_has_a_page(packaged):
    "The page of `61a_evidence` has the name of its module; public names of a package are found in its modules."
    assert packaged.public == {"weigh": "explore.evidence"}
    packaged.write_notebook(packaged.notebooks[0])
    cells = nbformat.read(packaged.folder / "reference/explore/evidence.ipynb", 4).cells
    text = "\n".join(cell.source for cell in cells)
    assert "{py:module} mbs.explore.evidence" in text and '"../../_modules/mbs/explore/evidence.html"' in text
    assert "[this](/reference/explore/evidence.ipynb)" in text
    assert "{py:obj}`mbs.explore.evidence.weigh <mbs.explore.evidence.weigh>`" in text
    assert "{doc}`61a_evidence </reference/explore/evidence>`" in text


def test_exported_cells_are_shown_without_directives(packaged):
    "Exported Markdown is text; code with only private names is folded and has no entry; imports are left out."
    packaged.write_notebook(packaged.notebooks[0])
    cells = nbformat.read(packaged.folder / "reference/explore/evidence.ipynb", 4).cells
    text = "\n".join(cell.source for cell in cells)
    assert "#|" not in text and "import math" not in text and "assert True" not in text
    assert any(c.cell_type == "markdown" and c.source.startswith("The paper: p = e / Σ e") for c in cells)
    code = [c for c in cells if c.cell_type == "code"]
    assert [c.source.split("(")[0] for c in code] == ["def weigh", "def _helper"]
    assert all(c.metadata["tags"] == ["hide-input"] for c in code)
    assert "{py:function} weigh(a: int) -> int" in text and "**Returns** second" in text
    assert text.count("{py:function}") == 1 and not packaged.unwritten


def test_a_public_name_without_a_definition_is_refused(packaged, tmp_path):
    from build import Site

    (tmp_path / "mbs/__init__.pyi").write_text("from .explore import gone as gone\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"lists gone, which mbs\.explore does not export"):
        Site(tmp_path / "other")


def test_readme_is_the_front_page():
    from readme import make_readme

    assert (ROOT / "README.md").read_text(encoding="utf-8") == make_readme(), "README.md is stale: run make readme"
    assert (DOCS / "images/background_shift.png").stat().st_size < 200_000


def test_a_link_out_of_the_site_is_refused(tmp_path):
    from build import Site

    with pytest.raises(ValueError, match="no page of the site"):
        Site(tmp_path).add_links("[here](../mbs/run.py)", "docs/data.md")
    assert (
        Site(tmp_path).add_links("`Protocol` and `x` in [`Protocol`](data.md)", "docs/data.md")
        == "{py:obj}`Protocol <mbs.protocol.Protocol>` and `x` in [`Protocol`](/data.md)"
    )


def test_a_role_and_a_common_word_stay_as_they_are(tmp_path):
    "Code behind a role is still linked; `train` in a text is a word, not the notebook of that name."
    from build import Site

    linked = Site(tmp_path).add_links("{term}`step`, as in `Protocol` and `train`", "docs/data.md")
    assert linked == "{term}`step`, as in {py:obj}`Protocol <mbs.protocol.Protocol>` and `train`"


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not DEMANDED:
        pytest.importorskip("playwright", reason="playwright is not installed: pip install 'mbs[dev]'")
        if not found:
            pytest.skip("no Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser):
    "Return a function that opens a file at a width; finally check for complaints and requests to other hosts."
    complaints, contexts = [], []

    def open_page(path, query="", width=1280, **options):
        contexts.append(browser.new_context(viewport=dict(width=width, height=1000), **options))
        page = contexts[-1].new_page()
        page.on(
            "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda request: (
                complaints.append(request.url) if not request.url.startswith(("file:", "data:", "blob:")) else None
            ),
        )
        page.goto(path.resolve().as_uri() + query, wait_until="load")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def count_colours(element):
    "Count the different colours that a part of the page shows."
    picture = Image.open(io.BytesIO(element.screenshot())).convert("RGB")
    return len(np.unique(np.array(picture).reshape(-1, 3), axis=0))


@pytest.mark.parametrize("name", SIX)
def test_page_is_drawn(opened, site, name):
    page = opened(site / name)
    pictures = page.locator("article img").all()
    assert all(picture.evaluate("p => p.complete && p.naturalWidth > 0") for picture in pictures)
    assert all(count_colours(picture) > 20 for picture in pictures[:3])
    assert bool(pictures) == (name not in ("reference.html", "equations.html"))
    formulae = page.locator("math")
    assert (formulae.count() > 0) == (
        name in ("reference/pseudo_labels.html", "reference/feature_distillation.html", "equations.html")
    )
    assert all(box["width"] > 3 and box["height"] > 3 for box in [f.bounding_box() for f in formulae.all()[:20]])
    assert "$" not in "".join(page.locator("article p").all_inner_texts())


@pytest.mark.parametrize("name", SIX)
def test_page_fits_a_phone(opened, site, name):
    page = opened(site / name, width=390, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    red = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/)[0]")
    assert int(red) < 60, "the page must be dark when the browser asks for dark"


@pytest.mark.parametrize(
    "words,wanted",
    [
        ("selective_pseudo_labels", "reference/pseudo_labels.html#mbs.pseudo_labels.selective_pseudo_labels"),
        ("learning rate", "parameters.html"),
        ("batch size", "parameters.html"),
        ("docker", "container.html"),
        ("inference", "reference/inference.html"),
    ],
)
def test_search_leads_to_the_page(opened, site, words, wanted):
    "The page is among the first three results."
    page = opened(site / "search.html", f"?q={words.replace(' ', '+')}")
    page.wait_for_selector("#search-results li a")
    page.wait_for_function("() => document.querySelector('.search-summary').textContent.includes('found')")
    found = page.locator("#search-results li a").evaluate_all("links => links.map((link) => link.getAttribute('href'))")
    assert wanted in [link.partition("#index")[0] for link in found[:3]], found


def test_chart_is_drawn(opened, site, tmp_path):
    "A stored chart of plotly becomes one that draws itself."
    import plotly.graph_objects as go
    from build import prepare_cell

    chart = json.loads(go.Figure(go.Bar(x=["old", "new"], y=[3, 1]), dict(title="</script>")).to_json())
    cell = new_code_cell(
        "fig", outputs=[new_output("display_data", {"application/vnd.plotly.v1+json": chart, "text/plain": "Figure"})]
    )
    (tmp_path / "pages").mkdir()
    kernel = dict(name="python3", display_name="python3", language="python")
    nbformat.write(
        new_notebook(cells=[new_markdown_cell("# A chart"), prepare_cell(cell, "")], metadata=dict(kernelspec=kernel)),
        tmp_path / "pages/index.ipynb",
    )
    subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "-q", "-c", DOCS, tmp_path / "pages", tmp_path / "html"], check=True
    )
    page = opened(tmp_path / "html/index.html")
    page.wait_for_selector(".plotly-chart svg.main-svg")
    assert page.locator(".plotly-chart .bars path").count() == 2 and count_colours(page.locator(".plotly-chart")) > 20
