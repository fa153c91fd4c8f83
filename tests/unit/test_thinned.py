"""Every case that `make test` leaves out is one of a test that there is."""

from pathlib import Path

import pytest
from thinned import CASES

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("name", CASES)
def test_it_names_a_test_and_its_parameters(name):
    file, _, function = name.partition("::")
    text = (TESTS / file).read_text()
    assert f"def {function}(" in text
    assert all(f'"{parameter}"' in text or f"{parameter}, " in text for parameter in CASES[name])
