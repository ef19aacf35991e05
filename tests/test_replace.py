"""Replacing files: the old one stays until the new one is whole, and nothing is left beside it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sdekit._replace import replace_file


def test_a_failed_write_leaves_the_old_file_alone_and_names_it(tmp_path):
    path = tmp_path / "x.npy"
    path.write_bytes(b"old")

    def fail(part):
        part.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match=r"disk full: .*x\.npy'") as caught:
        replace_file(path, fail)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["x.npy"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "new" / "x.npy"

    def first(part):
        part.write_bytes(b"fir")
        replace_file(path, lambda other: other.write_bytes(b"second"))  # comes between, and is done before
        with part.open("ab") as file:
            file.write(b"st")

    replace_file(path, first)
    assert path.read_bytes() == b"first"
    assert [file.name for file in path.parent.iterdir()] == ["x.npy"]


def test_links_stay_links_and_devices_stay_devices(tmp_path):
    file, link, pipe = tmp_path / "file", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to("file")
    replace_file(link, lambda part: part.write_bytes(b"new"))
    assert link.is_symlink()
    assert file.read_bytes() == b"new"
    os.mkfifo(pipe)
    replace_file(pipe, lambda part: None)
    assert pipe.is_fifo()
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        replace_file(tmp_path, lambda part: Path(part).write_bytes(b"new"))
