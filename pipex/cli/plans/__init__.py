"""The commands about plans: ``schedules``, ``bubble``, ``schedule``, ``plan`` and ``view``. None of them needs torch.

sizes      the options that all share: ranks, micro-batches, costs, memory
figures    what a plan's simulation says, as one JSON object and as text
files      plans in files
"""
