"""Measuring: quality beside speed, always against the unpatched model in the same run."""
