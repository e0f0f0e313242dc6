"""Foreign checkpoints, taken up without running what they hold: DeepSpeed's, torch DCP folders, plain torch.save files -> a folder for transformers.

opcodes.py    the instructions of a pickle, run by an interpreter of our own that can build containers, numbers, strings and a few records, and call nothing
archive.py    torch.save's zip archives: where each tensor's bytes lie, read when they are asked for
sources.py    what a folder or file is, and its tensors by name: DCP, DeepSpeed (universal and plain), state dicts
names.py      other systems' names and orders of rows -> transformers'
sandbox.py    the second wall: a process without network, other programs, or writes outside of the target
convert.py    the command
"""
