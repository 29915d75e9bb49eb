"Random changes of bytes and of files in every format that mbs reads, from a seed."

import copy
import io
import json
import os
import random
import re
import stat
import struct
import zipfile
import zlib
from functools import cache
from pathlib import Path

import numpy as np

NUMBERS = (0, 1, 2, 7, 8, 127, 128, 255, 256, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
CODE = "__import__('os').system('touch owned')"
VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3.5,
    255,
    256,
    10**6,
    2**31,
    2**63,
    10**30,
    -0.0,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "0",
    "1e3",
    "nan",
    "x" * 3000,
    "a\nb",
    "'",
    '"""',
    "\\",
    "<script>alert(1)</script>",
    "{x}",
    "{0}",
    "%s",
    "$HOME",
    "../../x",
    "/etc/passwd",
    "\0",
    "\x1b[31m",
    "é\u202e😀",
    "!!python/object/apply:os.system [true]",
    CODE,
    [],
    {},
    [[]],
    [None],
    {"": 0},
    {"cls": 1, "self": 2, "name": 3},
    {"a": {"b": {"c": []}}},
    [1, "1", 1.0],
    list(range(300)),
)
WORDS = (
    "null",
    "true",
    "-1",
    "0x10",
    "1:30",
    "2001-02-31",
    "&a [*a]",
    "*b",
    "!!binary x",
    "!!set {a}",
    "? - x",
    "<<: 1",
    "---",
    "...",
    "{",
    "]",
    "|",
    ">",
    "%YAML 9",
    "\t",
    "\0",
    "~",
    "'",
    '"',
    "é",
    ": ",
    "- ",
)


class Mutants:
    "A source of random changes."

    def __init__(self, seed):
        self.random = random.Random(seed)

    def change(self, data: bytes, most: int = 8) -> bytes:
        "Return `data` with a few bits, bytes or stretches changed, at most `most`."
        r, out = self.random, bytearray(data)
        for _ in range(r.choice((1, 1, 1, 2, 3, most))):
            at, length = r.randrange(len(out) + 1), r.choice((1, 1, 2, 4, 16, 200))
            kind = r.randrange(9)
            if kind < 3 and at < len(out):
                out[at] ^= 1 << r.randrange(8)
            elif kind == 3:
                out[at : at + 4] = struct.pack(r.choice("<>") + "I", r.choice(NUMBERS))
            elif kind == 4:
                del out[at : at + length]
            elif kind == 5:
                out[at:at] = out[at : at + length]
            elif kind == 6:
                out[at:at] = r.randbytes(length)
            elif kind == 7:
                out[at : at + length] = bytes(length)
            elif r.random() < 0.3:
                del out[at:]
            elif out:
                out[min(at, len(out) - 1)] = r.choice(b"\x00\xff\n\"'{}[]:,-09aZ ")
        return bytes(out)

    def change_text(self, text: str) -> bytes:
        "Return a text with words inserted, removed or doubled, or with changed bytes."
        r = self.random
        if r.random() < 0.4:
            return self.change(text.encode(), 4)
        lines = text.split("\n")
        for _ in range(r.choice((1, 1, 2, 4))):
            at = r.randrange(len(lines))
            words = lines[at].split(" ")
            kind, k = r.randrange(6), r.randrange(len(words))
            if kind == 0:
                words[k] = r.choice(WORDS)
            elif kind == 1:
                words[k:k] = [r.choice(WORDS)]
            elif kind == 2:
                del words[k]
            elif kind == 3:
                words[k] = json.dumps(r.choice(VALUES))
            elif kind == 4:
                lines[at:at] = [lines[r.randrange(len(lines))]]
            else:
                words = ["" if r.random() < 0.5 else "  ", *words]
            lines[at] = " ".join(words)
        return "\n".join(lines).encode("utf-8", "surrogatepass")

    def change_tree(self, value):
        "Return a copy of a JSON value with a few places changed."
        out = [copy.deepcopy(value)]
        for _ in range(self.random.choice((1, 1, 1, 2, 3))):
            self._change_place(out)
        return out[0]

    def _change_place(self, out: list):
        "Change one place below out[0], in place."
        r, holder, key = self.random, out, 0
        while isinstance(holder[key], (dict, list)) and holder[key] and r.random() < 0.85:
            holder = holder[key]
            key = r.choice(list(holder)) if isinstance(holder, dict) else r.randrange(len(holder))
        value, kind = holder[key], r.randrange(6)
        if kind == 0 and holder is not out:
            del holder[key]
        elif kind == 1 and isinstance(holder, list) and holder is not out:
            holder.insert(key, copy.deepcopy(value))
        elif kind == 2 and isinstance(holder, dict):
            holder[r.choice([str(v)[:20] for v in VALUES])] = holder.pop(key)
        elif kind == 3 and isinstance(value, (int, float)) and not isinstance(value, bool):
            holder[key] = r.choice((value + 1, -value, value * 1000, str(value), value + 0.5, [value]))
        else:
            holder[key] = copy.deepcopy(r.choice(VALUES))


def split_png(png: bytes) -> list[list]:
    "Return kind and content of each chunk of a PNG, up to the first one that is cut short."
    out, at = [], 8
    while at + 12 <= len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        out.append([kind, png[at + 8 : at + 8 + length]])
        at += 12 + length
    return out


def join_png(parts: list[list]) -> bytes:
    "Return a PNG of these chunks with correct checksums."
    chunks = [
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def change_png(mutants: Mutants, png: bytes) -> bytes:
    "Return a PNG with a changed chunk, order of chunks or pixel, and with correct checksums."
    r = mutants.random
    parts = split_png(png)
    part = r.choice(parts)
    kind = r.randrange(4)
    if kind == 0:
        part[1] = mutants.change(part[1], 2)
    elif kind == 1:
        parts.remove(part)
    elif kind == 2:
        parts.insert(r.randrange(len(parts) + 1), part)
    else:
        part = next(p for p in parts if p[0] == b"IDAT")
        part[1] = zlib.compress(mutants.change(zlib.decompress(part[1]), 3))
    return join_png(parts)


DTYPES = ("F64", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "X", "", 3)


def change_safetensors(mutants: Mutants, data: bytes) -> bytes:
    "Return a .safetensors file whose header is changed, usually still JSON: types, shapes, offsets or names."
    r = mutants.random
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    names = [k for k in header if k != "__metadata__"]
    name = r.choice(names)
    kind = r.randrange(7)
    if kind == 0:
        header[name]["dtype"] = r.choice(DTYPES)
    elif kind == 1:
        reversed_shape = header[name]["shape"][::-1]
        foreign_shape = header[r.choice(names)]["shape"]
        shapes = ([], [0], [-1], [2**40, 2**40], [1] * 70, reversed_shape, ["1"], None, foreign_shape)
        header[name]["shape"] = r.choice(shapes)
    elif kind == 2:
        foreign_offsets = header[r.choice(names)]["data_offsets"]
        offsets = ([0, 0], [0, 2**60], [8, 4], [-4, 0], foreign_offsets, [0], [0, len(body) + 8])
        header[name]["data_offsets"] = r.choice(offsets)
    elif kind == 3:
        header[r.choice(("x", "", "é" * 500, name + ".weight"))] = header.pop(name)
    elif kind == 4:
        del header[name]
    elif kind == 5:
        header["__metadata__"] = r.choice(({}, {"facts": "{"}, {"facts": "[]"}, {"digest": ""}, {"facts": 3}, None))
    else:
        header = mutants.change_tree(header)
    text = json.dumps(header).encode()
    length = len(text) if r.random() < 0.9 else r.choice((0, 1, 2**30, 2**63, len(text) - 1))
    return struct.pack("<Q", length) + text + body


HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "&lt;script&gt;",
    r"\input{z} 50% & _x_ #1 ~ ^ {y}",
    "a $x^2$ b",
    "=HYPERLINK(1)",
    "\t=A1",
    "@SUM(A1)",
    "[red]old[/red]",
    "net[/old]",
    "[link](javascript:alert(1))",
    "a\x1b[2Jb",
    "a\x07b\x00c",
    "\u202egnp.exe",
    "$HOME/`id`",
    "../../x",
    "/etc/passwd",
    "~root",
    "-rf",
    "x" * 2000,
    "con.",
    "é",
    "e\u0301",
)  # names: HTML, LaTeX, formulas, mark-up of Rich and Markdown, control characters, paths, the forms of an accent
_NAME = re.compile(r"[A-Za-z_][\w.-]*")


def rename(mutants: Mutants, text: str, is_json: bool) -> bytes:
    "Return `text` with one name replaced, wherever it stands, by a hostile one."
    names = sorted(set(_NAME.findall(text))) or [""]
    hostile = mutants.random.choice(HOSTILE)
    hostile = json.dumps(hostile)[1:-1] if is_json else hostile
    return text.replace(mutants.random.choice(names), hostile).encode("utf-8", "surrogatepass")


def blow_up(mutants: Mutants, data: bytes) -> bytes:
    "Return `data` with a stretch, a line, a number or brackets that come very often."
    r = mutants.random
    kind, at = r.randrange(6), r.randrange(len(data) + 1)
    if kind == 0:
        return data[:at] + data[at : at + r.choice((1, 20, 500))] * 2000 + data[at:]
    if kind == 1:
        return data * (1 + 300_000 // (len(data) + 1))
    if kind == 2:
        return data[:at] + r.choice((b"[", b'{"a":', b"- ")) * 50_000 + data[at:]
    if kind == 3:
        return re.sub(rb"\d+", lambda m: r.choice((m[0] * 400, m[0] + b"e999", m[0] + b"0" * 9, m[0])), data)
    if kind == 4:
        aliases = b"".join(b"a%d: &a%d [%s]\n" % (k + 1, k + 1, b"*a%d, " % k * 10) for k in range(20))
        return b"a0: &a0 [x]\n" + aliases + data
    return data + bytes(1 << 20)


def make_zeros(shape: tuple, size: int) -> bytes:
    "Return a .npz whose array 'counts' promises `shape` and holds `size` zeros, which take a thousandth of that."
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("counts.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, dict(descr="|u1", fortran_order=False, shape=shape))
        member.write(bytes(size))
    return buffer.getvalue()


_BOMBS = cache(lambda: [make_zeros((64 << 20,), 64 << 20), make_zeros((1 << 40,), 9), make_zeros((3, -1), 9)])
_TYPES = ("<f8", "<i2", "|b1", "<c16", "<U3", "|S2", "|O", "<M8[Y]", "|u1", ">i8")


def change_arrays(mutants: Mutants, data: bytes) -> bytes:
    "Return a .npz with an array of another type, shape or name, with other values, or with a bomb."
    r = mutants.random
    if r.random() < 0.1:
        return r.choice(_BOMBS())
    with np.load(io.BytesIO(data)) as loaded:
        arrays = dict(loaded)
    name = r.choice(list(arrays))
    array = arrays[name]
    kind = r.randrange(6)
    with np.errstate(all="ignore"):
        if kind == 0 and array.dtype.kind in "iufb":
            arrays[name] = np.zeros(array.shape, r.choice([t for t in _TYPES if t != "|O"]))
        elif kind == 1:
            arrays[name] = array.reshape(-1)[: r.randrange(array.size + 1)]
        elif kind == 2:
            arrays[name] = array[None]
        elif kind == 3:
            arrays[r.choice(("x", "../x", "a" * 300, name + ".npy", "é"))] = arrays.pop(name)
        elif kind == 4 and array.dtype.kind in "iu":
            arrays[name] = array.copy()
            arrays[name].reshape(-1)[r.randrange(array.size)] = r.choice((0, 1, 7, 77, 127))
        else:
            arrays[name] = arrays[r.choice(list(arrays))]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


PLACES = ("gone", "empty", "folder", "holes", "pipe", "socket", "device", "link", "dangling", "loop", "folder link")


def put(kind: str, path: Path, neighbour: Path):
    "Put something else in the place of the file `path`; `neighbour`: a folder of somebody else, with a file 'file'."
    path.unlink(missing_ok=True)
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "holes":
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        os.mknod(path, 0o600 | stat.S_IFSOCK)
    elif kind != "gone":
        targets = dict(device="/dev/zero", dangling=neighbour / "new", loop=path.name)
        targets |= {"link": neighbour / "file", "folder link": neighbour}
        path.symlink_to(targets[kind])


def change_any(mutants: Mutants, data: bytes, name: str) -> bytes:
    "Return the content of the file `name` after a change of a random kind that fits its format."
    r = mutants.random
    ending = name.rpartition(".")[2]
    kind = r.randrange(5)
    if kind == 0 or ending not in ("png", "npz", "safetensors", *_TEXTS):
        return mutants.change(data, 6)
    if ending == "png" and data[:4] != b"\x89PNG":
        return mutants.change(data, 6)
    if ending == "png":
        return change_png(mutants, data)
    if ending == "npz":
        return change_arrays(mutants, data)
    if ending == "safetensors":
        return change_safetensors(mutants, data)
    is_json = ending in _JSON
    if kind == 1:
        return rename(mutants, data.decode(), is_json)
    if kind == 2 and r.random() < 0.3:
        return blow_up(mutants, data)
    if ending == "jsonl":
        lines = data.splitlines()
        at = r.randrange(len(lines))
        lines[at] = json.dumps(mutants.change_tree(json.loads(lines[at]))).encode()
        return b"\n".join(lines) + b"\n"
    if is_json:
        return json.dumps(mutants.change_tree(json.loads(data))).encode()
    return mutants.change_text(data.decode())


_JSON = ("json", "jsonl", "ipynb", "worker")
_TEXTS = (*_JSON, "yaml", "txt")
