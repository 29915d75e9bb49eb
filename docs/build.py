"The documentation site: `python docs/build.py` turns notebooks and the pages in docs/ into _docs/html, without a network and without running a notebook."

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
from pathlib import Path

import nbformat
from nbformat.v4 import new_markdown_cell
from reference import Module

HERE = Path(__file__).parent
ROOT = HERE.parent
DIRECTIVE = re.compile(r"#\|\s*(\w+)")
CODE = re.compile(
    r"(^(`{3,}).*?^\2|\$\$.*?\$\$|\[[^\]\n]*\]\(|^#+ .*?$|</?[a-zA-Z][^>\n]*>)|(?<![`\\}])`([^`\n]+)`(?!`)", re.M | re.S
)  # what stays as it is, or code in the text
LINK = re.compile(r"(\]\()([^)#\s:]+)(#[^)\s]*)?\)")


def page_of(path):
    "The page of a file of the repository, without ending: notebooks lose their number, pages of docs/ lie at the top, tables of docs/results/ are one page; None for all other files."
    folder, name = posixpath.split(posixpath.splitext(path)[0])
    if path.endswith(".ipynb") and folder == "nbs":
        return f"reference/{re.sub(r'^[0-9]+[a-z]?_', '', name)}" if name != "index" else "index"
    if path.endswith(".ipynb") and folder in ("nbs/tutorials", "nbs/runs"):
        return f"{folder[4:]}/{name}"
    if path.endswith(".md") and folder == "docs":
        return name
    if path.endswith(".md") and folder == "docs/results":
        return "results"
    return {"CHANGELOG.md": "changelog", "CONTRIBUTING.md": "contributing"}.get(path)


class Site:
    "Pages are written to `folder`; code in the text becomes a link wherever it names something of the package."

    def __init__(self, folder: Path):
        self.folder = folder
        self.notebooks = sorted(
            p
            for p in (ROOT / "nbs").rglob("*.ipynb")
            if not any(s.startswith((".", "_")) for s in p.relative_to(ROOT).parts)
        )
        sources = {p.stem: p.relative_to(ROOT).as_posix() for p in self.notebooks}
        self.by_name = {name: page_of(source) for stem, source in sources.items() for name in (stem, source)}
        self.modules = {p.stem: Module(p) for p in sorted((ROOT / "mbs").glob("*.py")) if not p.stem.startswith("_")}
        home = ast.parse((ROOT / "mbs/__init__.py").read_text(encoding="utf-8"))
        self.public = next(
            ast.literal_eval(n.value) for n in home.body if isinstance(n, ast.Assign) and n.targets[0].id == "_HOME"
        )
        self.unwritten = {f"{m.name}.{n}" for m in self.modules.values() for n in m.exported}

    def role(self, text, module):
        "The link that `text`, code on a page of `module`, stands for; None when it names nothing, or something that is not unmistakable."
        name = re.sub(r"\(.*\)$|^mbs\.", "", text)
        first, _, rest = name.partition(".")
        if text.startswith("mbs.") and name in self.modules:
            return f"{{py:mod}}`{text} <mbs.{name}>`"
        if (
            first in self.modules
            and rest in self.modules[first].names
            and (text.startswith("mbs.") or re.search("[_A-Z]", rest))
        ):
            return f"{{py:obj}}`{text} <mbs.{name}>`"
        owners = [m for m in self.modules if name in self.modules[m].names]
        if module in owners or self.public.get(first) in owners or (len(owners) == 1 and re.search("[_A-Z]", name)):
            owner = next(m for m in (module, self.public.get(first), *owners) if m in owners)
            return f"{{py:obj}}`{text} <mbs.{owner}.{name}>`"
        return f"{{doc}}`{text} </{self.by_name[name]}>`" if name in self.by_name else None

    def linked(self, text, source, module=""):
        "Markdown of the file `source` with its links turned to pages of the site, and with names as links."

        def turn(m):
            target = posixpath.normpath(posixpath.join(posixpath.dirname(source), m[2]))
            page = page_of(target)
            if page:
                page += posixpath.splitext(target)[1]
            elif target.startswith("docs/images/"):
                page = posixpath.relpath(target, "docs")
            else:
                raise ValueError(
                    f"{source} links to {m[2]}, which is no page of the site: expected a notebook, a page of docs/ or a picture in docs/images"
                )
            return f"{m[1]}/{page}{m[3] or ''})"

        def name(m):
            return m[0] if m[1] else self.role(m[3], module) or m[0]

        return CODE.sub(name, LINK.sub(turn, text))

    def write(self, page, text):
        path = self.folder / page
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def notebook(self, path):
        "A notebook as a page: hidden cells left out, exported code folded under the reference entry of what it defines."
        source = path.relative_to(ROOT).as_posix()
        book = nbformat.read(path, 4)
        stem = next((m[1] for c in book.cells if (m := re.match(r"#\| default_exp (\w+)", c.source))), "")
        module, cells = self.modules.get(stem), []
        for cell in book.cells:
            if cell.cell_type == "markdown":
                cells.append(new_markdown_cell(self.linked(cell.source, source, stem)))
                if module and len(cells) == 1:
                    code = f'<a href="../_modules/mbs/{stem}.html">`{module.name}`</a>'
                    cells.append(
                        new_markdown_cell(
                            f"```{{py:module}} {module.name}\n```\n\nModule {code}, made from `{source}`."
                        )
                    )
            elif cell.cell_type == "code":
                words = set(DIRECTIVE.findall(cell.source))
                cell.source = re.sub(r"(?m)^#\|.*\n?", "", cell.source)
                if words & {"hide", "default_exp"} or not cell.source.strip():
                    continue
                if "export" in words:
                    text, names = module.entries(cell.source)
                    self.unwritten -= {f"{module.name}.{n}" for n in names}
                    if not names:
                        continue  # imports
                    cells.append(new_markdown_cell(self.linked(text, source, stem)))
                    cell.metadata["tags"] = ["hide-input"]
                cells.append(shown(cell, "../" * page_of(source).count("/")))
        if source == "nbs/index.ipynb":
            cells.append(new_markdown_cell(self.contents()))
        book.cells, book.metadata = cells, {"kernelspec": book.metadata["kernelspec"]}
        self.write(f"{page_of(source)}.ipynb", json.dumps(nbformat.validator.normalize(book)[1]))

    def contents(self):
        "The site's table of contents; tutorials that it does not name come after those that it does."
        text = (HERE / "contents.md").read_text(encoding="utf-8")
        pages = [page_of(p.relative_to(ROOT).as_posix()) for p in self.notebooks]
        return text.replace(
            "TUTORIALS\n", "".join(f"{p}\n" for p in pages if p.startswith("tutorials/") and f"{p}\n" not in text)
        )

    def reference(self):
        "The list of all modules with what each defines."
        text = (HERE / "reference.md").read_text(encoding="utf-8")
        rows = "".join(
            f"| {{py:obj}}`{name} <mbs.{home}.{name}>` | {self.linked(self.modules[home].says(name), 'docs/reference.md', home)} |\n"
            for name, home in sorted(self.public.items(), key=lambda item: item[0].lower())
        )
        listing, pages = "", []
        for path in self.notebooks:
            book = nbformat.read(path, 4)
            stem = next((m[1] for c in book.cells if (m := re.match(r"#\| default_exp (\w+)", c.source))), "")
            if not stem:
                continue
            pages.append(page_of(path.relative_to(ROOT).as_posix()))
            promise = re.search(r"(?m)^> (.*)", book.cells[0].source)
            listing += f"{{doc}}`/{pages[-1]}` · `mbs.{stem}`\n: {promise[1] if promise else ''}<br>\n"
            listing += (
                "  " + " ".join(f"{{py:obj}}`{n} <mbs.{stem}.{n}>`" for n in self.modules[stem].exported) + "\n\n"
            )
        self.write(
            "reference.md",
            text.replace("PUBLIC\n", rows).replace("MODULES\n", listing).replace("PAGES\n", "\n".join(pages) + "\n"),
        )

    def pages(self):
        for path in self.notebooks:
            self.notebook(path)
        for path in [
            *(p for p in HERE.glob("*.md") if p.stem != "contents"),
            ROOT / "CHANGELOG.md",
            ROOT / "CONTRIBUTING.md",
        ]:
            source = path.relative_to(ROOT).as_posix()
            self.write(f"{page_of(source)}.md", self.linked(path.read_text(encoding="utf-8"), source))
        self.reference()
        found = [
            self.linked(p.read_text(encoding="utf-8"), f"docs/results/{p.name}")
            for p in sorted((HERE / "results").glob("*.md"))
            if p.stem != "README"
        ]
        self.write(
            "results.md",
            self.linked((HERE / "results.md").read_text(encoding="utf-8"), "docs/results.md").replace(
                "RESULTS\n", "\n\n".join(found)
            ),
        )
        if self.unwritten:
            raise ValueError(
                f"{', '.join(sorted(self.unwritten))} would not be in the reference: expected a definition in an exported cell"
            )
        shutil.copytree(HERE / "images", self.folder / "images")


def shown(cell, up):
    "`cell` with outputs that a page can show: plotly's charts as charts, nothing that only a kernel can draw."
    for k, output in enumerate(cell.outputs):
        data = output.get("data", {})
        data.pop("application/vnd.jupyter.widget-view+json", None)
        if figure := data.pop("application/vnd.plotly.v1+json", None):
            name, content = f"{cell.id}-{k}", json.dumps([figure["data"], figure["layout"]]).replace("</", "<\\/")
            data["text/html"] = (
                f'<script src="{up}_static/plotly.min.js"></script><div id="{html.escape(name)}" class="plotly-chart"></div>'
                f'<script>Plotly.newPlot("{name}", ...{content}, {{responsive: true}})</script>'
            )
    cell.outputs = [o for o in cell.outputs if o.output_type == "stream" or o.get("data")]
    cell.execution_count = None
    return cell


def build(out: Path):
    "All pages in `out`/pages and the site in `out`/html; CalledProcessError when Sphinx warns of anything."
    for folder in ("pages", "html"):
        shutil.rmtree(out / folder, ignore_errors=True)
    Site(out / "pages").pages()
    subprocess.run(
        [
            sys.executable,
            "-m",
            "sphinx",
            "-W",
            "--keep-going",
            "-q",
            "-E",
            "-d",
            out / "doctrees",
            "-c",
            HERE,
            out / "pages",
            out / "html",
        ],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "_docs", help="folder to make")
    build(parser.parse_args().out)
