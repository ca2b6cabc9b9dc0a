"""Opens models in ONNX Runtime with our kernels."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir

from qmoe_plugin import override as overriding
from qmoe_plugin import wheels
from qmoe_plugin.devices import CPU, CPU_PROVIDER, CUDA_PROVIDER, Target, best_target, cuda_problem
from qmoe_plugin.graph.apply import apply, load, parse, serialize
from qmoe_plugin.graph.retarget import Retarget
from qmoe_plugin.graph.walk import external_tensors
from qmoe_plugin.library import get_library_path, native, runtime, runtime_minor
from qmoe_plugin.report import logger

if TYPE_CHECKING:
    import onnxruntime

Providers = Sequence[str | tuple[str, dict[str, Any]]]

FOLDER_KEY = "session.model_external_initializers_file_folder_path"
"""The session option that says where external data of a model given as bytes is."""

_registered: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()  # overriding?
_registered_lock = threading.Lock()
_shared_options = threading.Lock()


def session(
    model: str | os.PathLike[str] | bytes | onnx.ModelProto | ir.Model,
    providers: Providers | None = None,
    sess_options: onnxruntime.SessionOptions | None = None,
    provider_options: Sequence[Mapping[str, Any]] | None = None,
    *,
    external_data_dir: str | os.PathLike[str] | None = None,
    override: bool = False,
    **kwargs: object,
) -> onnxruntime.InferenceSession:
    """Opens a model with the nodes of our ops (QMoE, MatMulNBits, ...) run by our kernels.

    The model is retargeted in memory, see `qmoe_plugin.retarget`; nodes that no kernel takes are
    left to ONNX Runtime, with a warning of the logger "qmoe_plugin". Neither `model` nor a file is
    changed, and external data is not read: ONNX Runtime maps it into memory. (Weights inside the
    model's own file are held in memory as long as the session; prefer external data.)

    Args:
        model: Path of a model; or a model as bytes, onnx.ModelProto or onnx_ir.Model. It may have
            been retargeted already.
        providers: As for onnxruntime.InferenceSession. If left out, CUDA if onnxruntime, this build
            of ours and the machine all have it, else the CPU.
        sess_options: As for onnxruntime.InferenceSession. Our library is registered with it, once
            however often it is used here; it must not have been registered by other means than
            `qmoe_plugin.register`.
        provider_options: As for onnxruntime.InferenceSession.
        external_data_dir: Folder of the files with external data, for a model given as bytes or
            onnx.ModelProto; the others know it.
        override: Leave the model as it is, and put our ops in the place of com.microsoft's. Then
            every node of these ops is ours, those too that ONNX Runtime's optimizer makes,
            and one that we cannot run fails the session.
        **kwargs: More arguments of onnxruntime.InferenceSession. `enable_fallback` is 0 here unless
            given: a failure on the GPU is reported, not hidden by a slow session on the CPU.

    Returns:
        A plain onnxruntime.InferenceSession.
    """
    onnxruntime = runtime()
    options = onnxruntime.SessionOptions() if sess_options is None else sess_options
    if providers is None and not options.has_providers():
        providers = [CPU_PROVIDER]
        if best_target() != CPU:
            providers.insert(0, CUDA_PROVIDER)
    target = _target(providers, provider_options)
    if override and target.device == "CUDA" and not target.sm:
        raise RuntimeError(
            f"override would move nodes from {CUDA_PROVIDER} to the CPU, as our kernels cannot run "
            f"there: {cuda_problem(0)}"
        )
    change = None if override else Retarget(target)
    content, folder = _prepare(model, change, external_data_dir, options)
    _register(options, override)
    kwargs.setdefault("enable_fallback", 0)
    with _external_data_folder(options, folder, ours=sess_options is None):
        try:
            made = onnxruntime.InferenceSession(
                content, options, providers, provider_options, **kwargs
            )
        except Exception as error:
            if "already set in registry" in str(error):
                raise RuntimeError(
                    "Our library was registered twice with these SessionOptions. Register it by "
                    "qmoe_plugin.register(), which does it once, or leave it to session()."
                ) from error
            raise
    if target != CPU and CUDA_PROVIDER not in made.get_providers():
        logger.warning(
            "%s could not be started (onnxruntime has printed why), so the session runs on %s",
            CUDA_PROVIDER,
            ", ".join(made.get_providers()),
        )
    return made


def register(sess_options: onnxruntime.SessionOptions, *, override: bool = False) -> None:
    """Registers our library, so that sessions made with these options know our ops.

    Registering again with the same options does nothing.

    Args:
        sess_options: The options.
        override: Put our ops in the place of com.microsoft's, too. See `session`.

    Raises:
        RuntimeError: If this onnxruntime is too old, or, with `override`, newer than we know.
    """
    _register(sess_options, override)


def _register(sess_options: onnxruntime.SessionOptions, override: bool) -> None:
    with _registered_lock:
        if sess_options in _registered:
            if _registered[sess_options] != override:
                raise RuntimeError(
                    "our library was registered with these SessionOptions before, "
                    f"{'without' if override else 'with'} override; use new ones"
                )
            return
        problem = runtime_problem()
        if problem:
            raise RuntimeError(problem)
        problem = _conflict()
        if problem:
            warnings.warn(problem, RuntimeWarning, stacklevel=3)
        if override:
            overriding.check_override()
            sess_options.add_session_config_entry(overriding.CONFIG_KEY, "1")
        sess_options.register_custom_ops_library(get_library_path())
        _registered[sess_options] = override


@functools.cache
def _conflict() -> str:
    """`wheels.conflict`, once a process: it looks through sys.path, which takes a millisecond."""
    return wheels.conflict()


def runtime_problem() -> str:
    """Why this onnxruntime cannot load our library; "" if it can."""
    lowest: int = native().ort_api_range()[0]
    if runtime_minor() < lowest:
        return (
            f"onnxruntime {runtime().__version__} is too old for qmoe_plugin, which needs "
            f"1.{lowest} or newer; upgrade it with pip"
        )
    return ""


def _target(
    providers: Providers | None, provider_options: Sequence[Mapping[str, Any]] | None
) -> Target:
    """What kernels a session with these providers will use."""
    if providers is None:  # the caller's SessionOptions have them, and do not tell
        return best_target()
    index = _cuda_index(providers, provider_options)
    if index is None or CUDA_PROVIDER not in runtime().get_available_providers():
        return CPU
    problem = cuda_problem(index)
    if problem:
        logger.warning(
            "%s is asked for, but our kernels cannot run there: %s", CUDA_PROVIDER, problem
        )
        return Target("CUDA")  # no kernel takes this, so that all nodes are left to onnxruntime
    return best_target(index)


def _cuda_index(
    providers: Providers, provider_options: Sequence[Mapping[str, Any]] | None
) -> int | None:
    """The CUDA device that is asked for; None if it is the CPU."""
    for position, entry in enumerate(providers):
        name, options = entry if isinstance(entry, tuple) else (entry, {})
        if name == CUDA_PROVIDER:
            if provider_options:
                options = {**provider_options[position], **options}
            return int(options.get("device_id", 0))
    return None


def _prepare(
    model: str | os.PathLike[str] | bytes | onnx.ModelProto | ir.Model,
    change: Retarget | None,
    external_data_dir: str | os.PathLike[str] | None,
    options: onnxruntime.SessionOptions,
) -> tuple[str | bytes, Path | None]:
    """What to hand to onnxruntime: a path, or a changed model with the folder of its data."""
    folder = None if external_data_dir is None else Path(external_data_dir)
    if isinstance(model, (str, os.PathLike)):
        path = Path(model)
        if change is None and folder is None:
            return str(path), None
        proto = load(path)
        if not (change and apply(change, proto).moved) and folder is None:
            return str(path), None
        return serialize(proto), folder or path.parent.resolve()
    if isinstance(model, bytes):
        proto = parse(model)
    elif isinstance(model, ir.Model):
        folder = folder or _common_folder(model)
        proto = ir.to_proto(model)
    elif isinstance(model, onnx.ModelProto):
        proto = onnx.ModelProto()
        proto.CopyFrom(model)
    else:
        raise TypeError(
            f"model is a {type(model).__name__}; give a path, bytes, an onnx.ModelProto or an "
            "onnx_ir.Model"
        )
    if folder is None and not _folder_entry(options):
        external = next(external_tensors(ir.from_proto(proto)), None)
        if external is not None:
            raise ValueError(
                f"the model keeps '{external.name}' in the file '{external.location}', and does "
                "not say in which folder; give external_data_dir, or the path of the model"
            )
    if change is not None:
        apply(change, proto)
    return serialize(proto), folder


def _common_folder(model: ir.Model) -> Path | None:
    """The folder of a model's external data."""
    folders = {Path(tensor.base_dir).resolve() for tensor in external_tensors(model)}
    if len(folders) > 1:
        raise ValueError(
            f"the model keeps weights in several folders ({', '.join(map(str, sorted(folders)))}); "
            "save it to one place, and give the path"
        )
    return next(iter(folders), None)


def _folder_entry(options: onnxruntime.SessionOptions) -> str:
    """The folder of external data that the options name; "" if they name none."""
    try:
        return str(options.get_session_config_entry(FOLDER_KEY))
    except RuntimeError:
        return ""


@contextlib.contextmanager
def _external_data_folder(
    options: onnxruntime.SessionOptions, folder: Path | None, *, ours: bool
) -> Iterator[None]:
    """Names the folder of external data for the session that is made meanwhile.

    Options of the caller are afterwards as before: left in place, the entry would make the next
    session that is made with them read its weights from this folder, even if it is opened by its
    own path. For the same reason threads take turns.
    """
    if folder is None:
        yield
    elif ours:
        options.add_session_config_entry(FOLDER_KEY, str(folder.resolve()))
        yield
    else:
        with _shared_options:
            former = _folder_entry(options)
            options.add_session_config_entry(FOLDER_KEY, str(folder.resolve()))
            try:
                yield
            finally:
                options.add_session_config_entry(FOLDER_KEY, former)
