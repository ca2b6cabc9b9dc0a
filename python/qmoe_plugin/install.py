"""Makes a model folder of onnxruntime-genai use our kernels, and undoes it.

Nothing that was in the folder is changed but `genai_config.json`, in one step and at the end: the
retargeted model is a new file beside the old one (they share the files with weights), our library
is copied next to it, and `qmoe_plugin.install.json` says what there was before.
"""

from __future__ import annotations

import dataclasses
import filecmp
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmoe_plugin.devices import CPU, Target, cuda_problem, target
from qmoe_plugin.genai import (
    CONFIG,
    Edit,
    Part,
    get,
    parts,
    put,
    read_config,
    revert,
    write_config,
)
from qmoe_plugin.graph.apply import apply, load, serialize, write
from qmoe_plugin.graph.retarget import Retarget
from qmoe_plugin.library import LIBRARY_NAME, get_library_path
from qmoe_plugin.report import RetargetReport
from qmoe_plugin.whole_file import whole_file

MANIFEST = "qmoe_plugin.install.json"
"""What `install` did to a folder, for `uninstall`."""

_SUFFIX = ".qmoe_plugin.onnx"
_LIBRARY_OPTION = "custom_ops_library"
_CUDA = "cuda"

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Manifest:
    """What is installed in a folder.

    Attributes:
        config: The text of the configuration before.
        edits: What was put into it.
        files: What was put beside it, relative to the folder.
    """

    config: str
    edits: tuple[Edit, ...]
    files: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """That of a folder; None if nothing is installed.

        Raises:
            ValueError: If it is damaged.
        """
        path = folder / MANIFEST
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            edits = tuple(
                Edit(tuple(edit["at"]), edit["new"], tuple(edit["former"]))
                for edit in content["edits"]
            )
            files = tuple(Path(name) for name in content["files"])
            if any(file.is_absolute() or ".." in file.parts for file in files):
                raise ValueError("it names a file outside the folder")
            json.loads(content["config"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error!r}; take the model anew") from None
        return cls(content["config"], edits, tuple(map(str, files)))

    def write(self, folder: Path) -> None:
        """Puts it into a folder."""
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)
        write(text.encode(), folder / MANIFEST)

    def restore(self, config: dict[str, Any]) -> str:
        """Takes the edits out of a configuration; its text, the old one if nothing else changed."""
        for edit in reversed(self.edits):
            revert(config, edit)
        return self.config if json.loads(self.config) == config else write_config(config)


@dataclass(frozen=True)
class PartReport:
    """What was done to one model of the folder.

    Attributes:
        name: As in "decoder".
        source: File name of the model as it was.
        filename: File name of the model that is used now.
        retarget: Which nodes were moved.
    """

    name: str
    source: str
    filename: str
    retarget: RetargetReport

    @property
    def uses_us(self) -> bool:
        """Whether any of its nodes is ours now."""
        return bool(self.retarget.moved or self.retarget.already)


@dataclass(frozen=True)
class InstallReport:
    """What `install` did.

    Attributes:
        folder: The model folder.
        parts: Its models.
        files: What is new in the folder, or would be.
        changed: Whether the folder was changed.
    """

    folder: str
    parts: tuple[PartReport, ...]
    files: tuple[str, ...]
    changed: bool

    @property
    def possible(self) -> bool:
        """Whether there are nodes that our kernels can run."""
        return any(part.uses_us for part in self.parts)

    @property
    def complete(self) -> bool:
        """Whether no node of our ops was left to onnxruntime."""
        return not any(part.retarget.kept for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """As plain dicts and lists, for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """A few lines for people."""
        lines = [f"{part.name} ({part.source}): {part.retarget}" for part in self.parts]
        if self.possible:
            new = "new files" if self.changed else "new files would be"
            lines.append(f"{new}: {', '.join(self.files)}")
        lines.append(f"{self.folder} {'uses qmoe_plugin' if self.changed else 'is as it was'}")
        return "\n".join(lines)


def install(
    folder: PathLike,
    *,
    sm: int | None = None,
    cpu: bool = False,
    strict: bool = False,
    dry_run: bool = False,
) -> InstallReport:
    """Makes a model folder of onnxruntime-genai use our kernels.

    The models that `genai_config.json` names are retargeted (see `qmoe_plugin.retarget`) into new
    files, our library is copied into the folder, and the configuration names both. Installing again
    (after an upgrade, or for another GPU) replaces what was installed before. If no node can be
    moved, the folder stays as it is.

    Args:
        folder: The folder.
        sm: Compute capability of the GPU that it will run on, if the configuration asks for CUDA;
            None for the GPU of this machine.
        cpu: Run on the CPU, whatever provider the configuration asks for.
        strict: Change nothing if any node of our ops would be left to onnxruntime.
        dry_run: Only say what would be done.

    Returns:
        What was done to each model.

    Raises:
        FileNotFoundError: If a file is missing.
        FileExistsError: If another library of this name is there.
        ValueError: If the configuration names another library of custom ops, asks for a provider
            that we have no kernels for, or for CUDA where it cannot be told which GPU.
    """
    folder = Path(folder)
    text, config = read_config(folder)
    before = Manifest.read(folder)
    if before is not None:
        text = before.restore(config)
    found = parts(config)
    targets = _targets(found, sm, cpu)
    reports: list[PartReport] = []
    models: dict[str, bytes] = {}
    edits: list[Edit | None] = []
    for part in found:
        report, model = _retarget(folder, part, targets[part])
        reports.append(report)
        if not report.uses_us:
            continue
        if model is not None:
            models[report.filename] = model
        _refuse_other_library(config, part)
        edits.append(put(config, (*part.at, "filename"), report.filename))
        edits.append(put(config, (*part.options_at, _LIBRARY_OPTION), LIBRARY_NAME))
        if cpu:
            edits.append(put(config, (*part.options_at, "provider_options"), []))
    files = (*models, LIBRARY_NAME, MANIFEST) if edits else ()
    done = InstallReport(str(folder), tuple(reports), files, changed=False)
    if not edits or dry_run or (strict and not done.complete):
        return done
    manifest = Manifest(text, tuple(edit for edit in edits if edit), tuple(models))
    _replace(folder, before, manifest, config, models)
    return dataclasses.replace(done, changed=True)


def uninstall(folder: PathLike, *, dry_run: bool = False) -> list[str]:
    """Undoes `install`.

    Changes that were made to the configuration since then stay.

    Args:
        folder: The folder.
        dry_run: Only say what would be done.

    Returns:
        The files that were removed, or would be.

    Raises:
        ValueError: If nothing is installed, or the configuration still needs what would be removed.
    """
    folder = Path(folder)
    _, config = read_config(folder)
    manifest = Manifest.read(folder)
    if manifest is None:
        raise ValueError(f"{folder} has no {MANIFEST}: qmoe_plugin is not installed there")
    text = manifest.restore(config)
    used = {part.filename for part in parts(config)}
    used |= {get(config, (*part.options_at, _LIBRARY_OPTION)) for part in parts(config)}
    needed = sorted(used.intersection(manifest.files))
    if needed:
        raise ValueError(
            f"{CONFIG} was changed since qmoe_plugin was installed and still names "
            f"{', '.join(needed)}; name what it should use instead, then undo again"
        )
    removed = [name for name in manifest.files if (folder / name).exists()]
    if dry_run:
        return [*removed, MANIFEST]
    write(text.encode(), folder / CONFIG)
    for name in removed:
        (folder / name).unlink()
    (folder / MANIFEST).unlink()
    return [*removed, MANIFEST]


def _replace(
    folder: Path,
    before: Manifest | None,
    manifest: Manifest,
    config: dict[str, Any],
    models: dict[str, bytes],
) -> None:
    """Writes what is new, the configuration last, and removes what was there before.

    In this order, so that an interruption leaves nothing that `uninstall` does not know of.
    """
    library = Path(get_library_path())
    former = before or Manifest(manifest.config, (), ())
    if not _has_library(folder, former.files):
        manifest = dataclasses.replace(manifest, files=(*manifest.files, LIBRARY_NAME))
    both = Manifest(
        manifest.config,
        (*former.edits, *manifest.edits),
        tuple(dict.fromkeys((*former.files, *manifest.files))),
    )
    both.write(folder)
    if LIBRARY_NAME in manifest.files:
        _copy(library, folder / LIBRARY_NAME)
    for name, model in models.items():
        write(model, folder / name)
    write(write_config(config).encode(), folder / CONFIG)
    for stale in set(former.files) - set(manifest.files):
        (folder / stale).unlink(missing_ok=True)
    manifest.write(folder)


def _targets(found: list[Part], sm: int | None, cpu: bool) -> dict[Part, Target]:
    """What each model will run on."""
    if cpu:
        if sm:
            raise ValueError("sm names a GPU, and cpu says that there is none; give one of them")
        return dict.fromkeys(found, CPU)
    if sm and not any(_CUDA in part.providers for part in found):
        raise ValueError(
            f"{CONFIG} does not ask for {_CUDA}, so the models run on the CPU; leave sm out, or "
            'add {"cuda": {}} to provider_options'
        )
    return {part: _target(part, sm) for part in found}


def _target(part: Part, sm: int | None) -> Target:
    others = [name for name in part.providers if name != _CUDA]
    if others:
        raise ValueError(
            f"{part.name} asks for the provider {', '.join(others)}, and our kernels are for the "
            "CPU and CUDA; install for the CPU (cpu=True, --cpu)"
        )
    if not part.providers:
        return CPU
    if sm == 0:
        raise ValueError(f"{part.name} asks for CUDA; to run it on the CPU say cpu=True, --cpu")
    if sm is None and cuda_problem():
        raise ValueError(
            f"{part.name} asks for CUDA, and here {cuda_problem()}; say which GPU it will run on "
            "(sm=90, --sm 90), or install for the CPU (cpu=True, --cpu)"
        )
    return target(sm)


def _retarget(folder: Path, part: Part, where: Target) -> tuple[PartReport, bytes | None]:
    """The report on a model, and the retargeted one; None if it needs no change."""
    path = folder / part.filename
    if not path.is_file():
        raise FileNotFoundError(f"{CONFIG} names {path}, but there is no such file")
    proto = load(path)
    report = apply(Retarget(where), proto)
    if not report.moved:
        return PartReport(part.name, part.filename, part.filename, report), None
    filename = part.filename.removesuffix(".onnx") + _SUFFIX
    return PartReport(part.name, part.filename, filename, report), serialize(proto)


def _refuse_other_library(config: dict[str, Any], part: Part) -> None:
    library = get(config, (*part.options_at, _LIBRARY_OPTION), LIBRARY_NAME)
    if library != LIBRARY_NAME:
        raise ValueError(
            f"{CONFIG} names '{library}' as {_LIBRARY_OPTION} of {part.name}, and "
            "onnxruntime-genai takes one library only"
        )


def _has_library(folder: Path, former: tuple[str, ...]) -> bool:
    """Whether our library lies in the folder, put there by somebody else than we before."""
    path = folder / LIBRARY_NAME
    if LIBRARY_NAME in former or not path.exists():
        return False
    if not filecmp.cmp(path, get_library_path(), shallow=False):
        raise FileExistsError(f"{path} is there already and is another build; remove it")
    return True


def _copy(source: Path, destination: Path) -> None:
    """Copies a file in one step: a process that has the old one loaded keeps it."""
    with whole_file(destination) as partial:
        shutil.copy2(source, partial)
