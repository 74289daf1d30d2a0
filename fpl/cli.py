"""The command line: `fpl COMMAND --help` says what each command takes. Heavy libraries load only where they are used."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from fpl.data.files import ROOT, atomic_write, file_lock


def features(options: argparse.Namespace) -> None:
    """Run the frozen image tower over the images once (extract); or export, import and verify a pack of what it made.

    A pack is one file with all that the tables need: features, labels, class names, split, domain and provenance. Whoever imports
    it needs no images, but the weights of the text tower, which are not in it.
    """
    takes_file = options.action != "extract"
    if takes_file != (options.file is not None):
        needs = "needs the name of a pack" if takes_file else f"takes no file ({options.file}): params.yaml says where it goes"
        raise ValueError(f"`fpl features {options.action}` {needs}")
    {"extract": extract, "export": export, "import": unpack, "verify": verify}[options.action](options)


def extract(options: argparse.Namespace) -> None:
    """Draw the demo images if needed, and make the features files that are asked for and not there."""
    from fpl.experiments import settings

    params = settings.read(options.params, options.set)
    if options.all:
        for name, contents in params.contents().items():
            extract_of(params.source(name), options, contents)
    else:
        extract_of(params.source(options.on), options, {"patches"} if options.patches else set())


def extract_of(source, options: argparse.Namespace, contents: set[str]) -> None:
    import torch

    from fpl.data import datasets, encoders, world
    from fpl.data import features as cache
    from fpl.experiments import values
    from fpl.experiments.cache import device

    data = source.data
    values.check_choice(data.name, [*world.WORLDS, "own", *datasets.DATASETS], "data set")
    if data.name in world.WORLDS:
        listed = world.make(data.folder, data.seed, data.train_per_class, data.test_per_class, data.name)
    else:
        listed = datasets.prepare(data.name, Path(data.root), data.layout or None, data.manifest)
    manifest = cache.read_manifest(listed)
    loaded = encoders.load(
        source.backbone.name, source.backbone.weights or None, device(), preprocessing=source.backbone.preprocessing
    )
    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    workers = min(cores if gpus else cores // 4, 8) if options.workers is None else options.workers
    number = data.views if options.views is None else options.views
    views = cache.Views(number) if number else None
    for content in ["feats"] + ["patches"] * ("patches" in contents) + ["views"] * (views is not None):
        path = cache.file_of(data.features, content)
        made, skipped = cache.header(path)
        skip_bad = options.skip_bad and content == "feats"  # patches and views are of the same images as those
        asked = cache.provenance(manifest.without(skipped) if skip_bad else manifest, loaded, content, views)
        if options.fresh or not made.items() >= asked.items():
            others = [f"cuda:{i}" for i in range(1, gpus)]
            cache.extract(manifest, loaded, path, content, views=views, workers=workers, devices=others, skip_bad=skip_bad)
            _, skipped = cache.header(path)
        print(f"features: {path}" + (f", without {len(skipped)} images that cannot be read" if skipped else ""))
        manifest = manifest.without(skipped)


def files_of(options: argparse.Namespace):
    """The settings, and content -> where they look for it."""
    from fpl.data import features as cache
    from fpl.experiments import settings

    params = settings.read(options.params, options.set)
    return params, {content: cache.file_of(params.data.features, content) for content in cache.CONTENT}


def export(options: argparse.Namespace) -> None:
    from fpl.data import pack

    params, files = files_of(options)
    described(pack.export(files, params.data.name, options.file))


def unpack(options: argparse.Namespace) -> None:
    from fpl.data import pack

    params, files = files_of(options)
    for path, written in pack.unpack(options.file, files, params.data.name, params.backbone.name, options.force).items():
        print(f"features: {path}" + ("" if written else ", which was there already"))


def verify(options: argparse.Namespace) -> None:
    from fpl.data import pack

    described(pack.verify(options.file))


def described(words: dict[str, str]) -> None:
    for what, value in words.items():
        print(f"{what + ':':10}{value}")


def data(options: argparse.Namespace) -> None:
    """List the data sets, fetch one, or check what is there and what is missing."""
    from fpl.data import datasets, fetch

    if options.what == "list":
        print(datasets.overview(options.root).to_markdown(index=False))
        return
    left = []
    if options.what == "fetch":
        print(f"terms of use: {fetch.terms(options.name)}", flush=True)
        left = fetch.fetch(options.name, options.root)
    table = datasets.checklist(options.name, options.root)
    if options.what == "check" and (table["todo"] != "").any() and options.name != "own":
        left = fetch.by_hand(options.name, options.root)
    print("\n".join([table.to_markdown(index=False), *left]))


def run(options: argparse.Namespace) -> None:
    """Make one run (or find its record) and print the accuracy after the last round."""
    from fpl.experiments import records, settings, stats, values
    from fpl.experiments import runner as runs

    params = settings.read(options.params, options.set)
    changes = {key: values.plain(value, key) for key, value in assignments(options.changes).items()}
    seed = values.number(changes.pop("seed", params.seeds[0]), "int", "seed")
    experiment = params.experiment(options.method, int(seed), options.on, **changes)
    (path,) = runs.sweep([experiment], fresh=options.fresh)
    accuracy = stats.by_seed(records.frame([path])).iloc[0]
    print(f"{options.method}: {100 * accuracy:.2f} % after the last round, mean over clients; record: {path}")


def assignments(texts: Sequence[str]) -> dict[str, str]:
    """name=value, by name."""
    pairs = [text.partition("=") for text in texts]
    for text, (_, equals, _) in zip(texts, pairs, strict=True):
        if not equals:
            raise ValueError(f"{text!r} is not of the form name=value")
    return {key: value for key, _, value in pairs}


def sweep(options: argparse.Namespace) -> None:
    """Make the missing runs of tables (all of params.yaml), or of a method with every combination of some values."""
    import itertools

    from fpl.experiments import records, settings, tables, values
    from fpl.experiments import runner as runs

    params = settings.read(options.params, options.set)
    method, *changes = options.what or [""]
    if method not in settings.ROWS:
        names = [values.check_choice(name, params.tables, "table or method") for name in options.what] or list(params.tables)
        runs.tables(params, names, options.jobs, options.fresh)
        return
    lists = {key: values.several(value, key) for key, value in assignments(changes).items()}
    seeds = [int(values.number(seed, "int", "seed")) for seed in lists.pop("seed", params.seeds)]
    grid = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    experiments = [params.experiment(method, seed, options.on, **values) for values in grid for seed in seeds]
    paths = runs.sweep(experiments, options.jobs, options.fresh)
    if options.name:
        records.save_index(options.name, paths, [method] * len(paths), params.results)
    frame = records.frame(paths)
    print(tables.grid(frame, [*lists] or ["method"]).reset_index().to_markdown(index=False))


def notebook(options: argparse.Namespace) -> None:
    """Execute a notebook with papermill and keep the executed copy under results/notebooks."""
    from fpl.experiments import notebook as books
    from fpl.experiments import values

    values = {name: values.plain(value, name) for name, value in options.parameter or []}
    for source in options.source:
        books.execute(source, books.EXECUTED / source.name, values)


def report(options: argparse.Namespace) -> None:
    """Build the pages of results/report from the executed notebooks."""
    from fpl.experiments import report as pages

    print(f"report: {pages.build()}")


def compare(options: argparse.Namespace) -> None:
    """Compare the fresh tables with results/expected and fail when a cell is outside its tolerance."""
    from fpl.experiments import expected as check
    from fpl.experiments import tables

    cells = check.all_cells(tables.TABLES)
    print(cells.round(2).to_markdown(index=False))
    wrong = int((cells["verdict"] != "same").sum())
    print(f"\n{len(cells) - wrong} of {len(cells)} cells are the expected ones within their tolerance, {wrong} are not.")
    for what, where in (("tables", "results/tables"), ("figures", "results/figures"), ("report", "results/report/index.html")):
        print(f"{what + ':':9}{where}")
    if wrong:
        raise ValueError("the results differ from those in results/expected: see the verdict column above")


def accept(options: argparse.Namespace) -> None:
    """Take over the fresh tables and figures as the expected ones (for a change that is meant to move numbers)."""
    import shutil

    from fpl.experiments import expected as check

    for source in [*Path("results/tables").glob("*.*"), *Path("results/figures").glob("*.png")]:
        with atomic_write(check.EXPECTED / source.name) as temporary:
            shutil.copyfile(source, temporary)
    text = check.with_tables(Path("README.md").read_text())
    with atomic_write("README.md") as temporary:
        temporary.write_text(text)


def bench(options: argparse.Namespace) -> None:
    """Time a local step and a round of pFedMoAP in six ways, how it grows, an evaluation, features, or list sizes of files."""
    import json

    from fpl.bench import features as bench_features
    from fpl.bench import scaling as growth_of
    from fpl.bench import step
    from fpl.data import encoders
    from fpl.experiments import cache, plots

    device, models = cache.device(), options.model or ["ViT-B-16-quickgelu"]
    classes, batches, steps = options.classes or [102], options.batch or [16], options.steps or [25]
    if options.what not in ("step", "scaling") and max(map(len, (models, classes, batches, steps))) > 1:
        raise ValueError(f"`fpl bench {options.what}` takes one value of each option")

    def scaling():
        growth = {what: getattr(options, what) or values for what, values in growth_of.GROWTH.items()}
        demo = f"{encoders.LOCAL}{ROOT / 'data' / 'demo_clip'}"
        (model,) = options.model or [demo]
        loaded = step.loaded(model, device)
        loaded.model.visual = None  # a round does not need the image tower
        return growth_of.table(loaded, growth, batches[0], device)

    def evaluation():
        loaded, experts = step.loaded(models[0], device), (options.experts or [9])[0]
        return growth_of.evaluation(loaded, options.images or 30_000, (options.classes or [101])[0], experts, device)

    made = {
        "step": lambda: step.tables(
            models, classes, batches, steps=steps[0], repeats=options.repeats, device=device, measure_round=options.measure_round
        ),
        "profile": lambda: step.profile(models[0], classes[0], batches[0], device),
        "scaling": scaling,
        "evaluation": evaluation,
        "extraction": lambda: bench_features.extraction(
            models[0],
            options.weights,
            options.images or 256,
            batches[0] if options.batch else (256 if device == "cuda" else 64),
            options.workers,
            options.repeats,
            device,
        ),
        "reading": lambda: bench_features.reading(options.images or 75_000, options.repeats),
        "sizes": lambda: bench_features.sizes(options.views),
    }[options.what]()
    for table in made if options.what == "step" else [made]:
        shown = {"": table.to_markdown(index=False, floatfmt=".6g" if options.what in ("sizes", "scaling") else ".4g")}
        if options.what == "step":
            shown = {"": f"{step.shown(table)}\n\n{step.summary(table)}", "_summary": step.summary(table)}
        if options.save:
            with atomic_write(options.save.with_suffix(".json")) as temporary:
                lines = table.astype(object).where(table.notna(), None).to_dict("records")
                temporary.write_text(json.dumps(lines, indent=2) + "\n")  # pandas' own would round 1e-15 to 0
            for kind, text in shown.items():
                with atomic_write(options.save.with_name(f"{options.save.name}{kind}.md")) as temporary:
                    temporary.write_text(text + "\n")
    print(shown[""])
    if options.save and options.what == "scaling" and len(table) > 1:
        plots.save(plots.growth(table), options.save, kinds=["png"])


def plan(options: argparse.Namespace) -> None:
    """Say what a profile needs and whether it is there, its stages and runs, and how long they take on this machine.

    With --check weights are downloaded where they are missing, and the exit status is 1 if anything else is.
    """
    from fpl.bench import plan as plans
    from fpl.experiments import cache, settings

    params = settings.read(options.params, options.set)
    needs = plans.needs(params, fetch=options.check)
    for table in (needs.drop(columns="todo"), plans.disk(params)):
        print(table.to_markdown(index=False, floatfmt=".3g"), end="\n\n")
    device = cache.device()
    stages = plans.stages(params, plans.calibrate(params, device) if options.calibration else None)
    shown = stages if options.calibration else stages.drop(columns="hours")
    print(shown.astype(object).where(shown.notna(), None).to_markdown(index=False, floatfmt=".3g", missingval="-"))
    left = f"{(stages['number'] - stages['there']).sum()} files and runs to make"
    measured = (
        f"about {stages['hours'].sum():.1f} hours on this machine ({device})" if options.calibration else "no hours estimated"
    )
    print(f"\n{left}: {measured}, {stages['PFLOP'].sum():.3g} PFLOP of the text tower\n")
    missing = [todo for todo in needs["todo"] if todo]
    print("\n".join([*missing, f"{len(missing)} things are missing" if missing else "nothing is missing"]), flush=True)
    if options.check and missing:
        raise SystemExit(1)


def repro(options: argparse.Namespace) -> None:
    """Run the DVC pipeline, then `fpl compare` where results are expected, which is in the demo.

    One at a time in a folder; what a killed one left half written is removed.
    """
    import subprocess

    with file_lock("results/.repro.lock", waiting) as lock:
        for path in (Path(".dvc/tmp/rwlock"), Path("dvc.lock")):  # DVC empties them before it writes
            if path.exists() and not readable(path):
                path.unlink()
        here = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # the stages call fpl
        environment = {**os.environ, "PATH": here, "DVC_NO_ANALYTICS": "1"}
        code = subprocess.run([sys.executable, "-m", "dvc", "repro", *options.dvc], env=environment, pass_fds=[lock]).returncode
    if code:
        raise SystemExit(code)
    if Path("results/expected").exists() or Path.cwd() == ROOT:
        compare(options)


def waiting() -> None:
    print("another fpl is at work in this folder: waiting until it has finished", file=sys.stderr, flush=True)


def readable(path: Path) -> bool:
    """Whether a YAML or JSON file of DVC's is whole enough to be a mapping."""
    import yaml

    try:
        return isinstance(yaml.safe_load(path.read_text()), dict)
    except yaml.YAMLError:
        return False


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="fpl", description="Companion to federated prompt learning of CLIP: cached features, methods, tables."
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(command, *, params: bool = False, fresh: bool = False) -> argparse.ArgumentParser:
        text = (command.__doc__ or "").strip()
        sub = commands.add_parser(command.__name__, help=text.split("\n")[0], description=text)
        sub.set_defaults(command=command)
        if params:
            sub.add_argument("--params", type=Path, default=Path("params.yaml"), help="settings file (params.yaml)")
            example = "a setting in place of the file's, such as data.name=flowers102"
            sub.add_argument("--set", action="append", default=[], metavar="SECTION.NAME=VALUE", help=example)
            sub.add_argument(
                "--data", dest="on", default="", metavar="NAME", help="one of the file's datasets (that of its section data)"
            )
        if fresh:
            sub.add_argument("--fresh", action="store_true", help="run again even where a record exists")
        return sub

    sets = add(data)
    sets.add_argument("what", choices=("list", "fetch", "check"))
    sets.add_argument("name", nargs="?", default="", help="a data set of `fpl data list`, or own")
    sets.add_argument(
        "--root", type=Path, default=Path("data/images"), help="folder of data sets (data/images); for own, the CSV or folder"
    )
    images = add(features, params=True)
    actions = ("extract", "export", "import", "verify")
    images.add_argument("action", nargs="?", choices=actions, default="extract", help="what to do (extract)")
    images.add_argument("file", nargs="?", type=Path, help="the pack to write or read")
    images.add_argument("--workers", type=int, help="processes that decode images (with a GPU a core each, up to 8; else fewer)")
    images.add_argument("--patches", action="store_true", help="also write the file of patch features, which FedOTP reads")
    images.add_argument("--all", action="store_true", help="of every data set of the tables, all that their rows read")
    images.add_argument("--views", type=int, metavar="V", help="also write V random crops and flips of each training image")
    images.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be read")
    images.add_argument("--fresh", action="store_true", help="extract again what is there as asked for")
    images.add_argument("--force", action="store_true", help="import over other features")
    one = add(run, params=True, fresh=True)
    one.add_argument("method", help="a row of the table, such as promptfl")
    one.add_argument("changes", nargs="*", metavar="name=value", help="settings to change, such as lam=1 seed=2")
    many = add(sweep, params=True, fresh=True)
    what = "tables (all), or a method and name=values: 0,1,3 or first:last[:step], such as pfedmoap n_experts=0,1,3 lam=0:2:0.5"
    many.add_argument("what", nargs="*", metavar="TABLE | METHOD NAME=VALUES", help=what)
    many.add_argument("--name", default="", help="of a method's runs: keep them under this name, for notebooks/05_sweep.ipynb")
    many.add_argument("--jobs", type=int, help="runs at a time (the number of cores)")
    book = add(notebook)
    book.add_argument("source", type=Path, nargs="+", help="notebook(s) to execute, in this order")
    book.add_argument(
        "-p", dest="parameter", nargs=2, action="append", metavar=("NAME", "VALUE"), help="a parameter of the notebook"
    )
    add(report)
    add(compare)
    add(accept)
    speed = add(bench)
    speed.add_argument(
        "what",
        nargs="?",
        default="step",
        choices=("step", "profile", "scaling", "evaluation", "extraction", "reading", "sizes"),
        help="a local step and a round of pFedMoAP, from the released code's shape to ours (the default); where its time goes; "
        "its growth with clients, classes, steps and experts; an evaluation of one client; the extraction of features beside the "
        "bare model; a features file read into memory; the size of each data set's features",
    )
    speed.add_argument("--model", nargs="+", help="open_clip model (ViT-B-16-quickgelu; scaling: the demo's)")
    speed.add_argument("--weights", default="", help="extraction: weights as in params.yaml (random ones)")
    speed.add_argument("--classes", type=positive, nargs="+", help="step: numbers of class names (102: those of Flowers102)")
    speed.add_argument(
        "--batch", type=positive, nargs="+", help="images in a step (16), or in a pass of the bare model (64, GPU 256)"
    )
    speed.add_argument(
        "--steps", type=positive, nargs="+", help="step: local steps of a client in a round (25: 5 epochs of 5 batches)"
    )
    speed.add_argument("--clients", type=positive, nargs="+", help="scaling: numbers of clients (10 to 1000)")
    speed.add_argument("--experts", type=positive, nargs="+", help="scaling, evaluation: experts of a client (9, and 1 to 29)")
    speed.add_argument("--measure-round", action="store_true", help="step: make a whole round, too (on a GPU always)")
    speed.add_argument(
        "--images", type=positive, help="extraction: number of images (256); evaluation (30000), reading (75000): of features"
    )
    speed.add_argument("--views", type=positive, default=10, help="sizes: views of a training image (10)")
    speed.add_argument("--repeats", type=positive, default=3, help="times that each way is taken (3)")
    speed.add_argument("--workers", type=int, default=0, help="extraction: processes that decode images")
    speed.add_argument("--save", type=Path, help="also write the table to this name with .json and .md")
    ahead = add(plan, params=True)
    ahead.add_argument("--check", action="store_true", help="get weights that are missing; exit status 1 if anything else is")
    ahead.add_argument("--no-calibration", dest="calibration", action="store_false", help="measure nothing, estimate no hours")
    add(repro).add_argument("dvc", nargs="*", help="passed on to dvc repro")
    return top


def main(arguments: list[str] | None = None) -> None:
    """Run one command. What a user can mend ends in one sentence and exit status 1."""
    options = parser().parse_args(arguments)
    try:
        stage = options.command in (features, sweep, notebook, report)  # an orphan of a killed pipeline may still be at one
        with file_lock("results/.stage.lock", waiting) if stage else nullcontext():
            options.command(options)
    except (ValueError, FloatingPointError, OSError, RuntimeError) as error:
        sys.exit(f"fpl {options.command.__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; call the same command again to go on")


if __name__ == "__main__":
    main()
