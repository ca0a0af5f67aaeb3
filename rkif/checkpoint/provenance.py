"""``provenance.json``: how an output was made, as SLSA provenance v1.

It contains times, so it differs between runs and is not in the manifest. It has the manifest's digest, which
covers all other bytes of the output.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rkif.attest.statement import make_statement, read_statement, resource
from rkif.checkpoint.card import companions
from rkif.files import file_sha256, write_text

if TYPE_CHECKING:
    from rkif.checkpoint.preflight import Plan

PROVENANCE = "provenance.json"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILDER = "pkg:pypi/rkif"
BUILD_TYPE = f"{BUILDER}#fuse/v1"  # described in docs/guide/signatures.md


class _Input(NamedTuple):
    argument: str
    name: str
    path: Path


def input_files(plan: Plan) -> list[_Input]:
    """The files on which an output depends: all weights, and the files copied from the base."""
    files = []
    for argument, checkpoint in plan.checkpoints.items():
        copied = companions(checkpoint) if checkpoint is plan.base else ()
        root = checkpoint.folder or checkpoint.path.parent
        for path in (*checkpoint.files, *copied):
            name = path.relative_to(root).as_posix()
            files.append(_Input(argument, f"{checkpoint.name}/{name}" if checkpoint.folder else name, path))
    return files


class InputDigests:
    """SHA-256 of files, computed in a separate thread while the fusion reads the same files.

    Args:
        files: from :func:`input_files`.
    """

    def __init__(self, files: Sequence[_Input]) -> None:
        self._files = files
        self._closed = False
        self._thread = ThreadPoolExecutor(1, "rkif-digest")
        self._digests = self._thread.submit(lambda: [file_sha256(file.path, self._advance) for file in files])

    def close(self) -> None:
        """Stop the thread; unfinished digests are discarded."""
        self._closed = True
        self._thread.shutdown()

    def result(self) -> list[dict[str, Any]]:
        """Wait for all digests; returns a ResourceDescriptor for each file.

        Raises:
            OSError: a file cannot be read.
        """
        return [
            resource(file.name, digest, argument=file.argument)
            for file, digest in zip(self._files, self._digests.result(), strict=True)
        ]

    def _advance(self, _: int) -> None:
        if self._closed:
            raise CancelledError


def timestamp() -> str:
    """The current time in UTC, in the format of SLSA."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def write_provenance(
    plan: Plan, folder: Path, manifest: str, inputs: Sequence[dict[str, Any]], started: str
) -> None:
    """Write ``provenance.json`` to the folder of an output, after all other files.

    Args:
        plan: the plan of the fusion.
        folder: the output's folder.
        manifest: name of the manifest in ``folder``.
        inputs: from :meth:`InputDigests.result`.
        started: the time at which the fusion began, from :func:`timestamp`.
    """
    method = plan.request.method
    predicate = {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {
                "method": method.name,
                "settings": plan.request.settings,
                "inputs": {argument: checkpoint.name for argument, checkpoint in plan.checkpoints.items()},
                "maxShardSize": plan.request.max_shard_size,
            },
            "resolvedDependencies": list(inputs),
        },
        "runDetails": {
            "builder": {
                "id": BUILDER,
                "version": {
                    "python": platform.python_version(),
                    **{name: importlib.metadata.version(name) for name in ("rkif", "torch")},
                },
            },
            "metadata": {"startedOn": started, "finishedOn": timestamp()},
        },
    }
    subject = [resource(manifest, file_sha256(folder / manifest))]
    text = json.dumps(make_statement(subject, PREDICATE_TYPE, predicate), indent=1) + "\n"
    write_text(folder / PROVENANCE, text)


def provenance_problems(folder: Path, manifest: str) -> list[str]:
    """The reason why a provenance does not fit the manifest; empty if it fits, or if there is none."""
    path = folder / PROVENANCE
    if not path.is_file():
        return []
    try:
        statement = read_statement(path, PREDICATE_TYPE)
    except ValueError as error:
        return [str(error)]
    named = {subject.name: subject.digest.get("sha256") for subject in statement.subject}
    if named != {manifest: file_sha256(folder / manifest)}:
        return [f"{PROVENANCE} is of another output: it does not have the digest of {manifest}"]
    return []
