"Reference entries of a module, read from its source: signatures, docstrings, and the comments beside parameters and fields. Nothing is imported."

import ast
import io
import tokenize
from pathlib import Path

WIDEST = 300  # characters of a constant's value that are shown


def comments(source):
    "Line number → text of the comment that ends that line."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ").strip() for t in tokens if t.type == tokenize.COMMENT}


def exported(tree):
    "What `__all__` lists."
    return next(
        (ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"), []
    )


def bare(annotation):
    "(type, help) of an annotation: what the command line adds with `Annotated[type, Option(help=…)]` becomes the help."
    if annotation is None:
        return "", ""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return annotation.value, ""
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Annotated":
        kind, extra = annotation.slice.elts
        return ast.unparse(kind), next(
            (ast.literal_eval(k.value) for k in getattr(extra, "keywords", []) if k.arg == "help"), ""
        )
    return ast.unparse(annotation), ""


def parameters(function, notes, method):
    "(name, type, default, note) of every parameter, `self` left out, with the stars of the signature."
    a = function.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    found = [("", arg, default) for arg, default in zip(plain, defaults)][method:]
    if a.vararg:
        found.append(("*", a.vararg, None))
    elif a.kwonlyargs:
        found.append(("*", None, None))
    found += [("", arg, default) for arg, default in zip(a.kwonlyargs, a.kw_defaults)]
    if a.kwarg:
        found.append(("**", a.kwarg, None))
    rows, last = [], {}
    for stars, arg, default in found:
        if arg is None:
            rows.append(["*", "", "", ""])
            continue
        kind, text = bare(arg.annotation)
        rows.append([stars + arg.arg, kind, ast.unparse(default) if default else "", text])
        last[(default or arg).end_lineno] = rows[-1]
    for line, row in last.items():  # a comment belongs to the last parameter of its line, or to what is returned
        if not (function.returns and line == function.returns.end_lineno):
            row[3] = row[3] or notes.get(line, "")
    return [tuple(row) for row in rows]


def signature(rows, returns=""):
    shown = [
        name + (f": {kind}" if kind else "") + ((" = " if kind else "=") + default if default else "")
        for name, kind, default, _ in rows
    ]
    return f"({', '.join(shown)})" + (f" -> {returns}" if returns else "")


def table(rows, header):
    "A Markdown table of (name, type, default, note) rows; nothing when no row has a note. Defaults stand in the signature."
    rows = [r for r in rows if r[0] != "*"]
    if not any(note for *_, note in rows):
        return ""

    def code(text):
        return f"`{text}`" if text else ""

    cells = [(header, "type", "")] + [(code(name), code(kind), note) for name, kind, _, note in rows]
    lines = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in cells]
    return "\n".join([lines[0], "|---|---|---|", *lines[1:]]) + "\n\n"


def directive(kind, head, body, module, depth, **options):
    fence = ":" * depth
    extra = "".join(f":{k}: {v}\n" for k, v in options.items() if v is not None)
    return f"{fence}{{py:{kind}}} {head}\n:module: {module}\n{extra}\n{body.strip()}\n{fence}\n\n"


def function_entry(node, module, notes, owner=""):
    names = {ast.unparse(d) for d in node.decorator_list}
    rows = parameters(node, notes, method=bool(owner) and "staticmethod" not in names)
    (returns, _), head = bare(node.returns), f"{owner}{node.name}"
    text = (ast.get_docstring(node) or "") + "\n\n"
    if "property" in names:
        return directive("property", head, text, module, 3, type=returns or None)
    text += table(rows, "parameter")
    closing = max(
        (n for n in notes if node.lineno <= n < node.body[0].lineno and returns and n >= node.returns.lineno),
        default=None,
    )
    if closing:
        text += f"**Returns** {notes[closing]}\n"
    return directive("method" if owner else "function", head + signature(rows, returns), text, module, 3)


def class_entry(node, module, notes):
    methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
    made = next((n for n in methods if n.name == "__init__"), None)
    fields = [
        (n.target.id, ast.unparse(n.annotation), field_default(n.value), notes.get(n.end_lineno, ""))
        for n in node.body
        if isinstance(n, ast.AnnAssign)
    ]
    rows = parameters(made, notes, method=True) if made else fields
    text = (ast.get_docstring(node) or "") + "\n\n" + table(rows, "parameter" if made else "field")
    for n in methods:
        if not n.name.startswith("_"):
            text += function_entry(n, module, notes, f"{node.name}.")
    return directive("class", node.name + signature(rows), text, module, 4)


def field_default(value):
    "A field's default; of pydantic's `Field(default, …)` the default."
    if value is None:
        return ""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "Field":
        return ast.unparse(value.args[0]) if value.args else ""
    return ast.unparse(value)


def constant_entry(node, module, notes, name):
    value = ast.unparse(node.value)
    return directive(
        "data", name, notes.get(node.end_lineno, ""), module, 3, value=value if len(value) <= WIDEST else None
    )


class Module:
    "Everything a page needs to know about one module."

    def __init__(self, path: Path):
        self.name, self.source = f"mbs.{path.stem}", path.read_text(encoding="utf-8")
        tree = ast.parse(self.source)
        self.exported = exported(tree)
        self.definitions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        self.names = [*self.exported]  # that can be linked to; methods below
        for node in self.definitions.values():
            if isinstance(node, ast.ClassDef) and node.name in self.exported:
                self.names += [
                    f"{node.name}.{n.name}"
                    for n in node.body
                    if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")
                ]

    def says(self, name):
        "The docstring of `name` in one line; constants have none."
        return (
            " ".join((ast.get_docstring(self.definitions[name]) or "").split())
            if name in self.definitions
            else "constant"
        )

    def entries(self, cell):
        "Markdown of everything that the exported `cell` defines, and the names."
        notes, text, names = comments(cell), "", []
        for node in ast.parse(cell).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in self.exported:
                names.append(node.name)
                text += (class_entry if isinstance(node, ast.ClassDef) else function_entry)(node, self.name, notes)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for name in [
                    n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name) and n.id in self.exported
                ]:
                    names.append(name)
                    text += constant_entry(node, self.name, notes, name)
        return text, names
