"""Presets in files and on the Hub: the public face of :mod:`hf_accel.presets`."""

from hf_accel.presets.preset import PRESET_FILE, Match, Preset, Wanted, dump, is_reference, load, parse, to_yaml

__all__ = ["PRESET_FILE", "Match", "Preset", "Wanted", "dump", "is_reference", "load", "parse", "to_yaml"]
