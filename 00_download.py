"""Stage 00, download: the 100 Hz part of PTB-XL v1.0.3, every file checked against the publisher's checksum.

reads   https://physionet-open.s3.amazonaws.com and, for what that does not give, https://physionet.org
writes  DATA/SHA256SUMS.txt, ptbxl_database.csv, scp_statements.csv, records100/ (43,598 record files): 536 MB to fetch,
        620 MB on disk; with --imagenet also resnet18-f37072fd.pth (45 MB) beside the folder DATA

    python 00_download.py                  fetch what is not there yet into data/ptbxl
    python 00_download.py --check          fetch nothing: list what is missing, altered or extra
    python 00_download.py --imagenet       also fetch torchvision's ResNet18, from which --recipe paper starts
    python 00_download.py --synthetic 600  no network: write 600 synthetic records into data/synthetic
    python 00_download.py --demo           the same into data/demo, which --demo of every other stage reads

A file stays in memory until its checksum is right, then it is written under a temporary name and renamed: what stands
under its final name is whole. After an interruption the same command goes on where it was.

Takes 2.5 minutes where an answer takes 0.1 s (32 files at once), longer on a line below 30 Mbit/s; on 2 CPU cores
--check takes 0.1 and --demo 0.2 minutes. No GPU needed.
Last line: `data/ptbxl: 43,600 files complete and verified`.
"""
import base64
import hashlib
import http.client
import os
import queue
import random
import re
import ssl
import sys
import threading
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from tqdm import tqdm

import common

MIRRORS = ["https://physionet-open.s3.amazonaws.com/ptb-xl/1.0.3/", "https://physionet.org/files/ptb-xl/1.0.3/"]
SUMS, TABLES, RECORDS = "SHA256SUMS.txt", ("ptbxl_database.csv", "scp_statements.csv"), "records100/"
FILES = 43_600           # the two tables and 21,799 pairs of .hea and .dat
LICENCE = "PTB-XL is CC BY 4.0; cite Wagner et al., Scientific Data 7:154 (2020), doi:10.1038/s41597-020-0495-6"
IMAGENET_URL = "https://download.pytorch.org/models/resnet18-f37072fd.pth"
IMAGENET_SHA256 = "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec"
SYNTHETIC_SEED = 0       # not --seed: runs with different seeds share one data set

CONNECTIONS = 32         # at once: the files are small, so waiting for answers is what costs
TIMEOUT = 20             # seconds without a byte after which a connection counts as stalled
TRIES = 4                # per file and mirror, with pauses of about 1, 2 and 4 times PAUSE seconds between them
PAUSE = 1.0
DOWN = 600               # seconds for which a mirror whose TRIES all failed is asked last
GIVE_UP = 100            # files that failed with none arriving between them: the network is gone
TLS = ssl.create_default_context()  # checks certificates and host names
# Checksum and name. A name becomes a path below the folder and a part of a URL, so no other characters are let through
# and no part of it may begin with a dot.
LINE = re.compile(r"([0-9a-f]{64}) [ *]?(?:\./)?((?!\.)[\w.-]+(?:/(?!\.)[\w.-]+)*)", re.ASCII)


# ---------------------------------------------------------------------------------------------------------------------
# The list of files, and which of them are there

def read_sums(folder):
    """{name: sha256} of the tables and 100 Hz records in the folder's SHA256SUMS.txt; exits if that cannot be used.

    PhysioNet's own list also has the 500 Hz records and others, which are left out.
    """
    path, files = folder / SUMS, {}
    command = common.rerun("00_download.py")
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
            match = LINE.fullmatch(line.rstrip())
            if not match:
                raise ValueError(f"line {number} is not a checksum and a name inside the folder")
            if match[2] in TABLES or match[2].startswith(RECORDS):
                files[match[2]] = match[1]
        if len(files) <= len(TABLES) or not all(table in files for table in TABLES):
            raise ValueError("it does not list the two tables and the 100 Hz records of PTB-XL")
    except (FileNotFoundError, NotADirectoryError):
        sys.exit(f"{path} is missing, so nothing can be checked: {command}, which keeps the files that are right")
    except (OSError, ValueError) as e:
        sys.exit(f"{path} cannot be used ({e}): delete it and run the same command again, without --check")
    return files


def verify(folder, files):
    """(missing, altered): the names of `files` {name: sha256} that `folder` lacks, or holds with another checksum."""
    def state(name):
        try:
            with open(f"{folder}/{name}", "rb", buffering=0) as f:
                return "" if hashlib.file_digest(f, "sha256").hexdigest() == files[name] else "altered"
        except (FileNotFoundError, NotADirectoryError):
            return "missing"
        except OSError:  # unreadable, or a folder of that name
            return "altered"

    with ThreadPool(min(8, 2 * os.cpu_count())) as pool:
        states = list(tqdm(pool.imap(state, files, chunksize=64), f"checking {folder}", len(files), unit=" files"))
    return [[name for name, s in zip(files, states) if s == kind] for kind in ("missing", "altered")]


def extras(folder, files):
    """Names below records100/ that `files` does not list; hidden files and wget's index.html do not count."""
    found = (p.relative_to(folder).as_posix() for p in (folder / RECORDS).rglob("*") if not p.is_dir())
    return sorted(n for n in found if n not in files and not n.rpartition("/")[2].startswith((".", "index.html")))


def check(folder):
    """--check: the `files` of a folder that is whole; else lists what is wrong and exits with 1."""
    files = read_sums(folder)
    missing, altered = verify(folder, files)
    faults = {"missing": missing, "truncated or altered": altered, "extra": extras(folder, files)}
    for kind, names in faults.items():
        for name in names[:10]:
            print(f"{kind}: {name}")
        if len(names) > 10:
            print(f"{kind}: and {len(names) - 10:,} more")
    if any(faults.values()):
        counts = ", ".join(f"{len(names):,} {kind}" for kind, names in faults.items() if names)
        how = "" if len(files) == FILES else " --synthetic N (or --demo)"
        sys.exit(f"{folder} is not what its {SUMS} lists ({counts}): `python 00_download.py --data {folder}{how}` "
                 "mends missing and altered files, extra ones are yours to delete")
    return files


# ---------------------------------------------------------------------------------------------------------------------
# HTTP with the standard library: kept-alive connections, further tries, a second mirror

class Failed(Exception):
    """No mirror gave a file; the text says why, mirror by mirror."""


class Refused(Exception):
    """An answer that another try at the same mirror would not change."""


class Client:
    """One thread's open connections, its memory of mirrors that were down, and its counts for the progress bar."""

    def __init__(self, mirrors, stop):
        self.mirrors, self.stop = mirrors, stop
        self.connections, self.down, self.retries, self.bytes = {}, {}, 0, 0

    def fetch(self, name, sha256):
        """Bytes of `name` from the first mirror that gives them with this sha256 (None: any), else Failed."""
        problems = []
        for mirror in sorted(self.mirrors, key=lambda m: self.down.get(m, 0) > time.monotonic()):
            wrong = 0
            for attempt in range(TRIES):
                if attempt:
                    self.retries += 1
                    self.stop.wait(PAUSE * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))  # not all threads at once
                if self.stop.is_set():
                    raise Failed("stopped")
                try:
                    body = self.get(mirror + name)
                except (Refused, ssl.SSLCertVerificationError) as e:
                    problem = e
                    break
                except (OSError, http.client.HTTPException) as e:
                    problem = str(e) or type(e).__name__
                else:
                    if sha256 is None or hashlib.sha256(body).hexdigest() == sha256:
                        return body
                    problem, wrong = "wrong checksum", wrong + 1
                    if wrong == 2:  # once it was altered on the way, twice it is so at the mirror
                        break
            else:
                self.down[mirror] = time.monotonic() + DOWN
            problems.append(f"{urlsplit(mirror).netloc}: {problem}")
        raise Failed("; ".join(problems))

    def get(self, url):
        """The body of one answer; OSError or HTTPException if another try may help, Refused if not."""
        parts = urlsplit(url)
        connection = self.connections.pop(parts.netloc, None) or connect(parts)
        try:
            connection.request("GET", parts.path, headers={"User-Agent": "ProtoECGNet 00_download.py"})
            response = connection.getresponse()
            if response.status != 200:
                again = response.status in (408, 429) or response.status >= 500
                raise (http.client.HTTPException if again else Refused)(f"HTTP {response.status} {response.reason}")
            length, body, start = response.length, bytearray(), time.monotonic()
            while length is None or len(body) < length:
                piece = response.read1(1 << 16)
                if not piece:
                    break
                body += piece
                self.bytes += len(piece)
                if time.monotonic() - start > TIMEOUT + len(body) / 1000:  # a trickle never times a socket out
                    raise TimeoutError("slower than 1 kB/s")
            if length is not None and len(body) != length:
                raise http.client.HTTPException(f"the answer ended after {len(body):,} of {length:,} bytes")
            response.close()
            self.connections[parts.netloc] = connection  # kept alive for the next file; reopens itself if it must
            return bytes(body)
        finally:
            if self.connections.get(parts.netloc) is not connection:
                connection.close()


def connect(parts):
    """An https connection to the host of a split URL, through the system's proxy (http://[user:password@]host[:port])
    if there is one. Plain http goes to 127.0.0.1 only, where the tests run a server.
    """
    if parts.scheme == "http" and parts.hostname == "127.0.0.1":
        return http.client.HTTPConnection(parts.netloc, timeout=TIMEOUT)
    if parts.scheme != "https":
        raise Refused(f"{parts.scheme} is not https")
    proxy = None if proxy_bypass(parts.hostname) else getproxies().get("https")
    if not proxy:
        return http.client.HTTPSConnection(parts.netloc, timeout=TIMEOUT, context=TLS)
    try:
        via = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        connection = http.client.HTTPSConnection(via.hostname, via.port or 80, timeout=TIMEOUT, context=TLS)
    except ValueError as e:
        raise Refused(f"the system's proxy for https is none: {e}")
    login = f"{unquote(via.username or '')}:{unquote(via.password or '')}".encode()
    headers = {"Proxy-Authorization": f"Basic {base64.b64encode(login).decode()}"} if via.username else {}
    connection.set_tunnel(parts.hostname, parts.port or 443, headers)
    return connection


def fetch_all(todo, folder, mirrors):
    """Fetch `todo` {name: sha256} from `mirrors` into `folder`; exits with a report if any of them failed.

    Threads take the next name when they are free and hand results over in a short queue, so neither memory nor open
    files grow with the number of files. Files are not fsynced: after a power cut their checksum tells.
    """
    names, lock, stop, results = iter(todo), threading.Lock(), threading.Event(), queue.Queue(2 * CONNECTIONS)
    clients = [Client(mirrors, stop) for _ in range(min(CONNECTIONS, len(todo)))]

    def work(client):
        while not stop.is_set():
            with lock:
                name = next(names, None)
            if name is None:
                break
            try:
                body = client.fetch(name, todo[name])
                with common.replacing(folder / name) as temporary:
                    temporary.write_bytes(body)
                results.put((name, None))
            except Exception as e:  # for the main thread to judge
                results.put((name, e))
        for connection in client.connections.values():
            connection.close()

    threads = [threading.Thread(target=work, args=(client,), daemon=True) for client in clients]
    failures, in_a_row, left, start = [], 0, len(todo), time.monotonic()
    bar = tqdm(total=len(todo), desc=f"fetching {folder}", unit=" files")
    try:
        for thread in threads:
            thread.start()
        while left and in_a_row < GIVE_UP:
            bar.set_postfix_str(f"{sum(c.bytes for c in clients) / 1e6 / (time.monotonic() - start):.1f} MB/s, "
                                f"{sum(c.retries for c in clients)} retries", refresh=False)
            try:
                name, error = results.get(timeout=0.5)
            except queue.Empty:
                bar.refresh()
                continue
            left -= 1
            if error is None:
                in_a_row = 0
                bar.update()
            elif isinstance(error, Failed):
                in_a_row += 1
                failures.append(f"{name} ({error})")
            else:
                raise error
    except OSError as e:  # from writing: what goes wrong on the network is Failed
        sys.exit(f"{e.filename2 or e.filename or folder} cannot be written ({e.strerror}): put that right and run the "
                 "same command again (PTB-XL needs 620 MB); finished files are kept")
    finally:
        bar.close()
        stop.set()
        end = time.monotonic() + 0.2  # threads that wait for a stalled server are left behind
        for thread in threads:
            if thread.ident:  # started, before a Ctrl-C could come between
                thread.join(max(0, end - time.monotonic()))
    if failures:
        print(*[f"failed: {failure}" for failure in failures[:10]], sep="\n", file=sys.stderr)
        untried = f" ({left:,} were not tried)" if left else ""
        again = "check the network and run the same command again to fetch only what is missing"
        if any("wrong checksum" in failure for failure in failures) and (folder / SUMS).exists():
            again += f"; if checksums stay wrong, delete {SUMS}, which may be damaged"
        sys.exit(f"{folder}: {len(failures):,} of {len(todo):,} files could not be fetched{untried}: {again}")


# ---------------------------------------------------------------------------------------------------------------------
# The commands

def download(folder):
    """Make `folder` the whole 100 Hz part of PTB-XL and return its `files`; what is there and right stays."""
    if is_synthetic(folder):
        sys.exit(f"{folder} holds synthetic records: name another folder for PTB-XL with --data, or make them whole "
                 f"with `python 00_download.py --data {folder} --synthetic N`")
    if not (folder / SUMS).exists():
        print(LICENCE)
        fetch_all({SUMS: None}, folder, MIRRORS)
    files = read_sums(folder)
    if len(files) != FILES:
        sys.exit(f"{folder / SUMS} lists {len(files):,} files where PTB-XL v1.0.3 has {FILES:,}: name another folder "
                 "with --data, or delete the list if PTB-XL shall go into this one")
    missing, altered = verify(folder, files)
    if missing or altered:
        fetch_all({name: files[name] for name in missing + altered}, folder, MIRRORS)
    return files


def download_imagenet(folder):
    """--imagenet: torchvision's ResNet18 into `folder`, unless it is there already."""
    base, _, name = IMAGENET_URL.rpartition("/")
    if any(verify(folder, {name: IMAGENET_SHA256})):
        fetch_all({name: IMAGENET_SHA256}, folder, [base + "/"])
    print(f"{folder / name}: complete and verified")


def is_synthetic(folder):
    """Whether the table of records in `folder` is one of --synthetic."""
    table = folder / TABLES[0]
    return table.is_file() and "SYNTHETIC" in table.read_text(encoding="utf-8", errors="replace")


def write_synthetic(folder, n):
    """Make `folder` `n` records of tests/synthetic.py and return its `files`; a whole set stays, a real one is safe."""
    ours = is_synthetic(folder)
    if not ours and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        sys.exit(f"{folder} holds something other than synthetic records: name an empty or new folder with --data")
    files = read_sums(folder) if ours and (folder / SUMS).is_file() else {}
    if len(files) == 2 * n + len(TABLES) and not any(verify(folder, files)) and not extras(folder, files):
        print(f"{folder} is there already and is kept")
    else:
        sys.path.insert(0, str(Path(__file__).resolve().parent / "tests"))
        from synthetic import write_dataset  # here, because nothing else in the stages needs it
        try:
            write_dataset(folder, n, SYNTHETIC_SEED, True)
        except OSError as e:
            if e.errno is None:  # numpy, which wfdb writes with, says only how many items it could not write
                sys.exit(f"{folder} cannot be written, perhaps because the disk is full ({e}): free some space and run "
                         "the same command again")
            raise
        files = read_sums(folder)
    return files


def main():
    p = common.argument_parser(__doc__)
    p.add_argument("--check", action="store_true", help="fetch nothing, check the files of DATA")
    p.add_argument("--imagenet", action="store_true", help="also fetch the ImageNet weights, into the parent of DATA")
    p.add_argument("--synthetic", type=int, nargs="?", const=600, metavar="N",
                   help="write N synthetic records (default 600) into DATA, here by default data/synthetic")
    args = common.parse(p)
    n = 600 if args.demo and args.synthetic is None else args.synthetic
    if n is not None and n < 1:
        p.error("--synthetic must be at least 1")
    if args.check and args.imagenet:
        p.error("--check fetches nothing: leave --imagenet out, which checks the weights itself")
    if n is not None and args.data == Path("data/ptbxl"):
        args.data = Path("data/synthetic")
    if args.synthetic is not None:
        common.given[:] = [f" --data {args.data}", f" --synthetic {n}"]  # what a message says to run again

    if args.imagenet:
        download_imagenet(args.data.parent)
    if args.check:
        files = check(args.data)
    elif n is not None:
        files = write_synthetic(args.data, n)
    else:
        files = download(args.data)
    note = "" if len(files) == FILES else f" (PTB-XL has {FILES:,}: this is a synthetic set or a part)"
    print(f"{args.data}: {len(files):,} files complete and verified{note}")


if __name__ == "__main__":
    common.run(main)
