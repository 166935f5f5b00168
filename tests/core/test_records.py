"""Records: dataclasses that become plain data and come back the same, or are refused by field, value and expectation."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Annotated, Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kasmina_core import CheckpointError
from kasmina_core.records import Count, Mark, Range, Record, read
from kasmina_core.telemetry.sinks import for_json


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Level(IntEnum):
    LOW = 0
    HIGH = 1


@dataclass(frozen=True, slots=True)
class Inner(Record):
    share: Annotated[float, Range(0.0, 1.0)]
    note: str = ""

    def __post_init__(self) -> None:
        if self.note == "refused":
            raise ValueError("a note cannot be 'refused'")


@dataclass(frozen=True, slots=True)
class Outer(Record):
    derived: ClassVar = ("double",)

    count: Count
    number: float
    maybe: float | None
    colour: Colour
    level: Level
    named: Annotated[Level | None, Mark.BY_NAME]
    kind: Literal["a", "b"]
    inner: Inner | None
    rows: tuple[tuple[str, int], ...]
    items: list[Inner]
    table: Mapping[str, Sequence[float]]
    recent: deque[int]
    anything: dict[str, Any]
    later: Annotated[int | None, Mark.LATER] = None
    cause: Annotated[Exception | None, Mark.UNWRITTEN] = field(default=None, compare=False)

    @property
    def double(self) -> int:
        return 2 * self.count


inners = st.builds(Inner, st.floats(0, 1), st.text().filter(lambda text: text != "refused"))
finite = st.floats(allow_nan=False)
outers = st.builds(
    Outer,
    st.integers(0, 2**63 - 1),
    finite,
    st.none() | finite,
    st.sampled_from(Colour),
    st.sampled_from(Level),
    st.none() | st.sampled_from(Level),
    st.sampled_from(["a", "b"]),
    st.none() | inners,
    st.lists(st.tuples(st.text(), st.integers(-5, 5)), max_size=3).map(tuple),
    st.lists(inners, max_size=3),
    st.dictionaries(st.text(), st.lists(finite, max_size=3).map(tuple), max_size=3),
    st.lists(st.integers(-5, 5), max_size=3).map(deque),
    st.dictionaries(st.text(), st.none() | st.tuples(st.booleans()), max_size=2),
    st.none() | st.integers(-5, 5),
    st.none() | st.just(ValueError("gone")),
)


def an_outer(**changes: Any) -> dict[str, Any]:
    one = Outer(
        1,
        0.5,
        None,
        Colour.RED,
        Level.LOW,
        Level.HIGH,
        "a",
        Inner(0.5),
        (("x", 1),),
        [Inner(1.0)],
        {"t": [1.0]},
        deque([1]),
        {},
    )
    return one.to_dict() | changes


@given(outers)
def test_a_record_comes_back_the_same(record: Outer) -> None:
    assert Outer.from_dict(record.to_dict()) == record


@given(outers.map(lambda record: Outer.from_dict(record.to_dict() | {"anything": {}})))
def test_a_record_survives_json(record: Outer) -> None:
    data = json.loads(json.dumps(record.to_dict()))
    assert Outer.from_dict(data) == record
    assert Outer.from_dict(json.loads(json.dumps(for_json(record), allow_nan=False))) == record


def test_enums_are_written_by_value_or_by_name_and_exceptions_not_at_all() -> None:
    data = an_outer()
    assert (data["colour"], data["level"], data["named"]) == ("red", 0, "HIGH")
    assert type(data["level"]) is int
    assert data["double"] == 2
    assert "cause" not in data


def test_what_is_hinted_any_is_written_as_it_is() -> None:
    assert an_outer(anything={"shape": (1, 2)})["anything"] == {"shape": (1, 2)}
    record = Outer.from_dict(an_outer(anything={"shape": (1, 2)}))
    assert record.to_dict()["anything"] == {"shape": (1, 2)}
    assert record.to_dict()["anything"] is not record.anything


def test_what_earlier_versions_did_not_write_gets_its_default() -> None:
    data = an_outer()
    del data["later"]
    assert Outer.from_dict(data).later is None


@pytest.mark.parametrize(("word", "number"), [("Infinity", math.inf), ("-Infinity", -math.inf)])
def test_a_number_may_be_one_of_the_words_of_strict_json(word: str, number: float) -> None:
    assert Outer.from_dict(an_outer(number=word)).number == number
    assert math.isnan(Outer.from_dict(an_outer(number="NaN")).number)


def test_a_whole_number_is_a_number() -> None:
    assert type(Outer.from_dict(an_outer(number=3)).number) is float


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"count": -1}, "count must be a whole number of at least 0, not -1"),
        ({"count": 1.0}, "count must be a whole number of at least 0, not 1.0"),
        ({"count": True}, "count must be a whole number of at least 0, not True"),
        ({"count": 1 << 63}, "count must be a whole number"),
        ({"count": 10**5000}, "not a int too long to print"),
        ({"number": "much"}, "number must be a number, not 'much'"),
        ({"number": 10**400}, "number must be a number, not 1000"),
        ({"number": None}, "number must be a number, not None"),
        ({"colour": "green"}, r"colour must be a Colour \(red, blue\), not 'green'"),
        ({"level": True}, r"level must be a Level \(0, 1\), not True"),
        ({"level": 1.0}, r"level must be a Level \(0, 1\), not 1.0"),
        ({"named": 1}, r"named must be a Level \(LOW, HIGH\), not 1"),
        ({"kind": "c"}, "kind must be one of a, b, not 'c'"),
        ({"kind": []}, r"kind must be one of a, b, not \[\]"),
        ({"inner": {"share": 1.5, "note": ""}}, "inner.share must be a number of at least 0 and at most 1"),
        (
            {"inner": {"share": math.nan, "note": ""}},
            "inner.share must be a number of at least 0 and at most",
        ),
        ({"inner": {"share": 1.0, "note": "refused"}}, "inner: a note cannot be 'refused'"),
        ({"inner": 3}, "inner must be a mapping, not 3"),
        ({"rows": [["x"]]}, r"rows\[0\] must be a list of 2, not \['x'\]"),
        ({"rows": "xy"}, "rows must be a list, not 'xy'"),
        ({"items": [{"share": 0, "note": ""}, {}]}, r"items\[1\] has other fields.*\n  missing: note, share"),
        ({"table": {"t": ["x"]}}, r"table\['t'\]\[0\] must be a number, not 'x'"),
        ({"table": {3: []}}, "table must be a mapping by text"),
        ({"cause": None}, "unknown: cause"),
        ({"colours": 1, "z" * 900: 1}, "unknown: colours, z{1,200}$"),
    ],
)
def test_what_does_not_fit_is_refused_by_field_value_and_expectation(
    changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(CheckpointError, match=f"(?s)^The saved Outer cannot be read: .*{says}") as refused:
        Outer.from_dict(an_outer(**changes))
    assert len(str(refused.value)) < 450


def test_missing_fields_are_named_and_the_reader_says_what_it_read() -> None:
    data = an_outer()
    del data["count"], data["kind"]
    with pytest.raises(
        CheckpointError, match=r"^The file x cannot be read: it has.*\n  missing: count, kind\n"
    ):
        Outer.from_dict(data, "The file x")
    with pytest.raises(CheckpointError, match="memory cannot be read: pairs must be a list, not 3"):
        read(list[tuple[str, int]], 3, "memory", "pairs")


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(), inside, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(sorted(an_outer())), ANY)
def test_any_damage_is_refused_or_gives_the_types_of_the_hints(name: str, value: Any) -> None:
    try:
        record = Outer.from_dict(an_outer(**{name: value}))
    except CheckpointError:
        return
    assert type(record.count) is int
    assert record.count >= 0
    assert type(record.number) is float
    assert isinstance(record.colour, Colour)
    assert isinstance(record.level, Level)
    assert record.inner is None or 0.0 <= record.inner.share <= 1.0
    assert all(type(text) is str and type(number) is int for text, number in record.rows)
    assert Outer.from_dict(json.loads(json.dumps(for_json(record)))).count == record.count
