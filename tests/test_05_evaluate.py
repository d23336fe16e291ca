"""05_evaluate.py: its AUROC, bootstrap, thresholds and per-batch variant against slow references and scikit-learn, its
tables as a function of the saved files alone, and one sentence for every kind of bad input."""
import html.parser
import json
import re
import shutil
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from sklearn.metrics import average_precision_score, cohen_kappa_score, f1_score, roc_auc_score

import common
from common import BRANCHES, CODES, GROUPS, MODELS, columns
from conftest import run_stage, sentence, stage, write_joint, write_prep

ev = stage("05_evaluate")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # pytest undoes the stage's own filter
NO_TRAIN, NO_TEST, ONE_TEST = "TRIGU", "PMI", "2AVB"  # labels without a training record, test positive; with one
PROTOTYPES = [m for m, (kind, _) in MODELS.items() if kind != "blackbox"]
EVERY = [m for p in PROTOTYPES for m in (p, f"{p}-joint", f"{p}-projected", f"{p}-unprojected")]
EVERY += [m for m in MODELS if m not in PROTOTYPES]
EVERY += ["fusion", "fusion-own", "fusion-unprojected", "macro", "blackbox-macro"]


# ---------------------------------------------------------------------------------------------------------------------
# A PREP and runs as 01-04 leave them, with invented numbers

def fake_prep(folder, sizes=(60, 150, 170), seed=0):
    """A PREP without signals: (train, fold 9, fold 10) records, one to three of a patient; returns load_prep of it."""
    rng, n = np.random.default_rng(seed), sum(sizes)
    folds = np.repeat([1, 9, 10], sizes)
    order = rng.permutation(n)
    patients = np.repeat(np.arange(n), rng.integers(1, 4, n))[:n] * 10 + folds  # of one patient, one fold
    labels = (rng.random((n, 71)) < rng.uniform(0.01, 0.3, 71)).astype(np.uint8)
    for fold in (1, 9, 10):
        labels[np.flatnonzero(folds == fold)[:2]] = 1
    labels[folds <= 8, CODES.index(NO_TRAIN)] = 0
    labels[folds == 10, CODES.index(NO_TEST)] = 0
    labels[np.flatnonzero(folds == 10), CODES.index(ONE_TEST)] = np.arange(sizes[2]) == 5
    arrays = {"signals": np.zeros((n, 12, 1), np.float32), "labels": labels[order], "folds": folds[order],
              "ecg_ids": 5 + 2 * rng.permutation(n), "patient_ids": patients[order]}
    for name, array in arrays.items():
        common.save_npy(folder / f"{name}.npy", array)
    common.save_json(folder / "preprocess.json", {
        "format": common.FORMAT, "scaler": {}, "jaccard": [],
        "sizes": dict(zip(("train", "validation", "test"), sizes)), "seed": seed, "without_training_record": [NO_TRAIN],
        "sha256": {name: common.file_hash(folder / f"{name}.npy") for name in arrays},
        "shapes": {name: list(array.shape) for name, array in arrays.items()}})
    return common.load_prep(folder)


def fake_run(run, prep, names=EVERY, seed=42, contrastive=True, width=64, **settings):
    """A RUN in which the predictions `names` are the labels plus noise; each model's files hold only its name."""
    rng = np.random.default_rng([seed, contrastive, width])
    later = prep.val | prep.test
    cfg = common.Config(seed=seed, width=width, **settings)
    cfg = cfg if contrastive else common.without_contrastive(cfg)
    saved = {"format": common.FORMAT, "inputs": {"prep": common.file_hash(prep.path)}, "models": {}}
    for name in [m for m in MODELS if m in names]:
        (run / name).mkdir(parents=True)
        for file in ("joint.pt", "projected.pt"):
            (run / name / file).write_text(f"{name} {file}")
        common.save_json(run / name / "joint.json", {**common.provenance(cfg, "05_evaluate.py"), "device": "cpu",
                                                    "seconds": 12.3})
        common.save_json(run / name / "prototypes.json", {
            "format": common.FORMAT, "gap": {"morphology": 0.5}.get(name, 0.25), "distinct": 9,
            "prototypes": [{}] * {"morphology": 30}.get(name, 10),
            "inputs": {"joint": common.file_hash(run / name / "joint.pt")}})
    logits = {}
    for name in names:
        base = re.sub("-(joint|projected|unprojected)$", "", name)
        classes = [c for c in GROUPS[MODELS[base][1] if base in MODELS else "all"] if c != NO_TRAIN]
        members = [b if name == "macro" else f"blackbox-{b}" for b in BRANCHES]
        logits[name] = np.full((later.sum(), 71), np.nan, np.float32)
        if name in ("macro", "blackbox-macro"):
            for b, m in zip(BRANCHES, members):
                cols = columns([c for c in GROUPS[b] if c != NO_TRAIN])
                logits[name][:, cols] = logits[m][:, cols]
            inputs = {}
        else:
            y = prep.labels[later][:, columns(classes)]
            logits[name][:, columns(classes)] = (1.5 * y + rng.normal(size=y.shape)).round(1)  # with ties
            parts = BRANCHES if base not in MODELS else [base]
            inputs = {f"{m}/projected.pt": common.file_hash(run / m / "projected.pt") for m in parts}
            if base.startswith("blackbox"):
                inputs = {f"{name}/joint.pt": common.file_hash(run / name / "joint.pt")}
        common.save_npy(run / f"logits_{name}.npy", logits[name])
        saved["models"][name] = {"about": name, "classes": classes, "inputs": inputs}
        if not base.startswith(("blackbox", "macro")) and not name.endswith(("-joint", "-projected")):
            saved["models"][name].update(nonzero=7, weights=100)
    common.save_json(run / "predictions.json", saved)
    return run


def measured(args, models):
    """Invented sizes and times, for runs whose models are not there to be measured."""
    rows = {n: {"parameters": 10 ** 6 + i, "MB": 4.01, "ms 1": 2.5, "peak 1": 9.1, "ms 256": 0.5, "peak 256": 120.0}
            for i, n in enumerate(n for n in models if n in MODELS or n == "fusion")}
    return {"hardware": "an abacus", "device": "cpu", "threads": 2, "torch": "0", "models": rows}


def evaluate(monkeypatch, run, prep, *more, draws=60, figures=False):
    """05 on a fake run, with empty figures (they take most of the time) unless asked for; returns its metrics."""
    with monkeypatch.context() as patch:
        patch.setattr(ev, "DRAWS", draws)
        patch.setattr(ev, "efficiency", measured)
        for plot in () if figures else ("plot_classes", "plot_roc"):
            patch.setattr(ev, plot, lambda *_: ev.Figure((1, 1)))
        patch.setattr(ev, "interpretability", lambda *_: {"rhythm": {"dead": 3, "diversity": 0.25}})  # no networks here
        run_stage(patch, "05_evaluate", "--run", run, "--prep", prep.path.parent, "--threads", 1, *more)
    return json.loads((run / "metrics.json").read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(prep, a run with every prediction, its metrics), evaluated once; tests that change something copy the run."""
    folder = tmp_path_factory.mktemp("made")
    prep = fake_prep(folder / "prep")
    run = fake_run(folder / "full", prep)
    with pytest.MonkeyPatch.context() as monkeypatch:
        return prep, run, evaluate(monkeypatch, run, prep, figures=True)


@pytest.fixture
def small(tmp_path):
    """(prep, a run with the rhythm branch and its black box) to be damaged."""
    prep = fake_prep(tmp_path / "prep")
    names = ["rhythm", "rhythm-joint", "rhythm-projected", "rhythm-unprojected", "blackbox-rhythm"]
    return prep, fake_run(tmp_path / "small", prep, names)


# ---------------------------------------------------------------------------------------------------------------------
# Interpretability

def test_geometry_equals_a_slow_double_loop():
    rng = np.random.default_rng(0)
    p, p_class = rng.normal(size=(9, 4, 3)), np.array([0, 0, 0, 1, 1, 2, 2, 2, 3])
    J = np.array([[1, .1, .5, 0], [.1, 1, .2, .3], [.5, .2, 1, .05], [0, .3, .05, 1]])
    cosine = [[np.dot(a.ravel(), b.ravel()) / np.sqrt((a**2).sum() * (b**2).sum()) for b in p] for a in p]
    same = [cosine[i][j] for i in range(9) for j in range(9) if i != j and p_class[i] == p_class[j]]
    apart = [cosine[i][j] for i in range(9) for j in range(9) if p_class[i] != p_class[j]]
    pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    mean = [np.mean([cosine[i][j] for i in range(9) for j in range(9) if (p_class[i], p_class[j]) == ab])
            for ab in pairs]
    rank = [np.argsort(np.argsort(v)) for v in (mean, [J[ab] for ab in pairs])]
    got = ev.geometry(p, p_class, J)
    assert got["diversity"] == pytest.approx(1 - np.mean(same), abs=1e-12)
    assert got["separation"] == pytest.approx(1 - np.mean(apart), abs=1e-12)
    assert got["agreement"] == pytest.approx(np.corrcoef(rank)[0, 1], abs=1e-12)


def test_geometry_of_one_prototype_a_class_and_of_two_classes_is_unknown_not_an_error():
    got = ev.geometry(np.eye(2), np.array([0, 1]), np.eye(2))
    assert np.isnan(got["diversity"]) and np.isnan(got["agreement"]) and got["separation"] == 1


def test_purity_lift_of_perfect_and_of_blind_prototypes():
    y = np.zeros((2000, 3))
    y[:20, 0] = y[5:14, 1] = y[:1000, 2] = 1      # 1 %; too few positives; too common
    s = np.zeros((2000, 4))
    s[:10, 0], s[500:600, 0] = 1, 0.5             # all ten nearest carry the label, the next do not: lift 1 / .01
    s[1000:, 1] = 1                               # none does
    assert ev.purity_lift(s, y, np.array([0, 0, 1, 2])) == pytest.approx((100 + 0) / 2)
    assert np.isnan(ev.purity_lift(s, y[:, 1:], np.array([0, 0, 1, 1])))


def test_evidence_equals_a_slow_loop():
    rng = np.random.default_rng(1)
    X, W, b = rng.normal(size=(40, 7)), rng.normal(size=(3, 7)), rng.normal(size=3)
    thresholds = np.array([0.3, -1, np.nan])
    needed, against = [], []
    for x in X:
        for c in range(2):  # a class without a threshold is never predicted
            terms = W[c] * x
            if terms.sum() + b[c] >= thresholds[c]:
                size, most = sorted(abs(terms), reverse=True), 0
                while sum(size[:most]) < 0.95 * sum(size):
                    most += 1
                needed.append(most)
                against.append(-terms[terms < 0].sum() / sum(size))
    got = ev.evidence(X, W, b, thresholds)
    assert got["prototypes for 95 %"] == pytest.approx(np.mean(needed))
    assert got["negative evidence"] == pytest.approx(np.mean(against))
    nothing = ev.evidence(X, W, b, np.full(3, np.nan))
    assert np.isnan([*nothing.values()]).all()


def test_bridge_and_the_place_of_the_control():
    t = np.arange(1000)
    x, mask = np.stack([np.sin(t / 9), 0.01 * t]), (t >= 100) & (t < 400)
    cut = ev.bridged(x, mask)
    assert (cut[:, ~mask] == x[:, ~mask]).all() and np.allclose(cut[1], x[1])        # a straight line stays
    assert np.allclose(np.diff(cut[0], 2)[99:398], 0, atol=1e-12) and not np.allclose(cut[0], x[0])
    places = {int(np.flatnonzero(~m & np.roll(m, -1))[0]) for m in
              (ev.elsewhere(mask, np.random.default_rng(seed)) for seed in range(20))}
    assert len(places) > 5 and ev.elsewhere(mask, np.random.default_rng(0)).sum() == 300
    assert all(not (ev.elsewhere(mask, np.random.default_rng(seed)) & mask).any() for seed in range(20))


def test_disturbances_are_as_large_as_they_say():
    x = np.random.default_rng(0).normal(size=(3, 12, 1000)).astype(np.float32) * [[[0.5]], [[1]], [[2]]]
    got = ev.disturbed(x, np.random.default_rng(1))
    noise = got["20 dB noise"][0] - x
    assert 10 * np.log10((x**2).mean((1, 2)) / (noise**2).mean((1, 2))) == pytest.approx([20, 20, 20], abs=0.2)
    for name, samples in (("shift +0.2 s", 20), ("shift -0.2 s", -20)):
        assert got[name][1] == samples and (got[name][0][:, :, 500 + samples] == x[:, :, 500]).all()
    wander = got["wander"][0] - x  # the record itself has been through the filter once
    assert 0.02 < np.abs(wander[:, :, 100:900]).max() < 0.3                          # what the filter leaves of 0.5 mV


def pattern_network():
    """A partial branch whose one prototype is found where lead I is high: its "latents" are means of 32 samples."""
    net = common.ProtoECGNet("partial", ["IMI", "AMI"], [1, 1], common.Config(width=8, top_k=1), latent_dim=2)
    pool = lambda x: torch.nn.functional.avg_pool1d(torch.nn.functional.pad(x, (16, 8)), 32)  # noqa: E731
    net.latent = lambda x: torch.cat([pool(x[:, :1]), torch.ones(len(x), 1, 32) * 0.1], 1)    # [B, 2, 32]
    net.p.data = torch.tensor([[[1.0, 1, 1], [0, 0, 0]], [[0, 0, 0], [1, 1, 1]]])
    return net.eval()


def test_cutting_the_matched_window_hurts_and_elsewhere_does_not():
    net = pattern_network()
    x = np.zeros((4, 12, 1000), np.float32)
    for i in range(4):  # a plateau centred on latent step 5 + 5 i
        x[i, :, 32 * (5 + 5 * i) - 40:32 * (5 + 5 * i) + 40] = 1
    s, windows = ev.respond(net, x, "cpu")
    assert windows[:, 0, 0].tolist() == [4, 9, 14, 19] and (s[:, 0] > 0.95).all()
    head = {"W": np.array([[8.0, 0], [0, 1]]), "b": np.zeros(2), "mean": np.full(2, 0.3), "std": np.array([4.0, 1])}
    X = (s - head["mean"]) / head["std"]
    got = ev.faithfulness(net, head, x, X, windows, np.array([1.0, np.nan]), np.random.default_rng(0), "cpu")
    cut = np.stack([ev.bridged(e, (t >= 32 * (w + 1) - 47) & (t < 32 * (w + 1) + 47))
                    for t in [np.arange(1000)] for e, w in zip(x, windows[:, 0, 0])])
    drop = (s - ev.respond(net, cut, "cpu")[0])[:, 0].mean()
    assert got["similarity drop, cut"] == pytest.approx(drop) and drop > 0.4
    assert abs(got["similarity drop, control"]) < 1e-6 and got["logit drop, cut"] == pytest.approx(8 / 4 * drop)
    nothing = ev.faithfulness(net, head, x, X, windows, np.full(2, np.nan), np.random.default_rng(0), "cpu")
    assert np.isnan([*nothing.values()]).all()


@pytest.mark.parametrize("top_k, windows", [(1, 1), (3, 3), (30, 5)])
def test_as_many_windows_as_the_similarity_averages_but_five_at_most(top_k, windows):
    net = common.ProtoECGNet("partial", ["IMI"], [2], common.Config(width=8, top_k=top_k)).eval()
    assert ev.respond(net, np.zeros((3, 12, 1000)), "cpu")[1].shape == (3, 2, windows)


def test_stability_sees_a_window_that_moves_and_a_class_that_changes():
    net = pattern_network()
    x = np.zeros((2, 12, 1000), np.float32)
    x[0, :, 280:360], x[1, :, 600:680] = 1, 1
    head = {"W": np.diag([0.2, 10]), "b": np.array([0.2, 0.1]), "mean": np.full(2, 0.1), "std": np.array([0.1, 10])}
    moved, gone = np.roll(x, 20, 2), np.stack([np.roll(x[0], 300, 1), 0 * x[1]])
    variants = {"": (x, 0), "shift": (moved, 20), "gone": (gone, 0)}
    got = ev.stability({v: ev.respond(net, changed, "cpu") for v, (changed, _) in variants.items()}, head, variants,
                       "partial")
    assert got == {"top class, shift": 1, "window, shift": 1, "top class, gone": 0.5, "window, gone": 0}


def test_interpretability_of_a_run_is_that_of_fold_10_with_thresholds_of_fold_9(monkeypatch, tmp_path):
    """What the measures are given, and what they return, from the files themselves."""
    monkeypatch.setattr(common, "FEWEST", 1)
    monkeypatch.setattr(ev, "efficiency", measured)
    prep = write_prep(tmp_path / "prep", n=120)
    flags = ["--prep", tmp_path / "prep", "--run", tmp_path / "run", "--device", "cpu", "--threads", 1]
    path = write_joint(tmp_path / "run", prep, "morphology")
    common.save_json(path.with_suffix(".json"), {**common.load_pt(path, "")["meta"], "seconds": 1.0})
    for name in ("03_project", "04_fusion"):
        run_stage(monkeypatch, name, *flags)
    saved = common.load_pt(path.with_name("classifier.pt"), "")
    saved["W"][:, 0] = 0                                                            # a dead prototype
    common.save_pt(path.with_name("classifier.pt"), saved)
    given = {}
    for measure in ("disturbed", "purity_lift", "faithfulness"):
        real = getattr(ev, measure)
        monkeypatch.setattr(ev, measure, lambda *a, real=real, name=measure: given.update({name: a}) or real(*a))
    run_stage(monkeypatch, "05_evaluate", *flags)
    got = json.loads((tmp_path / "run" / "metrics.json").read_text())["interpretability"][""]["morphology"]

    meta, head = common.load_head(path.with_name("classifier.pt"), "")
    W, own, x = head["W"], columns(meta["classes"]), prep.signals[prep.test]
    scores = np.load(path.with_name("scores.npy")).astype(float)[prep.test]
    X, y = (scores - head["mean"]) / head["std"], prep.labels[:, own]
    later = prep.val | prep.test
    logits = np.load(tmp_path / "run" / "logits_morphology.npy")[:, own]
    thresholds = ev.decision_thresholds(y[prep.val], logits[prep.val[later]])
    assert not np.allclose(thresholds, ev.decision_thresholds(y[prep.test], logits[prep.test[later]]))
    for key, value in ev.evidence(X, W, head["b"], thresholds).items():
        assert got[key] == pytest.approx(value, abs=1e-4)
    assert np.array_equal(given["disturbed"][0], x) and np.array_equal(given["faithfulness"][2], x)
    assert np.array_equal(given["purity_lift"][0], scores) and np.array_equal(given["purity_lift"][1], y[prep.test])
    np.testing.assert_allclose(given["faithfulness"][3], X, atol=0.02)              # float32 in batches, over the sd
    np.testing.assert_allclose(given["faithfulness"][5], thresholds)
    prototypes = json.loads(path.with_name("prototypes.json").read_text())["prototypes"]
    sources = {(q["class"], q["ecg_id"], q["window"]) for q in prototypes}
    assert got["duplicates"] == 1 - len(sources) / len(prototypes)
    assert got["dead"] == ((W == 0).all(0) | (scores.std(0) < 0.01)).sum()


def test_interpretability_of_a_run_is_measured_once(monkeypatch, tmp_path, capsys):
    """05 after 02-04 with tiny networks: every metric is there, a second call measures nothing, a new model does."""
    prep = write_prep(tmp_path / "prep", n=120, codes=("SR", "AFIB", "NORM", "IMI", "LVH"))
    flags = ["--prep", tmp_path / "prep", "--run", tmp_path / "run", "--device", "cpu", "--threads", 1]
    for m in BRANCHES:
        path = write_joint(tmp_path / "run", prep, m)
        common.save_json(path.with_suffix(".json"), {**common.load_pt(path, "")["meta"], "seconds": 1.0})
    for name in ("03_project", "04_fusion", "05_evaluate"):
        run_stage(monkeypatch, name, *flags)
    first = json.loads((tmp_path / "run" / "metrics.json").read_text())["interpretability"][""]
    assert set(first) == {"rhythm", "morphology", "global", "fusion"}
    measured = {k.partition(", ")[0] for each in first.values() for k in each}
    assert measured == set(ev.MEASURES)
    assert first["morphology"]["window, wander"] is not None and "window, wander" not in first["rhythm"]
    text = (tmp_path / "run" / "results.md").read_text()
    assert all(f"- {metric}: " in text for metric in ev.MEASURES)

    with monkeypatch.context() as patch:
        patch.setattr(ev, "respond", lambda *_: pytest.fail("measured again"))
        run_stage(patch, "05_evaluate", *flags)
    assert (tmp_path / "run" / "results.md").read_text() == text
    (tmp_path / "run" / "rhythm" / "classifier.pt").unlink()
    with pytest.raises(SystemExit) as e:
        run_stage(monkeypatch, "05_evaluate", *flags)
    assert "classifier.pt is missing: run `python 04_fusion.py " in sentence(e)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers

@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6), st.integers(0, 5)), min_size=2, max_size=40))
def test_weighted_auroc_equals_scikit_learn_with_ties_and_weights(rows):
    y, score, weight = (np.array(column) for column in zip(*rows))
    got = ev.weighted_auroc(y.astype(np.uint8), score.astype(np.float32), weight[:, None].astype(np.float32))
    assert got.shape == (1,)
    if (weight * y).sum() == 0 or (weight * ~y).sum() == 0:
        assert np.isnan(got[0])
    else:
        assert got[0] == pytest.approx(roc_auc_score(y, score, sample_weight=weight), abs=1e-12)


@given(st.lists(st.tuples(st.booleans(), st.floats(-3, 3, width=32), st.floats(0.01, 9)), min_size=2, max_size=15))
def test_weighted_auroc_equals_a_slow_double_loop(rows):
    y, score, weight = (np.array(column) for column in zip(*rows))
    right = pairs = 0.0
    for i in np.flatnonzero(y):
        for j in np.flatnonzero(~y):
            pairs += weight[i] * weight[j]
            right += weight[i] * weight[j] * (1 if score[i] > score[j] else 0.5 if score[i] == score[j] else 0)
    got = ev.weighted_auroc(y, score, weight[:, None])[0]  # float64 weights: computed in float64
    assert np.isnan(got) if pairs == 0 else got == pytest.approx(right / pairs, abs=1e-12)


def test_every_auroc_without_bootstrap_equals_common_and_scikit_learn(made):
    prep, run, metrics = made
    on_test = prep.test[prep.val | prep.test]
    for name in ("fusion", "rhythm", "global", "blackbox-2d", "macro"):
        score, y = np.load(run / f"logits_{name}.npy")[on_test], prep.labels[prep.test]
        each = {c: roc_auc_score(y[:, CODES.index(c)], score[:, CODES.index(c)]) for c, v in
                metrics["per_class"][name].items() if c != NO_TEST}
        for c, value in each.items():
            assert metrics["per_class"][name][c][0] == pytest.approx(value, abs=6e-6)
        cols = columns(metrics["per_class"][name])
        assert metrics["predictions"][name]["auroc"][0] == pytest.approx(np.mean(list(each.values())), abs=6e-6)
        assert common.macro_auroc(y[:, cols], score[:, cols]) == pytest.approx(np.mean(list(each.values())), abs=1e-12)


def test_the_other_numbers_equal_scikit_learn(made):
    prep, run, metrics = made
    on_test, y = prep.test[prep.val | prep.test], prep.labels[prep.test]

    def mean_of(measure, codes, name="all-1d", rows=on_test, y=y):
        s = np.load(run / f"logits_{name}.npy")[rows]
        return pytest.approx(np.mean([measure(y[:, i], s[:, i]) for i in columns(codes) if 0 < y[:, i].sum() < len(y)]),
                             abs=6e-6)

    got, known = metrics["predictions"]["all-1d"], [c for c in CODES if c != NO_TRAIN]
    twelve = "AFIB AFLT BIGU PACE PSVT SARRH SBRAD SR STACH SVARR SVTAC".split()  # and TRIGU, not modelled here
    frequent = [c for c, n in metrics["counts"]["test_positives"].items() if n >= 10 and c != NO_TRAIN]
    assert 10 in metrics["counts"]["test_positives"].values() and got["frequent"][3] == len(frequent)
    assert got["frequent"][0] == mean_of(roc_auc_score, frequent)
    assert got["groups"]["Strodthoff's rhythm"][0] == mean_of(roc_auc_score, twelve)
    assert got["groups"]["Strodthoff's rhythm"][3:] == [11, 12]
    assert got["fold 9"] == mean_of(roc_auc_score, known, rows=~on_test, y=prep.labels[prep.val])
    assert got["auprc"] == mean_of(average_precision_score, known)
    for name in ("all-1d", "rhythm"):  # over the labels that the model has
        s, each = np.load(run / f"logits_{name}.npy")[on_test], metrics["per_class"][name]
        f1 = [f1_score(y[:, i], s[:, i] >= each[CODES[i]][5]) for i in columns(each) if y[:, i].any()]
        assert metrics["predictions"][name]["f1"] == pytest.approx(np.mean(f1), abs=2e-5)
    row = next(r for r in metrics["cost"] if r["name"] == "rhythm")
    rhythm = [c for c in GROUPS["rhythm"] if c != NO_TRAIN]
    for key, name in {"-joint": "rhythm-joint", "-projected": "rhythm-projected", "-unprojected": "rhythm-unprojected",
                      "sparse": "rhythm", "black box": "blackbox-rhythm"}.items():
        assert row[key] == mean_of(roc_auc_score, rhythm, name)
    row = next(r for r in metrics["cost"] if r["name"] == "morphology")  # whose start is blackbox-1d
    assert row["black box"] == mean_of(roc_auc_score, [c for c in GROUPS["morphology"] if c != NO_TRAIN], "blackbox-1d")


def test_macro_aggregation_is_the_weighted_mean_of_the_branches(made):
    _, run, metrics = made
    value = {n: p["auroc"] for n, p in metrics["predictions"].items()}
    r, m, g = (value[b][0] for b in BRANCHES)
    assert [value[b][3:] for b in BRANCHES] == [[15, 16], [51, 52], [3, 3]] and value["macro"][3:] == [69, 71]
    assert value["macro"][0] == pytest.approx((15 * r + 51 * m + 3 * g) / 69, abs=1e-5)
    text = (run / "results.md").read_text()
    assert re.search(r"Check: \(15 x .*\) / 69 = (\.\d+); macro aggregation \1: equal", text)


def test_macro_identity_16_52_3_when_all_classes_are_evaluable():
    rng = np.random.default_rng(0)
    aurocs = rng.random((11, 71))
    r, m, g, all_ = (ev.macro(aurocs, GROUPS[k])[0] for k in (*BRANCHES, "all"))
    assert all_ == pytest.approx((16 * r + 52 * m + 3 * g) / 71, abs=1e-5)


def test_bootstrap_draws_whole_patients_and_depends_on_the_seed_only():
    patients = np.array([7, 3, 7, 9, 3, 3, 8])
    weights = ev.patient_weights(patients, 200, 1)
    assert weights.shape == (7, 201) and (weights[:, 0] == 1).all()
    for p in set(patients.tolist()):
        assert (weights[patients == p] == weights[patients == p][0]).all()  # together or not at all
    once = [np.flatnonzero(patients == p)[0] for p in np.unique(patients)]
    assert (weights[once].sum(0) == 4).all()  # as many patients as there are
    assert np.array_equal(weights, ev.patient_weights(patients, 200, 1))
    assert not np.array_equal(weights, ev.patient_weights(patients, 200, 2))


def test_intervals_equal_resampling_the_records_themselves(made):
    """The weights give the same as drawing patients, taking their records and calling scikit-learn; each draw compares
    its classes with the same classes of the whole test set."""
    prep, run, metrics = made
    on_test = prep.test[prep.val | prep.test]
    y, score = prep.labels[prep.test], np.load(run / "logits_rhythm.npy")[on_test]
    of = prep.patient_ids[prep.test]
    patients, rng, draws = np.unique(of), np.random.default_rng(42), []
    for _ in range(60):
        drawn = patients[rng.integers(len(patients), size=len(patients))]
        rows = np.concatenate([np.flatnonzero(of == p) for p in drawn])
        cols = [c for c in columns(metrics["per_class"]["rhythm"]) if 0 < y[rows, c].sum() < len(rows)]
        draws.append(np.mean([roc_auc_score(y[rows, c], score[rows, c]) - roc_auc_score(y[:, c], score[:, c])
                              for c in cols]))
    value, *ends = metrics["predictions"]["rhythm"]["auroc"][:3]
    assert ends == pytest.approx(value + np.percentile(draws, [2.5, 97.5]), abs=2e-5)


def test_empty_class_rule():
    """A class absent from a draw moves that draw's mean by nothing of its own; in particular not because it is easier
    or harder than the others. A class absent from the test set leaves all means."""
    aurocs = np.full((4, 71), np.nan)
    a, b, c = columns(GROUPS["global"])
    aurocs[:, a], aurocs[:, b] = [0.6, 0.5, 0.7, 0.6], [0.8, 0.6, np.nan, np.nan]
    value, low, high, over, of = ev.macro(aurocs, GROUPS["global"])
    assert (value, over, of) == (0.7, 2, 3)
    assert (low, high) == pytest.approx(np.percentile([0.55, 0.8, 0.7], [2.5, 97.5]), abs=1e-5)
    aurocs[:, a] = [0.9, 0.95, 0.99, 0.99]
    aurocs[:, b] = [0.99, 0.99, np.nan, np.nan]
    assert ev.macro(aurocs, GROUPS["global"])[2] == 1                                       # no AUROC is above 1
    assert ev.macro(aurocs, ["AFIB"]) == [None, None, None, 0, 1]


def test_labels_without_test_positives_or_training_records_are_left_out_and_named(made):
    _, run, metrics = made
    text = (run / "results.md").read_text()
    assert metrics["per_class"]["fusion"][NO_TEST][:3] == [None] * 3 and NO_TRAIN not in metrics["per_class"]["fusion"]
    assert metrics["predictions"]["fusion"]["auroc"][3:] == [69, 71] and "(over 69 of 71)" in text
    assert f"Not modelled, without a training record: {NO_TRAIN}." in text
    assert f"without a test positive: {NO_TEST}." in text
    assert re.search(rf"fewer than 10 positives in fold 10; .*\b{ONE_TEST}\b", text)
    assert "a draw moves a macro mean by what it moves the classes that it has" in text


@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=1, max_size=30))
def test_thresholds_maximise_f1(rows):
    y, score = np.array([r[0] for r in rows]), np.array([r[1] for r in rows], np.float32)
    t = common.best_f1_thresholds(y[:, None], score[:, None])[0]
    if not y.any():
        assert np.isnan(t)
        return
    best = max(f1_score(y, score >= s, zero_division=0) for s in np.unique(score))
    assert t in score and f1_score(y, score >= t) == pytest.approx(best, abs=1e-12)


def test_thresholds_depend_on_fold_9_only(monkeypatch, small):
    prep, run = small
    before = evaluate(monkeypatch, run, prep)["per_class"]["rhythm"]
    path, on_test = run / "logits_rhythm.npy", prep.test[prep.val | prep.test]
    logits = np.load(path)
    logits[on_test] = -5 * logits[on_test] + 3  # fold 10 poisoned
    common.save_npy(path, logits)
    after = evaluate(monkeypatch, run, prep)["per_class"]["rhythm"]
    assert [v[5] for v in before.values()] == [v[5] for v in after.values()]
    assert before["AFIB"][0] != after["AFIB"][0] and before["AFIB"][4] != after["AFIB"][4]
    i = CODES.index("AFIB")
    called = logits[on_test, i] >= before["AFIB"][5]
    assert after["AFIB"][4] == pytest.approx(f1_score(prep.labels[prep.test, i], called), abs=6e-6)


def test_per_batch_variant_equals_a_slow_loop(made):
    prep, run, metrics = made
    on_test = prep.test[prep.val | prep.test]
    score, y = np.load(run / "logits_morphology.npy")[on_test], prep.labels[prep.test]
    by_id, batches = sorted(range(len(y)), key=lambda i: prep.ecg_ids[prep.test][i]), []
    for first in range(0, len(y), 32):
        rows, values = by_id[first:first + 32], []
        for c in columns(metrics["per_class"]["morphology"]):
            if 0 < y[rows, c].sum() < len(rows):
                values.append(roc_auc_score(y[rows, c], score[rows, c]))
        batches.append(np.mean(values))
    got = metrics["predictions"]["morphology"]
    assert got["per batch"] == pytest.approx(np.mean(batches), abs=6e-6) and got["per batch"] != got["auroc"][0]
    assert "as the authors log it; not comparable" in (run / "results.md").read_text()


def test_differences_are_paired_and_on_the_labels_that_both_have(monkeypatch, small, made):
    prep, run, metrics = made
    rows = {what: v for question in metrics["differences"].values() for what, v in question.items()}
    value = {n: p["auroc"][0] for n, p in metrics["predictions"].items()}
    assert rows["fusion - blackbox-1d"][0] == pytest.approx(value["fusion"] - value["blackbox-1d"], abs=2e-5)
    rhythm_of_box = metrics["predictions"]["blackbox-1d"]["groups"]["rhythm"][0]
    assert rows["rhythm - blackbox-1d"][0] == pytest.approx(value["rhythm"] - rhythm_of_box, abs=2e-5)
    assert [rows[f"{b} - blackbox-1d"][3] for b in BRANCHES] == [15, 51, 3]
    for pair in ("rhythm - blackbox-rhythm", "fusion - fusion-unprojected", "rhythm - rhythm-unprojected",
                 "fusion - macro", "fusion - rhythm", "fusion - all-1d", "fusion - all-partial", "fusion - all-global",
                 "fusion-own - fusion"):
        assert pair in rows
    prep, run = small  # a prediction against its own copy: no difference, an interval of width 0
    logits = np.load(run / "logits_rhythm.npy")
    common.save_npy(run / "logits_rhythm-unprojected.npy", logits)
    metrics = evaluate(monkeypatch, run, prep)
    rows = {what: v for question in metrics["differences"].values() for what, v in question.items()}
    assert rows["rhythm - rhythm-unprojected"] == [0, 0, 0, 15, 71]


# ---------------------------------------------------------------------------------------------------------------------
# Files

def test_everything_is_written_and_the_same_the_second_time(monkeypatch, made, capsys):
    prep, run, metrics = made
    text, numbers = (run / "results.md").read_bytes(), (run / "metrics.json").read_bytes()
    (run / "results.md").unlink()
    assert evaluate(monkeypatch, run, prep, figures=True) == metrics
    assert (run / "results.md").read_bytes() == text and (run / "metrics.json").read_bytes() == numbers
    assert len(numbers) < 200_000
    for name in ("per_class_auroc.png", "roc.png"):
        assert (run / "figures" / name).read_bytes().startswith(b"\x89PNG")
    last = capsys.readouterr().out.splitlines()[-1].removeprefix(str(run))
    assert re.fullmatch(r": fusion \.\d{4} \[\.\d{4}, \.\d{4}\] over 69 classes -> .*results\.md", last)
    assert not list(run.rglob("*.tmp"))


def test_the_papers_numbers_stand_beside_ours(made):
    _, run, metrics = made
    text = (run / "results.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| fusion classifier, 71"))
    ours = ev.cell(metrics["predictions"]["fusion"]["auroc"])
    assert [c.strip() for c in row.split("|")[2:-1]] == [".9010", "not run", ".9248", ours, "–", "–"]
    cost = {r["name"]: r for r in metrics["cost"]}
    assert set(cost) == {*PROTOTYPES, "fusion", "fusion-own"}
    for contrastive, paper in ((True, ".9248"), (False, ".9010")):
        text = ev.summary_text({**metrics, "contrastive": contrastive})
        assert re.search(rf"- fusion classifier, 71: .* The paper reports {re.escape(paper)}, by", text)
    assert cost["fusion"]["prototypes"] == 50 and cost["fusion"]["gap"] == (30 * 0.5 + 20 * 0.25) / 50
    assert cost["rhythm"]["distinct"] == 9 and cost["rhythm"]["gap"] == 0.25
    assert {"-joint", "-projected", "-unprojected", "sparse", "black box"} <= set(cost["all-1d"])


@pytest.mark.parametrize("names", [["rhythm"], ["blackbox-1d"], ["global", "global-unprojected", "rhythm"]])
def test_with_whatever_is_there(monkeypatch, tmp_path, names, capsys):
    prep = fake_prep(tmp_path / "prep")
    metrics = evaluate(monkeypatch, fake_run(tmp_path / "some", prep, names), prep, figures=True)
    final = [n for n in names if not n.endswith("-unprojected")]
    assert set(metrics["predictions"]) == set(final)
    assert "not run" in (tmp_path / "some" / "results.md").read_text()
    assert sorted(final, key=ev.ORDER.index)[0] in capsys.readouterr().out.splitlines()[-1]


def test_against_another_run(monkeypatch, small, tmp_path):
    prep, run = small
    plain = fake_run(tmp_path / "plain", prep, ["rhythm", "rhythm-joint"], contrastive=False)
    metrics = evaluate(monkeypatch, run, prep, "--against", plain)
    assert metrics["against"] == {"plain": False}
    rows = metrics["differences"]["Does the contrastive loss help? (4.2)"]
    ours, theirs = (metrics["predictions"][n]["auroc"][0] for n in ("rhythm", "rhythm of plain"))
    assert list(rows) == ["rhythm - rhythm of plain"]
    assert rows["rhythm - rhythm of plain"][0] == pytest.approx(ours - theirs, abs=2e-5)
    row = next(line for line in (run / "results.md").read_text().splitlines() if line.startswith("| rhythm branch"))
    cells = [c.strip() for c in row.split("|")[1:-1]]
    assert cells[2].startswith(ev.number(theirs)) and cells[4].startswith(ev.number(ours))
    assert {r["name"] for r in metrics["cost"]} == {"rhythm"}
    other = fake_run(tmp_path / "other", prep, ["rhythm"], contrastive=False, top_k=7)  # not only without the loss
    metrics = evaluate(monkeypatch, run, prep, "--against", other)
    assert metrics["against"] == {} and "Against other" in metrics["differences"]
    row = next(line for line in (run / "results.md").read_text().splitlines() if line.startswith("| rhythm branch"))
    assert row.split("|")[3].strip() == "not run"
    fewer = fake_run(tmp_path / "fewer", prep, ["rhythm"], contrastive=False, lambda_div=0.0)
    assert evaluate(monkeypatch, run, prep, "--against", fewer)["against"] == {}
    paper = [fake_run(tmp_path / f"paper{on}", prep, ["rhythm"], contrastive=on, **{
        **vars(common.RECIPES["paper"]), "seed": 42, "width": 64}) for on in (True, False)]
    metrics = evaluate(monkeypatch, paper[1], prep, "--against", paper[0], "--recipe", "paper")
    assert metrics["against"] == {"paperTrue": True}  # other lambdas, those that go with it in the paper
    (other / "predictions.json").unlink()
    with pytest.raises(SystemExit) as error:  # the remedy is for the other run, not for this one
        evaluate(monkeypatch, run, prep, "--against", other)
    assert f"--run {other}`" in sentence(error) and f"--run {run}`" not in sentence(error)


def test_against_another_run_shows_of_it_the_models_asked_for(monkeypatch, tmp_path):
    prep = fake_prep(tmp_path / "prep")
    runs = [fake_run(tmp_path / f"r{on}", prep, ["rhythm", "global"], contrastive=on) for on in (True, False)]
    found = evaluate(monkeypatch, runs[0], prep, "--model", "global", "--against", runs[1])["interpretability"]
    assert found[" of rFalse"] == {}  # the fake knows rhythm alone


def test_ensemble_is_the_mean_of_the_black_boxes_logits(monkeypatch, tmp_path, small):
    prep, _ = small
    runs = [fake_run(tmp_path / f"r{seed}", prep, ["blackbox-1d"], seed=seed) for seed in (1, 2, 3)]
    metrics = evaluate(monkeypatch, runs[0], prep, "--ensemble", *runs[1:])["predictions"]
    mean = np.mean([np.load(r / "logits_blackbox-1d.npy") for r in runs], 0)[prep.test[prep.val | prep.test]]
    y = prep.labels[prep.test]
    each = [roc_auc_score(y[:, c], mean[:, c]) for c in range(71) if np.isfinite(mean[0, c]) and 0 < y[:, c].sum()]
    assert metrics["blackbox-ensemble"]["auroc"][0] == pytest.approx(np.mean(each), abs=2e-5)
    assert metrics["blackbox-ensemble"]["auroc"][0] > metrics["blackbox-1d"]["auroc"][0]
    lacking = fake_run(tmp_path / "lacking", prep, ["rhythm"])
    some = evaluate(monkeypatch, runs[0], prep, "--model", "blackbox-1d", "--ensemble", *runs)
    assert some["predictions"] == metrics  # with --model, and of a run that is named twice
    with pytest.raises(SystemExit) as error:
        evaluate(monkeypatch, runs[0], prep, "--ensemble", lacking)
    assert f"run `python 04_fusion.py --run {lacking}`" in sentence(error)
    (runs[2] / "blackbox-1d" / "joint.pt").write_text("trained again")
    warnings = evaluate(monkeypatch, runs[0], prep, "--force", "--ensemble", *runs[1:])["warnings"]
    assert len(warnings) == 1 and "is not what the predictions were made from" in warnings[0]


@pytest.mark.parametrize("value, better, as_good", [
    ([.02, .01, .03], "yes", "yes, better"), ([-.02, -.03, -.01], "no", "no"),
    ([.01, -.01, .03], "no difference shown", "no difference shown"),
    ([-1e-5, 2e-5, 4e-4], "yes", "yes, better")])  # an interval of percentiles need not hold its value
def test_answers_follow_the_interval(value, better, as_good):
    assert ev.answer("Do three branches beat one? (4.1)", value) == better
    assert ev.answer("As good as a black box? (4.3)", value) == as_good
    assert ev.answer("Against plain", value) == ev.answer("Cost of projection (3.5)", value) == "–"  # no question


def test_tables_of_the_readme_are_what_readme_writes(monkeypatch, tmp_path):
    (tmp_path / "tests").mkdir()
    shutil.copytree(ev.HERE / "tests" / "results", tmp_path / "tests" / "results")
    page = shutil.copy(ev.HERE / "README.md", tmp_path / "README.md")
    before = page.read_text(encoding="utf-8")
    monkeypatch.setattr(ev, "HERE", tmp_path)
    run_stage(monkeypatch, "05_evaluate", "--readme")
    assert page.read_text(encoding="utf-8") == before


def test_save_and_readme(monkeypatch, small, tmp_path, capsys):
    prep, run = small
    monkeypatch.setattr(ev, "HERE", tmp_path / "home")
    page = tmp_path / "home" / "README.md"
    page.parent.mkdir()
    course = "\n<!-- course:begin -->\nstale\n<!-- course:end -->\n\nend"
    page.write_text(f"# Größe\n\nbefore\n\n<!-- results:begin -->\nstale\n<!-- results:end -->\n\nafter{course}")
    with pytest.raises(SystemExit) as error:
        run_stage(monkeypatch, "05_evaluate", "--readme")
    assert "--save" in sentence(error)
    evaluate(monkeypatch, run, prep, "--save", "a-1")
    saved = tmp_path / "home" / "tests" / "results" / "a-1.json"
    assert saved.stat().st_size < 20_000 and "per_class" not in json.loads(saved.read_text())
    values = [json.loads(saved.read_text())["predictions"]["rhythm"]["auroc"][0]]
    run_stage(monkeypatch, "05_evaluate", "--readme")
    assert ev.cell(json.loads(saved.read_text())["predictions"]["rhythm"]["auroc"]) in page.read_text()
    for seed, how in ((43, {}), (44, {}), (42, {"contrastive": False}), (42, {"width": 32}),
                      (43, {"width": 32})):
        other = fake_run(tmp_path / f"r{seed}{len(how)}{how.get('width', '')}", prep, ["rhythm"], seed=seed, **how)
        metrics = evaluate(monkeypatch, other, prep, "--save", other.name)
        values += [metrics["predictions"]["rhythm"]["auroc"][0]]
    run_stage(monkeypatch, "05_evaluate", "--readme")
    once = page.read_text()
    run_stage(monkeypatch, "05_evaluate", "--readme")
    assert page.read_text() == once
    assert once.startswith("# Größe\n\nbefore\n\n<!-- results:begin -->")
    assert re.search(r"<!-- results:end -->\n\nafter\n<!-- course:begin -->\n\n\| model .*\|\n\n<!-- course:end -->\n\n"
                     r"end\Z", once, re.DOTALL)
    assert "stale" not in once and "Ablations" not in once
    assert f"{ev.number(np.mean(values[:3]))} ± {ev.number(np.std(values[:3], ddof=1))} (3 seeds)" in once
    glance, wide, narrow = once.split("<details><summary>default recipe, width ")
    assert wide.startswith("64, 170 test records: ") and narrow.startswith("32, 170 test records: ")
    assert ev.number(values[3]) in wide and "(2 seeds)" in narrow
    row = next(line for line in glance.splitlines() if line.startswith("| rhythm branch, 16 labels"))
    assert "| .8758 " in row and "(3 seeds)" in row and "(2 seeds)" in row and ev.number(values[3]) not in row
    shutil.copy(saved, again := saved.with_name("z.json"))  # which of the two counts, no date tells after a checkout
    with pytest.raises(SystemExit) as error:
        run_stage(monkeypatch, "05_evaluate", "--readme")
    assert "a-1.json" in sentence(error) and "z.json" in sentence(error) and page.read_text() == once
    again.unlink()
    other = fake_run(tmp_path / "ablation", prep, ["rhythm"], top_k=30, a=(1.0, 2.0, 1.0))
    metrics = evaluate(monkeypatch, other, prep, "--save", "ablation")["predictions"]["rhythm"]
    run_stage(monkeypatch, "05_evaluate", "--readme")
    before, _, table = page.read_text().partition("<summary>Ablations ")
    assert before.count("<summary>default recipe, width 64") == 1  # no table of its own
    row = next(line for line in table.splitlines() if "width 64, 170 test records: a [1.0, 2.0, 1.0], top_k 30" in line)
    assert ev.cell(metrics["auroc"]) in row and ev.number(metrics["fold 9"]) in row
    assert "records: as it is " in table and "records: as it is, no contrastive " in table and "(3 seeds)" in table
    page.write_text("no markers")
    with pytest.raises(SystemExit) as error:
        run_stage(monkeypatch, "05_evaluate", "--readme")
    assert "results:begin" in sentence(error) and page.read_text() == "no markers"
    page.write_text("<!-- results:begin -->\n<!-- results:end -->")
    with pytest.raises(SystemExit) as error:
        run_stage(monkeypatch, "05_evaluate", "--readme")
    assert "course:begin" in sentence(error)


def test_the_readme_keeps_interpretability_of_recipes_and_of_ablations_apart(monkeypatch, made, tmp_path):
    results = tmp_path / "tests" / "results"
    results.mkdir(parents=True)
    page = tmp_path / "README.md"
    page.write_text("<!-- results:begin -->\n<!-- results:end -->\n<!-- course:begin -->\n<!-- course:end -->")
    monkeypatch.setattr(ev, "HERE", tmp_path)
    for name, dead, changes in (("a", 11, {"top_k": 1}), ("b", 22, {}), ("c", 33, {"seed": 43}),
                                ("d", 44, {"epochs": 2}), ("e", 55, {"lambda_cntrst": 0.0}),
                                ("f", 66, {"recipe": "paper", "epochs": 3})):
        recipe = common.RECIPES[changes.get("recipe", "default")]
        cfg = json.loads(json.dumps(vars(common.replace(recipe, **changes))))
        saved = {**made[2], "config": cfg, **{k: cfg[k] for k in ("recipe", "seed")},
                 "contrastive": cfg["lambda_cntrst"] != 0,
                 "interpretability": {"": {m: {"dead": dead} for m in (*common.BRANCHES, "fusion")}}}
        if name == "f":
            saved["interpretability"] = {"": {"rhythm": {"dead": dead}}}
        (results / f"{name}.json").write_text(json.dumps(saved))
    run_stage(monkeypatch, "05_evaluate", "--readme")
    lines = page.read_text().partition("<summary>Interpretability")[2].splitlines()
    head, dead = ([c.strip() for c in next(x for x in lines if x.startswith(start)).split("|")[2:-1]]
                  for start in ("|  ", "| dead"))
    n = f", {made[2]['counts']['test']} test records"
    assert dict(zip(head, dead)) == {  # of the first seed; an ablation's stand in its own file only
        f"default recipe, width 64{n}, seed 42": "22 / 22 / 22 / 22",
        f"default recipe, width 64{n}, no contrastive, seed 42": "55 / 55 / 55 / 55",
        f"paper recipe, width 64{n} (changed), seed 42, rhythm only": "66"}
    assert "<summary>paper recipe, width 64" in page.read_text()  # with changes, but there is none without


def test_a_cell_names_the_seed_that_it_is_of():
    def run(seed, *names):
        return {"seed": seed, "contrastive": True, "predictions": {n: {"auroc": [.9, .8, .95, 71, 71]} for n in names}}

    some = [run(42, "rhythm"), run(43, "rhythm", "all-1d")]
    assert ev.pooled(some, "all-1d", True) == ".9000 [.8000, .9500] (seed 43)"
    assert ev.pooled(some[1:], "all-1d", True) == ".9000 [.8000, .9500]"
    assert ev.pooled(some, "rhythm", True).startswith(".9000 ± .0000 (2 seeds)")
    assert ev.pooled(some, "fusion", True) == ev.pooled([], "rhythm", True) == "not run"


def test_a_branch_with_settings_of_its_own_is_named_with_them(monkeypatch, tmp_path):
    """Two rounds, the second in joint_r2: minutes are of both."""
    prep = fake_prep(tmp_path / "prep")
    run = fake_run(tmp_path / "mixed", prep, ["rhythm", "global", "blackbox-1d"])
    for name in ("global", "blackbox-1d"):
        rewrite(run / name / "joint.json", lambda v: v["config"].update(lr=0.5))
    rewrite(run / "blackbox-1d" / "joint.json", lambda v: v.update(hardware="another machine"))
    shutil.copy(run / "rhythm" / "joint.pt", run / "rhythm" / "joint_r2.pt")
    shutil.copy(run / "rhythm" / "joint.json", run / "rhythm" / "joint_r2.json")
    rewrite(run / "global" / "joint.json", lambda v: v["config"].update(start="blackbox-global"))
    metrics = evaluate(monkeypatch, run, prep)
    assert metrics["trained"]["rhythm"]["round"] == 2
    (run / "rhythm" / "joint_old.pt").write_text("a user's copy, which is no round")
    assert evaluate(monkeypatch, run, prep)["trained"]["rhythm"] == metrics["trained"]["rhythm"]
    assert r"global starts from blackbox\-global" in ev.approach_text({**metrics, "cost": []}, {"filter": ""})
    rewrite(run / "global" / "joint.json", lambda v: v["config"].update(start="blackbox-1d"))
    metrics = evaluate(monkeypatch, run, prep)
    assert ev.changed(metrics) == ("lr 0.5 (global)",)  # the black box is not what the row is about
    assert {n: t["seconds"] for n, t in metrics["trained"].items()} == {"rhythm": 24.6, "global": 12.3,
                                                                        "blackbox-1d": 12.3}
    assert " and another machine (threads): rhythm 0 (" in "\n".join(ev.tables_of("", [metrics]))


def test_paired_differences_of_seeds_stand_side_by_side():
    def run(seed, contrastive, differences):
        return {"seed": seed, "contrastive": contrastive, "differences": differences}

    branches, help_ = "Do three branches beat one? (4.1)", "Does the contrastive loss help? (4.2)"
    lines = ev.paired_table([
        run(42, True, {branches: {"a - b": [.02, .01, .03, 71, 71], "a - lost": [None, None, None, 0, 71]},
                       help_: {"a - a of plain": [.001, -.01, .01, 71, 71], "box - box of plain": [0, 0, 0, 71, 71]}}),
        run(43, True, {branches: {"a - b": [.01, -.01, .03, 71, 71]}}),
        run(42, False, {branches: {"a - c": [.02, .01, .03, 71, 71]}})]).splitlines()
    rows = {tuple(c.strip() for c in line.split("|")[2:-1]) for line in lines[2:]}
    assert "seed 42" in lines[0] and "seed 43" in lines[0] and rows == {
        ("a - b", "+.0200 [+.0100, +.0300]", "+.0100 [-.0100, +.0300]", "yes / no difference shown"),
        ("a - a of plain", "+.0010 [-.0100, +.0100]", "–", "no difference shown")}


def test_the_course_table_takes_each_row_from_the_runs_that_it_names(monkeypatch):
    monkeypatch.setattr(ev, "pooled", lambda some, name, on: " and ".join(str(r["predictions"][name]) for r in some))

    def saved(name="rhythm", value=0.9, test=2198, efficient=True, recipe="default", **settings_):
        cfg = common.replace(common.RECIPES[recipe], **settings_)
        e = {**measured(None, [name]), "models": {name: measured(None, ["rhythm"])["models"]["rhythm"]}}
        return {"recipe": recipe, "seed": cfg.seed, "width": cfg.width, "contrastive": True,
                "config": json.loads(json.dumps(vars(cfg))),
                "counts": {"test": test}, "trained": {}, "predictions": {name: value},
                **({"efficiency": e} if efficient else {})}

    def rows(*runs):
        text = ev.course_table(runs)
        return [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()[2:]]

    empty = rows()
    assert len(empty) == 7 and all(r[1:] == ["", *["–"] * 5] for r in empty[:-1]) and empty[-1][1] == ".8758"
    all_71 = {"rhythm_alone": False}
    got = rows(saved(width=32, value=1), saved(width=32, value=2, seed=43), saved(value=4),
               saved(width=32, value=3, efficient=False, **all_71), saved(value=5, **all_71),
               saved("blackbox-rhythm", 6, width=32), saved("blackbox-rhythm", 7),
               saved(width=32, value=13, blackbox_epochs=40), saved(width=32, value=14, start="blackbox-rhythm"),
               saved(value=8, test=386), saved(value=9, lr=1e-3),
               saved(value=10, recipe="paper"), saved("fusion", 11), saved(value=12, class_weights=True))
    assert [r[1] for r in got] == ["1 and 2", "3", "4", "5", "6", "7", ".8758"]
    assert got[0][2:] == ["1,000,000", "4.01", "2.5 / 0.5", "9.1 / 120", "an abacus, 2 CPU threads"]
    assert got[1][2:] == ["–"] * 5


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one sentence, exit code 1, no results

def rewrite(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def resave(path, change):
    array = np.load(path)
    common.save_npy(path, change(array))


DAMAGE = {
    "no predictions": (lambda run: (run / "predictions.json").unlink(), "04_fusion.py"),
    "truncated predictions": (lambda run: (run / "predictions.json").write_text('{"format": 1, '), "04_fusion.py"),
    "other predictions": (lambda run: (run / "predictions.json").write_text("[]"), "04_fusion.py"),
    "no models": (lambda run: rewrite(run / "predictions.json", lambda v: v.update(models={})), "04_fusion.py"),
    "no logits": (lambda run: (run / "logits_rhythm.npy").unlink(), "04_fusion.py"),
    "truncated logits": (lambda run: (run / "logits_rhythm.npy").write_bytes(
        (run / "logits_rhythm.npy").read_bytes()[:-100]), "logits_rhythm.npy is damaged"),
    "empty logits": (lambda run: (run / "logits_rhythm.npy").write_bytes(b""), "logits_rhythm.npy is damaged"),
    "logits of other records": (lambda run: resave(run / "logits_rhythm.npy", lambda a: a[:-1]), "lacks a number"),
    "NaN logits": (lambda run: resave(run / "logits_rhythm.npy", lambda a: a * np.nan), "lacks a number"),
    "infinite logits": (lambda run: resave(run / "logits_rhythm.npy", lambda a: a / 0), "lacks a number"),
    "double logits": (lambda run: resave(run / "logits_rhythm.npy", lambda a: a.astype(float)), "lacks a number"),
    "text as logits": (lambda run: resave(run / "logits_rhythm.npy", lambda a: a.astype("U5")), "logits_rhythm.npy"),
    "changed model": (lambda run: (run / "rhythm" / "projected.pt").write_text("trained again"), "04_fusion.py"),
    "later round": (lambda run: (run / "rhythm" / "projected_r2.pt").write_text("round 2"), "04_fusion.py"),
    "model gone": (lambda run: (run / "rhythm" / "projected.pt").unlink(), "04_fusion.py"),
    "changed black box": (lambda run: (run / "blackbox-rhythm" / "joint.pt").write_text("again"), "04_fusion.py"),
    "no joint.json": (lambda run: (run / "rhythm" / "joint.json").unlink(), "02_train_joint.py --model rhythm"),
    "truncated joint.json": (lambda run: (run / "rhythm" / "joint.json").write_text("{"), "02_train_joint.py"),
    "no prototypes.json": (lambda run: (run / "rhythm" / "prototypes.json").unlink(), "03_project.py --model rhythm"),
    "empty prototypes.json": (lambda run: (run / "rhythm" / "prototypes.json").write_text("{}"), "03_project.py"),
    "no labels": (lambda run: (run.parent / "prep" / "labels.npy").unlink(), "01_preprocess.py"),
    "other labels": (lambda run: resave(run.parent / "prep" / "labels.npy", lambda a: a[:9]), "01_preprocess.py"),
    "no run": (shutil.rmtree, "04_fusion.py"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_bad_input_gives_one_sentence(monkeypatch, small, what):
    prep, run = small
    damage, expected = DAMAGE[what]
    damage(run)
    with pytest.raises(SystemExit) as error:
        evaluate(monkeypatch, run, prep, draws=5)
    assert expected in sentence(error)
    assert not (run / "results.md").exists()


def test_another_prep_is_refused_and_forced_with_a_warning_that_stays(monkeypatch, small, capsys):
    prep, run = small
    rewrite(prep.path, lambda v: v.update(seed=1))
    with pytest.raises(SystemExit) as error:
        evaluate(monkeypatch, run, prep)
    assert "was made from another" in sentence(error) and "--force" in sentence(error)
    metrics = evaluate(monkeypatch, run, prep, "--force")
    assert "WARNING" in capsys.readouterr().err and len(metrics["warnings"]) == 1
    assert "**WARNING**" in (run / "results.md").read_text()


def test_models_of_different_settings_in_one_run_are_pointed_out(monkeypatch, tmp_path, capsys):
    prep = fake_prep(tmp_path / "prep")
    run = fake_run(tmp_path / "mixed", prep, ["rhythm", "global", "blackbox-1d"])
    rewrite(run / "global" / "joint.json", lambda v: v["config"].update(lambda_cntrst=0.0))
    rewrite(run / "blackbox-1d" / "joint.json", lambda v: v["config"].update(lambda_cntrst=0.0))  # has no such loss
    assert evaluate(monkeypatch, run, prep)["warnings"] == ["mixed: global has other settings than rhythm"]
    assert "mixed: global has other settings than rhythm" in (run / "results.md").read_text()
    assert capsys.readouterr().err


def test_a_model_trained_again_but_not_projected_is_refused(monkeypatch, small):
    """Its joint.json would say how predictions came about that are of the training before."""
    prep, run = small
    (run / "rhythm" / "joint.pt").write_text("trained again")
    with pytest.raises(SystemExit) as error:
        evaluate(monkeypatch, run, prep)
    assert "was not projected from its joint.pt" in sentence(error) and "03_project.py" in sentence(error)
    assert len(evaluate(monkeypatch, run, prep, "--force")["warnings"]) == 1
    rewrite(run / "predictions.json", lambda v: v["models"]["rhythm"].update(warnings=["Eq. (10) is not solved"]))
    with pytest.raises(SystemExit) as error:  # a warning of another kind does not excuse it
        evaluate(monkeypatch, run, prep)
    assert "was not projected from its joint.pt" in sentence(error)


def test_only_the_models_asked_for(monkeypatch, tmp_path):
    prep = fake_prep(tmp_path / "prep")
    run = fake_run(tmp_path / "run", prep, ["rhythm", "rhythm-joint", "global", "blackbox-1d"])
    metrics = evaluate(monkeypatch, run, prep, "--model", "rhythm")
    assert [*metrics["predictions"]] == ["rhythm"] == [*metrics["trained"]] and "joint" in str(metrics["cost"])
    assert [*evaluate(monkeypatch, run, prep)["predictions"]] == ["rhythm", "global", "blackbox-1d"]


def test_a_model_that_was_not_predicted_is_asked_for(monkeypatch, small):
    prep, run = small
    with pytest.raises(SystemExit) as error:
        evaluate(monkeypatch, run, prep, "--model", "global")
    assert "04_fusion.py --model global" in sentence(error)


# ---------------------------------------------------------------------------------------------------------------------
# Size, time, memory, and the report, of a run with real networks

HOSTILE = "</td><script>document.title = 1</script><img src=http://e.org/x> | `a` [b](javascript:1) ![c](http://d/)"


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A PREP with hostile text in it; a RUN, itself of hostile name, with a rhythm branch and its black box of width 8
    through 04 and one case; flags for every stage."""
    base = tmp_path_factory.mktemp("real")
    prep = write_prep(base / "prep")
    info = common.load_json(prep.path, "")
    info["descriptions"]["AFIB"] = HOSTILE
    common.save_json(prep.path, info)
    prep, run = common.load_prep(base / "prep"), base / "<b>run & *co*"
    flags = ["--small", "--prep", base / "prep", "--run", run, "--device", "cpu", "--threads", 1]
    with pytest.MonkeyPatch.context() as patch:
        for model in ("rhythm", "blackbox-rhythm"):
            write_joint(run, prep, model, class_weights=True)
        for name, *more in (["03_project"], ["04_fusion"],
                            ["06_plot_prototypes", "--case", prep.ecg_ids[prep.test][0], "--top", 1]):
            run_stage(patch, name, *flags, *more)
    return SimpleNamespace(prep=prep, run=run, flags=flags, case=int(prep.ecg_ids[prep.test][0]))


def report_of(monkeypatch, real, *more, figures=False):
    """report.html of a real run, with few draws, invented times and empty figures unless asked for."""
    with monkeypatch.context() as patch:
        patch.setattr(ev, "DRAWS", 5)
        for plot in () if figures else ("plot_classes", "plot_roc"):
            patch.setattr(ev, plot, lambda *_: ev.Figure((1, 1)))
        patch.setattr(ev, "efficiency", measured)
        run_stage(patch, "05_evaluate", *real.flags, "--report", *more)
    return (real.run / "report.html").read_text(encoding="utf-8")


def test_a_fusion_has_one_classifier_in_place_of_its_branches_own(real, monkeypatch):
    path = real.run / "rhythm" / "projected.pt"
    net, _ = common.load_model(path, "")
    got = ev.measure([path, path], 9, "cpu", 1)
    P, C = net.head.weight.T.shape
    assert got["parameters"] == 2 * (sum(w.numel() for w in net.parameters()) - P * C - C) + 2 * P * 9 + 9
    assert got["MB"] == pytest.approx(2 * sum(w.nbytes for w in net.state_dict().values()) / 1e6, rel=0.01)
    assert got["ms 1"] > 0 and got["ms 256"] > 0 and got["peak 256"] >= got["peak 1"] >= 0
    with monkeypatch.context() as patch:  # a clock on which every batch takes a second
        patch.setattr(ev.time, "perf_counter", iter(range(10**6)).__next__)
        got = ev.measure([path], 9, "cpu", 1)
    assert (got["ms 1"], got["ms 256"]) == (1000, 3.91)


def test_efficiency_is_measured_once_and_again_when_something_changed(monkeypatch, tmp_path):
    asked = []

    class Pool:
        """Answers at once, in this process."""
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, f, paths, outputs, device, threads):
            asked.append(paths[0].parent.name if len(paths) == 1 else "fusion")
            found = Future()
            found.set_result({"parameters": len(asked)})
            return found

    monkeypatch.setattr(ev, "ProcessPoolExecutor", Pool)
    models = {}
    for m in BRANCHES:
        common.save_json(tmp_path / m / "projected.pt", {})
        models[m] = {"classes": ["SR"], "inputs": {f"{m}/projected.pt": "1"}}
    models |= {"fusion": {"classes": CODES, "inputs": {f"{m}/projected.pt": "1" for m in BRANCHES}},
               "macro": {"classes": CODES, "inputs": {}}, "gone": {"classes": CODES, "inputs": {"gone/joint.pt": "1"}}}
    args = SimpleNamespace(run=tmp_path, device=ev.torch.device("cpu"))

    def again(expected):
        asked.clear()
        got = ev.efficiency(args, models)
        assert sorted(asked) == sorted(expected) and set(got["models"]) == {*BRANCHES, "fusion"}
        assert got["threads"] == ev.torch.get_num_threads() and "cores" in got["hardware"]
        return got

    assert again([*BRANCHES, "fusion"])["models"] == again([])["models"]
    models["rhythm"]["inputs"]["rhythm/projected.pt"] = models["fusion"]["inputs"]["rhythm/projected.pt"] = "2"
    again(["rhythm", "fusion"])
    with monkeypatch.context() as patch:
        patch.setattr(common, "hardware", lambda device: "other cores")
        again([*BRANCHES, "fusion"])
        again([])
    again([*BRANCHES, "fusion"])
    assert [*ev.efficiency(args, {"global": models["global"]})["models"]] == ["global"]
    again([])  # an evaluation of one model has not forgotten the others
    with monkeypatch.context() as patch:  # killed, as where memory runs out
        broken = Future()
        broken.set_exception(BrokenProcessPool())
        patch.setattr(Pool, "submit", lambda *_: broken)
        (tmp_path / "efficiency.json").unlink()
        handler = ev.signal.getsignal(ev.signal.SIGINT)
        with pytest.raises(SystemExit, match="measured rhythm was killed"):
            ev.efficiency(args, models)
        assert ev.signal.getsignal(ev.signal.SIGINT) is handler
    for text in ("", "[]", "{}", '{"machine": 1, "models": 1}'):
        (tmp_path / "efficiency.json").write_text(text)
        again([*BRANCHES, "fusion"])


def test_efficiency_stands_in_the_results(made):
    _, run, metrics = made
    assert set(metrics["efficiency"]["models"]) == {*MODELS, "fusion"}
    text = (run / "results.md").read_text()
    assert re.search(r"\| rhythm +\| 1,000,001 +\| 4.01 +\| 2.5 / 0.5 +\| 9.1 / 120 +\|", text)
    assert "float32 on an abacus, 2 CPU threads" in text


class Page(html.parser.HTMLParser):
    """The elements and the text of a page."""
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


def test_the_report_is_one_page_of_everything(monkeypatch, real):
    text = report_of(monkeypatch, real)
    page = Page(text)
    assert re.findall(r'<section id="([\w-]+)"><h2>', text) == [
        "summary", "approach", "data", "results", "interpretability", "test-ecgs-beside-prototypes", "limitations",
        "how-to-reproduce"]
    for expected in ("Baseline-wander removal", "StandardScaler", "Weighted random sampling",
                     "Five loss terms", "Stage 3, classifier", "The cost of interpretability", "Efficiency",
                     "Paired differences", f"test ECG {real.case}", "fingerprint of signals", "lambda_cntrst",
                     "For research, not for clinical use"):
        assert expected in page.text
    assert HOSTILE in page.text and "<b>run & *co*" in page.text                      # said as it is, not obeyed
    assert "script" not in page.tags and "b" not in page.tags and "link" not in page.tags
    links = [v for k, v in page.attributes if k in ("src", "href")]
    assert links and all(v.startswith(("data:image/png;base64,", "#")) for v in links)
    cases = json.loads((real.run / "cases" / f"{real.case}.json").read_text())
    assert page.tags.count("img") == 2 + sum(len(r["prototypes"]) for r in cases["explained"])
    where = text.index("The cost of interpretability")
    assert text.index('<section id="interpretability"') < where < text.index('<section id="test-ecgs')
    before = (real.run / "report.html").read_bytes()
    report_of(monkeypatch, real)
    assert (real.run / "report.html").read_bytes() == before


def test_the_report_says_the_limits_of_the_readme(monkeypatch, real):
    limits = (ev.HERE / "README.md").read_text(encoding="utf-8").split("## Limits")[1].split("\n## ")[0].split()
    assert " ".join(limits) in " ".join(Page(report_of(monkeypatch, real)).text.split())


def test_the_reports_commands_make_the_same_settings(monkeypatch, real):
    """Parsed by 02 itself, the printed command gives the Config of the run."""
    text = Page(report_of(monkeypatch, real)).text
    line = next(line for line in text.splitlines() if line.startswith("python 02_train_joint.py"))
    assert f" --run {real.run}" in line and "--small" in line and "--class-weights yes" in line and "--width 8" in line
    flags = line.replace(str(real.run), "RUN").split()[2:]
    train = stage("02_train_joint")
    seen = []
    monkeypatch.setattr(train, "train", lambda name, args, cfg, prep: seen.append((name, cfg)) or 0.0)
    run_stage(monkeypatch, "02_train_joint", *flags)
    cfg = common.config_of(json.loads((real.run / "rhythm" / "joint.json").read_text()))
    assert [n for n, _ in seen] == ["blackbox-rhythm", "rhythm"]
    assert seen[1][1] == cfg


def test_the_reports_commands_train_what_the_run_holds(real):
    args, cfg = SimpleNamespace(small=False, demo=False, recipe="default"), common.Config()

    def every(**trained):
        names = {n.replace("_", "-"): {"hardware": "", "seconds": 0, **more} for n, more in trained.items()}
        m = {"config": json.loads(json.dumps(vars(cfg))), "trained": names, "versions": {}, "hardware": ""}
        info = {**real.prep.info, "test_ecgs": []}
        return [line for line in ev.reproduce_text(args, m, info).splitlines() if line.startswith("python")]

    def lines(**trained):
        return [line for line in every(**trained) if "02_train" in line]

    only_boxes = lines(blackbox_1d={}, blackbox_rhythm={})
    assert len(only_boxes) == 1 and only_boxes[0].endswith("--model blackbox-1d blackbox-rhythm")
    assert lines(rhythm={}, blackbox_1d={}, blackbox_rhythm={})[0].endswith("--model rhythm blackbox-1d")
    assert "--model" not in lines(rhythm={}, morphology={}, **{"global": {}}, blackbox_1d={}, blackbox_rhythm={})[0]
    other = json.loads(json.dumps(vars(common.replace(cfg, sampler="weighted"))))  # a box of another run
    first, second = lines(rhythm={}, morphology={}, **{"global": {}}, blackbox_rhythm={}, blackbox_1d={"config": other})
    assert first.endswith("--sampler weighted --model blackbox-1d") and "--sampler" not in second
    assert "--imagenet" not in "".join(every(rhythm={}))
    assert every(rhythm={}, blackbox_2d={})[0] == "python 00_download.py --imagenet"
    cfg = common.RECIPES["paper"]
    mine = {"config": {**json.loads(json.dumps(vars(cfg))), "lr": 0.5}}  # a branch that was tuned by itself
    assert every(rhythm={}, morphology=mine, **{"global": {}})[0].endswith("--imagenet")
    paper = [line.partition("--recipe paper")[2] for line in lines(rhythm={}, morphology=mine, **{"global": {}})]
    assert paper == [" --model rhythm global", " --lr 0.5 --model morphology",
                     " --model rhythm global --round 2", " --lr 0.5 --model morphology --round 2"]


def test_a_section_on_interpretability_stands_in_its_place(monkeypatch, real):
    written = ev.report
    more = "\n## Interpretability of prototypes\n\nDiversity: 7.\n<script>document.title = 1</script>\n"
    monkeypatch.setattr(ev, "report", lambda m: written(m) + more)
    text = report_of(monkeypatch, real)
    assert "script" not in Page(text).tags and "<script>document" in Page(text).text
    assert text.index('id="interpretability"') < text.index("Diversity: 7.") < text.index('id="test-ecgs')
    assert text.count("Diversity: 7.") == 1


def test_cases_of_the_report_are_of_this_model_or_asked_for(monkeypatch, real, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(real.run, run)
    copy = SimpleNamespace(run=run, flags=[run if f == real.run else f for f in real.flags])
    path = run / "cases" / f"{real.case}.json"
    asked = f"06_plot_prototypes.py --case {real.case} --small --prep {real.prep.path.parent} --run {run}"
    good = path.read_text()
    page = next((run / "cases" / str(real.case)).glob("*.png"))

    def broken(change, *more):
        value = json.loads(good)
        change(value)
        path.write_text(json.dumps(value))
        return report_of(monkeypatch, copy, *more)

    for change in (lambda v: v["inputs"].update({"rhythm/classifier.pt": "0"}), lambda v: v.pop("inputs"),
                   lambda v: v["explained"][0].update(prototypes=[3]), lambda v: v.update(explained=7),
                   lambda v: v["explained"][0]["prototypes"][0].update(page="../../../secret.png"),
                   lambda v: v["inputs"].update({"rhythm/gone.pt": "0"}), lambda v: page.unlink()):
        with pytest.raises(SystemExit) as error:
            broken(change)
        assert asked in sentence(error)
    shutil.rmtree(run / "cases")
    three = " ".join(map(str, sorted(real.prep.ecg_ids[real.prep.test])[:3]))
    assert asked.replace(f"--case {real.case}", f"--case {three}") in Page(report_of(monkeypatch, copy)).text


def test_a_forced_case_says_so_in_the_report(monkeypatch, real, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(real.run, run)
    copy = SimpleNamespace(run=run, flags=[run if f == real.run else f for f in real.flags])
    rewrite(run / "cases" / f"{real.case}.json", lambda v: v["inputs"].update({"rhythm/classifier.pt": "0"}))
    text = Page(report_of(monkeypatch, copy, "--force")).text
    assert f"WARNING: {run}/cases/{real.case}.json was made from another" in " ".join(text.split())


def test_a_report_does_not_outlive_its_results(monkeypatch, real, tmp_path, capsys):
    run = tmp_path / "copy"
    shutil.copytree(real.run, run)
    flags = [run if f == real.run else f for f in real.flags]
    report_of(monkeypatch, SimpleNamespace(run=run, flags=flags))
    for draws, stays in ((5, True), (6, False)):
        with monkeypatch.context() as patch:
            patch.setattr(ev, "DRAWS", draws)
            patch.setattr(ev, "efficiency", measured)
            run_stage(patch, "05_evaluate", *flags)
        assert (run / "report.html").exists() == stays == ("removed" not in capsys.readouterr().out)


def test_the_report_in_a_browser(browser, monkeypatch, real):
    """At the widths of a laptop and a phone nothing is cut off; on paper the cases lie across; nothing is fetched."""
    report_of(monkeypatch, real, figures=True)
    js, cdp = browser.execute_script, browser.execute_cdp_cmd
    for width, height in ((1280, 800), (390, 844)):
        cdp("Emulation.setDeviceMetricsOverride", {"width": width, "height": height, "deviceScaleFactor": 1,
                                                   "mobile": width < 500})
        browser.get((real.run / "report.html").as_uri())
        assert js("return document.documentElement.scrollWidth") <= width  # innerWidth would grow with the page
        assert js("return [...document.images].every(i => i.complete && i.naturalWidth > 300 && i.clientWidth > 300)")
        assert "report of" in browser.title and js("return document.scripts.length") == 0
    assert js("return performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:')).length") == 0
    cdp("Emulation.clearDeviceMetricsOverride", {})
    pdf = ev.base64.b64decode(cdp("Page.printToPDF", {"preferCSSPageSize": True})["data"])
    boxes = [tuple(map(float, b.split()[2:])) for b in re.findall(rb"/MediaBox ?\[([\d. ]+)\]", pdf)]
    assert any(w < h for w, h in boxes) and any(w > h for w, h in boxes)
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []


def ratings_file(path, reviewer, ratings, made="m"):
    each = {j: {"class": "SR", "representativeness": a, "clarity": b, "mark": mark, "comment": ""}
            for j, (a, b, mark) in ratings.items()}
    path.write_text(json.dumps({"format": 1, "kind": "protoecgnet-ratings", "reviewer": reviewer, "run": "r",
                                "made": [made], "ratings": each}))
    return path


def test_ratings_give_table_3_without_label_errors(tmp_path, capsys):
    a = ratings_file(tmp_path / "a.json", "Ada", {"rhythm/0": (5, 4, None), "rhythm/1": (3, 4, "best"),
                                                  "rhythm/2": (1, 1, None), "rhythm/3": (None, 2, None)})
    b = ratings_file(tmp_path / "b.json", "Ben", {"rhythm/0": (4, 4, None), "rhythm/1": (3, 5, None),
                                                  "rhythm/2": (1, 1, "label-error")})
    ev.ratings_table([a, b])
    out = capsys.readouterr().out
    paper = {"cardiologist": ("4.29 [4.22, 4.35]", "4.48 [4.42, 4.54]"),        # Table 3
             "internist": ("3.59 [3.52, 3.66]", "4.73 [4.69, 4.77]")}
    for who, (representativeness, clarity) in paper.items():
        assert re.search(rf"paper: {who} +\| {re.escape(representativeness)} +\| {re.escape(clarity)} ", out)
    assert "4.00 [2.04, 5.96] of 2" in out                         # Ada: 5 and 3; rhythm/2 is out for both
    assert "3.33 [2.03, 4.64] of 3" in out                         # Ada's clarity: 4, 4, 2
    assert "3.50 [2.52, 4.48] of 2" in out and "by a reviewer: 1 prototype\n" in out
    kappa = cohen_kappa_score([5, 3], [4, 3], labels=[1, 2, 3, 4, 5], weights="quadratic")
    assert f"{kappa:.2f} of 2" in out


def test_a_single_rating_has_no_interval(tmp_path, capsys):
    ev.ratings_table([ratings_file(tmp_path / "a.json", "Ada", {"rhythm/0": (5, None, None)})])
    out = capsys.readouterr().out
    assert "| 5.00 of 1 " in out and "nan" not in out


def test_ratings_of_different_prototypes_are_not_compared(tmp_path):
    files = [ratings_file(tmp_path / f"{who}.json", who, {"rhythm/0": (5, 4, None)}, who) for who in ("Ada", "Ben")]
    with pytest.raises(SystemExit, match="different models"):
        ev.ratings_table(files)


@pytest.mark.parametrize("text", ["[]", "{}", "{", '{"kind": "protoecgnet-ratings", "format": 1, "reviewer": "x", '
                                  '"ratings": {"rhythm/0": {"representativeness": 6, "clarity": 1, "mark": null}}}'])
def test_ratings_that_are_not_ours_give_one_sentence(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(SystemExit) as e:
        ev.ratings_table([tmp_path / "a.json"])
    assert "a.json" in str(e.value.code) and "review" in str(e.value.code)
