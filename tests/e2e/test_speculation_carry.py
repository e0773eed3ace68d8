"""What a slot carries from step to step for its draft is its own request's; drafts tell where it is not."""

import pytest

from tests.harness import Harness, tiny_config, write_tiny_model

FIRST = [(5 * i) % 180 + 3 for i in range(23)]
SECOND = [(7 * i + 11) % 180 + 3 for i in range(19)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def drafted(model, prompts, spoil=lambda speculator: None, **options):
    """Answer prompts in the same slot, one after another; return each one's answer and drafts."""
    config = tiny_config(
        model,
        draft="random-eagle3",
        draft_tokens=3,
        max_running_requests=1,
        prefix_caching=False,
        **options,
    )
    found = []
    with Harness(config) as harness:
        speculator, drafts = harness.engine._speculator, []
        spoil(speculator)
        advance = speculator.advance

        def noted(plan, *arguments):
            verified = advance(plan, *arguments)
            drafts.extend(speculator._state.drafts[plan.slots[row]].tolist() for row in plan.sampled)
            return verified

        speculator.advance = noted
        for number, prompt in enumerate(prompts):
            drafts.clear()
            harness.submit(f"{number}", prompt, max_tokens=12, ignore_eos=True)
            harness.run()
            found.append((harness.answers[f"{number}"].token_ids, list(drafts)))
        harness.idle_pages()
    return found


@pytest.mark.parametrize("max_tokens_per_step", [4, 64])
@pytest.mark.parametrize("graphs", [False, True])
def test_a_request_is_drafted_for_as_if_it_were_the_slot_s_first(model, graphs, max_tokens_per_step):
    options = {"graphs": graphs, "max_tokens_per_step": max_tokens_per_step}
    assert drafted(model, [FIRST, SECOND], **options)[1] == drafted(model, [SECOND], **options)[0]


def test_a_feature_that_another_request_left_is_found_out(model):
    def keep_open(speculator):
        speculator.close = lambda slot: None

    answer, drafts = drafted(model, [FIRST, SECOND], keep_open)[1]
    expected_answer, expected = drafted(model, [SECOND])[0]
    assert answer == expected_answer
    assert drafts != expected


def test_a_chunk_that_does_not_carry_its_last_feature_is_found_out(model):
    def forget(speculator):
        begin = speculator.begin

        def begin_without(plan, *arguments):
            if not plan.sampled:
                speculator._state.carried.zero_()
            return begin(plan, *arguments)

        speculator.begin = begin_without

    answer, drafts = drafted(model, [SECOND], forget, max_tokens_per_step=4)[0]
    expected_answer, expected = drafted(model, [SECOND], max_tokens_per_step=4)[0]
    assert answer == expected_answer
    assert drafts != expected
