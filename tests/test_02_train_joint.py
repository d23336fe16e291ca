"""02_train_joint.py: training learns, continues to the same bits and never sees fold 10."""
import copy
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, arguments, change_prep, run_stage, sentence, stage

import common

SMALL = dict(width=16, latent_dim=16, batch=16, epochs=2)
module = stage("02_train_joint")


@pytest.fixture
def train(monkeypatch, tmp_path):
    """train(*flags, run, prep, model, **settings): 02 with a tiny network, and what it wrote."""
    def run_02(*flags, run="run", prep="prep", model="rhythm", **settings):
        text = [f"{k}={v}" for k, v in {**SMALL, **settings}.items()]
        run_stage(monkeypatch, "02_train_joint", "--prep", tmp_path / prep, "--device", "cpu",
                  "--run", tmp_path / run, "--model", model, "--threads", 1, "--set", *text, *flags)
        return written(tmp_path / run / model)
    return run_02


def written(folder):
    """The network, meta, state and log of a trained model."""
    net, meta = common.load_model(folder / "joint.pt", "", arguments(folder.parent))
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return SimpleNamespace(net=net, meta=meta, state=net.state_dict(), log=log)


def judge(monkeypatch, values):
    """Let fold 9 give these values, one an epoch."""
    monkeypatch.setattr(module, "validate", lambda *_, each=iter(values): next(each))


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
        blank = y[~gone] == 0
        assert (blank == blank[0]).all()  # the span is the same in all leads
        at = blank[0].nonzero()[:, 0]
        assert len(at) == 0 or int(at[-1] - at[0]) + 1 == len(at) < 150
        spans.append(len(at))
        drop = y[~gone][0].diff()
        drop[blank[0, 1:] | blank[0, :-1]] = 0
        shifts.append(int((drop < -500).sum()))  # where the end of the ramp meets its start
        gain = y[~gone].amax(1) / ramp.max()
        assert gain.std() < 1e-2  # one amplitude for all leads
        gains.append(float(gain.mean()))
    assert sum(shifts) > 150 and max(shifts) == 1 and 60 < np.mean(spans) < 90
    assert 0.79 < min(gains) < 0.85 and 1.2 < max(gains) < 1.26 and 0.06 < lost / 2400 < 0.1
    still = module.augment(torch.zeros(200, 12, 1000))
    noise = still.diff().std((1, 2)) / 2**0.5
    assert 0.04 < noise.max() < 0.052 and noise.min() < 0.01
    waves = torch.fft.rfft(still[noise < 0.01]).abs()[..., :20] / 500  # mV at 0, 0.1, 0.2 ... Hz
    height = waves.amax(2)  # a sine of 0.1 to 0.5 Hz, in each lead another
    assert (waves.argmax(2) <= 6).float().mean() > 0.9 and 0.1 < height.max() < 0.16
    assert (height.std(1) > 0.005).float().mean() > 0.9


def test_record_weights_equal_a_slow_loop():
    y = np.random.default_rng(0).random((60, 4)) < [0.5, 0.2, 0.05, 0]
    rare = [[1 / y[:, c].sum() for c in range(4) if record[c]] for record in y]
    commonest = min(np.mean(each) for each in rare if each)
    want = [np.mean(each) if each else commonest for each in rare]  # unlabelled: as those
    np.testing.assert_allclose(module.record_weights(torch.from_numpy(y).float()), want, 1e-6)


def test_training_is_blind_to_fold_10(tiny_prep, train, tmp_path):
    """Fold 10 replaced by garbage, signals and labels: every weight and the log stay."""
    clean = tiny_prep()
    tiny_prep("poisoned")
    signals, labels = np.array(clean.signals), np.array(clean.labels)
    signals[clean.test], labels[clean.test] = 1e3, 1 - labels[clean.test]
    change_prep(tmp_path / "poisoned", signals=signals, labels=labels)
    a, b = (train(run=f"run-{prep}", prep=prep, epochs=1) for prep in ("prep", "poisoned"))
    assert same(a.state, b.state) and a.log == b.log


# ---- The step, and what reaches Eq. (2)

@pytest.mark.parametrize(
    "kind, epochs, seen", [("1d", 3, 500), ("1d", 2, 1000), ("global", 3, 1000)])
def test_an_epoch_is_the_steps_of_eq_2_written_out(kind, epochs, seen, monkeypatch):
    """Two batches in float64, crops, the moving average, own-class weights, the auxiliary head."""
    monkeypatch.setattr(module, "augment", lambda x, samples: x[:, :, :samples])
    cfg = common.Config(width=16, batch=6, dropout=0.0, ema=0.2,
                        latent_dim=5, own=0.25, auxiliary=0.5, epochs=epochs)
    torch.manual_seed(0)
    net = common.ProtoECGNet(kind, ["SR", "AFIB"], [2, 2], cfg).double()
    average, slow, want = copy.deepcopy(net), copy.deepcopy(net).train(), copy.deepcopy(net)
    data = SimpleNamespace(
        x=torch.randn(20, 12, 1000).double(), y=(torch.rand(12, 2) < 0.5).double(), draw=None,
        all_y=(torch.rand(12, 71) < 0.1).double(), rows=torch.arange(3, 15), w=torch.tensor([2.0, 5.0]),
        jaccard=torch.tensor([[1, 0.25], [0.25, 1]]).double())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.manual_seed(1)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    terms = module.train_epoch(net, average, data, optimizer, constant, cfg, 2)

    torch.manual_seed(1)
    totals = []
    for i, decay in zip(torch.randperm(12).split(6), [2 / 12, 0.2]):  # 0.2 < 3 / 13
        h = slow.features(data.x[data.rows[i]][:, :, :seen])
        s = slow.scores(slow.to_latent(h))
        means = s.view(6, 2, 2).mean(2)  # of each class
        logits = means @ slow.head.weight.T + slow.head.bias
        loss = module.composite_loss(logits, s, data.y[i], slow.p, slow.p_class,
                                     data.jaccard, cfg, data.w)["total"]
        m = means * slow.head.weight.diag() + slow.head.bias
        each = data.w * data.y[i] * F.softplus(-m) + (1 - data.y[i]) * F.softplus(m)
        loss = loss + 0.25 * each.mean()
        m = slow.linear_logits(h)
        loss = loss + 0.5 * (torch.logaddexp(m, torch.zeros(())) - data.all_y[i] * m).mean()
        gradient = torch.autograd.grad(loss, list(slow.parameters()))
        for v, g, mean in zip(slow.parameters(), gradient, want.parameters()):
            v.data -= 0.1 * g
            mean.data = decay * mean.data + (1 - decay) * v.data
        totals.append(loss.item())
    assert terms["total"] == pytest.approx(np.mean(totals), rel=1e-6)
    for got, expected in ((net, slow), (average, want)):
        for v, other in zip(got.parameters(), expected.parameters()):
            torch.testing.assert_close(v, other, rtol=1e-5, atol=1e-6)


def lambdas_of(cfg):
    return [cfg.lambda_clst, cfg.lambda_sep, cfg.lambda_div, cfg.lambda_cntrst]


def test_settings_reach_the_loss_and_the_optimizer(tiny_prep, train, monkeypatch):
    prep = tiny_prep()
    calls = watch(monkeypatch, module, "composite_loss")
    optimizers = watch(monkeypatch, torch.optim, "Adam")
    one = int(prep.labels[prep.train][:, common.CODES.index("AFIB")].argmax())  # alone is drawn
    monkeypatch.setattr(module, "record_weights", lambda y: torch.eye(len(y))[one])
    found = train("--no-contrastive", epochs=1, class_weights="yes", lr=0.25,
                  sampler="weighted", lambda_div=0.25, optimizer="adam", weight_decay=0.125,
                  scheduler="step")
    own = common.columns(found.meta["classes"])
    labels = torch.from_numpy(prep.labels[prep.train][:, own]).float()
    assert len(calls) == 3
    for (_, _, y, _, _, J, cfg, w), _ in calls:
        assert np.allclose(J, np.array(prep.info["jaccard"])[np.ix_(own, own)])
        assert lambdas_of(cfg) == [0.02, 0.004, 0.25, 0.0]
        assert (y == labels[one]).all()
        want = labels.sum() / labels.sum(0) - 1
        torch.testing.assert_close(w, want / want.mean())
    ((weights, lr), how), = optimizers
    assert (lr, how["weight_decay"]) == (0.25, 0.125)
    assert [w.shape for w in weights] == [w.shape for w in found.net.parameters()]


def test_a_black_box_has_class_weights_and_a_moving_average(tiny_prep, train, monkeypatch):
    prep = tiny_prep()
    calls = watch(monkeypatch, module, "bce")
    averages = watch(monkeypatch, torch, "_foreach_lerp_")
    found = train(model="blackbox-rhythm", epochs=1, class_weights="yes")
    n = prep.labels[prep.train][:, common.columns(found.meta["classes"])].sum(0)
    w, losses = (n.sum() - n) / n, []
    w = w / w.mean()
    for (logits, y, _), _ in calls:
        m, y = logits.detach().double().numpy(), y.numpy()
        losses.append((w * y * np.logaddexp(0, -m) + (1 - y) * np.logaddexp(0, m)).mean())
    assert found.log[1]["total"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert len(calls) == len(averages) == 3


@pytest.mark.parametrize("name", module.CHOICES["scheduler"])
def test_learning_rate_follows_the_scheduler(tiny_prep, train, monkeypatch, name):
    """48 records in batches of 16 for six epochs: 18 steps."""
    tiny_prep()
    _, *log = train(model="blackbox-rhythm", epochs=6, lr=1e-2, scheduler=name).log

    def one_cycle(steps):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-2)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
            yield scheduler.get_last_lr()[0]

    want = {"cosine": [5e-3 * (1 + np.cos(np.pi * e / 6)) for e in range(1, 7)],
            "onecycle": [*one_cycle(18)][2::3],
            "step": [1e-2] * 2 + [1e-3] * 2 + [1e-4] * 2}  # at 9 and 13 of 18 steps
    assert [line["lr"] for line in log] == pytest.approx(want[name])
    assert log[-1]["total"] < 0.6 * log[0]["total"]  # the records can be told apart
    if name == "onecycle":  # a batch of one record is left out, and not counted
        _, *log = train(model="blackbox-rhythm", run="47", batch=47, epochs=6, lr=1e-2).log
        assert [line["lr"] for line in log] == pytest.approx([*one_cycle(6)])


# ---- Which epoch is kept, going on, rounds

@pytest.mark.parametrize("fold_9, best", [([0.5, 0.6, 0.7, 0.6, 0.7, 0.8], 2), ([0.5] * 4, 0)])
def test_the_first_best_epoch_is_kept_and_patience_ends_training(
        tiny_prep, train, monkeypatch, fold_9, best):
    """Epoch 0 is the start: it is kept when no epoch is better."""
    tiny_prep()
    judge(monkeypatch, fold_9)
    states = after_each_epoch(monkeypatch)
    found = train(ema=0, epochs=9, patience=2, lr=0.01)
    meta, log = found.meta, found.log
    assert (meta["epochs"], meta["best_epoch"]) == (best + 2, best)
    assert meta["val_auroc"] == fold_9[best] and set(log[0]) == {"epoch", "val_auroc"}
    assert [line["epoch"] for line in log] == list(range(best + 3))
    assert list(log[1]) == "epoch lr val_auroc total bce clst sep div cntrst own auxiliary".split()
    is_kept = [same(found.state, state) for state in states]
    assert is_kept == [epoch == best for epoch in range(1, best + 3)]
    assert not torch.equal(states[0]["head.weight"], states[1]["head.weight"])


@pytest.mark.parametrize("model", ["rhythm", "blackbox-rhythm"])
def test_epochs_are_judged_on_fold_9(tiny_prep, train, model):
    """By the weights that joint.pt holds, over all of fold 9 and nothing else."""
    prep = tiny_prep(n=120)
    found = train(model=model)
    val, own = np.flatnonzero(prep.val), common.columns(found.net.classes)
    logits = common.batched(found.net, prep, val, CPU)
    auroc = common.macro_auroc(prep.labels[val][:, own], logits)
    assert found.meta["val_auroc"] == pytest.approx(auroc, abs=1e-6)


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
    a, b = (train("--seed", k, run=f"seed-{k}", epochs=0) for k in (1, 2))
    assert not same(a.state, b.state)


def test_finished_models_are_kept_and_another_setting_stops(tiny_prep, train, tmp_path, capsys):
    tiny_prep()
    train(epochs=1)
    path = tmp_path / "run/rhythm/joint.pt"
    before = path.read_bytes()
    train(epochs=1)
    assert "finished, kept" in capsys.readouterr().out and path.read_bytes() == before
    for seed, epochs, records in ((42, 3, 0), (7, 1, 0), (42, 1, 3)):
        tiny_prep(seed=records)
        with pytest.raises(SystemExit) as e:
            train("--seed", seed, epochs=epochs)
        assert "delete" in sentence(e) and path.read_bytes() == before
    path.rename(path.with_name("last.pt"))  # noticed before a model that comes first is trained
    with pytest.raises(SystemExit) as e:
        train("--model", "global", "rhythm", epochs=3)
    assert "last.pt" in sentence(e) and not (tmp_path / "run/global").exists()


def test_rounds_are_in_place(tiny_prep, train, tmp_path, monkeypatch, capsys):
    prep, run = tiny_prep(), tmp_path / "run"

    def project():
        run_stage(monkeypatch, "03_project", "--prep", prep.path.parent, "--run", run)
        return torch.load(run / "rhythm/projected.pt", weights_only=True)["state"]

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
        assert all(torch.equal(projected[k], found.state[k]) for k in ("p", "p_patient"))
        project()  # what the round was made from is gone, and nothing misses it
        capsys.readouterr()
        for again in range(1, number + 1):
            train("--round", again, epochs=1)
        assert capsys.readouterr().out.count("finished, kept") == number


# ---- Where a model starts from

@pytest.mark.parametrize("recipe", common.RECIPES)
@pytest.mark.parametrize("model", [m for m in common.MODELS if m not in common.BOXES])
def test_every_prototype_model_in_both_recipes(tiny_prep, train, monkeypatch, model, recipe):
    prep = tiny_prep()
    judge(monkeypatch, itertools.count())
    found = train("--recipe", recipe, model=model, epochs=1, start="random", ema=0)
    learned = set(common.CODES) - set(prep.info["without_training_record"])
    group = common.GROUPS[common.MODELS[model][1]]
    assert found.net.classes == [c for c in group if c in learned]
    assert sorted(found.meta["made_from"]) == ["preprocess.json"]
    own, W = found.net.p_class == torch.arange(len(learned & set(group)))[:, None], found.net.head
    if recipe == "paper":  # frozen as the authors start it
        assert torch.equal(W.weight, torch.where(own, 1.0, -0.5))
    else:  # one weight for a class
        start = 10 * torch.eye(len(own))
        n = prep.labels[prep.train][:, common.columns(found.net.classes)].sum(0)
        prior = torch.logit(torch.tensor(n) / 48)  # of labels, for the average record
        torch.testing.assert_close(W.bias, prior, atol=0.1, rtol=0)
        change = (W.weight - start).abs()
        assert (change > 0).all() and change.max() < 1


def test_a_start_from_imagenet_has_its_weights(tiny_prep, train, tmp_path):
    tiny_prep()
    state = common.ResNet18(64).state_dict()
    weights = {k: torch.rand(v.shape) / 30 for k, v in state.items() if "num_batches" not in k}
    square = {k: v[:, :, None].expand(-1, -1, 3, -1) if v.ndim == 3 else v
              for k, v in weights.items()}
    torch.save(square, tmp_path / "resnet18.pth")
    flags, how = ["--imagenet", tmp_path / "resnet18.pth"], dict(start="imagenet", epochs=0)
    got = train(*flags, **how, model="global", width=64).state
    for k, v in weights.items():  # the 12-lead stem stays random
        assert torch.equal(got[f"backbone.{k}"], v) == (k != "conv1.weight"), k
    with pytest.raises(SystemExit) as e:
        train(*flags, **how, model="global", run="small")
    assert "width" in sentence(e) and "00_download.py --imagenet" in sentence(e)
    with pytest.raises(SystemExit):  # before the branch that does not need it is trained
        train("--model", "rhythm", "morphology", "--imagenet", "nosuch", run="early",
              start="imagenet", epochs=0)
    assert not (tmp_path / "early").exists()


# ---- Settings and errors

def test_settings_reach_the_model(tiny_prep, train):
    prep = tiny_prep()
    found = train("--no-contrastive", lr=0.002, a="1,13,4", per_class="3,4,5", augment="no",
                  epochs=0)
    cfg = common.Config(**found.meta["config"])
    assert (cfg.lr, cfg.a, cfg.per_class, cfg.augment) == (0.002, (1, 13, 4), (3, 4, 5), False)
    assert (cfg.lambda_cntrst, cfg.seed) == (0, 42)
    for key, values in prep.info["scaler"].items():
        assert getattr(found.net, key).flatten().tolist() == pytest.approx(values)
    found = train("--recipe", "paper", "--no-contrastive", run="paper", start="random", epochs=0)
    cfg = common.Config(**found.meta["config"])
    assert lambdas_of(cfg) == [0.8, 0.08, 100.0, 0.0]  # Barnett et al.
    assert (found.net.mean == 0).all() and (found.net.std == 1).all()


@pytest.mark.parametrize("text", """epochs epoch=3 epochs=x epochs=1.5 augment=1 per_class=1,2
    head=x top_k=0 width=20 batch=0 seed=3 recipe=paper add_on=x tie=x""".split())
def test_wrong_settings_are_refused_by_name(tmp_path, monkeypatch, capsys, text):
    with pytest.raises(SystemExit) as e:
        run_stage(monkeypatch, "02_train_joint", "--run", tmp_path / "run", "--set", text)
    assert e.value.code == 2 and "--set" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_names_epoch_and_remedy(tiny_prep, train, monkeypatch):
    tiny_prep()
    monkeypatch.setattr(module, "augment", lambda x, samples: x * np.nan)
    with pytest.raises(SystemExit) as e:
        train()
    assert "rhythm" in sentence(e) and "epoch 1" in sentence(e) and "lower lr" in sentence(e)


def test_labels_that_cannot_be_trained_are_named_before_a_model_trains(tiny_prep, train, tmp_path):
    tiny_prep("no-rhythm", codes=("NORM", "IMI"))
    with pytest.raises(SystemExit) as e:
        train("--model", "global", "rhythm", run="none", prep="no-rhythm")
    assert "rhythm" in sentence(e) and "01_preprocess.py" in sentence(e)
    assert not (tmp_path / "none").exists()
