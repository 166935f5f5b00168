"""Try a small model of every family of timm and torchvision: ``python -m kasmina_timm.sweep``.

Each has random weights and runs in a process of its own with a time limit; nothing is downloaded. Its points are
derived, a glob is tried, and one seed lives its life: trained while the host is as without it, bit for bit, fossilised,
saved and loaded.
"""

from __future__ import annotations

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
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, Final

import timm
import torch
import torchvision  # type: ignore[import-untyped]  # ships no types
from kasmina_core import InjectionPoint, __version__
from kasmina_core.testing.comparing import tensors_in
from kasmina_core.testing.sweeps import first_that_attaches, globs_of, live, run, said, shares
from torch import Tensor, nn

from kasmina_timm.growing import grow
from kasmina_timm.structure import example_inputs, points

MOST_PARAMETERS: Final = 150_000_000
SECONDS: Final = 120.0
CANDIDATES: Final = 2
SMALL: Final = [
    "test_",
    "atto",
    "femto",
    "pico",
    "zepto",
    "nano",
    "xxxs",
    "xxtiny",
    "xxs",
    "xtiny",
    "xs",
    "tiny",
    "_t",
    "mini",
    "lite",
    "small",
    "_s",
    "_18",
    "b0",
    "_0",
    "t0",
    "s0",
    "s1",
    "_n",
    "050",
    "002",
]
"""Parts of names of small models, the smallest first."""

SHRUNKEN: Final[tuple[dict[str, Any], ...]] = ({"depth": 2, "img_size": 64}, {"img_size": 64}, {})
"""Options of timm's models; the first with which a model can be made and run on meta tensors are taken."""

TORCHVISION: Final = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
    "vgg11",
    "vit_b_32",
    "deeplabv3_mobilenet_v3_large",
    "deeplabv3_resnet50",
    "fcn_resnet50",
    "lraspp_mobilenet_v3_large",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fcos_resnet50_fpn",
    "keypointrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
    "mc3_18",
    "mvit_v2_s",
    "r2plus1d_18",
    "r3d_18",
    "s3d",
    "swin3d_t",
    "raft_small",
]
"""One small model of each family of torchvision: classification, segmentation, detection, video, optical flow."""

SMALLER: Final[dict[str, dict[str, Any]]] = {
    "rcnn|retinanet|fcos": {"min_size": 96, "max_size": 96},
    "rcnn": {
        "box_score_thresh": 0.0,
        "box_detections_per_img": 4,
        "rpn_pre_nms_top_n_test": 50,
        "rpn_post_nms_top_n_test": 20,
    },
    "retinanet|fcos": {"score_thresh": 0.0},
    "ssd": {"score_thresh": 0.0},
    "googlenet|inception": {"init_weights": False},
}
"""Options of torchvision's models by regular expression for their names."""


@dataclasses.dataclass
class Row:
    """What was found out about one family.

    Attributes:
        library: ``"timm"`` or ``"torchvision"``.
        family: Of timm the module, of torchvision the model.
        model: The model's name.
        size: Number of its parameters; 0 if it could not be built.
        inputs: The shapes of the example; empty if the model did not run with it.
        points: Number of points derived.
        layouts: Their topologies and layouts.
        glob: A glob that holds slots.
        life: ``"whole"``, or where the life of a seed ended.
        blueprint: Of the seed.
        reason: Why something did not work.
    """

    library: str
    family: str
    model: str = ""
    size: int = 0
    inputs: list[list[int]] = dataclasses.field(default_factory=list)
    points: int = 0
    layouts: list[str] = dataclasses.field(default_factory=list)
    glob: str = ""
    life: str = ""
    blueprint: str = ""
    reason: str = ""
    seconds: float = 0.0


def families() -> list[Row]:
    """Return an empty row for each module of timm that has models, and each chosen model of torchvision."""
    rows = [Row("timm", family) for family in timm.list_modules() if timm.list_models(module=family)]
    return rows + [Row("torchvision", name) for name in TORCHVISION]


def examine(row: Row) -> None:
    """Fill in a row, as far as it goes."""
    model = _build(row)
    if model is None:
        return
    example = example_inputs(model)
    with torch.no_grad():
        _call(copy.deepcopy(model), example)
        for parameter in model.parameters():
            if (
                parameter.dim() > 1 and not parameter.any()
            ):  # as some heads, below which nothing has a gradient
                parameter.normal_(std=0.02)
    row.inputs = [list(tensor.shape) for _, tensor in tensors_in(example)]
    found: list[InjectionPoint] = []
    try:
        found = points(model, example=example)
        row.points = len(found)
        row.layouts = sorted({f"{p.topology.value} {p.layout or p.topology.layout}" for p in found})
    except Exception as error:
        row.reason = said(error)
    row.glob = _glob(model, example, found)
    if row.points:
        _live(row, model, example)


def _build(row: Row) -> nn.Module | None:
    """Build the family's smallest model among those whose names say that they are small."""
    if row.library == "torchvision":
        row.model = row.family
        options = {"weights": None, **({"weights_backbone": None} if _has_backbone(row.model) else {})}
        for names, smaller in SMALLER.items():
            if re.search(names, row.model):
                options |= smaller
        torch.manual_seed(0)
        model: nn.Module = torchvision.models.get_model(row.model, **options)
        row.size = sum(parameter.numel() for parameter in model.parameters())
        return model.eval()
    built: dict[tuple[str, int], int] = {}
    for name in sorted(timm.list_models(module=row.family), key=_rank)[:CANDIDATES]:
        for i, shrunken in enumerate(SHRUNKEN):
            try:
                with torch.device("meta"):
                    meta = timm.create_model(name, pretrained=False, **shrunken)
                    meta.eval()(example_inputs(meta))
            except Exception as error:
                row.reason = said(error)
                continue
            built[name, i] = sum(parameter.numel() for parameter in meta.parameters())
            break
    for name, i in sorted(built, key=built.__getitem__)[:1]:
        if built[name, i] > MOST_PARAMETERS:
            row.reason = f"{name} has {built[name, i]:,} parameters"
            return None
        for shrunken in SHRUNKEN[i:]:  # indices out of range are not seen on meta tensors
            torch.manual_seed(0)
            small: nn.Module = timm.create_model(name, pretrained=False, **shrunken).eval()
            try:
                with torch.no_grad():
                    copy.deepcopy(small)(example_inputs(small))
            except Exception as error:
                row.reason = said(error)
                continue
            row.model, row.reason = name, ""
            row.size = sum(parameter.numel() for parameter in small.parameters())
            return small
    return None


def _has_backbone(name: str) -> bool:
    kind = torchvision.models.get_model_builder(name).__module__
    return ".detection" in kind or ".segmentation" in kind


def _rank(name: str) -> tuple[int, int, str]:
    """Sort small models first: by what their names say, then the shorter names."""
    return next((i for i, part in enumerate(SMALL) if part in name), len(SMALL)), len(name), name


def _glob(model: nn.Module, example: object, found: list[InjectionPoint]) -> str:
    """Return the first glob that holds slots: of the members of a container, of points, or of a part of each member."""
    whole, inner = globs_of(model)
    named = [re.sub(r"\d\w*", "*", point.path) for point in found]
    return first_that_attaches(
        dict.fromkeys((*whole, *named, *inner[:40])), lambda pattern: grow(model, pattern, example=example)
    )


def _live(row: Row, host: nn.Module, example: object) -> None:
    """Let one seed live its life at the last point that the outputs depend on, where features are small."""
    life = live(
        host,
        partial(grow, example=example),
        lambda module: _call(module, example),
        lambda bare, paths: _heard(bare, paths, example),
        last=True,
    )
    row.life, row.blueprint, row.reason = life.ended, life.blueprint, life.reason or row.reason


def _heard(bare: nn.Module, paths: list[str], example: object) -> set[str]:
    """Run forward and backward, and return the paths of modules on whose features the loss depends."""
    seen: dict[str, Tensor] = {}

    def noting(path: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            features = output[0] if isinstance(output, tuple) else output
            if features.requires_grad:
                features.retain_grad()
                seen[path] = features

        return note

    handles = [bare.get_submodule(path).register_forward_hook(noting(path)) for path in paths]
    run(bare, lambda module: _call(module, example))
    for handle in handles:
        handle.remove()
    return {
        path for path, features in seen.items() if features.grad is not None and bool(features.grad.any())
    }


def _call(module: nn.Module, example: object) -> Any:
    return module(*example) if isinstance(example, tuple) else module(example)


def _work(row: Row, channel: Connection) -> None:
    """Examine one family in a process of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    try:
        examine(row)
    except Exception as error:
        row.reason = said(error)
    row.seconds = round(time.perf_counter() - start, 1)
    channel.send(row)


def sweep(rows: list[Row], jobs: int = 1, seconds: float = SECONDS) -> Iterator[Row]:
    """Examine families in processes of their own, and yield each when it is done or its time is over."""
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(
            [
                "kasmina_timm.growing",
                "kasmina_core.testing.hosts",
            ]
        )
    waiting = list(reversed(rows))
    running: dict[Any, tuple[Row, Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            row = waiting.pop()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(row, theirs), daemon=True)
            process.start()
            theirs.close()
            running[ours] = (row, process, time.monotonic() + seconds)
        wait(list(running), timeout=1.0)
        for channel, (row, process, end) in list(running.items()):
            if channel.poll():
                try:
                    row = channel.recv()
                except EOFError:
                    row.reason = f"its process ended ({process.exitcode})"
            elif time.monotonic() > end:
                row.reason, row.seconds = f"not done after {seconds:.0f} s", seconds
                process.kill()
            else:
                continue
            process.join()
            del running[channel]
            yield row


def table(rows: list[Row]) -> str:
    """Return Markdown: one line a family."""
    lines = ["| family | model | points | layout | by glob | a seed's life |", "|---|---|---|---|---|---|"]
    for row in rows:
        life = f"{row.life} ({row.blueprint})" if row.life == "whole" else row.life
        reason = "" if row.life == "whole" else f" {row.reason[:160]}".replace("|", "/")
        model = f"{row.model}, {row.size / 1e6:.1f} M" if row.size else "not built"
        glob = f"`{row.glob}`" if row.glob else "no"
        lines.append(
            f"| {row.library} {row.family} | {model} | {row.points or 'none'} | {', '.join(row.layouts)} | {glob} | {life}{reason} |"
        )
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    """Return the counts for each library."""
    lines = []
    for library in ("timm", "torchvision"):
        chosen = [row for row in rows if row.library == library]
        ran = [row for row in chosen if row.inputs]
        if ran:
            lines.append(
                f"{library}: {len(chosen)} families, built and run {len(ran)}; of these " + shares(ran)
            )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m kasmina_timm.sweep", description=__doc__)
    parser.add_argument(
        "--only", metavar="PATTERN", default="", help="regular expression for 'library family'"
    )
    parser.add_argument("--json", metavar="FILE", help="write all that was found out to a file")
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="processes at once")
    parser.add_argument("--seconds", metavar="S", type=float, default=SECONDS, help="time limit of each")
    options = parser.parse_args(arguments)
    chosen = [row for row in families() if re.search(options.only, f"{row.library} {row.family}")]
    done: list[Row] = []
    for row in sweep(chosen, options.jobs, options.seconds):
        done.append(row)
        state = row.life or ("no points" if row.inputs else "not run" if row.size else "not built")
        reason = "" if row.life == "whole" else row.reason[:300]
        print(
            f"{len(done)}/{len(chosen)} {row.family} {row.seconds} s: {state} {reason}",
            file=sys.stderr,
            flush=True,
        )
    done.sort(key=lambda row: (row.library, row.family))
    versions = f"kasmina {__version__}, timm {timm.__version__}, torchvision {torchvision.__version__}, torch {torch.__version__}"
    print(f"{table(done)}\n\n{summary(done)}\n{versions}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump([dataclasses.asdict(row) for row in done], file, indent=1)
    return 0


if __name__ == "__main__":
    from kasmina_timm.sweep import main as _main  # the processes unpickle rows of this module by its name

    raise SystemExit(_main())
