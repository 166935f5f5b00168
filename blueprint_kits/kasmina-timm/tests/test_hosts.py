"""The hosts that the pack offers, by their ids."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from kasmina_core import HostError, HostProtocol, MorphogeneticModel, default_registry
from kasmina_core.testing import check_host
from timm_cases import SIZE

import kasmina_timm

HOSTS = [spec.name for spec in kasmina_timm.kasmina_hosts()]
every_host = pytest.mark.parametrize("name", HOSTS)


def test_every_public_name_is_there() -> None:
    for name in kasmina_timm.__all__:
        assert callable(getattr(kasmina_timm, name)), name


@every_host
def test_a_host_passes_the_conformance_checks(name: str) -> None:
    check_host(f"timm:{name}").raise_if_failed()


@every_host
def test_a_host_declares_points_that_hold_slots_and_copies(name: str) -> None:
    hosts = default_registry().hosts
    host = hosts.create(f"timm:{name}").eval()
    assert isinstance(host, HostProtocol)
    images = torch.randn(2, 3, SIZE, SIZE)
    bare = host(images)
    assert bare.shape == (2, 10)
    model = MorphogeneticModel(host).eval()
    assert len(model.slots) >= 2
    assert {slot.point.topology for slot in model.slots.values()} == {hosts.get(f"timm:{name}").topology}
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images), bare)
    with pytest.raises(HostError, match="already has a slot"):
        MorphogeneticModel(host)
    assert len(MorphogeneticModel(model.detach_slots()).slots) == len(model.slots)


@every_host
def test_a_host_declares_the_same_points_whether_it_holds_slots_or_not(name: str) -> None:
    host = default_registry().hosts.create(f"timm:{name}")
    before = list(host.injection_points())  # type: ignore[operator]
    MorphogeneticModel(host)
    assert list(host.injection_points()) == before  # type: ignore[operator]
    assert before == kasmina_timm.points(host, example=host.example_inputs())  # type: ignore[operator]


def test_a_host_takes_options_and_refuses_others() -> None:
    create = default_registry().hosts.create
    host = create("timm:vit-mini", depth=3, image_size=16)
    assert len(host.injection_points()) == 3  # type: ignore[operator]
    assert host.example_inputs().shape == (2, 3, 16, 16)  # type: ignore[operator]
    with pytest.raises(HostError, match="unexpected keyword argument 'pretrained'"):
        create("timm:resnet-mini", pretrained=True)


@pytest.mark.parametrize("name", [name for name in HOSTS if name != "torchvision-vit-mini"])
def test_a_host_takes_images_of_other_channels(name: str) -> None:
    host = default_registry().hosts.create(f"timm:{name}", in_channels=1, num_classes=4)
    assert host(host.example_inputs()).shape == (2, 4)  # type: ignore[operator]
    assert host.example_inputs().shape == (2, 1, SIZE, SIZE)  # type: ignore[operator]


def test_a_host_whose_slot_checkpointing_would_pass_by_refuses_to_run() -> None:
    host = default_registry().hosts.create("timm:resnet-mini")
    model = MorphogeneticModel(host, ["layer2"])
    host.set_grad_checkpointing()  # type: ignore[operator]
    with pytest.raises(HostError, match="may pass by the one at 'layer2' of ResNetHost"):
        model(torch.randn(2, 3, SIZE, SIZE))
    model.detach_slots()
    host(torch.randn(2, 3, SIZE, SIZE))
