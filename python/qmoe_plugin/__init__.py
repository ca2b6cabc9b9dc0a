"""Quantised Mixture-of-Experts kernels for ONNX Runtime.

Open a model that has QMoE or MatMulNBits nodes, and run it as any other::

    import qmoe_plugin

    session = qmoe_plugin.session("model.onnx")   # a plain onnxruntime.InferenceSession
    outputs = session.run(None, inputs)

The other names here are the steps that `session` takes, for those who want to take them themselves.
"""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

from qmoe_plugin import formats
from qmoe_plugin.graph.calibrate import calibrate
from qmoe_plugin.graph.fuse import fuse
from qmoe_plugin.graph.prepack import prepack
from qmoe_plugin.graph.quantize import quantize
from qmoe_plugin.graph.retarget import retarget, unretarget
from qmoe_plugin.kernels import explain, kernels
from qmoe_plugin.library import DOMAIN, get_library_path
from qmoe_plugin.session import register, session

try:
    __version__ = _version("qmoe-plugin")
except _PackageNotFoundError:  # a source tree on PYTHONPATH
    __version__ = "0+not.installed"

__all__ = [
    "DOMAIN",
    "__version__",
    "calibrate",
    "explain",
    "formats",
    "fuse",
    "get_library_path",
    "kernels",
    "prepack",
    "quantize",
    "register",
    "retarget",
    "session",
    "unretarget",
]
