"""--memory of pyattr attribute: sizes that people write."""

import pytest
from typer.testing import CliRunner

from pyattr.cli.commands import app
from pyattr.cli.options import parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2", 2 << 30),
        ("0.5", 1 << 29),
        ("512MiB", 512 << 20),
        ("1.5 gib", 3 << 29),
        ("2GB", 2 * 10**9),
        ("4096B", 4096),
    ],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "0", "-1", "1.2.3", "3 TB", "nan", "1e3"])
def test_other_texts_are_refused(text, tmp_path):
    with pytest.raises(ValueError, match="must be a number of GiB"):
        parse_bytes(text)
    arguments = ["attribute", "--out", str(tmp_path / "run"), f"--memory={text}"]
    assert CliRunner().invoke(app, arguments).exit_code == 2
    assert not (tmp_path / "run").exists()
