"""Data sets are made from complete, interrupted, damaged and hostile archives.

A local server provides small archives in the layout of the real ones."""

import hashlib
import http.server
import io
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from typer.testing import CliRunner

import mbs.archives
from mbs.archives import ARCHIVES, Archive, read_archive
from mbs.cli import app
from mbs.data import SegmentationFolder
from mbs.pictures import read_mask


def encode_picture(seed, kind="JPEG", size=(24, 18)):
    "Encode a random photo or, for PNG, a mask of one class."
    if kind == "PNG":
        pixels = np.full(size, seed % 20 + 1, np.uint8)
    else:
        pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def encode_sbd_mask(seed):
    "Encode a mask of one class as a MATLAB file of SBD."
    buffer = io.BytesIO()
    savemat(buffer, {"GTcls": {"Segmentation": np.full((24, 18), seed % 20 + 1, np.uint8)}})
    return buffer.getvalue()


def tar(files, mode="w"):
    "Pack files, by name, into a .tar archive."
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as t:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            t.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zipped(files):
    "Pack files, by name, into a .zip archive."
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        for name, content in files.items():
            z.writestr(name, content)
    return buffer.getvalue()


VOC = "VOCdevkit/VOC2012/"
FILES = {
    "voc": tar(
        {
            VOC + "Annotations/p1.xml": b"<x/>",
            **{VOC + f"JPEGImages/p{k}.jpg": encode_picture(k) for k in range(8)},
            **{VOC + f"SegmentationClass/p{k}.png": encode_picture(k, "PNG") for k in (0, 1, 2)},
            VOC + "ImageSets/Segmentation/train.txt": b"p0\np1\n",
            VOC + "ImageSets/Segmentation/val.txt": b"p2\n",
            VOC + "ImageSets/Main/train.txt": b"p7\n",
        }
    ),
    "sbd": tar(
        {f"benchmark_RELEASE/dataset/cls/p{k}.mat": encode_sbd_mask(k + 10) for k in (1, 2, 3, 4)}
        | {"benchmark_RELEASE/dataset/inst/p1.mat": b"other"},
        "w:gz",
    ),
    "ade": zipped(
        {
            "ADEChallengeData2016/objectInfo150.txt": (
                "Idx\tRatio\tTrain\tVal\tStuff\tName\n"
                + "".join(f"{k}\t.1\t1\t1\t0\tthing {k}, item\n" for k in range(1, 151))
            ).encode(),
            **{
                f"ADEChallengeData2016/{kind}/{part}/ADE_{part}_{k}.{end}": encode_picture(k, how)
                for part in ("training", "validation")
                for k in range(3)
                for kind, end, how in (("images", "jpg", "JPEG"), ("annotations", "png", "PNG"))
            },
        }
    ),
}


class Server(http.server.BaseHTTPRequestHandler):
    "Serve FILES; the first folder of the address names the fault."

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        _, fault, name = self.path.split("/")
        body, start = FILES[name], int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.server.requests.append((fault, name, start))
        if fault == "missing":
            return self.send_error(404)
        if start >= len(body):
            return self.send_error(416)
        if fault == "corrupt":
            body = body[:100] + b"?" + body[101:]
        if fault == "forgetful":
            start = 0  # a server without Range
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        n_requests = len([request for request in self.server.requests if request[1] == name])
        if fault in ("cut", "stalled") and n_requests < 4:
            self.wfile.write(body[start : start + len(body) // 5])
            self.wfile.flush()
            if fault == "stalled":
                time.sleep(1)
            self.close_connection = True
        else:
            self.wfile.write(body[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    "Start a server and replace the known archives by small ones, which it serves with the given faults."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.requests = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(mbs.archives, "_STALL_SECONDS", 0.3)
    monkeypatch.setattr(mbs.archives, "_MAX_IDLE_TRIES", 2)

    def serve(*faults):
        for name, body in FILES.items():
            urls = tuple(f"http://127.0.0.1:{server.server_port}/{fault}/{name}" for fault in faults)
            real = KNOWN[name]
            monkeypatch.setitem(
                ARCHIVES,
                name,
                Archive(real.name, urls, len(body), real.algorithm, hashlib.new(real.algorithm, body).hexdigest()),
            )
        return server

    yield serve
    server.shutdown()


KNOWN = dict(ARCHIVES)


@pytest.fixture
def home(tmp_path, monkeypatch):
    "An empty home folder."
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    return tmp_path


def run_data_command(*words, code=0):
    "Run `mbs data` and return its output; an error must be one line without a traceback."
    result = CliRunner().invoke(app, ["data", *map(str, words)])
    assert result.exit_code == code, result.output + result.stderr
    assert code == 0 or ("\n" not in result.stderr.strip() and "Traceback" not in result.stderr)
    return result.stdout + result.stderr


def list_data(home):
    "List the names in the data folder."
    return sorted(p.name for p in (home / "data").iterdir()) if (home / "data").is_dir() else []


def check_voc(root):
    "Check the lists, masks and photos of the small VOC data set."
    train, test = SegmentationFolder(root), SegmentationFolder(root, "test")
    assert train.ids == ["p0", "p1", "p3", "p4"] and test.ids == ["p2"]
    masks = [int(read_mask(m)[0, 0]) for m in train.masks]
    assert masks == [1, 2, 14, 15]  # VOC's own for p0 and p1, although SBD has p1 too; SBD's for p3 and p4
    assert train.dataset == "voc" and not (root / "JPEGImages" / "p7.jpg").exists()


@pytest.mark.parametrize(
    "faults,n_requests",
    [
        (("good",), 1),
        (("cut",), 4),
        (("stalled",), 4),
        (("forgetful",), 1),
        (("missing", "good"), 2),
        (("corrupt", "good"), 2),
    ],
)
def test_voc_is_complete_despite_network_faults(server, home, faults, n_requests):
    requests = server(*faults).requests
    assert "4 training and 1 test pictures" in run_data_command("voc")
    check_voc(home / "data" / "voc")
    starts = [start for _, name, start in requests if name == "voc"]
    assert list_data(home) == ["archives", "voc"] and len(starts) == n_requests
    if "cut" in faults:
        assert starts == [k * (len(FILES["voc"]) // 5) for k in range(4)]


def test_interrupted_download_is_resumed_by_the_same_command(server, home):
    server("missing")
    (home / "data" / "archives").mkdir(parents=True)
    part = home / "data" / "archives" / (KNOWN["voc"].name + ".part")
    part.write_bytes(FILES["voc"][:1000])
    assert "1,000 bytes are kept, rerun the command to resume" in run_data_command("voc", code=2)
    assert list_data(home) == ["archives"]
    requests = server("good").requests
    run_data_command("voc")
    assert ("good", "voc", 1000) in requests
    check_voc(home / "data" / "voc")


def test_a_corrupt_file_at_every_address_is_refused_and_removed(server, home):
    server("corrupt")
    printed = run_data_command("voc", code=2)
    assert "gave another file" in printed and "--from" in printed and KNOWN["voc"].name in printed
    assert list_data(home) == ["archives"] and not list((home / "data" / "archives").iterdir())


def test_without_a_network_the_error_says_where_to_put_the_archive(monkeypatch, home):
    monkeypatch.setitem(ARCHIVES, "voc", ARCHIVES["voc"]._replace(urls=("http://127.0.0.1:9/voc.tar",)))
    monkeypatch.setattr(mbs.archives, "_MAX_IDLE_TRIES", 1)
    printed = run_data_command("voc", code=2)
    assert KNOWN["voc"].name in printed and "put it at" in printed and str(home / "data" / "archives") in printed
    assert list_data(home) == ["archives"]


def test_archives_of_the_user_are_not_downloaded(server, home, tmp_path):
    requests = server("missing").requests
    own = tmp_path / "own"
    own.mkdir()
    (own / KNOWN["sbd"].name).write_bytes(FILES["sbd"])
    single = tmp_path / KNOWN["voc"].name
    single.write_bytes(FILES["voc"])
    run_data_command("voc", "--from", own, "--from", single, "--to", tmp_path / "elsewhere")
    check_voc(tmp_path / "elsewhere")
    assert not requests
    single.write_bytes(FILES["voc"][:-1])
    assert f"expected {len(FILES['voc']):,}" in run_data_command("voc", "--from", own, "--from", single, code=2)
    assert "does not exist" in run_data_command("voc", "--from", tmp_path / "nowhere", code=2)


def test_ade_is_complete(server, home):
    server("cut")
    assert "3 training and 3 test pictures" in run_data_command("ade")
    train = SegmentationFolder(home / "data" / "ade")
    assert train.dataset == "ade" and len(train.classes) == 150 and train.classes[1] == "thing 2" and len(train) == 3
    assert "already exists" in run_data_command("ade", code=2)


EVIL = ["../../evil.png", "/etc/evil.png", "C:/evil.png", "..\\..\\evil.png"]


@pytest.mark.parametrize("name", EVIL)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_paths_outside_the_folder_are_refused(tmp_path, name, kind):
    archive = tmp_path / "in" / f"a.{kind}"
    archive.parent.mkdir()
    archive.write_bytes((zipped if kind == "zip" else tar)({"fine.png": b"x", name: b"x"}))
    with pytest.raises(ValueError, match="would leave its folder"):
        list(read_archive(archive, lambda path: path))


def test_hostile_archive_leaves_nothing(server, home, monkeypatch):
    monkeypatch.setitem(
        FILES,
        "ade",
        zipped(
            {
                "ADEChallengeData2016/images/training/a.jpg": encode_picture(0),
                "ADEChallengeData2016/images/training/../../../../../evil.jpg": encode_picture(0),
            }
        ),
    )
    server("good")
    assert "would leave its folder" in run_data_command("ade", code=2)
    assert list_data(home) == ["archives"] and not list(home.parent.rglob("evil*"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "a.tar", "w") as t:
        info = tarfile.TarInfo("x.png")
        info.type, info.linkname = kind, "/etc/passwd"
        t.addfile(info)
    with pytest.raises(ValueError, match="expected a regular file"):
        list(read_archive(tmp_path / "a.tar", lambda path: path))


@pytest.mark.parametrize("name", ["voc", "sbd", "ade"])
def test_a_cut_archive_is_read_or_refused(tmp_path, name):
    "An archive that is cut anywhere is read up to the cut, or refused with a sentence."
    path = tmp_path / "a"
    for cut in np.linspace(0, len(FILES[name]) - 1, 60).astype(int):
        path.write_bytes(FILES[name][:cut])
        try:
            list(read_archive(path, lambda p: p))
        except ValueError as e:
            assert "cannot be read" in str(e)


def test_wrong_content_of_a_verified_archive_is_refused(server, home, monkeypatch):
    monkeypatch.setitem(FILES, "sbd", tar({"b/dataset/cls/p3.mat": b"no matlab"}, "w:gz"))
    server("good")
    assert "expected a MATLAB file" in run_data_command("voc", code=2) and list_data(home) == ["archives"]
    monkeypatch.setitem(FILES, "sbd", tar({"b/dataset/cls/p99.mat": encode_sbd_mask(1)}, "w:gz"))
    (home / "data" / "archives" / KNOWN["sbd"].name).unlink()
    server("good")
    assert "of the listed ids: expected" in run_data_command("voc", code=2) and list_data(home) == ["archives"]


def test_an_unusable_target_is_refused(server, home, tmp_path):
    server("good")
    (tmp_path / "file").write_text("no folder")
    assert "cannot be made" in run_data_command("voc", "--to", tmp_path / "file" / "voc", code=2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert (
        "already exists" in run_data_command("voc", "--to", tmp_path / "full", code=2)
        and Path(tmp_path / "full" / "mine.txt").read_text() == "mine"
    )


def test_check_lists_every_problem(home, server):
    server("good")
    run_data_command("voc")
    root = home / "data" / "voc"
    assert run_data_command("check", "voc").endswith("image–mask pairs\n")
    (root / "JPEGImages" / "p0.jpg").write_bytes(encode_picture(0)[:200])
    Image.fromarray(np.full((24, 18), 77, np.uint8)).save(root / "SegmentationClassAug" / "p1.png")
    Image.fromarray(np.full((24, 17), 1, np.uint8)).save(root / "SegmentationClassAug" / "p3.png")
    (root / "SegmentationClassAug" / "p2.png").unlink()
    with open(root / "ImageSets" / "Segmentation" / "val.txt", "a") as f:
        f.write("p4\n")
    result = CliRunner().invoke(app, ["data", "check", str(root)])
    printed = result.stdout
    assert result.exit_code == 2 and "5 problems" in printed
    for part in (
        "p0.jpg cannot be read",
        "holds [77]",
        "differ in size",
        "p2.png is missing",
        "'p4' is in the train and in the test part",
    ):
        assert part in printed, printed
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("p2\n")
    assert (
        f"and 2 more: mbs data check {root} lists them"
        in CliRunner().invoke(app, ["run", f"data={root}", "protocol=19-1"]).stderr
    )
