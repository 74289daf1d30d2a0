"""A Dask scheduler and workers as processes of their own, each with a folder and a store."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from helpers import ROOT

QUIET = {"DASK_DISTRIBUTED__WORKER__DAEMON": "False", "OMP_NUM_THREADS": "1"}


class Cluster:
    """Processes that end with the block; address: of the scheduler."""

    def __init__(self, folder):
        self.folder, self.running = folder, []
        scheduler = self.start("scheduler", "--port", "0", "--host", "127.0.0.1", "--no-dashboard")
        self.address = self.read(scheduler, r"Scheduler at:\s+(tcp://\S+)")

    def start(self, kind, *options, folder=None, **environment):
        """Start a process of Dask; what it says goes to a file."""
        here = folder or self.folder
        here.mkdir(parents=True, exist_ok=True)
        log = (self.folder / f"{len(self.running)}.log").open("w+")
        process = subprocess.Popen(
            [sys.executable, "-m", "dask", kind, *options],
            cwd=here,
            env={**os.environ, "PYTHONPATH": str(ROOT), **QUIET, **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        process.log = log
        self.running.append(process)
        return process

    def worker(self, name, **environment):
        """Start a worker without a nanny, which would start it again, and return it."""
        folder = self.folder / name
        environment = {"FPL_STORE": str(folder / "store")} | environment
        options = ("--no-nanny", "--nthreads", "1", "--no-dashboard", "--name", name)
        process = self.start("worker", self.address, *options, folder=folder, **environment)
        self.read(process, r"Registered to:\s+(tcp://\S+)")
        return process

    def read(self, process, pattern, most=120):
        """Wait until a process has said something, and return it."""
        end = time.monotonic() + most
        while time.monotonic() < end and process.poll() is None:
            process.log.flush()
            text = Path(process.log.name).read_text()
            found = re.search(pattern, text)
            if found:
                return found[1]
            time.sleep(0.05)
        raise AssertionError(Path(process.log.name).read_text())


@contextlib.contextmanager
def cluster(folder):
    """Give a scheduler without workers; nothing of it is left afterwards."""
    made = Cluster(folder)
    try:
        yield made
    finally:
        for process in reversed(made.running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.log.close()
