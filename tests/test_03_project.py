"""03_project.py: prototypes become real windows of their class, and every file says the same."""
import json

import numpy as np
import pytest
import torch
from conftest import CPU, arguments, run_stage, write_joint

import common


@pytest.fixture
def project(monkeypatch, tmp_path):
    """project(prep, model, run, change, **settings): 03 on an untrained model; its folder.

    `change` is called with the state before.
    """
    def run_03(prep, model="rhythm", run="run", change=None, **settings):
        path = write_joint(tmp_path / run, prep, model, **settings)
        if change:
            saved = torch.load(path, weights_only=True)
            change(saved["state"])
            common.save(path, saved)
        run_stage(monkeypatch, "03_project", "--run", tmp_path / run, "--prep", prep.path.parent,
                  "--device", "cpu")
        return path.parent
    return run_03


def loaded(folder, name):
    return common.load_model(folder / f"{name}.pt", "", arguments(folder.parent))


def described(folder):
    return json.loads((folder / "prototypes.json").read_text())


@pytest.mark.parametrize("model", common.BRANCHES)
def test_prototypes_are_real_windows_of_their_class_in_folds_1_to_8(tiny_prep, project, model):
    """Eq. (8) by a slow search in float64, and what prototypes.json and .npy say of it."""
    prep = tiny_prep()
    folder = project(prep, model, unique=False)
    (before, _), (net, _) = loaded(folder, "joint"), loaded(folder, "projected")
    found, x = described(folder), np.load(folder / "prototypes.npy")
    z, carries, rows = common.training_set(net, prep, CPU)
    assert prep.train[rows].all() and (np.diff(prep.ecg_ids[rows]) > 0).all()
    assert x.dtype == np.int16 and len(x) == len(found["prototypes"]) == len(net.p)
    windows = z.double().unfold(2, net.p.shape[2], 1).transpose(1, 2).flatten(2)  # [N, ., D T]
    for j, q in enumerate(found["prototypes"]):
        c = int(net.p_class[j])
        p = before.p[j].detach().double().flatten()
        cosine = torch.nn.functional.cosine_similarity(windows, p, dim=2)  # [N, windows]
        cosine[~torch.from_numpy(carries[:, c])] = -2
        i, window = divmod(int(cosine.argmax()), cosine.shape[1])
        assert (q["ecg_id"], q["window"]) == (prep.ecg_ids[rows[i]], window)
        assert torch.equal(net.p[j].detach(), z[i, :, window:window + net.p.shape[2]])
        assert q["similarity"] == pytest.approx(float(cosine.max()), abs=2e-6)

        best = cosine.amax(1).tolist()  # of each record
        order = [k for k in np.argsort(-np.array(best), kind="stable") if k != i][:3]
        assert [r["ecg_id"] for r in q["runners_up"]] == prep.ecg_ids[rows[order]].tolist()
        assert (q["index"], q["class"]) == (j, net.classes[c])
        for place in (q, *q["runners_up"]):
            labels = prep.labels[prep.row_of[place["ecg_id"]]]
            assert place["labels"] == [code for code, on in zip(common.CODES, labels) if on]
            assert tuple(place["samples"]) == common.window_samples(net.kind, place["window"])
        assert net.p_patient[j] == prep.patient_ids[rows[i]]
        assert np.abs(x[j] - 1000 * prep.signals[rows[i]]).max() <= 0.51  # microvolt, rounded
    places = {(q["class"], q["ecg_id"], q["window"]) for q in found["prototypes"]}
    gaps = [1 - q["similarity"] for q in found["prototypes"]]
    assert (found["distinct"], found["records"]) == (len(places), len({e for _, e, _ in places}))
    assert found["gap"] == pytest.approx(np.mean(gaps))
    assert (found["kind"], found["a"], found["top_k"]) == (net.kind, net.a, net.top_k)


def test_p_joint_and_fold_9_before_and_after(tiny_prep, project, capsys):
    prep = tiny_prep()
    folder = project(prep)
    projected = torch.load(folder / "projected.pt", weights_only=True)
    for when, name in (("before", "joint"), ("after", "projected")):
        net, meta = loaded(folder, name)
        p = {"joint": projected["p_joint"], "projected": projected["state"]["p"]}[name]
        assert torch.equal(net.p, p)
        val, own = np.flatnonzero(prep.val), common.columns(net.classes)
        logits = common.batched(net, prep, val, CPU)
        auroc = common.macro_auroc(prep.labels[val][:, own], logits)
        assert described(folder)[f"val_auroc_{when}"] == pytest.approx(auroc)
    assert not torch.equal(projected["p_joint"], projected["state"]["p"])
    assert list(meta["made_from"]) == ["preprocess.json", "rhythm/joint.pt"]
    assert capsys.readouterr().out.splitlines()[-1].endswith("projected rhythm")


@pytest.mark.parametrize("unique, records", [(True, 2), (False, 1)])
def test_whether_windows_may_repeat_is_a_setting(tiny_prep, project, unique, records):
    def two_alike(state):
        state["p"][1] = state["p"][0]  # of one class

    folder = project(tiny_prep(), change=two_alike, unique=unique)
    first, second, *_ = described(folder)["prototypes"]
    assert first["class"] == second["class"]
    assert len({first["ecg_id"], second["ecg_id"]}) == records


def test_whether_own_patients_count_is_a_setting(tiny_prep, project):
    net, _ = loaded(project(tiny_prep(), own_patient=True), "projected")
    assert (net.p_patient == -1).all()


def test_the_order_of_records_does_not_matter(tiny_prep, project):
    found = []
    for name, order in (("a", None), ("b", np.random.default_rng(5).permutation(60))):
        folder = project(tiny_prep(name, order=order), "morphology", run=name)
        found.append([(q["ecg_id"], q["window"]) for q in described(folder)["prototypes"]])
    assert found[0] == found[1]


def test_a_recipe_of_two_rounds_says_what_comes_next(tiny_prep, project, capsys):
    project(tiny_prep(), rounds=2)
    assert "02_train_joint.py --round 2" in capsys.readouterr().out
