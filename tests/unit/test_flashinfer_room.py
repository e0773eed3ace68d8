"""FlashInferAttention has room for the partial results of every bucket, over a fake of the library."""

import pytest
import torch

from tests.unit.test_flashinfer_attention import Staged, attention_over, compared


def test_the_largest_verify_bucket_has_room_for_partial_results() -> None:
    staged = Staged()
    for max_verified in (0, 24):
        attention, _ = attention_over(staged.pool, max_verified=max_verified)
        inputs = staged.bucket("verify", 24)
        if max_verified:
            found, expected = compared(staged, attention, staged.plan(s0=(9, 4), s1=(3, 4)), inputs)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        else:
            with pytest.raises(AssertionError, match="find no room"):
                compared(staged, attention, staged.plan(s0=(9, 4), s1=(3, 4)), inputs)
