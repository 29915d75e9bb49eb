"The package is what the notebooks export, and the notebooks are clean."
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOLS = Path(sys.executable).parent


def test_export_and_clean_change_nothing(tmp_path):
    for folder in ("nbs", "mbs"): shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for tool in ("nbdev-clean", "nbdev-export"): subprocess.run([TOOLS / tool], cwd=tmp_path, check=True)
    for folder in ("nbs", "mbs"):
        fresh = {p.relative_to(tmp_path) for p in (tmp_path / folder).rglob("*") if p.suffix in (".py", ".ipynb", ".yaml")}
        here = {p.relative_to(ROOT) for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".ipynb", ".yaml") and ".ipynb_checkpoints" not in p.parts}
        assert fresh == here
        for path in sorted(here): assert (tmp_path / path).read_bytes() == (ROOT / path).read_bytes(), f"{path} is stale: run make export"
