"Reports: numbers of the run folders in every format, hostile names, unfinished and mixed runs, published rows."

import base64
import csv
import hashlib
import json
import re
import shutil
from collections import Counter
from datetime import date
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mbs.bounds import find_confused_pairs
from mbs.cli import app
from mbs.comparison import find_runs, group_runs, summarise_runs
from mbs.experiment import Experiment
from mbs.metrics import CONVENTIONS
from mbs.protocol import SETTINGS, Protocol
from mbs.report import compare_runs, draw_confusions, draw_figures, draw_pairs, write_report
from mbs.report_tables import (
    _find_published,
    make_card_table,
    make_paper_table,
    make_published_table,
    make_score_table,
    read_published,
)
from mbs.run import Sample, load_run
from mbs.scenes import write_scenes
from mbs.settings import Settings
from mbs.tables import Table, summarise_seeds, to_csv, to_html, to_latex, to_markdown

HOSTILE = [
    "<script>alert(1)</script>",
    "a|b `c`",
    r"100% \& $x_1$ {#}",
    "https://example.org/?q=1&r=2",
    "leaf~^",
    "*star*",
    "\"quoted' name",
    "butterfly",
]
NETWORK = dict(encoder_options=dict(patch_size=8, embed_dim=16, depth=1, num_heads=1), samples=2)
SHORT = dict(crop=32, batch=4, iterations=2, optimizer="adamw")


def run(outputs, name, until=None, **settings):
    "Train a tiny run; stop after step `until`."
    experiment = Experiment(Settings(name=name, **dict(training=SHORT) | NETWORK | settings), outputs)
    for step in experiment.steps():
        if step == until:
            break
    return load_run(experiment.folder)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Train runs on scenes whose folder and class names are hostile.

    They make three lines, one of them with two seeds; a joint run, two unfinished runs and another protocol."""
    root = tmp_path_factory.mktemp("report")
    data = write_scenes(root / "<i>pets & 50%_data", 40, 8, size=32)
    (data / "classes.txt").write_text("\n".join(HOSTILE), encoding="utf-8")
    on = dict(data=str(data), protocol="6-2")
    for seed in (0, 1):
        run(root / "outputs", f"mbs{seed}", method="mbs", seed=seed, **on)
    run(root / "outputs", "mbs-without", method="mbs", parts=dict(orthogonality=False), **on)
    run(root / "outputs", "kd", method="kd", **on)
    run(root / "outputs", "joint", method="finetune", data=str(data), protocol="offline")
    run(root / "outputs", "stopped", until=0, method="finetune", **on)
    run(root / "outputs", "other", method="mbs", data=str(data), protocol="7-1")
    empty = root / "outputs" / "begun"  # killed before the first step was complete
    shutil.copytree(root / "outputs" / "kd", empty, ignore=shutil.ignore_patterns("step-*", "train.ipynb"))
    return root / "outputs"


@pytest.fixture(scope="module")
def written(outputs, tmp_path_factory):
    "Write the report of all runs, and return its folder."
    return write_report(find_runs([outputs])[0], tmp_path_factory.mktemp("written") / "a" / "report")


def stored(outputs, name):
    return [json.loads(p.read_text()) for p in sorted((outputs / name).glob("step-*/metrics.json"))]


def cells(text, method, split):
    "Return the cells of the first row of a text table whose first cell is `method`."
    row = next(line for line in text.splitlines() if re.match(rf"\W*{re.escape(method)}\s*[|&]", line))
    marks = r"\*\*|</?ins>|(?:textbf|underline)\{([^}]*)\}"
    return [re.sub(marks, r"\1", cell.strip(" \\")) for cell in row.strip("| ").split(split)]


def test_numbers_are_those_of_the_runs(outputs, written):
    "CSV agrees to the last digit, LaTeX and Markdown to the printed one, over two seeds."
    both = [stored(outputs, f"mbs{seed}") for seed in (0, 1)]
    with open(written / "summary.csv", newline="", encoding="utf-8") as f:
        lines = list(csv.DictReader(f))
    mine = next(line for line in lines if line["method"] == "mbs" and line["seeds"] == "2")
    md, tex = (
        cells((written / f"summary.{suffix}").read_text(encoding="utf-8"), "mbs", split)
        for suffix, split in (("md", "|"), ("tex", "&"))
    )
    columns = ["base step", "old", "new", "all", "old_fg", "all_fg", "harmonic", "released", "accuracy"]
    for k, column in enumerate(columns, 2):
        step, key = (0, "all") if column == "base step" else (-1, column)
        values = [100 * m[step]["scores"][key] for m in both]
        mean, std = np.mean(values), np.std(values, ddof=1)
        assert float(mine[column]) == pytest.approx(mean)
        assert float(mine[f"{column} std"]) == pytest.approx(std)
        assert mine[f"{column} n"] == "2"
        assert md[k] == f"{mean:.1f} ± {std:.1f}", column
        assert tex[k] == md[k].replace("±", r"$\pm$"), column
    for flow in both[0][-1]["shift"]:
        assert float(mine[flow.replace("->", " → ")]) == pytest.approx(
            100 * np.mean([m[-1]["shift"][flow] for m in both])
        )
    iou = [load_run(outputs / f"mbs{seed}").iou() for seed in (0, 1)]
    falls = [np.nanmean((m[0] - m[1])[1:7]) for m in iou]
    assert float(mine["forgetting"]) == pytest.approx(100 * np.mean(falls))
    assert float(mine["backward transfer"]) == pytest.approx(-100 * np.mean(falls))


def test_csv_of_steps_and_classes(outputs, written):
    with open(written / "steps.csv", newline="", encoding="utf-8") as f:
        steps = list(csv.DictReader(f))
    assert Counter(line["run"] for line in steps) == {
        "mbs0": 2,
        "mbs1": 2,
        "mbs-without": 2,
        "kd": 2,
        "joint": 2,
        "stopped": 1,
        "other": 2,
    }
    line = next(line for line in steps if line["run"] == "kd" and line["step"] == "1")
    kept = stored(outputs, "kd")[1]
    assert float(line["all"]) == pytest.approx(100 * kept["scores"]["all"])
    assert float(line["old->background"]) == pytest.approx(100 * kept["shift"]["old->background"])
    with open(written / "classes.csv", newline="", encoding="utf-8") as f:
        classes = list(csv.DictReader(f))
    matrix = load_run(outputs / "kd").iou()
    mine = [float(line["IoU"]) if line["IoU"] else np.nan for line in classes if line["run"] == "kd"]
    np.testing.assert_allclose(mine, [100 * v for t, row in enumerate(matrix) for v in row[: (7, 9)[t]]])
    assert {line["class"] for line in classes} == {"background", *HOSTILE}


class Page(HTMLParser):
    "Collects tags, attributes and text of a page; fails on a tag that is not closed."

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_loads_nothing_and_shows_names_unchanged(written):
    page = Page()
    html = (written / "report.html").read_text(encoding="utf-8")
    page.feed(html)
    assert not page.open and not {"link", "iframe", "object", "i", "a", "base"} & set(page.tags)
    (script,) = re.findall("<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(value for key, value in page.attributes if key == "content")
    assert policy.endswith(f"; script-src 'sha256-{digest}'"), "another script could run, or this one could not"
    assert all(
        value.startswith("data:image/png;base64,")
        for key, value in page.attributes
        if key in ("src", "href", "srcset", "action")
    )
    assert not any(key.startswith("on") for key, _ in page.attributes) and "url(" not in html and "@import" not in html
    assert page.tags.count("img") >= 10
    for name in HOSTILE:
        assert name in page.text, name
    assert "<i>pets & 50%_data" in page.text and str(written.parents[1]) not in page.text


def test_latex_and_markdown_are_escaped(written):
    tex, md = ((written / f"summary.{suffix}").read_text(encoding="utf-8") for suffix in ("tex", "md"))
    tex += (written / "table.tex").read_text(encoding="utf-8")
    bare = re.sub(r"\\[\\&%$#_{}]", "", tex)
    assert bare.count("{") == bare.count("}") and "#" not in bare and "_" not in bare
    assert r"100\% \textbackslash{}\& \$x\_1\$ \{\#\}" in tex and r"a\textbar{}b" in tex
    for line in tex.splitlines():
        assert not line.endswith(r"\\") or "&" in line
    tables = [block.splitlines() for block in md.split("\n\n") if block.startswith("|")]
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert "<script>" not in re.sub(r"\\[<>]", "", md) and r"a\|b" in md


def test_a_report_says_first_what_it_compares(written):
    page = (written / "report.html").read_text(encoding="utf-8")
    first = page.index("<h2>")
    for text in ("<h1>Comparison of runs in 2 protocols</h1>", f"What was compared, {date.today()}", "8 runs in all"):
        assert 0 < page.index(text) < first
    md = (written / "summary.md").read_text(encoding="utf-8")
    assert "| 6-2 | overlapped | kd, mbs, finetune | 0, 1 | 5 | 2 | 0 |" in md
    assert not any(re.search(r"\bnan\b", path.read_text(encoding="utf-8"), re.I) for path in written.glob("*.[mtc]*"))


def test_the_table_for_a_paper_is_small_and_ranked(outputs, written):
    tex = (written / "table.tex").read_text(encoding="utf-8")
    first = tex.split(r"\end{table}")[0]
    assert r"method & old & new & all & harmonic \\" in first and r"\usepackage{booktabs,adjustbox}" in first
    (six, _) = group_runs(find_runs([outputs])[0])
    table = make_paper_table(six)
    competing = [row[3].mean for row in table.rows[:-1]]
    shown = [round(100 * value, 1) for value in competing]
    ranks = [row[3] for row in table.rank()]
    assert ranks[-1] == 0, "the run that learns all at once competes"
    if len(set(shown)) > 1:
        assert [value == max(shown) for value in shown] == [rank == 1 for rank in ranks[:-1]]


def test_figures_are_saved_in_vectors(written):
    files = [*(written / "figures").iterdir(), written / "comparison.pdf", written / "comparison-2.pdf"]
    assert len(files) >= 15 and all(file.read_bytes().startswith(b"%PDF") for file in files)
    assert (written / "figures/01-curves.pdf").is_file() and (written / "figures/02-flows.pdf").is_file()


def test_a_link_named_figures_is_replaced(outputs, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "figures").symlink_to(elsewhere)
    write_report([load_run(outputs / "stopped")], tmp_path / "report")
    assert not list(elsewhere.iterdir()) and (tmp_path / "report/figures/01-curves.pdf").is_file()


def test_ranks_go_by_what_is_printed():
    "Equal prints share a rank, nothing is marked where all are equal, and two methods have no second best."
    values = [summarise_seeds([v]) for v in (0.5004, 0.5001, 0.3, 0.2)] + [summarise_seeds([]), summarise_seeds([0.9])]
    table = Table("", ["method", "old", "lost"], [["m", v, v] for v in values], "", ["old"], ["lost"], [5])
    assert [row[1] for row in table.rank()] == [1, 1, 2, 0, 0, 0]
    assert [row[2] for row in table.rank()] == [0, 0, 2, 1, 0, 0]
    assert not any(map(any, table._replace(rows=table.rows[:2]).rank()))
    assert [row[1] for row in table._replace(rows=table.rows[1:3]).rank()] == [1, 0]
    assert "<td class=n>–</td>" in to_html(table) and "<td class=n><strong>50.0</strong></td>" in to_html(table)


def test_lines_seeds_and_unfinished_runs(outputs, written):
    classes = outputs.parent / "<i>pets & 50%_data" / "classes.txt"
    runs, left_out = find_runs([outputs, outputs / "nowhere", classes])
    assert len(runs) == 8 and set(left_out.values()) == {"it does not exist", "no run.json in it"}
    six, seven = group_runs(runs)
    assert {label: len(line) for label, line in six.lines.items()} == {"kd": 1, "mbs": 2, "mbs orthogonality=False": 1}
    assert list(six.at_once) == list(seven.at_once) == ["finetune (all at once)"]
    assert list(seven.lines) == ["mbs"] and len(seven.lines["mbs"]) == 1
    assert {run.folder.name for _, run in six.unfinished} == {"stopped", "begun"}
    assert len({(row["table"], row["method"]) for row in summarise_runs(runs)}) == len(summarise_runs(runs)) == 6
    md = (written / "summary.md").read_text(encoding="utf-8")
    assert (
        md.count("### Unfinished runs") == 1
        and re.search(r"\| stopped \| finetune \| 0 \| 1 of 2 \|", md)
        and re.search(r"\| begun \| kd \| 0 \| 0 of 2 \| – \|", md)
    )
    scores = md.split("### Background shift")[0]
    assert "| finetune |" not in scores, "an unfinished run is among the finished ones"


def test_joint_is_split_as_the_table_is(outputs):
    runs = find_runs([outputs])[0]
    rows = {(row["table"].split(" · ")[1], row["method"]): row for row in summarise_runs(runs)}
    iou = load_run(outputs / "joint").iou()[0]
    for table, n_old in (("6-2", 7), ("7-1", 8)):
        row = rows[table, "finetune (all at once)"]
        assert (
            row["old"].mean == pytest.approx(np.nanmean(iou[:n_old]))
            and row["new"].mean == pytest.approx(np.nanmean(iou[n_old:]))
            and row["base"].n == row["forgetting"].n == 0
        )


def test_joint_alone_and_unfinished_alone(outputs, tmp_path):
    for name in ("joint", "stopped", "begun"):
        folder = write_report([load_run(outputs / name)], tmp_path / name)
        assert f"<td>{name}</td>" in (folder / "report.html").read_text(encoding="utf-8")
        assert name in (folder / "summary.md").read_text(encoding="utf-8")
    assert not (tmp_path / "begun" / "comparison.png").exists()


def test_recipes_make_lines_and_repeats_count_once(outputs, tmp_path):
    for name in ("kd", "mbs0"):
        shutil.copytree(outputs / name, tmp_path / name)
    shutil.copytree(outputs / "kd", tmp_path / "kd-again")
    run(
        tmp_path,
        "kd-fast",
        method="kd",
        data=load_run(outputs / "kd").settings.data,
        protocol="6-2",
        training=SHORT | dict(lr=0.01),
        seed=1,
    )
    runs = find_runs([tmp_path])[0]
    (group,) = group_runs(runs)
    assert {row["method"]: row["seeds"] for row in summarise_runs(runs)} == {
        "kd lr=0.001": 1,
        "kd lr=0.01": 1,
        "mbs lr=0.001": 1,
    }
    assert [r.folder.name for r in group.repeats] == ["kd-again"]
    text = (write_report(runs, tmp_path / "report") / "summary.md").read_text(encoding="utf-8")
    assert "Left out as repeats of a seed: kd-again" in text
    with pytest.raises(ValueError, match="cannot be compared in one picture"):
        compare_runs(find_runs([outputs])[0])


def test_runs_without_pictures(outputs, tmp_path):
    "A report on a run without samples lacks only the comparison and the pairs."
    made = run(tmp_path, "plain", method="kd", protocol="6-2", data=load_run(outputs / "kd").settings.data, samples=0)
    names = {p.name for p in (write_report([made], tmp_path / "report") / "figures").iterdir()}
    assert names == {"01-curves.pdf", "02-flows.pdf", "03-iou.pdf", "04-confusions.pdf"}
    assert {p.name for p in (tmp_path / "report").iterdir()} == {
        "figures",
        "table.tex",
        "report.html",
        "summary.md",
        "summary.tex",
        "summary.csv",
        "steps.csv",
        "classes.csv",
    }


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    "Train a run of 15-1 on a folder in VOC's layout, whose twenty classes have VOC's names."
    root = tmp_path_factory.mktemp("voc")
    data = root / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
        (data / folder).mkdir(parents=True)
    rng, ids = np.random.default_rng(0), [f"p{k:02d}" for k in range(40)]
    for k, name in enumerate(ids):
        mask = np.zeros((32, 32), np.uint8)
        mask[4:16, 4:28], mask[16:28, 4:28] = k % 20 + 1, (k + 1) % 20 + 1
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(data / "JPEGImages" / f"{name}.png")
        Image.fromarray(mask).save(data / "SegmentationClassAug" / f"{name}.png")
    for part, names in (("trainaug", ids[:20]), ("val", ids[20:])):
        (data / "ImageSets/Segmentation" / f"{part}.txt").write_text("\n".join(names))
    return run(root, "voc", method="mbs", data=str(data), protocol="15-1")


def test_published_rows_appear_beside_ours(voc):
    table = make_published_table(group_runs([voc])[0])
    theirs = {(row[0], row[1]): row[2:] for row in table.rows if not row[1].startswith("this report")}
    assert (
        theirs["MBS", "re-run A"] == ["foreground", 82.3, 69.0, 79.0]
        and theirs["MBS", "re-run B"][0] == "both"
        and theirs["Incrementer", "the paper"][0] == "all only"
    )
    assert theirs["MBS", "the paper"] == ["a number is missing", None, None, 80.6]
    ours = {row[2]: row[3:] for row in table.rows if row[1].startswith("this report")}
    scores = voc.metrics()["scores"]
    for name, keys in {
        "foreground": ("old_fg", "new", "all_fg"),
        "both": ("old", "new", "all"),
        "all only": ("old_fg", "new", "all"),
    }.items():
        np.testing.assert_allclose([value.mean for value in ours[name]], [scores[k] for k in keys])
    assert "20 pictures" in table.note and "arXiv 2608.30281" in table.note
    assert all(text in to_markdown(table) for text in ("82.3", "80.6", "–"))


def alter(run, folder, **changes):
    "Copy a run folder and change the settings on its card."
    shutil.copytree(run.folder, folder)
    card = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    card["settings"] |= changes
    (folder / "run.json").write_text(json.dumps(card), encoding="utf-8")
    return load_run(folder)


def test_published_rows_go_by_the_classes_of_each_step(voc, tmp_path):
    "Another way of writing 15-1 has its rows; a few-shot run has none, and a table of its own."
    listed = alter(voc, tmp_path / "listed", protocol=[15, 1, 1, 1, 1, 1], seed=1)
    few = alter(voc, tmp_path / "few", shots=5)
    groups = group_runs([listed, voc, few])
    assert [group.title.split(" · ")[1:] for group in groups] == [
        ["15-1-1-1-1-1", "overlapped"],
        ["15-1", "overlapped, 5 shots"],
    ]
    assert [len(line) for line in groups[0].lines.values()] == [2]
    assert make_published_table(groups[0]) and make_published_table(groups[1]) is None
    assert "at most 5 pictures of each new class" in to_markdown(make_score_table(groups[1]))
    table = make_card_table([few, voc])
    k = table.columns.index("shots")
    assert [row[k : k + 2] for row in table.rows] == [[5, "16, 2, 2, 2, 2, 2"], ["all", "16, 2, 2, 2, 2, 2"]]


@pytest.mark.parametrize("split", ["15-3-2", [10, 6, 4], [14, 6], "15-1-1-1-2"])
def test_an_uneven_protocol_has_no_published_rows(split):
    assert not _find_published(Protocol(split))[0]


def test_nothing_is_published_on_scenes(outputs):
    assert not [g for g in group_runs(find_runs([outputs])[0]) if make_published_table(g)]


def test_published_file():
    rows, sources = read_published()
    assert len(rows) == len(set(rows)) > 45 and {row.source for row in rows} == set(sources)
    for row in rows:
        assert row.setting in SETTINGS and len(Protocol(row.protocol, row.dataset).sizes) > 1
        assert (
            all(x is None or 0 < x < 100 for x in (row.old, row.new, row.all))
            and (row.old, row.new, row.all) != (None,) * 3
        )
        assert row.fits() is None or set(row.fits()) <= set(CONVENTIONS)
    mbs_a = [
        row.fits()
        for row in rows
        if (row.method, row.source, row.dataset) == ("MBS", "A", "voc")
        and row.fits() is not None
        and row.protocol != "5-3"
    ]
    assert mbs_a and all("foreground" in fits and "all only" not in fits for fits in mbs_a)
    assert {row.fits() for row in rows if row.method == "Incrementer"} == {("all only",)}


def test_cards(outputs):
    (row,) = make_card_table([load_run(outputs / "mbs1")]).rows
    card = load_run(outputs / "mbs1").card
    assert (
        card.data.train in row[5]
        and f"torch {card.versions['torch']}" in row[4]
        and row[6] == "random initialisation"
        and row[2] == 1
    )


def test_command(outputs, tmp_path):
    "The command executes the notebook, which writes the files; a path without a run is reported."
    (tmp_path / "README.md").write_text("no run")
    result = CliRunner().invoke(
        app,
        [
            "report",
            *map(str, [outputs / "kd", outputs / "stopped", tmp_path / "README.md"]),
            "--out",
            str(tmp_path / "out"),
        ],
    )
    assert result.exit_code == 0, result.output
    assert (
        "README.md, no run.json in it" in result.output.replace("\n", "")
        and "Unfinished: stopped, 1 of 2 steps" in result.output
    )
    assert {
        "report.html",
        "report.ipynb",
        "summary.md",
        "summary.tex",
        "summary.csv",
        "steps.csv",
        "classes.csv",
        "comparison.png",
        "comparison.pdf",
        "figures",
        "table.tex",
    } == {p.name for p in (tmp_path / "out").iterdir()}
    notebook = json.loads((tmp_path / "out" / "report.ipynb").read_text())
    outputs_ = [o for c in notebook["cells"] for o in c.get("outputs", [])]
    assert (
        sum("image/png" in o.get("data", {}) for o in outputs_) >= 4
        and sum("<table" in "".join(o.get("data", {}).get("text/html", "")) for o in outputs_) >= 4
    )


@pytest.mark.parametrize(
    "words,says",
    [(["nowhere"], "there is no run to report on; nowhere: it does not exist"), ([], "there is no run to report on")],
)
def test_command_refuses(words, says, tmp_path, monkeypatch):
    monkeypatch.setenv("MBS_HOME", str(tmp_path / "home"))
    result = CliRunner().invoke(app, ["report", *words])
    assert (
        result.exit_code == 2
        and says in result.stderr
        and "\n" not in result.stderr.strip()
        and not (tmp_path / "home").exists()
    )


def test_command_reports_an_unwritable_folder(outputs, tmp_path):
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["report", str(outputs / "kd"), "--out", str(tmp_path / "file")])
    assert result.exit_code == 2 and "cannot be written" in result.stderr


def test_a_run_of_another_version_is_left_out(outputs, tmp_path):
    shutil.copytree(outputs / "kd", tmp_path / "kd")
    for name, change in (
        ("lacks", lambda card: card.pop("steps")),
        ("unknown", lambda card: card["settings"].update(colour="red")),
    ):
        shutil.copytree(outputs / "kd", tmp_path / name)
        card = json.loads((tmp_path / name / "run.json").read_text())
        change(card)
        (tmp_path / name / "run.json").write_text(json.dumps(card))
    runs, left_out = find_runs([tmp_path])
    assert [r.folder.name for r in runs] == ["kd"]
    reasons = {Path(path).name: why for path, why in left_out.items()}
    assert reasons.keys() == {"lacks", "unknown"}
    assert "'steps' is missing" in reasons["lacks"] and "colour' is not known" in reasons["unknown"]


def test_tables_of_missing_values():
    table = Table("t", ["a", "b"], [[summarise_seeds([]), 1.25], [summarise_seeds([0.5, float("nan")]), None]])
    assert "–" in to_markdown(table) and "50.0" in to_latex(table)
    lines = list(csv.reader(to_csv([table]).splitlines()))
    assert lines[1] == ["t", "", "", "0", "1.25"] and lines[2] == ["t", "50.0", "", "1", ""]
    with pytest.raises(ValueError, match="different columns"):
        to_csv([table, table._replace(columns=["a", "c"])])


def test_confusions_of_a_line_are_those_of_its_runs(outputs):
    "One matrix a step, summed over seeds; a method that learns all classes at once has one."
    six, _ = group_runs(find_runs([outputs])[0])
    line = six.lines["mbs"]
    fig = draw_confusions(six, line)
    assert [ax.get_title() for ax in fig.axes] == ["after step 0", "after step 1"]
    for t, ax in enumerate(fig.axes):
        counts = sum(run.confusion(t).counts for run in line)
        n = len(counts)
        drawn = np.ma.filled(ax.images[0].get_array(), np.nan)
        total = counts.sum(1, keepdims=True)
        np.testing.assert_allclose((drawn[:n, :n] * total)[total[:, 0] > 0], counts[total[:, 0] > 0])
        assert drawn.shape == (9, 9) and np.isnan(drawn[n:]).all()
    (joint,) = six.at_once.values()
    assert [ax.get_title() for ax in draw_confusions(six, joint).axes] == ["all learnt at once"]


def test_pairs_of_a_line_are_shown_where_pictures_hold_them(outputs, monkeypatch):
    "Half of the pixels of a class are given another in matrix and picture; without pictures there is no figure."
    six, _ = group_runs(find_runs([outputs])[0])
    run = load_run(outputs / "kd")
    photo, truth, _ = run.samples()[0]
    true = int(np.bincount(truth[(truth > 0) & (truth < 9)]).argmax())
    wrong = 1 + true % 8
    predicted = np.where(truth == true, wrong, 0).astype(np.uint8)
    confusion = run.confusion()
    confusion.counts[:] = 9 * np.eye(9, dtype=int)
    confusion.counts[true, [true, wrong]] = 5
    monkeypatch.setattr(run, "confusion", lambda step=-1: confusion)
    monkeypatch.setattr(run, "samples", lambda: [Sample(photo, truth, [predicted])])
    assert find_confused_pairs(confusion.counts, 1)[0][:2] == (true, wrong)
    title = draw_pairs(six, [run]).subfigs[0].get_suptitle()
    assert title.startswith(f"{run.names[true]} → {run.names[wrong]}: 50.0 % of all {run.names[true]} pixels; here")
    assert title.endswith(f"{(truth == true).sum():,}")
    monkeypatch.setattr(run, "samples", list)
    assert draw_pairs(six, [run]) is None
    confusion.counts[:] = np.diag(np.diag(confusion.counts))
    assert draw_pairs(six, [run]) is None


def test_figures_of_a_line_have_captions_in_its_name(outputs):
    six, _ = group_runs(find_runs([outputs])[0])
    captions = [figure.caption for figure in draw_figures(six)]
    for label in six.lines:
        assert sum(caption.startswith(f"{label}: true class (rows)") for caption in captions) == 1
