"""Each formula against LyCORIS's own modules, in every form that they write."""

from __future__ import annotations

import pytest
import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import nn
from torch.nn import functional as F

from safelight.families.sd.spec import SD1
from safelight.families.tables import row
from safelight.weights.adapter_formulas import difference
from safelight.weights.adapter_mapping import WeightChange, match_adapter, modules_by_name

KINDS = {"lora": LoConModule, "loha": LohaModule, "lokr": LokrModule}
LAYERS = {
    "linear": lambda: nn.Linear(48, 32),
    "convolution": lambda: nn.Conv2d(16, 32, 3),
    "pointwise": lambda: nn.Conv2d(16, 32, 1),
}
FORMS = {
    "plain": {},
    "tucker": {"use_tucker": True},
    "dora": {"weight_decompose": True},
    "dora per input channel": {"weight_decompose": True, "wd_on_out": False},
}


def parts_of(tensors: dict[str, torch.Tensor], weight: torch.Tensor) -> dict[str, WeightChange]:
    known = modules_by_name(
        [(SD1.component("unet"), [row("x.weight", tuple(weight.shape)), row("x.bias", (weight.shape[0],))])]
    )
    found = match_adapter({name: tuple(tensor.shape) for name, tensor in tensors.items()}, known)
    assert not found.unknown
    assert not found.mismatched
    return {part.target: part for part in found.changes["unet"]}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [1.0, 3.0], ids=["alpha 1", "alpha 3"])
def test_differences_equal_those_of_lycoris(kind: str, layer: str, form: str, alpha: float) -> None:
    torch.manual_seed(7)
    original = LAYERS[layer]()
    module = KINDS[kind]("x", original, 1.0, 2, alpha, **FORMS[form])
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    weight = original.weight.detach().clone()
    x = torch.randn(2, 48) if layer == "linear" else torch.randn(2, 16, 5, 5)
    tensors = {f"lora_unet_x.{name}": tensor.detach() for name, tensor in module.state_dict().items()}
    part = parts_of(tensors, weight)["x.weight"]
    ours = difference(part, {slot: tensors[name] for slot, name in part.slots.items()}, weight)
    # What it computes, as merging scales twice in some of its modules.
    module.apply_to()
    operation = F.linear if layer == "linear" else F.conv2d
    with torch.no_grad():
        theirs, plain = original(x), operation(x, weight, original.bias)
        assert torch.allclose(operation(x, weight + ours, original.bias), theirs, rtol=1e-4, atol=1e-5)
    assert part.kind == kind
    assert (theirs - plain).abs().max() > 0.01


@pytest.mark.parametrize(("of_weight", "of_bias"), [("w_norm", "b_norm"), ("diff", "diff_b")])
def test_full_rank_differences_of_weights_and_biases(of_weight: str, of_bias: str) -> None:
    weight = torch.zeros(32)
    tensors = {f"lora_unet_x.{of_weight}": torch.ones(32), f"lora_unet_x.{of_bias}": torch.full((32,), 2.0)}
    parts = parts_of(tensors, weight)
    for name, value in (("x.weight", 1.0), ("x.bias", 2.0)):
        slots = {slot: tensors[tensor] for slot, tensor in parts[name].slots.items()}
        assert torch.equal(difference(parts[name], slots, weight), torch.full((32,), value))
