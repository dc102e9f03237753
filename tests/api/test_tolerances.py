from __future__ import annotations

import pytest

from vlmport.api.tolerances import TOLERANCES, near_tie_margin, tolerance_for


def test_every_row_has_a_reason_and_is_unique() -> None:
    keys = [(row.quantity, row.precision) for row in TOLERANCES]
    assert len(set(keys)) == len(keys)
    assert all(len(row.reason) > 40 for row in TOLERANCES)


def test_logits_are_held_to_the_promised_limit() -> None:
    row = tolerance_for("logits", "float32")
    assert (row.max_abs, row.is_relative) == (1e-4, False)
    assert near_tie_margin("float32") == 2e-4


def test_an_unknown_quantity_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean logits float32"):
        tolerance_for("logit", "float32")
