"""Training-step time of every mixer as a ratio to a plain Transformer; writes a JSON file with all that it ran on.

    python benchmarks/training_step.py results/training_step.json

The sizes are those that results are reported for: width 256, 4 blocks, 4 heads, batch 4, T = 512 and 2048, 2 threads,
fp32, 9 turns. Run it on a quiet machine. Any other size: `nestlearn bench train --help`.
"""

import sys

from nestlearn.cli import app

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    app(["bench", "train", "--alternations", "9", "--out", sys.argv[1]], prog_name="nestlearn")
