"""The State Farm solution on a few drawn images: every step runs, is written once, resumes, and is shown."""

import json

import numpy as np
import pytest
import tyro

from experiments import standin, statefarm_solution, statefarm_steps
from jaxft import ensemble, submission


@pytest.fixture(scope="module")
def solve(tmp_path_factory):
    """The experiment on 4 drivers × 20 images and 3 × 20 for the test, with further arguments."""
    root = tmp_path_factory.mktemp("solution")
    patch = pytest.MonkeyPatch()
    patch.setenv("JAXFT_CACHE", str(root / "cache"))
    folder = standin.render(root / "drawn", drivers=4, images_per_driver=20, test=(3, 20), scale=0.25)
    fixed = ["--data-dir", str(folder), "--folder", str(root / "run"), "--nets", "vgg16", "--weights", "none"]
    fixed += ["--freeze", "all-but-head", "--image-size", "32", "--folds", "2", "--epochs", "1", "--views", "1"]
    fixed += ["--batch-size", "8", "--confidence", "0", "--lr", "0.1", "--clip-norm", "1", "--no-pictures"]

    def call(*arguments):
        tyro.cli(statefarm_solution.main, args=[*fixed, *arguments])
        return root / "run"

    yield call
    patch.undo()


@pytest.mark.slow
def test_all_steps_run_once_and_are_shown(solve, capsys):
    """Bug: a second command trains a step again, or ends with another answer; a page without a step."""
    folder = solve("--composites")
    shown = capsys.readouterr().out
    results = json.loads((folder / "seed0/results.json").read_text(encoding="utf-8"))["steps"]
    names = [step["name"] for step in results]
    assert names[:4] == ["single net, single fold", "the same, random folds", "folds and nets", "views"]
    for name in ("composites", "test-time augmentation", "pseudo-labels", "refit on all drivers", "neighbours"):
        assert name in names and name in shown
    before = (folder / "seed0/submission.csv").read_bytes()
    scored = submission.score(folder / "seed0/submission.csv", folder.parent / "drawn/solution.csv")
    assert 0 < scored["loss"] < 10
    (folder / "seed0/submission.csv").unlink()
    (folder / "seed0/views/vgg16/fold1-test.csv").unlink()  # as if it had been killed there
    solve("--composites")
    again = capsys.readouterr().out
    assert (folder / "seed0/submission.csv").read_bytes() == before
    assert "views: vgg16, 2 folds" in again and "augmentation: vgg16" not in again
    page = (folder / "results.html").read_text(encoding="utf-8")
    assert all(name in page for name in names) and "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "views" in (folder / "results.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="(?s)stages of other settings.*image_size: 32 → 48"):
        solve("--composites", "--image-size", "48")


@pytest.mark.slow
def test_pseudo_labels_of_a_fold_come_from_nets_that_never_saw_it(solve):
    """Bug: a fold's own images reach it through the labels that other folds' nets gave."""
    folder = solve("--composites") / "seed0"
    said = [ensemble.read(folder / f"single nets/vgg16/fold{fold}-test.csv") for fold in range(2)]
    assert not np.allclose(said[0].values, said[1].values)


def test_the_members_are_checked():
    """Bug: a net without a weight file, or twice in the blend."""
    for nets, weights in ((("vgg16",), ("none", "none")), (("vgg16",) * 2, ("none",) * 2)):
        settings = statefarm_steps.Settings(nets=nets, weights=weights, freeze=("none",) * len(nets))
        with pytest.raises(ValueError, match="give one of each, and a net once"):
            statefarm_steps.members(settings, True)
