"""04_fusion.py: its solver of Eq. (10) against slow references, and what it keeps of a run."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CPU, arguments, change_prep, run_stage, sentence, stage, write_joint, write_run
from scipy.optimize import minimize
from scipy.special import expit
from threadpoolctl import threadpool_info, threadpool_limits

import common

fusion = stage("04_fusion")
TIGHT = 1e-8  # asked of the solver here, so that the comparisons are sharp


# ---- Eq. (10)

def problem(N=150, P=14, C=4, seed=0):
    """Random scores with the hard cases: X [N, P], Y [N, C], off [C, P] in float64.

    Class 0 is rare and one score tells it, scores 2 and 3 are nearly the same, score 5 is all zero,
    class 3 has no prototype of its own.
    """
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(N, P))
    Y = (X @ rng.normal(size=(P, C)) * 0.5 + rng.normal(size=(N, C)) > 0.3).astype(float)
    Y[:, 0] = np.arange(N) < 2
    X[:, 0] = np.where(Y[:, 0] == 1, 9, -0.1) + 0.01 * rng.normal(size=N)
    X[:, 3] = X[:, 2] + 1e-3 * rng.normal(size=N)
    X = (X - X.mean(0)) / X.std(0)
    X[:, 5] = 0
    return X, Y, np.arange(P) % (C - 1) != np.arange(C)[:, None]


def solve(X, Y, off, lambda_, W=None, b=None):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusion, "TOLERANCE", TIGHT)
        W, b, violation = fusion.fit(X, Y, off, lambda_, W, b)
    assert violation <= TIGHT
    return W, b


def check_optimal(X, Y, off, lambda_, W, b, within=1e-7):
    """The optimality conditions of the convex problem, weight by weight."""
    for c, l1 in enumerate(np.broadcast_to(lambda_, len(W))):
        error = expit(X @ W[c] + b[c]) - Y[:, c]
        assert abs(error.mean()) <= within, f"bias of class {c}"
        for p, w in enumerate(W[c]):
            g = error @ X[:, p] / len(X) + fusion.L2 * w
            if not off[c, p]:  # no L1 on a class's own prototypes
                assert abs(g) <= within, (c, p)
            elif w == 0:
                assert abs(g) <= l1 + within, (c, p)
            else:
                assert abs(g + l1 * np.sign(w)) <= within, (c, p)


@pytest.mark.parametrize("lambda_", [
    1e-4, 1e-3, 1e-2, 0.1, 100.0, np.inf, np.array([1e-3, 1e-2, 5e-2, np.inf])])
def test_fit_satisfies_the_optimality_conditions(lambda_):
    X, Y, off = problem()
    W, b = solve(X, Y, off, lambda_)
    check_optimal(X, Y, off, lambda_, W, b)
    assert (W[:, 5] == 0).all()  # a score without information
    assert (W[~off] != 0).sum() == (~off).sum() - 1  # own-class weights are not silenced
    let_in, strong = np.where(off, W, 0).any(1), np.broadcast_to(lambda_, 4) > 1  # [C]
    assert not let_in[strong].any() and let_in.any() != strong.all()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("lambda_", [1e-3, 2e-2])
def test_fit_equals_an_independent_solver(lambda_, seed):
    """SciPy's L-BFGS-B in float64: w = u - v with u, v >= 0 makes the L1 term linear."""
    P = 10
    X, Y, off = problem(N=80, P=P, seed=seed)
    W, b = solve(X, Y, off, lambda_)
    for c in range(len(W)):
        l1 = np.where(off[c], lambda_, 0)

        def objective(v):
            w = v[:P] - v[P:-1]
            m = X @ w + v[-1]
            bce = (np.logaddexp(0, m) - Y[:, c] * m).mean()
            error = (expit(m) - Y[:, c]) / len(X)
            g = X.T @ error + fusion.L2 * w
            value = bce + fusion.L2 / 2 * w @ w + l1 @ (v[:P] + v[P:-1])
            return value, np.concatenate([g + l1, l1 - g, [error.sum()]])

        best = minimize(
            objective, np.zeros(2 * P + 1), jac=True, method="L-BFGS-B",
            bounds=[(0, None)] * (2 * P) + [(None, None)],
            options={"maxiter": 20000, "maxfun": 40000, "ftol": 1e-15, "gtol": 1e-10})
        ours = np.concatenate([W[c].clip(0), (-W[c]).clip(0), [b[c]]])
        assert objective(ours)[0] == pytest.approx(best.fun, abs=1e-7)
        np.testing.assert_allclose(W[c], best.x[:P] - best.x[P:-1], atol=2e-3)


def test_fit_does_not_depend_on_the_start(monkeypatch):
    X, Y, off = problem()
    W, b = solve(X, Y, off, 5e-3)
    start = np.random.default_rng(0).normal(size=off.shape)
    W_2, b_2 = solve(X, Y, off, 5e-3, start, start[:, 0])
    np.testing.assert_allclose(W_2, W, atol=2e-5)  # violation over curvature
    np.testing.assert_allclose(b_2, b, atol=1e-4)  # at -10 the loss is nearly flat in it
    monkeypatch.setattr(fusion, "ROUNDS", 1)
    assert fusion.fit(X, Y, off, 5e-3)[2] > fusion.TOLERANCE  # unsolved: it says so


def test_classes_without_an_inner_optimum():
    """Nothing but a bias; a label that every or no record has; two records that one score tells."""
    X, Y, off = problem()
    W, b = solve(X, Y[:, [3]], off[[3]], 10.0, np.zeros((1, 14)), np.zeros(1))
    assert (W == 0).all() and expit(b[0]) == pytest.approx(Y[:, 3].mean(), abs=1e-6)
    W, b = solve(X, Y[:, [0]], off[[0]], 1e-5)
    logits = X @ W[0] + b[0]
    assert logits[:2].min() > logits[2:].max() and np.abs(W).max() < 50
    W, b, violation = fusion.fit(X, np.zeros((150, 2)) + [0, 1], off[:2], 0.01)
    assert np.isfinite(W).all() and b[0] < -5 and 5 < b[1] < np.inf and violation < 1e-5


def test_lambda_of_lets_the_same_correlation_in_for_rare_and_frequent_labels():
    """At W = 0 the covariance of score and label is their correlation times the label's spread."""
    rng = np.random.default_rng(0)
    Y = (rng.random((4000, 3)) < [0.5, 0.05, 0.01]).astype(float)
    X = rng.normal(size=(4000, 3)) + Y / Y.std(0)  # a class's score correlates by about .7
    X = (X - X.mean(0)) / X.std(0)
    correlation = np.abs(X.T @ (Y - Y.mean(0)) / len(Y) / Y.std(0)).max(0)
    assert correlation.min() > 0.9 * correlation.max()
    off = np.ones((3, 3), bool)
    for factor, let_in in ((1.01, 0), (0.99, 3)):
        W, _ = solve(X, Y, off, fusion.lambda_of(factor * correlation, Y, "default"))
        assert (W != 0).any(1).sum() == let_in
    assert (fusion.lambda_of(0.3, Y, "paper") == 0.3).all()
    assert (fusion.lambda_of(np.inf, 0 * Y, "default") == np.inf).all()


def test_fit_takes_one_thread_of_numpys(monkeypatch):
    seen, real = [], np.linalg.eigvalsh
    monkeypatch.setattr(np.linalg, "eigvalsh", lambda *a: seen.append(threadpool_info()) or real(*a))
    with threadpool_limits(2, user_api="blas"):
        solve(*problem(), 0.03)
    blas = [pool for info in seen for pool in info if pool["user_api"] == "blas"]
    assert {pool["num_threads"] for pool in blas} == {1}


# ---- What goes into the fit, and the strength

def scores_and_prep(N=60, P=8):
    """Random scores [N, P] of three labels, a PREP whose patients are its rows, y [N, 3]."""
    rng = np.random.default_rng(0)
    folds = 1 + np.arange(N) % 10
    masks = dict(train=folds <= 8, val=folds == 9, test=folds == 10)
    prep = SimpleNamespace(patient_ids=np.arange(N), **masks)
    y = (rng.random((N, 3)) < 0.4).astype(np.uint8)
    scores = 0.9 + 0.02 * rng.normal(size=(N, P)) + 0.02 * (y @ rng.normal(size=(3, P)))
    return scores.astype(np.float32), prep, y


@pytest.mark.parametrize("tied", [False, True])
def test_standardise_uses_training_folds_and_forgets_own_patients(tied):
    scores, prep, _ = scores_and_prep()
    scores[:, 7] = 0.5  # no division by zero
    prep.patient_ids[[1, 2, 5]] = prep.patient_ids[[0, 3, 40]]  # of whom there are two records
    p_patient = np.array([0, 3, 3, 56, 12, 20, -1, 30])  # of the seventh all matches count
    pieces = [0, 1, 1, 2, 3, 3, 3, 4] if tied else range(8)
    A = np.eye(max(pieces) + 1)[list(pieces)]
    X, mean, std = fusion.standardise(scores, A, prep, p_patient)
    want = np.full((60, A.shape[1]), np.nan)
    for i, f in np.ndindex(want.shape):
        counted = [scores[i, p] for p in range(8)
                   if pieces[p] == f and prep.patient_ids[i] != p_patient[p]]
        want[i, f] = np.mean(counted, dtype=np.float64) if counted else np.nan
    train = want[prep.train]
    np.testing.assert_allclose(mean, np.nanmean(train, 0), rtol=1e-12)
    np.testing.assert_allclose(std, np.nanstd(train, 0).clip(1e-6), rtol=1e-9)
    np.testing.assert_allclose(X, np.nan_to_num((want - mean) / std), rtol=1e-9, atol=1e-9)
    assert (X[:, :-1] == 0).sum() == (5 if tied else 9)  # where no match counts: the mean


def path_of(scores, prep, y, recipe="default", within=fusion.WITHIN):
    X, *_ = fusion.standardise(scores, np.eye(8), prep, np.zeros(8, int))
    off = np.arange(8) % 3 != np.arange(3)[:, None]
    strengths = fusion.STRENGTHS[recipe]
    return fusion.fit_path(X, y.astype(float), off, prep, recipe, strengths, within)


@pytest.mark.parametrize("garbage", [1e6, np.nan, -np.inf])
def test_scores_and_strength_are_blind_to_fold_10(garbage):
    scores, prep, y = scores_and_prep()
    W, b, *chosen = path_of(scores, prep, y)
    scores[prep.test], y[prep.test] = garbage, 1 - y[prep.test]
    W_2, b_2, *again = path_of(scores, prep, y)
    assert (W == W_2).all() and (b == b_2).all() and chosen == again
    y[prep.val] = 1 - y[prep.val]  # the test can fail: fold 9 does count
    assert path_of(scores, prep, y)[3] != chosen[1]


@pytest.mark.parametrize("recipe", common.RECIPES)
@pytest.mark.parametrize("fold_9, chosen", [
    ([0.8, 0.9, 0.92, 0.9, 0.92, 0.9, 0.9, 0.9], 2), (np.linspace(0.8, 0.9, 8), 7),
    ([0.8, 0.899, 0.8985, 0.9, 0.9, 0.9, 0.9, 0.9], 1),  # a thousandth is no reason
    ([0.8, 0.897, 0.8985, 0.9, 0.9, 0.9, 0.9, 0.9], 2),
    ([np.nan] * 8, 0)])  # nothing to judge by: the strongest
def test_fold_9_chooses_the_strongest_that_costs_almost_nothing(
        monkeypatch, fold_9, chosen, recipe):
    calls = []
    monkeypatch.setitem(fusion.STRENGTHS, recipe, fusion.STRENGTHS[recipe][:8])

    def auroc(y, s):  # every strength is judged on as many resamples
        calls.append(y)
        return fold_9[(len(calls) - 1) // fusion.RESAMPLES]

    monkeypatch.setattr(common, "macro_auroc", auroc)
    W, _, strength, path = path_of(*scores_and_prep(), recipe)
    assert [row["strength"] for row in path] == sorted(fusion.STRENGTHS[recipe], reverse=True)
    assert strength == path[chosen]["strength"] and (W != 0).sum() == path[chosen]["nonzero"]
    one, two = calls[:2]  # with replacement, and each its own
    assert len(one) == 6 and (one != two).any()
    np.testing.assert_array_equal(calls[fusion.RESAMPLES], one)  # the same for all strengths


def test_thresholds_have_the_best_f1_of_fold_9():
    """Against a loop over every score; with fewer than 10 positives it is 0."""
    rng = np.random.default_rng(0)
    y, logits = rng.random((200, 4)) < [0.4, 0.1, 0, 0.2], rng.normal(size=(200, 4)).round(1)
    y[:9, 2], logits[:, 3] = True, logits[:, 3].round()  # equal scores stay together
    for c, got in enumerate(fusion.thresholds_of(y, logits)):
        f1 = {}
        for t in set(logits[:, c]):
            over = logits[:, c] >= t
            f1[t] = 2 * (over & y[:, c]).sum() / (over.sum() + y[:, c].sum())
        assert got == 0 if c == 2 else f1[got] == max(f1.values())


# ---- The stage itself

def classifier(run, name):
    return common.load(run / "classifiers" / f"{name}.pt", "", arguments(run))


def logits_of(net, prep):
    """What a network gives for folds 9 and 10."""
    later = np.flatnonzero(prep.val | prep.test)
    return common.batched(net, prep, later, CPU)


@pytest.fixture
def whole(tiny_prep, tmp_path, monkeypatch):
    prep = tiny_prep()
    return prep, write_run(monkeypatch, tmp_path / "run", prep)


def test_a_classifier_is_w_x_plus_b_and_optimal(whole):
    """Branch, fusion and own-class fusion: logits, thresholds, fold 9, and Eq. (10) itself."""
    prep, run = whole
    later = prep.val | prep.test
    for head in common.load_run(run, ["rhythm", "fusion", "fusion-own"]):
        scores = common.similarities(head, np.array(prep.signals))
        X = (common.evidence(scores, head.A) - head.mean) / head.std
        logits = classifier(run, head.name)["logits"].numpy()
        own = common.columns(head.classes)
        np.testing.assert_allclose(logits[:, own], X[later] @ head.W.T + head.b, atol=1e-3)
        assert np.isnan(np.delete(logits, own, 1)).all()
        y, on_val = prep.labels[:, own], logits[prep.val[later]][:, own]
        assert head.val_auroc == pytest.approx(common.macro_auroc(y[prep.val], on_val))
        assert (head.thresholds == fusion.thresholds_of(y[prep.val], on_val)).all()
        assert (head.nonzero, head.weights) == ((head.W != 0).sum(), head.W.size)

        for p, q in enumerate(head.prototypes):
            assert head.pieces[head.A[p].argmax()] == q["class"] and head.A[p].sum() == 1
            scores[prep.row_of[q["ecg_id"]], p] = np.nan  # each patient has one record
        groups = [np.nanmean(scores[:, head.A[:, f] > 0], 1) for f in range(len(head.pieces))]
        X = np.nan_to_num((np.stack(groups, 1) - head.mean) / head.std)
        off = np.array(head.pieces) != np.array(head.classes)[:, None]
        np.testing.assert_allclose(X[prep.train].mean(0), 0, atol=1e-3)
        assert (head.strength is None) == (head.name == "fusion-own")
        assert head.strength or (head.W[off] == 0).all()
        if head.strength:  # of our fusion a stronger one, for short explanations
            within = fusion.SHORT if head.name == "fusion" else fusion.WITHIN
            best = max(row["val_auroc"] for row in head.path)
            fine = [row for row in head.path if row["val_auroc"] >= best - within]
            assert head.strength == max(row["strength"] for row in fine)
        Y = y[prep.train].astype(float)
        lambda_ = fusion.lambda_of(head.strength or np.inf, Y, "default")
        check_optimal(X[prep.train], Y, off, lambda_, head.W, head.b, within=1e-4)
    trained = set(common.CODES) - set(prep.info["without_training_record"])
    assert classifier(run, "fusion")["meta"]["classes"] == [c for c in common.CODES if c in trained]


def test_steps_on_the_way(whole):
    """Stage 1's head before and after projection; Eq. (10) before it; macro is its branches."""
    prep, run = whole
    for step in ("joint", "projected"):
        net, _ = common.load_model(run / "rhythm" / f"{step}.pt", "", arguments(run))
        got = classifier(run, f"rhythm-{step}")["logits"][:, common.columns(net.classes)]
        torch.testing.assert_close(got, logits_of(net, prep), atol=1e-4, rtol=1e-4)
    macro = classifier(run, "macro")
    for saved in (classifier(run, branch) for branch in common.BRANCHES):
        own = common.columns(saved["meta"]["classes"])
        assert torch.equal(macro["logits"][:, own], saved["logits"][:, own])
    for name in ("fusion", "fusion-own", "rhythm"):
        saved, before = classifier(run, name), classifier(run, f"{name}-unprojected")
        assert before["meta"]["strength"] == saved["meta"]["strength"]
        assert not torch.equal(before["mean"], saved["mean"])


def test_black_boxes_keep_their_own_logits(tiny_prep, tmp_path, monkeypatch):
    prep, run = tiny_prep(), tmp_path / "run"
    for box in common.BOXES:
        write_joint(run, prep, box)
    run_stage(monkeypatch, "04_fusion", "--run", run, "--prep", tmp_path / "prep")
    for branch in common.BRANCHES:
        net, _ = common.load_model(run / f"blackbox-{branch}/joint.pt", "", arguments(run))
        for name in (f"blackbox-{branch}", "blackbox-macro"):
            got = classifier(run, name)["logits"][:, common.columns(net.classes)]
            torch.testing.assert_close(got, logits_of(net, prep), atol=1e-4, rtol=1e-4)


def test_projection_and_classifier_are_blind_to_fold_10(whole, tiny_prep, tmp_path, monkeypatch):
    """Fold 10 replaced by garbage: prototypes, weights, thresholds, fold-9 logits stay."""
    prep, run = whole
    signals, labels = np.array(prep.signals), np.array(prep.labels)
    signals[prep.test], labels[prep.test] = 50, 1 - labels[prep.test]
    tiny_prep("poisoned")
    poisoned = change_prep(tmp_path / "poisoned", signals=signals, labels=labels)
    other = write_run(monkeypatch, tmp_path / "other", poisoned)
    for branch in common.BRANCHES:
        a, b = (common.load(r / branch / "projected.pt", "")["state"] for r in (run, other))
        assert all(torch.equal(a[k], b[k]) for k in a)
    on_val = prep.val[prep.val | prep.test]
    for name in ("fusion", "fusion-own", "rhythm", "morphology"):
        a, b = classifier(run, name), classifier(other, name)
        assert all(torch.equal(a[k], b[k]) for k in ("W", "b", "mean", "std", "thresholds"))
        assert all(a["meta"][k] == b["meta"][k] for k in ("strength", "path", "val_auroc"))
        np.testing.assert_array_equal(a["logits"][on_val], b["logits"][on_val])
        own = common.columns(a["meta"]["classes"])
        assert not torch.isclose(a["logits"][~on_val][:, own], b["logits"][~on_val][:, own]).any()


@pytest.mark.parametrize("change", [{"recipe": "paper"}, {"tie": "none"}])
def test_fusion_of_two_recipes_is_refused(tiny_prep, tmp_path, monkeypatch, change):
    prep, flags = tiny_prep(), ["--run", tmp_path / "run", "--prep", tmp_path / "prep"]
    for branch, changes in zip(common.BRANCHES, ({}, {}, change)):
        write_joint(tmp_path / "run", prep, branch, **changes)
    run_stage(monkeypatch, "03_project", *flags)
    with pytest.raises(SystemExit) as e:
        run_stage(monkeypatch, "04_fusion", *flags)
    assert "two recipes" in sentence(e)
