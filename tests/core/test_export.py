"""A grown model leaves as a plain module that computes the same, and runs where kasmina is not installed."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from dataclasses import dataclass

import pytest
import torch
from state_helpers import (
    FIRST,
    SECOND,
    WIDTH,
    bring_to,
    make_batch,
    make_host,
    make_model,
    make_registry,
    open_config,
)
from torch import nn

from kasmina_core import (
    BlueprintRegistry,
    BlueprintSpec,
    ExportError,
    HookedHost,
    HostError,
    InjectionPoint,
    MorphogeneticModel,
    SeedStage,
    Topology,
    export_model,
    tie_optimizer,
)
from kasmina_core.growth.slot import SeedSlot
from kasmina_core.hosts import SlotHook

EXAMPLE = torch.zeros(2, 1, 5, 5)


def fossilised(*slots, blueprint="scale", model=None):
    model = model or make_model()[0]
    for slot in slots:
        bring_to(model, SeedStage.FOSSILIZED, slot, blueprint)
    with torch.no_grad():
        for parameter in model.seed_parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def is_free_of_us(module):
    assert not any(isinstance(part, (SeedSlot, MorphogeneticModel)) for part in module.modules())
    hooks = [hook for part in module.modules() for hook in part._forward_hooks.values()]
    assert not any(isinstance(hook, SlotHook) for hook in hooks)
    return True


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("blueprint", ["scale", "normed"])
def test_the_exported_model_computes_the_same_and_learns_the_same(blueprint, training):
    model = fossilised(FIRST, SECOND, blueprint=blueprint).train(training)
    plain = export_model(model, EXAMPLE)
    assert is_free_of_us(plain)
    assert plain.training is training
    x, _ = make_batch()
    outputs = [model(x), plain(x)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.sum().backward()
    gradients = [[p.grad for p in module.parameters()] for module in (model, plain)]
    assert len(gradients[0]) == len(gradients[1])
    by_size = [sorted((g.flatten().tolist() for g in one), key=str) for one in gradients]
    assert by_size[0] == by_size[1]


def test_the_model_stays_as_it_was():
    model = fossilised(FIRST).eval()
    before, x = copy.deepcopy(model.state_dict()), make_batch()[0]
    output = model(x)
    plain = export_model(model, EXAMPLE)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before if not key.endswith("_extra_state"))
    assert torch.equal(model(x), output)


def test_torch_export_takes_it():
    model = fossilised(FIRST, SECOND).eval()
    x, _ = make_batch()
    program = torch.export.export(export_model(model, EXAMPLE), (x,))
    assert torch.equal(program.module()(x), model(x))


def test_the_keys_say_where_things_are():
    keys = list(export_model(fossilised(FIRST), EXAMPLE).state_dict())
    assert [key for key in keys if key.startswith(f"{FIRST}.")] == [f"{FIRST}.1.weight", f"{FIRST}.1.bias"]
    assert {"0.weight", "7.bias"} <= set(keys)


@pytest.mark.slow
def test_it_is_loaded_where_kasmina_cannot_be_imported(tmp_path, monkeypatch):
    package = tmp_path / "packs"
    package.mkdir()
    (package / "mine.py").write_text(
        textwrap.dedent(
            """
            from dataclasses import dataclass
            import torch
            from torch import nn

            @dataclass
            class Output:
                features: torch.Tensor
                more: int

            class Pair(nn.Conv2d):
                def forward(self, x):
                    return super().forward(x), x.sum()

            class Record(nn.Conv2d):
                def forward(self, x):
                    return Output(super().forward(x), 3)

            class Host(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.plain = nn.Conv2d(1, 4, 3, padding=1)
                    self.pair, self.record = Pair(4, 4, 1), Record(4, 4, 1)

                def forward(self, x):
                    x, total = self.pair(self.plain(x))
                    output = self.record(x)
                    return output.features.mean((2, 3)) + total * output.more

            class Seed(nn.Module):
                def __init__(self, dim):
                    super().__init__()
                    self.weight = nn.Parameter(torch.full((dim, 1, 1), 1.5))

                def forward(self, x):
                    return x * self.weight
            """
        )
    )
    monkeypatch.syspath_prepend(str(package))
    import mine

    x = torch.linspace(-1, 1, 50).view(2, 1, 5, 5)
    registry = BlueprintRegistry()
    registry.register(BlueprintSpec("seed", Topology.CNN, mine.Seed, lambda d: d), pack="mine")
    points = ("plain", "pair", "record")
    model = MorphogeneticModel(mine.Host(), points, example=x, registry=registry, config=open_config()).eval()
    model.evaluate_with(lambda: model(x).sum(1))
    fossilised(*points, blueprint="seed", model=model)
    made = tmp_path / "made.pt"
    torch.save([export_model(model, x), x, model(x).detach()], made)
    monkeypatch.delitem(sys.modules, "mine")
    take = f"""
        import sys, torch
        class Never:
            def find_spec(self, name, *_):
                assert not name.startswith("kasmina"), name
        sys.meta_path.insert(0, Never())
        sys.path.insert(0, {str(package)!r})
        plain, x, expected = torch.load({str(made)!r}, weights_only=False)
        assert torch.equal(plain(x), expected)
        assert torch.equal(torch.export.export(plain, (x,)).module()(x), expected)
        assert not [name for name in sys.modules if name.startswith("kasmina")]
        print("equal")
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(take)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal\n"


@dataclass
class Output:
    missing: object
    features: torch.Tensor


class Layer(nn.Module):
    """Its output, a tuple or a dataclass, is what the test asks for; it takes keywords, and the host reads its kind."""

    def __init__(self, form):
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 1)
        self.form, self.kind = form, "local"

    def forward(self, x, *, scale=1.0):
        y = self.conv(x) * scale
        return {"tensor": y, "tuple": (y, x), "dataclass": Output(None, y)}[self.form]


class LayerHost(HookedHost, nn.Module):
    def __init__(self, form, reads="kind"):
        super().__init__()
        self.stem, self.layer = nn.Conv2d(1, WIDTH, 3, padding=1), Layer(form)
        self.reads = reads

    def injection_points(self):
        return [InjectionPoint("point", "layer", WIDTH, Topology.CNN)]

    def example_inputs(self):
        return (EXAMPLE,)

    def forward(self, x):
        getattr(self.layer, self.reads)
        y = self.layer(self.stem(x), scale=0.5)
        return (
            y[0] + y[1] if self.layer.form == "tuple" else y.features if self.layer.form == "dataclass" else y
        )


def layered(form, reads="kind"):
    model = MorphogeneticModel(LayerHost(form, reads), registry=make_registry(), config=open_config())
    x, _ = make_batch(4)
    model.evaluate_with(lambda: model(x).mean((1, 2, 3)))
    return fossilised("point", model=model)


@pytest.mark.parametrize("form", ["tensor", "tuple", "dataclass"])
def test_any_output_a_slot_can_sit_on_can_be_exported(form):
    model = layered(form).eval()
    plain, x = export_model(model), make_batch()[0]
    assert is_free_of_us(plain)
    assert torch.equal(model(x), plain(x))
    assert torch.equal(torch.export.export(plain, (x,)).module()(x), model(x))


def test_a_host_that_reads_into_a_replaced_module_is_refused_with_the_reason():
    with pytest.raises(
        ExportError, match=r"(?s)LayerHost does not run.*conv.*more of a replaced module.*'layer'"
    ):
        export_model(layered("tensor", reads="conv"))


def test_unfinished_seeds_are_refused_or_dropped():
    model = fossilised(FIRST)
    bring_to(model, SeedStage.SHADOWING, SECOND)
    with pytest.raises(ExportError, match=r"not part of the model yet: 4 \(SHADOWING\)"):
        export_model(model, EXAMPLE)
    plain, x = export_model(model, EXAMPLE, unfinished="drop"), make_batch()[0]
    with model.eval().bypassed(SECOND):
        assert torch.equal(model(x), plain.eval()(x))
    with pytest.raises(ValueError, match="one of refuse, drop, not 'keep'"):
        export_model(model, EXAMPLE, unfinished="keep")


def test_a_model_in_which_nothing_grew_is_its_host():
    model, _ = make_model()
    plain = export_model(model, EXAMPLE)
    assert list(plain.state_dict()) == list(make_host().state_dict())
    assert is_free_of_us(plain)


def test_points_inside_of_points_are_exported_each():
    host = nn.Sequential(nn.Sequential(nn.Conv2d(1, WIDTH, 1), nn.ReLU()), nn.ReLU())
    model = MorphogeneticModel(
        host, ("0", "0.0"), example=EXAMPLE, registry=make_registry(), config=open_config()
    )
    x, _ = make_batch()
    model.evaluate_with(lambda: model(x).mean((1, 2, 3)))
    fossilised("0", "0_0", model=model)
    assert torch.equal(export_model(model, EXAMPLE)(x), model(x))


def test_a_seed_that_answers_in_another_dtype_is_cast_as_in_the_slot():
    model, _ = make_model()
    fossilised(FIRST, model=model)
    model.slots[FIRST].seed.to(torch.float64)
    plain, x = export_model(model.eval(), EXAMPLE), make_batch()[0]
    assert torch.equal(model(x), plain(x))
    assert plain(x).dtype is torch.float32


def test_an_optimiser_of_the_exported_model_goes_on_training_it():
    model = fossilised(FIRST)
    tie_optimizer(model, torch.optim.SGD(model.host_parameters(), 0.1))
    plain = export_model(model, EXAMPLE)
    assert all(p.grad is None for p in plain.parameters())
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in model.parameters())


def test_an_export_without_an_example_says_how_to_give_one():
    host = nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, WIDTH, 3, padding=1))
    x = torch.randn(2, 3, 8, 8)
    model = MorphogeneticModel(host, ["0"], example=x)
    with pytest.raises(HostError, match=r"(?s)its export.*export_model\(model, example=\.\.\.\)"):
        export_model(model)
    assert torch.equal(export_model(model, x).eval()(x), model.eval()(x))
