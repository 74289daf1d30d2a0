"""Promise: figures and what they show of prompts and gates are what the run had.

That is its attention, its experts, its distances, and the words nearest to its prompts.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import PARAMS, refuses
from helpers.tiny import make
from matplotlib.collections import PathCollection
from scipy import stats

from fpl import rounds
from fpl.ablations import GateAlone, NoiseExperts, OwnGate
from fpl.experiments import assemble, inspect, measures, plots, tables
from fpl.methods import PFedMoAP, PromptFL
from fpl.privacy import noise_multiplier
from fpl.state import generator

# Four of six clients in a round.
MANY = rounds.Training(
    rounds=3, local_epochs=2, batch_size=4, lr=0.02, gate_lr=0.05, participation=0.67
)
SEEDS = rounds.Seeds(init=3, order=4)


@pytest.fixture(scope="module")
def learnt(text, clients):
    """The end of a run whose gates prefer some experts, and in which a client trained only once."""
    method = make(PFedMoAP)
    *_, before, last = rounds.run_rounds(rounds.Setup(method, text, clients, MANY, SEEDS))
    server = before.state.server.begin(last.number, last.participants)
    gen = torch.Generator().manual_seed(1)
    evaluated = {
        k: v + torch.randn(v.shape, generator=gen) * k.startswith("gate_")
        for k, v in last.evaluated.items()
    }
    init = method.init(text, generator(SEEDS.init, "init"))
    return inspect.Learnt(method, text, clients, init, evaluated, server, torch.arange(6))


def by_hand(learnt, client, prompts, name):
    """A[h, b, k] of one client and class, expert by expert and head by head."""
    method, p = learnt.method, {k: v[client] for k, v in learnt.evaluated.items()}
    c, e = learnt.text.names.index(name), method.d_gate // method.heads
    q = (
        learnt.clients.feats[learnt.clients.test[client]][:, :: 32 // method.d_gate]
        @ p["gate_wq"].T
        + p["gate_bq"]
    )
    texts = torch.stack([learnt.text(prompt)[c] for prompt in prompts])[:, :: 32 // method.d_gate]
    k = texts @ p["gate_wk"].T + p["gate_bk"]
    heads = [slice(h * e, (h + 1) * e) for h in range(method.heads)]
    return torch.stack([(method.gate_scale * q[:, h] @ k[:, h].T).softmax(-1) for h in heads])


@pytest.mark.parametrize("name", ["red circle", "cat"])
def test_attention_is_that_of_the_gate_on_the_prompts_that_were_downloaded(learnt, name):
    found = inspect.attention(learnt).query("`class` == @name")
    assert [*found["client"].unique()] == learnt.readers.tolist() and len(learnt.readers) > 3
    for client, lines in found.groupby("client"):
        pool = learnt.server.uploads["ctx"]
        own, *others = lines.sort_values("rank").itertuples()
        a = by_hand(
            learnt,
            client,
            [learnt.evaluated["ctx"][client], *(pool[line.expert] for line in others)],
            name,
        )
        assert own.expert == client and own.rank == 0
        assert lines["share"].tolist() == pytest.approx(a.mean((0, 1)).tolist(), abs=1e-6)
        entropy = -(a * a.log()).sum(-1).mean().item() / math.log(3)
        assert own.evenness == pytest.approx(entropy, abs=1e-5) and entropy < 0.99
    assert found.groupby("client")["share"].sum().tolist() == pytest.approx(
        [1.0] * len(learnt.readers), abs=1e-5
    )


def test_a_gate_without_a_preference_is_even(learnt):
    silent = {
        k: torch.zeros_like(v) if k in ("gate_wq", "gate_bq") else v
        for k, v in learnt.evaluated.items()
    }
    found = inspect.attention(dataclasses.replace(learnt, evaluated=silent))
    assert np.allclose(found["share"], 1 / 3) and np.allclose(found["evenness"], 1)


def test_the_gate_as_drawn_is_the_one_before_training_and_prompts_stay(learnt):
    drawn = inspect.with_gate_as_drawn(learnt).evaluated
    assert torch.equal(drawn["ctx"], learnt.evaluated["ctx"])
    assert all(torch.equal(drawn[k][4], v) for k, v in learnt.init.items() if k != "ctx")
    assert not torch.equal(drawn["gate_wq"], learnt.evaluated["gate_wq"])


def test_experts_are_the_downloaded_prompts_in_their_order(learnt):
    found = inspect.experts(learnt)
    ids = learnt.readers
    down = learnt.method.download(learnt.server, ids, learnt.clients)["experts"]
    assert len(found) == len(ids) * 2
    for line in found.itertuples():
        assert torch.equal(
            down[ids.tolist().index(line.client), line.rank - 1],
            learnt.server.uploads["ctx"][line.expert],
        )


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"method": make(PromptFL)}, "mixing"),
        ({"mixing": "uniform"}, "mixing"),
        ({"n_experts": 0}, "n_experts"),
        *(
            ({"method": make(row)}, "experts of others")
            for row in (NoiseExperts, OwnGate, GateAlone)
        ),
    ],
)
def test_refuses_runs_without_attention_or_experts(learnt, change, word):
    method = change.get("method") or dataclasses.replace(learnt.method, **change)
    refuses(lambda: inspect.attention(dataclasses.replace(learnt, method=method)), [word])


def test_learn_keeps_the_round_before_the_last_and_when_each_prompt_came(here):
    experiment = PARAMS.experiment("pfedmoap", 1, rounds=3, participation=0.5)
    run, played = inspect.learn(experiment), [*assemble.rounds_of(experiment)]
    last = {int(i): r.number for r in played[:2] for i in r.participants}
    assert run.uploaded.tolist() == [last.get(i, -1) for i in range(4)]
    assert run.client_ids.tolist() == sorted(last) and run.server.round == 2
    assert torch.equal(run.server.uploads["ctx"], played[1].state.server.uploads["ctx"])
    assert torch.equal(run.evaluated["ctx"], played[2].evaluated["ctx"])
    first = next(
        iter(assemble.rounds_of(PARAMS.experiment("pfedmoap", 1, lr=1e-12, weight_decay=0.0)))
    )
    assert torch.allclose(first.state.server.params["ctx"], run.init["ctx"], atol=1e-6)
    refuses(lambda: inspect.learn(PARAMS.experiment("pfedmoap", 1, rounds=1)), ["rounds 1", "2"])


def test_norms_are_those_of_the_prompts_and_changes_of_a_run(here):
    experiment = PARAMS.experiment("promptfl", 1, rounds=2)
    found = measures.norms(experiment)
    first, last = assemble.rounds_of(experiment)
    assert len(found) == 2 * 4 and found["round"].tolist() == [0] * 4 + [1] * 4
    received = first.state.server.params["ctx"]
    for line in found.query("round == 1").itertuples():
        change = last.state.server.uploads["ctx"][line.client] - received
        assert line.update == pytest.approx(change.norm().item(), rel=1e-4)
        assert line.prompt == pytest.approx(received.norm().item(), rel=1e-5)
        assert line.numbers == received.numel()
    beside = measures.beside(found, experiment, [50.0])
    shown = found["prompt"].iloc[0], received.norm().item(), np.median(found["update"])
    assert beside.iloc[:4].tolist() == pytest.approx([*shown, experiment.run.clip], rel=1e-5)
    assert shown[0] != pytest.approx(shown[1], rel=1e-3)
    noise = noise_multiplier(50.0, 0.05, 2) * experiment.run.clip * math.sqrt(received.numel())
    assert beside["noise in an upload, epsilon 50"] == pytest.approx(noise)
    assert beside["noise in the mean of 4 uploads, epsilon 50"] == pytest.approx(noise / 2)
    refuses(lambda: measures.norms(PARAMS.experiment("zeroshot", 1)), ["zeroshot sends nothing"])
    halves = PARAMS.experiment("promptfl", 1, rounds=3, participation=0.5)
    beside = measures.beside(measures.norms(halves), halves, [50.0])
    assert beside.index[-1] == "noise in the mean of 2 uploads, epsilon 50"
    assert beside.iloc[-1] == pytest.approx(beside.iloc[-2] / math.sqrt(2))


@pytest.mark.parametrize("batch_size", [3, 4])  # the last batch of 3 is not full
def test_steps_are_those_that_the_loop_takes(batch_size, here):
    experiment = PARAMS.experiment("promptfl", 1, batch_size=batch_size)
    setup = assemble.setup_of(experiment)
    orders = [rounds.batches(setup, i, 0) for i in range(len(setup.clients))]
    assert measures.steps(experiment) == experiment.run.rounds * sum(map(len, orders)) > 8


def test_label_distance_is_0_for_equal_shares_and_1_for_disjoint_ones():
    far = inspect.variation(np.array([[2, 4, 0, 0], [1, 2, 0, 0], [0, 0, 9, 1], [3, 0, 3, 0]]))
    assert np.allclose(
        far, [[0, 0, 1, 2 / 3], [0, 0, 1, 2 / 3], [1, 1, 0, 1 / 2], [2 / 3, 2 / 3, 1 / 2, 0]]
    )


def test_distances_are_of_the_clients_with_an_upload(learnt):
    found, a, b = inspect.pairs(learnt), *learnt.client_ids[[1, 3]].tolist()
    assert len(found) == len(learnt.client_ids) * (len(learnt.client_ids) - 1) / 2
    pool, clients = learnt.server.uploads["ctx"], learnt.clients
    means = [clients.training(i)[0].mean(0) for i in (a, b)]
    assert found.loc[a, b].tolist() == pytest.approx(
        [
            (pool[a] - pool[b]).norm().item(),
            (clients.counts(a) / len(clients.train[a]) - clients.counts(b) / len(clients.train[b]))
            .abs()
            .sum()
            .item()
            / 2,
            (means[0] - means[1]).norm().item(),
            abs(len(clients.train[a]) - len(clients.train[b])),
            abs(a - b),
        ],
        abs=1e-6,
    )


def cloud(gen, n):
    points = gen.normal(size=(n, 2))
    return np.linalg.norm(points[:, None] - points, axis=-1)


def lopsided(gen, n):
    """Some clients are far from everybody: pairs are not independent."""
    far = gen.exponential(size=n) ** 2
    return (far[:, None] + far) * (1 - np.eye(n))


@pytest.mark.parametrize("world", [cloud, lopsided])
def test_unrelated_distances_are_found_related_as_seldom_as_stated(world):
    gen = np.random.default_rng(1)
    found = pd.DataFrame(
        [inspect.related(world(gen, 8), world(gen, 8), draws=99) for _ in range(120)]
    )
    assert 0 < (found["p"] <= 0.05).mean() <= 0.11  # three sigma are 0.06
    assert ((found["low"] <= 0) & (found["high"] >= 0)).mean() >= (0.93 if world is cloud else 0.8)


def test_correlation_is_spearmans_and_sees_order_alone():
    gen = np.random.default_rng(2)
    one, two = cloud(gen, 9), cloud(gen, 9)
    at = np.triu_indices(9, 1)
    assert inspect.related(one, two, 99)["spearman"] == pytest.approx(
        stats.spearmanr(one[at], two[at]).statistic
    )
    same, turned = inspect.related(one, np.exp(one), 99), inspect.related(one, -one, 99)
    assert same[["spearman", "low", "p"]].tolist() == pytest.approx([1, 1, 0.01])
    assert turned[["spearman", "high", "p"]].tolist() == pytest.approx([-1, -1, 0.01])
    assert inspect.related(one, 1 - np.eye(9), 99)[["spearman", "low", "high", "p"]].isna().all()


VERDICTS = [
    (0.5, 0.1, 0.8, 0.01, "together"),
    (0.5, 0.1, 0.8, 0.06, "not shown"),
    (0.5, -0.1, 0.8, 0.01, "not shown"),
    (-0.5, -0.8, -0.1, 0.05, "opposite"),
    (np.nan, np.nan, np.nan, np.nan, "cannot be said"),
]


@pytest.mark.parametrize(("spearman", "low", "high", "p", "verdict"), VERDICTS)
def test_verdict_needs_both_the_interval_and_the_test(
    learnt, monkeypatch, spearman, low, high, p, verdict
):
    said = pd.Series(
        {"spearman": spearman, "low": low, "high": high, "p": p, "clients": 5, "pairs": 10}
    )
    monkeypatch.setattr(inspect, "related", lambda *_: said)
    assert {*inspect.followed(learnt)["verdict"]} == {verdict}


def test_one_prompt_has_no_plane():
    with pytest.raises(ValueError, match="one prompt alone has no axes"):
        inspect.plane(torch.zeros(1, 2, 3))


def test_the_plane_keeps_the_distances_of_prompts_that_lie_in_one():
    gen = torch.Generator().manual_seed(0)
    flat = (
        torch.randn(7, 2, generator=gen, dtype=torch.double)
        @ torch.randn(2, 12, generator=gen, dtype=torch.double)
        + 3
    )
    points, parts = inspect.plane(flat.view(7, 3, 4))
    assert np.allclose(
        np.linalg.norm(points[:, None] - points, axis=-1), torch.cdist(flat, flat), atol=1e-6
    )
    assert sum(parts) == pytest.approx(1) and parts[0] >= parts[1]


def test_the_nearest_word_of_an_embedding_is_that_word(clip):
    words = ["photo", "cat", "golden"]
    found = inspect.nearest_words(
        clip, torch.cat([inspect.table_of_words(clip)[clip.tokenizer.encode(w)] for w in words])
    )
    assert (
        found["word 1"].tolist() == words
        and found["distance"].tolist() == [0, 0, 0]
        and found.index.tolist() == [1, 2, 3]
    )
    assert found["word 2"].isin(words).sum() == 0


def test_words_are_measured_to_other_words_and_vectors_to_all(clip):
    words = inspect.table_of_words(clip)
    far = (words[:1] - words).norm(dim=1)
    assert inspect.to_nearest(clip, words[:3] + 0).tolist() == [0, 0, 0]
    assert inspect.between_words(clip, sample=2)[0] == pytest.approx(far[1:].min().item(), rel=1e-5)


def saved(make, folder):
    """The figure that `make` returns, which saves to the same bytes when it is made again."""
    for name in "ab":
        plots.save(make(), folder / name)
    assert all(
        (folder / f"a.{kind}").read_bytes() == (folder / f"b.{kind}").read_bytes()
        for kind in ("png", "svg")
    )
    return make()


def test_every_client_has_a_dot_and_the_even_share_a_line(tmp_path):
    shares = pd.DataFrame([[0.5, 0.3, 0.2], [0.6, 0.2, 0.2]])
    figure = saved(lambda: plots.expert_shares({"one": shares, "two": shares[[0, 1]]}), tmp_path)
    for ax, columns in zip(figure.axes, (3, 2)):
        dots, mean = (part.get_offsets() for part in ax.collections)
        assert sorted(dots[:, 1]) == sorted(100 * shares.to_numpy()[:, :columns].ravel())
        assert mean[:, 1].tolist() == pytest.approx((100 * shares.mean()).tolist()[:columns])
        assert ax.lines[0].get_ydata()[0] == 100 / columns and ax.get_ylim()[0] == 0


@pytest.mark.parametrize(("n", "outlier", "panels"), [(20, True, 2), (20, False, 1), (10, True, 1)])
def test_the_map_enlarges_a_crowd_where_there_is_one(n, outlier, panels, tmp_path):
    points = np.random.default_rng(0).uniform(size=(n, 2))
    points[0] += 30 * outlier
    figure = saved(
        lambda: plots.prompt_map(
            points, [*map(str, range(n))], ["a", "b"] * (n // 2), [(0, 1), (2, 3)], (0.5, 0.2)
        ),
        tmp_path,
    )
    assert len(figure.axes) == panels
    for ax, inside in zip(figure.axes, (points, points[1:])):
        (x0, x1), (y0, y1) = ax.get_xlim(), ax.get_ylim()
        assert (inside >= [x0, y0]).all() and (inside <= [x1, y1]).all()
    shown = [{text.get_text() for text in ax.texts} for ax in figure.axes]
    assert {*map(str, range(n))} <= set().union(*shown)
    assert panels == 1 or "1" not in shown[0] and "0" in shown[0], (
        "the crowd has names where it is enlarged"
    )


def test_points_are_moved_only_where_they_would_touch():
    points = np.array([[0, 0], [0, 0], [0.5, 0], [9, 9]])
    moved = plots.move_apart(points, 1)
    far = np.linalg.norm(moved[:, None] - moved, axis=-1)[np.triu_indices(4, 1)]
    assert (
        far.min() > 0.98
        and np.abs(moved - points)[:3].max() < 1.2
        and np.allclose(moved[3], 9, atol=1e-4)
    )


def test_clients_worst_and_mean_stand_in_the_row_of_their_method(tmp_path):
    lines = [("A", seed, value) for seed in (1, 2) for value in (0.1 * seed, 0.9)] + [("b", 1, 0.4)]
    runs = pd.DataFrame(lines, columns=["title", "seed", "accuracy"])
    figure = saved(lambda: plots.by_client(runs), tmp_path)
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "A",
        "b",
    ] and ax.yaxis_inverted()
    each, worst, mean = (part.get_offsets().tolist() for part in ax.collections)
    assert np.allclose(each, [[10, 0], [90, 0], [20, 0], [90, 0], [40, 1]])
    assert np.allclose(worst, [[10, 0], [20, 0], [40, 1]])
    assert np.allclose(mean, [[52.5, -0.25], [40, 0.75]])


def test_controls_are_drawn_apart_and_each_data_set_has_a_panel(tmp_path):
    lines = [("one", "A", 50), ("one", "guess", 20), ("two", "A", 60), ("two", "guess", 30)]
    table = pd.DataFrame(lines, columns=["data", "row", "mean"])
    table = table.assign(low=table["mean"] - 2, high=table["mean"] + 1).set_index(["data"])
    figure = saved(
        lambda: plots.rows(table.set_index("row", append=True, drop=False), ["guess"]), tmp_path
    )
    assert [ax.get_title("left") for ax in figure.axes] == ["one", "two"]
    for ax, first in zip(figure.axes, (50, 60)):
        methods, controls = (line for line in ax.lines if line.get_marker() in "os")
        assert methods.get_xydata().tolist() == [[first, 0]] and methods.get_marker() == "o"
        assert controls.get_xydata().tolist() == [[first - 30, 1]] and controls.get_marker() == "s"


def test_a_control_with_fewer_seeds_is_drawn_as_one():
    names = ["A", "A (b)", "guess", "guess of (one)", "no guess"]
    table = pd.DataFrame({"row": names, "mean": [50.0, 60, 20, 30, 40], "seeds": [9, 1, 1, 2, 9]})
    table = tables.marked(table.assign(low=table["mean"], high=table["mean"]))
    assert table["row"][1:3].tolist() == ["A (b) (1 seed)", "guess (1 seed)"]
    (ax,) = plots.rows(table, ["guess", "guess of (one)"]).axes
    methods, controls = (line for line in ax.lines if line.get_marker() in "os")
    assert methods.get_ydata().tolist() == [0, 1, 4]
    assert controls.get_ydata().tolist() == [2, 3]


def test_a_curve_is_the_mean_of_clients_and_its_band_reaches_over_seeds(tmp_path):
    lines = [(seed, number, 0.1 * seed + 0.2 * number) for seed in (1, 2) for number in (0, 1)]
    runs = pd.DataFrame(lines * 2, columns=["seed", "round", "accuracy"]).assign(title="A")
    (ax,) = saved(lambda: plots.curves(runs), tmp_path).axes
    assert np.allclose(ax.lines[0].get_xydata(), [[1, 15], [2, 35]])
    low, high = ax.collections[0].get_paths()[0].get_extents().get_points()
    assert np.allclose(low, [1, 10]) and np.allclose(high, [2, 40])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["A"] and not ax.get_title(
        "left"
    )


def of_claims(index):
    """Differences of each kind: claimed, claimed but not after Holm, and not seen."""
    lines = [(2, 1, 3, 0.01, "above"), (-1, -2, -0.1, 0.2, "below"), (0.5, -1, 2, 1, "no")]
    columns = ["mean", "low", "high", "holm", "verdict"]
    return pd.DataFrame(lines, index=index, columns=columns)


FACES = [[0, 0, 0, 1], pytest.approx([2 / 3] * 3 + [1]), [1, 1, 1, 1]]


def test_differences_have_their_interval_and_are_filled_where_they_are_claimed(tmp_path):
    table = of_claims(["a - b", "a - c", "a - d"])
    (ax,) = saved(lambda: plots.differences(table), tmp_path).axes
    bars, points = ax.collections[:2]
    assert [line[:, 0].tolist() for line in bars.get_segments()] == [[1, 3], [-2, -0.1], [-1, 2]]
    assert points.get_offsets().tolist() == [[2, 0], [-1, 1], [0.5, 2]]
    assert points.get_facecolor().tolist() == FACES
    assert [label.get_text() for label in ax.get_yticklabels()] == [*table.index]
    two = plots.differences(table, far=1.5)
    labels = [[label.get_text() for label in ax.get_yticklabels()] for ax in two.axes]
    assert labels == [["a - b"], ["a - c", "a - d"]]


def test_what_has_no_interval_is_not_said_to_be_seen_or_not(tmp_path):
    table = of_claims(["a - b", "a - c", "a - d"]).assign(verdict="unknown")
    (ax,) = saved(lambda: plots.differences(table), tmp_path).axes
    assert ax.collections[1].get_facecolor().tolist() == [[1, 1, 1, 1]] * 3
    (found,) = ax.figure.legends or [ax.get_legend()]
    assert "none seen, or no interval" in [text.get_text() for text in found.get_texts()]


def test_gains_stand_above_the_value_of_their_setting(tmp_path):
    index = pd.MultiIndex.from_tuples([("k", 10.0), ("k", 0.1), ("l", 0.1)], names=["pair", "at"])
    (ax,) = saved(lambda: plots.gains(of_claims(index), "alpha"), tmp_path).axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.1", "10"]
    drawn = [marks for marks in ax.collections if isinstance(marks, PathCollection)]
    points = np.concatenate([marks.get_offsets() for marks in drawn])
    x, y = points.T
    assert x.round().tolist() == [1, 0, 0] and x[1] < x[2]  # beside each other
    assert y.tolist() == [2, -1, 0.5]


def test_accuracy_stands_above_the_bytes_of_all_rounds_so_far(tmp_path):
    lines = [("A", 1, 0, 2, 50), ("A", 1, 1, 4, 60), ("A", 16, 0, 32, 55), ("A", 16, 1, 64, 70)]
    lines += [("silent", 1, 0, 0, 40), ("silent", 1, 1, 0, 45)]
    table = pd.DataFrame(lines, columns=["row", "n_ctx", "round", "kB", "mean"])
    table = table.assign(low=table["mean"] - 2, high=table["mean"] + 3)
    table = table.set_index(["row", "n_ctx", "round"])
    (ax,) = saved(lambda: plots.traffic(table, "vectors:"), tmp_path).axes
    one, last, other = ax.lines[0], ax.lines[1], ax.lines[4]
    assert one.get_xydata().tolist() == [[2, 50], [4, 60]] and one.get_linestyle() == "-"
    assert last.get_xydata().tolist() == [[4, 60]] and last.get_marker() == "o"
    assert other.get_xydata().tolist() == [[32, 55], [64, 70]] and other.get_linestyle() == "--"
    level = ax.lines[8]
    assert [*level.get_ydata()] == [45, 45] and ax.get_xscale() == "log"


def test_more_kinds_than_lines_are_refused():
    index = pd.MultiIndex.from_product([["A"], range(5), [0]], names=["row", "n_ctx", "round"])
    table = pd.DataFrame({"kB": 1.0, "mean": 50.0, "low": 49.0, "high": 51.0}, index)
    with pytest.raises(ValueError, match="4 values of vectors can be drawn, not 5"):
        plots.traffic(table, "vectors")


def test_lines_over_words_stand_in_the_order_of_the_table(tmp_path):
    index = pd.MultiIndex.from_product([["A", "B"], ["untouched", "clipped"]])
    table = pd.DataFrame({"mean": [50, 60, 70, 80]}, index).eval("low = mean - 1\nhigh = mean + 1")
    (ax,) = saved(lambda: plots.lines(table, "x"), tmp_path).axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["untouched", "clipped"]
    assert ax.lines[0].get_xydata().tolist() == [[0, 50], [1, 60]]


def test_pairs_are_all_drawn_and_their_means_climb_with_them(tmp_path):
    x = np.arange(40.0)
    figure = saved(
        lambda: plots.against(
            {"climbs": (x, 2 * x, "x"), "one value": (0 * x, x, "x"), "third": (x, x, "x")}, "y"
        ),
        tmp_path,
    )
    assert len(figure.axes) == 3
    climbs, one, _ = figure.axes
    assert len(climbs.collections[0].get_offsets()) == 40
    assert (
        np.allclose(climbs.lines[0].get_ydata(), 2 * climbs.lines[0].get_xdata())
        and len(climbs.lines[0].get_xdata()) == 8
    )
    assert one.lines[0].get_ydata().tolist() == [19.5]


def test_heat_has_a_disc_for_every_share_and_hatches_gaps(tmp_path):
    matrix = pd.DataFrame([[1.0, np.nan], [0.5, 0.2]], ["a", "b"])
    dots = pd.DataFrame([[1.0, 0], [0.25, 0]])
    figure = saved(lambda: plots.heat(matrix, "t", "l", dots=dots), tmp_path)
    ax = figure.axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    (discs,) = ax.collections
    assert discs.get_offsets().tolist() == [[0, 0], [0, 1]]
    assert discs.get_sizes()[1] == pytest.approx(discs.get_sizes()[0] / 4)
    assert ax.patch.get_hatch()
    assert ax.images[0].get_array().mask.tolist() == [[False, True], [False, False]]


def test_a_figure_goes_to_the_folder_of_its_notebook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plots.save(plots.mask(np.eye(3), 1), "10_table1/mask")
    made = sorted(str(path) for path in Path("results").rglob("*.*"))
    assert made == ["results/tables/10_table1/mask.png", "results/tables/10_table1/mask.svg"]
