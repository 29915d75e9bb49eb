"Read reference entries from the source of a module: signatures, docstrings, and comments beside parameters and fields."

import ast
import io
import tokenize
from pathlib import Path

MAX_VALUE = 300  # characters; longer values of constants are left out


def read_comments(source):
    "Return {line number: text of the comment at the end of that line}; a comment on its own line is left out."
    lines = source.splitlines()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {
        t.start[0]: t.string.lstrip("# ").strip()
        for t in tokens
        if t.type == tokenize.COMMENT and lines[t.start[0] - 1][: t.start[1]].strip()
    }


def find_note(notes, first, last):
    "Return the last comment in the lines `first` to `last`, or an empty string."
    return next((notes[line] for line in range(last, first - 1, -1) if line in notes), "")


def read_exported(tree):
    "Return the names in `__all__`; none when it is absent or computed."
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            try:
                return ast.literal_eval(node.value)
            except ValueError:
                return []
    return []


def split_annotation(annotation):
    "Return (type, help) of an annotation; help is that of `Annotated[type, Option(help=…)]` in the command line."
    if annotation is None:
        return "", ""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return annotation.value, ""
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Annotated":
        kind, extra = annotation.slice.elts
        keywords = getattr(extra, "keywords", [])
        texts = [k.value.value for k in keywords if k.arg == "help" and isinstance(k.value, ast.Constant)]
        return ast.unparse(kind), "".join(texts)
    return ast.unparse(annotation), ""


def list_arguments(function):
    "Return (stars, argument, default) of every argument in order; argument is None for a bare `*`."
    a = function.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    found = [("", arg, default) for arg, default in zip(plain, defaults)]
    if a.vararg:
        found.append(("*", a.vararg, None))
    elif a.kwonlyargs:
        found.append(("*", None, None))
    found += [("", arg, default) for arg, default in zip(a.kwonlyargs, a.kw_defaults)]
    if a.kwarg:
        found.append(("**", a.kwarg, None))
    return found


def list_parameters(function, notes, is_method):
    """Return (name, type, default, note) of every parameter, with the stars of the signature and without `self`.

    A note is the comment at the end of the parameter's lines; of several parameters on a line, the last one gets it."""
    rows, places = [], []
    for stars, arg, default in list_arguments(function)[is_method:]:
        if arg is None:
            rows.append(["*", "", "", ""])
            continue
        kind, text = split_annotation(arg.annotation)
        rows.append([stars + arg.arg, kind, ast.unparse(default) if default else "", text])
        places.append((arg.lineno, rows[-1]))
    closing = (
        function.returns.end_lineno if function.returns else function.body[0].lineno
    )  # its note is not a parameter's
    ends = [line for line, _ in places[1:]] + [closing]
    for (line, row), end in zip(places, ends):
        row[3] = row[3] or find_note(notes, line, end - 1)
    return [tuple(row) for row in rows]


def format_signature(rows, returns=""):
    "Return the signature of a function with the parameters `rows`."
    shown = []
    for name, kind, default, _ in rows:
        equals = " = " if kind else "="
        shown.append(name + (f": {kind}" if kind else "") + (equals + default if default else ""))
    return f"({', '.join(shown)})" + (f" -> {returns}" if returns else "")


def make_table(rows, header):
    "Return a Markdown table of (name, type, default, note) rows without the defaults; empty when no row has a note."
    rows = [r for r in rows if r[0] != "*"]
    if not any(note for *_, note in rows):
        return ""

    def code(text):
        return f"`{text}`" if text else ""

    cells = [(header, "type", "")] + [(code(name), code(kind), note) for name, kind, _, note in rows]
    lines = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in cells]
    return "\n".join([lines[0], "|---|---|---|", *lines[1:]]) + "\n\n"


def make_directive(kind, head, body, module, depth, **options):
    "Return a directive of Sphinx's Python domain; `depth` is the number of colons of its fence."
    fence = ":" * depth
    extra = "".join(f":{k}: {v}\n" for k, v in options.items() if v is not None)
    return f"{fence}{{py:{kind}}} {head}\n:module: {module}\n{extra}\n{body.strip()}\n{fence}\n\n"


def describe_function(node, module, notes, owner=""):
    "Return the entry of a function, or of a method or property of the class `owner` (`Class.`)."
    decorators = {ast.unparse(d) for d in node.decorator_list}
    rows = list_parameters(node, notes, is_method=bool(owner) and "staticmethod" not in decorators)
    returns, _ = split_annotation(node.returns)
    head = f"{owner}{node.name}"
    text = (ast.get_docstring(node) or "") + "\n\n"
    if decorators & {"property", "cached_property", "functools.cached_property"}:
        return make_directive("property", head, text, module, 3, type=returns or None)
    text += make_table(rows, "parameter")
    if node.returns and node.returns.end_lineno in notes:
        text += f"**Returns** {notes[node.returns.end_lineno]}\n"
    kind = "method" if owner else "function"
    return make_directive(kind, head + format_signature(rows, returns), text, module, 3)


def describe_class(node, module, notes):
    "Return the entry of a class: its fields or the parameters of `__init__`, then its public methods."
    methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
    constructor = next((n for n in methods if n.name == "__init__"), None)
    fields = [
        (
            n.target.id,
            ast.unparse(n.annotation),
            read_field_default(n.value),
            find_note(notes, n.lineno, n.end_lineno),
        )
        for n in node.body
        if isinstance(n, ast.AnnAssign) and not n.target.id.startswith("_")
    ]
    rows = list_parameters(constructor, notes, is_method=True) if constructor else fields
    text = (ast.get_docstring(node) or "") + "\n\n" + make_table(rows, "parameter" if constructor else "field")
    for n in methods:
        if not n.name.startswith("_"):
            text += describe_function(n, module, notes, f"{node.name}.")
    return make_directive("class", node.name + format_signature(rows), text, module, 4)


def read_field_default(value):
    "Return a field's default; for pydantic's `Field(default, …)` its first argument."
    if value is None:
        return ""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "Field":
        return ast.unparse(value.args[0]) if value.args else ""
    return ast.unparse(value)


def describe_constant(node, module, notes, name):
    "Return the entry of a constant: its value, if that is short, and the comment at its end."
    value = ast.unparse(node.value)
    note = notes.get(node.end_lineno) or notes.get(node.value.end_lineno, "")
    return make_directive("data", name, note, module, 3, value=value if len(value) <= MAX_VALUE else None)


def is_import(node):
    "Return whether a statement only imports names, or only sets `__all__`."
    if isinstance(node, ast.Assign):
        return getattr(node.targets[0], "id", "") == "__all__"
    return isinstance(node, ast.Import | ast.ImportFrom)


class Module:
    "The source, names and definitions of one module."

    def __init__(self, path: Path, name: str):
        self.name = f"mbs.{name}"
        self.source = path.read_text(encoding="utf-8")
        tree = ast.parse(self.source)
        self.exported = read_exported(tree)
        self.definitions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        assigned = [n for n in tree.body if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)]
        self.constants = {n.targets[0].id: n.value for n in assigned if isinstance(n.value, ast.Constant)}
        self.names = [*self.exported]  # link targets; public methods below
        for node in self.definitions.values():
            if isinstance(node, ast.ClassDef) and node.name in self.exported:
                methods = [n.name for n in node.body if isinstance(n, ast.FunctionDef)]
                self.names += [f"{node.name}.{method}" for method in methods if not method.startswith("_")]

    def summarise(self, name):
        "Return the first paragraph of the docstring of `name` as one line; 'constant' for a constant."
        if name not in self.definitions:
            return "constant"
        docstring = ast.get_docstring(self.definitions[name]) or ""
        return " ".join(docstring.split("\n\n")[0].split())

    def parse(self, cell):
        "Return the syntax tree of `cell` with the texts of constants in place of their names in `help=NAME`."
        tree = ast.parse(cell)
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "help" and isinstance(node.value, ast.Name):
                node.value = self.constants.get(node.value.id, node.value)
        return tree

    def describe(self, cell):
        "Return (Markdown, names) of the public definitions in the exported `cell`; names is None for mere imports."
        notes, text, names = read_comments(cell), "", []
        body = self.parse(cell).body
        if all(is_import(node) for node in body):
            return "", None
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in self.exported:
                names.append(node.name)
                describe = describe_class if isinstance(node, ast.ClassDef) else describe_function
                text += describe(node, self.name, notes)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
                for name in [name for name in found if name in self.exported]:
                    names.append(name)
                    text += describe_constant(node, self.name, notes, name)
        return text, names
