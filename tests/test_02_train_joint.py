"""02_train_joint.py: training learns, goes on to the same bits, never sees fold 10, and fails with one sentence."""
import copy
import itertools
import json

import numpy as np
import pytest
import scipy
import torch
from conftest import CPU, arguments, change_prep, run_stage, sentence, stage, write_joint
from sklearn.linear_model import LogisticRegression

import common

SMALL = dict(width=16, batch=16, epochs=2, blackbox_epochs=3)
module = stage("02_train_joint")


def train(monkeypatch, tmp_path, run, *flags, prep="prep", model="rhythm", **changes):
    """02 with tiny settings in tmp_path/RUN; `changes` are given by --set."""
    text = {k: ["no", "yes"][v] if isinstance(v, bool) else v for k, v in {**SMALL, **changes}.items()}
    text = {k: ",".join(map(str, v)) if isinstance(v, tuple) else v for k, v in text.items()}
    run_stage(monkeypatch, "02_train_joint", "--prep", tmp_path / prep, "--run", tmp_path / run, "--model", model,
              "--device", "cpu", "--threads", 1, "--set", *[f"{k}={v}" for k, v in text.items()], *flags)
    return tmp_path / run


def saved(run, model="rhythm", name="joint"):
    return torch.load(run / model / f"{name}.pt", weights_only=True)


def loaded(run, model="rhythm"):
    return common.load_model(run / model / "joint.pt", "", arguments(run))[0]


def log_of(run, model="rhythm"):
    return [json.loads(line) for line in (run / model / "log.jsonl").read_text().splitlines()]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def judge(monkeypatch, values):
    """Let fold 9 give these values, one an epoch."""
    values = iter(values)
    monkeypatch.setattr(module, "validate", lambda *_: next(values))


# ---- Data

def test_augmentation_does_each_of_its_changes():
    """On a ramp of large voltages every change can be read off: shift, amplitude, lost leads, the blanked span."""
    ramp, shifts, gains, lost, spans = 1e4 + torch.arange(1000.0), [], [], 0, []
    torch.manual_seed(0)
    for y in module.augment(ramp.expand(200, 12, 1000)):
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
    noise = module.augment(torch.zeros(200, 12, 1000)).std((1, 2))
    assert 0.04 < noise.max() < 0.05 and noise.min() < 0.01


def test_weighted_sampler_draws_rare_labels_more_often():
    y = torch.zeros(100, 2)
    y[:90, 0], y[90:95, 1] = 1, 1
    weight = module.record_weights(y)
    assert torch.allclose(weight[:90], torch.tensor(1 / 90)) and torch.allclose(weight[90:95], torch.tensor(1 / 5))
    assert torch.allclose(weight[95:], torch.tensor(1 / 90))  # without a label: as the commonest


def test_training_is_blind_to_fold_10(tiny_prep, tmp_path, monkeypatch):
    """Fold 10 replaced by garbage, signals and labels: every weight and the log stay the same."""
    clean = tiny_prep()
    signals, labels = clean.signals.copy(), clean.labels.copy()
    signals[clean.test], labels[clean.test] = 1e3, 1 - labels[clean.test]
    tiny_prep("poisoned")
    change_prep(tmp_path / "poisoned", signals=np.asarray(signals), labels=np.asarray(labels))
    runs = [train(monkeypatch, tmp_path, f"run-{p}", prep=p) for p in ("prep", "poisoned")]
    assert same(*(saved(r)["state"] for r in runs)) and log_of(runs[0]) == log_of(runs[1])


# ---- The step, and what reaches Eq. (2)

def test_training_separates_what_can_be_separated(tiny_prep, tmp_path, monkeypatch):
    tiny_prep(n=200)
    run = train(monkeypatch, tmp_path, "run", model="blackbox-1d", blackbox_epochs=12, augment=False)
    log = log_of(run, "blackbox-1d")
    assert log[-1]["bce"] < 0.7 * log[0]["bce"] and saved(run, "blackbox-1d")["meta"]["val_auroc"] > 0.75


def test_lambdas_jaccard_class_weights_and_sampler_reach_the_loss(tiny_prep, tmp_path, monkeypatch):
    prep = tiny_prep()
    given, loss = [], common.composite_loss
    monkeypatch.setattr(common, "composite_loss", lambda *a: given.append((a[2], *a[5:])) or loss(*a))
    one = int(prep.labels[prep.train][:, common.CODES.index("AFIB")].argmax())  # the only record that is drawn
    monkeypatch.setattr(module, "record_weights", lambda y: torch.eye(len(y))[one])
    run = train(monkeypatch, tmp_path, "run", "--no-contrastive", start="random", epochs=1, class_weights=True,
                sampler="weighted", lambda_div=0.25)
    own = common.columns(saved(run)["meta"]["classes"])
    labels = prep.labels[prep.train][:, own].astype(float)
    assert len(given) == 3
    for y, J, lambdas, w in given:
        assert np.allclose(J, np.array(prep.info["jaccard"])[np.ix_(own, own)])
        assert lambdas == (*common.Config().lambdas[:2], 0.25, 0.0)
        assert (y == torch.from_numpy(labels[one])).all()
        torch.testing.assert_close(w.double(), torch.from_numpy((len(labels) - labels.sum(0)) / labels.sum(0)))


@pytest.mark.parametrize("own_patient", [False, True])
def test_what_a_prototype_says_of_its_own_patient_is_the_mean(tiny_prep, tmp_path, monkeypatch, own_patient):
    """In one batch of all training records, by what the network gives and what the loss is given."""
    prep = tiny_prep(n=60)
    prep = change_prep(tmp_path / "prep", patient_ids=prep.patient_ids // 3)  # up to three records of each patient
    given, forward, loss = [], common.ProtoECGNet.forward, common.composite_loss

    def watched(net, x):
        logits, s = forward(net, x)
        if net.training:
            given.append((x, net.p_patient.clone(), s.detach()))
        return logits, s

    monkeypatch.setattr(common.ProtoECGNet, "forward", watched)
    monkeypatch.setattr(common, "composite_loss", lambda *a: given.append(a[1].detach()) or loss(*a))
    train(monkeypatch, tmp_path, "run", epochs=1, batch=64, augment=False, own_patient=own_patient)
    (x, p_patient, s), counted = given
    rows = [int(np.flatnonzero((prep.signals == each.numpy()).all((1, 2)))[0]) for each in x]
    same_patient = torch.from_numpy(prep.patient_ids[rows])[:, None] == p_patient
    assert same_patient.any() != own_patient
    torch.testing.assert_close(counted, torch.where(same_patient, s.mean(0), s))


@pytest.mark.parametrize("head, moves", [("frozen", False), ("free", True)])
def test_a_frozen_head_stays_as_the_authors_set_it(tiny_prep, tmp_path, monkeypatch, head, moves):
    tiny_prep()
    judge(monkeypatch, itertools.count())
    net = loaded(train(monkeypatch, tmp_path, "run", start="random", head=head, lr=0.01))
    start = torch.where(net.p_class == torch.arange(len(net.classes))[:, None], 1.0, -0.5)
    assert torch.equal(net.head.weight, start) != moves


def test_a_black_box_is_the_moving_average_of_its_weights(tiny_prep, tmp_path, monkeypatch):
    """Against the recursion written out, from the weights after every step."""
    tiny_prep()
    seen, step = [], torch.optim.AdamW.step

    def watched(optimizer, *a, **k):
        weights = optimizer.param_groups[0]["params"][0].detach()
        seen.extend([weights.double().clone()] * (not seen))
        out = step(optimizer, *a, **k)
        seen.append(weights.double().clone())
        return out

    judge(monkeypatch, itertools.count())  # every epoch is better
    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    run = train(monkeypatch, tmp_path, "run", model="blackbox-rhythm", blackbox_epochs=2, blackbox_ema=0.3,
                head="free", blackbox_lr=0.1)
    name, average = next(iter(loaded(run, "blackbox-rhythm").named_parameters()))
    want = seen[0]
    for t, w in enumerate(seen[1:], start=3):  # three steps an epoch, the first of which counts as the second
        decay = min(0.3, t / (10 + t))
        want = decay * want + (1 - decay) * w
    torch.testing.assert_close(average.double(), want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(want, seen[-1], atol=1e-6)


@pytest.mark.parametrize("name, expected", [  # 48 records in batches of 16: three steps an epoch
    ("cosine", lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12 * 3)),
    ("onecycle", lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, 12 * 3)), ("plateau", None)])
def test_learning_rate_follows_the_scheduler(tiny_prep, tmp_path, monkeypatch, name, expected):
    tiny_prep()
    judge(monkeypatch, np.linspace(0.9, 0.8, 12))  # fold 9 falls: a plateau
    run = train(monkeypatch, tmp_path, "run", model="blackbox-rhythm", blackbox_epochs=12, patience=99,
                blackbox_lr=1e-2, scheduler=name, head="free")
    want = [1e-2] * 4 + [5e-3] * 4 + [2.5e-3] * 4  # halved after four epochs without gain
    if expected:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-2)
        scheduler, want = expected(optimizer), []
        for _ in range(12):
            for _ in range(3):
                optimizer.step()
                scheduler.step()
            want.append(optimizer.param_groups[0]["lr"])
    assert [line["lr"] for line in log_of(run, "blackbox-rhythm")] == pytest.approx(want)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_optimizer_and_weight_decay(tiny_prep, tmp_path, monkeypatch, name):
    tiny_prep()
    made, kind = [], {"adam": "Adam", "adamw": "AdamW"}[name]
    real = getattr(torch.optim, kind)
    monkeypatch.setattr(torch.optim, kind, lambda *a, **k: made.append(k) or real(*a, **k))
    train(monkeypatch, tmp_path, "run", start="random", epochs=1, optimizer=name, weight_decay=0.125, lr=0.25)
    assert [(k["lr"], k["weight_decay"]) for k in made] == [(0.25, 0.125)]


# ---- The head between epochs, and projection

def test_head_is_solved_without_what_a_prototype_says_of_its_own_patient(tiny_prep, tmp_path):
    """Against the same objective minimised in float64, on scores with the own patients' replaced by the mean."""
    prep = tiny_prep(n=120)
    write_joint(tmp_path, prep)
    net = loaded(tmp_path)
    z, y, rows = common.training_set(net, prep, CPU)
    patients = prep.patient_ids[rows]
    patients[20:40] = patients[:20]  # two records each
    net.p_patient[1:] = torch.from_numpy(patients[[3, 7, 11]])  # of the first prototype all matches count
    net.p.data[1:] = z[[3, 7, 11]]
    s = net.scores(z).detach().double().numpy()
    mean, std = s.mean(0), s.std(0)
    for p, of_patient in enumerate([[], [3, 23], [7, 27], [11, 31]]):
        s[of_patient, p] = mean[p]
    module.refit_head(net, z, y, patients)
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
    net = common.ProtoECGNet("1d", ["SR", "AFIB"], [3, 3], common.Config(width=16))
    y = np.zeros((4000, 2), bool)
    y[:1500, 0] = y[:10, 1] = 1
    s = rng.normal(size=(4000, 6)) * 0.05 + 0.3 * y[:, [0, 0, 0, 1, 1, 1]] * rng.random(6)
    net.scores = lambda part: part
    module.refit_head(net, torch.from_numpy(s).float(), y, np.arange(4000))
    X = (s[:, 3:] - s[:, 3:].mean(0)) / s[:, 3:].std(0)
    slow = LogisticRegression(C=1e4 / 4000, tol=1e-10, max_iter=10**4).fit(X, y[:, 1])
    got = s @ net.head.weight[1].detach().double().numpy() + net.head.bias[1].item()
    np.testing.assert_allclose(got, X @ slow.coef_[0] + slow.intercept_[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("project", [1, 0])
def test_prototypes_are_projected_after_each_epoch_and_kept_as_they_were_before(
        tiny_prep, tmp_path, monkeypatch, project):
    prep = tiny_prep()
    judge(monkeypatch, itertools.count())  # every epoch is better
    states, real = [], common.save
    monkeypatch.setattr(common, "save", lambda path, value: (
        states.append(copy.deepcopy(value["model"])) if path.name == "last.pt" else None, real(path, value)))
    run = train(monkeypatch, tmp_path, "run", lr=0.05, project_every=project)
    net, last = loaded(run), states[-1]
    assert torch.equal(last["p"], net.p) == (not project)
    net.load_state_dict(last)
    z, carries, _ = common.training_set(net, prep, CPU)
    away = [float((z[carries[:, c]] - p).abs().amax((1, 2)).min())
            for p, c in zip(net.p.detach(), net.p_class.tolist())]
    assert (max(away) < 1e-4) == bool(project)


# ---- Which epoch is kept, going on, rounds

def test_epoch_0_is_the_start_and_patience_ends_training(tiny_prep, tmp_path, monkeypatch):
    tiny_prep()
    judge(monkeypatch, [0.5, 0.6, 0.7, 0.6, 0.7, 0.8])
    run = train(monkeypatch, tmp_path, "run", start="random", epochs=9, patience=2)
    meta = saved(run)["meta"]
    assert (meta["epochs"], meta["best_epoch"], meta["val_auroc"]) == (4, 2, 0.7)
    assert [e["epoch"] for e in log_of(run)] == [0, 1, 2, 3, 4] and set(log_of(run)[0]) == {"epoch", "val_auroc"}


@pytest.mark.parametrize("model", ["rhythm", "blackbox-rhythm"])
def test_epochs_are_judged_on_fold_9(tiny_prep, tmp_path, monkeypatch, model):
    """By the weights that joint.pt holds, over all of fold 9 and nothing else."""
    prep = tiny_prep(n=120)
    run = train(monkeypatch, tmp_path, "run", model=model, start="random", head="free", project_every=0,
                own_patient=True, lr=0.01)
    net, auroc = loaded(run, model), {}
    own = common.columns(net.classes)
    for fold, rows in (("val", prep.val), ("train", prep.train)):
        logits = common.batched(lambda x: net(x)[0], prep, np.flatnonzero(rows), CPU).numpy()
        auroc[fold] = common.macro_auroc(prep.labels[rows][:, own], logits)
    assert saved(run, model)["meta"]["val_auroc"] == pytest.approx(auroc["val"], abs=1e-6)
    assert auroc["val"] != pytest.approx(auroc["train"], abs=1e-6)


def test_continued_equals_uninterrupted_bit_for_bit(tiny_prep, tmp_path, monkeypatch, capsys):
    tiny_prep()
    whole = train(monkeypatch, tmp_path, "whole")
    real = common.save

    def killed(path, value):
        real(path, value)
        if path.name == "last.pt" and path.parent.name == "rhythm" and len(value["log"]) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(common, "save", killed)
    with pytest.raises(SystemExit):
        train(monkeypatch, tmp_path, "cut")
    assert not (tmp_path / "cut/rhythm/joint.pt").exists()
    monkeypatch.setattr(common, "save", real)
    cut = train(monkeypatch, tmp_path, "cut")
    assert "goes on after epoch 1" in capsys.readouterr().out
    assert same(saved(whole)["state"], saved(cut)["state"]) and log_of(whole) == log_of(cut)
    assert not (cut / "rhythm/last.pt").exists()


def test_finished_models_are_kept_and_another_setting_stops(tiny_prep, tmp_path, monkeypatch, capsys):
    tiny_prep()
    run = train(monkeypatch, tmp_path, "run")
    before = (run / "rhythm/joint.pt").read_bytes()
    train(monkeypatch, tmp_path, "run")
    assert "finished, kept" in capsys.readouterr().out and (run / "rhythm/joint.pt").read_bytes() == before
    for change in ({"lr": 0.01}, {"seed": 7}, {"prep": True}):
        with pytest.raises(SystemExit) as e:
            if "prep" in change:
                tiny_prep("prep", seed=3)
                change = {}
            more = ["--seed", change.pop("seed")] if "seed" in change else []
            train(monkeypatch, tmp_path, "run", *more, **change)
        assert "delete" in sentence(e) and (run / "rhythm/joint.pt").read_bytes() == before


def test_rounds_are_in_place(tiny_prep, tmp_path, monkeypatch, capsys):
    tiny_prep()
    flags = ["--prep", tmp_path / "prep", "--run", tmp_path / "run", "--device", "cpu"]
    run = train(monkeypatch, tmp_path, "run")
    with pytest.raises(SystemExit) as e:
        train(monkeypatch, tmp_path, "run", "--round", 2)
    assert "03_project.py" in sentence(e)
    run_stage(monkeypatch, "03_project", *flags)
    projected = saved(run, name="projected")["state"]
    with pytest.raises(SystemExit) as e:
        train(monkeypatch, tmp_path, "run", "--round", 2, lr=0.01)
    assert "settings" in sentence(e)
    judge(monkeypatch, [0.9, 0.1, 0.1])  # the start stays the best
    train(monkeypatch, tmp_path, "run", "--round", 2)
    second = saved(run)
    assert second["meta"]["round"] == 2 and second["meta"]["best_epoch"] == 0
    assert torch.equal(projected["p"], second["state"]["p"])
    assert torch.equal(projected["p_patient"], second["state"]["p_patient"])
    run_stage(monkeypatch, "03_project", *flags)  # what round 2 was made from is gone, and nothing misses it
    capsys.readouterr()
    train(monkeypatch, tmp_path, "run", "--round", 2)
    train(monkeypatch, tmp_path, "run")
    assert capsys.readouterr().out.count("finished, kept") == 2


def test_same_seed_same_result_other_seed_another(tiny_prep, tmp_path, monkeypatch):
    tiny_prep()
    runs = [saved(train(monkeypatch, tmp_path, f"run{i}", "--seed", seed))["state"] for i, seed in enumerate((1, 1, 2))]
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


# ---- Where a model starts from

@pytest.mark.parametrize("recipe", common.RECIPES)
@pytest.mark.parametrize("model", ["rhythm", "morphology", "global", "all-1d", "all-partial", "all-global"])
def test_every_prototype_model_in_both_recipes(tiny_prep, tmp_path, monkeypatch, model, recipe):
    prep = tiny_prep()
    start = "random" if recipe == "paper" else "blackbox"
    run = train(monkeypatch, tmp_path, "run", "--recipe", recipe, model=model, epochs=1, blackbox_epochs=1, start=start)
    meta = saved(run, model)["meta"]
    own = {c for c, n in prep.info["training_positives"].items() if n}
    assert meta["classes"] == [c for c in common.GROUPS[common.MODELS[model][1]] if c in own]
    box = "blackbox-rhythm" if model == "rhythm" else "blackbox-1d"
    assert (run / box).exists() == (f"{box}/joint.pt" in meta["made_from"]) == (recipe == "default")
    assert meta["made_from"]["preprocess.json"] == common.file_hash(prep.path)
    assert meta["commands"][-1].startswith("python 02_train_joint.py")


def test_prototypes_start_as_real_training_windows_of_their_class(tiny_prep, tmp_path, monkeypatch):
    prep = tiny_prep()
    net = loaded(train(monkeypatch, tmp_path, "run", model="morphology", epochs=0), "morphology")
    z, carries, _ = common.training_set(net, prep, CPU)
    for j, c in enumerate(net.p_class.tolist()):
        windows = z[carries[:, c]].unfold(2, 3, 1).permute(0, 2, 1, 3).flatten(0, 1)  # [n windows, D, 3]
        assert (windows - net.p[j].detach()).abs().amax((1, 2)).min() < 1e-4


@pytest.mark.parametrize("model", ["rhythm", "morphology"])
def test_latents_start_as_whitened_class_directions(tiny_prep, tmp_path, monkeypatch, model):
    """Against Cov^(-1/2) by SciPy in float64, on the evidence that each step gives to each class of the black box."""
    prep = tiny_prep()
    run = train(monkeypatch, tmp_path, "run", model=model, epochs=0)
    net, box = loaded(run, model), loaded(run, module.start_of(model, common.Config()))
    (V, _), = module.black_box_heads(box, prep, CPU, [0.1])
    box, V = box.double(), V.double()
    with torch.no_grad():
        h = box.backbone(box.scaler(torch.from_numpy(prep.signals[prep.train]).double()))  # [N, D, L]
        mean, most = V.tensor_split(2, 1)  # on the average and on the maximum over time
        if model == "rhythm":
            u = (h.mean(2) @ mean.T + h.amax(2) @ most.T)[:, :, None]  # [N, C, 1]
        else:
            u = torch.einsum("cd,ndl->ncl", mean + most, h)  # [N, C, L]
    steps = u.transpose(1, 2).flatten(0, 1).numpy()
    covariance = np.cov(steps.T)
    damped = covariance + np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    expected = (steps - steps.mean(0)) @ np.linalg.inv(scipy.linalg.sqrtm(damped))
    got = common.training_set(net, prep, CPU)[0].transpose(1, 2).flatten(0, 1)  # the records are in order
    np.testing.assert_allclose(got, expected, atol=2e-3)


def test_black_box_head_is_the_logistic_regression_that_fold_9_prefers(tiny_prep, tmp_path):
    prep = tiny_prep(n=200)
    write_joint(tmp_path, prep, "blackbox-1d")
    net = loaded(tmp_path, "blackbox-1d")
    own = common.columns(net.classes)
    h = [common.batched(lambda x: net(x)[1], prep, np.flatnonzero(m), CPU).double() for m in (prep.train, prep.val)]
    X, X_val = ((part - h[0].mean(0)) / h[0].std(0).clamp_min(1e-6) for part in h)
    y, y_val = prep.labels[prep.train][:, own], prep.labels[prep.val][:, own]
    expected = {}
    strengths = (0.1, 0.03, 0.01, 0.003)
    for l2, (W, b) in zip(strengths, module.black_box_heads(net, prep, CPU, strengths)):
        fits = [LogisticRegression(C=1 / (l2 * len(y)), tol=1e-8, max_iter=3000).fit(X, y[:, c])
                for c in range(len(own))]
        logits = np.stack([fit.decision_function(X_val) for fit in fits], 1)
        np.testing.assert_allclose(h[1].float() @ W.T + b, logits, rtol=0.03, atol=0.1)
        expected[common.macro_auroc(y_val, logits)] = logits
    got = module.refit_black_box(net, prep, CPU)
    assert got == pytest.approx(max(expected), abs=1e-3)
    np.testing.assert_allclose(net.head(h[1].float()).detach(), expected[max(expected)], rtol=0.03, atol=0.1)


def test_a_start_from_imagenet_has_its_weights(tiny_prep, tmp_path, monkeypatch):
    tiny_prep()
    state = common.ResNet18(64).state_dict()
    weights = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in state.items()}
    weights = {k: v.abs() + 0.5 if k.endswith("running_var") else v for k, v in weights.items()}
    square = {k: v[:, :, None].expand(-1, -1, 3, -1) if v.ndim == 3 else v for k, v in weights.items()}
    torch.save(square, tmp_path / "resnet18.pth")
    flags = ["--imagenet", tmp_path / "resnet18.pth"]
    run = train(monkeypatch, tmp_path, "run", *flags, model="global", start="imagenet", width=64, epochs=0)
    got = saved(run, "global")["state"]
    for k, v in weights.items():
        if not k.endswith("num_batches_tracked"):
            assert torch.equal(got[f"backbone.{k}"], v) == (k != "conv1.weight"), k  # the 12-lead stem stays random
    with pytest.raises(SystemExit) as e:
        train(monkeypatch, tmp_path, "small", *flags, model="global", start="imagenet")
    assert "width" in sentence(e) and "00_download.py --imagenet" in sentence(e)


@pytest.mark.parametrize("scale", [True, False])
def test_whether_leads_are_scaled_is_a_setting(tiny_prep, tmp_path, monkeypatch, scale):
    prep = tiny_prep()
    scaler = loaded(train(monkeypatch, tmp_path, "run", start="random", epochs=0, scale_input=scale)).scaler
    wanted = prep.info["scaler"] if scale else {"mean": [0.0] * 12, "std": [1.0] * 12}
    assert scaler.mean.flatten().tolist() == pytest.approx(wanted["mean"])
    assert scaler.std.flatten().tolist() == pytest.approx(wanted["std"])


# ---- Settings and errors

def test_without_contrastive_has_the_lambdas_of_barnett_in_the_paper_recipe(tiny_prep, tmp_path, monkeypatch):
    tiny_prep()
    run = train(monkeypatch, tmp_path, "run", "--recipe", "paper", "--no-contrastive", start="random", epochs=0)
    assert common.config_of(saved(run)["meta"]).lambdas == (0.8, 0.08, 100.0, 0.0)


@pytest.mark.parametrize("text", ["epochs", "epoch=3", "epochs=x", "epochs=1.5", "augment=1", "per_class=1,2", "head=x",
                                  "lr=0", "width=20", "batch=0", "seed=3", "recipe=paper", "add_on=sigmoid"])
def test_wrong_settings_are_refused_by_name(tiny_prep, tmp_path, monkeypatch, capsys, text):
    tiny_prep()
    with pytest.raises(SystemExit) as e:
        run_stage(monkeypatch, "02_train_joint", "--prep", tmp_path / "prep", "--run", tmp_path / "run", "--set", text)
    assert e.value.code == 2 and "--set" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_names_epoch_and_remedy(tiny_prep, tmp_path, monkeypatch):
    tiny_prep()
    loss = common.composite_loss
    monkeypatch.setattr(common, "composite_loss", lambda *a: {k: v * np.nan for k, v in loss(*a).items()})
    with pytest.raises(SystemExit) as e:
        train(monkeypatch, tmp_path, "run", start="random", head="free", project_every=0)
    assert "epoch 1" in sentence(e) and "lower lr" in sentence(e)


def test_labels_that_cannot_be_learned_or_judged(tiny_prep, tmp_path, monkeypatch):
    tiny_prep(codes=("NORM", "IMI"))
    with pytest.raises(SystemExit) as e:
        train(monkeypatch, tmp_path, "run")
    assert "rhythm" in sentence(e) and "01_preprocess.py" in sentence(e)
