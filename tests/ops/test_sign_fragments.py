"""Where the CUDA kernels keep signs, normals and gradients, checked on the CPU through the kernels' own headers."""

import ctypes
import itertools
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from pyattr.ops import sign_matrix

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
QUADS = list(itertools.product(range(4), range(4)))  # lane of a quad, quarter of a block


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    library = tmp_path_factory.mktemp("fragments") / "fragments.so"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{CSRC}"]
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, *flags, str(HERE / "sign_fragments.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def address(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def halves_as_floats(words, dtype):  # [...] uint32 -> [..., 2] float32, low half first
    halves = np.stack([words & 0xFFFF, words >> 16], axis=-1).astype(np.uint16)
    return torch.from_numpy(halves.view(np.int16)).view(dtype).float().numpy()


def test_every_column_of_a_block_has_one_slot(native):
    slots = itertools.product(range(8), range(2), range(4), range(2))
    assert sorted(native.slot_column_of_signs(*slot) for slot in slots) == list(range(128))


def test_slot_formula_by_hand(native):
    assert native.slot_column_of_signs(0, 0, 0, 0) == 15
    assert native.slot_column_of_signs(0, 0, 0, 1) == 31
    assert native.slot_column_of_signs(7, 1, 0, 0) == 0
    assert native.slot_column_of_signs(3, 1, 2, 1) == 64 + 31 - 7


@pytest.mark.parametrize(("dtype", "minus_ones"), [(torch.bfloat16, 0xBF80BF80), (torch.float16, 0xBC00BC00)])
@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (0xDEADBEEF, 0xFFFFFFFF)])
def test_registers_hold_the_signs_of_their_columns(native, dtype, minus_ones, seed, stream):
    """All lanes, registers and steps, against the matrix that Python's own Philox writes out."""
    rows = np.array([0, 1, 8, 31, 12345, 2**32 - 1], dtype=np.uint32)
    for block in (0, 1, 2**32 - 1):
        registers = np.zeros((len(rows), 8, 2, 4), dtype=np.uint32)
        native.sign_registers(block, address(rows), len(rows), ctypes.c_uint32(seed), ctypes.c_uint32(stream),
                              ctypes.c_uint32(minus_ones), address(registers))  # fmt: skip
        values = halves_as_floats(registers, dtype)  # [row, step, half register, lane, half]
        expected = sign_matrix(rows.tolist(), range(128 * block, 128 * block + 128), seed, stream).numpy()
        for step, register, lane, half in itertools.product(range(8), range(2), range(4), range(2)):
            column = native.slot_column_of_signs(step, register, lane, half)
            assert (values[:, step, register, lane, half] == expected[:, column]).all()


def test_gradients_are_staged_in_the_order_of_the_signs(native):
    """Register j of a quarter is step 2 quarter + j div 2, half register j mod 2."""
    for (lane, quarter), j, e in itertools.product(QUADS, range(4), range(2)):
        slot = native.slot_column_of_signs(2 * quarter + j // 2, j % 2, lane, e)
        assert native.staged_column(0, lane, quarter, j, e) == slot


def test_gradients_are_staged_in_the_order_of_the_normals(native):
    """The lane's two registers of a step hold columns 16 step + 4 lane + 0..3, the four entries of one call."""
    for (lane, quarter), j, e in itertools.product(QUADS, range(4), range(2)):
        assert native.staged_column(1, lane, quarter, j, e) == 16 * (2 * quarter + j // 2) + 4 * lane + 2 * (j % 2) + e


@pytest.mark.parametrize("samples", [8, 32, 64])
def test_staging_covers_everything_once_without_bank_conflicts(native, samples):
    units = []
    for index in range(samples * 16):
        out = np.zeros(3, dtype=np.int32)
        native.staged_unit(samples, index, address(out))
        units.append(tuple(out.tolist()))
    assert sorted(units) == list(itertools.product(range(samples), range(4), range(4)))

    stores = [native.operand_byte(samples, *unit) for unit in units]
    assert sorted(stores) == list(range(0, samples * 256, 16))
    for phase in range(0, len(stores), 8):  # 16-byte accesses are served eight lanes at a time
        assert len({byte // 16 % 8 for byte in stores[phase : phase + 8]}) == 8
    for quarter, tile in itertools.product(range(4), range(samples // 8)):
        loads = [native.operand_byte(samples, 8 * tile + lane // 4, lane % 4, quarter) for lane in range(32)]
        for phase in range(0, 32, 8):
            assert len({byte // 16 % 8 for byte in loads[phase : phase + 8]}) == 8

    for element_bytes, normal, group in itertools.product((2, 4), (0, 1), (0, 1)):
        chunks = [[native.raw_byte(element_bytes, s, c) for c in range(8 * element_bytes)] for s in range(samples)]
        assert sorted(itertools.chain(*chunks)) == list(range(0, samples * 128 * element_bytes, 16))
        lanes = 32 // element_bytes  # reads of four elements: 8 or 16 bytes a lane, 16 or 8 lanes a phase
        for phase in range(0, len(units), lanes):
            banks = set()
            for sample, lane, quarter in units[phase : phase + lanes]:
                byte = native.staged_group(normal, lane, quarter, group) * element_bytes
                banks.add((chunks[sample][byte // 16] + byte % 16) % 128)
            assert len(banks) == lanes


def test_normal_entries_are_within_their_bound(native):
    """Against float64, on random words and on those where u1 or the angle is extreme or a branch changes."""
    edges = [0, 1, 2, 0x1FFFFFFF, 0x20000000, 0x3FFFFFFF, 0x40000000, 0x5FFFFFFF, 0x60000000, 0x7FFFFFFF, 0x80000000,
             0xA0000000, 0xB504F333, 0xB504F334, 0xC0000000, 0xE0000000, 0xFFFFFFFE, 0xFFFFFFFF]  # fmt: skip
    rng = np.random.default_rng(0)
    small, large = rng.integers(0, 2000, 50_000), 2**32 - 1 - rng.integers(0, 2000, 50_000)
    a = np.concatenate([np.repeat(edges, len(edges)), small, large, rng.integers(0, 2**32, 1_000_000)])
    b = np.concatenate([np.tile(edges, len(edges)), rng.integers(0, 2**32, len(a) - len(edges) ** 2)])
    a32, b32 = a.astype(np.uint32), b.astype(np.uint32)
    even, odd = np.zeros(len(a), dtype=np.float32), np.zeros(len(a), dtype=np.float32)
    native.normal_pairs(address(a32), address(b32), ctypes.c_int64(len(a)), address(even), address(odd))
    radius, angle = np.sqrt(-2 * np.log((a + 0.5) * 2.0**-32)), 2 * np.pi * b * 2.0**-32
    error = np.maximum(np.abs(even - radius * np.cos(angle)), np.abs(odd - radius * np.sin(angle)))
    assert error.max() < 1e-6


def limbs_of(native, num_limbs, values):
    values = np.asarray(values, dtype=np.float32)
    out = np.zeros((len(values), num_limbs), dtype=np.uint32)
    native.limbs(num_limbs, address(values.view(np.uint32).copy()), ctypes.c_int64(len(values)), address(out))
    assert (out & 0xFFFF == 0).all()  # each limb is a bfloat16
    return out.view(np.float32)


def test_three_limbs_hold_a_float32_exactly(native):
    rng = np.random.default_rng(1)
    values = rng.integers(0, 2**32, 200_000).astype(np.uint32).view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) >= 2.0**-110)]
    extreme = [0.0, -0.0, 1.0, np.pi, np.float32(np.finfo(np.float32).max), -np.float32(np.finfo(np.float32).max)]
    values = np.concatenate([values, np.array(extreme, dtype=np.float32)])
    limbs = limbs_of(native, 3, values)
    assert np.isfinite(limbs).all()
    assert (limbs.astype(np.float64).sum(axis=1) == values).all()


def test_two_limbs_hold_every_float16_exactly(native):
    values = np.arange(2**16, dtype=np.uint16).view(np.float16)
    values = values[np.isfinite(values)].astype(np.float32)
    assert (limbs_of(native, 2, values).astype(np.float64).sum(axis=1) == values).all()


def test_limbs_of_numbers_too_small_for_bfloat16(native):
    values = np.array([2.0**-126 * 1.9999999, 2.0**-149, -(2.0**-130) * 1.2345], dtype=np.float32)
    error = np.abs(limbs_of(native, 3, values).astype(np.float64).sum(axis=1) - values)
    assert (error <= 2.0**-133).all()


@pytest.mark.parametrize("num_limbs", [2, 3])
def test_infinities_and_nans_stay_what_they_are(native, num_limbs):
    limbs = limbs_of(native, num_limbs, [np.inf, -np.inf])
    assert (limbs[:, 0] == [np.inf, -np.inf]).all() and (limbs[:, 1:] == 0).all()
    payloads = np.array([0x7FC00000, 0x7F800001, 0xFF800001, 0x7F80FFFF], dtype=np.uint32).view(np.float32)
    assert np.isnan(limbs_of(native, num_limbs, payloads).sum(axis=1)).all()


def test_packing_keeps_the_upper_halves(native):
    native.packed.restype = ctypes.c_uint32
    assert native.packed(ctypes.c_uint32(0xABCD1234), ctypes.c_uint32(0x9876FFFF)) == 0x9876ABCD
