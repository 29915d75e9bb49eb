"A picture that lacks a part is refused, also where its decoder would make the rest up."

import base64
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageFile

from mbs.labelme import LabelmeShape, _place_mask
from mbs.pictures import check_png, read_image, read_mask, read_photo, read_photo_facts

PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
READERS = (read_mask, read_photo, read_photo_facts)


def make_png(rows: bytes, width: int, height: int, depth=8, colour=0, interlacing=0) -> bytes:
    "Make a PNG whose compressed data hold `rows`, with sound checksums."
    header = struct.pack(">2I5B", width, height, depth, colour, 0, 0, interlacing)
    data = zlib.compress(rows)
    chunks = [b"IHDR" + header, b"IDAT" + data[:9], b"IDAT" + data[9:], b"IDAT", b"IEND"]
    parts = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def list_rows(ids: np.ndarray, is_interlaced: bool = False) -> list[bytes]:
    "Return the rows of a grey PNG, each with the number of its filter, none."
    passes = PASSES if is_interlaced else ((0, 0, 1, 1),)
    parts = [ids[top::down, left::right] for top, left, down, right in passes]
    return [b"\0" + row.tobytes() for part in parts if part.size for row in part]


@pytest.mark.parametrize("is_interlaced", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (17, 9), (8, 64)])
def test_every_lost_row_is_found(tmp_path, shape, is_interlaced):
    "Decoders leave rows black that the compressed data do not reach; in a mask they would be background."
    ids, file = np.arange(1, 1 + np.prod(shape), dtype=np.uint16).astype(np.uint8).reshape(shape), tmp_path / "a.png"
    rows, height, width = list_rows(ids, is_interlaced), *shape
    whole = make_png(b"".join(rows), width, height, interlacing=int(is_interlaced))
    assert (np.asarray(Image.open(BytesIO(whole))) == ids).all()
    file.write_bytes(whole)
    assert (read_mask(file) == ids).all() and (read_mask(file, is_known=True) == ids).all()
    assert (read_photo(file)[..., 0] == ids).all() and read_photo_facts(file).size == shape
    for n in range(len(rows)):
        file.write_bytes(make_png(b"".join(rows[:n]), width, height, interlacing=int(is_interlaced)))
        for read in READERS:
            with pytest.raises(ValueError, match=r"a.png cannot be read \(some of its rows are missing\): expected a"):
                read(file)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("width", [1, 7, 8, 9])
def test_whole_pictures_of_all_modes_pass(mode, width):
    "Pillow writes bits, pairs of bits and nibbles, too, if a palette is small."
    for n_colours in (2, 4, 16, 256):
        pixels = np.random.default_rng(0).integers(0, n_colours, (5, width), dtype=np.uint8)
        image = Image.fromarray(pixels)
        image = image.quantize(n_colours) if mode == "P" else image.convert(mode)
        file = BytesIO()
        image.save(file, "PNG")
        check_png(file.getvalue())


def test_a_png_that_is_cut_anywhere_is_refused(tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(file)
    content = file.read_bytes()
    for n in range(len(content)):
        file.write_bytes(content[:n])
        for read in READERS:
            with pytest.raises(ValueError, match=r"a.png cannot be read"):
                read(file)
    for k in range(8, len(content)):
        file.write_bytes(content[:k] + bytes([content[k] ^ 1]) + content[k + 1 :])
        with pytest.raises(ValueError, match=r"a.png cannot be read"):
            read_mask(file, is_known=True)


def test_a_mask_of_labelme_that_lacks_rows_is_refused():
    ids = np.ones((4, 4), np.uint8)
    for n, is_whole in ((4, True), (2, False)):
        mask = base64.b64encode(make_png(b"".join(list_rows(ids)[:n]), 4, 4)).decode()
        shape = LabelmeShape(label="a", points=[(0, 0), (3, 3)], shape_type="mask", mask=mask)
        if is_whole:
            _place_mask(shape, 8, 8)
            continue
        with pytest.raises(ValueError, match=r"a mask that cannot be read \(some of its rows are missing\)"):
            _place_mask(shape, 8, 8)


def test_pillow_may_not_make_pixels_up(tmp_path, monkeypatch):
    "A program may have told Pillow to fill what is lost."
    file = tmp_path / "a.bmp"
    Image.fromarray(np.ones((8, 8), np.uint8)).save(file)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for read in (*READERS, read_image):
        with pytest.raises(ValueError, match=r"a.bmp cannot be read \(ImageFile.LOAD_TRUNCATED_IMAGES .* False"):
            read(file)
