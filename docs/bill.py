"""Write dist/mbs-VERSION.cdx.json: what a user installs with mbs and all its extras, as CycloneDX 1.6.

The versions and licences are those of this environment, which `make` installs from the lock file; tools of developers
are left out. Run by `make wheel`, after the wheel is built.
"""

import hashlib
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from dependencies import EXTRAS, find_licence
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def list_requirements(name: str, extras: frozenset[str] = frozenset()) -> list[tuple[str, frozenset[str]]]:
    "List the installed packages that a package requires here, and the extras of each; an optional one may be absent."
    found = []
    for line in distribution(name).requires or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker and not any(marker.evaluate(dict(extra=extra)) for extra in extras or {""}):
            continue
        found.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return found


def find_closure(name: str, extras: frozenset[str]) -> dict[str, set[str]]:  # package → packages that it requires
    "Follow the requirements of a package to the end."
    required, waiting, seen = {}, [(name, extras)], set()
    while waiting:
        package, wanted = waiting.pop()
        if (package, wanted) in seen:
            continue
        seen.add((package, wanted))
        needs = list_requirements(package, wanted)
        required.setdefault(package, set()).update(needed for needed, _ in needs)
        waiting += needs
    return required


def make_component(name: str, wheel: Path) -> Component:
    "Describe an installed package; mbs itself by its wheel."
    version = distribution(name).version
    is_root = name == "mbs"
    return Component(
        name=name,
        version=version,
        type=ComponentType.APPLICATION if is_root else ComponentType.LIBRARY,
        bom_ref=f"{name}=={version}",
        purl=PackageURL("pypi", name=name, version=version),
        licenses=[LicenseFactory().make_from_string("MIT" if is_root else find_licence(name))],
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=hashlib.sha256(wheel.read_bytes()).hexdigest())] * is_root,
    )


def make_bill(wheel: Path) -> Bom:
    "Make the bill of materials of a wheel of mbs."
    required = find_closure("mbs", frozenset(EXTRAS) - {"requirements", "dev"})
    components = {name: make_component(name, wheel) for name in sorted(required)}
    bill = Bom(components=[component for name, component in components.items() if name != "mbs"])
    bill.metadata.component = components["mbs"]
    for name, component in components.items():
        bill.register_dependency(component, [components[needed] for needed in sorted(required[name])])
    return bill


if __name__ == "__main__":
    (wheel,) = Path(sys.argv[1]).glob("mbs-*.whl")
    file = wheel.with_name(f"mbs-{distribution('mbs').version}.cdx.json")
    try:
        file.write_text(JsonV1Dot6(make_bill(wheel)).output_as_string(indent=1) + "\n", encoding="utf-8")
    except PackageNotFoundError as e:
        sys.exit(f"package {e.name} is not installed: expected mbs with all its extras; run make .venv/developer")
    print(file)
