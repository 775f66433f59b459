"""What pipex knows of transformers and PEFT: how the files of a model call its tensors, and in which form they keep
them.

Neither package is needed by the rest of pipex, and neither is imported before a model of theirs is there. A ``Card`` is
made from the model before it is cut, and says without it (of which a rank may hold a stage only) how to write and to
read such files.
"""

from pipex.hugging_face.card import Card, Part, card_of, matches
from pipex.hugging_face.conversions import Group
from pipex.hugging_face.models import build, read_configuration

__all__ = ["Card", "Group", "Part", "build", "card_of", "matches", "read_configuration"]
