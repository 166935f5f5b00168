"""What finding, loading and registering packs costs: ``python -m benchmarks.discovery``.

Fake packs are written to a temporary folder. Each figure is CPU time of a process of its own, so that nothing is warm
but the disk; each ratio is taken between neighbours in one round.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import importlib_metadata

SIZES = (10, 100, 1000)
ROUNDS = 7

MODULE = """
from kasmina_core import BlueprintSpec, Topology, hookimpl

@hookimpl
def kasmina_blueprints():
    return [BlueprintSpec("scale", Topology.CNN, "{module}.seeds:Scale", lambda dim: dim)]
"""
METADATA = """Metadata-Version: 2.4
Name: fake-pack-{number}
Version: 1.{number}
Summary: A pack for the benchmark.
Requires-Python: >=3.11
Requires-Dist: kasmina>=0.1
Requires-Dist: torch>=2.11
Requires-Dist: pytest>=8.3; extra == "test"
Provides-Extra: test
"""
ENTRY_POINTS = """[kasmina.plugins]
fake-{number} = {module}
[kasmina.api]
fake-{number} = v1
"""


def write_packs(folder: Path, count: int) -> None:
    """Write the metadata and modules of ``count`` packs, each with one blueprint."""
    for number in range(count):
        module = f"fake_pack_{number}"
        info = folder / f"{module}-1.{number}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(METADATA.format(number=number))
        (info / "entry_points.txt").write_text(ENTRY_POINTS.format(number=number, module=module))
        (folder / f"{module}.py").write_text(MODULE.format(module=module))


# -- in the child -----------------------------------------------------------------------------------------------------


def _scan_alone() -> int:
    return len(importlib_metadata.entry_points(group="kasmina.plugins"))


def _scan_and_import_alone() -> int:
    return len([entry.load() for entry in importlib_metadata.entry_points(group="kasmina.plugins")])


def _list() -> int:
    from kasmina_core.packs.scanning import list_packs
    from kasmina_core.packs.switches import Switches

    return len(list_packs(Switches()))


def _load() -> int:
    from kasmina_core.packs.discovery import PluginRegistry

    return len(PluginRegistry(checks=False).load_installed())


STEPS: dict[str, Callable[[], int]] = {
    "scan": _scan_alone,
    "list": _list,
    "scan+import": _scan_and_import_alone,
    "load": _load,
}


def _step(name: str, folder: str) -> dict[str, Any]:
    import kasmina_core.packs.discovery  # what the packs import, so that only what they cost is measured

    assert kasmina_core.packs.discovery
    sys.path.insert(0, folder)
    begun = time.process_time()
    found = STEPS[name]()
    seconds = time.process_time() - begun
    return {"seconds": seconds, "packs": found, "torch": "torch" in sys.modules}


def _import_after_torch() -> dict[str, float]:
    """Return CPU seconds of importing torch, and then the library, without the garbage collection that is due between."""
    begun = time.process_time()
    import torch

    assert torch
    imported = time.process_time()
    gc.disable()
    from kasmina_core import MorphogeneticModel

    assert MorphogeneticModel
    return {"torch": imported - begun, "library": time.process_time() - imported}


def _germinate_first(folder: str) -> dict[str, float]:
    """Return CPU seconds of importing torch, and of the first germination in a process with the packs of a folder."""
    sys.path.insert(0, folder)
    begun = time.process_time()
    import torch

    imported = time.process_time()
    torch.set_num_threads(1)
    from kasmina_cnn import CNNHost

    from kasmina_core import MorphogeneticModel

    model = MorphogeneticModel(CNNHost(base_channels=3, width_factor=1))
    made = time.process_time()
    model.germinate("block2", "conv_light")
    return {"torch": imported - begun, "germination": time.process_time() - made}


def _register(rounds: int, limit: int) -> dict[str, list[float]]:
    """Return, by kind of registration, CPU seconds of each blueprint and round."""
    import torch

    from kasmina_core import BlueprintRegistry, check_blueprint_spec, default_registry

    torch.set_num_threads(1)
    entries = default_registry().blueprints.list_all()[:limit]
    seconds: dict[str, list[float]] = {}

    def timed(kind: str, call: Callable[[], object]) -> None:
        begun = time.process_time()
        call()
        seconds.setdefault(kind, []).append(time.process_time() - begun)

    for _ in range(rounds):
        registry = BlueprintRegistry()
        for entry in entries:
            timed("no checks", partial(registry.register, entry.spec, pack=entry.pack))
            for full, name in ((False, "checks as packs load"), (True, "every check")):
                timed(name, partial(check_blueprint_spec, entry.spec, device="cpu", full=full))
    return seconds


# -- in the parent ----------------------------------------------------------------------------------------------------


def _child(*arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.discovery", "--child", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"A measuring process failed:\n{done.stderr}")
    return json.loads(done.stdout)


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def measure_discovery(count: int, rounds: int) -> dict[str, Any]:
    """Return CPU seconds, and their ratios to a bare scan, of each step at ``count`` packs: median and quartiles."""
    with tempfile.TemporaryDirectory() as folder:
        write_packs(Path(folder), count)
        seconds: dict[str, list[float]] = {name: [] for name in STEPS}
        for number in range(-1, rounds):  # the first round warms the disk, and compiles the modules
            for name in STEPS:
                _progress(f"{count} packs, round {number + 1} of {rounds}: {name}")
                told = _child(name, folder)
                assert told["packs"] >= count, told
                assert not told["torch"], "finding and loading light packs imports no torch"
                if number >= 0:
                    seconds[name].append(told["seconds"])
        first = [_child("germinate", folder) for _ in range(rounds)]
    scan = seconds["scan"]
    return {
        "packs": count,
        "seconds": {name: _quartiles(values) for name, values in seconds.items()},
        "ratio_to_scan": {
            name: _quartiles([a / b for a, b in zip(values, scan, strict=True)])
            for name, values in seconds.items()
        },
        "first_germination": _quartiles([told["germination"] for told in first]),
        "first_germination_over_importing_torch": _quartiles(
            [told["germination"] / told["torch"] for told in first]
        ),
        "loading_per_pack": _quartiles(
            [(a - b) / count for a, b in zip(seconds["load"], seconds["list"], strict=True)]
        ),
    }


def measure(sizes: Sequence[int], rounds: int, blueprints: int) -> dict[str, Any]:
    """Return every figure as plain data."""
    sizes_measured = [measure_discovery(count, rounds) for count in sizes]
    _progress("import")
    imports = [_child("import") for _ in range(rounds)]
    _progress("registration")
    registration = {
        kind: _quartiles(seconds)
        for kind, seconds in _child("register", str(rounds), str(blueprints)).items()
    }
    _progress("")
    return {
        "command": "python -m benchmarks.discovery",
        "machine": {
            "cores": os.cpu_count(),
            "processor": platform.machine(),
            "python": platform.python_version(),
            "torch": importlib_metadata.version("torch"),
            "importlib_metadata": importlib_metadata.version("importlib_metadata"),
            "other_distributions": len(list(importlib_metadata.distributions())),
        },
        "rounds": rounds,
        "discovery": sizes_measured,
        "import_over_importing_torch": _quartiles([told["library"] / told["torch"] for told in imports]),
        "registration_per_blueprint": registration,
    }


def _print(result: dict[str, Any]) -> None:
    machine = result["machine"]
    print(f"{result['command']}: {result['rounds']} rounds; CPU time; median (quartiles)")
    print(
        f"{machine['cores']} cores, {machine['processor']}, Python {machine['python']}, torch {machine['torch']}, "
        f"importlib_metadata {machine['importlib_metadata']}, {machine['other_distributions']} other distributions"
    )
    print(f"\n{'packs':>5}  {'step':<12}{'ms':>28}  {'ratio to the bare scan':>28}")
    for size in result["discovery"]:
        for name in STEPS:
            print(
                f"{size['packs']:>5}  {name:<12}{_spread(size['seconds'][name], 1e3, 1):>28}  "
                f"{_spread(size['ratio_to_scan'][name], 1, 2):>28}"
            )
        print(f"{size['packs']:>5}  {'load, a pack':<12}{_spread(size['loading_per_pack'], 1e3, 2):>28}")
        print(
            f"{size['packs']:>5}  {'germination':<12}{_spread(size['first_germination'], 1e3, 0):>28}  "
            f"{_spread(size['first_germination_over_importing_torch'], 1, 3):>28} of importing torch"
        )
    print(
        "\nscan: importlib_metadata.entry_points alone; list: list_packs; scan+import: the same and EntryPoint.load"
    )
    print("germination: the first one in a process, of a bundled blueprint by its short name")
    print("load: PluginRegistry(checks=False).load_installed, listing included; a pack: load less list")
    imported = _spread(result["import_over_importing_torch"], 1, 3)
    print(f"\nfrom kasmina_core import MorphogeneticModel, over importing torch: {imported}")
    print(f"\n{'registration, a blueprint':<36}{'ms':>28}")
    for kind, seconds in result["registration_per_blueprint"].items():
        print(f"{kind:<36}{_spread(seconds, 1e3, 3):>28}")


def _spread(values: Sequence[float], scale: float, digits: int) -> str:
    middle, low, high = (f"{value * scale:.{digits}f}" for value in values)
    return f"{middle} ({low} to {high})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--sizes", default=",".join(map(str, SIZES)), help="numbers of packs (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--fast", action="store_true", help="three packs, one round, one blueprint: does it run?"
    )
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        name, *rest = options.child
        if name == "register":
            told = _register(*map(int, rest))
        elif name == "import":
            told = _import_after_torch()
        else:
            told = _germinate_first(rest[0]) if name == "germinate" else _step(name, rest[0])
        print(json.dumps(told))
        return
    if options.fast:
        result = measure((3,), 1, 1)
    else:
        result = measure([int(size) for size in options.sizes.split(",")], options.rounds, sys.maxsize)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        _print(result)


if __name__ == "__main__":
    main()
