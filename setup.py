"""Read the requirements from settings.ini and declare the package data that lie in nbs/.

Run notebooks, published rows, tutorials and trained runs become mbs.runs, mbs.tutorials and mbs.trained.
All other facts about the package are in pyproject.toml."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

settings = ConfigParser(interpolation=None, default_section="", inline_comment_prefixes="#")
settings.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
extras = {name: text.split() for name, text in settings["extras"].items()}

setup(
    install_requires=settings["DEFAULT"]["requirements"].split(),
    extras_require=extras,
    packages=[
        "mbs",
        "mbs.explore",
        "mbs.runs",
        "mbs.runs.protocols",
        "mbs.runs.grids",
        "mbs.tutorials",
        "mbs.trained",
    ],
    package_dir={
        "mbs": "mbs",
        "mbs.runs": "nbs/runs",
        "mbs.runs.protocols": "nbs/runs/protocols",
        "mbs.runs.grids": "nbs/runs/grids",
        "mbs.tutorials": "nbs/tutorials",
        "mbs.trained": "nbs/trained",
    },
    package_data={
        "mbs": ["py.typed", "*.pyi"],
        "mbs.explore": ["*.js", "*.css", "*.html", "labconfig/*.json"],
        "mbs.runs": ["*.ipynb", "*.yaml"],
        "mbs.runs.protocols": ["*.yaml"],
        "mbs.runs.grids": ["*.yaml"],
        "mbs.tutorials": ["*.ipynb"],
        "mbs.trained": ["*.md", "*.yaml", "*/*", "*/*/*"],
    },
)
