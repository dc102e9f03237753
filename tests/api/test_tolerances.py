from __future__ import annotations

from typing import get_args

import pytest

from vlmport.api.tolerances import TOLERANCES, near_tie_margin, tolerance_for
from vlmport.contract import Precision


def test_every_row_has_a_reason_and_is_unique() -> None:
    keys = [(row.quantity, row.precision) for row in TOLERANCES]
    assert len(set(keys)) == len(keys)
    assert all(len(row.reason) > 40 for row in TOLERANCES)


def test_logits_are_held_to_the_promised_limit() -> None:
    row = tolerance_for("logits", "float32")
    assert (row.max_abs, row.basis) == (1e-4, "absolute")
    assert near_tie_margin(row.max_abs) == 2e-4


def test_every_precision_has_the_same_quantities() -> None:
    quantities: dict[str, set[str]] = {}
    for row in TOLERANCES:
        quantities.setdefault(row.precision, set()).add(row.quantity)
    assert set(quantities) == set(get_args(Precision))
    assert len({frozenset(names) for names in quantities.values()}) == 1


def test_an_unknown_quantity_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean logits float32"):
        tolerance_for("logit", "float32")
