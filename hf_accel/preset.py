"""Presets in files and on the Hub: the public face of :mod:`hf_accel.presets`."""

from hf_accel.presets.files import PRESET_FILE, dump, parse, to_yaml
from hf_accel.presets.loading import is_reference, load
from hf_accel.presets.preset import Match, Preset, Wanted

__all__ = ["PRESET_FILE", "Match", "Preset", "Wanted", "dump", "is_reference", "load", "parse", "to_yaml"]
