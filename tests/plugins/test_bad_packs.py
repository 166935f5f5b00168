"""One bad pack of any kind stops nothing: it is listed with its cause, and asking for what it offered raises that."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from fake_packs import GOOD, SEEDS, Site

from kasmina_core import PackReason, PackState, PluginError, PluginRegistry


class Bad(NamedTuple):
    source: str | None
    state: PackState
    reason: PackReason
    cause: str
    declares_thing: bool = False


def hook(body: str, name: str = "kasmina_blueprints", arguments: str = "") -> str:
    return f"{SEEDS}\n@hookimpl\ndef {name}({arguments}):\n    {body}\n"


def thing(changes: str, classes: str = "") -> str:
    return f"{SEEDS}\n{classes}\n@hookimpl\ndef kasmina_blueprints():\n    return [scale('fine'), scale('thing', {changes})]\n"


def seed(forward: str, initial: str = "self.weight = nn.Parameter(torch.zeros(dim, 1, 1))") -> str:
    return (
        "class Bad(nn.Module):\n    def __init__(self, dim):\n        super().__init__()\n"
        f"        {initial}\n    def forward(self, x):\n        {forward}\n"
    )


FAILED, INVALID, CONFLICT = PackState.FAILED, PackState.INVALID, PackState.CONFLICT
INCOMPATIBLE = PackState.INCOMPATIBLE
CHECK = PackReason.CHECK_FAILED

BAD = {
    "missing module": Bad(None, FAILED, PackReason.IMPORT_FAILED, "No module named 'fake_bad'"),
    "syntax error": Bad("def (:", FAILED, PackReason.IMPORT_FAILED, "SyntaxError"),
    "import error": Bad("import no_such_thing", FAILED, PackReason.IMPORT_FAILED, "no_such_thing"),
    "exit at import": Bad("raise SystemExit(3)", FAILED, PackReason.IMPORT_FAILED, "SystemExit: 3"),
    "warning at import made an error": Bad(
        "import warnings\nwarnings.warn('old')", FAILED, PackReason.IMPORT_FAILED, "UserWarning: old"
    ),
    "skip of pytest at import": Bad(
        "import pytest\npytest.skip('no GPU', allow_module_level=True)",
        FAILED,
        PackReason.IMPORT_FAILED,
        "raised Skipped: no GPU",
    ),
    "generator exit in a hook": Bad(
        hook("raise GeneratorExit('gone')"), FAILED, PackReason.HOOK_FAILED, "raised GeneratorExit: gone"
    ),
    "an exception of its own while its declarations are read": Bad(
        f"class Own(BaseException): pass\n{hook('yield scale(' + repr('thing') + '); raise Own(3)')}",
        FAILED,
        PackReason.HOOK_FAILED,
        "raised Own: 3",
        True,
    ),
    "an exception of its own in a factory": Bad(
        thing("factory=own", "class Own(BaseException): pass\ndef own(dim): raise Own(4)"), INVALID, CHECK, "Own: 4", True
    ),
    "a skip in forward": Bad(
        thing("factory=Bad", "import pytest\n" + seed("pytest.skip('no GPU')")), INVALID, CHECK, "Skipped: no GPU", True
    ),
    "an exception of its own in a repr": Bad(
        "class Own(BaseException): pass\nclass Odd:\n    def __repr__(self): raise Own(5)\n" + hook("return [Odd()]"),
        INVALID,
        PackReason.WRONG_TYPE,
        "found: <Odd whose repr raised EscapeError>",
    ),
    "an exception whose message raises": Bad(
        "class Own(Exception):\n    def __str__(self): raise GeneratorExit\n" + hook("raise Own"),
        FAILED,
        PackReason.HOOK_FAILED,
        "raised Own: (its message cannot be read)",
    ),
    "declaration changed after it was made": Bad(
        hook("s = scale('thing'); object.__setattr__(s, 'name', 'Bad' + chr(27) + '[2J'); return [s]"),
        FAILED,
        PackReason.HOOK_FAILED,
        r"'Bad\x1b[2J' is not a blueprint name",
    ),
    "name of a gate check that a terminal acts upon": Bad(
        hook(
            "from kasmina_core import GateCheckSpec, GateLevel\n"
            "    return [GateCheckSpec('a' + chr(0x202e), (GateLevel.G1,), print, minimum=1)]",
            "kasmina_gate_checks",
        ),
        INVALID,
        PackReason.WRONG_TYPE,
        "names of at most 100 printable characters",
    ),
    "fractional estimate": Bad(
        thing("param_estimate=lambda dim: dim + 0.5"), INVALID, CHECK, "param_estimate gives 64.5 at width 64", True
    ),
    "no hooks": Bad("x = 1", INVALID, PackReason.NO_HOOK, "It implements no hook"),
    "hook without its mark": Bad(
        GOOD.replace("@hookimpl", ""), INVALID, PackReason.NO_HOOK, "kasmina_blueprints lacks the mark @hookimpl"
    ),
    "unknown hook": Bad(
        hook("return []", "kasmina_blueprint"), INCOMPATIBLE, PackReason.UNKNOWN_HOOK, "kasmina_blueprint"
    ),
    "good hook and one with an unknown argument": Bad(
        GOOD + hook("return []", "kasmina_hosts", "config"), INCOMPATIBLE, PackReason.UNKNOWN_HOOK, "config"
    ),
    "hook wrapper": Bad(
        GOOD.replace("@hookimpl", "@hookimpl(wrapper=True)").replace("return [", "yield; return ["),
        INVALID,
        PackReason.WRONG_TYPE,
        "hook wrapper",
    ),
    "hook raises": Bad(hook("raise OSError('disk')"), FAILED, PackReason.HOOK_FAILED, "OSError: disk"),
    "hook exits": Bad(hook("raise SystemExit(1)"), FAILED, PackReason.HOOK_FAILED, "SystemExit"),
    "hook forgets to return": Bad(hook("[scale('thing')]"), INVALID, PackReason.WRONG_TYPE, "found: None"),
    "hook returns one spec": Bad(
        hook("return scale('thing')"), INVALID, PackReason.WRONG_TYPE, "an iterable of BlueprintSpec"
    ),
    "hook returns text": Bad(hook("return 'thing'"), INVALID, PackReason.WRONG_TYPE, "found: 'thing'"),
    "hook returns a non-spec": Bad(
        hook("return [scale('thing'), 42]"), INVALID, PackReason.WRONG_TYPE, "found: 42, of type int", True
    ),
    "generator that raises midway": Bad(
        hook("yield scale('thing'); raise OSError('midway')"), FAILED, PackReason.HOOK_FAILED, "midway", True
    ),
    "blueprints good, hosts bad": Bad(
        hook("return [scale('thing')]") + hook("return [None]", "kasmina_hosts"),
        INVALID,
        PackReason.WRONG_TYPE,
        "kasmina_hosts must return only HostSpec",
        True,
    ),
    "gate check of another type": Bad(
        hook("return [scale('thing')]") + hook("return ['friday']", "kasmina_gate_checks"),
        INVALID,
        PackReason.WRONG_TYPE,
        "GateCheckSpec",
        True,
    ),
    "policies that are a list": Bad(
        hook("return ['x']", "kasmina_policies"), INVALID, PackReason.WRONG_TYPE, "mapping"
    ),
    "policy that cannot be called": Bad(
        hook("return {'x': 3}", "kasmina_policies"), INVALID, PackReason.WRONG_TYPE, "a callable for 'x'"
    ),
    "policy without a usable name": Bad(
        hook("return {'X Y': print}", "kasmina_policies"), INVALID, PackReason.WRONG_TYPE, "'X Y'"
    ),
    "one name twice": Bad(
        hook("return [scale('thing'), scale('thing', description='second')]"),
        CONFLICT,
        PackReason.DUPLICATE_ID,
        "description='second'",
        True,
    ),
    "int estimate without its width": Bad(
        thing("param_estimate=129"), FAILED, PackReason.HOOK_FAILED, "at which width"
    ),
    "unusable blueprint name": Bad(
        hook("return [scale('Bad Name')]"), FAILED, PackReason.HOOK_FAILED, "'Bad Name' is not a blueprint name"
    ),
    "wrong topology": Bad(thing("topology='cnnn'"), FAILED, PackReason.HOOK_FAILED, "topology must be a Topology"),
    "wrong estimate": Bad(
        thing("param_estimate=lambda dim: 2 * dim"), INVALID, CHECK, "does not have the size it declares", True
    ),
    "estimate that raises": Bad(
        thing("param_estimate=lambda dim: 1 // 0"), INVALID, CHECK, "ZeroDivisionError", True
    ),
    "factory that is not there": Bad(thing("factory='fake_bad:Gone'"), INVALID, CHECK, "Gone", True),
    "factory that raises": Bad(thing("factory=lambda dim: 1 / 0"), INVALID, CHECK, "ZeroDivisionError", True),
    "factory that exits": Bad(thing("factory=lambda dim: exit()"), INVALID, CHECK, "SystemExit", True),
    "factory that returns no module": Bad(thing("factory=lambda dim: dim"), INVALID, CHECK, "measured: int", True),
    "wrong shape": Bad(
        thing("factory=Bad", seed("return (x * (1 + self.weight))[..., 1:]")), INVALID, CHECK, "measured: (2, 64, 8, 7)", True
    ),
    "several outputs": Bad(
        thing("factory=Bad", seed("return x * (1 + self.weight), x")), INVALID, CHECK, "measured: tuple", True
    ),
    "forward that raises": Bad(thing("factory=Bad", seed("return x @ x")), INVALID, CHECK, "does not run", True),
    "NaN output": Bad(
        thing("factory=Bad", seed("return x * (1 + self.weight / 0)")), INVALID, CHECK, "NaN or infinity", True
    ),
    "dead gradient": Bad(
        thing("factory=Bad", seed("return x + torch.relu(self.weight * x.mean()) * self.weight")),
        INVALID,
        CHECK,
        "no usable gradient at birth",
        True,
    ),
    "changes its input": Bad(
        thing("factory=Bad", seed("return x.mul_(2) * (1 + self.weight)")), INVALID, CHECK, "changes its input", True
    ),
    "random numbers in forward": Bad(
        thing("factory=Bad", seed("return x * (1 + self.weight) + 0 * torch.rand(1)")),
        INVALID,
        CHECK,
        "global random numbers",
        True,
    ),
    "seeds the generators": Bad(
        thing("factory=Bad", seed("return x * (1 + self.weight)", "torch.manual_seed(0); self.weight = nn.Parameter(torch.zeros(dim, 1, 1))")),
        INVALID,
        CHECK,
        "changes settings of the whole program",
        True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD.values(), ids=list(BAD))
def test_a_bad_pack_is_listed_with_its_cause_and_stops_no_other(site: Site, bad: Bad) -> None:
    site.install("fake-good", "a-good = fake_good", fake_good=GOOD)
    site.install("fake-last", "z-good = fake_last", fake_last=GOOD.replace('"scale"', '"last"'))
    modules = {"fake_bad": bad.source} if bad.source is not None else {}
    site.install("fake-bad", "bad = fake_bad", version="6.6", **modules)
    registry = PluginRegistry()
    registry.load_installed()

    record = registry.pack("bad")
    assert (record.distribution, record.version, record.module) == ("fake-bad", "6.6", "fake_bad")
    assert (record.state, record.reason) == (bad.state, bad.reason), record.cause
    assert bad.cause in record.cause
    assert [b.id for b in registry.blueprints.list_all() if b.distribution.startswith("fake")] == [
        "a-good:scale",
        "z-good:last",
    ]
    assert not [e for e in registry.events if e.blueprint_id.startswith("bad")]
    assert not [full for full in registry.policies() if full.startswith("bad")]

    asked = ["bad:thing", "bad:anything", *(["thing"] if bad.declares_thing else [])]
    for name in asked:
        with pytest.raises(PluginError, match="'bad'") as caught:
            registry.blueprints.get(name)
        assert bad.cause in str(caught.value)
        assert "fake-bad 6.6" in str(caught.value)
        assert caught.value.__cause__ is record.error
    with pytest.raises(PluginError):
        registry.hosts.get("bad:anything")
    with pytest.raises(PluginError):
        registry.policies()["bad:anything"]


def test_the_exception_behind_a_bad_pack_is_chained(site: Site) -> None:
    site.install("fake-bad", "bad = fake_bad", fake_bad="import no_such_thing")
    registry = PluginRegistry(checks=False)
    registry.load_installed()
    lengths = set()
    for _ in range(3):
        with pytest.raises(PluginError) as caught:
            registry.blueprints.get("bad:thing")
        assert isinstance(caught.value.__cause__, ModuleNotFoundError)
        lengths.add(len(caught.traceback))
    assert len(lengths) == 1, "asking again must not grow the traceback"


def test_an_unknown_short_name_says_which_packs_are_not_available(site: Site) -> None:
    site.install("fake-bad", "bad = fake_bad", fake_bad="import no_such_thing")
    registry = PluginRegistry(checks=False)
    registry.load_installed()
    with pytest.raises(KeyError, match=r"Not available: pack .*bad"):
        registry.blueprints.get("thing")


def test_an_interrupt_while_a_pack_loads_reaches_the_user(site: Site) -> None:
    site.install("fake-slow", "slow = fake_slow", fake_slow="raise KeyboardInterrupt")
    registry = PluginRegistry(checks=False)
    with pytest.raises(KeyboardInterrupt):
        registry.load_installed()
