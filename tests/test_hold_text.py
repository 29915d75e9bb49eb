"Text is escaped for the language it goes to: format × payload × place."

import csv
import io
import json
import re
import shutil
import warnings

import nbformat
import numpy as np
import pytest
from markdown_it import MarkdownIt
from matplotlib.text import Text
from rich.console import Console
from test_safety import Elements

import mbs.cli
from mbs.comparison import find_runs
from mbs.files import read_json, write_json
from mbs.folders import find_package_folder
from mbs.live import render_console_table
from mbs.run import trained_run
from mbs.tables import Table, Value, escape_markdown, to_csv, to_html, to_latex, to_markdown
from mbs.viz import draw_class_legend, make_grid

PAYLOADS = [
    "=HYPERLINK(1)",
    "+A1",
    "-A1+B2",
    "@SUM(A1)",
    "\t=A1",
    "<img src=x onerror=alert(1)>",
    "&lt;b&gt;",
    "a $x^2$ b",
    r"\input{z} 50% & _x_ #1 ~ ^ {y}",
    "[2cm] *",
    "[red]old[/red]",
    "net[/old]",
    ":smile:",
    "**bold** `code` ~~gone~~",
    "[link](javascript:alert(1))",
    "![p](x)",
    "| cell |",
]


def make_table(payload: str) -> Table:
    return Table(payload, ["name", payload], [[payload, Value(-0.5, 0.1, 2)], ["-0.5", None], ["b", -3]], payload)


def render_latex(text: str) -> str:
    "Undo the escapes of LaTeX; AssertionError for a character that is not escaped."
    names = {"textbackslash": "\\", "textasciitilde": "~", "textasciicircum": "^", "textless": "<", "textgreater": ">"}
    names["textbar"] = "|"
    text = re.sub(r"\\(text\w+)\{\}", lambda m: f"\0{ord(names[m[1]])};", text)
    text = re.sub(r"\\([&%$#_{}])|\{([\[\]*])\}", lambda m: f"\0{ord(m[1] or m[2])};", text)
    assert not re.search(r"[\\&%$#_{}~^]", text), text
    return re.sub(r"\0(\d+);", lambda m: chr(int(m[1])), text)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_tables_show_text_as_it_is(payload):
    "Title, name of a column, cell and note, in every format."
    table, plain = make_table(payload), " ".join(payload.split())
    html = to_html(table)
    assert Elements(html).found == Elements(to_html(make_table("plain"))).found
    page = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(to_markdown(table))
    assert Elements(page).found == Elements(MarkdownIt().enable("table").render(to_markdown(make_table("plain")))).found
    assert page.count(MarkdownIt().render(escape_markdown(plain)).strip().removeprefix("<p>").removesuffix("</p>")) >= 4
    lines = to_latex(table).splitlines()
    assert render_latex(lines[2].removeprefix(r"\caption{").removesuffix("}")).startswith(plain.rstrip("."))
    header, _, row = lines[lines.index(r"\toprule") + 1 :][:3]
    assert render_latex(row.split(r" & $-$")[0]) == plain == render_latex(header.removeprefix("name & ")[:-3])
    assert not re.match(r"\s*[\[*]", row)
    for row in csv.reader(io.StringIO(to_csv([table]))):
        for cell in row:
            assert not re.match(r"\s*[=+@-]", cell) or re.fullmatch(r"-\d+(\.\d+)?", cell), cell
    assert "-50.0" in to_csv([table]) and ",-0.5," in to_csv([table]), "negative numbers are spared"


@pytest.mark.parametrize("payload", [payload for payload in PAYLOADS if "\t" not in payload])
def test_a_terminal_shows_text_as_it_is(payload, monkeypatch):
    "The table of a batch, and that of `mbs run` and `mbs report`."
    rows = [(payload, "queued", payload)]
    console = Console(width=200, file=io.StringIO(), emoji=False)
    console.print(render_console_table(Table(payload, ("run", "state", payload), rows, payload)))
    assert console.file.getvalue().count(payload.strip()) == 5
    row = dict(table=payload, method=payload, seeds=1) | dict.fromkeys(mbs.cli._SUMMARY, 0.5)
    monkeypatch.setattr("mbs.comparison.summarise_runs", lambda runs: [row])
    output = io.StringIO()
    monkeypatch.setattr("sys.stdout", output)
    monkeypatch.setenv("COLUMNS", "200")
    mbs.cli._print_summary([])
    assert output.getvalue().count(payload.strip()) == 2


@pytest.mark.parametrize("payload", PAYLOADS)
def test_figures_draw_text_as_it_is(payload):
    "Dollar signs are characters; what is no formula between them does not fail."
    fig, axes = make_grid(1, 1, 3, 1)
    axes[0, 0].set_title(f"{payload} $\\nothing{{$")
    draw_class_legend(fig, [np.arange(2, dtype=np.uint8)], ["background", payload])
    fig.savefig(io.BytesIO(), format="png", bbox_inches="tight")
    texts = [text for text in fig.findobj(Text) if text.get_text()]
    assert len(texts) >= 2 and not any(text.get_parse_math() for text in texts)


PLACES = ("class", "data", "run", "parameter")


def test_reports_show_names_as_they_are(tmp_path, monkeypatch):
    "Every payload in every place of two runs that are compared; the notebook of the report is executed here."
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    text = " ".join(PAYLOADS).replace("\t", "")
    name = "=" + text.replace("/", "")
    for number, folder in enumerate((name, "plain")):
        shutil.copytree(trained_run("mbs").folder, tmp_path / "runs" / folder[:200])
        card = read_json(tmp_path / "runs" / folder[:200] / "run.json")
        card["names"][1] = f"{text} class"
        card["settings"]["data"] = f"/x/{text} data"
        card["settings"]["encoder"] = f"={text} parameter" if number else "vit"
        write_json(tmp_path / "runs" / folder[:200] / "run.json", card)
    runs, left_out = find_runs([tmp_path / "runs"])
    assert len(runs) == 2, left_out
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *things: shown.extend(things))
    scope = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for cell in nbformat.read(find_package_folder("runs") / "report.ipynb", 4).cells:
            if cell.cell_type == "code":
                exec(cell.source, scope)
                scope |= dict(runs=[str(tmp_path / "runs")], out=str(tmp_path / "report"))
    markdown = [thing.data for thing in shown if type(thing).__name__ == "Markdown"]
    rendered = "".join(map(MarkdownIt().render, markdown))
    assert {tag for tag, _ in Elements(rendered).found} <= {"h2", "p", "em"} and "onerror" in rendered
    page = (tmp_path / "report" / "report.html").read_text()
    assert not [tag for tag in Elements(page).found if "onerror" in tag[1]] and "onerror" in page
    for file in (tmp_path / "report").glob("*.csv"):
        cells = [cell for row in csv.reader(file.open(newline="")) for cell in row]
        assert not [cell for cell in cells if re.match(r"\s*[=+@-]", cell) and not re.fullmatch(r"-?[\d.e-]+", cell)]
    assert "<img" not in (tmp_path / "report" / "summary.md").read_text()
    assert json.dumps(text)[1:20] not in markdown
