"""fpl repro: the whole pipeline."""

import os
import subprocess
import sys
from pathlib import Path

from fpl.cli import compare
from fpl.cli.options import Options, Parser
from fpl.cli.show import notice
from fpl.data.files import ROOT, file_lock


def add(parser: Parser) -> None:
    """Add the options."""
    parser.add_argument("dvc", nargs="*", help="passed on to dvc repro")


def run(options: Options) -> None:
    """Run the DVC pipeline, then `fpl compare` where results are expected, which is in the demo.

    One at a time in a folder; what a killed one left half written is removed.
    """
    check_data()
    with file_lock("results/.repro.lock", waiting) as lock:
        for path in (Path(".dvc/tmp/rwlock"), Path("dvc.lock")):
            if path.exists() and not readable(path):  # DVC empties them before it writes
                path.unlink()
        here = str(Path(sys.executable).parent)  # the stages call python
        places = os.pathsep.join([here, os.environ.get("PATH", "")])
        environment = {**os.environ, "PATH": places, "DVC_NO_ANALYTICS": "1"}
        command = [sys.executable, "-m", "dvc", "repro", *options.dvc]
        code = subprocess.run(command, env=environment, pass_fds=[lock]).returncode
    if code:
        sys.exit(code)
    if Path("results/expected").exists() or Path.cwd() == ROOT:
        compare.run(options)


def check_data() -> None:
    """Raise ValueError unless the settings have the data sets that the stages make."""
    from fpl.experiments import settings, values

    read = settings.read()
    pipeline = Path("dvc.yaml")
    outs = values.load(pipeline)["stages"]["features"]["outs"] if pipeline.exists() else []
    paths = [Path(path) for out in outs for path in out]
    made = {path.parent.name for path in paths if path.name == "manifest.csv"}
    missing = made - {read.source(name).data.name for name in ("", *read.datasets)}
    if missing:
        raise ValueError(
            f"the stages of {pipeline} are the demo's and make {', '.join(sorted(missing))}, which "
            f"{values.profile()} no longer has: call `fpl features`, `fpl run` and `fpl sweep` for "
            "other data, or correct its data.name"
        )


def waiting() -> None:
    """Say that another process holds the lock."""
    notice("another fpl is at work in this folder: waiting until it has finished")


def readable(path: Path) -> bool:
    """Return whether a YAML or JSON file of DVC's is whole enough to be a mapping."""
    import yaml

    try:
        return isinstance(yaml.safe_load(path.read_text()), dict)
    except yaml.YAMLError:
        return False
