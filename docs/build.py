"""Build the documentation site: `python docs/build.py` turns notebooks and the pages in docs/ into _docs/html.

It needs no network and executes no notebook."""

import argparse
import ast
import html
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import nbformat
from live import embed_pages, write_pages
from nbformat.v4 import new_markdown_cell
from reference import Module

from mbs.parameters import describe_fields
from mbs.settings import PARAMETER_GROUPS

HERE = Path(__file__).parent
ROOT = HERE.parent
DIRECTIVE = re.compile(r"(?m)^#\|\s*(\w+).*\n?")
CODE = re.compile(
    r"(^(`{3,}).*?^\2|\$\$.*?\$\$|\[[^\]\n]*\]\(|^#+ .*?$"  # fences, formulas, links, titles stay as they are,
    r"|</?[a-zA-Z][^>\n]*>|\{[\w:]+\}`[^`\n]+`)"  # and so do HTML and roles
    r"|(?<![`\\}])`([^`\n]+)`(?!`)",  # code in the text
    re.M | re.S,
)
LINK = re.compile(r"(\]\()([^)#\s:]+)(#[^)\s]*)?\)")
TOP_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")  # of the repository


@cache
def read_notebook(path):
    "Return the notebook at `path`; treat it as read-only."
    return nbformat.read(path, 4)


def find_module(path):
    "Return the module that the notebook at `path` exports, without `mbs.` (`explore.evidence`); empty for none."
    found = [re.match(r"#\| default_exp ([\w.]+)", cell.source) for cell in read_notebook(path).cells]
    return next((m[1].removesuffix(".__init__") for m in found if m), "")


def find_page(path):
    """Return the page of a file of the repository, without ending; None for files without a page.

    Modules have theirs in reference/, pages of docs/ are at the top, tables of docs/results/ share one page."""
    folder, name = posixpath.split(posixpath.splitext(path)[0])
    if path.endswith(".ipynb") and folder == "nbs":
        if name == "index":
            return "index"
        module = find_module(ROOT / path) if (ROOT / path).is_file() else ""
        return f"reference/{module.replace('.', '/') or re.sub('^[0-9]+[a-z]*_', '', name)}"
    if path.endswith(".ipynb") and folder in ("nbs/tutorials", "nbs/runs"):
        return f"{folder[4:]}/{name}"
    if path.endswith(".md") and folder == "docs":
        return name
    if path.endswith(".md") and folder == "docs/results":
        return "results"
    return path.removesuffix(".md").lower() if path in TOP_PAGES else None


def find_source(module):
    "Return the file of a module of the package, whose name is given without `mbs.`."
    path = ROOT / "mbs" / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def read_homes():
    "Return {public name of the package: module that defines it}, as `mbs/__init__.pyi` lists them."
    tree = ast.parse((ROOT / "mbs/__init__.pyi").read_text(encoding="utf-8"))
    return {alias.name: n.module for n in tree.body if isinstance(n, ast.ImportFrom) for alias in n.names}


class Site:
    "The pages of the site, written to `folder`; code in the text becomes a link if it names something of the package."

    def __init__(self, folder: Path):
        self.folder = folder
        files = [(p, p.relative_to(ROOT)) for p in (ROOT / "nbs").rglob("*.ipynb")]
        self.notebooks = sorted(p for p, name in files if not any(part.startswith((".", "_")) for part in name.parts))
        sources = {p.stem: p.relative_to(ROOT).as_posix() for p in self.notebooks}
        names = [(source, source) for source in sources.values()]
        names += [(stem, source) for stem, source in sources.items() if "_" in stem]  # `train` is mostly another word
        self.by_name = {name: find_page(source) for name, source in names}
        exported = [module for p in self.notebooks if (module := find_module(p))]
        self.modules = {module: Module(find_source(module), module) for module in exported}
        self.public = {name: self.find_home(name, home) for name, home in read_homes().items()}
        self.unwritten = {f"{m.name}.{n}" for m in self.modules.values() for n in m.exported}

    def find_home(self, name, home):
        "Return the module that defines the public `name`: `home`, or a module of the package `home`."
        inside = [m for m in self.modules if m == home or m.startswith(f"{home}.")]
        found = [m for m in inside if name in self.modules[m].exported]
        if not found:
            raise ValueError(f"mbs/__init__.pyi lists {name}, which mbs.{home} does not export: correct the stub")
        return found[0]

    def find_role(self, text, module):
        "Return the link for `text`, code on a page of `module`; None when it names nothing or is ambiguous."
        name = re.sub(r"\(.*\)$|^mbs\.", "", text)
        if text.startswith("mbs.") and name in self.modules:
            return f"{{py:mod}}`{text} <mbs.{name}>`"
        first, rest = next(((m, name[len(m) + 1 :]) for m in self.modules if name.startswith(f"{m}.")), ("", ""))
        if first and rest in self.modules[first].names and (text.startswith("mbs.") or re.search("[_A-Z]", rest)):
            return f"{{py:obj}}`{text} <mbs.{name}>`"
        owners = [m for m in self.modules if name in self.modules[m].names]
        home = self.public.get(name.partition(".")[0])
        if module in owners or home in owners or (len(owners) == 1 and re.search("[_A-Z]", name)):
            owner = next(m for m in (module, home, *owners) if m in owners)
            return f"{{py:obj}}`{text} <mbs.{owner}.{name}>`"
        return f"{{doc}}`{text} </{self.by_name[name]}>`" if name in self.by_name else None

    def add_links(self, text, source, module=""):
        "Return the Markdown of the file `source` with links to pages of the site, and with names as links."

        def turn(m):
            target = posixpath.normpath(posixpath.join(posixpath.dirname(source), m[2]))
            page = find_page(target)
            if page:
                page += posixpath.splitext(target)[1]
            elif target.startswith("docs/images/"):
                page = posixpath.relpath(target, "docs")
            else:
                expected = "a notebook, a page of docs/ or a picture in docs/images"
                raise ValueError(f"{source} links to {m[2]}, which is no page of the site: expected {expected}")
            return f"{m[1]}/{page}{m[3] or ''})"

        def link(m):
            return m[0] if m[1] else self.find_role(m[3], module) or m[0]

        return CODE.sub(link, LINK.sub(turn, text))

    def write(self, page, text):
        path = self.folder / page
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def write_notebook(self, path):
        "Write a notebook as a page: hidden cells are left out, exported code is folded below the entries it defines."
        source = path.relative_to(ROOT).as_posix()
        book, name = read_notebook(path).copy(), find_module(path)
        page, module = find_page(source), self.modules.get(name)
        up = "../" * page.count("/")
        cells = []
        for cell in book.cells:
            words = set(DIRECTIVE.findall(cell.source))
            text = DIRECTIVE.sub("", cell.source)
            if words & {"hide", "default_exp"} or not text.strip():
                continue
            if cell.cell_type == "markdown":
                cells.append(new_markdown_cell(self.add_links(text, source, name)))
                if module and len(cells) == 1:
                    cells.append(self.make_module_cell(module, source, up))
            elif cell.cell_type == "code":
                folded = False
                if "export" in words:
                    entries, names = module.describe(text)
                    if names is None:
                        continue  # imports
                    self.unwritten -= {f"{module.name}.{n}" for n in names}
                    if names:
                        cells.append(new_markdown_cell(self.add_links(entries, source, name)))
                    folded = True
                cells.append(prepare_cell(cell, up, text, folded))
        if source == "nbs/index.ipynb":
            cells.append(new_markdown_cell(self.make_contents()))
        if source == "nbs/tutorials/explore.ipynb":
            cells.insert(1, new_markdown_cell(embed_pages(up)))
        book.cells, book.metadata = cells, {"kernelspec": book.metadata["kernelspec"]}
        self.write(f"{page}.ipynb", json.dumps(nbformat.validator.normalize(book)[1]))

    def make_module_cell(self, module, source, up):
        "Return the cell below a page's title: the module's entry, and links to its code and its notebook."
        code = f'<a href="{up}_modules/{module.name.replace(".", "/")}.html">`{module.name}`</a>'
        return new_markdown_cell(f"```{{py:module}} {module.name}\n```\n\nModule {code}, made from `{source}`.")

    def make_contents(self):
        "Return the table of contents; tutorials that docs/contents.md does not name come last in their list."
        text = (HERE / "contents.md").read_text(encoding="utf-8")
        pages = [find_page(p.relative_to(ROOT).as_posix()) for p in self.notebooks]
        more = [p for p in pages if p.startswith("tutorials/") and f"{p}\n" not in text]
        return text.replace("TUTORIALS\n", "".join(f"{p}\n" for p in more))

    def write_reference(self):
        "Write the list of all public names and of all modules with the names that each defines."
        text = (HERE / "reference.md").read_text(encoding="utf-8")
        rows = ""
        for name, home in sorted(self.public.items(), key=lambda item: item[0].lower()):
            summary = self.add_links(self.modules[home].summarise(name), "docs/reference.md", home)
            rows += f"| {{py:obj}}`{name} <mbs.{home}.{name}>` | {summary} |\n"
        listing, pages = "", []
        for path in self.notebooks:
            module = find_module(path)
            if not module:
                continue
            pages.append(find_page(path.relative_to(ROOT).as_posix()))
            promise = re.search(r"(?m)^> (.*)", read_notebook(path).cells[0].source)
            names = [f"{{py:obj}}`{n} <mbs.{module}.{n}>`" for n in self.modules[module].exported]
            listing += f"{{doc}}`/{pages[-1]}` · `mbs.{module}`\n: {promise[1] if promise else ''}<br>\n"
            listing += f"  {' '.join(names)}\n\n"
        text = text.replace("PUBLIC\n", rows).replace("MODULES\n", listing)
        self.write("reference.md", text.replace("PAGES\n", "\n".join(pages) + "\n"))

    def write_results(self):
        "Write the page of results: docs/results.md with the tables of docs/results/."
        tables = sorted(p for p in (HERE / "results").glob("*.md") if p.stem != "README")
        found = [self.add_links(p.read_text(encoding="utf-8"), f"docs/results/{p.name}") for p in tables]
        text = self.add_links((HERE / "results.md").read_text(encoding="utf-8"), "docs/results.md")
        self.write("results.md", text.replace("RESULTS\n", "\n\n".join(found)))

    def write_parameters(self):
        "Write the page of parameters: docs/parameters.md with a table for each group."
        text = self.add_links((HERE / "parameters.md").read_text(encoding="utf-8"), "docs/parameters.md")
        tables = ""
        for title, prefix, model in PARAMETER_GROUPS:
            tables += f"## {title}\n\n| parameter | default | meaning |\n|---|---|---|\n"
            for name, default, meaning in describe_fields(model):
                shown = f"`{default!r}`" if default != {} else ""
                row = [f"`{prefix}{name}`", shown, html.escape(meaning, quote=False)]
                tables += "| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |\n"
            tables += "\n"
        self.write("parameters.md", text.replace("PARAMETERS\n", self.add_links(tables, "docs/parameters.md")))

    def write_pages(self):
        "Write all pages; ValueError when an exported name has no entry."
        for path in self.notebooks:
            self.write_notebook(path)
        texts = [p for p in HERE.glob("*.md") if p.stem not in ("contents", "parameters", "reference", "results")]
        for path in [*texts, *(ROOT / name for name in TOP_PAGES)]:
            source = path.relative_to(ROOT).as_posix()
            self.write(f"{find_page(source)}.md", self.add_links(path.read_text(encoding="utf-8"), source))
        self.write_reference()
        self.write_results()
        self.write_parameters()
        if self.unwritten:
            names = ", ".join(sorted(self.unwritten))
            raise ValueError(f"{names} would not be in the reference: expected a definition in an exported cell")
        shutil.copytree(HERE / "images", self.folder / "images")


def prepare_cell(cell, up, text=None, is_folded=False):
    "Return a copy of `cell` with the source `text` and outputs that a page can show: plotly's charts, but no widgets."
    cell = cell.copy()
    cell.source = cell.source if text is None else text
    cell.metadata = {"tags": ["hide-input"]} if is_folded else {}
    cell.outputs = [prepare_output(output, f"{cell.id}-{k}", up) for k, output in enumerate(cell.outputs)]
    cell.outputs = [o for o in cell.outputs if o.output_type == "stream" or o.get("data")]
    cell.execution_count = None
    return cell


def prepare_output(output, name, up):
    "Return a copy of `output` without widgets; a chart of plotly becomes HTML with the id `name` that draws it."
    output = output.copy()
    if "data" not in output:
        return output
    data = output.data = output.data.copy()
    data.pop("application/vnd.jupyter.widget-view+json", None)
    if figure := data.pop("application/vnd.plotly.v1+json", None):
        content = json.dumps([figure["data"], figure["layout"]]).replace("</", "<\\/")
        data["text/html"] = (
            f'<script src="{up}_static/plotly.min.js"></script>'
            f'<div id="{html.escape(name)}" class="plotly-chart"></div>'
            f'<script>Plotly.newPlot("{name}", ...{content}, {{responsive: true}})</script>'
        )
    return output


def build(out: Path):
    "Write all pages to `out`/pages and the site to `out`/html; CalledProcessError when Sphinx warns of anything."
    for folder in ("pages", "html"):
        shutil.rmtree(out / folder, ignore_errors=True)
    Site(out / "pages").write_pages()
    options = ["-W", "--keep-going", "-q", "-E", "-d", out / "doctrees", "-c", HERE]
    subprocess.run(
        [sys.executable, "-m", "sphinx", *options, out / "pages", out / "html"],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
    )
    write_pages(out / "html/_static/live")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "_docs", help="folder for pages and site")
    build(parser.parse_args().out)
