"""The course of a reading: piece after piece, saved now and then, until its end or whatever comes before it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from longread.cli.reading.pieces import Pieces, TokenPiece
from longread.cli.reading.progress import ReadingProgress
from longread.cli.reading.readers import Readers
from longread.cli.reading.session_file import Autosave
from longread.cli.reading.stops import Stop, StopSignals
from longread.loading import OpenModel
from longread.session import TextPrefix


class Course:
    """One reading.

    A piece counts for all readers or for none, and only what counts is saved: whatever ends the reading, and wherever,
    it ends at the last whole piece.
    """

    def __init__(
        self, opened: OpenModel, readers: Readers, saving: Autosave, stops: StopSignals, progress: ReadingProgress
    ) -> None:
        self._opened, self._readers, self._saving = opened, readers, saving
        self._stops, self._progress = stops, progress
        self.pieces_read = 0

    def read_texts(
        self, texts: Iterable[Iterable[str]], begun: TextPrefix | None, *, live: bool
    ) -> KeyboardInterrupt | Exception | None:
        """Reads to the end of the texts, and saves; gives what came before the end, if anything.

        Args:
            begun: what has been read of the texts already.
            live: what comes cannot come again, so what has come is read when a stop finds it waiting for more.
        """
        model = self._opened.model
        pieces = Pieces(
            (self._stops.waiting(text) for text in texts),
            self._opened.tokenizer,
            model.config,
            model.device.type,
            position=self._readers.session.position,
            begun=begun,
        )
        ended: KeyboardInterrupt | Exception | None = None
        try:
            for piece in _until_stopped(pieces, live=live):
                self._read_piece(piece, pieces.share_taken)
            self._readers.finish()
        except (KeyboardInterrupt, Exception) as error:
            ended = error
        if self.pieces_read or ended is None:
            self._saving.save(self._readers.session)
        self._progress.clear()
        return ended

    def _read_piece(self, piece: TokenPiece, share: float) -> None:
        if self._opened.model.device.type == "cpu":
            with self._stops.open():
                found = self._readers.look(piece)
        else:  # a graph that is being captured cannot be left
            found = self._readers.look(piece)
        self._readers.keep(found, piece)
        self.pieces_read += 1
        readers = self._readers
        self._progress.add(len(piece.ids), share, readers.session.position, readers.measurements)
        if self._saving.is_due:
            self._saving.save(readers.session)
            if self._saving.refused:
                self._progress.clear()
                print(f"longread: warning: {self._saving.refused}; {self._saving}", file=sys.stderr)


def _until_stopped(pieces: Pieces, *, live: bool) -> Iterator[TokenPiece]:
    """All pieces; before a stop, where there is nothing left but to wait, what has come."""
    iterator = iter(pieces)
    while True:
        try:
            piece = next(iterator, None)
        except Stop:
            if live and (rest := pieces.rest()):
                yield rest
            raise
        if piece is None:
            return
        yield piece
