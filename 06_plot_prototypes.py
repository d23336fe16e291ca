"""Script 06, pictures (paper 4.5, Appendices B-D): prototypes, explanations, a review.

Blue is what a prototype looks at: 0.94 s (partial), the strip (1D); global: all.

reads   RUN/classifiers/fusion.pt, or without it, or with --model, MODEL.pt;
        RUN/MODEL/projected.pt, prototypes.json, .npy.gz; PREP for --case alone
writes  RUN/figures/gallery.html; RUN/cases/NAME.html, printed a page a label,
        NAME.json with all that it shows, records.csv; RUN/review.html

    python 06_plot_prototypes.py                   the gallery of prototypes
    python 06_plot_prototypes.py --case 449        why is this said of this ECG?
    python 06_plot_prototypes.py --record my/ecg   the same of your own WFDB record
    python 06_plot_prototypes.py --record my/*     records.csv; with --pages also pages
    python 06_plot_prototypes.py --review          to rate prototypes (Appendix C)

Takes seconds. Last line: `RUN: 355 prototypes -> RUN/figures/gallery.html`.
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
ROWS = [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]  # of leads, on paper
STEP = 25 / RATE  # mm a sample, at 25 mm/s
LEFT, WIDTH, MARGIN = 15, 270, 13.5  # mm: start of traces, paper, margin
PULSE = np.repeat([0, 1, 0], [4, 20, 4])  # 1 mV for 0.2 s
SAID = "label", "classifier", "probability", "threshold", "predicted", "logit"
BLUE, ORANGE, GREY = "#0b4f8a", "#d55e00", "#888888"


# ---- Layout: a scene is what lies where on a paper, in mm from the upper left

def paper(rows, w, h, columns, text):
    """A scene of rows of leads [(number, mV [n])], `columns` mm apart: traces (x, y [n]),
    texts (x, y, size, text), boxes (x, y, w, h, filled). It has half gain, and says so,
    if a trace would leave it."""
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
        traces.append((LEFT - 29 * STEP, y0 - gain * PULSE))
        for i, (lead, signal) in enumerate(row):
            x = LEFT + columns * i
            traces.append((x, np.clip(y0 - gain * signal, 0, h)))
            texts.append((x + 1.5, y0 - 2.5, 3.5, NAMES[lead]))
    return dict(w=w, h=h, traces=traces, texts=texts, boxes=[])


def whole(x, kind, windows=()):
    """The scene of x [12, 1000] mV as 3 x 4 leads and a strip, which is marked for 1D; for
    partial it is the first of `windows` [(first, end)], others are outlined."""
    part = x.reshape(12, 4, 250)
    rows = [[(j, part[j, i]) for i, j in enumerate(row)] for row in ROWS]
    rows.append([(1, x[1])])
    scene = paper(rows, WIDTH, 106, 62.5, "25 mm/s, high-pass 0.5 Hz")
    if kind == "1d":
        top = max(60, min(y.min() for _, y in scene["traces"][-2:]) - 2)
        scene["boxes"].append((LEFT - 1, top, 252, 100 - top, True))
    if kind == "partial":
        for i, (first, end) in enumerate(windows):
            x0, y0 = LEFT + STEP * first, 1 + 1.2 * i  # they may overlap
            scene["boxes"].append((x0, y0, STEP * (end - first), 100 - y0, i == 0))
    return scene


def cut_out(x, window):
    """The scene of a window (first, end) of x [12, 1000] mV, all leads."""
    first, end = window
    rows = [[(j, x[j, first:end]) for j in row] for row in ROWS]
    return paper(rows, 134, 74, 29, f"{first / RATE:.2f} to {end / RATE:.2f} s, 25 mm/s")


# ---- Drawing: SVG in mm

def svg(w, h, shapes):
    """A picture of its true size."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}mm" '
            f'height="{h}mm" fill="none" font-family="sans-serif">{"".join(shapes)}</svg>\n')


def letters(x, y, mm, text, style=""):
    """Text from (x, y) on, so many mm high, with a halo."""
    style += ' fill="#000" stroke="#fff" stroke-width="0.7" paint-order="stroke"'
    return f'<text x="{x:.2f}" y="{y:.2f}" font-size="{mm}"{style}>{escape(text)}</text>'


def draw(scene, left=0, top=0):
    """A scene, its upper left corner at (left, top)."""
    w, h, shapes = scene["w"], scene["h"], [f'<g transform="translate({left} {top})">']
    for step, colour, mm in ((1, "#f9dcdc", 0.1), (5, "#eeb0b0", 0.2)):
        d = "".join(f"M{x} 0V{h}" for x in range(0, w + 1, step))
        d += "".join(f"M0 {y}H{w}" for y in range(0, h + 1, step))
        shapes.append(f'<path d="{d}" stroke="{colour}" stroke-width="{mm}"/>')
    for x, y, dx, dy, filled in scene["boxes"]:
        shapes.append(
            f'<rect x="{x}" y="{y}" width="{dx}" height="{dy}" stroke="{BLUE}" '
            f'stroke-width="0.3" fill="#56b4e9" fill-opacity="{0.22 * filled}"/>')
    for x, y in scene["traces"]:  # in 1/20 mm, from point to point
        first, *more = np.diff(np.round(20 * y), prepend=0).astype(int).tolist()
        points = " ".join(f"{20 * STEP:.0f} {dy}" for dy in more)
        style = 'transform="scale(.05)" stroke="#000" stroke-width="6"'
        shapes.append(f'<path d="M{20 * x:.0f} {first}l{points}" {style}/>')
    shapes += [letters(*text) for text in scene["texts"]]
    return "".join(shapes) + "</g>"


def draw_bars(bars, top):
    """Bars (what, value, more), from a common zero."""
    values, shapes = [value for _, value, _ in bars], []
    least = min(*values, 0)
    mm = 70 / (max(*values, 0) - least)
    for i, (what, value, more) in enumerate(bars):
        x, y = 80 + mm * (min(value, 0) - least), top + 5.5 * i + 3.7
        colour = BLUE if value > 0 else ORANGE
        if i in (0, len(bars) - 1):  # where the sum begins and ends
            colour = GREY
        box = f'x="{x:.2f}" y="{y - 3:.2f}" width="{mm * abs(value):.2f}" height="3.6"'
        shapes += [f'<rect {box} fill="{colour}"/>',
                   letters(MARGIN, y, 3.5, what), letters(154, y, 3.5, more),
                   letters(78, y, 3.5, f"{value:+.2f}", ' text-anchor="end"')]
    return "".join(shapes)


def sheet(items):
    """A page as SVG, from top to bottom: lists of scenes or of bars (what, value, more),
    and texts, whose first line is a heading."""
    shapes, y = [], 5
    for item in items:
        if isinstance(item, str):
            heading, *more = item.splitlines()
            shapes.append(letters(MARGIN, y + 5, 4.2, heading, ' font-weight="bold"'))
            shapes += [letters(MARGIN, y + 10.5 + 5 * i, 3.5, s) for i, s in enumerate(more)]
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
<style>body { font: 16px/1.4 sans-serif; margin: 8px }
"""


# ---- Gallery and review (3.6, Appendix C)

def source(q):
    """A prototype and its source, in words."""
    first, end = np.divide(q["samples"], RATE)
    text = "prototype {model} {index}: training ECG {ecg_id}".format(**q)
    return f"{text}, {first:.2f} to {end:.2f} s"


def album(args, heads, words, review=False):
    """Write all prototypes, a section a label: gallery.html, with sources, or
    review.html, with the class alone, to be rated."""
    sections, prototypes = {}, [q for h in heads for q in h.prototypes]
    for q in tqdm(prototypes, "pictures", disable=None):
        scenes = [whole(q["x"], q["kind"], [q["samples"]])]
        if q["kind"] == "partial":
            scenes.append(cut_out(q["x"], q["samples"]))
        pictures = "".join(svg(s["w"], s["h"], [draw(s)]) for s in scenes)
        labels = "; ".join(words[c] for c in q["labels"])
        below = escape(f"{source(q)}, labelled {labels}")
        if review:
            below = FORM.format(**q, words=escape(words[q["class"]]))
        figure = f"<figure>{pictures}{below}</figure>"
        sections.setdefault((CODES.index(q["class"]), q["model"]), []).append(figure)
    title = f"{heads[0].mark}{args.run}: {len(prototypes):,} prototypes"
    path, text = args.run / "figures/gallery.html", (PAGE + ALBUM).replace("TITLE", escape(title))
    if review:
        made = [h.made_from[f"{m}/projected.pt"] for h in heads for m in h.branches]
        page = json.dumps(dict(run=str(args.run), made=made)).replace("<", "\\u003c")
        path, text = args.run / "review.html", text + REVIEW.replace("RUN", page)
    for (c, model), figures in sorted(sections.items()):
        heading = escape(f"{words[CODES[c]]}, {model}: {len(figures)}")
        text += f"<details><summary>{heading}</summary>{''.join(figures)}</details>"
    common.save(path, text.replace("<details>", "<details open>", 1))
    print(f"{title} -> {path}")


ALBUM = """figure { display: inline-block; width: 600px; max-width: 95%; margin: 8px;
  vertical-align: top } figure svg { border: 1px solid #bbb; width: 100%; height: auto }
summary, label { padding: 8px 4px }
header { position: sticky; top: 0; background: #fff; padding: 8px 0 }
</style><h1>TITLE</h1><p>Each prototype is a real training ECG, or 0.94 s of one, with
which new ECGs are compared. Not for clinical use.</p>
"""
SCALE = "".join(
    f'<label><input type="radio" name="NAME" value="{n}">{n}</label>' for n in range(1, 6))
FORM = f"""<form id="{{model}}/{{index}}"><input type="hidden" name="class" value="{{class}}">
<b>{{words}}</b><br>Representativeness {SCALE.replace("NAME", "representativeness")}<br>
Clarity {SCALE.replace("NAME", "clarity")}<br>
<select name="mark"><option value="">no mark</option><option>best</option>
<option>bad</option><option>label-error</option></select>
<textarea name="comment" rows="1" placeholder="comment"></textarea>
<button type="reset">Clear</button></form>"""
REVIEW = """<style>figure, figure svg { width: auto; max-width: 100% }</style>
<p><b>Representativeness</b>: Does the prototype reflect a typical or defining
presentation of the assigned diagnostic class? <b>Clarity</b>: Is the ECG signal in the
prototype clean and interpretable, or is it obscured by noise or artifacts that make
interpretation difficult? 5 is best. Ratings stay in this browser: export them.</p>
<header><span id="progress"></span> <button id="next">Next unrated</button>
<button id="export">Export</button>
<label>Import <input id="file" type="file"></label></header>
<script>
const page = RUN, key = `protoecgnet ${page.run} ${page.made}`;
const $ = id => document.getElementById(id), forms = () => [...document.forms];
let later;
const rating = form => Object.fromEntries(new FormData(form));
const ratings = () => Object.fromEntries(forms().map(f => [f.id, rating(f)]));
const done = form => {
  const {mark, representativeness, clarity} = rating(form);
  return mark === "label-error" || representativeness && clarity;
};
function keep() {
  $("progress").textContent = `${forms().filter(done).length} of ${forms().length} rated`;
  try { localStorage.setItem(key, JSON.stringify(ratings())); }
  catch { $("progress").textContent += ", not kept here: export them"; }
}
function fill(ratings) {
  for (const form of forms()) {
    if (ratings[form.id]) form.reset();
    for (const [name, value] of Object.entries(ratings[form.id] ?? {}))
      if (form.elements[name]) form.elements[name].value = value ?? "";
  }
  keep();
}
onload = () => fill(JSON.parse(localStorage.getItem(key)) ?? {});
oninput = keep;
onreset = () => { clearTimeout(later); later = setTimeout(keep); };  // when it is empty
onsubmit = () => false;
$("next").onclick = () => {
  const form = forms().find(f => !done(f));
  if (form) form.closest("details").open = true;
  form?.scrollIntoView({block: "end"});
};
$("export").onclick = () => {
  const reviewer = prompt("Your name?");
  const found = {kind: "protoecgnet-ratings", reviewer, ...page, ratings: ratings()};
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(found)]));
  link.download = `ratings_${reviewer}.json`;
  if (reviewer) link.click();
};
$("file").onchange = async ({target}) => {
  const found = await target.files[0].text().then(JSON.parse).catch(() => ({}));
  target.value = "";  // the same file can be chosen again
  if (`${found?.made}` === `${page.made}`) return fill(found.ratings ?? {});
  alert("This does not hold ratings of these prototypes.");
};
</script>
"""


# ---- Explanations (4.5)

def read_wfdb(path, start=0.0):
    """10 s of a WFDB record from second `start` on -> x [12, 1000] mV at 100 Hz, filtered
    as in 01, and notes on what is odd."""
    import wfdb  # slow to import
    try:
        header = wfdb.rdheader(path)
        fs, length, first = header.fs, header.sig_len, round(start * header.fs)
        end = length and min(length, first + int(np.ceil(10 * fs)))
        record = wfdb.rdrecord(path, sampfrom=first, sampto=end)
        text = Path(f"{path}.hea").read_text("latin-1")
        lead = "|".join(LEADS)
        no_gain = re.search(
            rf"(?mi)^[^#\s]\S*\s+\S+[ \t]+0[.0]*[(/ \t].*\s({lead})\s*$", text)
    except Exception as e:  # of many kinds
        sys.exit(f"{path} cannot be read from {start:g} s on: are dates and names in its "
                 f".hea right? {e!r:.200}")
    if record.p_signal is None or not 50 <= fs <= 10_000:
        sys.exit(f"{path} has no signals, or {fs:g} Hz, not 50 to 10,000")
    seconds = len(record.p_signal) / fs
    if seconds < 9.98:
        sys.exit(f"{path} has {seconds:.3f} s from {start:g} s on, but needs 10 s")
    names = [str(n).strip().upper() for n in record.sig_name]
    x, millivolt = [], dict(mv=1, uv=1e-3, v=1e3)
    for lead in LEADS:
        if names.count(lead) != 1:
            sys.exit(f"{path} must hold each lead once, not so {lead}")
        i = names.index(lead)
        unit = str(record.units[i] or "mV")
        scale = millivolt.get(unit.lower(), np.nan)
        x.append(scale * record.p_signal[:int(np.ceil(10 * fs)), i])
        if not np.all(abs(x[-1] - np.median(x[-1])) < 50):
            sys.exit(f"{path}: lead {lead}, in {unit}, has missing samples (try --start), "
                     "exceeds 50 mV or its unit is none of mV, uV, V")
    up, down = Fraction(RATE / fs).limit_denominator(20_000).as_integer_ratio()
    x = resample_poly(x, up, down, axis=1, padtype="line")[:, :SAMPLES]
    height = np.ptp(x, 1)
    if height.max() < 0.1:
        sys.exit(f"{path} is flat, or its gain or unit is wrong: no lead has 0.1 mV")
    notes = [f"Lead {name} is flat." for name, mv in zip(NAMES, height) if mv < 0.01]
    if no_gain:
        notes.append("Not calibrated: the gain is 0, 200 units are taken for 1 mV.")
    if start:
        notes.append(f"From {start:g} s on.")
    x = np.pad(x, ((0, 0), (0, SAMPLES - x.shape[1])), "edge")  # of up to 0.02 s
    return common.highpass(x).astype(np.float32), notes


@torch.no_grad()
def matched_windows(head, q, x):
    """The windows (first, end) of x most like prototype q, best first."""
    network = head.networks[head.branches.index(q["model"])]
    z = network.latent(torch.from_numpy(x)[None].to(network.p))
    S = common.similarity(z, network.p[q["index"], None])[0, 0]  # [windows]
    best = S.cpu().sort(descending=True, stable=True).indices[:network.top_k]
    return [common.window_samples(network.kind, w) for w in best.tolist()]


def bars_of(r):
    """Bars for pieces: all but a rest of under 5 %."""
    sizes = [abs(piece["contribution"]) for piece in r["pieces"]]
    most = 1 + int(np.searchsorted(np.cumsum(sizes), 0.95 * sum(sizes)))
    bars = [("the average training record", r["average"], "")]
    for piece in r["pieces"][:most]:
        ids = " ".join(str(q["ecg_id"]) for q in piece["prototypes"])
        more = "similarity {similarity:.2f}, average {mean:.2f}, to ECG".format(**piece)
        bars.append((piece["claim"], piece["contribution"], f"{more} {ids}"))
    rest = [piece["contribution"] for piece in r["pieces"][most:]]
    if rest:
        bars.append((f"and {len(rest)} more, together", sum(rest), ""))
    return [*bars, ("logit", r["logit"], "")]


def page(case, x, r, head, words):
    """The items of a sheet that explains result r for x."""
    known = "; ".join(words[c] for c in case.get("true_labels", ())) or "unknown"
    p, threshold = shown(r["probability"]), shown(r["threshold"])
    text = " ".join([
        f"{case['title']}. Probability {p}, predicted from {threshold} on, by the "
        f"{r['classifier']} classifier. True labels: {known}.", *case["notes"],
        "For research, not for clinical use."])
    by_id = {(q["model"], q["index"]): q for q in head.prototypes}
    pairs, first = [], None
    speaking = [q for q in r["pieces"] if q["contribution"] > 0 or not r["predicted"]]
    for piece in speaking[:2]:
        if abs(piece["contribution"]) < abs(speaking[0]["contribution"]) / 5:
            break
        nearest = piece["prototypes"][0]
        q = by_id[nearest["model"], nearest["index"]]
        windows = matched_windows(head, q, x)
        first = first or (q["kind"], windows)
        labels = textwrap.shorten("; ".join(words[c] for c in q["labels"]), 140)
        pairs.append(f"{piece['claim']}: nearest is {source(q)}, similarity "
                     f"{nearest['similarity']:.2f}\nlabelled {labels}")
        if q["kind"] == "partial":
            pairs.append([cut_out(x, windows[0]), cut_out(q["x"], q["samples"])])
        else:
            pairs.append([whole(q["x"], q["kind"])])
    verdict = "predicted" if r["predicted"] else "not predicted"
    title = [f"{head.mark}{words[r['label']]} {verdict}", *textwrap.wrap(text, 145)]
    ecg = [whole(x, *first or ("global", []))]
    return ["\n".join(title), ecg, "What speaks for and against it", bars_of(r), *pairs]


def shown(p):
    """A probability that claims no certainty."""
    if 0.001 <= p <= 0.999:
        return f"{p:.3f}"
    return "> 0.999" if p > 0.5 else "< 0.001"


def write_case(args, heads, words, x, case, results):
    """Write NAME.html, a page a label predicted or asked for, and NAME.json."""
    asked = [r for r in results if r["label"] in (args.label or ())]
    explained = asked or [r for r in results if r["predicted"]] or results[:1]
    path = args.run / f"cases/{case['name']}.html"
    text = (PAGE + CASE).replace("TITLE", escape(case["title"]))
    by_name = {h.name: h for h in heads}
    for r in explained:
        text += sheet(page(case, x, r, by_name[r["classifier"]], words))
    common.save(path, text)
    inputs = [(args.run / f"classifiers/{h.name}.pt", vars(h)) for h in heads]
    common.save(path.with_suffix(".json"), dict(
        common.provenance(args, *inputs), **case, explained=explained,
        labels=[{k: r[k] for k in SAID} for r in results],
        descriptions=heads[0].descriptions))
    said = ", ".join(f"{words[r['label']]} {shown(r['probability'])}" for r in explained)
    print(f"{args.run}: {case['title']}: {said} -> {path}", *case["notes"])


def explain_records(args, heads, words):
    """Explain WFDB records: pages and records.csv; exits if some cannot be used."""
    paths = {}
    for path in args.record:  # of my/* only what has a header
        stem, alone = re.sub(r"\.(hea|dat|mat)$", "", path), len(args.record) == 1
        if alone or Path(f"{stem}.hea").is_file() or not Path(path).exists():
            paths[stem] = os.fsencode(stem).decode("utf-8", "replace")
    if not paths:
        sys.exit("none of these is a WFDB record: there is no .hea")
    prototypes = [q for h in heads for q in h.prototypes]
    rows, failed = [], []
    for path, said in tqdm(paths.items(), "records", disable=None):
        try:
            x, notes = read_wfdb(path, args.start)
        except SystemExit as e:
            failed.append(str(e))
            continue
        patient = None
        for q in prototypes:  # other sets hold PTB-XL's ECGs too
            if patient is None and np.corrcoef(x.ravel(), q["x"].ravel())[0, 1] > 0.75:
                patient = q["patient"]
                notes.append(f"This is training ECG {q['ecg_id']}.")
        results = common.explain(heads, x, patient)
        for r in results:
            pieces = [f"{q['class']} {q['contribution']:+.2f}" for q in r["pieces"][:3]]
            rows.append(dict(record=said, **{k: r[k] for k in SAID},
                             pieces="; ".join(pieces), notes=" ".join(notes)))
        if len(paths) == 1 or args.pages:
            place = repr((os.path.abspath(path), args.start)).encode()
            place = hashlib.sha256(place).hexdigest()[:6]
            name = re.sub(r"\W+", "-", Path(said).name).strip("-")[:60]
            write_case(args, heads, words, x, dict(
                name=f"record-{name}-{place}", record=said,
                title=f"{heads[0].mark}record {said[-70:]}", notes=notes), results)
    if len(paths) > 1 and rows:
        common.save(args.run / "cases/records.csv", pd.DataFrame(rows).to_csv(index=False))
        print(f"{args.run}: {len(paths) - len(failed)} records -> cases/records.csv")
    if failed:
        sys.exit("\n".join(failed))


CASE = """@page { size: A4; margin: 0 } @media print { body { margin: 0 } }
svg { display: block; max-width: 100%; max-height: 296mm; height: auto; break-after: page }
</style>
"""


def main():
    p = common.argument_parser(__doc__, *common.RUN_FLAGS)
    what = p.add_mutually_exclusive_group()
    what.add_argument("--case", type=int, nargs="+", metavar="ECG_ID", help="of PTB-XL")
    what.add_argument("--record", nargs="+", metavar="PATH", help="your WFDB records")
    what.add_argument("--review", action="store_true", help="a page to rate on")
    p.add_argument("--label", nargs="+", metavar="CODE", help="explain these labels")
    p.add_argument("--start", type=float, default=0, metavar="S", help="from second S on")
    p.add_argument("--pages", action="store_true", help="pages of many records too")
    args = common.parse(p)
    if set(args.model or ()) & set(BOXES):
        p.error("black boxes have no prototypes")
    heads = common.load_run(args.run, args.model, args.device)
    known = {c for h in heads for c in h.classes}
    for code in set(args.label or ()) - known:
        sys.exit(f"{args.run} has no label {code}, but {' '.join(sorted(known))}")
    words = {c: f"{text} ({c})" for c, text in heads[0].descriptions.items()}
    if args.review:
        return album(args, heads, words, review=True)
    if args.record:
        return explain_records(args, heads, words)
    if args.case or args.demo:
        prep = common.load_prep(args.prep)
        file = args.run / f"classifiers/{heads[0].name}.pt"
        common.load(file, "04_fusion.py", args)  # of this PREP?
        for ecg_id in args.case or prep.ecg_ids[prep.test][:1].tolist():
            row = prep.row_of.get(ecg_id)
            if row is None:
                sys.exit(f"{args.prep} has no ECG {ecg_id}")
            part = ["training", "validation", "test"][max(0, prep.folds[row] - 8)]
            labels = [c for c, on in zip(CODES, prep.labels[row]) if on]
            results = common.explain(heads, prep.signals[row], prep.patient_ids[row])
            write_case(args, heads, words, prep.signals[row], dict(
                name=str(ecg_id), ecg_id=ecg_id, true_labels=labels,
                title=f"{heads[0].mark}{part} ECG {ecg_id}", notes=[]), results)
    if not args.case:
        album(args, heads, words)


if __name__ == "__main__":
    common.run(main)
