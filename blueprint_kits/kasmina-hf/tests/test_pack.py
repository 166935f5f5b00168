"""The pack as Kasmina sees it."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from kasmina_core import HostError, HostProtocol, MorphogeneticModel, PackState, default_registry

import kasmina_hf

HOSTS = ["bert-tiny", "convnext-tiny", "gpt2-tiny", "llama-tiny", "resnet-tiny", "vit-tiny"]


def test_the_pack_is_active_with_its_hosts() -> None:
    record = next(record for record in default_registry().packs if record.name == "hf")
    assert record.state is PackState.ACTIVE, record.cause
    assert record.distribution == "kasmina-hf"
    assert list(record.hosts) == [f"hf:{name}" for name in HOSTS]


def test_the_pack_declares_its_hosts_without_torch_or_transformers() -> None:
    code = (
        "import sys, kasmina_hf; assert len(list(kasmina_hf.kasmina_hosts())) == 6; "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_is_there() -> None:
    for name in kasmina_hf.__all__:
        assert callable(getattr(kasmina_hf, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = kasmina_hf.nothing


@pytest.mark.parametrize("name", HOSTS)
def test_a_host_declares_points_that_hold_slots_and_copies(name: str) -> None:
    spec = default_registry().hosts.get(f"hf:{name}")
    host = default_registry().hosts.create(f"hf:{name}").eval()
    assert isinstance(host, HostProtocol)
    inputs = host.example_inputs()  # type: ignore[attr-defined]
    bare = host(**inputs).logits
    model = MorphogeneticModel(host).eval()
    assert len(model.slots) == 2
    assert {slot.point.topology for slot in model.slots.values()} == {spec.topology}
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**inputs).logits, bare)
    with pytest.raises(HostError, match="already has a slot"):
        MorphogeneticModel(host)
    assert len(MorphogeneticModel(model.detach_slots()).slots) == 2


@pytest.mark.parametrize("name", HOSTS)
def test_a_host_learns_with_the_loss_of_its_kind(name: str) -> None:
    host = default_registry().hosts.create(f"hf:{name}")
    inputs = host.example_inputs()  # type: ignore[operator]
    labels = inputs["input_ids"] if name in ("gpt2-tiny", "llama-tiny") else torch.tensor([0, 1])
    loss = host(**inputs, labels=labels).loss
    loss.backward()
    assert loss.isfinite()


def test_options_of_a_host_are_fields_of_its_config_and_others_are_refused() -> None:
    create = default_registry().hosts.create
    assert len(create("hf:gpt2-tiny", n_layer=3).injection_points()) == 3  # type: ignore[operator]
    with pytest.raises(HostError, match=r"GPT2Config has no field 'n_layers'. Did you mean 'n_layer'\?"):
        create("hf:gpt2-tiny", n_layers=3)


def test_a_host_takes_the_words_that_the_command_gives_every_host() -> None:
    create = default_registry().hosts.create
    assert create("gpt2-tiny", vocab_size=64, max_len=70).config.n_positions == 70
    assert create("llama-tiny", max_len=70).config.max_position_embeddings == 70
    config = create("vit-tiny", in_channels=1, image_size=8, num_classes=7).config
    assert (config.num_channels, config.num_labels) == (1, 7)
