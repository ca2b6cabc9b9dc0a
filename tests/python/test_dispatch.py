"""Which CUDA kernel is chosen on GPUs that are not here."""

import pytest

import qmoe_plugin
from qmoe_plugin.devices import Target
from qmoe_plugin.kernels import Explanation, Problem, ask

pytestmark = pytest.mark.usefixtures("library")

# fc1 of gpt-oss-20b, float16, by tokens: what streams weights as long as its rows of x fit into
# shared memory, then what multiplies tiles.
STREAMS, TILES, WGMMA = "gemv_sm80", "grouped_gemm_sm80", "grouped_gemm_sm90"
LARGE_SHARED = {1: STREAMS, 8: STREAMS, 64: STREAMS, 512: TILES}
SMALL_SHARED = {1: STREAMS, 8: TILES, 64: TILES, 512: TILES}
CHOSEN = {
    80: LARGE_SHARED,
    86: SMALL_SHARED,
    89: SMALL_SHARED,
    90: LARGE_SHARED | {512: WGMMA},
    100: LARGE_SHARED,
    120: SMALL_SHARED,
}


def explain(sm: int, **changes: object) -> Explanation:
    if not any(kernel.device == "CUDA" for kernel in qmoe_plugin.kernels()):
        pytest.skip("the library was built without CUDA")
    problem = {
        "stage": "fc1",
        "format": "int4",
        "n": 5760,
        "k": 2880,
        "experts": 32,
        "topk": 4,
        "rows": 4,
        "dtype": "float16",
        "activation": "swiglu",
        "block_size": 32,
    } | changes
    return ask(Problem(target=Target("CUDA", sm), **problem))  # type: ignore[arg-type]


def stem(answer: Explanation) -> str | None:
    return answer.kernel and answer.kernel.split(".")[0]


@pytest.mark.parametrize("sm", CHOSEN)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_each_generation_has_its_kernels(sm: int, dtype: str) -> None:
    chosen = {tokens: stem(explain(sm, rows=4 * tokens, dtype=dtype)) for tokens in CHOSEN[sm]}
    assert chosen == CHOSEN[sm]


@pytest.mark.parametrize("sm", CHOSEN)
def test_float32_is_exact_on_all(sm: int) -> None:
    chosen = [stem(explain(sm, rows=4 * tokens, dtype="float32")) for tokens in (1, 64, 512)]
    assert chosen == ["gemv_simt", "gemv_simt", "grouped_gemm_dequant"]


@pytest.mark.parametrize("sm", CHOSEN)
@pytest.mark.parametrize("tokens", [1, 3, 8, 16, 17, 64, 100, 512, 8192])
def test_nothing_is_left_without_a_kernel(sm: int, tokens: int) -> None:
    for fmt in ("int2", "int4", "int8", "mxfp4", "nvfp4", "fp8_e4m3", "codebook4"):
        block = qmoe_plugin.formats.get(fmt).only_block_size or 128
        assert explain(sm, rows=4 * tokens, format=fmt, block_size=block).kernel, fmt


@pytest.mark.parametrize("sm", [70, 75, 130])
def test_other_generations_are_refused_by_name(sm: int) -> None:
    answer = explain(sm)
    assert answer.kernel is None
    assert f"sm_{sm}" in answer.refusals


def test_rows_that_do_not_fit_are_the_reason() -> None:
    refusals = {v.kernel: v.refusal for v in explain(86, rows=32).verdicts}
    assert "only 2 rows of 2880 values fit" in refusals["gemv_sm80.int4"]


@pytest.mark.parametrize(
    ("fmt", "block_size", "zero_points"),
    [
        ("int4", 32, False),
        ("int4", 32, True),
        ("int8", 32, False),
        ("int8", 32, True),
        ("mxfp4", 32, False),
        ("nvfp4", 16, False),
        ("fp8_e4m3", 0, False),
    ],
)
def test_long_rows_of_few_tokens_fit(fmt: str, block_size: int, zero_points: bool) -> None:
    """fc2 of Mixtral: beside two rows of 14336 values there is room for what warps share."""
    for tokens in (1, 2, 8):
        answer = explain(
            90,
            stage="fc2",
            format=fmt,
            n=4096,
            k=14336,
            experts=8,
            topk=2,
            rows=2 * tokens,
            activation="identity",
            block_size=block_size,
            zero_points=zero_points,
        )
        assert stem(answer) == STREAMS, answer.refusals
