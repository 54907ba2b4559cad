"""From staged bytes to a model: all of it, or none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from actors.engines.tensors import adopt_dtypes, plan_update, unpack
from penstock.errors import WeightTransferError
from penstock.trajectory import PolicyVersion
from penstock.weights.manifest import HostTensor
from penstock.weights.staged import StagedWeights, stage


class Tied(nn.Module):
    """An embedding, a layer, a persistent buffer, and a head that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.layer = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("derived", torch.ones(2), persistent=False)
        self.requires_grad_(False)


def content(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    values: dict[str, torch.Tensor | None] = {
        "embedding.weight": torch.arange(15.0).reshape(5, 3),
        "layer.weight": -torch.arange(9.0).reshape(3, 3),
        "layer.bias": torch.full((3,), 0.5),
        "scale": torch.tensor([2.0, 3.0]),
    } | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in values.items() if value is not None}


def staged(values: dict[str, torch.Tensor]) -> StagedWeights:
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    return stage(
        PolicyVersion(3, 1),
        [
            HostTensor(
                name=name,
                dtype=names[value.dtype],
                shape=tuple(value.shape),
                data=value.contiguous().reshape(-1).view(torch.uint8).numpy(),
            )
            for name, value in values.items()
        ],
    )


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_every_tensor_is_copied_in_place() -> None:
    model = Tied()
    before = model.embedding.weight
    plan_update(model, staged(content())).apply()
    for name, value in content().items():
        assert torch.equal(model.state_dict()[name], value)
    assert model.embedding.weight is before is model.head.weight


def test_a_tied_tensor_may_come_under_any_of_its_names() -> None:
    model = Tied()
    head = torch.full((5, 3), 7.0)
    plan_update(model, staged(content(embedding__weight=None, head__weight=head))).apply()
    assert torch.equal(model.embedding.weight, head)
    plan_update(model, staged(content(embedding__weight=head, head__weight=head))).apply()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (content(layer__bias=None), "lacks the tensor layer.bias"),
        (content(scale=None), "lacks the tensor scale"),
        (content(embedding__weight=None), "lacks the tensor embedding.weight"),
        (content(surplus=torch.ones(1)), "surplus"),
        (content(derived=torch.ones(2)), "derived"),
        (content(layer__weight=torch.ones(3, 2)), r"\[3, 2\]; the policy has \[3, 3\]"),
        (content(layer__weight=torch.ones(3, 3).bfloat16()), "bfloat16; the policy has it in torch.float32"),
        (content(head__weight=torch.zeros(5, 3)), "different values for the tied tensors"),
    ],
)
def test_a_version_that_does_not_fit_is_refused_and_nothing_changes(
    values: dict[str, torch.Tensor], says: str
) -> None:
    model = Tied()
    before = snapshot(model)
    with pytest.raises(WeightTransferError, match=says):
        plan_update(model, staged(values))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_planning_alone_changes_nothing() -> None:
    model = Tied()
    before = snapshot(model)
    plan_update(model, staged(content()))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_another_dtype_is_converted_when_asked_for() -> None:
    model = Tied()
    values = {name: value.bfloat16() for name, value in content().items()}
    plan_update(model, staged(values), convert=True).apply()
    assert torch.equal(model.layer.weight, values["layer.weight"].float())


def test_a_model_adopts_each_tensors_dtype_and_stays_tied() -> None:
    model = Tied()
    values = {name: value.bfloat16() for name, value in content().items()} | {"scale": torch.ones(2)}
    adopt_dtypes(model, staged(values))
    plan_update(model, staged(values)).apply()
    assert model.head.weight is model.embedding.weight
    assert model.head.weight.dtype == torch.bfloat16
    assert model.state_dict()["scale"].dtype == torch.float32
    for name, value in values.items():
        assert torch.equal(model.state_dict()[name], value)


def test_not_a_number_counts_as_equal_bits_in_tied_tensors() -> None:
    broken = torch.full((5, 3), torch.nan)
    plan_update(Tied(), staged(content(embedding__weight=broken, head__weight=broken.clone())))


def test_tensors_are_views_of_the_staged_bytes() -> None:
    version = staged(content())
    bias = unpack(version)["layer.bias"]
    entry = version.manifest.tensors[2]
    version.buffer[entry.offset : entry.offset + 4] = np.frombuffer(np.float32(9).tobytes(), dtype=np.uint8)
    assert bias.tolist() == [9.0, 0.5, 0.5]
