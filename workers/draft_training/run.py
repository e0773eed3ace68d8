"""A training run from prompts to a draft, in one folder, that goes on where it was cut off.

corpus/      answers, written first        checkpoint/  to go on from        metrics.jsonl
config.json, model.safetensors, README.md, training.svg: the draft, rewritten with each checkpoint
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter

from workers.card import ModelCard, load_card
from workers.draft_card import read_draft_card
from workers.draft_training.checkpoint import load_checkpoint, save_checkpoint
from workers.draft_training.corpus import Sample, TokenArray, held_out_file, read_corpus, read_shard
from workers.draft_training.draft_readme import Facts, write_readme
from workers.draft_training.generation import write_corpus
from workers.draft_training.metrics_log import MetricsLog, Record
from workers.draft_training.options import TrainOptions
from workers.draft_training.plot import write_plot
from workers.draft_training.prompts import PromptError, hold_out, read_prompts, without
from workers.draft_training.published import collected, draft_config, initial_weights, write_draft
from workers.draft_training.rounds import Evaluated
from workers.draft_training.trainer import Trainer
from workers.draft_training.vocabulary import DraftVocabulary, count_tokens, coverage, most_frequent
from workers.models.decoder import Decoder
from workers.models.draft_weights import load_draft
from workers.models.eagle_draft import Eagle3Draft
from workers.models.weights import load_model
from workers.parallel import TPGroup

_LOG_EVERY = 20
_MAY_CHANGE = (
    "minutes",
    "generate_minutes",
    "steps",
    "checkpoint_minutes",
    "device",
    "attention_backend",
    "num_threads",
    "max_running_requests",
    "kv_gb",
    "evaluate_every",
)
"""Options that a run may change when it goes on: they move no batch and no draw of what is there."""

Progress = Callable[[str], None]


class RunError(Exception):
    """A run cannot start or go on; the message says what to change."""


@dataclass(frozen=True)
class Outcome:
    """Where a run stands. `is_done`: all steps have been taken."""

    step: int
    num_steps: int
    accept_length: float
    rates: list[float]

    @property
    def is_done(self) -> bool:
        """Tell whether there is nothing left to train."""
        return self.step >= self.num_steps


@dataclass(frozen=True)
class _Corpus:
    samples: list[Sample]
    held_out: list[Sample]
    counts: TokenArray


def train(options: TrainOptions, progress: Progress) -> Outcome:
    """Generate what is missing, then train until the steps or the minutes are over; leave a checkpoint and
    the draft as it is by then.

    Raise RunError, PromptError, CorpusError, CheckpointError and ModelError, for the user.
    """
    start_s = time.monotonic()
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    _check_same_run(options)
    card = load_card(options.model)
    if not options.draft_vocab_size < card.vocab_size:
        raise RunError(
            f"draft_vocab_size is {options.draft_vocab_size}; it must be below the model's {card.vocab_size}"
        )
    corpus = _corpus(options, card, progress)
    decoder, draft, vocabulary = _models(options, card, corpus)
    trainer = Trainer(decoder, draft, vocabulary, corpus.samples, options)
    state = load_checkpoint(options.out / "checkpoint")
    if state is not None:
        trainer.restore(state)
    log = MetricsLog(options.out / "metrics.jsonl", trainer.step)
    num_answer_tokens = sum(sample.answer_len for sample in corpus.samples)
    progress(
        f"training on {len(corpus.samples)} answers of {num_answer_tokens / 1e6:.2f} M tokens, steps"
        f" {trainer.step} to {trainer.num_steps}"
    )
    end_s = None if options.minutes is None else start_s + 60 * options.minutes
    evaluated = _train_until(trainer, corpus, options, log, end_s, progress, lambda: _save(trainer, options))
    _save(trainer, options)
    _write_result(trainer, options, card, corpus, vocabulary, log, evaluated)
    return Outcome(trainer.step, trainer.num_steps, evaluated.accept_length, evaluated.rates)


def _train_until(
    trainer: Trainer,
    corpus: _Corpus,
    options: TrainOptions,
    log: MetricsLog,
    end_s: float | None,
    progress: Progress,
    save: Callable[[], None],
) -> Evaluated:
    """Take steps until they or the time are over; return the last evaluation."""
    sums: list[tuple[torch.Tensor, torch.Tensor]] = []
    saved_s = logged_s = time.monotonic()
    evaluated = None
    while trainer.step < trainer.num_steps and (end_s is None or time.monotonic() < end_s):
        sums.append(trainer.train_step())
        evaluated = None
        if trainer.step % _LOG_EVERY == 0 or trainer.step == trainer.num_steps:
            loss = float(torch.stack([loss for loss, _ in sums]).mean())  # waits for the device
            rates = torch.stack([rates for _, rates in sums]).mean(dim=0).tolist()
            now_s = time.monotonic()
            rate = len(sums) * options.batch_tokens / (now_s - logged_s)
            log.add(Record(trainer.step, loss, rates, tokens_per_s=rate))
            logged_s, sums = now_s, []
            shown = " ".join(f"{share:.2f}" for share in rates)
            progress(
                f"step {trainer.step} of {trainer.num_steps}: loss {loss:.3f}, right by place {shown},"
                f" {rate:.0f} tokens/s"
            )
        if trainer.step % options.evaluate_every == 0:
            evaluated = _evaluate(trainer, corpus, log, progress)
            logged_s = time.monotonic()
        if time.monotonic() - saved_s > 60 * options.checkpoint_minutes:
            save()
            saved_s = logged_s = time.monotonic()
    return evaluated or _evaluate(trainer, corpus, log, progress)


def _evaluate(trainer: Trainer, corpus: _Corpus, log: MetricsLog, progress: Progress) -> Evaluated:
    evaluated = trainer.evaluate(corpus.held_out)
    log.add(Record(trainer.step, None, evaluated.rates, evaluated.accept_length))
    progress(
        f"step {trainer.step}: accept length {evaluated.accept_length:.3f} on held-out prompts, chains of"
        f" {len(evaluated.rates)}"
    )
    return evaluated


def _check_same_run(options: TrainOptions) -> None:
    """Raise RunError where the folder holds a run with other options."""
    file = options.out / "run.json"
    adapter = TypeAdapter(TrainOptions)
    if file.exists():
        before, now = (
            adapter.dump_python(adapter.validate_json(file.read_bytes())),
            adapter.dump_python(options),
        )
        changed = [name for name in now if name not in (*_MAY_CHANGE, "out") and before[name] != now[name]]
        if changed:
            raise RunError(
                f"{options.out} holds a run with {changed[0]}={before[changed[0]]}, found {now[changed[0]]};"
                f" a run that goes on may change {', '.join(_MAY_CHANGE)} alone: give"
                " the same, or another --out"
            )


def _note_run(options: TrainOptions) -> None:
    """Say in the folder whose run it is, once there is something to keep."""
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "run.json").write_bytes(TypeAdapter(TrainOptions).dump_json(options, indent=2))


def _corpus(options: TrainOptions, card: ModelCard, progress: Progress) -> _Corpus:
    prompts = read_prompts(options.prompts)
    if options.held_out_prompts is None:
        prompts, held = hold_out(prompts, options.held_out)
    else:
        held = read_prompts([options.held_out_prompts])[: options.held_out]
        prompts = without(prompts, held)
    if not held or not (prompts or options.self_prompts):
        raise PromptError(
            f"{len(prompts) + len(held)} prompts and held_out={options.held_out} leave nothing to train or to"
            " evaluate on; give more prompts, or self_prompts and held_out_prompts"
        )
    _note_run(options)
    folder = options.out / "corpus"
    if not _start(options).exists():  # what training has begun on stays as it is
        write_corpus(folder, card, options, prompts, held, progress)
    samples = [sample for sample in read_corpus(folder) if sample.answer_len > 1]
    held_out = [sample for sample in read_shard(held_out_file(folder)) if sample.answer_len > 1]
    if not samples or not held_out:
        raise RunError(
            f"{folder}: {len(samples)} answers and {len(held_out)} held out are too few to train on"
        )
    return _Corpus(samples, held_out, count_tokens(samples, card.vocab_size))


def _models(
    options: TrainOptions, card: ModelCard, corpus: _Corpus
) -> tuple[Decoder, Eagle3Draft, DraftVocabulary]:
    """Load the target, and the draft to begin with, which is written first if it is not there."""
    device, group = torch.device(options.device), TPGroup.single()
    dtype = "float32" if options.dtype == "auto" and options.device == "cpu" else options.dtype
    loaded = load_model(
        card,
        group=group,
        device=device,
        dtype=dtype,
        load_format=options.load_format,
        seed=options.seed,
        max_context_len=options.max_prompt_tokens + options.max_answer_tokens + 64,  # a batch's padding
    )
    loaded.decoder.requires_grad_(False)
    folder = _start(options).parent
    if not _start(options).exists():
        target_ids = most_frequent(corpus.counts, options.draft_vocab_size)
        vocabulary = DraftVocabulary.of(torch.from_numpy(target_ids), card.vocab_size)
        weights = initial_weights(card, loaded.decoder, vocabulary, options.seed)
        write_draft(folder, draft_config(card, options.draft_vocab_size), weights, vocabulary)
    draft_card = read_draft_card(str(folder), card)
    draft = load_draft(draft_card, loaded.decoder, group=group, device=device, dtype=torch.float32).model
    assert isinstance(draft, Eagle3Draft) and draft.target_id_table is not None, "the folder holds our own"
    return loaded.decoder, draft, DraftVocabulary.of(draft.target_id_table, card.vocab_size)


def _start(options: TrainOptions) -> Path:
    """Name the weights that training begins with."""
    return options.out / "start" / "model.safetensors"


def _save(trainer: Trainer, options: TrainOptions) -> None:
    save_checkpoint(options.out / "checkpoint", trainer.step, trainer.state())


def _write_result(
    trainer: Trainer,
    options: TrainOptions,
    card: ModelCard,
    corpus: _Corpus,
    vocabulary: DraftVocabulary,
    log: MetricsLog,
    evaluated: Evaluated,
) -> None:
    config = draft_config(card, options.draft_vocab_size)
    write_draft(options.out, config, collected(trainer.draft.placements()), vocabulary)
    write_plot(
        options.out / "training.svg",
        f"EAGLE-3 draft for {card.name}",
        [(record.step, record.loss) for record in log.records if record.loss is not None],
        [(record.step, record.accept_length) for record in log.records if record.accept_length is not None],
        options.simulated_drafts,
    )
    target_ids = vocabulary.target_ids.cpu().numpy()
    held_counts = count_tokens(corpus.held_out, card.vocab_size)
    facts = Facts(
        model=card.name,
        step=trainer.step,
        num_steps=trainer.num_steps,
        num_answers=len(corpus.samples),
        num_answer_tokens=sum(sample.answer_len for sample in corpus.samples),
        num_held_out=len(corpus.held_out),
        draft_vocab_size=options.draft_vocab_size,
        coverage=coverage(corpus.counts, target_ids),
        held_out_coverage=coverage(held_counts, np.asarray(target_ids)),
        accept_length=evaluated.accept_length,
        rates=evaluated.rates,
    )
    write_readme(options.out, facts, options)
