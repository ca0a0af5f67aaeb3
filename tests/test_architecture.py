"""The import rules of ``docs/architecture.md``, and the maximum size of files and classes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [path for root in ("rkif", "rkif_kernels", "bench") for path in sorted((ROOT / root).rglob("*.py"))]
# A module imports from layers below its own, from its own folder, and from no other module of its layer.
LAYERS = (
    {"rkif.__main__"},
    {"rkif.cli"},
    {"rkif.demo"},
    {"rkif.continual.replay_round", "rkif.continual.tune"},
    {"rkif.continual.run"},
    {"rkif.continual.task_sequence"},
    {"rkif.continual.display", "rkif.continual.methods"},
    {"rkif.continual.evaluation"},
    {"rkif.continual.models", "rkif.continual.rundir"},
    {"rkif.continual.config"},
    {"rkif.continual.config_evaluation", "rkif.continual.config_errors"},
    {"rkif.continual.config_base", "rkif.continual.config_file", "rkif.continual.config_fusion"},
    {"rkif.continual.tracking", "rkif.continual.user_metrics"},
    {"rkif.continual.tasks"},
    {"rkif.continual.spelling"},
    {"rkif.hf", "rkif.checkpoint", "rkif.plan"},
    {"rkif"},  # the package itself, `from rkif import Fuser`
    {"rkif.optim", "rkif.lora"},
    {"rkif.fuser"},
    {"rkif.ledger"},
    {"rkif.fusion"},
    {"rkif.gate", "rkif.distributed", "rkif.config"},
    {"rkif.attest"},
    {"rkif.files", "rkif.seeding"},
    {"rkif_kernels"},
    {"rkif_kernels.ops"},
    {"rkif_kernels.backends"},
    {"rkif_kernels.selection"},
    {"rkif_kernels.checks", "rkif_kernels.contiguous"},
    {"rkif_kernels.types"},
    {"rkif_kernels.numerics", "rkif_kernels.profiling"},
)
WINGS = {f"bench.{wing}" for wing in ("kernels", "training", "forgetting", "checkpoints", "fuzzing")}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, anywhere in the file; for ``from a import b`` this is a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(module: str) -> tuple[int, str] | None:
    """The layer of a module, and its name there; the longest matching name decides."""
    known = [
        (level, name)
        for level, names in enumerate(LAYERS)
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    return max(known, key=lambda found: len(found[1]), default=None)


ARROWS = [(module_of(path), target) for path in FILES for target in imports(path)]


@pytest.mark.parametrize("package", ["rkif", "rkif_kernels"])
def test_no_module_imports_from_a_higher_layer(package: str) -> None:
    for source, target in ARROWS:
        if source.partition(".")[0] == package and target.partition(".")[0] in ("rkif", "rkif_kernels"):
            (level, name), (target_level, target_name) = layer(source), layer(target)
            assert name == target_name or level < target_level, f"{source} imports {target}"


def test_every_module_has_a_layer() -> None:
    for module in map(module_of, FILES):
        if module.startswith("rkif") and module not in ("rkif", "rkif.continual", "rkif_kernels"):
            assert layer(module)[1] not in ("rkif", "rkif_kernels"), f"{module} is in none of LAYERS"


def test_rkif_imports_kernels_only_from_the_package() -> None:
    for source, target in ARROWS:
        if source.startswith("rkif.") and target.startswith("rkif_kernels."):
            face, *inner = target.split(".")[1:]
            module = ROOT / "rkif_kernels" / face
            assert not inner, f"{source} imports {target}"
            assert not module.exists(), f"{source} imports {target}"
            assert not module.with_suffix(".py").exists(), f"{source} imports {target}"
        assert not (source.startswith("rkif_kernels") and target.startswith("rkif.")), (
            f"{source} imports {target}"
        )


def test_only_the_triton_backend_imports_triton() -> None:
    for source, target in ARROWS:
        if target.partition(".")[0] == "triton" and not source.startswith("bench."):
            assert source.startswith("rkif_kernels.backends.triton."), f"{source} imports {target}"


def test_the_parts_of_bench_do_not_import_each_other() -> None:
    for source, target in ARROWS:
        wings = {".".join(name.split(".")[:2]) for name in (source, target)} & WINGS
        shared = source in ("bench.__main__", "bench.docs")
        assert shared or len(wings) < 2, f"{source} imports {target}"


def test_the_parser_sees_every_package() -> None:
    """Guards against a parser that finds no imports, with which the tests above would pass."""
    assert {source.partition(".")[0] for source, _ in ARROWS} == {"rkif", "rkif_kernels", "bench"}
    assert any(target.startswith("triton") for _, target in ARROWS)


@pytest.mark.parametrize(("folder", "most"), [("rkif", 9), ("bench", 6), ("tests", 8)])
def test_few_modules_are_at_the_top_level(folder: str, most: int) -> None:
    assert 0 < len(list((ROOT / folder).glob("*.py"))) <= most


def test_files_and_classes_are_small() -> None:
    """At most 450 lines a file and 340 a class."""
    files, classes = set(), set()
    for path in FILES:
        module, text = module_of(path), path.read_text()
        if module.startswith("bench"):
            continue
        if len(text.splitlines()) > 450:
            files.add(module)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and node.end_lineno - node.lineno >= 340:
                classes.add(f"{module}.{node.name}")
    assert not files
    assert not classes
