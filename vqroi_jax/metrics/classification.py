"""How well a classifier tells classes, from its probabilities on ROIs that it has not seen."""

import math
from typing import NamedTuple

import numpy as np
from scipy import stats


class Auc(NamedTuple):
    """Area under the ROC curve."""

    value: float
    low: float  # of the 95 % interval
    high: float


def auc(scores: np.ndarray, positive: np.ndarray) -> Auc:
    """Area under the ROC curve, with DeLong's interval.

    The probability that a positive scores higher than a negative, ties counting half. Source: DeLong et al. 1988,
    *Comparing the areas under two or more correlated ROC curves*. Where no pair is out of order the interval has no
    width.

    Args:
        scores: float [n].
        positive: bool [n], at least two of each.
    """
    ours, theirs = np.asarray(scores)[positive], np.asarray(scores)[~positive]
    above = np.sign(ours[:, None] - theirs[None]) / 2 + 0.5
    value = float(above.mean())
    variance = above.mean(axis=1).var(ddof=1) / len(ours) + above.mean(axis=0).var(ddof=1) / len(theirs)
    half = stats.norm.ppf(0.975) * math.sqrt(variance)
    return Auc(value, max(value - half, 0.0), min(value + half, 1.0))


def confusion(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Counts, int [classes, classes]: true class by row, predicted one by column."""
    counts = np.zeros((classes, classes), int)
    np.add.at(counts, (labels, predicted), 1)
    return counts


def figures(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The paper's figures: `auc`, `f1`, `accuracy`, `precision` and `recall`.

    Of two classes the second (HGG) is the positive one; of more, each is in turn, and the figures are means over them.
    What would be 0 / 0 is 0.

    Args:
        probabilities: `[n, classes]`.
        labels: int `[n]`, every class at least twice.
    """
    classes = probabilities.shape[1]
    counts = confusion(np.argmax(probabilities, axis=1), labels, classes)
    positives = [1] if classes == 2 else range(classes)
    found: dict[str, list[float]] = {'auc': [], 'f1': [], 'precision': [], 'recall': []}
    for number in positives:
        hits, told, there = counts[number, number], counts[:, number].sum(), counts[number].sum()
        found['auc'].append(auc(probabilities[:, number], labels == number).value)
        found['f1'].append(2 * hits / (told + there) if told + there else 0.0)
        found['precision'].append(hits / told if told else 0.0)
        found['recall'].append(hits / there if there else 0.0)
    means = {name: float(np.mean(values)) for name, values in found.items()}
    return {**means, 'accuracy': float(np.trace(counts) / counts.sum())}


def roc_curve(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of negatives and of positives that score at least a threshold, for falling thresholds; from (0, 0)."""
    order = np.argsort(-np.asarray(scores), kind='stable')
    ends = np.append(np.flatnonzero(np.diff(np.asarray(scores)[order])), len(order) - 1)  # ties go together
    hits, misses = np.cumsum(positive[order])[ends], np.cumsum(~positive[order])[ends]
    return np.append(0, misses / misses[-1]), np.append(0, hits / hits[-1])
