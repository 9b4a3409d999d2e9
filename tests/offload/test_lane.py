"""The lane of a GPU, with stand-ins for CUDA's streams: the order of what it asks for. Nothing was run on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from library.offload.lane import CudaLane, lane_of


@pytest.fixture
def asked() -> Iterator[mock.Mock]:
    """All calls of CUDA, in their order."""
    calls = mock.MagicMock()
    calls.cudart().cudaHostRegister.return_value = 0
    calls.reset_mock()
    names = ("Stream", "current_stream", "stream", "cudart")
    with mock.patch.multiple(torch.cuda, **{name: getattr(calls, name) for name in names}):
        yield calls


def test_a_copy_starts_behind_the_computation_and_is_waited_for_on_the_device(asked: mock.Mock) -> None:
    device = torch.device("cuda", 0)
    lane = CudaLane(device)
    target, source = mock.Mock(), mock.Mock()
    asked.attach_mock(target, "target")
    done = lane.copy(target, source)
    names = [name for name, _, _ in asked.mock_calls]
    own = [name for name in names if not name.startswith("cudart")]
    assert own == [
        *("Stream", "current_stream", "Stream().wait_stream", "stream", "stream().__enter__"),
        *("target.copy_", "Stream().record_event", "stream().__exit__"),
    ]
    target.copy_.assert_called_once_with(source, non_blocking=True)
    assert done is asked.Stream().record_event()


def test_registered_memory_is_given_back_with_the_lane(asked: mock.Mock) -> None:
    """It stays pinned as long as the lane, and is never freed while it is."""
    lane = CudaLane(torch.device("cuda", 0))
    memory = lane.registered(1000)
    assert (memory.dtype, len(memory)) == (torch.uint8, 1000)
    asked.cudart().cudaHostRegister.assert_called_once_with(memory.data_ptr(), 1000, 0)
    asked.cudart().cudaHostUnregister.assert_not_called()
    del lane
    asked.cudart().cudaHostUnregister.assert_called_once_with(memory.data_ptr())


def test_memory_that_cannot_be_pinned_is_used_as_it_is(asked: mock.Mock, caplog: pytest.LogCaptureFixture) -> None:
    asked.cudart().cudaHostRegister.return_value = 2
    lane = CudaLane(torch.device("cuda", 0))
    assert len(lane.registered(2048)) == 2048
    assert "2.0 KiB of host memory cannot be pinned (2): copies are slower" in caplog.text
    del lane
    asked.cudart().cudaHostUnregister.assert_not_called()


def test_a_cpu_has_none() -> None:
    assert lane_of(torch.device("cpu")) is None
