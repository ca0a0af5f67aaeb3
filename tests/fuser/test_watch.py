"""A fuser detects that its model no longer has its parameters, and that a step has no gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.utils.prune
from fuser_loop import Loop, batch, make_model
from tiny import tiny_llama
from torch import nn

import rkif
from rkif import Fuser, FusionConfig


def assign(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def load(model: nn.Module) -> None:
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)


def delete(model: nn.Module) -> None:
    del model[0].weight


def prune(model: nn.Module) -> None:
    nn.utils.prune.random_unstructured(model[0], "weight", 0.5)


def parametrize(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model[0])


@pytest.mark.parametrize(
    ("events", "call"), [(1, "observe"), (3, "begin_outer"), (5, "observe"), (6, "fuse")]
)
@pytest.mark.parametrize(
    ("replace", "message"),
    [
        (assign, "replaced after"),
        (load, "replaced after"),
        (delete, "removed from its layer after"),
        (prune, "removed from its layer after"),
        (parametrize, r"parametrized after .* from parametrizations\.weight\.original0, "),
    ],
)
def test_a_replaced_parameter_is_named(
    replace: Callable[..., Any], message: str, events: int, call: str
) -> None:
    loop = Loop(FusionConfig())
    loop.run(range(events))
    start = loop.fuser.state_dict()
    parameters = [p.detach().clone() for p in loop.fuser.parameters.values()]
    replace(loop.model)
    if replace is not delete:
        loop.model(batch(0)).sum().backward()
    with pytest.raises(RuntimeError, match=rf"parameter '0\.weight' of the model was {message}"):
        getattr(loop.fuser, call)()
    end = loop.fuser.state_dict()
    assert all(torch.equal(end[name], tensor) for name, tensor in start.items())
    assert all(map(torch.equal, parameters, loop.fuser.parameters.values()))


def test_a_tied_parameter_is_watched_in_every_place() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    fuser = Fuser(model, FusionConfig())
    model[1].weight = nn.Parameter(torch.ones(4, 4))
    model(batch(0)).sum().backward()
    with pytest.raises(RuntimeError, match=r"parameter '0\.weight' of the model was replaced"):
        fuser.observe()


def test_a_replaced_layer_is_noticed_at_the_end_of_its_phase() -> None:
    loop = Loop(FusionConfig())
    loop.run(range(2))
    loop.model[2] = nn.Linear(9, 2)
    for call in (loop.fuser.begin_outer, loop.fuser.begin_outer):  # also when it is tried again
        with pytest.raises(RuntimeError, match=r"the layer of parameter '2\.weight' was replaced"):
            call()
    assert loop.fuser.phase == "inner"


def test_resized_embeddings() -> None:
    model = tiny_llama(40, 0)
    fuser = Fuser(model, FusionConfig())
    inputs = torch.randint(0, 40, (2, 5))
    model(input_ids=inputs, labels=inputs).loss.backward()
    fuser.observe()
    model.zero_grad()
    model.resize_token_embeddings(48, mean_resizing=False)
    model(input_ids=inputs, labels=inputs).loss.backward()
    with pytest.raises((RuntimeError, ValueError), match=r"embed_tokens\.weight'"):
        fuser.observe()
    with pytest.raises(RuntimeError, match=r"(embed_tokens|lm_head)\.weight'"):
        fuser.begin_outer()


def test_another_dtype_is_noticed() -> None:
    loop = Loop(FusionConfig())
    loop.run(range(2))
    loop.model.bfloat16()
    with pytest.raises(RuntimeError, match=r"'0\.weight' was torch\.float32 .* and is torch\.bfloat16"):
        loop.fuser.begin_outer()


def test_another_device_is_noticed() -> None:
    loop = Loop(FusionConfig())
    loop.run(range(2))
    torch.utils.swap_tensors(loop.model[0].weight, nn.Parameter(torch.ones(9, 4, device="meta")))
    with pytest.raises(RuntimeError, match=r"'0\.weight' was torch\.float32 \(9, 4\) on cpu .* meta now"):
        loop.fuser.begin_outer()


def unfreeze(model: nn.Module) -> str:
    model[0].bias.requires_grad_()
    return "0.bias"


def add_layer(model: nn.Module) -> str:
    model.append(nn.Linear(2, 2))
    return "3.weight"


@pytest.mark.parametrize("add", [unfreeze, add_layer])
def test_a_parameter_that_became_trainable_is_named(add: Callable[[nn.Module], str]) -> None:
    model = make_model()
    model[0].bias.requires_grad_(False)
    fuser = Fuser(model, FusionConfig())
    model(batch(0)).sum().backward()
    fuser.observe()
    name = add(model)
    with pytest.raises(RuntimeError, match=f"'{name}' is trainable now, but was not when the Fuser was made"):
        fuser.begin_outer()
    assert fuser.phase == "inner"


def test_a_second_adapter_is_named() -> None:
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(tiny_llama(40, 0), settings)
    fuser = Fuser(model, FusionConfig())
    inputs = torch.randint(0, 40, (2, 5))
    model(input_ids=inputs, labels=inputs).loss.backward()
    fuser.observe()
    fuser.begin_outer()
    fuser.observe()
    model.add_adapter("second", settings)
    model.set_adapter("second")
    fuser.fuse()
    with pytest.raises(RuntimeError, match=r"lora_A\.second\.weight' is trainable now, but was not when"):
        fuser.begin_outer()


@pytest.mark.parametrize("call", ["make", "observe", "begin_outer", "observe the outer", "fuse", "rollback"])
def test_a_merged_adapter_is_named(call: str) -> None:
    """Merged, changed and unmerged, it would leave the weights of its layer changed, without an error."""
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(tiny_llama(40, 0), settings)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    fuser = Fuser(model, FusionConfig())
    steps: dict[str, Callable[[], Any]] = {
        "make": lambda: Fuser(model, FusionConfig()),
        "observe": fuser.observe,
        "begin_outer": fuser.begin_outer,
        "observe the outer": fuser.observe,
        "fuse": fuser.fuse,
        "rollback": fuser.rollback,
    }
    for name, step in steps.items():
        if name == call:
            break
        step()
    before = fuser.state_dict()
    model.merge_adapter()
    message = (
        r"adapter 'default' is merged into the weights of the layer of parameter '.*q_proj\.lora_A\.default"
    )
    with pytest.raises(RuntimeError, match=message):
        steps[call]()
    assert all(torch.equal(tensor, before[name]) for name, tensor in fuser.state_dict().items())
    model.unmerge_adapter()
    steps[call]()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad or torch.allclose(parameter, frozen[name])


def free(model: nn.Module) -> None:
    model[0].weight.untyped_storage().resize_(0)


def share(model: nn.Module) -> None:
    model[0].bias.data = model[0].weight.data.view(-1)[:9]


def expand(model: nn.Module) -> None:
    model[0].weight.data = torch.zeros(1, 4).expand(9, 4)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (free, r"the memory of parameter '0\.weight' is freed"),
        (share, r"parameters\['0\.bias'\] and parameters\['0\.weight'\] share memory"),
        (expand, r"parameters\['0\.weight'\] is an expanded view"),
    ],
)
@pytest.mark.parametrize(("events", "call"), [(3, "begin_outer"), (6, "fuse")])
def test_a_parameter_whose_memory_is_freed_or_shared_is_named(
    spoil: Callable[[nn.Module], None], message: str, events: int, call: str
) -> None:
    loop = Loop(FusionConfig())
    loop.run(range(events))
    spoil(loop.model)
    with pytest.raises(ValueError, match=message):
        getattr(loop.fuser, call)()
    assert loop.fuser.round == 0


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile, lambda model: model.named_parameters()])
def test_changes_in_place_are_no_error(wrap: Callable[[Any], Any]) -> None:
    model = make_model()
    fuser = Fuser(wrap(model), FusionConfig())
    for _ in range(2):
        model.load_state_dict(make_model(1).state_dict())
        model.double().float()  # the same parameters, other memory
        model.zero_grad()
        model(batch(0)).sum().backward()
        fuser.observe()
        with fuser.outer():
            fuser.observe()
    assert fuser.round == 2


def test_a_deleted_model_is_no_error() -> None:
    fuser = Fuser(nn.Sequential(nn.Linear(2, 2)), FusionConfig())
    for parameter in fuser.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    fuser.observe()
    with fuser.outer():
        fuser.observe()
    assert fuser.round == 1


@pytest.mark.parametrize("optimizer", [None, rkif.optim.AdamW])
def test_a_step_without_any_gradient_is_refused(optimizer: Any) -> None:
    model = make_model()
    fuser = Fuser(model, FusionConfig())
    observe = fuser.observe if optimizer is None else optimizer(model.parameters(), fuser=fuser).step
    model(batch(0)).sum().backward()
    model.zero_grad()
    with pytest.raises(RuntimeError, match=r"no parameter has a gradient: observe after backward\(\)"):
        observe()
    assert fuser.inner_observed == 0
    model(batch(0)).sum().backward()
    observe()
    assert fuser.inner_observed == 1
