"""`dry_run` of the functions, on models in memory; that of the verbs: test_verbs.py."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers.cases import QMoECase
from helpers.moe_cases import MoECase

import qmoe_plugin
from qmoe_plugin.graph.external_data import Discard

pytestmark = pytest.mark.usefixtures("library")


def stock():
    case = QMoECase()
    return case.model(case.tensors(), "com.microsoft")


def ours():
    model = stock()
    qmoe_plugin.retarget(model, sm=0)
    return model


def moe():
    case = MoECase()
    return case.model(case.tensors())


PASSES = {
    "retarget": (qmoe_plugin.retarget, stock),
    "unretarget": (qmoe_plugin.unretarget, ours),
    "prepack": (qmoe_plugin.prepack, stock),
    "fuse": (qmoe_plugin.fuse, moe),
    "quantize": (qmoe_plugin.quantize, moe),
}


@pytest.mark.parametrize("name", PASSES)
def test_models_in_memory_stay(name):
    function, make = PASSES[name]
    model = make()
    before = onnx.ModelProto.FromString(model.SerializeToString())
    report = function(model, dry_run=True)
    assert model == before
    assert all(one.dry_run for one in (report if name == "fuse" else [report]))


@pytest.mark.parametrize("name", ["retarget", "unretarget", "prepack", "fuse"])
def test_a_model_that_would_be_changed_is_refused(name):
    function, make = PASSES[name]
    model = ir.from_proto(make())
    with pytest.raises(TypeError, match="dry_run is for a path, bytes or onnx"):
        function(model, dry_run=True)


def test_bytes():
    report = qmoe_plugin.prepack(stock().SerializeToString(), dry_run=True)
    assert len(report.packed) == 1


def test_what_a_dry_run_keeps():
    """Small tensors, as later passes look at biases; of large ones no bytes, but all are made."""
    store, made = Discard(), []

    def parts():
        for _ in range(4):
            made.append(np.zeros(1 << 20, np.uint8))
            yield made[-1]

    large = store.stream("large", ir.DataType.UINT8, (4, 1 << 20), parts())
    assert (len(made), large.shape, large.dtype) == (4, ir.Shape([4, 1 << 20]), ir.DataType.UINT8)
    with pytest.raises(AssertionError, match="the bytes of 'large' were not kept"):
        large.numpy()
    small = store.add("small", np.arange(3, dtype=np.uint8))
    np.testing.assert_array_equal(small.numpy(), [0, 1, 2])
