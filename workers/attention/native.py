"""NativeAttention: paged attention by the compiled CPU kernels, for float32 and bfloat16 pools."""

import ctypes

import torch

from workers.attention.backend import AttentionLayer
from workers.engine.forward_batch import ForwardBatch
from workers.kvcache.kv_pool import KVPool
from workers.native.kernels import KERNEL_DTYPES, AttentionBatch, AttentionShape, NativeKernels
from workers.plan import Mode


class NativeAttention:
    """See AttentionBackend. How a row is computed depends on that row alone, never on its neighbours."""

    def __init__(self, pool: KVPool, kernels: NativeKernels) -> None:
        self._pool = pool
        self._kernels = kernels
        self._shapes: dict[AttentionLayer, tuple[AttentionShape, int]] = {}
        self._batch: ForwardBatch | None = None
        self._batch_view = AttentionBatch()
        self._batch_address = ctypes.addressof(self._batch_view)

    def for_passes(self, batch: ForwardBatch) -> "NativeAttention":
        """Return attention for passes over `batch`: the kernels read its lengths where they are."""
        attention = NativeAttention(self._pool, self._kernels)
        attention.plan(batch)
        return attention

    @staticmethod
    def supports(pool: KVPool) -> bool:
        """Tell whether the kernels know the pool's element type and can reach its bytes."""
        return pool.data.device.type == "cpu" and pool.layer(0)[0].dtype in KERNEL_DTYPES

    captured_modes: frozenset[Mode] = frozenset()

    def plan(self, batch: ForwardBatch) -> None:
        """Point the kernels at the batch's tensors, which are kept until the next plan."""
        assert batch.page_rows.stride(1) == 1, batch.page_rows.stride()
        # Also makes this thread adopt torch.set_num_threads, should it not have run a torch kernel yet.
        torch.get_num_threads()
        self._batch = batch
        view = self._batch_view
        view.page_rows = batch.page_rows.data_ptr()
        view.query_starts = batch.query_starts.data_ptr()
        view.context_lens = batch.context_lens.data_ptr()
        view.locations = batch.out_locations.data_ptr()
        view.page_rows_stride = batch.page_rows.stride(0)
        view.num_rows = batch.num_rows
        view.num_tokens = batch.num_tokens
        view.page_size = self._pool.page_size
        tree = batch.tree
        view.visible = None if tree is None else tree.visible.data_ptr()
        view.positions = None if tree is None else batch.positions.data_ptr()
        view.num_before = 0 if tree is None else tree.num_before

    def begin(self) -> None:
        """Do nothing: `plan` has."""

    def forward(
        self, layer: AttentionLayer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """See AttentionBackend; the result is a fresh tensor."""
        return self._kernels.attention(self._batch_address, self._shape_address(layer), q, k, v)

    def write(self, layer: AttentionLayer, k: torch.Tensor, v: torch.Tensor) -> None:
        """See WritingBackend."""
        self._kernels.write_kv(self._batch_address, self._shape_address(layer), k, v)

    def _shape_address(self, layer: AttentionLayer) -> int:
        found = self._shapes.get(layer)
        if found is None:
            shape = self._shape_of(layer)
            found = self._shapes[layer] = (shape, ctypes.addressof(shape))
        return found[1]

    def _shape_of(self, layer: AttentionLayer) -> AttentionShape:
        pool_k, pool_v = self._pool.layer(layer.index)
        page_stride, token_stride, head_stride, _ = pool_k.stride()
        assert pool_v.stride() == pool_k.stride() and head_stride == layer.head_dim, pool_k.stride()
        return AttentionShape(
            pool_k=pool_k.data_ptr(),
            pool_v=pool_v.data_ptr(),
            page_stride=page_stride,
            token_stride=token_stride,
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            sliding_window=layer.sliding_window or 0,
            scale=layer.scale,
            dtype=KERNEL_DTYPES[pool_k.dtype],
        )
