"""`eyrie draft`: what is measured of a draft, and what the commands say, take and refuse."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.__main__ import app
from tests.unit.draft_runs import run_options, silent
from workers.draft_training.measuring import measure
from workers.draft_training.options import EvalOptions, TrainOptions
from workers.draft_training.prompts import hold_out, read_prompts
from workers.draft_training.run import train


def quiet(_: str, num_done: int, num_all: int) -> None:
    pass


@pytest.fixture
def options(tmp_path: Path) -> TrainOptions:
    return run_options(tmp_path)


def test_measuring_counts_what_the_engine_accepts(options: TrainOptions) -> None:
    asked = EvalOptions(
        model=options.model,
        draft="self",
        prompts=options.prompts,
        dtype="float32",
        attention_backend="reference",
        num_threads=1,
        draft_tokens=2,
        batch_sizes=(1, 3),
        max_prompts=4,
        max_answer_tokens=13,
        repeats=1,
    )
    heard: list[tuple[str, int, int]] = []
    found = measure(asked, lambda *told: heard.append(told))
    # without what warms up: two arms, two batch sizes, four prompts; before that 1 + 3 prompts in each arm
    assert heard[-1][1:] == (24, 24) and [done for _, done, _ in heard] == sorted(
        done for _, done, _ in heard
    )
    assert {of for _, _, of in heard} == {24}
    assert [what for what, _, _ in heard if what.startswith("starting")] == [
        "starting the engine with self",
        "starting the engine without a draft",
    ]
    assert found.first_entry is None
    assert found.accept_length == pytest.approx(3.0)
    assert found.rates == found.accepted_rates == [1.0, 1.0]
    assert (found.num_prompts, found.equal_ratio) == (4, 1.0)
    assert [speed.batch_size for speed in found.speeds] == [1, 3]
    tree = measure(replace(asked, draft_topk=2, batch_sizes=(1,)), quiet)
    assert tree.accept_length == pytest.approx(3.0) and tree.equal_ratio == 1.0
    adversary = measure(replace(asked, draft="random-eagle3"), quiet)
    assert adversary.accept_length < 1.5 and adversary.equal_ratio == 1.0


def test_the_engine_accepts_what_the_simulation_of_a_run_foretells(options: TrainOptions) -> None:
    longer = replace(options, max_answer_tokens=120, steps=60, learning_rate=1e-2, evaluate_every=100)
    foretold = train(longer, silent)
    held = hold_out(read_prompts(options.prompts), 4)[1]
    file = options.out / "held_out.jsonl"
    file.write_text("".join(f"{json.dumps({'prompt': chat[0].content})}\n" for chat in held))
    asked = EvalOptions(
        model=options.model,
        draft=str(options.out),
        prompts=(file,),
        dtype="float32",
        attention_backend="reference",
        num_threads=1,
        max_answer_tokens=120,
        repeats=1,
    )
    found = measure(asked, quiet)
    assert found.equal_ratio == 1.0 and foretold.accept_length > 1.3, foretold
    # weights are rounded on the way to the files, and an answer's last round is counted in another way
    assert found.accept_length == pytest.approx(foretold.accept_length, rel=0.03)
    # both say it of the same drafts, and so does the card
    assert found.rates == pytest.approx(foretold.rates, abs=0.1)
    assert len(found.rates) == 3 and found.accepted_rates[0] == found.rates[0]
    card = (options.out / "README.md").read_text()
    assert f"{foretold.rates[0]:.3f}, " in card
    assert "of the drafts at each place whose predecessors were right, the share that was right" in card


@pytest.mark.parametrize("draft", ["self", "random-eagle3"])
def test_what_the_first_tokens_entry_changes_is_measured(options: TrainOptions, draft: str) -> None:
    asked = EvalOptions(
        model=options.model,
        draft=draft,
        prompts=options.prompts,
        attention_backend="reference",
        dtype="float32",
        num_threads=1,
        max_prompts=6,
        max_answer_tokens=24,
        repeats=1,
        first_entry=True,
    )
    found = measure(asked, quiet)
    first = found.first_entry
    assert first is not None and first.num_answers == 6
    # along an answer as the engine goes: what it measures itself
    assert first.seen.accept_length == pytest.approx(found.accept_length, rel=0.06)
    assert (first.seen != first.hidden) == (draft == "self"), "the target cannot do without its first token"


def command(options: TrainOptions, **changes: object) -> list[str]:
    given = {
        "model": options.model,
        "prompts": options.prompts[0],
        "out": options.out,
        "held-out": 4,
        "max-prompt-tokens": 32,
        "max-answer-tokens": 8,
        "draft-vocab-size": 64,
        "steps": 2,
        "kv-gb": 0.01,
        "num-threads": 1,
        "attention-backend": "reference",
        **changes,
    }
    return ["draft", "train", *[f"--{name}={value}" for name, value in given.items()]]


def test_the_command_trains_by_file_and_flags_and_tells_where_it_stands(options: TrainOptions) -> None:
    file = options.out.parent / "run.yaml"
    given = [part.removeprefix("--").split("=", 1) for part in command(options, steps=9)[2:]]
    lines = [f"{name.replace('-', '_')}: {value}\n" for name, value in given if name != "prompts"]
    file.write_text("".join(lines))
    flags = [f"--config={file}", f"--prompts={options.prompts[0]}", "--steps=2", "--json"]
    ended = CliRunner().invoke(app, ["draft", "train", *flags])
    assert ended.exit_code == 0, ended.output
    told = json.loads(ended.stdout.splitlines()[-1])
    assert (told["step"], told["is_done"]) == (2, True), "flags win"
    again = CliRunner().invoke(app, command(options, seed=1))
    assert again.exit_code == 1 and "seed=0, found 1" in again.output


@pytest.mark.slow
def test_the_command_measures_and_says_what_is_what(options: TrainOptions) -> None:
    flags = {"model": options.model, "draft": "self", "prompts": options.prompts[0], "dtype": "float32"}
    flags |= {"max-prompts": 3, "max-answer-tokens": 9, "repeats": 1, "attention-backend": "reference"}
    flags |= {"draft-tokens": 2, "num-threads": 1}
    given = [f"--{name}={value}" for name, value in flags.items()]
    ended = CliRunner().invoke(app, ["draft", "eval", *given, "--first-entry"])
    assert ended.exit_code == 0, ended.output
    for said in (
        "accept length 3.00 with 2 drafts at a time",
        "right by place: 1.000, 1.000: of the drafts at each place whose predecessors were right",
        "accept length with an entry of the first token, as served here: ",
    ):
        assert said in ended.output


@pytest.mark.parametrize(
    ("changes", "exit_code", "message"),
    [
        ({"steps": "many"}, 2, "--steps: many"),
        ({"held-out": 0}, 2, "--held-out: 0"),
        ({"prompts": "/nowhere.txt"}, 1, "/nowhere.txt: cannot be read"),
        ({"model": "no-such-model"}, 1, "no-such-model"),
        ({"held-out": 20}, 1, "leave nothing to train"),
    ],
)
def test_the_command_says_what_is_wrong(options: TrainOptions, changes, exit_code: int, message: str) -> None:
    ended = CliRunner().invoke(app, command(options, **changes))
    assert ended.exit_code == exit_code, ended.output
    assert message in ended.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step: 4", "run.yaml: unknown key `step`; did you mean `steps`?"),
        ("xyzzy: 4", "run.yaml: unknown key `xyzzy`; allowed are model, prompts, out"),
        ("held_out: 0", "run.yaml: `held_out`: 0: Input should be greater than or equal to 1"),
        ("- steps", "run.yaml: found a list at the top"),
        ("steps: [", "run.yaml: not YAML in line"),
    ],
)
def test_what_is_wrong_in_a_file_of_options_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"{text}\n")
    ended = CliRunner().invoke(app, ["draft", "train", f"--config={file}", "--model=m", "--out=o"])
    assert ended.exit_code == 2 and message in ended.output, ended.output


def test_a_file_of_options_may_name_one_value_where_several_are_allowed(options: TrainOptions) -> None:
    file = options.out.parent / "one.yaml"
    file.write_text(
        f"model: {options.model}\ndraft: nowhere\nprompts: {options.prompts[0]}\nbatch_sizes: 1\n"
    )
    result = CliRunner().invoke(app, ["draft", "eval", "--config", str(file)])
    assert "draft 'nowhere': no existing path" in result.output
