"""A whole federation on one machine: three sites with folders of their own, and their processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from ruamel.yaml import YAML

from federation.protocol import Agreement, read
from federation.site import read_images
from fpl.cli import show
from fpl.data import world
from fpl.data.files import ROOT
from fpl.data.manifest import read_manifest
from fpl.experiments import stored, verbs
from fpl.prompts import PromptTree
from fpl.rounds import Setup, run_rounds
from fpl.state import Clients

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
CLIP = f"local-dir:{ROOT / 'data' / 'demo_clip'}"
SITES = ("north", "south", "west")
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


def draw_sites(folder: Path, classes: int = 9, train: int = 8, test: int = 10) -> list[str]:
    """Draw images of the demo world, deal classes to sites in turn, and return all classes.

    A site has them in FOLDER/SITE/images/train/CLASS and test/CLASS.
    """
    drawn = folder / "drawn"
    manifest = read_manifest(world.make(drawn, 1, train, test))
    chosen = manifest.classes[:: len(manifest.classes) // classes][:classes]
    for row in manifest.rows:
        if row["class"] in chosen:
            site = SITES[chosen.index(row["class"]) % len(SITES)]
            place = folder / "sites" / site / "images" / row["split"] / row["class"]
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(drawn / row["path"], place)
    shutil.rmtree(drawn)
    return chosen


def write_agreement(path: Path, **content: Any) -> None:
    """Write an agreement of these sites; content: what it says besides."""
    with path.open("w") as file:
        YAML(typ="safe").dump({"sites": [*SITES], **content}, file)


@dataclass
class Machine:
    """The processes of a federation on this machine, none of which it outlives.

    folder: of sites, server and logs. port: of the SuperLink; SuperNodes have those behind it.
    link, node, client: options of SuperLink, of SuperNodes and of the connection of `flwr run`.
    """

    folder: Path
    port: int
    link: Sequence[str] = ("--insecure",)
    node: dict[str, Sequence[str]] = field(default_factory=dict)
    client: str = "insecure = true"
    running: dict[str, subprocess.Popen] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """Of all processes."""
        home = {"FLWR_HOME": str(self.folder / "flwr"), "PYTHONPATH": str(ROOT)}
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        # each message starts a Python: compiled modules save most of its time
        inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        return {**inherited, **QUIET, **home, "PATH": path, "OMP_NUM_THREADS": "1"}

    def start(self, name: str, *command: str) -> subprocess.Popen:
        """Start a process with a log of its own."""
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        with (self.folder / "logs" / name).open("ab") as log:
            self.running[name] = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self.running[name]

    def start_link(self) -> None:
        """Start the SuperLink."""
        self.start(
            *("superlink", "flower-superlink", "--port", str(self.port), *self.link),
            "--disable-runtime-dependency-installation",
        )

    def start_site(self, site: str) -> None:
        """Start the SuperNode of a site."""
        place = self.folder / "sites" / site
        said = {"site": site, "folder": place, "images": place / "images", "clip": CLIP}
        node = self.node.get(site, ("--insecure",))
        port = self.port + 1 + SITES.index(site)
        self.start(
            *(site, "flower-supernode", "--superlink", f"127.0.0.1:{self.port}"),
            *("--port", str(port), *node),
            *("--node-config", " ".join(f'{k}="{v}"' for k, v in said.items())),
        )

    def connect(self) -> None:
        """Write how the commands of `flwr` find the SuperLink."""
        home = self.folder / "flwr"
        home.mkdir(parents=True, exist_ok=True)
        address = f'address = "127.0.0.1:{self.port}"'
        connection = f'[superlink]\ndefault = "here"\n[superlink.here]\n{address}\n{self.client}\n'
        (home / "config.toml").write_text(connection)

    def submit(self, name: str, agreement: Path, **config: Any) -> None:
        """Ask the SuperLink to run a federation."""
        self.connect()
        said = {"agreement": agreement, "folder": self.folder / name, "clip": CLIP, **config}
        quoted = {k: v if isinstance(v, float) else f'"{v}"' for k, v in said.items()}
        words = " ".join(f"{k}={v}" for k, v in quoted.items())
        done = self.start(f"run_{name}", "flwr", "run", str(HERE), "--run-config", words)
        if done.wait():
            log = (self.folder / "logs" / f"run_{name}").read_text()
            raise RuntimeError(f"the SuperLink does not take the run: {log[-2000:]}")

    def kill(self, name: str) -> None:
        """End a process and all that it has started, which may have outlived it."""
        process = self.running.pop(name)
        found = [one for one in psutil.process_iter() if session_of(one.pid) == process.pid]
        with contextlib.suppress(psutil.NoSuchProcess):
            found += psutil.Process(process.pid).children(recursive=True)
        for one in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()

    def log(self, name: str) -> str:
        """Return what a process has said so far."""
        path = self.folder / "logs" / name
        return path.read_text(errors="replace") if path.exists() else ""


def session_of(process: int) -> int:
    """Return the session of a process, 0 of one that is no longer there."""
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(process)
    return 0


@contextlib.contextmanager
def machine(folder: Path, port: int, **options: Any) -> Iterator[Machine]:
    """Give a machine, and end all its processes, sites first."""
    made = Machine(folder, port, **options)
    try:
        yield made
    finally:
        for name in reversed([*made.running]):
            made.kill(name)


def wait_for(what: str, true: Any, seconds: float = 180.0) -> None:
    """Wait until something is so. Raises TimeoutError if it does not come."""
    until = time.monotonic() + seconds
    while not true():
        if time.monotonic() > until:
            raise TimeoutError(f"{what} did not come in {seconds:g} s")
        time.sleep(0.5)


def together(sites: Sequence[Clients]) -> Clients:
    """Return the clients of all sites, in their order, as the in-process loop takes them."""
    first = torch.tensor([0] + [len(site.labels) for site in sites]).cumsum(0).tolist()
    feats, labels = (torch.cat([getattr(site, k) for site in sites]) for k in ("feats", "labels"))
    train = [site.train[0] + begin for site, begin in zip(sites, first)]
    test = [site.test[0] + begin for site, begin in zip(sites, first)]
    return Clients(feats, labels, train, test, sites[0].n_cls)


def compare(
    folder: Path,
    agreement: Agreement,
    state: Path,
    changed: Callable[[Clients], Clients] = lambda clients: clients,
) -> pd.DataFrame:
    """Return a line for each site: accuracy and bytes of this federation and of the loop.

    changed: what the loop's clients are to be.
    """
    clip = verbs.load(CLIP)
    places = [folder / "sites" / name for name in agreement.sites]
    clients = changed(together([read_images(p / "images", p, clip, agreement) for p in places]))
    text = PromptTree(clip, agreement.classes, agreement.rules.n_ctx)
    setup = Setup(agreement.rules, text, clients, agreement.run, agreement.seeds)
    *_, last = run_rounds(setup)
    tensors, header = stored.read(state)
    params = last.state.server.params
    away = max((tensors["params"][k] - v.cpu()).abs().max().item() for k, v in params.items())
    lines = []
    for i, (name, place) in enumerate(zip(agreement.sites, places)):
        said = stored.read(place / f"{agreement.key[:16]}.safetensors")[1]["accuracy"]
        at = last.participants.tolist().index(i)
        sent = [x for x in header["lines"] if (x["site"], x["kind"]) == (name, "train")][-1]
        lines.append(
            {
                "method": agreement.method,
                "site": name,
                "accuracy": said[str(last.number)],
                "of the loop": last.accuracy[i].item(),
                "up, bytes": sent["up"],
                "4 x numbers up": 4 * int(last.up[at]),
                "down, bytes": sent["down"],
                "4 x numbers down": 4 * int(last.down[at]),
                "messages up": sent["up_message"],
                "messages down": sent["down_message"],
                "prompts differ by": away,
            }
        )
    return pd.DataFrame(lines)


def finished(state: Path, rounds: int) -> bool:
    """Say whether a server has finished so many rounds."""
    return state.exists() and stored.read(state)[1]["round"] >= rounds - 1


ROUNDS = 2
LOOKS = {"n_ctx": 4}
METHODS = {"pfedmoap": {"n_experts": 2}, "promptfl": {}}


def federate(folder: Path, port: int, simulated: bool = False) -> pd.DataFrame:
    """Run the methods of the rehearsal, and return their comparison with the loop."""
    folder.mkdir(parents=True, exist_ok=True)
    classes = draw_sites(folder)
    for method, settings in METHODS.items():
        said = {"name": method, "classes": classes, "method": method, "settings": LOOKS | settings}
        training = {"rounds": ROUNDS, "local_epochs": 2}
        write_agreement(folder / f"{method}.yaml", **said, training=training)
    tables = []
    options = SIMULATED if simulated else {}
    with machine(folder, port, **options) as here:
        here.start_link()
        wait_for("the SuperLink", lambda: "startup complete" in here.log("superlink"))
        for site in () if simulated else SITES:
            here.start_site(site)
        for method in METHODS:
            path, state = folder / f"{method}.yaml", folder / method / "server.safetensors"
            here.submit(method, path, rehearsal=str(folder / "sites") if simulated else "")
            wait_for(method, lambda state=state: finished(state, ROUNDS), 600)
            agreement = read(path, verbs.load(CLIP).provenance)
            tables.append(compare(folder, agreement, state))
    return pd.concat(tables)


SIMULATED: dict[str, Any] = {
    "link": ("--insecure", "--simulation"),
    "client": f"insecure = true\noptions.num-supernodes = {len(SITES)}",
}


def main() -> None:
    """Run it all in a folder that is removed in the end, and show the table."""
    with tempfile.TemporaryDirectory() as folder:
        found = federate(Path(folder), 9400, "--simulation" in sys.argv)
    shown = found.round({"accuracy": 4, "of the loop": 4}).set_index("site").T
    show.table(shown.reset_index())
    if (found["accuracy"] != found["of the loop"]).any() or found["prompts differ by"].max() > 1e-6:
        raise SystemExit("the federation does not have the numbers of the loop")


if __name__ == "__main__":
    main()
