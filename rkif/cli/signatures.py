"""``rkif sign`` and ``rkif verify``, for runs, outputs of ``rkif fuse``, and other folders."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rkif.cli.options import Json, announce, importing
from rkif.files import require_folder

if TYPE_CHECKING:
    from rkif.attest.head import LedgerHead
    from rkif.attest.model_signature import Signed
    from rkif.ledger.chain import LedgerRecord

commands = typer.Typer()


@commands.command("sign", rich_help_panel="Sign and verify")
def sign_command(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN|DIR", help="A run, an output of `rkif fuse`, or any other folder.")
    ],
    key: Annotated[Path, typer.Option("--key", help="PEM file of a private key on P-256, P-384 or P-521.")],
    as_json: Json = False,
) -> None:
    """Sign every file of a folder, and the head of a ledger, in the format of OpenSSF Model Signing.

    A run is checked against its ledger first, and an output of `rkif fuse` against its manifest.
    The signature is DIR/model.sig.

    \b
    Example:
      rkif sign runs/first --key private.pem
    """
    announce(f"Signing every file of {folder}")
    require_folder(folder)
    from rkif.attest.model_signature import SIGNATURE, sign_folder
    from rkif.checkpoint.manifest import MANIFEST, verify  # imports PyTorch, so it is not at the top

    if (folder / MANIFEST).exists():
        _refuse(folder, verify(folder))
    files = sign_folder(folder, key, _checked_head(folder))
    if as_json:
        print(json.dumps({"signature": str(folder / SIGNATURE), "files": files}))
    else:
        print(f"{folder / SIGNATURE}: {files} files are signed")


@commands.command("verify", rich_help_panel="Sign and verify")
def verify_command(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|DIR", help="A run, or an output of `rkif fuse`; with --key any signed folder."
        ),
    ],
    key: Annotated[
        Path | None,
        typer.Option("--key", metavar="PUB", help="PEM file of a public key: check DIR/model.sig with it."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check an output of `rkif fuse` by its manifest, a run by its ledger, or any folder by its signature.

    \b
    Examples:
      rkif verify fused
      rkif verify runs/first --key public.pem
    """
    announce(f"Checking every byte of {folder}")
    require_folder(folder)
    if key is not None:
        _verify_signature(folder, key, as_json=as_json)
        return
    from rkif.attest.model_signature import SIGNATURE
    from rkif.continual.display.log import verified_line

    if (checked := _checked_run(folder)) is not None:
        if as_json:
            print(json.dumps({**checked[0], "hash": checked[1][-1]["hash"]}))
            return
        signed = "; to check its signature, give --key" if (folder / SIGNATURE).exists() else ""
        print(verified_line(folder, *checked) + signed)
        return
    with importing():
        from rich.console import Console

        from rkif.checkpoint.display import Bar
        from rkif.checkpoint.manifest import read_manifest, verify

    manifest = read_manifest(folder)
    console = Console(stderr=as_json)
    with Bar(console) as bar:
        problems = verify(folder, bar)
    _refuse(folder, problems)
    if as_json:
        counts = {key: len(manifest[key]) for key in ("files", "tensors")}
        print(json.dumps(counts | {"content_sha256": manifest["content_sha256"]}))
        return
    console.print(
        f"{folder}: {len(manifest['files'])} files and {len(manifest['tensors'])} tensors are unchanged\n"
        f"SHA-256 {manifest['content_sha256']}",
        markup=False,
        soft_wrap=True,
    )


def _verify_signature(folder: Path, key: Path, *, as_json: bool) -> None:
    from rkif.attest.model_signature import compare_files, read_signature

    signed = read_signature(folder, key)
    problems = compare_files(folder, signed)
    ledger = ""
    if signed.ledger is not None:
        problems += _ledger_problems(folder, signed, signed.ledger)
        ledger = f"; the ledger has {signed.ledger.records} records and the hash {signed.ledger.hash}"
    _refuse(folder, problems)
    if as_json:
        head = None if signed.ledger is None else signed.ledger.model_dump()
        left = list(signed.left_out)
        print(json.dumps({"files": len(signed.resources), "ledger": head, "left_out": left}))
        return
    left_out = f"; the signer left out {', '.join(signed.left_out)}" if signed.left_out else ""
    print(f"{folder}: {len(signed.resources)} files are as signed{ledger}{left_out}")


def _refuse(folder: Path, problems: list[str]) -> None:
    """Raise ValueError if there are problems; print all but the last to stderr, one line each."""
    for problem in problems[:-1]:
        print(f"- {problem}", file=sys.stderr)
    if problems:
        named = problems[-1].startswith(str(folder))
        raise ValueError(problems[-1] if named else f"{folder}: {problems[-1]}")


def _checked_head(folder: Path) -> LedgerHead | None:
    """The head of a folder's ledger, after a run was checked against it; None without a ledger."""
    from rkif.continual.rundir.head import head_of
    from rkif.ledger.chain import LEDGER

    if (checked := _checked_run(folder)) is not None:
        return head_of(checked[1])
    return head_of(_chain(folder / LEDGER)) if (folder / LEDGER).exists() else None


def _checked_run(folder: Path) -> tuple[Counter[str], list[LedgerRecord]] | None:
    """Check a run: counts of what was checked, and its records. None for a folder that is not a run.

    A folder with two of three files of a run counts as a run, so that one with a missing file is not accepted
    as another folder.
    """
    from rkif.continual.rundir.folder import RunReader
    from rkif.continual.rundir.state import CHECKPOINT
    from rkif.continual.rundir.verify import require_whole
    from rkif.ledger.chain import LEDGER

    if sum((folder / name).exists() for name in ("config.yaml", LEDGER, CHECKPOINT)) < 2:
        return None
    reader = RunReader(folder)
    records = reader.ledger()
    return require_whole(reader, records), records


def _chain(path: Path) -> list[LedgerRecord]:
    """Check the chain of a ledger and return its records; there is at least one."""
    from rkif.ledger.chain import LedgerError, read_ledger

    records = list(read_ledger(path))
    if not records:
        raise LedgerError(f"{path} holds no record")
    return records


def _ledger_problems(folder: Path, signed: Signed, head: LedgerHead) -> list[str]:
    """The difference between a ledger and the signed head; empty if there is none."""
    from rkif.continual.rundir.head import require_head
    from rkif.ledger.chain import LEDGER, LedgerError

    path = folder / LEDGER
    if not path.is_file():
        named = any(one.name == LEDGER for one in signed.resources)  # then it is reported as missing
        return [] if named else [f"{LEDGER} is missing, but its head was signed"]
    try:
        records = _chain(path)
        require_head(records, head, path, "the signature")
    except LedgerError as error:
        return [str(error)]
    added = len(records) - head.records
    count = "1 record was" if added == 1 else f"{added} records were"
    return [f"{path}: {count} added after it was signed"] if added else []
