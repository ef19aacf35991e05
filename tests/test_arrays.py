"""Files of arrays: what is written is read again, and a failed write leaves the old file."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdekit.commands.arrays import floating, read_array, write_arrays


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.uint8, torch.int64])
def test_what_is_written_is_read_again(tmp_path, suffix, dtype):
    x = torch.arange(12).reshape(3, 4).to(dtype)
    path = tmp_path / f"x{suffix}"
    write_arrays(path, {"x": x})
    again = read_array(path)
    assert again.dtype == dtype
    assert torch.equal(again, x)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("dtype", [">f8", ">i4", "<u2", "<u4"])
def test_other_byte_orders_and_unsigned_numbers_are_read(tmp_path, dtype):
    np.save(tmp_path / "x.npy", np.arange(5, dtype=dtype))
    assert read_array(tmp_path / "x.npy").tolist() == [0, 1, 2, 3, 4]


def test_a_file_that_could_run_code_is_not_read(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="executed"):
        read_array(tmp_path / "x.npy")
    np.savez(tmp_path / "x.npz", a=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="executed"):
        read_array(tmp_path / "x.npz")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_a_broken_file_is_named(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"not an array")
    with pytest.raises(ValueError, match=path.name):
        read_array(path)


def test_a_header_that_claims_more_than_there_is_memory_is_named(tmp_path):
    with (tmp_path / "x.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (10**12, 10**5)})
    with pytest.raises(ValueError, match=r"x\.npy.*(larger than the memory|broken)"):
        read_array(tmp_path / "x.npy")


def test_a_damaged_archive_is_named_with_its_reader_s_reason(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, x=np.random.default_rng(0).normal(size=500))
    held = bytearray(path.read_bytes())
    held[60:90] = bytes(30)
    path.write_bytes(held)
    with pytest.raises(ValueError, match=r"x\.npz.*: .*error: .+\)"):
        read_array(path)


def test_a_directory_is_no_file(tmp_path):
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(ValueError, match="is a directory"):
        read_array(tmp_path / "x.safetensors")


def test_complex_numbers_are_called_so():
    with pytest.raises(ValueError, match=r"complex numbers \(torch.complex64\)"):
        floating(torch.zeros(3, 2, dtype=torch.complex64), None, 0)
