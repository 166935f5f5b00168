"""Tasks: small data sets with four disjoint splits.

Nothing is downloaded. The splits are drawn with generators of their own, so loading a task leaves torch's global
random state as it was, and one name and seed always give the same tensors (for ``chars``: with the same Python).
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple, final

import torch
from torch import Tensor
from torch.nn import functional

from kasmina_core.errors import KasminaError, UnknownNameError, did_you_mean

DATA_ENV: Final = "KASMINA_DATA"
"""Environment variable that names the folder of the torchvision data sets."""

SEQUENCE_LENGTH: Final = 64
"""Characters per sequence of ``chars``."""

CHARACTERS: Final = 64
"""Vocabulary of ``chars``: the most frequent characters and `UNKNOWN_CHARACTER`."""

UNKNOWN_CHARACTER: Final = "�"
"""Stands for every rarer character of ``chars``; its index is 0."""

SplitName = Literal["train", "gate", "val", "test"]
SPLITS: Final[tuple[SplitName, ...]] = ("train", "gate", "val", "test")


class TaskError(KasminaError):
    """The data of a task is not there; the message says what is missing and what to do."""


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
        kind: ``classification``: inputs ``(n, c, h, w)`` float32, targets ``(n,)`` int64, logits ``(n, n_classes)``.
            ``language-model``: inputs and targets ``(n, t)`` int64, logits ``(n, t, vocab_size)``.
        splits: ``train`` to learn from, ``gate`` for the gates' decisions, ``val`` to follow the run, ``test`` for
            the final figures; no sample is in two of them.
        input_shape: Shape of one input, without ``n``.
        n_classes: Classes; ``None`` for a language model.
        vocab_size: Characters; ``None`` for a classification.
        metric_name: Unit of `metric`: ``accuracy`` in [0, 1] or ``bits per character``.
        higher_is_better: Which way the metric points.
        description: What the data is, in a sentence or two.
        vocabulary: The character of each index; empty for a classification.
        is_moved: Whether `training_batches` shifts its images.
    """

    name: str
    kind: Literal["classification", "language-model"]
    splits: Mapping[SplitName, Split]
    input_shape: tuple[int, ...]
    n_classes: int | None
    vocab_size: int | None
    metric_name: str
    higher_is_better: bool
    description: str
    vocabulary: str = ""
    is_moved: bool = False

    @property
    def train(self) -> Split:
        """The samples to learn from."""
        return self.splits["train"]

    @property
    def gate(self) -> Split:
        """The samples that the gates are decided on."""
        return self.splits["gate"]

    @property
    def val(self) -> Split:
        """The samples that the run is followed on."""
        return self.splits["val"]

    @property
    def test(self) -> Split:
        """The samples of the final figures."""
        return self.splits["test"]

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropy of each sample in nats, ``(n,)``; of a sequence, the mean over its positions.

        Args:
            logits: ``(n, n_classes)`` or ``(n, t, vocab_size)``; half precision is raised to float32.
            targets: ``(n,)`` or ``(n, t)``.
        """
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
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
) -> Task:
    """Load a task.

    Args:
        name: One of `task_names`.
        seed: Divides the samples into train, gate and val; the test samples are the same for every seed.
        device: Where the tensors go.
        data_dir: Folder of the torchvision data sets; by default the variable ``KASMINA_DATA``, else ``data``.

    Raises:
        UnknownNameError: If there is no such task; the message suggests near names.
        TaskError: If a package or the data is missing.
    """
    load = _LOADERS.get(name)
    if load is None:
        raise UnknownNameError(f"There is no task '{name}'.{did_you_mean(name, _LOADERS)}")
    task = load(seed, Path(data_dir or os.environ.get(DATA_ENV) or "data"))
    splits = {key: Split(*(tensor.to(device) for tensor in split)) for key, split in task["splits"].items()}
    return Task(name=name, **(task | {"splits": MappingProxyType(splits)}))


def task_names() -> tuple[str, ...]:
    """Return the names that `load_task` knows, sorted."""
    return tuple(sorted(_LOADERS))


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
    }


def _load_digits(seed: int, data_dir: Path) -> dict[str, Any]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise TaskError(
            "The task 'digits' takes its images from scikit-learn, which is not installed.\n"
            "Install it with: pip install 'kasmina[grow]'"
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
    ) | {"is_moved": True}


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


def _load_torchvision(dataset: str, description: str, seed: int, data_dir: Path) -> dict[str, Any]:
    name = dataset.lower()
    try:
        from torchvision import datasets
    except ImportError as error:
        raise TaskError(
            f"The task '{name}' reads its images through torchvision, which is not installed.\n"
            "Install it with: pip install 'kasmina[vision]'"
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
    return _classification(
        {name: images[picked] for name, picked in dealt.items()} | {"test": _image_tensor(held_out.data)},
        {name: labels[picked] for name, picked in dealt.items()}
        | {"test": torch.as_tensor(held_out.targets)},
        description,
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
        ),
        "digits": _load_digits,
        "mnist": partial(
            _load_torchvision,
            "MNIST",
            "70,000 grey images of handwritten digits, 28 x 28 pixels (MNIST). The model names the digit.",
        ),
    }
)
