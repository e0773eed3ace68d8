import pytest

from tests.property.fake_group import VOCAB_SIZE, FakeGroup
from workers.protocol import RequestId, SamplingParams, SubmitRequest
from workers.scheduler.admission import (
    BadTokenError,
    PromptTooLongError,
    QueueFullError,
    RequestRefusedError,
)

ONE = SamplingParams(max_tokens=1, ignore_eos=True)


@pytest.mark.parametrize(
    ("token_ids", "sampling", "error", "message"),
    [
        ([], ONE, RequestRefusedError, "token_ids: found an empty prompt"),
        ([1] * 48, ONE, PromptTooLongError, "found 48 prompt tokens, allowed are 47"),
        ([1, -1], ONE, BadTokenError, "token_ids: found token id -1, allowed are 0 to"),
        ([1, VOCAB_SIZE], ONE, BadTokenError, f"token_ids: found token id {VOCAB_SIZE}, allowed are 0 to"),
        ([1], SamplingParams(stop_token_ids=[9999]), BadTokenError, "stop_token_ids: found token id 9999"),
        ([1], SamplingParams(logit_bias=[(-5, 1.0)]), BadTokenError, "logit_bias: found token id -5"),
        ([1], SamplingParams(max_tokens=0), RequestRefusedError, "max_tokens: found 0, allowed is 1 or more"),
    ],
)
def test_a_bad_request_is_refused_by_field_and_leaves_no_trace(token_ids, sampling, error, message):
    group = FakeGroup()
    with pytest.raises(error, match=message) as refused:
        group.submit(token_ids, sampling)
    assert group.scheduler.stats.num_refused == {refused.value.code: 1}
    assert not group.scheduler.has_requests
    assert group.step() is None


def test_codes_are_those_of_the_protocol():
    errors = (RequestRefusedError, QueueFullError, PromptTooLongError, BadTokenError)
    codes = ["bad_request", "queue_full", "prompt_too_long", "bad_token"]
    assert [error.code for error in errors] == codes


def test_a_prompt_that_leaves_room_for_one_token_is_served():
    group = FakeGroup(num_pages=4, page_size=4)
    with pytest.raises(PromptTooLongError, match="found 16 prompt tokens, allowed are 15"):
        group.submit([1] * 16, ONE)
    request = group.submit([1] * 15, SamplingParams(ignore_eos=True))
    group.run()
    assert len(group.streams[request]) == 1


def test_the_queue_is_bounded_and_free_slots_do_not_count():
    group = FakeGroup(max_running=2, max_waiting=3)
    for number in range(5):
        group.submit([number], ONE)
    with pytest.raises(QueueFullError, match="0 requests running and 5 waiting, allowed are 5 together"):
        group.submit([9], ONE)
    group.step()
    group.submit([9], ONE)
    assert group.scheduler.num_waiting == 4  # two slots are free again
    group.run()


def test_without_a_queue_a_free_slot_still_serves():
    group = FakeGroup(max_running=1, max_waiting=0)
    group.submit([1], ONE)
    with pytest.raises(QueueFullError):
        group.submit([2], ONE)
    group.run()
    group.submit([2], ONE)
    group.run()


def test_preempted_requests_do_not_fill_the_queue_for_good():
    group = FakeGroup(max_running=4, max_waiting=1, num_pages=6, page_size=2, max_context_len=12)
    for number in range(4):
        group.submit([number] * 3, SamplingParams(ignore_eos=True))
    group.run()
    assert group.scheduler.stats.num_preemptions > 0
    group.submit([1], ONE)
    group.run()


def test_an_id_in_use_is_refused_and_free_again_afterwards():
    group = FakeGroup()
    submit = SubmitRequest(RequestId("same"), [1], ONE)
    group.scheduler.add(submit, 0.0)
    with pytest.raises(RequestRefusedError, match="request_id: found same, which is in use"):
        group.scheduler.add(submit, 0.0)
    group.scheduler.abort(RequestId("same"))
    group.scheduler.add(submit, 0.0)
