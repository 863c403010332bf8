"""The command line: what a user types first."""

from __future__ import annotations

import json

import pytest

from hf_accel import zoo
from hf_accel.cli import main
from hf_accel.errors import NotApplicable
from hf_accel.measure import demo


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
    status = main(["demo", "--out", str(tmp_path), "--steps", "2", "--set", "dense_steps=1", "kmeans_iter_init=2"])
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


def test_demo_of_a_step_cache_runs_on_the_miniature_with_a_unet(capsys, tmp_path):
    status = main(
        ["demo", "--out", str(tmp_path), "--method", "deepcache", "--steps", "10", "--set", "cache_interval=3"]
    )
    assert status == 0
    found = json.loads((tmp_path / "comparison.json").read_text())
    (ours,) = found["summary"]
    assert found["pipeline"] == "StableDiffusionPipeline"
    assert ours["label"] == "deepcache"
    assert 0.4 < ours["mac_share"] < 1  # four of ten steps are full
    assert 10 < ours["psnr_mean"] < 200
    assert (tmp_path / "side_by_side.png").stat().st_size > 1000
    assert not (tmp_path / "density.png").exists()
    out = capsys.readouterr().out
    assert "mini-sd" in out
    assert "4 full, 6 partial" in out
    assert f"{ours['mac_share']:.1%}" in out


def test_a_method_that_no_miniature_takes_is_refused_with_their_reasons(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "MINIATURES", (demo.MINI_WAN,))
    with pytest.raises(NotApplicable, match=r"No miniature of the zoo suits it. mini-wan: .*U-Net"):
        demo.demo(tmp_path, method="deepcache")
