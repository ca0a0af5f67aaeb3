"""A fusion killed at any moment leaves no output or a complete one, and resumes to the same bytes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import Triple, files_of

from rkif.checkpoint import fuse as fusing
from rkif.checkpoint import preflight as planning
from rkif.checkpoint.manifest import verify
from rkif.checkpoint.workdir import Workdir

CHUNK = 16_384  # bytes: gives a few dozen chunks

# The command line with small chunks, as for a large model with little memory. Each command runs in a fork, in
# which Python and PyTorch are already imported, so that a kill interrupts the fusion itself.
SERVER = f"""
import json, os, sys
from huggingface_hub import ModelCard, ModelCardData
from rkif.checkpoint import display, fuse, manifest, preflight
from rkif.cli import main
preflight.MAX_SLOT, preflight.MIN_SLOT, fuse.UNRECORDED = {CHUNK}, 64, {CHUNK}
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        sys.argv = ["rkif", *json.loads(line)]
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            main()
        finally:
            os._exit(sys.exc_info()[1].code or 0 if isinstance(sys.exc_info()[1], SystemExit) else 99)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Killed(BaseException):
    """Simulates a kill of the process: nothing catches it, and nothing is cleaned up."""


@pytest.fixture(scope="module")
def triple(tmp_path_factory: pytest.TempPathFactory) -> Triple:
    return Triple(tmp_path_factory.mktemp("triple"), scale=3)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "MAX_SLOT", CHUNK)
    monkeypatch.setattr(planning, "MIN_SLOT", 64)
    monkeypatch.setattr(fusing, "UNRECORDED", CHUNK)


@pytest.fixture(scope="module", params=["recurrent_kif", "ties", "dare_ties"])
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def whole(triple: Triple, out: Path, method: str) -> dict[str, bytes]:
    triple.fuse(out=out, method=method)
    return files_of(out)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_kill_at_any_record_resumes_to_the_same_bytes(
    triple: Triple, tmp_path: Path, method: str, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is killed just before or just after each record; the resumed fusion has the same bytes."""
    expected = whole(triple, tmp_path / "whole", method)
    events: list[str] = []
    computed: list[int] = []
    dies_at = 0

    def dying(name: str) -> Any:
        original = getattr(Workdir, name)

        def call(self: Workdir, *arguments: Any) -> Any:
            events.append(name)
            dies = len(events) == dies_at
            if dies and not after:
                raise Killed
            result = original(self, *arguments)
            if dies:
                raise Killed
            return result

        return call

    compute = fusing._Fusion._compute
    monkeypatch.setattr(
        fusing._Fusion,
        "_compute",
        lambda self, chunk, *a: computed.append(chunk.index) or compute(self, chunk, *a),
    )
    for name in ("record", "record_scan", "publish"):
        monkeypatch.setattr(Workdir, name, dying(name))
    triple.fuse(out=tmp_path / "counted", method=method)
    points, chunks = len(events), len(computed)
    assert points > chunks > 8
    for point in range(1, points + 1):
        out = tmp_path / f"out{point}"
        events.clear()
        computed.clear()
        dies_at = point
        with monkeypatch.context() as patch:
            patch.setattr(
                Workdir, "__exit__", lambda self, *_: self._lock.release()
            )  # a killed process removes nothing
            with pytest.raises(Killed):
                triple.fuse(out=out, method=method)
        dies_at = 0
        assert out.exists() == (after and events[-1] == "publish")
        triple.fuse(out=out, method=method, resume=True)
        # One chunk that was computed but not recorded, and one chunk in computation.
        assert len(computed) <= chunks + 2
        assert files_of(out) == expected
        assert not out.with_name(out.name + ".partial").exists()


@pytest.mark.usefixtures("small_chunks")
def test_a_kill_at_a_random_moment_resumes_to_the_same_bytes(triple: Triple, tmp_path: Path) -> None:
    """SIGKILL at random moments of many fusions."""
    expected = whole(triple, tmp_path / "whole", "recurrent_kif")
    inputs = [str(triple.path(name)) for name in ("base", "inner", "outer")]
    generator = random.Random(0)
    statuses = Counter()
    completed = 0
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def run(out: Path, seconds: float | None) -> int:
            server.stdin.write(json.dumps(["fuse", *inputs, "--out", str(out), "--resume"]).encode() + b"\n")
            server.stdin.flush()
            child = int(server.stdout.readline())
            if seconds is not None:
                time.sleep(seconds)
                with contextlib.suppress(ProcessLookupError):  # the fusion finished before the kill
                    os.kill(child, signal.SIGKILL)
            return int(server.stdout.readline())

        assert run(tmp_path / "first", None) == 0  # the server has started when this returns
        begun = time.perf_counter()
        assert run(tmp_path / "timed", None) == 0
        longest = time.perf_counter() - begun
        while statuses[-signal.SIGKILL] < 36:
            out = tmp_path / f"out{completed}"
            statuses[run(out, generator.uniform(0, longest))] += 1
            if out.exists():
                assert files_of(out) == expected
                assert verify(out) == []
                completed += 1
        assert run(tmp_path / "last", None) == 0
        server.stdin.close()
    assert set(statuses) <= {0, -signal.SIGKILL}
    assert completed > 1


@pytest.mark.usefixtures("small_chunks")
def test_resume_refuses_other_inputs_and_settings(triple: Triple, tmp_path: Path, monkeypatch: Any) -> None:
    out = tmp_path / "out"
    stopped = []

    def stop(self: Workdir, record: dict[str, Any]) -> None:
        if record.get("chunk") == 4:
            stopped.append(record)
            raise OSError(errno.EIO, "Input/output error", "disk")
        keep(self, record)

    keep = Workdir.record
    with monkeypatch.context() as patch:
        patch.setattr(Workdir, "record", stop)
        with pytest.raises(OSError, match="Input/output error"):
            triple.fuse(out=out)
    assert stopped
    assert not out.exists()
    with pytest.raises(RuntimeError, match="holds an interrupted fusion; continue it with --resume"):
        triple.fuse(out=out)
    with pytest.raises(RuntimeError, match="is from other inputs or settings"):
        triple.fuse(out=out, resume=True, density=0.3)
    triple.path("outer").touch()
    with pytest.raises(RuntimeError, match="is from other inputs or settings"):
        triple.fuse(out=out, resume=True)


@pytest.mark.usefixtures("small_chunks")
def test_a_chunk_with_an_incomplete_record_is_repeated(
    triple: Triple, tmp_path: Path, monkeypatch: Any
) -> None:
    expected = whole(triple, tmp_path / "whole", "recurrent_kif")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Workdir, "publish", lambda *_: (_ for _ in ()).throw(Killed()))
        patch.setattr(Workdir, "__exit__", lambda self, *_: self._lock.release())
        with pytest.raises(Killed):
            triple.fuse(out=out)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    content = journal.read_bytes()
    for cut in (len(content) - 1, len(content) - 40, content.index(b"\n") + 1, 3, 0):
        journal.write_bytes(content[:cut])
        shutil.copytree(tmp_path / "out.partial", tmp_path / f"cut{cut}.partial")
        triple.fuse(out=tmp_path / f"cut{cut}", resume=True)
        assert files_of(tmp_path / f"cut{cut}") == expected
    journal.write_bytes(content)
    (tmp_path / "out.partial" / "data" / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match=r"model.safetensors differs from what was written; remove"):
        triple.fuse(out=out, resume=True)
    for damaged in ('{"plan"', "[" * 100_000):
        journal.write_text(f"{damaged}\n{{}}\n")
        with pytest.raises(RuntimeError, match=r"journal\.jsonl is damaged: .*; remove .*out\.partial"):
            triple.fuse(out=out, resume=True)


def test_a_complete_output_is_not_overwritten(triple: Triple, tmp_path: Path) -> None:
    out = tmp_path / "out"
    expected = whole(triple, out, "recurrent_kif")
    again = triple.fuse(out=out, resume=True)
    assert again.resumed
    assert again.read == 0
    with pytest.raises(ValueError, match="exists; name another folder"):
        triple.fuse(out=out)
    with pytest.raises(ValueError, match="exists; name another folder"):
        triple.fuse(out=out, density=0.5, resume=True)
    assert files_of(out) == expected


def test_an_empty_folder_is_accepted_and_parents_are_made(triple: Triple, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    triple.fuse(out=tmp_path / "there")
    triple.fuse(out=tmp_path / "a" / "b" / "c")
    assert files_of(tmp_path / "there") == files_of(tmp_path / "a" / "b" / "c")


def test_two_processes_do_not_write_one_output(triple: Triple, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Workdir(out, "of the first", 8192, resume=False) as first:
        first.record({"scanning": True})
        inputs = [str(triple.path(name)) for name in ("base", "inner", "outer")]
        command = [sys.executable, "-m", "rkif", "fuse", *inputs, "--out", str(out), "--resume"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith(f"rkif: error: another process is writing {out}")
        assert first.records == [{"scanning": True}]
        assert (tmp_path / "out.partial" / "journal.jsonl").exists()


@pytest.mark.parametrize("name", ["out.partial", "out.partial/data", "out.partial/data/model.safetensors"])
def test_a_link_in_the_work_folder_is_not_followed(triple: Triple, tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    link = tmp_path / name
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.suffix == ".safetensors":
        victim.write_text("another's file")
    else:
        victim.mkdir()
    link.symlink_to(victim)
    with pytest.raises(RuntimeError, match=f"{link} is a link; remove {tmp_path / 'out.partial'}"):
        triple.fuse(out=tmp_path / "out")
    assert victim.read_text() == "another's file" if victim.is_file() else not any(victim.iterdir())
    assert not (tmp_path / "out").exists()


def test_files_left_by_a_kill_are_removed_before_work_begins(tmp_path: Path) -> None:
    left = tmp_path / "out.partial" / ".tmpAbCdEf"  # a name that safetensors gives
    left.parent.mkdir()
    left.write_bytes(b"half a scan")
    with Workdir(tmp_path / "out", "plan", 8192, resume=False) as workdir:
        assert not left.exists()
        left.write_bytes(b"half a scan of another process, which is writing it")
        workdir.record_scan({"counts": torch.zeros(3)}, {"pass": 1})
        assert left.exists()


def test_a_full_disk_is_reported_before_the_fusion(triple: Triple, tmp_path: Path) -> None:
    """A limit on the size of files simulates a full disk: the system refuses to allocate space."""
    inputs = [str(triple.path(name)) for name in ("base", "inner", "outer")]
    limited = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000));"
        "from rkif.cli import main; main()"
    )
    command = [sys.executable, "-c", limited, "fuse", *inputs, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("rkif: error: File too large: ")
    assert "model.safetensors" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_chunks")
def test_a_fusion_continues_after_the_disk_was_full(triple: Triple, tmp_path: Path, monkeypatch: Any) -> None:
    expected = whole(triple, tmp_path / "whole", "recurrent_kif")
    out = tmp_path / "out"
    written = []

    def pwrite(*arguments: Any) -> int:
        written.append(arguments)
        if len(written) == 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    real = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(OSError, match="No space left on device") as caught:
            triple.fuse(out=out)
    assert caught.value.filename.endswith("model.safetensors")
    assert not out.exists()
    assert triple.fuse(out=out, resume=True).resumed
    assert files_of(out) == expected


@pytest.mark.usefixtures("small_chunks")
def test_an_input_that_shrinks_during_the_fusion_is_named(
    triple: Triple, tmp_path: Path, monkeypatch: Any
) -> None:
    plan = planning.preflight(triple.request(out=tmp_path / "out"))
    content = triple.path("inner").read_bytes()
    try:
        triple.path("inner").write_bytes(content[:-1000])
        with pytest.raises(OSError, match="the file ends before its last tensor does") as caught:
            fusing.fuse_checkpoints(plan)
        assert caught.value.filename == str(triple.path("inner"))
    finally:
        triple.path("inner").write_bytes(content)
    assert not (tmp_path / "out").exists()


def test_a_journal_has_one_line_per_chunk(triple: Triple, tmp_path: Path, monkeypatch: Any) -> None:
    """Each chunk appends one line; earlier lines are not rewritten."""
    monkeypatch.setattr(planning, "MAX_SLOT", CHUNK)
    lines = []
    publish = Workdir.publish
    monkeypatch.setattr(
        Workdir,
        "publish",
        lambda self, sizes: lines.extend(self._journal.read_text().splitlines()) or publish(self, sizes),
    )
    triple.fuse(out=tmp_path / "out")
    records = [json.loads(line) for line in lines]
    assert records[1] == {"scanning": True}
    assert [record["chunk"] for record in records[2:]] == list(range(len(records) - 2))


def test_resume_refuses_an_output_of_other_weights(tmp_path: Path) -> None:
    triple = Triple(tmp_path)
    triple.fuse()
    triple.inner["layer.0.norm"] += 1.0
    triple.save("inner")
    with pytest.raises(ValueError, match="exists; name another folder"):
        triple.fuse(resume=True)


def test_inputs_that_change_during_the_fusion_are_reported(tmp_path: Path) -> None:
    triple = Triple(tmp_path)
    plan = planning.preflight(triple.request())
    triple.outer["layer.0.norm"] += 1.0
    triple.save("outer")
    with pytest.raises(ValueError, match=r"OUTER: .* was changed while it was read; nothing was published"):
        fusing.fuse_checkpoints(plan)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("small_chunks")
def test_resume_keeps_the_chunks_of_the_interrupted_fusion(tmp_path: Path, monkeypatch: Any) -> None:
    """Python's own memory varies between processes, and the size of a chunk with it."""
    triple = Triple(tmp_path, scale=3)
    expected = whole(triple, tmp_path / "whole", "recurrent_kif")
    with monkeypatch.context() as patch:
        patch.setattr(Workdir, "publish", lambda *_: (_ for _ in ()).throw(Killed()))
        patch.setattr(Workdir, "__exit__", lambda self, *_: self._lock.release())
        with pytest.raises(Killed):
            triple.fuse(out=tmp_path / "out")
    monkeypatch.setattr(planning, "MAX_SLOT", CHUNK // 4)
    assert planning.preflight(triple.request(out=tmp_path / "out", resume=True)).slot == CHUNK
    triple.fuse(out=tmp_path / "out", resume=True)
    assert files_of(tmp_path / "out") == expected


def test_files_left_by_a_kill_after_publication_are_removed(tmp_path: Path) -> None:
    triple = Triple(tmp_path)
    triple.fuse()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "journal.jsonl").write_text("{}\n")
    assert triple.fuse(resume=True).resumed
    assert not (tmp_path / "out.partial").exists()
