"""05_evaluate.py: every number against a slow reference, intervals of whole patients, and pages
that say what is so; tests/tables.py."""
import html.parser
import json
import sys

import numpy as np
import pytest
import torch
from conftest import arguments, run_stage, sentence, stage, write_joint, write_prep, write_run
from hypothesis import given, strategies as st
from PIL import Image
from scipy.stats import norm
from sklearn.metrics import (
    average_precision_score, cohen_kappa_score, f1_score, roc_auc_score)

import common
from common import BRANCHES, CODES, GROUPS

module = stage("05_evaluate")
# 05 ignores these warnings itself, which pytest undoes
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(module, "DRAWS", 50)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(prep, run, metrics.json) of an evaluated run: untrained branches and two black boxes."""
    folder, monkeypatch = tmp_path_factory.mktemp("made"), pytest.MonkeyPatch()
    prep = write_prep(folder / "prep", n=200)
    for box in ("blackbox-1d", "blackbox-rhythm"):
        write_joint(folder / "run", prep, box)
    write_run(monkeypatch, folder / "run", prep)
    monkeypatch.setattr(module, "DRAWS", 50)
    m = evaluate(monkeypatch, prep, folder / "run")
    monkeypatch.undo()
    return prep, folder / "run", m


def evaluate(monkeypatch, prep, run, *flags):
    """Run 05 and return what metrics.json says."""
    folders = ["--run", run, "--prep", prep.path.parent]
    run_stage(monkeypatch, "05_evaluate", *folders, "--threads", 1, *flags)
    return json.loads((run / "metrics.json").read_text())


def logits_of(run, name, prep, fold="test"):
    saved = torch.load(run / "classifiers" / f"{name}.pt", weights_only=True)
    return saved["logits"].numpy()[getattr(prep, fold)[prep.val | prep.test]]


# ---- Numbers

ROWS = st.lists(
    st.tuples(st.booleans(), st.integers(-3, 3), st.integers(0, 3)), min_size=2, max_size=30)


@given(ROWS)
def test_weighted_auroc_equals_a_double_loop_and_scikit_learn(rows):
    y, score, weight = (np.array(column) for column in zip(*rows))
    weights = weight[:, None].astype(np.float32)
    got = module.weighted_auroc(y, score.astype(np.float32), weights)[0]
    right = pairs = 0.0
    for i in np.flatnonzero(y):
        for j in np.flatnonzero(~y):
            pairs += weight[i] * weight[j]
            in_order = (score[i] > score[j]) + 0.5 * (score[i] == score[j])
            right += weight[i] * weight[j] * in_order
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
    assert (w == module.patient_weights(patients, 200, 1)).all()
    assert (w != module.patient_weights(patients, 200, 2)).any()


def test_the_draws_are_those_of_the_saved_results():
    """Every interval in tests/results is of these draws."""
    w = module.patient_weights(np.arange(2000) // 2, 3, module.SEED)
    rng = np.random.default_rng(42)
    for draw in w.T[1:]:
        assert (draw[::2] == np.bincount(rng.integers(1000, size=1000), minlength=1000)).all()


def test_intervals_equal_resampling_the_records_themselves(made):
    """The slow way: records of drawn patients are copied, AUROCs by scikit-learn."""
    prep, run, _ = made
    rng, rows = np.random.default_rng(module.SEED), np.flatnonzero(prep.test)
    patients, s, labels = prep.patient_ids[rows], logits_of(run, "rhythm", prep), prep.labels[rows]
    own = [c for c in common.columns(GROUPS["rhythm"]) if labels[:, c].any()]

    def aurocs(draw):
        each = []
        for c in own:
            y = labels[draw, c]
            each.append(roc_auc_score(y, s[draw, c]) if 0 < y.sum() < len(y) else np.nan)
        return np.array(each)

    value, draws, every = aurocs(np.arange(len(rows))), [], np.unique(patients)

    for _ in range(50):
        drawn = every[rng.integers(len(every), size=len(every))]
        draw = np.concatenate([np.flatnonzero(patients == p) for p in drawn])
        draws.append(np.nanmean(aurocs(draw)))
    ends = np.percentile(draws, [2.5, 97.5])
    weights = module.patient_weights(patients, 50, module.SEED)
    found = np.full((51, 71), np.nan)
    for c in own:
        found[:, c] = module.weighted_auroc(labels[:, c], s[:, c], weights)
    got = module.macro(found, GROUPS["rhythm"])
    assert got[:3] == pytest.approx([np.nanmean(value), *ends], abs=1e-5)


def simulated(rng, y, delta, models=2):
    """Scores [N, 71] of equally good models, alike as ours are: AUROC is norm.cdf(delta / 2^.5)."""
    alike = rng.normal(size=y.shape)
    return [y * delta + .7 ** .5 * alike + .3 ** .5 * rng.normal(size=y.shape)
            for _ in range(models)]


def drawn_aurocs(y, score, weights):
    aurocs = np.full((weights.shape[1], 71), np.nan)
    for c in np.flatnonzero(y.any(0)):
        aurocs[:, c] = module.weighted_auroc(y[:, c], score[:, c], weights)
    module.redraw_rare(aurocs, y, score)
    return aurocs


def test_rare_labels_move_as_positives_of_their_branch_do():
    rng, y = np.random.default_rng(0), np.zeros((400, 71), int)
    for c, n in zip(common.columns(["SR", "AFIB", "PSVT", "NORM"]), (90, 40, 4, 5)):
        y[rng.choice(400, n, replace=False), c] = 1
    weights = module.patient_weights(np.arange(400), 4000, 1)
    [score] = simulated(rng, y, np.full(71, 1.5), 1)
    aurocs, expected = drawn_aurocs(y, score, weights), []
    for code in ("SR", "AFIB", "PSVT"):  # the slow way
        own, s = y[:, CODES.index(code)] == 1, score[:, CODES.index(code)]
        alone = [roc_auc_score(np.append(y[~own, 0] * 0, 1), np.append(s[~own], v)) for v in s[own]]
        expected.append(np.var(alone, ddof=1))
    draws = aurocs[:, CODES.index("PSVT")]
    assert draws[1:].std() == pytest.approx((np.mean(expected) / 4) ** .5, rel=.05)
    assert draws[1:].mean() == pytest.approx(draws[0], abs=.01)
    plain = module.weighted_auroc(y[:, CODES.index("SR")], score[:, CODES.index("SR")], weights)
    assert (aurocs[:, CODES.index("SR")] == plain).all()  # not rare: its bootstrap
    assert (drawn_aurocs(y, score, weights) == aurocs)[:, y.any(0)].all()  # for all models the same


@pytest.mark.slow
def test_intervals_cover_what_they_claim():
    """With positives as on fold 10; equal models differ in one of twenty simulations."""
    rng, n = np.random.default_rng(1), np.array(POSITIVES)
    y, simulations = np.zeros((2198, 71), int), 300
    for c in range(71):
        y[rng.choice(2198, n[c], replace=False), c] = 1
    auroc = rng.uniform(.82, .99, 71)
    delta, weights = 2 ** .5 * norm.ppf(auroc), module.patient_weights(np.arange(2198), 200, 1)
    frequent = [c for c, k in zip(CODES, n) if k >= module.RARE]
    counts = {"covered": 0, "equal": 0, "frequent covered": 0, "frequent equal": 0}
    for _ in range(simulations):
        a, b = (drawn_aurocs(y, s, weights) for s in simulated(rng, y, delta))
        for what, codes in (("", CODES), ("frequent ", frequent)):
            true = auroc[[c for c in common.columns(codes) if n[c]]].mean()
            _, low, high, *_ = module.macro(a, codes)
            counts[f"{what}covered"] += low <= true <= high
            counts[f"{what}equal"] += module.answer(module.macro(a - b, codes, -1)) == "not shown"
    shares = {k: v / simulations for k, v in counts.items()}
    assert all(.92 <= share <= .98 for share in shares.values()), shares


POSITIVES = [  # of each label on fold 10
    182, 77, 18, 11, 963, 267, 234, 214, 162, 128, 112, 79, 79, 66, 54, 54, 48, 42, 35, 27, 22,
    22, 20, 18, 18, 17, 14, 13, 12, 10, 10, 9, 8, 8, 5, 4, 3, 2, 2, 2, 2, 2, 2, 1, 322, 114,
    101, 87, 55, 44, 42, 40, 34, 29, 18, 6, 3, 3, 1, 1674, 152, 82, 77, 64, 28, 14, 8, 7, 3, 2,
    2]


def test_macro_counts_only_classes_that_there_are():
    aurocs = np.full((3, 71), np.nan)
    aurocs[:, common.columns(["SR", "AFIB"])] = [[.8, .6], [.9, .6], [.7, .5]]
    value, low, high, known, codes = module.macro(aurocs, GROUPS["rhythm"])
    assert (value, known, codes) == (.7, 2, 16)
    assert [low, high] == pytest.approx(np.percentile([.75, .6], [2.5, 97.5]))
    assert module.macro(aurocs, ["IMI"])[0] is None


@given(st.lists(st.lists(st.floats(0, 1), min_size=5, max_size=5), min_size=2, max_size=2))
def test_no_interval_leaves_what_is_possible(pair):
    """AUROCs are within 0 and 1, differences within -1 and 1, also at their very ends."""
    a, b = np.full((2, 5, 71), np.nan)
    a[:, 0], b[:, 0] = pair
    for aurocs, lowest in ((a, 0), (b, 0), (a - b, -1)):
        value, low, high, *_ = module.macro(aurocs, [CODES[0]], lowest)
        assert lowest <= low <= high <= 1 and lowest <= value <= 1


@pytest.mark.parametrize("name", ["fusion", "rhythm", "blackbox-1d", "macro"])
def test_the_other_numbers_equal_scikit_learn(made, name):
    prep, run, m = made
    saved = torch.load(run / "classifiers" / f"{name}.pt", weights_only=True)
    own, s = common.columns(saved["meta"]["classes"]), logits_of(run, name, prep)
    y, over = prep.labels[prep.test], s[:, own] >= saved["thresholds"].numpy()
    f1, auprc, aurocs = [], [], []
    for i, c in enumerate(own):
        if y[:, c].any():
            f1.append(f1_score(y[:, c], over[:, i]))
            auprc.append(average_precision_score(y[:, c], s[:, c]))
            aurocs.append(roc_auc_score(y[:, c], s[:, c]))
    p = m["predictions"][name]
    got = [p["f1"], p["auprc"], p["auroc"][0], p["fold 9"]]
    want = [np.mean(f1), np.mean(auprc), np.mean(aurocs), saved["meta"]["val_auroc"]]
    assert got == pytest.approx(want, abs=1e-5)
    order, parts = np.argsort(prep.ecg_ids[prep.test]), []
    for i in range(0, len(order), 32):
        rows = order[i:i + 32]
        there = [c for c in own if 0 < y[rows, c].sum() < len(rows)]
        parts.append(np.mean([roc_auc_score(y[rows, c], s[rows, c]) for c in there]))
    assert p["per batch"] == pytest.approx(np.mean(parts), abs=1e-5)
    for c, threshold in zip(saved["meta"]["classes"], saved["thresholds"].tolist()):
        assert m["per_class"][name][c][5] == pytest.approx(threshold, abs=1e-5)


def test_macro_aggregation_is_the_weighted_mean_of_the_branches(made):
    m = json.loads(json.dumps(made[2]))
    each = [m["predictions"][b]["auroc"] for b in BRANCHES]
    total = sum(v[0] * v[3] for v in each) / sum(v[3] for v in each)
    macro = m["predictions"]["macro"]["auroc"]
    assert macro[0] == pytest.approx(total, abs=2e-5)


def test_differences_are_paired(made):
    """One draw for both: a prediction and itself differ by nothing, in no draw."""
    m = made[2]
    got = m["differences"]["As good as a black box? (4.3)"]["rhythm - blackbox-rhythm"][1]
    a, b = m["per_class"]["rhythm"], m["per_class"]["blackbox-rhythm"]
    both = [c for c in a if a[c][0] is not None]
    assert got[0] == pytest.approx(np.mean([a[c][0] - b[c][0] for c in both]), abs=2e-5)
    assert got[3] == len(both)
    x = np.random.default_rng(0).random((51, 71))
    assert module.macro(x - x, CODES, -1)[:3] == [0, 0, 0]


def test_cost_is_of_every_step_and_of_the_box_that_a_branch_starts_from(made):
    prep, run, m = made
    rows = {row["name"]: row for row in m["cost"]}
    assert set(rows) == {"fusion", "fusion-own", *BRANCHES}
    assert rows["rhythm"]["black box"] == m["predictions"]["blackbox-rhythm"]["auroc"][0]
    box, test = logits_of(run, "blackbox-1d", prep), prep.labels[prep.test]
    for name in BRANCHES:
        own = common.columns(GROUPS[name])
        for key, other in (("-joint", f"{name}-joint"), ("sparse", name)):
            want = common.macro_auroc(test[:, own], logits_of(run, other, prep)[:, own])
            assert rows[name][key] == pytest.approx(want, abs=1e-5)
        if name != "rhythm":
            want = common.macro_auroc(test[:, own], box[:, own])
            assert rows[name]["black box"] == pytest.approx(want, abs=1e-5)
    parts = [json.loads((run / b / "prototypes.json").read_text()) for b in BRANCHES]
    assert rows["fusion"]["prototypes"] == sum(len(part["prototypes"]) for part in parts)
    assert rows["fusion"]["distinct"] == sum(part["distinct"] for part in parts)


# ---- Pages

FIGURES = "per_class_auroc", "training"


def test_everything_is_written_and_the_same_the_second_time(made, monkeypatch, capsys):
    prep, run, _ = made
    names = ["metrics.json", "results.md", "results.html", *(f"figures/{f}.png" for f in FIGURES)]
    before = {n: (run / n).read_bytes() for n in names}
    evaluate(monkeypatch, prep, run)
    assert [n for n in names if (run / n).read_bytes() != before[n]] == []
    assert all(Image.open(run / f"figures/{f}.png").size[0] > 500 for f in FIGURES)
    assert capsys.readouterr().out.splitlines()[-1].endswith("results.md")
    text = (run / "results.md").read_text()
    assert "20 test\nrecords (the paper: 2,198)" in text
    assert "Stage 1 kept the start, epoch 0, of rhythm, morphology, global" in text


def test_the_papers_numbers_stand_beside_ours(made):
    m = made[2]
    table = module.paper_table(m)
    lines = {line.split("|")[1].strip(): line for line in table.splitlines()}
    ours = module.cell(m["predictions"]["rhythm"]["auroc"])
    assert all(n in lines["rhythm branch, 16 labels"] for n in (".8730", ".8758", ours))
    assert all(n in lines["fusion classifier, 71"] for n in (".9010", ".9248", "not run"))
    assert "one branch, 2D partial, 71" not in lines  # it was not run


def test_a_rhythm_run_is_about_rhythm_alone(made, monkeypatch, tmp_path):
    prep = made[0]
    write_run(monkeypatch, tmp_path / "run", prep, models=["rhythm"])
    m = evaluate(monkeypatch, prep, tmp_path / "run")
    assert list(m["predictions"]) == ["rhythm"] and list(m["shown"]) == ["rhythm"]
    text = (tmp_path / "run/results.md").read_text()
    assert "morphology" not in text and "| prediction | rhythm " in text


def test_only_the_models_asked_for(made, monkeypatch):
    prep, run, m = made
    found = evaluate(monkeypatch, prep, run, "--model", "rhythm", "blackbox-1d")
    assert list(found["predictions"]) == ["rhythm", "blackbox-1d"]
    assert found["predictions"]["rhythm"] == m["predictions"]["rhythm"]
    assert "rhythm - rhythm-unprojected" in str(found["differences"])
    with pytest.raises(SystemExit) as e:
        evaluate(monkeypatch, prep, run, "--model", "all-1d")
    assert "04_fusion.py" in sentence(e)
    evaluate(monkeypatch, prep, run)


@pytest.mark.parametrize("seed, fills", [(0, True), (1, False)])
def test_against_a_run_without_contrastive_loss_fills_its_column(
        made, monkeypatch, tmp_path, seed, fills):
    """But only if the loss is all that the runs differ in."""
    prep, run, m = made
    write_run(monkeypatch, tmp_path / "plain", prep, lambda_cntrst=0.0, seed=seed)
    found = evaluate(monkeypatch, prep, run, "--against", tmp_path / "plain")
    question = "Does the contrastive loss help? (4.2)" if fills else "Against plain"
    assert "fusion - fusion of plain" in found["differences"][question]
    assert found["against"] == ({"plain": False} if fills else {})
    lines = module.paper_table(found).splitlines()
    line = next(line for line in lines if "fusion classifier" in line)
    theirs = module.cell(found["predictions"]["fusion of plain"]["auroc"])
    assert line.split("|")[3].strip() == (theirs if fills else "not run")
    assert found["predictions"]["fusion"] == m["predictions"]["fusion"]
    assert module.report(found).count("fusion of plain") >= 2
    evaluate(monkeypatch, prep, run)


def test_tables_keep_a_run_and_what_was_measured_of_it(made, monkeypatch, tmp_path):
    prep, run, m = made
    tables = stage("tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["tables.py", "--keep", str(run), "mine"])
    common.save(tmp_path / "mine.json", {"interpretability": {}, "predictions": "old"})
    tables.main()
    saved = json.loads((tmp_path / "mine.json").read_text())
    assert saved["predictions"] == m["predictions"] and "per_class" not in saved
    assert saved["interpretability"] == {}
    page = tables.page()
    assert "Default recipe, width 32 (width 16, latent_dim 16, per_class [2, 3, 2])" in page
    assert module.cell(m["predictions"]["fusion"]["auroc"]) in page


def test_tables_show_a_seed_that_was_trained_twice(made, monkeypatch, tmp_path):
    prep, run, m = made
    tables = stage("tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    tables.keep(run, "mine")
    assert tables.again_section(tables.load_runs()) == []
    tables.keep(run, "again/mine")
    rows = tables.again_section(tables.load_runs())[-1].splitlines()[2:]
    assert len(tables.load_runs()) == 1 and len(rows) == 2 and rows[0] == rows[1]
    assert tables.number(m["predictions"]["fusion"]["auroc"][0]) in rows[0]


def test_another_input_is_refused_with_the_stage_to_run(made, monkeypatch, tmp_path):
    prep, run, _ = made
    write_run(monkeypatch, tmp_path / "run", prep, models=["rhythm"])
    path = tmp_path / "run/rhythm/projected.pt"
    common.save(path, {**torch.load(path, weights_only=True), "more": 1})
    for folder in (tmp_path / "run", tmp_path / "none"):
        with pytest.raises(SystemExit) as e:
            evaluate(monkeypatch, prep, folder)
        assert "04_fusion.py" in sentence(e)


# ---- results.html

def write_case(run, prep):
    """A case as 06 writes it."""
    path = run / "classifiers/fusion.pt"
    meta = torch.load(path, weights_only=True)["meta"]
    common.save(run / "cases/7.json", {
        **common.provenance(arguments(run, prep.path.parent), (path, meta))})
    common.save(run / "cases/7.html", "<style>svg { x: 0 }</style><svg><text>SR!</text></svg>")


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href")]
        assert not any(k.startswith("on") for k, _ in attrs)


def test_results_html_holds_everything_and_runs_nothing(made, monkeypatch):
    prep, run, _ = made
    assert "None yet: run 06_plot_prototypes.py" in (run / "results.html").read_text()
    write_case(run, prep)
    m = evaluate(monkeypatch, prep, run)
    text, page = (run / "results.html").read_text(), Tags()
    page.feed(text)
    assert not {"script", "b", "a", "iframe", "object"} & set(page.tags)
    assert page.tags.count("img") == 2 and page.tags.count("table") > 6
    assert all(link.startswith("data:image/png") for link in page.links)
    assert "<svg><text>SR!</text></svg>" in text and "default-src 'none'" in text
    assert [c.split()[1] for c in m["commands"]][-2:] == ["03_project.py", "04_fusion.py"]
    assert all(f"python {c.split()[1]}" in text for c in m["commands"])


def test_a_case_of_another_model_is_left_out(made, monkeypatch):
    prep, run, _ = made
    path = run / "cases/7.json"
    case = json.loads(path.read_text())
    common.save(path, {**case, "made_from": {"rhythm/projected.pt": "0" * 16}})
    evaluate(monkeypatch, prep, run)
    text = (run / "results.html").read_text()
    assert "delete it, run 06_plot_prototypes.py again" in text and "SR!" not in text
    common.save(path, case)
    evaluate(monkeypatch, prep, run)


@pytest.mark.parametrize("width", [1280, 390])
def test_results_html_in_a_browser(made, browser, width):
    browser.set_window_size(width, 900)
    browser.get((made[1] / "results.html").as_uri())
    assert "ProtoECGNet" in browser.title and browser.get_log("browser") == []
    script = "return document.documentElement.scrollWidth - window.innerWidth"
    assert browser.execute_script(script) <= 0
    loaded = "return [...document.images].every(image => image.naturalWidth > 0)"
    assert browser.execute_script(loaded)


# ---- Table 3

def ratings(path, reviewer, scores, made="m"):
    each = {}  # as a form has it: what is not rated is missing
    for j, (r, c, mark) in enumerate(scores):
        rated = {k: str(v) for k, v in (("representativeness", r), ("clarity", c)) if v}
        each[f"rhythm/{j}"] = {"class": "SR", **rated, "mark": mark or "", "comment": ""}
    value = {"kind": "protoecgnet-ratings", "reviewer": reviewer, "run": "r",
             "made": [made], "ratings": each}
    path.write_text(json.dumps(value))
    return path


def test_ratings_give_table_3_without_label_errors(tmp_path, capsys):
    a = [(5, 4, None), (3, 4, "best"), (1, 1, "label-error"), (4, None, None)]
    b = [(5, 5, None), (3, 4, None), (2, 2, None), (5, 3, "bad"), (1, 1, None)]
    files = ratings(tmp_path / "a.json", "A", a), ratings(tmp_path / "b.json", "B", b)
    module.ratings_table(files)
    out = capsys.readouterr().out
    half = 1.96 * np.std([5, 3, 4], ddof=1) / 3 ** .5
    assert f"4.00 [{4 - half:.2f}, {4 + half:.2f}] of 3" in out and "4.29 [4.22, 4.35]" in out
    assert "left out, marked as label errors by a reviewer: 1" in out
    # weights (i - j)^2: observed 0 + 0 + 1, expected over all pairs of A's 5 3 4 and B's 5 3 5
    expected = np.mean([(i - j) ** 2 for i in (5, 3, 4) for j in (5, 3, 5)])
    kappa = 1 - (1 / 3) / expected
    assert f"{kappa:.2f} of 3" in out
    assert kappa == pytest.approx(cohen_kappa_score([5, 3, 4], [5, 3, 5], weights="quadratic"))


def test_reviewers_who_rated_nothing_in_common_have_means_but_no_kappa(tmp_path, capsys):
    module.ratings_table([ratings(tmp_path / "a.json", "A", [(5, 4, None), (3, 4, None)]),
                          ratings(tmp_path / "b.json", "B", [(None, 2, "label-error")] * 2
                                  + [(2, 1, None), (4, 2, None)])])
    out = capsys.readouterr().out
    assert "nan of 0" in out and "3.00 [" in out


@pytest.mark.parametrize("spoil", ["other prototypes", "same reviewer", '{"kind": "x"}', "[1]", "x"])
def test_ratings_that_cannot_be_compared_give_one_sentence(tmp_path, spoil):
    reviewer = "A" if spoil == "same reviewer" else "B"
    a = ratings(tmp_path / "a.json", "A", [(5, 4, None), (3, 3, None)])
    b = ratings(tmp_path / "b.json", reviewer, [(5, 4, None)],
                made="x" if spoil == "other prototypes" else "m")
    if " " not in spoil or spoil[0] == "{":
        b.write_text(spoil)
    with pytest.raises(SystemExit) as e:
        module.ratings_table([a, b])
    assert sentence(e)


# ---- tests/tables.py

tables = stage("tables")


def test_the_page_of_tables_is_what_the_saved_runs_say():
    page = (tables.RESULTS / "README.md").read_text()
    assert page == tables.page()
    files = sorted(tables.RESULTS.glob("default-seed4?.json"))
    runs = [json.loads(path.read_text()) for path in files]
    values = [r["predictions"]["fusion"]["auroc"][0] for r in runs]
    want = module.number(np.mean(values))
    if len(values) > 1:
        want = f"{want} ± {module.number(np.std(values, ddof=1))} ({len(values)} seeds)"
    assert want in page


def test_the_readmes_table_is_generated():
    readme = (tables.ROOT / "README.md").read_text()
    lines = tables.glance(tables.load_runs()).splitlines()
    assert len(lines) == 9 and all(line.count("|") == 7 for line in lines)
    assert [line for line in lines if line not in readme] == []


def test_a_cell_pools_seeds_and_counts_each_once():
    def run(seed, value, contrastive=True):
        p = {"auroc": [value, value - .1, value + .1, 16, 16], "per batch": value}
        return {"seed": seed, "contrastive": contrastive, "predictions": {"rhythm": p}}

    runs = [run(1, .8), run(2, .9), run(2, .9, False)]
    want = ".8500 ± .0707 (2 seeds) [.7500, .9500]"
    assert tables.pooled(runs, "rhythm", True) == want == tables.pooled(runs, "rhythm")
    assert tables.pooled(runs, "rhythm", False) == ".9000 [.8000, 1.0000] (seed 2)"
    assert tables.pooled(runs, "rhythm", True, "per batch", note=False) == ".8500 ± .0707"
    assert tables.pooled(runs, "global") == "not run"


@pytest.mark.parametrize("v, want", [
    ([.02, .01, .03], "yes"), ([-.02, -.03, -.01], "no, the second"),
    ([0, -.01, .02], "not shown"), ([None, None, None], "not shown")])
def test_answers(v, want):
    assert module.answer(v) == want
