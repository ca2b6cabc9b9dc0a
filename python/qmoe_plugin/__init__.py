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
from qmoe_plugin.graph.schema import register_schemas as _register_schemas
from qmoe_plugin.inspection import inspect
from qmoe_plugin.install import install, uninstall
from qmoe_plugin.kernels import explain, kernels
from qmoe_plugin.library import DOMAIN, get_library_path
from qmoe_plugin.session import register, session
from qmoe_plugin.verify import verify

try:
    __version__ = _version("qmoe-plugin")
except _PackageNotFoundError:  # a source tree on PYTHONPATH
    __version__ = "0+not.installed"

_register_schemas()

__all__ = [
    "DOMAIN",
    "__version__",
    "calibrate",
    "explain",
    "formats",
    "fuse",
    "get_library_path",
    "inspect",
    "install",
    "kernels",
    "prepack",
    "quantize",
    "register",
    "retarget",
    "session",
    "uninstall",
    "unretarget",
    "verify",
]
