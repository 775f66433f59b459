"""From a model to stages."""

from pipex.partition.allocator import given_back
from pipex.partition.balance import Balance
from pipex.partition.build import build_stages
from pipex.partition.describe import layout_of, tensors_of, tied
from pipex.partition.empty import empty_model
from pipex.partition.materialize import materialize
from pipex.partition.profile import LayerSplit, profile_layers, profile_split
from pipex.partition.room import room_for
from pipex.partition.skeleton import without_others
from pipex.partition.split import split_model
from pipex.partition.stage import Stage, as_stages

__all__ = [
    "Balance", "LayerSplit", "Stage", "as_stages", "build_stages", "empty_model", "given_back", "layout_of",
    "materialize", "profile_layers", "profile_split", "room_for", "split_model", "tensors_of", "tied", "without_others",
]  # fmt: skip
