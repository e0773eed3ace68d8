"""VocabularyShard: what ranks tell each other so that each samples from its own part of the vocabulary.

The Sampler's and the drafts', on every rank: all of them call the same, in the same order. They exchange a
row's best tokens, its largest logit, its sums of integers, which come out alike however the vocabulary is
divided: never its logits. A group of one exchanges nothing.
"""

import torch
from torch import Tensor

from workers.models.sharding import ceil_div
from workers.parallel import TPGroup

_LAST_ID = 0xFFFFFFFF
_RUN_LEN = 256
"""Tokens of a run. Where few of many are wanted, a row is read for its runs' largest values, and of its runs
only those that can have what is wanted are looked at closely."""
_MASS_BITS = 40
"""Masses relative to a row's likeliest token are whole multiples of 2^-40: their sums are exact."""


def keys_of(values: Tensor, token_ids: Tensor) -> Tensor:
    """Return int64s in the order of float32 `values`, and for equal ones against that of the int64 ids.

    key:  [ order of the float : 32 | 2^32 - 1 - id : 32 ]
    """
    return (order_of(values).to(torch.int64) << 32) | (_LAST_ID - token_ids)


def order_of(values: Tensor) -> Tensor:
    """Return int32s in the order of float32 values; NaN of either sign is larger than all numbers, as to
    argmax."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0: the two zeros are equal
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).masked_fill_(values.isnan(), 0x7FFFFFFF)


def greedy_keys(logits: Tensor, first_id: int) -> Tensor:
    """Return the keys [rows] int64 of each row's largest logit, of equal ones the lower id; logits [rows, n]
    of any float type are those of the tokens from `first_id` on."""
    best, places = logits.float().max(dim=-1)
    return keys_of(best, places + first_id)


def ids_of(keys: Tensor) -> Tensor:
    """Return the token ids of keys, int64."""
    return _LAST_ID - (keys & _LAST_ID)


def values_of(keys: Tensor) -> Tensor:
    """Return the values of keys, float32."""
    order = (keys >> 32).to(torch.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).view(torch.float32)


class VocabularyShard:
    """Tokens `first` .. `first + num_tokens` of a vocabulary that is divided as VocabularyHead divides it."""

    def __init__(self, vocab_size: int, group: TPGroup) -> None:
        share = ceil_div(vocab_size, group.size)
        self.vocab_size = vocab_size
        self.first = group.rank * share
        self.num_tokens = min(share, vocab_size - self.first)
        assert self.num_tokens > 0, f"{vocab_size} tokens leave none to rank {group.rank} of {group.size}"
        self.is_whole = group.size == 1
        self._share = share
        self._group = group

    def best(self, keys: Tensor) -> Tensor:
        """Return the ids of the largest of all ranks' keys, [rows] int64, which it overwrites."""
        sums = self._group.one_shot
        if sums is not None and sums.takes_keys(keys):
            return sums.best_ids(keys)
        self._group.maximum(keys)
        return ids_of(keys)

    def largest(self, values: Tensor, num: int) -> Tensor:
        """Return the keys of each row's `num` largest values of all ranks, largest first, [rows, num] int64.

        `values` [rows, num_tokens] of any float type; equal values rank by id, the lower first, which topk
        alone leaves open, and logits of bf16 weights are often equal.
        """
        keys = _largest_of_rank(values, self.first, min(num, self.num_tokens))
        if self.is_whole:
            return keys
        # A row's largest are among the largest of each rank, of which the last may have fewer.
        width = min(num, self._share)
        padded = torch.nn.functional.pad(keys, (0, width - keys.shape[1]), value=-(1 << 63))
        gathered = self._group.all_gather(padded)  # [ranks, rows, width]
        return _largest(gathered.transpose(0, 1).reshape(len(values), -1), num)

    def likeliest(self, logits: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """Return each row's `num` likeliest tokens of all ranks, the likeliest first: ids [rows, num] int64,
        and the logarithms of their probabilities, float32. The same bits on every rank and in a group of one.

        `logits` [rows, num_tokens] of any float type; of equal ones the lower id comes first. Where a row's
        largest is no finite number, it says nothing: its logarithms are -inf.
        """
        keys = self.largest(logits, num)
        values = values_of(keys)
        largest = values[:, :1]
        # Anything where the largest is not finite, but the same on all ranks: it is not used.
        masses = (logits - largest).exp_().mul_(2.0**_MASS_BITS).to(torch.int64)
        mass = self.sum(masses.sum(dim=-1, keepdim=True)).double().mul_(2.0**-_MASS_BITS)
        log_p = ((values - largest).double() - mass.log_()).float()
        return ids_of(keys), log_p.masked_fill_(~largest.isfinite(), -torch.inf)

    def maximum(self, values: Tensor) -> Tensor:
        """Return the largest of all ranks' values, elementwise; it may overwrite them."""
        self._group.maximum(values)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of all ranks' values, elementwise; it may overwrite them."""
        self._group.all_reduce(values)
        return values

    def log_softmax(self, values: Tensor) -> Tensor:
        """Return log-probabilities [rows, num_tokens] of all ranks' values, but for rounding the same however
        the vocabulary is divided. Row by row on every device: unlike a plain sum's they do not depend on the
        batch."""
        own = torch.log_softmax(values, dim=-1)
        if self.is_whole:
            return own
        log_mass = values.amax(-1, keepdim=True) - own.amax(-1, keepdim=True)
        return own.add_(log_mass - self._group.all_gather(log_mass).logsumexp(dim=0))

    def before(self, counts: Tensor) -> Tensor:
        """Return the sum of the counts of the ranks with lower ids, elementwise."""
        if self.is_whole:
            return torch.zeros_like(counts)
        return self._group.all_gather(counts)[: self._group.rank].sum(dim=0)

    def place(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return where ids are in this part, 0 for others, and which of them are in it."""
        places = token_ids - self.first
        is_here = (places >= 0) & (places < self.num_tokens)
        return places * is_here, is_here


def _largest_of_rank(values: Tensor, first_id: int, num: int) -> Tensor:
    """Return the keys of each row's `num` largest values, largest first; values [rows, n] of any float type
    are those of the tokens from `first_id` on."""
    num_rows, num_tokens = values.shape
    num_runs = num_tokens // _RUN_LEN
    places = torch.arange(num_tokens, device=values.device)
    if num_runs > 2 * num:
        # What is among the largest is in one of `num` runs: those with the largest values, of equal ones the
        # first. Or it is behind the last run.
        tail = places[num_runs * _RUN_LEN :].expand(num_rows, -1)
        best = values[:, : num_runs * _RUN_LEN].view(num_rows, num_runs, _RUN_LEN).amax(dim=-1)
        runs = ids_of(_largest(keys_of(best.float(), places[:num_runs]), num))
        places = (runs[:, :, None] * _RUN_LEN + places[:_RUN_LEN]).flatten(1)
        places = torch.cat([places, tail], dim=1)  # [rows, num * _RUN_LEN + tail]
        values = values.gather(1, places)
    return _largest(keys_of(values.float(), places + first_id), num)


def _largest(keys: Tensor, num: int) -> Tensor:
    if num * 8 > keys.shape[1]:  # topk is slower than a sort where it keeps much
        return keys.sort(dim=-1, descending=True).values[:, :num]
    if num == 0:
        return keys[:, :0]
    return keys.topk(num, dim=-1).values
