"""06_plot_prototypes.py: true millimetres, the marked place, sums that give the logit, own records,
hostile text, and the review page in a real browser (skipped where there is none)."""
import contextlib
import csv
import json
import re
import shutil
import time
from html import escape
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import wfdb
from hypothesis import given, strategies as st
from scipy.signal import resample_poly

import common
from common import BRANCHES, CODES, LEADS, SAMPLES
from conftest import run_stage, sentence, stage, write_prep, write_run

NAME = "06_plot_prototypes"
plot = stage(NAME)
HOSTILE = "</script><img src=x onerror=alert(1)> $\\frac{x$ \"&' <!--"
WRITTEN = "SR", "AFIB", "NORM", "IMI", "LVH", "LAO/LAE", "PRC(S)"


def heartbeats(fs=100, seconds=10.0):
    """A made-up ECG [12, n] mV, smooth enough for any rate from 100 Hz."""
    t = (np.arange(round(fs * seconds)) / fs + 0.2) % 0.8  # since the beginning of a beat
    beat = sum(height * np.exp(-((t - at) / width) ** 2) for height, at, width in
               ((0.15, 0.24, 0.03), (1.2, 0.4, 0.03), (0.3, 0.65, 0.06)))
    gains = [1, 1.2, 0.2, -1.1, 0.4, 0.7, -0.8, -1.4, 0.3, 1.3, 1.1, 0.9]
    return np.array(gains)[:, None] * beat


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A PREP with hostile text in it and a RUN of untrained networks."""
    base = tmp_path_factory.mktemp("six")
    prep = write_prep(base / "prep", n=80, codes=WRITTEN)
    words = {**prep.info["descriptions"], "IMI": HOSTILE, "LVH": "left $$ & <b>large</b> " * 9}
    common.save(prep.path, {**prep.info, "descriptions": words})
    prep = common.load_prep(base / "prep")
    with pytest.MonkeyPatch.context() as patch:
        write_run(patch, base / "run", prep, top_k=3, per_class=(2, 4, 2))
    head, = common.load_run(base / "run")
    return SimpleNamespace(
        prep=prep, run=base / "run", prototypes=head.prototypes,
        alone=["--run", base / "run", "--prep", base / "absent"],
        args=["--run", base / "run", "--prep", base / "prep"],
        words={c: f"{text} ({c})" for c, text in words.items()})


def case_of(made, name):
    return json.loads((made.run / "cases" / f"{name}.json").read_text())


def refused(monkeypatch, *argv):
    """The sentence with which the stage ends."""
    with pytest.raises(SystemExit) as e:
        run_stage(monkeypatch, NAME, *argv)
    return sentence(e)


def test_ten_seconds_are_250_mm_a_millivolt_10_mm_and_every_lead_in_its_place():
    x = heartbeats() + np.random.default_rng(0).normal(size=(12, SAMPLES)) * 0.1
    scene = plot.whole(x, "global")
    assert scene["boxes"] == [] and plot.NAMES[3:6] == ["aVR", "aVL", "aVF"]
    *_, (_, pulse), (left, strip) = scene["traces"]
    assert len(strip) / 4 == 250 and np.allclose(np.diff(strip), -10 * np.diff(x[1]))
    assert np.ptp(pulse) == 10 and (pulse == pulse.min()).sum() / 4 == 5  # 1 mV for 0.2 s
    names = {(text, left) for left, _, _, text in scene["texts"]}
    for k, (left, y) in enumerate(t for t in scene["traces"] if len(t[1]) == 250):
        row, column = divmod(k, 4)
        lead, first = 3 * column + row, 250 * column  # I II III | aVR aVL aVF | ...
        assert left == 15 + 62.5 * column and (plot.NAMES[lead], left + 1.5) in names
        assert np.allclose(np.diff(y), -10 * np.diff(x[lead, first:first + 250]))
    assert k == 11


@given(window=st.integers(0, 29), others=st.lists(st.integers(0, 29), max_size=4))
def test_marked_and_enlarged_are_the_samples_of_the_window(window, others):
    x = np.random.default_rng(window).normal(size=(12, SAMPLES)) * 0.2
    windows = [common.window_samples("partial", w) for w in (window, *others)]
    scene, cut = plot.whole(x, "partial", windows), plot.cut_out(x, windows[0])
    assert [box[4] for box in scene["boxes"]] == [True] + [False] * len(others)
    for (left, top, width, height, _), (first, end) in zip(scene["boxes"], windows):
        assert (left, left + width) == pytest.approx((15 + first / 4, 15 + end / 4))
        assert top < 8 and top + height > scene["h"] - 10  # over all rows
    first, end = windows[0]
    assert f"{first / 100:.2f} to {end / 100:.2f} s" in cut["texts"][0][3]
    traces = [t for t in cut["traces"] if t[0] >= 15]
    for k, (left, y) in enumerate(traces):
        lead = 3 * (k % 4) + k // 4
        assert left == 15 + 29 * (k % 4)
        assert np.allclose(np.diff(y), -10 * np.diff(x[lead, first:end]))


@pytest.mark.parametrize("height", [0.1, 0.5, 4.0])
def test_rows_lie_below_each_other_and_the_1d_strip_is_marked(height):
    scene = plot.whole(heartbeats() * height, "1d")
    pulses = [y.max() for left, y in scene["traces"] if left < 15]
    names = {text: y for _, y, _, text in scene["texts"]}
    assert all(0 < zero - names[lead] < 4 for zero, lead in zip(pulses[::2], ("I", "III")))
    assert ("HALF GAIN: 5 mm/mV" in scene["texts"][0][3]) == (height == 4)
    assert np.ptp(scene["traces"][0][1]) == (5 if height == 4 else 10)
    assert len(pulses) == 4 and min(np.diff(pulses)) >= 12 and 10 < pulses[0] < pulses[3] < 105
    assert all(0 <= y.min() and y.max() <= scene["h"] for _, y in scene["traces"])
    (left, top, width, height, filled), = scene["boxes"]
    strip = scene["traces"][-1][1]
    assert filled and left <= 15 and left + width >= 265
    assert top < strip.min() and top + height > strip.max()


def points(path):
    """A path from point to point [n, 2] in mm."""
    first, steps = path.get("d")[1:].split("l")
    steps = np.array(steps.split(), float).reshape(-1, 2)
    return np.cumsum([np.array(first.split(), float), *steps], 0) / 20


def shapes(text, tag):
    """The shapes of some SVG that have a tag, in their order."""
    svg = "{http://www.w3.org/2000/svg}"
    return list(ElementTree.fromstring(text).iter(svg + tag))


def test_pictures_are_drawn_to_scale():
    scene = plot.whole(heartbeats(), "1d")
    text = plot.sheet([f"title & <b>\n{HOSTILE}", [scene], "one", [("a", -3, ""), ("b", 4, "")]])
    assert re.search('viewBox="0 0 (297.0) (1..[.0-9]*)" width="(.*)mm" height="(.*)mm"', text
                     ).groups() == ("297.0", "151.0", "297.0", "151.0")
    drawn = [p for p in shapes(text, "path") if "scale" in p.get("transform", "")]
    for (left, y), path in zip(scene["traces"], drawn, strict=True):
        x = left + np.arange(len(y)) / 4
        assert np.allclose(points(path), np.stack([x, y], 1), atol=0.026)
    box, *bars = shapes(text, "rect")
    assert [float(box.get(k)) for k in ("x", "y", "width", "height")] == pytest.approx(
        scene["boxes"][0][:4], abs=0.01)
    assert [float(bar.get("width")) for bar in bars] == [30, 40]
    ends = [float(bar.get("x")) for bar in bars]
    assert ends[0] + 30 == ends[1]  # the common zero
    said = [t.text or "" for t in shapes(text, "text")]
    assert said[0] == "title & <b>" and HOSTILE in " ".join(said) and "+4.00" in said


def slow_logit(head, x, code, without=None):
    """A label's logit in float64, prototype by prototype, and how far off float32 may be."""
    c, total, found = head.classes.index(code), head.b[head.classes.index(code)], []
    for network in head.networks:
        with torch.no_grad():
            z = network.latent(torch.from_numpy(np.array(x))[None])[0].double()
        for p, patient in zip(network.p.detach().double(), network.p_patient.tolist()):
            patches = [z[:, w:w + p.shape[1]] for w in range(z.shape[1] - p.shape[1] + 1)]
            cosines = [float((patch * p).sum() / patch.norm() / p.norm()) for patch in patches]
            s = np.mean(sorted(cosines)[-network.top_k:])
            found.append(np.nan if patient == without else s)
    for f, own in enumerate(head.A.T > 0):
        counted = [s for s in np.array(found)[own] if s == s]
        if counted:
            total += head.W[c, f] * (np.mean(counted) - head.mean[f]) / head.std[f]
    return total, 1e-5 * np.abs(head.W[c] / head.std).sum()


def random_weights(made):
    """A run's classifier with other weights where it has some."""
    head, = heads = common.load_run(made.run)
    head.W = np.random.default_rng(0).normal(size=head.W.shape) * (head.W != 0)
    return head, heads


def test_the_average_and_the_pieces_add_up_to_the_logit(made):
    head, heads = random_weights(made)
    x = made.prep.signals[5]
    results = common.explain(heads, x)
    assert {r["label"] for r in results} == set(head.classes)
    for r in results:
        pieces, c = r["pieces"], head.classes.index(r["label"])
        terms = [q["weight"] * (q["similarity"] - q["mean"]) / q["std"] for q in pieces]
        assert terms == pytest.approx([q["contribution"] for q in pieces])
        assert np.abs(terms).tolist() == sorted(np.abs(terms), reverse=True)
        assert sum(terms) + r["average"] == pytest.approx(r["logit"], abs=1e-9)
        assert {q["class"] for q in pieces} == {
            name for name, w in zip(head.pieces, head.W[c]) if w}  # no weight, no reason
        for q in pieces:
            near = [each["similarity"] for each in q["prototypes"]]
            assert near == sorted(near, reverse=True)
            assert np.mean(near) == pytest.approx(q["similarity"])
        wanted, off = slow_logit(head, x, r["label"])
        assert r["logit"] == pytest.approx(wanted, abs=off)
        assert r["probability"] == pytest.approx(1 / (1 + np.exp(-r["logit"])))
        assert r["predicted"] == (r["probability"] >= r["threshold"])


def test_prototypes_of_the_same_patient_do_not_count(made):
    head, heads = random_weights(made)
    ecg_id = head.prototypes[0]["ecg_id"]
    row = made.prep.row_of[ecg_id]
    patient, x = made.prep.patient_ids[row], made.prep.signals[row]
    with_them, without = common.explain(heads, x), common.explain(heads, x, patient)
    for r in without:
        assert not [q for piece in r["pieces"] for q in piece["prototypes"]
                    if q["ecg_id"] == ecg_id]
        wanted, off = slow_logit(head, x, r["label"], without=patient)
        assert r["logit"] == pytest.approx(wanted, abs=off)
    assert ecg_id in {q["ecg_id"] for q in with_them[0]["pieces"][0]["prototypes"]} | {
        q["ecg_id"] for r in with_them for piece in r["pieces"] for q in piece["prototypes"]}


@pytest.mark.parametrize("model", BRANCHES)
def test_matched_windows_are_those_that_the_similarity_averages(made, model):
    x = np.array(made.prep.signals[5])
    head, = common.load_run(made.run, [model])
    network, = head.networks
    with torch.no_grad():
        z = network.latent(torch.from_numpy(x)[None])
        S = common.similarity(z, network.p, network.a)[0].numpy()  # [P, windows]
    places = [common.window_samples(network.kind, w) for w in range(S.shape[1])]
    s = common.similarities(head, x[None])[0]
    for j, q in enumerate(head.prototypes):
        values = [S[j, places.index(at)] for at in plot.matched_windows(head, q, x)]
        assert values == sorted(S[j])[::-1][:network.top_k]
        assert np.mean(values) == pytest.approx(s[j], abs=1e-5)


@pytest.mark.parametrize("model", BRANCHES)
def test_a_page_says_and_shows_what_was_computed(made, model):
    heads = common.load_run(made.run, [model])
    head, x = heads[0], made.prep.signals[25]
    case = {"title": "an ECG", "true_labels": ["SR", "IMI"], "notes": ["A note."]}
    r = common.explain(heads, x)[0]
    heading, above, _, bars, *pairs = plot.page(case, x, r, head, made.words)
    title, *text = heading.splitlines()
    text = " ".join(text)
    verdict = "predicted" if r["predicted"] else "not predicted"
    assert title == f"{head.mark}{made.words[r['label']]} {verdict}" and text.startswith("an ECG. ")
    assert f"True labels: {made.words['SR']}; {made.words['IMI']}. A note. For res" in text
    assert f"Probability {r['probability']:.3f}, predicted from {r['threshold']:.3f} on" in text
    values = [value for _, value, _ in bars]
    assert values[0] == r["average"] and values[-1] == r["logit"]
    assert sum(values[:-1]) == pytest.approx(r["logit"])
    piece = next(q for q in r["pieces"] if q["contribution"] > 0 or not r["predicted"])
    nearest = piece["prototypes"][0]
    assert f"prototype {model} {nearest['index']}: training ECG {nearest['ecg_id']}" in pairs[0]
    source = made.prep.signals[made.prep.row_of[nearest["ecg_id"]]]
    strip = np.diff(above[0]["traces"][-1][1])
    assert np.allclose(strip, -10 * np.diff(x[1]), atol=0.011)
    first, end = {"samples": q["samples"] for q in head.prototypes
                  if q["index"] == nearest["index"]}["samples"]
    part = source[1, :250] if model != "morphology" else source[1, first:end]  # lead II
    drawn = pairs[1][-1]["traces"][6][1]
    assert len(pairs[1]) == 1 + (model == "morphology")
    assert np.allclose(np.diff(drawn), -10 * np.diff(part), atol=0.011)


def test_bars_show_all_but_a_twentieth():
    def result(*terms):
        piece = {"claim": "like SR", "similarity": 0.5, "mean": 0.1, "prototypes": []}
        return {"average": -3.0, "logit": -3 + sum(terms),
                "pieces": [{**piece, "contribution": t} for t in terms]}

    values = [[v for _, v, _ in plot.bars_of(result(*terms))]
              for terms in ((4, -1), (4, -1, 0.1, 0.1), (2, 2, -2, 2))]
    assert values[0] == [-3, 4, -1, 0] and values[1][:3] == [-3, 4, -1]
    assert values[1][3] == pytest.approx(0.2) and values[2] == [-3, 2, 2, -2, 2, 1]
    assert [plot.shown(p) for p in (0.99999, 0.00001, 0.5)] == ["> 0.999", "< 0.001", "0.500"]


def test_a_case_of_ptbxl_is_written_whole(made, monkeypatch, capsys):
    row = int(np.flatnonzero(made.prep.val | made.prep.test)[3])
    ecg_id = int(made.prep.ecg_ids[row])
    run_stage(monkeypatch, NAME, *made.args, "--case", 10, ecg_id)
    out = capsys.readouterr().out
    assert f"test ECG {ecg_id}: " in out and "training ECG 10: " in out
    case = case_of(made, ecg_id)
    assert case["ecg_id"] == ecg_id
    assert case["true_labels"] == [c for c, on in zip(CODES, made.prep.labels[row]) if on]
    assert "classifiers/fusion.pt" in case["made_from"] and "preprocess.json" in case["made_from"]
    assert case["descriptions"]["IMI"] == HOSTILE
    saved = common.load(made.run / "classifiers/fusion.pt", "x")
    thresholds = dict(zip(saved["meta"]["classes"], torch.sigmoid(saved["thresholds"]).tolist()))
    assert {r["label"] for r in case["labels"]} == set(thresholds)
    for r in case["labels"]:  # the numbers of 04
        assert r["threshold"] == pytest.approx(thresholds[r["label"]])
        logit = float(saved["logits"][3, CODES.index(r["label"])])
        assert r["logit"] == pytest.approx(logit, abs=2e-3)
    reached = [r["label"] for r in case["labels"] if r["probability"] >= r["threshold"]]
    assert [r["label"] for r in case["explained"]] == (reached or [case["labels"][0]["label"]])
    text = (made.run / "cases" / f"{ecg_id}.html").read_text()
    pages = text.splitlines()[-len(case["explained"]):]
    assert text.count("<svg") == len(pages) and "<script" not in text
    for page in pages:  # on A4 no letter is under 7 points
        _, _, w, h = map(float, ElementTree.fromstring(page).get("viewBox").split())
        assert 3.5 * min(210 / w, 296 / h) * 72 / 25.4 > 7


def test_which_labels_are_explained(made, monkeypatch):
    """Those asked for, predicted or not; without any the most probable."""
    for label in ("LAO/LAE", "PRC(S)"):
        run_stage(monkeypatch, NAME, *made.args, "--case", 10, "--label", label)
        r, = case_of(made, 10)["explained"]
        assert r["label"] == label
    text = refused(monkeypatch, *made.args, "--case", 10, "--label", "FLUTTER")
    assert "FLUTTER" in text and "LVH" in text
    head, = heads = common.load_run(made.run)
    head.thresholds = np.full(len(head.classes), 99.0)
    monkeypatch.setattr(common, "load_run", lambda *a: heads)
    run_stage(monkeypatch, NAME, *made.args, "--case", 13)
    case = case_of(made, 13)
    assert [r["label"] for r in case["explained"]] == [case["labels"][0]["label"]]


def write_record(folder, fs=100, seconds=10, names=LEADS, units="mV", scale=1, signal=None, gain=0):
    """A WFDB record `own` in `folder`; returns its path without the ending."""
    x = heartbeats(fs, seconds) if signal is None else signal
    rows, n = [LEADS.index(n.upper().replace("X", "I")) for n in names], len(names)
    folder.mkdir(parents=True, exist_ok=True)
    wfdb.wrsamp("own", fs=fs, units=[units] * n, sig_name=list(names),
                p_signal=np.ascontiguousarray(x[rows].T) * scale, write_dir=str(folder),
                fmt=["16"] * n, adc_gain=[gain or 5000 / scale] * n, baseline=[0] * n)
    return str(folder / "own")


def test_the_trained_run_explains_a_record(tmp_path, monkeypatch, capsys):
    """tests/pretrained, of the default recipe, knows sinus rhythm where it is made up."""
    run = shutil.copytree(Path(__file__).parent / "pretrained", tmp_path / "run")
    assert sum(f.stat().st_size for f in run.rglob("*") if f.is_file()) < 12e6
    run_stage(monkeypatch, NAME, "--run", run, "--record", write_record(tmp_path, 500))
    assert "sinus rhythm (SR)" in capsys.readouterr().out
    case, = (json.loads(path.read_text()) for path in run.glob("cases/*.json"))
    first = case["explained"][0]
    assert first["label"] == "SR" and first["probability"] > 0.9
    assert first["pieces"][0]["class"] == "SR" and len(first["pieces"][0]["prototypes"]) == 5


@pytest.mark.parametrize("fs, units, scale, names", [
    (100, "mV", 1, LEADS), (500, "uV", 1000, [n.lower() for n in LEADS[::-1]]),
    (250, "V", 0.001, ["x", *LEADS[::-1]]), (257, "UV", 1000, LEADS), (62.5, "mV", 1, LEADS),
    (360, "MV", 1, [n.replace("AV", "aV") for n in LEADS])])
def test_own_records_of_any_rate_unit_and_order(tmp_path, fs, units, scale, names):
    seconds = 12.5 if fs == 500 else 10.0
    signal = heartbeats(fs, seconds) + 1  # mV of offset
    x, notes = plot.read_wfdb(write_record(tmp_path, fs, seconds, names, units, scale, signal))
    assert x.shape == (12, SAMPLES) and x.dtype == np.float32
    error = np.abs(x - common.highpass(heartbeats()))
    assert error[:, 20:-20].max() < (0.1 if fs < 100 else 0.01) and notes == []  # mV


def test_own_records_need_the_run_alone(made, monkeypatch, tmp_path, capsys):
    """One has a page; of several, all are in records.csv, and the bad ones named at the end."""
    folders = "x-y/z", "x/y-z", "ü (2)"
    paths = [write_record(tmp_path / folder, 500, 11.0) for folder in folders]
    for path in paths:  # records of one name keep their explanations
        run_stage(monkeypatch, NAME, *made.alone, "--record", f"{path}.hea")
        assert f"record {path[-70:]}: " in capsys.readouterr().out
    found = {file.stem: json.loads(file.read_text())
             for file in (made.run / "cases").glob("record-own-*.json")}
    assert {case["record"] for case in found.values()} == set(paths)
    assert len({case["title"] for case in found.values()}) == len(paths)
    p = common.predict(common.load_run(made.run), plot.read_wfdb(path)[0][None])[0]
    case = next(case for case in found.values() if case["record"] == path)
    assert not {"ecg_id", "true_labels"} & case.keys()
    for r in case["labels"]:
        assert r["probability"] == pytest.approx(p[CODES.index(r["label"])], abs=1e-6)

    bad = write_record(tmp_path / "bad", seconds=5)
    everything = [f"{path}{end}" for path in (*paths, bad) for end in (".dat", ".hea")]
    (tmp_path / "RECORDS").write_text("own")  # lies beside records, and is none
    everything.append(str(tmp_path / "RECORDS"))
    pages = set((made.run / "cases").iterdir())
    text = refused(monkeypatch, *made.alone, "--record", *everything)
    assert bad in text and "5.000 s" in text and paths[0] not in text
    with open(made.run / "cases/records.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["record"] for r in rows] == [path for path in paths for _ in case["labels"]]
    for row, r in zip(rows[-len(case["labels"]):], case["labels"]):
        assert row["label"] == r["label"] and row["predicted"] == str(r["predicted"])
        assert float(row["probability"]) == pytest.approx(r["probability"], abs=1e-6)
    first = case["explained"][0]["pieces"][0]
    said = f"{first['class']} {first['contribution']:+.2f}"
    assert rows[-len(case["labels"])]["pieces"].startswith(said)
    assert set((made.run / "cases").iterdir()) - pages == {made.run / "cases/records.csv"}
    there = str(tmp_path / "RECORDS")
    assert "no .hea" in refused(monkeypatch, *made.alone, "--record", there, there)
    before = (made.run / "cases/records.csv").read_bytes()
    for one in (["nosuch"], [paths[0]]):  # neither a typo nor one look changes it
        with pytest.raises(SystemExit) if one == ["nosuch"] else contextlib.nullcontext():
            run_stage(monkeypatch, NAME, *made.alone, "--record", *one)
    assert (made.run / "cases/records.csv").read_bytes() == before


def test_a_training_ecg_is_known_again(made, monkeypatch, tmp_path, capsys):
    """From 500 Hz and under another name: its patient's prototypes do not count for it."""
    q = made.prototypes[0]
    x = made.prep.signals[made.prep.row_of[q["ecg_id"]]]
    path = write_record(tmp_path, 500, signal=resample_poly(x, 5, 1, axis=1))
    run_stage(monkeypatch, NAME, *made.alone, "--record", path)
    assert f"This is training ECG {q['ecg_id']}." in capsys.readouterr().out
    case = next(json.loads(file.read_text()) for file in (made.run / "cases").glob("record-*.json")
                if path in file.read_text())
    assert not [each for r in case["explained"] for piece in r["pieces"]
                for each in piece["prototypes"] if each["ecg_id"] == q["ecg_id"]]


def changed(path, old, new):
    """A record after a change of its header's text."""
    header = Path(f"{path}.hea")
    assert old in header.read_text()
    header.write_text(header.read_text().replace(old, new))
    return path


def test_headers_as_published_sets_have_them(tmp_path):
    want = common.highpass(heartbeats())
    for name, old, new in (("length", " 500 5000", " 500"), ("unit", "/mV", ""),
                           ("date", " 500 5000", " 500 5000 12:30:00 01/05/2020")):
        x, notes = plot.read_wfdb(changed(write_record(tmp_path / name, 500), old, new))
        assert np.abs(x - want)[:, 20:-20].max() < 0.01 and notes == []
    path = write_record(tmp_path / "mat", 500)
    Path(f"{path}.mat").write_bytes(bytes(24) + Path(f"{path}.dat").read_bytes())
    for old, new in ((".dat 16 ", ".mat 16+24 "), (" 500 5000", " 500")):
        x, _ = plot.read_wfdb(changed(path, old, new))
        assert np.abs(x - want)[:, 20:-20].max() < 0.01
    for zero in "0(0)/", "0.0(0)/":
        path = write_record(tmp_path / "gain", 500)
        x, notes = plot.read_wfdb(changed(path, "5000.0(0)/", zero))
        assert "Not calibrated" in notes[0] and np.abs(x - 25 * want)[:, 20:-20].max() < 0.3
    other = changed(write_record(tmp_path / "other", names=["x", *LEADS]), "(0)/", "(0)/")
    text = Path(f"{other}.hea").read_text().splitlines()
    text[1] = text[1].replace(text[1].split()[2], "0(0)/mV")  # a channel that is no lead
    Path(f"{other}.hea").write_text("\n".join([*text, "# lab 0 in lead II", ""]))
    assert plot.read_wfdb(other)[1] == []
    with pytest.raises(SystemExit, match="dates.*2020"):
        plot.read_wfdb(changed(write_record(tmp_path), " 100 1000", " 100 1000 0:0:0 2020-05-01"))


def test_frames_of_several_samples_are_averaged(tmp_path):
    path = write_record(tmp_path, 500)
    header = Path(f"{path}.hea")
    leads = heartbeats(500).reshape(12, 1000, 5)
    samples = np.round(1000 * leads).astype("<i2").transpose(1, 0, 2)  # frame by frame
    Path(f"{path}.dat").write_bytes(samples.tobytes())
    text = header.read_text().replace(" 500 5000", " 100 1000").replace(".dat 16 ", ".dat 16x5 ")
    header.write_text(re.sub(r"16x5 \S+", "16x5 1000(0)/mV", text))
    x, _ = plot.read_wfdb(path)
    assert np.allclose(x, common.highpass(leads.mean(2)), atol=2e-3)


def test_headers_without_signals_are_refused(tmp_path):
    path = changed(write_record(tmp_path / "none", 500), "own 12 ", "own 0 ")
    with pytest.raises(SystemExit, match="has no signals"):
        plot.read_wfdb(path)
    path = write_record(tmp_path / "extra", names=["x", *LEADS])
    header = Path(f"{path}.hea")
    header.write_text(re.sub(r"5000.0\(0\)(.*x)", r"0(0)\1", header.read_text(), count=1))
    assert plot.read_wfdb(path)[1] == []  # not of a lead that is used


def test_segments_a_gap_and_the_start_in_a_long_record(tmp_path):
    long = heartbeats(500, 24)
    for name, part in (("one", long[:, :2000]), ("two", long[:, 2000:])):
        path = write_record(tmp_path, 500, signal=part)
        for end in "hea", "dat":
            text = Path(f"{path}.{end}").read_bytes().replace(b"own", name.encode())
            (tmp_path / f"{name}.{end}").write_bytes(text)
    (tmp_path / "all.hea").write_text("all/2 12 500 12000\none 2000\ntwo 10000\n")
    layout = "".join(f"~ 0 5000(0)/mV 16 0 0 0 0 {lead}\n" for lead in LEADS)
    (tmp_path / "plan.hea").write_text("plan 12 500 0\n" + layout)
    (tmp_path / "gap.hea").write_text("gap/3 12 500 10500\nplan 0\n~ 500\ntwo 10000\n")
    for name, start, first in (("all", 0, 0), ("all", 12.5, 12.5), ("gap", 1, 4), ("two", 6, 10)):
        x, _ = plot.read_wfdb(str(tmp_path / name), start)
        want = common.highpass(long[:, int(500 * first):][:, :5000:5])
        assert np.abs(x - want)[:, 20:-20].max() < 0.01
    with pytest.raises(SystemExit, match="--start"):
        plot.read_wfdb(str(tmp_path / "gap"))
    with pytest.raises(SystemExit, match="9.500 s from 14.5 s on"):
        plot.read_wfdb(str(tmp_path / "all"), 14.5)


@pytest.mark.parametrize("samples", [4990, 4999, 5000, 5001])
def test_a_fiftieth_of_a_second_may_miss(tmp_path, samples):
    x, _ = plot.read_wfdb(write_record(tmp_path, 500, signal=heartbeats(500)[:, :samples]
                                       if samples < 5001 else heartbeats(500, 10.002)))
    assert x.shape == (12, SAMPLES)
    assert np.abs(x - common.highpass(heartbeats()))[:, 20:-100].max() < 0.02


def test_flat_leads_are_named_and_flat_records_refused(tmp_path):
    x = heartbeats()
    x[3], x[8] = 0.7, 0
    _, notes = plot.read_wfdb(write_record(tmp_path, signal=x))
    assert notes == ["Lead aVR is flat.", "Lead V3 is flat."]
    for flat in (0 * x, 0 * x + 0.7, x / 1000):  # the last: microvolt named mV
        with pytest.raises(SystemExit, match="flat, or its gain or unit is wrong"):
            plot.read_wfdb(write_record(tmp_path, signal=flat))


@pytest.mark.parametrize("how, says", [
    (dict(names=[n for n in LEADS if n != "V3"]), "V3"), (dict(names=LEADS + ["v1"]), "V1"),
    (dict(seconds=9.9), "9.900 s"), (dict(units="mmHg"), "mmHg"),
    (dict(units="\u00b5V", scale=1000), "50 mV"),  # which wfdb reads as V
    (dict(signal=np.where(np.arange(12)[:, None] == 7, np.nan, heartbeats())), "lead V2"),
    (dict(signal=100 * heartbeats(), gain=100), "50 mV"), (dict(fs=25), "25 Hz")])
def test_own_records_that_cannot_be_used(tmp_path, how, says):
    path = write_record(tmp_path, **how)
    with pytest.raises(SystemExit) as e:
        plot.read_wfdb(path)
    assert says in sentence(e) and path in sentence(e)


def test_own_records_that_are_damaged(tmp_path):
    for ending, content in (
            ("hea", b""), ("hea", bytes(range(256))), ("hea", b"own 12 0 1000\n"),
            ("dat", bytes(5000)), ("dat", None), ("hea", None)):
        path = write_record(tmp_path)
        file = Path(f"{path}.{ending}")
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(SystemExit) as e:
            plot.read_wfdb(path)
        assert path in sentence(e)


def test_what_is_missing_or_of_another_prep_is_named(made, monkeypatch, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(made.run, run, ignore=shutil.ignore_patterns("cases", "figures"))
    other = write_prep(tmp_path / "other", n=80, seed=1, codes=WRITTEN)
    args = ["--run", run, "--prep", other.path.parent]
    assert "04_fusion.py" in refused(monkeypatch, *args, "--case", 10)
    assert "99999" in refused(monkeypatch, *made.args, "--case", 99999)
    (run / "classifiers/rhythm.pt").unlink()
    assert "04_fusion.py" in refused(monkeypatch, *args, "--model", "rhythm")
    shutil.rmtree(run)
    assert "02_train_joint.py" in refused(monkeypatch, *args, "--review")


def test_command_line(made, monkeypatch, capsys):
    for more, code in ((["--help"], 0), (["--model", "blackbox-1d"], 2)):
        with pytest.raises(SystemExit) as ended:
            run_stage(monkeypatch, NAME, *made.args, *more)
        assert ended.value.code == code
    assert len(capsys.readouterr().out.splitlines()) <= 60


def test_gallery_shows_every_prototype_and_escapes_hostile_text(made, monkeypatch, capsys):
    run_stage(monkeypatch, NAME, *made.alone, "--threads", 2)
    figures, total = made.run / "figures", len(made.prototypes)
    assert capsys.readouterr().out.endswith(f"{total} prototypes -> {figures}/gallery.html\n")
    text = (figures / "gallery.html").read_text()
    partial = sum(q["kind"] == "partial" for q in made.prototypes)
    assert text.count("<figure>") == total and text.count("<svg") == total + partial
    assert "<script" not in text and "<b>" not in text and escape(HOSTILE) in text
    sections = {(q["model"], q["class"]) for q in made.prototypes}
    assert text.count("<details") == text.count("</details>") == len(sections)
    for q in made.prototypes:
        assert f"{q['model']} {q['index']}: training ECG {q['ecg_id']}" in text


def test_demo_makes_a_case_and_the_gallery(made, monkeypatch, capsys):
    run_stage(monkeypatch, NAME, "--demo", *made.args, "--threads", 1)
    *_, case, last = capsys.readouterr().out.strip().splitlines()
    assert f"test ECG {made.prep.ecg_ids[made.prep.test][0]}" in case
    assert f" {len(made.prototypes)} prototypes -> " in last


@pytest.fixture(scope="module")
def review(made):
    with pytest.MonkeyPatch.context() as patch:
        run_stage(patch, NAME, *made.alone, "--review")
    return made.run / "review.html"


def test_review_page_holds_the_ecgs_but_not_their_source(made, review):
    text = review.read_text()
    assert text.count("<script") == text.count("</script>") == 1
    assert not [word for word in ("<img", "<!--", "ecg_id", "training ECG ", "similarity")
                if word in text]
    shown = {place: (code, picture) for picture, place, code in re.findall(
        r'<figure>(<svg.*)\n(?:<svg.*\n)?<form id="(.*?)">.*name="class" value="(.*?)">', text)}
    assert set(shown) == {f"{q['model']}/{q['index']}" for q in made.prototypes}
    for q in made.prototypes[::4]:
        (code, picture), x = shown[f"{q['model']}/{q['index']}"], q["x"]
        y = points(shapes(picture, "path")[-1])[:, 1]  # the strip
        assert code == q["class"]
        assert np.allclose(y - y[0], -10 * (x[1] - x[1, 0]), atol=0.07)


def test_review_in_a_browser(browser, review, made, tmp_path):
    from selenium.webdriver.common.by import By
    js = browser.execute_script

    def find(name):
        return browser.find_element(By.ID, name)

    def choose(form, css):
        form.find_element(By.CSS_SELECTOR, css).click()

    browser.set_window_size(1280, 900)
    browser.get(review.as_uri())
    js("document.querySelectorAll('details').forEach(e => { e.open = true })")
    forms = browser.find_elements(By.TAG_NAME, "form")
    ours = sorted(made.prototypes, key=lambda q: CODES.index(q["class"]))
    ids = [f"{q['model']}/{q['index']}" for q in ours]
    assert [form.get_attribute("id") for form in forms] == ids
    rated = "{} of %d rated" % len(ours)
    assert find("progress").text == rated.format(0)
    assert js("return document.documentElement.scrollWidth <= innerWidth")

    # The picture is there, and no text of it leaves the paper
    assert js("return document.querySelector('svg').getBoundingClientRect().width") > 600
    assert js("""return [...document.querySelectorAll('text')].every(t => {
        const b = t.getBBox(), all = t.ownerSVGElement.viewBox.baseVal;
        return b.x >= 0 && b.x + b.width <= all.width && b.y + b.height <= all.height + 1 })""")

    # Rate two, mark the third, and take the fourth back
    first, second, third, fourth = forms[:4]
    choose(first, "[name=representativeness][value='4']")
    choose(first, "[name=clarity][value='5']")
    choose(first, "textarea")
    first.find_element(By.TAG_NAME, "textarea").send_keys("clear </script> 1")
    choose(second, "[name=representativeness][value='2']")
    choose(second, "[name=clarity][value='3']")
    choose(third, "option:nth-child(4)")
    choose(fourth, "[name=clarity][value='1']")
    choose(fourth, "button")
    assert find("progress").text == rated.format(3)

    browser.refresh()  # kept in the browser; the rest is behind the first section
    assert find("progress").text == rated.format(3)
    js("document.querySelectorAll('details').forEach(e => { e.open = false })")
    find("next").click()
    form = find(ids[3])
    assert form.is_displayed() and js("return scrollY > 0")
    find("export").click()
    browser.switch_to.alert.send_keys("Dr. Ö")
    browser.switch_to.alert.accept()
    time.sleep(0.5)
    exported, = tmp_path.glob("ratings_*.json")
    found = json.loads(exported.read_text())
    rest = [{"class": q["class"], "mark": "", "comment": ""} for q in ours]
    rest[0].update(representativeness="4", clarity="5", comment="clear </script> 1")
    rest[1].update(representativeness="2", clarity="3")
    rest[2].update(mark="label-error")
    made_from = [common.file_hash(made.run / m / "projected.pt") for m in BRANCHES]
    assert found == {"kind": "protoecgnet-ratings", "reviewer": "Dr. Ö",
                     "run": str(made.run), "made": made_from, "ratings": dict(zip(ids, rest))}

    # Another browser begins anew, and imports them; a file of other prototypes is refused
    js("localStorage.clear()")
    browser.refresh()
    assert find("progress").text == rated.format(0)
    find("file").send_keys(str(exported))
    time.sleep(0.3)
    assert find("progress").text == rated.format(3)
    rest[0].update(clarity="3", comment="")  # what is imported replaces what is there
    del rest[0]["representativeness"]  # not rated: as a form has it
    exported.write_text(json.dumps({**found, "ratings": {ids[0]: {**rest[0], "mark": None}}}))
    find("file").send_keys(str(exported))
    time.sleep(0.3)
    assert js("return rating(document.forms[0])") == rest[0]
    assert find("progress").text == rated.format(2)
    exported.write_text(json.dumps({**found, "made": ["0"]}))
    find("file").send_keys(str(exported))
    time.sleep(0.3)
    assert "does not hold ratings" in browser.switch_to.alert.text
    browser.switch_to.alert.accept()
    summaries = js("return [...document.querySelectorAll('summary')].map(e => e.textContent)")
    assert f"{HOSTILE} (IMI), morphology: 4" in summaries
    assert not browser.find_elements(By.TAG_NAME, "img")
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []
