"""A tiny model, prompts and options for training runs and measurements of a second."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.harness import write_tiny_model
from workers.card import load_card
from workers.draft_training.options import TrainOptions
from workers.draft_training.published import collected
from workers.models.weights import load_model
from workers.parallel import TPGroup

WORDS = [f"<{word}> <{word * 7 % 250}>" for word in range(3, 23)]


def silent(_: str) -> None:
    pass


def write_model(folder: Path) -> Path:
    """Write a tiny model of random weights, in files."""
    folder = write_tiny_model(folder, num_hidden_layers=6)
    loaded = load_model(
        load_card(str(folder)),
        group=TPGroup.single(),
        device=torch.device("cpu"),
        dtype="float32",
        load_format="dummy",
        seed=5,
    )
    save_file(collected(loaded.decoder.placements()), folder / "model.safetensors")
    return folder


def run_options(folder: Path) -> TrainOptions:
    """Write a model and prompts below `folder`; return options of a short run in it."""
    model = write_model(folder / "model")
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"{word}\n" for word in WORDS))
    return TrainOptions(
        model=str(model),
        prompts=(prompts,),
        out=folder / "run",
        held_out=4,
        attention_backend="reference",
        num_threads=1,
        max_running_requests=4,
        kv_gb=0.01,
        max_prompt_tokens=32,
        max_answer_tokens=16,
        shard_prompts=6,
        draft_vocab_size=64,
        simulated_drafts=3,
        steps=4,
        batch_tokens=128,
        evaluate_every=2,
        learning_rate=3e-3,
    )
