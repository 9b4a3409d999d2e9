"""Writes what a run leaves behind while it trains: networks, states and samples."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError
from library.files import atomic
from library.record import saves as save
from library.record.run_file import RunFile
from library.training import state
from library.training.hooks import ema

if TYPE_CHECKING:
    from library.record.metadata import RunMetadata
    from library.training.loop import Run


logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Saver:
    """`samples` draws what is due after so many steps; `facts` are those of the run's states.

    A file that cannot be written now (a full disk) costs a message, not the run: the next one is tried when it is due.
    Only the last one must be there, so what is wrong with that is raised.
    """

    saves: save.SavePlan
    run: Run
    facts: state.Facts
    precision: str | None  # --save_precision
    metadata: RunMetadata
    samples: Callable[[int], None]
    record: RunFile = field(default_factory=RunFile)
    _unwritten: int = 0

    def due(self, step: int) -> None:
        """Write what is due after `step` steps, then remove what retention no longer keeps; draw the samples."""
        self._write(self.saves.due(step), step, ends=step == self.saves.total_steps)

    def last(self, step: int) -> None:
        """The same at the end of a run that ends early, with its last file."""
        self._write(self.saves.due(step, last=True), step, ends=True)

    def best(self, step: int) -> None:
        """Write the network, as it was validated after `step` steps, in the place of the best so far."""
        try:
            self._network(self.saves.best_file, step=step, epoch=self._epoch(step), purpose="validate")
        except UserError as error:
            self._put_up_with(error)

    def _write(self, files: Iterable[save.Due], step: int, *, ends: bool) -> None:
        failure = None
        for due in files:
            last = ends and due.path == self.saves.last_file
            of_network, of_state = self._both(due.path, due.state, step=step, epoch=due.epoch, last=last)
            for error in dict.fromkeys(filter(None, (of_network, of_state))):
                if not last:
                    self._put_up_with(error)
                elif failure is None:
                    failure = error
                else:
                    logger.error("%s", error)
            # nothing goes while what should replace it is not there
            if due.remove is not None and of_network is None:
                atomic.remove(due.remove)
            if due.remove_state is not None and of_state is None:
                state.remove(due.remove_state)
        if ends and self._unwritten:
            logger.warning("%d times a file or state could not be written; see above", self._unwritten)
        if failure is not None:
            raise failure
        try:
            with ema.weights_for(self.run.ema, "sample"):
                self.samples(step)
        except UserError as error:
            self._put_up_with(error)

    def _put_up_with(self, error: UserError) -> None:
        """Raise it where the run cannot go on."""
        if isinstance(error, save.BrokenWeightsError) and self.run.guard.action == "stop":
            raise error
        self._unwritten += 1
        logger.error("%s. Training goes on, and the next file is tried when it is due", error)

    def now(self, step: int) -> None:
        """Write the network and the state as they are after `step` steps, for a run that ends early."""
        path = self.saves.step_file(step)
        errors = self._both(path, save.state_folder(path), step=step, epoch=self._epoch(step), last=True)
        for error in filter(None, errors):
            raise error

    def _both(
        self, path: Path, folder: Path | None, *, step: int, epoch: int, last: bool
    ) -> tuple[UserError | None, UserError | None]:
        """Write the network to `path` and the state to `folder`, each whatever becomes of the other. Returns what went
        wrong with each. Weights that are no numbers any more are in neither."""
        of_network: UserError | None = None
        try:
            self._network(path, step=step, epoch=epoch, last=last)
        except UserError as error:
            of_network = error
        broken = isinstance(of_network, save.BrokenWeightsError) and not of_network.only_in_file
        if folder is None or broken:
            return of_network, of_network if broken and folder is not None else None
        try:
            state.write(folder, self.run, self.facts, step)
        except UserError as error:
            return of_network, error
        self.record.wrote(folder, kind="state", step=step)
        return of_network, None

    def _epoch(self, step: int) -> int:
        return (step - 1) // self.saves.steps_per_epoch

    def _network(self, path: Path, *, step: int, epoch: int, purpose: str = "save", last: bool = False) -> None:
        """`last`: there will be no other try, so what cannot be written to `path` goes where there is room."""
        metadata = self.metadata.at(steps=step, epoch=epoch)
        with ema.weights_for(self.run.ema, purpose):
            try:
                save.save_network(self.run.network, path, precision=self.precision, metadata=metadata)
                self.record.wrote(path, kind="network", step=step)
            except save.BrokenWeightsError:
                raise
            except UserError as error:
                if not last:
                    raise
                elsewhere = Path(tempfile.mkdtemp(prefix="lora-")) / path.name
                try:
                    save.save_network(self.run.network, elsewhere, precision=self.precision, metadata=metadata)
                except UserError:
                    raise error from None
                raise UserError(f"{error}. The network is in {elsewhere} instead: move it to a safe place") from None
