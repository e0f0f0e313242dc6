"""What ranks are forked with, imported once by their server; the last of what it imports.

Each rank of a foreign model imported transformers and accelerate in 3.3 s. DeepSpeed's first engine imports a Muon decorated with torch.compile, and so
the whole of Inductor, in 3.6 s.
"""

import gc
import os
from importlib import import_module

from gigatrain.kernels import widened

_, _, before = os.environ["PYTHONPATH"].partition(os.pathsep)
os.environ.pop("PYTHONPATH")  # the folder of tests was for this server alone
if before:
    os.environ["PYTHONPATH"] = before
os.environ["DS_ACCELERATOR"] = "cpu"  # or it says on which device it has decided
for name in (
    "torch.distributed.checkpoint",
    "accelerate",
    "transformers.generation.utils",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
):
    import_module(name)
del os.environ["DS_ACCELERATOR"]
if widened.needed():  # as in the process that starts them (conftest.py), or one would differ from the other by how it rounds
    widened.register()
gc.collect()
gc.freeze()  # a collection in a rank would write to, and so copy, every page that it shares with the server: 1.6 s of ZeRO-3's start
