"""A folder that cannot be written to is refused by its flag, and none is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_so2.errors import ConfigurationError
from hf_so2.folders import new_folders, remove_empty, require_folder


@pytest.mark.parametrize("name", ["", "new", "new/deeper"])
def test_a_folder_that_is_there_or_can_be_made_passes_and_is_not_made(name: str, tmp_path: Path) -> None:
    require_folder("output_dir", tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["file", "file/deeper"])
def test_a_file_in_the_way_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"^output_dir='.*': must be a folder, and .*file is none"):
        require_folder("output_dir", str(tmp_path / name))


def test_a_link_to_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigurationError, match="must be a folder"):
        require_folder("cache_dir", tmp_path / "link")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody can write to")
def test_what_nobody_can_write_to_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"^output_dir='/proc/out/run': cannot be written to: "):
        require_folder("output_dir", "/proc/out/run")


def test_only_what_was_made_and_stayed_empty_is_removed(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    new = new_folders(tmp_path / "old" / "a" / "b")
    assert new == [tmp_path / "old" / "a" / "b", tmp_path / "old" / "a"]
    new[0].mkdir(parents=True)
    (tmp_path / "old" / "a" / "other").touch()
    remove_empty(new)
    assert not new[0].exists()
    assert (tmp_path / "old" / "a" / "other").exists()
    (tmp_path / "old" / "a" / "other").unlink()
    remove_empty(new[1:])
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
