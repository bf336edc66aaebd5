"""Submissions: what is written, what is refused, and a score that agrees with scikit-learn's."""

import csv

import drawn_tables
import numpy as np
import pytest
from sklearn import metrics

from jaxft import submission


@pytest.fixture
def table():
    return drawn_tables.tables(50, 4, [1.0])[0]


def solution(path, table, one_hot=False):
    rows = list(zip(table.names, table.labels.tolist(), strict=True))[::-1]  # in another order than the submission
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        if one_hot:
            out.writerow(["img", *table.classes, "Usage"])
            out.writerows([name, *np.eye(4, dtype=int)[label], "Private"] for name, label in rows)
        else:
            out.writerow(["img", "classname", "subject"])
            out.writerows([name, table.classes[label], "p1"] for name, label in rows)


@pytest.mark.parametrize("one_hot", [False, True])
def test_the_score_agrees_with_scikit_learn(table, tmp_path, one_hot, capsys):
    """Bug: rows are matched by place and not by name; the loss is of unclipped or unscaled rows."""
    table.values[0] = [1.0, 0.0, 0.0, 0.0]
    table.labels[0] = 2  # certain, and wrong
    submission.write(tmp_path / "s.csv", table, table.names)
    solution(tmp_path / "a.csv", table, one_hot)
    found = submission.score(tmp_path / "s.csv", tmp_path / "a.csv")
    read = submission.read(tmp_path / "s.csv")
    assert found["loss"] == pytest.approx(metrics.log_loss(table.labels, read.values, labels=range(4)), rel=1e-9)
    assert found["loss"] > -np.log(1e-15) / 50
    submission.main(tmp_path / "s.csv", tmp_path / "a.csv")
    assert f"log loss {found['loss']:.5f}" in capsys.readouterr().out


def test_kaggles_format(table, tmp_path):
    """Bug: a label column, the order of the table and not of the sample, rows that do not sum to 1, zeros."""
    table.values[3] = [1.0, 0.0, 0.0, 0.0]
    names = sorted(table.names)
    submission.write(tmp_path / "s.csv", table, names, ["c0", "c1", "c2", "c3"])
    rows = list(csv.reader((tmp_path / "s.csv").read_text(encoding="utf-8").splitlines()))
    assert rows[0] == ["img", "c0", "c1", "c2", "c3"] and [row[0] for row in rows[1:]] == names
    values = np.array([row[1:] for row in rows[1:]], float)
    np.testing.assert_allclose(values.sum(1), 1, atol=1e-9)
    assert values.min() >= 0.99e-15 and values.max() < 1 + 1e-12
    assert submission.sample(tmp_path / "s.csv") == (names, ["c0", "c1", "c2", "c3"])


def test_files_that_are_asked_for_twice_or_not_there(table, tmp_path):
    """Bug: a submission that Kaggle refuses, or that leaves images out, is written."""
    for names, match in (
        ([*table.names, "img0.jpg"], "img0.jpg is listed twice"),
        ([*table.names, "new.jpg"], "new.jpg; predict them"),
        (table.names[1:], "1 images are not asked for: img0.jpg"),
    ):
        with pytest.raises(ValueError, match=match):
            submission.write(tmp_path / "s.csv", table, names)
    with pytest.raises(ValueError, match="3 columns for 4 classes"):
        submission.write(tmp_path / "s.csv", table, table.names, ["a", "b", "c"])
    assert not (tmp_path / "s.csv").exists()


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda text: text.replace("img,", "file,", 1), "expected img"),
        (lambda text: text + text.splitlines()[1] + "\n", "img0.jpg is listed twice"),
        (lambda text: text.replace("img1.jpg,0.", "img1.jpg,x0.", 1), "img1.jpg has could not convert"),
        (lambda text: text.replace("img1.jpg,0.", "img1.jpg,nan0.", 1).replace("nan0.", "nan,0.", 1), "img1.jpg"),
        (lambda text: text.replace("img2.jpg,0", "img2.jpg,7", 1), "img2.jpg has probabilities that do not sum"),
        (lambda text: "", "holds no rows"),
        (lambda text: text.replace("img,c0", "img,label,c0", 1), "5 columns, the header 6"),
    ],
)
def test_a_file_that_is_no_submission(table, tmp_path, change, match):
    """Bug: it is scored."""
    submission.write(tmp_path / "s.csv", table, table.names)
    (tmp_path / "s.csv").write_text(change((tmp_path / "s.csv").read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(ValueError, match=match):
        submission.read(tmp_path / "s.csv")


def test_a_solution_of_other_files_or_classes(table, tmp_path):
    """Bug: images that the solution lacks are left out of the score."""
    submission.write(tmp_path / "s.csv", table, table.names)
    solution(tmp_path / "a.csv", table.at(np.arange(1, 50)))
    with pytest.raises(ValueError, match="not asked for: img0.jpg"):
        submission.score(tmp_path / "s.csv", tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("img,classname\nimg0.jpg,dog\n", encoding="utf-8")
    with pytest.raises(ValueError, match="img0.jpg has the class dog; expected one of c0"):
        submission.score(tmp_path / "s.csv", tmp_path / "b.csv")
