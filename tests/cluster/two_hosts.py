"""Promise: two machines that share nothing but a network make the tables of one.

Two network namespaces stand for the machines: the caller and the scheduler on one, the workers on
the other, each in a folder of its own. Needs root and `ip`; called by `make test-cluster`.
"""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import DATA, PARAMS, ROOT

from fpl.experiments import records, runner

HERE, THERE = "10.77.0.1", "10.77.0.2"
PORT = "8786"
EXPERIMENTS = [PARAMS.experiment(row, seed) for row in ("promptfl", "pfedmoap") for seed in (1, 2)]
CALLER = f"""
import sys
from helpers import BACKBONE, DATA, PARAMS
from fpl.data import encoders, extraction
from fpl.data.manifest import read_manifest
from fpl.experiments import cluster, runner
from fpl.experiments.runner import Asked

with cluster.connected("tcp://{HERE}:{PORT}") as client, client.as_current():
    away = cluster.Encoder(client, BACKBONE)
    images = read_manifest(DATA.folder / "manifest.csv")
    how = extraction.Options(elsewhere=away)
    extraction.extract(images, encoders.load(BACKBONE.name), DATA.features, options=how)
rows = [(row, seed) for row in ("promptfl", "pfedmoap") for seed in (1, 2)]
experiments = [PARAMS.experiment(*of) for of in rows]
runner.sweep(experiments, asked=Asked(cluster="tcp://{HERE}:{PORT}"))
"""


def ip(*words):
    subprocess.run(["ip", *words], check=True)


@pytest.fixture
def hosts():
    """Two hosts with a cable between them."""
    for name in ("fpl_here", "fpl_there"):
        ip("netns", "add", name)
    try:
        ip("link", "add", "fpl0", "netns", "fpl_here", "type", "veth", "peer", "name", "fpl1")
        ip("link", "set", "fpl1", "netns", "fpl_there")
        for host, card, address in (("fpl_here", "fpl0", HERE), ("fpl_there", "fpl1", THERE)):
            ip("-n", host, "addr", "add", f"{address}/24", "dev", card)
            ip("-n", host, "link", "set", card, "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield
    finally:
        for name in ("fpl_here", "fpl_there"):
            ip("netns", "del", name)


def on(host, folder, *arguments):
    """Start Python on a host, in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    settings = {"PYTHONPATH": paths, "FPL_STORE": str(folder / "store"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        ["ip", "netns", "exec", host, sys.executable, *arguments],
        cwd=folder,
        env=os.environ | settings,
        start_new_session=True,
    )


def test_the_caller_has_what_workers_on_another_host_made(hosts, here, tmp_path):
    features = DATA.features.read_bytes()
    shutil.rmtree(records.RECORDS, ignore_errors=True)
    runner.sweep(EXPERIMENTS, jobs=1)
    want = {path.name: path.read_bytes() for path in records.RECORDS.iterdir()}
    shutil.rmtree(records.RECORDS)
    DATA.features.unlink()
    options = ("--no-nanny", "--nthreads", "1", "--no-dashboard", "--host", THERE)
    address = f"tcp://{HERE}:{PORT}"
    running = [
        on("fpl_here", here, "-m", "dask", "scheduler", "--host", HERE, "--no-dashboard"),
        on("fpl_there", tmp_path / "one", "-m", "dask", "worker", address, *options),
        on("fpl_there", tmp_path / "two", "-m", "dask", "worker", address, *options),
    ]
    try:
        caller = on("fpl_here", here, "-c", CALLER)
        running.append(caller)
        assert caller.wait(300) == 0
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        time.sleep(0.2)  # until the hosts are free
    assert {path.name: path.read_bytes() for path in records.RECORDS.iterdir()} == want
    assert DATA.features.read_bytes() == features
    assert len([*(tmp_path / "one" / "store" / "files").iterdir()]) == 3
