"""Script 01, preprocessing (paper 3.1, 3.2): PTB-XL -> arrays.

reads   DATA/ptbxl_database.csv, scp_statements.csv, records100/
writes  PREP/signals.npy float32 [N, 12, 1000] mV, high-pass filtered;
        labels [N, 71]; folds, ecg_ids, patient_ids [N]; preprocess.json

    python 01_preprocess.py                  all records
    python 01_preprocess.py --records 3000   the first

Takes half a minute. Last line:
`PREP: 21,799 records, PTB-XL v1.0.3: [17418, 2183, 2198]`.
"""
import sys
from itertools import islice

import numpy as np
import pandas as pd
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

import common
from common import CODES, LEADS, file_hash

TABLES = "ptbxl_database.csv", "scp_statements.csv"
HASHES = "7600de9c1b27d181", "ad05b0b1fcae83bb"  # of v1.0.3
OTHER = "NOT PTB-XL v1.0.3", "SYNTHETIC"
NUMBERS = ["ecg_id", "patient_id", "strat_fold"]
COLUMNS = [*NUMBERS, "scp_codes", "filename_lr"]
CSV = {"encoding": "utf-8-sig", "dtype": str, "engine": "python"}


def read_tables(data, first):
    """The first records by ecg_id, {label: description}."""
    described = dict(pd.read_csv(data / TABLES[1], usecols=[0, 1], **CSV).values)
    if list(described) != CODES:
        raise ValueError(f"{TABLES[1]} does not list the 71 labels of PTB-XL")
    table = pd.read_csv(data / TABLES[0], usecols=COLUMNS, **CSV).fillna("")
    numbers = table[NUMBERS].apply(pd.to_numeric, errors="coerce")
    ecg_id, patient, fold = (numbers[n] for n in NUMBERS)
    names = [f"records100/{i // 1000:02.0f}000/{i:05.0f}_lr" for i in ecg_id]
    name, codes = table["filename_lr"], table["scp_codes"].str
    checks = {
        "a number is not whole": (numbers % 1 == 0).all(axis=1),
        "strat_fold is not 1-10": fold.between(1, 10),
        "its patient is in two folds": fold.groupby(patient).transform("nunique") == 1,
        "filename_lr is not its own": (name == names) & ~ecg_id.duplicated(),
        "scp_codes is no dictionary": codes.fullmatch(r"\{('[^']+': [0-9.]+,? ?)*\}"),
        "it has an unknown label": codes.findall("'(.+?)'").map(set(CODES).issuperset)}
    for what, right in checks.items():
        for row in np.flatnonzero(~right):
            raise ValueError(f"line {row + 2} of {TABLES[0]}: {what}")
    table[["ecg_ids", "patient_ids", "folds"]] = numbers.astype(int)
    return table.sort_values("ecg_ids")[:first], described


def read_record(path):
    """The samples of a record, int16 [12, 1000] uV."""
    header = path.with_suffix(".hea").read_text(errors="replace")
    words = [s.split() for s in header.splitlines()]
    signal = [f"{path.name}.dat", "16", "1000.0(0)/mV", "16", "0", "0"]
    right = [[path.name, "12", "100", "1000"], *([*signal, s] for s in LEADS)]
    if [w[:5] + w[7:] for w in words] != right:
        raise ValueError("its header is not of a 100 Hz record of PTB-XL")
    x = np.fromfile(path.with_suffix(".dat"), "<i2").reshape(1000, 12).T
    sums = x.sum(1, dtype=int) - [int(w[6]) for w in words[1:]]
    if (sums % 2**16).any() or (x == -2**15).any():
        raise ValueError("a checksum is wrong, or samples are missing")
    return x


def usable(args, table, skipped):
    """Yield (fold, samples) of records; bad ones join `skipped`, if --skip-bad."""
    for row in tqdm(table.itertuples(), "reading", len(table)):
        path = args.data / row.filename_lr
        try:
            yield row.folds, read_record(path)
        except (OSError, ValueError) as e:
            if not args.skip_bad:
                sys.exit(f"{path}: {e}: run 00_download.py, or use --skip-bad")
            skipped.append({"ecg_id": row.ecg_ids, "reason": str(e)})


def write_signals(path, records):
    """Filter `records` (fold, samples) into a .npy [N, 12, 1000] mV -> scaler."""
    scaler = StandardScaler()
    with open(path, "wb") as f:
        f.seek(128)  # the header comes last
        while chunk := list(islice(records, 512)):
            folds, uV = map(np.array, zip(*chunk))
            parts = np.array_split(uV / 1000, 8)  # they fit a cache
            x = np.concatenate([*map(common.highpass, parts)])
            f.write(x.astype("<f4").tobytes())  # [n, 12, 1000] mV
            train = x[folds <= 8].transpose(0, 2, 1)
            if len(train):
                scaler.partial_fit(train.reshape(-1, 12))
        shape = (f.tell() - 128) // 48_000, 12, 1000
        f.seek(0)
        np.lib.format.write_array_header_1_0(
            f, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return scaler


def jaccard(labels):
    """labels [N, C] -> [C, C]: records with both over records with either."""
    y = labels.astype(float)
    both = y.T @ y
    either = y.sum(0)[:, None] + y.sum(0) - both
    return np.where(np.eye(len(both)), 1.0, both / np.maximum(either, 1))


def main():
    p = common.argument_parser(__doc__, "data", "prep", "threads", "demo")
    p.add_argument("--records", type=int, metavar="N", help="the first N")
    p.add_argument("--skip-bad", action="store_true", help="leave them out")
    args = common.parse(p)
    try:
        table, described = read_tables(args.data, args.records)
    except (OSError, ValueError) as e:
        sys.exit(f"{args.data}: {e}: run 00_download.py, or use --data")
    args.prep.mkdir(parents=True, exist_ok=True)
    signals, skipped = args.prep / ".signals.npy.tmp", []
    scaler = write_signals(signals, usable(args, table, skipped))
    table = table[~table["ecg_ids"].isin([s["ecg_id"] for s in skipped])]
    sizes = np.histogram(table["folds"], [1, 9, 10, 11])[0].tolist()
    if 0 in sizes:
        sys.exit(f"{args.data}: too few records, a part is empty: {sizes}")
    (args.prep / "preprocess.json").unlink(missing_ok=True)  # until all is new
    signals.replace(args.prep / "signals.npy")
    labels = [[f"'{c}'" in codes for c in CODES] for codes in table["scp_codes"]]
    arrays = {"labels": np.uint8(labels), **table[["folds", "ecg_ids", "patient_ids"]]}
    for name, array in arrays.items():
        common.save(args.prep / f"{name}.npy", array)
    hashes = tuple(file_hash(args.data / t) for t in TABLES)
    other = b"SYNTHETIC" in (args.data / TABLES[0]).read_bytes()
    data = "PTB-XL v1.0.3" if hashes == HASHES else OTHER[other]
    train = arrays["labels"][table["folds"] <= 8]
    common.save(args.prep / "preprocess.json", dict(
        common.provenance(args), records=len(table), skipped=skipped,
        sizes=dict(zip(["train", "validation", "test"], sizes)),
        data=data, codes=CODES, descriptions=described,
        without_training_record=[c for c, n in zip(CODES, train.sum(0)) if not n],
        scaler=dict(mean=scaler.mean_.tolist(), std=scaler.scale_.tolist()),
        jaccard=jaccard(train).round(6).tolist(),
        sha256={k: file_hash(args.prep / f"{k}.npy") for k in ("signals", *arrays)}))
    print(f"{args.prep}: {len(table):,} records, {data}: {sizes}")


if __name__ == "__main__":
    common.run(main)
