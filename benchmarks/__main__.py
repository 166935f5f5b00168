"""``python -m benchmarks``: the fast form of the growth benchmarks; with a name, another one."""

from __future__ import annotations

import importlib
import sys

NAMES = {
    "growth": ("benchmarks.growth.__main__", "what growth is worth, at equal training FLOPs"),
    "sizes": ("benchmarks.sizes.__main__", "one run that grows against every fixed size, at any budget"),
    "costs": (
        "benchmarks.costs",
        "steps and memory with slots and seeds, over the bare host and the same by hand",
    ),
    "checkpoints": ("benchmarks.checkpoints", "what saving and loading a run costs"),
    "compilation": ("benchmarks.compilation", "how many graphs a whole life compiles"),
    "slots": ("benchmarks.slots", "what many slots, seeds and host tensors cost outside of a step"),
    "handover": ("benchmarks.handover", "what it costs an optimiser that seeds come and go"),
    "processes": ("benchmarks.processes", "what growth costs two processes that train one model"),
    "environment": ("benchmarks.environment", "what a step of kasmina-rl costs over an epoch of the host"),
    "compare": ("benchmarks.compare", "what became slower between two results, OLD.json NEW.json"),
    "joint": ("benchmarks.joint", "what seeds learn that share a counterfactual pass, at equal FLOPs"),
    "discovery": ("benchmarks.discovery", "what installed packs cost"),
}

DEFAULT = (("growth", ["--minutes", "3.8"]), ("sizes", ["--short", "--minutes", "1"]))
"""What runs without a name, and how."""

HELP = """usage: python -m benchmarks [NAME] [options]

Without a name: the fast form of 'growth' and the short one of 'sizes', under five minutes on two cores.

names:
{names}

'python -m benchmarks NAME --help' says what each can do; 'python -m benchmarks growth --long' is the long form."""


def main() -> None:
    """Run the benchmark that is asked for."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(HELP.format(names="\n".join(f"  {key:<13}{what}" for key, (_, what) in NAMES.items())))
        return
    if name in NAMES:
        del sys.argv[1]
    elif name and not name.startswith("-"):
        sys.exit(f"There is no benchmark '{name}'. There are: {', '.join(NAMES)}.")
    elif not name:
        for each, given in DEFAULT:
            importlib.import_module(NAMES[each][0]).main(given)
        return
    else:
        name = "growth"
    sys.argv[0] = f"python -m benchmarks {name}"
    importlib.import_module(NAMES[name][0]).main()


if __name__ == "__main__":
    main()
