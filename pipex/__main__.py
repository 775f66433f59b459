"""``python -m pipex`` and ``torchrun -m pipex``."""

import sys

from pipex.cli import main

sys.exit(main())
