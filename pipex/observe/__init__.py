"""What happened, when: events of a run, figures from them, and traces. Never decides anything."""

from pipex.events import Event, Observer
from pipex.observe.measure import Figures, measure
from pipex.observe.recorder import Recorder
from pipex.observe.trace import read_trace, write_trace

__all__ = ["Event", "Figures", "Observer", "Recorder", "measure", "read_trace", "write_trace"]
