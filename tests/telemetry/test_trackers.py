"""What trackers show: read back from their own stores, offline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kasmina_core import (
    BlueprintRegistry,
    BlueprintSpec,
    CommandRefused,
    EpochEnded,
    GateEvaluated,
    MorphogeneticModel,
    RunStarted,
    SeedCulled,
    SeedGerminated,
    SlotReading,
    StageChanged,
    Telemetry,
    TelemetryEvent,
    Topology,
    TrackerSink,
    UnknownNameError,
)
from kasmina_core.telemetry.trackers import flat, markdown

SETTINGS = {"lr": 0.5, "policy": {"patience": 3}, "slots": ("a", "b")}


def life() -> list[TelemetryEvent]:
    """A seed that germinates, learns through two epochs and is culled."""
    waits = GateEvaluated(
        slot="a", seed_id="a-0", epoch=1, gate="G2", passed=False, reason="gain | never\nmeasured"
    )
    empty, seed = SlotReading("b", "DORMANT"), SlotReading("a", "TRAINING", "a-0", "p:scale", 0.0, 8, 1)
    measured = SlotReading("a", "BLENDING", "a-0", "p:scale", 0.25, 8, 2, gain=0.125, gradient_norm=2.0)
    return [
        RunStarted(settings=SETTINGS),
        SeedGerminated(slot="a", seed_id="a-0", blueprint_id="p:scale", parameters=8),
        StageChanged(slot="a", seed_id="a-0", before="DORMANT", after="GERMINATED"),
        waits,
        EpochEnded(epoch=1, metric=2.0, host_parameters=100, seed_parameters=8, slots=(seed, empty)),
        CommandRefused(slot="b", epoch=1, command="Advance", reason="no seed"),
        EpochEnded(
            epoch=2, metric=1.5, host_parameters=100, seed_parameters=8, flops=5e9, slots=(measured, empty)
        ),
        SeedCulled(
            slot="a", seed_id="a-0", epoch=2, blueprint_id="p:scale", reason="asked to", stage="BLENDING"
        ),
    ]


METRIC = {1: 2.0, 2: 1.5}
ALPHA = {1: 0.0, 2: 0.25}
STAGE = {1: 3.0, 2: 4.0}
LOG = [
    ["0", "a", "a-0", "germinated", "p:scale, 8 parameters"],
    ["0", "a", "a-0", "stage_changed", "DORMANT → GERMINATED"],
    ["1", "a", "a-0", "gate_evaluated", "G2 not passed: gain \\| never measured"],
    ["1", "b", "", "command_refused", "Advance: no seed"],
    ["2", "a", "a-0", "culled", "p:scale in BLENDING: asked to, gain never measured"],
]


def send(sink: object) -> None:
    with Telemetry([sink]) as telemetry:
        for event in life():
            telemetry.emit(event)
    assert telemetry.errors == (0,), telemetry.status


def cells(text: str) -> list[list[str]]:
    """The rows of a table in Markdown, without its head."""
    return [
        [cell.strip() for cell in line.strip("|").replace("\\|", "\0").split("|")]
        for line in text.splitlines()[2:]
    ]


def log_of(text: str) -> list[list[str]]:
    return [[cell.replace("\0", "\\|") for cell in row] for row in cells(text)]


# -- what they share ---------------------------------------------------------------------------------------------------


class Shows(TrackerSink):
    def __init__(self, settings=None):
        super().__init__(settings)
        self.shown = []

    def show_numbers(self, values, epoch):
        self.shown.append((epoch, dict(values)))

    def show_log(self, rows, epoch):
        self.shown.append((epoch, len(rows)))

    def show_settings(self, settings):
        self.shown.append(dict(settings))

    def end(self):
        self.shown.append("end")


def test_settings_come_first_and_the_log_when_something_else_than_a_gate_was_told():
    sink = Shows({"seed": 1})
    for event in life():
        sink.write([event])
    gate = GateEvaluated(slot="a", epoch=3, gate="G2", passed=False, reason="")
    sink.write([gate, EpochEnded(epoch=3, metric=None, host_parameters=1, seed_parameters=0)])
    sink.write([gate, EpochEnded(epoch=4, metric=None, host_parameters=1, seed_parameters=0)])
    sink.close()
    assert sink.shown[0] == {"seed": 1, "lr": 0.5, "policy.patience": 3, "slots": "('a', 'b')"}
    epochs = [
        shown[0] if isinstance(shown, tuple) and isinstance(shown[1], dict) else shown for shown in sink.shown
    ]
    assert epochs[1:] == [1, (1, 3), 2, (2, 4), 3, (3, 6), 4, (4, 7), "end"]


def test_what_was_never_measured_is_not_shown():
    sink = Shows()
    sink.write(life())
    (_, first), (_, second) = (s for s in sink.shown if isinstance(s, tuple) and isinstance(s[1], dict))
    assert "growth/slots/a/gain" not in first
    assert "growth/model/flops" not in first
    assert second["growth/slots/a/gain"] == 0.125
    assert second["growth/slots/b/stage"] == 1


def test_the_log_keeps_its_last_rows(monkeypatch):
    monkeypatch.setattr("kasmina_core.telemetry.trackers.LOG_ROWS", 2)
    sink = Shows()
    sink.write(life())
    sink.close()
    assert sink.shown[-2] == (2, 2)


def test_a_table_keeps_its_columns_whatever_the_cells_hold():
    assert cells(markdown(("a", "b"), [("x | y\nz", 1)])) == [["x \0 y z", "1"]]


def test_settings_are_numbers_and_text():
    assert flat({"a": True, "b": None, "c": {"d": [1]}}) == {"a": True, "b": "None", "c.d": "[1]"}


def test_a_wrong_name_of_a_sink_is_answered_with_the_bundled_ones():
    with pytest.raises(UnknownNameError, match=r"No sink 'tensorbord' .* Bundled: .*tensorboard"):
        Telemetry(["tensorbord"])


# -- TensorBoard -------------------------------------------------------------------------------------------------------


def tensorboard(folder: Path):
    """Return scalars by name and epoch, and texts by name."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = accumulators.EventAccumulator(str(folder), {"scalars": 0, "tensors": 0})
    read.Reload()
    tags = read.Tags()
    scalars = {tag: {e.step: e.value for e in read.Scalars(tag)} for tag in tags["scalars"]}
    texts = {
        tag.removesuffix("/text_summary"): read.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
        for tag in tags["tensors"]
        if tag.endswith("text_summary")
    }
    return scalars, texts, read


def check_tensorboard(folder: Path):
    scalars, texts, read = tensorboard(folder)
    assert scalars["growth/model/metric"] == METRIC
    assert scalars["growth/model/flops"] == {2: 5e9}
    assert scalars["growth/slots/a/alpha"] == ALPHA
    assert scalars["growth/slots/a/stage"] == STAGE
    assert scalars["growth/slots/a/gain"] == {2: 0.125}
    assert log_of(texts["growth/log"]) == LOG
    assert ["lr", "0.5"] in cells(texts["growth/settings"])
    return scalars, read


def test_tensorboard_shows_numbers_the_log_and_settings(tmp_path):
    pytest.importorskip("tensorboard")
    from kasmina_core import TensorBoardSink

    sink = TensorBoardSink(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    send(sink)
    _, read = check_tensorboard(tmp_path / "run")
    plugin = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")
    data = read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    info = plugin.HParamsPluginData.FromString(data).session_start_info
    assert {name: value.number_value or value.string_value for name, value in info.hparams.items()} == {
        "lr": 0.5,
        "policy.patience": 3.0,
        "slots": "('a', 'b')",
    }
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_summary_writer_is_joined_and_stays_open(tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path))
    writer.add_scalar("loss", 3.0, 1000)
    send(writer)
    writer.add_scalar("loss", 2.0, 1001)
    writer.close()
    scalars, read = check_tensorboard(tmp_path)
    assert scalars["loss"] == {1000: 3.0, 1001: 2.0}
    with pytest.raises(KeyError):
        read.SummaryMetadata("_hparams_/session_start_info")


def test_a_logger_of_lightning_is_joined(tmp_path):
    pytest.importorskip("tensorboard")
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    logger = loggers.TensorBoardLogger(str(tmp_path), name="", version="")
    logger.log_metrics({"growth/a/alpha": 0.75}, step=400)  # as GrowthCallback logs
    send(logger)
    logger.finalize("success")
    scalars, _ = check_tensorboard(tmp_path)
    assert scalars["growth/a/alpha"] == {400: 0.75}


def test_a_model_that_grows_is_seen_in_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    registry = BlueprintRegistry()
    registry.register(
        BlueprintSpec(
            "conv", Topology.CNN, lambda dim: torch.nn.Conv2d(dim, dim, 1), lambda dim: dim * (dim + 1)
        ),
        pack="p",
    )
    from kasmina_core import InjectionPoint, TensorBoardSink

    host = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.ReLU())
    with Telemetry([TensorBoardSink(tmp_path / "run")]) as telemetry:
        model = MorphogeneticModel(
            host,
            [InjectionPoint("first", "0", 2, Topology.CNN)],
            example=torch.zeros(2, 1, 4, 4),
            registry=registry,
            telemetry=telemetry,
        )
        model.germinate("first", "conv")
        stages = {}
        for metric in (3.0, 2.0):
            model.step_epoch(metric)
            stages[model.epoch] = int(model.slots["first"].stage)
    scalars, texts, _ = tensorboard(tmp_path / "run")
    assert scalars["growth/model/metric"] == {1: 3.0, 2: 2.0}
    assert scalars["growth/slots/first/stage"] == stages
    assert scalars["growth/model/seed_parameters"] == {1: 6, 2: 6}
    assert "GERMINATED → TRAINING" in texts["growth/log"]
