"""Script 06, pictures (paper 4.5, Appendices B-D): prototypes, explanations, a page for clinicians.

ECGs are drawn as on clinical paper. What a prototype looks at is blue: 0.94 s of all leads
(partial), the strip (1D), or nothing, as it is all of it (global). A page says how similarities
lead from the logit of the average training record to that of this one, without prototypes of the
same patient.

reads   RUN/classifiers/fusion.pt (MODEL.pt with --model, or where there is no fusion),
        RUN/MODEL/projected.pt, prototypes.json, prototypes.npy.gz; PREP for --case alone
writes  RUN/figures/gallery.html; RUN/cases/NAME.html, a page a label when printed, and NAME.json
        with all that it shows, records.csv; RUN/review.html

    python 06_plot_prototypes.py                   the gallery of all prototypes
    python 06_plot_prototypes.py --case 449        why is this said of this ECG of PTB-XL?
    python 06_plot_prototypes.py --record my/ecg   the same for your own WFDB record (my/ecg.hea)
    python 06_plot_prototypes.py --record my/*     for many: cases/records.csv; pages with --pages
    python 06_plot_prototypes.py --review          one HTML file to rate prototypes (Appendix C)

Takes some seconds on 2 CPU cores.
Last line: `runs/default: 355 prototypes -> runs/default/figures/gallery.html`.
"""
import hashlib
import json
import os
import re
import sys
import textwrap
from fractions import Fraction
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.signal import resample_poly
from tqdm import tqdm

import common
from common import BOXES, CODES, LEADS, RATE, SAMPLES

NAMES = [lead.replace("AV", "aV") for lead in LEADS]
ROWS = [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]  # of leads, on clinical paper
STEP = 25 / RATE  # mm a sample, at 25 mm/s
LEFT, WIDTH = 15, 270  # mm: where traces begin, and the paper's width
PULSE = np.repeat([0, 1, 0], [4, 20, 4])  # calibration: 1 mV for 0.2 s
MARGIN = 13.5  # mm, of a sheet
SAID = "label", "classifier", "probability", "threshold", "predicted", "logit"
BLUE, ORANGE, GREY = "#0b4f8a", "#d55e00", "#888888"


# ---- Layout: a scene is what lies where, in mm from the upper left corner of its paper

def paper(rows, w, h, step, columns, text):
    """A scene of rows of leads [(its number, mV [n])], `columns` mm apart: traces (x, step, y [n]),
    texts (x, y, size, text), boxes (x, y, w, h, filled). It has half gain, 5 mm/mV, and says so,
    where a trace would leave the paper."""
    most = np.array([max(y.max() for _, y in row) for row in rows])
    least = np.array([min(y.min() for _, y in row) for row in rows])
    for gain in (10, 5):
        up, down = np.clip(gain * most, 6, 30), np.clip(-gain * least, 6, 30)
        scale = (h - 11) / (up + down).sum()  # below 1 rows overlap
        zero = np.round(5 + scale * (np.cumsum(up + down) - down))
        if (zero >= gain * most).all() and (zero - gain * least <= h).all():
            break
    note = "10 mm/mV" if gain == 10 else "HALF GAIN: 5 mm/mV"
    traces, texts = [], [(LEFT, h - 1.5, 3.5, f"{text}, {note}")]
    for row, y0 in zip(rows, zero):
        traces.append((LEFT - 29 * step, step, y0 - gain * PULSE))
        for column, (lead, signal) in enumerate(row):
            x = LEFT + columns * column
            traces.append((x, step, np.clip(y0 - gain * signal, 0, h)))
            texts.append((x + 1.5, y0 - 2.5, 3.5, NAMES[lead]))
    return {"w": w, "h": h, "traces": traces, "texts": texts, "boxes": []}


def whole(x, kind, windows=()):
    """The scene of x [12, 1000] mV as 3 x 4 leads and strip. Of the 1D kind the strip is marked; of
    the partial one the first of `windows` [(first, end)], while the others are outlined."""
    rows = [[(lead, x[lead, 250 * i:250 * i + 250]) for i, lead in enumerate(row)] for row in ROWS]
    rows.append([(1, x[1])])
    scene = paper(rows, WIDTH, 106, STEP, 62.5, "25 mm/s, high-pass 0.5 Hz")
    if kind == "1d":
        top = max(60, min(y.min() for _, _, y in scene["traces"][-2:]) - 2)
        scene["boxes"].append((LEFT - 1, top, 252, 100 - top, True))
    if kind == "partial":
        for rank, (first, end) in enumerate(windows):
            x0, y0 = LEFT + STEP * first, 1 + 1.2 * rank  # staggered, as windows may overlap
            scene["boxes"].append((x0, y0, STEP * (end - first), 100 - y0, rank == 0))
    return scene


def cut_out(x, window):
    """The scene of a window (first, end) of x [12, 1000] mV, all leads."""
    first, end = window
    rows = [[(lead, x[lead, first:end]) for lead in row] for row in ROWS]
    return paper(rows, 134, 74, STEP, 29, f"{first / RATE:.2f} to {end / RATE:.2f} s, 25 mm/s")


# ---- Drawing: SVG in mm

def svg(w, h, shapes):
    """A picture of its true size."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}mm" '
            f'height="{h}mm" fill="none" font-family="sans-serif">{"".join(shapes)}</svg>\n')


def letters(x, y, mm, text, style=""):
    """Text from (x, y) on, in letters of so many mm, with a halo."""
    return (f'<text x="{x:.2f}" y="{y:.2f}" font-size="{mm}" fill="#000" stroke="#fff" '
            f'stroke-width="0.7" paint-order="stroke"{style}>{escape(text)}</text>')


def rectangle(x, y, w, h, style):
    """A box with its upper left corner at (x, y)."""
    return f'<rect x="{x:.2f}" y="{y:.2f}" width="{w:.2f}" height="{h:.2f}" {style}/>'


def draw(scene, left=0, top=0):
    """A scene, its upper left corner at (left, top)."""
    w, h, shapes = scene["w"], scene["h"], [f'<g transform="translate({left} {top})">']
    for step, colour, mm in ((1, "#f9dcdc", 0.1), (5, "#eeb0b0", 0.2)):
        d = "".join(f"M{x} 0V{h}" for x in range(0, w + 1, step))
        d += "".join(f"M0 {y}H{w}" for y in range(0, h + 1, step))
        shapes.append(f'<path d="{d}" stroke="{colour}" stroke-width="{mm}"/>')
    for *box, filled in scene["boxes"]:
        style = f'fill="#56b4e9" fill-opacity="{0.22 * filled}" stroke="{BLUE}" stroke-width="0.3"'
        shapes.append(rectangle(*box, style))
    for x, step, y in scene["traces"]:  # in twentieths of a mm, from point to point
        first, *changes = np.diff(np.round(20 * y), prepend=0).astype(int).tolist()
        points = " ".join(f"{20 * step:.0f} {change}" for change in changes)
        style = 'transform="scale(.05)" stroke="#000" stroke-width="6"'
        shapes.append(f'<path d="M{20 * x:.0f} {first}l{points}" {style}/>')
    shapes += [letters(*text) for text in scene["texts"]]
    return "".join(shapes) + "</g>"


def draw_bars(bars, top):
    """Bars (what, value, more), a line each, to scale, from a common zero."""
    values, shapes = [value for _, value, _ in bars], []
    most, least = max(*values, 0), min(*values, 0)
    mm = 70 / (most - least)
    zero = 80 - mm * least
    for i, (what, value, more) in enumerate(bars):
        y = top + 5.5 * i + 2.5
        colour = BLUE if value > 0 else ORANGE
        if i in (0, len(bars) - 1):  # where the sum begins, and itself
            colour = GREY
        x = zero + mm * min(value, 0)
        shapes += [rectangle(x, y - 1.8, mm * abs(value), 3.6, f'fill="{colour}"'),
                   letters(MARGIN, y + 1.2, 3.5, what), letters(154, y + 1.2, 3.5, more),
                   letters(78, y + 1.2, 3.5, f"{value:+.2f}", ' text-anchor="end"')]
    return "".join(shapes)


def sheet(title, text, items):
    """A page as SVG: title, text, then from top to bottom `items`: rows of scenes, lines of text
    of which the first is a heading, or lists of bars (what, value, more)."""
    bold, lines = ' font-weight="bold"', textwrap.wrap(text, 145)
    shapes = [letters(MARGIN, 10, 4.5, title, bold)]
    shapes += [letters(MARGIN, 17 + 5 * i, 3.5, line) for i, line in enumerate(lines)]
    y = 19 + 5 * len(lines)
    for item in items:
        if isinstance(item, str):
            heading, *more = item.splitlines()
            shapes.append(letters(MARGIN, y + 5, 4, heading, bold))
            shapes += [letters(MARGIN, y + 10, 3.5, line) for line in more]
            y += 7 + 5 * len(more)
        elif isinstance(item[0], dict):
            for left, scene in zip((MARGIN, MARGIN + WIDTH - item[-1]["w"]), item):
                shapes.append(draw(scene, left, y))
            y += 3 + item[0]["h"]
        else:
            shapes.append(draw_bars(item, y))
            y += 3 + 5.5 * len(item)
    return svg(WIDTH + 2 * MARGIN, y + 4, shapes)


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>TITLE</title>
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'"><style>
body { font: 16px/1.4 sans-serif; margin: 8px }
"""


# ---- Gallery

def pictures_of(q):
    """A prototype as SVG: the whole ECG, and of the partial kind its window."""
    scenes = [whole(q["x"], q["kind"], [q["samples"]])]
    if q["kind"] == "partial":
        scenes.append(cut_out(q["x"], q["samples"]))
    return "".join(svg(scene["w"], scene["h"], [draw(scene)]) for scene in scenes)


def source(q):
    """A prototype and where it comes from, in words."""
    text = "prototype {model} {index}: training ECG {ecg_id}, {0:.2f} to {1:.2f} s"
    return text.format(*np.divide(q["samples"], RATE), **q)


def gallery(args, prototypes, words, mark):
    """Write gallery.html: pictures of all prototypes, a section for each label of a model."""
    sections = {}
    for q in tqdm(prototypes, "pictures", disable=None):
        about = f"{source(q)}, labelled {'; '.join(words[c] for c in q['labels'])}"
        figure = f"<figure>{pictures_of(q)}<figcaption>{escape(about)}</figcaption></figure>"
        sections.setdefault(f"{words[q['class']]}, {q['model']}", []).append(figure)
    path = args.run / "figures/gallery.html"
    title = f"{mark}{args.run}: {len(prototypes):,} prototypes"
    text = (PAGE + GALLERY).replace("TITLE", escape(title))
    for heading, figures in sections.items():
        text += f"<details><summary>{escape(heading)}: {len(figures)}</summary>"
        text += "".join(figures) + "</details>"
    common.save(path, text.replace("<details>", "<details open>", 1))
    print(f"{title} -> {path}")


GALLERY = """figure { display: inline-block; vertical-align: top; width: 600px; margin: 8px }
svg { border: 1px solid #bbb; width: 100%; height: auto }
</style><h1>TITLE</h1><p>Each prototype is a real training ECG, or 0.94 s of one, with which the
model compares new ECGs. Below it are its source and all its labels. Not for clinical use.</p>
"""


# ---- Explanations (4.5)

def read_wfdb(path, start=0.0):
    """10 s of a WFDB record from second `start` on -> x [12, 1000] mV at 100 Hz, our leads,
    filtered as 01's, and notes on what is odd in it."""
    import wfdb  # slow to import
    try:
        header = wfdb.rdheader(path)
        fs, length, first = header.fs, header.sig_len, round(start * header.fs)
        end = length and min(length, first + int(np.ceil(10 * fs)))  # None: not in the header
        record = wfdb.rdrecord(path, sampfrom=first, sampto=end)
        lines = [line.split() for line in Path(f"{path}.hea").read_text("latin-1").splitlines()]
        gains = [line[2] for line in lines if len(line) > 2 and line[-1].upper() in LEADS]
        no_gain = 0 in [float(re.split("[(/]", gain)[0]) for gain in gains]
    except Exception as e:  # wfdb raises many kinds on a damaged file
        reason = str(e).splitlines()[0] if str(e) else ""
        sys.exit(f"{path} is not a record that wfdb can read ({type(e).__name__}: {reason}): its "
                 ".hea is text, where dates, and dots and spaces in names, can be mended")
    frames = getattr(header, "samps_per_frame", None) or [1]
    if record.p_signal is None or not 50 <= fs <= 10_000 or max(frames) > 1:
        sys.exit(f"{path} has no signals, {fs:g} Hz, or leads of several rates: it must have 50 to "
                 "10,000 Hz, one sample a frame")
    seconds = len(record.p_signal) / fs
    if seconds < 9.98:
        sys.exit(f"{path} has {seconds:.3f} s from {start:g} s on: the model needs 10 s")
    names = [str(name).strip().upper() for name in record.sig_name]
    x, millivolt = [], {"mv": 1, "uv": 1e-3, "v": 1e3}
    for lead in LEADS:
        if names.count(lead) != 1:
            sys.exit(f"{path} must hold each of the 12 leads once, not so {lead}")
        i = names.index(lead)
        unit = str(record.units[i] or "mV")
        x.append(record.p_signal[:int(np.ceil(10 * fs)), i] * millivolt.get(unit.lower(), np.nan))
        if not np.all(np.abs(x[-1] - np.median(x[-1])) < 50):
            sys.exit(f"{path} cannot be used: lead {lead}, in {unit}, has missing samples (try "
                     "--start), exceeds 50 mV or its unit is none of mV, uV, V")
    up, down = Fraction(RATE / fs).limit_denominator(20_000).as_integer_ratio()
    x = resample_poly(x, up, down, axis=1, padtype="line")[:, :SAMPLES]
    height = np.ptp(x, axis=1)
    if height.max() < 0.1:
        sys.exit(f"{path} is flat, or its gain or unit is wrong: no lead is 0.1 mV high")
    flat = ", ".join(name for name, mv in zip(NAMES, height) if mv < 0.01)
    notes = [f"Flat leads: {flat}."] if flat else []
    if no_gain:
        notes.append("Not calibrated: with a gain of 0, 200 units are taken for 1 mV.")
    x = np.pad(x, ((0, 0), (0, SAMPLES - x.shape[1])), "edge")  # the last 0.02 s may miss
    return common.highpass(x).astype(np.float32), notes


@torch.no_grad()
def matched_windows(head, q, x):
    """The windows (first, end) of x whose mean is the similarity to prototype q, best first."""
    network = head.networks[head.branches.index(q["model"])]
    z = network.latent(torch.from_numpy(x)[None].to(network.p.device))
    S = common.similarity(z, network.p[q["index"], None], network.a)[0, 0]  # [windows]
    best = S.cpu().sort(descending=True, stable=True).indices[:network.top_k]
    return [common.window_samples(network.kind, w) for w in best.tolist()]


def bars_of(r):
    """Bars for a label's pieces of evidence: all but a rest of under 5 %."""
    sizes = [abs(piece["contribution"]) for piece in r["pieces"]]
    most = 1 + int(np.searchsorted(np.cumsum(sizes), 0.95 * sum(sizes)))
    bars = []
    for piece in r["pieces"][:most]:
        ids = " ".join(str(q["ecg_id"]) for q in piece["prototypes"])
        like = "like" if piece["similarity"] > piece["mean"] else "unlike"
        bars.append((f"{like} {piece['class']}", piece["contribution"],
                     f"similarity {piece['similarity']:.2f}, average {piece['mean']:.2f}, to ECG "
                     f"{ids}"))
    rest = [piece["contribution"] for piece in r["pieces"][most:]]
    if rest:
        bars.append((f"and {len(rest)} more, together", sum(rest), ""))
    first, last = ("the average training record", r["average"], ""), ("logit", r["logit"], "")
    return [first, *bars, last]


def page(case, x, r, head, top, words):
    """Title, text and items of the sheet that explains what is said of label r to ECG x."""
    verdict = "predicted" if r["predicted"] else "not predicted"
    known = "; ".join(words[c] for c in case["true_labels"] or []) or "not known"
    text = " ".join([
        f"{case['title']}. Probability {shown(r['probability'])}, predicted from "
        f"{shown(r['threshold'])} on, by the {r['classifier']} classifier. True labels: {known}.",
        *case["notes"],
        "For research, not for clinical use."])
    by_id = {(q["model"], q["index"]): q for q in head.prototypes}
    pairs, first = [], None
    speaking = [q for q in r["pieces"] if q["contribution"] > 0 or not r["predicted"]]
    for piece in speaking[:top]:
        if abs(piece["contribution"]) < abs(speaking[0]["contribution"]) / 5:
            break
        nearest = piece["prototypes"][0]
        q = by_id[nearest["model"], nearest["index"]]
        windows = matched_windows(head, q, x)
        first = first or (q["kind"], windows)
        labels = textwrap.shorten("; ".join(words[c] for c in q["labels"]), 140)
        pairs.append(f"{piece['class']}: nearest is {source(q)}, similarity "
                     f"{nearest['similarity']:.2f}\nlabelled {labels}")
        if q["kind"] == "partial":
            pairs.append([cut_out(x, windows[0]), cut_out(q["x"], q["samples"])])
        else:
            pairs.append([whole(q["x"], q["kind"])])
    ecg, heading = [whole(x, *first or ("global", []))], "What speaks for and against it"
    title = f"{head.mark}{words[r['label']]} {verdict}"
    return title, text, [ecg, heading, bars_of(r), *pairs]


def shown(p):
    """A probability that claims no certainty."""
    if 0.001 <= p <= 0.999:
        return f"{p:.3f}"
    return "> 0.999" if p > 0.5 else "< 0.001"


def write_case(args, heads, words, x, case, results):
    """Write NAME.html, a page to print for each label that is predicted or asked for, and JSON."""
    explained = [r for r in results if r["predicted"]] or results[:1]
    if args.label:
        explained = [r for r in results if r["label"] in args.label]
    path = args.run / "cases" / f"{case['name']}.html"
    text = (PAGE + CASE).replace("TITLE", escape(case["title"]))
    by_name = {head.name: head for head in heads}
    for r in explained:
        text += sheet(*page(case, x, r, by_name[r["classifier"]], args.top, words))
    common.save(path, text)
    inputs = [(args.run / f"classifiers/{head.name}.pt", vars(head)) for head in heads]
    common.save(path.with_suffix(".json"), {
        **common.provenance(args, *inputs), **case, "explained": explained,
        "labels": [{k: r[k] for k in SAID} for r in results],
        "descriptions": heads[0].descriptions})
    said = [f"{words[r['label']]} {shown(r['probability'])}" for r in explained]
    print(" ".join([f"{args.run}: {case['title']}: {', '.join(said)} -> {path}", *case["notes"]]))


def explain_records(args, heads, words):
    """Explain own WFDB records: pages and records.csv; ends with those that cannot be used."""
    paths = {}
    for path in args.record:  # of my/* only what has a header
        stem = re.sub(r"\.(hea|dat|mat)$", "", path)
        if len(args.record) == 1 or Path(f"{stem}.hea").is_file() or not Path(path).exists():
            paths[stem] = os.fsencode(stem).decode("utf-8", "replace")
    prototypes = [q for head in heads for q in head.prototypes]
    rows, failed = [], []
    for path, said in tqdm(paths.items(), "records", disable=None):
        try:
            x, notes = read_wfdb(path, args.start)
        except SystemExit as e:
            failed.append(str(e))
            continue
        if args.start:
            notes.append(f"From {args.start:g} s on.")
        patient = None
        for q in prototypes:  # PTB-XL's ECGs are in other data sets too, at other rates
            if patient is None and np.corrcoef(x.ravel(), q["x"].ravel())[0, 1] > 0.75:
                patient = q["patient"]
                notes.append(f"This is training ECG {q['ecg_id']}.")
                if patient >= 0:
                    notes.append("Prototypes of its patient do not count.")
        results = common.explain(heads, x, patient)
        for r in results:
            pieces = [f"{q['class']} {q['contribution']:+.2f}" for q in r["pieces"][:3]]
            rows.append({"record": said, **{k: r[k] for k in SAID}, "pieces": "; ".join(pieces),
                         "notes": " ".join(notes)})
        if len(paths) == 1 or args.pages:
            place = f"{os.path.abspath(path)} {args.start}".encode("utf-8", "surrogateescape")
            name = re.sub(r"\W+", "-", Path(said).name).strip("-")[:60]
            write_case(args, heads, words, x, {
                "name": f"record-{name}-{hashlib.sha256(place).hexdigest()[:6]}",
                "title": f"{heads[0].mark}record {said[-70:]}", "true_labels": None,
                "ecg_id": None, "record": said, "notes": notes}, results)
    if len(paths) > 1 and rows:
        table = pd.DataFrame(rows).to_csv(index=False, float_format="%.6f")
        common.save(args.run / "cases/records.csv", table)
        print(f"{args.run}: {len(paths) - len(failed)} records -> {args.run}/cases/records.csv")
    if failed:
        sys.exit("\n".join(failed))


CASE = """@page { size: A4; margin: 0 }
svg { display: block; max-width: 100%; max-height: 296mm; height: auto; break-after: page }
@media print { body { margin: 0 } }
</style>
"""


# ---- Review page (3.6, Appendix C)

def review(args, heads, prototypes, words):
    """Write review.html: prototypes, known by class alone, and how to rate them."""
    items = [{"id": f"{q['model']}/{q['index']}", "class": q["class"], "picture": pictures_of(q)}
             for q in tqdm(prototypes, "review page", disable=None)]
    made = [head.made_from[f"{model}/projected.pt"] for head in heads for model in head.branches]
    data = {"run": str(args.run), "made": made, "words": words, "items": items}
    data = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # ends no script
    page = (PAGE + REVIEW).replace("TITLE", "Prototype review").replace(
        "style-src", "script-src 'unsafe-inline'; style-src").replace("DATA", data)
    common.save(args.run / "review.html", page)
    print(f"{args.run}: {len(items):,} prototypes -> {args.run / 'review.html'}")


REVIEW = r"""body { display: flex; flex-wrap: wrap; gap: 8px }
#paper { flex: 1 680px } #panel { flex: 1 250px; max-width: 400px }
svg { width: min(100%, 150vh - 120px); height: auto; border: 1px solid #d98c8c }
button, select { font: inherit; min-height: 44px; min-width: 44px; max-width: 300px }
[aria-pressed=true] { background: #0b4f8a; color: #fff }</style>
<header style="width: 100%"><select id="class"></select> <button id="previous">&#9664;</button>
<button id="next">&#9654;</button> <button id="unrated">Next unrated</button>
<span id="progress"></span> <button id="export">Export</button>
<label>Import <input id="file" type="file" accept=".json"></label>
<button id="anew">Start anew</button></header>
<main id="paper"></main><section id="panel"><h3 id="title"></h3>
<p><b>Representativeness</b> Does the prototype reflect a typical or defining presentation of the
assigned diagnostic class? (5 is best)</p><div id="representativeness"></div>
<p><b>Clarity</b> Is the ECG signal in the prototype clean and interpretable, or is it obscured by
noise or artifacts that make interpretation difficult? (5 is best)</p><div id="clarity"></div>
<p><b>Mark and comment</b></p><div id="mark"></div><textarea id="comment" rows="4"></textarea>
<p>Keys: 1-5 representativeness, Shift + 1-5 clarity, arrows previous and next, N next unrated.
Ratings stay in this browser; export them to hand them in.</p></section>
<script type="application/json" id="data">DATA</script><script>
const $ = id => document.getElementById(id);
const {run, made, words, items} = JSON.parse($("data").textContent);
const key = `protoecgnet ${run} ${made}`, scale = [1, 2, 3, 4, 5];
const choices = {representativeness: scale, clarity: scale, mark: ["best", "bad", "label-error"]};
const empty = {representativeness: null, clarity: null, mark: null, comment: ""};
let ratings = JSON.parse(localStorage.getItem(key)) ?? {}, at = 0;  // at: the item on view

function make(parent, tag, attributes, text = "") {  // text never meets the HTML parser
  const e = parent.appendChild(document.createElement(tag));
  for (const name in attributes) e.setAttribute(name, attributes[name]);
  e.textContent = text;
  return e;
}
const rating = q => ({class: q.class, ...empty, ...ratings[q.id]});
function done(q) {
  const {mark, representativeness, clarity} = rating(q);
  return mark === "label-error" || representativeness && clarity;
}
function change(name, value) {  // the same choice once more takes it back
  const q = items[at], r = rating(q);
  ratings[q.id] = {...r, [name]: r[name] === value ? null : value};
  show();
}
function show() {  // all but the picture
  const q = items[at], r = rating(q), same = items.filter(o => o.class === q.class);
  localStorage.setItem(key, JSON.stringify(ratings));
  $("title").textContent = `${words[q.class]}: prototype ${same.indexOf(q) + 1} of ${same.length}`;
  $("progress").textContent = `${items.filter(done).length} of ${items.length} rated`;
  $("class").value = q.class;
  if ($("comment").value !== r.comment) $("comment").value = r.comment;
  for (const name in choices) for (const button of $(name).children)
    button.setAttribute("aria-pressed", button.textContent === String(r[name]));
}
function go(i) {
  at = (i + items.length) % items.length;
  $("paper").innerHTML = items[at].picture;  // in which all text is escaped
  show();
}
const jump = wanted => wanted && go(items.indexOf(wanted));
const actions = {
  previous: () => go(at - 1), next: () => go(at + 1),
  unrated: () => jump([...items.slice(at + 1), ...items].find(q => !done(q))),
  anew: () => {
    if (confirm("Forget the ratings in this browser? Export them first.")) ratings = {};
    show();
  },
  export: () => {
    const reviewer = prompt("Your name, as the reviewer?");
    if (!reviewer) return;
    const out = {format: 1, kind: "protoecgnet-ratings", reviewer, run, made, ratings};
    const href = URL.createObjectURL(new Blob([JSON.stringify(out)]));
    make(document.body, "a", {download: `ratings_${reviewer}.json`, href}).click();
  },
};
for (const id in actions) $(id).onclick = actions[id];
for (const c of new Set(items.map(q => q.class))) make($("class"), "option", {value: c}, words[c]);
for (const name in choices) for (const value of choices[name])
  make($(name), "button", {}, value).onclick = () => change(name, value);
$("class").onchange = ({target}) => {
  jump(items.find(q => q.class === target.value));
  target.blur();  // back to the keys
};
$("comment").oninput = e => change("comment", e.target.value);
$("file").onchange = async ({target}) => {
  const found = await target.files[0].text().then(JSON.parse).catch(() => ({}));
  target.value = "";  // so that the same file can be chosen again
  if (found.kind !== "protoecgnet-ratings" || String(found.made) !== String(made))
    return alert("This file does not hold ratings of these prototypes.");
  Object.assign(ratings, found.ratings);
  show();
};
onkeydown = e => {
  if (/TEXTAREA|SELECT/.test(e.target.tagName) || e.ctrlKey || e.altKey || e.metaKey) return;
  if (/^(Digit|Numpad)[1-5]$/.test(e.code))
    change(e.shiftKey ? "clarity" : "representativeness", Number(e.code.at(-1)));
  actions[{ArrowLeft: "previous", ArrowRight: "next", n: "unrated"}[e.key]]?.();
};
go(0);
</script></html>
"""


def main():
    p = common.argument_parser(__doc__, *common.RUN_FLAGS)
    what = p.add_mutually_exclusive_group()
    what.add_argument("--case", type=int, nargs="+", metavar="ECG_ID", help="explain these ECGs")
    what.add_argument("--record", nargs="+", metavar="PATH", help="explain your own WFDB records")
    what.add_argument("--review", action="store_true", help="write the page for clinicians")
    p.add_argument("--label", nargs="+", metavar="CODE", help="explain these, predicted or not")
    p.add_argument("--start", type=float, default=0, metavar="S", help="second of a long --record")
    p.add_argument("--pages", action="store_true", help="a page for each of several records too")
    p.add_argument("--top", type=int, default=2, metavar="N", help="pieces to show (default 2)")
    args = common.parse(p)
    if args.top < 1 or set(args.model or ()) & set(BOXES):
        p.error("--top must be at least 1, and black boxes have no prototypes")
    heads = common.load_run(args.run, args.model, args.device)
    known = {c for head in heads for c in head.classes}
    for code in set(args.label or ()) - known:
        sys.exit(f"{args.run} has no label {code}, but {', '.join(sorted(known))}")
    words = {c: f"{text} ({c})" for c, text in heads[0].descriptions.items()}
    prototypes = [q for head in heads for q in head.prototypes]
    prototypes.sort(key=lambda q: CODES.index(q["class"]))
    if args.review:
        return review(args, heads, prototypes, words)
    if args.record:
        return explain_records(args, heads, words)
    if args.case or args.demo:
        prep = common.load_prep(args.prep)
        classifier = args.run / f"classifiers/{heads[0].name}.pt"
        common.load(classifier, "04_fusion.py", args)  # exits if it is not of this PREP
        for ecg_id in args.case or prep.ecg_ids[prep.test][:1].tolist():
            row = prep.row_of.get(ecg_id)
            if row is None:
                sys.exit(f"{args.prep} has no ECG {ecg_id}")
            part = ["training", "validation", "test"][max(0, prep.folds[row] - 8)]
            labels = [c for c, on in zip(CODES, prep.labels[row]) if on]
            results = common.explain(heads, prep.signals[row], prep.patient_ids[row])
            write_case(args, heads, words, prep.signals[row], {
                "name": str(ecg_id), "title": f"{heads[0].mark}{part} ECG {ecg_id}", "notes": [],
                "true_labels": labels, "ecg_id": ecg_id, "record": None}, results)
    if not args.case:
        gallery(args, prototypes, words, heads[0].mark)


if __name__ == "__main__":
    common.run(main)
