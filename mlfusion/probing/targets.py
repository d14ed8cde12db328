"""Targets of a probe: one class, several labels, or a number. Loss, choice and scores follow from the target alone."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mlfusion.errors import BadData
from mlfusion.probing.losses import Loss, class_weights, cross_entropy
from mlfusion.shapes import Float, Int, Num, Shaped
from mlfusion.statistics import measures
from mlfusion.system.words import plural

STRATUM_SIZE = 5  # images with similar numbers, of which one is held out
_AT_LEAST = {1: "1 or more", 2: "2 or more, one to fit and one to choose on"}


@dataclass(frozen=True)
class Target(ABC):
    """A kind of labels. `outputs` is C, the number of outputs of a probe for one image."""

    outputs: int
    names: tuple[str, ...] = field(default=(), compare=False, kw_only=True)  # of the classes or labels, for messages

    kind: ClassVar[str]
    metric: ClassVar[str]  # configurations are chosen by it; larger is better

    def name_of(self, number: int) -> str:
        """A class or label as messages name it: its name, or its number if there are no names."""
        return repr(self.names[number]) if self.names else str(number)

    def _require_folds(self, kind: str, counts: Int[np.ndarray, " C"], folds: int) -> None:
        if counts.min() < folds:
            scarce = int(counts.argmin())
            raise BadData(
                f"{kind} {self.name_of(scarce)} has {plural(int(counts[scarce]), 'image')}, so that not every one of "
                f"--folds {folds} can test it; allowed: 2 to the number of images of the rarest {kind}. Ask for fewer folds, "
                f"add images, or leave the {kind} out"
            )

    @abstractmethod
    def check(self, labels: Num[np.ndarray, "N ..."], name: str) -> None:
        """Check that labels are of this kind.

        Raises:
            BadData: says which row of split `name`.
        """

    @abstractmethod
    def check_choice(self, labels: Num[np.ndarray, "N ..."], *, least: int = 2) -> None:
        """Check that there are labels to train on: two images of each, one to fit and one to choose on.

        `least` is 1 where other images choose.

        Raises:
            BadData: says which label is too rare.
        """

    @abstractmethod
    def strata(self, labels: Num[np.ndarray, "N ..."]) -> Int[np.ndarray, " N"]:
        """The stratum of every image; the same share of each stratum is held out."""

    @abstractmethod
    def check_folds(self, labels: Num[np.ndarray, "N ..."], folds: int) -> None:
        """Check that every fold can test every class or label.

        Raises:
            BadData: says which one has fewer images than there are folds.
        """

    def fitted_to(self, labels: Num[np.ndarray, "N ..."]) -> "Target":
        """This target as it follows from the training images of a fold; its predictions compare with those of other folds."""
        return self

    def weights(self, labels: Num[np.ndarray, "N ..."]) -> Float[np.ndarray, " N"]:
        """The weight of every image in training; their mean is one."""
        return np.ones(len(labels))

    @abstractmethod
    def regressand(self, labels: Num[np.ndarray, "N ..."]) -> Float[np.ndarray, "N C"]:
        """Labels as targets of a regression, float64."""

    @abstractmethod
    def loss(self, labels: Num[np.ndarray, "N ..."], device: str, dtype: torch.dtype) -> Loss:
        """The loss for training on images with these labels."""

    @abstractmethod
    def predictions(self, outputs: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """Outputs → predictions, which are saved and scored, on the processor: probabilities in float32, or the number.

        They are computed in float64: the same outputs give the same predictions, wherever in a block they stand.
        """

    def scored(self, labels: Num[np.ndarray, "N ..."]) -> Num[np.ndarray, "N ..."]:
        """Labels as predictions are compared with them."""
        return labels

    def score(self, labels: Num[np.ndarray, "N ..."], predictions: Float[np.ndarray, "N C"]) -> float:
        """The metric of predictions."""
        return measures.full_score(measures.measure(self.scored(labels), predictions, self.metric), len(labels))

    def scores(self, labels: Num[np.ndarray, "N ..."], predictions: Float[np.ndarray, "N C"]) -> dict[str, Any]:
        """All metrics of a result, including that of `score`."""
        return measures.scores(self.scored(labels), predictions)


@dataclass(frozen=True)
class OneClass(Target):
    """One class per image: labels [N] int64 in 0..C-1, cross-entropy with class weights, balanced accuracy."""

    smoothing: float = 0.0  # label smoothing, in [0, 1)

    kind: ClassVar[str] = "class"
    metric: ClassVar[str] = "balanced_accuracy"

    def check(self, labels: Num[np.ndarray, "N ..."], name: str) -> None:
        wrong = np.flatnonzero((labels < 0) | (labels >= self.outputs))
        if len(wrong):
            raise BadData(
                f"{name} row {wrong[0]} has label {labels[wrong[0]]}; allowed: 0 to {self.outputs - 1}. "
                "Extract the split again, or pass the number of classes that the labels have"
            )

    def check_choice(self, labels: Num[np.ndarray, "N ..."], *, least: int = 2) -> None:
        if self.outputs < 2:
            raise BadData(
                f"{self.outputs} class in train; allowed: 2 or more, so choose a data set with at least two classes"
            )
        if len(labels) < self.outputs:
            raise BadData(
                f"train has {len(labels)} images of {self.outputs} classes; allowed: two images of every class or more. "
                "Extract more images, or leave classes out"
            )
        counts = np.bincount(labels, minlength=self.outputs)
        if counts.min() < least:
            scarce = int(counts.argmin())
            raise BadData(
                f"class {self.name_of(scarce)} has {counts[scarce]} training image{'' if counts[scarce] == 1 else 's'}; "
                f"allowed: {_AT_LEAST[least]}. Add images of that class or leave it out"
            )

    def check_folds(self, labels: Num[np.ndarray, "N ..."], folds: int) -> None:
        self._require_folds("class", np.bincount(labels, minlength=self.outputs), folds)

    def strata(self, labels: Num[np.ndarray, "N ..."]) -> Int[np.ndarray, " N"]:
        return labels

    def weights(self, labels: Num[np.ndarray, "N ..."]) -> Float[np.ndarray, " N"]:
        return class_weights(labels, self.outputs)[labels]

    def regressand(self, labels: Num[np.ndarray, "N ..."]) -> Float[np.ndarray, "N {self.outputs}"]:
        return np.eye(self.outputs)[labels]

    def loss(self, labels: Num[np.ndarray, "N ..."], device: str, dtype: torch.dtype) -> Loss:
        weights = torch.from_numpy(class_weights(labels, self.outputs)).to(device, dtype)
        return partial(cross_entropy, weights=weights, smoothing=self.smoothing)

    def predictions(self, outputs: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """Probabilities whose largest stays the largest where float32 cannot tell it from others, as near λ = 10⁶."""
        exact = torch.softmax(outputs.cpu().double(), dim=-1)
        rounded, top = exact.float(), exact.argmax(-1, keepdim=True)
        tied = (rounded == rounded.gather(-1, top)) & (exact < exact.gather(-1, top))
        return torch.where(tied, torch.nextafter(rounded, torch.zeros(())), rounded)


@dataclass(frozen=True)
class SeveralLabels(Target):
    """Any number of labels per image: labels [N, C] of 0 and 1, a binary cross-entropy each, mean average precision."""

    kind: ClassVar[str] = "labels"
    metric: ClassVar[str] = "mean_average_precision"

    def check(self, labels: Num[np.ndarray, "N ..."], name: str) -> None:
        if labels.shape[1:] != (self.outputs,):
            raise BadData(
                f"{name} has labels of shape {labels.shape}; allowed: [N, {self.outputs}], a 0 or 1 for every class. "
                "Extract both splits from the same data set"
            )
        wrong = np.argwhere((labels != 0) & (labels != 1))
        if len(wrong):
            row, column = wrong[0]
            raise BadData(
                f"{name} row {row} has {labels[row, column]} for label {column}; allowed: 0 or 1. "
                "Say of every label whether the image has it, and extract the split again"
            )
        if not labels.any():
            raise BadData(
                f"no image of {name} has a label, so that no average precision exists; allowed: a split with one label or "
                "more. Give its images their labels, or take another split"
            )

    def check_choice(self, labels: Num[np.ndarray, "N ..."], *, least: int = 2) -> None:
        counts = labels.sum(0)
        if counts.min() < least:
            scarce = int(counts.argmin())
            raise BadData(
                f"label {self.name_of(scarce)} is on {int(counts[scarce])} training image{'' if counts[scarce] == 1 else 's'}; "
                f"allowed: {_AT_LEAST[least]}. Add images with that label or leave it out"
            )

    def check_folds(self, labels: Num[np.ndarray, "N ..."], folds: int) -> None:
        self._require_folds("label", labels.sum(0), folds)

    def strata(self, labels: Num[np.ndarray, "N ..."]) -> Int[np.ndarray, " N"]:
        """The rarest label on the image, so that both parts have rare labels; C for images without labels."""
        rarity = np.argsort(np.argsort(labels.sum(0), kind="stable"))
        rarest = np.where(labels > 0, rarity, self.outputs).min(1)
        return rarest.astype(np.int64)

    def regressand(self, labels: Num[np.ndarray, "N ..."]) -> Float[np.ndarray, "N {self.outputs}"]:
        return labels.astype(np.float64)

    def loss(self, labels: Num[np.ndarray, "N ..."], device: str, dtype: torch.dtype) -> Loss:
        def mean(outputs: Float[Tensor, "K B C"], truth: Shaped[Tensor, "B ..."]) -> Float[Tensor, " K"]:
            labels = truth.to(outputs.dtype).expand_as(outputs)
            return F.binary_cross_entropy_with_logits(outputs, labels, reduction="none").mean((1, 2))

        return mean

    def predictions(self, outputs: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        return torch.sigmoid(outputs.cpu().double()).float()


@dataclass(frozen=True)
class Number(Target):
    """A real number per image: labels [N], squared error on the standardised number, R².

    The outputs of a probe are (number − `origin` − `mean`) / `deviation`, so that learning rates and penalties mean the same in
    every unit. Predictions are saved and scored as number − `origin`, in float64: far from zero, such as in seconds since 1970,
    the number itself has too few digits left for its deviations. The difference from `origin` is exact, and so no score
    depends on where the unit has its zero.
    """

    mean: float = 0.0  # of number − origin, over the training labels
    deviation: float = 1.0
    origin: float = 0.0  # the median of the training labels, or a label beside it

    kind: ClassVar[str] = "number"
    metric: ClassVar[str] = "r2"

    def check(self, labels: Num[np.ndarray, "N ..."], name: str) -> None:
        wrong = np.flatnonzero(~np.isfinite(labels))
        if len(wrong):
            raise BadData(
                f"{name} row {wrong[0]} has label {labels[wrong[0]]}; allowed: finite numbers. "
                "Leave that image out, or give it a number"
            )
        if len(np.unique(labels)) < 2:
            raise BadData(
                f"all {len(labels)} labels of {name} are {labels[0]}, so that no R² exists; allowed: two different numbers or "
                "more. Choose labels that differ from image to image"
            )

    def check_choice(self, labels: Num[np.ndarray, "N ..."], *, least: int = 2) -> None:
        if least > 1 and len(labels) < 2 * STRATUM_SIZE:
            raise BadData(
                f"train has {len(labels)} images; allowed: {2 * STRATUM_SIZE} or more to choose by R². Add images"
            )

    def strata(self, labels: Num[np.ndarray, "N ..."]) -> Int[np.ndarray, " N"]:
        """Five images that follow each other in the order of their numbers are a stratum."""
        ranks = np.argsort(np.argsort(labels, kind="stable"))
        return np.minimum(ranks // STRATUM_SIZE, len(labels) // STRATUM_SIZE - 1)  # the last stratum takes the rest

    def check_folds(self, labels: Num[np.ndarray, "N ..."], folds: int) -> None:
        if len(labels) < 2 * folds:
            raise BadData(
                f"{len(labels)} images are too few for --folds {folds}; allowed: 2 to {len(labels) // 2}, since R² of a fold "
                "needs two images"
            )

    def fitted_to(self, labels: Num[np.ndarray, "N ..."]) -> "Number":
        differences = labels.astype(np.float64) - self.origin
        return replace(self, mean=float(differences.mean()), deviation=float(differences.std()) or 1.0)

    def scored(self, labels: Num[np.ndarray, "N ..."]) -> Float[np.ndarray, " N"]:
        return labels.astype(np.float64) - self.origin

    def regressand(self, labels: Num[np.ndarray, "N ..."]) -> Float[np.ndarray, "N {self.outputs}"]:
        return ((self.scored(labels) - self.mean) / self.deviation)[:, None]

    def loss(self, labels: Num[np.ndarray, "N ..."], device: str, dtype: torch.dtype) -> Loss:
        def mean(outputs: Float[Tensor, "K B C"], truth: Shaped[Tensor, "B ..."]) -> Float[Tensor, " K"]:
            standardised = (truth.to(torch.float64) - self.origin - self.mean) / self.deviation
            return (outputs[..., 0] - standardised.to(outputs.dtype)).square().mean(1)

        return mean

    def predictions(self, outputs: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        return outputs.cpu().double() * self.deviation + self.mean


def target_of(labels: np.ndarray, classes: int, *, smoothing: float = 0.0, names: tuple[str, ...] = ()) -> Target:
    """The target of training labels: [N] integers, [N, C] of 0 and 1, or [N] floating-point numbers.

    `classes` is the C of the data set, which numbers do not use, and `names` are their names for messages; `smoothing` of
    labels is for one class per image.

    Raises:
        BadData: the labels have another shape, or smoothing is given for labels without one class.
    """
    kind = kind_of(labels)
    if kind is OneClass:
        return OneClass(classes, smoothing, names=names)
    if smoothing:
        raise BadData("labels are smoothed only where an image has one class; leave --smoothing out")
    if kind is SeveralLabels:
        return SeveralLabels(classes, names=names)
    finite = np.sort(labels[np.isfinite(labels)].astype(np.float64))
    if not len(finite):
        return Number(1)
    origin = float(finite[len(finite) // 2])
    differences = finite - origin
    return Number(1, float(differences.mean()), float(differences.std()) or 1.0, origin)


def kind_of(labels: np.ndarray) -> type[Target]:
    """The class of target for labels of this shape and type.

    Raises:
        BadData: there is none.
    """
    if labels.ndim == 2:
        return SeveralLabels
    if labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer):
        return OneClass
    if labels.ndim == 1 and np.issubdtype(labels.dtype, np.floating):
        return Number
    raise BadData(
        f"labels of shape {labels.shape} and type {labels.dtype}; allowed: [N] integers (a class), [N, C] of 0 and 1 "
        "(several labels) or [N] floating-point numbers"
    )


TARGETS: dict[str, type[Target]] = {target.kind: target for target in (OneClass, SeveralLabels, Number)}
