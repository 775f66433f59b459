"""The search for the best plan: published orders and planned ones, all judged by the same replay on the true costs.

planner    the search itself
arguments  what it is given, checked
published  candidates that need no planning
space      the placements, with their costs and bounds
sparing    which stages to recompute or offload
rules      variation of the list scheduler's rules
units      whole numbers for the list scheduler
result     what the search answers
"""

from pipex.plan.search.planner import search
from pipex.plan.search.result import Candidate, SearchResult

__all__ = ["Candidate", "SearchResult", "search"]
