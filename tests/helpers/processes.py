"""Processes of their own, forked from one in which everything is imported: that takes seconds."""

import multiprocessing
import os
import runpy
import sys
import time
from multiprocessing.connection import wait

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["helpers", "fpl.cli", "fpl.experiments.runner", "open_clip"])


class Python:
    """A process as `python ARGUMENTS` in a folder, with the interface of subprocess.Popen.

    arguments: "-c", code and what follows; or "-m", a module and what follows. It finds this
    checkout's modules, as do processes that it starts.
    """

    def __init__(self, folder, *arguments):
        self.pipes, ends = zip(*(FORKS.Pipe(duplex=False) for _ in range(2)), strict=True)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = FORKS.Process(target=be, args=(folder, arguments, environment, *ends))
        self.process.start()
        for end in ends:
            end.close()
        self.pid = self.process.pid
        self.said = {pipe: b"" for pipe in self.pipes}

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def kill(self):
        self.process.kill()

    def communicate(self, timeout=None):
        """Return what it says on stdout and stderr, once nobody holds either and it has ended."""
        end = time.monotonic() + (timeout or 3600)
        while listening := [pipe for pipe in self.pipes if not pipe.closed]:
            ready = wait(listening, max(0, end - time.monotonic()))
            if not ready:
                raise TimeoutError(f"process {self.pid} says no more in {timeout} seconds")
            for pipe in ready:
                part = os.read(pipe.fileno(), 2**16)
                self.said[pipe] += part
                if not part:
                    pipe.close()
        self.process.join(max(0, end - time.monotonic()))
        return tuple(self.said[pipe].decode() for pipe in self.pipes)


def be(folder, arguments, environment, out, err):
    """In the new process: be what `python` with these arguments is."""
    multiprocessing.set_start_method(None, force=True)  # it starts others by the default again
    for number, end in enumerate((out, err), 1):
        os.dup2(end.fileno(), number)
        end.close()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    how, what, *rest = arguments
    sys.argv = [how, *rest]
    if how == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), vars(sys.modules["__main__"]))
