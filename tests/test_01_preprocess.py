"""01_preprocess.py on small WFDB data sets written here: filter, scaler and labels against slow
references, every kind of bad input, and hundreds of damaged files."""
import csv
import multiprocessing
import os
import re
import shutil
import sys
import time
from pathlib import Path

import common
import numpy as np
import pandas as pd
import pytest
import wfdb
from common import CODES, GROUPS, LEADS
from conftest import PTBXL, needs_ptbxl, run_stage, sentence, stage, write_prep
from hypothesis import given
from hypothesis import strategies as st
from scipy.signal import filtfilt
from sklearn.preprocessing import StandardScaler

pre = stage("01_preprocess")
HEADER = ("ecg_id patient_id age report scp_codes heart_axis strat_fold filename_lr "
          "filename_hr").split()
RECORDS = [  # ecg_id, patient, fold, scp_codes; in the file in another order
    (1, 501, 1, {"NORM": 100.0, "SR": 0.0}), (2, 502, 2, {"AFIB": 0.0}),
    (3, 503, 3, {"IMI": 15.0, "SR": 0.0}), (4, 504, 4, {}),
    (5, 505, 5, {"NORM": 80.0, "LVOLT": 0.0, "SR": 0.0}), (6, 506, 6, {"AFIB": 100.0, "IMI": 35.0}),
    (7, 507, 7, {"PRC(S)": 100.0, "LAO/LAE": 50.0}), (8, 508, 8, {"NORM": 100.0, "SR": 0.0}),
    (9, 501, 1, {"SR": 0.0}), (12, 509, 9, {"AFIB": 0.0}), (1001, 510, 10, {"NORM": 100.0}),
    (1002, 511, 9, {"EL": 100.0, "SR": 0.0}), (2050, 512, 10, {"IMI": 100.0, "EL": 0.0})]
IDS = [r[0] for r in RECORDS]
N = len(RECORDS)


def where(ecg_id):
    return f"records100/{ecg_id // 1000 * 1000:05d}/{ecg_id:05d}_lr"


def noise(seed, samples=1000, most=500):
    return np.random.default_rng(seed).integers(-most, most, (samples, 12))


def write_record(data, ecg_id, samples=1000, leads=12, **changes):
    """One record as PTB-XL stores it: noise and wander; `changes` go to wfdb.wrsamp."""
    t = np.arange(samples)[:, None] / 100
    x = noise(ecg_id, samples) + 800 * np.sin(1.3 * t + np.arange(12)) + 50 * np.arange(12)
    name = data / where(ecg_id)
    name.parent.mkdir(parents=True, exist_ok=True)
    usual = {"fs": 100, "units": ["mV"] * leads, "sig_name": LEADS[:leads], "fmt": ["16"] * leads,
             "d_signal": np.rint(x[:, :leads]).astype(int), "adc_gain": [1000.0] * leads,
             "baseline": [0] * leads}
    wfdb.wrsamp(name.name, write_dir=str(name.parent), **{**usual, **changes})


def write_tables(data, records, header=HEADER, codes=CODES):
    with open(data / "ptbxl_database.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, header, lineterminator="\n", extrasaction="ignore", restval="")
        writer.writeheader()
        for ecg_id, patient, fold, scp_codes in records:
            name = where(ecg_id)
            high = name.replace("100", "500", 1).replace("_lr", "_hr")
            writer.writerow({"ecg_id": ecg_id, "patient_id": f"{patient}.0", "age": "56.0",
                             "report": "sinusrhythmus, normal", "scp_codes": str(scp_codes),
                             "strat_fold": fold, "filename_lr": name, "filename_hr": high})
    lines = [",description,diagnostic\n", *(f"{c},about {c},1.0\n" for c in codes)]
    (data / "scp_statements.csv").write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ptbxl") / "data"
    for ecg_id in IDS:
        write_record(folder, ecg_id)
    write_tables(folder, [RECORDS[i] for i in np.random.default_rng(0).permutation(N)])
    return folder


@pytest.fixture
def data(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "data"))


@pytest.fixture
def preprocess(monkeypatch, tmp_path):
    """preprocess(data, *flags): 01 into tmp_path / "prep", and common.load_prep of it."""
    def go(data, *flags):
        prep = tmp_path / "prep"
        run_stage(monkeypatch, "01_preprocess", "--data", data, "--prep", prep, *flags)
        return common.load_prep(prep)
    return go


def millivolt(data, ecg_id):
    """The samples of a record read without wfdb -> [12, 1000] float64 mV."""
    return np.fromfile(data / f"{where(ecg_id)}.dat", "<i2").reshape(1000, 12).T / 1000


def slow_filter(x):
    """Lead by lead, with the coefficients of paper_facts: x [12, 1000] -> the same."""
    b, a = [0.98453371, -0.98453371], [1, -0.96906742]
    return np.stack([filtfilt(b, a, lead) for lead in x])


# ---- What it computes

def test_arrays_of_a_small_data_set(data, preprocess, tmp_path, capsys):
    prep = preprocess(data)
    assert prep.ecg_ids.tolist() == IDS == sorted(IDS)  # whatever the order of the csv
    assert prep.patient_ids.tolist() == [r[1] for r in RECORDS]
    assert prep.folds.tolist() == [r[2] for r in RECORDS] and prep.folds.dtype == np.int64
    assert prep.signals.shape == (N, 12, 1000) and prep.signals.dtype == np.float32
    for x, ecg_id in zip(prep.signals, IDS):
        np.testing.assert_allclose(x, slow_filter(millivolt(data, ecg_id)), atol=2e-6)
    assert prep.labels.shape == (N, 71) and prep.labels.dtype == np.uint8
    for row, (*_, codes) in zip(prep.labels, RECORDS):  # whatever the likelihood, 0.0 included
        assert row.tolist() == [int(c in codes) for c in CODES]
    info, train = prep.info, [r[3] for r in RECORDS if r[2] <= 8]
    assert info["records"] == N and info["sizes"] == {"train": 9, "validation": 2, "test": 2}
    absent = [c for c in CODES if not any(c in r for r in train)]
    assert info["without_training_record"] == absent and "EL" in absent
    assert info["codes"] == CODES and info["descriptions"]["SR"] == "about SR"
    for name in info["sha256"]:
        assert info["sha256"][name] == common.file_hash(tmp_path / f"prep/{name}.npy")
    assert info["skipped"] == [] and info["made_from"] == {}
    slow = pre.jaccard(prep.labels[prep.folds <= 8])
    np.testing.assert_allclose(info["jaccard"], slow, atol=1e-6)
    assert slow[CODES.index("NORM"), CODES.index("SR")] == 3 / 5
    last = f"{tmp_path / 'prep'}: 13 records, NOT PTB-XL v1.0.3: [9, 2, 2]"
    assert capsys.readouterr().out.splitlines()[-1] == last
    made = write_prep(tmp_path / "made").info  # the PREP of other tests looks the same
    assert set(made) == set(info) and set(made["scaler"]) == set(info["scaler"])
    for name in pre.TABLES:
        (data / name).write_bytes(b"\xef\xbb\xbf" + (data / name).read_bytes())
    again = preprocess(data).info  # byte-order marks are read
    assert again["sha256"] == info["sha256"] and again["scaler"] == info["scaler"]


def test_scaler_over_many_chunks_equals_scikit_learn(tmp_path):
    folds = np.arange(600) % 10 + 1
    x = [noise(i).T.astype(np.int16) for i in range(600)]
    found = pre.write_signals(tmp_path / "x.npy", iter(zip(folds, x)))
    signals = np.load(tmp_path / "x.npy")
    assert signals.shape == (600, 12, 1000)
    for i in (0, 63, 64, 511, 512, 599):
        np.testing.assert_allclose(signals[i], slow_filter(x[i] / 1000), atol=2e-6)
    train = np.concatenate([slow_filter(s / 1000).T for s, k in zip(x, folds) if k <= 8])
    scaler = StandardScaler().fit(train)
    np.testing.assert_allclose(found.mean_, scaler.mean_, atol=1e-7)
    np.testing.assert_allclose(found.scale_, scaler.scale_, rtol=1e-6)


def test_what_is_fitted_is_blind_to_folds_9_and_10(data, preprocess):
    clean = preprocess(data).info
    poisoned = []
    for ecg_id, patient, fold, codes in RECORDS:
        if fold >= 9:
            write_record(data, ecg_id, d_signal=noise(ecg_id, most=32000))
            codes = {c: 100.0 for c in CODES if c not in codes}
        poisoned.append((ecg_id, patient, fold, codes))
    write_tables(data, poisoned)
    dirty = preprocess(data)
    assert np.abs(dirty.signals[dirty.folds >= 9]).max() > 20  # the poison did arrive
    for name in ("scaler", "jaccard", "without_training_record"):
        assert dirty.info[name] == clean[name], name
    write_record(data, 1, d_signal=noise(99))  # and the test can fail
    assert preprocess(data).info["scaler"] != clean["scaler"]


@given(st.lists(st.sets(st.integers(0, 4)), min_size=1, max_size=12), st.sampled_from([1, 100]))
def test_jaccard_equals_slow_sets(records, times):
    records = records * times  # more than 255 must not overflow
    J = pre.jaccard(np.array([[c in r for c in range(5)] for r in records], np.uint8))
    for a in range(5):
        for b in range(5):
            with_a, with_b = ({i for i, r in enumerate(records) if c in r} for c in (a, b))
            want = 1 if a == b else len(with_a & with_b) / max(len(with_a | with_b), 1)
            assert J[a, b] == pytest.approx(want, abs=1e-12)


def test_first_records_only(data, preprocess, tmp_path):
    prep = preprocess(data, "--records", 11)
    assert prep.ecg_ids.tolist() == IDS[:11] and prep.info["records"] == 11
    with pytest.raises(SystemExit) as e:  # the first nine have no fold 9 or 10
        preprocess(data, "--records", 9)
    assert "too few" in sentence(e)
    again = common.load_prep(tmp_path / "prep").info  # what was there is still whole
    assert again["sha256"]["signals"] == common.file_hash(tmp_path / "prep/signals.npy")
    write_tables(data, [])
    with pytest.raises(SystemExit) as e:
        preprocess(data)
    assert "too few records" in sentence(e)


# ---- Bad input: one sentence that names the file or record and stage 00


def edit(name, *changes):
    """A change of a text file: each (pattern, replacement), once."""
    def change(data):
        text = (data / name).read_text()
        for pattern, replacement in changes:
            text, n = re.subn(pattern, replacement, text, count=1, flags=re.MULTILINE)
            assert n == 1, pattern
        (data / name).write_text(text)
    return change


def cell(ecg_id, column, value):
    """A change of one cell of ptbxl_database.csv."""
    def change(data):
        path = data / "ptbxl_database.csv"
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        table.loc[table["ecg_id"] == str(ecg_id), column] = value
        table.to_csv(path, index=False)
    return change


def record(**changes):
    return lambda data: write_record(data, 5, **changes)


def write(name, content):
    return lambda data: (data / name).write_bytes(content)


HEA, DAT = f"{where(5)}.hea", f"{where(5)}.dat"
DATABASE, STATEMENTS = pre.TABLES
BAD_TABLES = {  # change, what the sentence names
    "missing csv": (lambda d: (d / DATABASE).unlink(), DATABASE),
    "missing folder": (shutil.rmtree, "No such file"),
    "empty csv": (write(DATABASE, b""), "No columns|not match"),
    "binary csv": (write(DATABASE, bytes(range(256))), "decode|not match"),
    "unclosed quote": (edit(DATABASE, (r"\Z", '9,"half a line')), "unexpected end"),
    "stray quote": (edit(DATABASE, ("^3,", '"3,')), "expected after"),
    "missing column": (lambda d: write_tables(d, RECORDS, HEADER[:-3]), "strat_fold"),
    "other statements": (edit(STATEMENTS, ("^NORM,", "NORMAL,")), STATEMENTS),
    "statements sorted": (lambda d: write_tables(d, RECORDS, codes=sorted(CODES)), STATEMENTS),
    "scp_codes a list": (cell(5, "scp_codes", "['NORM', 'SR']"), "scp_codes"),
    "scp_codes empty": (cell(5, "scp_codes", ""), "scp_codes"),
    "scp_codes to run": (cell(5, "scp_codes", "__import__('os').mkdir('evil')"), "scp_codes"),
    "scp_codes deep": (cell(5, "scp_codes", "[" * 20000), "scp_codes"),
    "unknown code": (cell(5, "scp_codes", "{'NORMAL': 80.0}"), "unknown label"),
    "duplicate ecg_id": (lambda d: write_tables(d, [*RECORDS, RECORDS[2]]), "line 15.*own"),
    "ecg_id no number": (cell(5, "ecg_id", "five"), "not whole"),
    "ecg_id and a half": (cell(5, "ecg_id", "4.7"), "not whole"),
    "ecg_id of another record": (cell(5, "ecg_id", "55"), "filename_lr"),
    "fold 11": (cell(5, "strat_fold", "11"), "strat_fold"),
    "fold empty": (cell(5, "strat_fold", ""), "not whole"),
    "fold infinite": (cell(5, "strat_fold", "1e999"), "not whole"),
    "patient in two folds": (cell(9, "strat_fold", "9"), "patient"),
    "filename outside": (cell(5, "filename_lr", "records100/../../x"), "filename_lr"),
    "filename with a line break": (cell(5, "filename_lr", f"{where(5)}\n"), "filename_lr"),
    "filename of 500 Hz": (cell(5, "filename_lr", "records500/00000/00005_hr"), "filename_lr"),
    "filename of another record": (cell(5, "filename_lr", where(6)), "filename_lr"),
    "short row": (edit(DATABASE, (r"^5,.*$", "5,505.0")), "line"),
}
BAD_RECORDS = {  # change, the reason given
    "leads in another order": (record(sig_name=["II", "I", *LEADS[2:]]), "header"),
    "eleven leads": (record(leads=11), "header"),
    "500 Hz": (record(fs=500), "header"),
    "999 samples": (record(samples=999), "header"),
    "missing sample": (record(d_signal=np.where(np.arange(12000) == 99, -2**15, 7)
                              .reshape(1000, 12)), "missing"),  # WFDB's "no sample" of format 16
    "checksum": (write(DAT, bytes(24000)), "checksum"),
    "half a .dat": (lambda d: os.truncate(d / DAT, 12000), "reshape"),
    "longer .dat": (lambda d: (d / DAT).write_bytes((d / DAT).read_bytes() * 5), "reshape"),
    "missing .hea": (lambda d: (d / HEA).unlink(), "No such file"),
    "missing .dat": (lambda d: (d / DAT).unlink(), "No such file"),
    "binary .hea": (write(HEA, bytes(range(256))), "header"),
    "header of another .dat": (edit(HEA, ("00005_lr.dat", "00006_lr.dat")), "header"),
    "header out of the folder": (edit(HEA, ("00005_lr.dat", "../00000/00005_lr.dat")), "header"),
    "another gain": (record(adc_gain=[1000.0] * 11 + [200.0]), "header"),
    "another format": (record(fmt=["80"] * 12, d_signal=np.zeros((1000, 12), int)), "header"),
    "a thousand million leads": (edit(HEA, ("_lr 12 100", "_lr 1000000000 100")), "header"),
    "no checksum": (edit(HEA, (r" -?\d+ (0 I)$", r" \1")), "header"),
    "checksum no number": (edit(HEA, (r" -?\d+ (0 I)$", r" x \1")), "invalid literal"),
}


@pytest.mark.parametrize("fault", [*BAD_TABLES, *BAD_RECORDS])
def test_fault_gives_one_sentence(data, preprocess, tmp_path, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)
    change, names = {**BAD_TABLES, **BAD_RECORDS}[fault]
    change(data)
    with pytest.raises(SystemExit) as e:
        preprocess(data)
    message = sentence(e)
    assert re.search(names, message) and "00_download.py" in message, message
    assert message.startswith(str(data / where(5) if fault in BAD_RECORDS else data)), message
    assert not (tmp_path / "evil").exists() and not (tmp_path / "prep/preprocess.json").exists()


def test_skip_bad_leaves_records_out_and_lists_them(data, preprocess):
    BAD_RECORDS["checksum"][0](data)
    (data / f"{where(1)}.hea").unlink()
    write_record(data, 2050, fs=500)
    prep = preprocess(data, "--skip-bad")
    kept = [r for r in RECORDS if r[0] not in (1, 5, 2050)]
    assert [s["ecg_id"] for s in prep.info["skipped"]] == [1, 5, 2050]
    for skipped, reason in zip(prep.info["skipped"], ("No such file", "checksum", "header")):
        assert reason in skipped["reason"]
    assert prep.ecg_ids.tolist() == [r[0] for r in kept] and prep.info["records"] == N - 3
    assert prep.info["sizes"] == {"train": 7, "validation": 2, "test": 1}
    for x, row, (ecg_id, _, _, codes) in zip(prep.signals, prep.labels, kept, strict=True):
        np.testing.assert_allclose(x, slow_filter(millivolt(data, ecg_id)), atol=2e-6)
        assert {CODES[c] for c in np.flatnonzero(row)} == set(codes)
    shutil.rmtree(data / "records100")
    with pytest.raises(SystemExit) as e:
        preprocess(data, "--skip-bad")
    assert "too few" in sentence(e)


@pytest.mark.parametrize("call", range(5))
def test_full_disk_at_any_file(data, preprocess, tmp_path, monkeypatch, call):
    preprocess(data)
    cell(5, "scp_codes", "{'PVC': 100.0}")(data)
    calls, save = iter(range(5)), common.save

    def full(path, value):
        if next(calls) == call:
            raise OSError(28, "No space left on device", str(path))
        save(path, value)

    monkeypatch.setattr(common, "save", full)
    with pytest.raises(SystemExit) as e:
        preprocess(data)
    assert "No space left on device" in sentence(e)
    assert not (tmp_path / "prep/preprocess.json").exists()


def run_in_process(*argv):
    sys.argv = ["01_preprocess.py", *argv]
    common.run(pre.main)


def test_killed_while_reading(data, preprocess, tmp_path):
    """A header that is a FIFO holds the stage in the middle of reading."""
    before = preprocess(data).info["sha256"]
    (data / HEA).rename(tmp_path / "header")
    os.mkfifo(data / HEA)
    processes = multiprocessing.get_context("forkserver")
    flags = "--data", str(data), "--prep", str(tmp_path / "prep")
    process = processes.Process(target=run_in_process, args=flags)
    process.start()
    end = time.monotonic() + 60
    while not (tmp_path / "prep/.signals.npy.tmp").exists() and time.monotonic() < end:
        time.sleep(0.02)
    process.kill()
    process.join()
    assert (tmp_path / "prep/.signals.npy.tmp").exists()
    assert common.load_prep(tmp_path / "prep").info["sha256"] == before
    (data / HEA).unlink()
    (tmp_path / "header").rename(data / HEA)
    assert preprocess(data).info["sha256"] == before
    assert not (tmp_path / "prep/.signals.npy.tmp").exists()


# ---- Damaged files: no traceback, and no changed sample taken for a good one

def damage(raw, rng, text):
    """`raw` with one random fault of the kinds that disks, editors and transfers make.

    Bytes change places in text only: two samples of a lead that do keep their sum, which is all
    that WFDB's checksum is. 00_download.py --check compares the SHA-256.
    """
    raw, at, n = bytearray(raw), int(rng.integers(len(raw))), int(rng.integers(1, 30))
    lines = bytes(raw).split(b"\n")
    j, k = sorted(int(i) for i in rng.integers(len(lines), size=2))
    words = bytes(raw).split(b" ")
    odd = [b"", b"-1", b"nan", b"/dev/zero", b"../x", b"1e9", b"~", b"16x2", b'"']
    faults = {
        "flip": lambda: raw[:at] + bytes([raw[at] ^ 1 << n % 8]) + raw[at + 1:],
        "bytes": lambda: raw[:at] + rng.bytes(8) + raw[at + 8:],
        "cut": lambda: raw[:at], "delete": lambda: raw[:at] + raw[at + n:],
        "insert": lambda: raw[:at] + rng.bytes(n) + raw[at:],
        "zeros": lambda: raw[:at] + bytes(len(raw[at:at + 512])) + raw[at + 512:],
        "double": lambda: raw + raw[at:]}
    if text:
        faults |= {
            "digit": lambda: re.sub(rb"\d", b"%d" % (n % 10), raw[:at]) + raw[at:],
            "digit in": lambda: raw[:at] + b"%d" % n + raw[at:],
            "line": lambda: b"\n".join(lines[:j] + lines[j + 1:]),
            "line twice": lambda: b"\n".join(lines[:j] + lines[j:j + 1] + lines[j:]),
            "lines moved": lambda: b"\n".join(lines[:j] + lines[k:] + lines[j:k]),
            "word": lambda: b" ".join([*words[:n], odd[n % 9], *words[n + 1:]]),
            "quote": lambda: raw[:at] + b'"' + raw[at:]}
    kind = rng.choice(list(faults))
    return kind, bytes(faults[kind]())


@pytest.mark.parametrize("n", [300, pytest.param(1500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("suffix", [".hea", ".dat"])
def test_damaged_records(data, suffix, n):
    path, rng, refused = data / f"{where(5)}{suffix}", np.random.default_rng(n), 0
    good, samples = path.read_bytes(), pre.read_record(data / where(5))
    for i in range(n):
        kind, bad = damage(good, rng, text=suffix == ".hea")
        path.write_bytes(bad)
        try:
            x = pre.read_record(data / where(5))
        except (OSError, ValueError) as e:
            refused += 1
            assert str(e) and "\n" not in str(e) and len(str(e)) < 200, (i, kind)
        else:
            assert np.array_equal(x, samples), (i, kind, "changed samples accepted")
    assert refused > n / 2


@pytest.mark.parametrize("n", [150, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_tables(data, n):
    def read():
        table, _ = pre.read_tables(data, None)
        columns = table[["patient_ids", "folds", "scp_codes", "filename_lr"]]
        return dict(zip(table["ecg_ids"], columns.itertuples(index=False)))

    path, rng, refused = data / DATABASE, np.random.default_rng(n), 0
    good, known = path.read_bytes(), read()
    for i in range(n):
        kind, bad = damage(good, rng, text=True)
        path.write_bytes(bad)
        try:
            found = read()
        except (OSError, ValueError) as e:
            refused += 1
            assert str(e) and len(str(e)) < 400, (i, kind)
            continue
        for ecg_id, r in found.items():  # the samples of a record are those of its number
            assert r.filename_lr == where(ecg_id) and 1 <= r.folds <= 10, (i, kind)
            assert set(re.findall("'(.+?)'", r.scp_codes)) <= set(CODES), (i, kind)
        changed = sum(known.get(k) != r for k, r in found.items()) + len(known.keys() - found)
        if kind in ("flip", "digit in", "line twice", "word", "quote"):
            assert changed <= 3, (i, kind, changed)  # no other record changes or disappears
    assert refused > n / 10


# ---- The real PTB-XL

@needs_ptbxl
def test_counts_of_the_real_data():
    table, described = pre.read_tables(PTBXL, None)
    assert len(table) == 21_799 and table["patient_ids"].nunique() == 18_869
    assert list(described) == CODES
    fold, codes = table["folds"], table["scp_codes"].str.findall("'(.+?)'")
    assert [(fold <= 8).sum(), (fold == 9).sum(), (fold == 10).sum()] == [17_418, 2_183, 2_198]
    train = [c for record in codes[fold <= 8] for c in record]
    assert train.count("SR") == 13_404 and train.count("NORM") == 7_596
    assert sum(c in GROUPS["morphology"] for c in train) == 22_778
    assert codes.map(len).sum() == 61_007


@needs_ptbxl
def test_real_records_equal_what_wfdb_reads():
    table, _ = pre.read_tables(PTBXL, None)
    for name in table["filename_lr"][::109]:  # 200 of them, from every folder
        physical = wfdb.rdrecord(str(PTBXL / name)).p_signal.T  # mV
        x = pre.read_record(PTBXL / name)
        np.testing.assert_allclose(x / 1000, physical, rtol=0, atol=1e-12)
