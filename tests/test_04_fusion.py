"""04_fusion.py: its solver of Eq. (10) against the optimality conditions and a slow reference; blindness to fold 10."""
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from threadpoolctl import threadpool_info, threadpool_limits

import common
from common import CODES
from conftest import change_prep, run_stage, sentence, stage, write_joint

fusion = stage("04_fusion")
TIGHT = 1e-8  # asked of the solver here, so that the comparisons are sharp


def problem(N=150, P=14, C=4, seed=0):
    """Random scores with the hard cases in them: class 0 is rare and separable, column 5 is all zero, columns 2 and 3
    are nearly the same, class 3 has no prototype of its own. X [N, P], Y [N, C], off [C, P], float64."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(N, P))
    Y = (X @ rng.normal(size=(P, C)) * 0.5 + rng.normal(size=(N, C)) > 0.3).astype(float)
    Y[:, 0] = 0
    Y[:2, 0] = 1
    X[:, 0] = np.where(Y[:, 0] == 1, 9, -0.1) + 0.01 * rng.normal(size=N)  # one score tells class 0
    X[:, 3] = X[:, 2] + 1e-3 * rng.normal(size=N)
    X = (X - X.mean(0)) / X.std(0)
    X[:, 5] = 0
    p_class = np.arange(P) % (C - 1)
    return X, Y, p_class[None] != np.arange(C)[:, None]


def solve(X, Y, off, strength, start=None, **how):
    W, b = start or (np.zeros(off.shape), np.zeros(len(off)))
    return fusion.fit(X, Y, off, strength, W, b, tolerance=TIGHT, **how)


def objective(X, Y, off, strength, W, b, l2=fusion.L2):
    """Eq. (10) with the small L2 of 04, summed over classes, in plain loops."""
    total = 0.0
    for c in range(len(W)):
        for x, y in zip(X, Y[:, c]):
            m = float(x @ W[c] + b[c])
            total += (max(m, 0) + math.log1p(math.exp(-abs(m))) - y * m) / len(X)
        for p in range(len(W[c])):
            total += (strength * abs(W[c, p]) if off[c, p] else 0) + l2 / 2 * W[c, p] ** 2
    return total


def check_optimal(X, Y, off, strength, W, b, within, l2=fusion.L2):
    """The optimality (KKT) conditions of the convex problem, class by class and weight by weight."""
    for c, strength in enumerate(np.broadcast_to(strength, len(W))):
        residual = 1 / (1 + np.exp(-(X @ W[c] + b[c]))) - Y[:, c]
        assert abs(residual.mean()) <= within, f"bias of class {c}"
        for p in range(W.shape[1]):
            g = float((residual * X[:, p]).mean() + l2 * W[c, p])
            if not off[c, p]:
                assert abs(g) <= within, (c, p, "own class: gradient 0")
            elif W[c, p] == 0:
                assert abs(g) <= strength + within, (c, p, "zero weight: gradient within the strength")
            else:
                assert abs(g + strength * np.sign(W[c, p])) <= within, (c, p, "weight: gradient = -strength * sign")


@pytest.mark.parametrize("strength", [1e-4, 1e-3, 1e-2, 0.1])
def test_fit_satisfies_the_optimality_conditions(strength):
    X, Y, off = problem()
    W, b, violation = solve(X, Y, off, strength)
    assert violation <= TIGHT
    check_optimal(X, Y, off, strength, W, b, within=1e-7)
    assert (W[:, 5] == 0).all()  # a column without information
    if strength == 1e-2:
        assert 0 < (W[off] != 0).mean() < 0.7 and (W[~off] != 0).sum() > 8  # L1 acts, and on off-class weights only


def test_l1_leaves_own_class_weights_alone():
    """Own-class weights carry no L1: at a strength that silences every other weight they are still at their optimum."""
    X, Y, off = problem()
    W, b, _ = solve(X, Y, off, 100.0)
    assert (W[off] == 0).all() and (np.abs(W[~off]) > 1e-3).sum() > 8
    check_optimal(X, Y, off, 100.0, W, b, within=1e-7)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("strength", [1e-3, 2e-2])
def test_fit_reaches_the_objective_of_a_slow_reference(strength, seed):
    X, Y, off = problem(N=80, P=10, seed=seed)
    W, b, _ = solve(X, Y, off, strength)
    for c in range(len(W)):
        weights = np.where(off[c], strength, 0)

        def slow(v):  # w = u - v with u, v >= 0 makes the L1 term linear
            w, bias = v[:10] - v[10:20], v[20]
            m = X @ w + bias
            value = (np.logaddexp(0, m) - Y[:, c] * m).mean() + fusion.L2 / 2 * w @ w + weights @ (v[:10] + v[10:20])
            r = (1 / (1 + np.exp(-m)) - Y[:, c]) / len(X)
            g = X.T @ r + fusion.L2 * w
            return value, np.concatenate([g + weights, -g + weights, [r.sum()]])

        best = minimize(slow, np.zeros(21), jac=True, method="L-BFGS-B", bounds=[(0, None)] * 20 + [(None, None)],
                        options={"maxiter": 20000, "maxfun": 40000, "ftol": 1e-15, "gtol": 1e-10})
        ours = objective(X, Y[:, [c]], off[[c]], strength, W[[c]], b[[c]])
        assert abs(ours - best.fun) <= 1e-7, c
        np.testing.assert_allclose(W[c], best.x[:10] - best.x[10:20], atol=2e-3)


def test_every_class_has_its_own_strength():
    X, Y, off = problem()
    strength = np.array([1e-3, 1e-2, 5e-2, np.inf])
    W, b, violation = solve(X, Y, off, strength)
    assert violation <= TIGHT
    check_optimal(X, Y, off, strength, W, b, within=1e-7)
    for c in range(4):
        alone = solve(X, Y[:, [c]], off[[c]], strength[c])
        np.testing.assert_allclose(W[c], alone[0][0], atol=2e-5)


def test_rare_and_frequent_labels_let_the_same_correlation_in():
    """At W = 0 the covariance of a score with a label is its correlation times the label's spread: under the default
    recipe a class's first weight appears at the strength of its largest correlation, whatever the class's frequency."""
    rng = np.random.default_rng(0)
    Y = (rng.random((4000, 3)) < [0.5, 0.05, 0.01]).astype(float)
    X = rng.normal(size=(4000, 3)) + Y / Y.std(0)  # the score of a class correlates by about .7
    X = (X - X.mean(0)) / X.std(0)
    off, largest = np.ones((3, 3), bool), np.abs(X.T @ (Y - Y.mean(0)) / len(Y) / Y.std(0)).max(0)
    assert largest.min() > 0.9 * largest.max()
    for strength, some in ((1.01, 0), (0.99, 1)):
        for c in range(3):
            W, _, _ = solve(X, Y[:, [c]], off[[c]], fusion.lambda_of(strength * largest[c], Y, "default")[c])
            assert (W != 0).sum() == some
    assert (fusion.lambda_of(0.3, Y, "paper") == 0.3).all()
    assert (fusion.lambda_of(np.inf, 0 * Y, "default") == np.inf).all()


def test_fit_takes_one_thread_of_numpys(monkeypatch):
    seen, solve_ = [], np.linalg.solve
    monkeypatch.setattr(np.linalg, "solve", lambda A, b: seen.append(
        {p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas"}) or solve_(A, b))
    with threadpool_limits(2, user_api="blas"):
        solve(*problem(), 0.03)
    assert seen and set.union(*seen) == {1}


def test_fit_does_not_depend_on_the_start():
    X, Y, off = problem()
    W, b, _ = solve(X, Y, off, 5e-3)
    rng = np.random.default_rng(0)
    start = rng.normal(size=off.shape), rng.normal(size=len(off))
    copies = start[0].copy(), start[1].copy()
    W2, b2, violation = solve(X, Y, off, 5e-3, start)
    assert violation <= TIGHT and (start[0] == copies[0]).all() and (start[1] == copies[1]).all()
    np.testing.assert_allclose(W2, W, atol=2e-5)  # violation over curvature: TIGHT / L2 at the worst
    np.testing.assert_allclose(b2, b, atol=1e-4)  # without a penalty, at -10 the loss is nearly flat in it


def test_bias_is_optimal_when_every_weight_is_zero():
    """A class without prototypes of its own under a strong L1: W = 0 and b = the log odds, whatever the start."""
    X, Y, off = problem()
    X, Y, off = X, Y[:, [3]], off[[3]]
    W, b, violation = solve(X, Y, off, 10.0)
    assert (W == 0).all()
    assert b[0] == pytest.approx(math.log(Y.mean() / (1 - Y.mean())), abs=1e-6)


def test_a_label_that_every_or_no_record_has_is_no_infinity():
    X, Y = np.random.default_rng(0).normal(size=(50, 4)), np.zeros((50, 2))
    Y[:, 1] = 1
    off = np.array([[False, False, True, True], [True, True, False, False]])
    W, b, violation = fusion.fit(X, Y, off, 0.01)
    assert np.isfinite(W).all() and np.isfinite(b).all() and b[0] < -5 and b[1] > 5 and violation < 1e-5


def test_reported_violation_is_the_true_one():
    """Stopped early, fit must say so: fit_path and the artifact's meta rely on the number."""
    X, Y, off = problem()
    W, b, violation = solve(X, Y, off, 1e-3, rounds=1)
    _, _, converged = solve(X, Y, off, 1e-3)
    assert converged <= TIGHT < violation


def test_infinite_strength_gives_own_class_weights_only():
    X, Y, off = problem()
    W, b, violation = solve(X, Y, off, torch.inf)
    assert np.isfinite(W).all() and np.isfinite(b).all() and violation <= TIGHT
    assert (W[off] == 0).all() and (W[~off] != 0).sum() == (~off).sum() - 1  # all of them but the empty column
    check_optimal(X, Y, off, np.inf, W, b, within=1e-7)


def test_rare_separable_class_has_a_finite_optimum():
    X, Y, off = problem()
    W, b, _ = solve(X, Y, off, 1e-5)
    logits = X @ W[0] + b[0]
    assert logits[Y[:, 0] == 1].min() > logits[Y[:, 0] == 0].max() and np.abs(W[0]).max() < 50


# ---------------------------------------------------------------------------------------------------------------------
# What goes into the fit

def scores_and_prep(N=60, P=8, seed=0):
    rng = np.random.default_rng(seed)
    folds = 1 + np.arange(N) % 10
    prep = SimpleNamespace(folds=folds, train=folds <= 8, val=folds == 9, test=folds == 10, patient_ids=np.arange(N))
    y = rng.random((N, 3)) < 0.4
    scores = 0.9 + 0.02 * rng.normal(size=(N, P)) + 0.02 * (y @ rng.normal(size=(3, P)))
    return scores.astype(np.float32), prep, y.astype(np.uint8), rng


def test_standardise_uses_training_folds_and_forgets_own_patients():
    scores, prep, _, _ = scores_and_prep()  # whose patients have the numbers of their rows
    own = np.array([0, 3, 3, 60 - 4, 12, 20, 21, 30])
    assert (prep.folds[own] <= 8).all()
    X, X_val, X_later, mean, std = fusion.standardise(scores, prep, own)
    train = scores[prep.train].astype(np.float64)
    np.testing.assert_allclose(mean, train.mean(0), rtol=1e-6)
    np.testing.assert_allclose(std, train.std(0), rtol=1e-4)
    rows = np.flatnonzero(prep.train).tolist()
    want = (train - train.mean(0)) / train.std(0)
    for p, record in enumerate(own):
        assert X[rows.index(record), p] == 0
        want[rows.index(record), p] = 0
    np.testing.assert_allclose(X, want, atol=2e-4)
    assert (X == 0).sum() == len(own)  # nothing else is touched
    np.testing.assert_allclose(X_later, (scores[prep.folds >= 9] - train.mean(0)) / train.std(0), atol=2e-4)
    np.testing.assert_array_equal(X_val, X_later[prep.folds[prep.folds >= 9] == 9])


def test_own_patients_entries_do_not_matter():
    """Whatever a patient's record scores against the prototype taken from it, the classifier sees the mean there."""
    scores, prep, y, rng = scores_and_prep()
    own = np.array([0, 3, 3, 56, 12, 20, 21, 30])
    X = fusion.standardise(scores, prep, own)[0]
    rows = np.flatnonzero(prep.train).tolist()
    entries = [rows.index(r) for r in own], np.arange(8)
    scores[own, np.arange(8)] = 1.0  # a perfect match
    again = fusion.standardise(scores, prep, own)[0]
    assert (again[entries] == 0).all() and (X[entries] == 0).all()


def test_standardise_forgets_other_records_of_a_prototypes_patient():
    scores, prep, _, _ = scores_and_prep()
    own = np.array([0, 3, 3, 56, 12, 20, -1, 30])  # of the seventh prototype all matches count
    prep.patient_ids[[1, 2, 5]] = prep.patient_ids[[0, 3, 40]]  # rows 0 and 1 are of one patient, so are 3 and 2
    X = fusion.standardise(scores, prep, own)[0]
    rows = np.flatnonzero(prep.train).tolist()
    assert {(rows[i], p) for i, p in zip(*np.nonzero(X == 0))} == {
        *((r, p) for p, r in enumerate(own.tolist()) if r >= 0), (1, 0), (2, 1), (2, 2)}


def test_constant_score_is_no_division_by_zero():
    scores, prep, _, _ = scores_and_prep()
    scores[:, 2] = 0.5
    X, _, X_later, _, std = fusion.standardise(scores, prep, np.zeros(8, int))
    assert np.isfinite(X).all() and np.abs(X[:, 2]).max() < 1 and (std > 0).all()


def path_of(scores, prep, y, own, recipe="default"):
    X, X_val, X_later, mean, std = fusion.standardise(scores, prep, own)
    off = np.arange(8)[None] % 3 != np.arange(3)[:, None]
    W, b, path, strength = fusion.fit_path(X, y[prep.train].astype(float), off, X_val, y[prep.val], "test", recipe)
    return dict(mean=mean, std=std, W=W, b=b, strength=strength, path=path)


@pytest.mark.parametrize("garbage", [1e6, np.nan, -np.inf])
def test_scores_and_strength_are_blind_to_fold_10(garbage):
    scores, prep, y, _ = scores_and_prep()
    own = np.zeros(8, int)
    clean = path_of(scores, prep, y, own)
    scores[prep.test], y[prep.test] = garbage, 1 - y[prep.test]
    poisoned = path_of(scores, prep, y, own)
    assert clean["path"] == poisoned["path"] and clean["strength"] == poisoned["strength"]
    for k in ("mean", "std", "W", "b"):
        np.testing.assert_array_equal(clean[k], poisoned[k])
    scores, prep, y, rng = scores_and_prep()  # the test can fail: fold 9 does choose the strength's table
    y[prep.val] = 1 - y[prep.val]
    assert path_of(scores, prep, y, own)["path"] != clean["path"]


def test_best_strength_of_fold_9_is_chosen_within_the_limit(monkeypatch):
    scores, prep, y, _ = scores_and_prep()
    monkeypatch.setattr(fusion, "fit", lambda X, Y, off, *_: (np.zeros(off.shape), 0.0, 0.0))  # the choice matters here
    curve = iter([0.80, 0.9001, 0.9020, 0.9015, 0.9020, 0.9018, 0.9017, 0.90])
    monkeypatch.setattr(common, "macro_auroc", lambda y, s: next(curve))
    chosen = path_of(scores, prep, y, np.zeros(8, int))
    assert [row["strength"] for row in chosen["path"]] == sorted(fusion.STRENGTHS["default"], reverse=True)
    assert chosen["strength"] == fusion.STRENGTHS["default"][2]  # the stronger of the two with .9020

    shares = iter(())  # of the off-class weights that the next strengths leave

    def fit(X, Y, off, strength, W, b):
        return (off & (np.cumsum(off).reshape(off.shape) <= next(shares) * off.sum())).astype(float), 0.0, 0.0
    monkeypatch.setattr(fusion, "fit", fit)
    for recipe, tried in (("default", 3), ("paper", 8)):  # the paper sets no limit
        curve, shares = iter(np.linspace(0.8, 0.9, 8)), iter([0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
        chosen = path_of(scores, prep, y, np.zeros(8, int), recipe)
        assert len(chosen["path"]) == tried and chosen["strength"] == fusion.STRENGTHS[recipe][tried - 1], recipe
    monkeypatch.setattr(common, "macro_auroc", lambda y, s: float("nan"))  # no label to judge by: the strongest
    shares = iter([0] * 8)
    assert path_of(scores, prep, y, np.zeros(8, int))["strength"] == fusion.STRENGTHS["default"][0]


# ---------------------------------------------------------------------------------------------------------------------
# The stages 03 and 04 themselves

@pytest.fixture
def run_to_fusion(tmp_path, monkeypatch, tiny_prep):
    """run_to_fusion(name, change): 03 and 04 on untrained branches, after change(folds, signals, labels)."""
    def go(name, change=None, models=("rhythm",)):
        prep = tiny_prep(f"prep-{name}")
        if change:
            arrays = {k: np.array(getattr(prep, k)) for k in ("signals", "labels")}
            change(prep.folds, **arrays)
            prep = change_prep(tmp_path / f"prep-{name}", **arrays)
        run = tmp_path / f"run-{name}"
        for model in models:
            write_joint(run, prep, model)
        folders = ("--prep", tmp_path / f"prep-{name}", "--run", run, "--device", "cpu")
        run_stage(monkeypatch, "03_project", *folders)
        run_stage(monkeypatch, "04_fusion", *folders)
        return prep, run
    return go


def test_projection_and_classifier_are_blind_to_fold_10(run_to_fusion):
    def garbage(folds, signals, labels):
        signals[folds == 10] = np.random.default_rng(1).normal(size=signals[folds == 10].shape) * 1e3
        labels[folds == 10] = 1 - labels[folds == 10]

    prep, clean = run_to_fusion("clean")
    _, poisoned = run_to_fusion("poisoned", garbage)
    a, b = (torch.load(run / "rhythm/classifier.pt", weights_only=True) for run in (clean, poisoned))
    for k in ("W", "b", "mean", "std"):
        assert torch.equal(a[k], b[k]), k
    assert a["meta"]["strength"] == b["meta"]["strength"] and a["meta"]["path"] == b["meta"]["path"]
    p, q = (json.loads((run / "rhythm/prototypes.json").read_text()) for run in (clean, poisoned))
    for k in ("prototypes", "gap", "val_auroc_before", "val_auroc_after"):
        assert p[k] == q[k], k
    la, lb = (np.load(run / "logits_rhythm.npy") for run in (clean, poisoned))
    of = prep.folds[prep.folds >= 9]
    modelled = common.columns(a["meta"]["classes"])
    assert np.array_equal(la[of == 9], lb[of == 9], equal_nan=True)
    assert not np.isclose(la[of == 10][:, modelled], lb[of == 10][:, modelled]).any()  # the poison did arrive
    assert np.isnan(np.delete(la, modelled, 1)).all()


def test_a_classifier_that_is_not_solved_says_so(run_to_fusion, monkeypatch, capsys):
    f4, solved = stage("04_fusion"), stage("04_fusion").fit
    monkeypatch.setattr(f4, "fit", lambda *a, **k: (*solved(*a, **k)[:2], 0.5))
    _, run = run_to_fusion("unsolved")
    assert "WARNING: rhythm: Eq. (10) is not solved" in capsys.readouterr().err
    for found in (json.loads((run / "predictions.json").read_text())["models"]["rhythm"],
                  json.loads((run / "rhythm" / "classifier.json").read_text())):
        assert "is not solved" in found["warnings"][0]


@pytest.mark.parametrize("own_patient", [False, True])
def test_whether_own_patients_count_is_a_setting(tiny_prep, tmp_path, monkeypatch, own_patient):
    """The classifier does not change with what prototypes' own patients score, unless the setting says they count."""
    prep, folders = tiny_prep(), ("--prep", tmp_path / "prep", "--run", tmp_path / "run", "--device", "cpu")
    write_joint(tmp_path / "run", prep, own_patient=own_patient)
    run_stage(monkeypatch, "03_project", *folders)
    found = json.loads((tmp_path / "run/rhythm/prototypes.json").read_text())["prototypes"]
    net, _ = common.load_model(tmp_path / "run/rhythm/projected.pt", "")
    rows = [prep.row_of[q["ecg_id"]] for q in found]
    assert net.p_patient.tolist() == ([-1] * len(rows) if own_patient else prep.patient_ids[rows].tolist())

    seen, fit_path = [], fusion.fit_path
    monkeypatch.setattr(fusion, "fit_path", lambda X, *a: (seen.append(X), fit_path(X, *a))[1])
    run_stage(monkeypatch, "04_fusion", *folders)
    at = [np.flatnonzero(prep.train).tolist().index(r) for r in rows], range(len(rows))
    assert ((seen[0][at] == 0) != own_patient).all() and (seen[0] == 0).sum() == (0 if own_patient else len(rows))


def test_whole_fusion_of_three_branches(run_to_fusion, capsys):
    """Artifacts of 04 agree with each other: logits = standardised scores times W + b, Eq. (9), own-class fusion."""
    prep, run = run_to_fusion("all", models=common.BRANCHES)
    later = np.flatnonzero(prep.folds >= 9)
    scores = [np.load(run / m / "scores.npy") for m in common.BRANCHES]
    scores = np.concatenate(scores, 1).astype(np.float64)                                                      # Eq. (9)
    prototypes = sum((json.loads((run / m / "prototypes.json").read_text())["prototypes"] for m in common.BRANCHES), [])
    assert scores.shape == (60, len(prototypes))
    models = [common.load_model(run / m / "projected.pt", "03_project.py")[0] for m in common.BRANCHES]
    direct = torch.cat([common.batched(lambda x: m(x)[1], prep, np.arange(60), "cpu") for m in models], 1)
    np.testing.assert_allclose(scores, direct, atol=1e-5)
    for name in ("fusion", "fusion-own"):
        saved = torch.load(run / f"{name}.pt", weights_only=True)
        assert saved["meta"]["config"].keys() == {*common.BRANCHES}  # branches may differ
        classes, W, b = saved["meta"]["classes"], saved["W"].numpy(), saved["b"].numpy()
        assert classes == sorted(classes, key=CODES.index)
        logits = (scores[later] - saved["mean"].numpy()) / saved["std"].numpy() @ W.T + b
        got = np.load(run / f"logits_{name}.npy")
        np.testing.assert_allclose(got[:, common.columns(classes)], logits, atol=1e-3, rtol=1e-3)
        probabilities = np.load(run / f"probabilities_{name}.npy")
        np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-got.astype(np.float64))), atol=1e-6)
        off = np.array([[q["class"] != c for q in prototypes] for c in classes])
        assert (W[off] == 0).all() == (name == "fusion-own")

        # optimal for its data: the training records' scores, without those of records against their own prototype
        X = (scores - saved["mean"].numpy()) / saved["std"].numpy()
        row = {int(e): i for i, e in enumerate(prep.ecg_ids)}
        for p, q in enumerate(prototypes):
            X[row[q["ecg_id"]], p] = 0
        Y = prep.labels[prep.train][:, common.columns(classes)].astype(float)
        strength = saved["meta"]["strength"] * Y.std(0) if name == "fusion" else np.inf
        check_optimal(X[prep.train], Y, off, strength, W, b, within=1e-4)

    macro, branch = np.load(run / "logits_macro.npy"), [np.load(run / f"logits_{m}.npy") for m in common.BRANCHES]
    for m, logits in zip(common.BRANCHES, branch):  # each label from its own branch
        columns = common.columns([c for c in common.GROUPS[m] if not np.isnan(logits[:, CODES.index(c)]).any()])
        np.testing.assert_array_equal(macro[:, columns], logits[:, columns])
    assert np.isnan(macro).all(0).sum() == 71 - len(classes)
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{run}: fold-9 macro-AUROC fusion ")


def test_what_projection_costs_is_measured_on_both_models(run_to_fusion):
    """Logits of Stage 1's heads are the saved models'; "unprojected" is Eq. (10) on the scores before Stage 2."""
    prep, run = run_to_fusion("cost")
    later = np.flatnonzero(prep.folds >= 9)
    joint, projected = (common.load_model(run / f"rhythm/{name}.pt", "")[0] for name in ("joint", "projected"))
    own = common.columns(joint.classes)
    for name, net in (("joint", joint), ("projected", projected)):
        wanted = common.batched(lambda x: net(x)[0], prep, later, "cpu").numpy()
        np.testing.assert_allclose(np.load(run / f"logits_rhythm-{name}.npy")[:, own], wanted, atol=1e-5)
    scores = common.batched(lambda x: joint(x)[1], prep, np.arange(60), "cpu").numpy()
    strength = torch.load(run / "rhythm/classifier.pt", weights_only=True)["meta"]["strength"]
    X, _, X_later, _, _ = fusion.standardise(scores, prep, projected.p_patient.numpy())
    Y = prep.labels[prep.train][:, own].astype(float)
    off = np.array([[joint.classes[k] != c for k in joint.p_class] for c in joint.classes])
    W, b, _ = fusion.fit(X, Y, off, fusion.lambda_of(strength, Y, "default"))
    unprojected, final = (np.load(run / f"logits_rhythm{end}.npy")[:, own] for end in ("-unprojected", ""))
    np.testing.assert_allclose(unprojected, X_later @ W.T + b, atol=2e-3)
    assert np.abs(unprojected - final).max() > 0.05


def test_a_branch_that_fold_9_cannot_judge(run_to_fusion):
    """No fold-9 record with the branch's labels (a small data set): its AUROC is undefined, and that is no crash."""
    def none_in_fold_9(folds, signals, labels):
        labels[folds == 9] = 0

    _, run = run_to_fusion("unjudged", none_in_fold_9)
    saved = torch.load(run / "rhythm/classifier.pt", weights_only=True)
    assert saved["meta"]["strength"] == fusion.STRENGTHS["default"][0]
    assert json.loads((run / "predictions.json").read_text())["models"]["rhythm"]["val_auroc"] is None


def test_a_model_that_has_gone_leaves_no_prediction(run_to_fusion, tmp_path, monkeypatch):
    _, run = run_to_fusion("gone", models=("rhythm", "global"))
    assert "global" in json.loads((run / "predictions.json").read_text())["models"]
    shutil.rmtree(run / "global")
    run_stage(monkeypatch, "04_fusion", "--prep", tmp_path / "prep-gone", "--run", run, "--device", "cpu")
    left = json.loads((run / "predictions.json").read_text())["models"]
    assert {*left} == {"rhythm", "rhythm-joint", "rhythm-projected", "rhythm-unprojected"}


def test_a_model_trained_again_leaves_no_fusion_of_what_it_was(run_to_fusion, tmp_path, monkeypatch):
    prep, run = run_to_fusion("again", models=common.BRANCHES)
    write_joint(run, prep, "rhythm", seed=1)
    folders = ("--prep", tmp_path / "prep-again", "--run", run, "--device", "cpu", "--model", "rhythm")
    for name in ("03_project", "04_fusion"):
        run_stage(monkeypatch, name, *folders)
    left = json.loads((run / "predictions.json").read_text())["models"]
    assert {"rhythm", "global"} <= {*left} and not {"fusion", "fusion-own"} & {*left}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 0, "inputs": 1}'])
def test_damaged_predictions_are_written_anew(run_to_fusion, tmp_path, monkeypatch, text):
    """05's remedy for them is 04."""
    name = f"damaged{len(text)}"
    _, run = run_to_fusion(name)
    before = (run / "predictions.json").read_bytes()
    (run / "predictions.json").write_text(text)
    run_stage(monkeypatch, "04_fusion", "--prep", tmp_path / f"prep-{name}", "--run", run, "--device", "cpu")
    assert (run / "predictions.json").read_bytes() == before


def test_fusion_refuses_prototypes_of_another_training(run_to_fusion, monkeypatch, capsys):
    prep, run = run_to_fusion("stale")
    write_joint(run, prep, "rhythm", seed=1)  # trained again, not projected again
    folders = ("--prep", prep.path.parent, "--run", run, "--device", "cpu")
    with pytest.raises(SystemExit) as e:
        run_stage(monkeypatch, "04_fusion", *folders)
    assert "projected.pt" in sentence(e) and "03_project.py --model rhythm" in sentence(e)
    run_stage(monkeypatch, "04_fusion", *folders, "--force")
    assert "WARNING" in capsys.readouterr().err


def test_fusion_of_two_recipes_is_refused(run_to_fusion, tiny_prep, tmp_path, monkeypatch):
    prep = tiny_prep()
    for model in ("rhythm", "morphology", "global"):
        write_joint(tmp_path / "run", prep, model, recipe="paper" if model == "rhythm" else "default")
    folders = ("--prep", tmp_path / "prep", "--run", tmp_path / "run", "--device", "cpu")
    run_stage(monkeypatch, "03_project", *folders)
    with pytest.raises(SystemExit) as e:
        run_stage(monkeypatch, "04_fusion", *folders)
    assert "branches of both recipes" in sentence(e)


def test_fusion_without_projection_gives_one_sentence(tiny_prep, tmp_path, monkeypatch):
    prep = tiny_prep()
    folders = ("--prep", tmp_path / "prep", "--run", tmp_path / "run", "--device", "cpu")
    with pytest.raises(SystemExit) as e:
        run_stage(monkeypatch, "04_fusion", *folders)
    assert "02_train_joint.py" in sentence(e)
    write_joint(tmp_path / "run", prep, "rhythm")
    with pytest.raises(SystemExit) as e:
        run_stage(monkeypatch, "04_fusion", *folders)
    assert "projected.pt" in sentence(e) and "03_project.py --model rhythm" in sentence(e)
    with pytest.raises(SystemExit) as e:
        run_stage(monkeypatch, "04_fusion", *folders, "--model", "blackbox-1d")
    assert "joint.pt" in sentence(e) and "02_train_joint.py --model blackbox-1d" in sentence(e)
