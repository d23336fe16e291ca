"""04_fusion.py: its solver of Eq. (10) against the optimality conditions and a slow reference; blindness to fold 10."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from threadpoolctl import threadpool_info, threadpool_limits

import common
from conftest import arguments, change_prep, run_stage, sentence, stage, write_joint, write_run

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


# ---- What goes into the fit

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
    X_all, mean, std = fusion.standardise(scores, prep, own)
    X, X_later = X_all[prep.train], X_all[prep.folds >= 9]
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


def test_standardise_forgets_other_records_of_a_prototypes_patient():
    scores, prep, _, _ = scores_and_prep()
    own = np.array([0, 3, 3, 56, 12, 20, -1, 30])  # of the seventh prototype all matches count
    prep.patient_ids[[1, 2, 5]] = prep.patient_ids[[0, 3, 40]]  # rows 0 and 1 are of one patient, so are 3 and 2
    X = fusion.standardise(scores, prep, own)[0][prep.train]
    rows = np.flatnonzero(prep.train).tolist()
    assert {(rows[i], p) for i, p in zip(*np.nonzero(X == 0))} == {
        *((r, p) for p, r in enumerate(own.tolist()) if r >= 0), (1, 0), (2, 1), (2, 2)}


def test_constant_score_is_no_division_by_zero():
    scores, prep, _, _ = scores_and_prep()
    scores[:, 2] = 0.5
    X, _, std = fusion.standardise(scores, prep, np.zeros(8, int))
    assert np.isfinite(X).all() and np.abs(X[:, 2]).max() < 1 and (std > 0).all()


def path_of(scores, prep, y, own, recipe="default"):
    X, mean, std = fusion.standardise(scores, prep, own)
    off, Y = np.arange(8)[None] % 3 != np.arange(3)[:, None], y.astype(float)
    W, b, strength, path = fusion.fit_path(
        X[prep.train], Y[prep.train], off, X[prep.val], y[prep.val], recipe, "test")
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


def test_thresholds_have_the_best_f1_of_fold_9():
    """Against a loop over every score; a label with fewer than 10 positives is predicted from 0 on."""
    rng = np.random.default_rng(0)
    y, logits = rng.random((200, 4)) < [0.4, 0.1, 0.03, 0.2], rng.normal(size=(200, 4)).round(1)
    y[:, 2] = False
    y[:9, 2] = True
    for c, got in enumerate(fusion.thresholds_of(y, logits)):
        f1 = {}
        for t in set(logits[:, c]):
            over = logits[:, c] >= t
            f1[t] = 2 * (over & y[:, c]).sum() / (over.sum() + y[:, c].sum())
        assert got == 0 if c == 2 else f1[got] == max(f1.values())


# ---- The stage itself

FLAGS = ["--device", "cpu", "--threads", 1]


def classifier(run, name):
    return torch.load(run / "classifiers" / f"{name}.pt", weights_only=True)


def later_rows(prep):
    return np.flatnonzero(prep.val | prep.test)


def test_whole_fusion_of_three_branches(tiny_prep, tmp_path, monkeypatch):
    """Logits are W X + b on standardised similarities; the fusion has all branches' prototypes; own has own weights."""
    prep = tiny_prep()
    run = write_run(monkeypatch, tmp_path / "run", prep)
    heads = common.load_run(run, ["fusion", "fusion-own", "rhythm"])
    x = torch.from_numpy(np.array(prep.signals[later_rows(prep)]))
    for head in heads:
        saved = classifier(run, head.name)
        X = (common.similarities(head, x) - head.mean) / head.std
        own = common.columns(head.classes)
        np.testing.assert_allclose(saved["logits"].numpy()[:, own], X @ head.W.T + head.b, atol=1e-3)
        rest = np.setdiff1d(np.arange(71), own)
        assert np.isnan(saved["logits"].numpy()[:, rest]).all()
        on_val = prep.val[later_rows(prep)]
        y, logits = prep.labels[prep.val][:, own], saved["logits"].numpy()[on_val][:, own]
        assert saved["meta"]["val_auroc"] == pytest.approx(common.macro_auroc(y, logits))
        np.testing.assert_array_equal(head.thresholds, fusion.thresholds_of(y, logits))
        assert saved["meta"]["nonzero"] == (head.W != 0).sum() and saved["meta"]["weights"] == head.W.size
    p_code = np.array([q["class"] for q in heads[1].prototypes])
    assert (heads[1].W[p_code != np.array(heads[1].classes)[:, None]] == 0).all()
    assert heads[0].classes == [c for c in common.CODES if prep.info["training_positives"][c]]
    scores = common.similarities(heads[0], torch.from_numpy(np.array(prep.signals[prep.train])))
    np.testing.assert_allclose(heads[0].mean, scores.mean(0), atol=1e-5)


def test_steps_on_the_way(tiny_prep, tmp_path, monkeypatch):
    """-joint and -projected are Stage 1's head on the prototypes before and after projection; macro is its branches."""
    prep = tiny_prep()
    run = write_run(monkeypatch, tmp_path / "run", prep)
    x = torch.from_numpy(np.array(prep.signals[later_rows(prep)]))
    for step in ("joint", "projected"):
        net, _ = common.load_model(run / "rhythm" / f"{step}.pt", "", arguments(run))
        with torch.no_grad():
            want = net(x)[0]
        got = classifier(run, f"rhythm-{step}")["logits"][:, common.columns(net.classes)]
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    macro = classifier(run, "macro")
    for branch in common.BRANCHES:
        own = common.columns(classifier(run, branch)["meta"]["classes"])
        assert torch.equal(macro["logits"][:, own], classifier(run, branch)["logits"][:, own])
    assert classifier(run, "fusion-unprojected")["W"].shape == classifier(run, "fusion")["W"].shape


def test_black_boxes_keep_their_own_logits(tiny_prep, tmp_path, monkeypatch):
    prep = tiny_prep()
    run = tmp_path / "run"
    for box in [b for b in common.BOXES if b != "blackbox-2d"]:
        write_joint(run, prep, box)
    run_stage(monkeypatch, "04_fusion", "--run", run, "--prep", tmp_path / "prep", *FLAGS)
    net, _ = common.load_model(run / "blackbox-1d/joint.pt", "", arguments(run))
    with torch.no_grad():
        want = net(torch.from_numpy(np.array(prep.signals[later_rows(prep)])))[0]
    got = classifier(run, "blackbox-1d")["logits"][:, common.columns(net.classes)]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert classifier(run, "blackbox-macro")["meta"]["branches"] == []


def test_projection_and_classifier_are_blind_to_fold_10(tiny_prep, tmp_path, monkeypatch):
    """Fold 10 replaced by garbage: prototypes, weights, strength, thresholds and fold-9 logits stay the same."""
    clean = tiny_prep()
    signals, labels = np.array(clean.signals), np.array(clean.labels)
    signals[clean.test], labels[clean.test] = 50, 1 - labels[clean.test]
    tiny_prep("poisoned")
    poisoned = change_prep(tmp_path / "poisoned", signals=signals, labels=labels)
    a, b = (write_run(monkeypatch, tmp_path / f"run{i}", p) for i, p in enumerate((clean, poisoned)))
    for branch in common.BRANCHES:
        same = [torch.load(r / branch / "projected.pt", weights_only=True)["state"] for r in (a, b)]
        assert all(torch.equal(same[0][k], same[1][k]) for k in same[0])
    for name in ("fusion", "fusion-own", "rhythm", "morphology"):
        one, two = classifier(a, name), classifier(b, name)
        for k in ("W", "b", "mean", "std", "thresholds"):
            assert torch.equal(one[k], two[k]), (name, k)
        assert one["meta"]["strength"] == two["meta"]["strength"]
        on_val = clean.val[later_rows(clean)]
        np.testing.assert_array_equal(one["logits"][on_val], two["logits"][on_val])


def test_fusion_of_two_recipes_is_refused(tiny_prep, tmp_path, monkeypatch):
    prep = tiny_prep()
    for branch in common.BRANCHES:
        write_joint(tmp_path / "run", prep, branch, recipe="paper" if branch == "global" else "default")
    flags = ["--run", tmp_path / "run", "--prep", tmp_path / "prep", *FLAGS]
    run_stage(monkeypatch, "03_project", *flags)
    with pytest.raises(SystemExit) as e:
        run_stage(monkeypatch, "04_fusion", *flags)
    assert "both recipes" in sentence(e)
