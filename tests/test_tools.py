"""tests/tune.py, bench.py and faithfulness.py: that they measure what they say."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, change_prep, stage, write_prep, write_run

import common

faithfulness = stage("faithfulness")


def tool(name, *flags):
    return subprocess.run([sys.executable, f"tests/{name}.py", *map(str, flags)], cwd=ROOT, capture_output=True,
                          text=True)


@pytest.mark.slow  # nine processes a study
def test_tuning_is_blind_to_fold_10_and_goes_on(tmp_path):
    optuna = pytest.importorskip("optuna")
    prep, values = write_prep(tmp_path / "prep"), {}
    flags = ["--model", "rhythm", "--threads", 1, "--set", "width=16", "batch=16", "epochs=1", "start=random"]
    for name in ("clean", "poisoned"):
        study = f"sqlite:///{tmp_path}/{name}.db"
        for trials in (1, 2) if name == "clean" else (2,):  # in two parts, and in one
            done = tool("tune", *flags, "--trials", trials, "--study", study, "--prep", tmp_path / "prep")
            assert done.returncode == 0, done.stderr
        assert "--set lr=" in done.stdout.splitlines()[-1]
        values[name] = [t.value for t in optuna.load_study(study_name="rhythm", storage=study).trials]
        labels = np.array(prep.labels)
        labels[prep.test] = 1 - labels[prep.test]
        change_prep(tmp_path / "prep", labels=labels)
    assert len(values["clean"]) == 2 and values["clean"] == values["poisoned"]
    done = tool("tune", *flags, "--trials", 3, "--study", study, "--prep", tmp_path / "prep", "--search", "batch")
    assert done.returncode == 1 and "other settings" in done.stderr.splitlines()[-1]


def test_flop_of_a_step_are_three_times_those_of_the_forward_pass():
    bench = stage("bench")
    macs = 500 * 12 * 7 * 16 + 250 * 4 * 3 * 16**2  # the stem and the first stage of width 16
    for i, length in enumerate((125, 63, 32), start=1):
        c = 16 * 2**i
        macs += length * (3 * (c // 2) * c + 3 * 3 * c * c + (c // 2) * c)
    got = bench.step_flop("blackbox-1d", 16)
    assert got == pytest.approx(3 * 2 * macs, rel=0.05)  # but for the stem's input and the head


def test_evidence_equals_a_slow_loop():
    rng = np.random.default_rng(0)
    X, W, b, thresholds = rng.normal(size=(20, 6)), rng.normal(size=(3, 6)), rng.normal(size=3), np.zeros(3)
    needed, against = [], []
    for x in X:
        for w, bias in zip(W, b):
            terms = w * x
            if terms.sum() + bias < 0:
                continue
            size, k = sorted(map(abs, terms), reverse=True), 1
            while sum(size[:k]) < 0.95 * sum(size):
                k += 1
            needed.append(k)
            against.append(-terms[terms < 0].sum() / sum(size))
    found = faithfulness.evidence(X, W, b, thresholds)
    assert list(found.values()) == pytest.approx([np.mean(needed), np.mean(against)])


def test_purity_lift_of_perfect_and_of_blind_prototypes():
    y = np.zeros((1000, 1))
    y[:15] = 1
    assert faithfulness.purity_lift(y, y, np.array([0])) == pytest.approx(1 / 0.015)
    assert faithfulness.purity_lift(1 - y, y, np.array([0])) == 0
    assert np.isnan(faithfulness.purity_lift(y, np.zeros((1000, 1)), np.array([0])))


def test_disturbances_are_as_large_as_they_say():
    x = np.random.default_rng(1).normal(size=(5, 12, 1000))
    found = faithfulness.disturbed(x, np.random.default_rng(0))
    noise = found["20 dB noise"][0] - x
    assert 10 * np.log10((x**2).mean() / (noise**2).mean()) == pytest.approx(20, abs=0.2)
    assert 0.05 < np.abs(found["wander"][0] - x).max() < 0.5
    assert np.array_equal(found["shift +0.2 s"][0][..., 20:], x[..., :-20]) and found["shift +0.2 s"][1] == 20


def test_bridge_and_the_place_of_the_control():
    x, mask = np.arange(24000.0).reshape(2, 12000)[:, :1000] ** 1.5, np.zeros(1000, bool)
    mask[300:400] = True
    got = faithfulness.bridged(x, mask)
    assert np.array_equal(got[:, ~mask], x[:, ~mask]) and np.allclose(np.diff(got[0, 299:401], 2), 0)
    other = faithfulness.elsewhere(mask, np.random.default_rng(0))
    assert other.sum() == 100 and not (other & mask).any()


def test_a_run_is_measured(tmp_path, monkeypatch):
    prep = write_prep(tmp_path / "prep", n=100)
    write_run(monkeypatch, tmp_path / "run", prep)
    monkeypatch.setattr(sys, "argv", ["x", "--run", str(tmp_path / "run"), "--prep", str(tmp_path / "prep")])
    faithfulness.main()
    found = json.loads((tmp_path / "run/faithfulness.json").read_text())
    assert set(found) == {*common.BRANCHES, "fusion"}
    assert found["rhythm"]["duplicates"] == 0 and {"logit drop, cut", "window, wander"} <= set(found["morphology"])
    net = common.load_run(tmp_path / "run", ["rhythm"])[0].networks[0]
    unit = torch.nn.functional.normalize(net.p.detach().double().flatten(1), dim=1)
    same = net.p_class[:, None] == net.p_class
    S = unit @ unit.T
    assert found["rhythm"]["separation"] == pytest.approx(1 - float(S[~same].mean()), abs=1e-4)
