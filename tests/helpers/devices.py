"""Where tests can run: always on the CPU, and on the GPU where everything for it is there."""

from __future__ import annotations

import ctypes
import functools

import onnxruntime as ort


@functools.cache
def library_problem() -> str | None:
    """Why the package cannot be tested, or None."""
    try:
        import qmoe_plugin

        ctypes.CDLL(qmoe_plugin.get_library_path())
    except (ImportError, OSError) as error:
        return f"the built package is required (pip install .): {error}"
    return None


@functools.cache
def cuda_problem() -> str | None:
    """What is missing to test on a GPU, or None."""
    if library_problem() is not None:
        return library_problem()
    import qmoe_plugin

    library = ctypes.CDLL(qmoe_plugin.get_library_path())
    if not library.qmoe_plugin_has_cuda():
        return "the library was built without CUDA (nvcc was missing, or QMOE_PLUGIN_CUDA=OFF)"
    if not library.qmoe_plugin_cuda_device_count():
        return "there is no CUDA device, or no driver for it"
    sm = library.qmoe_plugin_cuda_device_sm(0)
    if sm < 80:
        return f"the CUDA device is sm_{sm}; our kernels need sm_80 or newer"
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return "onnxruntime has no CUDAExecutionProvider: install onnxruntime-gpu, not onnxruntime"
    return _provider_problem()


def _provider_problem() -> str | None:
    """Whether the CUDA execution provider loads: onnxruntime falls back to the CPU if not."""
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
    opsets = [helper.make_opsetid("", 21)]
    model = helper.make_model(graph, ir_version=10, opset_imports=opsets)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CUDAExecutionProvider"]
        )
    except Exception as error:
        return f"the CUDA execution provider does not start: {error}"
    if "CUDAExecutionProvider" not in session.get_providers():
        return "the CUDA execution provider does not load; are CUDA 13 and cuDNN 9 installed?"
    return None


def devices() -> list[str]:
    """The devices that tests can run on here."""
    return ["cpu"] if cuda_problem() else ["cpu", "cuda"]
