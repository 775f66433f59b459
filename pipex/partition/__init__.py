"""From a model to stages."""

from pipex.partition.balance import Balance
from pipex.partition.build import build_stages
from pipex.partition.describe import layout_of, tensors_of, tied
from pipex.partition.empty import empty_model
from pipex.partition.materialize import materialize
from pipex.partition.profile import profile_layers
from pipex.partition.room import room_for
from pipex.partition.skeleton import without_others
from pipex.partition.split import split_model
from pipex.partition.stage import Stage, as_stages

__all__ = [
    "Balance", "Stage", "as_stages", "build_stages", "empty_model", "layout_of", "materialize", "profile_layers",
    "room_for", "split_model", "tensors_of", "tied", "without_others",
]  # fmt: skip
