"Every notebook runs, in a process of its own, shows again what it is stored with, and is kept as notebooks are kept here."

import base64
import io
import json
import os
import re
import tempfile
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(s.startswith(("_", ".")) for s in p.relative_to(ROOT).parts)
)
MODULES = [p for p in NOTEBOOKS if re.match(r"\d\d[a-z]?_", p.name)]
TUTORIALS = sorted((ROOT / "nbs/tutorials").glob("*.ipynb"))
TOGETHER = 6_000_000  # bytes of all notebooks
IDENTICAL = (
    os.environ.get("MBS_IDENTICAL") == "1"
)  # to the last byte, as a second execution on one machine must be; other processors round differently
NUMBER = re.compile(r"[-+]?\b\d[\d,]*(?:\.\d*)?(?:e[-+]?\d+)?\b|\bnan\b", re.I)


def name(path):
    return str(path.relative_to(ROOT / "nbs"))


def cells(path, kind):
    return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


def executed(path, home):
    "The notebook after a kernel of its own ran it in its folder; CellExecutionError when a cell fails."
    book = nbformat.read(path, 4)
    environment = os.environ | dict(
        MBS_HOME=str(home),
        IN_TEST="1",
        OMP_NUM_THREADS="1",
        MPLBACKEND="module://matplotlib_inline.backend_inline",
        PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    )
    with tempfile.TemporaryDirectory(prefix="mbs-") as sockets:
        kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{sockets}/kernel")
        NotebookClient(book, km=kernel, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute(
            env=environment, cleanup_kc=True
        )
        assert not kernel.has_kernel  # one that stays alive takes half a gigabyte from all tests after it
    return book


def kept(content):
    "Text as it is compared: without numbers and columns, or as it is."
    return content if IDENTICAL else " ".join(NUMBER.sub("#", content).split())


def shown(cell):
    "What a cell shows, as (kind, content): streams in one piece. Warnings are left out, and cells that say `#| measured`: times, processes, whoever comes first."
    if "#| measured" in "".join(cell["source"]):
        return []
    found = []
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            if output["name"] == "stderr":
                continue
            before = found.pop()[1] if found and found[-1][0] == "stdout" else ""
            found.append(("stdout", before + "".join(output["text"])))
        else:
            found += sorted(
                (kind, "".join(v) if isinstance(v, str | list) else json.dumps(v, sort_keys=True))
                for kind, v in output.get("data", {}).items()
            )
    return [(kind, value if kind == "image/png" else kept(value)) for kind, value in found]


def same(stored, now):
    "Whether a cell shows what it is stored with; pictures may differ in a tick label's width, unless they have to be identical."
    if len(stored) != len(now) or any(a[0] != b[0] for a, b in zip(stored, now)):
        return False

    def alike(a, b):
        sizes = [Image.open(io.BytesIO(base64.b64decode(picture))).size for picture in (a, b)]
        return all(abs(m - n) <= 30 for m, n in zip(*sizes))

    return all(
        a == b or (kind == "image/png" and not IDENTICAL and alike(a, b)) for (kind, a), (_, b) in zip(stored, now)
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_runs_and_shows_what_is_stored(path, tmp_path):
    "Outputs of a second execution: the same to the byte with MBS_IDENTICAL=1, else the same kinds, words and sizes. A notebook stored without any has nothing to compare."
    stored, now = (
        {c["id"]: shown(c) for c in of if c["cell_type"] == "code"}
        for of in (cells(path, "code"), executed(path, tmp_path).cells)
    )
    if not any(stored.values()):
        return
    stale = [cell for cell, content in stored.items() if not same(content, now[cell])]
    assert not stale, "stale outputs, execute the notebook as CONTRIBUTING.md says: " + "".join(
        f"\n{c}\n{str(stored[c])[:400]}\n{str(now[c])[:400]}" for c in stale
    )


def test_number_is_no_word(monkeypatch):
    "What the comparison lets pass, and what not."
    monkeypatch.setitem(globals(), "IDENTICAL", False)

    def stream(text, source=""):
        return dict(source=source, outputs=[dict(output_type="stream", name="stdout", text=text)])

    assert shown(stream("old 61.4 %,\tnan")) == shown(stream("old 7 %, -0.3e-05")) == [("stdout", "old # %, #")]
    assert shown(stream("step1 old")) != shown(stream("step1 new")) and shown(stream("a1")) != shown(stream("a2"))
    assert shown(stream("12 s", "#| measured\nx")) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_is_kept_well(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    outputs = [o for c in cells(path, "code") for o in c["outputs"]]
    assert "widgets" not in content["metadata"], "stored widget state"
    assert not [o for o in outputs if o["output_type"] == "error"], "a stored error"
    assert path.stat().st_size < 400_000, (
        f"{path.stat().st_size} bytes: expected under 400,000; make the pictures smaller"
    )


def test_are_small_together():
    total = sum(path.stat().st_size for path in NOTEBOOKS)
    assert total < TOGETHER, f"{total:,} bytes: expected under {TOGETHER:,}; make the pictures smaller"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_is_a_tutorial(path):
    exported = ["".join(c["source"]) for c in cells(path, "code") if "#| export" in "".join(c["source"])]
    pictures = [o for c in cells(path, "code") for o in c["outputs"] if "image/png" in o.get("data", {})]
    assert max(len(source.splitlines()) for source in exported) <= 60, "an exported cell is longer than a screen"
    assert len(cells(path, "markdown")) >= len(exported) / 2, "too little prose"
    assert pictures, "no picture of what it does"


@pytest.mark.parametrize("path", TUTORIALS, ids=name)
def test_tutorial_shows_and_exports_nothing(path):
    "A tutorial uses the package: pictures, prose, no exported cell. `test_runs` executes it like every notebook."
    sources = ["".join(c["source"]) for c in cells(path, "code")]
    assert path in NOTEBOOKS and not [s for s in sources if "#| export" in s or "#| default_exp" in s]
    assert [o for c in cells(path, "code") for o in c["outputs"] if "image/png" in o.get("data", {})], "no picture"
    assert len(cells(path, "markdown")) >= len(sources) / 2, "too little prose"


def test_train_parameters_are_the_settings():
    "The parameters of the train notebook are exactly the fields of `Settings`, with the same defaults."
    from mbs.run import Settings

    variables = {}
    exec(
        next(
            "".join(c["source"])
            for c in cells(ROOT / "nbs/runs/train.ipynb", "code")
            if "parameters" in c["metadata"].get("tags", [])
        ),
        variables,
    )
    del variables["__builtins__"]
    assert variables == {name: field.default for name, field in Settings.model_fields.items()}
