"""Promise: the label-prior table is rebuilt exactly from label counts.

A wrong partition would be noticed.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from fpl.audit import label_prior
from fpl.released.splits import domain_dirichlet

ROOT = Path(__file__).parents[1]
GOLDEN = json.loads((ROOT / "tests/data/label_prior.json").read_text())
DATASETS = {"domainnet10": "DomainNet (10 classes)", "office_caltech10": "Office-Caltech10"}
CASES = [
    (file, beta, domain)
    for file in DATASETS
    for beta in GOLDEN[file]
    for domain in GOLDEN[file][beta]
]
SPREAD = {  # in points, over the five clients of a domain, and over all thirty
    **{"clipart": 9.32, "infograph": 13.41, "painting": 6.19, "quickdraw": 4.23},
    **{"real": 6.92, "sketch": 18.27, "average": 12.57},
}
MAJORITY = {
    "domainnet10": {
        "clipart": 47.83,
        "infograph": 47.86,
        "painting": 32.60,
        "quickdraw": 37.00,
        "real": 32.76,
        "sketch": 37.40,
        "average": 39.24,
    },
    "office_caltech10": {
        "amazon": 34.94,
        "caltech": 39.41,
        "dslr": 44.00,
        "webcam": 38.39,
        "average": 39.19,
    },
}


@pytest.fixture(scope="module", params=DATASETS)
def file(request):
    return request.param


@pytest.fixture(scope="module")
def counts():
    return {file: label_prior.read_counts(file) for file in DATASETS}


@pytest.fixture(scope="module")
def published():
    return label_prior.published()


def golden(file, beta, domain):
    clients = GOLDEN[file][beta][domain]
    return np.array(
        [[client[f"{split}_hist"] for client in clients] for split in ("train", "test")]
    )


@pytest.mark.parametrize(("file", "beta", "domain"), CASES)
def test_clients_are_those_of_the_released_code(counts, file, beta, domain):
    ours = label_prior.clients(counts[file][domain][0], beta=float(beta))
    assert np.array_equal(ours, golden(file, beta, domain))
    clients = GOLDEN[file][beta][domain]
    assert ours[0].argmax(-1).tolist() == [client["majority"] for client in clients]
    assert 100 * label_prior.majority(ours) == pytest.approx(
        [client["majority_test_acc"] for client in clients], abs=1e-4
    )


def test_another_seed_gives_other_clients(counts, file):
    domain = next(iter(counts[file]))
    ours = label_prior.clients(counts[file][domain][0], seed=1)
    assert not np.array_equal(ours, golden(file, "0.3", domain))


def test_every_image_has_one_client_and_global_state_is_left_alone():
    rng = np.random.default_rng(0)
    labels = rng.integers(10, size=500), rng.integers(10, size=200)
    before = np.random.get_state()[1].copy()
    parts = domain_dirichlet(labels, beta=5.0)
    assert np.array_equal(before, np.random.get_state()[1])
    for part, y in zip(parts, labels):
        assert sorted(np.concatenate(part)) == list(range(len(y)))


def test_list_order_does_not_change_the_label_counts():
    y = np.repeat(np.arange(10), 40)
    shuffled = np.random.default_rng(1).permutation(y)
    for a, b in zip(domain_dirichlet((y, y))[0], domain_dirichlet((shuffled, shuffled))[0]):
        assert np.array_equal(
            np.bincount(y[a], minlength=10), np.bincount(shuffled[b], minlength=10)
        )


def test_a_partition_that_would_never_end_raises():
    labels = np.zeros(20, int)
    with pytest.raises(
        ValueError, match=r"client \d would hold \d (train|test) images.*min_size=2"
    ):
        domain_dirichlet((labels, labels))


def test_majority_guess_of_each_domain(counts, file):
    ours = 100 * label_prior.guesses(counts[file])["majority"]
    assert ours.to_dict() == pytest.approx(MAJORITY[file], abs=0.005)


def test_the_spread_of_a_majority_guess_over_clients_is_that_of_all_of_them(counts):
    """By hand, of n and not n - 1; of all 30 it is not the mean of the domains'."""
    found = (100 * label_prior.guesses(counts["domainnet10"])["spread"]).to_dict()
    assert found == pytest.approx(SPREAD, abs=0.005)


@pytest.mark.parametrize(
    ("file", "best", "shared"), [("domainnet10", 39.24, 15.15), ("office_caltech10", 39.47, 16.33)]
)
def test_limits_without_an_image(counts, file, best, shared):
    average = 100 * label_prior.guesses(counts[file]).loc["average"]
    assert (average["best"], average["shared"]) == pytest.approx((best, shared), abs=0.005)


@pytest.mark.parametrize(("file", "average"), [("domainnet10", 32.52), ("office_caltech10", 30.37)])
def test_beta_of_the_default_flag_does_not_fit(counts, file, average):
    assert 100 * label_prior.guesses(counts[file], beta=0.5).loc[
        "average", "majority"
    ] == pytest.approx(average, abs=0.005)


@pytest.mark.parametrize(
    ("file", "rms", "r", "average"),
    [("domainnet10", 0.87, 0.993, 38.80), ("office_caltech10", 1.96, 0.905, 38.31)],
)
def test_fit_to_published_pfedmoap(counts, published, file, rms, r, average):
    rows = published[published["dataset"] == DATASETS[file]]
    ours = (
        label_prior.fits(label_prior.guesses(counts[file]), rows)
        .xs("pFedMoAP", level="method")
        .iloc[0]
    )
    assert 100 * ours["rms"] == pytest.approx(rms, abs=0.005)
    assert ours["r"] == pytest.approx(r, abs=0.001)
    assert 100 * ours["average"] == pytest.approx(average, abs=1e-9)


def test_no_other_seed_fits_domainnet(counts, published):
    rows = published[
        (published["dataset"] == DATASETS["domainnet10"]) & (published["method"] == "pFedMoAP")
    ]
    seeds = label_prior.null(counts["domainnet10"], rows.set_index("domain")["mean"], range(30))
    assert label_prior.as_good(seeds.loc[1:], seeds.loc[0]) == {
        "partitions": 28,
        "as near": 0,
        "as correlated": 0,
    }
    assert label_prior.as_good(seeds, seeds.loc[0]) == {
        "partitions": 29,
        "as near": 1,
        "as correlated": 1,
    }


def test_stratified_rule():
    only = label_prior.stratified(np.array([10, 25]))
    assert only.tolist() == [[[8, 20], [2, 5]]]
    tied = label_prior.stratified(
        np.array([13, 13, 13, 11])
    )  # 10 of 50 for test: 2.6, 2.6, 2.6, 2.2
    assert tied[:, 1].tolist() == [[3, 3, 2, 2], [3, 2, 3, 2], [2, 3, 3, 2]]
    assert (tied.sum(1) == [13, 13, 13, 11]).all()


def test_stratified_rule_gives_all_domainnet_counts(counts):
    for domain in counts["domainnet10"].values():
        splits = label_prior.stratified(domain[0].sum(0)).tolist()
        assert domain[0].tolist() in splits


def test_ties_of_webcam_are_explicit(counts):
    assert {domain: len(splits) for domain, splits in counts["office_caltech10"].items()} == {
        "amazon": 1, "caltech": 1, "dslr": 1, "webcam": 3,
    }  # fmt: skip
    webcam = 100 * label_prior.guesses(counts["office_caltech10"]).loc["webcam", ["low", "high"]]
    assert webcam.tolist() == pytest.approx([37.62, 38.78], abs=0.005)


def test_saved_table_is_in_percent_beside_the_published_rows(counts, published, tmp_path):
    guesses = {dataset: label_prior.guesses(counts[file]) for file, dataset in DATASETS.items()}
    label_prior.save(label_prior.comparison(guesses, published), tmp_path / "table")
    lines = (tmp_path / "table.csv").read_text().splitlines()
    assert lines[0] == "row,dataset,table,domain,method,variant,mean,std"
    assert any(
        line.endswith("DomainNet (10 classes),Table 3,average,pFedMoAP,,38.80,0.11")
        for line in lines
    )
    assert any(
        line.endswith("DomainNet (10 classes),ours,average,majority guess of each client,,39.24,")
        for line in lines
    )
    assert "| majority guess of each client | 34.94" in (tmp_path / "table.md").read_text()


def test_zero_shot_lies_where_unrelated_images_and_names_put_it(counts, published):
    """An image is right in one of ten cases; the mean over n has the deviation sqrt(0.09 / n)."""
    named = {dataset: counts[file] for file, dataset in DATASETS.items()}
    zero_shot = published[published["method"] == "ZS-CLIP"]
    table = label_prior.at_chance(named, zero_shot)
    assert len(table) == 12 and table["expected"].between(0.1 - 1e-9, 0.1 + 1e-9).all()
    webcam = table.loc[("Office-Caltech10", "Table 4", "webcam")]
    assert webcam["test images"] == 59 and webcam["deviation"] == pytest.approx(0.03906, abs=1e-5)
    assert webcam["away"] == pytest.approx((0.062 - 0.1) / 0.03906, abs=1e-3)
    average = table.loc[("Office-Caltech10", "Table 4", "average")]
    deviations = [np.sqrt(0.09 / n) for n in (192, 225, 32, 59)]
    assert average["deviation"] == pytest.approx(np.linalg.norm(deviations) / 4)
    assert (table["away"].abs() < 1.96 / np.sqrt(3)).all(), "as three seeds should"
    best = label_prior.at_chance(named, published[published["method"] == "pFedMoAP"])
    assert (best["away"].abs() > 3).all(), "a row that has learnt labels is far from it"


def test_a_guess_in_a_random_order_of_names_deviates_as_chance_says(counts):
    """Simulated: labels of a domain, images that say nothing, names shuffled in each process."""
    gen = np.random.default_rng(3)
    domain = counts["office_caltech10"]["amazon"]
    labels = np.repeat(np.arange(10), domain[0, 1])
    seen = gen.integers(10, size=len(labels))
    right = [(gen.permutation(10)[seen] == labels).mean() for _ in range(4000)]
    line = label_prior.chance(counts["office_caltech10"]).loc["amazon"]
    assert np.mean(right) == pytest.approx(line["expected"], abs=0.002)
    assert np.std(right) == pytest.approx(line["deviation"], rel=0.25)  # one draw of images
