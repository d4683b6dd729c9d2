from __future__ import annotations

import json
import subprocess

import pytest

from farfield.bench import doctor
from farfield.ops.multipole import ENGINES
from farfield.ops.multipole.triton import tuning


def test_every_engine_and_peer_is_told_about() -> None:
    facts = doctor.examine()
    json.dumps(facts)
    assert [row["engine"] for row in facts["engines"] if row["device"] == "cpu"] == list(ENGINES)
    for row in facts["engines"]:
        assert set(row["dtypes"]) | set(row["why_not"]) == {"float32", "float64", "bfloat16", "float16"}
        assert all(reason and "impl=" not in reason for reason in row["why_not"].values())
    assert facts["peers"]["sdpa"] is None
    assert "torch" in facts["versions"] and facts["versions"]["farfield"]
    assert facts["machine"]["threads"] >= 1
    assert facts["devices"][0]["name"] == "cpu"


def test_the_switch_of_tuning_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tuning.SWITCH, raising=False)
    assert tuning.SWITCH not in doctor.examine()["environment"]
    monkeypatch.setenv(tuning.SWITCH, "0")
    assert doctor.examine()["environment"][tuning.SWITCH] == "0"


def test_a_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor._compiler().startswith("none found")
    monkeypatch.setenv("CXX", "my-compiler -O2")
    assert doctor._compiler() == "$CXX is 'my-compiler -O2', which is not found"


def test_a_compiler_that_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("c++", 20)

    monkeypatch.setattr(doctor.shutil, "which", lambda name: name)
    monkeypatch.setattr(doctor.subprocess, "run", fail)
    assert "does not run" in doctor._compiler()
