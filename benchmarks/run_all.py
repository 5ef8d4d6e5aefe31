"""Makes every published figure of speed and memory: results/bench_<name>.json, each with a picture beside it.

    python benchmarks/run_all.py            # all; hours, on a quiet machine
    python benchmarks/run_all.py --list     # the commands, without running them
    python benchmarks/run_all.py train decode

What is done already is not done again: delete a result to repeat it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / "results"
ONE = "self_modifying_titans"
HOPE = f"{ONE},{ONE}:momentum=true"
ALL = f"{HOPE},titans,gated_delta_net,delta_net,linear_attention,attention"
SIZE = "--dim 256 --depth 4 --heads 4 --threads 2"

# The goals are a ratio of time to a Transformer at a length, flat cost, and memory: see README.md beside this file.
FIGURES = {
    "train": f"train --mixers {HOPE} --lengths 512,2048,4096,8192 --batch 4 {SIZE} --alternations 5",
    "train_batch_1": f"train --mixers {HOPE} --lengths 2048,32768 --batch 1 {SIZE} --alternations 5",
    "train_mixers": f"train --mixers {ALL} --lengths 512,2048 --batch 4 {SIZE} --alternations 5",
    "prefill": f"prefill --mixers {HOPE} --lengths 512,2048,8192,32768 --batch 1 {SIZE} --alternations 5",
    "decode": f"decode --mixers {HOPE} --lengths 100,2048,8192,32768,100000 --batch 1,8 {SIZE} --alternations 5",
    "decode_batch_1": f"decode --mixers {ONE} --lengths 100,2048,100000 --batch 1 {SIZE} --alternations 5",
    "decode_batch_8": f"decode --mixers {ONE} --lengths 100,2048 --batch 8 {SIZE} --alternations 5",
    "optimizer": "optimizer --dims 128,256,512 --depth 4 --heads 4 --threads 2 --alternations 9",
    # The small preset's matrices, and those of a Transformer of its size, whose steps are nearly all matrix products.
    "optimizer_small": "optimizer --optimizers m3 --dims 320 --depth 6 --heads 5 --threads 2 --alternations 5",
    "optimizer_small_transformer": "optimizer --mixer plain_attention --optimizers m3 --dims 320 --depth 6 --heads 5 "
    "--threads 2 --alternations 5",
}


def command(name: str) -> list[str]:
    """The words of a figure's command, run from the root of the repository."""
    return ["nestlearn", "bench", *shlex.split(FIGURES[name]), "--out", f"results/bench_{name}.json"]


def is_done(name: str) -> bool:
    """Whether the result is there and whole; one of a run that was cut off is not."""
    path = RESULTS / f"bench_{name}.json"
    return path.is_file() and json.loads(path.read_text())["complete"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FIGURES)}; all if none is given")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    arguments = parser.parse_args()
    names = arguments.names or list(FIGURES)
    for name in names:
        if name not in FIGURES:
            parser.error(f"there is no figure {name!r}; expected names among {', '.join(FIGURES)}")
    failed = []
    for name in names:
        print(f"$ {shlex.join(command(name))}", flush=True)
        if arguments.list:
            continue
        if is_done(name):
            print(f"done already: results/bench_{name}.json", flush=True)
            continue
        # The interpreter's own nestlearn, whatever is on the PATH.
        words = [sys.executable, "-m", *command(name)]
        if subprocess.run(words, cwd=RESULTS.parent, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
