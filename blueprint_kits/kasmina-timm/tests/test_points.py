"""Points read off models and proved by a forward."""

from __future__ import annotations

import copy

import pytest
import torch
from kasmina_core import HostError, InjectionPoint, Topology
from timm_cases import CASES, CLASSES, SIZE, BlockParams, Case, created, every_case, swin, timm, tv
from torch import nn

from kasmina_timm import example_inputs, grow, points

IMAGES, TOKENS = Topology.CNN, Topology.TRANSFORMER

EXPECTED = {
    "timm-resnet": [("act1", 32), ("layer1", 32), ("layer2", 48), ("layer3", 192), ("layer4", 96)],
    "timm-convnext": [("stages.0", 8), ("stages.1", 12), ("stages.2", 16), ("stages.3", 20)],
    "timm-efficientnet": [
        ("blocks.0", 16),
        ("blocks.1", 24),
        ("blocks.2", 32),
        ("blocks.3", 48),
        ("blocks.4", 64),
    ],
    "timm-mobilenet": [
        ("bn1", 16),
        ("blocks.0", 8),
        ("blocks.1", 16),
        ("blocks.3", 24),
        ("blocks.5", 288),
    ],
    "timm-swin": [("layers.0", 8), ("layers.1", 16)],
    "timm-vit": [("blocks.0", 64), ("blocks.1", 64)],
    "torchvision-resnet": [("layer1", 64), ("layer2", 128), ("layer3", 256), ("layer4", 512)],
    "torchvision-convnext": [("features.1", 8), ("features.3", 12)],
    "torchvision-densenet": [
        ("features.relu0", 8),
        ("features.denseblock1", 16),
        ("features.denseblock2", 16),
        ("features.denseblock3", 16),
        ("features.norm5", 16),
    ],
    "torchvision-mobilenet": [
        ("features.1", 8),
        ("features.3", 8),
        ("features.6", 8),
        ("features.13", 24),
        ("features.18", 1280),
    ],
    "torchvision-vgg": [("features.1", 8), ("features.6", 12), ("features.7", 12)],
    "torchvision-vit": [
        ("encoder.layers.encoder_layer_0", 16),
        ("encoder.layers.encoder_layer_1", 16),
    ],
}


@every_case
def test_points_are_the_model_s_stages_or_blocks(case: Case) -> None:
    found = points(case.host())
    assert [(point.path, point.dim) for point in found] == EXPECTED[case.name]
    assert [point.name for point in found] == [point.path.replace(".", "_") for point in found]
    assert {point.topology for point in found} == {TOKENS if "vit" in case.name else IMAGES}
    assert not any(point.causal for point in found)


@every_case
def test_features_at_a_point_are_as_declared(case: Case) -> None:
    host, found = case.host(), points(case.host())
    tall = "vit" not in case.name and "swin" not in case.name
    images = torch.randn(1, 3, 2 * SIZE if tall else SIZE, SIZE)
    seen: dict[str, list[torch.Size]] = {point.path: [] for point in found}
    for path, shapes in seen.items():
        host.get_submodule(path).register_forward_hook(lambda _m, _a, out, s=shapes: s.append(out.shape))
    host(images)
    for point in found:
        (shape,) = seen[point.path]
        assert len(shape) == point.topology.ndim
        assert shape[point.axes.index(point.topology.width)] == point.dim
        if tall:  # (b, c, h, w): height and width are those of the image, at some stride
            assert shape[2] == 2 * shape[3]


@every_case
def test_asking_for_points_leaves_the_model_as_it_was(case: Case) -> None:
    host = case.host()
    for part in list(host.children())[::2]:
        part.train()
    modes = [module.training for module in host.modules()]
    before = {key: value.clone() for key, value in host.state_dict().items()}
    numbers = torch.get_rng_state()
    points(host)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert [module.training for module in host.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in host.state_dict().items())
    assert not [hook for module in host.modules() for hook in module._forward_hooks.values()]


def test_a_model_that_keeps_what_it_computes_of_its_parameters_can_be_copied_afterwards() -> None:
    host = created("levit_128s")().eval()
    points(host)
    copy.deepcopy(host)
    assert all(parameter.requires_grad for parameter in host.parameters())


class KeepsFeatures(nn.Module):
    """Keeps what it was given last, as torchvision's RAFT does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = x
        return 2 * x


def test_a_model_that_keeps_its_features_can_be_copied_afterwards() -> None:
    host = nn.Sequential(nn.Conv2d(3, 4, 1), KeepsFeatures())
    assert [point.path for point in points(host)] == ["0"]
    copy.deepcopy(host)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("alexnet", [("features.1", 64), ("features.4", 192), ("features.11", 256), ("features.12", 256)]),
        (
            "efficientnet_b0",
            [
                ("features.1", 16),
                ("features.2", 24),
                ("features.3", 40),
                ("features.5", 112),
                ("features.8", 1280),
            ],
        ),
        (
            "mnasnet0_5",
            [
                ("layers.7", 8),
                ("layers.8", 16),
                ("layers.9", 24),
                ("layers.11", 48),
                ("layers.16", 1280),
            ],
        ),
        (
            "mobilenet_v3_small",
            [
                ("features.0", 16),
                ("features.1", 16),
                ("features.3", 24),
                ("features.8", 48),
                ("features.12", 576),
            ],
        ),
        ("shufflenet_v2_x0_5", [("stage2", 48), ("stage3", 96), ("stage4", 192)]),
        (
            "squeezenet1_1",
            [("features.1", 64), ("features.4", 128), ("features.7", 256), ("features.12", 512)],
        ),
    ],
)
def test_points_of_further_torchvision_models(name: str, expected: list[tuple[str, int]]) -> None:
    with torch.device("meta"):
        found = points(getattr(tv, name)(weights=None))
    assert [(point.path, point.dim) for point in found] == expected


def test_points_of_torchvision_s_regnet() -> None:
    sizes = BlockParams([1, 1], [8, 16], [8, 8], [1.0, 1.0], [2, 2])
    found = points(tv.RegNet(sizes, num_classes=CLASSES))
    assert [(point.path, point.dim) for point in found] == [
        ("trunk_output.block1", 8),
        ("trunk_output.block2", 16),
    ]


def test_every_takes_each_so_many_places() -> None:
    host = CASES["timm-resnet"].host()
    assert [point.name for point in points(host, every=2)] == ["layer1", "layer3"]
    assert list(grow(host, every=2).slots) == ["layer1", "layer3"]
    with pytest.raises(ValueError, match="every must be from 1 to 5, the number of places, not 6"):
        points(host, every=6)
    with pytest.raises(ValueError, match="not 0"):
        points(host, every=0)


@pytest.mark.parametrize("wanted", ["blocks_1", "blocks.1"])
def test_a_place_may_be_named_by_point_or_by_path(wanted: str) -> None:
    model = grow(CASES["timm-efficientnet"].host(), wanted)
    assert [(slot.name, slot.point.path) for slot in model.slots.values()] == [("blocks_1", "blocks.1")]


def test_places_inside_stages_may_be_named_by_a_glob() -> None:
    model = grow(CASES["timm-vit"].host(), "blocks.*.mlp")
    assert {name: slot.point.dim for name, slot in model.slots.items()} == {
        "blocks_0_mlp": 64,
        "blocks_1_mlp": 64,
    }


def test_a_model_without_feature_info_has_a_point_after_each_block() -> None:
    host = CASES["timm-vit"].host()
    found = points(host)
    del host.feature_info
    assert points(host) == found


# -- where the declared module is not the one that runs ---------------------------------------------------------------


def features_only(name: str, **options: object) -> nn.Module:
    return timm.create_model(name, pretrained=False, features_only=True, **options)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (
            lambda: features_only("test_convnext", out_indices=(1, 3)),
            [("stages_1", "stages_1", 32), ("stages_3", "stages_3", 64)],
        ),
        (
            lambda: features_only("test_vit", img_size=SIZE, depth=2, out_indices=(0, 1)),
            [("blocks_0", "model.blocks.0", 64), ("blocks_1", "model.blocks.1", 64)],
        ),
    ],
)
def test_models_that_return_features_have_points_too(
    build: object, expected: list[tuple[str, str, int]]
) -> None:
    host = build()  # type: ignore[operator]
    assert [(point.name, point.path, point.dim) for point in points(host)] == expected
    images = torch.randn(2, 3, SIZE, SIZE)
    bare = host.eval()(images)
    assert all(map(torch.equal, grow(host)(images), bare))


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return created(name)()


@pytest.mark.parametrize(
    ("name", "first", "topology"),
    [
        ("mvitv2_tiny", ("block_0", "stages.0", 96), TOKENS),
        ("twins_pcpvt_small", ("block_0", "blocks.0.2", 64), TOKENS),
        ("pit_ti_224", ("transformers_0", "transformers.0", 64), IMAGES),
    ],
)
def test_a_stage_that_is_named_wrongly_or_not_called_is_found(
    name: str, first: tuple[str, str, int], topology: Topology
) -> None:
    point = points(on_meta(name))[0]
    assert (point.name, point.path, point.dim) == first
    assert point.topology is topology


# -- channels-last ----------------------------------------------------------------------------------------------------


def tv_swin() -> nn.Module:
    return tv.SwinTransformer([2, 2], 8, [1, 1], [1, 1], [4, 4], num_classes=CLASSES)  # type: ignore[no-any-return]


def sam() -> nn.Module:
    options = {"img_size": SIZE, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 1}
    return timm.models.VisionTransformerSAM(**options, neck_chans=8, num_classes=CLASSES)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (swin, [("layers.0", 8), ("layers.1", 16)]),
        (tv_swin, [("features.1", 8), ("features.3", 16)]),
        (created("test_mambaout"), [("stages.0", 16), ("stages.1", 32), ("stages.2", 48), ("stages.3", 64)]),
        (sam, [("blocks.0", 12), ("blocks.1", 12)]),
    ],
    ids=["swin", "torchvision-swin", "mambaout", "sam"],
)
def test_points_of_channels_last_models_have_that_layout(
    build: object, expected: list[tuple[str, int]]
) -> None:
    host = build()  # type: ignore[operator]
    found = points(host)
    assert [(point.path, point.dim) for point in found] == expected
    assert {(point.topology, point.layout) for point in found} == {(IMAGES, "bhwc")}
    for slot in grow(host, expected[0][0]).slots.values():
        assert slot.point == found[0]


def test_a_layout_that_shapes_leave_open_is_the_one_that_the_model_declares() -> None:
    host = created("test_mambaout")()
    images = torch.randn(1, 3, 64, 64)
    assert host.stages[0](host.stem(images)).shape == (1, 16, 16, 16)
    assert points(host, example=images)[0].layout == "bhwc"


def test_a_path_given_by_hand_gets_the_layout_of_its_features() -> None:
    slots = grow(swin(), ["layers.0.blocks.0", "patch_embed.proj"]).slots.values()
    assert [(slot.point.dim, slot.point.axes) for slot in slots] == [(8, "bhwc"), (8, "bchw")]


def test_places_in_a_channels_last_model_that_are_not_can_hold_slots() -> None:
    host = swin().eval()
    images = torch.randn(2, 3, SIZE, SIZE)
    bare = host(images)
    stem = InjectionPoint("stem", "patch_embed.proj", 8, IMAGES)
    model = grow(host, ["layers.*.blocks.*.mlp", stem])
    assert [(slot.point.topology, slot.point.dim) for slot in model.slots.values()] == [
        (TOKENS, 8),
        (TOKENS, 16),
        (IMAGES, 8),
    ]
    assert torch.equal(model(images), bare)


# -- models that declare no places, or some that cannot hold a slot ----------------------------------------------------


def test_declared_places_that_cannot_hold_a_slot_are_left_out() -> None:
    assert [point.path for point in points(on_meta("tresnet_m"))] == [
        "body.layer1",
        "body.layer2",
        "body.layer3",
        "body.layer4",
    ]


def test_where_stages_return_lists_the_last_module_at_each_resolution_holds_a_slot() -> None:
    found = points(on_meta("hrnet_w18_small"))
    assert [(point.path, point.dim) for point in found] == [
        ("conv1", 64),
        ("incre_modules.0", 128),
        ("downsamp_modules.0.0", 256),
        ("downsamp_modules.1.0", 512),
        ("final_layer", 2048),
    ]


class ReadsSecond(nn.Module):
    """A block of two outputs, of which the model reads the second."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.inner(x)
        return x + 1, 2 * x


class TwoOutputs(nn.Module):
    feature_info = ({"module": "block", "num_chs": 3},)

    def __init__(self) -> None:
        super().__init__()
        self.block = ReadsSecond()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)[1].mean((2, 3))


def test_features_that_the_model_does_not_read_are_no_place() -> None:
    assert [point.path for point in points(TwoOutputs())] == ["block.inner"]


def video() -> nn.Module:
    return tv.video.r3d_18(weights=None)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (
            lambda: tv.GoogLeNet(num_classes=CLASSES, init_weights=False),
            {("inception3b", IMAGES), ("inception4e", IMAGES), ("inception5b", IMAGES)},
        ),
        (
            lambda: tv.segmentation.fcn_resnet50(weights=None, weights_backbone=None),
            {("backbone.layer1", IMAGES)},
        ),
        (video, {("layer1", Topology.VOLUME), ("layer3", Topology.VOLUME)}),
    ],
    ids=["googlenet", "fcn", "r3d"],
)
def test_parts_of_a_model_of_another_kind_are_found_by_a_forward(
    build: object, expected: set[tuple[str, Topology]]
) -> None:
    with torch.device("meta"):
        host = build()  # type: ignore[operator]
    assert expected <= {(point.path, point.topology) for point in points(host)}


# -- refusal ------------------------------------------------------------------------------------------------------------


def test_a_model_without_a_place_is_refused_with_what_can_be_done() -> None:
    host = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(
        HostError, match=r"(?s)cannot be derived: nothing in it returns.*Modules that it has: 0, 1"
    ):
        points(host, example=torch.randn(2, 3, 2, 2))


def test_a_model_of_another_kind_grows_where_places_are_named_by_hand() -> None:
    host = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert list(grow(host, ["1"], example=torch.randn(1, 1, 8, 8)).slots) == ["1"]


def test_an_example_that_the_model_does_not_take_is_refused() -> None:
    with pytest.raises(
        HostError, match=r"(?s)does not take an example of shape \(1, 2, 8, 8\).*example=tensor"
    ):
        points(CASES["timm-resnet"].host(), example=torch.randn(1, 2, 8, 8))


# -- examples -----------------------------------------------------------------------------------------------------------


@every_case
def test_example_inputs_are_what_the_model_takes_and_always_the_same(case: Case) -> None:
    host = case.host()
    host(example_inputs(host))
    assert torch.equal(example_inputs(host), example_inputs(host))
    assert example_inputs(host).shape[-1] == (SIZE if "vit" in case.name or "swin" in case.name else 96)


def test_example_inputs_have_the_channels_size_and_dtype_of_the_model() -> None:
    gray = created("test_resnet", in_chans=1)().to(torch.bfloat16)
    assert example_inputs(gray, 48).shape == (2, 1, 48, 48)
    assert example_inputs(gray).dtype is torch.bfloat16
    assert grow(gray).slots["layer1"].alpha_buffer.dtype is torch.bfloat16
    assert example_inputs(on_meta("deit_tiny_patch16_224"), 48).shape == (2, 3, 224, 224)
    assert example_inputs(on_meta("tresnet_m"), 48).shape == (2, 3, 48, 48)  # its first layer packs pixels
