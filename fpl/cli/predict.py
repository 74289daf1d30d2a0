"""fpl predict: what a run learnt is used on other images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fpl.cli.options import Options, Parser, check_target, positive
from fpl.cli.show import notice, say, table
from fpl.data.files import atomic_write

if TYPE_CHECKING:
    from pandas import DataFrame

    from fpl.experiments.predict import Evaluation, Model


def add(parser: Parser) -> None:
    """Add the options."""
    add_run(parser)
    what = "images, folders, or patterns such as 'holiday/*.jpg'"
    parser.add_argument("images", nargs="+", metavar="IMAGES", help=what)
    add_client(parser)
    what = "first train the new client on images in folders FOLDER/CLASS/FILE"
    parser.add_argument("--adapt", type=Path, metavar="FOLDER", help=what)
    what = "local epochs of that training (those of the run)"
    parser.add_argument("--epochs", type=positive, help=what)
    what = "how many classes of each image (1)"
    parser.add_argument("--top", type=positive, default=1, help=what)
    what = "write the table to this file, and print none"
    parser.add_argument("--csv", type=Path, metavar="FILE", help=what)
    what = "IMAGES is a folder IMAGES/CLASS/FILE: print accuracy, macro-F1 and confusion"
    parser.add_argument("--evaluate", action="store_true", help=what)


def add_run(parser: Parser) -> None:
    """Add the argument that says which run is meant."""
    which = "a run that was made with --keep: its record, or the name of that, also cut short"
    parser.add_argument("record", metavar="RUN", help=which)


def add_client(parser: Parser, required: bool = False) -> None:
    """Add the options that say whose classifier is meant."""
    whose = f"its number, its name, or new for one that took no part{'' if required else ' (0)'}"
    parser.add_argument("--client", default="", required=required, help=whose)
    what = "the class of a method of your own"
    parser.add_argument("--method", default="", metavar="FILE.py:CLASS", help=what)


def run(options: Options) -> None:
    """Say what a client of a run takes images for, or how well it does on labelled ones.

    A new client gets what the server would send it, without experts; with --adapt it then trains on
    images of its own. Exit status 1 if an image cannot be read: the others are answered.
    """
    check(options)
    model = restore(options)
    if options.adapt:
        model = model.adapt(options.adapt, options.epochs)
    client = options.client or ("new" if options.adapt else "0")
    if options.evaluate:
        tell(model.evaluate(options.images[0], client), options.csv)
        return
    found = model.predict(options.images, client, options.top)
    show(found, options.csv)
    bad = found[found["error"] != ""]
    for image, why in zip(bad["image"], bad["error"], strict=True):
        notice(f"fpl predict: {image} cannot be read: {why}")
    if len(bad):
        sys.exit(1)


def check(options: Options) -> None:
    """Raise ValueError for options that do not go together; find the file to write."""
    from fpl.data.pictures import is_picture

    if options.adapt and options.client not in ("", "new"):
        raise ValueError(f"--adapt is for a new client, not for {options.client}: leave --client")
    if options.epochs and not options.adapt:
        raise ValueError("--epochs are those of --adapt FOLDER: give both")
    if options.evaluate and (len(options.images) > 1 or options.top > 1):
        raise ValueError("--evaluate takes one folder, and no --top: leave the others")
    if options.csv:
        options.csv = check_target(options.csv)
        if is_picture(options.csv) or str(options.csv) in map(str, options.images):
            raise ValueError(
                f"--csv {options.csv} is a picture: name the table's file behind --csv"
            )


def restore(options: Options) -> Model:
    """Return what a run learnt."""
    from fpl.experiments import predict

    return predict.restore(options.record, method=options.method or None)


def show(found: DataFrame, csv: Path | None) -> None:
    """Print answers, or write them to a file."""
    if csv:
        write(found, csv)
        return
    read = found[found["error"] == ""].drop(columns="error")
    if len(read):
        table(read, floatfmt=".4f")


def tell(found: Evaluation, csv: Path | None) -> None:
    """Print accuracy, F1 and confusion of the classes that occur; or write the whole of this."""
    say(f"accuracy: {100 * found.accuracy:.2f} %", f"macro-F1: {100 * found.macro_f1:.2f} %")
    counts = found.confusion
    if csv:
        write(counts.reset_index(), csv)
        return
    there = counts.loc[counts.any(axis=1), counts.any(axis=0)]
    say("")
    table(there.reset_index())


def write(frame: DataFrame, path: Path) -> None:
    """Write a table, also with names of files that are in no encoding."""
    with atomic_write(path) as temporary:
        frame.to_csv(temporary, index=False, lineterminator="\n", errors="surrogateescape")
    say(f"table: {path}")
