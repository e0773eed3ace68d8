"""A random two-layer model in a folder, and answers of transformers' own."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.harness import TINY_CONFIG, write_tiny_model
from tests.oracle.make_oracle import greedy_tokens
from tests.scenario import Case

NUM_TOKENS = 8


def make_tiny(folder: Path, prompt_lens: Sequence[int], *, common_len: int = 0, seed: int) -> list[Case]:
    """Write the model; return a case for each length, all of which begin with the same tokens."""
    write_tiny_model(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY_CONFIG), dtype=torch.float32).eval()
    model.save_pretrained(folder)
    write_tiny_model(folder)
    generator = torch.Generator().manual_seed(seed)
    common = torch.randint(3, 256, (common_len,), generator=generator).tolist()
    cases = []
    for prompt_len in prompt_lens:
        own = torch.randint(3, 256, (prompt_len - common_len,), generator=generator).tolist()
        cases.append(Case(common + own, *greedy_tokens(model, common + own, NUM_TOKENS)))
    return cases
