"""Stage 06, pictures (paper 4.5, Appendices B-D): prototypes, explanations, a page for clinicians.

ECGs are drawn as on clinical paper. What a prototype looks at is blue: 0.94 s of all leads
(partial), the strip (1D), or nothing, as it is all of it (global). A page says how similarities
lead from the logit of the average training record to that of this one, without prototypes of the
same patient.

reads   RUN/classifiers/fusion.pt (MODEL.pt with --model, or where there is no fusion),
        RUN/MODEL/projected.pt, prototypes.json, prototypes.npy; PREP for --case alone
writes  RUN/figures/gallery.html, MODEL/*.png; RUN/cases/NAME.pdf, a page for each label, the same
        as NAME/*.png, and NAME.json with all that they show; RUN/review.html

    python 06_plot_prototypes.py                   the gallery of all prototypes
    python 06_plot_prototypes.py --case 449        why is this said of this ECG of PTB-XL?
    python 06_plot_prototypes.py --record my/ecg   the same for your own WFDB record (my/ecg.hea)
    python 06_plot_prototypes.py --review          one HTML file to rate prototypes (Appendix C)

Takes a minute for 355 prototypes on 2 CPU cores, a second for each page of a case.
Last line: `runs/default: 355 of 355 prototypes -> runs/default/figures/gallery.html`.
"""
import html
import io
import json
import os
import re
import sys
import textwrap

import matplotlib
import numpy as np
import torch
from joblib import Parallel, delayed
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image
from scipy.signal import resample_poly
from tqdm import tqdm

import common
from common import BOXES, CODES, LEADS, RATE, SAMPLES

matplotlib.rcParams["text.parse_math"] = False  # "$" in a text is a "$"
NAMES = [lead.replace("AV", "aV") for lead in LEADS]
ROWS = [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]  # of leads, on clinical paper
STEP = 25 / RATE  # mm a sample, at 25 mm/s
LEFT, WIDTH = 15, 270  # mm: where traces begin, and the paper's width
PULSE = np.repeat([0, 1, 0], [4, 20, 4])  # calibration: 1 mV for 0.2 s
MARGIN = 13.5  # mm, of a sheet
DPI = 127  # 5 pixels a mm: grid lines fall on whole pixels
POINT = 72 / 25.4  # points a mm, for letters and line widths


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
    traces, texts = [], [(LEFT, h - 1.5, 3.5, f"{text}   {note}")]
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
    scene = paper(rows, WIDTH, 106, STEP, 62.5, "25 mm/s   high-pass 0.5 Hz")
    if kind == "1d":
        top = min(y.min() for _, _, y in scene["traces"][-2:]) - 2
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
    return paper(rows, 134, 74, STEP, 29, f"{first / RATE:.2f} to {end / RATE:.2f} s   25 mm/s")


# ---- Drawing

def draw(ax, scene, left, top):
    """A scene on a sheet, its upper left corner at (left, top) mm."""
    w, h = scene["w"], scene["h"]
    for step, colour, mm in ((1, "#f9dcdc", 0.1), (5, "#eeb0b0", 0.2)):
        style = {"color": colour, "linewidth": mm * POINT, "zorder": 0}
        ax.vlines(left + np.arange(0, w + 1, step), top, top + h, **style)
        ax.hlines(top + np.arange(0, h + 1, step), left, left + w, **style)
    for x, y, width, height, filled in scene["boxes"]:
        style = {"fc": ("#56b4e9", 0.22 * filled), "ec": "#0b4f8a", "lw": 0.3 * POINT}
        ax.add_patch(Rectangle((left + x, top + y), width, height, **style))
    for x, step, y in scene["traces"]:
        x = left + x + step * np.arange(len(y))
        ax.plot(x, top + y, color="black", linewidth=0.3 * POINT)
    halo = [withStroke(linewidth=0.7 * POINT, foreground="white")]
    for x, y, mm, text in scene["texts"]:
        ax.text(left + x, top + y, text, fontsize=mm * POINT, path_effects=halo)


def save_sheet(path, title, text, items, pdf=None):
    """Write a sheet to a PNG of true size, and to a PDF: title, text, then from top to bottom
    `items`: rows of scenes, lines of text, or lists of bars (what, value, more)."""
    text = textwrap.fill(text, 155)
    top, width = 19 + 5 * len(text.splitlines()), WIDTH + 27
    heights = []
    for item in items:
        if isinstance(item, str):
            heights.append(7 + 5 * item.count("\n"))
        else:
            heights.append(3 + (item[0]["h"] if isinstance(item[0], dict) else 5.5 * len(item)))
    height = top + sum(heights) + 4
    fig = Figure((width / 25.4, height / 25.4), DPI)
    ax = fig.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    ax.set_axis_off()
    ax.text(MARGIN, 10, title, fontsize=5 * POINT, weight="bold")
    ax.text(MARGIN, 14, text, fontsize=3.5 * POINT, va="top", linespacing=1.3)
    for item, h in zip(items, heights):
        if isinstance(item, str):
            heading, _, more = item.partition("\n")
            ax.text(MARGIN, top + 5, heading, fontsize=4 * POINT, weight="bold")
            ax.text(MARGIN, top + 10, more, fontsize=3.5 * POINT)
        elif isinstance(item[0], dict):
            for left, scene in zip((MARGIN, MARGIN + WIDTH - item[-1]["w"]), item):
                draw(ax, scene, left, top)
        else:
            draw_bars(ax, item, top)
        top += h
    pixels, content = io.BytesIO(), io.BytesIO()
    fig.savefig(pixels, format="rgba")
    image = Image.frombytes("RGBA", fig.canvas.get_width_height(), pixels.getvalue())
    small = image.convert("RGB").quantize(64, method=Image.Quantize.FASTOCTREE, dither=0)
    small.save(content, "PNG", dpi=(DPI, DPI))
    common.save(path, content.getvalue())
    if pdf:
        pdf.savefig(fig)


def draw_bars(ax, bars, top):
    """Bars (what, value, more), a line each, to scale, from a common zero."""
    values = np.array([value for _, value, _ in bars])
    most, least = max(values.max(), 0), min(values.min(), 0)
    mm = 70 / (most - least)
    zero = 80 - mm * least
    for i, (what, value, more) in enumerate(bars):
        y = top + 5.5 * i + 2.5
        colour = "#0b4f8a" if value > 0 else "#d55e00"
        if i in (0, len(bars) - 1):  # where the sum begins, and itself
            colour = "#888888"
        ax.add_patch(Rectangle((zero, y - 1.8), mm * value, 3.6, color=colour))
        ax.text(MARGIN, y, what, fontsize=3.5 * POINT, va="center")
        ax.text(78, y, f"{value:+.2f}", fontsize=3.5 * POINT, va="center", ha="right")
        ax.text(154, y, more, fontsize=3.5 * POINT, va="center")


# ---- Gallery

def source_mark(q):
    """What stands first wherever a prototype is shown: nothing, if it is an ECG of PTB-XL."""
    return "" if q["data"] == "PTB-XL v1.0.3" else f"{q['data']}: "


def scenes_of(q):
    """A prototype as scenes: the whole ECG, and of the partial kind its window."""
    scenes = [whole(q["x"], q["kind"], [q["samples"]])]
    return scenes + [cut_out(q["x"], q["samples"])] if q["kind"] == "partial" else scenes


def file_name(text):
    """Text as part of a file name: LAO/LAE -> LAO-LAE."""
    return re.sub(r"\W+", "-", text).strip("-")


def source(q):
    """A prototype and where it comes from, in words."""
    text = "prototype {model} {index}: training ECG {ecg_id}, {0:.2f} to {1:.2f} s"
    return text.format(*np.divide(q["samples"], RATE), **q)


def gallery(args, prototypes, words):
    """Pictures of all prototypes, and gallery.html with a section for each label of a model."""
    sections, jobs, body = {}, [], ""
    for q in prototypes:
        sections.setdefault((q["class"], q["model"]), []).append(q)
    for (code, model), section in sections.items():
        shown = section[:3] if args.demo else section
        heading = f"{words[code]}, {model}: {len(shown)} of {len(section)} shown"
        body += f"<details><summary>{html.escape(heading)}</summary>"
        for q in shown:
            file = f"{model}/{file_name(code)}_{q['index']:04d}.png"
            about = f"{source(q)}, labelled {'; '.join(words[c] for c in q['labels'])}"
            scenes = [[scene] for scene in scenes_of(q)]
            title = source_mark(q) + words[code]
            jobs.append(delayed(save_sheet)(args.run / "figures" / file, title, about, scenes))
            body += f'<figure><a href="{file}"><img src="{file}" loading="lazy" alt=""></a>'
            body += f"<figcaption>{html.escape(about)}</figcaption></figure>"
        body += "</details>"
    parallel = Parallel(args.threads or os.cpu_count(), return_as="generator")
    list(tqdm(parallel(jobs), "pictures", len(jobs), disable=None))
    path = args.run / "figures/gallery.html"
    title = f"{source_mark(q)}{args.run}: {len(jobs):,} of {len(prototypes):,} prototypes"
    text = GALLERY.replace("TITLE", html.escape(title)) + body
    common.save(path, text.replace("<details>", "<details open>", 1))
    print(f"{title} -> {path}")


GALLERY = """<!doctype html><html lang="en"><meta charset="utf-8"><title>TITLE</title><style>
body { font: 16px/1.4 sans-serif; margin: 1rem 2rem }
figure { display: inline-block; vertical-align: top; width: 300px; margin: 8px }
img { border: 1px solid #bbb; width: 100% }
</style><h1>TITLE</h1><p>Each prototype is a real training ECG, or 0.94 s of one, with which the
model compares new ECGs. Below it are its source and all its labels. Not for clinical use.</p>
"""


# ---- Explanations (4.5)

def read_wfdb(path):
    """The first 10 s of a WFDB record -> x [12, 1000] mV at 100 Hz, our leads, filtered as 01's."""
    import wfdb  # slow to import
    try:
        header = wfdb.rdheader(path)
        fs, length = header.fs, header.sig_len
        record = wfdb.rdrecord(path, sampto=min(length, int(np.ceil(10 * fs))))
    except Exception as e:  # wfdb raises many kinds on a damaged file
        reason = str(e).split("\n")[0][:80]
        sys.exit(f"{path} is not a readable WFDB record ({type(e).__name__}: {reason})")
    if length < 10 * fs:
        sys.exit(f"{path} is {length / fs:.1f} s long: the model needs 10 s")
    names = [name.strip().upper() for name in record.sig_name]
    x, millivolt = [], {"mv": 1, "uv": 1e-3, "v": 1e3}
    for lead in LEADS:
        if names.count(lead) != 1:
            sys.exit(f"{path} must hold each of the 12 leads once, not so {lead}")
        i = names.index(lead)
        x.append(record.p_signal[:, i] * millivolt.get(record.units[i].lower(), np.nan))
        if not np.all(np.abs(x[-1] - np.median(x[-1])) < 50):
            sys.exit(f"{path} cannot be used: lead {lead}, in {record.units[i]}, has missing "
                     "samples, exceeds 50 mV or its units are none of mV, uV, V")
    x = resample_poly(x, 1000 * RATE, round(1000 * fs), axis=1, padtype="line")
    return common.highpass(x[:, :SAMPLES]).astype(np.float32)


@torch.no_grad()
def matched_windows(head, q, x):
    """The windows (first, end) of x whose mean is the similarity to prototype q, best first."""
    network = head.networks[head.branches.index(q["model"])]
    z = network.latent(torch.from_numpy(x)[None].to(network.p.device))
    S = common.similarity(z, network.p[q["index"], None], network.a)[0, 0]  # [windows]
    best = S.cpu().sort(descending=True, stable=True).indices[:network.top_k]
    return [common.window_samples(network.kind, w) for w in best.tolist()]


def bars_of(r):
    """Lines of draw_bars for a label's pieces of evidence: all but a rest of under 5 %."""
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
    text = (f"Probability {shown(r['probability'])}, predicted from {shown(r['threshold'])} on, by "
            f"the {r['classifier']} classifier. True labels: {known}. "
            "For research, not for clinical use.")
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
    title = f"{case['title']}: {words[r['label']]} {verdict}"
    return title, text, [ecg, heading, bars_of(r), *pairs]


def shown(p):
    """A probability that claims no certainty."""
    if 0.001 <= p <= 0.999:
        return f"{p:.3f}"
    return "> 0.999" if p > 0.5 else "< 0.001"


def explain_case(args, heads, words, x, title, labels=None, ecg_id=None, record=None, patient=None):
    """Write a case: a PDF, its pages as PNG, and JSON."""
    case = {"title": title, "true_labels": labels, "ecg_id": ecg_id, "record": record}
    results = common.explain(heads, x, patient)
    explained = [r for r in results if r["predicted"]] or results[:1]
    if args.label:
        known = {r["label"]: r for r in results}
        for code in set(args.label) - set(known):
            sys.exit(f"{args.run} has no label {code}, but {', '.join(sorted(known))}")
        explained = [known[code] for code in args.label]
    name = str(ecg_id or file_name(title))
    path, content = args.run / "cases" / f"{name}.pdf", io.BytesIO()
    by_name = {head.name: head for head in heads}
    with PdfPages(content) as pdf:
        for r in tqdm(explained, "labels", disable=None):
            r["page"] = f"{name}/{r['classifier']}_{file_name(r['label'])}.png"
            sheet = page(case, x, r, by_name[r["classifier"]], args.top, words)
            save_sheet(path.parent / r["page"], *sheet, pdf)
    common.save(path, content.getvalue())
    inputs = [(args.run / f"classifiers/{head.name}.pt", vars(head)) for head in heads]
    keys = "label", "probability", "threshold", "predicted", "logit"
    common.save(path.with_suffix(".json"), {
        **common.provenance(args, *inputs), **case, "explained": explained,
        "labels": [{key: r[key] for key in keys} for r in results],
        "descriptions": heads[0].descriptions})
    said = [f"{words[r['label']]} {shown(r['probability'])}" for r in explained]
    print(f"{args.run}: {title}: {', '.join(said)} -> {path}")


# ---- Review page (3.6, Appendix C)

def review(args, heads, prototypes, words):
    """Write review.html: prototypes as scenes, known by class alone, and how to rate them."""
    items = []
    for q in tqdm(prototypes, "review page", disable=None):
        scenes = scenes_of(q)
        for traces in [scene["traces"] for scene in scenes]:
            for i, (x, step, y) in enumerate(traces):
                changes = np.diff(np.round(20 * y), prepend=0)  # short in JSON
                traces[i] = x, step, changes.astype(int).tolist()
        items.append({"id": f"{q['model']}/{q['index']}", "class": q["class"], "scenes": scenes})
    made = [head.made_from[f"{model}/projected.pt"] for head in heads for model in head.branches]
    data = {"run": str(args.run), "made": made, "words": words, "items": items}
    data = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # ends no script
    common.save(args.run / "review.html", REVIEW.replace("DATA", data))
    print(f"{args.run}: {len(items):,} prototypes -> {args.run / 'review.html'}")


REVIEW = r"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Prototype review</title>
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"><style>
body { display: flex; flex-wrap: wrap; gap: 8px; margin: 8px; font: 16px/1.4 sans-serif }
#paper { flex: 1 680px } #panel { flex: 1 250px; max-width: 400px }
svg { width: min(100%, 150vh - 120px); border: 1px solid #d98c8c }
text { white-space: pre; paint-order: stroke; stroke: #fff; stroke-width: 0.7 }
polyline { fill: none; stroke: #000; stroke-width: 0.3 }
rect { fill: #56b4e944; stroke: #0b4f8a; stroke-width: 0.5 }
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
  const ns = tag === "svg" ? "http://www.w3.org/2000/svg" : parent.namespaceURI;
  const e = parent.appendChild(document.createElementNS(ns, tag));
  for (const name in attributes) e.setAttribute(name, attributes[name]);
  e.textContent = text;
  return e;
}
function draw({w, h, boxes, traces, texts}) {
  const svg = make($("paper"), "svg", {viewBox: `0 0 ${w} ${h}`});
  for (const [step, stroke, width] of [[1, "#f9dcdc", 0.1], [5, "#eeb0b0", 0.2]]) {
    let d = "";
    for (let x = 0; x <= w; x += step) d += `M${x} 0V${h}`;
    for (let y = 0; y <= h; y += step) d += `M0 ${y}H${w}`;
    make(svg, "path", {d, stroke, "stroke-width": width});
  }
  for (const [x, y, width, height] of boxes) make(svg, "rect", {x, y, width, height});
  for (const [x, step, changes] of traces) {
    let y = 0;
    const points = changes.map((change, i) => [x + i * step, (y += change) / 20]);
    make(svg, "polyline", {points: points.join(" ")});
  }
  for (const [x, y, size, text] of texts) make(svg, "text", {x, y, "font-size": size}, text);
}
const rating = q => ratings[q.id] ?? {class: q.class, ...empty};
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
  $("paper").replaceChildren();
  items[at].scenes.forEach(draw);
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
    what.add_argument("--record", metavar="PATH", help="explain your own WFDB record")
    what.add_argument("--review", action="store_true", help="write the page for clinicians")
    p.add_argument("--label", nargs="+", metavar="CODE", help="explain these, predicted or not")
    p.add_argument("--top", type=int, default=2, metavar="N", help="pieces to show (default 2)")
    args = common.parse(p)
    if args.top < 1 or set(args.model or ()) & set(BOXES):
        p.error("--top must be at least 1, and black boxes have no prototypes")
    heads = common.load_run(args.run, args.model, args.device)
    words = {c: f"{text} ({c})" for c, text in heads[0].descriptions.items()}
    prototypes = [q for head in heads for q in head.prototypes]
    prototypes.sort(key=lambda q: CODES.index(q["class"]))
    if args.review:
        return review(args, heads, prototypes, words)
    mark = source_mark(prototypes[0])
    if args.record:
        path = args.record.removesuffix(".hea")
        title = f"{mark}record " + "/".join(os.path.abspath(path).split(os.sep)[-2:])
        return explain_case(args, heads, words, read_wfdb(path), title, record=path)
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
            title = f"{mark}{part} ECG {ecg_id}"
            explain_case(args, heads, words, prep.signals[row], title, labels, ecg_id,
                         patient=prep.patient_ids[row])
    if not args.case:
        gallery(args, prototypes, words)


if __name__ == "__main__":
    common.run(main)
