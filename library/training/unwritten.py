"""Files that could not be written during training: each error is logged, and the run continues."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from library.errors import UserError
from library.record.saves import BrokenWeightsError

logger = logging.getLogger(__name__)


@dataclass
class Unwritten:
    """Counts them. `ends_on_broken_weights`: weights that are not finite end the run."""

    ends_on_broken_weights: bool
    count: int = 0

    def put_up_with(self, error: UserError) -> None:
        """Log the error; raise it where the run cannot go on."""
        if isinstance(error, BrokenWeightsError) and self.ends_on_broken_weights:
            raise error
        self.count += 1
        logger.error("%s. Training continues, and the next file is tried when it is due", error)
