"""The remote tier: what one machine builds another finds, and whatever the remote does, the model gets its plan.

Two folders stand for two machines. The remotes are fsspec's memory, a folder, and a server that speaks S3 (moto's).
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec  # type: ignore[import-untyped, unused-ignore]
import pytest
from fsspec.implementations.memory import MemoryFileSystem  # type: ignore[import-untyped, unused-ignore]

from tests.cache_cases import PLAN, Builder, Warned, key
from tests.compiled import in_threads
from tests.test_cache_archive import HOSTILE, OURS, SECRET, SIGNATURES, WRONG
from trt_dynamo.cache import Plan, entry, get_or_build, open_store, remote
from trt_dynamo.cache.packing import MAGIC, packed, unpacked
from trt_dynamo.settings import Settings

BUCKET = "engines"


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    """No remote that an earlier test has met, and an empty memory."""
    remote.remote_of.cache_clear()
    if "s3fs" in sys.modules:
        sys.modules["s3fs"].S3FileSystem.clear_instance_cache()  # it has the address of a server
    MemoryFileSystem.store.clear()
    yield
    for _, each in remote.REMOTES:
        each.finish(0)
    del remote.REMOTES[:]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a server that speaks S3."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty place in a bucket; the server's address comes by variables, as a user gives it."""
    for name, value in s3_variables(server).items():
        monkeypatch.setenv(name, value)
    import boto3

    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    for found in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=found["Key"])
    return f"s3://{BUCKET}/a/b"


def s3_variables(server: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "user",
        "AWS_SECRET_ACCESS_KEY": "password",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@pytest.fixture(params=["memory", "folder", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a remote, which has nothing in it."""
    if request.param == "s3":
        found: str = request.getfixturevalue("s3")
        return found
    return "memory://engines/x" if request.param == "memory" else str(tmp_path / "shared" / "engines")


class Machines:
    """Machines with a cache of their own each and one remote."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url

    def settings(self, machine: str, **changes: Any) -> Settings:
        return Settings(**{"cache_dir": self.folder / machine, "cache_remote": self.url, **changes})

    def ask(self, machine: str, build: Callable[[], Plan], number: int = 1, **changes: Any) -> tuple[Plan, bool]:
        """Asks for an engine, and waits for its upload."""
        settings = self.settings(machine, **changes)
        answer = get_or_build(key(number), build, settings)
        each = remote.open_remote(settings)
        if each is not None:
            each.finish()
        return answer

    def write(self, number: int, data: bytes) -> None:
        files, root = fsspec.core.url_to_fs(self.url)
        files.makedirs(root, exist_ok=True) if remote.is_local(files) else None
        files.pipe_file(f"{root}/{key(number)}.engine", data)

    def read(self, number: int) -> bytes | None:
        files, root = fsspec.core.url_to_fs(self.url)
        files.invalidate_cache()
        try:
            data: bytes = files.cat_file(f"{root}/{key(number)}.engine")
        except FileNotFoundError:
            return None
        return data


@pytest.fixture
def machines(tmp_path: Path, url: str) -> Machines:
    return Machines(tmp_path, url)


@pytest.fixture
def memory(tmp_path: Path) -> Machines:
    return Machines(tmp_path, "memory://engines")


def never() -> Plan:
    raise AssertionError("nothing was to be built")


FIRST = (Plan(b"plan 1", {"build": 1}), False)


class TestSharing:
    def test_what_one_machine_builds_another_finds(self, machines: Machines, warned: Warned) -> None:
        build = Builder()
        assert machines.ask("a", build) == FIRST
        assert machines.ask("b", never) == (FIRST[0], True)
        a, b = (open_store(machines.settings(machine)) for machine in "ab")
        assert a.record(key(1)) == b.record(key(1)), "the same to the byte"
        assert machines.ask("a", build, 2)[1] is False
        assert machines.ask("b", never, 2)[1] is True
        # And then the remote is not needed.
        elsewhere = Machines(machines.folder, "memory://nothing/here")
        assert elsewhere.ask("b", never) == (FIRST[0], True)

    def test_what_is_in_it_can_be_imported(self, machines: Machines, tmp_path: Path) -> None:
        from trt_dynamo.cache.archive import import_entries

        machines.ask("a", Builder())
        (tmp_path / "object").write_bytes(machines.read(1) or b"")
        store = open_store(machines.settings("c"))
        assert import_entries(store, tmp_path / "object").done == [key(1)]

    def test_modes(self, memory: Machines, warned: Warned) -> None:
        build = Builder()
        assert memory.ask("a", build, cache="off")[1] is False
        assert memory.ask("a", build, cache="readonly")[1] is False
        assert memory.read(1) is None
        assert memory.ask("a", build, cache="on") == (Plan(b"plan 3", {"build": 3}), False)
        assert memory.ask("b", never, cache="readonly") == (Plan(b"plan 3", {"build": 3}), True)
        assert not (memory.folder / "b").exists()
        assert memory.ask("b", build, cache="refresh") == (Plan(b"plan 4", {"build": 4}), False)
        assert memory.ask("c", never)[0] == Plan(b"plan 4", {"build": 4}), "the newer one"

    def test_a_local_disk_that_takes_nothing(self, memory: Machines, warned: Warned, tmp_path: Path) -> None:
        (tmp_path / "b").write_text("in the way")
        memory.ask("a", Builder())
        assert memory.ask("b", never)[1] is True
        assert memory.ask("b", lambda: PLAN, 2) == (PLAN, False)
        warned.once("is not a folder")
        assert memory.ask("c", never, 2) == (PLAN, True)

    def test_errors_of_the_build_pass_untouched(self, memory: Machines, warned: Warned) -> None:
        with pytest.raises(AssertionError, match="nothing was to be built"):
            memory.ask("a", never)
        assert memory.read(1) is None

    def test_many_threads(self, memory: Machines, warned: Warned) -> None:
        build = Builder()
        in_threads(12, lambda n: memory.ask(f"m{n % 4}", build, n % 3))
        for number in range(3):
            assert memory.ask("new", never, number)[1] is True

    def test_a_folder_never_shows_half_an_entry(self, tmp_path: Path, warned: Warned) -> None:
        machines = Machines(tmp_path, str(tmp_path / "shared"))
        machines.ask("a", Builder())
        assert [path.name for path in (tmp_path / "shared").iterdir()] == [f"{key(1)}.engine"]

    def test_what_killed_processes_left_in_a_folder_goes(self, tmp_path: Path, warned: Warned) -> None:
        shared = tmp_path / "shared"
        shared.mkdir()
        old, new = (shared / f"{key(1)}.engine.{name}.tmp" for name in ("old", "new"))
        for path in (old, new, shared / "notes.tmp"):
            path.write_text("half")
            os.utime(path, (1, 1)) if path != new else None
        Machines(tmp_path, str(shared)).ask("a", Builder())
        assert sorted(path.name for path in shared.iterdir()) == [f"{key(1)}.engine", new.name, "notes.tmp"]

    def test_a_full_shared_folder(self, tmp_path: Path, warned: Warned, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        machines = Machines(tmp_path, str(tmp_path / "shared"))
        monkeypatch.setattr(os, "replace", full)
        assert machines.ask("a", Builder()) == FIRST
        warned.once("No space left on device")
        assert list((tmp_path / "shared").iterdir()) == []

    def test_who_waits_for_an_upload_finds_its_failure_told(
        self, tmp_path: Path, warned: Warned, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However slowly the upload's thread tells of it."""

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        def slowly(self: remote.Remote, *given: Any, **named: Any) -> None:
            failing.set()
            time.sleep(0.3)
            fail(self, *given, **named)

        failing, fail = threading.Event(), remote.Remote.fail
        monkeypatch.setattr(remote.Remote, "fail", slowly)
        monkeypatch.setattr(os, "replace", full)
        settings = Machines(tmp_path, str(tmp_path / "shared")).settings("a")
        get_or_build(key(1), Builder(), settings)
        each = remote.open_remote(settings)
        assert each is not None and failing.wait(60)
        each.finish()
        warned.once("No space left on device")

    def test_through_torch_compile(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, s3: str) -> None:
        import torch

        import trt_dynamo

        monkeypatch.setenv("TRT_DYNAMO_RUNTIME", "reference")
        monkeypatch.setenv("TRT_DYNAMO_CACHE_REMOTE", s3)
        monkeypatch.setenv("TRT_DYNAMO_CACHE_KEY", SECRET)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2)).eval()
        x = torch.randn(3, 4)
        for machine, hits in (("a", 0), ("b", 1)):
            monkeypatch.setenv("TRT_DYNAMO_CACHE_DIR", str(tmp_path / machine))
            torch._dynamo.reset()
            before = trt_dynamo.report()
            with torch.no_grad():
                torch.testing.assert_close(torch.compile(model, backend="tensorrt")(x), model(x))
            remote.finish_uploads()
            after = trt_dynamo.report()
            assert after["cache_hits"] - before["cache_hits"] == hits
            assert after["engines_built"] - before["engines_built"] == 1 - hits


class TestTrust:
    BAD: ClassVar[dict[str, bytes]] = {
        **{name: data for name, data in HOSTILE.items() if name != "wrong count"},
        **{name: MAGIC + stream + b"end 1\n" for name, (stream, _) in WRONG.items()},
        "two entries": packed(entry.recorded(key(1), PLAN)).replace(b"end 1\n", b"")
        + packed(entry.recorded(key(2), PLAN)).replace(MAGIC, b"").replace(b"end 1", b"end 2"),
        "another entry": packed(entry.recorded(key(2), PLAN)),
        "no entry": MAGIC + b"end 0\n",
    }

    @pytest.mark.parametrize("name", BAD)
    def test_a_damaged_entry_is_built_again_and_replaced(self, memory: Machines, warned: Warned, name: str) -> None:
        memory.write(1, self.BAD[name])
        assert memory.ask("a", Builder()) == FIRST
        warned.once("memory://engines", key(1), "built again")
        assert memory.ask("b", never) == (FIRST[0], True)

    def test_a_damaged_entry_on_each_remote(self, machines: Machines, warned: Warned) -> None:
        for number in (1, 2):
            good = packed(entry.recorded(key(number), PLAN))
            machines.write(number, good[:-1500] + b"x" + good[-1499:])
        build = Builder()
        for number in (1, 2):
            assert machines.ask("a", build, number)[1] is False
        warned.once("of no use", "checksum")
        for number in (1, 2):
            assert machines.ask("b", never, number)[1] is True

    @pytest.mark.parametrize("name", SIGNATURES)
    def test_with_a_key_others_entries_are_refused(self, memory: Machines, warned: Warned, name: str) -> None:
        change, reason = SIGNATURES[name]
        memory.write(1, packed(change(entry.recorded(key(1), PLAN, OURS))))
        assert memory.ask("a", Builder(), cache_key=SECRET) == FIRST
        warned.once("memory://engines", reason)
        assert memory.ask("b", never, cache_key=SECRET) == (FIRST[0], True)
        assert unpacked(memory.read(1) or b"", key(1), OURS).plan == FIRST[0]

    def test_signed_entries_swapped_for_one_another(self, machines: Machines, warned: Warned) -> None:
        for number in (1, 2):
            machines.ask("a", lambda number=number: Plan(b"%d" % number, {}), number, cache_key=SECRET)  # type: ignore[misc]
        one, two = (machines.read(number) or b"" for number in (1, 2))
        machines.write(1, two)
        machines.write(2, one.replace(key(1).encode(), key(2).encode()))
        for number in (1, 2):
            assert machines.ask("b", lambda: PLAN, number, cache_key=SECRET) == (PLAN, False)
        warned.once("of no use")

    def test_many_unsigned_entries_are_one_warning(self, memory: Machines, warned: Warned) -> None:
        for number in range(5):
            memory.write(number, packed(entry.recorded(key(number), PLAN)))
        for number in range(5):
            assert memory.ask("a", lambda: PLAN, number, cache_key=SECRET)[1] is False
        warned.once("not signed")

    def test_without_the_key_the_remote_is_left_alone(self, memory: Machines, warned: Warned, tmp_path: Path) -> None:
        memory.write(1, packed(entry.recorded(key(1), PLAN)))
        missing: Any = {"cache_key_file": tmp_path / "no such file"}
        assert memory.ask("a", Builder(), **missing) == FIRST
        assert memory.ask("a", Builder(), 2, **missing) == FIRST
        warned.once("entries are to be signed", "no such file cannot be read")
        assert memory.read(2) is None


class Strange(MemoryFileSystem):  # type: ignore[misc]
    """A remote that does as the test says; a name of its own, so that fsspec finds it by URL."""

    protocol = "strange"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    reads: Callable[[], None] = staticmethod(lambda: None)
    writes: Callable[[], None] = staticmethod(lambda: None)
    calls: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = super()._strip_protocol(path.replace("strange://", "memory://"))
        return stripped

    def cat_file(self, path: str, *arguments: Any, **keywords: Any) -> bytes:
        self.calls.append("read")
        Strange.reads()
        data: bytes = super().cat_file(path, *arguments, **keywords)
        return data

    def pipe_file(self, path: str, value: bytes, *arguments: Any, **keywords: Any) -> None:
        self.calls.append("write")
        Strange.writes()
        super().pipe_file(path, value, *arguments, **keywords)


@pytest.fixture
def strange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:
    fsspec.register_implementation("strange", Strange, clobber=True)
    for name, value in (("store", {}), ("calls", []), ("reads", lambda: None), ("writes", lambda: None)):
        monkeypatch.setattr(Strange, name, value)
    return Machines(tmp_path, "strange://me:password@host/engines")


def raising(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


ERRORS = [
    PermissionError(13, "Access Denied"),
    ConnectionError("no route"),
    TimeoutError("its own"),
    RuntimeError("of the remote's own library"),
    KeyError("?"),
    OSError(30, "Read-only file system"),
]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/engines", "s3://bucket/engines"),
        ("ftp://me:secret@host/engines", "ftp://me:***@host/engines"),
        ("ftp://me:sec@ret:x@host:21/a:b@c", "ftp://me:***@host:21/a:b@c"),
        ("ftp://me@host:21/x", "ftp://me@host:21/x"),
        ("/mnt/shared", "/mnt/shared"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert remote.without_password(url) == shown


class TestFailure:
    """Whatever the remote does, the model gets its plan, in time, with one warning."""

    @pytest.mark.parametrize("error", ERRORS, ids=repr)
    def test_a_remote_that_cannot_be_read(
        self, strange: Machines, warned: Warned, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        monkeypatch.setattr(Strange, "reads", raising(error))
        for number in (1, 2, 3):
            assert strange.ask("a", lambda: PLAN, number) == (PLAN, False)
        texts = warned.texts()
        warned.once("strange://me:***@host", "cannot be read", "engines are built here")
        assert "password" not in texts[0]
        assert Strange.calls.count("read") == 1, "it is left alone for a while"
        assert Strange.calls.count("write") == 3, "what can be written is"
        monkeypatch.setattr(Strange, "reads", lambda: None)
        assert strange.ask("b", lambda: PLAN, 1)[1] is False
        remote.remote_of(strange.url, 60, os.getpid()).reading.closed_until = 0
        assert strange.ask("c", never, 1)[1] is True, "and then tried again"

    @pytest.mark.parametrize("error", ERRORS, ids=repr)
    def test_a_remote_that_cannot_be_written(
        self, strange: Machines, warned: Warned, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        strange.ask("a", lambda: PLAN, 7)
        monkeypatch.setattr(Strange, "writes", raising(error))
        for number in (1, 2, 3):
            assert strange.ask("a", lambda: PLAN, number) == (PLAN, False)
        assert strange.ask("b", never, 7) == (PLAN, True), "what can be read is"
        warned.once("cannot be written", "other machines do not get")
        assert Strange.calls.count("write") == 2

    def test_a_remote_that_does_not_answer(
        self, strange: Machines, warned: Warned, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answer = threading.Event()
        monkeypatch.setattr(Strange, "reads", lambda: answer.wait(60))
        began = time.monotonic()
        for number in (1, 2, 3):
            assert strange.ask("a", lambda: PLAN, number, cache_remote_seconds=1) == (PLAN, False)
        assert time.monotonic() - began < 10
        warned.once("no answer within 1 s")
        answer.set()

    def test_uploads_keep_nobody_waiting(
        self, strange: Machines, warned: Warned, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answer = threading.Event()
        monkeypatch.setattr(Strange, "writes", lambda: answer.wait(60))
        settings = strange.settings("a")
        began = time.monotonic()
        for number in (1, 2, 3):
            assert get_or_build(key(number), lambda: PLAN, settings) == (PLAN, False)
        assert time.monotonic() - began < 5
        each = remote.open_remote(settings)
        assert each is not None
        assert not each.finish(0.1)
        warned.once("3 uploads were not done in time")
        answer.set()

    def test_what_waits_to_be_uploaded_is_bounded(
        self, strange: Machines, warned: Warned, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answer = threading.Event()
        monkeypatch.setattr(Strange, "writes", lambda: answer.wait(60))
        monkeypatch.setattr(remote, "PENDING_BYTES", 3 * len(PLAN.data))
        settings = strange.settings("a")
        for number in range(6):
            get_or_build(key(number), lambda: PLAN, settings)
        warned.once("more slowly than they are built")
        answer.set()
        each = remote.open_remote(settings)
        assert each is not None
        assert each.finish()
        assert Strange.calls.count("write") == 2
        assert strange.ask("a", lambda: PLAN, 9) == (PLAN, False)
        assert Strange.calls.count("write") == 3, "and then it goes on"

    @pytest.mark.parametrize(
        ("url", "gone", "parts"),
        [
            ("s3://bucket/engines", "s3fs", ["s3fs", "trt-dynamo[remote]"]),
            ("memory://engines", "fsspec", ["fsspec", "trt-dynamo[remote]"]),
            ("nonsense://x", "", ["nonsense", "trt-dynamo[remote]"]),
        ],
    )
    def test_a_package_that_is_missing(
        self, tmp_path: Path, warned: Warned, monkeypatch: pytest.MonkeyPatch, url: str, gone: str, parts: list[str]
    ) -> None:
        if gone:
            monkeypatch.setitem(sys.modules, gone, None)
            monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
        machines = Machines(tmp_path, url)
        for number in (1, 2):
            assert machines.ask("a", lambda: PLAN, number) == (PLAN, False)
        warned.once("is not used", *parts)

    def test_a_bucket_that_is_not_there(self, s3: str, tmp_path: Path, warned: Warned) -> None:
        machines = Machines(tmp_path, "s3://no-such-bucket/engines")
        for number in (1, 2):
            assert machines.ask("a", lambda: PLAN, number) == (PLAN, False)
        warned.once("cannot be written", "bucket does not exist")

    def test_a_server_that_is_gone(
        self, tmp_path: Path, warned: Warned, monkeypatch: pytest.MonkeyPatch, server: str
    ) -> None:
        for name, value in s3_variables("http://127.0.0.1:9").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        machines = Machines(tmp_path, f"s3://{BUCKET}")
        began = time.monotonic()
        assert machines.ask("a", lambda: PLAN, 1, cache_remote_seconds=5) == (PLAN, False)
        assert machines.ask("a", never, 1, cache_remote_seconds=5) == (PLAN, True)
        assert time.monotonic() - began < 30
        warned.once("cannot be read")


ENDING = """
import sys, test_cache_remote as t
t.build_and_end(*sys.argv[1:])
"""


def build_and_end(folder: str, url: str) -> None:
    """What a short program does: it builds two engines and ends at once, before there is a connection."""
    for number in (1, 2):
        settings = Settings(cache_dir=Path(folder), cache_remote=url, cache="refresh")
        get_or_build(key(number), lambda: PLAN, settings)


FORKING = """
import os, sys, test_cache_remote as t
t.build_and_end(sys.argv[1], sys.argv[2])
t.remote.finish_uploads()
child = os.fork()
if not child:
    status = 1
    try:
        settings = t.Settings(cache_dir=t.Path(sys.argv[1] + " of the fork"), cache_remote=sys.argv[2])
        found = [t.get_or_build(t.key(number), t.never, settings) for number in (1, 2)]
        t.get_or_build(t.key(3), lambda: t.PLAN, settings)
        t.remote.finish_uploads()
        status = 0 if found == [(t.PLAN, True)] * 2 else 2
    finally:
        os._exit(status)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_fork_has_a_connection_of_its_own(s3: str, tmp_path: Path) -> None:
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", FORKING, str(tmp_path / "a"), s3],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert Machines(tmp_path, s3).ask("b", never, 3) == (PLAN, True)


def test_the_end_of_the_program_waits_for_uploads(s3: str, server: str, tmp_path: Path) -> None:
    tests = Path(__file__).parent
    # By name, which aiohttp looks up in a pool of threads: at the very end such pools take nothing any more.
    named = s3_variables(server.replace("127.0.0.1", "localhost"))
    path = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", ENDING, str(tmp_path / "a"), s3],
        env={**os.environ, **named, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (done.returncode, done.stderr) == (0, "")
    for number in (1, 2):
        assert Machines(tmp_path, s3).ask("b", never, number) == (PLAN, True)
