"""Every kernel beside its peers: `gigatrain bench kernels`, whose options this takes.

python benchmarks/kernels.py --op rms_norm
"""

import sys

from gigatrain import cli

if __name__ == "__main__":
    cli.main(["bench", "kernels", *sys.argv[1:]])
