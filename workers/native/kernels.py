"""NativeKernels: the compiled CPU kernels as functions of tensors, called in the engine's thread.

Tensors go down as raw addresses, checked here and nowhere below. Threads are torch's own.
"""

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import torch

from workers.layers.kernels import Matmul
from workers.native.build import COMPILERS, built_library, default_cache_folder, has_matrix_units
from workers.native.packed_torch import packed_by_torch
from workers.native.self_check import check_kernels

KERNEL_DTYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1}
"""Element types the kernels know, by their code in simd.h."""

MAX_ROWS_BESIDE_MATRIX_UNITS = 16
"""On CPUs with AMX, products of more rows are bound by arithmetic, of which AMX has several times as much."""

_POINTER, _INT, _FLOAT, _CODE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int32


class AttentionBatch(ctypes.Structure):
    """One step's batch, as attention.cpp reads it."""

    _fields_ = (
        ("page_rows", _POINTER),
        ("query_starts", _POINTER),
        ("context_lens", _POINTER),
        ("locations", _POINTER),
        ("page_rows_stride", _INT),
        ("num_rows", _INT),
        ("num_tokens", _INT),
        ("page_size", _INT),
        ("visible", _POINTER),
        ("positions", _POINTER),
        ("num_before", _INT),
    )


class AttentionShape(ctypes.Structure):
    """One layer and its part of the pool, as attention.cpp reads it."""

    _fields_ = (
        ("pool_k", _POINTER),
        ("pool_v", _POINTER),
        ("page_stride", _INT),
        ("token_stride", _INT),
        ("num_heads", _INT),
        ("num_kv_heads", _INT),
        ("head_dim", _INT),
        ("sliding_window", _INT),
        ("scale", _FLOAT),
        ("dtype", _CODE),
    )


class NativeKernels:
    """One loaded library, as LayerKernels and for NativeAttention. Any number of models may share it.

    `max_matmul_rows`: products of more rows are left to torch; None: none are.
    """

    def __init__(self, library: Path, max_matmul_rows: int | None = None) -> None:
        self._max_matmul_rows = max_matmul_rows
        # torch, imported above, has loaded the OpenMP runtime that the library's symbols resolve to.
        functions = ctypes.CDLL(str(library))
        self._packed_words = _declare(functions.eyrie_packed_words, [_INT, _INT], _INT)
        self._pack_linear = _declare(functions.eyrie_pack_linear, [_POINTER, _INT, _INT, _INT, _POINTER])
        self._linear = self._launched(
            functions.eyrie_linear,
            [_POINTER, _CODE, _INT, _INT, _POINTER, _INT, _INT, _POINTER, _POINTER, _CODE, _INT],
        )
        self._attention = self._launched(
            functions.eyrie_attention,
            [_POINTER, _POINTER, _POINTER, _INT, _POINTER, _INT, _POINTER, _INT, _POINTER],
        )
        self._write_kv = self._launched(
            functions.eyrie_write_kv, [_POINTER, _POINTER, _POINTER, _INT, _POINTER, _INT]
        )
        self._rms_norm = self._launched(
            functions.eyrie_rms_norm,
            [_POINTER, _INT, _POINTER, _INT, _POINTER, _POINTER, _FLOAT, _INT, _INT, _POINTER, _CODE],
        )
        self._rotate = self._launched(
            functions.eyrie_rotate, [_POINTER, _INT, _INT, _INT, _INT, _POINTER, _POINTER, _INT, _CODE]
        )
        self._silu_mul = self._launched(
            functions.eyrie_silu_mul, [_POINTER, _INT, _INT, _INT, _POINTER, _CODE]
        )

    def _launched(self, function: Callable[..., int], arguments: list[type]) -> Callable[..., int]:
        """Return a step's function as it is called; RecordingKernels notes each call."""
        return _declare(function, arguments)

    @classmethod
    def load(cls, cache_folder: Path | None = None, compilers: Sequence[str] = COMPILERS) -> Self:
        """Compile if need be, load and check. Raises NativeBuildError where one of them cannot be done."""
        library = built_library(cache_folder or default_cache_folder(), compilers)
        kernels = cls(library, MAX_ROWS_BESIDE_MATRIX_UNITS if has_matrix_units() else None)
        check_kernels(kernels)
        return kernels

    def matmul(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Matmul | None:
        """Return x W^T + b by the packed weight; None for anything but bf16, where torch is as fast."""
        if weight.dtype != torch.bfloat16 or weight.numel() == 0:
            return None
        num_columns, packed = weight.shape[0], self.pack_linear(weight)
        wide_bias = None if bias is None else bias.float()

        def native(x: torch.Tensor) -> torch.Tensor:
            return self.linear(x, packed, num_columns, wide_bias)

        max_rows = self._max_matmul_rows
        if max_rows is None:
            return native
        by_torch = packed_by_torch(weight, bias)
        return lambda x: native(x) if x.shape[0] <= max_rows else by_torch(x)

    def gated_matmul(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Matmul | None:
        """Return None: the activation by itself is as fast."""
        return None

    def pack_linear(self, weight: torch.Tensor) -> torch.Tensor:
        """Return bf16 `weight` [n, k] in the layout of linear.cpp."""
        assert weight.dtype == torch.bfloat16 and weight.stride(1) == 1, (weight.dtype, weight.stride())
        n, k = weight.shape
        packed = torch.empty(self._packed_words(n, k), dtype=torch.int32)
        self._pack_linear(weight.data_ptr(), weight.stride(0), n, k, packed.data_ptr())
        return packed

    def linear(
        self,
        x: torch.Tensor,
        packed: torch.Tensor,
        num_columns: int,
        bias: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Return x W^T (+ bias) [rows, num_columns] for x [rows, k] float32 or bf16, bias float32.

        Accumulates in float32, in an order that does not depend on the number of rows.
        """
        if x.stride(1) != 1:
            x = x.contiguous()
        rows, k = x.shape
        out = torch.empty(rows, num_columns, dtype=out_dtype or x.dtype)
        self._linear(
            x.data_ptr(),
            KERNEL_DTYPES[x.dtype],
            x.stride(0),
            rows,
            packed.data_ptr(),
            num_columns,
            k,
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            KERNEL_DTYPES[out.dtype],
            num_columns,
        )
        return out

    def attention(
        self, batch: int, shape: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """Write k and v into the pool and attend; see attention.cpp. `batch`, `shape`: structures' addresses.

        q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim]; returns [tokens, heads * head_dim].
        """
        tokens, num_heads, head_dim = q.shape
        q, k, v = _whole_heads(q), _whole_heads(k), _whole_heads(v)
        out = torch.empty(tokens, num_heads * head_dim, dtype=q.dtype)
        self._attention(
            batch,
            shape,
            q.data_ptr(),
            q.stride(0),
            k.data_ptr(),
            k.stride(0),
            v.data_ptr(),
            v.stride(0),
            out.data_ptr(),
        )
        return out

    def write_kv(self, batch: int, shape: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write k and v [tokens, kv_heads, head_dim] into the pool, as `attention` does."""
        k, v = _whole_heads(k), _whole_heads(v)
        self._write_kv(batch, shape, k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0))

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return x / rms(x) * weight, x [rows, size]."""
        if x.stride(1) != 1:
            x = x.contiguous()
        rows, size = x.shape
        out = torch.empty(rows, size, dtype=x.dtype)
        code = KERNEL_DTYPES[x.dtype]
        self._rms_norm(
            x.data_ptr(), x.stride(0), None, 0, None, weight.data_ptr(), eps, rows, size, out.data_ptr(), code
        )
        return out

    def add_rms_norm(
        self, x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x + delta, and that normalised; x and delta [rows, size] contiguous."""
        rows, size = x.shape
        assert x.is_contiguous() and delta.is_contiguous(), (x.stride(), delta.stride())
        total, out = torch.empty_like(x), torch.empty_like(x)
        self._rms_norm(
            x.data_ptr(),
            size,
            delta.data_ptr(),
            size,
            total.data_ptr(),
            weight.data_ptr(),
            eps,
            rows,
            size,
            out.data_ptr(),
            KERNEL_DTYPES[x.dtype],
        )
        return total, out

    def rotate_(self, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotate heads [tokens, heads, dim] in place by cos and sin [tokens, 1, dim / 2] (halves layout)."""
        tokens, num_heads, dim = heads.shape
        assert heads.stride(2) == 1 and heads.stride(1) == dim, heads.stride()
        assert cos.stride(0) == sin.stride(0) and cos.stride(2) == 1, (cos.stride(), sin.stride())
        self._rotate(
            heads.data_ptr(),
            heads.stride(0),
            tokens,
            num_heads,
            dim,
            cos.data_ptr(),
            sin.data_ptr(),
            cos.stride(0),
            KERNEL_DTYPES[heads.dtype],
        )
        return heads

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Return silu(gate) * up [rows, size] of gate_up [rows, 2 * size] = [ gate | up ]."""
        assert gate_up.stride(1) == 1, gate_up.stride()
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(rows, size, dtype=gate_up.dtype)
        code = KERNEL_DTYPES[gate_up.dtype]
        self._silu_mul(gate_up.data_ptr(), gate_up.stride(0), rows, size, out.data_ptr(), code)
        return out


def _declare(
    function: Callable[..., int], arguments: list[type], result: type | None = None
) -> Callable[..., int]:
    function.argtypes = arguments  # type: ignore[attr-defined]  # a ctypes function pointer
    function.restype = result  # type: ignore[attr-defined]
    return function


def _whole_heads(heads: torch.Tensor) -> torch.Tensor:
    """Return [tokens, heads, dim] with each token's heads contiguous; tokens may lie apart."""
    _, _, dim = heads.shape
    return heads if heads.stride(2) == 1 and heads.stride(1) == dim else heads.contiguous()
