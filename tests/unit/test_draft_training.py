"""Training runs from prompts to a draft that serves: what they leave, how they go on, what they refuse."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.harness import Harness, tiny_config
from tests.unit.draft_runs import run_options, silent
from workers.card import load_card
from workers.draft_card import read_draft_card
from workers.draft_training import checkpoint
from workers.draft_training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from workers.draft_training.corpus import (
    CorpusError,
    Sample,
    read_corpus,
    read_shard,
    shard_file,
    write_shard,
)
from workers.draft_training.generation import shards, write_corpus
from workers.draft_training.metrics_log import MetricsLog, Record, read_records
from workers.draft_training.options import Dtype, TrainOptions
from workers.draft_training.prompts import PromptError, hold_out, read_prompts
from workers.draft_training.run import RunError, train


@pytest.fixture
def options(tmp_path: Path) -> TrainOptions:
    return run_options(tmp_path)


def weights(options: TrainOptions) -> dict[str, torch.Tensor]:
    return load_file(options.out / "model.safetensors")


def test_a_trained_draft_serves_and_changes_no_answer(options: TrainOptions) -> None:
    outcome = train(options, silent)
    assert outcome.is_done and outcome.step == 4
    card = read_draft_card(str(options.out), load_card(options.model))
    assert (card.kind, card.draft_vocab_size, card.norm_before_residual) == ("eagle3", 64, True)
    assert card.feature_layers == (2, 3, 3), "EAGLE-3's own places in six layers"
    config = tiny_config(Path(options.model), load_format="auto", num_pages=128)
    answers = []
    for draft in (None, str(options.out)):
        with Harness(replace(config, draft=draft)) as harness:
            for place in range(4):
                harness.submit(str(place), [3 + place, 9, 14], max_tokens=20, ignore_eos=True)
            harness.run()
            answers.append({name: answer.token_ids for name, answer in harness.answers.items()})
            kept = harness.scheduler.stats.accept_lengths
    assert answers[0] == answers[1]
    assert sum(kept.values()) > 20, "the draft was asked"


def test_the_files_are_in_the_published_layout(options: TrainOptions) -> None:
    train(options, silent)
    found = weights(options)
    assert found["d2t"].dtype == torch.int64 and found["t2d"].dtype == torch.bool
    ids = torch.arange(64) + found["d2t"]
    assert found["t2d"].nonzero().flatten().equal(ids)
    assert {tensor.dtype for name, tensor in found.items() if name not in ("d2t", "t2d")} == {torch.bfloat16}
    assert "midlayer.hidden_norm.weight" in found and "embed_tokens.weight" not in found
    settings = json.loads((options.out / "config.json").read_text())
    assert settings["norm_before_residual"] is True
    assert "eagle_aux_hidden_state_layer_ids" not in settings
    readme = (options.out / "README.md").read_text()
    assert f"{len(read_corpus(options.out / 'corpus'))} answers" in readme and "4 of 4" in readme
    assert (options.out / "training.svg").read_text().startswith("<svg")


def test_a_run_that_was_cut_off_ends_as_one_that_was_not(options: TrainOptions, tmp_path: Path) -> None:
    whole = replace(options, out=tmp_path / "whole")
    train(whole, silent)
    said: list[str] = []
    outcome = train(replace(options, minutes=1e-9), said.append)
    assert (outcome.step, outcome.is_done) == (0, False), "the time was over before the first step"
    assert load_checkpoint(options.out / "checkpoint") is not None
    half = [2]  # steps until the clock runs out

    def clock_runs_out(text: str) -> None:
        if text.startswith("step 2: accept length") and half.pop():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(replace(options, checkpoint_minutes=1e-9), clock_runs_out)
    state = load_checkpoint(options.out / "checkpoint")
    assert state is not None and state["step"] == 1, "what came behind the last checkpoint is lost"
    assert train(options, silent).is_done
    for name, weight in weights(whole).items():
        assert torch.equal(weights(options)[name], weight), name
    left, right = (load_checkpoint(run.out / "checkpoint") for run in (whole, options))
    assert left is not None and right is not None
    for one, other in zip(left["parameters"], right["parameters"], strict=True):
        assert torch.equal(one, other)
    steps = [record.step for record in read_records(options.out / "metrics.jsonl")]
    assert steps == sorted(steps) and steps[-1] == 4


def test_training_lowers_the_loss_and_makes_more_drafts_right(options: TrainOptions) -> None:
    train(replace(options, steps=60, learning_rate=1e-2, evaluate_every=100), silent)
    first, *_, last = [r for r in read_records(options.out / "metrics.jsonl") if r.loss is not None]
    assert (first.step, last.step) == (20, 60)
    assert last.loss < first.loss - 0.1, "the rest is the random target's own entropy"
    assert last.rates[0] > first.rates[0] + 0.1, (first, last)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_target_of_half_the_width_trains_weights_of_the_whole(options: TrainOptions, dtype: Dtype) -> None:
    narrow = replace(options, dtype=dtype, steps=60, learning_rate=1e-2, evaluate_every=100)
    assert train(narrow, silent).accept_length > 1.3
    state = load_checkpoint(options.out / "checkpoint")
    assert state is not None and {weight.dtype for weight in state["parameters"]} == {torch.float32}


def test_a_run_refuses_other_options_but_those_that_may_change(options: TrainOptions) -> None:
    train(replace(options, steps=1), silent)
    assert train(replace(options, steps=2), silent).step == 2
    with pytest.raises(RunError, match=r"learning_rate=0\.003, found 0\.1; .*another --out"):
        train(replace(options, learning_rate=0.1), silent)
    other = options.out.with_name("other")
    with pytest.raises(PromptError):
        train(replace(options, prompts=(other,), out=other), silent)
    assert train(replace(options, out=other), silent).is_done, "what failed at once leaves no run"
    with pytest.raises(RunError, match="draft_vocab_size is 256; it must be below the model's 256"):
        train(replace(options, draft_vocab_size=256, out=options.out.with_name("third")), silent)


def corpus_of(options: TrainOptions) -> None:
    prompts, held = hold_out(read_prompts(options.prompts), options.held_out)
    write_corpus(options.out, load_card(options.model), options, prompts, held, silent)


def test_answers_go_on_behind_the_last_file_and_are_the_same(options: TrainOptions) -> None:
    corpus_of(options)
    first = [sample.token_ids.tolist() for sample in read_corpus(options.out)]
    assert len(first) == 16
    lost = shard_file(options.out, 1)
    lost.unlink()
    kept = shard_file(options.out, 0).stat().st_mtime_ns
    corpus_of(options)
    assert shard_file(options.out, 0).stat().st_mtime_ns == kept
    assert [sample.token_ids.tolist() for sample in read_corpus(options.out)] == first


def test_the_time_for_generating_ends_at_a_file(options: TrainOptions) -> None:
    corpus_of(replace(options, generate_minutes=1e-9))
    assert sorted(file.name for file in options.out.glob("*.npz")) == ["answers-00000.npz", "held-out.npz"]


def test_held_out_answers_are_greedy_and_others_mixed(options: TrainOptions) -> None:
    corpus_of(options)
    with Harness(tiny_config(Path(options.model), load_format="auto", num_pages=128)) as harness:
        found = read_shard(options.out / "held-out.npz")
        for place, sample in enumerate(found):
            harness.submit(str(place), sample.token_ids[: sample.prompt_len].tolist(), max_tokens=16)
        harness.run()
        for place, sample in enumerate(found):
            assert harness.answers[str(place)].token_ids == sample.token_ids[sample.prompt_len :].tolist()
        mixed = read_corpus(options.out)
        for place, sample in enumerate(mixed):
            harness.submit(f"m{place}", sample.token_ids[: sample.prompt_len].tolist(), max_tokens=16)
        harness.run()
        same = [
            harness.answers[f"m{place}"].token_ids == sample.token_ids[sample.prompt_len :].tolist()
            for place, sample in enumerate(mixed)
        ]
    assert 1 <= sum(same) < len(same), "some are greedy, some sampled"


def test_prompts_of_its_own_and_given_ones_share_the_files(options: TrainOptions) -> None:
    given = read_prompts(options.prompts)
    work = shards(given, replace(options, self_prompts=10))
    assert [len(shard) for shard in work] == [6] * 5
    assert sum(not conversation for shard in work for conversation in shard) == 10
    assert {conversation for shard in work for conversation in shard if conversation} == set(given)
    assert len({sum(not conversation for conversation in shard) for shard in work}) > 1, "shuffled"


def test_shards_keep_tokens_and_a_broken_one_is_named(tmp_path: Path) -> None:
    import numpy as np

    file = shard_file(tmp_path, 3)
    samples = [Sample(np.array([1, 2, 70_000]), 1), Sample(np.array([5, 6]), 2)]
    write_shard(file, samples)
    assert [(s.token_ids.tolist(), s.prompt_len) for s in read_shard(file)] == [
        ([1, 2, 70_000], 1),
        ([5, 6], 2),
    ]
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(CorpusError, match=r"answers-00003\.npz"):
        read_shard(file)


def test_a_checkpoint_is_whole_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_PIECE_BYTES", 1000)
    assert load_checkpoint(tmp_path) is None
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step, "weights": torch.arange(1000)})
    pieces = sorted(tmp_path.glob("*.bin"))
    assert len(pieces) > 8 and all(piece.stat().st_size <= 1000 for piece in pieces)
    assert {piece.name[:12] for piece in pieces} == {"step-0000002"}
    found = load_checkpoint(tmp_path)
    assert found is not None and found["step"] == 2 and torch.equal(found["weights"], torch.arange(1000))
    pieces[1].write_bytes(pieces[1].read_bytes()[::-1])
    with pytest.raises(CheckpointError, match="are not those that were written"):
        load_checkpoint(tmp_path)
    pieces[1].unlink()
    with pytest.raises(CheckpointError, match="copy them all"):
        load_checkpoint(tmp_path)


def test_metrics_behind_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    for step in (1, 2, 3):
        log.add(Record(step, 1.0 / step, [0.5]))
    again = MetricsLog(tmp_path / "metrics.jsonl", 2)
    assert [record.step for record in again.records] == [1, 2]
    assert read_records(tmp_path / "metrics.jsonl") == again.records


def test_the_work_needs_no_ray_and_no_cluster() -> None:
    code = (
        "import sys, workers.draft_training.run, workers.draft_training.measuring;"
        "print([m for m in ('ray', 'cluster', 'transformers', 'typer', 'starlette') if m in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
