"""Try every architecture of the installed transformers: ``python -m kasmina_hf.sweep``.

Each is built from a shrunken config with random weights, in a process of its own with a time limit; nothing is
downloaded. Its points are derived, a glob is tried, and one seed lives its life: trained while the host is as without
it, bit for bit, fossilised, saved and loaded.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # transformers reads it when it is imported
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import argparse
import copy
import dataclasses
import json
import multiprocessing
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, Final

import numpy
import torch
import transformers
from kasmina_core import HostError, InjectionPoint, Topology, __version__
from kasmina_core.testing.sweeps import first_that_attaches, globs_of, live, run, said, shares
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from kasmina_hf.growing import grow
from kasmina_hf.inputs import example_inputs
from kasmina_hf.shrinking import RECIPES, shrunken
from kasmina_hf.structure import points

MOST_PARAMETERS: Final = 100_000_000
SECONDS: Final = 60.0
_DECLARATION: Final = (
    r'InjectionPoint\("([^"]+)", "([^"]+)", (\d+), Topology\("(\w+)"\)(?:, layout="(\w+)")?\)'
)


@dataclasses.dataclass
class Row:
    """What was found out about one architecture.

    Attributes:
        name: Its ``model_type``.
        model: The model's class.
        part_of: Architectures of which it is a part: their configs hold one of its kind.
        recipe: How its config was shrunken; empty if it could not be built.
        inputs: The shapes of the example that ran.
        points: Number of points derived.
        towers: Where they are: path, number, layout and whether causal.
        glob: A glob that holds slots, or else a path.
        stated: Where neither does, the path of a point that holds one declared as the refusal says.
        life: ``"whole"``, or where the life of a seed ended.
        blueprint: Of the seed.
        reason: Why something did not work.
    """

    name: str
    model: str = ""
    part_of: list[str] = dataclasses.field(default_factory=list)
    recipe: str = ""
    inputs: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    points: int = 0
    towers: list[str] = dataclasses.field(default_factory=list)
    glob: str = ""
    stated: str = ""
    life: str = ""
    blueprint: str = ""
    reason: str = ""
    seconds: float = 0.0


def architectures() -> dict[str, list[str]]:
    """Return every ``model_type`` with a base model, and the architectures that it is a part of."""
    parts: dict[type[PreTrainedConfig], list[str]] = {}
    for name in MODEL_MAPPING_NAMES:
        for kind in CONFIG_MAPPING[name].sub_configs.values():
            if kind is not transformers.AutoConfig:
                parts.setdefault(kind, []).append(name)
    return {name: parts.get(CONFIG_MAPPING[name], []) for name in MODEL_MAPPING_NAMES}


def examine(row: Row) -> None:
    """Fill in a row, as far as it goes."""
    name = MODEL_MAPPING_NAMES[row.name]
    row.model = name if isinstance(name, str) else name[0]
    model, example = _build(row)
    if model is None:
        return
    if example is not None:
        row.reason = ""
        try:
            found = points(model, example=example)
            row.points = len(found)
            row.towers = _towers(found)
        except Exception as error:
            row.reason = said(error)
        row.glob = _glob(model, example, [tower.split()[0] for tower in row.towers])
        if not row.glob:
            row.stated = _stated(model, example)
        if row.points:
            _live(row, model, example)


def _build(row: Row) -> tuple[PreTrainedModel | None, dict[str, Tensor] | None]:
    """Build a model by the first recipe with which it runs, or at least builds."""
    config, kind = CONFIG_MAPPING[row.name], None
    built: PreTrainedModel | None = None
    for recipe in RECIPES:
        try:
            kind = getattr(transformers, row.model)
            if not issubclass(config, own := kind.config_class):  # the model is that of a part
                config = own
            small = shrunken(config, recipe)
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in kind(copy.deepcopy(small)).parameters())
            if size > MOST_PARAMETERS:
                row.reason = row.reason or f"{size:,} parameters by the recipe '{recipe.name}'"
                continue
            torch.manual_seed(0)
            model = kind(small).eval()
        except ImportError as error:
            row.reason = said(error)
            break
        except Exception as error:
            row.reason = row.reason or said(error)
            continue
        try:
            example = example_inputs(model)
        except Exception as error:
            if built is None:
                built, row.recipe, row.reason = model, recipe.name, said(error)
            continue
        row.recipe = recipe.name
        row.inputs = {name: list(tensor.shape) for name, tensor in example.items()}
        return model, example
    return built, None


def _towers(found: list[Any]) -> list[str]:
    """Say where points are, one text a tower."""
    towers: dict[str, list[Any]] = {}
    for point in found:
        towers.setdefault(re.sub(r"\.\d+(?!.*\.\d)", ".*", point.path), []).append(point)
    return [
        f"{path} {len(own)} {own[0].layout or own[0].topology.layout}{' causal' if own[0].causal else ''}"
        for path, own in towers.items()
    ]


def _glob(model: PreTrainedModel, example: dict[str, Tensor], known: list[str]) -> str:
    """Return the first glob that holds slots: of a tower, of the members of a container, or of a part of each; else a path."""
    whole, inner = globs_of(model)
    paths = [
        path for path, module in model.named_modules() if path and next(module.parameters(), None) is not None
    ]
    return first_that_attaches(
        (*known[:1], *whole, *inner[:40], *paths[:40]), lambda pattern: grow(model, pattern, example=example)
    )


def _stated(model: PreTrainedModel, example: dict[str, Tensor]) -> str:
    """Return the path of a point that holds a slot if it is declared as the refusal of a glob says."""
    for pattern in globs_of(model)[0]:
        try:
            grow(model, pattern, example=example)
        except HostError as error:
            for name, path, dim, topology, layout in re.findall(_DECLARATION, str(error)):
                point = InjectionPoint(name, path, int(dim), Topology(topology), layout=layout or None)
                with suppress(HostError):
                    grow(model, [point], example=example).detach_slots()
                    return path
    return ""


def _live(row: Row, host: PreTrainedModel, example: dict[str, Tensor]) -> None:
    """Let one seed live its life in the first tower."""

    def call(module: nn.Module) -> Any:
        numpy.random.seed(0)  # transformers masks sound with it in training
        return module(**example)

    def heard(bare: nn.Module, paths: list[str]) -> set[str]:
        try:
            run(bare, call)
        except Exception:  # Reformer has gradients in training alone
            run(bare.train(), call)
        return {path for path in paths if _learns(bare, path)}

    life = live(host, partial(grow, example=example), call, heard)
    row.life, row.blueprint, row.reason = life.ended, life.blueprint, life.reason or row.reason


def _learns(bare: nn.Module, path: str) -> bool:
    """Return whether the loss depends on the module at a path."""
    return any(
        p.grad is not None and bool(p.grad.any())
        for p in bare.get_submodule(path.partition(":")[0]).parameters()
    )


def _work(channel: Connection) -> None:
    """Examine the architectures that come in, in a process of their own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    while True:
        try:
            row = channel.recv()
        except EOFError:
            return
        start = time.perf_counter()
        try:
            examine(row)
        except Exception as error:
            row.reason = said(error)
        row.seconds = round(time.perf_counter() - start, 1)
        channel.send(row)


class _Worker:
    """A process that examines one architecture after the other, and is replaced if it dies or takes too long."""

    def __init__(self) -> None:
        self._start()
        self.row: Row | None = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.channel, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, row: Row, seconds: float) -> None:
        self.row, self.seconds = row, seconds
        self.end = time.monotonic() + seconds
        self.channel.send(row)

    def take(self) -> Row | None:
        """Return the row if it is done, or given up."""
        assert self.row is not None
        row, reason = self.row, ""
        if self.channel.poll():
            try:
                row = self.channel.recv()
            except EOFError:
                reason = "its process died"
        elif time.monotonic() > self.end:
            reason = f"not done after {self.seconds:.0f} s"
        else:
            return None
        if reason:
            row.reason = reason
            self.stop()
            self._start()
        self.row = None
        return row

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.channel.close()


def sweep(rows: list[Row], jobs: int = 1, seconds: float = SECONDS) -> Iterator[Row]:
    """Examine architectures in processes of their own, and yield each when it is done or its time is over."""
    waiting = list(reversed(rows))
    workers = [_Worker() for _ in range(min(jobs, len(rows)))]
    try:
        while waiting or any(worker.row for worker in workers):
            for worker in workers:
                if worker.row is None and waiting:
                    worker.give(waiting.pop(), seconds)
            wait([worker.channel for worker in workers if worker.row], timeout=1.0)
            for worker in workers:
                if worker.row is not None and (row := worker.take()) is not None:
                    yield row
    finally:
        for worker in workers:
            worker.stop()


def table(rows: list[Row]) -> str:
    """Return Markdown: one line an architecture."""
    lines = ["| architecture | points | where | by hand | a seed's life |", "|---|---|---|---|---|"]
    for row in rows:
        built = row.recipe and row.inputs
        where = "<br>".join(f"`{tower}`" for tower in row.towers)
        life = f"{row.life} ({row.blueprint})" if row.life == "whole" else row.life or ""
        reason = "" if row.life == "whole" else f" {row.reason[:160]}".replace("|", "/").replace("\n", " ")
        if not built:
            lines.append(f"| {row.name} | not {'run' if row.recipe else 'built'} |{reason} | | |")
        else:
            hand = f"`{row.glob}`" if row.glob else f"`{row.stated}`, declared" if row.stated else "no"
            lines.append(f"| {row.name} | {row.points or 'none'} | {where} | {hand} | {life}{reason} |")
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    """Return the counts, for whole architectures and for parts of others."""
    lines = []
    for what, chosen in (
        ("architectures", [row for row in rows if not row.part_of]),
        ("parts of others", [row for row in rows if row.part_of]),
    ):
        built = [row for row in chosen if row.recipe]
        ran = [row for row in built if row.inputs]
        if ran:
            lines.append(
                f"{what}: {len(chosen)}, built {len(built)}, run with derived inputs {len(ran)}; of these "
                + shares(ran)
                + f", by a declared point alone {sum(bool(row.stated) for row in ran)}"
            )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m kasmina_hf.sweep", description=__doc__)
    parser.add_argument("--only", metavar="PATTERN", default="", help="regular expression for model types")
    parser.add_argument("--json", metavar="FILE", help="write all that was found out to a file")
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="processes at once")
    parser.add_argument("--seconds", metavar="S", type=float, default=SECONDS, help="time limit of each")
    options = parser.parse_args(arguments)
    chosen = [
        Row(name, part_of=parts) for name, parts in architectures().items() if re.search(options.only, name)
    ]
    done: list[Row] = []
    for row in sweep(chosen, options.jobs, options.seconds):
        done.append(row)
        state = row.life or ("no points" if row.inputs else "not run" if row.recipe else "not built")
        reason = "" if row.life == "whole" else row.reason[:100]
        print(f"{len(done)}/{len(chosen)} {row.name}: {state} {reason}", file=sys.stderr, flush=True)
    done.sort(key=lambda row: row.name)
    versions = f"kasmina {__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    print(f"{table(done)}\n\n{summary(done)}\n{versions}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump([dataclasses.asdict(row) for row in done], file, indent=1)
    return 0


if __name__ == "__main__":
    from kasmina_hf.sweep import main as _main  # the processes unpickle rows of this module by its name

    raise SystemExit(_main())
