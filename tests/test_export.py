"""Promise: a classifier that is handed on gives the client's logits, and has no pickle in it.

It is read with safetensors or torch.export alone.
"""

import dataclasses
import io
import json
import pickletools
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, refuses
from helpers.tiny import NAMES, make
from safetensors import safe_open

from fpl import cli
from fpl.experiments import export, keep, predict
from fpl.experiments.metrics import NO_CLASS
from fpl.experiments.settings import ROWS
from fpl.methods import PromptFL
from fpl.prompts import PromptTree
from fpl.rounds import Setup, Training, run_rounds

RUN = Training(rounds=3, local_epochs=1, batch_size=4, lr=0.05, gate_lr=0.05, participation=0.67)
MADE_OF = {"model": "tiny", "architecture": "ab", "weights": "cd", "transform": "Resize(32)"}
PATCHES = {row for row, kind in ROWS.items() if kind.inputs == "patches"}
LINEAR = {row for row, kind in ROWS.items() if kind.logits is PromptFL.logits}


def learn(method, clip, clients):
    """Return what a run of the tiny CLIP learnt."""
    text = PromptTree(clip, NAMES, n_ctx=method.n_ctx)
    training = dataclasses.replace(RUN, **method.training)
    setup = Setup(method, text, clients, training)
    *_, last = run_rounds(setup)
    named = dataclasses.replace(clip, provenance=MADE_OF)
    return predict.Model(keep.of_run(setup, last, named, "abcdef"), named)


def images(b, seed=0):
    return F.normalize(torch.randn(b, 32, generator=torch.Generator().manual_seed(seed)), dim=-1)


def of_file(path):
    """Return what gives logits, and what is said beside it, with no help of this package."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            weight, scale = file.get_tensor("weight"), file.get_tensor("logit_scale")
            told = json.loads(file.metadata()["fpl"])
            return lambda x: scale * x @ weight.T, told
    told = {"fpl.json": ""}
    program = torch.export.load(path, extra_files=told)
    return program.module(), json.loads(told["fpl.json"])


def is_pickle(content):
    """Say whether bytes are a pickle, or an archive as torch.save writes it around one."""
    try:
        return content.startswith(b"PK\x03\x04") or bool([*pickletools.genops(content)])
    except Exception:  # the reader has many for what is none
        return False


def test_a_pickle_would_be_seen():
    archive = io.BytesIO()
    torch.save(torch.zeros(2), archive)
    assert is_pickle(archive.getvalue())
    with zipfile.ZipFile(archive) as inner:
        assert any(is_pickle(inner.read(name)) for name in inner.namelist())


@pytest.mark.parametrize("row", sorted({*ROWS} - PATCHES))
def test_the_file_gives_the_logits_of_the_client(row, clip, clients, tmp_path):
    model = learn(make(ROWS[row]), clip, clients)
    path = export.export(model, 4, tmp_path / "of.4")
    assert path == tmp_path / f"of.4{'.safetensors' if row in LINEAR else '.pt2'}"
    classify, told = of_file(path)
    for b in (1, 3, 600):
        wanted = model.classifier(4).logits(images(b))
        torch.testing.assert_close(classify(images(b)), wanted, atol=1e-5, rtol=0)
    assert told.pop("classes") == [*NAMES, *[NO_CLASS] * (wanted.shape[1] - len(NAMES))]
    assert told == {**MADE_OF, "method": ROWS[row].title, "client": 4}
    if row not in LINEAR:
        with zipfile.ZipFile(path) as archive:
            parts = [archive.read(name) for name in archive.namelist()]
        assert len(parts) > 5 and not any(map(is_pickle, parts))


@pytest.mark.parametrize("row", sorted(PATCHES))
def test_what_torch_cannot_follow_is_refused_and_leaves_nothing(row, clip, clients, tmp_path):
    """The transport plan is iterated until it moves little, which only the numbers say."""
    model = learn(make(ROWS[row]), clip, clients)
    words = [ROWS[row].title, "cannot follow how it classifies", "fpl predict"]
    refuses(lambda: export.export(model, 0, tmp_path / "x"), words)
    assert not [*tmp_path.iterdir()]


def test_a_client_is_meant_as_for_prediction(clip, clients, tmp_path):
    model = learn(make(PromptFL), clip, clients)
    for client in ("c", "new", np.int64(2)):
        classify, told = of_file(export.export(model, client, tmp_path / str(client)))
        assert told["client"] == client
        wanted = model.classifier(client).logits(images(2))
        assert torch.allclose(classify(images(2)), wanted, atol=1e-5)
    refuses(lambda: export.export(model, 6, tmp_path / "x"), ["no client 6", "0 to 5, and new"])


def test_a_file_has_the_ending_of_its_kind(clip, clients, tmp_path):
    for row, right, wrong in (
        ("promptfl", "safetensors", "pt2"),
        ("ridge_own", "pt2", "safetensors"),
    ):
        model = learn(make(ROWS[row]), clip, clients)
        name = tmp_path / f"x.{right}"
        assert export.export(model, 0, name) == name
        for name in (f"x.{wrong}", "x.txt", "x.h5"):
            refuses(lambda m=model, n=name: export.export(m, 0, n), [f"NAME.{right}", name])


def test_the_same_call_writes_the_same_numbers(clip, clients, tmp_path):
    model = learn(make(PromptFL), clip, clients)
    one, two = (export.export(model, 2, tmp_path / name).read_bytes() for name in "ab")
    assert one == two


# The command


@pytest.fixture
def run(clip, clients, tmp_path, monkeypatch):
    """Standing where a run has kept what it learnt, of the tiny CLIP."""
    monkeypatch.chdir(tmp_path)
    model = learn(make(PromptFL), clip, clients)
    keep.write(Path("results/records/promptfl-1-ab.safetensors"), model.kept)
    monkeypatch.setattr(predict, "load", lambda *asked: model.clip)
    return model


def test_the_command_writes_the_file_that_it_names(run, capsys):
    for to, path in (
        ([], "results/exports/promptfl-1-ab-client-2.safetensors"),
        (["--to", "mine/x"], "mine/x.safetensors"),
    ):
        cli.main(["export", "promptfl-1", "--client", "c", *to])
        assert capsys.readouterr().out == f"classifier: {path}\n"
        wanted = run.classifier(2).logits(images(2))
        assert torch.allclose(of_file(Path(path))[0](images(2)), wanted, atol=1e-5)


def test_the_command_refuses_in_one_sentence(run, capsys):
    for options, words in (
        (["promptfl-1", "--client", "9"], "there is no client '9'"),
        (["promptfl-2", "--client", "0"], "there is no run promptfl-2"),
        (["promptfl-1", "--client", "0", "--to", "results"], "results is a folder"),
        (["promptfl-1", "--client", "0", "--to", "x.pt2"], "NAME.safetensors"),
    ):
        with pytest.raises(SystemExit, match=f"^fpl export: .*{words}"):
            cli.main(["export", *options])
    with pytest.raises(SystemExit):
        cli.main(["export", "promptfl-1"])
    assert "--client" in capsys.readouterr().err


def test_the_command_that_adapts_is_named(clip, clients, tmp_path):
    model = learn(make(ROWS["coop"]), clip, clients)
    words = ["nothing that was trained", "`fpl predict --adapt FOLDER`"]
    refuses(lambda: export.export(model, "new", tmp_path / "x"), words)


def test_the_page_says_what_a_file_is_read_with():
    """Its five lines are those of `of_file`."""
    page = (ROOT / "docs" / "using.md").read_text()
    for line in ('file.get_tensor("logit_scale")', 'json.loads(file.metadata()["fpl"])["classes"]'):
        assert line in page
