import pytest
from etils import epath

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.sources.folder import read_attributes


@pytest.fixture
def table(tmp_path):
    def write(text, encoding="utf-8"):
        file = epath.Path(tmp_path / "attributes.csv")
        file.write_bytes(text.encode(encoding))
        return file

    return write


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_table_is_read(table, end, encoding):
    lines = ["path,smiling,größe", "a.png,1,0", '"b, c.png", 0,1', "d/e.png,0,0", ""]
    names, values = read_attributes(table(end.join(lines), encoding))
    assert names == ("smiling", "größe")
    assert values == {"a.png": (1, 0), "b, c.png": (0, 1), "d/e.png": (0, 0)}


@pytest.mark.parametrize("separator", [";", "\t"])
def test_tables_of_other_spreadsheets(table, separator):
    lines = ["path,smiling,young", "a.png,1,0"]
    names, values = read_attributes(table("\n".join(lines).replace(",", separator)))
    assert names == ("smiling", "young") and values == {"a.png": (1, 0)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no attribute; give each a column"),
        ("path\na.png", "has no attribute"),
        ("path,a, a\nx.png,0,1", "has an attribute 'a'; give each a name of its own"),
        ('path,"a\nb"\nx.png,0', "has an attribute 'a.nb'; give .* without commas and line breaks"),
        ("path,a,\nx.png,0,1", "has an attribute ''; give"),
        ('path,"a,b"\nx.png,0', "has an attribute 'a,b'; give each .* without commas"),
        ("path,a,b\nx.png,0,1\ny.png,0,2", "line 3: '0,2'; give 0 or 1 for each of the 2"),
        ("path,a,b\nx.png,0", "line 2: '0'; give 0 or 1"),
        ("path,a\nx.png,-1", "line 2: '-1'; give"),
    ],
)
def test_errors_name_the_place(table, text, message):
    with pytest.raises(VqbeamError, match=f"attributes.csv.*{message}"):
        read_attributes(table(text))


def test_another_encoding(table):
    with pytest.raises(VqbeamError, match="is not a CSV table in UTF-8"):
        read_attributes(table("path,größe\nx.png,1", "latin-1"))
