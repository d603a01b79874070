"""init.py: what it writes are the package's recipes, and nothing that exists is touched."""

import pytest

from hf_deit import UserError
from hf_deit.commands import init
from hf_deit.options.recipe import RECIPES


def test_the_recipes_and_a_machine_file_are_written(tmp_path, capsys):
    init.main([str(tmp_path / "new" / "x")])
    written = {path.name: path.read_text("utf-8") for path in (tmp_path / "new" / "x").iterdir()}
    assert written.keys() == {"my_photos.yaml", "my_photos_teacher.yaml", "machine.yaml"}
    assert all(written[name] == (RECIPES / name).read_text("utf-8") for name in written if name != "machine.yaml")
    assert "num_processes: 1" in written["machine.yaml"]
    assert f"hf-deit distill {tmp_path / 'new' / 'x' / 'my_photos.yaml'}" in capsys.readouterr().out


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "machine.yaml").write_text("mine")
    with pytest.raises(UserError, match="already has machine.yaml: name another folder"):
        init.main([str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["machine.yaml"]
    assert (tmp_path / "machine.yaml").read_text() == "mine"


def test_a_file_in_place_of_the_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to"):
        init.main([str(tmp_path / "file" / "x")])
