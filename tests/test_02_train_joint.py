"""02_train_joint.py: training learns, resumes to the same bits, never sees fold 10, and fails with one sentence."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, change_prep, run_stage, sentence, stage

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
        assert (run / "blackbox-1d").exists() == (recipe == "default")


def test_default_prototypes_start_as_real_training_windows_of_their_class(tiny_prep, tmp_path, monkeypatch):
    prep = tiny_prep()
    run = train(monkeypatch, tmp_path, "run", "--model", "morphology", "--epochs", 0)  # epoch 0 is the start
    net, _ = common.load_model(run / "morphology" / "joint.pt", "")
    z, carries, _ = common.training_set(net, prep, torch.device("cpu"))
    for j, c in enumerate(net.p_class.tolist()):
        windows = z[carries[:, c]].unfold(2, 3, 1).permute(0, 2, 1, 3).flatten(0, 1)           # [n windows, D, 3]
        assert (windows - net.p[j].detach()).abs().amax((1, 2)).min() < 1e-4


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


def test_second_round_starts_from_the_projected_prototypes(tiny_prep, tmp_path, monkeypatch):
    tiny_prep()
    run = train(monkeypatch, tmp_path, "run", "--model", "rhythm")
    with pytest.raises(SystemExit) as e:
        train(monkeypatch, tmp_path, "run", "--model", "rhythm", "--round", 2)
    assert "03_project.py" in sentence(e)
    run_stage(monkeypatch, "03_project", "--prep", tmp_path / "prep", "--run", run, "--device", "cpu")
    train(monkeypatch, tmp_path, "run", "--model", "rhythm", "--round", 2, "--epochs", 0)
    projected, second = (weights(run / "rhythm" / f"{n}.pt") for n in ("projected", "joint_r2"))
    assert torch.equal(projected["p"], second["p"])
    run_stage(monkeypatch, "03_project", "--prep", tmp_path / "prep", "--run", run, "--device", "cpu")
    assert (run / "rhythm" / "projected_r2.pt").is_file()


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


@pytest.mark.parametrize("flags, says", [
    (["--scheduler", "wild"], "--scheduler"), (["--class-weights", "perhaps"], "--class-weights"),
    (["--model", "rhythms"], "rhythms"), (["--device", "quantum"], "--device"), (["--threads", "0"], "--threads")])
def test_usage_errors(tmp_path, flags, says):
    done = subprocess.run([sys.executable, "02_train_joint.py", "--prep", str(tmp_path), *flags], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr
    assert says in done.stderr.splitlines()[-1] or "01_preprocess.py" in done.stderr


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


def test_start_from_another_data_set_or_width_is_refused(tiny_prep, tmp_path, monkeypatch):
    tiny_prep(), tiny_prep("other", seed=1)
    train(monkeypatch, tmp_path, "run", "--model", "blackbox-1d")
    for prep, flags in (("other", []), ("prep", ["--width", 16])):
        with pytest.raises(SystemExit) as e:
            train(monkeypatch, tmp_path, "run", "--model", "rhythm", *flags, prep=prep)
        assert "02_train_joint.py --model blackbox-1d" in sentence(e)


def test_resume_refuses_another_setting(tiny_prep, tmp_path, monkeypatch):
    tiny_prep()
    run = train(monkeypatch, tmp_path, "run", "--model", "blackbox-1d")
    (run / "blackbox-1d" / "joint.pt").unlink()
    with pytest.raises(SystemExit) as e:
        train(monkeypatch, tmp_path, "run", "--model", "blackbox-1d", "--resume", "--lr", 0.5)
    assert "another setting" in sentence(e)


def test_augmentation_keeps_shape_and_changes_every_record():
    x = torch.randn(16, 12, 1000, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    y = stage("02_train_joint").augment(x)
    assert y.shape == x.shape and y.isfinite().all()
    assert ((y - x).abs().amax((1, 2)) > 0.1).all()
    assert (y.abs().amax() < 1.3 * x.abs().amax() + 0.5)


def test_weighted_sampler_draws_rare_labels_more_often():
    y = torch.zeros(100, 2)
    y[:90, 0], y[90:95, 1] = 1, 1
    weight = stage("02_train_joint").record_weights(y)
    assert torch.allclose(weight[:90], torch.tensor(1 / 90)) and torch.allclose(weight[90:95], torch.tensor(1 / 5))
    assert torch.allclose(weight[95:], torch.tensor(1 / 90))  # without a label: as the commonest
