"""Install what fpl needs into .venv with one line of progress; pip's own words go to a file.

    python tools/install.py LOG LOCK COMMAND ...

COMMAND is the call of pip that installs what a file lists, without the file. The first call is for
what builds packages that come as source, so that no later one fetches build tools that have no
hash. pip's output is written to LOG, and the end of it is shown if pip fails. On a terminal the
line overwrites itself; elsewhere there are a few lines.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

# what pip says of each package of the lock
PACKAGE = re.compile(
    r"(?:Collecting |Ignoring |Requirement already satisfied: |Processing (?:\S*/)?)"
    r"([\w.-]+?)(?=[=<>;:\s]|-\d)"
)
UNPACKING = "Installing collected packages"
ENTRY = re.compile(r"^(\S+)==(?:.*\\\n)*.*\n", re.MULTILINE)  # of the lock: a version, its hashes
BUILDERS = ("packaging", "setuptools", "wheel")
TAIL = 30  # lines of pip's output that are shown when it fails


class Progress:
    """One line that says how many packages of the lock pip is through with, and the last one."""

    def __init__(self, total: int, screen: TextIO):
        self.total, self.screen = total, screen
        self.done, self.shown = 0, 0
        self.terminal = screen.isatty()

    def read(self, line: str) -> None:
        """Take in a line of pip's output."""
        package = PACKAGE.match(line)
        if package:
            self.done = min(self.done + 1, self.total)
            self.show(f"{self.done} of {self.total} packages: {package[1]}", self.quarter())
        elif line.startswith(UNPACKING):
            self.show("all packages are here, unpacking them (about a minute)", worth_a_line=True)

    def quarter(self) -> bool:
        """Whether another quarter of the packages is done since a line was last printed."""
        return 4 * self.done // self.total > 4 * self.shown // self.total

    def show(self, text: str, worth_a_line: bool) -> None:
        if self.terminal:
            self.screen.write(f"\r\033[K{text:.78}")
        elif worth_a_line:
            self.screen.write(f"{text}\n")
            self.shown = self.done
        self.screen.flush()

    def end(self, text: str) -> None:
        start = "\r\033[K" if self.terminal else ""
        self.screen.write(f"{start}{text}\n")
        self.screen.flush()


def install(log: Path, lock: Path, command: list[str], screen: TextIO) -> int:
    """Run pip, once for the builders and once for the whole lock, and return its exit status."""
    entries = [*ENTRY.finditer(lock.read_text())]
    builders = log.with_name("build.txt")
    builders.write_text("".join(entry[0] for entry in entries if entry[1] in BUILDERS))
    progress = Progress(max(len(entries), 1), screen)
    lines: list[str] = []
    with log.open("w") as file:

        def listen(line: str) -> None:
            file.write(line)
            lines.append(line)

        def follow(line: str) -> None:
            listen(line)
            progress.read(line)

        status = 0
        if builders.stat().st_size:
            status = call([*command, "-r", str(builders)], listen)
        status = status or call([*command, "-r", str(lock)], follow)
    if status:
        progress.end(f"pip failed. The end of what it said, all of which is in {log}:")
        screen.write("".join(lines[-TAIL:]))
    else:
        progress.end(f"installed; pip's own words are in {log}")
    return status


def call(command: list[str], listen: Callable[[str], None]) -> int:
    """Run pip once, give each line of its output to `listen`, and return its exit status."""
    pip = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    for line in pip.stdout or []:
        listen(line)
    return pip.wait()


if __name__ == "__main__":
    log, lock, *command = sys.argv[1:]
    sys.exit(install(Path(log), Path(lock), command, sys.stdout))
