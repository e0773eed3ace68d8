"""Covering arrays: few combinations of factor values that hold each pair of values of each two factors."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from random import Random
from typing import Any

Combination = dict[str, Any]
Pair = frozenset[tuple[str, Any]]


def pairs_of(combination: Mapping[str, Any]) -> set[Pair]:
    return {frozenset(pair) for pair in combinations(combination.items(), 2)}


def all_pairs(factors: Mapping[str, Sequence[Any]]) -> set[Pair]:
    return {
        frozenset({(a, value_a), (b, value_b)})
        for a, b in combinations(factors, 2)
        for value_a in factors[a]
        for value_b in factors[b]
    }


def pairwise(
    factors: Mapping[str, Sequence[Any]], seed: int = 0, num_candidates: int = 60
) -> list[Combination]:
    """Return combinations that cover all pairs. Greedy: of random ones, the best is next."""
    random = Random(seed)
    uncovered = all_pairs(factors)
    chosen: list[Combination] = []
    while uncovered:
        wanted = dict(min(uncovered, key=sorted_repr))
        candidates = [
            {name: wanted.get(name, random.choice(list(values))) for name, values in factors.items()}
            for _ in range(num_candidates)
        ]
        best = max(candidates, key=lambda candidate: len(pairs_of(candidate) & uncovered))
        chosen.append(best)
        uncovered -= pairs_of(best)
    return chosen


def sorted_repr(pair: Pair) -> list[str]:
    return sorted(map(repr, pair))
