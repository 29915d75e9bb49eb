"""Every notebook runs in its own process, shows its stored outputs again, and follows the rules for notebooks.

The rules: short cells, enough prose, a picture in each module notebook and tutorial, no stored errors, small files."""

import base64
import io
import json
import os
import re
import tempfile
from pathlib import Path
from statistics import median

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image
from warm_kernels import make_manager

ROOT = Path(__file__).parents[1]


def is_hidden(path):
    "Return whether a file or a folder above it is hidden or generated."
    return any(part.startswith(("_", ".")) for part in path.relative_to(ROOT).parts)


NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not is_hidden(p))
MODULES = [p for p in NOTEBOOKS if re.match(r"\d\d[a-z]*_", p.name)]  # numbered, for example 40_ or 61a_
TUTORIALS = sorted((ROOT / "nbs/tutorials").glob("*.ipynb"))
MAX_BYTES = 400_000  # of one notebook
MAX_BYTES_TOGETHER = 8_000_000
MAX_MEDIAN_LINES = 8  # of the code cells of a notebook
MAX_EXPORTED_LINES = 60  # of one exported cell
# Compare outputs to the last byte, which works on the machine that stored them; other processors round differently.
IDENTICAL = os.environ.get("MBS_IDENTICAL") == "1"
NUMBER = re.compile(r"[-+]?\b\d[\d,]*(?:\.\d*)?(?:e[-+]?\d+)?\b|\bnan\b", re.I)


def name(path):
    "Return the path of a notebook below nbs/."
    return str(path.relative_to(ROOT / "nbs"))


def read_cells(path, kind):
    "Read the cells of a notebook that are of one kind, 'code' or 'markdown'."
    content = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in content["cells"] if cell["cell_type"] == kind]


def read_sources(path):
    "Read the text of all code cells of a notebook that are not empty."
    sources = ["".join(cell["source"]) for cell in read_cells(path, "code")]
    return [source for source in sources if source.strip()]


def list_pictures(path):
    "List the outputs of a notebook that hold a PNG picture."
    outputs = [output for cell in read_cells(path, "code") for output in cell["outputs"]]
    return [output for output in outputs if "image/png" in output.get("data", {})]


def execute(path, home):
    "Run a notebook in its folder with a kernel of its own and return it; CellExecutionError when a cell fails."
    book = nbformat.read(path, 4)
    environment = os.environ | dict(
        MBS_HOME=str(home),
        IN_TEST="1",
        OMP_NUM_THREADS="1",
        MPLBACKEND="module://matplotlib_inline.backend_inline",
        PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    )
    with tempfile.TemporaryDirectory(prefix="mbs-") as sockets:
        kernel = make_manager(sockets)
        NotebookClient(book, km=kernel, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute(
            env=environment, cleanup_kc=True
        )
        assert not kernel.has_kernel  # a kernel that stays alive takes half a gigabyte from all later tests
    return book


def simplify(text):
    "Replace numbers in a text and collapse its spaces; return it unchanged when outputs must be identical."
    return text if IDENTICAL else " ".join(NUMBER.sub("#", text).split())


def list_outputs(cell):
    """List the outputs of a cell as (kind, content), with consecutive prints joined.

    Warnings are left out. A cell marked `#| measured` has no comparable outputs: times, processes, order of arrival."""
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
    return [(kind, value if kind == "image/png" else simplify(value)) for kind, value in found]


def read_size(picture):
    "Return (width, height) of a base64 PNG."
    return Image.open(io.BytesIO(base64.b64decode(picture))).size


def is_same(kind, stored, new):
    "Return whether two outputs agree; the size of a picture may differ by the width of a tick label."
    if stored == new:
        return True
    if IDENTICAL or kind != "image/png":
        return False
    return all(abs(a - b) <= 30 for a, b in zip(read_size(stored), read_size(new)))


def are_same(stored, new):
    "Return whether two lists of outputs agree."
    kinds = [kind for kind, _ in stored]
    if kinds != [kind for kind, _ in new]:
        return False
    return all(is_same(kind, a, b) for kind, (_, a), (_, b) in zip(kinds, stored, new))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_runs_and_shows_what_is_stored(path, tmp_path):
    """A new execution gives the stored outputs: the same kinds, words and sizes; the same bytes with MBS_IDENTICAL=1.

    A notebook without stored outputs only has to run."""
    stored = {cell["id"]: list_outputs(cell) for cell in read_cells(path, "code")}
    executed = execute(path, tmp_path).cells
    new = {cell["id"]: list_outputs(cell) for cell in executed if cell["cell_type"] == "code"}
    if not any(stored.values()):
        return
    stale = [i for i, outputs in stored.items() if not are_same(outputs, new[i])]
    details = "".join(f"\n{i}\n{str(stored[i])[:400]}\n{str(new[i])[:400]}" for i in stale)
    assert not stale, f"stale outputs, execute the notebook as CONTRIBUTING.md says: {details}"


def test_comparison_ignores_numbers_but_not_words(monkeypatch):
    monkeypatch.setitem(globals(), "IDENTICAL", False)

    def stream(text, source=""):
        return dict(source=source, outputs=[dict(output_type="stream", name="stdout", text=text)])

    assert list_outputs(stream("old 61.4 %,\tnan")) == [("stdout", "old # %, #")]
    assert list_outputs(stream("old 7 %, -0.3e-05")) == [("stdout", "old # %, #")]
    assert list_outputs(stream("step1 old")) != list_outputs(stream("step1 new"))
    assert list_outputs(stream("a1")) != list_outputs(stream("a2"))
    assert list_outputs(stream("12 s", "#| measured\nx")) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_is_small_without_errors_and_widgets(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    outputs = [output for cell in read_cells(path, "code") for output in cell["outputs"]]
    assert "widgets" not in content["metadata"], "stored widget state"
    assert not [output for output in outputs if output["output_type"] == "error"], "a stored error"
    size = path.stat().st_size
    assert size < MAX_BYTES, f"{size:,} bytes: expected under {MAX_BYTES:,}; make the pictures smaller"


def test_all_notebooks_together_are_small():
    total = sum(path.stat().st_size for path in NOTEBOOKS)
    assert total < MAX_BYTES_TOGETHER, (
        f"{total:,} bytes: expected under {MAX_BYTES_TOGETHER:,}; make the pictures smaller"
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_code_cells_are_short(path):
    lengths = [len(source.splitlines()) for source in read_sources(path)]
    assert not lengths or median(lengths) <= MAX_MEDIAN_LINES, (
        f"the median code cell has {median(lengths):g} lines: expected at most {MAX_MEDIAN_LINES}; "
        "split long cells, and use each function in its own cell"
    )


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_module_notebook_is_a_tutorial(path):
    exported = [source for source in read_sources(path) if "#| export" in source]
    longest = max(len(source.splitlines()) for source in exported)
    assert longest <= MAX_EXPORTED_LINES, "an exported cell is longer than a screen"
    assert len(read_cells(path, "markdown")) >= len(exported) / 2, "too little prose"
    assert list_pictures(path), "no picture of what it does"


@pytest.mark.parametrize("path", TUTORIALS, ids=name)
def test_tutorial_has_pictures_and_exports_nothing(path):
    sources = ["".join(cell["source"]) for cell in read_cells(path, "code")]
    assert path in NOTEBOOKS, "the tutorial is not executed"
    assert not [source for source in sources if "#| export" in source or "#| default_exp" in source]
    assert list_pictures(path), "no picture"
    assert len(read_cells(path, "markdown")) >= len(sources) / 2, "too little prose"


def test_train_parameters_are_the_settings():
    "The parameters of the train notebook are exactly the fields of `Settings`, and change no default."
    from mbs.settings import Settings

    train = read_cells(ROOT / "nbs/runs/train.ipynb", "code")
    parameters = next(cell for cell in train if "parameters" in cell["metadata"].get("tags", []))
    variables = {}
    exec("".join(parameters["source"]), variables)
    del variables["__builtins__"]
    assert variables.keys() == Settings.model_fields.keys()
    assert Settings.checked(**variables) == Settings()
