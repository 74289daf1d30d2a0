"""fpl export: one client's classifier for whoever has open_clip and not this package."""

from __future__ import annotations

from pathlib import Path

from fpl.cli.options import Options, Parser, check_target
from fpl.cli.predict import add_client, add_run, restore
from fpl.cli.show import say


def add(parser: Parser) -> None:
    """Add the options."""
    add_run(parser)
    add_client(parser, required=True)
    what = "file to write (results/exports/RUN-client-N, with the ending of its kind)"
    parser.add_argument("--to", type=Path, metavar="FILE", help=what)


def run(options: Options) -> None:
    """Write what one client of a run classifies with as a file of its own.

    That is .safetensors with a text feature for each class where this is all, and else a program of
    torch.export, .pt2, from image features to logits.
    """
    from fpl.experiments import export, predict

    if options.to:
        options.to = check_target(options.to)
    model = restore(options)
    number = predict.number_of(model.kept, options.client)
    name = predict.file_of(options.record).stem
    whose = predict.NEW if number is None else number
    path = options.to or export.EXPORTS / f"{name}-client-{whose}"
    say(f"classifier: {export.export(model, options.client, path)}")
