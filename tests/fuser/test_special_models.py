"""Quantised bases, special adapters and tied weights are fused, or refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import rkif
from rkif.checkpoint.fuse import fuse_checkpoints
from rkif.checkpoint.methods import make_method
from rkif.checkpoint.preflight import preflight
from rkif.checkpoint.request import PreflightError, Request

TOKENS = torch.arange(4, 28).view(4, 6)
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "dora": {"use_dora": True},
}


def adapted(model: Any = None, **settings: Any) -> Any:
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **settings)
    return get_peft_model(tiny_llama(40, 0) if model is None else model, config)


def one_round(model: Any) -> tuple[rkif.Fuser, dict[str, Any]]:
    """One step of each learner, and the result of rkif.fuse for the same parameters by name."""
    fuser = rkif.Fuser(model, rkif.FusionConfig.paper())

    def step() -> dict[str, Tensor]:
        model.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        fuser.observe()
        with torch.no_grad():
            for parameter in fuser.parameters.values():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=0.5)
        return {name: p.detach().clone() for name, p in fuser.parameters.items()}

    base = fuser.base()
    inner = step()
    scores = {"inner_importance": fuser.scores("inner")}
    fuser.begin_outer()
    outer = step()
    scores["outer_importance"] = fuser.scores("outer")
    expected = rkif.fuse(base, inner, outer, **scores)
    assert fuser.fuse().counts == expected.report.counts
    return fuser, expected.params


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_are_fused_by_their_names_and_reload(kind: str, tmp_path: Path) -> None:
    model = adapted(**ADAPTERS[kind])
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    fuser, expected = one_round(model)
    for name, parameter in fuser.parameters.items():
        assert torch.equal(parameter, expected[name])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(fuser.parameters)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(40, 0), tmp_path)
    assert torch.equal(again(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


def test_only_the_trained_adapter_is_fused() -> None:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("second")
    fuser, expected = one_round(model)
    assert all(".second." in name for name in fuser.parameters)
    assert all(torch.equal(p, expected[name]) for name, p in fuser.parameters.items())


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_are_one_parameter(tied: bool) -> None:
    model = tiny_llama(40, 0)
    model.config.tie_word_embeddings = tied
    if tied:
        model.tie_weights()
        model.lm_head.weight = model.model.embed_tokens.weight
    fuser, expected = one_round(model)
    assert ("lm_head.weight" in fuser.parameters) == (not tied)
    assert all(torch.equal(p, expected[name]) for name, p in fuser.parameters.items())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    if tied:
        both = [("embed", model.model.embed_tokens.weight), ("head", model.lm_head.weight)]
        with pytest.raises(ValueError, match=r"'embed'.*'head'.*share memory \(tied weights\?\)"):
            rkif.Fuser(both)


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_on_a_quantised_base_are_fused(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_llama(40, 0).save_pretrained(tmp_path)
    how = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=how, device_map={"": "cpu"}, dtype=torch.float32
    )
    # Evaluation mode would pack the 4-bit weights again, which needs larger shapes.
    model = adapted(prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)).train()
    narrow = {name: p.clone() for name, p in model.named_parameters() if not p.is_floating_point()}
    assert narrow
    fuser, expected = one_round(model)
    assert all("lora_" in name for name in fuser.parameters)
    assert all(torch.equal(p, expected[name]) for name, p in fuser.parameters.items())
    assert all(torch.equal(p, narrow[name]) for name, p in model.named_parameters() if name in narrow)


def test_a_frozen_quantised_weight_needs_no_library() -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
            self.factor = nn.Parameter(torch.ones(4))

    assert list(rkif.Fuser(Quantised()).parameters) == ["factor"]


def fused_on_disk(folder: Path) -> Path:
    base, *models = (folder / name for name in ("base", "inner", "outer"))
    out = folder / "out"
    fuse_checkpoints(preflight(Request(base, tuple(models), out, make_method("recurrent_kif", {}))))
    return out


def save_adapters(folder: Path, change: dict[str, Any], **settings: Any) -> None:
    """Three adapters of one kind; ``change`` edits the settings file of the last one."""
    for number, name in enumerate(("base", "inner", "outer")):
        model = adapted(**settings)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in filter(lambda p: p.requires_grad, model.parameters()):
                parameter.copy_(torch.rand(parameter.shape, generator=generator))
        model.save_pretrained(folder / name)
    file = folder / "outer" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_on_disk_are_fused_and_load(kind: str, tmp_path: Path) -> None:
    save_adapters(tmp_path, {}, **ADAPTERS[kind])
    out = fused_on_disk(tmp_path)
    tensors = [
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("base", "inner", "outer")
    ]
    base, inner, outer = tensors
    expected = rkif.fuse(
        base,
        inner,
        outer,
        {name: (inner[name] - base[name]).abs() for name in base},
        {name: (outer[name] - inner[name]).abs() for name in base},
    )
    found = load_file(out / "adapter_model.safetensors")
    assert all(torch.equal(found[name], expected.params[name]) for name in base)
    logits = PeftModel.from_pretrained(tiny_llama(40, 0), out)(input_ids=TOKENS).logits
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("plain", {"lora_alpha": 16}),
        ("plain", {"use_rslora": True}),
        ("plain", {"r": 8}),
        ("patterns", {"alpha_pattern": {"q_proj": 5}}),
        ("patterns", {"rank_pattern": {}}),
        ("dora", {"use_dora": False}),
    ],
)
def test_adapters_with_different_settings_are_refused(
    kind: str, change: dict[str, Any], tmp_path: Path
) -> None:
    """The factors have equal shapes, but represent different updates."""
    save_adapters(tmp_path, change, **ADAPTERS[kind])
    (setting,) = change
    with pytest.raises(PreflightError, match=f"OUTER: {setting} is .* in its config; in BASE it is"):
        fused_on_disk(tmp_path)


def test_quantised_weights_on_disk_are_refused(tmp_path: Path) -> None:
    for name in ("base", "inner", "outer"):
        (tmp_path / name).mkdir()
        save_file({"w": torch.zeros(4, dtype=torch.float8_e4m3fn)}, tmp_path / name / "model.safetensors")
    with pytest.raises(ValueError, match=r"'w'.*F8_E4M3"):
        fused_on_disk(tmp_path)
