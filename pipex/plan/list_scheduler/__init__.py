"""Due-date list scheduling: orders for a loop, v or wave placement under any costs and memory limits, fast.

Every action has a due date (``rule``). Whenever a rank is free, it takes the most urgent action that is ready or will
be soon; if that is not ready yet, it runs what fits before it, else it waits. An F needs memory, and some is kept for
the deeper chunks of its rank; while it has none, it lends its due date to a W. Micro-batches stay in rising order in
every stage and kind. Which rule is best depends on costs, sizes and limits: try several (``PORTFOLIO``), vary the best
one, judge each by ``replay``, and ``improve`` the best orders.

problem      what is to be scheduled, and packed orders
rule         due dates, and the rules to begin with
reference    the scheduler in Python
execution    the replay in Python
improvement  small changes to orders, in Python
native       all three in C++: the same answers, about a hundred times as fast

The functions here are the native ones where pipex._native is built, else the Python.
"""

from pipex.plan.list_scheduler.execution import Replay
from pipex.plan.list_scheduler.native import improve, list_schedule, replay
from pipex.plan.list_scheduler.problem import Packed, Problem, pack, unpack
from pipex.plan.list_scheduler.rule import PORTFOLIO, Rule

__all__ = [
    "PORTFOLIO",
    "Packed",
    "Problem",
    "Replay",
    "Rule",
    "improve",
    "list_schedule",
    "pack",
    "replay",
    "unpack",
]
