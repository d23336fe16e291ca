"""03_project.py: prototypes become real windows of their class, and every file says the same of them."""
import json

import numpy as np
import pytest
import torch
from conftest import CPU, arguments, run_stage, write_joint

import common


def project(monkeypatch, tmp_path, prep, *models, **settings):
    for model in models:
        write_joint(tmp_path / "run", prep, model, **settings)
    run_stage(monkeypatch, "03_project", "--run", tmp_path / "run", "--prep", prep.path.parent, "--device", "cpu")
    return tmp_path / "run"


def prototypes_of(run, model):
    return json.loads((run / model / "prototypes.json").read_text())


@pytest.mark.parametrize("model", common.BRANCHES)
def test_prototypes_are_real_windows_of_their_class_in_folds_1_to_8(tiny_prep, tmp_path, monkeypatch, model):
    prep = tiny_prep()
    run = project(monkeypatch, tmp_path, prep, model)
    net, meta = common.load_model(run / model / "projected.pt", "", arguments(run))
    found = prototypes_of(run, model)
    z, carries, rows = common.training_set(net, prep, CPU)
    order = prep.ecg_ids[rows].tolist()
    x = np.load(run / model / "prototypes.npy")
    assert x.dtype == np.int16 and len(x) == len(found["prototypes"]) == len(net.p)
    for j, q in enumerate(found["prototypes"]):
        row, i = prep.row_of[q["ecg_id"]], order.index(q["ecg_id"])
        assert prep.train[row] and q["class"] == net.classes[net.p_class[j]] in q["labels"] and q["index"] == j
        assert q["labels"] == [c for c, on in zip(common.CODES, prep.labels[row]) if on]
        assert torch.equal(net.p[j].detach(), z[i, :, q["window"]:q["window"] + net.p.shape[2]])
        assert tuple(q["samples"]) == common.window_samples(net.kind, q["window"])
        assert net.p_patient[j] == prep.patient_ids[row]
        assert np.abs(x[j] - 1000 * prep.signals[row]).max() <= 0.51  # microvolt, rounded
        assert len(q["runners_up"]) == 3 and q["ecg_id"] not in [r["ecg_id"] for r in q["runners_up"]]
        assert all(q["class"] in r["labels"] for r in q["runners_up"])
    assert found["descriptions"] == prep.info["descriptions"] and found["kind"] == net.kind
    assert found["gap"] == pytest.approx(np.mean([1 - q["similarity"] for q in found["prototypes"]]))
    assert found["distinct"] == len({(q["class"], q["ecg_id"], q["window"]) for q in found["prototypes"]})


def test_p_joint_and_fold_9_before_and_after(tiny_prep, tmp_path, monkeypatch, capsys):
    prep = tiny_prep()
    run = project(monkeypatch, tmp_path, prep, "rhythm")
    joint, projected = (torch.load(run / "rhythm" / f"{n}.pt", weights_only=True) for n in ("joint", "projected"))
    assert torch.equal(projected["p_joint"], joint["state"]["p"])
    assert not torch.equal(projected["p_joint"], projected["state"]["p"])
    for when, name in (("before", "joint"), ("after", "projected")):
        net, _ = common.load_model(run / "rhythm" / f"{name}.pt", "", arguments(run))
        logits = common.batched(lambda x: net(x)[0], prep, np.flatnonzero(prep.val), CPU)
        y = prep.labels[prep.val][:, common.columns(net.classes)]
        assert prototypes_of(run, "rhythm")[f"val_auroc_{when}"] == pytest.approx(common.macro_auroc(y, logits))
    assert capsys.readouterr().out.splitlines()[-1].endswith("projected rhythm")


@pytest.mark.parametrize("unique, windows", [(True, 2), (False, 1)])
def test_whether_windows_may_repeat_is_a_setting(tiny_prep, tmp_path, monkeypatch, unique, windows):
    prep = tiny_prep()
    path = write_joint(tmp_path / "run", prep, "rhythm", unique=unique)
    saved = torch.load(path, weights_only=True)
    saved["state"]["p"][1] = saved["state"]["p"][0]  # two alike, of one class
    common.save(path, saved)
    run_stage(monkeypatch, "03_project", "--run", tmp_path / "run", "--prep", tmp_path / "prep", "--device", "cpu")
    first, second = prototypes_of(tmp_path / "run", "rhythm")["prototypes"][:2]
    assert first["class"] == second["class"] and len({q["ecg_id"] for q in (first, second)}) == windows


def test_the_order_of_records_does_not_matter(tmp_path, monkeypatch, tiny_prep):
    found = []
    for name, order in (("a", None), ("b", np.random.default_rng(5).permutation(60))):
        prep = tiny_prep(name, order=order)
        run = project(monkeypatch, tmp_path / name, prep, "morphology")
        found.append([(q["ecg_id"], q["window"]) for q in prototypes_of(run, "morphology")["prototypes"]])
    assert found[0] == found[1]


def test_a_recipe_of_two_rounds_says_what_comes_next(tiny_prep, tmp_path, monkeypatch, capsys):
    project(monkeypatch, tmp_path, tiny_prep(), "rhythm", rounds=2)
    assert "02_train_joint.py --round 2" in capsys.readouterr().out
