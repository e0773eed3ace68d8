"""HeadLayout: which attention heads live on which rank. Plain integers, no torch.

KV heads are divided among the ranks; replicated when there are fewer than ranks; the last ranks get zero
heads where they do not divide, so that every rank has the same shapes. Outputs are unchanged: a zero head
writes zeros, reads zeros and meets zero columns in the output projection.
"""

from dataclasses import dataclass

from workers.models.config import ModelConfig


def ceil_div(amount: int, parts: int) -> int:
    """Return the smallest n with n * parts >= amount."""
    return -(-amount // parts)


def leaves_none_out(vocab_size: int, tp_size: int) -> bool:
    """Tell whether each rank has tokens of a vocabulary: in equal shares, but for the last one's."""
    return (tp_size - 1) * ceil_div(vocab_size, tp_size) < vocab_size


@dataclass(frozen=True)
class HeadLayout:
    """The heads of each rank, as global indices; None is a zero head.

    A group is one KV head with its query heads. With r replicas of each group (r > 1 only when there are
    fewer KV heads than ranks) replica i takes query heads [i * n, (i + 1) * n) of it, n = ceil(group / r):

        3 KV heads, 9 query heads, 2 ranks     2 KV heads, 8 query heads, 4 ranks
        rank 0: kv 0 1   q 0 1 2 | 3 4 5       rank 0: kv 0  q 0 1     rank 2: kv 1  q 4 5
        rank 1: kv 2 -   q 6 7 8 | - - -       rank 1: kv 0  q 2 3     rank 3: kv 1  q 6 7
    """

    num_heads: int
    num_kv_heads: int
    tp_size: int

    @property
    def replicas(self) -> int:
        """Ranks that hold a copy of each KV head."""
        return max(1, self.tp_size // self.num_kv_heads)

    @property
    def kv_heads_per_rank(self) -> int:
        """KV heads of every rank, zero heads included."""
        return ceil_div(self.num_kv_heads * self.replicas, self.tp_size)

    @property
    def group_size(self) -> int:
        """Query heads of one KV head on one rank."""
        return ceil_div(self.num_heads // self.num_kv_heads, self.replicas)

    @property
    def heads_per_rank(self) -> int:
        """Query heads of every rank, zero heads included."""
        return self.kv_heads_per_rank * self.group_size

    def kv_heads(self, rank: int) -> list[int | None]:
        """Return the rank's KV heads in order."""
        first = rank * self.kv_heads_per_rank
        shares = range(first, first + self.kv_heads_per_rank)
        return [s // self.replicas if s < self.num_kv_heads * self.replicas else None for s in shares]

    def heads(self, rank: int) -> list[int | None]:
        """Return the rank's query heads in order: `group_size` for each of its KV heads."""
        whole_group = self.num_heads // self.num_kv_heads
        heads: list[int | None] = []
        for place, kv_head in enumerate(self.kv_heads(rank)):
            replica = (rank * self.kv_heads_per_rank + place) % self.replicas
            for i in range(replica * self.group_size, (replica + 1) * self.group_size):
                is_real = kv_head is not None and i < whole_group
                heads.append(kv_head * whole_group + i if is_real and kv_head is not None else None)
        return heads


def head_layout(config: ModelConfig, tp_size: int) -> HeadLayout:
    """Return the layout of a model's heads over `tp_size` ranks."""
    return HeadLayout(config.num_heads, config.num_kv_heads, tp_size)


def kv_shape(config: ModelConfig, tp_size: int) -> tuple[int, int, int]:
    """Return (num_layers, KV heads of one rank, head_dim): the shape of a bundle's target section."""
    return config.num_layers, head_layout(config, tp_size).kv_heads_per_rank, config.head_dim
