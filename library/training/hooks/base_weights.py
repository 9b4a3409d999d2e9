"""Switches off what acts in training alone while pictures are rendered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from library.training.hook import Hook
from library.training.run import Run

if TYPE_CHECKING:
    from networks.network import Network


class OffInPictures(Hook[Run]):
    """For frozen networks below the one that is trained: adapters without which a distilled base cannot be trained."""

    name = "off in pictures"

    def __init__(self, networks: Sequence[Network]) -> None:
        self._networks = networks

    @contextmanager
    def weights_for(self, run: Run, purpose: str) -> Iterator[None]:
        with ExitStack() as stack:
            for network in self._networks if purpose == "sample" else ():
                stack.enter_context(network.off())
            yield
