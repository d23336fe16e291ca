"""Script 00, download: PTB-XL v1.0.3 at 100 Hz, checked by SHA-256.

reads   https://physionet-open.s3.amazonaws.com, or else https://physionet.org
writes  DATA/SHA256SUMS.txt, two tables, records100/: 620 MB;
        --imagenet: resnet18-f37072fd.pth (45 MB) beside the folder DATA

    python 00_download.py                  fetch what is missing or altered
    python 00_download.py --check          only list it
    python 00_download.py --imagenet       also weights for --recipe paper
    python 00_download.py --synthetic 600  no network: records in data/synthetic
    python 00_download.py --demo           the same in data/demo, for the demo

Takes minutes; if interrupted, the same command goes on. Last line:
`DATA: 43,600 files complete and verified`.
"""
import hashlib
import re
import sys
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.util import Retry

import common

MIRRORS = ["https://physionet-open.s3.amazonaws.com/ptb-xl/1.0.3/",
           "https://physionet.org/files/ptb-xl/1.0.3/"]
TORCHVISION = "https://download.pytorch.org/models/"
IMAGENET_SHA256 = "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec"
FILES = 43_600  # 2 tables, 21,799 .hea and .dat
CONNECTIONS = 32  # at once: files are small, most time is waiting
TIMEOUT = 20  # s without a byte
PAUSE = 1  # s: requests repeat at once, after 2 and 4 of them
GIVE_UP = 40  # failures: the network is gone
SUMS = "SHA256SUMS.txt"
TABLES = {"ptbxl_database.csv", "scp_statements.csv"}
# Only such names become paths and URLs
LINE = re.compile(
    r"(?m)^([0-9a-f]{64}) [ *]?(?:\./)?"
    r"(ptbxl_database\.csv|scp_statements\.csv|"
    r"records100/[0-9]{5}/[0-9]{5}_lr\.(?:dat|hea))$")


def read_sums(folder):
    """{name: sha256} of tables and 100 Hz records in SHA256SUMS.txt."""
    path = folder / SUMS
    if not path.is_file():
        sys.exit(f"{path} is missing: run 00_download.py without --check")
    text = path.read_text("utf-8-sig", "replace")
    files = {name: sha256 for sha256, name in LINE.findall(text)}
    if not TABLES < files.keys():
        sys.exit(f"{path} does not list PTB-XL: delete it, run 00_download.py again")
    return files


def faults(folder, files):
    """{name: "missing" or "altered"} of `files` {name: sha256} that are."""
    found = {}
    for name in tqdm(files, f"checking {folder}"):
        path = folder / name
        if not path.is_file():
            found[name] = "missing"
        elif hashlib.sha256(path.read_bytes()).hexdigest() != files[name]:
            found[name] = "altered"
    return found


def fetch(session, path, name, sha256, mirrors):
    """Write `name` from the first mirror that has it right; or return why not."""
    for mirror in list(mirrors):
        for _ in range(2):  # it may be altered on the way
            try:
                answer = session.get(
                    mirror + name, timeout=TIMEOUT, allow_redirects=False)
            except requests.RequestException as e:
                problem = str(e)[:200]
                continue
            if answer.status_code != 200:
                problem = f"HTTP {answer.status_code}"
            elif sha256 not in (None, hashlib.sha256(answer.content).hexdigest()):
                problem = "wrong checksum"
            else:
                common.save(path, answer.content)
                return None
        mirrors[:] = [m for m in mirrors if m != mirror] + [mirror]  # asked last
    return f"{name}: {problem}"


def fetch_all(files, folder, mirrors):
    """Fetch `files` {name: sha256, or None} into `folder`; exits if some fail."""
    retry = Retry(
        total=3, backoff_factor=PAUSE, backoff_jitter=PAUSE / 2,
        respect_retry_after_header=False,
        status_forcelist=[408, 429, *range(500, 600)])  # busy or out of order
    adapter = HTTPAdapter(pool_maxsize=CONNECTIONS, max_retries=retry)
    session = requests.Session()
    session.adapters.clear()
    session.mount("https://", adapter)
    session.mount("http://127.0.0.1:", adapter)  # tests
    with session, ThreadPool(min(CONNECTIONS, len(files))) as pool:
        done = pool.imap_unordered(
            lambda n: fetch(session, folder / n, n, files[n], mirrors), files)
        done = tqdm(done, f"fetching {folder}", len(files))
        failed = list(islice(filter(None, done), GIVE_UP))
    if failed:
        sys.exit(
            f"{len(failed):,} of {len(files):,} files cannot be fetched "
            f"({failed[0]}): run 00_download.py again, without {SUMS} if a checksum "
            "stays wrong")


def fetch_sums(folder):
    """Fetch SHA256SUMS.txt into `folder`, unless it is there."""
    table = folder / "ptbxl_database.csv"
    if table.is_file() and b"SYNTHETIC" in table.read_bytes():
        sys.exit(f"{folder} holds synthetic records: take another --data, "
                 "or use --synthetic N or --demo")
    if not (folder / SUMS).is_file():
        fetch_all({SUMS: None}, folder, list(MIRRORS))
    if len(read_sums(folder)) != FILES:
        sys.exit(f"{folder / SUMS} does not list {FILES:,} files: delete it, run "
                 "00_download.py again")


def main():
    p = common.argument_parser(__doc__, "data", "threads", "demo")
    p.add_argument("--check", action="store_true", help="only check files")
    p.add_argument("--imagenet", action="store_true", help="ImageNet weights too")
    p.add_argument("--synthetic", type=int, metavar="N", help="write N records")
    args = common.parse(p)
    n = args.synthetic
    if args.demo and n is None:
        n = 600
    if n is not None and n < 1:
        p.error("--synthetic must be at least 1")
    if n and args.data == Path("data/ptbxl"):
        args.data = Path("data/synthetic")
    weights = {common.IMAGENET: IMAGENET_SHA256}
    if args.imagenet and faults(args.data.parent, weights):
        fetch_all(weights, args.data.parent, [TORCHVISION])
    if n and not args.check:
        sys.path.insert(0, str(Path(__file__).resolve().parent / "tests"))
        from synthetic import write_dataset  # nothing else needs it
        there = read_sums(args.data) if (args.data / SUMS).is_file() else {}
        if len(there) != 2 * n + 2 or faults(args.data, there):
            write_dataset(args.data, n, progress=True)
    elif not args.check:
        fetch_sums(args.data)
    files = read_sums(args.data)
    found = faults(args.data, files)
    if args.check and found:
        first = islice(found.items(), 5)
        some = ", ".join(f"{what} {name}" for name, what in first)
        sys.exit(f"{args.data}: {len(found):,} files are not as in {SUMS}, as "
                 f"{some}: run 00_download.py without --check")
    if found:
        fetch_all({name: files[name] for name in found}, args.data, list(MIRRORS))
    print(f"{args.data}: {len(files):,} files complete and verified")


if __name__ == "__main__":
    common.run(main)
