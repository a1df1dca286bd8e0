"""Turns, clocks and counters against what is known of the work."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from drmm_hf.benchmarks import measuring
from drmm_hf.benchmarks.measuring import (
    Seconds,
    Stopwatch,
    check_least,
    count_flops,
    matmul_rate,
    peak_memory,
    summary,
    take_turns,
    threads,
    timed,
)


CPU = torch.device("cpu")


def test_contestants_alternate_and_the_warm_up_does_not_count():
    calls = []

    def contestant(name):
        calls.append(name)
        return len(calls)

    taken = take_turns({name: lambda name=name: contestant(name) for name in "ab"}, repetitions=2)
    assert calls == ["a", "b"] * 3
    assert taken == {"a": [3, 5], "b": [4, 6]}


def test_the_median_is_not_the_mean():
    assert summary([1.0, 2.0, 9.0]) == {"median": 2.0, "min": 1.0, "max": 9.0}


def test_parts_of_one_name_add_up_and_nothing_is_lost(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 7.0])
    used = iter([0.0, 0.5, 0.75, 2.0])
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(measuring, "processor_seconds", lambda: next(used))
    stopwatch = Stopwatch(CPU)
    for name in ("data", "forward", "data"):
        stopwatch.mark(name)
    assert stopwatch.parts() == {"data": Seconds(5.0, 1.75), "forward": Seconds(2.0, 0.25)}
    assert stopwatch.total() == Seconds(7.0, 2.0)


def test_marks_on_a_gpu_are_events_that_are_read_after_all_work(monkeypatch):
    """Without a GPU here, what would be asked of one: events in order, one wait at the end, milliseconds."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.number = len([entry for entry in log if entry == "record"])

        def record(self):
            log.append("record")

        def elapsed_time(self, other):
            assert "synchronize" in log
            return 1000.0 * (other.number - self.number)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    stopwatch = Stopwatch(torch.device("cuda"))
    stopwatch.mark("forward")
    stopwatch.mark("backward")
    assert log == ["record"] * 3
    assert {name: seconds.wall for name, seconds in stopwatch.parts().items()} == {"forward": 1.0, "backward": 1.0}
    assert log[3:] == ["synchronize"]


def test_sleep_takes_wall_time_and_no_processor():
    seconds = timed(lambda: time.sleep(0.05), CPU)
    assert seconds.wall >= 0.05 > seconds.processor >= 0
    assert seconds.cost(CPU) == seconds.processor and seconds.cost(torch.device("cuda")) == seconds.wall


def test_processor_time_is_that_of_all_processes(monkeypatch):
    def usage(who):
        first = 1 if who == measuring.resource.RUSAGE_SELF else 300
        return SimpleNamespace(ru_utime=first, ru_stime=20 * first)

    monkeypatch.setattr(measuring.resource, "getrusage", usage)
    assert measuring.processor_seconds() == 21 + 6300


@pytest.mark.parametrize("batch", [1, 3])
def test_flops_are_those_of_the_formulas_forward_and_backward(batch):
    convolution, linear = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Linear(8, 5, bias=False)
    pictures = torch.randn(batch, 3, 6, 10)

    def work():
        linear(convolution(pictures).mean((2, 3))).sum().backward()

    forward = 2 * batch * (3 * 8 * 9 * 60 + 8 * 5)
    # Of the convolution's backward only the weight's gradient, since pictures need none; of the linear layer's both.
    backward = 2 * batch * (3 * 8 * 9 * 60 + 2 * 8 * 5)
    assert count_flops(work) == forward + backward


def test_flops_of_attention_are_counted_and_pooling_counts_nothing():
    query = torch.randn(1, 2, 7, 4)
    assert count_flops(lambda: F.scaled_dot_product_attention(query, query, query)) == 2 * (2 * 2 * 7 * 7 * 4)
    table, index = torch.randn(10, 4), torch.tensor([[1, 2]])
    assert count_flops(lambda: F.embedding_bag(index, table, mode="sum")) == 0


def test_the_matrix_rate_is_operations_over_time(monkeypatch):
    calls = []

    def one_second(work, device):
        work()
        calls.append(work)
        return Seconds(0.01 * 2 ** len(calls), 0.02 * 2 ** len(calls))

    monkeypatch.setattr(measuring, "timed", one_second)
    counted = []
    monkeypatch.setattr(torch, "mm", lambda left, right, out: counted.append(2 * len(left) ** 3))
    rate = matmul_rate(torch.float32, CPU, least_seconds=0.05)
    assert len(calls) == 3  # 0.02, 0.04, 0.08 seconds, of 4, 8 and 16 products
    assert rate == pytest.approx(Seconds(sum(counted[-16:]) / 0.08, sum(counted[-16:]) / 0.16))


def test_peak_memory_sees_what_is_freed_before_the_end():
    size = 256 * 2**20
    memory = peak_memory(lambda: torch.ones(size // 4).sum().item(), CPU)
    assert 0.9 * size < memory.added < 1.5 * size
    small = peak_memory(lambda: torch.ones(10), CPU)
    assert small.added < 0.2 * size  # the mark was put back


def test_threads_are_put_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_numbers_below_their_bound_are_named():
    check_least({"repetitions": (1, 1)})
    with pytest.raises(ValueError, match="num_workers is -1, must be at least 0"):
        check_least({"repetitions": (1, 1), "num_workers": (-1, 0)})
