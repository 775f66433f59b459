"""Ranks on any hosts, joined through torch.distributed: Gloo for CPU memory, NCCL for GPU memory.

world         the ranks of a run: joining, all-gather of bytes, opening edges, leaving
edges         the two ends of an edge: a checked header goes before every message
watch         who failed: one verdict for all ranks, found by two threads that wait for it
rendezvous    the store that torchrun's environment names
"""

from pipex.transport.group.rendezvous import store_from_environment
from pipex.transport.group.world import GroupWorld

__all__ = ["GroupWorld", "store_from_environment"]
