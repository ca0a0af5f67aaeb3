"""``rkif fuse --mergekit``: YAML files of mergekit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoint_files import files_of, loaded, merge
from command import Rkif
from safetensors.torch import save_file
from torch import Tensor

from rkif.checkpoint import preflight as planning
from rkif.checkpoint.manifest import read_manifest

LAYERS = 5
NAMES = [
    "model.embed_tokens.weight",
    *(
        f"model.layers.{n}.{part}.weight"
        for n in range(LAYERS)
        for part in ("self_attn.q_proj", "mlp.up_proj")
    ),
    "model.norm.weight",
    "lm_head.weight",
]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four checkpoints "base", "a", "b", "c" in the current folder."""
    for seed, name in enumerate(("base", "a", "b", "c")):
        generator = torch.Generator().manual_seed(seed)
        (tmp_path / name).mkdir()
        tensors: dict[str, Tensor] = {key: torch.randn(8, 9, generator=generator) for key in NAMES}
        tensors["model.rotary.positions"] = torch.arange(4)
        save_file(tensors, tmp_path / name / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def compare(got: dict[str, Tensor], wanted: Callable[[str], Tensor]) -> None:
    assert set(got) == {*NAMES, "model.rotary.positions"}
    for name in NAMES:
        torch.testing.assert_close(got[name], wanted(name), msg=lambda text, name=name: f"{name}: {text}")


def test_scalars_have_the_bytes_of_the_options(rkif: Rkif, models: Path) -> None:
    content = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            {"model": "base"},  # has no task vector
            {"model": "a", "parameters": {"weight": 0.4}},
            {"model": "b", "parameters": {"weight": 0.7}},
        ],
        "parameters": {"density": 0.3, "normalize": False, "int8_mask": True, "lambda": 0.9},
        "dtype": "float32",
    }
    merge(rkif, models, content)
    options = ["--weight", "0.4,0.7", "--density", 0.3, "--no-normalize", "--lambda", 0.9]
    assert rkif("fuse", "base", "a", "b", "--out", "plain", "--method", "ties", *options)[0] == 0
    assert files_of(models / "out") == files_of(models / "plain")


def test_the_default_density_is_that_of_mergekit(rkif: Rkif, models: Path) -> None:
    """In mergekit, everything is kept by default."""
    content = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "a", "parameters": {"weight": 1}}],
    }
    base, a = loaded(models, ("base", "a"))
    compare(merge(rkif, models, content), lambda name: a[name] + 0 * base[name])
    assert read_manifest(models / "out")["settings"]["density"] == 1


@pytest.fixture(params=[None, 128], ids=["whole", "cut"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors in one chunk each, and cut."""
    if request.param:
        monkeypatch.setattr(planning, "MAX_SLOT", request.param)
        monkeypatch.setattr(planning, "MIN_SLOT", 64)


@pytest.mark.usefixtures("chunks")
def test_gradients_and_filters(rkif: Rkif, models: Path) -> None:
    """Weights by layer and by name, computed by hand."""
    content = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": [0, 1, 0.5]}},  # values at layers 0, 2 and 4
            {
                "model": "b",
                "parameters": {
                    "weight": [
                        {"filter": "self_attn", "value": [0.2, 0.6]},
                        {"filter": "lm_head", "value": 3},
                    ]
                },
            },
            {"model": "c", "parameters": {"weight": [{"filter": "mlp", "value": 2}, {"value": -1}]}},
        ],
        "parameters": {"weight": [{"filter": "*", "value": 0.25}], "lambda": 0.5},
    }
    by_layer = {"a": [0, 0.5, 1, 0.75, 0.5], "b": [0.2, 0.3, 0.4, 0.5, 0.6]}

    def weights(name: str) -> tuple[float, float, float]:
        layer = int(name.split(".")[2]) if "layers" in name else 0  # outside of layers: the first value
        own = by_layer["b"][layer] if "self_attn" in name else 3 if "lm_head" in name else 0.25
        return by_layer["a"][layer], own, 2 if "mlp" in name else -1

    base, *others = loaded(models, ("base", "a", "b", "c"))
    compare(
        merge(rkif, models, content),
        lambda name: (
            base[name]
            + 0.5
            * sum(w * (other[name] - base[name]) for w, other in zip(weights(name), others, strict=True))
        ),
    )
    settings = read_manifest(models / "out")["settings"]
    assert settings["models"][0] == {"weight": [0, 1, 0.5]}
    assert settings["lambda"] == 0.5


@pytest.mark.usefixtures("chunks")
def test_densities_by_model_and_layer(rkif: Rkif, models: Path) -> None:
    """Model a keeps everything in the first layer and a quarter in the last; b half of each tensor."""
    content = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": 1, "density": [1, 0.25]}},
            {"model": "b", "parameters": {"weight": 0.5}},
        ],
        "parameters": {"density": 0.5, "normalize": True},
    }
    base, a, b = loaded(models, ("base", "a", "b"))

    def kept(vector: Tensor, density: float) -> Tensor:
        limit = vector.abs().flatten().sort(descending=True).values[int(density * vector.numel()) - 1]
        return torch.where(vector.abs() >= limit, vector, 0.0)

    def wanted(name: str) -> Tensor:
        layer = int(name.split(".")[2]) if "layers" in name else 0
        first = kept(a[name] - base[name], 1 - 0.75 * layer / 4)
        second = 0.5 * kept(b[name] - base[name], 0.5)
        sign = torch.where(first + second >= 0, 1.0, -1.0)
        one, two = first.sign() == sign, second.sign() == sign
        divisor = one * 1.0 + two * 0.5
        return base[name] + (first * one + second * two) / torch.where(divisor == 0, 1.0, divisor)

    compare(merge(rkif, models, content), wanted)


def test_all_elements_are_kept_where_only_weights_vary(rkif: Rkif, models: Path) -> None:
    content = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "a", "parameters": {"weight": [1, 0.5]}}],
        "parameters": {"normalize": False},
    }
    base, a = loaded(models, ("base", "a"))

    def wanted(name: str) -> Tensor:
        layer = int(name.split(".")[2]) if "layers" in name else 0
        return base[name] + (1 - layer / 8) * (a[name] - base[name])

    compare(merge(rkif, models, content), wanted)


def test_a_single_layer_takes_the_last_value_of_a_gradient(
    rkif: Rkif, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in mergekit. The layers of each list are counted separately. Numbers of experts are no layers."""
    monkeypatch.chdir(tmp_path)
    weights = {
        "encoder.block.0.layer.1.w": 8.0,
        "decoder.block.0.mlp.experts.7.w": 0.0,
        "decoder.block.1.mlp.experts.0.w": 4.0,
        "decoder.block.2.mlp.experts.7.w": 8.0,
        "classifier.3.w": 0.0,
    }
    for name, value in (("base", 0.0), ("a", 1.0)):
        (tmp_path / name).mkdir()
        tensors = {key: torch.full((3,), value) for key in weights}
        save_file(tensors, tmp_path / name / "model.safetensors")
    content = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": "a", "parameters": {"weight": [0, 8]}}],
    }
    got = merge(rkif, tmp_path, content)
    assert {name: value[0].item() for name, value in got.items()} == weights


def test_random_drops_have_densities_by_layer(rkif: Rkif, models: Path) -> None:
    content = {
        "merge_method": "dare_linear",
        "base_model": "base",
        "models": [{"model": "a", "parameters": {"weight": 1, "density": [1, 0.2]}}],
    }
    got = merge(rkif, models, content, "--seed", 3)
    base, a = loaded(models, ("base", "a"))
    for layer, share in ((0, 1.0), (4, 0.2)):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        moved = got[name] - base[name]
        assert (moved != 0).float().mean() == pytest.approx(share, abs=0.15)
        assert moved.abs().sum() == pytest.approx((a[name] - base[name]).abs().sum().item(), rel=1e-4)


def test_a_mean_needs_no_base_model(rkif: Rkif, models: Path) -> None:
    content = {
        "merge_method": "linear",
        "models": [
            {"model": "a", "parameters": {"weight": [1, 0]}},
            {"model": "b", "parameters": {"weight": [0, 1]}},
            {"model": "c", "parameters": {"weight": 1}},
        ],
    }
    rows = loaded(models, ("a", "b", "c"))

    def wanted(name: str) -> Tensor:
        t = int(name.split(".")[2]) / 4 if "layers" in name else 0
        return sum(w * row[name] for w, row in zip((1 - t, t, 1), rows, strict=True)) / 2

    compare(merge(rkif, models, content), wanted)
    assert list(read_manifest(models / "out")["inputs"]) == ["BASE", "MODEL 1", "MODEL 2", "MODEL 3"]


VALID = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [{"model": "a", "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": 1}}],
}


def changed(**more: Any) -> dict[str, Any]:
    return {key: value for key, value in {**VALID, **more}.items() if value is not None}


def with_weight(value: Any) -> dict[str, Any]:
    return changed(models=[{"model": "a", "parameters": {"weight": value}}])


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (changed(slices=[]), "slices is not supported; merge_method, base_model, models, parameters, dtype"),
        (changed(tokenizer_source="union"), "tokenizer_source is not supported"),
        (changed(modules={}), "modules is not supported"),
        (changed(chat_template="auto"), "chat_template is not supported"),
        (
            changed(merge_method="slerp"),
            "merge_method 'slerp' is not supported; linear, task_arithmetic, ties",
        ),
        (changed(merge_method=None), "merge_method None is not supported"),
        (changed(base_model=None), "ties needs base_model"),
        (
            changed(base_model="org/model"),
            "there is no org/model; a model of the Hub must be downloaded first: hf download org/model",
        ),
        (
            changed(models=[{"model": "a+lora"}]),
            "there is no a+lora; an adapter",
        ),
        (changed(models=[{"model": "base"}]), "models has no model beside base_model"),
        (changed(models=[{"model": "a", "layer_range": [0, 1]}]), "models[0].layer_range is not supported"),
        (changed(models=["a"]), "models[0] must have keys, such as model and parameters; got 'a'"),
        (changed(models=None), "models must be a list of models"),
        (changed(models=[{"model": "a"}]), "models[0] (a) has no weight for 'lm_head.weight'"),
        (
            changed(parameters={"epsilon": 0.1}),
            "parameters.epsilon is not supported; weight, density, normalize",
        ),
        (changed(parameters={"normalize": [1, 0]}), "parameters.normalize must be true or false; got [1, 0]"),
        (changed(parameters={"lambda": [1, 0]}), "parameters.lambda must be a number; got [1, 0]"),
        (
            changed(dtype="bfloat16"),
            "the output would be bfloat16, but base is float32; dtypes are not converted",
        ),
        (changed(dtype="float32", out_dtype="float16"), "the output would be float16, but base is float32"),
        (changed(dtype="int8"), "merge.yml: dtype 'int8' is not supported; float32, bfloat16, float16 are"),
        (changed(dtype=["float32"]), "merge.yml: dtype ['float32'] is not supported"),
        (changed(out_dtype={"a": 1}), "merge.yml: out_dtype {'a': 1} is not supported"),
        (
            with_weight("1"),
            "models[0].parameters.weight must be a number, a list of numbers or a list of filters",
        ),
        (
            with_weight([1, "x"]),
            "models[0].parameters.weight[0] must have a value, and may have a filter; got 1",
        ),
        (with_weight([{"value": 1, "layer": 2}]), "models[0].parameters.weight[0].layer is not supported"),
        (with_weight([{"filter": "mlp", "value": 1}]), "models[0] (a) has no weight for "),
        (with_weight([{"value": True}]), "models[0].parameters.weight[0].value must be a number or a list"),
        (
            changed(models=[{"model": "a", "parameters": {"weight": 1, "density": [2, 1]}}]),
            "density must be in [0, 1]",
        ),
        (
            changed(models=[{"model": "a", "parameters": {"weight": 1, "gamma": 1}}]),
            "parameters.gamma is not sup",
        ),
    ],
)
def test_everything_else_is_refused_by_name(
    rkif: Rkif, models: Path, content: dict[str, Any], error: str
) -> None:
    (models / "merge.yml").write_text(yaml.safe_dump(content))
    status, output, errors = rkif("fuse", "--mergekit", "merge.yml", "--out", "out")
    assert (status, output) == (1, "")
    assert error in errors
    assert errors.startswith("rkif: error: ")
    assert errors.count("\n") == 1
    assert not (models / "out").exists()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["base", "a", "b"], "leave out base"),
        (["--density", 0.5], "leave out --density"),
        (["--method", "ties"], "leave out --method"),
        (["--space", "delta"], "leave out --space"),
        (["--inner-importance", "a"], "leave out --inner-importance"),
    ],
)
def test_options_that_the_file_has_are_refused(
    rkif: Rkif, models: Path, options: list[object], error: str
) -> None:
    (models / "merge.yml").write_text(yaml.safe_dump(VALID))
    status, _, errors = rkif("fuse", *options, "--mergekit", "merge.yml", "--out", "out")
    wanted = f"rkif: error: --mergekit has the inputs, the method and its settings: {error}\n"
    assert (status, errors) == (1, wanted)


def test_a_command_without_inputs_says_what_is_missing(rkif: Rkif, models: Path) -> None:
    status, _, errors = rkif("fuse", "--out", "out")
    assert status == 1
    assert "name the checkpoints BASE, INNER and OUTER, or a file of mergekit with --mergekit" in errors
    (models / "merge.yml").write_text("merge_method: [")
    assert "merge.yml: not valid YAML" in rkif("fuse", "--mergekit", "merge.yml", "--out", "out")[2]
    (models / "merge.yml").write_text("merge_method: ties\nbase_model: a\nbase_model: b\n")
    errors = rkif("fuse", "--mergekit", "merge.yml", "--out", "out")[2]
    assert (
        errors
        == "rkif: error: merge.yml: not valid YAML: line 3, column 1: key 'base_model' is given twice\n"
    )
