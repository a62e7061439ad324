"""Exact-match rewards: which number counts, and that no text raises."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_pr2.rl.rewards import exact_match, extract_number

CASES = {
    # the last number
    "15 20 29": 29,
    "~27": 27,
    "The answer is 42.": 42,
    "1,234 apples cost $5,678.50.": Fraction("5678.5"),
    "about 3.0": 3,
    ".5": Fraction(1, 2),
    "first 1,2": 2,
    "1,2345": 2345,
    "007": 7,
    "100%": 100,
    # signs
    "-3": -3,
    "= -3": -3,
    "+3": 3,
    "10-3": 3,
    "10 - 3": 3,
    "10 -3": -3,
    "(2)-3": 3,
    "\u22128": -8,
    "-$1,234.50": Fraction("-1234.5"),
    "$-5": -5,
    "\\$18": 18,
    # an explicit answer field wins over later numbers
    "#### 18": 18,
    "so 5 and 6\n#### -1,450,000 (of 7)": -1450000,
    "#### 1\n#### 2": 2,
    "\\boxed{18} is 3 times 6": 18,
    "\\boxed{1} no, \\boxed{2}": 2,
    "\\boxed{42 \\text{ dollars}}": 42,
    "\\boxed{\\frac{1}{2}}": Fraction(1, 2),
    "\\boxed{-\\dfrac{3}{4}}": Fraction(-3, 4),
    # no answer
    "": None,
    "none": None,
    "5 apples ####": None,
    "7 \\boxed{}": None,
    "7 \\boxed{8": 8,
    "\\boxed{1 or 2}": None,
    "\\boxed{\\frac{1}{0}}": None,
    "9" * 10_000: None,
    "-": None,
    "\u0665": None,
}


@pytest.mark.parametrize(("text", "number"), CASES.items(), ids=lambda value: repr(value)[:40])
def test_number_of_a_response(text, number):
    assert extract_number(text) == number


def test_comparison_is_exact():
    assert exact_match("18.00", "18") == 1.0
    assert exact_match("0.1", "0.10") == 1.0
    assert exact_match("0.30000000000000004", "0.3") == 0.0
    assert exact_match("12345678901234567891", "12345678901234567890") == 0.0
    assert exact_match("#### 70,000", "70000") == 1.0
    assert exact_match("no idea", "none") == 0.0  # nothing equals nothing


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.text(alphabet="0123456789.,-+$# \\{}boxedfrac\u2212")))
def test_any_text_gets_a_reward(text):
    assert exact_match(text, "5") in (0.0, 1.0)


@given(st.integers(-(10**12), 10**12), st.booleans())
def test_every_integer_is_read_back(value, grouped):
    assert extract_number(f"so it is {value:,}." if grouped else f"7 8 {value}") == value


@given(st.decimals(allow_nan=False, allow_infinity=False, places=4, min_value=-(10**9), max_value=10**9))
def test_every_decimal_is_read_back(value):
    assert extract_number(f"x = {value:f} dollars") == Fraction(value)
