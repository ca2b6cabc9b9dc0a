"""How much the columns of each weight matter: the file that `calibrate` writes.

It is a numpy .npz file. The array "names" has the names of weights; the importance of the n-th is
in the array "n", float32 [K], or [E, K] of experts: the mean square of what each column is
multiplied with.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qmoe_plugin.whole_file import whole_file

Array = npt.NDArray[Any]

_NAMES, _VERSION = "names", "qmoe_plugin_calibration"


class Calibration:
    """The importance of the columns of weights, by the names of these."""

    def __init__(self, importance: Mapping[str, Array]) -> None:
        """Takes them.

        Args:
            importance: float32 [K] or [E, K] by the name of a weight.
        """
        self._importance = dict(importance)
        self._used: set[str] = set()

    def of(self, name: str, experts: int, k: int) -> Array | None:
        """The importance of a weight's columns, [E, K]; None if it was not collected.

        Raises:
            ValueError: If it was for a weight of another size.
        """
        found = self._importance.get(name)
        if found is None:
            return None
        self._used.add(name)
        wanted = (experts, k)
        if found.shape not in (wanted, (k,)):
            raise ValueError(
                f"the calibration file has {list(found.shape)} numbers for '{name}', which has "
                f"{experts} x {k} columns; it was made for another model"
            )
        return np.broadcast_to(found, wanted)

    @property
    def unused(self) -> tuple[str, ...]:
        """Names that nobody asked for so far."""
        return tuple(name for name in self._importance if name not in self._used)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a file, which gets its name when it is whole."""
        arrays: dict[str, Any] = {
            str(i): array for i, array in enumerate(self._importance.values())
        }
        arrays[_NAMES] = np.array(list(self._importance), dtype=np.str_)
        arrays[_VERSION] = np.array(1)
        with whole_file(Path(path)) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Reads a file.

        Raises:
            ValueError: If it is none of ours.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                if int(file[_VERSION]) != 1:
                    raise ValueError(f"version {int(file[_VERSION])} is not known")
                names = file[_NAMES].tolist()
                return cls({name: file[str(i)] for i, name in enumerate(names)})
        except (KeyError, ValueError, AttributeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is no file of qmoe_plugin calibrate: {error}") from error
