"""Plans and layouts of other systems, read strictly and written so that those systems read them.

files            a plan from whatever file holds it
torch_csv        the CSV of torch.distributed.pipelining, in both of its formats
torch_versions   for which versions of torch a CSV is
torch_lowering   the actions that torch's runtime needs between the compute actions
sidecar          what the CSV cannot say about a plan, in a JSON file beside it
megatron_layout  Megatron-LM's layout string
"""

from pipex.plan.interop.files import read_plan, write_torch_csv
from pipex.plan.interop.megatron_layout import Layout
from pipex.plan.interop.torch_csv import from_torch_csv, to_torch_csv

__all__ = ["Layout", "from_torch_csv", "read_plan", "to_torch_csv", "write_torch_csv"]
