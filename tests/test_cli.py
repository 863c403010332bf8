"""The command line: what a user types first."""

from __future__ import annotations

import json

import pytest

from hf_accel import zoo
from hf_accel.cli import main


def test_methods_are_listed(capsys):
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert "svg2" in out
    assert "2505.18875" in out


def test_a_mistake_is_a_sentence_not_a_traceback(capsys, tmp_path):
    assert main(["demo", "--out", str(tmp_path), "--set", "top_p"]) == 2
    assert "A setting is given as name=value; got 'top_p'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["no-such-command"])


def test_demo_writes_pictures_and_figures(capsys, tmp_path):
    assert "mini-wan" in zoo.names()
    status = main(["demo", "--out", str(tmp_path), "--steps", "3", "--set", "dense_steps=1", "kmeans_iter_init=2"])
    assert status == 0
    found = json.loads((tmp_path / "comparison.json").read_text())
    dense, ours = found["summary"]
    assert dense["label"] == "dense"
    assert dense["psnr_mean"] == 200  # the seam changes no bit
    assert 0 < ours["density"] < 1
    assert ours["psnr_mean"] > 10
    assert found["reports"]["svg2"]["entries"][0]["run"]["generations"] == 1
    for name in ("side_by_side.gif", "density.png"):
        assert (tmp_path / name).stat().st_size > 1000
    out = capsys.readouterr().out
    assert "PSNR dB" in out
    assert "density in the sparse calls" in out
