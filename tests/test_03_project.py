"""03_project.py: prototypes become real windows of their class, and every file says the same."""
import itertools
import json

import numpy as np
import pytest
import torch
from conftest import arguments, random32, run_stage, stage, training_latents, write_joint

import common

stage03 = stage("03_project")


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
    found, x = described(folder), common.load(folder / "prototypes.npy.gz", "")
    z, rows = training_latents(net, prep)
    assert x.dtype == np.int16 and len(x) == len(found["prototypes"]) == len(net.p)
    windows = z.double().unfold(2, net.p.shape[2], 1).transpose(1, 2).flatten(2)  # [N, ., D T]
    for j, q in enumerate(found["prototypes"]):
        c = int(net.p_class[j])
        p = before.p[j].detach().double().flatten()
        cosine = torch.nn.functional.cosine_similarity(windows, p, dim=2)  # [N, windows]
        cosine[prep.labels[rows][:, common.CODES.index(net.classes[c])] == 0] = -2
        i, window = divmod(int(cosine.argmax()), cosine.shape[1])
        assert (q["ecg_id"], q["window"]) == (prep.ecg_ids[rows[i]], window)
        assert torch.equal(net.p[j].detach(), z[i, :, window:window + net.p.shape[2]])
        assert q["similarity"] == pytest.approx(float(cosine.max()), abs=2e-6)

        assert (q["index"], q["class"]) == (j, net.classes[c])
        labels = prep.labels[prep.row_of[q["ecg_id"]]]
        assert q["labels"] == [code for code, on in zip(common.CODES, labels) if on]
        assert tuple(q["samples"]) == common.window_samples(net.kind, q["window"])
        assert q["patient"] == net.p_patient[j] == prep.patient_ids[rows[i]]
        assert np.abs(x[j] - 1000 * prep.signals[rows[i]]).max() <= 0.51  # microvolt, rounded
    places = {(q["class"], q["ecg_id"], q["window"]) for q in found["prototypes"]}
    gaps = [1 - q["similarity"] for q in found["prototypes"]]
    assert found["distinct"] == len(places)
    assert found["gap"] == pytest.approx(np.mean(gaps))
    assert {(q["kind"], q["model"]) for q in found["prototypes"]} == {(net.kind, model)}


def test_p_joint_is_what_was_projected(tiny_prep, project, capsys):
    folder = project(tiny_prep())
    projected = torch.load(folder / "projected.pt", weights_only=True)
    for p, name in ((projected["p_joint"], "joint"), (projected["state"]["p"], "projected")):
        net, meta = loaded(folder, name)
        assert torch.equal(net.p, p)
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


# ---- Eq. (8)

def brute_force(z, carries, p, p_class, unique=False):
    """Eq. (8) written out in float64; values within 1e-5 are equal."""
    z, p, p_class, T = z.double().numpy(), p.double().numpy(), p_class.tolist(), p.shape[2]
    table, taken, found = [[] for _ in p], [], [None] * len(p)
    for j, c in enumerate(p_class):
        for r in np.flatnonzero(carries[:, c]):
            for t in range(z.shape[2] - T + 1):
                patch = z[r, :, t:t + T]
                cosine = (patch * p[j]).sum() / np.linalg.norm(patch) / np.linalg.norm(p[j])
                table[j].append((-round(cosine, 5), int(r), t, cosine))
        table[j].sort()  # best first, then by row, then by window
    for j in sorted(range(len(p)), key=lambda j: (table[j][0][0], j)):
        def taken_by(row):  # how many prototypes of the class have a place within two steps
            return sum((c, r) == (p_class[j], row[1]) and abs(w - row[2]) <= 2 for c, r, w in taken)

        choice = min(table[j], key=lambda row: (taken_by(row) if unique else 0, row))
        taken.append((p_class[j], *choice[1:3]))
        found[j] = choice[1:]
    return found


def same_found(found, want):
    assert [f[:2] for f in found] == [f[:2] for f in want]
    np.testing.assert_allclose([f[2] for f in found], [f[2] for f in want], atol=1e-5)


def planted(n, D, L, T, per_class, seed=0):
    """(z, carries, p, p_class): latents where four windows hold each prototype exactly, so
    ties at cosine 1, some of them in records that do not carry the class."""
    rng, C = np.random.default_rng(seed), len(per_class)
    p_class = torch.repeat_interleave(torch.arange(C), torch.tensor(per_class))
    p, z = random32(len(p_class), D, T, seed=seed), random32(n, D, L, seed=seed + 100)
    carries = rng.random((n, C)) < 0.6
    carries[:5] = True
    for j in range(len(p)):
        for r, t in zip(rng.integers(n, size=4), rng.integers(L - T + 1, size=4)):
            z[r, :, t:t + T] = p[j]
    return z, carries, p, p_class


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("D, L, T", [(4, 6, 3), (6, 1, 1), (3, 5, 5)])
def test_projection_equals_brute_force_with_ties(D, L, T, unique):
    for seed in range(5):
        case = z, carries, p, p_class = planted(12, D, L, T, (4, 3), seed)
        projected, found = stage03.project(*case, unique)
        same_found(found, brute_force(*case, unique))
        for j, (record, window, _) in enumerate(found):
            assert carries[record, p_class[j]]
            patch = z[record, :, window:window + T]
            assert torch.equal(projected[j], patch)  # exactly a patch, nothing averaged


def test_ties_go_to_the_lowest_ecg_id_then_the_earliest_window():
    z, p = random32(5, 4, 8, seed=1), random32(2, 4, 3, seed=2)
    for record, window in ((4, 0), (2, 5), (2, 1), (3, 0)):
        z[record, :, window:window + 3] = p[0]
    carries = np.array([[1, 1, 0]] * 4 + [[1, 0, 1]], bool)  # the last class has one record
    _, found = stage03.project(z, carries, p, torch.tensor([0, 2]))
    assert found[0][:2] == (2, 1) and found[1][0] == 4


def test_unique_keeps_prototypes_of_a_class_two_steps_apart():
    z, carries, p, _ = planted(8, 4, 9, 3, (1, 1))
    p, p_class = torch.cat([p[:1] + 0.01 * random32(8, 4, 3), p[:1]]), torch.tensor([0] * 8 + [1])
    for unique in (False, True):
        found = stage03.project(z, carries, p, p_class, unique)[1]
        same_found(found, brute_force(z, carries, p, p_class, unique))
        near = [a[0] == b[0] and abs(a[1] - b[1]) <= 2 for a, b in itertools.combinations(found[:8], 2)]
        assert any(near) != unique and found[8][:2] in [f[:2] for f in found[:8]]
    few = np.zeros_like(carries)
    few[3] = True  # one record has two places, so some are shared
    found = stage03.project(z, few, p, p_class, True)[1]
    same_found(found, brute_force(z, few, p, p_class, True))
    assert {f[0] for f in found} == {3}
