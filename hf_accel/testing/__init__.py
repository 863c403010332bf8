"""The promises of methods as a test kit, for our own tests and for those of other packages.

    import pytest
    from hf_accel.testing import promises

    @pytest.mark.parametrize("promise", promises("my-method", "wan"), ids=str)
    def test_promises(promise):
        promise()

Importing it builds no model and needs no test runner. See ``docs/testing.md``.
"""

from hf_accel.testing.case import Case
from hf_accel.testing.claims import FAMILIES, REPRESENTATIVES, Family
from hf_accel.testing.kit import Promise, families, promises
from hf_accel.testing.outcome import BrokenPromise, Skipped

__all__ = [
    "FAMILIES",
    "REPRESENTATIVES",
    "BrokenPromise",
    "Case",
    "Family",
    "Promise",
    "Skipped",
    "families",
    "promises",
]
