"""QWHA as a tuner of peft."""
