"""Stage 01, preprocessing (paper 3.1, 3.2): PTB-XL records -> arrays for every later stage.

A first-order 0.5 Hz Butterworth high-pass removes baseline wander. A StandardScaler per lead
is fitted on folds 1-8. All 71 labels become 0/1, whatever their likelihood.

reads   DATA/ptbxl_database.csv, scp_statements.csv, records100/
writes  PREP/signals.npy  float32 [N, 12, 1000] mV, filtered, not scaled
        PREP/labels.npy   uint8 [N, 71], in the row order of scp_statements.csv
        PREP/ecg_ids.npy, patient_ids.npy, folds.npy  int64 [N]
        PREP/preprocess.json  scaler, Jaccard similarities, label names and counts

    python 01_preprocess.py                 all 21,799 records
    python 01_preprocess.py --records 3000  the 3,000 with the lowest ecg_id

Takes half a minute on one CPU core, 1 GB of memory.
Last line: `runs/prep: 21,799 records (train 17,418, validation 2,183, test 2,198)`.
"""
import os
import sys
from itertools import islice

import numpy as np
import pandas as pd
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

import common
from common import CODES, LEADS

NUMBERS = ["ecg_id", "patient_id", "strat_fold"]
DICT = r"\{('[^']+': [0-9.]+(, )?)*\}"  # of a label's likelihoods


def read_table(path, columns):
    """Some columns of a csv file, as text; exits if they cannot be read."""
    try:
        table = pd.read_csv(path, usecols=columns, dtype=str, encoding="utf-8-sig",
                            engine="python", index_col=False, keep_default_na=False)
    except (OSError, ValueError) as e:
        sys.exit(f"{path} cannot be read ({e}): run 00_download.py, or use --data")
    return table.fillna("")


def read_tables(data):
    """The records by ecg_id, checked (a DataFrame), and {code: description}."""
    path = data / "scp_statements.csv"
    described = dict(read_table(path, ["Unnamed: 0", "description"]).to_numpy())
    if list(described) != CODES:
        sys.exit(f"{path} does not list PTB-XL's 71 codes: run 00_download.py")
    path = data / "ptbxl_database.csv"
    table = read_table(path, [*NUMBERS, "scp_codes", "filename_lr"])

    def require(right, what):
        if not all(right):
            line = list(right).index(False) + 2
            sys.exit(f"{path}, line {line}: {what}: run 00_download.py")

    for name in NUMBERS:
        whole = table[name].str.fullmatch(r"[0-9]{1,9}(\.0)?")
        require(whole, f"{name} is not a whole number")
        table[name] = table[name].astype(float).astype(np.int64)
    ecg_id, patient_id, fold = (table[name] for name in NUMBERS)
    require(fold.between(1, 10), "strat_fold is not one of 1-10")
    first = fold.groupby(patient_id).transform("first")
    require(fold == first, "its patient is in another fold, too")
    require(~ecg_id.duplicated(), "its ecg_id stands twice")
    names = [f"records100/{i // 1000 * 1000:05d}/{i:05d}_lr" for i in ecg_id]
    require(table["filename_lr"] == names, "filename_lr is not that of its ecg_id")
    require(table["scp_codes"].str.fullmatch(DICT), "scp_codes is no dictionary")
    table["codes"] = table["scp_codes"].str.findall("'([^']+)'")
    known = table["codes"].map(set(CODES).issuperset)
    require(known, "scp_codes has an unknown code")
    return table.sort_values("ecg_id"), described


def read_record(path):
    """The samples of a record, int16 microvolt [12, 1000]; exceptions say what is wrong."""
    text = path.with_suffix(".hea").read_text(encoding="ascii", errors="replace")
    lines = [line.split() for line in text.splitlines()]
    form = [f"{path.name}.dat", "16", "1000.0(0)/mV", "16", "0", "0"]
    expected = [[path.name, "12", "100", "1000"], *(form + [lead] for lead in LEADS)]
    if [words[:5] + words[7:] for words in lines] != expected:
        raise ValueError("its header is not of 12 leads, 100 Hz, 1000 samples, format 16")
    x = np.frombuffer(path.with_suffix(".dat").read_bytes(), "<i2")
    x = x.reshape(1000, 12).T  # [12, 1000]
    checksums = [int(words[6]) for words in lines[1:]]
    if ((x.sum(1, dtype=np.int64) - checksums) % 2**16).any():
        raise ValueError("its samples do not match the checksums of its header")
    if (x == -2**15).any():
        raise ValueError("it has missing samples")
    return x


def usable(args, table, skipped):
    """Yield (ecg_id, fold, samples [12, 1000]); what is not usable goes to `skipped`."""
    for row in tqdm(table.itertuples(), "reading", len(table)):
        path = args.data / row.filename_lr
        try:
            yield row.ecg_id, row.strat_fold, read_record(path)
        except (OSError, ValueError) as e:
            if not args.skip_bad:
                sys.exit(f"{path}: {e}: run 00_download.py, or use --skip-bad")
            skipped.append({"ecg_id": row.ecg_id, "reason": str(e)})


def write_signals(path, records):
    """Write filtered `records` (see `usable`) as .npy float32 [N, 12, 1000] mV.

    Returns the scaler of folds 1-8, and ecg_ids with a flat lead or saturation.
    """
    scaler, N, flat, saturated = StandardScaler(), 0, [], []
    with open(path, "wb") as f:
        f.seek(128)  # the header comes last
        while chunk := list(islice(records, 512)):
            ids, folds, digital = map(np.array, zip(*chunk))
            parts = np.split(digital / 1000, range(64, len(ids), 64))  # fit the cache
            x = np.concatenate([common.highpass(part) for part in parts])
            f.write(x.astype("<f4").tobytes())  # [n, 12, 1000] mV
            train = x[folds <= 8].transpose(0, 2, 1).reshape(-1, 12)  # [n * 1000, 12]
            if len(train):
                scaler.partial_fit(train)
            N += len(ids)
            flat += ids[(np.ptp(digital, axis=2) == 0).any(1)].tolist()
            saturated += ids[(np.abs(digital) == 2**15 - 1).any((1, 2))].tolist()
        f.seek(0)
        header = {"descr": "<f4", "fortran_order": False, "shape": (N, 12, 1000)}
        np.lib.format.write_array_header_1_0(f, header)
    return scaler, flat, saturated


def jaccard(labels):
    """labels [N, C] of 0/1 -> [C, C]: records with both over records with either."""
    y = labels.astype(np.float64)
    both = y.T @ y
    either = y.sum(0)[:, None] + y.sum(0) - both
    similarity = both / np.maximum(either, 1)
    np.fill_diagonal(similarity, 1)
    return similarity


def main():
    p = common.argument_parser(__doc__, "data", "prep", "threads", "demo")
    p.add_argument("--records", type=int, metavar="N", help="only the N lowest ecg_ids")
    p.add_argument("--skip-bad", action="store_true", help="leave bad records out")
    args = common.parse(p)
    table, described = read_tables(args.data)
    table = table[:args.records]
    skipped, temporary = [], args.prep / ".signals.npy.tmp"
    args.prep.mkdir(parents=True, exist_ok=True)
    records = usable(args, table, skipped)
    scaler, flat, saturated = write_signals(temporary, records)
    table = table[~table["ecg_id"].isin([s["ecg_id"] for s in skipped])]
    fold = table["strat_fold"]
    sizes = {"train": fold <= 8, "validation": fold == 9, "test": fold == 10}
    sizes = {part: int(rows.sum()) for part, rows in sizes.items()}
    if 0 in sizes.values():
        sys.exit(f"too few records, they leave a part empty: {sizes}")

    (args.prep / "preprocess.json").unlink(missing_ok=True)  # arrays of two runs
    os.replace(temporary, args.prep / "signals.npy")
    labels = np.uint8([[c in codes for c in CODES] for codes in table["codes"]])
    train = labels[fold <= 8]
    positives = dict(zip(CODES, train.sum(0).tolist()))
    arrays = {"labels": labels, "folds": fold, "ecg_ids": table["ecg_id"],
              "patient_ids": table["patient_id"]}
    shapes = {"signals": [len(table), 12, 1000]}
    for name, array in arrays.items():
        common.save(args.prep / f"{name}.npy", array)
        shapes[name] = list(array.shape)
    hashes = {name: common.file_hash(args.prep / f"{name}.npy") for name in shapes}
    tables = ["ptbxl_database.csv", "scp_statements.csv"]
    common.save(args.prep / "preprocess.json", {
        **common.provenance(args),
        "records": len(table),
        "sizes": sizes,
        "codes": CODES,
        "descriptions": described,
        "shapes": shapes,
        "training_positives": positives,
        "without_training_record": [c for c in CODES if not positives[c]],
        "filter": "Butterworth high-pass, order 1, 0.5 Hz, forwards and backwards",
        "scaler": {"mean": scaler.mean_.tolist(), "std": scaler.scale_.tolist()},
        "jaccard": jaccard(train).round(6).tolist(),
        "skipped": skipped,
        "flat_leads": flat,
        "saturated": saturated,
        "sha256": hashes,
        "tables": {name: common.file_hash(args.data / name) for name in tables}})
    print(f"{len(skipped)} skipped, {len(flat)} with a flat lead, {len(saturated)} saturated")
    print(f"{args.prep}: {len(table):,} records (train {sizes['train']:,}, "
          f"validation {sizes['validation']:,}, test {sizes['test']:,})")


if __name__ == "__main__":
    common.run(main)
