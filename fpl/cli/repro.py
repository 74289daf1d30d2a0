"""fpl repro: the whole pipeline."""

import os
import subprocess
import sys
from pathlib import Path

from fpl.cli import compare
from fpl.cli.options import Options, Parser
from fpl.data.files import ROOT, file_lock


def add(parser: Parser) -> None:
    """Add the options."""
    parser.add_argument("dvc", nargs="*", help="passed on to dvc repro")


def run(options: Options) -> None:
    """Run the DVC pipeline, then `fpl compare` where results are expected, which is in the demo.

    One at a time in a folder; what a killed one left half written is removed.
    """
    with file_lock("results/.repro.lock", waiting) as lock:
        for path in (Path(".dvc/tmp/rwlock"), Path("dvc.lock")):
            if path.exists() and not readable(path):  # DVC empties them before it writes
                path.unlink()
        here = str(Path(sys.executable).parent)  # the stages call fpl
        places = os.pathsep.join([here, os.environ.get("PATH", "")])
        environment = {**os.environ, "PATH": places, "DVC_NO_ANALYTICS": "1"}
        command = [sys.executable, "-m", "dvc", "repro", *options.dvc]
        code = subprocess.run(command, env=environment, pass_fds=[lock]).returncode
    if code:
        sys.exit(code)
    if Path("results/expected").exists() or Path.cwd() == ROOT:
        compare.run(options)


def waiting() -> None:
    """Say that another process holds the lock."""
    message = "another fpl is at work in this folder: waiting until it has finished"
    print(message, file=sys.stderr, flush=True)


def readable(path: Path) -> bool:
    """Return whether a YAML or JSON file of DVC's is whole enough to be a mapping."""
    import yaml

    try:
        return isinstance(yaml.safe_load(path.read_text()), dict)
    except yaml.YAMLError:
        return False
