"""What a tiny model answers while its pool is so small that its pages go to a tier and come back."""

from pathlib import Path

from tests.arena_host import ArenaHost
from tests.harness import Harness, tiny_config, write_tiny_model

NUM_PAGES = 40
NUM_SLOTS = 200
TEXTS = [[1 + (7 * text + 3 * place) % 250 for place in range(64)] for text in range(6)]


def answers(folder: Path, host: ArenaHost | None, **options: object) -> tuple[dict[str, list[int]], Harness]:
    """Greedy answers to texts that come back, each a little longer; and the harness, which is closed."""
    config = tiny_config(write_tiny_model(folder), **({"num_pages": NUM_PAGES} | options))
    with Harness(config, host=host) as harness:
        for turn in range(3):
            for number, text in enumerate(TEXTS):
                harness.submit(f"{turn}.{number}", text[: 40 + 8 * turn], max_tokens=6, ignore_eos=True)
                if number % 2:
                    harness.run()
        harness.run()
        assert harness.idle_pages()["quiescing"] == 0
        assert harness.engine.num_sanitized_steps > 50
    return {name: answer.token_ids for name, answer in harness.answers.items()}, harness
