"""TensorBoard's event files, written by tensorboardX. Every event is flushed, so that a killed run leaves a readable file."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reinforce_ada.outside import printable

_LARGEST = 3.4028234663852886e38  # of float32


class EventFile:
    """A new event file in `folder`. Raises: ModuleNotFoundError without tensorboardX, OSError for a folder that cannot be written to."""

    def __init__(self, folder: Path) -> None:
        # SummaryWriter would hand events to a thread, and a killed run would lack its last ones.
        from tensorboardX.event_file_writer import EventsWriter

        folder.mkdir(parents=True, exist_ok=True)
        # An absolute path, since tensorboardX would not take s3: and gs: for folders. The suffix keeps two files of one second apart.
        self._writer = EventsWriter(str(folder.absolute() / "events"), f".{uuid.uuid4().hex[:8]}")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write one event with all of these values; a number past float32 becomes the largest one."""
        from tensorboardX.proto.summary_pb2 import Summary

        numbers = [Summary.Value(tag=printable(tag), simple_value=_float32(value)) for tag, value in values.items()]
        self._write(step=step, summary=Summary(value=numbers))

    def restart(self, step: int) -> None:
        """Mark everything that earlier files of the folder have at `step` and later as about to be written again."""
        from tensorboardX.proto.event_pb2 import SessionLog

        self._write(step=step, session_log=SessionLog(status=SessionLog.START))

    def close(self) -> None:
        self._writer.close()

    def _write(self, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(wall_time=time.time(), **fields))
        self._writer.flush()


def _float32(value: float) -> float:
    """Return the nearest float32 number; nan and the infinities stay as they are."""
    if not -sys.float_info.max <= value <= sys.float_info.max:  # also an integer past float64
        return value if isinstance(value, float) else _LARGEST if value > 0 else -_LARGEST
    return min(max(float(value), -_LARGEST), _LARGEST)
