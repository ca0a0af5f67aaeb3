"""What others can check: signatures of runs and outputs, noted heads of ledgers, the gate's verdicts."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import Triple
from run_inputs import TASKS, go, make_config, rewrite_ledger

Rkif = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def original(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose first round is unchecked, and whose second is undone by the gate."""
    run = tmp_path_factory.mktemp("original") / "run"
    loss = {"metric": "memory_loss", "floor": -1, "tolerance": None}
    tasks = {"folder": str(inputs / "tasks"), "order": TASKS[:2]}
    training = {"steps": 6, "batch_size": 2, "learning_rate": 1e-2}
    go(make_config(inputs, tasks=tasks, training=training, gate={"criteria": [loss], "every": 2}), run)
    return run


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An output of rkif fuse, with a file in a folder and a hidden file."""
    triple = Triple(tmp_path)
    triple.fuse()
    for name in (".hidden", ".git/HEAD"):
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text("content")
    return tmp_path / "out"


def write_keys(folder: Path, name: str = "key", curve: str = "SECP256R1") -> tuple[Path, Path]:
    """A new private and public key in PEM."""
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(getattr(ec, curve)())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    (folder / f"{name}.pem").write_bytes(private)
    (folder / f"{name}.pub").write_bytes(public)
    return folder / f"{name}.pem", folder / f"{name}.pub"


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path)


def refused(rkif: Rkif, *arguments: object) -> str:
    status, output, errors = rkif(*arguments)
    assert (status, output) == (1, "")
    assert errors.splitlines()[-1].startswith("rkif: error: ")
    return errors


def model_signing(*arguments: object) -> tuple[int, str]:
    """Status and output of the command line of OpenSSF Model Signing."""
    pytest.importorskip("model_signing")
    done = subprocess.run(
        [sys.executable, "-m", "model_signing", *map(str, arguments)], capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def signed_statement(folder: Path) -> dict[str, Any]:
    bundle = json.loads((folder / "model.sig").read_text())
    statement: dict[str, Any] = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    return statement


@pytest.mark.parametrize("curve", ["SECP256R1", "SECP384R1", "SECP521R1"])
def test_model_signing_accepts_our_signature(rkif: Rkif, folder: Path, tmp_path: Path, curve: str) -> None:
    key, public = write_keys(tmp_path, curve=curve)
    assert rkif("sign", folder, "--key", key) == (0, f"{folder / 'model.sig'}: 5 files are signed\n", "")
    check = ("verify", "key", folder, "--public_key", public, "--signature", folder / "model.sig")
    assert model_signing(*check) == (0, "Verification succeeded\n")
    assert rkif("verify", folder, "--key", public)[0] == 0


def test_we_accept_the_signature_of_model_signing_and_find_changes(
    rkif: Rkif, folder: Path, keys: tuple[Path, Path]
) -> None:
    signed = model_signing(
        "sign", "key", folder, "--private_key", keys[0], "--signature", folder / "model.sig"
    )
    assert signed == (0, "Signing succeeded\n")
    assert rkif("verify", folder, "--key", keys[1]) == (
        0,
        f"{folder}: 5 files are as signed\n",
        "",
    )
    (folder / ".hidden").unlink()
    assert ".hidden is missing, but it was signed" in refused(rkif, "verify", folder, "--key", keys[1])


def test_a_signed_run_has_its_ledgers_head(
    rkif: Rkif, run: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    status, output, _ = rkif("sign", run, "--key", keys[0])
    files = [path for path in run.rglob("*") if path.is_file() and path.name != "model.sig"]
    assert (status, output) == (0, f"{run / 'model.sig'}: {len(files)} files are signed\n")
    statement = signed_statement(run)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    digests = {one["name"]: one["digest"] for one in statement["predicate"]["resources"]}
    assert digests == {
        path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }
    origin, records, root, *_ = rkif("log", run, "--head")[1].split("\n")
    head = base64.b64decode(root).hex()
    assert statement["predicate"]["ledger"] == {"origin": origin, "records": int(records), "hash": head}
    shutil.move(run, tmp_path / "elsewhere")
    status, output, errors = rkif("verify", tmp_path / "elsewhere", "--key", keys[1])
    assert (status, errors) == (0, "")
    assert f"{len(files)} files are as signed; the ledger has {records} records" in output
    assert head in output
    moved = tmp_path / "elsewhere"
    check = ("verify", "key", moved, "--public_key", keys[1], "--signature", moved / "model.sig")
    assert model_signing(*check) == (0, "Verification succeeded\n")
    (moved / "metrics.json").write_text("{}")
    status, output = model_signing(*check)
    assert status == 1
    assert re.search(r"Hash mismatch for \W+metrics.json", output)


def test_a_ledger_that_differs_from_the_signed_head_is_found(
    rkif: Rkif, run: Path, keys: tuple[Path, Path]
) -> None:
    assert rkif("sign", run, "--key", keys[0])[0] == 0
    ledger = run / "ledger.jsonl"
    content = ledger.read_bytes()
    lines = content.splitlines(keepends=True)

    rewrite_ledger(ledger, lambda record: record.update(time="2020-01-01T00:00:00+00:00"), len(lines) - 1)
    errors = refused(rkif, "verify", run, "--key", keys[1])
    assert "- ledger.jsonl was changed after it was signed\n" in errors
    assert f"record {len(lines) - 1} was rewritten: its hash is " in errors

    ledger.write_bytes(content.replace(b'"event"', b'"evil"', 1))
    assert "record 0 was changed" in refused(rkif, "verify", run, "--key", keys[1])
    ledger.write_bytes(b"".join(lines[:-1]))
    assert f"record {len(lines) - 1} is missing" in refused(rkif, "verify", run, "--key", keys[1])
    ledger.write_bytes(b"")
    assert "holds no record" in refused(rkif, "verify", run, "--key", keys[1])
    ledger.unlink()
    assert "ledger.jsonl is missing, but it was signed" in refused(rkif, "verify", run, "--key", keys[1])

    ledger.write_bytes(content)
    from rkif.ledger.chain import Ledger

    Ledger(ledger).append({"event": "measured", "files": {}})
    assert "1 records were added after it was signed" in refused(rkif, "verify", run, "--key", keys[1])


def test_a_ledger_outside_of_a_run_is_signed_with_its_head(
    rkif: Rkif, original: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    lines = (original / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "ledger.jsonl").write_bytes(b"".join(lines[:2]) + b"torn")
    assert "record 2 is incomplete" in refused(rkif, "sign", folder, "--key", keys[0])
    (folder / "ledger.jsonl").write_bytes(b"".join(lines[:2]))
    assert rkif("sign", folder, "--key", keys[0])[0] == 0
    assert signed_statement(folder)["predicate"]["ledger"]["hash"] == json.loads(lines[1])["hash"]
    assert "the ledger has 2 records" in rkif("verify", folder, "--key", keys[1])[1]


def garble(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    bundle = json.loads(path.read_text())
    edit(bundle)
    path.write_text(json.dumps(bundle))


def change_payload(bundle: dict[str, Any]) -> None:
    payload = base64.b64decode(bundle["dsseEnvelope"]["payload"]).replace(b"README.md", b"README.md2")
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()


SIGNATURE_CHANGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: path.unlink(), "has no model.sig: it is not signed"),
    (lambda path: path.write_text(""), "model.sig is damaged"),
    (lambda path: path.write_bytes(path.read_bytes()[:-9]), "model.sig is damaged"),
    (lambda path: path.write_bytes(b"\xff\x00"), "model.sig is damaged"),
    (lambda path: path.write_text("[]"), "model.sig is damaged: it does not hold an object"),
    (lambda path: path.write_text("{}"), "it lacks 'mediaType'"),
    (lambda path: garble(path, lambda b: b["dsseEnvelope"].update(payloadType="x")), "payloadType"),
    (lambda path: garble(path, lambda b: b["dsseEnvelope"].update(payload="?")), "text that is not base64"),
    (lambda path: garble(path, lambda b: b["dsseEnvelope"].update(signatures=[])), "signatures"),
    (lambda path: garble(path, change_payload), "the signature does not fit its content"),
    (
        lambda path: garble(path, lambda b: b["dsseEnvelope"]["signatures"][0].update(sig="AAAA")),
        "the signature does not fit its content",
    ),
]


@pytest.mark.parametrize(("change", "message"), SIGNATURE_CHANGES)
def test_a_missing_or_damaged_signature_is_one_clear_line(
    rkif: Rkif, folder: Path, keys: tuple[Path, Path], change: Callable[[Path], object], message: str
) -> None:
    assert rkif("sign", folder, "--key", keys[0])[0] == 0
    change(folder / "model.sig")
    errors = refused(rkif, "verify", folder, "--key", keys[1])
    assert errors.count("\n") == 1
    assert message in errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: (out / "README.md").write_text("x"), "README.md was changed after it was signed"),
        (
            lambda out: (out / "rkif-manifest.json").unlink(),
            "rkif-manifest.json is missing, but it was signed",
        ),
        (lambda out: (out / ".new").write_text("x"), ".new was not there when the folder was signed"),
        (lambda out: (out / "new").symlink_to("README.md"), "new is a link or a special file"),
    ],
)
def test_a_changed_removed_or_added_file_is_one_clear_line(
    rkif: Rkif,
    folder: Path,
    keys: tuple[Path, Path],
    change: Callable[[Path], object],
    message: str,
) -> None:
    assert rkif("sign", folder, "--key", keys[0])[0] == 0
    change(folder)
    errors = refused(rkif, "verify", folder, "--key", keys[1])
    assert errors.count("\n") == 1
    assert message in errors


def test_all_differences_are_listed(rkif: Rkif, folder: Path, keys: tuple[Path, Path]) -> None:
    assert rkif("sign", folder, "--key", keys[0])[0] == 0
    (folder / "README.md").write_text("x")
    (folder / "more").write_text("x")
    errors = refused(rkif, "verify", folder, "--key", keys[1])
    assert errors.splitlines() == [
        "- README.md was changed after it was signed",
        f"rkif: error: {folder}: more was not there when the folder was signed",
    ]


def test_gits_files_and_a_second_signature_change_nothing(
    rkif: Rkif, folder: Path, keys: tuple[Path, Path]
) -> None:
    for _ in range(2):
        assert rkif("sign", folder, "--key", keys[0])[0] == 0
        (folder / ".git" / "HEAD").write_text("other")
        (folder / ".gitignore").write_text("x")
        assert rkif("verify", folder, "--key", keys[1])[0] == 0
    assert rkif("verify", folder)[0] == 0  # against the manifest


def test_another_key_is_refused(rkif: Rkif, folder: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    _, other = write_keys(tmp_path, "other")
    assert rkif("sign", folder, "--key", keys[0])[0] == 0
    assert "it names another key" in refused(rkif, "verify", folder, "--key", other)
    from rkif.attest.keys import VerifyingKey

    hint = VerifyingKey(other).fingerprint
    garble(folder / "model.sig", lambda b: b["verificationMaterial"]["publicKey"].update(hint=hint))
    assert "or not of the key" in refused(rkif, "verify", folder, "--key", other)


def test_keys_that_cannot_be_used_are_one_clear_line(
    rkif: Rkif, folder: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    private, public = keys
    key = serialization.load_pem_private_key(private.read_bytes(), None)
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    locked, other = tmp_path / "locked.pem", tmp_path / "ed25519.pem"
    locked.write_bytes(key.private_bytes(pem, pkcs8, serialization.BestAvailableEncryption(b"word")))
    other.write_bytes(
        ed25519.Ed25519PrivateKey.generate().private_bytes(pem, pkcs8, serialization.NoEncryption())
    )
    koblitz, _ = write_keys(tmp_path, "koblitz", "SECP256K1")
    shutil.copy(private, folder / "key.pem")
    for path, message in {
        locked: f"--key: {locked} needs a password",
        other: "holds a key of another kind; it must be on P-256, P-384 or P-521",
        koblitz: "holds a key on the curve secp256k1; it must be on P-256, P-384 or P-521",
        public: f"--key: {public} holds no private key in PEM",
        tmp_path / "none": f"No such file or directory: {tmp_path / 'none'}",
    }.items():
        errors = refused(rkif, "sign", tmp_path, "--key", path)
        assert errors.count("\n") == 1
        assert message in errors
        assert not (tmp_path / "model.sig").exists()
    assert "key.pem was not there" in refused(rkif, "sign", folder, "--key", folder / "key.pem")
    assert "so it would be published" in refused(rkif, "sign", tmp_path, "--key", private)
    (folder / "key.pem").unlink()
    assert rkif("sign", folder, "--key", private)[0] == 0
    assert "holds no public key" in refused(rkif, "verify", folder, "--key", private)


def test_only_what_is_whole_is_signed(
    rkif: Rkif, run: Path, folder: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    (run / "metrics.json").write_text((run / "metrics.json").read_text() + " ")
    assert "metrics.json is not the file that was written" in refused(rkif, "sign", run, "--key", keys[0])
    (folder / "README.md").write_text("x")
    assert "README.md has 1 bytes" in refused(rkif, "sign", folder, "--key", keys[0])
    assert f"{tmp_path / 'none'} is not a folder" in refused(
        rkif, "sign", tmp_path / "none", "--key", keys[0]
    )
    assert not list(tmp_path.rglob("model.sig"))


def test_a_missing_package_is_named_with_its_extra(
    rkif: Rkif, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    for command in ("sign", "verify"):
        assert refused(rkif, command, folder, "--key", tmp_path / "key.pem") == (
            'rkif: error: signatures need cryptography: pip install "rkif[sign]"\n'
        )


def test_a_head_is_a_checkpoint_of_three_lines(rkif: Rkif, run: Path) -> None:
    status, output, _ = rkif("log", run, "--head")
    lines = (run / "ledger.jsonl").read_bytes().splitlines()
    record = json.loads(lines[-1])
    del record["hash"]
    content = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    root = base64.b64encode(hashlib.sha256(content).digest()).decode()
    origin = f"rkif.ledger/{json.loads(lines[0])['hash'][:16]}"
    assert (status, output) == (0, f"{origin}\n{len(lines)}\n{root}\n\n")


def test_a_noted_head_is_found_in_the_ledger_and_in_a_longer_one(
    rkif: Rkif, run: Path, tmp_path: Path
) -> None:
    noted, ledger = tmp_path / "head", run / "ledger.jsonl"
    noted.write_text(rkif("log", run, "--head")[1] + "— someone AAAA\n")  # signed by its keeper
    status, output, _ = rkif("log", run, "--verify", "--head", noted)
    assert status == 0
    assert f"the chain has the head in {noted}" in output
    content = ledger.read_bytes()
    ledger.write_bytes(b"".join(content.splitlines(keepends=True)[:4]))
    noted.write_text(rkif("log", run, "--head")[1])
    ledger.write_bytes(content)
    assert rkif("log", run, "--verify", "--head", noted)[0] == 0


def test_a_ledger_that_was_rewritten_whole_is_found_with_a_noted_head(
    rkif: Rkif, run: Path, tmp_path: Path
) -> None:
    noted, ledger = tmp_path / "head", run / "ledger.jsonl"
    noted.write_text(rkif("log", run, "--head")[1])
    content = ledger.read_bytes()
    last = len(content.splitlines()) - 1
    for seq, message in {
        None: f"record 0 is not that of {noted}: the ledger was rewritten, or is that of another run",
        3: f"record {last} was rewritten: its hash is ",
    }.items():
        rewrite_ledger(ledger, lambda record: record.update(time="2020-01-01T00:00:00+00:00"), seq)
        assert rkif("log", run, "--verify")[0] == 0  # the chain alone does not tell
        errors = refused(rkif, "log", run, "--verify", "--head", noted)
        assert errors.count("\n") == 1
        assert message in errors
        ledger.write_bytes(content)
    ledger.write_bytes(b"".join(content.splitlines(keepends=True)[:last]))
    assert f"record {last} is missing: {noted} has a head of {last + 1} records" in refused(
        rkif, "log", run, "--verify", "--head", noted
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "its lines are not origin, number of records and hash"),
        ("origin\n3\n", "its lines are not origin, number of records and hash"),
        ("origin\n03\nAAAA\n", "its lines are not origin, number of records and hash"),
        ("origin\n3\nAAAA\n", "its third line is not a SHA-256 in base64"),
        ("origin\n3\n????\n", "its third line is not a SHA-256 in base64"),
    ],
)
def test_a_file_without_a_head_is_one_clear_line(
    rkif: Rkif, original: Path, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "head").write_text(text)
    errors = refused(rkif, "log", original, "--verify", "--head", tmp_path / "head")
    assert errors == f"rkif: error: {tmp_path / 'head'} holds no head: {message}\n"


def test_the_noted_head_and_its_options_belong_together(rkif: Rkif, original: Path, tmp_path: Path) -> None:
    for arguments in (["--verify", "--head"], [tmp_path / "head"], [tmp_path / "head", "--head"]):
        assert "rkif log RUN --verify --head FILE" in refused(rkif, "log", original, *arguments)
    missing = refused(rkif, "log", original, "--verify", "--head", tmp_path / "head")
    assert missing == f"rkif: error: No such file or directory: {tmp_path / 'head'}\n"


def test_an_undone_round_is_a_failed_test_result(rkif: Rkif, original: Path) -> None:
    status, output, _ = rkif("log", original, "--test-result", 2)
    assert status == 0
    statement = json.loads(output)
    record = next(json.loads(line) for line in (original / "ledger.jsonl").open() if '"round":2,' in line)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://in-toto.io/attestation/test-result/v0.1"
    assert [one["digest"] for one in statement["subject"]] == [{"sha256": record["hash"]}]
    config = hashlib.sha256((original / "config.yaml").read_bytes()).hexdigest()
    assert statement["predicate"] == {
        "result": "FAILED",
        "configuration": [{"name": "config.yaml", "digest": {"sha256": config}}],
        "passedTests": [],
        "warnedTests": [],
        "failedTests": ["memory_loss"],
    }


@pytest.mark.parametrize(
    ("verdict", "result", "tests"),
    [
        ("keep", "PASSED", {"passedTests": ["loss", "loss of all"], "warnedTests": [], "failedTests": []}),
        ("damp", "WARNED", {"passedTests": ["loss"], "warnedTests": ["loss of all"], "failedTests": []}),
        ("stop", "FAILED", {"passedTests": ["loss"], "warnedTests": [], "failedTests": ["loss of all"]}),
    ],
)
def test_a_verdict_maps_to_a_result_and_its_criteria_to_tests(
    rkif: Rkif, run: Path, verdict: str, result: str, tests: dict[str, list[str]]
) -> None:
    figures = {"loss": 1.0, "loss of all": 2.0}
    whole = [] if verdict == "keep" else ["loss of all 2 is above 1"]
    attempts = [(1.0, whole)] if verdict != "damp" else [(1.0, whole), (0.5, [])]
    gate = {
        "verdict": verdict,
        "factor": 1.0,
        "before": figures,
        "attempts": [{"factor": f, "figures": figures, "objections": o} for f, o in attempts],
        "samples": 0,
    }

    def edit(record: dict[str, Any]) -> None:
        if record["event"] == "round":
            record["gate"] = gate

    rewrite_ledger(run / "ledger.jsonl", edit)
    statement = json.loads(rkif("log", run, "--test-result", 1)[1])
    records = [json.loads(line) for line in (run / "ledger.jsonl").open()]
    record = next(record for record in records if record.get("round") == 1)
    kept = [] if result == "FAILED" else [record["parameters"]["after"]]
    assert [one["digest"]["sha256"] for one in statement["subject"]] == [record["hash"], *kept]
    predicate = statement["predicate"]
    assert predicate["result"] == result
    assert {name: predicate[name] for name in tests} == tests


def test_a_test_result_has_the_fields_of_in_toto(rkif: Rkif, original: Path) -> None:
    pytest.importorskip("in_toto_attestation")
    from google.protobuf import json_format
    from in_toto_attestation.predicates.test_result.v0 import test_result_pb2

    predicate = json.loads(rkif("log", original, "--test-result", 2)[1])["predicate"]
    json_format.ParseDict(predicate, test_result_pb2.TestResult())


def test_a_round_that_was_not_checked_has_no_test_result(rkif: Rkif, original: Path) -> None:
    assert f"no gate checked round 1 of {original}" in refused(rkif, "log", original, "--test-result", 1)
    assert f"{original} has no round 3; it has 2 rounds" in refused(rkif, "log", original, "--test-result", 3)


def guide(name: str) -> str:
    return (Path(__file__).parents[2] / "docs" / "guide" / name).read_text(encoding="utf-8")


def test_the_commands_of_the_guide_run(
    rkif: Rkif, run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("model_signing")
    run.rename(tmp_path / "RUN")
    folder.rename(tmp_path / "fused")
    monkeypatch.chdir(tmp_path)
    commands = "".join(re.findall(r"```sh\n(.*?)```", guide("signatures.md"), flags=re.DOTALL)).splitlines()
    assert len(commands) == 10
    for command in commands:
        call, _, target = command.partition(" > ")
        program, *arguments = call.split()
        if program == "rkif":
            status, output, errors = rkif(*arguments)
            assert status == 0, errors
            if target:
                Path(target).write_text(output)
        else:
            program = {"python": sys.executable}.get(program, program)
            subprocess.run([program, *arguments], check=True, capture_output=True)


def test_the_audit_page_names_fields_that_a_ledger_has(rkif: Rkif, run: Path) -> None:
    assert rkif("rollback", run, "--to", 1)[0] == 0
    records = [json.loads(line) for line in (run / "ledger.jsonl").open()]
    fields = {(record["event"], key) for record in records for key in record}
    events = {event for event, _ in fields}
    named = [name.split(".") for name in re.findall(r"`(\w+\.\w+)`", guide("audit.md"))]
    named = [name for name in named if name[0] in events]
    assert {event for event, _ in named} == {"begin", "round", "task", "state", "measured", "rollback"}
    assert [name for name in named if tuple(name) not in fields] == []
