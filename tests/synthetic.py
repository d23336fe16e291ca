"""A synthetic stand-in for PTB-XL v1.0.3 (100 Hz part): same folders, same columns, invented patients, 15 MB.

    python 00_download.py --synthetic [N]    # N records (default 600) into data/synthetic, 10 s on one CPU core

Every heart beat is a handful of Gaussian waves of a three-dimensional heart dipole (a vectorcardiogram), projected on
the leads; every label used changes those waves or their timing the way the textbook says, so a network can learn it.
All 16 rhythm labels, 3 global ones and 28 of the 52 morphology labels occur. Nothing here comes from a patient: use it
to see that the code runs and learns, never to report accuracy.
"""
import csv
import hashlib
import io
import os
import shutil
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import wfdb
from tqdm import tqdm

LEADS = ("I", "II", "III", "AVR", "AVL", "AVF", "V1", "V2", "V3", "V4", "V5", "V6")
FS, SAMPLES = 100, 1000  # Hz, samples: ten seconds

# ---------------------------------------------------------------------------------------------------------------------
# What is in the data set: the 71 statements and which of them occur together
# ---------------------------------------------------------------------------------------------------------------------

# code, flags (d diagnostic, f form, r rhythm), description; the row order of PTB-XL's own scp_statements.csv.
STATEMENTS = [entry.split(maxsplit=2) for entry in """
NDT df nondiagnostic T abnormalities; NST_ df nonspecific ST changes; DIG df digitalis effect; LNGQT df long QT interval
NORM d normal ECG; IMI d inferior myocardial infarction; ASMI d anteroseptal myocardial infarction
LVH d left ventricular hypertrophy; LAFB d left anterior fascicular block; ISC_ d nonspecific ischemia
IRBBB d incomplete right bundle branch block; 1AVB d first degree AV block
IVCD d nonspecific intraventricular conduction disturbance; ISCAL d ischemia in anterolateral leads
CRBBB d complete right bundle branch block; CLBBB d complete left bundle branch block
ILMI d inferolateral myocardial infarction; LAO/LAE d left atrial overload/enlargement
AMI d anterior myocardial infarction; ALMI d anterolateral myocardial infarction; ISCIN d ischemia in inferior leads
INJAS d subendocardial injury in anteroseptal leads; LMI d lateral myocardial infarction
ISCIL d ischemia in inferolateral leads; LPFB d left posterior fascicular block; ISCAS d ischemia in anteroseptal leads
INJAL d subendocardial injury in anterolateral leads; ISCLA d ischemia in lateral leads
RVH d right ventricular hypertrophy; ANEUR d ST-T changes from ventricular aneurysm
RAO/RAE d right atrial overload/enlargement; EL d electrolyte disturbance or drug effect
WPW d Wolff-Parkinson-White syndrome; ILBBB d incomplete left bundle branch block
IPLMI d inferoposterolateral myocardial infarction; ISCAN d ischemia in anterior leads
IPMI d inferoposterior myocardial infarction; SEHYP d septal hypertrophy
INJIN d subendocardial injury in inferior leads; INJLA d subendocardial injury in lateral leads
PMI d posterior myocardial infarction; 3AVB d third degree AV block
INJIL d subendocardial injury in inferolateral leads; 2AVB d second degree AV block; ABQRS f abnormal QRS
PVC f ventricular premature complex; STD_ f ST depression; VCLVH f voltage criteria for left ventricular hypertrophy
QWAVE f Q waves present; LOWT f low amplitude T waves; NT_ f nonspecific T wave changes; PAC f atrial premature complex
LPR f prolonged PR interval; INVT f inverted T waves; LVOLT f low QRS voltage; HVOLT f high QRS voltage
TAB_ f T wave abnormality; STE_ f ST elevation; PRC(S) f premature complexes; SR r sinus rhythm
AFIB r atrial fibrillation; STACH r sinus tachycardia; SARRH r sinus arrhythmia; SBRAD r sinus bradycardia
PACE r artificial pacemaker; SVARR r supraventricular arrhythmia; BIGU r bigeminal pattern; AFLT r atrial flutter
SVTAC r supraventricular tachycardia; PSVT r paroxysmal supraventricular tachycardia; TRIGU r trigeminal pattern
""".strip().replace("\n", ";").split(";")]
FLAGS = {code: flags for code, flags, _ in STATEMENTS}

# Which labels occur together, and in how many of 600 records. As in PTB-XL a few records have no rhythm label, many no
# morphology label, and every normal one says so; only the long tail is shorter, so that each label can be learned.
KINDS = [(int(entry.split()[0]), tuple(entry.split()[1:])) for entry in """
64 NORM SR; 16 NORM SARRH; 12 NORM SBRAD; 14 NORM STACH; 6 NORM; 6 NDT SR; 8 NDT LOWT SR; 5 NDT AFIB; 6 NDT LOWT 1AVB SR
10 IMI ABQRS SR; 8 IMI QWAVE SR; 6 IMI PVC ABQRS SR; 6 IMI 1AVB SR; 10 ASMI ABQRS SR; 8 ASMI QWAVE SR
6 ASMI LAFB ABQRS SR; 8 AMI ABQRS SR; 6 AMI QWAVE SR; 10 LVH VCLVH SR; 8 LVH LAO/LAE VCLVH SR; 8 LVH ISC_ STD_ SR
6 LVH ISC_ AFIB; 3 LVH VCLVH AFLT; 8 LAFB SR; 10 IRBBB SR; 8 CRBBB SR; 3 LAFB CRBBB SR; 6 CLBBB SR; 6 CLBBB LAO/LAE SR
4 CLBBB AFIB; 8 1AVB SR; 6 IVCD SR; 6 IVCD LVOLT SR; 4 IVCD AFIB; 8 LVOLT SR; 8 HVOLT SR; 6 HVOLT SARRH; 8 STE_ SR
6 STE_ SBRAD; 8 ISCAL SR; 6 ISCAL STD_ STACH; 4 INJAS SR; 10 INJAS INVT SR; 5 INVT SR; 8 LNGQT SR; 6 LNGQT SBRAD
8 WPW ABQRS SR; 3 WPW SR; 3 WPW ABQRS SBRAD; 14 RVH RAO/RAE SR; 4 PVC SR; 6 PAC SR; 8 AFIB; 10 DIG STD_ AFIB; 5 DIG SR
14 EL SR; 16 PACE; 12 AFLT; 10 PVC SR BIGU; 5 PAC SR BIGU; 10 PVC SR TRIGU; 5 PAC SR TRIGU; 5 2AVB; 5 IMI 2AVB
5 IRBBB 2AVB; 7 3AVB; 4 IMI 3AVB; 4 CRBBB 3AVB; 10 PSVT; 5 STD_ PSVT; 15 SVTAC; 15 SVARR
""".strip().replace("\n", ";").split(";")]

COLUMNS = ("ecg_id patient_id age sex height weight nurse site device recording_date report scp_codes heart_axis "
           "infarction_stadium1 infarction_stadium2 validated_by second_opinion initial_autogenerated_report "
           "validated_by_human baseline_drift static_noise burst_noise electrodes_problems extra_beats pacemaker "
           "strat_fold filename_lr filename_hr").split()
STATEMENT_COLUMNS = (",description,diagnostic,form,rhythm,diagnostic_class,diagnostic_subclass,Statement Category,"
                     "SCP-ECG Statement Description,AHA code,aECG REFID,CDISC Code,DICOM Code").split(",")

# ---------------------------------------------------------------------------------------------------------------------
# The heart: waves of a dipole, in millivolt; axes left, down (to the feet), front
# ---------------------------------------------------------------------------------------------------------------------

# How one millivolt of dipole along each axis shows in the 8 independent leads. [8, 3]
LEAD_VECTORS = np.array([[.65, -.20, -.05],   # I
                         [.25, 1.00, .10],    # II
                         [-.50, .10, .95],    # V1
                         [.10, .12, 1.35],    # V2
                         [.85, .10, 1.20],    # V3
                         [1.20, .15, .60],    # V4
                         [1.10, .15, .05],    # V5
                         [.85, .10, -.25]])   # V6

# A wave: centre, width before it, width after it (ms, Gaussian sigma), then the dipole (left, down, front, mV).
# P counts from its own middle, the rest from the R peak; ST, T and U stretch with the heart period.
WAVES = {"P right": (-12, 17, 17, .02, .08, .05), "P left": (22, 19, 19, .06, .06, -.05),
         "delta": (-42, 16, 14, 0, 0, 0), "Q": (-21, 7, 7, -.11, -.05, .27), "R": (0, 9, 9, .95, .62, -.25),
         "S": (22, 8, 9, -.15, -.08, -.60), "late": (55, 17, 20, 0, 0, 0), "ST": (120, 45, 60, 0, .01, .05),
         "T": (290, 55, 37, .25, .20, .17), "U": (470, 40, 45, .01, .015, .02)}
QRS = ("delta", "Q", "R", "S", "late")
PREMATURE_LEFT = {"R": (25, 27, 30, -.70, -.80, 1.00), "late": (75, 22, 25, -.50, -.30, .55),
                  "ST": (150, 45, 60, .10, .08, -.12), "T": (350, 60, 50, .30, .30, -.45)}  # from the left ventricle
PREMATURE_RIGHT = {"R": (25, 26, 30, .55, .80, -.85), "late": (75, 22, 25, .55, .35, -.60),
                   "ST": (150, 45, 60, -.10, -.10, .12), "T": (350, 60, 50, -.28, -.30, .42)}  # from the right one
PACED = {"R": (32, 20, 26, .40, -.65, -.60), "late": (72, 24, 24, .45, -.50, -.70),
         "ST": (150, 45, 60, -.08, .12, .12), "T": (350, 62, 48, -.22, .38, .40)}  # from the tip of the right one

# What a code does to the waves: three numbers replace the dipole, six the timing too; later codes overrule earlier.
CHANGES = {
    # Atria. Left: P broad, notched, deep terminal part in V1. Right: P tall and pointed in II.
    "LAO/LAE": {"P left": (42, 20, 22, .12, .11, -.14)},
    "RAO/RAE": {"P right": (.04, .26, .12), "P left": (12, 19, 19, .06, .06, -.05)},
    # An accessory pathway excites a part early and slowly: delta wave (and a short PR, below), T opposite to it.
    "WPW": {"delta": (.38, .03, .22), "Q": (.30, .03, .15), "R": (1.00, .30, .05), "T": (-.08, .12, .14)},
    # More muscle on the left: tall R in V5, deep S in V2. On the right: tall R in V1, deep S in V6, right axis.
    "LVH": {"R": (0, 11, 11, 1.55, .58, -.50), "S": (-.15, -.10, -.85), "T": (.12, .12, .24)},
    "RVH": {"Q": (-.03, -.08, .10), "R": (.12, .60, .75), "S": (-.75, -.15, .05), "T": (.20, .20, -.26)},
    # Scars: the first forces point away from the feet (Q in II, III, aVF), the septum (QS in V1-V3), the front (V3-V5).
    "IMI": {"Q": (-27, 11, 10, .03, -.42, .15), "R": (.88, .20, -.25), "T": (.24, -.12, .20)},
    "ASMI": {"Q": (-25, 10, 10, .05, -.02, -.42), "R": (.75, .58, -.90), "ST": (.02, 0, .10), "T": (.10, .15, -.10)},
    "AMI": {"Q": (-26, 11, 10, -.32, .02, -.14), "R": (.36, .62, -.12), "ST": (.06, 0, .06), "T": (-.16, .16, -.08)},
    # The right ventricle last: r' in V1, S in I and V6; T in V1 opposite to a complete block.
    "IRBBB": {"S": (-.09, -.07, -.21), "late": (42, 9, 10, -.22, -.02, .42)},
    "CRBBB": {"S": (-.09, -.07, -.18), "late": (-.45, 0, .72), "T": (.26, .18, -.16)},
    # The left ventricle by a detour: one broad notched wave to the left and back, ST and T opposite to it.
    "CLBBB": {"Q": (0, 0, 0), "R": (8, 18, 24, .62, .22, -.95), "S": (0, 0, 0), "late": (62, 24, 20, .72, .05, -.85),
              "ST": (-.10, -.02, .14), "T": (-.27, 0, .42)},
    # Its upper front part last: rS in II, III, aVF, qR in I and aVL.
    "LAFB": {"Q": (-.14, .22, .22), "R": (.80, -.30, -.25), "S": (24, 8, 9, .05, -.72, -.45)},
    # Everything slow and slurred, of no typical shape.
    "IVCD": {"Q": (-46, 15, 15, -.11, -.05, .25), "R": (0, 17, 18, .85, .55, -.25), "S": (48, 17, 18, -.18, -.08, -.55),
             "late": (22, 9, 9, -.28, -.20, .05)},
    # ST and T. ISC_ is the strain pattern, INJAS depresses ST over the septum (subendocardial injury), DIG scoops it
    # and shortens QT; EL is the tented T of high potassium with a flat P.
    "NDT": {"T": (.01, .07, .12)},
    "LOWT": {"T": (.02, .03, .02)},
    "LVOLT": {"T": (.15, .12, .11)},
    "INJAS": {"ST": (-.08, .02, -.24), "T": (.12, .18, .02)},
    "INVT": {"T": (-.06, .06, -.36)},
    "ISC_": {"ST": (-.12, -.05, .06), "T": (290, 70, 32, -.26, -.08, .14)},
    "ISCAL": {"ST": (-.03, 0, 0), "T": (290, 42, 38, -.36, .02, -.14)},
    "STE_": {"ST": (120, 60, 60, .10, .11, .19)},
    "DIG": {"ST": (120, 50, 50, -.17, -.15, -.06), "T": (240, 32, 28, .06, .08, .10)},
    "STD_": {"ST": (-.20, -.14, -.05)},
    "EL": {"T": (290, 33, 28, .62, .55, .50), "P right": (.01, .04, .02), "P left": (.03, .03, -.02)},
    "LNGQT": {"T": (400, 66, 45, .25, .20, .17), "U": (0, 0, 0)},
}
PR = {"1AVB": (225, 320), "WPW": (95, 115)}  # ms from mid P to R; (125, 180) for the others


def heart(codes: set[str], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The waves of the atria and of an ordinary beat under these codes.

    A finding is anything from half as marked as in CHANGES to a bit more, and every wave varies by a quarter anyway.
    """
    waves = {name: np.array(wave, float) for name, wave in WAVES.items()}
    for code in [code for code in CHANGES if code in codes]:
        degree = rng.uniform(.5, 1.1)
        for name, change in CHANGES[code].items():
            waves[name][-len(change):] += degree * (change - waves[name][-len(change):])
    waves["Q"][3:] *= 1.4 if "QWAVE" in codes else 1
    for name in QRS:
        waves[name][3:] *= 1.8 if "HVOLT" in codes else .35 if "LVOLT" in codes else 1
    for wave in waves.values():
        wave[3:] *= rng.uniform(.75, 1.25)
    return waves


RATES = {"SBRAD": (40, 54), "STACH": (102, 130), "PSVT": (172, 205), "SVTAC": (140, 165), "AFIB": (70, 120),
         "PACE": (60, 75), "SARRH": (60, 75), "1AVB": (56, 72), "2AVB": (72, 88), "LNGQT": (58, 72), "BIGU": (70, 90),
         "TRIGU": (70, 90)}  # beats per minute; (62, 95) for the others
FLUTTER = 4.9  # flutter waves per second


def rhythm(codes: set[str], rng: np.random.Generator) -> tuple[list, list, float]:
    """P waves and beats as lists of (seconds, kind), and the usual heart period in s.

    Kinds: N of normal origin, A from elsewhere in the atria, V from a ventricle, S stimulated by a pacemaker.
    """
    period = 60 / rng.uniform(*next((RATES[code] for code in RATES if code in codes), (62, 95)))
    pr = rng.uniform(*next((PR[code] for code in PR if code in codes), (125, 180))) / 1000
    if "3AVB" in codes:  # two clocks that know nothing of each other, the slow one below the block
        escape = "N" if codes & {"IMI", "CRBBB"} else rng.choice(["N", "V"])
        return ([(t, "N") for t in np.arange(-rng.uniform(1, 2), 12, 60 / rng.uniform(85, 105))],
                [(t, escape) for t in np.arange(-rng.uniform(1, 3), 12, 60 / rng.uniform(32, 42))], 1.0)
    if "AFLT" in codes:  # every second to fourth flutter wave is conducted
        period = rng.choice([2, 3, 4, 4]) / FLUTTER
    count = int(20 / period) + 2
    k = np.arange(count)
    breath = np.sin(2 * np.pi * (k * period / rng.uniform(3.5, 5) + rng.uniform()))
    depth = rng.uniform(.13, .26) if "SARRH" in codes else .02
    steps = period * (1 + depth * breath) * rng.normal(1, .012, count)  # s, R to R
    kinds = np.full(count, "S" if "PACE" in codes else "N")
    if codes & {"PACE", "AFLT", "PSVT", "SVTAC"}:  # like clockwork
        steps[:] = period
    if "AFIB" in codes:
        steps = period * np.clip(rng.gamma(14, 1 / 14, count), .5, 2)
    if "SVARR" in codes:  # the pace-making focus wanders through the atria
        steps = period * rng.uniform(.65, 1.35, count)
        kinds = rng.choice(["N", "A", "A"], count)
    if codes & {"PVC", "PAC"}:  # every so many beats one comes early and a pause follows
        every = 2 if "BIGU" in codes else 3 if "TRIGU" in codes else rng.integers(5, 8)
        early = k[:-1][k[1:] % every == 0]
        kinds[early] = "V" if "PVC" in codes else "A"
        steps[early] *= .62
        steps[early + 1] *= 1.36 if "PVC" in codes else 1.15
    times = -rng.uniform(2, 8) + np.cumsum(steps)
    p_waves = [(t - pr, kind) for t, kind in zip(times, kinds) if kind != "V"]
    if codes & {"AFIB", "AFLT", "PSVT", "SVTAC"} or "PACE" in codes and rng.uniform() < .5:
        p_waves = []
    if "2AVB" in codes:  # PR grows from beat to beat (Wenckebach) or not (Mobitz) until a P is not conducted
        every, growth = rng.integers(3, 5), rng.choice([0, .07])
        times = (times + growth * (k % every))[k % every < every - 1]
        kinds = kinds[:len(times)]
    return p_waves, list(zip(times, kinds)), period


def add_waves(dipole: np.ndarray, when: float, waves: dict, stretch: float = 1, vector=(1, 1, 1)) -> None:
    """Add waves, with time zero at `when` seconds, to dipole [3, 1000] in place; ST, T, U are stretched in time."""
    ms = (np.arange(SAMPLES) / FS - when) * 1000
    for name, (centre, before, after, *own) in waves.items():
        z = (ms / stretch if name in ("ST", "T", "U") else ms) - centre
        dipole += np.outer(np.multiply(own, vector), np.exp(-.5 * (z / np.where(z < 0, before, after)) ** 2))


def make_ecg(codes: set[str], rng: np.random.Generator, gain: float = 1, tilt: float = 0, turn: float = 0,
             noise: float = 1) -> np.ndarray:
    """One ten-second ECG of a heart with these SCP codes: float64 [12, 1000], mV, 100 Hz, leads in PTB-XL's order.

    gain, tilt (degrees in the frontal plane) and turn (degrees in the horizontal plane) belong to the patient's body;
    noise scales baseline wander, muscle and mains noise together.
    """
    t = np.arange(SAMPLES) / FS
    waves = heart(codes, rng)
    atria, ventricles = ({name: waves[name] for name in waves if name.startswith("P ") is own} for own in (True, False))
    source = {"N": ventricles, "A": ventricles, "S": PACED, "V": (PREMATURE_LEFT, PREMATURE_RIGHT)[rng.integers(2)]}
    p_waves, beats, period = rhythm(codes, rng)
    stretch = np.sqrt(np.clip(period, .28, 1.3))  # QT goes with the square root of the heart period (Bazett)

    dipole = np.zeros((3, SAMPLES))
    for when, kind in p_waves:  # A: from low in the atria, so upside down in II, III, aVF
        low = rng.uniform((-1, -1.2, .5), (1, -.5, 1.2))
        add_waves(dipole, when, atria, vector=low if kind == "A" else (1, 1, 1))
    for when, kind in beats:
        add_waves(dipole, when, source[kind], stretch)
    if "PACE" in codes:  # a stimulus is shorter than a sample: one sample just before QRS (and P, if there is one)
        for k in [round((when - .03) * FS) for when, _ in beats] + [round((when - .06) * FS) for when, _ in p_waves]:
            if 0 <= k < SAMPLES:
                dipole[:, k] += (.30, .65, -.45)
    if "AFIB" in codes:  # fibrillation: five oscillations of unsteady frequency and size, best seen in V1 and II
        for hertz in rng.uniform(4.5, 9, 5):
            unsteady = np.cumsum(rng.normal(0, .12, SAMPLES))  # rad
            swell = 1 + .7 * np.sin(2 * np.pi * (rng.uniform(.2, .6) * t + rng.uniform()))
            dipole += np.outer(rng.normal((0, .014, .019), .004), swell * np.sin(2 * np.pi * hertz * t + unsteady))
    if "AFLT" in codes:  # flutter: slow fall and quick rise in II, III, aVF; upright in V1
        saw = np.interp((t - beats[0][0]) * FLUTTER % 1, (0, .68, 1), (.5, -.5, .5))
        dipole += np.outer(rng.uniform(.6, 1.3) * np.array([.02, .30, -.16]), saw)

    # The body: size and position of the heart, then electrodes and their noise.
    (a, b), (c, d) = ((np.cos(x), np.sin(x)) for x in np.radians((tilt, turn)))
    frontal, horizontal = np.array([[a, -b, 0], [b, a, 0], [0, 0, 1]]), np.array([[c, 0, -d], [0, 1, 0], [d, 0, c]])
    leads = gain * LEAD_VECTORS @ horizontal @ frontal @ dipole  # [8, 1000]
    mains = rng.uniform(0, .008) * np.cos(2 * np.pi * 49.7 * t)
    for lead in leads:
        wander = sum(rng.uniform(.01, .12) * np.sin(2 * np.pi * (hertz * t + rng.uniform()))
                     for hertz in rng.uniform(.08, .4, 3))
        lead += noise * (wander + rng.normal(0, rng.uniform(.005, .03), SAMPLES) + mains)
    i, ii = leads[:2]
    return np.stack([i, ii, ii - i, -(i + ii) / 2, i - ii / 2, ii - i / 2, *leads[2:]])  # Einthoven, Goldberger


# ---------------------------------------------------------------------------------------------------------------------
# The data set: who has what, in which fold, and the files
# ---------------------------------------------------------------------------------------------------------------------


def plan_records(n: int) -> list[tuple[str, ...]]:
    """The label sets of n records, in the order of KINDS: exactly KINDS for 600, in proportion for other n.

    Three records of every label come first, as training, fold 9 and fold 10 need one each; that takes some 90 records.
    """
    counts, total = np.zeros(len(KINDS), int), Counter()
    for _ in range(n):
        best = max(range(len(KINDS)), key=lambda k: (sum(total[code] < 3 for code in KINDS[k][1]),
                                                     n * KINDS[k][0] / 600 - counts[k]))
        counts[best] += 1
        total.update(KINDS[best][1])
    return [codes for count, (_, codes) in zip(counts, KINDS) for _ in range(count)]


def assign_folds(records: list[tuple[str, ...]]) -> np.ndarray:
    """Fold 1..10 of every record, int [n], each about a tenth of the records and of every label.

    Folds 10 and 9 pick first, always the record whose labels they miss most, until they hold a tenth of the records
    and of every label two (one, of a label with fewer than 14 records). In a set of fewer than 300 that takes more than
    a tenth, at most three; from 90 records on every label is in training, fold 9 and fold 10.
    """
    names = list(dict.fromkeys(code for codes in records for code in codes))
    has = np.array([[code in codes for code in names] for codes in records])  # [n, codes]
    counts = has.sum(axis=0)
    least = np.where(counts >= 14, 2, 1)
    folds = np.zeros(len(records), int)
    for fold in (10, 9):
        mine = np.zeros(len(names))
        while (np.sum(folds == fold) < len(records) // 10 or (mine < least).any()) and \
                np.sum(folds == fold) < .3 * len(records):
            wish = has @ ((np.maximum(counts / 10, least) - mine) / counts)
            wish[(has & (has[folds == 0].sum(axis=0) <= fold - 8)).any(axis=1)] -= 100  # leave one for each later split
            best = np.argmax(np.where(folds == 0, wish, -np.inf))
            folds[best] = fold
            mine += has[best]
    rest = np.flatnonzero(folds == 0)
    folds[rest] = 1 + np.arange(len(rest)) % 8  # neighbours in KINDS order are alike, so dealing them out is fair
    return folds


def plan_patients(folds: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Patient number of every record, int [n]: one patient in six has two or three records, alike and of one fold."""
    patients, number = np.zeros(len(folds), int), 0
    for fold in range(1, 11):
        mine = np.flatnonzero(folds == fold)
        while len(mine):
            number += 1
            visits = rng.choice([1, 2, 3], p=[.84, .12, .04])
            patients[mine[:visits]], mine = number, mine[visits:]
    return patients


def database_row(ecg_id: int, patient: int, codes: tuple[str, ...], fold: int, seed: int) -> dict:
    """One row of ptbxl_database.csv; the columns left out stay empty, as they mostly are in PTB-XL."""
    rng, person = np.random.default_rng([seed, 1, ecg_id]), np.random.default_rng([seed, 2, patient])
    doubt = rng.choice([100.0, 80.0, 50.0, 15.0], p=[.75, .12, .09, .04])  # likelihood of the diagnostic statements
    stated = {code: float(doubt) if "d" in FLAGS[code] else 100.0 if code in ("PVC", "PACE", "AFLT", "PSVT") else 0.0
              for code in codes}
    where, date = f"{ecg_id // 1000 * 1000:05d}/{ecg_id:05d}", datetime(1990, 1, 1, 8) + timedelta(hours=7.25 * ecg_id)
    return dict(
        ecg_id=ecg_id, patient_id=float(patient), age=float(person.integers(30, 90)),
        sex=person.integers(2), weight=float(person.integers(50, 100)), nurse=0.0, site=0.0,
        device="SYNTHETIC", recording_date=f"{date:%Y-%m-%d %H:%M:%S}",
        report="synthetic: " + ", ".join(text for code, _, text in STATEMENTS if code in codes), scp_codes=str(stated),
        second_opinion=False, initial_autogenerated_report=False, validated_by_human=True,
        pacemaker="ja, pacemaker" if "PACE" in codes else "", strat_fold=fold,
        filename_lr=f"records100/{where}_lr", filename_hr=f"records500/{where}_hr")


def write_csv(path: Path, columns: list[str], rows: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


def write_whole(path: Path, text: str) -> None:
    """Write a file in one step: on a full disk or at a kill there is no half of it."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8", newline="")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_dataset(folder: Path, n: int = 600, seed: int = 0, progress: bool = False) -> None:
    """Write n synthetic records into folder, laid out as PTB-XL: the two tables, records100/, SHA256SUMS.txt.

    The same n and seed give the same bytes. SHA256SUMS.txt is written last: without it the folder is not complete.
    """
    folder = Path(folder)
    table, statements, sums = (folder / name for name in ("ptbxl_database.csv", "scp_statements.csv", "SHA256SUMS.txt"))
    if table.exists() and "SYNTHETIC" not in table.read_text(encoding="utf-8"):
        raise SystemExit(f"{table} is not synthetic and is left as it is; choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    sums.unlink(missing_ok=True)
    if table.exists():  # a kill from here on must not leave ECGs of one plan beside the table of another
        shutil.rmtree(folder / "records100", ignore_errors=True)

    rng = np.random.default_rng(seed)
    records = plan_records(n)
    folds = assign_folds(records)
    patients = plan_patients(folds, rng)
    plan = [(k + 1, patients[j], records[j], folds[j]) for k, j in enumerate(rng.permutation(n))]  # by ecg_id
    write_csv(table, COLUMNS, [database_row(*record, seed) for record in plan])
    write_csv(statements, STATEMENT_COLUMNS, [
        {"": code, "description": text, **{name: "1.0" for name in STATEMENT_COLUMNS[2:5] if name[0] in flags}}
        for code, flags, text in STATEMENTS])

    written = [table, statements]
    for ecg_id, patient, codes, _ in tqdm(plan, desc="synthetic ECGs", disable=not progress):
        body = np.random.default_rng([seed, 3, patient])
        x = make_ecg(set(codes), np.random.default_rng([seed, 4, ecg_id]), gain=body.uniform(.75, 1.25),
                     tilt=body.normal(0, 13), turn=body.normal(0, 9))  # [12, 1000] mV
        name, where = f"{ecg_id:05d}_lr", folder / "records100" / f"{ecg_id // 1000 * 1000:05d}"
        where.mkdir(parents=True, exist_ok=True)
        wfdb.wrsamp(name, fs=FS, units=["mV"] * 12, sig_name=list(LEADS), d_signal=np.rint(x.T * 1000).astype(int),
                    fmt=["16"] * 12, adc_gain=[1000.0] * 12, baseline=[0] * 12, write_dir=str(where))
        written += [where / f"{name}.dat", where / f"{name}.hea"]
    write_whole(sums, "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.relative_to(folder).as_posix()}\n"
                              for path in written))
