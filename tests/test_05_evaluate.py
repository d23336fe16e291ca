"""05_evaluate.py: every number against a slow reference, intervals of whole patients, and pages that say what is so."""
import html.parser
import json


import numpy as np
import pytest
import torch
from conftest import run_stage, sentence, stage, write_joint, write_prep, write_run
from hypothesis import given, strategies as st
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

import common
from common import BRANCHES, CODES, GROUPS

module = stage("05_evaluate")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of 05, which filters its own; pytest undoes that


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(module, "DRAWS", 50)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(prep, run, metrics.json) of an evaluated run of three untrained branches and two black boxes."""
    folder, monkeypatch = tmp_path_factory.mktemp("made"), pytest.MonkeyPatch()
    prep = write_prep(folder / "prep", n=200)
    for box in ("blackbox-1d", "blackbox-rhythm"):
        write_joint(folder / "run", prep, box)
    write_run(monkeypatch, folder / "run", prep)
    monkeypatch.setattr(module, "DRAWS", 50)
    evaluate(monkeypatch, folder)
    monkeypatch.undo()
    return prep, folder / "run", json.loads((folder / "run/metrics.json").read_text())


def evaluate(monkeypatch, folder, *flags, run="run"):
    run_stage(monkeypatch, "05_evaluate", "--run", folder / run, "--prep", folder / "prep", "--threads", 1, *flags)


def logits_of(run, name, prep, fold="test"):
    logits = torch.load(run / "classifiers" / f"{name}.pt", weights_only=True)["logits"].numpy()
    return logits[getattr(prep, fold)[prep.val | prep.test]]


# ---- Numbers

ROWS = st.lists(st.tuples(st.booleans(), st.integers(-3, 3), st.integers(0, 3)), min_size=2, max_size=30)


@given(ROWS)
def test_weighted_auroc_equals_a_double_loop_and_scikit_learn(rows):
    y, score, weight = (np.array(column) for column in zip(*rows))
    got = module.weighted_auroc(y, score.astype(np.float32), weight[:, None].astype(np.float32))[0]
    right = pairs = 0.0
    for i in np.flatnonzero(y):
        for j in np.flatnonzero(~y):
            pairs += weight[i] * weight[j]
            right += weight[i] * weight[j] * ((score[i] > score[j]) + 0.5 * (score[i] == score[j]))
    if pairs == 0:
        assert np.isnan(got)
    else:
        assert got == pytest.approx(right / pairs, abs=1e-12)
        assert got == pytest.approx(roc_auc_score(y, score, sample_weight=weight), abs=1e-9)


def test_bootstrap_draws_whole_patients_and_depends_on_the_seed_only():
    patients = np.array([3, 3, 5, 9, 9, 9, 11])
    w = module.patient_weights(patients, 200, 1)
    assert w.shape == (7, 201) and (w[:, 0] == 1).all()
    assert (w[0] == w[1]).all() and (w[3] == w[5]).all()
    assert (w[[0, 2, 3, 6]].sum(0) == 4).all()  # as many patients as there are
    assert (w == module.patient_weights(patients, 200, 1)).all() and (w != module.patient_weights(patients, 200, 2)).any()


def test_intervals_equal_resampling_the_records_themselves(made):
    """The slow way: records of drawn patients copied, AUROC of each class by scikit-learn, moves averaged."""
    prep, run, m = made
    rng, rows = np.random.default_rng(module.SEED), np.flatnonzero(prep.test)
    patients, s = prep.patient_ids[rows], logits_of(run, "rhythm", prep)
    own = [c for c in GROUPS["rhythm"] if prep.labels[rows][:, CODES.index(c)].any()]

    def aurocs(draw):
        each = []
        for c in common.columns(own):
            y = prep.labels[rows][draw, c]
            each.append(roc_auc_score(y, s[draw, c]) if 0 < y.sum() < len(y) else np.nan)
        return np.array(each)

    value, moves = aurocs(np.arange(len(rows))), []
    every = np.unique(patients)
    for _ in range(50):
        drawn = every[rng.integers(len(every), size=len(every))]
        draw = np.concatenate([np.flatnonzero(patients == p) for p in drawn])
        moves.append(np.nanmean(aurocs(draw) - value))
    want = [np.nanmean(value), *(np.nanmean(value) + np.percentile(moves, [2.5, 97.5]))]
    assert m["predictions"]["rhythm"]["auroc"][:3] == pytest.approx(want, abs=1e-5)


def test_macro_counts_only_classes_that_there_are():
    aurocs = np.full((3, 71), np.nan)
    aurocs[:, common.columns(["SR", "AFIB"])] = [[.8, .6], [.9, .6], [.7, np.nan]]
    assert module.macro(aurocs, GROUPS["rhythm"]) == [.7, pytest.approx(.6, abs=.01), pytest.approx(.75, abs=.01), 2, 16]
    assert module.macro(aurocs, ["IMI"])[0] is None


@pytest.mark.parametrize("name", ["fusion", "rhythm", "blackbox-1d", "macro"])
def test_the_other_numbers_equal_scikit_learn(made, name):
    prep, run, m = made
    saved = torch.load(run / "classifiers" / f"{name}.pt", weights_only=True)
    own, s, y = common.columns(saved["meta"]["classes"]), logits_of(run, name, prep), prep.labels[prep.test]
    over = s[:, own] >= saved["thresholds"].numpy()
    there = [i for i, c in enumerate(own) if y[:, c].any()]
    p = m["predictions"][name]
    assert p["f1"] == pytest.approx(np.mean([f1_score(y[:, own[i]], over[:, i]) for i in there]), abs=1e-5)
    assert p["auprc"] == pytest.approx(
        np.mean([average_precision_score(y[:, own[i]], s[:, own[i]]) for i in there]), abs=1e-5)
    assert p["auroc"][0] == pytest.approx(np.mean([roc_auc_score(y[:, own[i]], s[:, own[i]]) for i in there]), abs=1e-5)
    assert p["fold 9"] == pytest.approx(saved["meta"]["val_auroc"], abs=1e-5)
    order, parts = np.argsort(prep.ecg_ids[prep.test]), []
    for i in range(0, len(order), 32):
        rows = order[i:i + 32]
        parts.append(np.mean([roc_auc_score(y[rows, c], s[rows, c]) for c in own if 0 < y[rows, c].sum() < len(rows)]))
    assert p["per batch"] == pytest.approx(np.mean(parts), abs=1e-5)


def test_macro_aggregation_is_the_weighted_mean_of_the_branches(made):
    m = made[2]
    each = [m["predictions"][b]["auroc"] for b in BRANCHES]
    total = sum(v[0] * v[3] for v in each) / sum(v[3] for v in each)
    assert m["predictions"]["macro"]["auroc"][0] == pytest.approx(total, abs=2e-5)
    assert ": equal." in module.identity(m)
    m["predictions"]["macro"]["auroc"][0] += .001
    assert "NOT EQUAL" in module.identity(m)
    m["predictions"]["macro"]["auroc"][0] -= .001


def test_differences_are_paired(made):
    """One draw for both: a prediction and itself differ by nothing, and the value is the difference of the values."""
    m = made[2]
    rows = m["differences"]["As good as a black box? (4.3)"]
    a, b = m["per_class"]["rhythm"], m["per_class"]["blackbox-rhythm"]
    both = [c for c in a if a[c][0] is not None]
    want = np.mean([a[c][0] - b[c][0] for c in both])
    assert rows["rhythm - blackbox-rhythm"][0] == pytest.approx(want, abs=2e-5)
    assert rows["rhythm - blackbox-rhythm"][3] == len(both)
    x = np.random.default_rng(0).random((51, 71))
    assert module.macro(x - x, CODES)[:3] == [0, 0, 0]


# ---- Pages

def test_everything_is_written_and_the_same_the_second_time(made, monkeypatch, capsys):
    prep, run, m = made
    names = ["metrics.json", "results.md", "results.html", *(f"figures/{f}.png" for f in
                                                              ("per_class_auroc", "roc", "training"))]
    before = {n: (run / n).read_bytes() for n in names if n != "metrics.json"}
    evaluate(monkeypatch, run.parent)
    assert all((run / n).read_bytes() == content for n, content in before.items())
    for n in names[3:]:
        assert Image.open(run / n).size[0] > 500
    text = (run / "results.md").read_text()
    assert "Not the paper's test set" in text and "0: the start" in text
    assert capsys.readouterr().out.splitlines()[-1].endswith("results.md")


def test_the_papers_numbers_stand_beside_ours(made):
    m = made[2]
    lines = {line.split("|")[1].strip(): line for line in module.paper_table(m).splitlines()}
    assert all(n in lines["rhythm branch, 16 labels"] for n in (".8730", ".8758", module.cell(
        m["predictions"]["rhythm"]["auroc"])))
    assert all(n in lines["fusion classifier, 71"] for n in (".9010", ".9248", "not run"))
    assert "one branch, 2D partial, 71" not in lines  # a run of what it has, and no rows of what was not asked for


def test_only_the_models_asked_for(made, monkeypatch, tmp_path, capsys):
    prep, run, _ = made
    write_run(monkeypatch, tmp_path / "run", prep, models=["rhythm"])
    run_stage(monkeypatch, "05_evaluate", "--run", tmp_path / "run", "--prep", prep.path.parent)
    text = (tmp_path / "run/results.md").read_text()
    assert "morphology" not in text.split("## Label groups")[0] and "rhythm" in text


def test_against_another_run_fills_the_other_column(made, monkeypatch, tmp_path):
    prep, run, m = made
    write_run(monkeypatch, tmp_path / "plain", prep, lambda_cntrst=0.0, seed=1)
    evaluate(monkeypatch, run.parent, "--against", tmp_path / "plain")
    found = json.loads((run / "metrics.json").read_text())
    evaluate(monkeypatch, run.parent)
    rows = found["differences"]["Does the contrastive loss help? (4.2)"]
    assert "fusion - fusion of plain" in rows and found["against"] == {"plain": False}
    line = next(x for x in module.paper_table(found).splitlines() if "fusion classifier" in x)
    assert module.cell(found["predictions"]["fusion of plain"]["auroc"]) in line and "not run" not in line
    assert found["predictions"]["fusion"] == m["predictions"]["fusion"]


def test_save_keeps_what_tables_reads(made, monkeypatch, tmp_path):
    prep, run, m = made
    monkeypatch.setattr(module, "__file__", str(tmp_path / "05_evaluate.py"))
    evaluate(monkeypatch, run.parent, "--save", "mine")
    saved = json.loads((tmp_path / "tests/results/mine.json").read_text())
    assert saved["predictions"] == m["predictions"] and "per_class" not in saved


def test_another_input_is_refused_with_the_stage_to_run(made, monkeypatch, tmp_path):
    prep, run, _ = made
    write_run(monkeypatch, tmp_path / "run", prep, models=["rhythm"])
    path = tmp_path / "run/rhythm/projected.pt"
    saved = torch.load(path, weights_only=True)
    common.save(path, {**saved, "more": 1})
    with pytest.raises(SystemExit) as e:
        run_stage(monkeypatch, "05_evaluate", "--run", tmp_path / "run", "--prep", prep.path.parent)
    assert "04_fusion.py" in sentence(e)
    with pytest.raises(SystemExit) as e:
        run_stage(monkeypatch, "05_evaluate", "--run", tmp_path / "none", "--prep", prep.path.parent)
    assert "04_fusion.py" in sentence(e)


CASE = {"title": "ECG <script>alert(1)</script>", "true_labels": ["SR", "<b>"], "explained": [
    {"label": "SR", "probability": .9, "threshold": .5, "prototypes": [
        {"model": "rhythm", "index": 1, "class": "SR", "ecg_id": 10, "labels": ["SR"], "similarity": .7,
         "contribution": 1.5, "page": "7/p.png"}]}]}


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href")]


def test_results_html_holds_everything_and_runs_nothing(made, monkeypatch):
    prep, run, m = made
    (run / "cases/7").mkdir(parents=True)
    Image.new("RGB", (20, 10)).save(run / "cases/7/p.png")
    (run / "cases/7.json").write_text(json.dumps(CASE))
    evaluate(monkeypatch, run.parent)
    text = (run / "results.html").read_text()
    page = Tags()
    page.feed(text)
    assert "script" not in page.tags and page.tags.count("img") == 4 and page.tags.count("table") > 6
    assert all(link.startswith("data:image/png") for link in page.links)
    assert "alert(1)" in text and "default-src 'none'" in text
    for command in ("04_fusion.py", "03_project.py", "05_evaluate.py"):
        assert f"python {command}" in text or command == "05_evaluate.py"


def test_results_html_in_a_browser(made, browser):
    browser.get((made[1] / "results.html").as_uri())
    assert "ProtoECGNet" in browser.title and browser.get_log("browser") == []
    width = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    assert width <= 0


# ---- Table 3

def ratings(path, reviewer, scores, made="m"):
    each = {f"rhythm/{j}": {"class": "SR", "representativeness": r, "clarity": c, "mark": mark, "comment": ""}
            for j, (r, c, mark) in enumerate(scores)}
    path.write_text(json.dumps({"format": 1, "kind": "protoecgnet-ratings", "reviewer": reviewer, "run": "r",
                                "made": made, "ratings": each}))
    return path


def test_ratings_give_table_3_without_label_errors(tmp_path, capsys):
    a = ratings(tmp_path / "a.json", "A", [(5, 4, None), (3, 4, "best"), (1, 1, "label-error"), (4, None, None)])
    b = ratings(tmp_path / "b.json", "B", [(5, 5, None), (3, 4, None), (2, 2, None), (5, 3, "bad")])
    module.ratings_table([a, b])
    out = capsys.readouterr().out
    v = np.array([5, 3, 4])
    half = 1.96 * v.std(ddof=1) / 3 ** .5
    assert f"4.00 [{4 - half:.2f}, {4 + half:.2f}] of 3" in out and "4.29 [4.22, 4.35]" in out
    assert "left out, marked as label errors by a reviewer: 1" in out
    # weights (i - j)^2: observed 0 + 0 + 1, expected over all pairs of A's 5 3 4 and B's 5 3 5
    expected = np.mean([(i - j) ** 2 for i in (5, 3, 4) for j in (5, 3, 5)])
    assert f"{1 - (1 / 3) / expected:.2f} of 3" in out


@pytest.mark.parametrize("spoil", ["other prototypes", "same reviewer", "not ours", "missing"])
def test_ratings_that_cannot_be_compared_give_one_sentence(tmp_path, spoil):
    a = ratings(tmp_path / "a.json", "A", [(5, 4, None)])
    b = ratings(tmp_path / "b.json", "A" if spoil == "same reviewer" else "B", [(5, 4, None)],
                made="x" if spoil == "other prototypes" else "m")
    if spoil == "not ours":
        b.write_text('{"kind": "x"}')
    if spoil == "missing":
        b.unlink()
    with pytest.raises(SystemExit) as e:
        module.ratings_table([a, b])
    assert sentence(e)


# ---- tests/tables.py

def test_the_page_of_tables_is_what_the_saved_runs_say(monkeypatch):
    tables = stage("tables")
    page = (tables.RESULTS / "README.md").read_text()
    assert page == tables.page()
    runs = [json.loads(p.read_text()) for p in tables.RESULTS.glob("default-width32-seed4?.json")]
    values = [r["predictions"]["fusion"]["auroc"][0] for r in runs]
    cell = f"{module.number(np.mean(values))} ± {module.number(np.std(values, ddof=1))}"
    assert len(values) == 3 and cell in page
    readme = (tables.ROOT / "README.md").read_text()
    assert tables.glance(tables.load_runs()) in readme  # nothing in it is typed
