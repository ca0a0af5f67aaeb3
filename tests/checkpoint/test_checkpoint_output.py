"""An output can be loaded, read and verified."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import Triple, files_of, load_folder
from safetensors import safe_open

from rkif.checkpoint.fuse import fuse_checkpoints
from rkif.checkpoint.manifest import MANIFEST, read_manifest, verify
from rkif.checkpoint.methods import make_method
from rkif.checkpoint.preflight import preflight
from rkif.checkpoint.request import Request


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small language models with tied embeddings; the base has companion files."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).bfloat16()
    for name in ("base", "inner", "outer"):
        model.save_pretrained(folder / name, max_shard_size="20KB")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    extra = {
        "tokenizer.json": json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": []}),
        "chat_template.jinja": "{{ messages }}",
        "LICENSE": "do what you like",
        "README.md": "---\nlicense: mit\n---\n# Base\n",
        "trainer_state.json": "{}",
        "pytorch_model.bin": "left alone",
        ".hidden.json": "{}",
    }
    for name, content in extra.items():
        (folder / "base" / name).write_text(content)
    return folder


def fuse(folder: Path, out: Path, **more: Any) -> Path:
    settings = more.pop("settings", {})
    base, *models = (folder / n for n in ("base", "inner", "outer"))
    request = Request(
        base,
        tuple(models),
        out,
        make_method("recurrent_kif", settings),
        **more,
    )
    fuse_checkpoints(preflight(request))
    return out


@pytest.mark.parametrize("shard", [30_000, 10**9], ids=["sharded", "one file"])
def test_transformers_loads_the_output(models: Path, tmp_path: Path, shard: int) -> None:
    import transformers

    out = fuse(models, tmp_path / "out", max_shard_size=shard)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype="auto", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    saved = load_folder(out)
    assert "lm_head.weight" not in saved
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in saved.items())
    assert len(list(out.glob("*.safetensors"))) == (
        1 if shard == 10**9 else len(read_manifest(out)["files"]) - 7
    )


def test_the_index_agrees_with_the_files(models: Path, tmp_path: Path) -> None:
    out = fuse(models, tmp_path / "out", max_shard_size=30_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    saved = load_folder(out)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in saved.values())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))]
    for file in files:
        with safe_open(out / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            names = set(opened.keys())
        assert names == {name for name, place in index["weight_map"].items() if place == file}
        assert sum(saved[name].nbytes for name in names) <= 30_000 or len(names) == 1


def test_configs_and_tokenizers_are_copied_and_other_files_are_not(models: Path, tmp_path: Path) -> None:
    out = fuse(models, tmp_path / "out")
    expected = {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "LICENSE",
        "README.md",
        "model.safetensors",
        MANIFEST,
    }
    assert set(files_of(out)) == expected
    for name in ("config.json", "tokenizer.json", "LICENSE"):
        assert (out / name).read_bytes() == (models / "base" / name).read_bytes()
    mask = os.umask(0)
    os.umask(mask)
    for path in out.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path.name


def test_the_card_describes_the_fusion(models: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    out = fuse(models, tmp_path / "out", settings={"density": 0.3})
    card = ModelCard.load(out / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == ["base", "inner", "outer"]
    assert data["base_model_relation"] == "merge"
    assert data["license"] == "mit"
    assert data["library_name"] == "transformers"
    manifest = read_manifest(out)
    for digest in (
        manifest["content_sha256"],
        *(about["content_sha256"] for about in manifest["inputs"].values()),
    ):
        assert digest in card.text
    assert '"density": 0.3' in card.text
    assert str(models) not in card.content


def test_a_fusion_of_adapters_is_an_adapter(tmp_path: Path) -> None:
    """PEFT loads the fusion of three of its adapters."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    lora = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False)
    for name in ("base", "inner", "outer"):
        peft.get_peft_model(transformers.LlamaForCausalLM(config), lora).save_pretrained(tmp_path / name)
    out = fuse(tmp_path, tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(model, out)
    state = peft.get_peft_model_state_dict(loaded)
    saved = load_folder(out)
    assert saved.keys() == state.keys()
    assert all(torch.equal(state[name], value) for name, value in saved.items())
    assert {"adapter_model.safetensors", "adapter_config.json"} <= set(files_of(out))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    triple = Triple(tmp_path)
    triple.fuse(max_shard_size=40_000)
    return tmp_path / "out"


def test_verify_finds_every_flipped_byte(output: Path) -> None:
    assert verify(output) == []
    for path in sorted(output / name for name in files_of(output)):
        content = path.read_bytes()
        size = len(content)
        for position in {0, 9, size // 3, size // 2, size - 2}:
            flipped = bytearray(content)
            flipped[position] ^= 1
            path.write_bytes(flipped)
            if path.name == MANIFEST:
                with pytest.raises(ValueError, match="is damaged"):
                    verify(output)
            else:
                problems = verify(output)
                assert len(problems) >= 1
                assert path.name in problems[0]
        path.write_bytes(content)
    assert verify(output) == []


def test_verify_names_a_changed_tensor(output: Path) -> None:
    file = next(output.glob("*.safetensors"))
    with safe_open(file, framework="pt") as opened:
        names = list(opened.keys())
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (problem,) = verify(output)
    assert problem.startswith(f"{file.name}: ")
    assert any(repr(name) in problem for name in names)


@pytest.mark.parametrize("harm", ["missing", "truncated", "longer", "foreign"])
def test_verify_finds_other_damage(output: Path, harm: str) -> None:
    file = sorted(output.glob("*.safetensors"))[-1]
    content = file.read_bytes()
    if harm == "missing":
        file.unlink()
    elif harm == "foreign":
        (output / "model-99999.safetensors").write_bytes(content)
    else:
        file.write_bytes(content[:-5] if harm == "truncated" else content + b"x")
    (problem,) = verify(output)
    wanted = {"missing": "is missing", "foreign": "was added"}.get(harm, f"it had {len(content):,}")
    assert wanted in problem


@pytest.mark.parametrize(
    "name",
    [
        "chat_template.jinja",
        "tokenizer.model",
        "modeling_evil.py",
        "pytorch_model.bin",
        "CONFIG.JSON",
        "Model.SafeTensors",
        "additional_chat_templates/tools.jinja",
        "merges.txt",
    ],
)
def test_verify_finds_an_added_file(output: Path, name: str) -> None:
    (output / name).parent.mkdir(exist_ok=True)
    (output / name).write_text("{}")
    assert verify(output) == [f"{name} was added"]
    (output / name).unlink()
    (output / name).symlink_to("/dev/null")
    assert verify(output) == [f"{name} was added"]
    (output / name).unlink()
    (output / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    assert verify(output) == []


def remade(manifest: dict[str, Any]) -> str:
    """A changed manifest with a valid digest, as in a forgery."""
    manifest = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "manifest_sha256": digest}, indent=1) + "\n"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.pop("tensors"), "it lacks 'tensors'"),
        (lambda m: m.pop("files"), "it lacks 'files'"),
        (lambda m: m.update(tensors=[]), "tensors: "),
        (
            lambda m: m["files"].update({"../victim": next(iter(m["files"].values()))}),
            "'../victim' is not the name of a file in the",
        ),
        (lambda m: m.update(content_sha256="0" * 64), "content_sha256 is not the digest of its tensors"),
        (lambda m: next(iter(m["tensors"].values())).update(sha256="0" * 64), "content_sha256 is not"),
        (lambda m: m["tensors"].popitem(), "content_sha256 is not"),
        (lambda m: next(iter(m["tensors"].values())).update(file="x.safetensors"), "is not in files"),
    ],
)
def test_verify_refuses_an_invalid_manifest_with_a_valid_digest(
    output: Path, edit: Callable[[Any], Any], message: str
) -> None:
    manifest = json.loads((output / MANIFEST).read_text())
    assert remade(manifest) == (output / MANIFEST).read_text()
    edit(manifest)
    (output / MANIFEST).write_text(remade(manifest))
    with pytest.raises(ValueError, match=f"{MANIFEST} is damaged.*") as caught:
        verify(output)
    assert message in str(caught.value)


def test_verify_refuses_a_folder_that_is_no_output(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"has no {MANIFEST}"):
        verify(tmp_path)
    with pytest.raises(ValueError, match=f"has no {MANIFEST}"):
        verify(tmp_path / "nowhere")


def test_verify_finds_a_changed_header_length_and_a_reformatted_manifest(output: Path) -> None:
    file = sorted(output.glob("*.safetensors"))[0]
    content = file.read_bytes()
    for length in (2**40, 2**63):
        file.write_bytes(length.to_bytes(8, "little") + content[8:])
        assert f"{file.name}: its header was changed" in verify(output)
    file.write_bytes(content)
    manifest = output / MANIFEST
    written = manifest.read_bytes()
    for changed in (written.replace(b'": ', b'":  ', 1), written.replace(b"\n", b"\r\n")):
        manifest.write_bytes(changed)
        with pytest.raises(ValueError, match="is damaged"):
            verify(output)


def test_unreadable_files_next_to_the_base_do_not_stop_a_fusion(models: Path, tmp_path: Path) -> None:
    """A card with invalid YAML, and a file name that is not UTF-8."""
    for name in ("base", "inner", "outer"):
        shutil.copytree(models / name, tmp_path / name)
    (tmp_path / "base" / "README.md").write_text("---\nlicense: [mit\n---\n")
    Path(os.fsdecode(os.fsencode(tmp_path / "base") + b"/r\xe9.txt")).write_text("resume")
    out = fuse(tmp_path, tmp_path / "out")
    assert verify(out) == []
    assert "license" not in (out / "README.md").read_text()
