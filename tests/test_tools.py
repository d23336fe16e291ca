"""tests/tune.py, bench.py, faithfulness.py and pieces.py: that they measure what they say."""
import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    ROOT, change_prep, run_stage, sentence, stage, write_joint, write_prep, write_run)

import common

bench, faithfulness = stage("bench"), stage("faithfulness")
SMALL = "width=16", "batch=16", "epochs=1", "per_class=2,3,2"


# ---- tune.py

@pytest.fixture
def tune(tmp_path, monkeypatch):
    """tune(trials, *flags, study, prep): a search with stages in this process; its trials."""
    optuna = pytest.importorskip("optuna")

    def run(command, **_):
        try:
            run_stage(monkeypatch, Path(command[1]).stem, *command[2:])
        except SystemExit as e:
            return SimpleNamespace(returncode=1, stderr=str(e))
        return SimpleNamespace(returncode=0)

    def search(trials, *flags, study="study", prep="prep"):
        storage = f"sqlite:///{tmp_path}/{study}.db"
        run_stage(monkeypatch, "tune", "--model", "rhythm", "--trials", trials, "--study", storage,
                  "--prep", tmp_path / prep, "--threads", 1, "--set", *SMALL, *flags)
        trials = optuna.load_study(study_name="rhythm", storage=storage).trials
        return [(t.params, t.value) for t in trials]

    monkeypatch.setattr(stage("tune"), "subprocess", SimpleNamespace(run=run))
    return search


def test_tuning_goes_on_blind_to_fold_10_and_its_best_can_be_trained(
        tune, tmp_path, monkeypatch, capsys):
    """Two trials, one after the other; and both at once with fold 10 replaced by garbage."""
    prep = write_prep(tmp_path / "prep")
    signals, labels = np.array(prep.signals), np.array(prep.labels)
    signals[prep.test], labels[prep.test] = 50, 1 - labels[prep.test]
    write_prep(tmp_path / "poisoned")
    change_prep(tmp_path / "poisoned", signals=signals, labels=labels)
    search = "lambda_div=0", "--search", "training", "lambdas", "batch", "per_class"
    tune(1, *search)
    found = tune(2, *search)
    line = capsys.readouterr().out.splitlines()[-1]
    assert found == tune(2, *search, study="other", prep="poisoned")
    assert len(found) == 2 and found[0][0]["lr"] != found[1][0]["lr"]
    assert len(found[0][0]) == 9  # four for training, lambdas but of no term, batch, per_class
    flags = ["--run", tmp_path / "run", "--prep", tmp_path / "prep", "--model", "rhythm"]
    run_stage(monkeypatch, "02_train_joint", *flags, "--set", *line.split("--set ")[1].split())
    for name in ("03_project", "04_fusion"):
        run_stage(monkeypatch, name, *flags)
    best = common.load(tmp_path / "run/classifiers/rhythm.pt", "")["meta"]["val_auroc"]
    assert best == max(value for _, value in found) and f"{best:.4f}" in line


def test_what_tuning_refuses_and_what_it_survives(tune, tmp_path, monkeypatch):
    def refused(*given, **more):
        with pytest.raises(SystemExit) as e:
            tune(*given, **more)
        return sentence(e)

    assert "run 01_preprocess.py first" in refused(1)
    write_prep(tmp_path / "prep")
    write_prep(tmp_path / "others", codes=("NORM", "IMI"))
    assert "no rhythm label" in refused(1, study="others", prep="others")  # what 02 said
    tune(1)
    assert "other settings" in refused(2, "top_k=3") and "other settings" in refused(2, "--seed", 1)
    assert "other settings or data" in refused(2, prep="others")
    monkeypatch.setattr(stage("02_train_joint"), "augment", lambda x, samples: x * np.nan)
    assert "diverged" in refused(2, study="diverging")
    assert tune(2)[1][1] is None  # a pruned trial beside a finished one


@pytest.mark.slow
def test_two_workers_share_a_study(tmp_path):
    """They begin at the same moment, with a database that is not there yet."""
    prep, study = write_prep(tmp_path / "prep").path.parent, f"sqlite:///{tmp_path}/study.db"
    flags = ["--model", "rhythm", "--trials", 4, "--threads", 1, "--study", study, "--prep", prep]
    command = [sys.executable, ROOT / "tests/tune.py", *flags, "--set", *SMALL]
    workers = [subprocess.Popen([*map(str, command)]) for _ in range(2)]
    assert [worker.wait() for worker in workers] == [0, 0]
    trials = pytest.importorskip("optuna").load_study(study_name="rhythm", storage=study).trials
    assert 4 <= len(trials) <= 5
    assert len({t.params["lr"] for t in trials}) == len(trials)


# ---- bench.py

def test_flop_of_a_step_are_three_times_those_of_the_forward_pass():
    macs = 500 * 12 * 7 * 16 + 250 * 4 * 3 * 16**2  # the stem and the first stage of width 16
    for i, length in enumerate((125, 63, 32), start=1):
        c = 16 * 2**i
        macs += length * (3 * (c // 2) * c + 3 * 3 * c * c + (c // 2) * c)
    got = bench.step_flop("blackbox-1d", 16)
    assert got == pytest.approx(3 * 2 * macs, rel=0.05)  # but for the stem's input and the head


@pytest.mark.parametrize("others", [0.04, 0.06])
def test_a_busy_machine_gives_no_seconds(tmp_path, monkeypatch, others):
    """Each stage takes 10 s and 7 s of CPU time; other programs take a share of the machine."""
    each = np.array([10.0, 7.0, 7.0 + 10 * others * bench.os.cpu_count()])
    steps, printed = iter(range(100)), "  3.0 s     1 min left  2.0 s     0 min left"
    monkeypatch.setattr(bench, "clocks", lambda: each * next(steps))
    monkeypatch.setattr(bench, "stage", lambda *_: (0.5, printed))
    write_prep(tmp_path / "prep")  # 48 records for training
    args = SimpleNamespace(data=tmp_path, synthetic=None, width=16)
    _, *rows = bench.measure_stages(args, tmp_path, peak=1e9)
    steps = {row[0]: row[1:] for row in rows}
    share = round(24 * bench.step_flop("rhythm", 16) / 1e9, 3)
    whole, epoch = [10.0, "–", "–"], [2.0, 24, share]
    if others > 0.05:
        whole = epoch = [bench.BUSY, "–", "–"]
    assert steps["02, an epoch of rhythm"] == [*epoch, 7.0, 0.5]
    assert all(steps[name] == [*whole, 7.0, 0.5] for name in "01 03 04 05 06".split())


def test_sizes_and_latency_of_a_run(tmp_path):
    path = write_joint(tmp_path / "run", write_prep(tmp_path / "prep"), "rhythm")
    (name, parameters, mb, ms), = bench.sizes_and_latency(tmp_path / "run")
    assert name == "rhythm" and mb == pytest.approx(4 * parameters / 1e6, rel=0.05)
    assert mb == pytest.approx(path.stat().st_size / 1e6, rel=0.1) and 0 < ms < 1e4


def test_the_plain_network_has_the_layers_of_ours(tmp_path):
    cfg = common.Config(width=16, pool="mean")
    plain, ours = bench.plain.resnet(16).eval(), common.BlackBox(common.CODES, cfg).eval()
    state = {k: v for k, v in ours.state_dict().items() if k not in ("mean", "std")}
    for v, other in zip(plain.state_dict().values(), state.values(), strict=True):
        v.copy_(other + 0.01 if v.is_floating_point() else other)
        other.copy_(v)
    x = torch.randn(3, 12, 1000)
    torch.testing.assert_close(plain(x), ours(x), rtol=1e-4, atol=1e-4)
    write_prep(tmp_path)
    assert (bench.plain.compare(tmp_path, 16, records=40, times=1) > 0).all()


# ---- faithfulness.py

def test_evidence_equals_a_slow_loop():
    rng = np.random.default_rng(0)
    X, W, b = rng.normal(size=(20, 6)), rng.normal(size=(3, 6)), rng.normal(size=3)
    needed, three, against = [], [], []
    for x in X:
        for w, bias in zip(W, b):
            terms = w * x
            if terms.sum() + bias < 0:
                continue
            size, k = sorted(map(abs, terms), reverse=True), 1
            while sum(size[:k]) < 0.95 * sum(size):
                k += 1
            needed.append(k)
            three.append(sum(size[:3]) / sum(size))
            against.append(-terms[terms < 0].sum() / sum(size))
    found = faithfulness.evidence(X, W, b, np.zeros(3))
    assert list(found.values()) == pytest.approx(
        [np.mean(needed), np.mean(three), np.mean(against)])


# ---- pieces.py

def test_the_curve_passes_through_what_04_chose(tmp_path, monkeypatch):
    prep = write_prep(tmp_path / "prep")
    for run in ("a", "b"):
        write_run(monkeypatch, tmp_path / run, prep)
    monkeypatch.setattr(stage("pieces"), "ROOT", tmp_path)
    run_stage(monkeypatch, "pieces", tmp_path / "a", tmp_path / "b", "--prep", tmp_path / "prep")
    out = tmp_path / "tests/results"
    lines = (out / "pieces.csv").read_text().splitlines()
    assert lines[-1] == "# a and b 100.0%"
    table = pd.DataFrame(csv.DictReader(lines[:-1]))
    saved = common.load(tmp_path / "a/classifiers/fusion.pt", "")["meta"]
    row, = table[(table["chosen"] == "True") & (table["fold"] == "9") & (table["run"] == "a")].iloc
    assert float(row["auroc"]) == pytest.approx(saved["val_auroc"], abs=0.002)
    assert abs(int(row["weights"]) - saved["nonzero"]) <= 3  # other starts of the solver
    weights = table[(table["fold"] == "10") & (table["run"] == "b")]["weights"].astype(int)
    assert weights.is_monotonic_increasing and (out / "pieces.png").stat().st_size > 9000


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
    shifted, samples = found["shift +0.2 s"]
    assert np.array_equal(shifted[..., 20:], x[..., :-20]) and samples == 20


def test_bridge_and_the_place_of_the_control():
    x = np.arange(24000.0).reshape(2, 12000)[:, :1000] ** 1.5
    mask = np.zeros(1000, bool)
    mask[300:400] = True
    got = faithfulness.bridged(x, mask)
    assert np.array_equal(got[:, ~mask], x[:, ~mask])
    assert np.allclose(np.diff(got[0, 299:401], 2), 0)
    other = faithfulness.elsewhere(mask, np.random.default_rng(0))
    assert other.sum() == 100 and not (other & mask).any()


def test_what_is_measured_of_a_branch_and_its_first_prototypes():
    """Of three prototypes the first two are of one class, so of one piece of evidence."""
    p, p_class = torch.tensor([[1.0, 0], [0, 1], [1, 1]])[:, :, None], torch.tensor([0, 0, 1])
    head = SimpleNamespace(
        networks=[SimpleNamespace(p=p, p_class=p_class, a=1.0)], A=np.eye(2)[[0, 0, 1]],
        prototypes=[{"class": "SR", "ecg_id": i, "window": 0} for i in (1, 1, 2)],
        mean=0, std=1, W=np.array([[0.0, 1.0], [1.0, 2.0]]))
    s = np.array([[0.9, 0.1, 0.3], [0.1, 0.3, 0.05]])
    assert faithfulness.first_prototypes(head, s, [1, 1]).tolist() == [2, 1]
    s[:, 0], head.W[:, 1] = 0.3, 0  # the first is constant, the third of a piece without weights
    found = faithfulness.measure_branch(head, s, np.eye(2), np.eye(2))
    assert list(found.values())[:4] == pytest.approx([1 / 3, 2, 1, 1 - 0.5**0.5])


def test_a_run_is_measured(tmp_path, monkeypatch):
    run = write_run(monkeypatch, tmp_path / "run", write_prep(tmp_path / "prep", n=100))
    heads = {name: common.load_run(run, [name])[0] for name in (*common.BRANCHES, "fusion")}
    heads["morphology"].thresholds -= 9  # so that it predicts
    monkeypatch.setattr(common, "load_run", lambda _, names: [heads[names[0]]])
    run_stage(monkeypatch, "faithfulness", "--run", run, "--prep", tmp_path / "prep")
    found = json.loads((run / "faithfulness.json").read_text())
    assert set(found) == {*common.BRANCHES, "fusion"} and found["rhythm"]["duplicates"] == 0
    assert {"logit drop, cut", "window, wander"} <= set(found["morphology"])


# ---- pack.py

def test_a_packed_run_says_the_same_and_holds_no_more_ecgs_than_it_must(tmp_path, monkeypatch):
    prep = write_prep(tmp_path / "prep")
    run, out = write_run(monkeypatch, tmp_path / "run", prep), tmp_path / "out"
    run_stage(monkeypatch, "05_evaluate", "--run", run, "--prep", tmp_path / "prep")
    run_stage(monkeypatch, "pack", "--run", run, "--out", out)
    x = prep.signals[:20]
    ours, theirs = (common.predict(common.load_run(folder), x) for folder in (run, out))
    np.testing.assert_allclose(ours, theirs, atol=0.01)
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files == {"README.md", "classifiers/fusion.pt", *(
        f"{b}/{f}" for b in common.BRANCHES
        for f in ("projected.pt", "prototypes.json", "prototypes.npy.gz"))}
    kept = common.load(out / "classifiers/fusion.pt", "")
    assert "logits" not in kept and kept["W"].dtype == torch.float64
    text = (out / "README.md").read_text()
    assert "python 04_fusion.py" in text and "CC BY 4.0" in text and "{" not in text
