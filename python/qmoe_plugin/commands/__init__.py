"""The verbs of the command line, one file each: arguments and printing, no logic."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qmoe_plugin.commands import bench, calibrate, fuse, inspect, install, report, tune, verify

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_commands(commands: Commands) -> None:
    """Adds the verbs of this folder to the parser."""
    for verb in (fuse, calibrate, inspect, verify, bench, report, tune, install):
        verb.add(commands)
