"""A decode step of a whole decoder without its attention, captured: what each switch of the kernels gains."""

import torch

from tests.bench.kernel_timing import seconds_per_call
from tests.bench.timed_cases import CUDA, DTYPE, NUM_PAGES, PAGE_SIZE
from workers.models.decoder import Decoder
from workers.parallel import TPGroup
from workers.triton_kernels.choice import cuda_kernels
from workers.triton_kernels.layer_kernels import Switches

ARMS = {
    "torch": None,
    "all": Switches(),
    "without_dependent_launch": Switches(dependent_launch=False),
    "without_skinny_matmul": Switches(skinny_matmul=False, gated_matmul=False),
    "without_gated_matmul": Switches(gated_matmul=False),
    "without_late_launch": Switches(late_launch=False),
    "without_rotate_and_write": Switches(),
}
"""By name; None: the layers' own torch code."""


class NoAttention:
    """An AttentionBackend that writes KV and attends to nothing: its result is always the same."""

    def __init__(self, config, rows, kernels):
        self._kernels = kernels
        self._locations = torch.randperm(NUM_PAGES * PAGE_SIZE, device=CUDA)[:rows].clone()
        shape = (NUM_PAGES, 2, PAGE_SIZE, config.num_kv_heads, config.head_dim)
        self._pools = torch.zeros(shape, dtype=DTYPE, device=CUDA).unbind(1)
        self._out = torch.full((rows, config.num_heads * config.head_dim), 0.1, dtype=DTYPE, device=CUDA)

    def forward(self, layer, q, k, v):
        if self._kernels is not None:
            self._kernels.write_kv(k, v, self._locations, *self._pools)
        else:
            pages, offsets = self._locations // PAGE_SIZE, self._locations % PAGE_SIZE
            for pool, new in zip(self._pools, (k, v), strict=True):
                pool[pages, offsets] = new
        return self._out


class RotatesAndWrites(NoAttention):
    def forward_unrotated(self, layer, q, k, v, cos, sin):
        self._kernels.rotate_and_write_kv(q, k, v, cos, sin, self._locations, *self._pools)
        return self._out


def step_times(config, batches):
    """Return, by batch and arm, the milliseconds of a step: embedding, layers, head and the greedy tokens."""
    found = {str(rows): {} for rows in batches}
    for name, switches in ARMS.items():
        decoder = Decoder(config, dtype=DTYPE, device=CUDA, group=TPGroup.single())
        for parameter in decoder.parameters():
            parameter.normal_(0, 0.02)
        kernels = None
        if switches is not None:
            kernels = cuda_kernels(CUDA, DTYPE, switches)
            decoder.adopt(kernels)
        fuses = kernels is not None and name != "without_rotate_and_write"
        for rows in batches:
            attention = (RotatesAndWrites if fuses else NoAttention)(config, rows, kernels)
            found[str(rows)][name] = 1000 * seconds_per_call([_step(decoder, attention, rows, kernels)])
        del decoder
        torch.cuda.empty_cache()
    return found


def _step(decoder, attention, rows, kernels):
    token_ids = torch.randint(100, 40_000, (rows,), device=CUDA)
    positions = torch.randint(0, 200, (rows,), device=CUDA)

    def step():
        logits = decoder.logits(decoder(token_ids, positions, attention))
        return logits.argmax(dim=-1) if kernels is None else kernels.greedy_tokens(logits)

    return step
