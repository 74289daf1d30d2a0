"""Promise: a run can be followed while it goes, by whoever has DVCLive, and needs it not."""

import contextlib
import math
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
from helpers import PARAMS, ROOT, refuses

from fpl import cli, rounds
from fpl.experiments import live, records, runner
from fpl.experiments.runner import Asked


class Live:
    """What DVCLive's class of that name does, as far as it is used: https://dvc.org/doc/dvclive."""

    logs = []

    def __init__(self, folder, **options):
        self.folder, self.options = folder, options
        self.params, self.steps, self.now = {}, [], {}
        self.logs.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *how):
        self.ended = how

    def log_params(self, params):
        self.params |= params

    def log_metric(self, name, value):
        self.now[name] = value

    def next_step(self):
        self.steps.append(self.now)
        self.now = {}


@pytest.fixture
def installed(monkeypatch):
    """DVCLive is there."""
    module = ModuleType("dvclive")
    module.Live = Live
    monkeypatch.setitem(sys.modules, "dvclive", module)
    monkeypatch.setattr(Live, "logs", [])
    return Live.logs


def test_every_round_is_logged_as_the_record_says_it(here, installed):
    experiment = PARAMS.experiment("promptfl", 1, rounds=3)
    with live.followed(experiment, Asked(fresh=True)) as asked:
        (path,) = runner.sweep([experiment], asked=asked)
    (log,) = installed
    assert log.folder == "results/live/promptfl-1" and log.params == experiment.settings()
    assert log.ended == (None, None, None)
    rounds = records.read(path)["rounds"]
    assert len(log.steps) == len(rounds) == 3
    for step, line in zip(log.steps, rounds, strict=True):
        mean = 100 * math.fsum(line["accuracy"]) / 4
        assert step["accuracy/mean"] == pytest.approx(mean)
        assert step["accuracy/worst"] == 100 * min(line["accuracy"])
        assert step["loss"] == line["loss"] and step["sent"] == sum(line["up"])


def test_what_learns_nothing_has_no_loss(here, installed):
    experiment = PARAMS.experiment("majority", 1)
    with live.followed(experiment, Asked(fresh=True)) as asked:
        runner.sweep([experiment], asked=asked)
    assert [[*step] for step in installed[0].steps] == [
        ["accuracy/mean", "accuracy/worst", "sent", "received"]
    ]


def stopped_after_a_round(experiment):
    """Begin a run whose second round leaves no checkpoint."""

    class Stop(Exception):
        pass

    def stop(line):
        if line["round"] == 1:
            raise Stop

    with pytest.raises(Stop):
        runner.sweep([experiment], asked=Asked(every=0, follow=stop))


def test_a_run_that_goes_on_has_whole_curves(here, installed):
    experiment = PARAMS.experiment("promptfl", 2, rounds=3)
    stopped_after_a_round(experiment)
    with live.followed(experiment, Asked()) as asked:
        (path,) = runner.sweep([experiment], asked=asked)
    losses = [line["loss"] for line in records.read(path)["rounds"]]
    assert [step["loss"] for step in installed[-1].steps] == losses


def test_the_command_goes_on_from_a_checkpoint_and_makes_a_run_again_that_is_made(
    here, installed, monkeypatch
):
    experiment = PARAMS.experiment("promptfl", 4, rounds=3)
    monkeypatch.setattr("fpl.cli.run.read_settings", lambda options: PARAMS)
    stopped_after_a_round(experiment)
    trained = []
    whole = rounds.train_round
    monkeypatch.setattr(rounds, "train_round", lambda *a: trained.append(a) or whole(*a))
    for new in (2, 3):  # those that were left, and all of them
        cli.main(["run", "promptfl", "seed=4", "rounds=3", "--live"])
        assert len(trained) == new and len(installed[-1].steps) == 3
        trained.clear()


def test_without_dvclive_a_sentence_says_what_to_install(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "dvclive", None)
    experiment = PARAMS.experiment("promptfl", 1)
    refuses(lambda: live.followed(experiment, Asked()).__enter__(), ["DVCLive", "pip install"])
    assert cli.parser().parse_args(["run", "promptfl", "--live"]).live


class Tracker(ModuleType):
    """What MLflow and W&B have of what the snippets call: runs by name, with settings and lines."""

    def __init__(self, name):
        super().__init__(name)
        self.runs = {}

    @contextlib.contextmanager
    def start_run(self, run_name):
        self.now = self.runs.setdefault(run_name, SimpleNamespace(config=None, lines={}))
        yield

    def log_params(self, settings):
        self.now.config = settings

    def log_metrics(self, metrics, step):
        self.now.lines[step] = metrics

    @contextlib.contextmanager
    def init(self, project, name, config):
        with self.start_run(name):
            self.log_params(config)
            yield SimpleNamespace(log=self.log_metrics)


@pytest.mark.parametrize("tracker", ["mlflow", "wandb"])
def test_the_snippet_of_the_docs_hands_every_record_over(tracker, here, monkeypatch):
    paths = runner.sweep([PARAMS.experiment(row, 1) for row in ("promptfl", "majority")])
    monkeypatch.setitem(sys.modules, tracker, Tracker(tracker))
    page = (ROOT / "docs" / "running.md").read_text()
    (code,) = [c for c in re.findall("```python\n(.*?)```", page, re.S) if f"import {tracker}" in c]
    exec(code, {})
    found = sys.modules[tracker].runs
    for path in paths:
        record = records.read(path)
        assert found[path.stem].config == record["settings"]
        assert [*found[path.stem].lines] == [line["round"] for line in record["rounds"]]
        last = found[path.stem].lines[record["rounds"][-1]["round"]]
        assert last == live.metrics(record["rounds"][-1])
