"""Inputs made for a model, from names and shapes as exporters write them."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from qmoe_plugin.sample_inputs import Wanted, sample_inputs

FLOAT, INT = TensorProto.FLOAT16, TensorProto.INT64


def decoder(inputs, window=None, table=50):
    """A graph that embeds input_ids and attends with past states."""
    values = [helper.make_tensor_value_info(name, *rest) for name, *rest in inputs]
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["x"])]
    if window is not None:
        nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                ["x", "x", "x", "past.key"],
                ["y"],
                domain="com.microsoft",
                local_window_size=window,
            )
        )
    weights = helper.make_tensor("table", TensorProto.FLOAT, [table, 1], [0.0] * table)
    graph = helper.make_graph(nodes, "decoder", values, [], [weights])
    return ir.from_proto(helper.make_model(graph, ir_version=10))


GENAI = [
    ("input_ids", INT, ["batch_size", "sequence_length"]),
    ("attention_mask", INT, ["batch_size", "total_sequence_length"]),
    ("position_ids", INT, [3, "batch_size", "sequence_length"]),
    ("past.key", FLOAT, ["batch_size", 2, "past_sequence_length", 8]),
    ("past.conv", FLOAT, ["batch_size", 5]),
    ("hidden", FLOAT, ["batch_size", 6]),
]
MOBIUS = [
    ("input_ids", INT, ["batch", "sequence_len"]),
    ("attention_mask", INT, ["batch", "past_seq_len + seq_len"]),
    ("past.key", FLOAT, ["batch", 2, "past_sequence_len", 8]),
]


def test_as_genai_names_them():
    made = sample_inputs(decoder(GENAI), Wanted(tokens=7))
    assert {name: (array.shape, str(array.dtype)) for name, array in made.items()} == {
        "input_ids": ((1, 7), "int64"),
        "attention_mask": ((1, 7), "int64"),
        "position_ids": ((3, 1, 7), "int64"),
        "past.key": ((1, 2, 0, 8), "float16"),
        "past.conv": ((1, 5), "float16"),
        "hidden": ((1, 6), "float16"),
    }
    assert made["attention_mask"].all()
    assert made["position_ids"][2, 0].tolist() == list(range(7))
    assert not made["past.conv"].any()
    assert made["hidden"].all()
    assert made["input_ids"].max() < 50


def test_as_mobius_names_them():
    made = sample_inputs(decoder(MOBIUS), Wanted(tokens=7))
    assert made["attention_mask"].shape == (1, 7)
    assert made["past.key"].shape == (1, 2, 0, 8)


@pytest.mark.parametrize("inputs", [GENAI, MOBIUS])
def test_given_inputs_say_sizes(inputs):
    key = np.ones((2, 2, 4, 8), np.float16)
    ids = np.zeros((2, 3), np.int64)
    made = sample_inputs(decoder(inputs), Wanted({"past.key": key, "input_ids": ids}))
    assert made["attention_mask"].shape == (2, 7)
    assert made["past.key"] is key


def test_sliding_window():
    inputs = [*GENAI[:3], ("past.key", FLOAT, ["batch_size", 2, "past_sliding_length", 8])]
    made = sample_inputs(decoder(inputs, window=32), Wanted())
    assert made["past.key"].shape == (1, 2, 32, 8)
    with pytest.raises(ValueError, match="past_sliding_length', may have any size"):
        sample_inputs(decoder(inputs), Wanted())


def test_dims_and_seed():
    first, again = (sample_inputs(decoder(GENAI), Wanted(seed=1)) for _ in range(2))
    other = sample_inputs(decoder(GENAI), Wanted(dims={"batch_size": 3}, seed=2))
    np.testing.assert_array_equal(first["input_ids"], again["input_ids"])
    assert other["input_ids"].shape == (3, 8)
    assert other["input_ids"][0].tolist() != first["input_ids"][0].tolist()


def test_input_without_a_shape():
    model = decoder(GENAI)
    model.graph.inputs[0].shape = None
    with pytest.raises(ValueError, match="does not say the type and shape of input 'input_ids'"):
        sample_inputs(model, Wanted())
