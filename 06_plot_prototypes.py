"""Stage 06, pictures (paper 4.5, Appendices B, C, D): every prototype, the explanation of a case, a review page.

All ECGs are drawn as on clinical paper: four columns of 2.5 s (I II III, aVR aVL aVF, V1-V3, V4-V6) over 10 s of lead
II, 25 mm/s and 10 mm/mV on a 1 mm grid, in true size when printed at 100 %. What a prototype looks at is highlighted:
0.94 s of all leads (morphology, with an enlarged cut-out), the lead II strip (rhythm), or nothing, all of it (global).

reads   PREP/*.npy, RUN/MODEL/prototypes.json; for a case also projected.pt, RUN/fusion.pt (without it, or with --model,
        RUN/MODEL/classifier.pt) and RUN/logits_*.npy, whose fold 9 gives each label its threshold (best F1; probability
        .5 for a label with fewer than 10 positives there, of which a threshold would be chance)
writes  RUN/figures/gallery.html and RUN/figures/MODEL/*.png; of a case RUN/cases/NAME.pdf, the same pages as
        NAME/fusion_LABEL_1.png, and NAME.json with all that they show; RUN/review.html

    python 06_plot_prototypes.py                  every prototype of the run, with an index of them by label
    python 06_plot_prototypes.py --case 449       why does the model say what it says of this ECG of PTB-XL?
    python 06_plot_prototypes.py --case 449 --label AFLT  the same for one label, predicted or not
    python 06_plot_prototypes.py --record my/ecg  the same for your own WFDB record (my/ecg.hea), any sampling rate
    python 06_plot_prototypes.py --review         one HTML file in which clinicians rate the prototypes (Appendix C)

A prototype contributes w * (s - mean) / std to a label's logit, mean and std being those of its similarity s in the
training folds. So the bias is the logit of the average training record, and bias and contributions add up to the logit.
Prototypes from ECGs of the explained patient contribute nothing, as in 04 (a training ECG would explain itself).

The review page exports {"format": 1, "kind": "protoecgnet-ratings", "reviewer": str, "run": str, "made": the models'
fingerprints, "ratings": {"MODEL/INDEX": {"class": str, "representativeness": 1-5 or null, "clarity": 1-5 or null,
"mark": "best", "bad", "label-error" or null, "comment": str}}}, for `05_evaluate.py --ratings A.json B.json` (Table 3).

Takes one to two minutes for 1,037 prototypes on 2 CPU cores (75 MB), and about a second for each page of a case.
Last line: `runs/default: 1,037 prototypes -> runs/default/figures/gallery.html`.
"""
import base64
import html
import json
import re
import sys
import textwrap
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image
from scipy.signal import resample_poly
from tqdm import tqdm

import common
from common import BRANCHES, CODES, LEADS, RATE, SAMPLES

matplotlib.rcParams.update({"text.parse_math": False, "patch.facecolor": "w"})  # "$" is a "$"; a named colour is quick
NAMES = [lead.replace("AV", "aV") for lead in LEADS]
MM_S, MM_MV = 25, 10  # paper speed and gain
LEFT, WIDTH = 15, 270  # mm: where the traces begin, and the grid's width; ten seconds are 250 mm
PULSE = np.array([(5, 0), (6, 0), (6, -10), (11, -10), (11, 0), (12, 0)])  # 1 mV for 0.2 s, in mm before a row
DPI = 127  # 5 pixels per mm, so that every grid line falls on whole pixels
BLUE = "#0b4f8a"  # stands out from the red grid with any colour vision, and is dark in grey print


# ---------------------------------------------------------------------------------------------------------------------
# Layout: what lies where on the paper, in mm from the upper left corner, for matplotlib and the review page alike

def x_mm(sample):
    """Where a sample lies: the same in the three rows and on the strip, which share one time axis."""
    return LEFT + sample / RATE * MM_S


def blank(w, h):
    """An empty scene of w x h mm; traces are (x, step, y [n]), paths [[x, y], ...], texts (x, y, size, text) and boxes
    (x, y, w, h, filled), all in mm."""
    return {"w": w, "h": h, "traces": [], "paths": [], "texts": [], "boxes": []}


def spread(up, down, top, height):
    """Baselines [rows] in whole mm for traces that reach `up` and `down` [rows, columns] mm from theirs: apart from
    each other where the height allows it, otherwise overlapping evenly."""
    up, down = np.clip(up, 6, 30), np.clip(down, 6, 30)
    need = np.array([up[0].max(), *(down[:-1] + up[1:]).max(1), down[-1].max()], float)    # edge, rows' distances, edge
    spare = height - need.sum()
    need = need + spare / len(need) if spare > 0 else need * height / need.sum()
    return np.round(top + np.cumsum(need)[:-1])


def clinical(x, kind, best=None, others=()):
    """The 3 x 4 picture and rhythm strip of x [12, 1000] mV as a scene. Highlighted are, by kind, the samples
    (first, end) of the `best` window with outlines of the `others`, the strip ("1d"), or nothing ("global")."""
    scene = blank(WIDTH, 110 if kind == "partial" else 145)
    h = scene["h"]
    rows = [[(3 * c + r, 250 * c, 250 * (c + 1)) for c in range(4)] for r in range(3)] + [[(1, 0, SAMPLES)]]
    leads = [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11], [1, 1, 1, 1]]
    parts = MM_MV * x.reshape(12, 4, 250)[leads, range(4)]                                   # [rows, columns, 250]
    base = spread(parts.max(2).clip(11), -parts.min(2), 5, h - 11)
    for row, y0 in zip(rows, base):
        scene["paths"].append((PULSE + (0, y0)).tolist())
        for lead, first, end in row:
            y = y0 - MM_MV * x[lead, first:end]
            scene["traces"].append((x_mm(first), MM_S / RATE, y))
            scene["texts"].append((x_mm(first) + 1, max(4.5, y[:44].min() - 1.5), 4, NAMES[lead]))
            if first:  # a tick where the next lead begins
                scene["paths"].append([[x_mm(first), y0 - 3], [x_mm(first), y0 + 3]])
    scene["texts"].append((LEFT, h - 1, 3.2, "25 mm/s   10 mm/mV   high-pass 0.5 Hz"))
    if kind == "1d":
        top = min(base[3] - 11, scene["traces"][-1][2].min()) - 5
        scene["boxes"].append((LEFT - 1, top, 252, h - 5 - top, True))
    if kind == "partial":
        for rank, (first, end) in enumerate(others, start=2):  # staggered, to tell overlapping outlines apart
            scene["boxes"].append((x_mm(first), 1.2 * rank, x_mm(end) - x_mm(first), h - 5.5 - 1.2 * rank, False))
        scene["boxes"].append((x_mm(best[0]), 1, x_mm(best[1]) - x_mm(best[0]), h - 5.5, True))
    return scene


def cutouts(parts):
    """Scenes of all 12 leads in the windows of parts [(x [12, 1000] mV, (first, end))] at 50 mm/s and one common gain,
    half the standard one where the leads of a column would not fit. Each lead is centred in its place."""
    cuts = [x[:, first:end].reshape(4, 3, -1) for x, (first, end) in parts]                  # [columns, rows, n] mV
    gain = MM_MV if max(np.ptp(cut, 2).sum(1).max() for cut in cuts) * MM_MV < 62 else MM_MV / 2
    scenes = []
    for cut, (_, (first, end)) in zip(cuts, parts):
        scene = blank(WIDTH, 70)
        text = f"{first / RATE:.2f} to {end / RATE:.2f} s in all leads   50 mm/s   {gain:g} mm/mV"
        scene["texts"].append((LEFT, 4.5, 3.2, text))
        scene["paths"].append((PULSE * (1, gain / MM_MV) + (0, 20)).tolist())
        reach = np.ptp(cut, 2) / 2 * gain + 0.5
        for c in range(4):
            left = LEFT + 62.5 * c
            for r, y0 in enumerate(spread(reach[c, :, None], reach[c, :, None], 5, 64)):
                y = cut[c, r] - (cut[c, r].max() + cut[c, r].min()) / 2
                scene["traces"].append((left + 10, 2 * MM_S / RATE, y0 - gain * y))
                scene["texts"].append((left, y0 + 1.4, 4, NAMES[3 * c + r]))
        scenes.append(scene)
    return scenes


def strips(parts):
    """Scene of lead II of several records, [(name, x [12, 1000] mV)], one below the other at 50 mm/s."""
    scene = blank(2 * WIDTH + 8, 30 * len(parts) + 5)
    lead = MM_MV * np.stack([x[1:2] for _, x in parts])                                      # [records, 1, 1000]
    for (name, x), y0 in zip(parts, spread(lead.max(2).clip(11), -lead.min(2), 7, scene["h"] - 9)):
        scene["paths"].append((PULSE * (2, 1) + (-5, y0)).tolist())
        scene["traces"].append((LEFT + 5, 2 * MM_S / RATE, y0 - MM_MV * x[1]))
        scene["texts"].append((LEFT + 507, y0 + 1, 4, name))
    scene["texts"].append((LEFT, 4.5, 3.2, "lead II   50 mm/s   10 mm/mV"))
    return scene


# ---------------------------------------------------------------------------------------------------------------------
# Drawing

def sheet(width, height):
    """A figure of width x height mm and axes over all of it, in mm with y downwards."""
    fig = Figure(figsize=(width / 25.4, height / 25.4), dpi=DPI)
    FigureCanvasAgg(fig)
    ax = fig.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    ax.set_axis_off()
    return fig, ax


def points(mm):
    """Millimetres in matplotlib's points, for line widths and letters."""
    return mm * 72 / 25.4


def write(ax, x, y, text, mm, **more):
    """Text with its baseline at (x, y) mm."""
    ax.text(x, y, text, fontsize=points(mm), **more)


def draw(ax, scene, left, top):
    """A scene with its upper left corner at (left, top) mm of a sheet; traces end at its edges."""
    w, h = scene["w"], scene["h"]
    paper = Rectangle((left, top), w, h, fc="none", ec="#d98c8c", lw=points(0.2))
    ax.add_patch(paper)
    for step, colour, width in ((1, "#f9dcdc", 0.1), (5, "#eeb0b0", 0.2)):
        lines = [[(left + x, top), (left + x, top + h)] for x in range(0, w + 1, step)]
        lines += [[(left, top + y), (left + w, top + y)] for y in range(0, h + 1, step)]
        ax.add_collection(LineCollection(lines, colors=colour, linewidths=points(width), zorder=0), autolim=False)
    for x, y, width, height, filled in scene["boxes"]:
        if filled:
            ax.add_patch(Rectangle((left + x, top + y), width, height, fc="#56b4e9", alpha=0.22, lw=0))
        ax.add_patch(Rectangle((left + x, top + y), width, height, fc="none", ec=BLUE,
                               lw=points(0.5 if filled else 0.25), ls="-" if filled else (0, (4, 2))))
    lines = [np.column_stack([left + x + step * np.arange(len(y)), top + y]) for x, step, y in scene["traces"]]
    lines += [np.array(path) + (left, top) for path in scene["paths"]]
    traces = LineCollection(lines, colors="black", linewidths=points(0.3), joinstyle="round", zorder=3)
    ax.add_collection(traces, autolim=False)
    traces.set_clip_path(paper)
    halo = [withStroke(linewidth=points(0.7), foreground="w")]
    for x, y, mm, text in scene["texts"]:
        write(ax, left + x, top + y, text, mm, zorder=4, path_effects=halo)


def save_png(path, fig):
    """Write a figure with 64 colours, which takes a third of the room and says its true size."""
    fig.canvas.draw()
    image = Image.fromarray(np.asarray(fig.canvas.buffer_rgba())).convert("RGB")
    with common.replacing(path) as t:
        image.quantize(64, method=Image.Quantize.FASTOCTREE, dither=0).save(t, "PNG", dpi=(DPI, DPI))


# ---------------------------------------------------------------------------------------------------------------------
# Gallery

def load_prototypes(name, args, prep):
    """A model's prototypes.json, each prototype with its `model`, `kind` and the `row` of its training record; exits if
    it is damaged or belongs to other records than `prep` or to another training than the model's last."""
    path, maker = args.run / name / "prototypes.json", common.command("03_project.py", name)
    record = common.load_json(path, maker, "inputs", "kind", "projected", "prototypes", "warnings")
    trained = common.newest(args.run / name, "joint", common.command("02_train_joint.py", name))[1]
    try:
        common.same_input(record, "prep", prep.path, path, maker, args.force)
        common.same_input(record, "joint", trained, path, maker, args.force)
        for j, q in enumerate(record["prototypes"]):
            q.update(row=prep.row_of[q["ecg_id"]], model=name, kind=record["kind"], index=j)
            if not 0 <= q["samples"][0] < q["samples"][1] <= SAMPLES or not {q["class"], *q["labels"]} <= set(CODES):
                raise ValueError
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        sys.exit(f"{path} is damaged or of other records than {args.prep}: {common.rerun(maker)} again")
    return record


def source(q):
    """Where a prototype comes from, in words."""
    part = "" if q["kind"] != "partial" else f", {q['samples'][0] / RATE:.2f} to {q['samples'][1] / RATE:.2f} s"
    return f"training ECG {q['ecg_id']}{part}"


def scenes_of(q, x):
    """The scenes that show a prototype, x [12, 1000] mV being its training ECG."""
    return [clinical(x, q["kind"], q["samples"])] + (cutouts([(x, q["samples"])]) if q["kind"] == "partial" else [])


def file_name(text):
    """Text as part of a file name: LAO/LAE -> LAO-LAE."""
    return re.sub(r"\W+", "-", text).strip("-")


def picture(job):
    """Draw one prototype to a PNG file; job is (path, PREP, prototype, title, text below it)."""
    path, folder, q, title, below = job  # no samples: jobs go through a pipe
    scenes, top = scenes_of(q, common.load_npy(folder / "signals.npy", "01_preprocess.py", mmap=True)[q["row"]]), 20
    fig, ax = sheet(297, top + sum(scene["h"] + 3 for scene in scenes) + 4)     # a partial one is A4 landscape
    write(ax, 13.5, 7, title, 5, weight="bold")
    write(ax, 13.5, 10, textwrap.fill(below, 160, max_lines=2, placeholder=" ..."), 3.2, va="top")
    for scene in scenes:
        draw(ax, scene, 13.5, top)
        top += scene["h"] + 3
    save_png(path, fig)


def gallery(args, prep, records, words):
    """Pictures of all prototypes in a pool of processes, and gallery.html with a section for each label."""
    jobs, sections, figures = [], {}, args.run / "figures"
    for name, record in records.items():
        for q in record["prototypes"]:
            file = f"{name}/{file_name(q['class'])}_{q['index']:04d}.png"
            about = f"{source(q)}, labelled {'; '.join(words[c] for c in q['labels'])}"
            jobs.append((figures / file, args.prep, q, words[q["class"]],
                         f"prototype {name} {q['index']}: {about}"))
            sections.setdefault((name, q["class"]), []).append((file, html.escape(about)))
    try:
        with common.process_pool(args) as pool:
            done = pool.map(picture, jobs, chunksize=4)
            for _ in tqdm(done, "prototypes", len(jobs), unit=" pictures", disable=None):
                pass
    finally:
        for name in records:  # what processes of the pool left half-written at a Ctrl-C
            common.sweep(figures / name)

    contents, body = [], []
    for (name, code), entries in sorted(sections.items(), key=lambda section: CODES.index(section[0][1])):
        heading, anchor = html.escape(f"{words[code]}, {len(entries)} prototypes ({name})"), f"{name}-{file_name(code)}"
        contents.append(f'<li><a href="#{anchor}">{heading}</a>')
        body.append(f'<h2 id="{anchor}">{heading}</h2>')
        for file, about in entries:
            body.append(f'<figure><a href="{file}"><img src="{file}" loading="lazy" width="297" height="210" '
                        f'alt="{html.escape(words[code])}"></a><figcaption>{about}</figcaption></figure>')
    missing = prep.info["without_training_record"]
    left_out = f" Without a training record, so not modelled: {' '.join(missing)}." if missing else ""
    title = f"{len(jobs):,} prototypes of {html.escape(str(args.run))}"
    warnings = "".join(f"<p>WARNING: {html.escape(w)}" for r in records.values() for w in r["warnings"])
    with common.replacing(figures / "gallery.html") as t:
        t.write_text(f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.4 sans-serif; margin: 1rem 2rem }} ul {{ columns: 24rem; column-gap: 3rem }}
figcaption {{ font-size: 14px }}
figure {{ display: inline-block; vertical-align: top; width: 297px; margin: 0 1rem 1rem 0 }}
img {{ border: 1px solid #bbb; object-fit: contain }}</style><h1>{title}</h1>
<p>Each prototype is a real training ECG, or 0.94 s of one, with which the model compares new ECGs. Below it stand its
source and all labels of that ECG. Click a picture to enlarge it; printed at 100 % it has 25 mm/s and 10 mm/mV. For
research, not for clinical use.{left_out}</p>{warnings}<ul>{"".join(contents)}</ul>{"".join(body)}</html>
""", encoding="utf-8")
    drawn = {path for path, *_ in jobs}
    for old in [p for name in records for p in (figures / name).glob("*.png") if p not in drawn]:
        old.unlink()  # of other prototypes; only now that no page shows it
    print(f"{args.run}: {len(jobs):,} prototypes -> {figures / 'gallery.html'}")


# ---------------------------------------------------------------------------------------------------------------------
# Case explanations (4.5)

def read_wfdb(name):
    """The first ten seconds of a WFDB record -> x [12, 1000] mV at 100 Hz, leads in our order, filtered like PTB-XL."""
    import wfdb
    if not Path(name + ".hea").is_file():
        sys.exit(f"{name}.hea is missing: --record takes the path of a WFDB record, without its ending")
    try:
        head = wfdb.rdheader(name)
        fs, length = float(head.fs), int(head.sig_len or 0)
        r = wfdb.rdrecord(name, sampto=min(length, int(np.ceil(10 * fs))))
        signal, leads, units = r.p_signal.T, [str(s).strip().upper() for s in r.sig_name], [str(u) for u in r.units]
        share = Fraction(RATE / fs).limit_denominator(10000)
    except Exception as e:  # wfdb raises many kinds on a damaged file
        sys.exit(f"{name} is not a readable WFDB record ({type(e).__name__}: {(str(e).splitlines() or [''])[0][:80]})")
    if length < 10 * fs:
        sys.exit(f"{name} is {length / fs:.1f} s long: the model needs 10 s")
    if missing := [n for n, lead in zip(NAMES, LEADS) if leads.count(lead) != 1]:
        sys.exit(f"{name} must hold each of the twelve leads once, but not so {', '.join(missing)}: rename its signals "
                 f"({', '.join(leads)[:200]})")
    volts = {"mv": 1, "uv": 1e-3, "v": 1e3}
    rows = [leads.index(lead) for lead in LEADS]
    if unknown := [units[i] for i in rows if units[i].lower() not in volts]:
        sys.exit(f"{name} has signals in {unknown[0]!r}: the units must be mV, uV or V")
    x = np.stack([signal[i] * volts[units[i].lower()] for i in rows])                                # [12, n] mV
    if not (whole := np.isfinite(x).all(1)).all():
        sys.exit(f"{name} has missing samples in lead {NAMES[whole.argmin()]}: its first 10 s must be whole")
    if np.abs(x - np.median(x, 1, keepdims=True)).max() > 50:
        # among others, wfdb reads "\u00b5V" as "V"
        sys.exit(f"{name} reaches more than 50 mV, which no ECG does: check gain and units (mV, uV, V) in {name}.hea")
    if length > np.ceil(10 * fs):
        print(f"{name} is {length / fs:.1f} s long: using the first 10 s")
    x = resample_poly(x, share.numerator, share.denominator, axis=1, padtype="line")[:, :SAMPLES]
    return common.highpass(x).astype(np.float32)


def load_classifiers(args, prep):
    """What is to be explained: the run's fusion, or without it (or with --model) the classifiers of single models.

    Each is a namespace of name, classes, W [C, P], b [C], mean [P], std [P] float64, thresholds [C] on the logit,
    prototypes [P], the networks whose similarities, side by side, are its input, and the warnings of its making.
    """
    found, later = [], prep.val | prep.test
    fusion = args.model is None and (args.run / "fusion.pt").is_file()
    for name in ["fusion"] if fusion else common.prototype_models(args):
        path = args.run / "fusion.pt" if fusion else args.run / name / "classifier.pt"
        maker = "04_fusion.py" if fusion else common.command("04_fusion.py", name)
        meta, arrays = common.load_head(path, maker)
        head = SimpleNamespace(name=name, classes=meta["classes"], networks=[], prototypes=[], warnings=[], **arrays,
                               file=path.relative_to(args.run).as_posix(), hash=common.file_hash(path))
        for m in BRANCHES if fusion else [name]:
            source_of = common.command("03_project.py", m)
            projected = common.newest(args.run / m, "projected", source_of)[1]
            key = f"{m}/{projected.name}" if fusion else "projected"
            common.same_input(meta, key, projected, path, maker, args.force)
            record = load_prototypes(m, args, prep)
            if record["projected"] != common.file_hash(projected):
                sys.exit(f"{args.run / m}/prototypes.json does not fit {projected}: {common.rerun(source_of)} again")
            head.networks.append(common.load_model(projected, source_of, args.device)[0])
            head.prototypes += record["prototypes"]
            head.warnings += record["warnings"]
        head.warnings = list(dict.fromkeys(meta.get("warnings", []) + head.warnings))
        if head.W.shape != (len(head.classes), sum(len(network.p) for network in head.networks)):
            sys.exit(f"{path} is of other prototypes than there are now: {common.rerun(maker)} again")
        logits = common.load_npy(args.run / f"logits_{name}.npy", maker)
        if logits.shape != (later.sum(), len(CODES)):
            sys.exit(f"{args.run}/logits_{name}.npy is of other records: {common.rerun(maker)} again")
        own = common.columns(head.classes)
        head.thresholds = common.decision_thresholds(prep.labels[prep.val][:, own], logits[prep.val[later]][:, own])
        found.append(head)
    return found


@torch.no_grad()
def explain(x, classifiers, top, patient=None):
    """What the classifiers say of x [12, 1000] mV and why: a result for every label, the most probable first.

    A result holds the logit, its bias, the `top` prototypes by contribution w * (s - mean) / std, each with the windows
    of x that match it, best first, and in `others` number and sum of the rest: first of the label's own prototypes,
    then of other labels'. Prototypes without a weight are in neither, nor are those that were taken from an ECG of
    `patient` (own_patient is their number): as in 04 they contribute nothing, or a training ECG would explain itself.
    """
    results = []
    for head in classifiers:
        s, matched = [], []
        for network in head.networks:
            z = network.latent(torch.from_numpy(np.array(x, np.float32))[None].to(network.p.device))
            s.append(network.scores(z)[0].double().cpu().numpy())                                 # [P]
            best = common.similarity(z, network.p, network.a)[0].cpu().sort(dim=1, descending=True, stable=True)
            for window, value in zip(best.indices[:, :network.top_k].tolist(), best.values[:, :network.top_k].tolist()):
                matched.append([{"samples": common.window_samples(network.kind, w), "similarity": v}
                                for w, v in zip(window, value)])
        s = np.concatenate(s)                                                                     # Eq. (9)
        taken_from = torch.cat([network.p_patient for network in head.networks]).cpu().numpy()    # [P]
        counts = np.ones(len(s), bool) if patient is None else taken_from != patient
        W = head.W * counts
        logits = W @ ((s - head.mean) / head.std) + head.b                                        # [C]
        for c, code in enumerate(head.classes):
            p, threshold = 1 / (1 + np.exp(-np.array([logits[c], head.thresholds[c]])))
            terms = W[c] * (s - head.mean) / head.std                                             # [P]
            order = np.argsort(-terms, kind="stable")
            shown = order[W[c][order] != 0][:top]
            own = np.array([q["class"] == code for q in head.prototypes])
            left = (W[c] != 0) & ~np.isin(np.arange(len(terms)), shown)
            results.append({
                "label": code, "classifier": head.name, "probability": p, "threshold": threshold,
                "predicted": bool(p >= threshold), "logit": logits[c], "bias": head.b[c],
                "own_patient": int((~counts & (head.W[c] != 0)).sum()), "prototypes": [
                    {**head.prototypes[j], "similarity": s[j], "mean": head.mean[j], "std": head.std[j],
                     "weight": W[c, j], "contribution": terms[j], "matched": matched[j]} for j in shown],
                "others": [{"number": int(those.sum()), "contribution": terms[those].sum()}
                           for those in (left & own, left & ~own)]})
    return sorted(results, key=lambda r: -r["probability"])


def page(x, x_source, title, true, r, q, words, warnings=()):
    """One page of a case: ECG x (`title`, `true` labels in words) beside prototype q, which has a say in r["label"]."""
    places = [m["samples"] for m in q["matched"][:5]]
    below = cutouts([(x, places[0]), (x_source, q["samples"])]) if q["kind"] == "partial" else []
    below = [strips([("this ECG", x), ("prototype", x_source)])] if q["kind"] == "1d" else below
    pair = clinical(x, q["kind"], places[0], places[1:]), clinical(x_source, q["kind"], q["samples"])
    top = 76 + 6 * len(r["prototypes"])
    bottom = top + pair[0]["h"] + 3
    height = bottom + (below[0]["h"] + 3 if below else 0) + 6
    fig, ax = sheet(2 * WIDTH + 24, height)
    write(ax, 8, 11, f"{title}: {words[r['label']]}", 8, weight="bold")
    verdict = "predicted: it reaches" if r["predicted"] else "not predicted: it stays below"
    text = f"probability {r['probability']:.3g} by the {r['classifier']} classifier ({verdict} the threshold "
    why = f", fold 9 has fewer than {common.FEWEST} positives" if r["threshold"] == 0.5 else ", chosen on fold 9"
    write(ax, 8, 19, f"{text}{r['threshold']:.3g}{why})", 5)

    # The sum: contributions + bias = logit
    lines = [f"  {'prototype':66}{'taken from':40}{'similarity':>10}{'training mean (sd)':>20}{'difference in sd':>19}"
             f"{'x weight':>11}{'= contribution':>17}"]
    for p in r["prototypes"]:
        name = textwrap.shorten(f"{p['model']} {p['index']}: {words[p['class']]}", 64, placeholder=" ...")
        lines.append(f"{'>' if p is q else ' '} {name:66}{source(p):40}{p['similarity']:10.3f}{p['mean']:12.3f} "
                     f"({p['std']:.3f}){(p['similarity'] - p['mean']) / p['std']:+19.2f}{p['weight']:+11.3f}"
                     f"{p['contribution']:+17.3f}")
    own, other = r["others"]
    more = "more of other labels' prototypes (the rest have no weight)"
    for name, amount in ((f"{own['number']:,} more of this label's prototypes", own["contribution"]),
                         (f"{other['number']:,} {more}", other["contribution"]),
                         ("bias: the logit of the average training record", r["bias"]),
                         (f"sum: the logit, that is probability {r['probability']:.3g}", r["logit"])):
        lines.append(f"  {name:166}{amount:+17.3f}")
    write(ax, 8, 25, "\n".join(lines), 4, va="top", family="monospace", linespacing=1.3)

    labels = "; ".join(words[c] for c in q["labels"])
    sides = ((8, title, true), (16 + WIDTH, f"prototype {q['model']} {q['index']}: {source(q)}", labels))
    for (left, heading, text), scene in zip(sides, pair):
        write(ax, left, top - 13, heading, 4.6, weight="bold")
        text = textwrap.fill(f"true labels: {text}", 130, max_lines=2, placeholder=" ...")
        write(ax, left, top - 11, text, 3.8, va="top")
        draw(ax, scene, left, top)
    for i, scene in enumerate(below):
        draw(ax, scene, sides[i][0], bottom)
    notes = []
    if len(places) > 1:
        notes.append(f"solid: the best matching window; dashed: the next {len(places) - 1} of the {len(q['matched'])} "
                     "whose mean is the similarity.")
    if q["weight"] < 0 < q["contribution"]:
        notes.append("The weight is negative: that this ECG is unlike the prototype speaks for the label.")
    if r["own_patient"]:
        notes.append(f"Not counted, as in training: prototypes from ECGs of this patient ({r['own_patient']:,}).")
    if warnings:
        notes.append("WARNING: made despite warnings, which its JSON file holds.")
    write(ax, 8, height - 2, "   ".join([*notes, "For research, not for clinical use."]), 3.6)
    return fig


def case(args, prep, words, ecg_id=None):
    """Explain ECG `ecg_id` of PTB-XL, or the record args.record: a PDF, its pages as PNG, and JSON with all of it."""
    if ecg_id is None:
        path = str(args.record).removesuffix(".hea").removesuffix(".dat")
        x, codes, true, patient = read_wfdb(path), None, "not known", None
        parts = Path(path).resolve().parts[-2:]  # with its folder: in many data sets a record's name is not its own
        title, name = f"record {'/'.join(parts)[-60:]}", f"record_{file_name('-'.join(parts))}"
    else:
        if ecg_id not in prep.row_of:
            sys.exit(f"ECG {ecg_id} is not in {args.prep}, which holds {len(prep.ecg_ids):,} records between "
                     f"{prep.ecg_ids.min()} and {prep.ecg_ids.max()}")
        row = prep.row_of[ecg_id]
        x, codes = prep.signals[row], [c for c, on in zip(CODES, prep.labels[row]) if on]
        path, patient = None, prep.patient_ids[row]
        part = "test" if prep.test[row] else "validation" if prep.val[row] else "training"
        title, name, true = f"{part} ECG {ecg_id}", str(ecg_id), "; ".join(words[c] for c in codes) or "none"
    classifiers = load_classifiers(args, prep)
    results = explain(x, classifiers, args.top, patient)
    warnings = list(dict.fromkeys(w for head in classifiers for w in head.warnings))
    explained = [r for r in results if r["predicted"]] or results[:1]
    if args.label:
        explained = [r for r in results if r["label"] in args.label]
        if missing := set(args.label) - {r["label"] for r in explained}:
            sys.exit(f"{', '.join(sorted(missing))}: no label of {args.run}'s models; choose from "
                     f"{', '.join(sorted({r['label'] for r in results}))}")
    folder, pages = args.run / "cases", [(r, q, i) for r in explained for i, q in enumerate(r["prototypes"], 1)]
    with common.replacing(folder / f"{name}.pdf") as temporary, PdfPages(temporary) as pdf:
        for r, q, i in tqdm(pages, "pages", disable=None):
            fig = page(x, prep.signals[q["row"]], title, true, r, q, words, warnings)
            q["page"] = f"{name}/{r['classifier']}_{file_name(r['label'])}_{i}.png"
            save_png(folder / q["page"], fig)
            pdf.savefig(fig)
    labels = [{k: r[k] for k in ("label", "probability", "threshold", "predicted", "logit")} for r in results]
    common.save_json(folder / f"{name}.json", {
        "format": common.FORMAT, "kind": "protoecgnet-case", "run": str(args.run), "ecg_id": ecg_id, "record": path,
        "title": title, "warnings": warnings,
        "inputs": {"prep": common.file_hash(prep.path), **{head.file: head.hash for head in classifiers}},
        "true_labels": codes, "explained": explained, "labels": labels, "descriptions": words})
    for old in set((folder / name).glob("*.png")) - {folder / q["page"] for _, q, _ in pages}:
        old.unlink()
    print(f"{args.run}: {title}: " + ", ".join(f"{words[r['label']]} {r['probability']:.3g}" for r in explained)
          + ("" if any(r["predicted"] for r in explained) else ", below its threshold") + f" -> {folder / name}.pdf")


# ---------------------------------------------------------------------------------------------------------------------
# Review page (3.6, Appendix C)

def review(args, prep, records, words):
    """Write review.html: every prototype as scenes, labelled by class only, and the program to rate them with."""
    items = []
    for q in tqdm([q for r in records.values() for q in r["prototypes"]], "review page", disable=None):
        scenes = scenes_of(q, prep.signals[q["row"]])
        y = np.concatenate([y for scene in scenes for _, _, y in scene["traces"]])      # mm, kept as int16 of 0.01 mm
        y = base64.b64encode(np.clip(np.round(100 * y), -32768, 32767).astype("<i2").tobytes()).decode()
        for scene in scenes:
            scene["traces"] = [[x, step, len(trace)] for x, step, trace in scene["traces"]]
        items.append({"id": f"{q['model']}/{q['index']}", "class": q["class"], "scenes": scenes, "y": y})
    items.sort(key=lambda q: CODES.index(q["class"]))
    data = {"run": str(args.run), "words": words, "items": items,
            "made": [r["projected"] for r in records.values()]}            # ratings are kept for these prototypes only
    path = args.run / "review.html"
    with common.replacing(path) as t:
        # written as an escape, "<" within a JSON string cannot end the script element
        t.write_text(REVIEW.replace("DATA", json.dumps(data).replace("<", "\\u003c"), 1), encoding="utf-8")
    print(f"{args.run}: {len(items):,} prototypes -> {path} ({path.stat().st_size / 1e6:.1f} MB, for any browser)")


REVIEW = r"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'">
<title>Prototype review</title><style>
* { box-sizing: border-box }
body { margin: 0; font: 15px/1.35 system-ui, sans-serif; color: #1a1a1a; background: #f4f4f4; height: 100vh;
  display: flex; flex-direction: column }
header, main, .row { display: flex; gap: 6px; align-items: center }
header { background: #fff; border-bottom: 1px solid #bbb; flex-wrap: wrap; padding: 6px 8px }
main { flex: 1; min-height: 0; align-items: stretch; padding: 6px 8px }
button, select, input, textarea { font: inherit; color: inherit; background: #fff; border: 1px solid #777;
  border-radius: 6px; min-height: 44px; min-width: 44px; padding: 2px 8px }
[aria-pressed=true], [aria-current=true] { background: #0b4f8a; color: #fff }
:focus-visible { outline: 3px solid #e69f00 }
#class { width: 280px } #reviewer { width: 120px } #list { width: 74px; overflow-y: auto } #list button { width: 100% }
#picture { flex: 1; min-width: 0; display: flex; flex-direction: column } #paper { flex: 1; overflow: auto }
h1 { font-size: 19px; margin: 4px 0; flex: 1 } text { white-space: pre }
svg { display: block; background: #fff; border: 1px solid #d98c8c; margin-bottom: 3px }
#panel { width: 270px; overflow-y: auto } fieldset { border: 1px solid #bbb; margin: 0 0 6px; padding: 0 8px 8px }
legend { font-weight: bold } p { margin: 0 0 5px; font-size: 14px } fieldset button { flex: 1; padding: 2px }
textarea { width: 100%; margin-top: 5px } #status { color: #0b4f8a; font-weight: bold }
@media (max-width: 960px) { html { overflow-y: scroll } body { height: auto } main { flex-flow: column } 
  main > * { width: auto !important } #list button { width: auto } }
</style></head><body>
<header><label>Class <select id="class"></select></label><button id="previous">&#9664;</button>
<button id="next">&#9654;</button><button id="unrated">Next unrated</button><span id="progress"></span>
<label>Reviewer <input id="reviewer" maxlength="80" autocomplete="off"></label><button id="export">Export</button>
<button id="import">Import</button><input id="file" type="file" accept=".json" hidden>
<button id="clear">Start anew</button></header>
<main><nav id="list"></nav><section id="picture"><div class="row"><h1 id="title"></h1>
<button id="smaller">&#8722;</button><button id="fit">Fit</button><button id="larger">+</button></div>
<div id="paper" tabindex="0"></div></section>
<section id="panel"><fieldset><legend>Representativeness</legend><p>Does the prototype reflect a typical or defining
presentation of the assigned diagnostic class? (5 is best)</p><div class="row" id="representativeness"></div></fieldset>
<fieldset><legend>Clarity</legend><p>Is the ECG signal in the prototype clean and interpretable, or is it obscured by
noise or artifacts that make interpretation difficult? (5 is best)</p><div class="row" id="clarity"></div></fieldset>
<fieldset><legend>Mark and comment</legend><div class="row" id="mark"></div>
<textarea id="comment" maxlength="2000" aria-label="comment"></textarea></fieldset><p id="status" role="status"></p>
<p>Keys: <b>1</b>-<b>5</b> representativeness, <b>Shift</b> + <b>1</b>-<b>5</b> clarity, <b>B</b> best, <b>X</b> bad,
<b>L</b> label error, <b>C</b> comment (<b>Esc</b> leaves it), <b>&#8592;</b> <b>&#8594;</b> previous, next,
<b>N</b> next unrated, <b>+</b> <b>-</b> <b>0</b> zoom. Ratings stay in this browser; export them to hand them in.</p>
</section></main><script type="application/json" id="data">DATA</script><script>
"use strict";
const $ = id => document.getElementById(id), {run, words, items, made} = JSON.parse($("data").textContent);
const key = `protoecgnet ${run} ${made}`, classes = [...new Set(items.map(q => q.class))];
const scales = ["representativeness", "clarity"], marks = {best: "Best", bad: "Bad", "label-error": "Label error"};
let state = {reviewer: "", ratings: {}}, at = 0, zoom = 1;

function make(tag, parent, attributes, text = "") {              // text never passes through the HTML parser
  const svg = /^(svg|path|rect|text)$/.test(tag) && "http://www.w3.org/2000/svg";
  const e = svg ? document.createElementNS(svg, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) e.setAttribute(name, value);
  e.textContent = text; parent.append(e); return e;
}
function say(text) { $("status").textContent = text }
function rating(q) {
  return state.ratings[q.id] ?? {class: q.class, representativeness: null, clarity: null, mark: null, comment: ""};
}
function done(q) { const r = rating(q); return r.mark === "label-error" || Boolean(r.representativeness && r.clarity) }
function save() {
  try { localStorage.setItem(key, JSON.stringify(state)) } catch { say("This browser keeps nothing: export in time.") }
}
function change(part) { state.ratings[items[at].id] = {...rating(items[at]), ...part}; save(); show() }
function toggle(name, value) { change({[name]: rating(items[at])[name] === value ? null : value}) }
function adopt(found) {                                          // checked ratings of our prototypes, from outside
  const score = v => [1, 2, 3, 4, 5].includes(v) ? v : null;
  const ours = items.filter(q => Object.hasOwn(found.ratings, q.id) && found.ratings[q.id]?.class === q.class);
  for (const q of ours) {
    const {representativeness, clarity, mark, comment} = found.ratings[q.id];
    state.ratings[q.id] = {class: q.class, representativeness: score(representativeness), clarity: score(clarity),
      mark: Object.hasOwn(marks, mark) ? mark : null, comment: String(comment ?? "").slice(0, 2000)};
  }
  $("reviewer").value = state.reviewer = String(found.reviewer ?? "").slice(0, 80);
  return ours.length;
}

function draw(q) {                                               // what 06_plot_prototypes.py laid out, in mm
  const bytes = Uint8Array.from(atob(q.y), c => c.charCodeAt(0)), samples = new DataView(bytes.buffer);
  let k = 0;
  $("paper").replaceChildren();
  for (const s of q.scenes) {
    const svg = make("svg", $("paper"), {viewBox: `0 0 ${s.w} ${s.h}`});
    for (const [step, stroke, width] of [[1, "#f9dcdc", 0.1], [5, "#eeb0b0", 0.2]]) {
      let d = "";
      for (let x = 0; x <= s.w; x += step) d += `M${x} 0V${s.h}`;
      for (let y = 0; y <= s.h; y += step) d += `M0 ${y}H${s.w}`;
      make("path", svg, {d, stroke, "stroke-width": width});
    }
    for (const [x, y, width, height] of s.boxes) make("rect", svg, {x, y, width, height, fill: "#56b4e9",
      "fill-opacity": 0.22, stroke: "#0b4f8a", "stroke-width": 0.5});
    let d = s.paths.map(path => "M" + path.join("L")).join("");
    for (const [x, step, n] of s.traces) for (let i = 0; i < n; i++)
      d += `${i ? "L" : "M"}${(x + i * step).toFixed(2)} ${samples.getInt16(2 * k++, true) / 100}`;
    make("path", svg, {d, fill: "none", stroke: "#000", "stroke-width": 0.3, "stroke-linejoin": "round"});
    for (const [x, y, size, text] of s.texts) make("text", svg, {x, y, "font-size": size, stroke: "#fff",
      "stroke-width": 0.7, "paint-order": "stroke"}, text);
  }
}
function fit() {                                                 // at zoom 1 the whole picture is seen
  const s = items[at].scenes, box = $("paper"), h = s.reduce((sum, scene) => sum + scene.h, 0);
  const free = innerWidth > 960 ? (box.clientHeight - 4 * s.length - 2) * s[0].w / h : Infinity;
  for (const svg of box.children) svg.style.width = `${Math.floor(Math.min(box.clientWidth - 1, free) * zoom)}px`;
}
function setZoom(z) { zoom = Math.min(8, Math.max(1, z)); fit() }
function go(i) { at = (i + items.length) % items.length; draw(items[at]); show(); fit(); $("paper").scrollTo(0, 0) }
function show() {                                                // everything but the picture
  const q = items[at], r = rating(q), same = items.filter(o => o.class === q.class);
  $("title").textContent = `${words[q.class]}: prototype ${same.indexOf(q) + 1} of ${same.length}`;
  $("list").replaceChildren();
  same.forEach((o, i) => make("button", $("list"), {"aria-current": o === q}, `${i + 1} ${done(o) ? "\u2713" : ""}`)
    .onclick = () => go(items.indexOf(o)));
  classes.forEach((c, i) => { const own = items.filter(o => o.class === c);
    $("class").options[i].textContent = `${own.filter(done).length}/${own.length} ${words[c]}` });
  $("class").value = classes.indexOf(q.class);
  for (const name of [...scales, "mark"])
    for (const b of $(name).children) b.setAttribute("aria-pressed", String(r[name]) === b.dataset.value);
  if ($("comment").value !== r.comment) $("comment").value = r.comment;
  $("progress").textContent = `${items.filter(done).length} of ${items.length} rated`;
}
function unrated() {
  for (let k = 1; k <= items.length; k++) if (!done(items[(at + k) % items.length])) return go(at + k);
  say("Every prototype is rated: export your ratings.");
}

classes.forEach((c, i) => make("option", $("class"), {value: i}));
for (const name of scales) for (let v = 1; v <= 5; v++)
  make("button", $(name), {"data-value": v, "aria-label": `${name} ${v}`}, v).onclick = () => toggle(name, v);
for (const v in marks) make("button", $("mark"), {"data-value": v}, marks[v]).onclick = () => toggle("mark", v);
const keys = {arrowleft: () => go(at - 1), arrowright: () => go(at + 1), n: unrated, b: () => toggle("mark", "best"),
  x: () => toggle("mark", "bad"), l: () => toggle("mark", "label-error"), c: () => $("comment").focus(),
  "+": () => setZoom(zoom * 1.4), "-": () => setZoom(zoom / 1.4), 0: () => setZoom(1)};
Object.entries({previous: "arrowleft", next: "arrowright", unrated: "n", larger: "+", smaller: "-", fit: 0})
  .forEach(([id, k]) => $(id).onclick = keys[k]);
$("class").onchange = e => { go(items.findIndex(q => q.class === classes[e.target.value])); e.target.blur() };
$("comment").oninput = e => change({comment: e.target.value});
$("reviewer").oninput = e => { state.reviewer = e.target.value; save() };
$("clear").onclick = () => {
  if (!confirm("Forget the ratings kept in this browser? Export them first.")) return;
  state = {reviewer: "", ratings: {}}; $("reviewer").value = ""; save(); go(0);
};
$("export").onclick = () => {
  const reviewer = state.reviewer.trim();
  if (!reviewer) { say("Enter your name as reviewer first."); return $("reviewer").focus() }
  const out = {format: 1, kind: "protoecgnet-ratings", reviewer, run, made, ratings: state.ratings};
  const link = make("a", document.body, {download: `ratings_${reviewer.replace(/[^\w-]+/g, "_")}.json`});
  link.href = URL.createObjectURL(new Blob([JSON.stringify(out, null, 1)], {type: "application/json"}));
  link.click(); link.remove(); say(`Exported the ratings of ${Object.keys(state.ratings).length} prototypes.`);
};
$("import").onclick = () => $("file").click();
$("file").onchange = async e => {
  try {
    const found = JSON.parse(await e.target.files[0].text());
    if (found.kind !== "protoecgnet-ratings" || found.format !== 1 || String(found.made) !== String(made)) throw 0;
    const n = adopt(found), all = Object.keys(found.ratings).length;
    save(); show(); say(`Imported ${n} of ${all} ratings${n < all ? "; the others belong to other prototypes" : ""}.`);
  } catch { say("This file does not hold ratings exported from this page.") }
  e.target.value = "";
};
addEventListener("keydown", e => {
  if (e.key === "Escape") return document.activeElement.blur();
  if (e.ctrlKey || e.altKey || e.metaKey || /INPUT|TEXTAREA|SELECT/.test(e.target.tagName)) return;
  const digit = /^(Digit|Numpad)[1-5]$/.test(e.code) && Number(e.code.at(-1));
  const action = digit ? () => toggle(scales[Number(e.shiftKey)], digit) : keys[e.key.toLowerCase()];
  if (action) { e.preventDefault(); action() }
});
addEventListener("resize", fit);
try { adopt(JSON.parse(localStorage.getItem(key)) ?? state) } catch { say("What this browser kept cannot be read.") }
go(0);
</script></body></html>
"""


def main():
    p = common.argument_parser(__doc__)
    what = p.add_mutually_exclusive_group()
    what.add_argument("--case", type=int, nargs="+", metavar="ECG_ID", help="explain the predictions for these ECGs")
    what.add_argument("--record", metavar="PATH", help="the same for your own WFDB record (12 leads, at least 10 s)")
    p.add_argument("--label", nargs="+", metavar="CODE", help="explain these labels of a case, predicted or not")
    p.add_argument("--top", type=int, default=3, metavar="N", help="prototypes shown per label of a case (default 3)")
    what.add_argument("--review", action="store_true", help="write the page in which clinicians rate the prototypes")
    args = common.parse(p)
    if args.top < 1:
        p.error("--top must be at least 1")
    if args.label and not (args.case or args.record is not None):
        p.error("--label goes with --case or --record")
    prep = common.load_prep(args.prep)
    words = {c: f"{prep.info['descriptions'].get(c, '')} ({c})" for c in CODES}
    if args.case or args.record is not None:
        for ecg_id in args.case or [None]:
            case(args, prep, words, ecg_id)
        return
    records = {name: load_prototypes(name, args, prep) for name in common.prototype_models(args)}
    if args.review:
        return review(args, prep, records, words)
    if args.demo:  # quick: one case, and the first prototypes of each label only
        case(args, prep, words, int(prep.ecg_ids[prep.test][0]))
        for record in records.values():
            labels = [q["class"] for q in record["prototypes"]]
            record["prototypes"] = [q for j, q in enumerate(record["prototypes"]) if labels[:j].count(labels[j]) < 3]
    gallery(args, prep, records, words)


if __name__ == "__main__":
    common.run(main)
