"""Promise: a record keeps what was said of every test image, and metrics of it are the usual ones.

They are those of the released code where that has one, of plain numpy, or counted by hand.
"""

import base64
import dataclasses
import json
import subprocess
import sys
import zlib

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import PARAMS, ROOT, refuses
from helpers.tiny import NAMES, golden, make

from fpl import rounds
from fpl.experiments import answers, assemble, metrics, plots, records, runner, stats, tables
from fpl.experiments.settings import ROWS
from fpl.prompts import PromptTree

ONE = rounds.Training(rounds=1, local_epochs=1, batch_size=4, lr=0.02, gate_lr=0.05)
GOLDEN = ["promptfl_official", "pfedmoap_official", "fedotp_official"]
GOLDEN += ["fedpgp_official", "fedpgp_official_np2"]


def framed(label, predicted, confidence=1.0, client=0):
    """Return answers as a record's are read."""
    said = {"client": client, "label": label, "predicted": predicted, "confidence": confidence}
    frame = pd.DataFrame(said)
    return frame.assign(right=frame["label"] == frame["predicted"])


def drawn(seed, images=400, classes=7, clients=3):
    """Return answers drawn at random, of which about half are right."""
    gen = np.random.default_rng(seed)
    label = gen.integers(classes, size=images)
    predicted = np.where(gen.random(images) < 0.5, label, gen.integers(classes, size=images))
    return framed(label, predicted, gen.random(images), np.sort(gen.integers(clients, size=images)))


# What is kept


@pytest.fixture(scope="module")
def said(clip, clients):
    """Return a function of the name of a row: its answers after a round."""

    def play(name):
        method = make(ROWS[name])
        text = PromptTree(clip, NAMES, n_ctx=method.n_ctx)
        training = dataclasses.replace(ONE, **method.training)
        *_, last = rounds.run_rounds(rounds.Setup(method, text, clients, training))
        return last.answers

    return play


@pytest.mark.parametrize("name", ROWS)
def test_what_every_row_says_comes_back(name, said, clients):
    told = said(name)
    packed = json.loads(json.dumps(answers.pack(told, clients)))
    frame = answers.unpack(packed)
    assert frame.groupby("client").size().tolist() == [len(index) for index in clients.test]
    for i, own in frame.groupby("client"):
        assert own["label"].tolist() == clients.labels[clients.test[i]].tolist()
        assert own["predicted"].tolist() == told[i].predicted.tolist()
        assert own["right"].tolist() == told[i].right.tolist()
        assert np.allclose(own["confidence"], told[i].confidence, atol=1 / 510 + 1e-6)


@pytest.mark.parametrize(("largest", "kind"), [(255, "|u1"), (256, "<u2"), (65536, "<u4")])
def test_numbers_of_classes_take_the_smallest_type_that_holds_them(largest, kind):
    packed = answers.squeezed(np.array([0, largest]))
    assert packed["dtype"] == kind
    assert answers.expanded(packed, 2).tolist() == [0, largest]


def test_answers_of_other_clients_or_without_a_confidence_are_not_kept(said, clients):
    told = said("zeroshot")
    turned = dataclasses.replace(clients, test=[*clients.test[1:], clients.test[0]])
    refuses(lambda: answers.pack(told, turned), ["other images", "those of the run"])
    refuses(lambda: answers.pack(told[:-1], clients), ["other images", "those of the run"])
    nan = told[0]._replace(confidence=told[0].confidence * torch.nan)
    refuses(lambda: answers.pack([nan, *told[1:]], clients), ["confidence", "[0, 1]"])


def text_of(content):
    return base64.b64encode(content).decode()


def squeezed(values, kind="|u1"):
    return {"dtype": kind, "zlib": text_of(zlib.compress(np.array(values, kind).tobytes()))}


WHOLE = {"sizes": [2, 1], **{name: squeezed([0, 1, 2]) for name in ("label", "predicted")}}
WHOLE["confidence"] = squeezed([255, 0, 51])
CUT = {"dtype": "|u1", "zlib": text_of(zlib.compress(bytes(3))[:-5])}
LONGER = {"dtype": "|u1", "zlib": text_of(zlib.compress(bytes(3)) + b"more")}
BOMB = {"dtype": "|u1", "zlib": text_of(zlib.compress(bytes(10**7)))}
DAMAGE = {
    "too few": {"label": squeezed([0, 1])},
    "too many": {"predicted": squeezed([0, 1, 2, 3])},
    "a bomb": {"predicted": BOMB},
    "cut": {"label": CUT},
    "longer": {"label": LONGER},
    "no zlib": {"label": {"dtype": "|u1", "zlib": text_of(b"abc")}},
    "no base64": {"label": {"dtype": "|u1", "zlib": "§"}},
    "no text": {"label": {"dtype": "|u1", "zlib": 3}},
    "no parts": {"label": None},
    "signed": {"label": squeezed([0, 1, 2], "<i2")},
    "surer than sure": {"confidence": squeezed([256, 0, 51], "<u2")},
    "objects": {"label": {"dtype": "|O", "zlib": ""}},
    "no type": {"label": {"dtype": ["|u1"], "zlib": ""}},
    "other sizes": {"sizes": [2, 2]},
    "no sizes": {"sizes": []},
    "sizes that add up": {"sizes": [4, -1]},
    "parts of images": {"sizes": [1.5, 1.5]},
    "sizes beyond memory": {"sizes": [10**15, 1]},
    "a number": {"sizes": 3},
    "words": {"sizes": "21"},
}


def test_what_fits_is_read():
    frame = answers.unpack(WHOLE)
    assert frame["client"].tolist() == [0, 0, 1] and frame["right"].all()
    assert frame["confidence"].tolist() == [1.0, 0.0, 0.2]


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_does_not_fit_is_refused_in_a_sentence(kind):
    with pytest.raises(records.Damaged) as error:
        answers.unpack(WHOLE | DAMAGE[kind])
    assert "--fresh" in str(error.value) and "\n" not in str(error.value)


def test_a_part_that_is_missing_is_refused():
    for name in WHOLE:
        with pytest.raises(records.Damaged, match="--fresh"):
            answers.unpack({k: v for k, v in WHOLE.items() if k != name})


# Records


def test_a_record_has_what_clients_said_after_the_last_round(alone):
    experiment = PARAMS.experiment("pfedmoap", 1)
    (path,) = runner.sweep([experiment])
    frame = answers.read(path)
    clients = assemble.make_clients(experiment, "cpu")
    *_, last = assemble.rounds_of(experiment)
    images = torch.cat(list(clients.test))
    assert frame["label"].tolist() == clients.labels[images].tolist()
    assert frame["predicted"].tolist() == torch.cat([a.predicted for a in last.answers]).tolist()
    own = frame.groupby("client")["right"].mean()
    assert own.tolist() == pytest.approx(last.accuracy.tolist(), abs=1e-6)
    names = records.read(path)["classes"]
    assert len(names) == clients.n_cls
    assert metrics.confusion(frame, names).to_numpy().sum() == len(frame)


def test_a_record_without_answers_or_with_those_of_others_is_refused(alone):
    one, other = runner.sweep([PARAMS.experiment("promptfl", 1), PARAMS.experiment("majority", 1)])
    record = records.read(one)
    wrong = records.read(other)["answers"]
    for changed in (
        {"answers": wrong},
        {"answers": WHOLE},
        {"answers": record["answers"] | {"sizes": [1, 2]}},
        {"answers": 3},
        {"classes": ["one"]},
        {"classes": record["classes"][:-1]},
        {"classes": None},
    ):
        records.seal(record | changed, one)
        with pytest.raises(records.Damaged, match=f"{one}.*--fresh"):
            answers.read(one)
    records.seal({k: v for k, v in record.items() if k != "answers"}, one)
    refuses(lambda: answers.read(one), [str(one), "before predictions were kept", "--fresh"])
    assert len(records.frame([one])), "a record of before is still read"


def test_answers_are_read_without_torch():
    code = "from fpl.experiments import answers, tables; import sys; print(*sys.modules)"
    found = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()
    assert "fpl.experiments.answers" in found and not {"torch", "torchmetrics"} & {*found}


# Metrics


@pytest.mark.parametrize("name", GOLDEN)
def test_macro_f1_is_that_of_the_released_code(name):
    z = golden(f"e2e_{name}")
    n = int(z["num_users"])
    labels = [z[f"client{i}.test_label"] for i in range(n)]
    stored = z["test_macro_f1"].flatten().tolist()
    logits = z["test_logits"].reshape(len(stored), len(labels[0]), -1)
    for number, wanted in enumerate(stored):
        truth = labels[number % n].numpy()
        found = metrics.scores(framed(truth, logits[number].argmax(-1).numpy()))
        assert 100 * found["macro_f1"].item() == pytest.approx(wanted, abs=1e-4)


def test_metrics_by_hand():
    """Class 0 has four images of which three are right, class 2 two, of which one is, 1 none.

    Class 0: precision 3/4, recall 3/4, F1 3/4. Class 2: precision 1/1, recall 1/2, F1 2/3. What is
    said of class 1 counts by what it takes from the others.
    """
    frame = framed([0, 0, 0, 0, 2, 2], [0, 0, 0, 1, 2, 0], [0.9, 0.8, 0.7, 0.3, 1.0, 0.9])
    found = metrics.per_class(frame)
    assert found.index.tolist() == [0, 2] and found["images"].tolist() == [4, 2]
    assert found["recall"].tolist() == pytest.approx([3 / 4, 1 / 2])
    assert found["f1"].tolist() == pytest.approx([3 / 4, 2 / 3])
    line = metrics.scores(frame).loc[0]
    assert line["accuracy"] == pytest.approx(4 / 6)
    assert line["macro_f1"] == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert line["worst_class"] == pytest.approx(1 / 2)
    taken = metrics.confusion(frame, ["a", "b", "c"])
    assert taken.to_numpy().tolist() == [[3, 1, 0], [0, 0, 0], [1, 0, 1]]
    assert [*taken.index] == [*taken.columns] == ["a", "b", "c"]


def test_calibration_by_hand():
    """Two bins: below a half 0.3 and 0.1, one of two right; above 1.0, 0.7, 0.7, two of three."""
    frame = framed([0] * 5, [0, 1, 0, 0, 1], [0.3, 0.1, 1.0, 0.7, 0.7])
    table = metrics.reliability(frame, bins=2)
    assert table["images"].tolist() == [2, 3]
    assert table["confidence"].tolist() == pytest.approx([0.2, 0.8])
    assert table["accuracy"].tolist() == pytest.approx([1 / 2, 2 / 3])
    assert table[["low", "high"]].to_numpy().tolist() == [[0, 0.5], [0.5, 1]]
    wanted = 2 / 5 * (0.5 - 0.2) + 3 / 5 * (0.8 - 2 / 3)
    assert metrics.ece(frame, bins=2) == pytest.approx(wanted)


def test_a_confidence_at_an_edge_is_in_the_bin_above_as_in_the_calibration_error():
    frame = framed([0, 0, 0, 1], [0, 1, 0, 1], [0.25, 0.5, 0.5, 0.75])
    table = metrics.reliability(frame, bins=4)
    assert table["images"].tolist() == [0, 1, 2, 1]
    gaps = (table["confidence"] - table["accuracy"]).abs() * table["images"]
    assert metrics.ece(frame, bins=4) == pytest.approx(gaps.sum() / 4)


def test_full_confidence_has_no_bin_of_its_own():
    frame = framed([0, 0], [0, 1], [1.0, 0.99])
    assert metrics.ece(frame) == pytest.approx(0.995 - 0.5)
    assert metrics.reliability(frame)["images"].tolist() == [0] * 14 + [2]


def plain_scores(frame):
    """The same with numpy, image by image."""
    label, said = frame["label"].to_numpy(), frame["predicted"].to_numpy()
    f1, recall = [], []
    for c in np.unique(label):
        hit = np.sum((label == c) & (said == c))
        f1.append(2 * hit / (np.sum(label == c) + np.sum(said == c)))
        recall.append(hit / np.sum(label == c))
    at = np.minimum((15 * frame["confidence"].to_numpy()).astype(int), 14)
    distance = 0.0
    for k in range(15):
        part = frame[at == k]
        if len(part):
            distance += len(part) * abs(part["confidence"].mean() - part["right"].mean())
    found = [np.mean(label == said), np.mean(f1), np.min(recall), distance / len(frame)]
    return dict(zip(["accuracy", "macro_f1", "worst_class", "ece"], found))


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_those_of_plain_numpy(seed):
    frame = drawn(seed)
    found = metrics.scores(frame)
    assert found.index.tolist() == [0, 1, 2]
    for client, own in frame.groupby("client"):
        assert found.loc[client].to_dict() == pytest.approx(plain_scores(own), abs=1e-6)
    taken = metrics.confusion(frame, [*"abcdefg"])
    counts = frame.groupby(["label", "predicted"]).size().unstack(fill_value=0)
    assert taken.to_numpy().tolist() == counts.to_numpy().tolist()
    by_class = metrics.per_class(frame)
    assert by_class["recall"].tolist() == pytest.approx(np.diag(taken) / taken.sum(axis=1))
    table = metrics.reliability(frame)
    gaps = (table["confidence"] - table["accuracy"]).abs() * table["images"]
    assert gaps.sum() / len(frame) == pytest.approx(metrics.ece(frame))
    assert table["images"].sum() == len(frame)


def test_the_worst_client_is_that_of_each_metric():
    frame = drawn(1)
    each = pd.DataFrame([plain_scores(own) for _, own in frame.groupby("client")])
    found = metrics.over_clients(metrics.scores(frame))
    assert found.loc["mean"].to_dict() == pytest.approx(each.mean().to_dict(), abs=1e-6)
    worst = {**each.min(), "ece": each["ece"].max()}
    assert found.loc["worst client"].to_dict() == pytest.approx(worst, abs=1e-6)


def test_what_is_no_class_is_wrong_and_has_a_column_of_its_own():
    """As said by rows that have more columns than classes."""
    frame = framed([0, 1, 1], [3, 1, 2])
    taken = metrics.confusion(frame, ["a", "b"])
    assert [*taken.columns] == ["a", "b", metrics.NO_CLASS]
    assert taken.to_numpy().tolist() == [[0, 0, 1], [0, 1, 1]]
    line = metrics.scores(frame).loc[0]
    assert line["accuracy"] == pytest.approx(1 / 3) and line["worst_class"] == 0
    refuses(lambda: metrics.confusion(frame, ["a"]), ["label 1", "1 classes"])


# Tables and figures


@pytest.fixture
def runs(alone):
    made = [PARAMS.experiment(row, seed) for row in ("promptfl", "majority") for seed in (1, 2)]
    return records.frame(runner.sweep(made))


def test_tables_have_metrics_with_the_interval_of_the_accuracy(runs):
    table = tables.scores(runs)
    usual = tables.table1(runs)
    assert table[["row", *tables.POINTS]].equals(usual[["row", *tables.POINTS]])
    last = stats.last_round(runs)
    for row, of_row in last.groupby("method"):
        wanted = {name: [] for name in tables.SCORES}
        for run, lines in of_row.groupby("run"):
            frame = answers.read(records.RECORDS / f"{run}.json")
            each = pd.DataFrame([plain_scores(own) for _, own in frame.groupby("client")])
            wanted["macro-F1"].append(each["macro_f1"].mean())
            wanted["worst class"].append(each["worst_class"].mean())
            wanted["worst client"].append(each["accuracy"].min())
            wanted["global"].append(lines["global"].mean())
            # kept confidences may lie on the border of two bins
            wanted["ECE"].append(metrics.scores(frame)["ece"].mean())
        for name in wanted:
            over = stats.over_seeds(wanted[name])
            for column, value in {
                name: "mean",
                f"{name} low": "low",
                f"{name} high": "high",
            }.items():
                assert table.loc[row, column] == pytest.approx(100 * over[value], abs=0.011)
    by_label = tables.scores(runs, "row")
    assert by_label["macro-F1"].tolist() == table["macro-F1"].tolist()


def test_differences_may_be_of_any_metric(runs):
    measured = tables.by_measures(tables.with_metrics(runs), {"F1": "macro_f1"})
    table = tables.differences(measured, {"one": ("promptfl, F1", "majority, F1")})
    scores = tables.scores(runs)["macro-F1"]
    wanted = scores["promptfl"] - scores["majority"]
    assert table.loc["one", "mean"] == pytest.approx(wanted, abs=0.02)


def test_a_table_of_a_record_of_before_says_what_to_do(runs):
    path = records.RECORDS / f"{runs['run'].iloc[0]}.json"
    record = records.read(path)
    del record["answers"]
    records.seal(record, path)
    refuses(lambda: tables.scores(runs), [path.name, "--fresh"])


def test_the_reliability_diagram_has_the_accuracy_and_images_of_each_bin():
    frame = drawn(2)
    table = metrics.reliability(frame)
    figure = plots.reliability(table)
    upper, lower = figure.axes
    heights = [[bar.get_height() for bar in ax.patches] for ax in (upper, lower)]
    assert heights[0] == pytest.approx((100 * table["accuracy"]).tolist())
    assert heights[1] == table["images"].tolist()
    assert f"{100 * metrics.ece(frame):.2f} %" in upper.get_title(loc="left")


def test_empty_bins_are_not_drawn():
    figure = plots.reliability(metrics.reliability(framed([0, 0], [0, 1], [0.5, 0.9])))
    assert [len(ax.patches) for ax in figure.axes] == [2, 2]


@pytest.mark.parametrize("classes", [3, 60])
def test_the_confusion_has_a_number_in_each_cell_with_images_where_there_is_room(classes):
    frame = drawn(3, classes=classes)
    taken = metrics.confusion(frame, [f"class {i}" for i in range(classes)])
    ax = plots.confusion(taken, "all").axes[0]
    written = {tuple(map(int, text.xy)): int(text.get_text()) for text in ax.texts}
    counts = {(x, y): taken.iat[y, x] for y, x in np.argwhere(taken.to_numpy())}
    assert written == (counts if classes == 3 else {})
    shades = ax.images[0].get_array()
    assert np.ma.count(shades) == len(counts) and shades.max() <= 100


def test_curves_name_the_worst_client_of_the_last_round(runs):
    one = runs[(runs["method"] == "promptfl") & (runs["seed"] == 1)]
    ax = plots.curves_of_clients(one).axes[0]
    last = one[one["round"] == one["round"].max()].set_index("client")["accuracy"]
    *each, worst, mean = ax.lines
    assert [line.get_ydata()[-1] for line in each] == pytest.approx((100 * last).tolist())
    assert worst.get_ydata()[-1] == pytest.approx(100 * last.min())
    assert f"client {last.idxmin()}," in worst.get_label()
    assert mean.get_ydata()[-1] == pytest.approx(100 * last.mean())


def test_values_side_by_side_have_a_mark_each():
    table = pd.DataFrame({"own": [80.0, 90.0], "all": [20.0, 95.0]}, ["client 0", "client 1"])
    ax = plots.side_by_side(table, "accuracy (%)").axes[0]
    marks = {line.get_label(): line.get_xdata().tolist() for line in ax.lines}
    assert marks == table.to_dict("list")
    assert [label.get_text() for label in ax.get_yticklabels()] == [*table.index]
