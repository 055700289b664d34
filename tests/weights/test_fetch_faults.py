"""Everything that can go wrong on the way: nothing wrong is returned, nothing half-written stays.

Each fault is met by the real Hub client (`hub`) and by our downloads from web servers (`url`),
against a server on this machine. After each the same fetch succeeds once the fault is gone.
"""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import random
import resource
import signal
import socket
import time
from pathlib import Path

import pytest
from huggingface_hub import constants
from loopback_hub import COMMIT, Fault, serve

from backbones import weights
from backbones.errors import BackbonesError, CheckpointError, WeightsUnavailableError
from backbones.manifest import WeightsEntry
from backbones.weights.download import http, retrying

CONTENT = random.Random(0).randbytes(300_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
ROADS = ("hub", "url")
fork = multiprocessing.get_context("fork")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that this process's client talks to, with short waits."""
    folder = tmp_path / "served"
    (folder / "me/mine").mkdir(parents=True)
    (folder / "me/mine/weights.pth").write_bytes(CONTENT)
    with serve(folder) as server:
        point_client_at(server.address, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
        monkeypatch.setattr(retrying, "DELAYS", (0.01, 0.02))
        yield server


def entry_of(hub, road, **facts):
    place = (
        {"repo": "me/mine", "file": "weights.pth"}
        if road == "hub"
        else {"url": f"{hub.address}/me/mine/weights.pth"}
    )
    facts = {"sha256": DIGEST, "size": len(CONTENT), **facts}
    return WeightsEntry("toy", "t", "", **place, **facts)


# The empty file by which the client learns which permissions a new file gets.
CLIENTS_PROBE = "tmp_"


def assert_clean(cache, allow=()):
    """No file but whole ones, bookkeeping, and those whose suffix is allowed."""
    allow = tuple(allow)
    for path in cache.rglob("*"):
        name = path.name
        if not path.is_file() or name.endswith(allow) or ".locks" in path.parts:
            continue
        if CLIENTS_PROBE in allow and name.startswith(CLIENTS_PROBE) and not path.stat().st_size:
            continue
        if name.endswith((".lock", "CACHEDIR.TAG", ".etag")) or path.parent.name == "refs":
            continue
        assert hashlib.sha256(path.read_bytes()).hexdigest() == DIGEST, path


def assert_recovers(hub, road, cache):
    hub.fault = None
    path = weights.fetch(entry_of(hub, road), cache_dir=cache)
    assert path.read_bytes() == CONTENT
    assert_clean(cache)
    seen = len(hub.requests)
    assert weights.fetch(entry_of(hub, road), cache_dir=cache) == path
    assert len(hub.requests) == seen, "a cached and verified file needs no network"


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(hub, tmp_path, road, method, status):
    hub.fault = Fault(method, times=1, status=status, headers={"Retry-After": "0"})
    path = weights.fetch(entry_of(hub, road), cache_dir=tmp_path / "cache")
    assert path.read_bytes() == CONTENT
    if road == "hub" or method == "GET":
        assert hub.fault.times == 0


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("status", [500, 503])
def test_a_server_that_stays_busy_is_given_up(hub, tmp_path, road, status):
    hub.fault = Fault("any", status=status)
    with pytest.raises(WeightsUnavailableError, match=f"{status}.*checkpoint_path") as caught:
        weights.fetch(entry_of(hub, road), cache_dir=tmp_path / "cache")
    assert "weights.pth" in str(caught.value)
    assert_clean(tmp_path / "cache")
    assert_recovers(hub, road, tmp_path / "cache")


def test_the_wait_that_the_server_asks_for_is_kept(hub, tmp_path):
    hub.fault = Fault("GET", times=1, status=429, headers={"Retry-After": "1"})
    begin = time.monotonic()
    weights.fetch(entry_of(hub, "url"), cache_dir=tmp_path / "cache")
    assert time.monotonic() - begin >= 1


@pytest.mark.parametrize(
    ("road", "status", "headers", "message"),
    [
        ("hub", 401, {}, "refuses weights.pth of me/mine.*HF_TOKEN"),
        ("hub", 401, {"X-Error-Code": "RepoNotFound"}, "no repository me/mine.*HF_TOKEN"),
        ("hub", 403, {}, "refuses weights.pth of me/mine.*HF_TOKEN"),
        ("hub", 403, {"X-Error-Code": "GatedRepo"}, "gated: accept its terms at .*/me/mine"),
        ("hub", 404, {"X-Error-Code": "RepoNotFound"}, "no repository me/mine"),
        ("hub", 404, {"X-Error-Code": "RevisionNotFound"}, "has no revision"),
        ("hub", 404, {"X-Error-Code": "EntryNotFound"}, "me/mine has no file weights.pth"),
        ("hub", 410, {}, "cannot be had"),
        ("url", 401, {}, "needs a login"),
        ("url", 403, {}, "access is refused"),
        ("url", 404, {}, "no such file any more"),
        ("url", 418, {}, "HTTP status 418"),
    ],
)
def test_refusals_are_explained_at_once(hub, tmp_path, road, status, headers, message):
    hub.fault = Fault("any", status=status, headers=headers)
    with pytest.raises(WeightsUnavailableError, match=message) as caught:
        weights.fetch(entry_of(hub, road), cache_dir=tmp_path / "cache")
    assert "checkpoint_path=" in str(caught.value)
    assert len(hub.requests) == 1
    assert_recovers(hub, road, tmp_path / "cache")


def test_a_token_opens_a_private_repository(hub, tmp_path, monkeypatch):
    hub.token = "hf_secret"
    with pytest.raises(WeightsUnavailableError, match="HF_TOKEN"):
        weights.fetch(entry_of(hub, "hub"), cache_dir=tmp_path / "cache")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert weights.fetch(entry_of(hub, "hub"), cache_dir=tmp_path / "cache").is_file()


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("at", [0, 1, 65_536, 150_000, len(CONTENT) - 1])
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_cut_connection_is_resumed(hub, tmp_path, road, at, reset):
    if road == "hub" and not reset and at not in (0, 150_000):
        pytest.skip("the Hub's client waits a second before it resumes")
    hub.fault = Fault(times=1, cut=at, reset=reset)
    path = weights.fetch(entry_of(hub, road), cache_dir=tmp_path / "cache")
    assert path.read_bytes() == CONTENT
    assert hub.fault.times == 0
    if road == "url" and not reset:
        assert hub.sent < len(CONTENT) + (2 << 16), "what had arrived was fetched again"
    assert_clean(tmp_path / "cache")


@pytest.mark.parametrize("at", [0, 1, 150_000, len(CONTENT) - 1])
def test_what_arrived_is_used_by_a_later_call(hub, tmp_path, at, monkeypatch):
    monkeypatch.setattr(retrying, "DELAYS", ())
    hub.fault = Fault(cut=at)
    with pytest.raises(WeightsUnavailableError, match=f"after {at} of {len(CONTENT)} bytes"):
        weights.fetch(entry_of(hub, "url"), cache_dir=tmp_path / "cache")
    assert_clean(tmp_path / "cache", allow=[".part"])
    hub.sent = 0
    assert_recovers(hub, "url", tmp_path / "cache")
    assert hub.sent < len(CONTENT) - at + (2 << 16)


def test_a_file_that_changed_between_the_parts_is_fetched_whole(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(retrying, "DELAYS", ())
    served = hub.folder / "me/mine/weights.pth"
    served.write_bytes(bytes(len(CONTENT)))
    hub.fault = Fault(cut=100_000)
    unpinned = entry_of(hub, "url", sha256=None, size=None)
    with pytest.raises(WeightsUnavailableError):
        weights.fetch(unpinned, cache_dir=tmp_path / "cache")
    served.write_bytes(CONTENT)
    hub.fault = None
    assert weights.fetch(unpinned, cache_dir=tmp_path / "cache").read_bytes() == CONTENT


@pytest.mark.parametrize("headers", [{"ETag": ""}, {"ETag": 'W/"weak"'}], ids=["none", "weak"])
def test_parts_of_different_files_are_never_joined(hub, tmp_path, monkeypatch, headers):
    monkeypatch.setattr(retrying, "DELAYS", ())
    served = hub.folder / "me/mine/weights.pth"
    for pinned in (True, False):
        facts = {} if pinned else {"sha256": None, "size": None}
        cache = tmp_path / f"cache{pinned}"
        served.write_bytes(bytes(len(CONTENT)))
        hub.fault = Fault(cut=100_000, headers=headers)
        with pytest.raises(WeightsUnavailableError):
            weights.fetch(entry_of(hub, "url", **facts), cache_dir=cache)
        served.write_bytes(CONTENT)
        hub.fault = Fault(headers=headers)
        path = weights.fetch(entry_of(hub, "url", **facts), cache_dir=cache)
        assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("kept", [len(CONTENT), len(CONTENT) + 5])
@pytest.mark.parametrize("known", [True, False])
def test_a_part_file_of_full_length_or_more(hub, tmp_path, kept, known):
    """A process may end between the last byte and the rename."""
    facts = {} if known else {"sha256": None, "size": None}
    entry = entry_of(hub, "url", **facts)
    path = weights.fetch(entry, cache_dir=tmp_path / "cache")
    part = path.with_name(f".{path.name}.part")
    path.unlink()
    part.write_bytes((CONTENT + bytes(5))[:kept])
    part.with_name(part.name + ".etag").write_text(f'"{DIGEST}"')
    hub.sent = 0
    assert weights.fetch(entry, cache_dir=tmp_path / "cache").read_bytes() == CONTENT
    assert not part.exists()
    assert hub.sent == 0 or kept > len(CONTENT), "a whole part file needs no second download"


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("off", [-1000, 1000])
def test_a_wrong_length_is_refused(hub, tmp_path, road, off, monkeypatch):
    monkeypatch.setattr(retrying, "DELAYS", ())
    hub.fault = Fault("any", headers={"Content-Length": str(len(CONTENT) + off)}, cut=len(CONTENT))
    with pytest.raises(CheckpointError, match="announces"):
        weights.fetch(entry_of(hub, road), cache_dir=tmp_path / "cache")
    assert_clean(tmp_path / "cache")
    assert_recovers(hub, road, tmp_path / "cache")


def test_more_than_recorded_is_refused_where_no_length_is_announced(hub, tmp_path):
    more = CONTENT + bytes(50_000_000)
    hub.fault = Fault(
        content=more, headers={"Content-Length": None, "Connection": "close"}, cut=len(more)
    )
    with pytest.raises(CheckpointError, match=f"sends more than {len(CONTENT)} bytes"):
        weights.fetch(entry_of(hub, "url"), cache_dir=tmp_path / "cache")
    assert hub.sent < len(more), "it was read to the end"
    assert_clean(tmp_path / "cache")
    assert_recovers(hub, "url", tmp_path / "cache")


@pytest.mark.parametrize("road", ROADS)
def test_other_content_is_refused(hub, tmp_path, road):
    """The server announces the right file and sends one of the same length."""
    hub.fault = Fault(content=CONTENT[:-1] + b"\0")
    with pytest.raises(CheckpointError, match=f"sha256 [0-9a-f]{{64}}.*{DIGEST}"):
        weights.fetch(entry_of(hub, road), cache_dir=tmp_path / "cache")
    if road == "url":
        assert_clean(tmp_path / "cache")
        assert_recovers(hub, road, tmp_path / "cache")
        return
    # It lies in the Hub's cache, which is the user's: refused as long as it does.
    hub.fault = None
    with pytest.raises(CheckpointError, match=r"weights fetch toy.t --again"):
        weights.fetch(entry_of(hub, road), cache_dir=tmp_path / "cache")
    path = weights.fetch(entry_of(hub, road), cache_dir=tmp_path / "cache", again=True)
    assert path.read_bytes() == CONTENT


def test_the_hubs_own_digest_is_compared_before_the_download(hub, tmp_path):
    with pytest.raises(CheckpointError, match=f"announces sha256 {DIGEST}, recorded is {'0' * 64}"):
        weights.fetch(entry_of(hub, "hub", sha256="0" * 64), cache_dir=tmp_path / "cache")
    assert hub.sent == 0


@pytest.mark.parametrize("road", ROADS)
def test_a_damaged_copy_in_the_cache_is_refused_and_kept(hub, tmp_path, road):
    path = weights.fetch(entry_of(hub, road), cache_dir=tmp_path / "cache")
    damaged = CONTENT[:-1] + b"\0"
    path.resolve().write_bytes(damaged)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=DIGEST) as caught:
            weights.fetch(entry_of(hub, road), cache_dir=tmp_path / "cache")
        assert hashlib.sha256(damaged).hexdigest() in str(caught.value)
        assert path.read_bytes() == damaged
    weights.fetch(entry_of(hub, road), cache_dir=tmp_path / "cache", again=True)
    assert_recovers(hub, road, tmp_path / "cache")


def test_a_failed_second_download_leaves_the_first_file(hub, tmp_path):
    path = weights.fetch(entry_of(hub, "url"), cache_dir=tmp_path / "cache")
    hub.fault = Fault(status=404)
    with pytest.raises(WeightsUnavailableError):
        weights.fetch(entry_of(hub, "url"), cache_dir=tmp_path / "cache", again=True)
    assert path.read_bytes() == CONTENT


def test_a_slow_drip_is_given_up(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(http, "PATIENCE", 0.2)
    monkeypatch.setattr(retrying, "DELAYS", (0.01,))
    hub.fault = Fault(drip=0.02)
    with pytest.raises(WeightsUnavailableError, match="fewer than 1024 bytes per second"):
        weights.fetch(entry_of(hub, "url"), cache_dir=tmp_path / "cache")
    assert_clean(tmp_path / "cache", allow=[".part"])
    assert_recovers(hub, "url", tmp_path / "cache")


@pytest.mark.parametrize("road", ROADS)
def test_a_server_that_falls_silent_is_given_up(hub, tmp_path, road, monkeypatch):
    monkeypatch.setattr(retrying, "DELAYS", ())
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    hub.fault = Fault("any", drip=3.0, piece=1000, status=None)
    with pytest.raises(WeightsUnavailableError, match="timed out"):
        weights.fetch(entry_of(hub, road), cache_dir=tmp_path / "cache")
    assert_clean(tmp_path / "cache", allow=[".part"])
    assert_recovers(hub, road, tmp_path / "cache")


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_redirect_loop_ends(hub, tmp_path, road, method, monkeypatch):
    monkeypatch.setattr(retrying, "DELAYS", ())
    if road == "url" and method == "HEAD":
        pytest.skip("web servers are asked by GET only")
    place = "me/mine/resolve/main/weights.pth" if road == "hub" else "me/mine/weights.pth"
    hub.fault = Fault(method, redirect=f"{hub.address}/{place}")
    with pytest.raises(WeightsUnavailableError, match=r"(?i)redirect"):
        weights.fetch(entry_of(hub, road), cache_dir=tmp_path / "cache")
    assert len(hub.requests) < 100
    assert_clean(tmp_path / "cache")
    assert_recovers(hub, road, tmp_path / "cache")


def test_redirects_to_other_protocols_are_refused(hub, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(CONTENT)
    hub.fault = Fault(redirect=secret.as_uri())
    with pytest.raises(WeightsUnavailableError):
        weights.fetch(entry_of(hub, "url"), cache_dir=tmp_path / "cache")
    with pytest.raises(WeightsUnavailableError, match="no http or https"):
        entry = WeightsEntry("toy", "t", "", url=secret.as_uri())
        weights.fetch(entry, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize(
    "headers",
    [
        {"ETag": '"../../../evil"'},
        {"ETag": ""},
        {"ETag": '"' + "x" * 5000 + '"'},
        {"X-Linked-Etag": "a/b"},
        {"X-Repo-Commit": "../../x"},
    ],
    ids=["path", "empty", "long", "linked", "commit"],
)
def test_corrupt_headers_name_no_file(hub, tmp_path, road, headers):
    cache = tmp_path / "outer/inner/cache"
    hub.fault = Fault("any", headers=headers)
    if road == "url":
        assert weights.fetch(entry_of(hub, road), cache_dir=cache).read_bytes() == CONTENT
        return
    with pytest.raises(WeightsUnavailableError, match="HF_ENDPOINT|ETag|etag"):
        weights.fetch(entry_of(hub, road, sha256=None), cache_dir=cache)
    assert [p for p in (tmp_path / "outer").rglob("*") if p.is_file()] == []
    assert_recovers(hub, road, cache)


@pytest.mark.parametrize("road", ROADS)
def test_more_than_fits_on_the_disk_is_refused_beforehand(hub, tmp_path, road):
    hub.fault = Fault("any", headers={"Content-Length": str(1 << 60)}, cut=1000)
    with pytest.raises(WeightsUnavailableError, match="make room"):
        weights.fetch(entry_of(hub, road, size=None), cache_dir=tmp_path / "cache")
    assert_clean(tmp_path / "cache")
    assert_recovers(hub, road, tmp_path / "cache")


@pytest.mark.parametrize("road", ROADS)
def test_a_full_disk_is_left_as_it_was(hub, tmp_path, road):
    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    message = in_child(lambda: fetch_or_error(hub, road, tmp_path / "cache"), limited)
    assert "WeightsUnavailableError" in message
    assert "full" in message
    assert str(tmp_path / "cache") in message
    assert_clean(tmp_path / "cache")
    assert_recovers(hub, road, tmp_path / "cache")


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("place", ["file", "/proc/nowhere"])
def test_a_cache_that_cannot_be_written(hub, tmp_path, road, place):
    cache = Path(place)
    if place == "file":
        cache = tmp_path / "file"
        cache.write_text("in the way")
    with pytest.raises(WeightsUnavailableError, match=str(cache)) as caught:
        weights.fetch(entry_of(hub, road), cache_dir=cache / "sub")
    assert "cache_dir=" in str(caught.value)


@pytest.mark.parametrize("road", ROADS)
def test_eight_processes_at_once(hub, tmp_path, road):
    hub.fault = Fault("GET", drip=0.02, piece=30_000)
    queue = fork.Queue()
    workers = [
        fork.Process(target=lambda: queue.put(fetch_or_error(hub, road, tmp_path / "cache")))
        for _ in range(8)
    ]
    for worker in workers:
        worker.start()
    answers = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert answers == [DIGEST] * 8
    assert sum(line.startswith("GET") for line in hub.requests) == 1, "one download is enough"
    assert_recovers(hub, road, tmp_path / "cache")


@pytest.mark.parametrize("road", ROADS)
def test_killed_at_twenty_random_moments(hub, tmp_path, road):
    """The file is there whole or not at all, whenever the process ends."""
    hub.fault = Fault("GET", drip=0.05, piece=30_000)
    moments = random.Random(1)
    caches = [tmp_path / "cache" / str(i // 4) for i in range(20)]  # four in a row share one
    halfway = 0
    for i, cache in enumerate(caches):
        sent = hub.sent
        worker = fork.Process(target=lambda c=cache: fetch_or_error(hub, road, c))
        worker.start()
        if i % 2:
            time.sleep(moments.uniform(0, 0.5))
        else:  # a place in the file instead of a time: no machine is too quick or too slow for it
            place = sent + 30_000 * moments.randrange(1, 7)
            while hub.sent < place and worker.is_alive():
                time.sleep(0.001)
        worker.kill()
        worker.join()
        halfway += 0 < hub.sent - sent < len(CONTENT)
        copy = weights.local_copy(entry_of(hub, road), cache)
        assert copy is None or copy.read_bytes() == CONTENT
        assert_clean(cache, allow=[".part", ".incomplete", CLIENTS_PROBE])
    assert halfway, "no process was killed during its download"
    hub.fault = None
    for cache in dict.fromkeys(caches):
        path = weights.fetch(entry_of(hub, road), cache_dir=cache)
        assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("road", ROADS)
def test_no_connection(hub, tmp_path, road, monkeypatch):
    point_client_at("http://127.0.0.1:9", monkeypatch)
    entry = entry_of(hub, road)
    if road == "url":
        entry = WeightsEntry("toy", "t", "", url="http://127.0.0.1:9/weights.pth")
    with pytest.raises(WeightsUnavailableError, match=r"(?i)connection"):
        weights.fetch(entry, cache_dir=tmp_path / "cache")
    assert_clean(tmp_path / "cache")


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), 1),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), 1),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), 1),
        (OSError(errno.EHOSTUNREACH, "No route to host"), 1),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), 3),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), 3),
    ],
)
def test_without_a_way_to_the_server_there_is_no_waiting(
    hub, tmp_path, road, error, attempts, monkeypatch
):
    """What the system's own calls raise where there is no network, met by both clients."""
    tried = []

    def refuse(*address, **options):
        tried.append(address)
        raise error

    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(WeightsUnavailableError, match=rf"{error.strerror}.*check the connection"):
        weights.fetch(entry_of(hub, road), cache_dir=tmp_path / "cache")
    assert len(tried) == attempts
    assert_clean(tmp_path / "cache")


@pytest.mark.parametrize("road", ROADS)
def test_offline(hub, tmp_path, road, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsUnavailableError, match="HF_HUB_OFFLINE"):
        weights.fetch(entry_of(hub, road), cache_dir=tmp_path / "cache")
    assert hub.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    unpinned = entry_of(hub, road, sha256=None, size=None)
    path = weights.fetch(unpinned, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert weights.fetch(unpinned, cache_dir=tmp_path / "cache") == path


def test_an_unpinned_cached_file_serves_while_the_hub_is_down(hub, tmp_path):
    unpinned = entry_of(hub, "hub", sha256=None, size=None)
    path = weights.fetch(unpinned, cache_dir=tmp_path / "cache")
    hub.fault = Fault("any", status=503)
    assert weights.fetch(unpinned, cache_dir=tmp_path / "cache") == path


def test_the_revision_is_the_recorded_one(hub, tmp_path):
    weights.fetch(entry_of(hub, "hub", revision=COMMIT), cache_dir=tmp_path / "cache")
    assert all(f"/resolve/{COMMIT}/" in line for line in hub.requests)


def point_client_at(address, monkeypatch):
    """Do what HF_ENDPOINT does when the client is imported."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)


def fetch_or_error(hub, road, cache):
    try:
        path = weights.fetch(entry_of(hub, road), cache_dir=cache)
    except BackbonesError as error:
        return f"{type(error).__name__} {error}"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def in_child(action, prepare):
    queue = fork.SimpleQueue()

    def child():
        prepare()
        queue.put(action())

    worker = fork.Process(target=child)
    worker.start()
    worker.join(timeout=60)
    assert worker.exitcode == 0
    return queue.get()
