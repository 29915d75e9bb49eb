"The fingerprint of the base step follows the code that a base step executes, and nothing else."

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mbs
from mbs.fingerprint import hash_class, hash_code, reach_definitions
from mbs.methods import Method
from mbs.settings import Settings
from mbs.setup import _BASE_STEP, Setup, hash_base_step

PACKAGE = Path(mbs.__file__).parent


@pytest.fixture
def package(tmp_path):
    "A copy of the package, to be changed."
    return shutil.copytree(PACKAGE, tmp_path / "mbs", ignore=shutil.ignore_patterns("__pycache__", "runs", "trained"))


def change(package, module, pattern, replacement):
    file = package / f"{module}.py"
    before = file.read_text(encoding="utf-8")
    after = re.sub(pattern, replacement, before, count=1)
    assert after != before, f"{pattern} is not in {module}"
    file.write_text(after, encoding="utf-8")


def test_a_reformatted_package_has_the_same_fingerprint(package):
    "Other line lengths, comments and docstrings."
    for file in package.glob("*.py"):
        text = re.sub(r"^(\s+)return ", r"\1# a comment\n\1return ", file.read_text(encoding="utf-8"), flags=re.M)
        text = re.sub(r'(:\n\s+)"[^"\n]+"\n', r'\1"Another docstring."\n', text)
        file.write_text(text, encoding="utf-8")
    ruff = Path(sys.executable).with_name("ruff")
    subprocess.run([ruff, "format", "--isolated", "--line-length", "70", "-q", package], check=True)
    changed = [f.name for f in package.glob("*.py") if f.read_bytes() != (PACKAGE / f.name).read_bytes()]
    assert len(changed) > 20 and hash_code(_BASE_STEP, package) == hash_code(_BASE_STEP)


@pytest.mark.parametrize(
    "module,pattern,replacement",
    [
        ("objective", r"\.clamp\(min=1\)", ".clamp(min=2)"),
        ("bands", r"\.clamp\(min=1\)", ".clamp(min=2)"),
        ("methods", r"step_loss\(student", "step_loss(teacher or student"),
        ("augment", r"random\.random\(\) < 0\.5", "random.random() < 0.4"),
        ("training", r"self\.optimizer\.step\(\)", "pass"),
        ("recipe", r"total // 20", "total // 10"),
        ("segmenter", r"\(std \+ 1e-5\)", "(std + 1e-6)"),
        ("evaluation", r"\(truth \* n\)\.add_\(predicted\)", "(predicted * n).add_(truth)"),
        ("pictures", r"convert\(\"RGB\"\)", 'convert("L")'),
    ],
)
def test_a_changed_formula_changes_the_fingerprint(package, module, pattern, replacement):
    change(package, module, pattern, replacement)
    assert hash_code(_BASE_STEP, package) != hash_code(_BASE_STEP)


def test_code_that_a_base_step_never_executes_does_not_count(package):
    change(package, "report", r"def write_report", "def write_all")
    change(package, "viz", r"def show_protocol", "def show_steps")
    assert hash_code(_BASE_STEP, package) == hash_code(_BASE_STEP)


def test_the_base_loss_is_in_the_fingerprint():
    reached = {module for module, _ in reach_definitions(_BASE_STEP)}
    assert {"objective", "bands", "methods", "parts", "segmenter", "augment", "draws", "data", "weights"} <= reached
    assert not {"report", "viz", "cli", "explore", "batch"} & reached


def test_methods_share_a_base_step_and_a_users_class_has_another(tmp_path, monkeypatch):
    monkeypatch.setenv("MBS_HOME", str(tmp_path))

    class Doubled(Method):
        def loss(self, *args):
            return {name: 2 * term for name, term in super().loss(*args).items()}

    def fingerprint(name, kind=Method, **choices):
        setup = Setup(Settings(method=name, **choices), kind)
        return hash_base_step(setup, setup.model())

    shared = fingerprint("mbs")
    assert {fingerprint(name) for name in ("kd", "mib", "plop", "finetune")} == {shared}
    assert fingerprint("mbs", parts=dict(orthogonality=False)) == shared
    assert fingerprint("mbs", shots=1) == shared == fingerprint("mbs", protocol=[5, 2, 1])
    others = [
        fingerprint("mbs", Doubled),
        fingerprint("mbs", seed=1),
        fingerprint("mbs", weights="none", data="scenes"),
    ]
    assert others[0] != shared and others[1] != shared and others[2] == shared


def test_a_class_is_known_by_what_it_computes():
    class First:
        def f(self, x):
            "A docstring."
            return x + 1

    class Same:
        def f(self, x):
            return (
                x + 1  # a comment
            )

    class Other:
        def f(self, x, y=1):
            return x + 2

    assert hash_class(First) == hash_class(Same) != hash_class(Other)
