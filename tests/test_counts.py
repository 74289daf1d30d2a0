"""Promise: the ways of `fpl bench` compute the same, and do exactly the work that it says."""

from functools import partial

import pandas as pd
import pytest
import torch
from helpers.tiny import tiny_model

from fpl import gate
from fpl.bench import measure, scaling, step
from fpl.bench.parts import Case, Parts, make_world
from fpl.bench.ways import LISTS, SequentialPFedMoAP, compiled, names
from fpl.experiments import plots
from fpl.methods import PFedMoAP
from fpl.prompts import Clip, PromptTree

SETTINGS = {"n_ctx": 4, "n_experts": 2, "d_gate": 16, "heads": 4}
KINDS = {way: kind for way, (kind, _) in step.WAYS.items()}
LAST = list(step.WAYS)[-1]


@pytest.fixture
def tiny():
    return Clip(tiny_model())


@pytest.fixture
def shallow():
    """With one layer of text, which takes half as long to trace."""
    return Clip(tiny_model(layers=1))


@pytest.fixture
def no_compiler(monkeypatch):
    """Dynamo without what generates code."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


@pytest.fixture
def not_traced(monkeypatch):
    """Nor Dynamo, where what it makes of the code is not what is tested."""
    monkeypatch.setattr(torch, "compile", lambda function, **named: function)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_all_ways_have_the_features_and_gradients_of_the_first(tiny, no_compiler, dtype, tolerance):
    world = make_world(Clip(tiny.model.to(dtype)), Case("tiny", 6, 5, 3, 1, SETTINGS))
    listed, found = names(10)[:6], {}
    for way in step.WAYS:
        t, learnt = step.all_gradients(Parts(way, tiny, world, listed))
        found[way] = {"features": t, **learnt}
        assert t.shape == (3, 6, 32) and all(len(v) == 3 for v in learnt.values())
    first = found[next(iter(found))]
    for way, tensors in found.items():
        for name, x in tensors.items():
            scale = (
                first[name.replace("gate_b", "gate_w")].abs().max()
            )  # biases but the query's change no probability
            assert scale > 1e-6 and (x - first[name]).abs().max() <= tolerance * scale, (way, name)


def test_the_differences_in_the_table_are_those_in_double_precision(tiny, not_traced):
    found = pd.DataFrame(step.differences(tiny, names(10)[:4], SETTINGS)).T
    assert (
        list(found.index) == list(step.WAYS)
        and (found < 1e-9).all(axis=None)
        and (found.iloc[0] == 0).all()
    )
    assert (found.loc["d prompt tree"] > 0).all() and tiny.model.logit_scale.dtype == torch.float32


@pytest.mark.parametrize("kind", dict.fromkeys(KINDS.values()))
def test_a_round_encodes_experts_for_each_receiver_or_once(kind):
    experts = 10 if kind is PFedMoAP else 90
    assert step.encodings(kind, n=10, k=9, steps=25) == (250, experts + 10)


@pytest.mark.parametrize(("n", "steps"), [(10, 1), (20, 1), (40, 1), (10, 2), (10, 4)])
def test_encodings_grow_with_clients_and_steps(n, steps):
    assert step.encodings(SequentialPFedMoAP, n, 9, steps) == (n * steps, n * 9 + n)
    assert step.encodings(PFedMoAP, n, n - 1, steps) == (n * steps, 2 * n)


@pytest.mark.parametrize("k", [1, 3, 6, 11])
def test_encodings_do_not_grow_with_receivers(k):
    trained, read = step.encodings(PFedMoAP, 12, k, 2)
    assert 12 < read <= 12 + 12 and trained == 24
    assert step.encodings(SequentialPFedMoAP, 12, k, 2) == (24, 12 * k + 12)


@pytest.mark.parametrize(
    ("classes", "cut", "tree"),
    [(10, 20, 47), (37, 23, 169), (47, 22, 203), (100, 22, 336), (101, 25, 427), (102, 25, 475)],
)
def test_tokens_of_known_class_names(tiny, classes, cut, tree):
    listed = names(classes)
    found = {
        way: encoder(tiny, listed, 16).n_nodes
        for way, (_, encoder) in step.WAYS.items()
        if way != LAST
    }
    assert list(found.values()) == [77 * classes, 77 * classes, cut * classes, tree, tree]
    rows = [
        tuple(row[:cut])
        for row in tiny.tokenizer(
            [f"{'X ' * 16}{name.replace('_', ' ')}." for name in listed]
        ).tolist()
    ]
    begun = {
        row[:j] for row in rows for j in range(1, 1 + row.index(tiny.tokenizer.eot_token_id) + 1)
    }
    assert len(begun) == tree  # the different beginnings of prompts


def test_tokens_grow_with_classes(tiny):
    nodes = [PromptTree(tiny, names(c)).n_nodes / c for c in (200, 400, 800)]
    assert max(nodes) < 1.1 * min(nodes) < 6


def forward_flops(width, layers, dim, sequences, tokens, classes):
    """Count by hand: of each token four maps, the MLP, scores and mixing; then the projection.

    A multiplication with its addition is two.
    """
    return 2 * (
        layers * sequences * tokens * (12 * width**2 + 2 * tokens * width) + classes * width * dim
    )


def tree_flops(width, layers, dim, tokens, classes, groups, size):
    """Count the same of a tree, which has scores and mixing within groups.

    Its last layer has three maps only, but for the ends of classes.
    """
    maps = (layers - 1) * tokens * 12 + tokens * 3 + classes * 9
    return 2 * (maps * width**2 + layers * groups * 2 * size**2 * width + classes * width * dim)


def test_arithmetic_is_that_of_the_shapes(tiny):
    world = make_world(tiny, Case("tiny", 101, 4, 3, 1, SETTINGS | {"n_ctx": 16}))
    done = {}
    for way in list(step.WAYS)[:-1]:
        parts = Parts(way, tiny, world, names(101))
        done[way] = step.count(parts, []).flops
        n = parts.size
        assert n == (3 if way.startswith("e") else 1)
        if isinstance(parts.text, PromptTree):
            expected = tree_flops(32, 2, 32, 427, 101, *parts.text.tree.groups.shape)
        else:
            expected = forward_flops(32, 2, 32, 101, parts.text.n_nodes // 101, 101)
        assert done[way]["encode"] == n * expected
        assert 2 < (done[way]["step"] / done[way]["encode"]) < 3.5
    assert done["b image features cached"]["encode"] > 7 * done["d prompt tree"]["encode"]
    assert done["a image tower, 77 tokens"]["step"] > done["b image features cached"]["step"]


def test_the_cost_model_of_vit_b_16():
    """77 tokens of a class take 5.96 GFLOP; the tree of Food101 a nineteenth of its 77 tokens."""
    padded, tree = forward_flops(512, 12, 512, 1, 77, 1), tree_flops(512, 12, 512, 427, 101, 9, 65)
    assert padded == pytest.approx(5.96e9, rel=2e-3) and 101 * padded / tree == pytest.approx(
        19, rel=0.02
    )


def table(tiny, **named):
    return step.table(Case("tiny", 10, 4, 3, 3, SETTINGS), tiny, repeats=1, **named)


def test_a_round_is_the_sum_of_its_parts(tiny, not_traced, monkeypatch):
    """Every call takes a second: 3 clients with 2 experts, 3 steps each."""
    monkeypatch.setattr(step, "timed", lambda call: (call(), 1.0)[1])
    found = table(tiny, measure_round=True).set_index("way")
    alone, stacked = 3 * 2 + 3 * (3 + 1), 1 + 3 + 1
    assert found["round of parts, s"].tolist() == [alone] * 4 + [stacked] * 2
    assert found["ms per step"].tolist() == pytest.approx([1000] * 4 + [1000 / 3] * 2)
    assert found["steps: times faster"].tolist() == pytest.approx([1] * 4 + [3] * 2)
    assert found["rounds: times faster"].tolist() == pytest.approx([1] * 4 + [alone / stacked] * 2)
    assert (found["round measured, s"] == 1).all() and found["first call, s"].notna().tolist() == [
        False
    ] * 5 + [True]
    speed = found["GFLOP per step"] / (found["ms per step"] / 1000)
    assert (found["share of peak"] / (speed / found["peak, GFLOP/s"])).tolist() == pytest.approx(
        [1] * 6
    )
    assert found["GFLOP per step"].iloc[-1] == found["GFLOP per step"].iloc[-2]
    assert (
        found["encodings forward"].tolist() == [9] * 4 + [6] * 2
        and (found["encodings forward and backward"] == 9).all()
    )


def test_setting_after_setting_is_compiled(shallow, monkeypatch):
    made = []
    monkeypatch.setattr(
        torch,
        "compile",
        partial(torch.compile, backend=lambda graph, _: made.append(graph) or graph.forward),
    )
    for classes in range(2, 7):  # each needs two versions of a function of which Dynamo keeps eight
        before = len(made)
        compiled(shallow, names(100)[:classes], 4)(torch.zeros(1, 4, 32))
        assert len(made) > before


def test_where_nothing_can_be_compiled_a_line_says_so(shallow, monkeypatch):
    def broken(*args, **named):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda model, **named: broken)
    found = table(shallow)
    assert found["way"].tolist() == [
        *list(step.WAYS)[:-1],
        "f compiled: not here, RuntimeError no C++ compiler",
    ]
    assert (
        found.iloc[-1]["ms per step":"gate gradient difference"].isna().all()
        and found["ms per step"][:-1].gt(0).all()
    )
    assert step.shown(found).endswith("f compiled: not here, RuntimeError no C++ compiler")
    assert step.ratios(found)["steps, a / f"].isna().all()


def test_profile_names_what_takes_the_time(tiny, not_traced):
    found = step.profile(Case("tiny", 10, 2, 3, 1, SETTINGS), tiny, kinds=5)
    for way in list(step.WAYS)[-2:]:
        part = found[found["way"] == way]
        assert (
            len(part) == 5 and part["ms"].is_monotonic_decreasing and 0 < part["share"].sum() <= 1
        )


def test_memory_is_what_a_call_takes():
    block = 64 * 2**20
    measure.memory(lambda: torch.ones(block // 4).sum())
    taken = measure.memory(lambda: torch.ones(block // 4).sum())
    assert taken != taken or 0.9 * block < taken < 2 * block


@pytest.mark.parametrize("classes", [*LISTS, 1000])
def test_every_list_has_its_classes(classes):
    assert len(set(names(classes))) == classes


def test_names_end_at_a_thousand():
    assert len(set(names(1000)) - set(names(999))) == 1
    with pytest.raises(ValueError, match="--classes 1001: there are names for 1 to 1000 classes"):
        names(1001)


def test_scaling_has_a_line_for_each_value_and_a_figure(tiny, tmp_path):
    growth = {"clients": (4, 6), "classes": (3, 10), "steps": (2, 1), "experts": (2, 5)}
    found = scaling.table(tiny, growth, 2, d_gate=16, heads=4)
    grown = found.set_index("grows")
    assert (
        grown.loc["clients", "clients"].tolist() == [4, 6]
        and (grown.loc["clients", "steps"] == 2).all()
    )
    assert grown.loc["steps", "encoded with gradients"].tolist() == [4, 8]
    assert grown.loc["clients", "encoded with gradients"].tolist() == [8, 12]
    assert (
        grown.loc["experts", "experts"].tolist() == [2, 5]
        and (grown.loc["experts", "clients"] == 6).all()
    )
    assert grown.loc["experts", "if by each receiver"].tolist() == [12, 30]
    assert (grown.loc["experts", "experts encoded"] <= 6).all() and (found["seconds"] > 0).all()
    plots.save(plots.growth(found), tmp_path / "growth", kinds=["png"])
    assert [file.name for file in tmp_path.iterdir()] == ["growth.png"]


def test_many_images_go_through_the_gate_in_chunks(tiny, monkeypatch):
    sizes, mix = [], gate.mix
    monkeypatch.setattr(
        gate, "mix", lambda p, x, *rest: [sizes.append(x.shape[1]), mix(p, x, *rest)][1]
    )
    (line,) = scaling.evaluation(tiny, 1100, 101, 9, d_gate=16, heads=4).to_dict("records")
    assert line["images"] == 1100 and line["seconds"] > 0
    assert sizes == 3 * [512, 512, 76]  # once to warm up, for the time, for the memory


def test_scaling_of_one_value_each_is_one_line(tiny):
    found = scaling.table(
        tiny,
        {"clients": (4,), "classes": (3,), "steps": (1,), "experts": (2,)},
        2,
        d_gate=16,
        heads=4,
    )
    assert len(found) == 1 and found["clients"].tolist() == [4]
