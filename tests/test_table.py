"""Tables of images, as spreadsheets and programs write them."""

import numpy as np
import pytest
from test_folder import make

from jaxft.data import source


@pytest.fixture
def table(tmp_path):
    make(tmp_path, "img/a.png", "img/b.png", "img/c d.png", "img/é.png")

    def write(text, name="t.csv", encoding="utf-8"):
        (tmp_path / name).write_bytes(text.encode(encoding))
        return tmp_path / name

    return write


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_spreadsheet(table, encoding, mark, end):
    """Bug: a byte-order mark, a semicolon or an end of line becomes part of a name."""
    rows = [("File ", "LABEL"), ("img/a.png", "cat"), ('"img/c d.png"', '"dog"'), ("", ""), ("img/é.png", "cat")]
    found = source.read(table(end.join(mark.join(row) for row in rows) + end, encoding=encoding))
    assert found.dataset.classes == ("cat", "dog") and found.dataset.labels.tolist() == [0, 1, 0]
    assert found.dataset.names == ("img/a.png", "img/c d.png", "img/é.png")
    assert found.dataset.images[2].startswith(b"\x89PNG")


def test_all_columns(table):
    """Bug: group, split or weight is passed over, or belongs to another row."""
    text = "weight,split,file,group,label\n2,train,img/a.png,g1,x\n,valid,img/b.png,g1,\n0.5,,img/c d.png,,y\n"
    found = source.read(table(text))
    assert found.split == ("train", "val", "") and found.weights.tolist() == [2, 1, 0.5]
    assert found.dataset.groups == ("g1", "g1", "img/c d.png") and found.dataset.labels.tolist() == [0, -1, 1]


def test_several_labels(table):
    """Bug: an image without any label is unknown, or an unknown one has none."""
    found = source.read(table("file,labels\nimg/a.png,cat|tabby\nimg/b.png,\nimg/c d.png,?\nimg/é.png, cat ;dog\n"))
    assert found.dataset.target == "labels" and found.dataset.classes == ("cat", "dog", "tabby")
    assert found.dataset.labels.tolist() == [[1, 0, 1], [0, 0, 0], [-1, -1, -1], [1, 1, 0]]


def test_values(table):
    """Bug: a blank value is 0, or columns are exchanged for a model that has them in another order."""
    path = table("file,value_age,value_mass\nimg/a.png,1.5,-2\nimg/b.png,,1e3\n")
    found = source.read(path).dataset
    assert found.target == "values" and found.classes == ("age", "mass")
    np.testing.assert_array_equal(found.labels, np.float32([[1.5, -2], [np.nan, 1000]]))
    assert source.read(path, classes=("mass", "age")).dataset.labels[0].tolist() == [-2, 1.5]
    with pytest.raises(ValueError, match="holds the values age, mass, the model predicts height"):
        source.read(path, classes=("height",))


def test_parquet(table, tmp_path):
    """Bug: lists, numbers or nulls of Parquet are read as texts such as None."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    table("")
    columns = {"file": ["img/a.png", "img/b.png"], "labels": [["x", "y"], []], "weight": [1.0, None]}
    parquet.write_table(arrow.table(columns), tmp_path / "t.parquet")
    found = source.read(tmp_path / "t.parquet")
    assert found.dataset.labels.tolist() == [[1, 1], [0, 0]] and found.weights.tolist() == [1, 1]
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="not a whole Parquet file"):
        source.read(tmp_path / "t.parquet")


def test_windows_paths_and_whole_paths(table, tmp_path):
    """Bug: backslashes, or a path from the root, name no file."""
    found = source.read(table(f"file,label\nimg\\a.png,x\n{tmp_path}/img/b.png,y\n"))
    assert found.dataset.images[0].startswith(b"\x89PNG") and found.dataset.images[1].startswith(b"\x89PNG")


def test_a_name_with_a_question_mark(table):
    """Bug: the mark for what is not known is cut out of a class's name."""
    assert source.read(table("file,label\nimg/a.png,cat?\nimg/b.png,?\n")).dataset.classes == ("cat?",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\nimg/a.png,x\n", "has the columns path, label: expected a column file"),
        ("file,class\nimg/a.png,x\n", "has the columns file, class: expected a column file and one of label"),
        ("file,label,value\nimg/a.png,x,1\n", "one of label"),
        ("file,label\n", "has no rows below its header"),
        ("", "is empty: expected a column file"),
        ("file,label\nimg/x.png,a\nimg/a.png,b\n", r"names 1 of 2 files that are not there: img/x\.png; paths are"),
        ("file,label\nimg/a.png,a\nimg/a.png,b\n", r"names 'img/a\.png' 2 times"),
        ("file,label\n,a\n", "row 2: the file is not named"),
        ("file,value\nimg/a.png,many\n", "row 2: the value is 'many', expected a number"),
        ("file;value\nimg/a.png;1,5\n", "'1,5', expected a number; write a decimal point"),
        ("file,label,split\nimg/a.png,a,tset\n", "row 2: the split is 'tset'"),
        ("file,label,weight\nimg/a.png,a,-1\n", "row 2: the weight is -1; expected at least 0"),
        ("file,label\nimg/a.png,a,b\n", "row 2: 3 cells for 2 columns"),
        ("file,label,label\nimg/a.png,a,b\n", "two columns 'label'"),
        ('file,label\nimg/a.png,"a\n', "not a csv file"),
        ("file,labels\nimg/a.png,\n", "no row has a label"),
    ],
)
def test_what_is_no_such_table(table, text, message):
    """Bug: a traceback of the csv module, or an error that names no row."""
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        source.read(table(text))


def test_text_that_is_not_utf8(table):
    """Bug: a UnicodeDecodeError without the name of the file."""
    with pytest.raises(ValueError, match=r"t\.csv is not text in UTF-8"):
        source.read(table("file,label\nimg/a.png,ö\n", encoding="latin-1"))
