"""The record of a run and the files made from it."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import os
import re
import sys
from html.parser import HTMLParser

import pytest
from fake_runs import fake_run
from hypothesis import given
from hypothesis import strategies as st

from kasmina_core.errors import CheckpointError
from kasmina_core.experiments import report, wording
from kasmina_core.experiments.page import charts_of, epoch_of_equal_flops
from kasmina_core.experiments.record import (
    GROWN,
    HOST_ALONE,
    ArmResult,
    EpochRecord,
    EpochSlot,
    RunRecord,
    SeedRecord,
)
from kasmina_core.experiments.report import (
    ReportError,
    metrics_csv,
    render_html,
    render_png,
    require_plots,
    write_run,
)

PNG = b"\x89PNG\r\n\x1a\n"
HOSTILE = '</td><script src="http://evil.example/x.js">alert(1)</script>"\' $\\frac{1}{$ _\x1b[31m\n'

# The record

numbers = st.floats() | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1e300])
whole = st.integers(0, 10**15)
slots = st.builds(EpochSlot, st.text(), st.text(), st.text(), numbers, st.none() | numbers)
epochs = st.builds(
    EpochRecord, whole, numbers, numbers, numbers, whole, numbers, st.lists(slots, max_size=2), st.text()
)
seeds = st.builds(
    SeedRecord,
    st.text(),
    st.text(),
    st.text(),
    st.sampled_from(["fossilized", "culled", "unfinished"]),
    whole,
    st.none() | whole,
    st.lists(st.tuples(st.text(), whole), max_size=2),
    whole,
    st.none() | numbers,
    st.none() | numbers,
    st.none() | numbers,
    st.text(),
)
arms = st.builds(ArmResult, st.text(), whole, numbers, whole, numbers, numbers, numbers, numbers)
runs = st.builds(
    RunRecord,
    st.text(),
    st.text(),
    st.text(),
    st.dictionaries(st.text(), st.integers() | st.text() | st.none() | st.lists(st.booleans(), max_size=2)),
    st.lists(epochs, max_size=2),
    st.lists(epochs, max_size=2),
    st.lists(seeds, max_size=2),
    st.lists(arms, max_size=2),
    st.booleans(),
    st.lists(st.text(), max_size=2),
    st.booleans(),
)


def refuse(name):
    raise AssertionError(f"{name} is not JSON")


@given(run=runs)
def test_any_run_survives_strict_json_unchanged(run):
    data = json.loads(run.to_json(), parse_constant=refuse)
    again = RunRecord.from_dict(data)
    assert again.to_json() == run.to_json()
    assert repr(again) == repr(run)  # by repr, for NaN differs from itself


def test_a_run_is_read_back_from_its_file(tmp_path):
    run = fake_run()
    run.write(tmp_path / "run.json")
    assert RunRecord.read(tmp_path / "run.json") == run
    assert run.arm(HOST_ALONE).parameters == 338
    assert run.arm("another") is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data.update(format=2), "format 2"),
        (lambda data: data.pop("arms"), "missing: arms"),
        (lambda data: data.update(surprise=1), "unknown: surprise"),
        (
            lambda data: data["epochs"][0].update(epoch="one"),
            "epochs[0].epoch must be a whole number, not 'one'",
        ),
        (lambda data: data["epochs"][0]["slots"].append(3), "epochs[0].slots[3] must be a mapping, not 3"),
        (
            lambda data: data["seeds"][0].update(outcome="eaten"),
            "seeds[0].outcome must be one of fossilized, culled, unfinished, not 'eaten'",
        ),
        (
            lambda data: data["arms"][0].update(test_loss="low"),
            "RunRecord cannot be read: arms[0].test_loss must be a number, not 'low'",
        ),
        (lambda data: data.update(interrupted=1), "interrupted must be true or false, not 1"),
    ],
)
def test_a_foreign_record_is_refused_and_the_message_names_the_fault(change, said):
    data = fake_run().to_dict()
    change(data)
    with pytest.raises(CheckpointError, match=re.escape(said)):
        RunRecord.from_dict(data)


@pytest.mark.parametrize("content", ["", "{", "[1]", '"text"', "null"])
def test_a_file_that_holds_no_record_is_refused(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(CheckpointError):
        RunRecord.read(tmp_path / "run.json")


# The files


class Page(HTMLParser):
    """Collects tags with their attributes, and the text between them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def picture():
    return render_png(fake_run())


def test_a_run_is_written_as_five_files_that_can_be_read(tmp_path):
    run = fake_run()
    paths = write_run(run, tmp_path / "new" / "run")
    assert [path.name for path in paths] == [
        "run.json",
        "config.json",
        "metrics.csv",
        "report.png",
        "report.html",
    ]
    assert sorted(os.listdir(tmp_path / "new" / "run")) == sorted(path.name for path in paths)
    assert RunRecord.read(paths[0]) == run
    assert json.loads(paths[1].read_text()) == run.config
    assert paths[3].read_bytes().startswith(PNG)
    assert base64.b64encode(paths[3].read_bytes()).decode() in paths[4].read_text()


def test_metrics_have_a_row_an_epoch_of_each_arm():
    run = fake_run()
    rows = list(csv.DictReader(io.StringIO(metrics_csv(run))))
    assert [row["arm"] for row in rows] == [GROWN] * 40 + [HOST_ALONE] * len(run.baseline)
    for row, epoch in zip(rows, [*run.epochs, *run.baseline], strict=True):
        assert int(row["epoch"]) == epoch.epoch
        assert float(row["val_loss"]) == epoch.val_loss
        assert float(row["val_accuracy"]) == epoch.val_metric
        assert float(row["flops"]) == epoch.flops
    assert rows[13]["block1.stage"] == "BLENDING"
    assert float(rows[13]["block1.alpha"]) == pytest.approx(0.4)
    assert rows[13]["block2.blueprint"] == "kasmina-cnn:norm"
    assert rows[40]["block1.stage"] == ""


def test_the_page_needs_no_network_and_runs_only_our_script(picture):
    text = render_html(fake_run(), picture)
    page = Page(text)
    assert not {"link", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", text, re.DOTALL)
    assert [attributes for attributes, _ in scripts] == [' type="application/json" id="data"', ""]
    digest = base64.b64encode(hashlib.sha256(scripts[1][1].encode()).digest()).decode()
    assert (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; connect-src 'none'"
        in text
    )
    sources = [value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "srcset")]
    assert len(sources) == 1
    assert sources[0].startswith("data:image/png;base64,")
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert links == list(report.DOWNLOADS)
    assert not re.search(r"url\(|@import", text[text.index("<style>") : text.index("</style>")])


def test_the_charts_are_drawn_from_the_data_of_the_run():
    run = fake_run()
    charts = charts_of(run)
    assert [line["name"] for line in charts["lines"]] == [
        "grown, validation",
        "grown, training",
        "host alone, validation",
        "host alone, training",
    ]
    assert charts["lines"][0]["y"] == [epoch.val_loss for epoch in run.epochs]
    assert charts["lines"][2]["x"] == epoch_of_equal_flops(run)
    (block2,) = [slot for slot in charts["slots"] if slot["name"] == "block2"]
    assert [seed["blueprint"] for seed in block2["seeds"]] == ["norm", "attention"]
    assert sum(last - first + 1 for first, last, _ in block2["spans"]) == len(run.epochs)
    json.dumps(charts_of(hostile_run()), allow_nan=False)


def test_the_page_holds_the_summary_the_tables_and_the_words(picture):
    run = fake_run()
    run.notes.append("The gates decided on 200 samples.")
    text = Page(render_html(run, picture)).text
    for part in ("0.305 lower", "93.5 %", "37.4 G", "seed-4", "never measured", "no gain after six epochs"):
        assert part in text
    for word in ("host", "seed", "gate", "alpha", "blending", "fossilized", "training FLOPs"):
        assert word in text
    assert "The gates decided on 200 samples." in text
    assert '["block1"]' in text


def hostile_run():
    run = fake_run()
    run.task = run.host = run.metric_name = HOSTILE
    run.config = {HOSTILE: HOSTILE}
    run.notes = [HOSTILE]
    slot = EpochSlot(HOSTILE, HOSTILE, HOSTILE, math.nan, math.nan)
    run.epochs = [EpochRecord(1, math.nan, math.inf, math.nan, 1, math.nan, (slot,), HOSTILE)]
    run.seeds = [SeedRecord(HOSTILE, HOSTILE, HOSTILE, "culled", 1, 1, [], 1, math.nan, 0.0, 1.0, HOSTILE)]
    run.arms = [ArmResult(HOSTILE, 1, math.inf, 1, math.nan, math.nan, math.nan, 0.0)]
    return run


def test_hostile_names_are_text_in_the_page_and_in_the_picture():
    run = hostile_run()
    picture = render_png(run)
    assert picture.startswith(PNG)
    page = Page(render_html(run, picture))
    assert [tag for tag, _ in page.tags].count("script") == 2  # the data, and ours
    assert "</td><script" in page.text
    assert "\x1b" not in page.text
    known = {
        "alt",
        "src",
        "class",
        "id",
        "type",
        "href",
        "data-head",
        "style",
        "charset",
        "content",
        "name",
        "lang",
        "http-equiv",
    }
    assert {key for _, attrs in page.tags for key in attrs} <= known


@pytest.mark.parametrize(
    "run",
    [
        RunRecord("digits", "accuracy", "host"),
        RunRecord("digits", "accuracy", "host", epochs=fake_run().epochs[:1], interrupted=True),
        RunRecord("digits", "accuracy", "host", baseline=fake_run().baseline),
        RunRecord("digits", "accuracy", "host", epochs=[EpochRecord(1, 1.0, 1.0, 0.5, 3, 0.0)]),
    ],
    ids=["nothing", "one epoch", "host alone only", "no slots"],
)
def test_a_run_that_was_stopped_early_has_a_report_too(tmp_path, run):
    write_run(run, tmp_path)
    assert (tmp_path / "report.html").stat().st_size > 1000


def test_the_host_alone_is_drawn_where_the_grown_run_had_spent_the_same_flops():
    run = RunRecord("t", "accuracy", "h")
    run.epochs = [EpochRecord(i, 1.0, 1.0, 0.5, 1, flops) for i, flops in ((1, 10.0), (2, 30.0))]
    run.baseline = [EpochRecord(i, 1.0, 1.0, 0.5, 1, 5.0 * i) for i in range(1, 7)]
    assert epoch_of_equal_flops(run) == pytest.approx([0.5, 1.0, 1.25, 1.5, 1.75, 2.0])


def test_the_regret_is_what_the_grown_run_is_behind_the_best_fixed_size_at_each_budget():
    def epochs(*points):
        return [EpochRecord(i, 0.0, loss, 0.0, 1, flops) for i, (flops, loss) in enumerate(points, 1)]

    record = RunRecord("digits", "accuracy", "host", epochs=epochs((10, 3.0), (80, 1.0)))
    assert record.regrets == []
    record.baseline = epochs((5, 2.0), (80, 2.0))
    record.sizes = {"9 parameters": epochs((20, 3.0), (40, 2.0), (80, 0.5))}
    record.arms = [ArmResult(name, 1, 80.0, 2, 0.0, 0.0, 0.0, 0.0) for name in (GROWN, HOST_ALONE)]
    grown, alone, large = record.regrets
    # At 10, 20, 40 and 80 FLOPs the best fixed size has 2, 2, 2 and .5.
    assert grown.behind == pytest.approx((1.0, 3 - 10 / 35 - 2, 3 - 30 / 35 - 2, 0.5))
    assert (alone.behind, large.behind) == ((0.0, 0.0, 0.0, 1.5), (None, 1.0, 0.0, 0.0))
    assert (grown.most, alone.most, large.most) == (1.0, 1.5, None)
    assert RunRecord.from_dict(json.loads(record.to_json())) == record
    assert "(host alone), is at most 1.500 behind" in wording.regret(record)
    assert wording.regret_table(record).rows[2] == ("9 parameters", "–", "+1.000", "best", "best", "–")  # noqa: RUF001
    assert render_png(record)[:4] == b"\x89PNG"


def test_equal_runs_make_equal_pictures(picture):
    assert render_png(fake_run()) == picture


def test_drawing_leaves_the_global_matplotlib_state_alone(picture):
    import matplotlib

    before = (dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False))
    render_png(fake_run())
    assert (dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False)) == before


def test_without_matplotlib_the_data_is_written_and_the_message_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ReportError, match=r"pip install 'matplotlib>=3.9'"):
        require_plots()
    with pytest.raises(ReportError):
        write_run(fake_run(), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "metrics.csv", "run.json"]
