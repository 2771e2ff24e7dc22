"""Figures of a classifier against counting by hand."""

import numpy as np
import pytest

from vqroi_jax.metrics import classification


def scored(n=60, seed=0):
    rng = np.random.default_rng(seed)
    positive = np.arange(n) % 3 == 0
    return np.round(rng.normal(positive * 1.0, 1), 1), positive  # rounded: some tie


def test_auc_is_the_share_of_pairs_in_order():
    scores, positive = scored()
    pairs = [(s > t) + (s == t) / 2 for s in scores[positive] for t in scores[~positive]]
    assert classification.auc(scores, positive).value == pytest.approx(np.mean(pairs))


def test_delong_interval_covers_as_often_as_it_says():
    truth = 0.7602  # P(N(1, 1) > N(0, 1))
    covered = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        positive = np.arange(80) % 2 == 0
        found = classification.auc(rng.normal(positive * 1.0, 1), positive)
        assert found.low < found.value < found.high
        covered += found.low <= truth <= found.high
    assert 0.91 < covered / 400 < 0.98


def test_perfect_and_useless_scores():
    positive = np.arange(20) < 10
    assert classification.auc(positive.astype(float), positive) == (1, 1, 1)
    assert classification.auc(np.zeros(20), positive).value == 0.5


def test_roc_goes_from_corner_to_corner_and_encloses_the_area():
    scores, positive = scored()
    wrong, right = classification.roc_curve(scores, positive)
    assert (wrong[0], right[0], wrong[-1], right[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(right, wrong) == pytest.approx(classification.auc(scores, positive).value)
    for threshold in np.unique(scores):
        point = np.mean(scores[~positive] >= threshold), np.mean(scores[positive] >= threshold)
        assert np.any(np.all(np.isclose(np.stack([wrong, right], 1), point), axis=1))


def test_figures_of_two_classes_are_those_of_the_second():
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.7, 0.3], [0.1, 0.9]])
    labels = np.array([0, 0, 1, 1, 1])  # told: 0, 1, 1, 0, 1
    assert classification.confusion(np.argmax(probabilities, 1), labels, 2).tolist() == [[1, 1], [1, 2]]
    found = classification.figures(probabilities, labels)
    expected = {'auc': 5 / 6, 'f1': 2 / 3, 'precision': 2 / 3, 'recall': 2 / 3, 'accuracy': 3 / 5}
    assert found == pytest.approx(expected)


def test_figures_of_more_classes_are_means():
    rng = np.random.default_rng(1)
    labels = np.arange(30) % 3
    probabilities = rng.dirichlet((1, 1, 1), 30)
    found, told = classification.figures(probabilities, labels), np.argmax(probabilities, 1)
    precision = np.mean([np.mean(labels[told == c] == c) for c in range(3)])
    recall = np.mean([np.mean(told[labels == c] == c) for c in range(3)])
    auc = np.mean([classification.auc(probabilities[:, c], labels == c).value for c in range(3)])
    assert (found['precision'], found['recall'], found['auc']) == pytest.approx((precision, recall, auc))
    assert found['accuracy'] == pytest.approx(np.mean(told == labels))


def test_a_class_that_is_never_told_counts_as_zero():
    found = classification.figures(np.tile([0.9, 0.1], (4, 1)), np.array([0, 0, 1, 1]))
    assert (found['precision'], found['recall'], found['f1'], found['accuracy']) == (0, 0, 0, 0.5)
