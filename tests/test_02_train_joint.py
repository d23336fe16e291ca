"""02_train_joint.py: training learns, continues to the same bits and never sees fold 10."""
import copy
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import scipy
import torch
from conftest import CPU, arguments, change_prep, run_stage, sentence, stage, write_joint
from sklearn.linear_model import LogisticRegression

import common

SMALL = dict(width=16, batch=16, epochs=2, blackbox_epochs=3)
module = stage("02_train_joint")


@pytest.fixture
def train(monkeypatch, tmp_path):
    """train(*flags, run, prep, model, **settings): 02 with a tiny network, and what it wrote."""
    def run_02(*flags, run="run", prep="prep", model="rhythm", **settings):
        text = [f"{k}={v}" for k, v in {**SMALL, **settings}.items()]
        folders = ["--prep", tmp_path / prep, "--run", tmp_path / run]
        run_stage(monkeypatch, "02_train_joint", *folders, "--model", model, "--device", "cpu",
                  "--threads", 1, "--set", *text, *flags)
        return written(tmp_path / run / model)
    return run_02


def written(folder):
    """The network, meta, state and log of a trained model."""
    net, meta = common.load_model(folder / "joint.pt", "", arguments(folder.parent))
    log = (folder / "log.jsonl").read_text().splitlines()
    return SimpleNamespace(net=net, meta=meta, state=net.state_dict(),
                           log=[json.loads(line) for line in log])


def judge(monkeypatch, values):
    """Let fold 9 give these values, one an epoch."""
    values = iter(values)
    monkeypatch.setattr(module, "validate", lambda *_: next(values))


def watch(monkeypatch, owner, name):
    """The (arguments, keywords) of every call of a function, from now on."""
    calls, real = [], getattr(owner, name)

    def call(*a, **k):
        calls.append((a, k))
        return real(*a, **k)

    monkeypatch.setattr(owner, name, call)
    return calls


def after_each_epoch(monkeypatch):
    """Of every epoch of a prototype model the state in last.pt."""
    states, real = [], common.save

    def save(path, value):
        if path.name == "last.pt":
            states.append(copy.deepcopy(value["model"]))
        real(path, value)

    monkeypatch.setattr(common, "save", save)
    return states


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- Data

def test_augmentation_does_each_of_its_changes():
    """On a ramp of large voltages every change of a record can be read off."""
    ramp = 1e4 + torch.arange(1000.0)
    shifts, gains, lost, spans = [], [], 0, []
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
        gain = kept.amax(1) / ramp.max()
        assert gain.std() < 1e-2  # one amplitude for all leads
        gains.append(float(gain.mean()))
    assert sum(shifts) > 150 and max(shifts) == 1 and 60 < np.mean(spans) < 90
    assert 0.79 < min(gains) < 0.85 and 1.2 < max(gains) < 1.26
    assert 0.06 < lost / 2400 < 0.1
    noise = module.augment(torch.zeros(200, 12, 1000)).std((1, 2))
    assert 0.04 < noise.max() < 0.05 and noise.min() < 0.01


def test_record_weights_equal_a_slow_loop():
    y = np.random.default_rng(0).random((60, 4)) < [0.5, 0.2, 0.05, 0]
    y[:3] = False
    want = []
    for record in y:
        rarity = [1 / y[:, c].sum() for c in range(4) if record[c]]
        want.append(np.mean(rarity) if rarity else 0)
    want = [w or min(v for v in want if v) for w in want]  # unlabelled: as the commonest
    got = module.record_weights(torch.from_numpy(y).float())
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_training_is_blind_to_fold_10(tiny_prep, train, tmp_path):
    """Fold 10 replaced by garbage, signals and labels: every weight and the log stay."""
    clean = tiny_prep()
    signals, labels = np.array(clean.signals), np.array(clean.labels)
    signals[clean.test], labels[clean.test] = 1e3, 1 - labels[clean.test]
    tiny_prep("poisoned")
    change_prep(tmp_path / "poisoned", signals=signals, labels=labels)
    a, b = (train(run=f"run-{prep}", prep=prep) for prep in ("prep", "poisoned"))
    assert same(a.state, b.state) and a.log == b.log


# ---- The step, and what reaches Eq. (2)

def test_training_separates_what_can_be_separated(tiny_prep, train):
    tiny_prep(n=200)
    found = train(model="blackbox-1d", blackbox_epochs=12, augment="no")
    assert found.log[-1]["bce"] < 0.7 * found.log[0]["bce"]
    assert found.meta["val_auroc"] > 0.75


@pytest.mark.parametrize("own_patient", [False, True])
def test_an_epoch_is_the_steps_of_eq_2_written_out(own_patient):
    """Two batches in float64; what a prototype says of its own patient counts as the mean."""
    cfg = common.Config(width=16, batch=6, dropout=0.0, augment=False, scheduler="plateau",
                        own_patient=own_patient)
    torch.manual_seed(0)
    net = common.ProtoECGNet("1d", ["SR", "AFIB"], [2, 2], cfg, latent_dim=5).double()
    net.p_patient[:] = torch.tensor([0, 3, -1, 5])
    slow = copy.deepcopy(net).train()
    data = SimpleNamespace(
        x=torch.randn(20, 12, 1000).double(), y=(torch.rand(12, 2) < 0.5).double(), draw=None,
        rows=torch.arange(3, 15), patients=torch.arange(12) // 2, w=torch.tensor([2.0, 5.0]),
        jaccard=torch.tensor([[1, 0.25], [0.25, 1]]).double())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.manual_seed(1)
    terms = module.train_epoch(net, net, data, optimizer, None, cfg, 1)

    torch.manual_seed(1)
    totals = []
    for i in torch.randperm(12).split(6):
        _, s = slow(data.x[data.rows[i]])
        counted, mean = s.clone(), s.mean(0).detach()
        for b, p in itertools.product(range(6), range(4)):
            if data.patients[i[b]] == slow.p_patient[p] and not own_patient:
                counted[b, p] = mean[p]
        logits = counted @ slow.head.weight.T + slow.head.bias
        loss = common.composite_loss(logits, counted, data.y[i], slow.p, slow.p_class,
                                     data.jaccard, cfg.lambdas, data.w)["total"]
        gradient = torch.autograd.grad(loss, list(slow.parameters()))
        for weight, g in zip(slow.parameters(), gradient):
            weight.data -= 0.1 * g
        totals.append(loss.item())
    assert terms["total"] == pytest.approx(np.mean(totals), rel=1e-6)
    for weight, other in zip(net.parameters(), slow.parameters()):
        torch.testing.assert_close(weight, other, rtol=1e-5, atol=1e-6)


def test_lambdas_jaccard_class_weights_and_sampler_reach_the_loss(tiny_prep, train, monkeypatch):
    prep = tiny_prep()
    calls = watch(monkeypatch, common, "composite_loss")
    afib = prep.labels[prep.train][:, common.CODES.index("AFIB")]
    one = int(afib.argmax())  # the only record that is drawn
    monkeypatch.setattr(module, "record_weights", lambda y: torch.eye(len(y))[one])
    found = train("--no-contrastive", start="random", epochs=1, class_weights="yes",
                  sampler="weighted", lambda_div=0.25)
    own = common.columns(found.meta["classes"])
    labels = torch.from_numpy(prep.labels[prep.train][:, own]).float()
    n = labels.sum(0)
    assert len(calls) == 3
    for (_, _, y, _, _, J, lambdas, w), _ in calls:
        assert np.allclose(J, np.array(prep.info["jaccard"])[np.ix_(own, own)])
        assert lambdas == (*common.Config().lambdas[:2], 0.25, 0.0)
        assert (y == labels[one]).all()
        torch.testing.assert_close(w, (len(labels) - n) / n)


def test_class_weights_reach_the_loss_of_a_black_box(tiny_prep, train, monkeypatch):
    prep = tiny_prep()
    calls = watch(monkeypatch, torch.nn.functional, "binary_cross_entropy_with_logits")
    found = train(model="blackbox-rhythm", blackbox_epochs=1, class_weights="yes", head="free")
    n = prep.labels[prep.train][:, common.columns(found.meta["classes"])].sum(0)
    w, want = (48 - n) / n, []
    for (logits, y), _ in calls:
        m = logits.detach().double().numpy()
        want.append((w * (np.logaddexp(0, m) - y.numpy() * m)).mean())
    assert found.log[0]["bce"] == pytest.approx(np.mean(want), rel=1e-5) and len(want) == 3


@pytest.mark.parametrize("head", ["frozen", "free"])
def test_a_frozen_head_stays_as_the_authors_set_it(tiny_prep, train, monkeypatch, head):
    tiny_prep()
    judge(monkeypatch, itertools.count())
    net = train(start="random", head=head, lr=0.01).net
    own = net.p_class == torch.arange(len(net.classes))[:, None]
    start = torch.where(own, 1.0, -0.5)
    assert torch.equal(net.head.weight, start) == (head == "frozen")


def test_a_black_box_is_the_moving_average_of_its_weights(tiny_prep, train, monkeypatch):
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
    net = train(model="blackbox-rhythm", blackbox_epochs=2, blackbox_ema=0.3, head="free",
                blackbox_lr=0.1).net
    want = seen[0]
    for t, w in enumerate(seen[1:], start=3):  # three steps an epoch, the first of epoch 1 is 3
        decay = min(0.3, t / (10 + t))
        want = decay * want + (1 - decay) * w
    average = next(net.parameters()).double()
    torch.testing.assert_close(average, want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(want, seen[-1], atol=1e-6)


@pytest.mark.parametrize("name", module.CHOICES["scheduler"])
def test_learning_rate_follows_the_scheduler(tiny_prep, train, monkeypatch, name):
    """48 records in batches of 16 for six epochs: 18 steps."""
    tiny_prep()
    judge(monkeypatch, np.linspace(0.9, 0.8, 6))  # fold 9 falls: a plateau
    log = train(model="blackbox-rhythm", blackbox_epochs=6, blackbox_lr=1e-2, scheduler=name,
                head="free").log
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-2)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, 18)
    rates = []
    for _ in range(18):
        optimizer.step()
        one_cycle.step()
        rates.append(optimizer.param_groups[0]["lr"])
    want = {"cosine": [5e-3 * (1 + np.cos(np.pi * e / 6)) for e in range(1, 7)],
            "onecycle": rates[2::3],
            "plateau": [1e-2] * 4 + [5e-3] * 2}  # halved after four epochs without gain
    assert [line["lr"] for line in log] == pytest.approx(want[name])


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_optimizer_and_weight_decay(tiny_prep, train, monkeypatch, kind):
    tiny_prep()
    calls = watch(monkeypatch, torch.optim, kind)
    train(start="random", epochs=1, optimizer=kind.lower(), weight_decay=0.125, lr=0.25)
    (_, given), = calls
    assert (given["lr"], given["weight_decay"]) == (0.25, 0.125)


# ---- The head between epochs, and projection

def test_head_is_solved_without_what_a_prototype_says_of_its_own_patient(tiny_prep, tmp_path):
    """Against the same objective minimised in float64, own patients' scores at the mean."""
    prep = tiny_prep(n=120)
    write_joint(tmp_path, prep)
    net = common.load_model(tmp_path / "rhythm/joint.pt", "", arguments(tmp_path))[0]
    z, y, rows = common.training_set(net, prep, CPU)
    patients = prep.patient_ids[rows]
    patients[20:40] = patients[:20]  # two records each
    net.p_patient[1:] = torch.from_numpy(patients[[3, 7, 11]])  # of the first all count
    net.p.data[1:] = z[[3, 7, 11]]
    s = net.scores(z).detach().double().numpy()
    mean, std = s.mean(0), s.std(0)
    for p, of_patient in enumerate([[], [3, 23], [7, 27], [11, 31]]):
        s[of_patient, p] = mean[p]
    module.refit_head(net, z, y, patients)
    W, b = (v.detach().numpy() for v in net.head.parameters())
    for c in range(2):
        own = net.p_class.numpy() == c
        X = (s[:, own] - mean[own]) / std[own]

        def objective(v):
            m = X @ v[:-1] + v[-1]
            bce = np.sum(np.logaddexp(0, m) - y[:, c] * m)
            return bce + len(y) * 1e-4 / 2 * np.sum(v[:-1] ** 2)

        v = scipy.optimize.minimize(objective, np.zeros(X.shape[1] + 1), tol=1e-10).x
        want = X @ v[:-1] + v[-1]
        np.testing.assert_allclose(s @ W[c] + b[c], want, atol=1e-3 * np.abs(want).max())
        assert (W[c, ~own] == 0).all()


def test_head_of_a_rare_label_is_solved_too():
    """Ten positives in 4,000 records: a tolerance on the mean loss must not stop it half way."""
    rng = np.random.default_rng(0)
    net = common.ProtoECGNet("1d", ["SR", "AFIB"], [3, 3], common.Config(width=16))
    y = np.zeros((4000, 2), bool)
    y[:1500, 0] = y[:10, 1] = 1
    s = rng.normal(size=(4000, 6)) * 0.05 + 0.3 * y[:, [0, 0, 0, 1, 1, 1]] * rng.random(6)
    net.scores = lambda part: part
    module.refit_head(net, torch.from_numpy(s).float(), y, np.arange(4000))
    X = (s[:, 3:] - s[:, 3:].mean(0)) / s[:, 3:].std(0)
    slow = LogisticRegression(C=1e4 / 4000, tol=1e-10, max_iter=10**4).fit(X, y[:, 1])
    W, b = (v[1].detach().double().numpy() for v in net.head.parameters())
    np.testing.assert_allclose(s @ W + b, slow.decision_function(X), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("project", [1, 0])
def test_prototypes_are_projected_after_each_epoch_and_kept_as_they_were_before(
        tiny_prep, train, monkeypatch, project):
    prep = tiny_prep()
    judge(monkeypatch, itertools.count())  # every epoch is better
    states = after_each_epoch(monkeypatch)
    net = train(lr=0.05, project_every=project).net
    assert torch.equal(states[-1]["p"], net.p) == (not project)
    net.load_state_dict(states[-1])
    z, carries, _ = common.training_set(net, prep, CPU)
    away = [float((z[carries[:, c]] - p).abs().amax((1, 2)).min())
            for p, c in zip(net.p.detach(), net.p_class.tolist())]
    assert (max(away) < 1e-4) == bool(project)


# ---- Which epoch is kept, going on, rounds

@pytest.mark.parametrize("fold_9, best", [([0.5, 0.6, 0.7, 0.6, 0.7, 0.8], 2), ([0.5] * 4, 0)])
def test_the_first_best_epoch_is_kept_and_patience_ends_training(
        tiny_prep, train, monkeypatch, fold_9, best):
    """Epoch 0 is the start: it is kept when no epoch is better."""
    tiny_prep()
    judge(monkeypatch, fold_9)
    states = after_each_epoch(monkeypatch)
    found = train(start="random", head="free", project_every=0, epochs=9, patience=2, lr=0.01)
    meta, log = found.meta, found.log
    assert (meta["epochs"], meta["best_epoch"]) == (best + 2, best)
    assert meta["val_auroc"] == fold_9[best] and set(log[0]) == {"epoch", "val_auroc"}
    assert [line["epoch"] for line in log] == list(range(best + 3))
    assert set(log[1]) == {"epoch", "lr", "val_auroc", "total", "bce", *"clst sep div cntrst".split()}
    is_kept = [same(found.state, state) for state in states]
    assert is_kept == [epoch == best for epoch in range(1, best + 3)]


@pytest.mark.parametrize("model", ["rhythm", "blackbox-rhythm"])
def test_epochs_are_judged_on_fold_9(tiny_prep, train, model):
    """By the weights that joint.pt holds, over all of fold 9 and nothing else."""
    prep, auroc = tiny_prep(n=120), {}
    found = train(model=model, start="random", head="free", project_every=0, own_patient="yes")
    own = common.columns(found.meta["classes"])
    for fold, rows in (("val", prep.val), ("train", prep.train)):
        logits = common.batched(lambda x: found.net(x)[0], prep, np.flatnonzero(rows), CPU)
        auroc[fold] = common.macro_auroc(prep.labels[rows][:, own], logits.numpy())
    assert found.meta["val_auroc"] == pytest.approx(auroc["val"], abs=1e-6)
    assert auroc["val"] != pytest.approx(auroc["train"], abs=1e-6)


def test_continued_equals_uninterrupted_bit_for_bit(
        tiny_prep, train, tmp_path, monkeypatch, capsys):
    tiny_prep()
    whole, real = train(run="whole"), common.save

    def killed(path, value):
        real(path, value)
        if path.match("rhythm/last.pt") and len(value["log"]) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(common, "save", killed)
    with pytest.raises(SystemExit):
        train(run="cut")
    assert not (tmp_path / "cut/rhythm/joint.pt").exists()
    monkeypatch.setattr(common, "save", real)
    cut = train(run="cut")
    assert "goes on after epoch 1" in capsys.readouterr().out
    assert same(whole.state, cut.state) and whole.log == cut.log
    assert not (tmp_path / "cut/rhythm/last.pt").exists()


def test_finished_models_are_kept_and_another_setting_stops(tiny_prep, train, tmp_path, capsys):
    tiny_prep()
    train()
    path = tmp_path / "run/rhythm/joint.pt"
    before = path.read_bytes()
    train()
    assert "finished, kept" in capsys.readouterr().out and path.read_bytes() == before
    for flags, settings in (([], {"lr": 0.01}), (["--seed", 7], {}), ([], {})):
        if not flags and not settings:
            tiny_prep(seed=3)  # other records
        with pytest.raises(SystemExit) as e:
            train(*flags, **settings)
        assert "delete" in sentence(e) and path.read_bytes() == before


def test_rounds_are_in_place(tiny_prep, train, tmp_path, monkeypatch, capsys):
    tiny_prep()

    def project():
        run_stage(monkeypatch, "03_project", "--prep", tmp_path / "prep", "--run",
                  tmp_path / "run", "--device", "cpu")
        return torch.load(tmp_path / "run/rhythm/projected.pt", weights_only=True)["state"]

    def refused(number, **settings):
        with pytest.raises(SystemExit) as e:
            train("--round", number, epochs=1, **settings)
        return sentence(e)

    train(epochs=1)
    assert "03_project.py" in refused(2)
    judge(monkeypatch, itertools.repeat(0.5))  # the start stays the best
    for number in (2, 3):
        projected = project()
        assert "settings" in refused(number, lr=0.01) and "round" in refused(number + 1)
        found = train("--round", number, epochs=1)
        assert (found.meta["round"], found.meta["best_epoch"]) == (number, 0)
        assert torch.equal(projected["p"], found.net.p)
        assert torch.equal(projected["p_patient"], found.net.p_patient)
        project()  # what the round was made from is gone, and nothing misses it
        capsys.readouterr()
        for again in range(1, number + 1):
            train("--round", again, epochs=1)
        assert capsys.readouterr().out.count("finished, kept") == number


def test_same_seed_same_result_other_seed_another(tiny_prep, train):
    tiny_prep()
    a, b, c = (train("--seed", seed, run=f"run-{i}", start="random", epochs=1)
               for i, seed in enumerate((1, 1, 2)))
    assert same(a.state, b.state) and not same(a.state, c.state)


# ---- Where a model starts from

@pytest.mark.parametrize("recipe", common.RECIPES)
@pytest.mark.parametrize("model", [m for m in common.MODELS if m not in common.BOXES])
def test_every_prototype_model_in_both_recipes(tiny_prep, train, tmp_path, model, recipe):
    prep = tiny_prep()
    start = {"paper": "random", "default": "blackbox"}[recipe]
    found = train("--recipe", recipe, model=model, epochs=1, blackbox_epochs=1, start=start)
    learned = {c for c, n in prep.info["training_positives"].items() if n}
    group = common.GROUPS[common.MODELS[model][1]]
    assert found.meta["classes"] == [c for c in group if c in learned]
    box = "blackbox-rhythm" if model == "rhythm" else "blackbox-1d"
    made_from = {"preprocess.json": common.file_hash(prep.path)}
    if start == "blackbox":
        made_from[f"{box}/joint.pt"] = common.file_hash(tmp_path / "run" / box / "joint.pt")
    assert found.meta["made_from"] == made_from
    assert found.meta["commands"][-1].startswith("python 02_train_joint.py")


def test_prototypes_start_as_real_training_windows_of_their_class(tiny_prep, train):
    prep = tiny_prep()
    net = train(model="morphology", epochs=0).net
    z, carries, rows = common.training_set(net, prep, CPU)
    windows = z.unfold(2, 3, 1).permute(0, 2, 1, 3)  # [N, windows, D, 3]
    for p, c, patient in zip(net.p.detach(), net.p_class.tolist(), net.p_patient.tolist()):
        away = (windows - p).abs().amax((2, 3)).amin(1)
        source = int(away.argmin())
        assert away[source] < 1e-4 and carries[source, c]
        assert prep.patient_ids[rows[source]] == patient


@pytest.mark.parametrize("model", ["rhythm", "morphology"])
def test_latents_start_as_whitened_class_directions(tiny_prep, train, tmp_path, model):
    """Against Cov^(-1/2) by SciPy in float64, on each step's evidence for the box's classes."""
    prep = tiny_prep()
    net = train(model=model, epochs=0).net
    box = written(tmp_path / "run" / module.start_of(model, common.Config())).net
    (V, _), = module.black_box_heads(box, prep, CPU, [0.1])
    box, V = box.double(), V.double()
    with torch.no_grad():
        x = torch.from_numpy(prep.signals[prep.train]).double()
        h = box.backbone(box.scaler(x))  # [N, D, L]
    mean, most = V.tensor_split(2, 1)  # on the average and on the maximum over time
    if model == "rhythm":
        u = (h.mean(2) @ mean.T + h.amax(2) @ most.T)[:, :, None]  # [N, C, 1]
    else:
        u = torch.einsum("cd,ndl->ncl", mean + most, h)  # [N, C, L]
    steps = u.transpose(1, 2).flatten(0, 1).numpy()
    covariance = np.cov(steps.T)
    damped = covariance + np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    expected = (steps - steps.mean(0)) @ np.linalg.inv(scipy.linalg.sqrtm(damped))
    z = common.training_set(net, prep, CPU)[0]  # the records are in order
    np.testing.assert_allclose(z.transpose(1, 2).flatten(0, 1), expected, atol=2e-3)


def test_black_box_head_is_the_logistic_regression_that_fold_9_prefers(tiny_prep, tmp_path):
    prep = tiny_prep(n=200)
    path = write_joint(tmp_path, prep, "blackbox-1d")
    net = common.load_model(path, "", arguments(tmp_path))[0]
    own, strengths = common.columns(net.classes), (0.1, 0.03, 0.01, 0.003)
    h, h_val = (common.batched(lambda x: net(x)[1], prep, np.flatnonzero(rows), CPU)
                for rows in (prep.train, prep.val))
    mean, std = h.double().mean(0), h.double().std(0).clamp_min(1e-6)
    X, X_val = (h - mean) / std, (h_val - mean) / std
    y, y_val = prep.labels[prep.train][:, own], prep.labels[prep.val][:, own]
    expected = {}
    for l2, (W, b) in zip(strengths, module.black_box_heads(net, prep, CPU, strengths)):
        solver = LogisticRegression(C=1 / (l2 * len(y)), tol=1e-8, max_iter=3000)
        logits = np.stack([solver.fit(X, each).decision_function(X_val) for each in y.T], 1)
        np.testing.assert_allclose(h_val @ W.T + b, logits, rtol=0.03, atol=0.1)
        expected[common.macro_auroc(y_val, logits)] = logits
    best = max(expected)
    assert module.refit_black_box(net, prep, CPU) == pytest.approx(best, abs=1e-3)
    got = net.head(h_val).detach()
    np.testing.assert_allclose(got, expected[best], rtol=0.03, atol=0.1)


def test_a_start_from_imagenet_has_its_weights(tiny_prep, train, tmp_path):
    tiny_prep()
    weights = {k: torch.rand(v.shape) + 0.5 for k, v in common.ResNet18(64).state_dict().items()}
    square = {k: v[:, :, None].expand(-1, -1, 3, -1) if v.ndim == 3 else v
              for k, v in weights.items()}
    torch.save(square, tmp_path / "resnet18.pth")
    flags = ["--imagenet", tmp_path / "resnet18.pth"]
    how = dict(model="global", start="imagenet", epochs=0)
    got = train(*flags, **how, width=64).state
    for k, v in weights.items():
        if not k.endswith("num_batches_tracked"):  # the 12-lead stem stays random
            assert torch.equal(got[f"backbone.{k}"], v) == (k != "conv1.weight"), k
    with pytest.raises(SystemExit) as e:
        train(*flags, **how, run="small")
    assert "width" in sentence(e) and "00_download.py --imagenet" in sentence(e)


@pytest.mark.parametrize("scale", ["yes", "no"])
def test_whether_leads_are_scaled_is_a_setting(tiny_prep, train, scale):
    prep = tiny_prep()
    scaler = train(start="random", epochs=0, scale_input=scale).net.scaler
    wanted = prep.info["scaler"] if scale == "yes" else {"mean": [0] * 12, "std": [1] * 12}
    assert scaler.mean.flatten().tolist() == pytest.approx(wanted["mean"])
    assert scaler.std.flatten().tolist() == pytest.approx(wanted["std"])


# ---- Settings and errors

def test_settings_reach_the_model(tiny_prep, train):
    tiny_prep()
    given = dict(lr=0.002, a="1,13,4", per_class="3,4,5", augment="no", start="random", epochs=0)
    cfg = common.config_of(train("--no-contrastive", **given).meta)
    assert (cfg.lr, cfg.a, cfg.per_class, cfg.augment) == (0.002, (1, 13, 4), (3, 4, 5), False)
    assert (cfg.prototypes, cfg.lambda_cntrst, cfg.seed) == ("random", 0, 42)
    cfg = common.config_of(train("--recipe", "paper", "--no-contrastive", run="paper",
                                 start="random", epochs=0).meta)
    assert cfg.lambdas == (0.8, 0.08, 100.0, 0.0)  # those of Barnett et al.


@pytest.mark.parametrize("text", """epochs epoch=3 epochs=x epochs=1.5 augment=1 per_class=1,2
    head=x lr=0 width=20 batch=0 seed=3 recipe=paper add_on=sigmoid""".split())
def test_wrong_settings_are_refused_by_name(tmp_path, monkeypatch, capsys, text):
    with pytest.raises(SystemExit) as e:
        run_stage(monkeypatch, "02_train_joint", "--run", tmp_path / "run", "--set", text)
    assert e.value.code == 2 and "--set" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_trained_is_said_in_one_sentence(tiny_prep, train, monkeypatch):
    tiny_prep()
    train(model="blackbox-rhythm", blackbox_epochs=1)
    with pytest.raises(SystemExit) as e:  # a start of another size
        train(blackbox_epochs=1, width=32)
    assert "blackbox-rhythm/joint.pt has width 16: --set that" in sentence(e)
    monkeypatch.setattr(module, "augment", lambda x: x * np.nan)
    with pytest.raises(SystemExit) as e:
        train(run="diverged", start="random", head="free", project_every=0)
    assert "rhythm: no number in epoch 1" in sentence(e) and "lower lr" in sentence(e)
    tiny_prep("no-rhythm", codes=("NORM", "IMI"))
    with pytest.raises(SystemExit) as e:
        train(run="none", prep="no-rhythm")
    assert "rhythm" in sentence(e) and "01_preprocess.py" in sentence(e)
