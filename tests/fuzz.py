"""Fuzzing: a target takes what is drawn and must return, or raise an `InputError` of short lines, soon."""

import os
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy, tuples

from guard import within
from pixart.errors import InputError

# 200 examples in the fast suite, 2,000 in the slow one
fuzzed = pytest.mark.parametrize("examples", [200, pytest.param(2000, marks=pytest.mark.slow)])


def fuzz(target: Callable, *drawn: SearchStrategy, examples: int, lines: int = 1, seconds: float = 20) -> None:
    """Call `target` with `examples` drawn arguments. Fails with any other exception than an InputError, with an error
    of more than `lines` lines or 2,000 characters, or if a call takes longer than `seconds`.

    The arguments drawn are the same in every run unless PIXART_FUZZ=anew is set: whether a commit passes must not hang
    on chance, and a search for new failures is started by hand.
    """

    @settings(
        max_examples=examples,
        suppress_health_check=[*HealthCheck],
        derandomize=os.environ.get("PIXART_FUZZ") != "anew",
    )
    @given(tuples(*drawn))
    def run(arguments: tuple) -> None:
        message = ""
        try:
            with within(seconds):
                target(*arguments)
        except InputError as error:
            message = str(error)
        assert len(message.splitlines()) <= lines, message
        assert len(message) <= 2000, message

    run()
