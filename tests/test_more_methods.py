"""Promise: newer methods keep the promises of all methods, in every form that they have."""

import pytest
from helpers.runs import SIZES

from fpl.experiments import promises
from fpl.more_methods import MORE

FORMS = [(row, {}) for row in MORE] + [
    ("prograd", {"rule": "flip"}),
    ("afl", {"gamma": 0.0}),
    ("fedclip", {"contrast": "class"}),
    ("dpfpl", {"factorization": "fedpgp"}),
    ("dpfpl", {"factorization": "dplora", "sign": -1}),
    ("dpfpl", {"bound": 1.0, "noise": 0.5}),
]


@pytest.mark.parametrize(("row", "settings"), FORMS)
def test_they_keep_the_promises_of_all_methods(row, settings):
    kind = MORE[row]
    sizes = {name: n for name, n in SIZES.items() if name in kind.__dataclass_fields__}
    assert not promises.check(kind, sizes | settings)
