"""The paper in miniature: train a teacher and its students, judge them, write the table; goes on where it stopped.

python -m sparse_forcing.cli.reproduce --config training/configs/reproduce.yaml --output runs/reproduce \
    --results docs/results/miniature
"""

from __future__ import annotations

import argparse
import sys

from sparse_forcing.cli import run_module
from sparse_forcing.cli.flags import path
from sparse_forcing.files import check_writable
from sparse_forcing.inputs import check_targets, config_inputs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=path, metavar="PATH", required=True, help="YAML file of settings")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change one setting; repeatable")
    parser.add_argument("--output", type=path, metavar="PATH", required=True, help="folder of trainings and rollouts")
    parser.add_argument("--results", type=path, metavar="PATH", required=True, help="folder of the table and the plots")


def run(arguments: argparse.Namespace) -> int:
    """Do what is not done yet, together with other processes that run the same command; returns 0 when everything is
    done, 143 when a training was stopped to be resumed."""
    from sparse_forcing.reproduction.run import Reproduction, read_reproduce_config

    config = read_reproduce_config(arguments.config, arguments.set)
    folders = arguments.output, arguments.results
    check_targets([], [arguments.config], sealed=config_inputs(config)[1], added_to=folders)
    for folder in folders:
        check_writable(folder, folder=True)
    work = Reproduction(config, arguments.output)
    code = work.run()
    if code == 0:
        work.write(arguments.results)
    return code


if __name__ == "__main__":
    sys.exit(run_module("sparse_forcing.cli.reproduce", sys.argv[1:]))
