"""fpl bench: how long things take on this machine, and how much memory."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fpl.cli.options import Options, Parser, check_read, check_target, natural, positive
from fpl.cli.show import say
from fpl.data.files import ROOT, atomic_write

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")
WHAT = {  # what is measured, with the options that it reads
    "step": {"model", "classes", "batch", "steps", "measure_round", "repeats"},
    "profile": {"model", "classes", "batch"},
    "scaling": {"model", "classes", "batch", "steps", "clients", "experts"},
    "evaluation": {"model", "classes", "experts", "images"},
    "extraction": {"model", "weights", "batch", "workers", "repeats", "images"},
    "reading": {"images", "repeats"},
    "sizes": {"views"},
    "gpu": {"small"},
}
MODEL = "ViT-B-16-quickgelu"
GPU = Path("results/bench/gpu")  # where files about GPUs go, named after the card
LISTS = ("model", "classes", "batch", "steps", "clients", "experts")
SEVERAL = {  # those of which several values are measured
    "step": {"model", "classes", "batch"},
    "scaling": {"classes", "steps", "clients", "experts"},
}


def add(parser: Parser) -> None:
    """Add the options."""
    parser.add_argument(
        "what",
        nargs="?",
        default="step",
        choices=[*WHAT],
        help="a local step and a round of pFedMoAP, from the released code's shape to ours (the "
        "default); where its time goes; its growth with clients, classes, steps and experts; an "
        "evaluation of one client; the extraction of features beside the bare model; a features "
        "file read into memory; the size of each data set's features; and gpu: in under ten "
        "minutes, everything that only a GPU can tell",
    )
    parser.add_argument(
        "--model", nargs="+", help=f"open_clip model ({MODEL}; scaling: the demo's)"
    )
    parser.add_argument(
        "--weights", default="", help="extraction: weights as in params.yaml (random ones)"
    )
    lists = {
        "--classes": "step: numbers of class names (102: those of Flowers102)",
        "--batch": "images in a step (16), or in a pass of the bare model (64, GPU 256)",
        "--steps": "step: local steps of a client in a round (25: 5 epochs of 5 batches)",
        "--clients": "scaling: numbers of clients (10 to 1000)",
        "--experts": "scaling, evaluation: experts of a client (9, and 1 to 29)",
    }
    for name, what in lists.items():
        parser.add_argument(name, type=positive, nargs="+", help=what)
    parser.add_argument(
        "--measure-round",
        action="store_true",
        help="step: make a whole round, too (on a GPU always)",
    )
    parser.add_argument(
        "--images",
        type=positive,
        help="extraction: number of images (256); evaluation (30000), reading (75000): of features",
    )
    parser.add_argument(
        "--views", type=positive, default=10, help="sizes: views of a training image (10)"
    )
    parser.add_argument(
        "--repeats", type=positive, default=3, help="times that each way is taken (3)"
    )
    parser.add_argument(
        "--workers", type=natural, default=0, help="extraction: processes that decode images"
    )
    add_files(parser)


def add_files(parser: Parser) -> None:
    """Add the options about what is written, and the one of a trial."""
    parser.add_argument(
        "--small", action="store_true", help="gpu: a trial in seconds, on a CPU, too"
    )
    parser.add_argument(
        "--save",
        type=Path,
        help="also write the table to this name with .json and .md; gpu: into this folder, named "
        f"after the card ({GPU})",
    )


def run(options: Options) -> None:
    """Time a local step and a round of pFedMoAP in six ways, or other things, on this machine."""
    check_read(options, {*WHAT[options.what], "save"}, f"fpl bench {options.what}")
    lists = {name for name in LISTS if len(getattr(options, name) or []) > 1}
    wrong = sorted(lists - SEVERAL.get(options.what, set()))
    if wrong:
        raise ValueError(f"`fpl bench {options.what}` takes one value of --{', --'.join(wrong)}")
    if 1 in (options.classes or []):
        raise ValueError("--classes takes two and more: one class leaves nothing to tell apart")
    if options.what == "gpu":
        on_gpu(options.small, options.save or GPU)
        return
    if options.save:
        check_target(options.save)
    tables = steps(options) if options.what == "step" else [measure(options)]
    for table in tables:
        pages = markdown(table, options.what)
        if options.save:
            save(table, pages, options.save)
    say(*pages[""].split("\n"))
    if options.save and options.what == "scaling" and len(table) > 1:
        from fpl.experiments import plots

        plots.save(plots.growth(table), options.save, ["png"], Path())


def on_gpu(small: bool, folder: Path) -> None:
    """Measure what only a GPU can tell, and write a JSON file and a page after every part.

    Raises ValueError without a GPU, but for a trial.
    """
    from fpl.bench import gpu, verdicts
    from fpl.data.files import check_writable
    from fpl.experiments.cache import device

    if device() == "cpu" and not small:
        raise ValueError("PyTorch finds no GPU here: run this where there is one, or add --small")
    check_writable(folder)
    for report in gpu.reports(gpu.small() if small else gpu.Sizes()):
        page = verdicts.page(report)
        name = verdicts.file_name(report["versions"]["card"]) + "-small" * small
        write(folder / f"{name}.json", json.dumps(report, indent=2))
        write(folder / f"{name}.md", page)
    say(*page.split("\n"), f"written to {folder / name}.json and .md")


def write(path: Path, text: str) -> None:
    """Write a file of text, or none."""
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n")


def markdown(table: pd.DataFrame, what: str) -> dict[str, str]:
    """Return the table as text, by what its file's name ends in."""
    if what == "step":
        from fpl.bench import step

        summary = step.summary(table)
        return {"": f"{step.shown(table)}\n\n{summary}", "_summary": summary}
    digits = ".6g" if what in ("sizes", "scaling") else ".4g"
    return {"": table.to_markdown(index=False, floatfmt=digits)}


def save(table: pd.DataFrame, pages: dict[str, str], place: Path) -> None:
    """Write the table as JSON and as text."""
    lines = table.astype(object).where(table.notna(), None).to_dict("records")
    # pandas' own JSON would round 1e-15 to 0
    write(place.with_suffix(".json"), json.dumps(lines, indent=2))
    for ending, text in pages.items():
        write(place.with_name(f"{place.name}{ending}.md"), text)


def first(values: list[T] | None, default: T) -> T:
    """Return the one value of an option, or the default."""
    return values[0] if values else default


def steps(options: Options) -> Iterator[pd.DataFrame]:
    """Measure a step in six ways, for every combination of the options; the lines so far."""
    from fpl.bench import step

    models = options.model or [MODEL]
    every = itertools.product(models, options.classes or [102], options.batch or [16])
    cases = [step.Case(*values, steps=first(options.steps, 25)) for values in every]
    return step.tables(cases, options.repeats, options.measure_round)


def measure(options: Options) -> pd.DataFrame:
    """Measure everything else."""
    from fpl.bench import features, scaling, step
    from fpl.experiments.cache import device

    batch = first(options.batch, 16)
    model = first(options.model, MODEL)
    if options.what == "sizes":
        return features.sizes(options.views)
    if options.what == "reading":
        return features.read(options.images or 75_000, options.repeats)
    if options.what == "extraction":
        batch = first(options.batch, 256 if device() == "cuda" else 64)
        clip = step.load_model(model, options.weights)
        images = options.images or 256
        return features.extract(clip, images, batch, options.workers, options.repeats)
    if options.what == "scaling":
        model = first(options.model, f"local-dir:{ROOT / 'data' / 'demo_clip'}")
        usual = scaling.GROWTH
        growth = {what: getattr(options, what) or usual[what] for what in usual}
        clip = step.load_model(model)
        del clip.model.visual  # a round does not need the image tower
        return scaling.table(clip, growth, batch)
    clip = step.load_model(model)
    if options.what == "profile":
        return step.profile(step.Case(model, first(options.classes, 102), batch, steps=1), clip)
    images = options.images or 30_000
    return scaling.evaluation(clip, images, first(options.classes, 101), first(options.experts, 9))
