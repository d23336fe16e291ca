"""00_download.py against web servers on 127.0.0.1 that fail on purpose; no other network."""
import hashlib
import multiprocessing
import ntpath
import os
import posixpath
import random
import signal
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import PTBXL, needs_ptbxl, run_stage, sentence, stage
from hypothesis import given
from hypothesis import strategies as st

download = stage("00_download")
MIRRORS = list(download.MIRRORS)
SUMS, RECORD = "SHA256SUMS.txt", "records100/00000/00007_lr.dat"


# ---- A small PTB-XL, and a server that gives it with scripted faults

def sums_of(files):
    lines = [f"{hashlib.sha256(body).hexdigest()} {name}\n" for name, body in files.items()]
    return "".join(lines).encode()


def data_set(pairs, size=2400):
    """{name: bytes} in the shape of PTB-XL; its SHA256SUMS.txt lists files that no stage reads."""
    rng = random.Random(7)
    tables = ("ptbxl_database.csv", "scp_statements.csv")
    wanted = {name: rng.randbytes(4500).hex().encode() for name in tables}
    for i in range(1, pairs + 1):
        name = f"records100/{i // 100 * 100:05d}/{i:05d}_lr"
        wanted |= {f"{name}.dat": rng.randbytes(size), f"{name}.hea": rng.randbytes(60)}
    others = {"LICENSE.txt": b"CC BY", "RECORDS": b"x", "records500/00000/00001_hr.dat": b"y"}
    return {SUMS: sums_of({**others, **wanted}), **wanted}


class Handler(BaseHTTPRequestHandler):
    protocol_version, timeout, disable_nagle_algorithm = "HTTP/1.1", 8, True

    def setup(self):
        super().setup()
        self.server.connections += 1

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, name = self.server, self.path.removeprefix("/base/")
        with server.lock:
            server.asked[name] += 1
            fault = next(server.faults.get(name, server.always), None)
        time.sleep(server.delay)
        body = server.files.get(name, b"sorry")
        if fault == "drop":
            self.close_connection = True
            return
        if fault == "flip":
            body = bytes([body[0] ^ 1]) + body[1:]
        code = fault if isinstance(fault, int) else 200 if name in server.files else 404
        self.send_response(code)
        if code in (301, 429):  # neither is followed
            self.send_header("Location", server.base + "scp_statements.csv")
            self.send_header("Retry-After", "3600")
        if fault == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault in ("short", "stall"):
            self.close_connection = True
            body = body[:len(body) // 2]
        self.wfile.write(body)
        if fault == "stall":
            server.closing.wait(8)


class Server(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.always, self.delay = {}, {}, iter(()), 0
        self.asked, self.connections = Counter(), 0
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.base = f"http://127.0.0.1:{self.server_address[1]}/base/"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *args):  # clients that hang up are part of the tests
        pass

    def stop(self):
        self.closing.set()
        self.shutdown()
        self.server_close()


@pytest.fixture
def world(tmp_path, monkeypatch, capsys):
    """Two mirrors `a` and `b` of 20 records, short waits, and ways to run the stage."""
    w = SimpleNamespace(folder=tmp_path / "data" / "ptbxl", a=Server(), b=Server())

    def use(files):
        w.files = w.a.files = w.b.files = files
        monkeypatch.setattr(download, "FILES", len(files) - 1)

    def run(*argv):
        """The last line printed; a SystemExit passes through."""
        run_stage(monkeypatch, "00_download", *argv)
        return capsys.readouterr().out.splitlines()[-1]

    def refused(*argv):
        """The sentence with which the stage ends, and what it printed before."""
        with pytest.raises(SystemExit) as e:
            run_stage(monkeypatch, "00_download", *argv)
        return sentence(e), capsys.readouterr().out

    w.use, w.run, w.refused = use, run, refused
    use(data_set(20))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    constants = {"MIRRORS": [w.a.base, w.b.base], "PAUSE": 0.01, "TIMEOUT": 2}
    for name, value in constants.items():
        monkeypatch.setattr(download, name, value)
    yield w
    w.a.stop()
    w.b.stop()


def tree(folder):
    paths = folder.rglob("*")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths if p.is_file()}


def put(folder, files):
    for name, body in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)


# ---- Fetching

def test_download_is_complete_byte_identical_and_keeps_connections(world):
    world.use(data_set(150))
    last = world.run("--data", world.folder)
    assert last == f"{world.folder}: 302 files complete and verified"
    assert tree(world.folder) == world.files and not world.b.asked
    assert world.a.asked == dict.fromkeys(world.files, 1)  # and nothing that no stage reads
    assert world.a.connections <= download.CONNECTIONS + 1


@pytest.mark.parametrize("name", [RECORD, "ptbxl_database.csv"])
@pytest.mark.parametrize("fault", ["drop", 500, 503, 429, 408, "short", "stall", "flip", "chunked"])
def test_fault_that_passes(world, monkeypatch, fault, name):
    monkeypatch.setattr(download, "TIMEOUT", 0.5)
    world.a.faults[name] = iter([fault])
    world.run("--data", world.folder)
    assert tree(world.folder) == world.files and not world.b.asked
    assert world.a.asked[name] == 1 + (fault != "chunked")


@pytest.mark.parametrize("fault", ["drop", 500, 404, 403, 301, "short", "flip"])
def test_fault_that_stays_is_left_to_the_other_mirror(world, fault):
    world.a.faults[RECORD] = repeat(fault)
    world.run("--data", world.folder)
    assert tree(world.folder) == world.files and world.b.asked[RECORD] == 1
    assert world.a.asked[RECORD] <= 8  # two requests of four tries


def test_dead_mirror_is_asked_last(world, monkeypatch):
    monkeypatch.setattr(download, "CONNECTIONS", 4)
    world.a.always = repeat(503)
    world.run("--data", world.folder)
    assert tree(world.folder) == world.files
    assert sum(world.a.asked.values()) <= (4 + 1) * 8


@pytest.mark.parametrize("fault, reason", [(404, "HTTP 404"), ("flip", "wrong checksum")])
def test_what_no_mirror_gives_is_reported_and_not_written(world, fault, reason):
    bad = [name for name in world.files if name.endswith(".hea")][:13]
    world.a.faults = {name: repeat(fault) for name in bad}
    world.b.faults = dict(world.a.faults)
    message, out = world.refused("--data", world.folder)
    assert "13 of 42 files cannot be fetched" in message and reason in message
    assert any(name in message for name in bad) and "complete" not in out
    assert tree(world.folder) == {n: b for n, b in world.files.items() if n not in bad}
    world.a.faults.clear()
    world.run("--data", world.folder)
    assert tree(world.folder) == world.files


def test_network_that_is_gone_ends_the_run(world, monkeypatch):
    monkeypatch.setattr(download, "GIVE_UP", 5)
    monkeypatch.setattr(download, "CONNECTIONS", 2)
    world.use(data_set(100, size=10))
    put(world.folder, {SUMS: world.files[SUMS]})
    world.a.always = world.b.always = repeat("drop")
    message, _ = world.refused("--data", world.folder)
    assert "5 of 202 files cannot be fetched" in message and len(world.a.asked) < 20


# ---- Interruption and resuming

def test_resume_fetches_only_what_is_missing_or_altered(world):
    cut, flipped, gone, other = [n for n in world.files if n.endswith(".dat")][:4]
    leftover = "records100/00000/.00001_lr.dat.tmp"  # as a kill leaves it
    put(world.folder, {**world.files, cut: world.files[cut][:100], flipped: world.files[other],
                       leftover: b"half", "notes.txt": b"mine"})
    (world.folder / gone).unlink()
    world.run("--data", world.folder)
    assert tree(world.folder) == {**world.files, "notes.txt": b"mine"}
    assert world.a.asked == {cut: 1, flipped: 1, gone: 1}


def test_folder_of_somebody_else_needs_no_network(world):
    partial = {n: b for n, b in world.files.items() if n != SUMS}
    windows = [b"%b *./%b" % tuple(line.split()) for line in sums_of(partial).splitlines()]
    for sums in (world.files[SUMS], sums_of(partial), b"\xef\xbb\xbf" + b"\r\n".join(windows)):
        put(world.folder, {**partial, SUMS: sums, "records100/index.html": b"wget"})
        for flags in ([], ["--check"]):
            assert "42 files complete" in world.run("--data", world.folder, *flags)
    assert not world.a.asked and not world.b.asked


def run_slowly(constants, argv):
    """The stage in a process of its own, where kills meet half-written files."""
    def slowly(path, body):
        with open(path, "wb", buffering=0) as f:
            f.write(body[:len(body) // 2])
            time.sleep(0.01)
            f.write(body[len(body) // 2:])

    Path.write_bytes = slowly
    vars(download).update(constants)
    sys.argv = ["00_download.py", *argv]
    download.common.run(download.main)


def start(world, **constants):
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["torch", "scipy.signal", "scipy.stats", "requests", "tqdm",
                                      "pytest", "hypothesis.strategies", "threadpoolctl"])
    constants = {"MIRRORS": [world.a.base], "FILES": download.FILES, **constants}
    p = processes.Process(target=run_slowly, args=(constants, ["--data", str(world.folder)]))
    p.start()
    return p


def test_killed_at_any_moment_and_resumed(world):
    world.use(data_set(300))
    world.a.delay = 0.01
    rng, met = random.Random(1), []
    for _ in range(40):
        before = set(tree(world.folder))
        world.a.asked.clear()
        process = start(world, CONNECTIONS=4)
        while not world.a.asked and process.is_alive():
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.join()
        now = tree(world.folder)
        met += [name for name in now if name.endswith(".tmp")]
        whole = {name for name in now if not name.endswith(".tmp")}
        assert all(now[name] == world.files[name] for name in whole)
        assert not before & whole & set(world.a.asked)  # what was whole is not fetched again
        if len(met) > 2:
            break
    assert met  # a kill did leave a half-written file behind
    world.run("--data", world.folder)
    assert tree(world.folder) == world.files


def test_ctrl_c_does_not_wait_for_a_stalled_server(world):
    put(world.folder, {SUMS: world.files[SUMS]})
    world.a.always = repeat("stall")
    process = start(world, TIMEOUT=30)
    while len(world.a.asked) < 20 and process.is_alive():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(5)
    assert process.exitcode == 1
    assert set(tree(world.folder)) == {SUMS}


def test_full_disk(world, monkeypatch):
    write = Path.write_bytes

    def full(path, body):
        if "00007" in path.name:
            raise OSError(28, "No space left on device", str(path))
        return write(path, body)

    monkeypatch.setattr(Path, "write_bytes", full)
    message, _ = world.refused("--data", world.folder)
    assert "No space left on device" in message and "00007" in message


# ---- SHA256SUMS.txt and --check

HOSTILE = ["/etc/passwd", "../../x", "records100/../../x", "records100\\..\\x", "..", "~/x y",
           "records100//x", "C:/x", "records100/a\0b", "records100/.ssh", "records100/x?y#z",
           "http://host/x", "records100/00000/../00001_lr.dat", "records100/00000/00001_lr.dat/",
           "records100/0000٣/00001_lr.dat", "records100/00000/00001_lr.json"]


def test_hostile_names_are_never_fetched_nor_written(world):
    lines = [f"{'0' * 64} {name}\n".encode() for name in HOSTILE]
    world.use({**world.files, SUMS: b"".join(lines) + world.files[SUMS]})
    assert "42 files complete" in world.run("--data", world.folder)
    assert set(world.a.asked) == set(tree(world.folder)) == set(world.files)
    assert [p.name for p in world.folder.parent.iterdir()] == ["ptbxl"]


@given(st.text(alphabet=st.sampled_from("rd0190/.\\:~ \0\n\r-_*é\u2028"), max_size=30))
def test_an_accepted_name_stays_inside_the_folder(text):
    for prefix in ("", "records100/", "records100/00000/00001_lr.dat"):
        for _, name in download.LINE.findall(f"{'0' * 64} {prefix}{text}"):
            for path, root in ((posixpath, "/f"), (ntpath, "C:\\f")):
                assert path.normpath(path.join(root, name)).startswith(root + path.sep)


@pytest.mark.parametrize("damage", [
    lambda s: s[:-30], lambda s: s.replace(b" ptbxl_database.csv", b" other.csv"),
    lambda s: b"\n".join(s.splitlines()[:5]), lambda s: b"<html>", lambda s: b"",
    lambda s: b"\xff\xfe", lambda s: s.replace(b"lr.dat", b"lr.DAT", 1)])
def test_damaged_list(world, damage):
    world.use({**world.files, SUMS: damage(world.files[SUMS])})
    message, _ = world.refused("--data", world.folder)
    assert SUMS in message and "delete it" in message
    assert set(world.a.asked) == {SUMS}


def test_check_lists_missing_and_altered(world):
    gone, cut, flipped, empty = [n for n in world.files if n.endswith(".dat")][:4]
    put(world.folder, {**world.files, cut: world.files[cut][:-1], empty: b"",
                       flipped: bytes(2400), "scp_statements.csv": b"", "notes.txt": b""})
    (world.folder / gone).unlink()
    before = tree(world.folder)
    message, _ = world.refused("--check", "--data", world.folder)
    altered = [f"altered {n}" for n in (cut, flipped, empty, "scp_statements.csv")]
    assert all(said in message for said in (f"missing {gone}", *altered))
    assert "5 files" in message and "00_download.py" in message
    assert tree(world.folder) == before and not world.a.asked
    (world.folder / SUMS).unlink()
    assert f"{SUMS} is missing" in world.refused("--check", "--data", world.folder)[0]


# ---- --imagenet, --synthetic, --demo, the command line

def test_only_https_leaves_this_machine(world, monkeypatch):
    assert all(url.startswith("https://") for url in [download.TORCHVISION, *MIRRORS])
    for url in ("http://localhost:9/", "http://127.0.0.1.example.org/", "ftp://127.0.0.1/"):
        monkeypatch.setattr(download, "MIRRORS", [url])
        assert "No connection adapters" in world.refused("--data", world.folder)[0]


def test_imagenet(world, monkeypatch):
    weights = random.Random(1).randbytes(200_000)
    target = world.folder.parent / download.common.IMAGENET
    world.a.files = {**world.files, target.name: weights}
    monkeypatch.setattr(download, "TORCHVISION", world.a.base)
    message, _ = world.refused("--imagenet", "--data", world.folder)
    assert "wrong checksum" in message and not target.exists()  # not torchvision's weights
    assert download.IMAGENET_SHA256.startswith(target.name[9:17])
    monkeypatch.setattr(download, "IMAGENET_SHA256", hashlib.sha256(weights).hexdigest())
    for _ in range(2):
        assert "42 files complete" in world.run("--imagenet", "--data", world.folder)
        assert target.read_bytes() == weights
    assert world.a.asked[target.name] == 3  # twice while it was wrong, once after


def test_synthetic_is_written_mended_and_never_mixed(world):
    folder = Path("data/synthetic")
    assert world.run("--synthetic", 3) == f"{folder}: 8 files complete and verified"
    first, when = tree(folder), (folder / SUMS).stat().st_mtime_ns
    world.run("--synthetic", 3)
    assert (folder / SUMS).stat().st_mtime_ns == when  # what is whole is kept
    next(folder.rglob("*.dat")).write_bytes(b"")
    assert "1 files" in world.refused("--check", "--data", folder)[0]
    assert "8 files" in world.run("--synthetic", 3) and tree(folder) == first
    world.run("--synthetic", 4)
    world.run("--synthetic", 3)
    assert tree(folder) == first and "8 files" in world.run("--check", "--data", folder)
    for _ in range(2):
        message, _ = world.refused("--data", folder)  # PTB-XL does not come into it
        assert "--synthetic N" in message and not world.a.asked
        (folder / SUMS).unlink(missing_ok=True)  # as a killed run leaves it
    put(world.folder, world.files)
    assert "not synthetic" in world.refused("--synthetic", 3, "--data", world.folder)[0]
    assert tree(world.folder) == world.files


def test_demo_is_600_synthetic_records(world, monkeypatch):
    asked = []

    def write_dataset(folder, n, progress):
        asked.append((folder, n))
        put(folder, world.files)

    monkeypatch.setitem(sys.modules, "synthetic", SimpleNamespace(write_dataset=write_dataset))
    assert world.run("--demo") == world.run("--demo", "--check")
    assert asked == [(Path("data/demo"), 600)]


@pytest.mark.parametrize("flags", [["--synthetic", "0"], ["--synthetic", "x"], ["--nonsense"]])
def test_usage_errors(monkeypatch, capsys, flags):
    with pytest.raises(SystemExit) as e:
        run_stage(monkeypatch, "00_download", *flags)
    assert e.value.code == 2 and "usage" in capsys.readouterr().err


@needs_ptbxl
def test_real_records(monkeypatch, capsys):
    run_stage(monkeypatch, "00_download", "--check", "--data", PTBXL)
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"{PTBXL}: 43,600 files complete and verified"
