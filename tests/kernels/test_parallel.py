"""Compiled loops, by one thread or by torch's team: the same bits, and what a plain computation gives."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from twhin_pipeline.kernels import parallel, vector_kernels
from twhin_pipeline.kernels.parallel import ParallelLoop, floats, integers, number


@pytest.fixture(params=["team", "one thread", "no OpenMP"])
def threads(request, monkeypatch):
    """Two threads of torch's, one, or two that cannot be shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if request.param == "one thread" else 2)
    if request.param == "no OpenMP":
        monkeypatch.setattr(parallel, "_runtime", lambda: None)
    yield request.param
    torch.set_num_threads(before)


@ParallelLoop
def mark(first: int, last: int, frame: int) -> None:
    visits, given = floats(frame, 0), integers(frame, 1)
    for i in range(first, last):
        visits[i, 0] += number(frame, 2)
        given[i] = first


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 1000])
def test_each_place_is_visited_once(threads, size):
    visits, first = np.zeros((size, 1), np.float32), np.full(size, -1)
    mark(size, 5, visits, first, 0.5)
    assert visits.tolist() == [[0.5]] * size
    # A few parts for each thread, of 5 at least.
    parts = min(size // 5, 2 * parallel.PARTS_A_THREAD) if threads == "team" and size >= 10 else 1
    assert sorted(set(first.tolist())) == ([size * i // parts for i in range(parts)] if size else [])


@pytest.mark.skipif(sys.platform != "linux", reason="torch's wheels have GNU OpenMP on Linux")
def test_torchs_threads_can_be_shared_here():
    assert parallel._runtime() is not None


@pytest.mark.parametrize("lacks", ["OpenMP", "the library"])
def test_other_builds_of_torch_are_known_as_such(monkeypatch, lacks):
    def refuse(*given, **options):
        raise OSError("libgomp.so.1: not loaded")

    if lacks == "OpenMP":
        monkeypatch.setattr(torch.__config__, "parallel_info", lambda: "ATen parallel backend: native thread pool")
    else:
        monkeypatch.setattr(parallel.ctypes, "CDLL", refuse)
    assert parallel._runtime.__wrapped__() is None


def updates(rng):
    rows = np.sort(rng.choice(5000, 3000, replace=False))
    return rows, rng.normal(size=(3000, 24)).astype(np.float32)


@pytest.mark.parametrize("loop", ["rowwise_adagrad", "adagrad"])
def test_updates_are_those_of_the_plain_loop(threads, loop):
    rng = np.random.default_rng(0)
    rows, grad = updates(rng)
    weight = rng.normal(size=(5000, 24)).astype(np.float32)
    momentum = rng.random((5000, 24) if loop == "adagrad" else 5000).astype(np.float32)
    expected = weight.copy(), momentum.copy()
    start, address = np.arange(len(rows) + 1), grad.ctypes.data + np.arange(len(rows)) * grad.strides[0]
    getattr(vector_kernels, loop)(*expected, rows, start, address, 1.0, 0.1, 1e-8)
    getattr(parallel, loop)(len(rows), 10, weight, momentum, rows, start, address, 1.0, 0.1, 1e-8)
    assert np.array_equal(weight, expected[0])
    assert np.array_equal(momentum, expected[1])


def softmax(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    share, total = np.empty_like(logits), np.empty(len(logits), np.float32)
    parallel.softmax(len(logits), 2, logits, share, total)
    return share, total


def test_softmax_and_its_logarithm_are_torchs(threads):
    logits = np.random.default_rng(0).normal(size=(301, 77)).astype(np.float32) * 30
    logits[np.random.default_rng(1).random(logits.shape) < 0.3] = -np.inf
    share, total = softmax(logits)
    exact = torch.from_numpy(logits).double()
    np.testing.assert_allclose(total, exact.logsumexp(1), rtol=2e-6, atol=2e-6)
    # The difference to the highest logit has the rounding of float32.
    np.testing.assert_allclose(share, exact.softmax(1), rtol=1e-5, atol=1e-37)
    assert (share[np.isneginf(logits)] == 0).all()


def test_rows_that_are_all_masked_and_rows_that_are_not_numbers_tell_so():
    logits = np.zeros((3, 20), np.float32)
    logits[0], logits[1, 7] = -np.inf, np.nan
    share, total = softmax(logits)
    assert total[0] == -np.inf
    assert np.isnan(total[1])
    assert total[2] == pytest.approx(np.log(20))
    assert (share[0] == 0).all()


def test_exp_is_within_two_units_in_the_last_place():
    x = -np.abs(np.random.default_rng(0).normal(size=100_000) * 30).astype(np.float32)
    x = np.concatenate([x, np.float32([0, -87, -87.5, -1000, -np.inf])])
    found = np.array([vector_kernels.exp(v) for v in x[-5:]], np.float32)
    assert found.tolist() == pytest.approx([1, np.exp(np.float64(-87)), 0, 0, 0], rel=1e-6)
    share, _ = softmax(np.stack([np.zeros_like(x), x], 1))
    expected = np.exp(x.astype(np.float64))
    np.testing.assert_allclose(share[:, 1] / share[:, 0], np.where(x > -87, expected, 0), rtol=4e-7)


@pytest.mark.parametrize("limit", [{}, {"OMP_THREAD_LIMIT": "1"}], ids=["two threads", "a team of one"])
def test_a_process_that_finds_nothing_compiled_compiles_loops_and_shares_them(tmp_path, limit):
    code = (
        "import numpy as np, torch; torch.set_num_threads(2); from twhin_pipeline.kernels import parallel; "
        "x = np.zeros((100, 3), np.float32); out = np.zeros(100, np.float32); "
        "parallel.softmax(100, 1, x, x.copy(), out); print(out.min())"
    )
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), **limit}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(np.log(3), rel=1e-5)


def test_arrays_of_another_type_or_order_are_refused():
    with pytest.raises(AssertionError):
        mark(1, 1, np.zeros((1, 1)), np.zeros(1, np.int64), 1.0)
    with pytest.raises(AssertionError):
        mark(2, 1, np.zeros((2, 4), np.float32)[:, ::2], np.zeros(2, np.int64), 1.0)


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7F800001])
def test_any_bits_that_are_no_number_are_known(bits):
    logits = np.random.default_rng(0).normal(size=(2, 21)).astype(np.float32)
    logits[1, 13:14].view(np.uint32)[:] = bits
    _, total = softmax(logits)
    assert np.isfinite(total[0])
    assert np.isnan(total[1])
