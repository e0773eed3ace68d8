"""Writes a trained draft's card: what it was trained on, how, and what it is worth."""

from dataclasses import dataclass
from pathlib import Path

from workers.draft_training.generation import TEMPERATURES
from workers.draft_training.options import TrainOptions


@dataclass(frozen=True)
class Facts:
    """What a run came to. Coverages: shares of answer tokens that the draft's vocabulary has."""

    model: str
    step: int
    num_steps: int
    num_answers: int
    num_answer_tokens: int
    num_held_out: int
    draft_vocab_size: int
    coverage: float
    held_out_coverage: float
    accept_length: float
    rates: list[float]


def write_readme(folder: Path, facts: Facts, options: TrainOptions) -> None:
    """Write README.md."""
    sources = [f"`{file.name}`" for file in options.prompts]
    if options.self_prompts:
        sources.append(f"at most {options.self_prompts} that it wrote itself")
    rates = ", ".join(f"{rate:.3f}" for rate in facts.rates)
    rows = {
        "Layout": "EAGLE-3: one layer, three taps, the model's embedding shared; bf16",
        "Draft vocabulary": f"{facts.draft_vocab_size} tokens: {facts.coverage:.2%} of those in the answers,"
        f" {facts.held_out_coverage:.2%} of those in the answers held out",
        "Data": f"{facts.num_answers} answers of {facts.num_answer_tokens} tokens that {facts.model} wrote to"
        f" prompts: {', '.join(sources)}",
        "Sampling": f"temperatures {', '.join(map(str, TEMPERATURES))} in equal parts, at most"
        f" {options.max_answer_tokens} tokens",
        "Steps": f"{facts.step} of {facts.num_steps}, at most {options.batch_tokens} tokens each,"
        f" {options.simulated_drafts} drafts simulated one on another",
        "Optimizer": f"AdamW, peak learning rate {options.learning_rate:g}, seed {options.seed}",
        "Accept length": f"{facts.accept_length:.3f} on {facts.num_held_out} held-out prompts, greedy, chains"
        f" of {len(facts.rates)} drafts, the target's own token counted",
        "Right by place": f"{rates}: of the drafts at each place whose predecessors were right, the share"
        " that was right",
        "First token": "has an entry of the draft, with a feature of zeros, as where it serves"
        if options.first_entry
        else "has no entry of the draft, as in most published heads; where it serves it has one",
    }
    lines = [f"# EAGLE-3 draft for {facts.model}", "", *_TEXT_BEFORE.format(facts.model).splitlines(), ""]
    lines += ["| | |", "|---|---|", *[f"| {name} | {value} |" for name, value in rows.items()], ""]
    lines += _TEXT_BEHIND.splitlines()
    (folder / "README.md").write_text("\n".join(lines) + "\n")


_TEXT_BEFORE = "Serve it with `eyrie serve {} --draft DIR`, this folder being DIR."
_TEXT_BEHIND = """\
The figures are of simulated drafting along the target's greedy answers; `eyrie draft eval` measures the
engine. `training.svg` shows the run. The text that it was trained on is the model's own; its prompts come
under their sources' licences.
"""
