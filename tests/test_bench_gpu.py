"""Promise: the script for a day with a GPU measures and judges all that it says; here on a CPU.

A job that fails or lasts too long is named, and the others are done.
"""

import dataclasses
import json
import re
import signal

import pytest
import torch
from helpers import BACKBONE, standing_in, store_clip

from fpl import cli
from fpl.bench import features as photos
from fpl.bench import gpu, verdicts, ways
from fpl.bench.gpu import Number
from fpl.bench.parts import Case
from fpl.bench.verdicts import IMAGE, TEXT, WRONG
from fpl.data import encoders
from fpl.experiments.settings import ROWS

METHOD = {"n_ctx": 2, "n_experts": 2, "d_gate": 16, "heads": 4}
SIZES = dataclasses.replace(
    gpu.small(),
    case=Case(BACKBONE.name, 3, batch=2, clients=3, steps=2, method=METHOD),
    demo=BACKBONE.name,
)
A, *_, E, F = ways.WAYS
WITHOUT_TEXT = {"majority", "ridge_own", "ridge_all"}


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    """Here is a random CLIP, and what the command made with it in `out`."""
    with standing_in(tmp_path_factory.mktemp("world")) as folder, pytest.MonkeyPatch.context() as m:
        store_clip(folder / "clip")
        m.setattr(gpu, "small", lambda: SIZES)
        cli.main(["bench", "gpu", "--small", "--save", "out"])
        yield folder


@pytest.fixture
def report(world):
    return json.loads((world / "out/cpu-small.json").read_text())


@pytest.fixture
def page(world):
    return (world / "out/cpu-small.md").read_text()


def play(jobs, seconds=100.0):
    """Return what a part of these jobs leaves in a report."""
    report = {"numbers": [], "failures": []}
    gpu.play("rounds", jobs, seconds, report)
    found = {line["of"]: line["value"] for line in report["numbers"]}
    return found, {line["of"]: line["why"] for line in report["failures"]}


def found_of(job):
    """Return what a job finds, by what it is of and what it says."""
    return {(number.of, number.what): number.value for number in job()}


def fake(*numbers, failures=(), device="cpu"):
    """Return a report of numbers (part, of, what, value) and failures (part, of, why)."""
    sizes = dataclasses.asdict(SIZES) | {"classes": [10, 102], "budgets": [10, 20, 40]}
    sizes["trial"] = device != "cuda"
    made = {
        "versions": {"card": "a card", "GPUs": 1, "torch": "9"},
        "sizes": sizes,
        "device": device,
        "numbers": [
            dict(zip(("part", "of", "what", "value", "unit"), (*line, ""), strict=True))
            for line in numbers
        ],
        "failures": [dict(zip(("part", "of", "why"), line, strict=True)) for line in failures],
    }
    best = verdicts.best_budget(made)
    return made | {"targets": verdicts.targets(made), "best budget, nodes": best}


def verdict(report, words):
    """Return what is said of the one target whose name has these words."""
    (found,) = [target for target in report["targets"] if words in target["target"]]
    return found


# What is measured

SAME = {"other predictions", WRONG}
ROUND = {"before, compiling included", "round", "at peak"}
RATE = {"rate", "share of bare model"}
WANTED = {
    "devices": {
        **{row: SAME | {TEXT} for row in ROWS if row not in WITHOUT_TEXT},
        **dict.fromkeys(WITHOUT_TEXT, SAME),
        "image tower": {IMAGE},
    },
    "precision": {
        f"{row}, {kind}": {"accuracy", "range over seeds", "at peak"}
        for row in ("promptfl", "pfedmoap")
        for kind in ("single", "bfloat16", "half")
    },
    "extraction": {
        **dict.fromkeys(("bare model", "extraction", "decoding alone"), RATE),
        "all, with every image's pixels": {"at peak"},
    },
    "rounds": {f"3 classes, {way}": ROUND for way in (A, E, F)},
    "budget": dict.fromkeys(
        ("64 nodes", "128 nodes"), {"prompts at once", "an encoding", "at peak"}
    ),
    "several GPUs": {"all": {"GPUs"}},
}


@pytest.mark.parametrize("part", verdicts.PARTS)
def test_every_part_gives_its_lines(part, report):
    made = {}
    for line in report["numbers"]:
        if line["part"] == part:
            made.setdefault(line["of"], set()).add(line["what"])
    assert made == WANTED[part] and report["failures"] == []


def test_numbers_are_possible_and_have_units(report):
    without = {TEXT, IMAGE, "share of bare model", "prompts at once", "GPUs"}
    for line in report["numbers"]:
        assert line["value"] >= 0 and (line["unit"] == "") == (line["what"] in without), line
        zero = line["part"] in ("devices", "several GPUs") or line["what"] == "range over seeds"
        assert zero or line["value"] > 0 or line["what"] == "at peak", line
    assert {"torch", "CUDA", "driver", "card", "TF32 in convolutions"} <= set(report["versions"])


def test_another_model_is_found_out_by_every_row_and_tower(world):
    """What a device would do that computes something else."""
    store_clip(world / "other", seed=1)
    work = gpu.Work(SIZES)
    work.demos = encoders.load("local-dir:clip"), encoders.load("local-dir:other")
    jobs = work.jobs["devices"]
    chosen = {name: jobs[name] for name in ("zeroshot", "pfedmoap", "fedotp", "image tower")}
    report = {"numbers": [], "failures": []}
    gpu.play("devices", chosen, 100, report)
    assert verdicts.unlike(report) == 4


def test_only_predictions_that_are_no_ties_are_wrong():
    inf = torch.inf
    cpu = torch.tensor([[10, 9.995, -inf], [10, 9.9, -inf], [0, 2, 1.0], [0, 1, 0]])
    other = torch.tensor([[1, 2, 0.0], [1, 2, 0], [0, 2, 1], [0, torch.nan, 2]])
    assert gpu.count_changed(cpu, other[[0, 1, 2, 2]]) == (2, 1)
    with pytest.raises(FloatingPointError, match="features are not finite"):
        gpu.distance(cpu, other)


def test_the_first_way_has_the_released_codes_weights_in_half_precision():
    clip = encoders.load(BACKBONE.name)
    half = gpu.in_half(A, clip, ["a", "b"], 2)
    single = ways.PixelPrompts(clip, ["a", "b"], 2)
    kinds = [{p.dtype for p in text.model.parameters()} for text in (half, single)]
    assert kinds == [{torch.half}, {torch.float}]
    ctx = torch.randn(1, 2, 16, generator=torch.Generator().manual_seed(0))
    pixels = torch.randn(1, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for made, wanted in ((half(ctx), single(ctx)), (half.images(pixels), single.images(pixels))):
        assert made.dtype == torch.float and 0 < (made - wanted).abs().max() < 0.01
    assert all(gpu.in_half(way, clip, ["a", "b"], 2).precision == "half" for way in (E, F))


def test_extraction_is_measured_on_all_devices_and_on_one():
    work = gpu.Work(SIZES)
    both = found_of(lambda: work.on_all(["cpu"]))
    assert {key for key in both if key[0]} == {("one", "rate"), ("all", "rate")}
    assert found_of(lambda: work.on_all([])) == {("", "GPUs"): torch.cuda.device_count()}


# What goes wrong


def fails():
    yield Number("first", 1.0)
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate\x1b 2 GiB")


def lasts():
    yield Number("first", 2.0)
    while True:
        pass


def fine():
    return [Number("only", 3.0, "s"), Number("memory", float("nan"), "MB", "unknown")]


def test_a_job_that_fails_is_named_and_what_was_found_stays():
    numbers, failures = play({"a": fails, "b": fine})
    assert numbers == {"a": 1.0, "b": 3.0, "unknown": None}
    said = r"OutOfMemoryError: CUDA out of memory. Tried to allocate\x1b 2 GiB"
    assert failures == {"a": said}


def test_a_part_ends_when_its_seconds_are_over():
    before = signal.getsignal(signal.SIGALRM)
    numbers, failures = play({"a": fine, "b": lasts, "c": fine}, 0.5)
    assert numbers == {"a": 3.0, "unknown": None, "b": 2.0}
    assert failures == dict.fromkeys("bc", "TimeoutError: the part's 0.5 s are over")
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_all_parts_end_in_under_ten_minutes():
    assert sum(seconds for _, seconds in verdicts.PARTS.values()) < 600


def test_parts_go_on_behind_one_that_fails(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no | memory")

    monkeypatch.setattr(photos, "extract", broken)
    none = dict.fromkeys(("devices", "precision", "rounds"), 0.0)
    *_, report = gpu.reports(dataclasses.replace(SIZES, seconds=none))
    failed = {line["part"] for line in report["failures"]}
    assert failed == {*none, "extraction"}
    assert {line["part"] for line in report["numbers"]} == {"budget", "several GPUs"}
    page = verdicts.page(report)
    assert r"* extraction failed: RuntimeError: no \| memory" in page
    assert all(f"* {row} failed: TimeoutError: the part's 0 s are over" in page for row in ROWS)
    assert verdict(report, "rounds of 3")["reached"] == "not measured"


# What is said of it

ROUNDS = [("rounds", f"10 classes, {A}", "round", 40.0), ("rounds", f"10 classes, {F}", "round", 2)]
TRAINED = [
    ("precision", "promptfl, single", "accuracy", 90.0),
    ("precision", "promptfl, single", "range over seeds", 1.5),
]
SHARE = ("extraction", "extraction", "share of bare model")


@pytest.mark.parametrize(
    ("numbers", "words", "found", "reached"),
    [
        ([], "unlike", None, "not measured"),
        ([("devices", "coop", TEXT, 1e-3), ("devices", "coop", WRONG, 0)], "unlike", 0, "yes"),
        ([("devices", "coop", TEXT, 2e-3), ("devices", "coop", WRONG, 1)], "unlike", 1, "no"),
        ([("devices", "coop", WRONG, 1), ("devices", "fedper", TEXT, 1)], "unlike", 2, "no"),
        ([("devices", "coop", "other predictions", 5)], "unlike", 0, "yes"),
        (TRAINED, "promptfl, half", None, "not measured"),
        ([*TRAINED, ("precision", "promptfl, half", "accuracy", 88.5)], "l, half", 1.5, "yes"),
        ([*TRAINED, ("precision", "promptfl, half", "accuracy", 92)], "l, half", 2, "no"),
        ([(*SHARE, 0.9)], "extraction", 0.9, "yes"),
        ([(*SHARE, 0.899)], "extraction", 0.899, "no"),
        ([(*SHARE, None)], "extraction", None, "not measured"),
        (ROUNDS, "rounds of 10 ", 20, "yes"),
        (ROUNDS[:1], "rounds of 10 ", None, "not measured"),
        (ROUNDS, "rounds of 102 ", None, "not measured"),
        ([ROUNDS[0], ("rounds", f"10 classes, {F}", "round", 2.1)], "of 10 ", 40 / 2.1, "no"),
    ],
)
def test_verdicts_follow_the_numbers(numbers, words, found, reached):
    target = verdict(fake(*numbers), words)
    assert (target["found"], target["reached"]) == (found, reached)


def test_a_row_that_fails_on_the_device_is_unlike_the_cpu():
    same = ("devices", "coop", TEXT, 0)
    report = fake(same, failures=[("devices", "fedotp", "no"), ("rounds", "x", "no")])
    assert verdict(report, "unlike")["found"] == 1


@pytest.mark.parametrize(
    ("taken", "best"),
    [
        ((3.0, 2.0, 1.0), 40),
        ((3.0, 1.04, 1.0), 20),  # hardly longer, with less memory
        ((1.0, 2.0, 3.0), 10),
        ((3.0, 2.0, None), 20),  # the largest had no memory
        ((None, None, None), None),
    ],
)
def test_the_best_budget_is_the_smallest_that_is_about_as_fast_as_any(taken, best):
    numbers = [
        ("budget", f"{n} nodes", "an encoding", ms)
        for n, ms in zip((10, 20, 40), taken, strict=True)
    ]
    report = fake(*numbers, device="cuda")
    assert report["best budget, nodes"] == best
    said = f'Set `BUDGET["cuda"]` in `fpl/prompts.py` to {best};'
    assert (said in verdicts.page(report)) == (best is not None)


def test_page_and_file_agree(report, page):
    sections = dict(re.findall(r"^## (.+?)\n(.+?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    for line in report["numbers"]:
        rows = sections[line["part"][0].upper() + line["part"][1:]].splitlines()
        (row,) = [row for row in rows if row.startswith(f"| {line['of']} ")]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert any(cell and float(cell) == float(f"{line['value']:.4g}") for cell in cells[1:])
    for target in report["targets"]:
        (row,) = [row for row in sections["Targets"].splitlines() if target["target"] in row]
        assert f"| {target['reached']} " in row and f"| {target['wanted']} " in row
    assert str(report["best budget, nodes"]) in sections["Node budget"]
    assert all(name in sections["Versions"] for name in report["versions"])


def test_a_page_of_a_cpu_says_so(page):
    assert page.startswith("# cpu\n") and "**This has not been run on a GPU.**" in page
    assert "There was no GPU." in page and "Nothing was compiled." in page
    of_card = verdicts.page(fake(device="cuda"))
    assert "There was one GPU." in of_card
    assert all(words not in of_card for words in ("not been run", "trial", "Nothing was"))


def test_a_trial_on_a_card_sets_nothing():
    report = fake(("budget", "20 nodes", "an encoding", 1), device="cuda")
    report["sizes"]["trial"] = True
    page = verdicts.page(report)
    assert "**This is a trial.**" in page and "The best in this trial is 20: leave" in page


@pytest.mark.parametrize(
    ("card", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "nvidia-a100-sxm4-80gb"),
        ("Quadro RTX 6000/8000", "quadro-rtx-6000-8000"),
        ("../../etc/passwd", "etc-passwd"),
        ("a\nb\x1b[0m", "a-b-0m"),
        ("...", "gpu"),
        ("x" * 300, "x" * 80),
    ],
)
def test_a_card_names_a_file_safely(card, name):
    assert verdicts.file_name(card) == name


# The command


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("gpu", "PyTorch finds no GPU here: run this where there is one, or add --small"),
        ("gpu --images 3", "`fpl bench gpu` does not read --images: leave it out"),
        ("step --small", "`fpl bench step` does not read --small: leave it out"),
        ("gpu --small --save clip/open_clip_config.json", "nothing can be written in clip/open_"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(line, said):
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", *line.split()])
    assert end.value.code.startswith("fpl bench: ") and said in end.value.code
