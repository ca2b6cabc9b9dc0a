"""Decoders of models that no exporter writes with MoE nodes, built by hand: Mixtral and Qwen3-MoE.

Their experts are MoE nodes with a separate fc3, as onnxruntime's MoE has it: silu(fc1) * fc3. The
rest is what onnxruntime-genai wants, in the names and ops of its builder.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from transformers import PreTrainedModel

F32 = NDArray[np.float32]

_STOCK = "com.microsoft"
_KINDS = {"mixtral": "mistral", "qwen3_moe": "qwen3"}
"""What genai calls the decoders with the same inputs and outputs."""


def build(model: PreTrainedModel, checkpoint: Path, folder: Path) -> None:
    """Writes a model folder of onnxruntime-genai.

    Args:
        model: Of transformers; gives the weights.
        checkpoint: Has the tokenizer.
        folder: To be made.
    """
    folder.mkdir(parents=True)
    proto = _Decoder(model).proto()
    onnx.checker.check_model(proto)
    onnx.save(proto, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    (folder / "genai_config.json").write_text(json.dumps(_genai_config(model.config), indent=4))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, folder)


class _Decoder:
    """The graph, node by node."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._config = model.config
        self._weights = {name: t.detach().numpy() for name, t in model.state_dict().items()}
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def proto(self) -> onnx.ModelProto:
        config = self._config
        lengths = self._lengths()
        self._rotary_caches()
        x = self._op("Gather", "embed", self._weight("model.embed_tokens.weight"), "input_ids")
        for index in range(config.num_hidden_layers):
            layer = f"model.layers.{index}"
            normed = self._norm(x, f"{layer}.input_layernorm")
            x = self._op("Add", f"{layer}.add", x, self._attention(normed, index, lengths))
            normed = self._norm(x, f"{layer}.post_attention_layernorm")
            x = self._op("Add", f"{layer}.mlp.add", x, self._experts(normed, layer))
        self._product(self._norm(x, "model.norm"), "lm_head", output="logits")
        cache = ["batch_size", config.num_key_value_heads, "{}", config.head_dim]
        batch = ["batch_size", "sequence_length"]
        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, batch),
            helper.make_tensor_value_info(
                "attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"]
            ),
        ]
        logits = [*batch, config.vocab_size]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, logits)]
        for values, name, length in (
            (inputs, "past_key_values", "past_sequence_length"),
            (outputs, "present", "total_sequence_length"),
        ):
            shape = [size if size != "{}" else length for size in cache]
            values += [
                helper.make_tensor_value_info(f"{name}.{index}.{kind}", TensorProto.FLOAT, shape)
                for index in range(config.num_hidden_layers)
                for kind in ("key", "value")
            ]
        graph = helper.make_graph(self._nodes, "decoder", inputs, outputs, self._constants)
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid(_STOCK, 1)]
        return helper.make_model(graph, ir_version=11, opset_imports=opsets)

    def _lengths(self) -> tuple[str, str]:
        """What GroupQueryAttention wants: last positions of each sequence, and the total."""
        one = self._constant("one", np.array([1]))
        count = self._op("ReduceSum", "lengths.count", "attention_mask", one, keepdims=0)
        last = self._op("Sub", "lengths.last", count, one)
        size = self._op("Shape", "lengths.shape", "attention_mask")
        total = self._op("Gather", "lengths.size", size, self._constant("second", np.array(1)))
        narrow = [
            self._op("Cast", f"{name}.narrow", name, to=TensorProto.INT32) for name in (last, total)
        ]
        return narrow[0], narrow[1]

    def _rotary_caches(self) -> None:
        half = self._config.head_dim // 2
        theta = self._config.rope_parameters["rope_theta"]
        frequencies = theta ** (-np.arange(half) / half)
        angles = np.outer(np.arange(self._config.max_position_embeddings), frequencies)
        self._constant("cos_cache", np.cos(angles).astype(np.float32))
        self._constant("sin_cache", np.sin(angles).astype(np.float32))

    def _attention(self, x: str, index: int, lengths: tuple[str, str]) -> str:
        name = f"model.layers.{index}.self_attn"
        heads = self._config.num_attention_heads, self._config.num_key_value_heads
        q, k, v = (self._product(x, f"{name}.{kind}_proj") for kind in "qkv")
        if f"{name}.q_norm.weight" in self._weights:
            q, k = self._head_norm(q, f"{name}.q_norm"), self._head_norm(k, f"{name}.k_norm")
        past = [f"past_key_values.{index}.{kind}" for kind in ("key", "value")]
        present = [f"present.{index}.{kind}" for kind in ("key", "value")]
        output = f"{name}.output"
        self._nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [q, k, v, *past, *lengths, "cos_cache", "sin_cache"],
                [output, *present],
                name,
                domain=_STOCK,
                num_heads=heads[0],
                kv_num_heads=heads[1],
                do_rotary=1,
            )
        )
        return self._product(output, f"{name}.o_proj")

    def _experts(self, x: str, layer: str) -> str:
        name = f"{layer}.mlp.experts"
        logits = self._product(x, f"{layer}.mlp.gate")
        logits = self._op(
            "Reshape",
            f"{layer}.mlp.gate.rows",
            logits,
            self._constant("rows_shape", np.array([-1, self._count()])),
        )
        gates, ups = np.split(self._weights[f"{name}.gate_up_proj"], 2, axis=1)
        parts = {"fc1": gates, "fc2": self._weights[f"{name}.down_proj"], "fc3": ups}
        fc1, fc2, fc3 = (self._constant(f"{name}.{kind}", part) for kind, part in parts.items())
        self._nodes.append(
            helper.make_node(
                "MoE",
                [x, logits, fc1, "", fc2, "", fc3],
                [f"{name}.output"],
                name,
                domain=_STOCK,
                activation_type="silu",
                k=self._config.num_experts_per_tok,
                normalize_routing_weights=1,
            )
        )
        return f"{name}.output"

    def _count(self) -> int:
        """Of the experts."""
        count: int = self._weights["model.layers.0.mlp.gate.weight"].shape[0]
        return count

    def _product(self, x: str, name: str, output: str = "") -> str:
        weight = self._constant(f"{name}.weight", self._weights[f"{name}.weight"].T)
        return self._op("MatMul", name, x, weight, output=output)

    def _norm(self, x: str, name: str) -> str:
        epsilon = self._config.rms_norm_eps
        weight = self._weight(f"{name}.weight")
        return self._op("RMSNormalization", name, x, weight, epsilon=epsilon)

    def _head_norm(self, x: str, name: str) -> str:
        """RMS norm of each head: [batch, sequence, heads * size] as [batch, -1, size]."""
        size = self._config.head_dim
        shape = self._op("Shape", f"{name}.shape", x)
        apart = self._constant("heads_shape", np.array([0, -1, size]))
        heads = self._op("Reshape", f"{name}.heads", x, apart)
        return self._op("Reshape", f"{name}.back", self._norm(heads, name), shape)

    def _weight(self, name: str) -> str:
        return self._constant(name, self._weights[name])

    def _constant(self, name: str, values: NDArray[Any]) -> str:
        if all(tensor.name != name for tensor in self._constants):
            values = np.ascontiguousarray(values)
            self._constants.append(numpy_helper.from_array(values, name))
        return name

    def _op(
        self, op_type: str, name: str, *inputs: str, output: str = "", **attributes: Any
    ) -> str:
        output = output or f"{name}.output"
        self._nodes.append(helper.make_node(op_type, inputs, [output], name, **attributes))
        return output


def _genai_config(config: Any) -> dict[str, Any]:
    """As the builder writes it for such a decoder on the CPU."""
    states = {f"{{}}_{kind}_names": f"{{}}.%d.{kind}" for kind in ("key", "value")}
    past = {name.format("past"): value.format("past_key_values") for name, value in states.items()}
    present = {name.format("present"): value.format("present") for name, value in states.items()}
    return {
        "model": {
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.pad_token_id,
            "context_length": config.max_position_embeddings,
            "type": _KINDS[config.model_type],
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": config.head_dim,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "num_key_value_heads": config.num_key_value_heads,
                "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", **past},
                "outputs": {"logits": "logits", **present},
            },
        },
        "search": {
            "do_sample": False,
            "max_length": config.max_position_embeddings,
            "num_beams": 1,
            "past_present_share_buffer": True,
        },
    }
