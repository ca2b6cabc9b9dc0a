/* C interface of the qmoe_plugin library, beside RegisterCustomOps (which ONNX Runtime calls).
 *
 * It answers two questions without a session: which kernels are there, and which one runs a given
 * problem; and it packs the weights of a node, for a model that loads faster. Everything here is thread-safe, allocates nothing that the caller must free, and never
 * throws. */
#ifndef QMOE_PLUGIN_H_
#define QMOE_PLUGIN_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QMOE_PLUGIN_EXPORT __attribute__((visibility("default")))

/* Version of the library, as in "0.1.0". */
QMOE_PLUGIN_EXPORT const char* qmoe_plugin_version(void);

/* Onnxruntime API versions the library works with: lowest and highest that it was written for. */
QMOE_PLUGIN_EXPORT void qmoe_plugin_ort_api_range(uint32_t* lowest, uint32_t* highest);

/* 1 if CUDA kernels were compiled in; the architectures, as in "90a"; "" without CUDA. */
QMOE_PLUGIN_EXPORT int qmoe_plugin_has_cuda(void);
QMOE_PLUGIN_EXPORT const char* qmoe_plugin_cuda_archs(void);

/* CUDA devices that the driver offers, 0 without a driver; compute capability of one (90 = Hopper),
 * 0 if there is none. */
QMOE_PLUGIN_EXPORT int qmoe_plugin_cuda_device_count(void);
QMOE_PLUGIN_EXPORT int qmoe_plugin_cuda_device_sm(int device);

/* A row of the support table. Strings live as long as the library. */
typedef struct qmoe_plugin_kernel {
  const char* name;   /* "grouped_gemm_sm80.int4" */
  const char* format; /* "int4" */
  const char* device; /* "CPU" or "CUDA" */
  int min_sm, max_sm; /* 0, 0 on the CPU */
  const char* dtypes; /* "float32 float16 bfloat16" */
  const char* limits; /* one line */
  int priority;
  int available; /* 0 if this processor cannot run it */
} qmoe_plugin_kernel;

QMOE_PLUGIN_EXPORT size_t qmoe_plugin_kernel_count(void);
/* Returns 0, or -1 if there is no such kernel. */
QMOE_PLUGIN_EXPORT int qmoe_plugin_get_kernel(size_t index, qmoe_plugin_kernel* out);

/* One (grouped) GEMM, as kernel selection sees it. */
typedef struct qmoe_plugin_gemm_problem {
  const char* device;     /* "CPU" or "CUDA" */
  int sm;                 /* CUDA: compute capability */
  const char* stage;      /* "fc1", "fc2" or "dense" */
  const char* format;     /* "int4" */
  const char* dtype;      /* "float32", "float16" or "bfloat16" */
  const char* activation; /* "identity", "relu", "gelu", "silu", "swiglu", "geglu" */
  int64_t experts, rows;  /* of x over all experts: M, or tokens * topk */
  int64_t topk;           /* rows of a token, each of another expert; 1 for "dense" */
  int64_t n, k, block_size;
  int zero_points, accuracy_level;
} qmoe_plugin_gemm_problem;

/* Calls `visit` for each kernel of the problem's device and format, best first, with the reason why
 * it does not run the problem ("" if it can: the first such kernel is the one that runs). Returns
 * 0, or -1 if a name in the problem is unknown; `visit` is then called once with kernel "" and the
 * message. */
QMOE_PLUGIN_EXPORT int qmoe_plugin_explain(const qmoe_plugin_gemm_problem* problem,
                                           void (*visit)(void* user, const char* kernel,
                                                         const char* refusal),
                                           void* user);

/* The lines that a tuning file (environment variable QMOE_PLUGIN_TUNING) for a CUDA device begins
 * with; "" if there is no such device. Valid until the thread's next call. */
QMOE_PLUGIN_EXPORT const char* qmoe_plugin_tuning_header(int device);

/* An attribute of a node; `type` says which of the values it has. */
typedef struct qmoe_plugin_attribute {
  const char* name;
  char type; /* 'i', 'f' or 's' */
  int64_t i;
  float f;
  const char* s;
} qmoe_plugin_attribute;

/* A constant input of a node, in host memory. */
typedef struct qmoe_plugin_tensor {
  const char* dtype; /* "uint8", "int32", "float32", "float16", "bfloat16", "float8e4m3fn",
                        "float8e8m0"; null for an input that was left out or is not constant */
  const int64_t* shape;
  size_t rank;
  const void* data;
  size_t bytes;
} qmoe_plugin_tensor;

/* A node of one of our ops. */
typedef struct qmoe_plugin_node {
  const char*
      op; /* "QMoE", "MoE", "MatMulNBits", "MatMulBlockQuantizedFp8Weight" or ...Fp4Weight */
  const char* dtype; /* of the activations: "float32", "float16" or "bfloat16" */
  const qmoe_plugin_attribute* attributes;
  size_t attribute_count;
  const qmoe_plugin_tensor* inputs; /* by number, as in the node */
  size_t input_count;
} qmoe_plugin_node;

/* Packs the weights of a node for GPUs of compute capability `sm` (90 = Hopper), which need not be
 * here, or for the CPU if `sm` is 0. Calls `allocate` for each projection ("fc1" and "fc2" of a QMoE
 * or MoE, "B" of the others) for memory to write, which may give up by returning null. The bytes take
 * the place of the projection's weights in a node with weights_layout="packed" (MatMulBlockQuantized...
 * have N and K then) and without all the other constant inputs but scales of activations. Returns 0; or, after calling `fail` with the reason, 1 if the
 * node is wrong, -1 if the machine failed. */
QMOE_PLUGIN_EXPORT int qmoe_plugin_prepack(const qmoe_plugin_node* node, int sm,
                                           void* (*allocate)(void* user, const char* projection,
                                                             size_t bytes),
                                           void (*fail)(void* user, const char* message),
                                           void* user);

/* What packed weights say of themselves. Strings live as long as the library. */
typedef struct qmoe_plugin_packed {
  const char* format;      /* "int4" */
  const char* layout;      /* "cpu_panel16" */
  const char* device;      /* "CPU" or "CUDA" */
  const char* scale_dtype; /* "float32" or "float16" */
  int64_t experts, rows, k, block_size;
  int gated, zero_points, act_scales; /* whether gates and ups alternate; what is in the weights */
} qmoe_plugin_packed;

/* Reads the header of packed weights, their first 64 bytes, of `bytes` in all. Returns 0; or, after
 * calling `fail` with the reason, 1 for bytes that no session of this library would load. */
QMOE_PLUGIN_EXPORT int qmoe_plugin_read_packed(const void* header, size_t bytes,
                                               qmoe_plugin_packed* out,
                                               void (*fail)(void* user, const char* message),
                                               void* user);

#ifdef __cplusplus
}
#endif

#endif /* QMOE_PLUGIN_H_ */
