"""Script 00, download: the 100 Hz part of PTB-XL v1.0.3, checked by SHA-256.

reads   https://physionet-open.s3.amazonaws.com, or else https://physionet.org
writes  DATA/SHA256SUMS.txt, two tables, records100/: 620 MB;
        --imagenet: resnet18-f37072fd.pth (45 MB) beside the folder DATA

    python 00_download.py                  fetch what is missing or altered
    python 00_download.py --check          list what is missing or altered
    python 00_download.py --imagenet       also the weights for --recipe paper
    python 00_download.py --synthetic 600  no network: records in data/synthetic
    python 00_download.py --demo           the same in data/demo, for other --demo

Takes minutes. After an interruption the same command goes on. Last line:
`data/ptbxl: 43,600 files complete and verified`.
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
FILES = 43_600  # two tables and 21,799 pairs of .hea and .dat
CONNECTIONS = 32  # at once: the files are small, so most time is spent waiting
TIMEOUT = 20  # seconds without a byte
PAUSE = 1  # second: a request is repeated at once, after 2 and after 4 times as much
GIVE_UP = 40  # so many failures mean that the network is gone
SUMS = "SHA256SUMS.txt"
TABLES = {"ptbxl_database.csv", "scp_statements.csv"}
# Checksum and name: only such names become paths and URLs
LINE = re.compile(r"^([0-9a-f]{64}) [ *]?(?:\./)?(ptbxl_database\.csv|scp_statements\.csv|"
                  r"records100/[0-9]{5}/[0-9]{5}_lr\.(?:dat|hea))$", re.MULTILINE)


def read_sums(folder):
    """{name: sha256} of what SHA256SUMS.txt lists of tables and 100 Hz records."""
    path = folder / SUMS
    if not path.is_file():
        sys.exit(f"{path} is missing: run 00_download.py without --check")
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    files = {name: sha256 for sha256, name in LINE.findall(text)}
    if not TABLES < files.keys():
        sys.exit(f"{path} does not list PTB-XL: delete it and run 00_download.py again")
    return files


def faults(folder, files):
    """{name: "missing" or "altered"} of those of `files` {name: sha256} that are."""
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
                answer = session.get(mirror + name, timeout=TIMEOUT, allow_redirects=False)
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
    """Fetch `files` {name: sha256 (None: any)} into `folder`; exits if some fail."""
    retry = Retry(total=3, backoff_factor=PAUSE, backoff_jitter=PAUSE / 2,
                  status_forcelist=[408, 429, *range(500, 600)],  # busy or out of order
                  respect_retry_after_header=False)
    adapter = HTTPAdapter(pool_maxsize=CONNECTIONS, max_retries=retry)
    session = requests.Session()
    session.adapters.clear()
    session.mount("https://", adapter)
    session.mount("http://127.0.0.1:", adapter)  # tests
    with session, ThreadPool(min(CONNECTIONS, len(files))) as pool:
        done = pool.imap_unordered(
            lambda name: fetch(session, folder / name, name, files[name], mirrors), files)
        done = tqdm(done, f"fetching {folder}", len(files))
        failed = list(islice(filter(None, done), GIVE_UP))
    if failed:
        sys.exit(f"{len(failed):,} of {len(files):,} files cannot be fetched ({failed[0]}): "
                 f"run 00_download.py again, without {SUMS} if a checksum stays wrong")


def fetch_sums(folder):
    """Fetch SHA256SUMS.txt of PTB-XL into `folder`, unless it is there."""
    table = folder / "ptbxl_database.csv"
    if table.is_file() and b"SYNTHETIC" in table.read_bytes():
        sys.exit(f"{folder} holds synthetic records: name another folder with --data, "
                 "or use --synthetic N or --demo")
    if not (folder / SUMS).is_file():
        fetch_all({SUMS: None}, folder, list(MIRRORS))
    if len(read_sums(folder)) != FILES:
        sys.exit(f"{folder / SUMS} does not list {FILES:,} files: delete it and run "
                 "00_download.py again")


def main():
    p = common.argument_parser(__doc__, "data", "threads", "demo")
    p.add_argument("--check", action="store_true", help="fetch nothing, check files")
    p.add_argument("--imagenet", action="store_true", help="also fetch ImageNet weights")
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
        some = ", ".join(f"{what} {name}" for name, what in islice(found.items(), 5))
        sys.exit(f"{args.data}: {len(found):,} files are not as {SUMS} lists them, as "
                 f"{some}: run 00_download.py without --check")
    if found:
        fetch_all({name: files[name] for name in found}, args.data, list(MIRRORS))
    print(f"{args.data}: {len(files):,} files complete and verified")


if __name__ == "__main__":
    common.run(main)
