"""Stage 01, preprocessing (paper 3.1, 3.2): PTB-XL records -> arrays that every later stage memory-maps.

Reads every 100 Hz record with wfdb, checks it (12 leads in order, 100 Hz, 1000 samples, mV, header checksum), removes
baseline wander with a first-order 0.5 Hz Butterworth high-pass run forwards and backwards, fits a StandardScaler per
lead on folds 1-8, and encodes all 71 labels as 0/1 whatever their likelihood.

reads   DATA/ptbxl_database.csv, scp_statements.csv, records100/
writes  PREP/signals.npy      float32 [N, 12, 1000], filtered, millivolt, not scaled
        PREP/labels.npy       uint8   [N, 71], in the row order of scp_statements.csv
        PREP/ecg_ids.npy, patient_ids.npy, folds.npy      int64 [N], ascending ecg_id
        PREP/preprocess.json  scaler, Jaccard co-occurrence of the training labels, label names and counts, checks

    python 01_preprocess.py                 all 21,799 records
    python 01_preprocess.py --records 3000  the first 3,000 only

Takes about a minute on 2 CPU cores (no GPU needed), under 1 GB of memory, 1.05 GB of disk.
Last line: `runs/prep: 21,799 records, 71 labels (train 17,418, validation 2,183, test 2,198)`.
"""
import ast
import csv
import itertools
import re
import sys
from collections import deque

import numpy as np
import wfdb
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

import common
from common import CODES, LEADS, RATE, SAMPLES, highpass

COLUMNS = ("ecg_id", "patient_id", "scp_codes", "strat_fold", "filename_lr")
CHUNK = 512    # records filtered at a time
PATIENCE = 120  # seconds without a record after which reading counts as stuck


def read_table(path, needed):
    """Rows of a csv file as dicts; exits if it is missing, unreadable or without one of the `needed` columns."""
    try:
        with open(path, newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f, strict=True))
    except FileNotFoundError:
        sys.exit(f"{path} is missing: {common.rerun('00_download.py')} first, or name the folder of the records with "
                 "--data")
    except (UnicodeDecodeError, csv.Error, OSError) as e:
        sys.exit(f"{path} is not a readable csv file ({e}): fetch it again, {common.rerun('00_download.py')}")
    missing = [c for c in needed if not rows or c not in rows[0]]
    if missing:
        sys.exit(f"{path} has no rows or no column {missing[0]!r}: fetch it again, "
                 f"{common.rerun('00_download.py')}")
    return rows


def read_metadata(data):
    """The csv files of PTB-XL -> (records sorted by ecg_id, {code: description}); exits on anything inconsistent.

    Each record is a dict of ecg_id, patient_id, fold, name (path of the record without its ending) and codes.
    """
    path = data / "scp_statements.csv"
    statements = read_table(path, ("", "description"))
    described = {row[""]: row["description"] for row in statements}
    if list(described) != CODES:
        sys.exit(f"{path} does not list the 71 codes of PTB-XL v1.0.3 in their order: fetch it again")
    path, records, seen, fold_of = data / "ptbxl_database.csv", [], set(), {}
    for line, row in enumerate(read_table(path, COLUMNS), start=2):
        where = f"{path}, line {line}"
        try:
            ecg_id, patient, fold = (int(re.fullmatch(r"(\d{1,9})(\.0)?", row[c], re.ASCII)[1])
                                     for c in ("ecg_id", "patient_id", "strat_fold"))
        except TypeError:
            sys.exit(f"{where}: ecg_id, patient_id and strat_fold must be whole numbers; correct or remove the line")
        try:
            codes = ast.literal_eval(row["scp_codes"])
            unknown = [c for c in codes.keys() if c not in CODES]
        except (ValueError, SyntaxError, AttributeError, TypeError, MemoryError, RecursionError):
            sys.exit(f"{where}: scp_codes is not a dictionary of codes; correct or remove the line")
        if unknown:
            sys.exit(f"{where}: unknown code {str(unknown[0])[:40]!r} in scp_codes; correct or remove the line")
        if ecg_id in seen:
            sys.exit(f"{where}: ecg_id {ecg_id} stands twice; remove one of the lines")
        if not 1 <= fold <= 10:
            sys.exit(f"{where}: strat_fold {fold} is outside 1-10; correct or remove the line")
        if fold_of.setdefault(patient, fold) != fold:
            sys.exit(f"{where}: patient {patient} is in folds {fold_of[patient]} and {fold}; correct strat_fold")
        # the name becomes a path, so nothing but PTB-XL's own pattern is let through
        if row["filename_lr"] != f"records100/{ecg_id // 1000 * 1000:05d}/{ecg_id:05d}_lr":
            sys.exit(f"{where}: filename_lr of ecg_id {ecg_id} must be records100/{ecg_id // 1000 * 1000:05d}/"
                     f"{ecg_id:05d}_lr; correct or remove the line")
        seen.add(ecg_id)
        records.append(dict(ecg_id=ecg_id, patient_id=patient, fold=fold, codes=list(codes),
                            name=str(data / row["filename_lr"])))
    return sorted(records, key=lambda r: r["ecg_id"]), described


def read_record(name):
    """One WFDB record -> (int16 microvolt [12, 1000], "") or (None, the reason why it cannot be used)."""
    try:
        with open(name + ".hea", encoding="ascii", errors="replace") as f:
            first = (f.readline(200).split() + ["", ""])[1]
        if first != str(len(LEADS)):  # wfdb would make room for as many leads as the header says
            return None, f"the header announces {first[:20]!r} leads, not {len(LEADS)}"
        r = wfdb.rdrecord(name, physical=False, return_res=16)
    except FileNotFoundError:
        return None, "the file is missing"
    except Exception as e:  # wfdb raises many kinds on a damaged file
        return None, f"wfdb cannot read it ({type(e).__name__}: {str(e).splitlines()[0][:80] if str(e) else ''})"
    leads = [str(lead).upper() for lead in r.sig_name or []]
    if leads != LEADS:
        return None, f"leads are {' '.join(leads)[:60] or 'none'}, not {' '.join(LEADS)}"
    if r.fs != RATE:
        return None, f"sampling rate is {r.fs} Hz, not {RATE} Hz"
    if set(r.file_name or ()) != {name.rpartition("/")[2] + ".dat"}:
        return None, "the header names another signal file"
    if r.d_signal is None or r.d_signal.shape != (SAMPLES, len(LEADS)):
        return None, f"it has {0 if r.d_signal is None else len(r.d_signal)} samples, not {SAMPLES}"
    if set(r.units) != {"mV"} or set(r.adc_gain) != {1000.0} or set(r.baseline) != {0} or set(r.fmt) != {"16"}:
        return None, "it is not WFDB format 16 with 1000 units per mV and baseline 0"
    digital = r.d_signal.T.astype(np.int16)
    sums = digital.astype(np.int64).sum(1) & 0xFFFF
    if r.checksum is None or any(c is None or int(s) != c & 0xFFFF for s, c in zip(sums, r.checksum)):
        return None, "the samples do not match the checksum of the header"
    if (digital == np.iinfo(np.int16).min).any():
        return None, "it has missing samples"
    return digital, ""


def read_records(names):
    """read_record of each name: one task of a reading process."""
    return [read_record(name) for name in names]


def jaccard(labels):
    """labels [N, C] of 0/1 -> [C, C]: records with both labels over records with either; 1 on the diagonal (Eq. 7)."""
    y = labels.astype(np.float64)
    both = y.T @ y
    either = y.sum(0)[:, None] + y.sum(0)[None] - both
    return np.where(np.eye(len(both), dtype=bool), 1.0, both / np.maximum(either, 1))


def part_sizes(folds):
    """{"train": records in folds 1-8, "validation": in 9, "test": in 10}; exits if one is empty. folds [N]."""
    sizes = {"train": int((folds <= 8).sum()), "validation": int((folds == 9).sum()), "test": int((folds == 10).sum())}
    if not all(sizes.values()):
        sys.exit(f"the {len(folds)} records leave a part empty ({sizes}): use more records")
    return sizes


def main():
    p = common.argument_parser(__doc__)
    p.add_argument("--records", type=int, metavar="N", help="use only the N records with the lowest ecg_id")
    p.add_argument("--skip-bad", action="store_true", help="leave unreadable records out, list them in preprocess.json")
    args = common.parse(p)

    records, described = read_metadata(args.data)
    if args.records is not None:
        if not 1 <= args.records <= len(records):
            sys.exit(f"--records must be between 1 and {len(records):,}, the number of records in {args.data}")
        records = records[:args.records]
    part_sizes(np.array([r["fold"] for r in records]))  # before the work begins

    # Read and filter in chunks, straight into the file: memory stays small however many records there are
    N, kept, skipped, flat, saturated = len(records), [], [], [], []
    scaler = StandardScaler()
    with common.replacing(args.prep / "signals.npy") as temporary, open(temporary, "wb") as f, \
            common.process_pool(args) as pool, \
            tqdm(total=N, unit=" records", desc="reading", mininterval=0.5, disable=None) as bar:
        # plainly written, not memory-mapped: on a full disk a map ends in a bus error
        header = {"descr": "<f4", "fortran_order": False, "shape": (N, len(LEADS), SAMPLES)}
        np.lib.format.write_array_header_1_0(f, header)
        chunk = []

        def flush():
            if chunk:
                x = highpass(np.stack(chunk) / 1000.0)                                       # int16 uV -> mV
                f.write(x.astype("<f4").tobytes())
                train = [r["fold"] <= 8 for r in kept[-len(chunk):]]
                if any(train):
                    scaler.partial_fit(x[train].transpose(0, 2, 1).reshape(-1, len(LEADS)))  # [records * 1000, 12]
                chunk.clear()

        names = ([r["name"] for r in records[i:i + 64]] for i in range(0, N, 64))
        parts = deque(pool.submit(read_records, part) for part in itertools.islice(names, 16))  # what waits fits memory
        for i, record in enumerate(records):
            if i % 64 == 0:
                try:
                    part = parts.popleft().result(timeout=PATIENCE)
                    parts += (pool.submit(read_records, more) for more in itertools.islice(names, 1))
                except TimeoutError:
                    sys.exit(f"{record['name']}: nothing came back in {PATIENCE} s (a stuck disk, or a process "
                             "was killed): run the same command again")
            digital, reason = part[i % 64]
            bar.update()
            if digital is None:
                if not args.skip_bad:
                    sys.exit(f"{record['name']}: {reason}; fetch it again ({common.rerun('00_download.py')}), "
                             "leave it out with --skip-bad, or use fewer records with --records N")
                skipped.append({"ecg_id": record["ecg_id"], "reason": reason})
                continue
            if (np.ptp(digital, axis=1) == 0).any():
                flat.append(record["ecg_id"])
            if (np.abs(digital.astype(np.int32)) >= 32767).any():
                saturated.append(record["ecg_id"])
            kept.append(record)
            chunk.append(digital)
            if len(chunk) == CHUNK:
                flush()
        flush()
        f.seek(0)  # the header again, with the number of readable records; numpy gives it the same length
        np.lib.format.write_array_header_1_0(f, {**header, "shape": (len(kept), len(LEADS), SAMPLES)})
        if not kept:
            sys.exit(f"{args.data} has no readable record: check the folder, {common.rerun('00_download.py --check')}")
        sizes = part_sizes(np.array([r["fold"] for r in kept]))
        f.flush()
        sha256 = {"signals": common.file_hash(temporary)}
        (args.prep / "preprocess.json").unlink(missing_ok=True)  # from here on the old arrays are no longer one set

    arrays = {"labels": np.array([[c in r["codes"] for c in CODES] for r in kept], np.uint8),
              **{f"{name}s": np.array([r[name] for r in kept]) for name in ("ecg_id", "patient_id", "fold")}}
    for name, array in arrays.items():
        common.save_npy(args.prep / f"{name}.npy", array)
        sha256[name] = common.file_hash(args.prep / f"{name}.npy")
    folds, labels = arrays["folds"], arrays["labels"]
    positives = labels[folds <= 8].sum(0)
    common.save_json(args.prep / "preprocess.json", {
        "format": common.FORMAT, "records": len(kept), "sizes": sizes, "codes": CODES, "descriptions": described,
        "shapes": {"signals": [len(kept), len(LEADS), SAMPLES], **{k: list(v.shape) for k, v in arrays.items()}},
        "training_positives": dict(zip(CODES, positives.tolist())),
        "without_training_record": [c for c, n in zip(CODES, positives) if n == 0],
        "filter": "Butterworth high-pass, order 1, 0.5 Hz, forwards and backwards",
        "scaler": {"mean": scaler.mean_.tolist(), "std": scaler.scale_.tolist()},              # mV per lead, folds 1-8
        "jaccard": jaccard(labels[folds <= 8]).round(6).tolist(),
        "skipped": skipped, "flat_leads": flat, "saturated": saturated,
        "inputs": {n: common.file_hash(args.data / n) for n in ("ptbxl_database.csv", "scp_statements.csv")},
        "sha256": sha256})

    left_out = [s["ecg_id"] for s in skipped]
    for what, ids in (("skipped", left_out), ("with a flat lead", flat), ("saturated", saturated)):
        if ids:
            print(f"{len(ids)} records {what}: ecg_id {', '.join(map(str, ids[:8]))}{' ...' if len(ids) > 8 else ''}")
    print(f"{args.prep}: {len(kept):,} records, {int((positives > 0).sum())} labels (train {sizes['train']:,}, "
          f"validation {sizes['validation']:,}, test {sizes['test']:,})")


if __name__ == "__main__":
    common.run(main)
