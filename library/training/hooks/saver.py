"""Writes networks and states during training."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError
from library.files import atomic
from library.files.index import read_index
from library.out_of_memory import during
from library.record import saves
from library.record.metadata import step_of
from library.record.modelspec import of_embedding
from library.record.run_file import RunFile
from library.record.saves import BrokenWeightsError, Due, SavePlan, state_folder
from library.record.validation_history import History, Validation
from library.training import state
from library.training.hook import Hook
from library.training.run import Run
from library.training.unwritten import Unwritten
from networks import kinds
from networks.formats import loaders

if TYPE_CHECKING:
    from library.record.metadata import RunMetadata

logger = logging.getLogger(__name__)


class Saver(Hook[Run]):
    """On the main process.

    If a file cannot be written (the disk is full), the error is logged and the run continues: the next file is tried
    when it is due. Only the last file must exist, so its errors are raised.
    """

    name = "saver"

    def __init__(
        self,
        saves: SavePlan,
        facts: state.Facts,
        *,
        precision: str | None,
        metadata: RunMetadata,
        unwritten: Unwritten,
        history: History | None,
        record: RunFile,
    ) -> None:
        """`facts`: of the run's states. `precision`: --save_precision. `history`: of the validations. `record`: lists
        the written files."""
        self._history, self._record = history, record
        self.saves, self._facts, self._precision, self._metadata = saves, facts, precision, metadata
        self._unwritten = unwritten

    def save(self, run: Run, step: int, *, last: bool) -> None:
        """Write the files due after `step` steps, then delete those that retention no longer keeps."""
        with during(f"saving after step {step}", done=step):
            self._write(run, self.saves.due(step, last=last), step, ends=last or step == self.saves.total_steps)

    def save_now(self, run: Run, step: int) -> None:
        path = self.saves.step_file(step)
        with during(f"saving after step {step}", done=step):
            errors = self._both(run, path, state_folder(path), step=step, epoch=self._epoch(step), last=True)
        for error in filter(None, errors):
            raise error

    def validated(self, run: Run, result: Validation, *, best: bool) -> None:
        if best:
            self._best(run, result.step)

    def _best(self, run: Run, step: int) -> None:
        """Write the network, as it was validated after `step` steps, in place of the best so far."""
        try:
            self._network(run, self.saves.best_file, step=step, epoch=self._epoch(step), purpose="validate")
        except UserError as error:
            self._unwritten.put_up_with(error)

    def resumed(self, run: Run) -> None:
        """Make the best file of a resumed run that of the best validation so far, or warn that it is not."""
        best, file = None if self._history is None else self._history.best, self.saves.best_file
        if best is None or is_best(best, file):
            return
        if best.step == run.position.done:
            self._best(run, best.step)
        elif file.exists():
            logger.warning(
                "%s is of step %s, and the best validation before the state, at step %d (%.4f), has no file: it is "
                "written when validation improves on that",
                *(file, step_of(file), best.step, best.loss),
            )
        else:
            logger.warning(
                "%s, of the best validation (%.4f at step %d), is missing: it is written when validation improves",
                *(file, best.loss, best.step),
            )

    def _write(self, run: Run, files: Iterable[Due], step: int, *, ends: bool) -> None:
        failure = None
        for due in files:
            last = ends and due.path == self.saves.last_file
            of_network, of_state = self._both(run, due.path, due.state, step=step, epoch=due.epoch, last=last)
            for error in dict.fromkeys(filter(None, (of_network, of_state))):
                if not last:
                    self._unwritten.put_up_with(error)
                elif failure is None:
                    failure = error
                else:
                    logger.error("%s", error)
            # an old file is deleted only after its successor is written
            if due.remove is not None and of_network is None:
                for old in (due.remove, *self.saves.beside(due.remove)):
                    atomic.remove(old)
            if due.remove_state is not None and of_state is None:
                state.remove(due.remove_state)
        if ends and self._unwritten.count:
            logger.warning("%d times a file or state could not be written: see above", self._unwritten.count)
        if failure is not None:
            raise failure

    def _both(
        self, run: Run, path: Path, folder: Path | None, *, step: int, epoch: int, last: bool
    ) -> tuple[UserError | None, UserError | None]:
        """Write the network to `path` and the state to `folder`, independently of each other. Returns the error of
        each. Weights that are not finite are written to neither."""
        of_network: UserError | None = None
        try:
            self._network(run, path, step=step, epoch=epoch, last=last)
        except UserError as error:
            of_network = error
        broken = isinstance(of_network, BrokenWeightsError) and not of_network.only_in_file
        if folder is None or broken:
            return of_network, of_network if broken and folder is not None else None
        try:
            state.write(folder, run, self._facts, step)
        except UserError as error:
            return of_network, error
        self._record.wrote(folder, kind="state", step=step)
        return of_network, None

    def _epoch(self, step: int) -> int:
        return (step - 1) // self.saves.steps_per_epoch

    def _network(
        self, run: Run, path: Path, *, step: int, epoch: int, purpose: str = "save", last: bool = False
    ) -> None:
        """Write the network. `last`: there is no later file, so if `path` cannot be written, another folder is used."""
        metadata = self._metadata.at(steps=step, epoch=epoch)
        with run.weights_for(purpose):
            try:
                apart = self._files(run, path, metadata)
                self._record.wrote(path, kind="network", step=step, loads=self._loads(path) if last else {})
                for own in apart:
                    self._record.wrote(own, kind="embedding", step=step)
            except BrokenWeightsError:
                raise
            except UserError as error:
                if not last:
                    raise
                elsewhere = Path(tempfile.mkdtemp(prefix="lora-")) / path.name
                try:
                    self._files(run, elsewhere, metadata)
                except UserError:
                    raise error from None
                raise UserError(f"{error}. The network is in {elsewhere} instead: move it to a safe place") from None

    def _files(self, run: Run, path: Path, metadata: Mapping[str, str]) -> list[Path]:
        """Write the network to `path`, and its embedding beside that if it has a file of its own, which is returned."""
        saves.save_network(run.network, path, precision=self._precision, metadata=metadata)
        apart = self.saves.beside(path)
        for own in apart:
            assert run.network.embedding is not None, "only that has a file of its own"
            about = of_embedding(metadata)
            saves.save_network(run.network.embedding, own, precision=self._precision, metadata=about)
        return apart

    def _loads(self, path: Path) -> dict[str, int]:
        """Log which programs load the last file, by their rules; the number of its layers that each finds."""
        version = self._metadata.facts.base_model_version
        if not loaders.is_about(version):
            return {}
        shapes = {name: entry.shape for name, entry in read_index(path).entries.items()}
        found = loaders.verdicts(shapes, version=version, more=kinds.tensor_names())
        if not found[0].total:
            return {}
        for line in loaders.in_words(found):
            logger.info("%s: %s", path.name, line)
        return {one.program: one.found for one in found}


def is_best(best: Validation | None, file: Path) -> bool:
    """Whether the file exists and, if its metadata has a step, is of the best validation's step."""
    return best is not None and file.is_file() and step_of(file) in (None, best.step)
