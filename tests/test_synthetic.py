"""The synthetic data set: laid out as PTB-XL, always the same, its labels really in its signals."""
import ast
import csv
import functools
import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import synthetic
import wfdb
from scipy.signal import find_peaks
from synthetic import assign_folds, make_ecg, plan_records, rhythm, write_dataset

from common import GROUPS, LEADS


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    write_dataset(folder := tmp_path_factory.mktemp("synthetic"), n=24, seed=3)
    return folder


# ---- Files

def test_same_seed_same_bytes(dataset, tmp_path):
    write_dataset(tmp_path, n=24, seed=3)
    for path in (p for p in dataset.rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / path.relative_to(dataset)).read_bytes(), path.name
    write_dataset(tmp_path, n=2, seed=4)
    first = "records100/00000/00001_lr.dat"
    assert (dataset / first).read_bytes() != (tmp_path / first).read_bytes()


def test_files_look_like_those_of_ptbxl(dataset):
    sums = [line.split(" ", 1) for line in (dataset / "SHA256SUMS.txt").read_text().splitlines()]
    files = {p.relative_to(dataset).as_posix() for p in dataset.rglob("*") if p.is_file()}
    assert {name for _, name in sums} == files - {"SHA256SUMS.txt"} and len(sums) == 2 + 2 * 24
    for digest, name in sums:
        assert hashlib.sha256((dataset / name).read_bytes()).hexdigest() == digest
    table, statements = (list(csv.DictReader((dataset / name).read_text().splitlines()))
                         for name in ("ptbxl_database.csv", "scp_statements.csv"))
    assert [int(row["ecg_id"]) for row in table] == list(range(1, 25))
    assert [row[""] for row in statements] == GROUPS["all"]
    kinds = Counter(row["diagnostic"] + row["form"] + row["rhythm"] for row in statements)
    assert kinds == {"1.01.0": 4, "1.0": 67} and len(table[0]) == 28 and len(statements[0]) == 13
    for row in table:
        labels = ast.literal_eval(row["scp_codes"])
        assert set(labels) <= set(GROUPS["all"])
        assert all(type(v) is float and 0 <= v <= 100 for v in labels.values())
        assert row["filename_lr"] == f"records100/00000/{int(row['ecg_id']):05d}_lr"
        record = wfdb.rdrecord(str(dataset / row["filename_lr"]))
        assert record.sig_name == LEADS and record.units == ["mV"] * 12
        assert (record.fs, record.sig_len, record.fmt) == (100, 1000, ["16"] * 12)
        assert record.adc_gain == [1000] * 12 and record.baseline == [0] * 12
        i, ii, iii, avr, avl, avf = record.p_signal.T[:6]
        for law in (iii - (ii - i), avr + (i + ii) / 2, avl - (i - ii / 2), avf - (ii - i / 2)):
            assert np.abs(law).max() < .0021  # mV; rounding to whole microvolts
        assert .3 < np.abs(record.p_signal).max() < 6


def test_a_killed_run_of_another_size_leaves_no_ecg_of_the_old_plan(tmp_path, monkeypatch):
    """They would stand beside the new table, whose labels are not theirs; nor are there sums."""
    write_dataset(tmp_path, n=4)
    write, names = synthetic.wfdb.wrsamp, []

    def twice(name, **more):
        names.append(name)
        if len(names) == 3:
            raise KeyboardInterrupt
        write(name, **more)

    monkeypatch.setattr(synthetic.wfdb, "wrsamp", twice)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, n=3)
    assert sorted(p.stem for p in tmp_path.rglob("*.dat")) == names[:2] == ["00001_lr", "00002_lr"]
    assert not (tmp_path / "SHA256SUMS.txt").exists() and not list(tmp_path.rglob("*.part"))


def test_no_half_of_a_table_is_left_and_real_data_are_not_overwritten(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Path, "write_text", lambda path, *_, **__: path.write_bytes(b"half") / 0)
        write_dataset(tmp_path, n=2)
    assert not any(tmp_path.iterdir())
    (tmp_path / "ptbxl_database.csv").write_text("ecg_id,device\n" + "1,CS-12   E\n" * 200)
    with pytest.raises(SystemExit, match="not synthetic"):
        write_dataset(tmp_path, n=2)
    assert [path.name for path in tmp_path.iterdir()] == ["ptbxl_database.csv"]


# ---- Plan

def label_counts(records, folds):
    parts = Counter(), Counter(), Counter()  # folds 1-8, 9, 10
    for codes, fold in zip(records, folds):
        parts[max(0, fold - 8)].update(codes)
    return parts


def test_plan_of_600_records():
    records, rhythms, others = plan_records(600), set(GROUPS["rhythm"]), set(GROUPS["global"])
    folds = assign_folds(records)
    train, validation, test = label_counts(records, folds)
    total = train + validation + test
    assert rhythms | others < set(total) and len(set(total) - rhythms - others) >= 20
    assert all(54 <= n <= 66 for n in np.bincount(folds)[1:])
    assert all(train[c] >= 10 and validation[c] >= 2 and test[c] >= 2 for c in total)
    assert total["SR"] > 250 and np.median(list(total.values())) < 25  # a long tail
    for part in (rhythms, set(total) - rhythms - others):  # some records have none of it
        assert any(not part & set(codes) for codes in records)
    assert all(set(codes) <= rhythms | {"NORM"} for codes in records if "NORM" in codes)
    patients = synthetic.plan_patients(folds, np.random.default_rng(0))
    assert len(set(zip(patients, folds))) == len(set(patients))  # each in one fold


@pytest.mark.parametrize("n", [1, 7, 25, 90, 100, 200, 300])
def test_smaller_plans_keep_every_label_in_every_split(n):
    records = plan_records(n)
    folds = assign_folds(records)
    assert len(records) == len(folds) == n
    codes = {code for _, kind in synthetic.KINDS for code in kind}
    assert n < 90 or all(codes <= set(part) for part in label_counts(records, folds))


# ---- Signals

@functools.cache
def ecgs(codes):
    """Eight noise-free ECGs [12, 1000] with these codes, and where their QRS complexes are."""
    found = []
    for k in range(8):
        x = make_ecg(set(codes.split()), np.random.default_rng([k, 9]), noise=0)
        steep = np.convolve(np.linalg.norm(np.diff(x), axis=0), np.ones(5), "same")
        height = .5 * np.percentile(steep, 99)
        found.append((x, find_peaks(steep, height=height, distance=25)[0]))
    return found


def beat(codes, lead, first, end, measure):
    """Median over beats and ECGs of a measure of samples R + first to R + end of a lead in mV, or
    of the "slope" of all."""
    found = []
    for x, peaks in ecgs(codes):
        v = np.linalg.norm(np.diff(x), axis=0) if lead == "slope" else x[LEADS.index(lead)]
        found.append(np.median([measure(v[r + first:r + end]) for r in peaks if 13 < r < 980]))
    return np.median(found)


def test_every_label_set_gives_a_sane_ecg_of_ten_seconds():
    for k, (_, codes) in enumerate(synthetic.KINDS):
        x = make_ecg(set(codes), np.random.default_rng(k))
        assert x.shape == (12, 1000) and np.isfinite(x).all() and .3 < np.abs(x).max() < 6, codes
        _, beats, _ = rhythm(set(codes), np.random.default_rng(k))
        times, kinds = map(np.array, zip(*beats))
        assert times[0] < 0 and times[-1] > 10 and np.diff(times).min() > .2, codes
        inside = kinds[(times > 0) & (times < 10)]
        for code, kind in (("PVC", "V"), ("PAC", "A")):
            assert code not in codes or kind in inside, codes


def test_rhythm_follows_the_label():
    rr = {codes: [np.diff(peaks) for _, peaks in ecgs(codes)] for codes in (
        "NORM SR", "NORM SBRAD", "NORM STACH", "SVTAC", "PSVT", "AFIB", "SVARR", "NORM SARRH")}
    for codes, low, high in (("NORM SR", 60, 100), ("NORM SBRAD", 0, 60), ("NORM STACH", 100, 135),
                             ("SVTAC", 135, 170), ("PSVT", 170, 300)):
        assert all(low <= 6000 / np.median(each) <= high for each in rr[codes]), codes
    spread = {codes: [each.std() / each.mean() for each in rr[codes]] for codes in rr}
    for codes in ("AFIB", "SVARR", "NORM SARRH"):
        assert max(spread["NORM SR"]) < min(.06, *spread[codes]), codes
    for codes, kind, every in (("PVC SR BIGU", "V", 2), ("PAC SR TRIGU", "A", 3)):
        _, beats, period = rhythm(set(codes.split()), np.random.default_rng(1))
        times, kinds = zip(*beats)
        early = [k for k in range(1, len(kinds)) if kinds[k] == kind]
        assert set(np.diff(early)) == {every}
        assert all(times[k] - times[k - 1] < .75 * period for k in early)
    for codes, low, high in (({"SR"}, .12, .19), ({"1AVB", "SR"}, .22, .33)):  # PR interval
        p, beats, _ = rhythm(codes, np.random.default_rng(0))
        assert all(low < b - a < high for (a, _), (b, _) in zip(p, beats))
    for code, low, high in (("2AVB", 1.2, 1.6), ("3AVB", 2, 9), ("AFIB", 0, 0)):  # P waves a beat
        p, beats, _ = rhythm({code}, np.random.default_rng(0))
        assert low <= len(p) / len(beats) <= high


def test_waves_follow_the_label():
    up = {lead: beat("NORM SR", lead, -4, 6, np.max) for lead in LEADS}
    down = {lead: -beat("NORM SR", lead, -4, 6, np.min) for lead in LEADS}
    assert down["AVR"] > 3 * up["AVR"] and up["II"] > 2 * down["II"]
    assert up["V1"] < up["V3"] < up["V5"] and down["V1"] > up["V1"] and up["V5"] > down["V5"]
    width = {codes: beat(codes, "slope", -12, 13, lambda v: np.sum(v > .12 * v.max()))
             for codes in ("NORM SR", "CLBBB SR", "CRBBB SR", "IVCD SR", "PACE")}
    assert width.pop("NORM SR") + 2 <= min(width.values())  # samples of 10 ms
    for codes, lead, low, high in (("INJAS SR", "V2", -9, -.1), ("NORM SR", "V2", -.1, .15),
                                   ("STE_ SR", "V2", .15, 9), ("LVH ISC_ STD_ SR", "V5", -9, -.03)):
        st_level = beat(codes, lead, 9, 12, np.mean) - beat(codes, lead, -8, -5, np.mean)
        assert low < st_level < high, codes
    for codes, lead, deeper in (("IMI QWAVE SR", "AVF", .15), ("ASMI QWAVE SR", "V2", .3)):  # scars
        assert beat(codes, lead, -4, 0, np.min) < beat("NORM SR", lead, -4, 0, np.min) - deeper
    assert beat("LVH VCLVH SR", "V5", -4, 6, np.max) > 1.25 * up["V5"]
    assert max(np.ptp(x[:6], axis=1).max() for x, _ in ecgs("LVOLT SR")) < 1.1
