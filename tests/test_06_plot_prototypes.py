"""06_plot_prototypes.py: true millimetres, the highlighted place, sums that add up to the logit, a user's own records,
hostile text, and the review page in a real browser (Chromium, chromedriver, selenium; skipped where they are not)."""
import base64
import html.parser
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import wfdb
from hypothesis import given, strategies as st
from PIL import Image

import common
from common import BRANCHES, CODES, LEADS, SAMPLES
from conftest import ROOT, run_stage, sentence, stage, write_joint, write_prep

plot = stage("06_plot_prototypes")
HOSTILE = "</script><img src=x onerror=alert(1)> $\\frac{x$ \"&' <!--"


def heartbeats(fs=100, seconds=10.0, seed=0):
    """A made-up ECG [12, n] mV: beats whose height differs between leads, smooth enough for any rate from 100 Hz."""
    t = np.arange(int(round(fs * seconds))) / fs
    beat = sum(h * np.exp(-((t[:, None] - np.arange(0.6, 600, 0.8) - d) / w) ** 2).sum(1)
               for h, d, w in ((0.15, -0.16, 0.03), (1.2, 0, 0.03), (0.3, 0.25, 0.06)))
    return np.array([1, 1.2, 0.2, -1.1, 0.4, 0.7, -0.8, -1.4, 0.3, 1.3, 1.1, 0.9])[:, None] * beat


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A PREP with hostile text in it and a RUN that 03 and 04 made from untrained networks of width 8."""
    base = tmp_path_factory.mktemp("six")
    prep = write_prep(base / "prep")
    info = common.load_json(prep.path, "x")
    info["descriptions"] = {c: f"words of {c}" for c in CODES} | {"IMI": HOSTILE, "LVH": "left $$ & <b>large</b> " * 9}
    common.save_json(prep.path, info)
    prep = common.load_prep(base / "prep")
    with pytest.MonkeyPatch.context() as patch:
        for seed, model in enumerate(BRANCHES):
            write_joint(base / "run", prep, model, seed, top_k=3)
        for name in ("03_project", "04_fusion"):
            run_stage(patch, name, "--prep", base / "prep", "--run", base / "run")
    return SimpleNamespace(prep=prep, run=base / "run", args=["--prep", base / "prep", "--run", base / "run"],
                           words={c: f"{info['descriptions'][c]} ({c})" for c in CODES})


def namespace(made, **more):
    return SimpleNamespace(**{"run": made.run, "prep": made.prep.path.parent, "model": None, "force": False,
                              "label": None, "device": "cpu", "threads": 1, "record": None, "top": 3, **more})


# ---------------------------------------------------------------------------------------------------------------------
# Layout

def test_ten_seconds_are_250_mm_and_a_millivolt_10_mm():
    x = heartbeats()
    scene = plot.clinical(x, "global")
    x0, step, y = scene["traces"][-1]                                                       # the rhythm strip
    assert step * SAMPLES == 250 and plot.x_mm(SAMPLES) - plot.x_mm(0) == 250 and len(y) == SAMPLES
    assert np.allclose(y - y[0], -10 * (x[1] - x[1, 0]))
    assert np.ptp(plot.PULSE[:, 1]) == 10 and plot.PULSE[3, 0] - plot.PULSE[2, 0] == 5      # 1 mV, 0.2 s
    fig, ax = plot.sheet(297, 210)
    assert np.allclose(fig.get_size_inches() * 25.4, (297, 210))
    fig.canvas.draw()
    inches = ax.transData.transform([(plot.x_mm(SAMPLES), 0), (plot.x_mm(0), 10)]) / fig.dpi
    assert np.allclose((inches[0] - inches[1]) * 25.4, (250, 10))                           # as drawn


def test_every_lead_stands_in_its_place():
    x = np.random.default_rng(0).normal(size=(12, SAMPLES)) * 0.3
    scene = plot.clinical(x, "global")
    for k, (x0, step, y) in enumerate(scene["traces"][:12]):
        row, column = divmod(k, 4)
        lead, first = 3 * column + row, 250 * column                                        # I II III | aVR ...
        assert x0 == plot.x_mm(first) == 15 + 62.5 * column
        assert np.allclose(y - y[0], -10 * (x[lead, first:first + 250] - x[lead, first]))
        near = [t for tx, ty, _, t in scene["texts"] if abs(tx - x0) < 2 and 0 < y[:44].min() - ty < 3]
        assert near == [plot.NAMES[lead]]
    assert plot.NAMES[3:6] == ["aVR", "aVL", "aVF"]
    assert any("25 mm/s" in t and "10 mm/mV" in t for *_, t in scene["texts"])
    assert len([p for p in scene["paths"] if len(p) == 6]) == 4                             # a pulse before each row


@given(window=st.integers(0, 29), others=st.lists(st.integers(0, 29), max_size=4))
def test_highlight_and_cutout_are_the_saved_samples(window, others):
    x = np.random.default_rng(window).normal(size=(12, SAMPLES)) * 0.2
    first, end = common.window_samples("partial", window)
    scene = plot.clinical(x, "partial", (first, end), [common.window_samples("partial", w) for w in others])
    *outlines, (left, top, width, height, filled) = scene["boxes"]
    assert filled and (left, left + width) == pytest.approx((15 + first / 4, 15 + end / 4))
    assert [o[0] for o in outlines] == pytest.approx([15 + common.window_samples("partial", w)[0] / 4 for w in others])
    assert not any(o[4] for o in outlines)
    strip = scene["traces"][-1][2]
    assert top <= scene["traces"][0][2].min() + 2 and top + height >= strip.max() - 2      # over rows and strip
    cut, = plot.cutouts([(x, (first, end))])
    gain = float(cut["texts"][0][3].split()[-2])
    assert gain in (5, 10) and f"{first / 100:.2f} to {end / 100:.2f} s" in cut["texts"][0][3]
    for k, (x0, step, y) in enumerate(cut["traces"]):
        assert step == 0.5 and np.allclose(y - y[0], -gain * (x[k, first:end] - x[k, first]))


def test_cutouts_and_strips_are_true_to_scale_and_named():
    rng = np.random.default_rng(3)
    for height, gain in ((0.2, 10), (2.0, 5)):                                              # where leads would not fit
        parts = [(rng.normal(size=(12, SAMPLES)) * height, at) for at in ((100, 194), (906, 1000))]
        for cut, (x, (first, end)) in zip(plot.cutouts(parts), parts):
            pulse, = cut["paths"]
            assert f"{gain} mm/mV" in cut["texts"][0][3] and np.ptp(np.array(pulse)[:, 1]) == pytest.approx(gain)
            for k, ((left, step, y), (x_text, y_text, _, name)) in enumerate(zip(cut["traces"], cut["texts"][1:])):
                assert name == plot.NAMES[k] and np.allclose(np.diff(y), -gain * np.diff(x[k, first:end]))
                assert x_text == left - 10 == 15 + 62.5 * (k // 3)                          # I II III | aVR ...
                assert y_text - 1.4 == pytest.approx((y.max() + y.min()) / 2)               # beside its lead
            heights = [y.mean() for _, _, y in cut["traces"][:3]]
            assert heights == sorted(heights)
    x, other = rng.normal(size=(2, 12, SAMPLES)) * 0.2
    scene = plot.strips([("this", x), ("that", other)])
    assert [text for *_, text in scene["texts"][:2]] == ["this", "that"]
    for (_, step, y), wanted in zip(scene["traces"], (x, other)):
        assert step == 0.5 and np.allclose(np.diff(y), -10 * np.diff(wanted[1]))
    assert all(np.ptp(np.array(path)[:, 1]) == 10 and np.ptp(np.array(path)[2:4, 0]) == 10 for path in scene["paths"])


def drawn(ax, number=0):
    """The traces [n, 2] in mm of the scene that draw() put on a sheet as its `number`th."""
    return [c for c in ax.collections if c.get_zorder() == 3][number].get_segments()


def test_a_scene_is_drawn_where_it_was_laid_out():
    scene = plot.clinical(heartbeats(), "partial", (433, 527), [(17, 111)])
    fig, ax = plot.sheet(300, 150)
    plot.draw(ax, scene, 13.5, 20)
    lines, traces = drawn(ax), scene["traces"]
    assert len(lines) == len(traces) + len(scene["paths"])
    for line, (x, step, y) in zip(lines, traces):
        assert np.allclose(line, np.column_stack([13.5 + x + step * np.arange(len(y)), 20 + y]))
    for line, path in zip(lines[len(traces):], scene["paths"]):
        assert np.allclose(line, np.array(path) + (13.5, 20))
    assert {(13.5 + x, 20 + y, text) for x, y, _, text in scene["texts"]} == {
        (*t.get_position(), t.get_text()) for t in ax.texts}
    paper, *boxes = [(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in ax.patches]
    assert {(13.5 + x, 20 + y, w, h) for x, y, w, h, _ in scene["boxes"]} == set(boxes)
    assert paper == (13.5, 20, 270, 110)


def test_highlight_of_the_other_kinds():
    x = heartbeats()
    assert plot.clinical(x, "global", (0, SAMPLES))["boxes"] == []
    (left, top, width, height, filled), = plot.clinical(x, "1d", (0, SAMPLES))["boxes"]
    scene = plot.clinical(x, "1d")
    assert left <= 15 and left + width >= 264
    assert scene["traces"][8][2].max() < top < scene["traces"][-1][2].min()


def test_rows_do_not_touch_where_there_is_room_and_stay_on_the_paper():
    base = plot.spread(np.full((4, 1), 12), np.full((4, 1), 8), 5, 100)
    assert (np.diff(base) >= 20).all() and (base == np.round(base)).all() and base[0] >= 17 and base[-1] <= 97
    crowded = plot.spread(np.array([[90], [12], [40], [12]]), np.array([[8], [60], [8], [8]]), 5, 100)
    assert (np.diff(crowded) > 0).all() and 5 < crowded[0] and crowded[-1] < 105


# ---------------------------------------------------------------------------------------------------------------------
# Explanations

def test_contributions_and_bias_add_up_to_the_logit_of_stage_04(made):
    later = np.flatnonzero(made.prep.val | made.prep.test)
    logits = np.load(made.run / "logits_fusion.npy")
    classifiers = plot.load_classifiers(namespace(made), made.prep)
    for at in (0, 3, len(later) - 1):
        results = plot.explain(made.prep.signals[later[at]], classifiers, 2)
        assert len(results) == len(classifiers[0].classes)
        for r in results:
            shown = sum(q["weight"] * (q["similarity"] - q["mean"]) / q["std"] for q in r["prototypes"])
            assert abs(shown + sum(o["contribution"] for o in r["others"]) + r["bias"] - r["logit"]) < 1e-4
            W = classifiers[0].W[classifiers[0].classes.index(r["label"])]
            own = [p["class"] == r["label"] for p in classifiers[0].prototypes]
            for ours, rest in zip((True, False), r["others"]):  # with those shown, all that have a weight
                shown = [q for q in r["prototypes"] if q["weight"] != 0 and ours == (q["class"] == r["label"])]
                assert rest["number"] + len(shown) == sum(w != 0 and o == ours for w, o in zip(W, own))
            # 04's own logit, from float32 similarities in batches of 256; an untrained network's spread is tiny
            assert r["logit"] == pytest.approx(logits[at, CODES.index(r["label"])], abs=2e-3)
            assert r["probability"] == pytest.approx(1 / (1 + np.exp(-r["logit"])))
            first, second = r["prototypes"]
            assert first["contribution"] >= second["contribution"]
        every = plot.explain(made.prep.signals[later[at]], classifiers, 10**6)
        assert all(r["others"] == [{"number": 0, "contribution": 0}] * 2 for r in every)


def test_what_has_no_weight_is_no_reason(made):
    """Not even where the others speak against the label and so contribute less than nothing."""
    classifiers = plot.load_classifiers(namespace(made), made.prep)
    head, x = classifiers[0], made.prep.signals[5]
    head.W = np.zeros_like(head.W)
    head.W[:, :3] = 1.0
    for r in plot.explain(x, classifiers, 5):
        assert [q["weight"] for q in r["prototypes"]] == [1.0] * 3 and r["others"][0]["number"] == 0
    head.W[:, :3] *= np.where(r["prototypes"][0]["contribution"] > 0, -1, 1)
    assert all(len(r["prototypes"]) == 2 for r in plot.explain(x, classifiers, 2))


def test_bias_is_the_logit_of_the_average_training_record(made):
    saved = common.load_pt(made.run / "fusion.pt", "x")
    scores = np.concatenate([np.load(made.run / b / "scores.npy") for b in BRANCHES], 1)[made.prep.train]
    assert np.allclose(scores.mean(0), saved["mean"].numpy(), atol=1e-6)
    X = torch.from_numpy(scores - scores.mean(0)) / saved["std"]
    assert torch.allclose((X @ saved["W"].T.to(X) + saved["b"].to(X)).mean(0), saved["b"].to(X), atol=1e-4)


def test_matched_windows_are_those_that_the_similarity_averages(made):
    x = made.prep.signals[5]
    net = common.load_model(made.run / "morphology" / "projected.pt", "x")[0]
    with torch.no_grad():
        z = net.latent(torch.from_numpy(np.array(x))[None])[0]
    classifiers = plot.load_classifiers(namespace(made, model=["morphology"]), made.prep)
    for q in plot.explain(x, classifiers, 99)[0]["prototypes"]:
        p = net.p[q["index"]].detach().flatten()
        cosine = torch.nn.functional.cosine_similarity
        cosines = np.array([float(cosine(z[:, w:w + 3].flatten(), p, dim=0)) for w in range(30)])
        best = np.sort(cosines)[::-1][:3]
        assert q["similarity"] == pytest.approx(best.mean(), abs=1e-5)
        assert [m["similarity"] for m in q["matched"]] == pytest.approx(list(best), abs=1e-5)
        for m in q["matched"]:
            window = next(w for w in range(30) if common.window_samples("partial", w) == tuple(m["samples"]))
            assert cosines[window] == pytest.approx(m["similarity"], abs=1e-5)


@pytest.mark.parametrize("model", BRANCHES)
def test_a_page_says_and_draws_what_was_computed(made, model):
    x, kind = made.prep.signals[25], common.MODELS[model][0]
    classifiers = plot.load_classifiers(namespace(made, model=[model]), made.prep)
    for predicted, r in zip((True, False), plot.explain(x, classifiers, 2)):
        r, (first, q) = {**r, "predicted": predicted}, r["prototypes"]
        x_source = made.prep.signals[q["row"]]
        fig = plot.page(x, x_source, "an ECG", "its labels", r, q, made.words)
        texts = [(t.get_position()[0] > 280, t.get_text()) for t in fig.axes[0].texts]
        assert texts[0] == (False, f"an ECG: {made.words[r['label']]}")
        verdict = "(predicted: it reaches" if predicted else "(not predicted: it stays below"
        assert f"probability {r['probability']:.3g} by the {model} classifier {verdict} the threshold " in texts[1][1]
        table = texts[2][1].splitlines()
        for p, line in zip((first, q), table[1:]):
            assert line[0] == (">" if p is q else " ") and f"{model} {p['index']}: " in line and plot.source(p) in line
            wanted = p["similarity"], p["mean"], p["std"], (p["similarity"] - p["mean"]) / p["std"], p["weight"]
            found = [float(word.strip("()")) for word in line.split()[-6:]]
            assert found == pytest.approx([*wanted, p["contribution"]], abs=0.006)
        *terms, total = [float(line.split()[-1]) for line in table[1:]]
        assert len(terms) == 5 and sum(terms) == pytest.approx(total, abs=0.004) == pytest.approx(r["logit"], abs=0.004)
        names = "; ".join(made.words[c] for c in q["labels"])
        sides = [(False, "an ECG", "its labels"), (True, f"prototype {model} {q['index']}: {plot.source(q)}", names)]
        for i, ((right, heading, labels), ecg) in enumerate(zip(sides, (x, x_source))):
            assert (right, heading) in texts
            true = next(t for side, t in texts if side == right and t.startswith("true labels: "))
            assert " ".join(true.split()).removeprefix("true labels: ")[:60] == labels[:60]
            strip = drawn(fig.axes[0], i)[12]                                               # lead II
            assert strip[0, 0] == pytest.approx(8 + 278 * i + 15) and np.allclose(np.diff(strip[:, 1]),
                                                                                  -10 * np.diff(ecg[1]), atol=1e-4)
            if kind == "partial":
                at = slice(*(q["matched"][0]["samples"] if i == 0 else q["samples"]))
                cut = drawn(fig.axes[0], 2 + i)[7]                                          # V2
                ratio = np.ptp(cut[:, 1]) / np.ptp(ecg[7, at])
                assert len(cut) == at.stop - at.start and min(abs(ratio - 5), abs(ratio - 10)) < 1e-3
        if kind == "1d":
            both = drawn(fig.axes[0], 2)
            assert all(np.allclose(np.diff(line[:, 1]), -10 * np.diff(e[1]), atol=1e-4)
                       for line, e in zip(both, (x, x_source)))
        note = texts[-1][1]
        assert note.endswith("For research, not for clinical use.")
        assert ("dashed: the next 2 of the 3 whose mean" in note) == (kind == "partial") and "WARNING" not in note
        for weight, contribution, unlike in ((-1, 1, True), (-1, -1, False), (1, 1, False)):
            turned = {**q, "weight": weight, "contribution": contribution}
            page = plot.page(x, x_source, "", "", r, turned, made.words)
            assert ("is unlike the prototype speaks for" in page.axes[0].texts[-1].get_text()) == unlike
        many = {**q, "matched": q["matched"] * 10}
        if kind == "partial":  # no more than five are drawn, and the page says of how many
            notes = plot.page(x, x_source, "", "", r, many, made.words, ["stale"]).axes[0].texts[-1].get_text()
            assert "dashed: the next 4 of the 30 whose mean" in notes and "WARNING" in notes


def test_case_explains_the_ecg_that_was_asked_for(made, monkeypatch):
    """The page's two ECGs, the labels and the logits are those of the ecg_id, from the arrays and from 04."""
    later, logits = np.flatnonzero(made.prep.val | made.prep.test), np.load(made.run / "logits_fusion.npy")
    shown, page = [], plot.page
    monkeypatch.setattr(plot, "page", lambda *a: (shown.append(a), page(*a))[1])
    row = int(np.flatnonzero(made.prep.test)[3])
    run_stage(monkeypatch, "06_plot_prototypes", *made.args, "--case", made.prep.ecg_ids[row], "--top", 1)
    found = json.loads((made.run / "cases" / f"{made.prep.ecg_ids[row]}.json").read_text())
    labels = [c for c, on in zip(CODES, made.prep.labels[row]) if on]
    assert found["true_labels"] == labels and found["warnings"] == []
    for r in found["labels"]:
        of_04 = logits[later.tolist().index(row), CODES.index(r["label"])]
        assert r["logit"] == pytest.approx(of_04, abs=2e-3)
        assert r["predicted"] == (r["probability"] >= r["threshold"])
    probabilities = [r["probability"] for r in found["labels"]]
    assert probabilities == sorted(probabilities, reverse=True) and probabilities[0] > probabilities[-1]
    assert shown
    for x, x_source, title, true, r, q, *_ in shown:
        assert np.array_equal(x, made.prep.signals[row]) and true == "; ".join(made.words[c] for c in labels)
        assert np.array_equal(x_source, made.prep.signals[made.prep.row_of[q["ecg_id"]]])


def test_a_training_ecg_is_not_explained_by_its_own_patient(made, monkeypatch):
    """Prototypes from ECGs of its patient contribute nothing, as in the fit of Eq. (10): else it explains itself."""
    saved = common.load_pt(made.run / "fusion.pt", "x")
    W, b, mean, std = (saved[k].numpy().astype(float) for k in ("W", "b", "mean", "std"))
    scores = np.concatenate([np.load(made.run / m / "scores.npy") for m in BRANCHES], 1)
    q = prototypes(made)[0][1]
    row = made.prep.row_of[q["ecg_id"]]
    mine = np.array([p["ecg_id"] == q["ecg_id"] for _, p in prototypes(made)])  # each record here has its own patient
    run_stage(monkeypatch, "06_plot_prototypes", *made.args, "--case", q["ecg_id"], "--top", 99, "--label", q["class"])
    r, = json.loads((made.run / "cases" / f"{q['ecg_id']}.json").read_text())["explained"]
    c = saved["meta"]["classes"].index(q["class"])
    X = np.where(mine, 0, (scores[row] - mean) / std)
    assert r["logit"] == pytest.approx(W[c] @ X + b[c], abs=2e-3)
    assert r["own_patient"] == (W[c, mine] != 0).sum() > 0
    assert q["ecg_id"] not in {p["ecg_id"] for p in r["prototypes"]}
    assert len(r["prototypes"]) == (W[c, ~mine] != 0).sum()
    classifiers = plot.load_classifiers(namespace(made), made.prep)
    other = next(o for o in plot.explain(made.prep.signals[row], classifiers, 1) if o["label"] == q["class"])
    assert other["own_patient"] == 0
    assert other["logit"] == pytest.approx(W[c] @ ((scores[row] - mean) / std) + b[c], abs=2e-3)
    page = plot.page(made.prep.signals[row], made.prep.signals[row], "", "", r, {**r["prototypes"][0]}, made.words)
    note = f"Not counted, as in training: prototypes from ECGs of this patient ({r['own_patient']})."
    assert note in page.axes[0].texts[-1].get_text()


def test_thresholds_are_those_of_fold_9(made, monkeypatch):
    monkeypatch.setattr(common, "FEWEST", 1)
    y, later = made.prep.labels[made.prep.val] > 0, made.prep.val | made.prep.test
    logits = np.load(made.run / "logits_fusion.npy").astype(float)[made.prep.val[later]]
    head, = plot.load_classifiers(namespace(made), made.prep)
    judged = 0
    for code, threshold in zip(head.classes, head.thresholds):
        positive, score = y[:, CODES.index(code)], logits[:, CODES.index(code)]
        if positive.any():
            f1 = lambda t: 2 * (positive & (score >= t)).sum() / (positive.sum() + (score >= t).sum())
            assert threshold in score.astype(np.float32) and f1(threshold) == max(map(f1, score))
            judged += 1
    assert judged > 2


def test_case_writes_pages_and_all_numbers(made, monkeypatch, capsys):
    ecg_id = int(made.prep.ecg_ids[made.prep.test][0])
    run_stage(monkeypatch, "06_plot_prototypes", *made.args, "--case", 10, ecg_id, "--top", 2)
    out = capsys.readouterr().out
    assert f"test ECG {ecg_id}: " in out and "training ECG 10: " in out
    found = json.loads((made.run / "cases" / f"{ecg_id}.json").read_text())
    assert found["ecg_id"] == ecg_id and found["true_labels"]
    assert (made.run / "cases" / f"{ecg_id}.pdf").stat().st_size > 10000
    reached = [r["label"] for r in found["labels"] if r["probability"] >= r["threshold"]]
    assert [r["label"] for r in found["explained"]] == (reached or [found["labels"][0]["label"]])
    for r in found["explained"]:
        assert abs(r["bias"] + sum(q["contribution"] for q in r["prototypes"] + r["others"]) - r["logit"]) < 1e-4
        for q in r["prototypes"]:
            with Image.open(made.run / "cases" / q["page"]) as image:
                assert image.info["dpi"] == pytest.approx((127, 127), abs=0.1) and image.width == 5 * 564
            assert q["ecg_id"] in made.prep.ecg_ids and q["labels"]


def test_a_label_with_few_positives_in_fold_9_has_the_threshold_one_half(made, monkeypatch):
    positives = made.prep.labels[made.prep.val].sum(0)
    monkeypatch.setattr(common, "FEWEST", int(positives.max()))
    run_stage(monkeypatch, "06_plot_prototypes", *made.args, "--case", 10, "--top", 1)
    labels = json.loads((made.run / "cases" / "10.json").read_text())["labels"]
    half = {r["label"]: r["threshold"] == 0.5 for r in labels}
    assert half == {c: positives[CODES.index(c)] < positives.max() for c in half} and len(set(half.values())) == 2


def test_without_a_predicted_label_the_most_probable_one_is_explained(made, monkeypatch, capsys):
    monkeypatch.setattr(common, "FEWEST", 0)
    monkeypatch.setattr(common, "best_f1_thresholds", lambda y, s: np.full(y.shape[1], 99.0))
    run_stage(monkeypatch, "06_plot_prototypes", *made.args, "--case", 13, "--model", "rhythm", "--top", 1)
    assert "below its threshold" in capsys.readouterr().out
    found = json.loads((made.run / "cases" / "13.json").read_text())
    most = max(found["labels"], key=lambda r: r["probability"])
    assert [r["label"] for r in found["explained"]] == [most["label"]]


# ---------------------------------------------------------------------------------------------------------------------
# A user's own record

def write_record(folder, fs=100, seconds=10.0, names=LEADS, units="mV", scale=1.0, signal=None, gain=None):
    """A WFDB record `own` with the leads `names` of heartbeats() in `units`; returns its path without the ending."""
    x = heartbeats(fs, seconds) if signal is None else signal
    rows = [LEADS.index(n.upper()) if n.upper() in LEADS else 0 for n in names]
    folder.mkdir(parents=True, exist_ok=True)
    x = np.ascontiguousarray(x[rows].T) * scale
    wfdb.wrsamp("own", fs=fs, units=[units] * len(names), sig_name=list(names), p_signal=x, write_dir=str(folder),
                fmt=["16"] * len(names), adc_gain=[gain or 5000 / scale] * len(names), baseline=[0] * len(names))
    return str(folder / "own")


@pytest.mark.parametrize("fs, units, scale, names", [
    (100, "mV", 1, LEADS), (500, "uV", 1000, [n.lower() for n in LEADS[::-1]]), (250, "V", 0.001, ["x", *LEADS[::-1]]),
    (360, "MV", 1, [n.replace("AV", "aV") for n in LEADS]), (257, "UV", 1000, LEADS), (1000, "mV", 1, LEADS)])
def test_own_record_of_any_rate_unit_and_order_gives_the_same_signal(tmp_path, fs, units, scale, names):
    seconds = 12.5 if fs == 500 else 10.0
    signal = heartbeats(fs, seconds) + 1                                                    # mV of offset
    x = plot.read_wfdb(write_record(tmp_path, fs, seconds, names, units, scale, signal))
    wanted = stage("01_preprocess").highpass(heartbeats())
    assert x.shape == (12, SAMPLES) and x.dtype == np.float32
    assert np.abs(x - wanted)[:, 20:-20].max() < 0.01 and np.abs(x - wanted).max() < 0.05   # mV; the filter's ends


def test_own_record_end_to_end(made, monkeypatch, tmp_path, capsys):
    name = write_record(tmp_path, 500, 11.0)
    run_stage(monkeypatch, "06_plot_prototypes", *made.args, "--record", f"{name}.hea", "--top", 1)
    out = capsys.readouterr().out
    assert "11.0 s long: using the first 10 s" in out and f"record {tmp_path.name}/own: "[-40:] in out
    found = json.loads((made.run / "cases" / f"record_{tmp_path.name}-own.json").read_text())
    assert found["ecg_id"] is None and found["true_labels"] is None and found["explained"] and found["record"] == name


def test_own_records_of_one_name_keep_their_explanations(made, monkeypatch, tmp_path):
    for patient in ("p1", "p2"):
        name = write_record(tmp_path / patient)
        run_stage(monkeypatch, "06_plot_prototypes", *made.args, "--record", name, "--top", 1)
    found = [json.loads((made.run / "cases" / f"record_{p}-own.json").read_text()) for p in ("p1", "p2")]
    assert [f["title"] for f in found] == ["record p1/own", "record p2/own"]
    pages = [q["page"] for f in found for r in f["explained"] for q in r["prototypes"]]
    assert all((made.run / "cases" / page).is_file() for page in pages)


def broken(x, lead, at):
    x = x.copy()
    x[lead, at] = np.nan
    return x


@pytest.mark.parametrize("how, says", [
    (dict(names=[n for n in LEADS if n not in ("V3", "AVF")]), "aVF, V3"), (dict(names=LEADS + ["v1"]), "V1"),
    (dict(units="\u00b5V", scale=1000), "50 mV"),
    (dict(seconds=9.9), "9.9 s long"), (dict(units="mmHg"), "mmHg"),
    (dict(signal=broken(heartbeats(), 7, 500)), "lead V2"),
    (dict(signal=100 * heartbeats(), gain=100), "50 mV")])
def test_own_record_that_cannot_be_used(tmp_path, how, says):
    name = write_record(tmp_path, **how)
    with pytest.raises(SystemExit) as error:
        plot.read_wfdb(name)
    assert says in sentence(error) and name in sentence(error)


@pytest.mark.parametrize("damage", [
    "no header", "empty header", "binary header", "no signal", "short signal", "zero rate"])
def test_own_record_that_is_damaged(tmp_path, damage):
    name = write_record(tmp_path)
    head, signal = Path(name + ".hea"), Path(name + ".dat")
    {"no header": head.unlink, "empty header": lambda: head.write_text(""), "no signal": signal.unlink,
     "binary header": lambda: head.write_bytes(bytes(range(256))),
     "short signal": lambda: signal.write_bytes(signal.read_bytes()[:5000]),
     "zero rate": lambda: head.write_text(head.read_text().replace("own 12 100 ", "own 12 0 "))}[damage]()
    with pytest.raises(SystemExit) as error:
        plot.read_wfdb(name)
    assert name in sentence(error)


# ---------------------------------------------------------------------------------------------------------------------
# Errors, one sentence each

@pytest.mark.parametrize("damage, says", [
    ("case", "ECG 99999 is not in"), ("no prototypes", "03_project.py"), ("json", "damaged"), ("samples", "damaged"),
    ("source", "damaged"), ("kind", "damaged"), ("class", "damaged"),
    ("other prep", "made from another"), ("no model", "02_train_joint.py"),
    ("no classifier", "04_fusion.py --model rhythm"), ("stale fusion", "made from another"),
    ("no logits", "04_fusion.py"),
    ("short logits", "of other records"), ("other projected", "03_project.py"),
    ("trained again", "03_project.py"), ("trained again, review", "03_project.py"), ("other fusion", "04_fusion.py")])
def test_errors_are_one_sentence(made, monkeypatch, tmp_path, damage, says):
    run, more = tmp_path / "run", []
    shutil.copytree(made.run, run, ignore=shutil.ignore_patterns("cases", "figures"))
    at = run / "rhythm" / "prototypes.json"
    record = json.loads(at.read_text())
    q = record["prototypes"][0]

    def resave(path):
        """The same weights in a file of another hash, as after training again."""
        saved = torch.load(path, weights_only=True)
        common.save_pt(path, {**saved, "again": 1})

    def narrower(path):
        """A classifier of one prototype less, as after a training with fewer of them."""
        saved = torch.load(path, weights_only=True)
        common.save_pt(path, {**saved, "W": saved["W"][:, 1:], "mean": saved["mean"][1:], "std": saved["std"][1:]})

    {"case": lambda: more.extend(["--case", 99999]), "no prototypes": at.unlink, "json": lambda: at.write_text("{"),
     "samples": lambda: q.update(samples=[500, 500]), "source": lambda: q.update(ecg_id=1),
     "kind": lambda: record.pop("kind"), "class": lambda: q.update({"class": "<b>"}),
     "other prep": lambda: record["inputs"].update(prep="0"), "no model": lambda: shutil.rmtree(run),
     "no classifier": lambda: [(run / "rhythm" / "classifier.pt").unlink(),
                               more.extend(["--case", 13, "--model", "rhythm"])],
     "stale fusion": lambda: [resave(run / "global" / "projected.pt"), more.extend(["--case", 13])],
     "no logits": lambda: [(run / "logits_fusion.npy").unlink(), more.extend(["--case", 13])],
     "short logits": lambda: [np.save(run / "logits_fusion.npy", np.zeros((3, 71))), more.extend(["--case", 13])],
     "other projected": lambda: [record.update(projected="0"), more.extend(["--case", 13])],
     "trained again": lambda: resave(run / "rhythm" / "joint.pt"),
     "trained again, review": lambda: [resave(run / "rhythm" / "joint.pt"), more.append("--review")],
     "other fusion": lambda: [narrower(run / "fusion.pt"), more.extend(["--case", 13])]}[damage]()
    if damage in ("samples", "source", "kind", "class", "other prep", "other projected"):
        at.write_text(json.dumps(record))
    with pytest.raises(SystemExit) as error:
        run_stage(monkeypatch, "06_plot_prototypes", *made.args[:3], run, *more)
    assert says in sentence(error)


def test_what_was_forced_is_said_on_the_pages(made, monkeypatch, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(made.run, run, ignore=shutil.ignore_patterns("cases", "figures"))
    saved = torch.load(run / "global" / "joint.pt", weights_only=True)
    common.save_pt(run / "global" / "joint.pt", {**saved, "again": 1})
    flags = [*made.args[:3], run, "--force"]
    run_stage(monkeypatch, "06_plot_prototypes", *flags, "--case", 13, "--top", 1)
    warning, = json.loads((run / "cases" / "13.json").read_text())["warnings"]
    assert "made from another" in warning and "joint.pt" in warning and warning in capsys.readouterr().err
    run_stage(monkeypatch, "06_plot_prototypes", *flags, "--model", "global", "--threads", 1)
    assert f"WARNING: {warning}" in Tags((run / "figures" / "gallery.html").read_text()).text


def test_command_line(made, monkeypatch, capsys):
    """--help is readable; as a process a mistake ends with its sentence, a non-zero code and no traceback."""
    for more, code in ((["--help"], 0), ([*made.args, "--top", 0], 2)):
        with pytest.raises(SystemExit) as ended:
            run_stage(monkeypatch, "06_plot_prototypes", *more)
        assert ended.value.code == code
    text = capsys.readouterr()
    assert "--review" in text.out and "gallery.html" in text.out and "--top must be at least 1" in text.err
    command = [sys.executable, "06_plot_prototypes.py", *map(str, made.args), "--case", "99999"]
    found = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert found.returncode == 1 and found.stderr.count("\n") == 1 and "Traceback" not in found.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Gallery and review page

class Tags(html.parser.HTMLParser):
    """Collects the start tags of a page with their attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def pages(made):
    """gallery.html and review.html of the run, and what their stages printed last."""
    with pytest.MonkeyPatch.context() as patch:
        run_stage(patch, "06_plot_prototypes", *made.args, "--threads", 1)
        run_stage(patch, "06_plot_prototypes", *made.args, "--review")
    return SimpleNamespace(gallery=made.run / "figures" / "gallery.html", review=made.run / "review.html")


def prototypes(made):
    return [(m, q) for m in BRANCHES for q in json.loads((made.run / m / "prototypes.json").read_text())["prototypes"]]


def test_gallery_shows_every_prototype_and_escapes_hostile_text(made, pages):
    page = Tags(pages.gallery.read_text())
    images = [a for tag, a in page.tags if tag == "img"]
    assert len(images) == len(prototypes(made)) and not any("onerror" in a for a in images)
    assert all(a["loading"] == "lazy" and (pages.gallery.parent / a["src"]).is_file() for a in images)
    assert not [t for t, _ in page.tags if t in ("script", "b")]
    assert HOSTILE in page.text and "words of SR (SR)" in page.text
    assert len([t for t, _ in page.tags if t == "h2"]) == len({(m, q["class"]) for m, q in prototypes(made)})
    for name, height in (("morphology", 210), ("rhythm", 172)):
        with Image.open(next((pages.gallery.parent / name).glob("*.png"))) as image:
            assert image.info["dpi"] == pytest.approx((127, 127), abs=0.1)
            assert image.width == 297 * 5 and abs(image.height - 5 * height) <= 1           # 297 mm at 5 pixels per mm


def test_a_picture_shows_its_prototypes_ecg(made, monkeypatch, tmp_path):
    scenes, draw = [], plot.draw
    monkeypatch.setattr(plot, "draw", lambda ax, scene, *a: (scenes.append(scene), draw(ax, scene, *a)))
    record = plot.load_prototypes("morphology", namespace(made), made.prep)
    for q in record["prototypes"][1:3]:
        x = made.prep.signals[made.prep.row_of[q["ecg_id"]]]
        plot.picture((tmp_path / "p.png", made.prep.path.parent, q, "title", "below"))
        whole, cut = scenes[-2:]
        assert np.allclose(np.diff(whole["traces"][12][2]), -10 * np.diff(x[1]), atol=1e-4)
        assert len(cut["traces"][0][2]) == q["samples"][1] - q["samples"][0]


def test_pictures_of_an_earlier_run_do_not_stay(made, pages, monkeypatch):
    old = made.run / "figures" / "rhythm" / "OLD_0999.png"
    old.write_bytes(b"")
    run_stage(monkeypatch, "06_plot_prototypes", *made.args, "--model", "rhythm", "--threads", 1)
    assert not old.exists()


def test_review_page_holds_the_ecgs_but_neither_source_nor_prediction(made, pages):
    text = pages.review.read_text()
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert text.count("<script") == text.count("</script") == 2 and "<img" not in text and "<!--" not in text
    assert data["words"]["IMI"] == f"{HOSTILE} (IMI)"
    assert "ecg_id" not in text and "similarity" not in text
    assert {i["id"] for i in data["items"]} == {f"{m}/{q['index']}" for m, q in prototypes(made)}
    rows = {int(e): i for i, e in enumerate(made.prep.ecg_ids)}
    by_id = {i["id"]: i for i in data["items"]}
    for m, q in prototypes(made)[::4]:
        item = by_id[f"{m}/{q['index']}"]
        y = np.frombuffer(base64.b64decode(item["y"]), "<i2") / 100
        wanted = plot.scenes_of({**q, "kind": common.MODELS[m][0]}, made.prep.signals[rows[q["ecg_id"]]])
        assert np.abs(y - np.concatenate([t[2] for s in wanted for t in s["traces"]])).max() <= 0.0051
        assert item["class"] == q["class"] and [s["h"] for s in item["scenes"]] == [s["h"] for s in wanted]


def test_demo_makes_a_case_and_a_gallery(made, monkeypatch, capsys):
    run_stage(monkeypatch, "06_plot_prototypes", "--demo", *made.args, "--threads", 1, "--top", 1)
    lines = capsys.readouterr().out.strip().splitlines()
    assert f"test ECG {made.prep.ecg_ids[made.prep.test][0]}" in lines[-2] and lines[-1].endswith("gallery.html")


# ---------------------------------------------------------------------------------------------------------------------
# The review page in a browser

def test_review_in_a_browser(browser, pages, made, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    find, js = lambda id_: browser.find_element(By.ID, id_), browser.execute_script
    pressed = lambda name: js("return [...document.querySelectorAll(arguments[0])].map(b => b.dataset.value)",
                              f"#{name} [aria-pressed=true]")
    keys = lambda *k: ActionChains(browser).send_keys(*k).perform()

    def size(w, h):
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                                {"width": w, "height": h, "deviceScaleFactor": 1, "mobile": False})
        assert js("return [innerWidth, innerHeight]") == [w, h]
        time.sleep(0.3)                                                                     # until the page fits

    size(1280, 800)
    browser.get(pages.review.as_uri())
    total = len(prototypes(made))
    assert find("progress").text == f"0 of {total} rated" and len(browser.find_elements(By.TAG_NAME, "svg")) >= 1
    assert browser.find_elements(By.TAG_NAME, "img") == [] and "words of" in find("title").text
    first = min(prototypes(made), key=lambda mq: CODES.index(mq[1]["class"]))
    scene = plot.scenes_of({**first[1], "kind": common.MODELS[first[0]][0]},
                           made.prep.signals[made.prep.row_of[first[1]["ecg_id"]]])[0]
    path = js("return [...document.querySelector('svg').querySelectorAll('path')].at(-1).getAttribute('d')")
    lines = scene["paths"] + [np.column_stack([x + step * np.arange(len(y)), y]) for x, step, y in scene["traces"]]
    points = np.array([[float(number) for number in re.split("[ ,]", p)] for p in re.split("[ML]", path)[1:]])
    assert np.allclose(points, np.concatenate(lines), atol=0.011)                           # mm, as laid out
    for w, h in ((1280, 800), (1024, 768), (768, 1024)):                                    # laptop, tablet
        size(w, h)
        assert js("return document.documentElement.scrollWidth <= innerWidth")
        assert js("return [...document.querySelectorAll('button, select, textarea')].every(e => e.offsetHeight >= 44)")
        assert js("const p = document.getElementById('paper'); return p.scrollWidth <= p.clientWidth")
    size(1280, 800)
    assert js("return document.documentElement.scrollHeight <= innerHeight")
    assert js("const p = document.getElementById('paper'); return p.scrollHeight <= p.clientHeight")

    # Rate the first with the mouse, the second with the keyboard, mark the third
    browser.find_element(By.CSS_SELECTOR, "#representativeness [data-value='4']").click()
    browser.find_element(By.CSS_SELECTOR, "#clarity [data-value='5']").click()
    find("comment").send_keys("clear </script> b x 1")
    keys(Keys.ESCAPE, Keys.ARROW_RIGHT, "2")
    ActionChains(browser).key_down(Keys.SHIFT).send_keys("3").key_up(Keys.SHIFT).perform()
    assert (pressed("representativeness"), pressed("clarity"), pressed("mark")) == (["2"], ["3"], [])
    keys("b", Keys.ARROW_RIGHT, "l")
    assert pressed("mark") == ["label-error"] and find("progress").text == f"3 of {total} rated"
    before = js("return document.querySelector('svg').clientWidth")
    keys("+")
    assert js("return document.querySelector('svg').clientWidth") > 1.3 * before
    find("reviewer").send_keys("Dr. Ö")
    keys(Keys.ESCAPE, "n")
    title = find("title").text

    browser.refresh()                                                                       # kept in the browser
    assert find("progress").text == f"3 of {total} rated" and find("reviewer").get_attribute("value") == "Dr. Ö"
    assert pressed("representativeness") == ["4"] and find("comment").get_attribute("value") == "clear </script> b x 1"
    keys("n")
    assert find("title").text == title

    find("export").click()
    for _ in range(100):                                                                    # made empty, then filled
        exported = [f for f in tmp_path.glob("ratings_*.json") if f.stat().st_size]
        if exported and not list(tmp_path.glob("*.crdownload")):
            break
        time.sleep(0.1)
    found = json.loads(exported[0].read_text())
    assert {k: found[k] for k in ("format", "kind", "reviewer", "run")} == {
        "format": 1, "kind": "protoecgnet-ratings", "reviewer": "Dr. Ö", "run": str(made.run)}
    classes = {f"{m}/{q['index']}": q["class"] for m, q in prototypes(made)}
    order = sorted(classes, key=lambda i: CODES.index(classes[i]))                          # as the page shows them
    assert found["ratings"] == {
        order[0]: {"class": classes[order[0]], "representativeness": 4, "clarity": 5, "mark": None,
                   "comment": "clear </script> b x 1"},
        order[1]: {"class": classes[order[1]], "representativeness": 2, "clarity": 3, "mark": "best", "comment": ""},
        order[2]: {"class": classes[order[2]], "representativeness": None, "clarity": None, "mark": "label-error",
                   "comment": ""}}

    # Start anew, then import them again with entries that are none of ours
    find("clear").click()
    browser.switch_to.alert.accept()
    assert find("progress").text == f"0 of {total} rated"
    bad = {"class": classes[order[4]], "representativeness": 9, "clarity": "5", "mark": "toString"}
    found["ratings"] |= {"rhythm/999": found["ratings"][order[0]], "__proto__": {"class": "SR"},
                         order[3]: {"class": "XX"}, order[4]: bad}
    (tmp_path / "again.json").write_text(json.dumps(found))
    find("file").send_keys(str(tmp_path / "again.json"))
    time.sleep(0.3)
    assert "Imported 4 of 7" in find("status").text and find("progress").text == f"3 of {total} rated"
    (tmp_path / "other.json").write_text('{"kind": "something"}')
    find("file").send_keys(str(tmp_path / "other.json"))
    time.sleep(0.3)
    assert "does not hold ratings" in find("status").text
    js("const e = document.getElementById('class'); e.value = 1; e.dispatchEvent(new Event('change'))")
    assert "prototype 1 of" in find("title").text
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []


def test_a_label_can_be_asked_for_predicted_or_not(made, monkeypatch):
    ecg_id = int(made.prep.ecg_ids[made.prep.test][0])
    label = common.load_json(made.run / "fusion.json", "")["classes"][-1]
    flags = [*made.args, "--case", ecg_id, "--top", 1, "--label"]
    run_stage(monkeypatch, "06_plot_prototypes", *flags, label)
    case = json.loads((made.run / "cases" / f"{ecg_id}.json").read_text())
    assert [r["label"] for r in case["explained"]] == [label]
    with pytest.raises(SystemExit) as e:
        run_stage(monkeypatch, "06_plot_prototypes", *flags, "FLUTTER")
    assert "FLUTTER" in sentence(e) and label in sentence(e)
