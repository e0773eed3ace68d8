import pytest

from cache_service.in_process_transfer import InProcessNetwork, InProcessTransfer
from cache_service.transfer import TransferError
from tests.unit.transfer_contract import TIMEOUT_S, TransferContract


class InProcessHarness:
    def __init__(self):
        self.network = InProcessNetwork()
        self.ends = []

    def open(self):
        self.ends.append(InProcessTransfer(self.network, f"node-{len(self.ends)}"))
        return self.ends[-1]


@pytest.fixture
def harness():
    harness = InProcessHarness()
    yield harness
    for transfer in harness.ends:
        assert transfer.close(TIMEOUT_S)


class TestInProcessTransfer(TransferContract):
    pass


def test_two_ends_of_one_name_are_refused(harness):
    transfer = harness.open()
    with pytest.raises(TransferError, match="node-0 exists already"):
        InProcessTransfer(harness.network, transfer.segment)
