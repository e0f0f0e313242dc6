"""What ranks are forked with, imported once by their server; the last of what it imports.

Each rank of a foreign model imported transformers and accelerate in 3.3 s. DeepSpeed's first engine imports a Muon decorated with torch.compile, and so
the whole of Inductor, in 3.6 s.
"""

import gc
import os

import accelerate
import torch.distributed.checkpoint
import transformers.generation.utils
import transformers.modeling_utils
import transformers.models.auto.modeling_auto

os.environ["DS_ACCELERATOR"] = "cpu"  # or it says on which device it has decided
import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer
import deepspeed.runtime.zero.stage3
import deepspeed.runtime.zero.stage_1_and_2

del os.environ["DS_ACCELERATOR"]
gc.collect()
gc.freeze()  # a collection in a rank would write to, and so copy, every page that it shares with the server: 1.6 s of ZeRO-3's start
