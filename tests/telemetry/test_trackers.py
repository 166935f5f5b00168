"""What trackers show: read back from their own stores, offline."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest
import torch

from kasmina_core import (
    BlueprintRegistry,
    BlueprintSpec,
    CommandRefused,
    EpochEnded,
    GateEvaluated,
    InjectionPoint,
    MlflowSink,
    MorphogeneticModel,
    RunStarted,
    SeedCulled,
    SeedGerminated,
    SlotReading,
    StageChanged,
    Telemetry,
    TelemetryEvent,
    TensorBoardSink,
    Topology,
    TrackerSink,
    TrackioSink,
    UnknownNameError,
    WandbSink,
    graft_seeds,
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


def small_model(telemetry: Telemetry | None = None) -> MorphogeneticModel:
    registry = BlueprintRegistry()
    registry.register(
        BlueprintSpec(
            "conv", Topology.CNN, lambda dim: torch.nn.Conv2d(dim, dim, 1), lambda dim: dim * (dim + 1)
        ),
        pack="p",
    )
    return MorphogeneticModel(
        torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.ReLU()),
        [InjectionPoint("first", "0", 2, Topology.CNN)],
        example=torch.zeros(2, 1, 4, 4),
        registry=registry,
        telemetry=telemetry,
    )


def send_a_seed(sink: object) -> torch.Tensor:
    """Cull a seed while a sink looks on; return its weight."""
    with Telemetry([sink]) as telemetry:
        model = small_model(telemetry)
        model.germinate("first", "conv")
        weight = model.slots["first"].seed.weight.detach().clone()
        model.cull("first")
    assert telemetry.errors == (0,), telemetry.status
    return weight


def check_seed(file: Path, weight: torch.Tensor) -> None:
    model = small_model()
    assert graft_seeds(file, model) == ["first"]
    assert torch.equal(model.slots["first"].seed.weight, weight)


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


@pytest.mark.parametrize(
    ("make", "package"),
    [
        (TensorBoardSink, "tensorboard"),
        (WandbSink, "wandb"),
        (MlflowSink, "mlflow"),
        (TrackioSink, "trackio"),
    ],
)
def test_a_missing_tracker_is_named_at_once(make, package, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        make()


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
    with Telemetry([TensorBoardSink(tmp_path / "run")]) as telemetry:
        model = small_model(telemetry)
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


# -- Weights & Biases --------------------------------------------------------------------------------------------------


def wandb_records(folder: Path):
    """Return the records of an offline run's file: blocks of 32 KiB, as LevelDB's log has them."""
    protocol = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield protocol.Record.FromString(whole)
            whole = b""


def check_wandb(folder: Path):
    """Return the rows of the run, each with its step."""
    pytest.importorskip("wandb").teardown()  # finish() does not wait for the file
    rows, config, axes = [], {}, {}
    for record in wandb_records(folder):
        which = record.WhichOneof("record_type")
        if which == "history":
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            rows.append((items["_step"], items))
        elif which == "config":
            for item in record.config.update:
                config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        elif which == "metric":
            axes[record.metric.glob_name or record.metric.name] = record.metric.step_metric
        elif which == "run":
            for item in record.run.config.update:
                config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    assert axes["growth/*"] == "growth/epoch"
    by_epoch = {row["growth/epoch"]: row for _, row in rows if "growth/model/metric" in row}
    assert {e: row["growth/model/metric"] for e, row in by_epoch.items()} == METRIC
    assert {e: row["growth/slots/a/alpha"] for e, row in by_epoch.items()} == ALPHA
    tables = [row["growth/log/path"] for _, row in rows if "growth/log/path" in row]
    (run,) = folder.glob("wandb/offline-run-*")
    table = json.loads((run / "files" / tables[-1]).read_text(encoding="utf-8"))
    assert table["columns"] == ["epoch", "slot", "seed", "event", "what"]
    assert [row[3] for row in table["data"]] == [row[3] for row in LOG]
    return rows, config


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """wandb without a network, in a folder of its own."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()  # it reads its variables once
    yield wandb
    wandb.teardown()


def test_wandb_has_a_run_of_its_own_that_ends_with_the_sink(offline, tmp_path):
    send("wandb")
    assert offline.run is None
    _, config = check_wandb(tmp_path)
    assert (config["lr"], config["policy.patience"]) == (0.5, 3)


def test_an_active_run_of_wandb_is_joined_and_its_steps_stay(offline, tmp_path):
    run = offline.init(project="mine", config={"lr": 1.0})
    sink = WandbSink()
    run.log({"loss": 3.0}, step=1000)
    sink.write(life()[:5])
    run.log({"val": 2.5}, step=1000)
    run.log({"loss": 2.0}, step=1001)
    sink.write(life()[5:])
    sink.close()
    run.log({"loss": 1.0}, step=1002)
    run.finish()
    rows, config = check_wandb(tmp_path)
    own = [(step, row.get("loss"), row.get("val"), row.get("growth/epoch")) for step, row in rows]
    assert own == [(1000, 3.0, 2.5, 1), (1001, 2.0, None, 2), (1002, 1.0, None, None)]
    assert config["lr"] == 1.0
    assert config["growth"]["lr"] == 0.5


def test_epochs_of_a_joined_run_that_logs_nothing_itself_are_all_there(offline, tmp_path):
    run = offline.init(project="mine")
    send(run)
    run.finish()
    check_wandb(tmp_path)


def test_a_logger_of_lightning_around_a_run_of_wandb_is_joined(offline, tmp_path):
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    run = offline.init(project="mine")
    send(loggers.WandbLogger(experiment=run))
    run.finish()
    check_wandb(tmp_path)


def test_a_seed_is_an_artefact_of_wandb(offline, tmp_path):
    weight = send_a_seed(WandbSink(seeds=tmp_path / "seeds"))
    offline.teardown()
    manifests = [
        record.request.log_artifact.artifact
        if record.WhichOneof("record_type") == "request"
        else record.artifact
        for record in wandb_records(tmp_path)
        if record.WhichOneof("record_type") == "artifact"
        or (record.WhichOneof("record_type") == "request" and record.request.HasField("log_artifact"))
    ]
    (artifact,) = [one for one in manifests if one.type == "seed"]
    assert artifact.name == "seed-first-1"
    assert json.loads(artifact.metadata) == {
        "slot": "first",
        "blueprint": "p:conv",
        "outcome": "culled",
        "epoch": 0,
    }
    (entry,) = artifact.manifest.contents
    assert entry.path == "first-1.safetensors"
    check_seed(Path(entry.local_path), weight)


# -- MLflow ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path, monkeypatch):
    """mlflow with a store in SQLite."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/store.db")
    yield mlflow
    mlflow.set_tracking_uri(before)


def check_mlflow(mlflow, run_id: str):
    client = mlflow.MlflowClient()
    for name, expected in {"model/metric": METRIC, "slots/a/alpha": ALPHA, "slots/a/stage": STAGE}.items():
        history = client.get_metric_history(run_id, f"growth/{name}")
        assert {metric.step: metric.value for metric in history} == expected
    assert log_of(mlflow.artifacts.load_text(f"runs:/{run_id}/growth/log.md")) == LOG
    run = client.get_run(run_id)
    assert run.data.params["growth.policy.patience"] == "3"
    return run


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its own libraries
def test_mlflow_has_a_run_of_its_own_that_ends_with_the_sink(store):
    send("mlflow")
    (run,) = store.MlflowClient().search_runs(
        [store.MlflowClient().get_experiment_by_name("kasmina").experiment_id]
    )
    assert check_mlflow(store, run.info.run_id).info.status == "FINISHED"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its own libraries
def test_an_active_run_of_mlflow_is_joined(store):
    with store.start_run() as run:
        store.log_metric("loss", 3.0, step=1000)
        send("mlflow")
        store.log_metric("loss", 2.0, step=1001)
        assert check_mlflow(store, run.info.run_id).info.status == "RUNNING"
    history = store.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert [metric.step for metric in history] == [1000, 1001]
    with store.start_run() as other:
        pass
    send(other)
    check_mlflow(store, other.info.run_id)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its own libraries
def test_a_logger_of_lightning_around_a_run_of_mlflow_is_joined(store):
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    logger = loggers.MLFlowLogger("mine", tracking_uri=store.get_tracking_uri())
    send(logger)
    assert check_mlflow(store, logger.run_id).info.status == "RUNNING"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its own libraries
def test_a_seed_is_an_artefact_of_mlflow(store, tmp_path):
    with store.start_run() as run:
        weight = send_a_seed(MlflowSink(seeds=tmp_path / "seeds"))
    shown = f"runs:/{run.info.run_id}/growth/seeds/first-1.safetensors"
    check_seed(Path(store.artifacts.download_artifacts(shown, dst_path=str(tmp_path / "got"))), weight)


# -- Trackio -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def local(tmp_path, monkeypatch):
    """trackio with a folder of its own, and no dashboard."""
    trackio = pytest.importorskip("trackio")
    from trackio import utils

    for name in ("TRACKIO_DIR", "MEDIA_DIR"):
        place = tmp_path if name == "TRACKIO_DIR" else tmp_path / "media"
        for module in [
            m for m in list(sys.modules.values()) if (getattr(m, "__name__", "") or "").startswith("trackio")
        ]:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, place)
    assert tmp_path == utils.TRACKIO_DIR
    yield trackio
    trackio.context_vars.current_run.set(None)


def check_trackio(trackio, project: str):
    """Return the run's rows."""
    (name,) = trackio.sqlite_storage.SQLiteStorage.get_runs(project)
    rows = trackio.sqlite_storage.SQLiteStorage.get_logs(project, name)
    numbers = [row for row in rows if "growth/model/metric" in row]
    assert {row["step"]: row["growth/model/metric"] for row in numbers} == METRIC
    assert {row["growth/epoch"]: row["growth/slots/a/alpha"] for row in numbers} == ALPHA
    texts = [row["growth/log"]["_value"] for row in rows if "growth/log" in row]
    assert log_of(texts[-1]) == LOG
    settings = [row["growth/settings"]["_value"] for row in rows if "growth/settings" in row]
    assert ["policy.patience", "3"] in cells(settings[-1])
    return name, rows


def test_trackio_has_a_run_of_its_own_that_ends_with_the_sink(local):
    send("trackio")
    assert local.context_vars.current_run.get() is None
    name, _ = check_trackio(local, "kasmina")
    config = local.sqlite_storage.SQLiteStorage.get_run_config("kasmina", name)
    assert config["policy.patience"] == 3


def test_an_active_run_of_trackio_is_joined(local):
    run = local.init("mine", auto_log_cpu=False, auto_log_gpu=False)
    local.log({"loss": 3.0}, step=1000)
    send("trackio")
    local.log({"loss": 2.0}, step=1001)
    local.finish()
    _, rows = check_trackio(local, "mine")
    assert {row["step"]: row["loss"] for row in rows if "loss" in row} == {1000: 3.0, 1001: 2.0}
    send_again = local.init("again", auto_log_cpu=False, auto_log_gpu=False)
    send(send_again)
    local.finish()
    check_trackio(local, "again")
    assert run is not send_again


def test_a_seed_is_an_artefact_of_trackio(local, tmp_path):
    weight = send_a_seed(TrackioSink(seeds=tmp_path / "seeds"))
    run = local.init("kasmina", auto_log_cpu=False, auto_log_gpu=False)
    folder = Path(run.use_artifact("seed-first-1:latest").download(tmp_path / "got"))
    local.finish()
    check_seed(folder / "first-1.safetensors", weight)
