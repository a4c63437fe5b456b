"""Expressions that are matched without backtracking: the names Python's `re` matches, and in bounded time."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subspace3d.patterns import compile_pattern

ATOMS = ["a", "b", "ab", r"\.", ".", "[ab]", "[^a]", "[a-c1]", r"\d", r"\w", r"[\d_]", "1", "^", "$", r"\-", "}", "]"]
plain = st.sampled_from(ATOMS)
expressions = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{0,2}", "{1,}", "{,2}", "*?", "+?"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(expressions, st.lists(st.sampled_from("ab1.c-"), max_size=7).map("".join))
def test_the_same_names_match_as_by_re(expression: str, name: str) -> None:
    pattern = compile_pattern(expression)
    assert pattern.matches(name) == bool(re.fullmatch(expression, name))
    # PEFT's reading of the keys of rank_pattern
    assert pattern.matches_suffix(name) == bool(re.match(rf"(.*\.)?({expression})$", name))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text("ab.*+?{}()[]|^$\\1,-", max_size=8))
def test_what_is_no_expression_is_refused_and_nothing_is_read_otherwise(text: str) -> None:
    try:
        pattern = compile_pattern(text)
    except ValueError as error:
        assert "expression" in str(error)
        return
    for name in ("", "a", "ab", "a.b", "1", "b*", "a]", "-"):
        assert pattern.matches(name) == bool(re.fullmatch(text, name)), name


@pytest.mark.parametrize(
    "text", ["a", r"aggregator\.frame_blocks\.0\.attn\.qkv|depth_head\.x", r"^a\.b", "a|b|", "x" * 60_000]
)
def test_plain_names_are_looked_up(text: str) -> None:
    pattern = compile_pattern(text)
    for name in (*text.replace("\\", "").replace("^", "").split("|"), "q.a", "q.a.b", "other"):
        assert pattern.matches(name) == bool(re.fullmatch(text, name))
        assert pattern.matches_suffix(name) == bool(re.match(rf"(.*\.)?({text})$", name))


@pytest.mark.parametrize("text", ["(a*)*b", "(a|a)*b", "(a?){50}" * 8 + "b", ".*" * 100 + "b", "((((a+)+)+)+)+b"])
def test_no_expression_takes_for_ever(text: str) -> None:
    before = time.process_time()
    assert not compile_pattern(text).matches("a" * 300)
    assert time.process_time() - before < 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(?i)a", "inline flags"),
        ("(?P<n>a)", "named groups"),
        ("a(?=b)", "looking around"),
        (r"(a)\1", "an escape that is not read"),
        (r"\ba", "an escape that is not read"),
        ("a**", "a repetition of a repetition"),
        ("a{101}", "a repetition must be"),
        ("(" * 60 + ")" * 60, "groups more than 50 deep"),
        ("." * 5000, "at most 4000 characters"),
        ("[b-a]", "a bad range"),
        ("a)", r"\) without \("),
    ],
)
def test_what_is_not_read_is_named(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        compile_pattern(text)
