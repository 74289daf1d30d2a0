"""Folders as `save_to_disk` of Hugging Face's `datasets` writes them: Arrow streams and JSON.

The streams are built here from the published format (Message.fbs and Schema.fbs of apache/arrow),
in another order of bytes than Arrow's own writer has, which the format leaves open.
"""

import json
import struct

import numpy as np

INT, FLOAT, UTF8, LIST, FIXED = 2, 3, 5, 12, 16
SCHEMA, BATCH = 1, 3


class Flat:
    """A FlatBuffers message under construction; what refers to something stands before it."""

    def __init__(self):
        self.raw = bytearray(8)

    def table(self, **fields):
        """Append a table, its vtable in front, and return its place.

        fields: f0=("<i", 3) is a number; f1=[..] refers to what the function in it appends.
        """
        numbered = {int(name[1:]): value for name, value in fields.items()}
        last = max(numbered, default=-1)
        offsets = [8 * (i + 1) if i in numbered else 0 for i in range(last + 1)]
        size = 8 * (last + 2)
        vtable = struct.pack(f"<{last + 3}H", 2 * last + 6, size, *offsets)
        self.raw += vtable + bytes(-len(vtable) % 8)
        place = len(self.raw)
        back = len(vtable) + -len(vtable) % 8
        self.raw += struct.pack("<i", back) + bytes(size - 4)
        for i, value in numbered.items():
            at = place + 8 * (i + 1)
            if isinstance(value, tuple):
                struct.pack_into(value[0], self.raw, at, value[1])
            else:
                struct.pack_into("<I", self.raw, at, value[0]() - at)
        return place

    def vector(self, entries=b"", n=None):
        """Append a vector of bytes or structs, and return its place."""
        self.raw += bytes(-(len(self.raw) + 4) % 8)
        place = len(self.raw)
        self.raw += struct.pack("<I", len(entries) if n is None else n) + entries
        self.raw += bytes(-len(self.raw) % 8)
        return place

    def tables(self, makers):
        """Append a vector of tables, and return its place."""
        place = self.vector(bytes(4 * len(makers)), len(makers))
        for i, make in enumerate(makers):
            at = place + 4 + 4 * i
            struct.pack_into("<I", self.raw, at, make() - at)
        return place

    def message(self, kind, header, body=b""):
        """Return the whole message; header: appends its description."""
        fields = {"f0": ("<h", 4), "f1": ("<B", kind), "f2": [header], "f3": ("<q", len(body))}
        struct.pack_into("<I", self.raw, 0, self.table(**fields))
        return struct.pack("<II", 2**32 - 1, len(self.raw)) + bytes(self.raw) + body


def field(flat, name, column):
    """Return what appends the description of a column, named by what it holds."""
    children = []
    if isinstance(column, list):
        kind, said = UTF8, {}
    elif column.dtype == object:  # vectors of any length
        kind, said, children = LIST, {}, [field(flat, "item", np.concatenate(column))]
    elif column.ndim == 2:
        kind, said = FIXED, {"f0": ("<i", column.shape[1])}
        children = [field(flat, "item", column.ravel())]
    elif column.dtype.kind == "f":
        kind, said = FLOAT, {"f0": ("<h", {2: 0, 4: 1, 8: 2}[column.itemsize])}
    else:
        kind, said = (
            INT,
            {"f0": ("<i", 8 * column.itemsize), "f1": ("<?", column.dtype.kind == "i")},
        )

    def make():
        return flat.table(
            f0=[lambda: flat.vector(name.encode())],
            f1=("<?", True),
            f2=("<B", kind),
            f3=[lambda: flat.table(**said)],
            f5=[lambda: flat.tables(children)],
        )

    return make


def layout(column):
    """Return nodes (rows, missing) and buffers of a column and its children."""
    if isinstance(column, list):
        letters = [text.encode() for text in column]
        return [(len(column), 0)], [b"", ends(letters), b"".join(letters)]
    if column.dtype == object:
        nodes, buffers = layout(np.concatenate(column))
        return [(len(column), 0), *nodes], [b"", ends(column), *buffers]
    if column.ndim == 2:
        nodes, buffers = layout(column.ravel())
        return [(len(column), 0), *nodes], [b"", *buffers]
    return [(len(column), 0)], [b"", column.tobytes()]


def ends(entries):
    return np.cumsum([0, *map(len, entries)]).astype("<i4").tobytes()


def stream(columns, rows=5):
    """Return an Arrow stream of some columns, in batches of so many rows.

    columns: arrays (n,) or (n, d), lists of text, or arrays of arrays, which are lists in Arrow.
    """
    flat = Flat()
    fields = [field(flat, name, column) for name, column in columns.items()]
    said = flat.message(SCHEMA, lambda: flat.table(f0=("<h", 0), f1=[lambda: flat.tables(fields)]))
    total = len(next(iter(columns.values())))
    for start in range(0, total, rows):
        said += batch([column[start : start + rows] for column in columns.values()])
    return said + struct.pack("<II", 2**32 - 1, 0)


def batch(columns):
    """Return the message of one batch of rows."""
    flat = Flat()
    found = [layout(column) for column in columns]
    nodes = b"".join(struct.pack("<qq", *node) for own, _ in found for node in own)
    places, body = b"", b""
    for buffer in (buffer for _, own in found for buffer in own):
        places += struct.pack("<qq", len(body), len(buffer))
        body += buffer + bytes(-len(buffer) % 8)

    def header():
        return flat.table(
            f0=("<q", len(columns[0])),
            f1=[lambda: flat.vector(nodes, len(nodes) // 16)],
            f2=[lambda: flat.vector(places, len(places) // 16)],
        )

    return flat.message(BATCH, header, body)


def save(folder, columns, shards=1, **state):
    """Write one Dataset into a folder, as `save_to_disk` does; state: more for state.json."""
    folder.mkdir(parents=True)
    total = len(next(iter(columns.values())))
    cuts = [total * i // shards for i in range(shards + 1)]
    names = [f"data-{i:05}-of-{shards:05}.arrow" for i in range(shards)]
    for name, start, end in zip(names, cuts, cuts[1:]):
        part = {key: column[start:end] for key, column in columns.items()}
        (folder / name).write_bytes(stream(part))
    said = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "0123456789abcdef",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(said | state))
    info = {"citation": "", "description": "", "features": {}, "homepage": "", "license": ""}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def save_splits(folder, splits, **options):
    """Write a DatasetDict into a folder: a Dataset for each split."""
    for name, columns in splits.items():
        save(folder / name, columns, **options)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": [*splits]}))
