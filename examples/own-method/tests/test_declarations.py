"""What each method promises by itself: its declarations hold together, and wrong models are refused in words."""

import pytest

from hf_accel.testing import promises

METHODS = ("local-window", "int8-cache", "low-rank-repair", "skip-steps", "repeat-ngram", "wsd")
OF_ITSELF = [promise for method in METHODS for promise in promises(method) if promise.family is None]


@pytest.mark.parametrize("promise", OF_ITSELF, ids=str)
def test_declarations(promise):
    promise()
