"""fpl features: image features, made once and handed on as packs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpl.cli.options import (
    Options,
    Parser,
    add_cluster,
    add_data,
    add_settings,
    check_read,
    check_target,
    cluster_of,
    natural,
    positive,
    read_settings,
)
from fpl.cli.show import say

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fpl.experiments.extract import Made, Request
    from fpl.experiments.settings import Data, Source
    from fpl.prompts import Clip

SETTINGS = {"params", "set", "on"}
MADE = {"workers", "views", "patches", "all", "skip_bad", "fresh", "rehash", "cluster"}
OF_OTHERS = ("classes", "model", "text", "column")  # what is said of features that others made
READ = {  # options by what reads them
    "extract": SETTINGS | MADE,
    "export": SETTINGS,
    "import": {*SETTINGS, "force", *OF_OTHERS},
    "verify": set(),
}
# How long a pack may be read before it counts as one on which HDF5 hangs.
PATIENCE = 60.0  # seconds
SLOWEST = 2**20  # bytes a second


def add(parser: Parser) -> None:
    """Add the options."""
    add_settings(parser)
    add_data(parser)
    add_cluster(parser)
    actions = ("extract", "export", "import", "verify")
    parser.add_argument(
        "action", nargs="?", choices=actions, default="extract", help="what to do (extract)"
    )
    parser.add_argument("file", nargs="?", type=Path, help="the pack, or cache to import")
    parser.add_argument(
        "--workers",
        type=natural,
        help="processes that decode images (with a GPU a core each, up to 8; else fewer)",
    )
    parser.add_argument(
        "--views",
        type=positive,
        metavar="V",
        help="also write V random crops and flips of each training image",
    )
    parser.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="import the features of others: their class names, one a line, in label order",
    )
    parser.add_argument("--model", default="", metavar="NAME", help="what made these features")
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="a .pt or .npy with text features of their classes, which zero-shot rows read",
    )
    parser.add_argument(
        "--column", default="", metavar="NAME", help="of a Hugging Face data set, the features'"
    )
    switches = {
        "--patches": "also write the file of patch features, which FedOTP reads",
        "--all": "of every data set of the tables, all that their rows read",
        "--skip-bad": "leave out images that cannot be read",
        "--fresh": "extract again what is there as asked for",
        "--rehash": "compare the content of every image, not only its size and time",
        "--force": "import over other features",
    }
    for name, what in switches.items():
        parser.add_argument(name, action="store_true", help=what)


def run(options: Options) -> None:
    """Run the frozen image tower over the images once (extract), or handle packs of features.

    A pack is one file with all that the tables need: features, labels, class names, split, domain
    and provenance. Whoever imports it needs no images, but the weights of the text tower, which are
    not in it. Import also reads the caches of features that others made.
    """
    check_read(options, READ[options.action], f"fpl features {options.action}")
    if options.all and (options.on or options.patches):
        raise ValueError("--all makes what all data sets need: leave it, or --data and --patches")
    command = f"`fpl features {options.action}`"
    if options.action == "extract":
        if options.file:
            where = "params.yaml says where it goes"
            raise ValueError(f"{command} takes no file ({options.file}): {where}")
        extract(options)
    elif not options.file:
        raise ValueError(f"{command} needs the name of a pack")
    elif options.action == "import":
        unpack(options)
    else:
        describe_pack(options)


def made(source: Source, clip: Clip, request: Request, address: str) -> Iterator[Made]:
    """Make the features files that are wanted, here or on a cluster."""
    from dataclasses import replace

    from fpl.experiments.extract import make_features

    if not address:
        yield from make_features(source.data, clip, request)
        return
    from fpl.experiments import cluster

    with cluster.connected(address) as client, client.as_current():
        away = cluster.Encoder(client, source.backbone)
        yield from make_features(source.data, clip, replace(request, elsewhere=away))


def extract(options: Options) -> None:
    """Make the features files that are asked for and not there, and say where they are."""
    import fpl
    from fpl.experiments.extract import Request

    settings = read_settings(options)
    asked = {options.on: {"patches"} if options.patches else set()}
    if options.all:
        asked = settings.contents()
    for name, contents in asked.items():
        source = settings.source(name)
        model = source.backbone
        clip = fpl.load(model.name, model.weights, model.preprocessing)
        how = (options.workers, options.skip_bad, options.fresh, options.rehash)
        request = Request(contents, options.views, *how)
        for path, skipped, why in made(source, clip, request, cluster_of(settings, options)):
            without = f", without {len(skipped)} images that cannot be read" if skipped else ""
            again = f", made again: {why}" if why else ""
            say(f"features: {path}{without}{again}")


def files_of(data: Data) -> dict[str, Path]:
    """Return where the settings look for features, by content."""
    from fpl.data import features

    return {content: data.file(content) for content in features.CONTENT}


def unpack(options: Options) -> None:
    """Put what is in a pack, or in a cache of others, where the settings look for it."""
    from fpl.data import foreign

    source = read_settings(options).source(options.on)
    data = source.data
    named = options.file.is_dir() or options.file.suffix.lower() in foreign.SUFFIXES
    if named or any(getattr(options, name) for name in OF_OTHERS):
        bring(options, data)
        return
    model = source.backbone.name
    written = of_pack("unpack", options.file, files_of(data), data.name, model, options.force)
    for path, is_new in written.items():
        say(f"features: {path}{'' if is_new else ', which was there already'}")


def bring(options: Options, data: Data) -> None:
    """Put a cache of features that others made where the settings look for features."""
    from fpl.data import foreign

    if not options.classes:
        raise ValueError(f"{options.file} is of others: give its class names with --classes FILE")
    if data.manifest.exists():
        own = "give the features a name, as in --set data.name=own --set data.store=NAME"
        raise ValueError(f"{data.manifest} lists the images of {data.name}: {own}")
    about = {"data": data.name} | ({"model": options.model} if options.model else {})
    path = data.features
    hints = foreign.Hints(options.text, options.column)
    is_new = foreign.bring(options.file, options.classes, path, about, options.force, hints)
    say(f"features: {path}{'' if is_new else ', which was there already'}")


def describe_pack(options: Options) -> None:
    """Verify a pack, which export makes first, and say what is in it."""
    if options.action == "export":
        from fpl.data import pack

        data = read_settings(options).source(options.on).data
        options.file = check_target(options.file)
        described = pack.export(files_of(data), data.name, options.file)
    else:
        described = of_pack("verify", options.file)
    for what, value in described.items():
        say(f"{what + ':':10}{value}")


def of_pack(function: str, path: Path, *arguments: Any) -> Any:
    """Call what `fpl.data.pack` has for a pack in a process that this one survives.

    Its maker may have sealed what makes HDF5 crash or hang.
    """
    from fpl.data import processes

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    seconds = PATIENCE + path.stat().st_size / SLOWEST
    try:
        return processes.apart(seconds, "fpl.data.pack", function, path, *arguments)
    except (ChildProcessError, TimeoutError) as e:
        why = "(it is damaged, or memory ran out)"
        raise ValueError(f"{path} is no pack that can be read: its reader {e} {why}") from None
