"""02_train_joint.py: training learns, resumes to the same bits, never sees fold 10, and fails with one sentence."""
import copy
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import scipy
import torch
from conftest import ROOT, change_prep, run_stage, sentence, stage, write_joint
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression

import common

SMALL = ["--width", 8, "--batch", 16, "--epochs", 2, "--blackbox-epochs", 3, "--device", "cpu", "--threads", 1]


def train(monkeypatch, tmp_path, run, *flags, prep="prep"):
    run_stage(monkeypatch, "02_train_joint", "--prep", tmp_path / prep, "--run", tmp_path / run, *SMALL, *flags)
    return tmp_path / run


def weights(path):
    return torch.load(path, weights_only=True)["state"]


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()


def test_training_separates_what_can_be_separated(tiny_prep, tmp_path, monkeypatch):
    """The records of tiny_prep differ in frequency by label: a working loop finds that within a few epochs."""
    tiny_prep(n=200)
    run = train(monkeypatch, tmp_path, "run", "--model", "blackbox-1d", "--blackbox-epochs", 12, "--augment", "no")
    log = [json.loads(line) for line in (run / "blackbox-1d" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["bce"] < 0.7 * log[0]["bce"]
    assert json.loads((run / "blackbox-1d" / "joint.json").read_text())["val_auroc"] > 0.75


def test_black_box_head_is_the_logistic_regression_that_fold_9_prefers(tiny_prep, tmp_path):
    """Against scikit-learn's solution at each strength; and a head that nothing beats on fold 9 stays as it is."""
    prep = tiny_prep(n=200)
    write_joint(tmp_path, prep, "blackbox-1d")
    net, _ = common.load_model(tmp_path / "blackbox-1d" / "joint.pt", "")
    own, cpu = common.columns(net.classes), torch.device("cpu")
    h = [common.batched(lambda x: net(x)[1], prep, np.flatnonzero(m), cpu).double() for m in (prep.train, prep.val)]
    X, X_val = ((part - h[0].mean(0)) / h[0].std(0).clamp_min(1e-6) for part in h)
    y, y_val = prep.labels[prep.train][:, own], prep.labels[prep.val][:, own]
    strengths = (0.1, 0.03, 0.01, 0.003)
    heads = stage("02_train_joint").black_box_heads(net, prep, cpu, strengths)
    expected = {common.macro_auroc(y_val, net.head(h[1].float()).detach().numpy()): None}
    for l2, (W, b) in zip(strengths, heads):
        solver = LogisticRegression(C=1 / (l2 * len(y)), tol=1e-8, max_iter=3000)
        fits = [clone(solver).fit(X, y[:, c]) for c in range(len(own))]
        logits = np.stack([fit.decision_function(X_val) for fit in fits], 1)
        np.testing.assert_allclose(h[1].float() @ W.T + b, logits, rtol=0.03, atol=0.1)
        expected[common.macro_auroc(y_val, logits)] = logits
    got = stage("02_train_joint").refit_black_box(net, prep, cpu)
    assert got == pytest.approx(max(expected), abs=1e-3) and expected[max(expected)] is not None
    np.testing.assert_allclose(net.head(h[1].float()).detach(), expected[max(expected)], rtol=0.03, atol=0.1)

    net.head.weight.data[:], net.head.bias.data[:] = 0, 0
    worse = change_prep(tmp_path / "prep", labels=np.where(prep.train[:, None], prep.labels, 1 - prep.labels))
    stage("02_train_joint").refit_black_box(net, worse, cpu)  # fold 9 contradicts folds 1-8: AUROC .5 is the best there
    assert (net.head.weight == 0).all() and (net.head.bias == 0).all()


def test_head_is_solved_without_what_a_prototype_says_of_its_own_patient(tiny_prep, tmp_path):
    """Against the same objective minimised in float64, on scores with the own patients' replaced by the mean."""
    prep = tiny_prep(n=120)
    write_joint(tmp_path, prep)
    net, _ = common.load_model(tmp_path / "rhythm" / "joint.pt", "")
    z, y, ids = common.training_set(net, prep, torch.device("cpu"))
    patients = common.patients_of(ids, prep)
    assert patients.tolist() == [prep.patient_ids[prep.ecg_ids.tolist().index(e)] for e in ids]
    patients[20:40] = patients[:20]  # two records each
    net.p_patient[1:] = patients[[3, 7, 11]]  # of the first prototype all matches count
    net.p.data[1:] = z[[3, 7, 11]]

    s = net.scores(z).detach().double().numpy()
    mean, std = s.mean(0), s.std(0)
    for p, rows in enumerate([[], [3, 23], [7, 27], [11, 31]]):
        s[rows, p] = mean[p]
    stage("02_train_joint").refit_head(net, z, y, patients)
    for c in range(2):
        own = net.p_class.numpy() == c
        X = (s[:, own] - mean[own]) / std[own]

        def objective(v):
            m = X @ v[:-1] + v[-1]
            return np.sum(np.logaddexp(0, m) - y[:, c] * m) + len(y) * 1e-4 / 2 * np.sum(v[:-1] ** 2)

        v = scipy.optimize.minimize(objective, np.zeros(X.shape[1] + 1), tol=1e-10).x
        want, W, b = X @ v[:-1] + v[-1], net.head.weight.detach().numpy(), net.head.bias.detach().numpy()
        np.testing.assert_allclose(s @ W[c] + b[c], want, atol=1e-3 * np.abs(want).max())
        assert (W[c, ~own] == 0).all()


def test_head_of_a_rare_label_is_solved_too():
    """Ten positives in 4,000 records: a tolerance on the gradient of the mean loss must not stop it half way."""
    rng = np.random.default_rng(0)
    net = common.ProtoECGNet("1d", ["SR", "AFIB"], [3, 3], common.Config(width=8))
    y = np.zeros((4000, 2))
    y[:1500, 0] = y[:10, 1] = 1
    s = rng.normal(size=(4000, 6)) * 0.05 + 0.3 * y[:, [0, 0, 0, 1, 1, 1]] * rng.random(6)
    net.scores = lambda part: part
    patients = torch.arange(4000)
    stage("02_train_joint").refit_head(net, torch.from_numpy(s).float(), y, patients)
    X = (s[:, 3:] - s[:, 3:].mean(0)) / s[:, 3:].std(0)
    slow = LogisticRegression(C=1e4 / 4000, tol=1e-10, max_iter=10**4).fit(X, y[:, 1])
    got = s @ net.head.weight[1].detach().double().numpy() + net.head.bias[1].item()
    np.testing.assert_allclose(got, X @ slow.coef_[0] + slow.intercept_[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("own_patient", [False, True])
def test_joint_training_takes_the_mean_for_what_a_prototype_says_of_its_own_patient(tiny_prep, tmp_path, monkeypatch,
                                                                                    own_patient):
    """In one batch of all training records, by what the network gives and what the loss is given; then the prototypes
    are of the patients that the epoch's projection found."""
    prep = tiny_prep(n=60)
    prep = change_prep(tmp_path / "prep", patient_ids=prep.patient_ids // 3)  # up to three records of each patient
    given, found, forward, loss = [], [], common.ProtoECGNet.forward, common.composite_loss
    own_patients = common.own_patients

    def watched(net, x):
        logits, s = forward(net, x)
        if net.training:
            given.append((x, net.p_patient.clone(), s.detach(), copy.deepcopy(net.head)))
        return logits, s

    def watched_loss(logits, s, y, p, p_class, *rest):
        given.append((logits.detach(), s.detach()))
        return loss(logits, s, y, p, p_class, *rest)

    monkeypatch.setattr(common.ProtoECGNet, "forward", watched)
    monkeypatch.setattr(common, "composite_loss", watched_loss)
    monkeypatch.setattr(common, "own_patients", lambda *a: found.append(own_patients(*a)) or found[-1])
    run = train(monkeypatch, tmp_path, "run", "--model", "rhythm", "--batch", 100, "--epochs", 1, "--augment", "no",
                "--lr", 0.05,  # so that the sources move
                "--own-patient", "yes" if own_patient else "no")
    (x, p_patient, s, head), (logits, s_loss) = given
    rows = [int((prep.signals == record).all((1, 2)).argmax()) for record in x.numpy()]             # of the batch
    own = torch.from_numpy(prep.patient_ids[rows])[:, None] == p_patient                            # [B, P]
    changed = s_loss != s
    if own_patient:
        assert (p_patient == -1).all() and not changed.any()
        return
    assert (p_patient >= 0).all() and own.any(0).all() and torch.equal(changed, own)
    torch.testing.assert_close(s_loss[changed], s.mean(0).expand_as(s)[changed])
    torch.testing.assert_close(logits, head(s_loss).detach())
    last = torch.load(run / "rhythm" / "last.pt", weights_only=True)["model"]["p_patient"]
    assert len(found) == 2 and torch.equal(last, found[1]) and not torch.equal(last, p_patient)


@pytest.mark.parametrize("model", ["rhythm", "morphology", "global", "all-1d", "all-partial", "all-global"])
def test_every_prototype_model_in_both_recipes(tiny_prep, tmp_path, monkeypatch, model):
    prep = tiny_prep()
    flags = {"default": [], "paper": ["--recipe", "paper", "--start", "random"]}
    for recipe, more in flags.items():
        run = train(monkeypatch, tmp_path, recipe, "--model", model, "--epochs", 1, "--blackbox-epochs", 1, *more)
        net, meta = common.load_model(run / model / "joint.pt", "")
        assert set(meta["classes"]) <= set(common.GROUPS[common.MODELS[model][1]])
        assert set(meta["left_out"]) == set(common.GROUPS[common.MODELS[model][1]]) - set(meta["classes"])
        assert meta["inputs"]["prep"] == common.file_hash(prep.path)
        assert (run / ("blackbox-rhythm" if model == "rhythm" else "blackbox-1d")).exists() == (recipe == "default")


def test_default_prototypes_start_as_real_training_windows_of_their_class(tiny_prep, tmp_path, monkeypatch):
    prep = tiny_prep()
    run = train(monkeypatch, tmp_path, "run", "--model", "morphology", "--epochs", 0)  # epoch 0 is the start
    net, _ = common.load_model(run / "morphology" / "joint.pt", "")
    z, carries, _ = common.training_set(net, prep, torch.device("cpu"))
    for j, c in enumerate(net.p_class.tolist()):
        windows = z[carries[:, c]].unfold(2, 3, 1).permute(0, 2, 1, 3).flatten(0, 1)           # [n windows, D, 3]
        assert (windows - net.p[j].detach()).abs().amax((1, 2)).min() < 1e-4


@pytest.mark.parametrize("model", ["rhythm", "morphology"])
def test_latents_start_as_whitened_class_directions(tiny_prep, tmp_path, monkeypatch, model):
    """Against Cov^(-1/2) by SciPy in float64, on the evidence that each step gives to each class of the black box."""
    prep = tiny_prep()
    run = train(monkeypatch, tmp_path, "run", "--model", model, "--epochs", 0)
    net, _ = common.load_model(run / model / "joint.pt", "")
    box, _ = common.load_model(run / common.start_of(model, common.Config()) / "joint.pt", "")
    (V, _), = stage("02_train_joint").black_box_heads(box, prep, torch.device("cpu"), [0.1])
    box, V = box.double(), V.double()
    with torch.no_grad():
        h = box.backbone(box.scaler(torch.from_numpy(prep.signals[prep.train]).double()))             # [N, D, L]
        mean, most = V.tensor_split(2, 1)  # of the weights, those on the average and those on the maximum over time
        if model == "rhythm":
            u = (h.mean(2) @ mean.T + h.amax(2) @ most.T)[:, :, None]                                 # [N, C, 1]
        else:
            u = torch.einsum("cd,ndl->ncl", mean + most, h)                                           # [N, C, L]
    steps = u.transpose(1, 2).flatten(0, 1).numpy()
    covariance = np.cov(steps.T)
    damped = covariance + np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    expected = (steps - steps.mean(0)) @ np.linalg.inv(scipy.linalg.sqrtm(damped))
    z, *_ = common.training_set(net, prep, torch.device("cpu"))
    order = np.argsort(prep.ecg_ids[prep.train], kind="stable")
    got = z[np.argsort(order)].transpose(1, 2).flatten(0, 1)
    np.testing.assert_allclose(got, expected, atol=2e-3)
    assert 0.1 < np.linalg.eigvalsh(np.cov(got.T)).max() < 1  # damped: below 1, the largest near it


def test_resumed_equals_uninterrupted_bit_for_bit(tiny_prep, tmp_path, monkeypatch):
    """Killed after its first epoch and resumed: weights, log and random state as without the kill."""
    tiny_prep()
    whole = train(monkeypatch, tmp_path, "whole", "--model", "rhythm")
    module, real = stage("02_train_joint"), common.save_pt

    def killed(path, value):
        real(path, value)
        if path.name == "last.pt" and path.parent.name == "rhythm" and len(value["log"]) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(module.common, "save_pt", killed)
    with pytest.raises(SystemExit) as e:
        train(monkeypatch, tmp_path, "cut", "--model", "rhythm")
    assert "--resume" in str(e.value.code)
    assert not (tmp_path / "cut" / "rhythm" / "joint.pt").exists()
    monkeypatch.setattr(module.common, "save_pt", real)
    cut = train(monkeypatch, tmp_path, "cut", "--model", "rhythm", "--resume")
    assert same(weights(whole / "rhythm" / "joint.pt"), weights(cut / "rhythm" / "joint.pt"))
    assert (whole / "rhythm" / "log.jsonl").read_text() == (cut / "rhythm" / "log.jsonl").read_text()
    last = [torch.load(r / "rhythm" / "last.pt", weights_only=True) for r in (whole, cut)]
    assert torch.equal(last[0]["random"], last[1]["random"]) and same(last[0]["model"], last[1]["model"])


def test_same_seed_same_result_other_seed_another(tiny_prep, tmp_path, monkeypatch):
    tiny_prep()
    runs = [train(monkeypatch, tmp_path, f"run{i}", "--model", "blackbox-rhythm", "--seed", seed)
            for i, seed in enumerate((1, 1, 2))]
    state = [weights(r / "blackbox-rhythm" / "joint.pt") for r in runs]
    assert same(state[0], state[1]) and not same(state[0], state[2])


def test_training_is_blind_to_fold_10(tiny_prep, tmp_path, monkeypatch):
    """Fold 10 replaced by garbage, signals and labels: every weight, the log and the chosen epoch stay the same."""
    clean = tiny_prep()
    signals, labels = clean.signals.copy(), clean.labels.copy()
    signals[clean.test], labels[clean.test] = 1e3, 1 - labels[clean.test]
    tiny_prep("poisoned")
    change_prep(tmp_path / "poisoned", signals=np.asarray(signals), labels=labels)
    runs = [train(monkeypatch, tmp_path, f"run-{p}", "--model", "rhythm", prep=p) for p in ("prep", "poisoned")]
    assert same(*(weights(r / "rhythm" / "joint.pt") for r in runs))
    assert len({(r / "rhythm" / "log.jsonl").read_text() for r in runs}) == 1


@pytest.mark.parametrize("flags", [["--scheduler", s] for s in ("constant", "cosine", "step", "cyclic", "plateau")] + [
    ["--class-weights", "yes"], ["--sampler", "weighted"], ["--no-contrastive"], ["--head", "free"],
    ["--prototypes", "random"], ["--add-on", "sigmoid", "--start", "random"]])
def test_options_train(tiny_prep, tmp_path, monkeypatch, flags):
    tiny_prep()
    run = train(monkeypatch, tmp_path, "run", "--model", "rhythm", "--epochs", 1, "--blackbox-epochs", 1, *flags)
    cfg = json.loads((run / "rhythm" / "joint.json").read_text())["config"]
    if flags == ["--no-contrastive"]:
        assert cfg["lambda_cntrst"] == 0
    else:
        assert str(cfg[flags[0][2:].replace("-", "_")]).lower() in (flags[1], "true")


@pytest.mark.parametrize("flags", [["--prototypes", "random"], ["--start", "random"]])
def test_random_prototypes_start_among_the_latents_and_with_a_solved_head(tiny_prep, tmp_path, monkeypatch, flags):
    """Not in the positive corner of a signed space, and not with W at 1 / -0.5, which is of another scale."""
    tiny_prep()
    run = train(monkeypatch, tmp_path, "run", "--model", "rhythm", "--epochs", 0, "--blackbox-epochs", 1, *flags)
    state = weights(run / "rhythm" / "joint.pt")
    p, W = state["p"].flatten(1), state["head.weight"]
    assert abs(float(p.mean())) < 0.25 and float(p.min()) < -0.25
    own = state["p_class"] == torch.arange(len(W))[:, None]
    assert (W[~own] == 0).all() and W[own].unique().numel() > own.sum() // 2


def test_second_round_starts_from_the_projected_prototypes(tiny_prep, tmp_path, monkeypatch, capsys):
    tiny_prep()
    run = train(monkeypatch, tmp_path, "run", "--model", "rhythm")
    with pytest.raises(SystemExit) as e:
        train(monkeypatch, tmp_path, "run", "--model", "rhythm", "--round", 2)
    assert "03_project.py" in sentence(e)
    run_stage(monkeypatch, "03_project", "--prep", tmp_path / "prep", "--run", run, "--device", "cpu")
    assert "rounds" not in capsys.readouterr().out
    train(monkeypatch, tmp_path, "run", "--model", "rhythm", "--round", 2, "--epochs", 0)
    projected, second = (weights(run / "rhythm" / f"{n}.pt") for n in ("projected", "joint_r2"))
    assert torch.equal(projected["p"], second["p"]) and torch.equal(projected["p_patient"], second["p_patient"])
    assert not torch.equal(projected["head.weight"], second["head.weight"])  # W is that of the projected prototypes
    with pytest.raises(SystemExit) as e:
        train(monkeypatch, tmp_path, "run", "--model", "rhythm", "--round", 2, "--own-patient", "yes", "--force")
    assert "another own_patient (False)" in sentence(e)
    with pytest.raises(SystemExit) as e:
        train(monkeypatch, tmp_path, "run", "--model", "rhythm", "--round", 2, "--seed", 7, "--force")
    assert "another seed (42)" in sentence(e)
    tiny_prep("fewer", codes=("SR", "NORM"))
    with pytest.raises(SystemExit) as e:
        train(monkeypatch, tmp_path, "run", "--model", "rhythm", "--round", 2, "--force", prep="fewer")
    assert "other labels" in sentence(e)
    run_stage(monkeypatch, "03_project", "--prep", tmp_path / "prep", "--run", run, "--device", "cpu")
    assert (run / "rhythm" / "projected_r2.pt").is_file()
    train(monkeypatch, tmp_path, "run", "--model", "rhythm", "--epochs", 1, "--force")  # round 1 anew, not projected
    with pytest.raises(SystemExit) as e:
        train(monkeypatch, tmp_path, "run", "--model", "rhythm", "--round", 2)
    assert "projected.pt" in sentence(e) and "03_project.py" in sentence(e)


def test_projection_names_the_models_whose_recipe_has_more_rounds(tiny_prep, tmp_path, monkeypatch, capsys):
    tiny_prep()
    flags = ["--recipe", "paper", "--model", "all-1d", "rhythm"]
    run = train(monkeypatch, tmp_path, "run", *flags, "--epochs", 0)
    run_stage(monkeypatch, "03_project", "--prep", tmp_path / "prep", "--run", run, "--device", "cpu", *flags)
    line = [line for line in capsys.readouterr().out.splitlines() if "more rounds" in line]
    assert len(line) == 1 and "--model all-1d rhythm --round 2" in line[0] and "--recipe paper" in line[0]


def test_non_finite_loss_names_epoch_step_and_term(tiny_prep, tmp_path, monkeypatch):
    prep = tiny_prep()
    signals = np.array(prep.signals)
    signals[np.flatnonzero(prep.train)[5]] = np.nan
    change_prep(tmp_path / "prep", signals=signals)
    with pytest.raises(SystemExit) as e:
        train(monkeypatch, tmp_path, "run", "--model", "blackbox-1d")
    message = sentence(e)
    assert "bce" in message and "epoch 1" in message and "step" in message
    assert not (tmp_path / "run" / "blackbox-1d" / "joint.pt").exists()


def test_weights_that_diverge_in_the_last_step(tiny_prep, tmp_path, monkeypatch):
    """The loss of the only step is a number, the weights after it are none."""
    tiny_prep()
    with pytest.raises(SystemExit) as e:
        train(monkeypatch, tmp_path, "run", "--model", "blackbox-1d", "--blackbox-epochs", 1, "--batch", 999,
              "--blackbox-lr", 1e30)
    assert "fold 9" in sentence(e) and "lower learning rate" in sentence(e)


def test_latents_that_are_no_numbers_are_not_blamed_on_the_data(tiny_prep, tmp_path):
    prep = tiny_prep()
    model = common.ProtoECGNet("1d", ["SR"], [2], common.Config(width=8))
    model.add_on.bias.data[3] = torch.nan
    with pytest.raises(common.Diverged) as e:  # which ends a trial of --tune, not the search
        common.training_set(model, prep, "cpu")
    assert "learning rate" in sentence(e) and "01_preprocess" not in sentence(e)


@pytest.mark.parametrize("flags, says", [
    (["--scheduler", "wild"], "--scheduler"), (["--class-weights", "perhaps"], "--class-weights"),
    (["--model", "rhythms"], "rhythms"), (["--device", "quantum"], "--device"), (["--threads", "0"], "--threads")])
def test_usage_errors(tmp_path, monkeypatch, capsys, flags, says):
    with pytest.raises(SystemExit) as e:
        run_stage(monkeypatch, "02_train_joint", "--prep", tmp_path, *flags)
    assert e.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1]


def test_errors_are_one_sentence(tiny_prep, tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as e:
        train(monkeypatch, tmp_path, "run", prep="nowhere")
    assert "01_preprocess.py" in sentence(e)
    tiny_prep()
    with pytest.raises(SystemExit) as e:  # ImageNet weights are not there
        train(monkeypatch, tmp_path, "run", "--model", "blackbox-2d", "--width", 64, "--imagenet", tmp_path / "no.pth")
    assert "00_download.py --imagenet" in sentence(e)
    tiny_prep("few", codes=("SR", "AFIB"))
    with pytest.raises(SystemExit) as e:
        train(monkeypatch, tmp_path, "run2", "--model", "blackbox-global", prep="few")
    assert "global" in sentence(e)


@pytest.mark.parametrize("prep, flags, says", [
    ("other", [], "02_train_joint.py --model blackbox-rhythm"), ("prep", ["--width", 16], "--width 8"),
    ("prep", ["--blackbox-epochs", 5], "--blackbox-epochs 3"), ("prep", ["--pool", "mean"], "--pool meanmax")])
def test_start_from_another_data_set_or_setting_is_refused(tiny_prep, tmp_path, monkeypatch, prep, flags, says):
    """And the message names the flag that helps."""
    tiny_prep(), tiny_prep("other", seed=1)
    train(monkeypatch, tmp_path, "run", "--model", "blackbox-rhythm")
    with pytest.raises(SystemExit) as e:
        train(monkeypatch, tmp_path, "run", "--model", "rhythm", *flags, prep=prep)
    assert says in sentence(e)


def test_a_model_named_twice_is_trained_once(tiny_prep, tmp_path, monkeypatch, capsys):
    tiny_prep()
    train(monkeypatch, tmp_path, "run", "--model", "blackbox-1d", "blackbox-1d", "--blackbox-epochs", 1)
    assert capsys.readouterr().out.count("epoch   1/1") == 1


def test_resume_trains_again_what_other_arrays_made(tiny_prep, tmp_path, monkeypatch, capsys):
    prep = tiny_prep()
    for twice in (1, 2):
        train(monkeypatch, tmp_path, "run", "--model", "blackbox-1d", "--resume")
    assert "is finished, kept" in capsys.readouterr().out
    common.save_json(prep.path, {**prep.info, "seed": 1})
    train(monkeypatch, tmp_path, "run", "--model", "blackbox-1d", "--resume")
    assert "kept" not in capsys.readouterr().out
    assert common.load_json(tmp_path / "run" / "blackbox-1d" / "joint.json", "")["inputs"] == {
        "prep": common.file_hash(prep.path)}


def test_without_a_black_box_prototypes_start_at_random_and_say_so(tiny_prep, tmp_path, monkeypatch):
    tiny_prep()
    run = train(monkeypatch, tmp_path, "run", "--model", "rhythm", "--epochs", 0, "--start", "random")
    assert common.load_json(run / "rhythm" / "joint.json", "")["config"]["prototypes"] == "random"


def test_resume_refuses_another_setting(tiny_prep, tmp_path, monkeypatch):
    tiny_prep()
    run = train(monkeypatch, tmp_path, "run", "--model", "blackbox-1d")
    (run / "blackbox-1d" / "joint.pt").unlink()
    with pytest.raises(SystemExit) as e:
        train(monkeypatch, tmp_path, "run", "--model", "blackbox-1d", "--resume", "--lr", 0.5)
    assert "another setting" in sentence(e)


def test_augmentation_does_each_of_its_changes():
    """On a ramp of large voltages every change can be read off: shift, amplitude, lost leads, the blanked span."""
    ramp, shifts, gains, lost, spans = 1e4 + torch.arange(1000.0), [], [], 0, []
    torch.manual_seed(0)
    for y in stage("02_train_joint").augment(ramp.expand(200, 12, 1000)):
        gone = (y == 0).all(1)
        lost += int(gone.sum())
        kept = y[~gone]
        blank = kept == 0
        assert (blank == blank[0]).all()  # the span is the same in all leads
        at = blank[0].nonzero()[:, 0]
        assert len(at) == 0 or int(at[-1] - at[0]) + 1 == len(at) < 150
        spans.append(len(at))
        drop = kept[0].diff()
        drop[blank[0, 1:] | blank[0, :-1]] = 0
        shifts.append(int((drop < -500).sum()))  # where the end of the ramp meets its start
        gains.append(kept.amax(1) / ramp.max())
        assert gains[-1].std() < 1e-2  # one amplitude for all leads
    gains = torch.stack([g.mean() for g in gains])
    assert sum(shifts) > 150 and max(shifts) == 1 and 60 < np.mean(spans) < 90
    assert 0.79 < gains.min() < 0.85 and 1.2 < gains.max() < 1.26 and 0.06 < lost / 2400 < 0.1
    noise = stage("02_train_joint").augment(torch.zeros(200, 12, 1000)).std((1, 2))
    assert 0.04 < noise.max() < 0.05 and noise.min() < 0.01


def test_weighted_sampler_draws_rare_labels_more_often():
    y = torch.zeros(100, 2)
    y[:90, 0], y[90:95, 1] = 1, 1
    weight = stage("02_train_joint").record_weights(y)
    assert torch.allclose(weight[:90], torch.tensor(1 / 90)) and torch.allclose(weight[90:95], torch.tensor(1 / 5))
    assert torch.allclose(weight[95:], torch.tensor(1 / 90))  # without a label: as the commonest


# ---------------------------------------------------------------------------------------------------------------------
# More than one process

EXACT = ["--dropout", "0", "--pool", "mean", "--augment", "no", "--epochs", "2", "--batch", "47"]  # of 48 records
RANKS = """
import importlib, pathlib, sys
sys.path.insert(0, {root!r})
import torch
import common
stage = importlib.import_module("02_train_joint")
out = pathlib.Path(sys.argv[1])

def call(run):
    sys.argv = ["02_train_joint.py", "--run", str(out / run), *{flags!r}]
    common.run(stage.main)

"""


def two_ranks(tmp_path, body, *flags):
    """Run `body`, which may `call` the stage with `flags` into a run, in two gloo processes; returns their output."""
    flags = ["--prep", str(tmp_path / "prep"), *map(str, SMALL), "--blackbox-epochs", "2", *flags]
    (tmp_path / "ranks.py").write_text(RANKS.format(root=str(ROOT), flags=flags) + body)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--",
                           str(tmp_path / "ranks.py"), str(tmp_path)], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_ranks_train_as_one_process_does(tiny_prep, tmp_path, monkeypatch):
    """Two gloo processes under torchrun against one process, in float64, where nothing but the order of sums differs.

    After two epochs of a black box and two of a prototype model: weights, prototypes, head, batch-norm statistics,
    moving average and logged losses. The last batch is a single record, so one rank has none. Float64 resolves 1e-16;
    Adam and the solver of the head magnify that to 1e-12; a record or a term with a wrong weight changes far more.
    No record has two rhythms: two classes' prototypes from one record would be equal, and the last bit would decide
    which of them a maximum of the loss takes. And there are but two prototypes of a class: of a group of two records
    both are as near to its centre, and the last bit would decide which of them becomes the prototype.
    """
    prep = tiny_prep()
    rhythms = common.columns(["SR", "AFIB"])
    labels = np.array(prep.labels)
    labels[:, rhythms[1]] &= 1 - labels[:, rhythms[0]]
    change_prep(tmp_path / "prep", labels=labels)
    flags = ["--model", "rhythm", "--start", "blackbox-rhythm", "--per-class", "2", "2", "2", *EXACT]
    printed = two_ranks(tmp_path, """
stage.bfloat16_is_fast = lambda device: False
torch.Tensor.float = torch.Tensor.double
torch.set_default_dtype(torch.float64)
call("two")
""", *flags)
    assert printed.count("epoch   1/2") == 2 and printed.count("(fold-9 macro-AUROC)") == 1  # rank 0 alone

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(stage("02_train_joint"), "bfloat16_is_fast", lambda device: False)
    torch.set_default_dtype(torch.float64)
    try:
        train(monkeypatch, tmp_path, "one", "--blackbox-epochs", 2, *flags)
    finally:
        torch.set_default_dtype(torch.float32)
    for model in ("blackbox-rhythm", "rhythm"):
        one, two = (torch.load(tmp_path / r / model / "last.pt", weights_only=True) for r in ("one", "two"))
        for kind in ("model", "average", "best_state"):
            for k, v in one[kind].items():
                assert torch.allclose(v, two[kind][k], rtol=1e-9, atol=1e-9), (model, kind, k)
        for a, b in zip(one["log"], two["log"], strict=True):
            assert a == pytest.approx(b, rel=1e-9)
    assert json.loads((tmp_path / "two" / "rhythm" / "joint.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_two_ranks_draw_for_themselves_and_resume_to_the_same_bits(tiny_prep, tmp_path):
    """With augmentation and dropout: the ranks draw differently; killed after an epoch and resumed, nothing changes."""
    tiny_prep()
    printed = two_ranks(tmp_path, """
init, train, augment, drawn = stage.dist.init_process_group, stage.train, stage.augment, []
stage.dist.destroy_process_group = lambda: None  # one group for all calls of this process
stage.dist.init_process_group = lambda *a, **k: stage.dist.is_initialized() or init(*a, **k)
stage.augment = lambda x: (drawn.append(float(torch.rand(()))), augment(x))[1]
call("whole")
(out / f"drawn{stage.RANK}").write_text(str(drawn))

def killed(epoch, auroc):
    if epoch == 1:
        raise KeyboardInterrupt

stage.train = lambda *a: train(*a, report=killed)
try:
    call("cut")
except SystemExit:
    stage.train = train
    call("cut")
""", "--model", "blackbox-rhythm", "--resume")
    assert printed.count("resumed after epoch 1") == 1
    whole, cut = (torch.load(tmp_path / r / "blackbox-rhythm" / "last.pt", weights_only=True) for r in ("whole", "cut"))
    assert same(whole["model"], cut["model"]) and same(whole["average"], cut["average"]) and whole["log"] == cut["log"]
    drawn = [json.loads((tmp_path / f"drawn{rank}").read_text()) for rank in (0, 1)]
    assert len(drawn[0]) == len(drawn[1]) == 6 and len({*drawn[0], *drawn[1]}) == 12


# ---------------------------------------------------------------------------------------------------------------------
# Tuning

TUNE = ["--model", "rhythm", "--start", "blackbox-rhythm", "--epochs", 1, "--blackbox-epochs", 1]


def trials(study):
    """What a study says of its finished trials, in order of their numbers."""
    import optuna
    storage = study if "://" in study else optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(study))
    return [t for t in optuna.load_study(study_name="rhythm", storage=storage).trials if t.state.is_finished()]


def test_tuning_is_blind_to_fold_10_resumes_and_its_result_can_be_trained(tiny_prep, tmp_path, monkeypatch):
    """Three trials, stopped after two of them, on clean data and uninterrupted with fold 10 replaced by garbage: the
    same trials. The best one, trained from tuned.json, has the fold-9 macro-AUROC in 04 that the study says."""
    clean = tiny_prep(n=80)
    signals, labels = clean.signals.copy(), clean.labels.copy()
    signals[clean.test], labels[clean.test] = np.nan, 1 - labels[clean.test]
    tiny_prep("poisoned", n=80)
    change_prep(tmp_path / "poisoned", signals=np.asarray(signals), labels=labels)
    for prep, stops in (("prep", (2, 3)), ("poisoned", (3,))):
        run = train(monkeypatch, tmp_path, f"run-{prep}", *TUNE, prep=prep)
        before = (run / "rhythm" / "joint.pt").read_bytes()
        for stop in stops:
            train(monkeypatch, tmp_path, run.name, *TUNE, "--tune", stop, "--study", tmp_path / f"{prep}.log",
                  "--search", "training", "lambdas", "batch", "per_class", prep=prep)
            assert len(trials(str(tmp_path / f"{prep}.log"))) == stop
        assert (run / "rhythm" / "joint.pt").read_bytes() == before
    a, b = ([(t.params, t.value, t.intermediate_values) for t in trials(str(tmp_path / f"{p}.log"))]
            for p in ("prep", "poisoned"))
    assert a == b and len({t[0]["lr"] for t in a}) == 3
    assert set(a[0][0]) == {"lr", "weight_decay", "dropout", "scheduler", "batch", "per_class", "lambda_clst",
                            "lambda_sep", "lambda_div", "lambda_cntrst"}

    run = tmp_path / "run-prep"
    tuned = json.loads((run / "rhythm" / "tuned.json").read_text())
    best = max(a, key=lambda t: t[1])
    assert tuned["val_auroc"] == best[1] and tuned["trials"] == 3 and tuned["config"]["per_class"][1:] == [18, 7]
    assert tuned["config"]["lr"] == best[0]["lr"] and tuned["config"]["per_class"][0] == best[0]["per_class"]
    train(monkeypatch, tmp_path, run.name, *TUNE, "--config", run / "rhythm" / "tuned.json", "--batch",
          tuned["config"]["batch"], "--force")  # SMALL names a batch size
    assert json.loads((run / "rhythm" / "joint.json").read_text())["config"] == tuned["config"]
    for later in ("03_project", "04_fusion"):
        run_stage(monkeypatch, later, "--prep", tmp_path / "prep", "--run", run, "--model", "rhythm", "--device", "cpu",
                  "--threads", 1)
    assert json.loads((run / "predictions.json").read_text())["models"]["rhythm"]["val_auroc"] == pytest.approx(
        tuned["val_auroc"], abs=1e-12)


def test_a_trial_is_judged_as_03_and_04_judge(tiny_prep, tmp_path, monkeypatch):
    """The same scores of the projected prototypes, own patients' left out, go into the same solver."""
    prep, fusion, given = tiny_prep(n=80), stage("04_fusion"), []
    run = train(monkeypatch, tmp_path, "run", "--model", "rhythm", "--start", "random", "--prototypes", "random",
                "--epochs", 0)
    real = fusion.fit_path
    monkeypatch.setattr(fusion, "fit_path", lambda *a: (given.append(a), real(*a))[1])
    args = common.SimpleNamespace(device=torch.device("cpu"))
    auroc = stage("02_train_joint").after_stage_3(run / "rhythm" / "joint.pt", args, prep)
    for later in ("03_project", "04_fusion"):
        run_stage(monkeypatch, later, "--prep", tmp_path / "prep", "--run", run, "--device", "cpu", "--threads", 1)
    for ours, theirs in zip(given[0][:5], given[1][:5], strict=True):  # X, Y, off, X_val, y_val
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert json.loads((run / "predictions.json").read_text())["models"]["rhythm"]["val_auroc"] == pytest.approx(auroc)


@pytest.mark.slow
def test_two_workers_share_a_study(tiny_prep, tmp_path, monkeypatch):
    """Two processes that begin at the same moment with a SQLite file that is not there yet."""
    tiny_prep()
    run = train(monkeypatch, tmp_path, "run", "--model", "blackbox-rhythm", *TUNE[2:])
    study = f"sqlite:///{tmp_path}/tune.db"
    flags = ["--prep", tmp_path / "prep", "--run", run, *SMALL, *TUNE, "--tune", 4, "--study", study]
    workers = [subprocess.Popen([sys.executable, "02_train_joint.py", *map(str, flags)], cwd=ROOT, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    texts = [w.communicate() for w in workers]
    assert [w.returncode for w in workers] == [0, 0], texts
    found = trials(study)
    assert sum(out.count("epoch   1/1") for out, _ in texts) == len(found)  # none was done twice
    assert 4 <= len(found) <= 5 and len({t.params["lr"] for t in found}) == len(found)
    assert json.loads((run / "rhythm" / "tuned.json").read_text())["val_auroc"] == max(t.value for t in found)


def test_hopeless_trials_end_early(tiny_prep, tmp_path, monkeypatch):
    """A trial that the pruner gives up, or whose loss is no number, is counted, but it is no result."""
    import optuna
    tiny_prep()
    train(monkeypatch, tmp_path, "run", "--model", "blackbox-rhythm", *TUNE[2:])
    monkeypatch.setattr(optuna.pruners, "MedianPruner", lambda: optuna.pruners.ThresholdPruner(lower=2))
    flags = [*TUNE, "--epochs", 3, "--tune", 1]
    with pytest.raises(SystemExit) as e:
        train(monkeypatch, tmp_path, "run", *flags, "--study", tmp_path / "pruned.log")
    assert "no trial" in sentence(e) and not (tmp_path / "run" / "rhythm" / "tuned.json").exists()
    assert [list(t.intermediate_values) for t in trials(str(tmp_path / "pruned.log"))] == [[1]]
    monkeypatch.setattr(stage("02_train_joint"), "augment", lambda x: x * torch.nan)
    with pytest.raises(SystemExit) as e:
        train(monkeypatch, tmp_path, "run", *flags, "--study", tmp_path / "diverged.log")
    assert "no trial" in sentence(e)
    assert [list(t.intermediate_values) for t in trials(str(tmp_path / "diverged.log"))] == [[]]


def test_tuning_errors_are_one_sentence(tiny_prep, tmp_path, monkeypatch, capsys):
    tiny_prep()
    (tmp_path / "none.json").write_text('{"per_class": [0, 18, 7]}')
    for wrong, says in ((["--tune", 3], "--study"), (["--study", "x"], "--tune"), (["--tune", 0, "--study", "x"], "1"),
                        (["--tune", 3, "--study", "x"], "--model"),
                        (["--config", tmp_path / "none.json"], "--per-class"),
                        (["--model", "blackbox-1d", "--tune", 3, "--study", "x"], "prototype model")):
        with pytest.raises(SystemExit) as e:
            train(monkeypatch, tmp_path, "run", *wrong)
        assert e.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1]
    flags = ["--model", "rhythm", "--tune", 1, "--study", tmp_path / "tune.log", "--start", "random"]
    with pytest.raises(SystemExit) as e:  # the black box must be there, lest every worker trains it
        train(monkeypatch, tmp_path, "run", *flags[:-2])
    assert "python 02_train_joint.py --model blackbox-rhythm" in sentence(e)
    train(monkeypatch, tmp_path, "run", *flags)
    with pytest.raises(SystemExit) as e:
        train(monkeypatch, tmp_path, "run", *flags, "--top-k", 3)
    assert "other settings" in sentence(e)
    with pytest.raises(SystemExit) as e:
        train(monkeypatch, tmp_path, "run", *flags[:-4], "--study", "sqlite:////no/such/folder/tune.db", *flags[-2:])
    assert "--study sqlite:////no/such/folder/tune.db" in sentence(e)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SystemExit) as e:
        train(monkeypatch, tmp_path, "run", *flags)
    assert "pip install optuna" in sentence(e)


@pytest.mark.parametrize("text, says", [
    ('{"lrr": 0.1}', "lrr is no setting"), ('{"config": {"rate": 1}}', "rate is no setting"),
    ('{"config": 3}', "config is no setting"),
    ('{"lr": "fast"}', "lr cannot be"), ('{"lr": NaN}', "lr cannot be"), ('{"batch": 16.5}', "batch cannot be"),
    ('{"augment": 1}', "augment cannot be"), ('{"epochs": true}', "epochs cannot be"),
    ('{"scheduler": "wild"}', "scheduler cannot be"), ('{"per_class": [5, 18]}', "per_class cannot be"),
    ('{"per_class": 5}', "per_class cannot be"), ('{"a": [1, "x", 2]}', "a cannot be"),
    ('{"lr": [0.1]}', "lr cannot be"), ('{"recipe": "paper"}', "--recipe paper"), ('{"lr": ', "damaged"),
    (None, "missing")])
def test_spoiled_config_gives_one_sentence(tmp_path, text, says):
    path = tmp_path / "config.json"
    if text:
        path.write_text(text)
    with pytest.raises(SystemExit) as e:
        stage("02_train_joint").read_config(path, common.Config())
    assert says in sentence(e) and str(path) in sentence(e)


def test_config_counts_for_more_than_the_lambdas_of_no_contrastive(tiny_prep, tmp_path, monkeypatch):
    tiny_prep()
    (tmp_path / "tuned.json").write_text(json.dumps({"config": {"recipe": "paper", "lambda_div": 7.0,
                                                                "lambda_cntrst": 3.0}}))
    run = train(monkeypatch, tmp_path, "run", "--model", "rhythm", "--recipe", "paper", "--no-contrastive", "--config",
                tmp_path / "tuned.json", "--epochs", 0)
    cfg = common.config_of(json.loads((run / "rhythm" / "joint.json").read_text()))
    assert cfg.lambdas == (0.8, 0.08, 7.0, 0.0)


def test_no_contrastive_counts_for_more_than_a_flag(tiny_prep, tmp_path, monkeypatch):
    tiny_prep()
    run = train(monkeypatch, tmp_path, "run", "--model", "rhythm", "--start", "random", "--prototypes", "random",
                "--no-contrastive", "--lambda-cntrst", 3, "--lambda-div", 5, "--epochs", 0)
    config = json.loads((run / "rhythm" / "joint.json").read_text())["config"]
    assert (config["lambda_cntrst"], config["lambda_div"]) == (0, 5)


def test_an_epoch_as_good_as_the_start_is_not_the_best(tiny_prep, tmp_path, monkeypatch):
    """The weights that are kept are the start's then."""
    tiny_prep()
    monkeypatch.setattr(stage("02_train_joint"), "validate", lambda *_: 0.5)
    run = train(monkeypatch, tmp_path, "run", "--model", "rhythm", "--start", "random", "--epochs", 2)
    meta = json.loads((run / "rhythm" / "joint.json").read_text())
    assert (meta["best_epoch"], meta["epochs"], meta["val_auroc"]) == (0, 2, 0.5)


def test_config_is_overridden_by_flags(tiny_prep, tmp_path, monkeypatch):
    tiny_prep()
    (tmp_path / "config.json").write_text(json.dumps({"config": {
        "lr": 0.002, "a": [1, 13, 4], "per_class": [3, 4, 5], "seed": 1, "optimizer": "adam", "epochs": 9,
        "augment": False}}))
    run = train(monkeypatch, tmp_path, "run", "--model", "rhythm", "--start", "random", "--config",
                tmp_path / "config.json", "--optimizer", "adamw", "--epochs", 0)
    cfg = common.config_of(json.loads((run / "rhythm" / "joint.json").read_text()))
    assert (cfg.lr, cfg.a, cfg.per_class, cfg.augment) == (0.002, (1, 13, 4), (3, 4, 5), False)
    assert (cfg.optimizer, cfg.epochs, cfg.seed) == ("adamw", 0, 42)


def test_prototypes_from_data_need_a_black_box_to_start_from(tmp_path, tiny_prep, monkeypatch, capsys):
    tiny_prep()
    with pytest.raises(SystemExit) as e:
        train(monkeypatch, tmp_path, "run", "--model", "rhythm", "--start", "random", "--prototypes", "data")
    assert e.value.code == 2 and "--prototypes data needs" in capsys.readouterr().err


def test_config_does_not_widen_a_small_network(tiny_prep, tmp_path, monkeypatch):
    tiny_prep()
    (tmp_path / "config.json").write_text(json.dumps({"lr": 0.002, "width": 64}))
    run_stage(monkeypatch, "02_train_joint", "--prep", tmp_path / "prep", "--run", tmp_path / "run", "--small",
              "--start", "random", "--config", tmp_path / "config.json", "--epochs", 0, "--device", "cpu")
    config = json.loads((tmp_path / "run" / "rhythm" / "joint.json").read_text())["config"]
    assert (config["width"], config["lr"]) == (32, 0.002)


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")  # in one dimension there are two directions
@pytest.mark.parametrize("model, codes, flags", [("rhythm", ("SR", "NORM"), []),
                                                 ("morphology", ("NORM", "IMI"), ["--start", "blackbox-global"])])
def test_a_black_box_of_one_label(tiny_prep, tmp_path, monkeypatch, model, codes, flags):
    tiny_prep(codes=codes)
    run = train(monkeypatch, tmp_path, "run", "--model", model, *flags, "--epochs", 1, "--blackbox-epochs", 1)
    assert common.load_model(run / model / "joint.pt", "")[1]["latent_dim"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# What every setting of the training loop does

def log_of(run, model):
    return [json.loads(line) for line in (run / model / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name, expected", [  # 48 records in batches of 16: three steps an epoch
    ("constant", lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0)),
    ("cosine", lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12 * 3)),
    ("step", lambda o: torch.optim.lr_scheduler.StepLR(o, 10 * 3, 0.5)),
    ("cyclic", lambda o: torch.optim.lr_scheduler.CyclicLR(o, 1e-3, 1e-2, 2 * 3, cycle_momentum=False)),
    ("onecycle", lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, 12 * 3)),
    ("plateau", None)])
def test_learning_rate_follows_the_scheduler(tiny_prep, tmp_path, monkeypatch, name, expected):
    tiny_prep()
    values = iter(np.linspace(0.9, 0.8, 12))  # fold 9 falls: a plateau
    monkeypatch.setattr(stage("02_train_joint"), "validate", lambda *_: next(values))
    run = train(monkeypatch, tmp_path, "run", "--model", "blackbox-rhythm", "--blackbox-epochs", 12, "--patience", 99,
                "--blackbox-lr", 1e-2, "--scheduler", name, "--head", "free")
    got = [line["lr"] for line in log_of(run, "blackbox-rhythm")]
    want = [1e-2] * 4 + [5e-3] * 4 + [2.5e-3] * 4  # halved after four epochs without gain
    if expected:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-2)
        scheduler, want = expected(optimizer), []
        for _ in range(12):
            for _ in range(3):
                optimizer.step()
                scheduler.step()
            want.append(optimizer.param_groups[0]["lr"])
    assert got == pytest.approx(want)


def test_training_stops_when_fold_9_has_not_improved_for_patience_epochs(tiny_prep, tmp_path, monkeypatch):
    tiny_prep()
    values = iter([0.5, 0.6, 0.7, 0.6, 0.7, 0.8])
    monkeypatch.setattr(stage("02_train_joint"), "validate", lambda *_: next(values))
    run = train(monkeypatch, tmp_path, "run", "--model", "rhythm", "--start", "random", "--epochs", 9, "--patience", 2)
    meta = json.loads((run / "rhythm" / "joint.json").read_text())
    assert (meta["epochs"], meta["best_epoch"], meta["val_auroc"]) == (4, 2, 0.7)


def test_a_black_box_is_the_moving_average_of_its_weights(tiny_prep, tmp_path, monkeypatch):
    """Against the recursion written out, from the weights after every step; joint.pt holds the average."""
    tiny_prep()
    seen, step = [], torch.optim.AdamW.step

    def watched(optimizer, *a, **k):
        weights = optimizer.param_groups[0]["params"][0].detach()
        seen.extend([weights.double().clone()] * (not seen))
        out = step(optimizer, *a, **k)
        seen.append(weights.double().clone())
        return out

    values = itertools.count()  # every epoch is better
    monkeypatch.setattr(stage("02_train_joint"), "validate", lambda *_: next(values))
    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    for ema in (0.3, 0.0):
        seen.clear()
        run = train(monkeypatch, tmp_path, f"run{ema}", "--model", "blackbox-rhythm", "--blackbox-epochs", 2,
                    "--blackbox-ema", ema, "--head", "free", "--blackbox-lr", 0.1, "--scheduler", "constant")
        last = torch.load(run / "blackbox-rhythm" / "last.pt", weights_only=True)
        name, _ = next(common.load_model(run / "blackbox-rhythm" / "joint.pt", "")[0].named_parameters())
        torch.testing.assert_close(last["model"][name].double(), seen[-1])
        if not ema:
            torch.testing.assert_close(last["average"][name], last["model"][name])
            continue
        average, decays = seen[0], []
        for t, w in enumerate(seen[1:], start=3):  # three steps an epoch, the first of which counts as the second
            decays.append(min(ema, t / (10 + t)))
            average = decays[-1] * average + (1 - decays[-1]) * w
        assert decays[0] < ema == decays[-1] and not torch.allclose(average, seen[-1], atol=1e-6)
        torch.testing.assert_close(last["average"][name].double(), average, atol=1e-5, rtol=1e-5)
        assert torch.equal(weights(run / "blackbox-rhythm" / "joint.pt")[name], last["average"][name])


@pytest.mark.parametrize("model", ["rhythm", "blackbox-rhythm"])
def test_epochs_are_judged_on_fold_9(tiny_prep, tmp_path, monkeypatch, model):
    """By the weights that joint.pt holds, over all of fold 9 and nothing else."""
    prep = tiny_prep(n=120)
    run = train(monkeypatch, tmp_path, "run", "--model", model, "--start", "random", "--head", "free",
                "--project-every", 0, "--own-patient", "yes", "--lr", 0.01)
    net, meta = common.load_model(run / model / "joint.pt", "")
    own, auroc = common.columns(net.classes), {}
    for fold, rows in (("val", prep.val), ("train", prep.train)):
        logits = common.batched(lambda x: net(x)[0], prep, np.flatnonzero(rows), "cpu").numpy()
        auroc[fold] = common.macro_auroc(prep.labels[rows][:, own], logits)
    assert meta["val_auroc"] == pytest.approx(auroc["val"], abs=1e-6) != pytest.approx(auroc["train"], abs=1e-6)


@pytest.mark.parametrize("scale", ["yes", "no"])
def test_whether_leads_are_scaled_is_a_setting(tiny_prep, tmp_path, monkeypatch, scale):
    prep = tiny_prep()
    run = train(monkeypatch, tmp_path, "run", "--model", "rhythm", "--blackbox-epochs", 1, "--epochs", 0,
                "--scale-input", scale)
    for model in ("rhythm", "blackbox-rhythm"):
        scaler = common.load_model(run / model / "joint.pt", "")[0].scaler
        wanted = prep.info["scaler"] if scale == "yes" else {"mean": [0.0] * 12, "std": [1.0] * 12}
        assert scaler.mean.flatten().tolist() == pytest.approx(wanted["mean"])
        assert scaler.std.flatten().tolist() == pytest.approx(wanted["std"])


@pytest.mark.parametrize("head, moves", [("frozen", False), ("free", True)])
def test_a_frozen_head_stays_as_the_authors_set_it(tiny_prep, tmp_path, monkeypatch, head, moves):
    tiny_prep()
    values = itertools.count()
    monkeypatch.setattr(stage("02_train_joint"), "validate", lambda *_: next(values))
    run = train(monkeypatch, tmp_path, "run", "--model", "rhythm", "--start", "random", "--head", head, "--lr", 0.01)
    net = common.load_model(run / "rhythm" / "joint.pt", "")[0]
    start = torch.where(net.p_class == torch.arange(len(net.classes))[:, None], 1.0, -0.5)
    assert torch.equal(net.head.weight, start) != moves


def test_a_start_from_imagenet_has_its_weights(tiny_prep, tmp_path, monkeypatch):
    tiny_prep()
    state = common.ResNet18(64).state_dict()
    saved = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in state.items()}
    saved = {k: v.abs() + 0.5 if k.endswith("running_var") else v for k, v in saved.items()}
    square = {k: v[:, :, None].expand(-1, -1, 3, -1) if v.ndim == 3 else v for k, v in saved.items()}
    torch.save(square, tmp_path / "resnet18.pth")
    run = train(monkeypatch, tmp_path, "run", "--model", "global", "--start", "imagenet", "--prototypes", "random",
                "--width", 64, "--epochs", 0, "--imagenet", tmp_path / "resnet18.pth")
    got = weights(run / "global" / "joint.pt")
    for k, v in saved.items():
        if not k.endswith("num_batches_tracked"):
            assert torch.equal(got[f"backbone.{k}"], v) == (k != "conv1.weight"), k  # the 12-lead stem stays random


def test_class_weights_reach_the_loss_of_a_black_box(tiny_prep, tmp_path, monkeypatch):
    prep = tiny_prep()
    each, bce = [], torch.nn.functional.binary_cross_entropy_with_logits
    monkeypatch.setattr(torch.nn.functional, "binary_cross_entropy_with_logits",
                        lambda *a, **k: each.append(bce(*a, **k)) or each[-1])
    run = train(monkeypatch, tmp_path, "run", "--model", "blackbox-rhythm", "--blackbox-epochs", 1, "--head", "free",
                "--class-weights", "yes")
    classes = common.load_model(run / "blackbox-rhythm" / "joint.pt", "")[0].classes
    y = prep.labels[prep.train][:, common.columns(classes)]
    w = torch.from_numpy((len(y) - y.sum(0)) / y.sum(0))
    assert log_of(run, "blackbox-rhythm")[0]["bce"] == pytest.approx(np.mean([(w * e.detach()).mean() for e in each]))


def test_prototypes_are_projected_after_each_epoch_and_kept_as_they_were_before(tiny_prep, tmp_path, monkeypatch):
    prep = tiny_prep()
    values = itertools.count()  # every epoch is better
    monkeypatch.setattr(stage("02_train_joint"), "validate", lambda *_: next(values))
    for project, same_p in ((1, False), (0, True)):
        run = train(monkeypatch, tmp_path, f"run{project}", "--model", "rhythm", "--lr", 0.05,
                    "--project-every", project)
        last = torch.load(run / "rhythm" / "last.pt", weights_only=True)
        assert torch.equal(last["model"]["p"], last["best_state"]["p"]) == same_p
        net, _ = common.load_model(run / "rhythm" / "joint.pt", "")
        net.load_state_dict(last["model"])
        z, carries, _ = common.training_set(net, prep, torch.device("cpu"))
        away = [float((z[carries[:, c]] - p).abs().amax((1, 2)).min())
                for p, c in zip(net.p.detach(), net.p_class.tolist())]
        assert (max(away) < 1e-4) == bool(project)
        kept, _ = common.load_model(run / "rhythm" / "joint.pt", "")  # its head is solved for the p that it has
        head = kept.head.weight.detach().clone()
        z, carries, ids = common.training_set(kept, prep, torch.device("cpu"))
        stage("02_train_joint").refit_head(kept, z, carries, common.patients_of(ids, prep))
        torch.testing.assert_close(kept.head.weight, head, rtol=1e-3, atol=1e-3 * float(head.abs().max()))


def test_lambdas_jaccard_class_weights_and_sampler_reach_the_loss(tiny_prep, tmp_path, monkeypatch):
    prep = tiny_prep()
    given, loss, module = [], common.composite_loss, stage("02_train_joint")
    monkeypatch.setattr(common, "composite_loss", lambda *a: given.append((a[2], *a[5:])) or loss(*a))
    one = int(prep.labels[prep.train][:, common.CODES.index("AFIB")].argmax())  # the only record that is drawn
    monkeypatch.setattr(module, "record_weights", lambda y: torch.eye(len(y))[one])
    train(monkeypatch, tmp_path, "run", "--model", "rhythm", "--start", "random", "--epochs", 1,
          "--class-weights", "yes", "--sampler", "weighted", "--lambda-div", 0.25, "--no-contrastive")
    classes = json.loads((tmp_path / "run" / "rhythm" / "joint.json").read_text())["classes"]
    labels = prep.labels[prep.train][:, common.columns(classes)].astype(float)
    assert len(given) == 3
    jaccard = np.array(prep.info["jaccard"])[np.ix_(*[common.columns(classes)] * 2)]
    for y, J, lambdas, w in given:
        assert np.allclose(J, jaccard) and lambdas == (*common.Config().lambdas[:2], 0.25, 0.0)
        assert (y == torch.from_numpy(labels[one])).all()
        torch.testing.assert_close(w.double(), torch.from_numpy((len(labels) - labels.sum(0)) / labels.sum(0)))


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_optimizer_and_weight_decay(tiny_prep, tmp_path, monkeypatch, name):
    tiny_prep()
    made, kind = [], {"adam": "Adam", "adamw": "AdamW"}[name]
    real = getattr(torch.optim, kind)
    monkeypatch.setattr(torch.optim, kind, lambda *a, **k: made.append(k) or real(*a, **k))
    train(monkeypatch, tmp_path, "run", "--model", "rhythm", "--start", "random", "--epochs", 1, "--optimizer", name,
          "--weight-decay", 0.125, "--lr", 0.25)
    assert [(k["lr"], k["weight_decay"]) for k in made] == [(0.25, 0.125)]
