"""Writes a sample's rows, and adopts its trained package: `python -m training.samples NAME --out FOLDER`.

Owns: this small command line, and how adapters/samples/ is renewed. Training itself is `lorikeet train-adapter`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from training.samples import recipe_of
from training.samples.adopt import SHIPPED, adopt
from training.samples.rows import ALL, write_rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.samples", description=__doc__)
    parser.add_argument("name", choices=sorted(ALL))
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where train.jsonl, eval.jsonl and pictures go"
    )
    parser.add_argument("--rows", type=int, metavar="N", help="training rows, unless the sample's own number")
    parser.add_argument("--eval-rows", type=int, metavar="N", help="held-out rows, from other seeds")
    parser.add_argument(
        "--adopt", type=Path, metavar="RUN", help="take a run's package into adapters/samples"
    )
    args = parser.parse_args()
    if (args.out is None) == (args.adopt is None):
        parser.error("give --out FOLDER to write rows, or --adopt RUN to take a trained package")
    if args.adopt is not None:
        if args.name not in SHIPPED:
            parser.error(
                f"{args.name} is an example and is not shipped; the samples are {', '.join(SHIPPED)}"
            )
        print(adopt(args.name, args.adopt))
        return
    sample = ALL[args.name]
    num_rows = sample.num_rows if args.rows is None else args.rows
    num_eval_rows = sample.num_eval_rows if args.eval_rows is None else args.eval_rows
    train, held_out = write_rows(sample, args.out, num_rows=num_rows, num_eval_rows=num_eval_rows)
    print(f"{num_rows} rows in {train}, {num_eval_rows} held out in {held_out}. Next:")
    print(f"lorikeet train-adapter --recipe {recipe_of(args.name)} --data {train} --eval {held_out}")


if __name__ == "__main__":
    main()
