"""Pickles as Python 2 writes them, and small data sets of CIFAR that consist of pickles."""

import struct

import numpy as np


def python2(x):
    """A pickle as Python 2 writes it: strings are bytes, NumPy's module has its old name."""
    return opcodes(x) + b"."


def opcodes(x):
    if isinstance(x, np.ndarray):
        dtype = (
            b"cnumpy\ndtype\n"
            + opcodes((x.dtype.str[1:], 0, 1))
            + b"R"
            + opcodes((3, "|", None, None, None, -1, -1, 0))
            + b"b"
        )
        made = (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
            + opcodes((0,))
            + opcodes("b")
            + b"tR"
        )
        return (
            made
            + b"("
            + opcodes(1)
            + opcodes(x.shape)
            + dtype
            + opcodes(0)
            + opcodes(x.tobytes())
            + b"tb"
        )
    if isinstance(x, str | bytes):
        raw = x if isinstance(x, bytes) else x.encode()
        return b"T" + struct.pack("<i", len(raw)) + raw
    if isinstance(x, dict):
        return b"(" + b"".join(opcodes(v) for item in x.items() for v in item) + b"d"
    if isinstance(x, list | tuple):
        return b"(" + b"".join(map(opcodes, x)) + (b"l" if isinstance(x, list) else b"t")
    return b"N" if x is None else b"J" + struct.pack("<i", x)


def cifar_world(root, name, write):
    """Write a few images per batch with the keys of the real ones.

    Returns the pixels (n, 32, 32, 3) for training and for testing.
    """
    rng = np.random.default_rng(0)
    hundred = name == "cifar100"
    folder = root / name / ("cifar-100-python" if hundred else "cifar-10-batches-py")
    folder.mkdir(parents=True)
    names = [f"class_{i}" for i in range(100 if hundred else 10)]
    pixels = []
    for file in (
        ["train", "test"] if hundred else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    ):
        data = rng.integers(0, 256, (20 if hundred else 4, 3072), dtype=np.uint8)
        labels = [int(i) for i in rng.integers(0, len(names), len(data))]
        if "train" in file or file == "data_batch_1":
            labels = [*range(len(names))]
            data = rng.integers(0, 256, (len(names), 3072), dtype=np.uint8)
        key = (
            {"fine_labels": labels, "coarse_labels": [0] * len(labels)}
            if hundred
            else {"labels": labels}
        )
        (folder / file).write_bytes(
            write({"batch_label": file, **key, "data": data, "filenames": ["x.png"] * len(labels)})
        )
        pixels.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    meta = {"fine_label_names" if hundred else "label_names": names}
    (folder / ("meta" if hundred else "batches.meta")).write_bytes(write(meta))
    return np.concatenate(pixels[:-1]), pixels[-1]
