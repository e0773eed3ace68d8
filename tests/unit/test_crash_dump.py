"""A rank that fails leaves a dump, which `eyrie debug dump` shows; neither prompts nor tokens are in it."""

import json
import os
import secrets
import stat
import time

import pytest
from typer.testing import CliRunner

from cluster.__main__ import app
from tests.arena_host import ArenaHost
from tests.harness import bundle_bytes, tiny_config, write_tiny_model
from workers.card import load_card
from workers.crash_dump import MAX_DUMPS, dump_folder, write_dump
from workers.dump_record import DumpError, read_dump
from workers.protocol import ReplicaId, RequestId, SamplingParams, SubmitRequest
from workers.rank import Rank, RankSpec

PROMPT = [101, 102, 103, 104, 105, 106, 107, 108, 109]
ILLEGAL_ACCESS = "CUDA error: an illegal memory access was encountered"


class FailingRunner:
    """A device that fails in its third pass."""

    def __init__(self, runner) -> None:
        self.runner = runner
        self.num_passes = 0

    def plan(self, batch) -> None:
        self.runner.plan(batch)

    def compute(self, batch):
        self.num_passes += 1
        if self.num_passes == 3:
            raise RuntimeError(ILLEGAL_ACCESS)
        return self.runner.compute(batch)


@pytest.fixture(scope="module")
def crashed(tmp_path_factory):
    """The folder that a rank's crash has left a dump in."""
    folder = tmp_path_factory.mktemp("crash")
    model = write_tiny_model(folder / "tiny")
    config = tiny_config(model, graphs=False, max_running_requests=4)
    spec = RankSpec(config, ReplicaId("replica-3"), 0, 7, "127.0.0.1", "127.0.0.1", 0, 1)
    rank = Rank(
        RankSpec(**{**vars(spec), "dump_folder": folder / "dumps"}), cluster_secret=secrets.token_bytes(32)
    )
    engine, scheduler = rank._engine, rank._loop._scheduler
    with ArenaHost(64) as host:
        place = host.place(bundle_bytes(config, load_card(config.model)), 1)
        arena, mover = place.attach(engine, rank._group)
        rank._cache.attach_tier(host, rank._group.moves, "write_through")
        engine._runner = FailingRunner(engine._runner)
        submit = SubmitRequest(RequestId("r"), PROMPT, SamplingParams(temperature=0.0, max_tokens=9))
        scheduler.add(submit, time.monotonic())
        with pytest.raises(RuntimeError, match=ILLEGAL_ACCESS):
            rank.run()
        mover.close()
        arena.close()
    return folder / "dumps"


def show(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["debug", "dump", *map(str, arguments)])
    return result.exit_code, result.output


def test_a_failed_rank_leaves_what_it_knows(crashed) -> None:
    (file,) = crashed.glob("*.json")
    assert file.name.startswith("replica-3-rank0-")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(crashed.stat().st_mode) == 0o700
    found = read_dump(file)
    assert found.error == f"RuntimeError: {ILLEGAL_ACCESS}" and "in compute" in found.traceback
    assert (found.replica, found.rank, found.incarnation) == ("replica-3", 0, 7)
    last = found.plans[-1]
    assert (found.step, last.mode, last.slots, last.starts) == (last.step, "decode", [0], [10])
    assert [plan.lens for plan in found.plans if plan.slots] == [[9], [1], [1]]
    assert found.relocation_version == last.version
    assert found.completed_steps == [last.step - 1]
    assert found.graph_steps == {"extend eager": 1, "decode eager": 2}
    assert found.eager_steps["decode disabled"] == 2
    assert found.rows == {"0": found.rows["0"]} and len(found.rows["0"]) == 3
    held = {page.page: page for page in found.pages}
    assert set(found.rows["0"]) <= set(held) and held[found.rows["0"][0]].state == "OWNED"
    assert held[found.rows["0"][0]].num_leases >= 2, "the row's and the tree's"
    kinds = {op.kind for plan in found.plans for op in plan.ops}
    assert {"OpenSlot", "OwnPages", "SetRow", "CompletePages", "SavePages"} <= kinds
    assert [(move.kind, len(move.statuses)) for move in found.moves] == [("save", 1)] * 2
    assert {"eyrie", "torch", "python"} <= found.versions.keys()
    assert found.config["page_size"] == 4


def test_neither_prompts_nor_tokens_are_in_it(crashed) -> None:
    (file,) = crashed.glob("*.json")
    text = file.read_text()
    assert not any(name in text for name in ("token_ids", "sampling", "101, 102", "101,102"))


def test_it_is_shown(crashed) -> None:
    (file,) = crashed.glob("*.json")
    code, text = show(file)
    assert code == 0
    for said in ("replica-3 rank 0", ILLEGAL_ACCESS, "decode eager", "SavePages of 2", "OWNED", "page_size"):
        assert said in text, said
    found = read_dump(file)
    step = next(plan.step for plan in found.plans if any(op.kind == "SavePages" for op in plan.ops))
    code, text = show(file, "--step", step)
    assert code == 0 and "first_move" in text and "epochs" in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("{", "is no crash dump of Eyrie"),
        ("[1]", "is no crash dump of Eyrie"),
        ("{}", "is no crash dump of Eyrie"),
        ('{"format_version": 99}', "is a crash dump of format 99; this version reads 1"),
        ('{"format_version": 1}', "is damaged"),
    ],
)
def test_what_is_no_dump_is_told_in_a_line(tmp_path, content, said) -> None:
    file = tmp_path / "file.json"
    if content is not None:
        file.write_text(content)
        with pytest.raises(DumpError):
            read_dump(file)
    code, text = show(file)
    assert code == 1 and said in text and len(text.splitlines()) == 1
    assert str(file) in text and "[Errno" not in text


def test_a_step_that_it_has_not_is_told_with_those_it_has(crashed) -> None:
    (file,) = crashed.glob("*.json")
    code, text = show(file, "--step", 999)
    assert code == 1 and "--step is 999" in text and "has the plans of steps 1 to" in text


def test_the_oldest_go_and_a_folder_that_cannot_be_written_hides_no_error(crashed, tmp_path, caplog) -> None:
    (file,) = crashed.glob("*.json")
    for number in range(MAX_DUMPS):
        old = tmp_path / f"old-{number}.json"
        old.write_bytes(file.read_bytes())
        os.utime(old, (number, number))
    with pytest.raises(TypeError):
        write_dump(tmp_path, ValueError("x"))
    blocked = tmp_path / "file"
    blocked.write_text("")
    options = dict.fromkeys(("config", "engine", "group", "cache"))
    assert write_dump(blocked, ValueError("x"), replica="r", incarnation=1, **options) is None
    assert "no crash dump could be written" in caplog.text


def test_dumps_are_each_user_s_own() -> None:
    assert dump_folder().name == f"eyrie-dumps-{os.getuid()}"


def test_a_dump_is_plain_json(crashed) -> None:
    (file,) = crashed.glob("*.json")
    assert json.loads(file.read_text())["format_version"] == 1
