"What a user sees of the package without reading it: names for editors, and short values in a terminal and a notebook."

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mbs
from mbs.cli import app
from mbs.parameters import describe_fields
from mbs.settings import PARAMETER_GROUPS

PACKAGE = Path(mbs.__file__).parent


def test_importing_the_package_loads_no_heavy_library():
    code = "import sys, mbs; print(*sorted({'torch', 'numpy', 'pandas', 'matplotlib'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


AT_TORCH = """
import sys
class Gate:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.exit("import torch")
sys.meta_path.insert(0, Gate())
from mbs.cli import app
app()
"""


TRAINS = ("run demo", "demo", "batch toy")
LOOKS = ("batch toy --dry-run", "inspect voc 15-1", "predict x y --out z", "report", "curves")


@pytest.mark.parametrize("command", [*TRAINS, *LOOKS])
def test_a_command_says_what_it_does_before_it_loads_torch(command, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", AT_TORCH, "--home", str(tmp_path), *command.split()], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr == "import torch\n"
    assert re.fullmatch(r"[A-Z].+ …\n", done.stdout)


def test_commands_and_servers_import_no_parser_of_links():
    "jsonschema imports one where it is installed, for 1.4 s; notebooks are checked without it."
    check = "import sys, nbformat; nbformat.validate(nbformat.v4.new_notebook()); assert not sys.modules[{!r}]"
    check = check.format("rfc3987_syntax")
    command = f"import mbs.cli; mbs.cli.app(['files'], standalone_mode=False); {check}"
    subprocess.run([sys.executable, "-c", command], check=True, capture_output=True)
    started = (
        "from mbs.lifeline import run_server; import sys\nwith run_server('timeit', '-n1', '-r1', sys.argv[1]) as p: "
    )
    subprocess.run([sys.executable, "-c", f"{started} sys.exit(p.wait())", check], check=True, capture_output=True)


@pytest.mark.parametrize("name", mbs.__all__)
def test_every_public_name_exists(name):
    assert getattr(mbs, name) is not None and name in dir(mbs)


def test_type_checkers_find_the_names():
    "The package is marked as typed, and its stub re-exports every name (`from .x import A as A`)."
    assert (PACKAGE / "py.typed").is_file()
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    imports = [alias for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert all(alias.asname == alias.name for alias in imports)
    assert [alias.name for alias in imports if alias.name not in mbs.__all__] == []


def test_an_unknown_name_is_one_sentence():
    with pytest.raises(AttributeError, match=r"'mbs' has no attribute 'Experimnt': expected one of ABLATIONS, Batch"):
        mbs.Experimnt  # noqa: B018


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    "Values that a notebook shows: a layout, both parts of a data set, protocol, settings and run."
    from mbs.layouts import find_layout
    from mbs.scenes import write_scenes

    root = write_scenes(tmp_path_factory.mktemp("scenes") / "<b>many</b>", 300, 30, size=16)
    settings = mbs.Settings(method="kd", parts={"threshold": 0.5})
    data = mbs.SegmentationFolder(root)
    return [find_layout(root), data, mbs.Protocol("15-1"), settings, mbs.trained_run()]


def test_values_are_short_in_a_terminal(values):
    for value in values:
        assert len(repr(value)) < 300 and "\n" not in repr(value), repr(value)


def test_values_are_short_tables_in_a_notebook(values):
    for value in values:
        html = value._repr_html_()
        assert html.count("<table") == 1 and len(html) < 5000 and "<b>" not in html, html[:300]


def test_settings_show_what_differs_from_the_defaults():
    assert "kd" in repr(mbs.Settings(method="kd")) and "iterations" not in repr(mbs.Settings(method="kd"))


def test_facts_of_a_run_have_the_names_of_its_files():
    from mbs.run import trained_run

    card = trained_run("mbs").card
    assert card["data"]["train"] == card.data.train and card["settings"]["method"] == "mbs"
    with pytest.raises(KeyError, match="nosuch"):
        card["nosuch"]


MODELS = {group.prefix: group.model for group in PARAMETER_GROUPS}


@pytest.mark.parametrize("group", MODELS)
def test_every_parameter_says_what_it_means(group):
    "In its comment; a list of choices is not enough."
    facts = describe_fields(MODELS[group])
    assert [fact.name for fact in facts] == list(MODELS[group].model_fields)
    assert [fact.name for fact in facts if not re.sub(r"^\S+( \| \S+)+; |^\S+( \| \S+)+$", "", fact.meaning)] == []


def test_the_help_of_a_run_lists_all_parameters():
    result = CliRunner().invoke(app, ["run", "--help"])
    for group, model in MODELS.items():
        for fact in describe_fields(model):
            line = next(line for line in result.output.splitlines() if line.split()[:1] == [f"{group}{fact.name}"])
            assert isinstance(fact.default, dict) or json.dumps(fact.default).strip('"')[:9] in line
    for word in ["mbs-analytic", "voc-15-1-overlapped", "null: as", "--print-config"]:
        assert word in result.output
    assert "None" not in result.output
    assert CliRunner().invoke(app, ["run"]).output.strip() == result.output.strip()


def test_the_command_tells_its_version_and_its_extras():
    assert CliRunner().invoke(app, ["--version"]).output == f"mbs {mbs.__version__}\n"
    assert "'mbs[app]'" in CliRunner().invoke(app, ["explore", "--help"]).output


def test_encoders_can_be_imported_beside_segmenters():
    from mbs import segmenter, weights

    assert segmenter.make_encoder is weights.make_encoder
    assert not hasattr(segmenter, "nosuch")
