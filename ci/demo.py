"""The demonstration that `bash ci/demo` runs: export, retarget, generate, check, time."""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

import qmoe_plugin
from qmoe_plugin import devices, reference

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from models import export  # noqa: E402
from models.runner import Decoder  # noqa: E402

# One MoE layer of gpt-oss-20b.
EXPERTS, TOPK, HIDDEN, INTER, BLOCK = 32, 4, 2880, 2880, 32
GPT_OSS = {
    "activation_type": "swiglu",
    "activation_alpha": 1.702,
    "activation_beta": 1.0,
    "swiglu_limit": 7.0,
    "swiglu_fusion": 1,
    "k": TOPK,
    "normalize_routing_weights": 1,
    "expert_weight_bits": 4,
    "block_size": BLOCK,
}
# Seconds that each timing may take.
TIMING = 2.0


def main() -> None:
    target = devices.best_target()
    providers = ["CPUExecutionProvider"]
    if target.device == "CUDA":
        providers.insert(0, "CUDAExecutionProvider")
    title("qmoe_plugin")
    show("version", f"{qmoe_plugin.__version__} in ONNX Runtime {ort.__version__}")
    show("library", str(Path(qmoe_plugin.get_library_path()).name))
    why_not = "" if target.device == "CUDA" else f" ({devices.cuda_problem()})"
    show("device", f"{target}{why_not}")
    show("kernels", f"{len(qmoe_plugin.kernels())} compiled in (python -m qmoe_plugin kernels)")
    run_exported_model(target, providers)
    run_real_layer(target, providers)
    print(
        "\nRead on: README.md for how to use it, docs/design.md for how it is built and why, and "
        "docs/adding-a-kernel.md to change it."
    )


def run_exported_model(target: devices.Target, providers: list[str]) -> None:
    """Steps 1 to 3: a model from onnxruntime-genai's builder, through `qmoe_plugin.session`."""
    title("1. A model as onnxruntime-genai's builder exports it: gpt-oss, tiny, int4")
    start = time.monotonic()
    exports = export.ensure()
    item = export.by_id("gpt_oss-int4_fp16" if target.device == "CUDA" else "gpt_oss-int4")
    folder = exports.model(item)
    where = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    show("exported", f"{where} ({time.monotonic() - start:.0f} s)")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    ops = [node.op_type for node in model.graph.node if node.domain == "com.microsoft"]
    show("com.microsoft", ", ".join(f"{ops.count(op)} {op}" for op in sorted(set(ops))))

    title("2. Its QMoE and MatMulNBits nodes move to our domain, weights untouched")
    print(qmoe_plugin.retarget(model))

    title("3. It generates in a plain onnxruntime.InferenceSession")
    expected = exports.expected(item)
    session = qmoe_plugin.session(folder / "model.onnx", providers)
    start = time.monotonic()
    tokens, logits = Decoder(session).generate(expected.prompt, len(expected.tokens))
    seconds = time.monotonic() - start
    show("prompt", f"{len(expected.prompt)} tokens: {' '.join(map(str, expected.prompt[:8]))} ...")
    show("ours", " ".join(map(str, tokens)))
    show("PyTorch", " ".join(map(str, expected.tokens)))
    # After the first differing token (rounding may flip one in float16) the texts part.
    differs = [mine != theirs for mine, theirs in zip(tokens, expected.tokens, strict=True)]
    same = differs.index(True) if any(differs) else len(tokens)
    compared = slice(0, len(expected.prompt) + min(same, len(tokens) - 1))
    error = np.abs(logits[compared] - expected.logits[compared]).max()
    show(
        "agreement",
        f"{same} of {len(tokens)} tokens; largest difference of a logit {error:.1e} "
        f"(their standard deviation: {expected.logits.std():.2f})",
    )
    show("time", f"{seconds * 1e3:.0f} ms")


def run_real_layer(target: devices.Target, providers: list[str]) -> None:
    """Steps 4 and 5: one layer in its real size, against the float64 oracle and the stock op."""
    dtype = np.dtype(np.float16 if target.device == "CUDA" else np.float32)
    size = EXPERTS * 3 * INTER * HIDDEN / 2 / 1e6
    title(
        f"4. One MoE layer in gpt-oss-20b's size: {EXPERTS} experts, {TOPK} a token, "
        f"{HIDDEN} x {INTER}, int4 blocks of {BLOCK}, {size:.0f} MB, {dtype}"
    )
    rng = np.random.default_rng(0)
    weights = layer_weights(rng, dtype)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "layer.onnx"
        save_layer(weights, dtype, path)
        ours = qmoe_plugin.session(path, providers, quiet_options())
        try:
            stock = ort.InferenceSession(path, quiet_options(), providers=providers)
        except Exception as error:  # a stock build without this kernel: nothing to compare with
            stock = None
            show("stock op", f"refused: {str(error).splitlines()[0][:120]}")
        tokens = {count: layer_inputs(rng, count, dtype) for count in (1, 64)}
        expected = oracle(weights, tokens[1])
        scale = np.sqrt(np.mean(expected**2))
        for name, session in (("ours", ours), ("stock op", stock)):
            if session is not None:
                error = np.abs(session.run(None, tokens[1])[0] - expected).max() / scale
                show(name, f"largest error against the float64 oracle: {error:.1e} of the rms")

        title("5. Its time")
        print(f"  {'tokens':>8}  {'ours':>10}  {'stock op':>10}  {'speed-up':>9}")
        for count, feeds in tokens.items():
            mine = median_time(ours, feeds, target)
            other = median_time(stock, feeds, target) if stock is not None else float("nan")
            print(
                f"  {count:>8}  {mine * 1e3:>7.2f} ms  {other * 1e3:>7.2f} ms  "
                f"{other / mine:>8.2f}x"
            )


def layer_weights(rng: np.random.Generator, dtype: np.dtype) -> dict[str, np.ndarray]:
    """Random codes; scales that keep the activations at about unit size."""

    def codes(n: int, k: int) -> np.ndarray:
        return np.frombuffer(rng.bytes(EXPERTS * n * k // 2), np.uint8).reshape(EXPERTS, n, k // 2)

    def scales(n: int, k: int) -> np.ndarray:
        spread = rng.uniform(0.5, 1.5, (EXPERTS, n, k // BLOCK))
        return (spread / (4.6 * np.sqrt(k))).astype(dtype)

    def bias(n: int) -> np.ndarray:
        return (0.1 * rng.standard_normal((EXPERTS, n))).astype(dtype)

    return {
        "fc1_experts_weights": codes(2 * INTER, HIDDEN),
        "fc1_scales": scales(2 * INTER, HIDDEN),
        "fc1_experts_bias": bias(2 * INTER),
        "fc2_experts_weights": codes(HIDDEN, INTER),
        "fc2_scales": scales(HIDDEN, INTER),
        "fc2_experts_bias": bias(HIDDEN),
    }


def save_layer(weights: dict[str, np.ndarray], dtype: np.dtype, path: Path) -> None:
    """A model of one com.microsoft QMoE node, weights as external data."""
    kind = helper.np_dtype_to_tensor_dtype(dtype)
    names = ["input", "router_probs", *weights]
    node = helper.make_node(
        "QMoE", names, ["output"], name="layer", domain="com.microsoft", **GPT_OSS,
        **({"weights_prepacked": 0} if dtype == np.float16 else {}),
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "layer",
        [
            helper.make_tensor_value_info("input", kind, ["tokens", HIDDEN]),
            helper.make_tensor_value_info("router_probs", kind, ["tokens", EXPERTS]),
        ],
        [helper.make_tensor_value_info("output", kind, ["tokens", HIDDEN])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, ir_version=10, opset_imports=opsets)
    onnx.save_model(model, path, save_as_external_data=True, location="layer.data")


def layer_inputs(rng: np.random.Generator, tokens: int, dtype: np.dtype) -> dict[str, np.ndarray]:
    return {
        "input": rng.standard_normal((tokens, HIDDEN)).astype(dtype),
        "router_probs": rng.standard_normal((tokens, EXPERTS)).astype(dtype),
    }


def oracle(weights: dict[str, np.ndarray], feeds: dict[str, np.ndarray]) -> np.ndarray:
    """`reference.qmoe` of one token, on its experts only: all of them would not fit into memory.

    That changes nothing, as the factors of the chosen experts are normalized.
    """
    chosen = np.sort(reference.route(feeds["router_probs"], TOPK, normalize=True)[0][0])
    projections = [
        reference.Projection(
            weights[f"{name}_experts_weights"][chosen],
            weights[f"{name}_scales"][chosen],
            bias=weights[f"{name}_experts_bias"][chosen],
        )
        for name in ("fc1", "fc2")
    ]
    return reference.qmoe(feeds["input"], feeds["router_probs"][:, chosen], *projections, **GPT_OSS)


def median_time(
    session: ort.InferenceSession, feeds: dict[str, np.ndarray], target: devices.Target
) -> float:
    """Seconds a run, inputs and outputs on the device."""
    device = target.device.lower()
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, device, 0))
    binding.bind_output("output", device)
    session.run_with_iobinding(binding)
    times: list[float] = []
    while sum(times) < TIMING and len(times) < 200:
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def quiet_options() -> ort.SessionOptions:
    """Only fatal errors are printed: what the stock op refuses is shown by us."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return options


def title(text: str) -> None:
    print(f"\n{text}\n{'-' * min(len(text), 100)}")


def show(name: str, text: str) -> None:
    print(f"  {name:<14} {text}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main()
