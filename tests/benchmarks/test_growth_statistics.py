"""The figures of the growth benchmarks, against ones worked out by hand."""

from __future__ import annotations

import math
from statistics import median

import pytest

from benchmarks.growth.gate_quality import decide
from benchmarks.growth.statistics import Judged, bootstrap, paired, score, share_interval
from benchmarks.growth.tables import half_bad, reached, worth_table


def test_interval_of_equal_values_is_that_value() -> None:
    found = bootstrap([0.25] * 7)
    assert (found.middle, found.low, found.high, found.n) == (0.25, 0.25, 0.25, 7)


def test_interval_of_two_values_spans_them() -> None:
    # Of four equally likely resamples one is twice the low and one twice the high value: 25 % each, above 2.5 %.
    found = bootstrap([1.0, 3.0])
    assert (found.middle, found.low, found.high) == (2.0, 1.0, 3.0)


def test_interval_of_many_values_is_near_the_normal_one() -> None:
    values = [math.sin(i * 1.7) for i in range(400)]
    spread = math.sqrt(sum(v * v for v in values) / len(values)) / math.sqrt(len(values))
    found = bootstrap(values)
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.1)
    assert found.low < found.middle < found.high


def test_interval_of_a_median_ignores_an_outlier() -> None:
    assert bootstrap([0.0] * 9 + [1e6], median).middle == 0.0


def test_nothing_and_one_value_have_no_interval() -> None:
    assert bootstrap([]).n == 0
    assert math.isnan(bootstrap([1.0]).low)
    assert str(bootstrap([1.0])) == "+1.000 [one run]"


def test_only_seeds_that_both_have_are_paired() -> None:
    assert paired({0: 1.0, 1: 5.0, 3: 2.0}, {1: 2.0, 3: 4.0, 4: 0.0}) == [3.0, -2.0]


def test_share_interval_is_wilsons() -> None:
    assert share_interval(0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))
    assert share_interval(5, 10) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert share_interval(0, 0) == (0.0, 1.0)


def test_score_of_a_rule() -> None:
    judged = [
        Judged(useful=True, accepted=True, gain=0.4),
        Judged(useful=True, accepted=False, gain=0.2),  # missed
        Judged(useful=False, accepted=True, gain=-0.6),  # harm
        Judged(useful=False, accepted=False, gain=-1.0),
    ]
    found = score(judged)
    assert found.precision == 0.5
    assert found.recall == 0.5
    assert found.harm == pytest.approx(0.6 / 4)
    assert found.regret == pytest.approx((0.6 + 0.2) / 4)
    assert found.profit == pytest.approx((0.4 - 0.6) / 4)


def test_rule_that_takes_nothing_has_no_precision_and_no_harm() -> None:
    found = score([Judged(True, False, 0.3), Judged(False, False, -0.3)])
    assert math.isnan(found.precision)
    assert (found.recall, found.harm) == (0.0, 0.0)
    assert found.regret == pytest.approx(0.15)
    with pytest.raises(ValueError, match="no seeds"):
        score([])


def _look(g2: bool, gain: float, improved: float, truth: float) -> dict[str, object]:
    return {"g2": g2, "gain": gain, "t": 0.0, "improved": improved, "truth": truth, "why": "", "tested": g2}


def test_ours_decides_at_the_first_look_it_likes_and_the_others_at_the_first_after_three() -> None:
    looks = [
        _look(False, 0.5, 9.0, 0.1),
        _look(False, 0.5, 9.0, 0.2),
        _look(False, 0.0, 0.4, 0.3),
        _look(False, 0.03, 0.4, 0.4),
        _look(True, 0.0, 0.6, 0.5),
    ]
    record = {"looks": looks, "kept": True, "truth": 0.9}
    assert (decide("no gate", record).look, decide("no gate", record).gain) == (3, 0.3)
    assert (decide("gain > .02", record).look, decide("gain > .02", record).gain) == (4, 0.4)
    assert (decide("ours, G2 alone", record).look, decide("report, G2", record).look) == (5, 5)
    assert (decide("ours, to the end", record).accepted, decide("ours, to the end", record).gain) == (
        True,
        0.9,
    )
    early = record | {"looks": [_look(True, 0.0, 0.6, 0.7), *looks]}
    assert (decide("ours, G2 alone", early).look, decide("tested G2", early).look) == (1, 6)
    refused = record | {"kept": False}
    assert not decide("ours, to the end", refused).accepted
    assert decide("ours, G2 alone", refused).accepted


def test_seed_that_no_rule_likes_is_judged_by_its_last_look() -> None:
    found = decide(
        "gain > .02", {"looks": [_look(False, 0.0, 0.0, g) for g in (0.1, 0.2, 0.3)], "kept": False}
    )
    assert (found.accepted, found.gain) == (False, 0.3)


def test_kept_seeds_are_told_by_what_they_were_worth() -> None:
    found = [
        {"kind": kind, "truth": truth, "kept": kept}
        for kind, truth, kept in [
            ("useful", 0.3, True),
            ("useful", 0.06, False),
            ("useful", 0.02, True),
            ("useful", -0.1, False),
            ("useful", None, False),  # refused before it blended in
            ("null", 0.3, True),
        ]
    ]
    rows = [line.split() for line in worth_table(found).splitlines()[1:]]
    assert [row[:-3] for row in rows] == [
        ["0", "or", "less", "0/1"],
        ["0", "to", "0.02", "1/1"],
        ["0.02"],  # to 0.05: none
        ["above", "0.05", "1/2"],
    ]


def test_half_of_the_pool_is_bad_in_equal_parts() -> None:
    counts = {"useful": 7, "null": 5, "harmful": 5, "overfitting": 2}
    pool = half_bad([{"kind": kind} for kind, n in counts.items() for _ in range(n)])
    kinds = [seed["kind"] for seed in pool]
    assert {kind: kinds.count(kind) for kind in counts} == {
        "useful": 6,
        "null": 2,
        "harmful": 2,
        "overfitting": 2,
    }


def test_target_is_reached_by_the_mean_of_three_looks() -> None:
    curve = [(1.0, 0.1, 3.0), (2.0, 0.2, 1.0), (3.0, 0.3, 2.0), (4.0, 0.4, 0.0), (5.0, 0.5, 9.0)]
    assert reached(curve, 1.0) == (4.0, 0.4)
    assert reached(curve, 0.5) is None
