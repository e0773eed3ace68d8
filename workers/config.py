"""WorkerConfig: every option of one TP group's workers, validated once, frozen ever after. No torch."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)

PositiveInt = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, config=_STRICT)
class WorkerConfig:
    """Options of one replica. Shared by all its ranks; fields that change KV enter its namespace."""

    model: str = "smollm2-135m"
    """A directory, a .gguf file, a hub id or an alias."""
    load_format: Literal["auto", "dummy"] = "auto"
    """`dummy`: seeded random weights of the model's shape."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: the checkpoint's own; bfloat16 for quantised files."""
    device: Literal["cpu", "cuda"] = "cpu"
    seed: Annotated[int, Field(ge=0)] = 0
    """Of dummy weights and of seeds given to requests that bring none."""
    tp_size: PositiveInt = 1
    page_size: Literal[1, 2, 4, 8, 16, 32, 64] = 16
    num_pages: PositiveInt | None = None
    """Pages a rank owns beside the dummy page; None: what `kv_gb` holds."""
    kv_gb: Annotated[float, Field(gt=0)] = 0.5
    """Device memory for KV pages on each rank, GiB."""
    max_context_len: PositiveInt | None = None
    """None: the model's, as far as the pool holds one such request."""
    max_running_requests: Annotated[int, Field(ge=1, le=4096)] = 32
    max_waiting_requests: Annotated[int, Field(ge=0)] = 256
    max_tokens_per_step: Annotated[int, Field(ge=1)] = 256
    """Token budget of a step: decodes first, prefill chunks fill the rest."""
    attention_backend: Literal["auto", "reference", "native"] = "auto"
    """`native`: the compiled CPU kernels, for attention and all else they know; `reference`: plain torch;
    `auto`: native where they compile, else reference."""
    graphs: bool = True
    """False: every decode step runs eager (the ablation)."""
    graph_batch_sizes: tuple[PositiveInt, ...] | None = None
    """Buckets; None: chosen from max_running_requests."""
    prefix_caching: bool = True
    kv_sanitizer: bool = False
    checked: bool = False
    """Bounds and ownership checks on every staged index."""
    num_threads: Annotated[int, Field(ge=0)] = 0
    """Compute threads of a rank on CPU; 0: cores shared fairly among the ranks of the node."""
    collective_timeout_s: Annotated[float, Field(gt=0)] = 60.0
