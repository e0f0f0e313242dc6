"""Checkpoints that are loadable or invisible, of pieces that any mesh takes up.

A save writes everything under a temporary name, syncs it, renames the folder, and writes the commit marker last:

    checkpoints/step-00000040/
        weights-00000.safetensors     fp32 master weights, canonical names: the pieces that rank 0 writes
        optimizer-00000.safetensors   moments, counts
        random-00000.safetensors      generator states
        weights-00001.safetensors     the pieces that rank 1 writes, if it writes any; and so on
        state.json                    step, data position, loss statistics, wall-clock so far
        manifest.json                 run, plan, step; bytes and SHA-256 of every file, hashed while it was written;
                                      of every tensor dtype, whole shape, and the boxes it lies in: file, start, size
        COMMITTED                     SHA-256 of manifest.json

Saves come in two forms that make the same bytes. In one piece (saves.py), when a run begins, ends or is told to leave: saving, like loading, is collective. In
the background (saving.py, background.py): the state is copied at the step's end, and a process beside each rank writes it (writing.py) while training goes on.

Every rank writes its own pieces; rank 0 makes the folder, joins the records into the manifest, renames and commits. What
fails on one rank fails on all, with one message. A load checks marker, manifest, run, every size and every hash (each file by one rank) before a tensor is
used; what fails is named and the one before it is taken. A piece is then put together from every stored box that meets it, so that ranks, mesh and engine of
the save need not be those of the load. Tensors are safetensors, the rest is JSON: opening a checkpoint executes nothing.

Steps that nodes keep in their own memory are near.py's and folder.py's; when there is a save, on either tier, is intervals.py's.
"""

from gigatrain.checkpoint.background import Outcome, Staged, Writer
from gigatrain.checkpoint.files import write_tensors, write_text
from gigatrain.checkpoint.intervals import Intervals, Timed
from gigatrain.checkpoint.near import Near
from gigatrain.checkpoint.reshard import PASSING, fill
from gigatrain.checkpoint.saves import Checkpoints
from gigatrain.checkpoint.saving import Saving
from gigatrain.checkpoint.table import Box, Files, Found, Stored, Tensors, weights_sha256
from gigatrain.data.shards import file_sha256, sync_folder

__all__ = [
    "PASSING",
    "Box",
    "Checkpoints",
    "Files",
    "Found",
    "Intervals",
    "Near",
    "Outcome",
    "Saving",
    "Staged",
    "Stored",
    "Tensors",
    "Timed",
    "Writer",
    "file_sha256",
    "fill",
    "sync_folder",
    "weights_sha256",
    "write_tensors",
    "write_text",
]
