from __future__ import annotations

import pytest

from farfield.bench import ceilings


@pytest.mark.usefixtures("quick_ceilings")
def test_rates_are_of_products_and_copies() -> None:
    found = ceilings.rates("float32", "cpu")
    assert found.matrix > 0 and found.memory > 0
    product = ceilings.MatrixProduct("float32", "cpu")
    assert (product.side, product.count) == (256, 1)
    assert product.rate([1.0, 2.0, 4.0]) == 2 * 256**3 / 2.0
    assert product.time() > 0
