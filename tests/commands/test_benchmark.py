"""The command that benchmarks: what it does around a benchmark."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from audiot.benchmark.features import FeatureBenchmark
from audiot.commands.benchmark import main


def test_a_second_run_is_set_beside_the_first_whatever_fails(tmp_path, monkeypatch, caplog):
    task = SimpleNamespace(overrides=SimpleNamespace(task=[]))
    monkeypatch.setattr("audiot.commands.benchmark.HydraConfig", SimpleNamespace(get=lambda: task))

    def measure(folder, compare, milliseconds, broken=False):
        def report(self, run, machine):
            header, line = ",".join([*self.key, self.figure]), ",".join([*self.key, str(milliseconds)])
            (run / "results.csv").write_text(f"{header}\n{line}\n")
            if broken:
                raise ValueError("1 of 1 measurements failed")

        monkeypatch.setattr(FeatureBenchmark, "report", report)
        target = "audiot.benchmark.features.FeatureBenchmark"
        settings = {"_target_": target, "features": ["mfcc"], "utterances": 1, "duration_s": 0.1, "rounds": 1, "device": "cpu"}
        (tmp_path / folder).mkdir()
        settings |= {"compare": compare}
        with caplog.at_level("INFO"):
            main(OmegaConf.create({"run_dir": str(tmp_path / folder), "seed": 0, "benchmark": settings}))

    measure("first", None, 4)
    assert not (tmp_path / "first" / "comparison.md").exists()
    with pytest.raises(ValueError, match="1 of 1 measurements failed"):
        measure("second", str(tmp_path / "first" / "results.csv"), 3, broken=True)
    text = (tmp_path / "second" / "comparison.md").read_text()
    assert "0.750 |" in text
    assert text in caplog.text
    (tmp_path / "other.csv").write_text("mechanism,median_ms\na,1\n")
    with pytest.raises(ValueError, match="no column features, channels, audiot_ms"):
        measure("third", str(tmp_path / "other.csv"), 3)
    assert not list((tmp_path / "third").iterdir())
