"""How bench_kernels times: calls over inputs that take turns, in a graph, replayed by the card's clock."""

import statistics

import torch

MIN_ROTATION_BYTES = 192 << 20
"""Inputs take turns over so much memory: several times what the card's caches hold."""
MAX_SETS = 128
MIN_TIMED_S = 0.004


def num_sets(bytes_per_call):
    """Return how many sets of inputs it takes for none to be found in a cache."""
    return max(2, min(MAX_SETS, -(-MIN_ROTATION_BYTES // bytes_per_call)))


def captured(calls):
    """Return a graph of `calls`, one after the other, each made once before: compiled, and allocated."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def seconds_per_call(calls, rounds=7):
    """Return the median over rounds of the time of one call; a round is some milliseconds of replays."""
    graph = captured(calls)
    graph.replay()
    num_replays = max(1, round(MIN_TIMED_S / replayed_s(graph, 1)))
    return statistics.median(replayed_s(graph, num_replays) for _ in range(rounds)) / len(calls)


def replayed_s(graph, num_replays):
    """Return the time of one replay of several."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(num_replays):
        graph.replay()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1000 / num_replays


def read_bytes_per_s(num_bytes=4 << 30):
    """Return the card's read bandwidth: the best of a sum, a maximum, and a search of ours for one."""
    from workers.triton_kernels.argmax import greedy_tokens

    values = torch.randn(num_bytes // 4, device="cuda")
    rows = values.view(1024, -1)
    readers = (values.sum, values.max, lambda: greedy_tokens(rows, pdl=False))
    return num_bytes / min(seconds_per_call([reader] * 2) for reader in readers)
