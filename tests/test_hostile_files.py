"""Promise: pictures and lists of others run nothing, crash nothing and have limits."""

import contextlib
import io
import os
import pickle
import socket
import struct
import zlib

import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

from fpl.data import archives, features, fetch, matlab, pickled, pictures
from fpl.data.datasets import layouts
from fpl.data.datasets.layouts import json_of

GREY = np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8)


def saved(pixels, kind="PNG", **more):
    """The bytes of a picture."""
    out = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(out, kind, **more)
    return out.getvalue()


def shown(content, **how):
    return np.asarray(pictures.decode(content, **how))


# --- pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP", "AVIF", "PPM"])
def test_eight_bits_are_decoded_as_pillow_does(kind):
    pixels = Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 7, 4), np.uint8))
    written = 0
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"):
        with contextlib.suppress(OSError, ValueError):  # no format has all of them
            content = saved(pixels.convert(mode), kind)
            expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
            assert np.array_equal(shown(content), expected)
            written += 1
    assert written >= 4


@pytest.mark.parametrize(
    "content",
    [
        saved(GREY.astype("u2") * 257),
        saved(GREY.astype("u2") * 257, "TIFF"),
        saved(GREY.astype(">u2") * 257, "TIFF"),
        saved(GREY.astype("f4") / 255, "TIFF"),
        saved(GREY.astype("i4") * 257, "PPM"),
        b"P5 30 20 4095\n" + np.rint(GREY / 255 * 4095).astype(">u2").tobytes(),
    ],
    ids=["png", "tiff", "big endian", "floats", "pgm", "twelve bits"],
)
def test_more_bits_are_scaled_to_eight(content):
    assert np.array_equal(shown(content), np.repeat(GREY[..., None], 3, 2))


@pytest.mark.parametrize("pixels", [GREY, GREY.astype("u2") * 257, GREY.astype("f4") / 255])
def test_where_zero_is_white_it_is_white(pixels):
    tag = struct.pack("<HHI", 262, 3, 1)
    content = saved(pixels, "TIFF")
    place = content.index(tag) + len(tag)
    shown_dark = shown(content)
    assert np.array_equal(shown(content[:place] + b"\0" + content[place + 1 :]), 255 - shown_dark)


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (GREY.astype("i4"), "whole numbers of unknown range"),
        (GREY.astype("f4"), "floats outside 0 .. 1"),
        (np.full((2, 2), -0.1, "f4"), "floats outside 0 .. 1"),
        (np.full((2, 2), np.nan, "f4"), "floats outside 0 .. 1"),
    ],
)
def test_what_cannot_be_scaled_is_refused(pixels, reason):
    with pytest.raises(ValueError, match=reason):
        pictures.decode(saved(pixels, "TIFF"))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "GIF", "WEBP"])
def test_own_photographs_stand_on_white_and_upright(kind):
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 2, 2))
    content = saved(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert shown(content, upright=True)[0].tolist() == [[255, 0, 0]] * 2 + [[255, 255, 255]] * 2
    assert shown(content)[0, 3].tolist() != [255, 255, 255]  # as CLIP's transform has it


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_own_photographs_are_turned_by_their_tag(kind):
    tags = Image.Exif()
    tags[0x0112] = 6  # the camera was turned by a quarter
    content = saved(np.zeros((2, 4, 3), np.uint8), kind, exif=tags)
    assert shown(content).shape[:2] == (2, 4) and shown(content, upright=True).shape[:2] == (4, 2)


def test_the_first_of_several_pictures_is_taken():
    first, second = (Image.new("RGB", (3, 3), colour) for colour in ("red", "blue"))
    for kind in ("GIF", "TIFF", "PNG"):
        content = saved(first, kind, save_all=True, append_images=[second])
        assert shown(content)[0, 0].tolist() == [255, 0, 0]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


def test_postscript_is_given_to_no_program(tmp_path, monkeypatch):
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\necho ran >> {tmp_path}/ran\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(ValueError, match="no picture in a format that is read"):
        pictures.decode(EPS)
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore")  # Pillow warns of some of the damage
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "WEBP", "AVIF"])
def test_a_damaged_picture_is_one_of_two_kinds_of_errors(kind):
    rng = np.random.default_rng(0)
    whole = saved(Image.fromarray(rng.integers(0, 256, (12, 10, 4), np.uint8)).convert("RGB"), kind)
    refused = 0
    for _ in range(100):
        changed = bytearray(whole)
        for place in rng.integers(0, len(changed), 3):
            changed[place] = rng.integers(256)
        try:
            pictures.decode(bytes(changed), upright=True)
        except (OSError, ValueError):
            refused += 1
    assert refused


def png(width, height):
    """A PNG of any size in a few bytes, cut behind its first row."""

    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    sizes = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(min(width, 2**20) + 1))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", sizes) + chunk(b"IDAT", rows)


JPEG = saved(GREY, "JPEG")
SCAN = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00"
COMMENT = b"\xff\xfe\x00\x04\xff\xd9"


def with_scans(content):
    return content + SCAN * 100 + b"\xff\xd9"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (png(1, 60000), "1 x 60000 pixels, one side 100 times the other"),
        (png(60000, 1), "60000 x 1 pixels, one side 100 times the other"),
        (png(9434, 9434), "9434 x 9434 pixels, more than 89000000"),
        (png(2**20, 2**20), "more than 89000000 pixels"),
        (with_scans(JPEG[:-2]), "over its pixels more than 100 times"),
        # an end among what the picture says of itself is none
        (with_scans(JPEG[:2] + COMMENT + JPEG[2:-2]), "over its pixels more than 100 times"),
    ],
)
def test_bombs_are_refused_before_they_are_decoded(content, reason):
    with pytest.raises(ValueError, match=reason):
        pictures.decode(content)


@pytest.mark.parametrize("progressive", [False, True])
def test_what_a_phone_puts_behind_a_photograph_is_no_part_of_it(progressive):
    """As a film of some seconds, in which any bytes stand."""
    photo = saved(GREY, "JPEG", progressive=progressive)
    assert np.array_equal(shown(photo + SCAN * 200), shown(photo))


def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket.jpg"))
        (tmp_path / "folder.jpg").mkdir()
        (tmp_path / "device.jpg").symlink_to("/dev/zero")
        for path in tmp_path.iterdir():
            with pytest.raises(ValueError, match="folder, pipe, socket or device and not a file"):
                pictures.content(path)
    with pytest.raises(FileNotFoundError):
        pictures.content(tmp_path / "none.jpg")
    (tmp_path / "large.jpg").write_bytes(bytes(11))
    with pytest.raises(ValueError, match="more than 10 bytes"):
        pictures.content(tmp_path / "large.jpg", 10)


# --- lists ----------------------------------------------------------------------------------------

# Ten texts, ten times these, ten times that, ..
SHARED = b"]q\x00(" + b"U\x01x" * 10 + b"e0"
SHARED += b"".join(b"]q%c(%se0" % (i, b"h%c" % (i - 1) * 10) for i in range(1, 20)) + b"h\x13."
TEXT = b"X" + struct.pack("<I", 2**20) + b"x" * 2**20 + b"q\x00"
BYTES = b"c_codecs\nencode\n"
PICKLES = {
    "lists that share lists": (SHARED, "stands for more than"),
    "a text a thousand times": (b"(" + TEXT + b"h\x00" * 1000 + b"t.", "stands for more than"),
    "bytes of it a thousand times": (
        b"(" + TEXT + (BYTES + b"(h\x00tR") * 1000 + b"t.",
        "stands for more than",
    ),
    "a far place of the memo": (b"]r" + struct.pack("<I", 2**31) + b".", "uses place 2147483648"),
    "the same as text": (b"]p2147483648\n.", "uses place 2147483648"),
    "bytes that it does not have": (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".", "bytearray"),
    "too many instructions": (b"(" + b"N" * 1001 + b"t.", "more than 1000 instructions"),
    "a list in itself": (b"]q\x00h\x00a.", "values within values"),
    "lists in lists": (b"]" * 100 + b"a" * 99 + b".", "values within values"),
    "what only its writer knows": (b"Px\n.", "persistent"),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_stands_for_no_more_than_memory_and_time_allow(kind, tmp_path, monkeypatch):
    content, reason = PICKLES[kind]
    (tmp_path / "list.pkl").write_bytes(content)
    monkeypatch.setattr(pickled, "YIELD", 2**25)
    monkeypatch.setattr(pickled, "STEPS", 10**6 if "shar" in kind or "times" in kind else 1000)
    with pytest.raises(ValueError, match=rf"list\.pkl is not read, .*{reason}") as refused:
        pickled.read(tmp_path / "list.pkl")
    assert "\n" not in str(refused.value)


def test_the_limits_leave_room_for_the_largest_known(tmp_path, monkeypatch):
    """The lists of CIFAR-100, besides whose pixels half of the limit is left for them."""
    count = 50000
    made = {
        "filenames": [f"whatever_the_name_is_{i:06d}.png" for i in range(count)],
        "fine_labels": list(range(count)),
        "coarse_labels": list(range(count)),
    }
    monkeypatch.setattr(pickled, "YIELD", (pickled.YIELD - count * 3072) // 2)
    (tmp_path / "train").write_bytes(pickle.dumps(made, protocol=2))
    assert pickled.read(tmp_path / "train") == made and 1.5 * count * 3072 < pickled.SIZE


@pytest.mark.parametrize("compressed", [False, True])
def test_matrices_are_read_as_scipy_reads_them(compressed, tmp_path):
    made = {
        "labels": np.random.default_rng(0).integers(1, 103, (1, 8189)).astype("u1"),
        "real": np.arange(6.0).reshape(2, 3),
        "one": [[7]],
        "cube": np.arange(24, dtype="i2").reshape(2, 3, 4),
        "text": "left out",
        "complex": np.array([[1 + 2j]]),
        "struct": {"a": 1},
    }
    savemat(tmp_path / "x.mat", made, do_compression=compressed)
    found, expected = matlab.read(tmp_path / "x.mat"), loadmat(tmp_path / "x.mat")
    assert set(found) == {"labels", "real", "one", "cube"}
    assert all(np.array_equal(found[name], expected[name]) for name in found)


def test_a_damaged_matlab_file_is_one_sentence(tmp_path):
    """Whatever is changed or cut; scipy ends the process for some of these."""
    path = tmp_path / "x.mat"
    rng = np.random.default_rng(0)
    for compressed in (False, True):
        savemat(path, {"a": np.arange(9.0)[None], "b": "text"}, do_compression=compressed)
        whole = path.read_bytes()
        for _ in range(150):
            changed = bytearray(whole[: rng.choice([len(whole), rng.integers(len(whole))])])
            for place in rng.integers(0, max(1, len(changed)), 2 * bool(changed)):
                changed[place] = rng.integers(256)
            path.write_bytes(changed)
            try:
                matlab.read(path)
            except ValueError as e:
                assert str(e).startswith(f"{path} is not read as a file of MATLAB 5: ")


def test_a_matlab_file_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(matlab, "SIZE", 10**4)
    savemat(tmp_path / "x.mat", {"a": np.zeros((1, 10**4))}, do_compression=True)
    with pytest.raises(ValueError, match=r"x\.mat .*unpacks to more than 10000 bytes"):
        matlab.read(tmp_path / "x.mat")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 10**6, "recursion"),
        (b'{"a": ' * 10**5, "recursion"),
        (b"[" + b"1" * 5000 + b"]", "digits"),
        (b"[1, ", "Expecting value"),
        (b"\xff\xfe[\x00", "UTF-8"),
        (b" " * 2**25 + b"[]", "more than 33554432 bytes"),
    ],
)
def test_a_json_list_that_is_none_is_one_sentence(content, reason, tmp_path):
    (tmp_path / "list.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"list\.json .*{reason}"):
        json_of(tmp_path / "list.json")


MIB = 2**20
LIMITS = {
    pictures: {"SIZE": 512 * MIB, "PIXELS": 89 * 10**6, "RATIO": 100, "SCANS": 100},
    archives: {"LIMIT": 20 * 1024 * MIB, "BLOCK": 4096, "MEMBERS": 10**6}
    | {"DIRECTORY": 32 * MIB, "HEADER": MIB},
    pickled: {"SIZE": 256 * MIB, "STEPS": 2097152, "YIELD": 512 * MIB, "VALUE": 256, "DEPTH": 50},
    layouts: {"JSON": 32 * MIB},
    matlab: {"SIZE": 32 * MIB},
    fetch: {"LEAST": 128 * 1024, "WINDOW": 120, "TOTAL": 24 * 3600, "TRIES": 5}
    | {"PROGRESS": MIB, "LISTS": 64 * MIB},
}


@pytest.mark.parametrize("module", LIMITS)
def test_the_limits_are_those_of_the_page_on_data(module):
    """Who changes one corrects docs/data.md."""
    assert {name: getattr(module, name) for name in LIMITS[module]} == LIMITS[module]


# --- features -------------------------------------------------------------------------------------


def test_a_column_is_no_larger_than_its_file(tmp_path):
    """Neither reserved without a place, nor packed, nor one text that stands for thousands."""
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as f:
        f.create_dataset("fine", data=["x" * 5000] + ["y"] * 999, dtype=h5py.string_dtype())
        f.create_dataset("shared", data=["x" * 5000] + ["y"] * 999, dtype=h5py.string_dtype())
        f.create_dataset("reserved", (10**9, 512), "f2")
        f.create_dataset("packed", data=np.zeros((99, 99), "f2"), compression="gzip")
        f.create_dataset("no texts", (10**6,), h5py.string_dtype())
        place = f["shared"].id.get_offset()
    with path.open("r+b") as raw:
        raw.seek(place)
        text = raw.read(16)
        raw.seek(place)
        raw.write(text * 1000)
    with h5py.File(path) as f:
        assert f["shared"].asstr()[999] == "x" * 5000
        assert [name for name in f if features.is_inside(f[name])] == ["fine"]
