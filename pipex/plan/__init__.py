"""Plans: which rank does what, in which order. Pure data and algorithms on the standard library alone.

actions        what a rank can do, and its text form
placement      which rank holds which stage
plan           the orders of all ranks, as immutable data
versions       which version of the weights an action uses
families       the published schedules, by name
costs          what the actions cost
communication  sends and receives between the compute actions, and how many buffers they need
causality      runs orders without a clock: finds deadlocks
offload        when an offloaded activation is away
memory         what a rank holds at its fullest moment
validator      proves a plan before anything runs
simulator      when everything starts and ends under given costs
bubbles        how long a step takes, and for which share of it ranks are idle
measured       a real run in the terms of a simulated one
critical_path  what the makespan hangs on
bounds         what no plan can beat
list_scheduler plans by due dates, in Python and natively
search         the best plan for given costs and memory
layer_costs    what a model's layers cost
chain, cut     where to cut them into stages, by time
fit            the same judged by simulation, under memory limits
view           pictures: text, a page for the browser, a Chrome trace
interop        torch's CSV, Megatron-LM's layouts
"""

from pipex.plan.actions import Action, Kind, parse_action
from pipex.plan.communication import alive, communicate, slots_needed, unfused
from pipex.plan.costs import CostModel, Costs, RankCosts
from pipex.plan.families import FAMILIES, build, options_of
from pipex.plan.placement import Edge, Placement
from pipex.plan.plan import Orders, Plan
from pipex.plan.simulator import Simulation, TimedAction, simulate
from pipex.plan.validator import validate
from pipex.plan.view.text import plan_view, simulation_view

__all__ = [
    "FAMILIES",
    "Action",
    "CostModel",
    "Costs",
    "Edge",
    "Kind",
    "Orders",
    "Placement",
    "Plan",
    "RankCosts",
    "Simulation",
    "TimedAction",
    "alive",
    "build",
    "communicate",
    "options_of",
    "parse_action",
    "plan_view",
    "simulate",
    "simulation_view",
    "slots_needed",
    "unfused",
    "validate",
]
