"""What the numbers of a day with a GPU say: targets, the best budget of nodes, and a page.

A report is what `fpl.bench.gpu.reports` yields, and all in it is what JSON can hold.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import pandas as pd

from fpl.bench.step import printed
from fpl.bench.ways import COMPILED, WAYS
from fpl.data.text import cell, markdown
from fpl.prompts import BUDGET, PRECISIONS

Report = Mapping[str, Any]

TOLERANCE = 1e-3  # of unit features; of logits, relative to the largest
TEXT, IMAGE = "text features differ by", "image features differ by"
WRONG = "other predictions, no ties"
LIMITS = {TEXT: TOLERANCE, IMAGE: TOLERANCE, WRONG: 0}
SHARE = 0.9  # of the bare model's images per second
FASTER = 20  # times, a round of ours against one of the released code's shape
SLACK = 1.05  # a budget is as good as the fastest if it takes at most so many times as long
FIRST = next(iter(WAYS))
LEARNING = ("promptfl", "pfedmoap")  # rows whose accuracy is compared
PARTS = {  # what each measures, and the seconds that it has
    "devices": ("Every row after two rounds with the demo's model, here and on the CPU.", 80.0),
    "precision": ("Accuracy after a short run on the demo's world, the same seeds for all.", 70.0),
    "extraction": ("Where decoding alone is slower than the bare model, it is the limit.", 80.0),
    "rounds": ("Whole rounds of pFedMoAP, every way in half precision.", 255.0),
    "budget": ("Encodings with their gradients in half precision, by nodes at once.", 40.0),
    "several GPUs": ("Extraction on all GPUs beside that on one, where there are several.", 50.0),
}
TRIAL = "**This is a trial.** Its sizes are too small to say whether targets are reached."
UNTRIED = "**This has not been run on a GPU.** The numbers are a CPU's, to try the script."


def value(report: Report, part: str, of: str, what: str) -> float:
    """Return a number of the report, or nan where it was not measured."""
    for line in report["numbers"]:
        if (line["part"], line["of"], line["what"]) == (part, of, what):
            return math.nan if line["value"] is None else line["value"]
    return math.nan


def judge(what: str, found: float, wanted: float, unit: str, at_most: bool = False) -> dict:
    """Return a target, what was found, and whether that reaches it."""
    is_known = not math.isnan(found)
    reached = found <= wanted if at_most else found >= wanted
    return {
        "target": what,
        "wanted": f"at {'most' if at_most else 'least'} {wanted:.4g}",
        "found": found if is_known else None,
        "unit": unit,
        "reached": ("yes" if reached else "no") if is_known else "not measured",
    }


def targets(report: Report) -> list[dict]:
    """Say of every target whether the numbers reach it."""
    get = partial(value, report)
    found = [judge("rows and towers unlike the CPU's", unlike(report), 0, "of them", at_most=True)]
    for row in LEARNING:
        single = f"{row}, single"
        spread = get("precision", single, "range over seeds")
        for kind in list(PRECISIONS)[1:]:
            of = f"{row}, {kind}"
            moved = get("precision", of, "accuracy") - get("precision", single, "accuracy")
            what = f"{of}: from single, beside its seeds' range"
            found.append(judge(what, abs(moved), spread, "points", at_most=True))
    share = get("extraction", "extraction", "share of bare model")
    found.append(judge("extraction beside the bare model", share, SHARE, "of its images/s"))
    for n in report["sizes"]["classes"]:
        first, ours = [get("rounds", f"{n} classes, {way}", "round") for way in (FIRST, COMPILED)]
        found.append(
            judge(f"rounds of {n} classes, f beside a", first / ours, FASTER, "times faster")
        )
    return found


def unlike(report: Report) -> float:
    """Return how many rows and towers failed or differ from the CPU's; nan if none was tried."""
    tested = [line for line in report["numbers"] if line["part"] == "devices"]
    wrong = {line["of"] for line in report["failures"] if line["part"] == "devices"}
    for line in tested:
        limit = LIMITS.get(line["what"], math.inf)
        if line["value"] > limit:
            wrong.add(line["of"])
    return len(wrong) if tested or wrong else math.nan


def best_budget(report: Report) -> int | None:
    """Return the smallest budget that takes hardly longer than the fastest."""
    taken = {}
    for nodes in report["sizes"]["budgets"]:
        taken[nodes] = value(report, "budget", f"{nodes} nodes", "an encoding")
    enough = SLACK * min((ms for ms in taken.values() if ms > 0), default=math.nan)
    return min((nodes for nodes, ms in taken.items() if ms <= enough), default=None)


def page(report: Report) -> str:
    """Return the report in Markdown."""
    about = report["versions"]
    case = report["sizes"]["case"]
    is_trial = report["sizes"]["trial"]
    setting = f"{case['clients']} clients, {case['steps']} steps, batches of {case['batch']}"
    lines = [f"# {cell(about['card'])}"]
    if report["device"] != "cuda":
        lines.append(UNTRIED)
    elif is_trial:
        lines.append(TRIAL)
    verdicts = printed(pd.DataFrame(report["targets"]))
    lines += ["## Targets", markdown(verdicts), "## Node budget", advice(report)]
    for part, (what, _) in PARTS.items():
        lines += [f"## {part[0].upper()}{part[1:]}", what]
        if part == "rounds":
            eager = " Nothing was compiled." if is_trial else ""
            lines.append(f"Model {cell(case['model'])}, {setting}.{eager}")
        if part == "several GPUs" and about["GPUs"] < 2:
            lines.append(f"There was {'one GPU' if about['GPUs'] else 'no GPU'}.")
        lines += part_lines(report, part)
    named = pd.DataFrame({"of": [*about], "is": [str(x) for x in about.values()]})
    lines += ["## Versions", markdown(named)]
    return "\n\n".join(lines)


def part_lines(report: Report, part: str) -> list[str]:
    """Return a part's table, with a line for each thing, and its failures."""
    numbers = pd.DataFrame([line for line in report["numbers"] if line["part"] == part])
    lines = []
    if len(numbers):
        unit = numbers["unit"].where(numbers["unit"] == "", ", " + numbers["unit"])
        numbers["column"] = numbers["what"] + unit
        wide = numbers.pivot(index="of", columns="column", values="value")
        ordered = wide.loc[numbers["of"].unique(), numbers["column"].unique()]
        lines.append(markdown(printed(ordered.reset_index())))
    failed = [line for line in report["failures"] if line["part"] == part]
    named = [f"* {cell(line['of'])} failed: {cell(line['why'])}" for line in failed]
    lines += ["\n".join(named)] if named else []
    return lines or ["Not begun."]


def advice(report: Report) -> str:
    """Say which number to put where."""
    best = report["best budget, nodes"]
    place = f'`BUDGET["{report["device"]}"]` in `fpl/prompts.py`'
    now = BUDGET[report["device"]]
    if best is None:
        return f"Not measured: leave {place} at {now}."
    if report["device"] != "cuda" or report["sizes"]["trial"]:
        return f"The best in this trial is {best}: leave {place} at {now}."
    return f"Set {place} to {best}; it was {now} in this run."


def file_name(card: str) -> str:
    """Return a name of letters, digits and hyphens for files about a card."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")[:80] or "gpu"
