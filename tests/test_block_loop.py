"""The loop of a block as a CUDA graph: its condition, in the emulator, and what it says without CUDA."""

from __future__ import annotations

import ctypes

import pytest
import torch

from backends import SCHEDULES, emulator
from fastdllm_ext import _C
from fastdllm_ext.ops import Row

simt = pytest.mark.skipif(emulator is None, reason="built without FASTDLLM_SIMT; see `make test`")


def decoding_rows(count: int) -> torch.Tensor:
    """Rows that have masks left, and nothing else to say."""
    rows = torch.randint(0, 100, (count, len(Row)))
    rows[:, Row.MASKS_LEFT] = torch.randint(1, 33, (count,))
    rows[:, Row.EOS_AT], rows[:, Row.BAD_LOGITS] = -1, 0
    return rows


def goes_on(rows: torch.Tensor, taken: int = 3, cap: int = 100) -> bool:
    """Under every schedule; the iteration is counted, the rows stay as they are."""
    assert emulator is not None
    function = emulator.simt_goes_on
    function.restype = ctypes.c_char_p
    given, found = rows.clone(), set()
    for schedule in SCHEDULES:
        emulator.simt_set_schedule(schedule)
        iterations, answers = torch.tensor([taken]), torch.full((32,), -1)
        addresses = [ctypes.c_void_p(x.data_ptr()) for x in (rows, iterations, answers)]
        count, most = ctypes.c_int64(len(rows)), ctypes.c_int64(cap)
        error = function(addresses[0], count, addresses[1], most, addresses[2])
        assert error is None, error
        assert iterations.tolist() == [taken + 1]
        found.add(tuple(answers.tolist()))
    assert torch.equal(rows, given)
    assert found in ({(0,) * 32}, {(1,) * 32}), "all lanes say the same, under every schedule"
    return found == {(1,) * 32}


@simt
@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 100], ids="simt-{}".format)
def test_condition(count: int) -> None:
    assert goes_on(decoding_rows(count))
    for b in {0, count // 2, count - 1}:
        for column, value in [
            (Row.MASKS_LEFT, 0),
            (Row.MASKS_LEFT, -1),
            (Row.EOS_AT, 0),
            (Row.EOS_AT, 40),
            (Row.BAD_LOGITS, 1),
        ]:
            rows = decoding_rows(count)
            rows[b, column] = value
            assert not goes_on(rows), f"row {b}, {column.name} {value}"
        rows = torch.cat((decoding_rows(b + 1), torch.zeros((1, len(Row)), dtype=torch.int64)))
        assert goes_on(rows[: b + 1]), "what lies behind the rows is not read"


@simt
@pytest.mark.parametrize("taken, cap, wanted", [(0, 1, False), (0, 2, True), (1, 2, False), (7, 8, False)],
                         ids="simt-{}".format)  # fmt: skip
def test_cap(taken: int, cap: int, wanted: bool) -> None:
    assert goes_on(decoding_rows(2), taken, cap) == wanted


def test_says_why_there_is_no_loop() -> None:
    if torch.cuda.is_available() and _C.cuda_built:
        pytest.skip("there may be one")
    with pytest.raises(RuntimeError, match="CUDA"):
        _C.BlockLoop(step_graph=0, rows_ptr=0, count=1, iterations_ptr=0, cap=1)
