"""Test cases for every seed of a good pack, which its own tests inherit. Needs pytest and hypothesis."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Iterable
from types import ModuleType
from typing import Any, ClassVar, Final

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kasmina_core.blueprints.declarations import BlueprintSpec
from kasmina_core.testing.offered import run_alone
from kasmina_core.topology import Topology

DTYPES: Final = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Precisions in which a seed works."""

SOME_WIDTHS: Final = (1, 2, 3, 4, 5, 7, 8, 12, 16, 31, 64, 96)
"""Small, odd and even widths; those that a blueprint refuses are left out."""

_COUNTED_WIDTHS: Final = (*range(1, 97), 127, 128, 129, 255, 256, 257, 1024)
_LISTING: Final = """
import importlib, sys
for spec in importlib.import_module(sys.argv[1]).kasmina_blueprints():
    accepted = [dim for dim in range(1, 97) if spec.refusal(dim) is None]
    assert all(spec.declared_params(dim) > 0 for dim in accepted), spec.name
assert "torch" not in sys.modules, "listing imported torch"
"""


def accepted_widths(spec: BlueprintSpec, widths: Iterable[int] = range(1, 97)) -> list[int]:
    """Return the widths that a blueprint accepts."""
    return [dim for dim in widths if spec.refusal(dim) is None]


def newborn(spec: BlueprintSpec, dim: int, seed: int = 0, **options: Any) -> nn.Module:
    """Return a seed as it is at birth, from its own random numbers; the global ones are left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return spec.load_factory()(dim, **options)


def grown(spec: BlueprintSpec, dim: int, seed: int = 0, std: float = 0.3, **options: Any) -> nn.Module:
    """Return a seed whose every parameter has moved, so that no part of it is zero."""
    module = newborn(spec, dim, seed, **options)
    source = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=source))
    return module


def features(
    spec: BlueprintSpec, dim: int, batch: int = 4, size: tuple[int, int] = (6, 5), seed: int = 2
) -> Tensor:
    """Return random features of the blueprint's topology.

    Args:
        spec: The blueprint.
        dim: The width.
        batch: Number of samples.
        size: Sizes of two axes of positions; one alone is ``size[0] * size[1]`` long, more are as long as the shorter.
        seed: Seed of the numbers.
    """
    positions = spec.topology.ndim - 2
    sizes = [math.prod(size)] if positions == 1 else [*size, *[min(size)] * positions][:positions]
    shape = spec.topology.shape(dim, batch, sizes)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fit(seed: nn.Module, x: Tensor, target: Tensor, steps: int = 60) -> float:
    """Train a seed on one batch, and return the last loss as a part of the first."""
    optimizer = torch.optim.Adam(seed.parameters(), lr=0.02)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(seed(x), target)
        loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
        optimizer.step()
        losses.append(loss.item())
    return losses[-1] / losses[0]


class SeedCases:
    """Test cases for each blueprint of a pack; a test class inherits them and names the pack.

    They go beyond the checks of a registration: they hold for seeds that are the identity at birth, keep no buffers,
    draw no random numbers and document themselves, as the bundled ones do.

    Attributes:
        pack: The pack's module.
        topology: The layout of all its blueprints.
        sources: How each declared source begins.
        largest: Scale of the largest features that every seed takes in every precision.

    >>> class TestSeeds(SeedCases):
    ...     import kasmina_cnn as pack
    ...     topology = Topology.CNN
    """

    pack: ClassVar[ModuleType]
    topology: ClassVar[Topology]
    sources: ClassVar[str] = "https://"
    largest: ClassVar[float] = 100.0

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each case once for each blueprint."""
        if "spec" in metafunc.fixturenames:
            specs = list(self.pack.kasmina_blueprints())
            metafunc.parametrize("spec", specs, ids=[spec.name for spec in specs])

    def test_listing_the_pack_imports_no_torch(self) -> None:
        done = run_alone(_LISTING, self.pack.__name__)
        assert done.returncode == 0, done.stderr

    # -- sizes, shapes, numbers -------------------------------------------------------------------------------------

    def test_declared_size_is_the_counted_size_at_every_width(self, spec: BlueprintSpec) -> None:
        factory = spec.load_factory()
        for dim in accepted_widths(spec, _COUNTED_WIDTHS):
            with torch.device("meta"):
                counted = sum(parameter.numel() for parameter in factory(dim).parameters())
            assert spec.declared_params(dim) == counted, f"width {dim}"

    def test_no_buffers_whose_state_could_drift(self, spec: BlueprintSpec) -> None:
        assert list(newborn(spec, 8).buffers()) == []

    @settings(max_examples=30, suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow])
    @given(
        dim=st.integers(1, 96),
        batch=st.integers(1, 3),
        size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
        dtype=st.sampled_from(DTYPES),
        scale=st.sampled_from([0.0, 1e-3, 1.0, None]),
        causal=st.booleans(),
    )
    def test_keeps_shape_and_dtype_and_stays_finite(
        self,
        spec: BlueprintSpec,
        dim: int,
        batch: int,
        size: tuple[int, int],
        dtype: torch.dtype,
        scale: float | None,
        causal: bool,
    ) -> None:
        if spec.refusal(dim) is not None:
            return
        seed = grown(spec, dim, **{"causal": causal} if spec.takes_causal else {}).to(dtype)
        x = (self.largest if scale is None else scale) * features(spec, dim, batch, size)
        x = x.to(dtype).requires_grad_()
        y = seed(x)
        assert (y.shape, y.dtype) == (x.shape, dtype)
        assert y.isfinite().all()
        (y.float() * features(spec, dim, batch, size, seed=4)).mean().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in seed.parameters())

    def test_one_value_of_each_feature_is_enough(self, spec: BlueprintSpec) -> None:
        for dim in accepted_widths(spec, SOME_WIDTHS):
            y = grown(spec, dim).train()(features(spec, dim, batch=1, size=(1, 1)))
            assert y.isfinite().all(), f"width {dim}"

    def test_works_without_memory_on_the_meta_device(self, spec: BlueprintSpec) -> None:
        x = features(spec, 12).to("meta")
        with torch.device("meta"):
            y = spec.load_factory()(12)(x)
        assert (y.shape, y.device.type) == (x.shape, "meta")

    def test_takes_each_memory_format(self, spec: BlueprintSpec) -> None:
        seed, x = grown(spec, 8), features(spec, 8)
        y = seed(x)
        assert y.is_contiguous()
        torch.testing.assert_close(seed(x.transpose(0, 1).contiguous().transpose(0, 1)), y)
        for name in self.topology.memory_formats:
            memory_format: torch.memory_format = getattr(torch, name)
            z = seed(x.to(memory_format=memory_format))
            assert z.is_contiguous(memory_format=memory_format)
            torch.testing.assert_close(z, y)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_runs_under_autocast(self, spec: BlueprintSpec, dtype: torch.dtype) -> None:
        seed, x = grown(spec, 8, std=0.1), features(spec, 8).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            y = seed(x)
        torch.testing.assert_close(y.float(), seed(x.float()), atol=0.1, rtol=0.05)

    def test_samples_of_a_batch_do_not_mix(self, spec: BlueprintSpec) -> None:
        seed, x = grown(spec, 8), features(spec, 8)
        torch.testing.assert_close(seed(x)[:1], seed(x[:1]))

    def test_compiles_to_one_graph(self, spec: BlueprintSpec) -> None:
        seed, x = grown(spec, 8), features(spec, 8)
        compiled = torch.compile(seed, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), seed(x))

    # -- birth and learning -----------------------------------------------------------------------------------------

    def test_is_the_identity_at_birth(self, spec: BlueprintSpec) -> None:
        for dim in accepted_widths(spec, SOME_WIDTHS):
            for dtype in DTYPES:
                x = features(spec, dim).to(dtype)
                assert torch.equal(newborn(spec, dim).to(dtype)(x), x), f"width {dim}, {dtype}"

    def test_no_parameter_is_dead_after_three_plain_sgd_steps(self, spec: BlueprintSpec) -> None:
        for dim in accepted_widths(spec, SOME_WIDTHS):
            seed, x = newborn(spec, dim), features(spec, dim)
            target = x + 0.5 * features(spec, dim, seed=3)
            optimizer = torch.optim.SGD(seed.parameters(), lr=0.1)
            largest = {name: 0.0 for name, _ in seed.named_parameters()}
            for step in range(3):
                optimizer.zero_grad()
                F.mse_loss(seed(x), target).backward()  # type: ignore[no-untyped-call]  # untyped in torch
                for name, parameter in seed.named_parameters():
                    assert parameter.grad is not None, f"{name} at width {dim}"
                    largest[name] = max(largest[name], parameter.grad.abs().max().item())
                if step == 0:
                    assert max(largest.values()) > 1e-4, f"no gradient at birth at width {dim}"
                optimizer.step()
            assert min(largest.values()) > 1e-9, f"width {dim}: {largest}"

    @pytest.mark.parametrize("dim", [8, 17])
    def test_learns_what_a_grown_seed_of_its_kind_does(self, spec: BlueprintSpec, dim: int) -> None:
        x = features(spec, dim, batch=8)
        assert fit(newborn(spec, dim), x, grown(spec, dim, seed=9)(x).detach()) < 0.5

    # -- no side effects --------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("training", [True, False])
    def test_forward_draws_no_random_number_and_leaves_its_input(
        self, spec: BlueprintSpec, training: bool
    ) -> None:
        seed, x = grown(spec, 8).train(training), features(spec, 8)
        before, state = x.clone(), torch.get_rng_state()
        y = seed(x)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(x, before)
        assert x._version == 0
        assert y.data_ptr() != x.data_ptr()

    def test_gives_the_same_result_in_training_and_evaluation(self, spec: BlueprintSpec) -> None:
        seed, x = grown(spec, 8), features(spec, 8)
        assert torch.equal(seed.train()(x), seed.eval()(x))

    def test_copies_pickles_and_reloads_exactly(self, spec: BlueprintSpec) -> None:
        seed, x = grown(spec, 8), features(spec, 8)
        reloaded = newborn(spec, 8, seed=5)
        reloaded.load_state_dict(seed.state_dict())
        for twin in (copy.deepcopy(seed), pickle.loads(pickle.dumps(seed)), reloaded):
            assert torch.equal(twin(x), seed(x))

    # -- declarations -----------------------------------------------------------------------------------------------

    def test_declaration_pickles(self, spec: BlueprintSpec) -> None:
        assert pickle.loads(pickle.dumps(spec)) == spec

    def test_declared_options_are_those_of_the_factory(self, spec: BlueprintSpec) -> None:
        signature = inspect.signature(spec.load_factory())
        keywords = {n: p.default for n, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY}
        if spec.takes_causal:
            assert keywords.pop("causal") is False
        assert dict(spec.options) == keywords

    def test_docstring_gives_shape_errors_and_the_declared_source(self, spec: BlueprintSpec) -> None:
        text = inspect.getdoc(spec.load_factory()) or ""
        assert spec.topology is self.topology
        assert spec.description
        assert spec.source.startswith(self.sources)
        assert all(heading in text for heading in ("Args:", "Shape:", "Raises:"))
        assert spec.source in text.partition("Source: ")[2]
