"""TrainOptions and EvalOptions: what `eyrie draft` hands to the process that does the work. No torch."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Backend = Literal["auto", "reference", "native", "flashinfer"]


@dataclass(frozen=True, config=_STRICT)
class TrainOptions:
    """Options of one training run. A run that goes on may change minutes and steps alone."""

    model: str
    """The target: a directory, a .gguf file, a hub id or an alias."""
    prompts: tuple[Path, ...]
    """Files of prompts, JSON lines or plain text; may be none where the model writes its own."""
    out: Path
    """Folder of the run; it goes on with what it finds there."""
    held_out_prompts: Path | None = None
    """A file of prompts to evaluate on. Not given: `held_out` of the prompts, chosen by their hash."""
    held_out: Annotated[int, Field(ge=1, le=4096)] = 128
    """Prompts to evaluate on."""
    self_prompts: Annotated[int, Field(ge=0)] = 0
    """Prompts that the model writes itself, beside those of the files."""
    load_format: Literal["auto", "dummy"] = "auto"
    """Where the target's weights come from; `dummy`: seeded random ones."""
    device: Literal["cpu", "cuda"] = "cpu"
    """What to compute on."""
    dtype: Dtype = "auto"
    """Number format of the target; `auto`: float32 on cpu, its own on cuda."""
    attention_backend: Backend = "auto"
    """Of the engine that generates answers."""
    num_threads: Annotated[int, Field(ge=0)] = 0
    """Compute threads on the CPU; 0: as torch chooses."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of sampling, initial weights and the order of batches."""
    max_running_requests: Count = 32
    """Answers that are generated at the same time."""
    kv_gb: Positive | None = None
    """Device memory for KV pages while answers are generated, GiB."""
    max_prompt_tokens: Count = 512
    """Longer prompts are left out."""
    max_answer_tokens: Count = 256
    """Most tokens of an answer."""
    shard_prompts: Count = 1024
    """Prompts whose answers make one file; a run that is cut off goes on behind the last file."""
    generate_minutes: Positive | None = None
    """Minutes for generating answers; what is there then is trained on. Not given: all prompts."""
    draft_vocab_size: Count = 4096
    """Tokens that the draft knows: the most frequent of the answers."""
    simulated_drafts: Annotated[int, Field(ge=1, le=16)] = 4
    """Tokens drafted one on another in training: the longest chain that the draft learns."""
    first_entry: bool = True
    """Train with the entry of a sequence's first token, as drafts are served here; off: as most heads that
    are published were trained, without it."""
    steps: Count | None = None
    """Optimizer steps in all. Not given: `epochs` of them."""
    epochs: Positive = 10.0
    """Times that each answer is seen."""
    batch_tokens: Count = 16384
    """Tokens of an optimizer step, padding included."""
    learning_rate: Positive = 1e-3
    """At its peak; it rises over the first steps and falls along a cosine."""
    minutes: Positive | None = None
    """Minutes until the run stops with a checkpoint, to go on later. Not given: until it is done."""
    checkpoint_minutes: Positive = 2.0
    """Minutes between two checkpoints."""
    evaluate_every: Count = 200
    """Optimizer steps between two evaluations."""


@dataclass(frozen=True, config=_STRICT)
class EvalOptions:
    """Options of one measurement."""

    model: str
    """The target: a directory, a .gguf file, a hub id or an alias."""
    draft: str
    """The draft: a directory, a hub id or an alias."""
    prompts: tuple[Path, ...]
    """Files of prompts, JSON lines or plain text."""
    load_format: Literal["auto", "dummy"] = "auto"
    """Where weights come from; `dummy`: seeded random ones."""
    device: Literal["cpu", "cuda"] = "cpu"
    """What to compute on."""
    dtype: Dtype = "auto"
    """Number format of weights and KV; `auto`: the checkpoint's own."""
    attention_backend: Backend = "auto"
    """Of the target."""
    draft_attention_backend: Backend = "auto"
    """Of the draft."""
    num_threads: Annotated[int, Field(ge=0)] = 0
    """Compute threads on the CPU; 0: as torch chooses."""
    draft_tokens: Annotated[int, Field(ge=1, le=16)] = 3
    """Tokens that the draft guesses at a time."""
    draft_topk: Annotated[int, Field(ge=1, le=8)] = 1
    """Guesses that it follows for each of these: 1, a chain; more, a tree."""
    batch_sizes: tuple[Count, ...] = (1,)
    """Requests that run at the same time, one measurement for each."""
    max_prompts: Count = 32
    """Prompts that are answered, the files' first."""
    max_answer_tokens: Count = 128
    """Most tokens of an answer."""
    repeats: Count = 3
    """Times that each arm runs, in turn; the median counts."""
    first_entry: bool = False
    """Also tell what it changes that the draft sees an entry of a prompt's first token here, which published
    heads mostly never had: accept lengths with and without it, simulated along the answers."""
