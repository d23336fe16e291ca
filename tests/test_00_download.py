"""Tests of 00_download.py against web servers on 127.0.0.1 that fail on purpose; no other network is touched.

The slow one (10,000 files) runs with `-m slow`. `PTBXL_DIR=folder` adds a check of the real records.
"""
import base64
import hashlib
import importlib.util
import json
import ntpath
import os
import platform
import posixpath
import random
import resource
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
import types
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import PTBXL, ROOT, needs_ptbxl

SPEC = importlib.util.spec_from_file_location("stage_download", ROOT / "00_download.py")
stage = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(stage)


# ---------------------------------------------------------------------------------------------------------------------
# A small PTB-XL, and a server that gives it with scripted faults

def sums_of(files):
    return "".join(f"{hashlib.sha256(body).hexdigest()} {name}\n" for name, body in files.items()).encode()


def data_set(pairs, size=2400):
    """{name: bytes} in the shape of PTB-XL, with files in SHA256SUMS.txt that this project does not fetch."""
    rng = random.Random(7)
    wanted = {"ptbxl_database.csv": rng.randbytes(9000), "scp_statements.csv": rng.randbytes(900)}
    for i in range(1, pairs + 1):
        name = f"records100/{i // 100 * 100:05d}/{i:05d}_lr"
        wanted |= {f"{name}.dat": rng.randbytes(size), f"{name}.hea": rng.randbytes(60)}
    others = {"LICENSE.txt": b"CC BY", "RECORDS": b"x", "records500/00000/00001_hr.dat": b"y"}
    return {"SHA256SUMS.txt": sums_of({**others, **wanted}), **wanted}


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
        body = server.files.get(name)
        if body is None:
            fault = 404
        if isinstance(fault, int):
            self.send_response(fault)
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"sorry")
            return
        if fault == "drop":
            self.close_connection = True
            return
        if fault == "flip":
            body = bytes([body[0] ^ 1]) + body[1:]
        self.send_response(200)
        if fault == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
            return
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault in ("short", "stall", "trickle"):
            self.wfile.write(body[:len(body) // 2])
            self.close_connection = True
            if fault == "stall":
                server.closing.wait(4)
            for i in range(len(body) // 2, len(body)) if fault == "trickle" else ():
                try:
                    self.wfile.write(body[i:i + 1])
                except OSError:  # the client has had enough
                    return
                if server.closing.wait(0.01):
                    return
        else:
            self.wfile.write(body)


class Server(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 64

    def __init__(self, files, tls=None):
        super().__init__(("127.0.0.1", 0), Handler)
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_side=True)
        self.files, self.faults, self.always, self.delay = dict(files), {}, iter(()), 0
        self.asked, self.connections, self.lock, self.closing = Counter(), 0, threading.Lock(), threading.Event()
        self.base = f"http{'s' if tls else ''}://127.0.0.1:{self.server_address[1]}/base/"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def handle_error(self, *args):  # clients that hang up are part of the tests
        pass

    def stop(self):
        self.closing.set()
        self.shutdown()
        self.server_close()


@pytest.fixture
def world(tmp_path, monkeypatch, capsys):
    """Two mirrors of a data set of 20 records, the stage with short waits, and a way to run a command."""
    w = types.SimpleNamespace(files=data_set(20), folder=tmp_path / "data" / "ptbxl")
    w.a, w.b = Server(w.files), Server(w.files)

    def use(files):
        w.files = w.a.files = w.b.files = files
        monkeypatch.setattr(stage, "FILES", len(files) - 1)

    def command(*argv):
        monkeypatch.setattr(sys, "argv", ["00_download.py", *map(str, argv)])
        try:
            stage.main()
            code = 0
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        return types.SimpleNamespace(ok=code == 0, message=str(code), out=out, err=err,
                                     last=(out.splitlines() or [""])[-1])

    w.use, w.command, w.download = use, command, lambda: command("--data", w.folder)
    use(w.files)
    monkeypatch.chdir(tmp_path)
    for name, value in dict(MIRRORS=[w.a.base, w.b.base], PAUSE=0.01, TIMEOUT=3).items():
        monkeypatch.setattr(stage, name, value)
    yield w
    w.a.stop()
    w.b.stop()


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def put(folder, files):
    for name, body in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)


RECORD = "records100/00000/00007_lr.dat"


# ---------------------------------------------------------------------------------------------------------------------
# Fetching

def test_download_is_complete_and_byte_identical(world):
    run = world.download()
    assert run.ok and tree(world.folder) == world.files
    assert run.last == f"{world.folder}: 42 files complete and verified" and "CC BY 4.0" in run.out
    assert set(world.a.asked.values()) == {1} and not world.b.asked
    assert set(world.a.asked) == set(world.files)  # nothing that this project does not use


def test_connections_are_kept_alive(world):
    world.use(data_set(150, size=100))
    assert world.download().ok
    assert sum(world.a.asked.values()) == 303 and world.a.connections <= stage.CONNECTIONS + 1


@pytest.mark.parametrize("name", [RECORD, "SHA256SUMS.txt"])
@pytest.mark.parametrize("fault", ["drop", 500, 503, 429, 408, "short"])
def test_fault_that_passes_is_tried_again(world, fault, name):
    world.a.faults[name] = iter([fault, fault])
    assert world.download().ok and tree(world.folder) == world.files
    assert world.a.asked[name] == 3 and not world.b.asked


@pytest.mark.parametrize("fault", ["stall", "trickle"])
def test_stall_is_given_up_and_tried_again(world, monkeypatch, fault):
    monkeypatch.setattr(stage, "TIMEOUT", 0.3)
    world.a.faults["scp_statements.csv"] = iter([fault])
    start = time.monotonic()
    assert world.download().ok and tree(world.folder) == world.files
    assert world.a.asked["scp_statements.csv"] >= 2 and time.monotonic() - start < 2.5  # the server would wait longer


def test_wrong_checksum_is_fetched_again_then_from_the_other_mirror(world):
    other = RECORD.replace("dat", "hea")
    world.a.faults = {RECORD: iter(["flip"]), other: repeat("flip")}
    assert world.download().ok and tree(world.folder) == world.files
    assert world.a.asked[RECORD] == 2 and world.a.asked[other] == 2
    assert world.b.asked == {other: 1}


def test_file_that_the_first_mirror_does_not_have(world):
    world.a.faults = {RECORD: repeat(404), "SHA256SUMS.txt": repeat(403)}
    assert world.download().ok and tree(world.folder) == world.files
    assert world.a.asked[RECORD] == 1 and world.b.asked == {RECORD: 1, "SHA256SUMS.txt": 1}


def test_answer_without_a_length(world):
    world.a.always = repeat("chunked")
    assert world.download().ok and tree(world.folder) == world.files and not world.b.asked


def test_dead_first_mirror_costs_each_connection_its_tries_only_once(world, monkeypatch):
    monkeypatch.setattr(stage, "CONNECTIONS", 4)
    world.a.always = repeat(503)
    assert world.download().ok and tree(world.folder) == world.files
    assert sum(world.a.asked.values()) <= (4 + 1) * stage.TRIES


def test_every_failure_is_reported(world):
    bad = [n for n in world.files if n.endswith(".hea")][:13]
    for server in (world.a, world.b):
        server.faults = {name: repeat(404) for name in bad}
    run = world.download()
    assert not run.ok and "13 of 42 files could not be fetched" in run.message and "\n" not in run.message
    named = [line for line in run.err.splitlines() if line.startswith("failed: ")]
    assert len(named) == 10 and all(line.split()[1] in bad and "HTTP 404" in line for line in named)
    assert tree(world.folder) == {n: b for n, b in world.files.items() if n not in bad}
    assert "complete" not in run.out
    world.a.faults.clear()
    assert world.download().ok and tree(world.folder) == world.files


def test_file_altered_on_both_mirrors_is_never_written(world):
    world.a.faults, world.b.faults = {RECORD: repeat("flip")}, {RECORD: repeat("flip")}
    run = world.download()
    assert not run.ok and "wrong checksum" in run.err and "delete SHA256SUMS.txt" in run.message
    assert not (world.folder / RECORD).exists()


def test_network_that_goes_away_ends_the_run(world, monkeypatch):
    monkeypatch.setattr(stage, "GIVE_UP", 5)
    monkeypatch.setattr(stage, "CONNECTIONS", 2)
    world.use(data_set(100, size=10))
    for server in (world.a, world.b):
        server.faults["SHA256SUMS.txt"], server.always = iter(()), repeat("drop")
    run = world.download()
    assert not run.ok and "5 of 202 files could not be fetched (197 were not tried)" in run.message
    assert len(world.a.asked) < 20


# ---------------------------------------------------------------------------------------------------------------------
# Interruption and resuming

def test_resume_fetches_only_what_is_missing_or_altered(world):
    (cut, flipped, gone), kept = [n for n in world.files if n.endswith(".dat")][:3], "records100/00000/00009_lr.dat"
    put(world.folder, world.files)
    (world.folder / cut).write_bytes(world.files[cut][:100])
    (world.folder / flipped).write_bytes(world.files[kept])
    (world.folder / gone).unlink()
    leftover, mine = (world.folder / cut).with_name(f".7_lr.dat.99999999@{platform.node()}.tmp"), ".notes.tmp"
    leftover.write_bytes(b"half")
    (world.folder / mine).write_bytes(b"of somebody else")
    assert world.download().ok and tree(world.folder) == {**world.files, mine: b"of somebody else"}
    assert world.a.asked == {cut: 1, flipped: 1, gone: 1}


def test_folder_of_somebody_else_needs_no_network(world):
    partial = {n: b for n, b in world.files.items() if n != "SHA256SUMS.txt"}
    for sums in (world.files["SHA256SUMS.txt"],  # PhysioNet's list; one of the 100 Hz files; one by sha256sum, Windows
                 sums_of(partial),
                 b"\r\n".join(b"%b *./%b" % tuple(line.split()) for line in sums_of(partial).splitlines())):
        put(world.folder, {**partial, "SHA256SUMS.txt": sums, "records100/index.html": b"wget", "notes.txt": b"mine"})
        for run in (world.download(), world.command("--check", "--data", world.folder)):
            assert run.ok and run.last == f"{world.folder}: 42 files complete and verified"
    assert not world.a.asked and not world.b.asked


DRIVER = """
import importlib.util, json, os, pathlib, sys, time
sys.path.insert(0, {root!r})
spec = importlib.util.spec_from_file_location("stage_download", {root!r} + "/00_download.py")
stage = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stage)
def slowly(path, body):  # so that kills meet half-written files
    with open(path, "wb", buffering=0) as f:
        f.write(body[:len(body) // 2])
        time.sleep(0.01)
        f.write(body[len(body) // 2:])
pathlib.Path.write_bytes = slowly
print("ready", flush=True)
for line in sys.stdin:  # each line starts one run of the stage in a fork: the imports are paid for once
    order = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(2, 1)
        vars(stage).update(order["constants"])
        sys.argv = ["00_download.py", *order["argv"]]
        stage.common.run(stage.main)
        sys.exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """Runs the stage in a process of its own: start(constants, *argv) -> its pid, status() waits, output() so far."""
    err = tmp_path_factory.mktemp("driver") / "stderr"
    with open(err, "w") as stderr:
        process = subprocess.Popen([sys.executable, "-c", DRIVER.format(root=str(ROOT))], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=stderr, text=True)

    def start(constants, *argv):
        process.stdin.write(json.dumps({"constants": constants, "argv": argv}) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    assert process.stdout.readline() == "ready\n"
    yield types.SimpleNamespace(start=start, status=lambda: int(process.stdout.readline()), output=err.read_text)
    process.stdin.close()
    process.wait(10)


def test_killed_at_any_moment_and_resumed(world, driver):
    world.use(data_set(120))
    world.a.delay = 0.01
    constants = dict(MIRRORS=[world.a.base], FILES=stage.FILES, CONNECTIONS=4)
    rng, met = random.Random(), []
    for kills in range(100):
        if kills >= 8 and met:
            break
        before = set(tree(world.folder)) if world.folder.exists() else set()
        if set(world.files) <= before:  # nothing left to fetch: begin again
            shutil.rmtree(world.folder)
            before = set()
        world.a.asked.clear()
        pid = driver.start(constants, "--data", str(world.folder))
        time.sleep(rng.uniform(0.02, 0.4))
        os.kill(pid, signal.SIGKILL)
        driver.status()
        now = tree(world.folder) if world.folder.exists() else {}
        met += [n for n in now if n.endswith(".tmp")]
        assert all(body == world.files[n] for n, body in now.items() if not n.endswith(".tmp"))
        assert not before & set(world.a.asked)  # what was whole is not fetched again
    assert met  # at least one kill left a half-written file behind
    assert world.download().ok and tree(world.folder) == world.files


def test_ctrl_c_does_not_wait_for_a_stalled_server(world, driver):
    world.a.faults["SHA256SUMS.txt"], world.a.always = iter(()), repeat("stall")
    pid = driver.start(dict(MIRRORS=[world.a.base], FILES=stage.FILES, TIMEOUT=30), "--data", str(world.folder))
    deadline = time.monotonic() + 90
    while len(world.a.asked) < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(pid, signal.SIGINT)
    start = time.monotonic()
    assert driver.status() == 1 and time.monotonic() - start < 10  # the server stalls for 30
    assert "run the same command again" in driver.output().splitlines()[-1] and "Traceback" not in driver.output()


@pytest.mark.parametrize("number, text", [(28, "No space left on device"), (13, "Permission denied")])
def test_folder_that_cannot_be_written(world, monkeypatch, number, text):
    write = Path.write_bytes

    def full(path, body):
        if "00007" in path.name:
            raise OSError(number, text, str(path))
        return write(path, body)

    monkeypatch.setattr(Path, "write_bytes", full)
    run = world.download()
    assert not run.ok and text in run.message and "\n" not in run.message and not list(world.folder.rglob("*.tmp"))
    monkeypatch.undo()
    assert all(world.files[n] == b for n, b in tree(world.folder).items())


# ---------------------------------------------------------------------------------------------------------------------
# SHA256SUMS.txt and --check

HOSTILE = ["/etc/passwd", "../../x", "records100/../../x", "records100/../x", "records100\\..\\x", "..", ".", "~/x y",
           "records100//x", "records100/./x", "C:/x", "C:x", "records100/a\0b", "records100/.ssh", "records100/x?y#z",
           "http://host/x"]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused(world, name):
    good = world.files["SHA256SUMS.txt"]
    world.use({**world.files, "SHA256SUMS.txt": good + f"{'0' * 64} {name}\n".encode()})
    number = good.count(b"\n") + 1
    for run in (world.download(), world.command("--check", "--data", world.folder)):
        assert not run.ok and f"line {number} is not a checksum and a name inside the folder" in run.message
    assert set(world.a.asked) == {"SHA256SUMS.txt"} and set(tree(world.folder)) == {"SHA256SUMS.txt"}


@given(st.text(alphabet=st.sampled_from("ab./\\:~ \0\n\r-_*é\u2028"), max_size=12))
@settings(max_examples=400, deadline=None)
def test_an_accepted_name_stays_inside_the_folder(name):
    match = stage.LINE.fullmatch(f"{'0' * 64} {name}")
    if match:
        for path, root in ((posixpath, "/f"), (ntpath, "C:\\f")):
            assert path.normpath(path.join(root, match[2])).startswith(root + path.sep)


@pytest.mark.parametrize("damage, sentence", [
    (lambda s: s[:-30], "line 45 is not a checksum"),
    (lambda s: s.replace(b" ptbxl_database.csv", b" other.csv"), "does not list the two tables"),
    (lambda s: b"\n".join(s.splitlines()[:5]), "does not list the two tables"),
    (lambda s: b"<html>", "line 1 is not a checksum"),
    (lambda s: b"", "does not list"),
    (lambda s: b"\xff\xfe", "decode"),
    (lambda s: b"\n".join(s.splitlines()[:-1]), "lists 41 files where PTB-XL v1.0.3 has 42")])
def test_damaged_list(world, damage, sentence):
    world.use({**world.files, "SHA256SUMS.txt": damage(world.files["SHA256SUMS.txt"])})
    run = world.download()
    assert not run.ok and sentence in run.message and "delete" in run.message and "\n" not in run.message
    assert set(world.a.asked) == {"SHA256SUMS.txt"}


def test_check_finds_missing_extra_truncated_and_altered(world):
    put(world.folder, world.files)
    world.use(world.files)
    names = [n for n in world.files if n.endswith(".dat")][:4]
    (world.folder / names[0]).unlink()
    (world.folder / names[1]).write_bytes(world.files[names[1]][:-1])
    (world.folder / names[2]).write_bytes(world.files[names[2]][:-1] + bytes([world.files[names[2]][-1] ^ 1]))
    (world.folder / names[3]).write_bytes(b"")
    (world.folder / "scp_statements.csv").write_bytes(b"")
    (world.folder / "records100/99000").mkdir()
    (world.folder / "records100/99000/99999_lr.dat").write_bytes(b"")
    before = tree(world.folder)
    run = world.command("--check", "--data", world.folder)
    assert set(run.out.splitlines()) == {
        f"missing: {names[0]}", f"truncated or altered: {names[1]}", f"truncated or altered: {names[2]}",
        f"truncated or altered: {names[3]}", "truncated or altered: scp_statements.csv",
        "extra: records100/99000/99999_lr.dat"}
    assert not run.ok and "1 missing, 4 truncated or altered, 1 extra" in run.message and "\n" not in run.message
    assert tree(world.folder) == before and not world.a.asked


def test_check_lists_ten_names_and_counts_the_rest(world):
    put(world.folder, {n: b for n, b in world.files.items() if not n.endswith(".hea")})
    run = world.command("--check", "--data", world.folder)
    assert len(run.out.splitlines()) == 11 and "missing: and 10 more" in run.out and "20 missing" in run.message


def test_check_without_a_list_fetches_nothing(world):
    put(world.folder, {n: b for n, b in world.files.items() if n != "SHA256SUMS.txt"})
    run = world.command("--check", "--data", world.folder)
    assert not run.ok and "SHA256SUMS.txt is missing" in run.message and "\n" not in run.message and not world.a.asked


def test_another_data_set_is_left_alone(world):
    small = {n: b for n, b in world.files.items() if n in stage.TABLES or n == RECORD}
    put(world.folder, {**small, "SHA256SUMS.txt": sums_of(small)})
    run = world.command("--check", "--data", world.folder)
    assert run.ok and run.last == (f"{world.folder}: 3 files complete and verified "
                                   "(PTB-XL has 42: this is a synthetic set or a part)")
    run = world.download()
    assert not run.ok and "lists 3 files where PTB-XL v1.0.3 has 42" in run.message and not world.a.asked


# ---------------------------------------------------------------------------------------------------------------------
# https

@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate for the address 127.0.0.1."""
    if not shutil.which("openssl"):
        pytest.skip("needs the openssl command")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-keyout", path, "-out", path.with_suffix(".crt"), "-days", "2", "-subj", "/CN=test",
                    "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + path.with_suffix(".crt").read_bytes())
    return path


@pytest.mark.parametrize("trusted", [False, True])
def test_certificates_are_checked(world, monkeypatch, certificate, trusted):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = Server(world.files, context)
    monkeypatch.setattr(stage, "MIRRORS", [server.base])
    if trusted:
        monkeypatch.setattr(stage, "TLS", ssl.create_default_context(cafile=certificate))
    run = world.download()
    if trusted:
        assert run.ok and tree(world.folder) == world.files
        # the right certificate, but for another name than the one that was asked for
        monkeypatch.setattr(stage, "MIRRORS", [server.base.replace("127.0.0.1", "localhost")])
        (world.folder / RECORD).unlink()
        run = world.download()
    server.stop()
    assert not run.ok and "CERTIFICATE_VERIFY_FAILED" in run.err and not (world.folder / RECORD).exists()


def test_only_https_leaves_this_machine(monkeypatch):
    assert stage.TLS.verify_mode == ssl.CERT_REQUIRED and stage.TLS.check_hostname
    assert all(url.startswith("https://") for url in [*stage.MIRRORS, stage.IMAGENET_URL])
    for url in ("http://physionet.org/x", "ftp://physionet.org/x", "file:///x", "http://127.0.0.1.example.org"):
        with pytest.raises(stage.Refused):
            stage.connect(urlsplit(url))
    for name in ("https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    connection = stage.connect(urlsplit(stage.MIRRORS[0]))
    assert connection.host == "physionet-open.s3.amazonaws.com" and connection._context is stage.TLS
    monkeypatch.setenv("https_proxy", "http://proxy.example.org:3128")
    connection = stage.connect(urlsplit(stage.MIRRORS[1]))
    assert (connection.host, connection.port, connection._tunnel_host) == ("proxy.example.org", 3128, "physionet.org")
    assert connection._context is stage.TLS
    assert not connection._tunnel_headers
    monkeypatch.setenv("https_proxy", "http://some%40one:pass:word@proxy.example.org:3128")
    connection = stage.connect(urlsplit(stage.MIRRORS[1]))
    kind, login = connection._tunnel_headers["Proxy-Authorization"].split()
    assert connection.host == "proxy.example.org" and kind == "Basic"
    assert base64.b64decode(login) == b"some@one:pass:word"
    monkeypatch.setenv("https_proxy", "http://proxy.example.org:80a")
    with pytest.raises(stage.Refused, match="80a"):
        stage.connect(urlsplit(stage.MIRRORS[1]))
    monkeypatch.setenv("no_proxy", "physionet.org")
    assert stage.connect(urlsplit(stage.MIRRORS[1])).host == "physionet.org"


# ---------------------------------------------------------------------------------------------------------------------
# --imagenet, --synthetic, --demo, the command line

def test_imagenet(world, monkeypatch):
    weights = random.Random(1).randbytes(200_000)
    target = world.folder.parent / "resnet18-f37072fd.pth"
    world.a.files = {**world.files, target.name: weights}
    monkeypatch.setattr(stage, "IMAGENET_URL", world.a.base + target.name)
    run = world.command("--imagenet", "--data", world.folder)
    assert not run.ok and "wrong checksum" in run.err and not target.exists()  # these are not torchvision's weights
    monkeypatch.setattr(stage, "IMAGENET_SHA256", hashlib.sha256(weights).hexdigest())
    for _ in range(2):
        run = world.command("--imagenet", "--data", world.folder)
        assert run.ok and target.read_bytes() == weights and run.last.endswith("42 files complete and verified")
    assert world.a.asked[target.name] == 3  # twice while it was wrong, once after


def test_imagenet_constants_are_those_of_common():
    name = stage.IMAGENET_URL.rpartition("/")[2]
    assert stage.common.IMAGENET == name and name[9:17] == stage.IMAGENET_SHA256[:8]


def test_synthetic_writes_keeps_and_mends(world):
    folder = Path("data/synthetic")
    run = world.command("--synthetic", 3)
    assert run.ok and run.last.startswith("data/synthetic: 8 files complete and verified (PTB-XL has")
    first = tree(folder)
    run = world.command("--synthetic", 3, "--seed", 5)
    assert run.ok and "is kept" in run.out and tree(folder) == first
    next(folder.rglob("*.dat")).write_bytes(b"")
    run = world.command("--synthetic", 3)
    assert run.ok and "is kept" not in run.out and tree(folder) == first
    assert world.command("--synthetic", 4).ok and world.command("--synthetic", 3).ok and tree(folder) == first
    assert world.command("--check", "--data", folder).ok
    assert not world.a.asked


def test_remedy_for_a_synthetic_set_is_never_to_fetch_ptbxl(world):
    folder = Path("data/synthetic")
    run = world.command("--check", "--synthetic", 3)  # there is none
    assert not run.ok and "`python 00_download.py --data data/synthetic --synthetic 3`" in run.message
    assert world.command("--synthetic", 3).ok
    (folder / "SHA256SUMS.txt").unlink()  # as a killed run leaves it
    before = tree(folder)
    run = world.command("--data", folder)  # what 01 says to do
    assert not run.ok and f"--data {folder} --synthetic N" in run.message and tree(folder) == before
    assert not world.a.asked and not world.b.asked


def test_full_disk_that_numpy_does_not_name_is_one_sentence(world, monkeypatch):
    def full(*_, **__):
        raise OSError("12000 requested and 0 written")  # without an errno

    import wfdb
    with monkeypatch.context() as patch:
        patch.setattr(wfdb, "wrsamp", full)
        run = world.command("--synthetic", 3)
    assert not run.ok and "data/synthetic cannot be written" in run.message and "\n" not in run.message
    assert world.command("--synthetic", 3).ok


def test_synthetic_leaves_real_records_alone(world):
    put(world.folder, world.files)
    run = world.command("--synthetic", 3, "--data", world.folder)
    assert not run.ok and "other than synthetic" in run.message and tree(world.folder) == world.files


def test_demo_is_600_synthetic_records(world, monkeypatch):
    asked = []

    def write_dataset(folder, n, seed, progress):
        files = {"ptbxl_database.csv": b"SYNTHETIC", "scp_statements.csv": b""}
        files |= {f"records100/00000/{i:05d}_lr.{end}": b"" for i in range(n) for end in ("dat", "hea")}
        put(folder, {**files, "SHA256SUMS.txt": sums_of(files)})
        asked.append((folder, n))

    monkeypatch.setitem(sys.modules, "synthetic", types.SimpleNamespace(write_dataset=write_dataset))
    for _ in range(2):
        run = world.command("--demo")
        assert run.ok and run.last.startswith("data/demo: 1,202 files complete and verified")
    assert asked == [(Path("data/demo"), 600)] and "is kept" in run.out
    Path("data/demo/SHA256SUMS.txt").unlink()  # as when it was interrupted
    assert world.command("--demo").ok and len(asked) == 2
    assert world.command("--synthetic").ok and asked[2] == (Path("data/synthetic"), 600)


def test_help_and_usage_errors(capsys, monkeypatch):
    done = subprocess.run([sys.executable, ROOT / "00_download.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    for text in ("--check", "--imagenet", "--synthetic", "--data", "Last line", "minutes"):
        assert text in done.stdout
    for argv in (["--synthetic", "0"], ["--synthetic", "many"], ["--nonsense"], ["--check", "--imagenet"]):
        monkeypatch.setattr(sys, "argv", ["00_download.py", *argv])
        with pytest.raises(SystemExit) as e:
            stage.main()
        assert e.value.code == 2 and "usage" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Size

@pytest.mark.slow
def test_ten_thousand_files_in_bounded_memory_and_handles(world):
    world.use(data_set(5000, size=20))
    seen, done = [], threading.Event()

    def watch():
        while not done.wait(0.05):
            seen.append((len(os.listdir("/proc/self/fd")), threading.active_count()))

    start = len(os.listdir("/proc/self/fd")), threading.active_count()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run = world.download()
    finally:
        done.set()
        watcher.join()
    assert run.ok and tree(world.folder) == world.files
    # The server is in this process too: two sockets and two threads for each connection, a few files being written.
    assert max(s[0] for s in seen) - start[0] <= 4 * stage.CONNECTIONS
    assert max(s[1] for s in seen) - start[1] <= 2 * stage.CONNECTIONS + 12
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 60_000  # kB


@needs_ptbxl
def test_real_records(world, monkeypatch):
    monkeypatch.setattr(stage, "FILES", 43_600)
    run = world.command("--check", "--data", PTBXL)
    assert run.ok and run.last == f"{PTBXL}: 43,600 files complete and verified"
