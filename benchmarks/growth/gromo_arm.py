"""The arm with GroMo: neurons added to a growing MLP, where and how its statistics of the gradient say."""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from typing import Any, Final

import torch
from torch import Tensor, nn

from benchmarks.growth.growing import Recipe
from benchmarks.growth.settings import MLP_WIDTH, Setting
from benchmarks.growth.training import EVALUATED, Training, evaluation
from kasmina_core import Germinate, Observation, PlateauPolicy, SeedStage, SlotObservation, Topology
from kasmina_core.quiet import derived_seed, private_rng

ADDED: Final = 4
"""Neurons that one growth adds at most."""

SCALES: Final = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Sizes of the update that the line search tries on the training samples, as its authors do."""


class GromoTraining(Training):
    """Trains a growing MLP; at each plateau the layer with the largest first-order gain gets neurons.

    The passes for the statistics and the line search are charged; the decompositions, which the counter of operations
    does not see, are not. The optimiser starts anew after a growth, since the layers have other tensors.

    Source: Rudkiewicz et al. 2024, https://arxiv.org/abs/2405.19816, and gromo's documentation
    """

    def __init__(self, setting: Setting, recipe: Recipe, seed: int, *rest: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from gromo.containers.growing_mlp import GrowingMLP

        with private_rng(derived_seed(seed, "host")):
            model = GrowingMLP(64, 10, MLP_WIDTH, 2, activation=nn.SELU(), device=torch.device("cpu"))
        super().__init__(setting, model, seed, *rest)
        self.policy = PlateauPolicy(
            lambda slot: ("gromo",), patience=recipe.patience, min_delta=recipe.min_delta, max_seeds=2
        )
        self.grown = 0

    @property
    def shape(self) -> Hashable:
        return tuple(tuple(p.shape) for p in self.module.parameters())

    def look(self, val_loss: float, val_accuracy: float) -> None:
        slots = tuple(
            SlotObservation(
                f"growth{i}",
                Topology.TRANSFORMER,
                MLP_WIDTH,
                SeedStage.FOSSILIZED if i < self.grown else SeedStage.DORMANT,
            )
            for i in range(2)
        )
        seen = Observation(self.intervals, val_loss, False, 0, 0, slots)
        if any(isinstance(command, Germinate) for command in self.policy.decide(seen)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._grow()

    def _grow(self) -> None:
        model: Any = self.module
        model.init_computation()
        for x, y in self.task.batches("train", EVALUATED):

            def gather(x: Tensor = x, y: Tensor = y) -> None:
                model.zero_grad()
                self.task.loss(model(x), y).mean().backward()
                model.update_computation()

            self.ledger.charge(("statistics", self.shape, len(x)), gather)
        model.compute_optimal_updates(maximum_added_neurons=ADDED)
        model.reset_computation()
        chosen = model.select_best_update()
        scale = min(SCALES, key=self._extended_loss)
        if scale > 0:
            model.currently_updated_layer.scaling_factor = scale
            model.apply_change()
        else:
            model.currently_updated_layer.delete_update()
            model.currently_updated_layer_index = None
        self.grown += 1
        self.log.append((self.intervals, f"layer {chosen + 1}", "kept", f"neurons at scale {scale}"))
        self.optimizer = torch.optim.Adam(model.parameters(), self.lr, fused=True)

    def _extended_loss(self, scale: float) -> float:
        model: Any = self.module
        model.currently_updated_layer.scaling_factor = scale
        total = 0.0
        with evaluation(model):
            for x, y in self.task.batches("train", EVALUATED):

                def look(x: Tensor = x, y: Tensor = y) -> Tensor:
                    return self.task.loss(model.extended_forward(x), y).sum()

                total += float(self.ledger.charge(("line search", self.shape, len(x)), look))
        return total
