"""Probabilities of several nets: what is refused, and what each mean and correction gives, against other ways."""

import dataclasses

import drawn_tables
import numpy as np
import pytest
from sklearn import metrics

from jaxft import ensemble
from jaxft.ensemble import Probabilities


@pytest.fixture
def tables():
    return drawn_tables.tables(300, 4, [0.5, 1.0, 2.0])


def test_log_loss_and_spread_agree_with_scikit_learn(tables):
    """Bug: an unknown label is scored; the spread is over images and not over drivers."""
    table = dataclasses.replace(tables[0], labels=np.where(np.arange(300) < 30, -1, tables[0].labels))
    known = table.known
    found = table.figures()
    assert known.sum() == 270
    assert found["loss"] == pytest.approx(metrics.log_loss(table.labels[known], table.values[known], labels=range(4)))
    assert found["accuracy"] == metrics.accuracy_score(table.labels[known], table.values[known].argmax(1))
    by_group = {}
    for group, loss in zip(table.groups, table.losses(), strict=True):
        by_group.setdefault(group, []).append(loss)
    means = [np.nanmean(losses) for losses in by_group.values() if not np.isnan(losses).all()]
    assert found["loss_spread"] == pytest.approx(np.std(means, ddof=1))


def test_what_cannot_be_a_table_is_refused_by_name(tables):
    """Bug: NaN, a file listed twice, or logits go through a blend and come out as a submission."""
    table = tables[0]
    values = table.values.copy()
    values[7, 2] = np.nan
    with pytest.raises(ValueError, match="img7.jpg has NaN"):
        dataclasses.replace(table, values=values)
    with pytest.raises(ValueError, match="img3.jpg is listed twice"):
        dataclasses.replace(table, names=("img3.jpg", *table.names[1:]))
    with pytest.raises(ValueError, match="img0.jpg has probabilities that do not sum to 1"):
        dataclasses.replace(table, values=table.values * 1.1)
    with pytest.raises(ValueError, match="give a row and a column for each"):
        dataclasses.replace(table, classes=table.classes[:3])


def test_tables_that_do_not_fit_each_other_are_refused(tables):
    """Bug: columns of other classes, or rows of other images, are averaged."""
    first = tables[0]
    swapped = dataclasses.replace(first, classes=first.classes[::-1])
    fewer = first.at(np.arange(10, 300))
    moved = first.at(np.arange(300)[::-1])
    for other, match in ((swapped, "another order"), (fewer, "img0.jpg, img1.jpg"), (moved, "in another order")):
        for use in (ensemble.mean, ensemble.fit_blend, ensemble.fit_per_class):
            with pytest.raises(ValueError, match=match):
                use([first, other])
    with pytest.raises(ValueError, match="10 images have no probabilities: img0.jpg, img1.jpg, img2.jpg and 7 more"):
        fewer.ordered(first.names)
    with pytest.raises(ValueError, match="img0.jpg is listed twice"):
        ensemble.join([first, first])
    with pytest.raises(ValueError, match="at least one net"):
        ensemble.mean([])
    with pytest.raises(ValueError, match="one for each, at least 0"):
        ensemble.mean(tables, [1, -1, 1])


def test_means(tables):
    """Bug: weights are ignored; the geometric mean is not scaled to a sum of 1."""
    a, b = tables[0].values, tables[1].values
    np.testing.assert_allclose(ensemble.mean(tables[:2], [3, 1], "arithmetic").values, 0.75 * a + 0.25 * b)
    product = a**0.75 * b**0.25
    expected = product / product.sum(1, keepdims=True)
    np.testing.assert_allclose(ensemble.mean(tables[:2], [3, 1]).values, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["arithmetic", "geometric"])
def test_blend_is_the_best_of_a_fine_grid(tables, kind):
    """Bug: the weights leave the simplex, or are those of another loss."""
    fitted = ensemble.fit_blend(tables, kind)
    assert sum(fitted.weights) == pytest.approx(1) and min(fitted.weights) >= 0
    grid = [(i / 20, j / 20, 1 - (i + j) / 20) for i in range(21) for j in range(21 - i)]
    best = min(ensemble.mean(tables, share, kind).figures()["loss"] for share in grid)
    assert fitted(tables).figures()["loss"] <= best + 1e-6
    assert fitted.weights[0] > 0.5  # the least noisy


def test_corrections_find_what_was_done(tables):
    """Bug: a bias, a temperature or a clip is fitted in the wrong direction."""
    table = tables[0]
    table = ensemble.fit_bias(table, 0.0)(ensemble.fit_temperature(table)(table))
    hot = dataclasses.replace(table, values=ensemble._softmax(3.0 * np.log(table.values)))
    assert ensemble.fit_temperature(hot).temperature == pytest.approx(
        3 * ensemble.fit_temperature(table).temperature, rel=0.01
    )
    moved = ensemble.Bias((1.0, 0.0, -1.0, 0.0))(table)
    assert ensemble.fit_bias(moved, 0.0)(moved).figures()["loss"] <= table.figures()["loss"] + 1e-6
    sure = dataclasses.replace(table, values=np.eye(4)[table.values.argmax(1)])
    clip = ensemble.fit_clip(sure)
    assert 1e-3 < clip.least <= 0.1 and clip(sure).figures()["loss"] < sure.figures()["loss"] / 2


def test_per_class_takes_the_nets_that_are_good_at_it(tables):
    """Bug: the choice is by all classes at once."""
    good = tables[0]
    values = good.values.copy()
    values[:, 2] = 0.25  # says nothing of class 2
    bad = dataclasses.replace(good, values=values / values.sum(1, keepdims=True))
    fitted = ensemble.fit_per_class([bad, good])
    assert fitted.chosen[2] == (1,)
    assert fitted([bad, good]).figures()["loss"] < bad.figures()["loss"]


def test_cross_fitting_does_not_flatter():
    """Bug: a step is judged on the images that it was fitted on, so that fitting noise looks like progress."""
    noise = drawn_tables.noise(200, 10)
    folds = np.arange(200) % 4
    fitted = ensemble.fit_bias(noise, 0.0)(noise).figures()["loss"]
    honest = ensemble.cross_fitted(lambda table: ensemble.fit_bias(table, 0.0), noise, folds)
    assert fitted < noise.figures()["loss"] < honest.figures()["loss"]
    assert honest.names == noise.names
    with pytest.raises(ValueError, match="one for each, and two different"):
        ensemble.cross_fitted(ensemble.fit_bias, noise, np.zeros(200))


def test_a_written_table_is_the_same(tables, tmp_path):
    """Bug: digits are lost, so that a resumed solution differs; a damaged file is taken."""
    table = dataclasses.replace(tables[0], labels=np.where(np.arange(300) % 2, tables[0].labels, -1))
    ensemble.write(tmp_path / "t.csv", table)
    again = ensemble.read(tmp_path / "t.csv")
    np.testing.assert_allclose(again.values, table.values, rtol=1e-8)
    assert (again.names, again.groups, again.classes) == (table.names, table.groups, table.classes)
    np.testing.assert_array_equal(again.labels, table.labels)
    ensemble.write(tmp_path / "u.csv", again)
    assert (tmp_path / "u.csv").read_bytes() == (tmp_path / "t.csv").read_bytes()
    text = (tmp_path / "t.csv").read_text(encoding="utf-8")
    for bad, match in (
        (text.replace(",p0,", ",p0,x", 1), "line 2"),
        (text[:-40], "line 301"),
        ("a,b\n", "begins with"),
    ):
        (tmp_path / "bad.csv").write_text(bad, encoding="utf-8")
        with pytest.raises(ValueError, match=match):
            ensemble.read(tmp_path / "bad.csv")


def test_pseudo_labels_are_confident_and_no_more_than_their_share(tables):
    """Bug: the share counts images that are not confident; the soft label becomes a hard one."""
    rows, soft = ensemble.pseudo_labels(tables[0], confidence=0.8, share=0.2, train=100)
    assert len(rows) == 25 and (tables[0].values[rows].max(1) >= 0.8).all() and (np.diff(rows) > 0).all()
    np.testing.assert_allclose(soft, tables[0].values[rows], rtol=1e-6)
    rows, _ = ensemble.pseudo_labels(tables[0], confidence=0.8, share=0.9, train=1000)
    assert len(rows) == (tables[0].values.max(1) >= 0.8).sum()
    with pytest.raises(ValueError, match="share 1"):
        ensemble.pseudo_labels(tables[0], confidence=0.8, share=1, train=100)


def test_nothing_is_fitted_without_labels(tables):
    """Bug: a fit on unknown labels takes -1 for the last class."""
    unknown = dataclasses.replace(tables[0], labels=np.full(300, -1))
    for fit in (ensemble.fit_bias, ensemble.fit_temperature, ensemble.fit_clip):
        with pytest.raises(ValueError, match="no label of these images is known"):
            fit(unknown)
    assert isinstance(unknown, Probabilities) and np.isnan(unknown.figures()["loss"])
