"""The synthetic data set: laid out as PTB-XL, the same on every run, and with its labels really in its signals."""
import ast
import csv
import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import wfdb
from scipy.signal import find_peaks

import synthetic
from synthetic import LEADS, assign_folds, make_ecg, plan_patients, plan_records, rhythm, write_dataset

RHYTHM = set("1AVB 2AVB 3AVB AFIB AFLT BIGU IVCD PACE PSVT SARRH SBRAD SR STACH SVARR SVTAC TRIGU".split())
GLOBAL = {"DIG", "EL", "NORM"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    write_dataset(folder, n=24, seed=3)
    return folder


def rows(path: Path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def ecgs(codes: str, count: int = 8) -> list[np.ndarray]:
    """Noise-free ECGs [12, 1000] with these codes."""
    return [make_ecg(set(codes.split()), np.random.default_rng([k, 9]), noise=0) for k in range(count)]


def r_peaks(x: np.ndarray) -> np.ndarray:
    """Sample numbers of the QRS complexes of x [12, 1000]: where the signal is steepest over all leads."""
    steep = np.convolve(np.linalg.norm(np.diff(x), axis=0), np.ones(5), "same")
    return find_peaks(steep, height=.5 * np.percentile(steep, 99), distance=25)[0]


def rate(x: np.ndarray) -> float:
    return 60 * 100 / np.median(np.diff(r_peaks(x)))


def irregularity(x: np.ndarray) -> float:
    """Coefficient of variation of the RR intervals."""
    rr = np.diff(r_peaks(x))
    return rr.std() / rr.mean()


def qrs_width(x: np.ndarray) -> float:
    """Median QRS duration in ms: how long the signal stays steep around each R peak."""
    steep = np.linalg.norm(np.diff(x), axis=0)
    return np.median([10 * np.sum(steep[r - 12:r + 13] > .12 * steep[r - 12:r + 13].max())
                      for r in r_peaks(x) if 12 <= r < 980])


def st_level(x: np.ndarray, lead: str) -> float:
    """Median of the signal 90-120 ms after R, against the level 60-80 ms before R, in mV."""
    v = x[LEADS.index(lead)]
    return np.median([v[r + 9:r + 12].mean() - v[r - 8:r - 5].mean() for r in r_peaks(x) if 10 <= r < 980])


# --- files -----------------------------------------------------------------------------------------------------------


def test_same_seed_same_bytes(dataset, tmp_path):
    write_dataset(tmp_path, n=24, seed=3)
    for path in dataset.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / path.relative_to(dataset)).read_bytes(), path.name
    write_dataset(tmp_path, n=2, seed=4)
    name = "records100/00000/00001_lr.dat"
    assert (dataset / name).read_bytes() != (tmp_path / name).read_bytes()


def test_checksums_match_and_cover_every_file(dataset):
    lines = [line.split(" ", 1) for line in (dataset / "SHA256SUMS.txt").read_text().splitlines()]
    assert len(lines) == 2 + 2 * 24
    assert {name for _, name in lines} == {path.relative_to(dataset).as_posix() for path in dataset.rglob("*")
                                           if path.is_file() and path.name != "SHA256SUMS.txt"}
    for digest, name in lines:
        assert hashlib.sha256((dataset / name).read_bytes()).hexdigest() == digest


def test_wfdb_reads_back_leads_units_and_limb_lead_laws(dataset):
    for row in rows(dataset / "ptbxl_database.csv"):
        record = wfdb.rdrecord(str(dataset / row["filename_lr"]))
        assert tuple(record.sig_name) == LEADS
        assert (record.fs, record.sig_len, record.fmt, record.units) == (100, 1000, ["16"] * 12, ["mV"] * 12)
        assert record.adc_gain == [1000] * 12 and record.baseline == [0] * 12
        i, ii, iii, avr, avl, avf = record.p_signal.T[:6]
        for law in (iii - (ii - i), avr + (i + ii) / 2, avl - (i - ii / 2), avf - (ii - i / 2)):
            assert np.abs(law).max() < .0021  # mV; rounding to whole microvolts
        assert .3 < np.abs(record.p_signal).max() < 6


def test_tables_look_like_ptbxl(dataset):
    table, statements = rows(dataset / "ptbxl_database.csv"), rows(dataset / "scp_statements.csv")
    assert [int(row["ecg_id"]) for row in table] == list(range(1, 25))
    assert (len(table[0]), len(statements), len(statements[0])) == (28, 71, 13)
    codes = [row[""] for row in statements]
    assert len(set(codes)) == 71 and RHYTHM | GLOBAL < set(codes)
    assert Counter((row["diagnostic"], row["form"], row["rhythm"]) for row in statements) == \
        {("1.0", "1.0", ""): 4, ("1.0", "", ""): 40, ("", "1.0", ""): 15, ("", "", "1.0"): 12}
    for row in table:
        labels = ast.literal_eval(row["scp_codes"])
        assert set(labels) <= set(codes) and all(type(v) is float and 0 <= v <= 100 for v in labels.values())
        assert row["filename_lr"] == f"records100/00000/{int(row['ecg_id']):05d}_lr"


def test_interrupted_run_leaves_no_checksums(tmp_path, monkeypatch):
    write_dataset(tmp_path, n=2)
    monkeypatch.setattr(synthetic.wfdb, "wrsamp", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, n=2)
    assert not (tmp_path / "SHA256SUMS.txt").exists()


def test_killed_run_of_another_size_leaves_no_ecg_of_the_old_plan(tmp_path, monkeypatch):
    """They would stand beside the new table, whose labels are not theirs, and 01 could not know."""
    write_dataset(tmp_path, n=4)
    write, written = synthetic.wfdb.wrsamp, []

    def twice(name, **more):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(name)
        write(name, **more)

    monkeypatch.setattr(synthetic.wfdb, "wrsamp", twice)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, n=3)
    assert sorted(p.stem for p in tmp_path.rglob("*.dat")) == written == ["00001_lr", "00002_lr"]
    assert not list(tmp_path.rglob("*.part"))


def test_full_disk_leaves_no_half_of_a_table(tmp_path, monkeypatch):
    def full(path, text, **more):
        with open(path, "w") as f:
            f.write(text[:100])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError):
            write_dataset(tmp_path, n=2)
    assert list(tmp_path.iterdir()) == []
    write_dataset(tmp_path, n=2)


def test_real_data_are_never_overwritten(tmp_path):
    (tmp_path / "ptbxl_database.csv").write_text("ecg_id,device\n" + "1,CS-12   E\n" * 200)
    with pytest.raises(SystemExit, match="not synthetic"):
        write_dataset(tmp_path, n=2)
    assert [path.name for path in tmp_path.iterdir()] == ["ptbxl_database.csv"]


# --- plan ------------------------------------------------------------------------------------------------------------


def label_counts(records, folds, choose) -> Counter:
    return Counter(code for codes, fold in zip(records, folds) if choose(fold) for code in codes)


def test_plan_of_600_records():
    records = plan_records(600)
    folds = assign_folds(records)
    total = label_counts(records, folds, lambda fold: True)
    assert RHYTHM | GLOBAL < set(total) and len(set(total) - RHYTHM - GLOBAL) >= 20
    assert np.bincount(folds, minlength=11)[1:].min() >= 54 and np.bincount(folds).max() <= 66
    train, validation, test = (label_counts(records, folds, choose) for choose in
                               (lambda fold: fold <= 8, lambda fold: fold == 9, lambda fold: fold == 10))
    for code in total:
        assert train[code] >= 10 and validation[code] >= 2 and test[code] >= 2, code
    assert total["SR"] > 250 and total["NORM"] > 100 and np.median(list(total.values())) < 25  # a long tail
    assert any(not RHYTHM & set(codes) for codes in records)
    assert any(not set(codes) - RHYTHM - GLOBAL for codes in records)
    assert all(set(codes) <= RHYTHM | {"NORM"} for codes in records if "NORM" in codes)


@pytest.mark.parametrize("n", [90, 100, 200, 300])
def test_smaller_plans_keep_every_label_in_every_split(n):
    records = plan_records(n)
    folds = assign_folds(records)
    assert len(records) == n
    splits = [label_counts(records, folds, choose) for choose in
              (lambda fold: fold <= 8, lambda fold: fold == 9, lambda fold: fold == 10)]
    assert all(split[code] >= 1 for split in splits for _, codes in synthetic.KINDS for code in codes)


@pytest.mark.parametrize("n", [1, 7, 25])
def test_tiny_plans_do_not_fail(n):
    assert len(assign_folds(plan_records(n))) == n


def test_patients_stay_in_one_fold():
    folds = assign_folds(plan_records(600))
    patients = plan_patients(folds, np.random.default_rng(0))
    assert len({(patient, fold) for patient, fold in zip(patients, folds)}) == len(set(patients))
    visits = Counter(Counter(patients).values())
    assert visits[1] > 300 and visits[2] > 20 and visits[3] > 5


# --- signals ---------------------------------------------------------------------------------------------------------


def test_every_label_set_gives_a_sane_ecg():
    for k, (_, codes) in enumerate(synthetic.KINDS):
        x = make_ecg(set(codes), np.random.default_rng(k))
        assert x.shape == (12, 1000) and np.isfinite(x).all() and .3 < np.abs(x).max() < 6, codes


def test_beats_fill_the_ten_seconds():
    for k, (_, codes) in enumerate(synthetic.KINDS * 3):
        _, beats, _ = rhythm(set(codes), np.random.default_rng(k))
        times, kinds = map(np.array, zip(*beats))
        assert times[0] < 0 and times[-1] > 10 and np.diff(times).min() > .2, codes
        inside = kinds[(times > 0) & (times < 10)]
        assert ("V" in inside if "PVC" in codes else "A" in inside if "PAC" in codes else len(inside) >= 5), codes


def test_normal_ecg_looks_normal():
    for x in ecgs("NORM SR"):
        r = r_peaks(x)
        r = r[(r > 5) & (r < 990)]
        up = dict(zip(LEADS, np.median([x[:, k - 4:k + 6].max(1) for k in r], axis=0)))
        down = dict(zip(LEADS, np.median([x[:, k - 4:k + 6].min(1) for k in r], axis=0)))
        assert -down["AVR"] > 3 * up["AVR"] and up["II"] > -2 * down["II"]
        assert up["V1"] < up["V3"] < up["V5"] and -down["V1"] > up["V1"] and up["V5"] > -down["V5"]  # R progression
        assert 60 <= rate(x) <= 100 and irregularity(x) < .06


def test_heart_rates():
    assert all(rate(x) < 60 for x in ecgs("NORM SBRAD"))
    assert all(100 < rate(x) < 135 for x in ecgs("NORM STACH"))
    assert all(135 < rate(x) < 170 for x in ecgs("SVTAC"))
    assert all(rate(x) > 170 for x in ecgs("PSVT"))


def test_rhythm_irregularity():
    sinus = [irregularity(x) for x in ecgs("NORM SR")]
    for codes in ("AFIB", "SVARR", "NORM SARRH"):
        assert min(irregularity(x) for x in ecgs(codes)) > max(sinus), codes


def test_premature_beats_come_early_and_in_order():
    for codes, kind, every in (("PVC SR BIGU", "V", 2), ("PAC SR TRIGU", "A", 3)):
        _, beats, period = rhythm(set(codes.split()), np.random.default_rng(1))
        times, kinds = zip(*beats)
        early = [k for k in range(1, len(kinds)) if kinds[k] == kind]
        assert set(np.diff(early)) == {every}
        assert all(times[k] - times[k - 1] < .75 * period for k in early)


def test_blocks_between_atria_and_ventricles():
    rng = np.random.default_rng(0)
    p, beats, _ = rhythm({"2AVB"}, rng)
    assert 1.2 < len(p) / len(beats) < 1.6
    p, beats, _ = rhythm({"3AVB"}, rng)
    assert len(p) > 2 * len(beats)
    for codes, low, high in (("SR", .12, .19), ("1AVB SR", .22, .33)):
        p, beats, _ = rhythm(set(codes.split()), rng)
        assert all(low < b - a < high for (a, _), (b, _) in zip(p, beats))
    assert rhythm({"AFIB"}, rng)[0] == []


def test_wide_qrs():
    normal = np.median([qrs_width(x) for x in ecgs("NORM SR")])
    for codes in ("CLBBB SR", "CRBBB SR", "IVCD SR", "PACE"):
        assert np.median([qrs_width(x) for x in ecgs(codes)]) >= normal + 20, codes


def test_st_level_follows_the_label():
    normal, elevated, injured = (np.median([st_level(x, "V2") for x in ecgs(codes)])
                                 for codes in ("NORM SR", "STE_ SR", "INJAS SR"))
    assert injured < -.1 < normal < .15 < elevated
    assert all(st_level(x, "V5") < -.03 for x in ecgs("LVH ISC_ STD_ SR"))


def test_scars_and_hypertrophy():
    def deepest(codes, lead):  # the most negative value just before R, median over records
        return np.median([np.median([x[LEADS.index(lead), r - 4:r].min() for r in r_peaks(x) if r > 5])
                          for x in ecgs(codes)])

    assert deepest("IMI QWAVE SR", "AVF") < deepest("NORM SR", "AVF") - .15
    assert deepest("ASMI QWAVE SR", "V2") < deepest("NORM SR", "V2") - .3
    assert np.median([x[LEADS.index("V5")].max() for x in ecgs("LVH VCLVH SR")]) > \
        1.25 * np.median([x[LEADS.index("V5")].max() for x in ecgs("NORM SR")])
    assert max(np.ptp(x[:6], axis=1).max() for x in ecgs("LVOLT SR")) < 1.1
