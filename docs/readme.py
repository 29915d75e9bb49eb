"Make README.md from nbs/index.ipynb: `python docs/readme.py`, or `make readme`."

import json
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = "nbs/index.ipynb"
NOTE = f"<!-- Made from {SOURCE} by `make readme`: edit it there. -->\n\n"


def move_links(text):
    "Turn links of the notebook into links of a file at the root."
    return re.sub(
        r"(\]\()(?![a-z]+:|#)([^)\s]+)\)",
        lambda m: f"{m[1]}{posixpath.normpath(posixpath.join(posixpath.dirname(SOURCE), m[2]))})",
        text,
    )


def read_output(output):
    "Return the printed text, or the text of the value, of an output of a code cell."
    return "".join(
        output["text"] if output["output_type"] == "stream" else output.get("data", {}).get("text/plain", [])
    )


def make_readme():
    "Return the text of README.md: Markdown as it is, code in fences, each followed by its printed output."
    parts = []
    for cell in json.loads((ROOT / SOURCE).read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if source.startswith("#| hide"):
            continue
        if cell["cell_type"] == "markdown":
            parts.append(move_links(source))
        else:
            parts += [f"```python\n{source}\n```"] + [
                f"```\n{text}\n```" for o in cell["outputs"] if (text := read_output(o).rstrip())
            ]
    return NOTE + "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(make_readme(), encoding="utf-8")
