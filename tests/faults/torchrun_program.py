"""Run by torchrun: rank 1 kills itself in step 2, and the others write what they saw into the folder that is given."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import pipex
from tests.faults.conftest import Saboteur, sigkill, train


def main(diaries: Path) -> None:
    saboteur = Saboteur(diaries, victim=1, place=("at", 2, 5), deed=sigkill)

    def rank_main() -> str:
        saboteur.rank = pipex.current_world().rank
        return train(saboteur, "zb-h1", None)

    pipex.launch(rank_main)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
