// ONNX Runtime's C ABI, as far as our operators need it. Its wheels ship no headers, so what stands here is declared
// by hand: the function table is append-only, and each entry has kept its slot since the version named beside it.
// RegisterCustomOps asks for version kOrtApi and refuses a runtime that has none; tests/test_native_ops.py calls
// every slot.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t kOrtApi = ACTUARY_ORT_API;  // export/ops/library.py
constexpr uint32_t kCustomOpVersion = 18;      // of struct CustomOp below

struct Status;  // null: all went well
struct Value;
struct Context;
struct ShapeContext;
struct ShapeInfo;
struct Domain;
struct SessionOptions;
struct KernelInfo;
struct CustomOp;

enum Code : int { kFail = 1, kInvalidArgument = 2 };
enum ElementType : int { kFloat = 1, kInt8 = 3, kInt32 = 6, kInt64 = 7, kFloat16 = 10, kBFloat16 = 16 };

using Api = void* const*;  // OrtApi: a table of functions

struct ApiBase {
  Api (*get_api)(uint32_t version);
  const char* (*get_version)();
};

// One function of the table: its slot, our name, the types of its arguments. Each returns a Status*.
#define ACTUARY_SLOT(slot, name, ...)                                           \
  template <class... A>                                                         \
  Status* name(Api api, A... arguments) {                                       \
    return reinterpret_cast<Status* (*)(__VA_ARGS__)>(api[slot])(arguments...); \
  }
ACTUARY_SLOT(0, create_status, Code, const char*)
ACTUARY_SLOT(26, create_domain, const char*, Domain**)
ACTUARY_SLOT(27, add_op, Domain*, const CustomOp*)
ACTUARY_SLOT(28, add_domain, SessionOptions*, Domain*)
ACTUARY_SLOT(51, mutable_data, Value*, void**)
ACTUARY_SLOT(57, create_shape, ShapeInfo**)
ACTUARY_SLOT(58, set_type, ShapeInfo*, int)
ACTUARY_SLOT(59, set_dims, ShapeInfo*, const int64_t*, size_t)
ACTUARY_SLOT(60, get_type, const ShapeInfo*, int*)
ACTUARY_SLOT(61, get_rank, const ShapeInfo*, size_t*)
ACTUARY_SLOT(62, get_dims, const ShapeInfo*, int64_t*, size_t)
ACTUARY_SLOT(63, get_symbols, const ShapeInfo*, const char**, size_t)
ACTUARY_SLOT(85, attribute_float, const KernelInfo*, const char*, float*)
ACTUARY_SLOT(86, attribute_int, const KernelInfo*, const char*, int64_t*)
ACTUARY_SLOT(88, input_count, const Context*, size_t*)
ACTUARY_SLOT(90, get_input, const Context*, size_t, const Value**)
ACTUARY_SLOT(91, get_output, Context*, size_t, const int64_t*, size_t, Value**)
ACTUARY_SLOT(193, gpu_stream, const Context*, void**)  // since 10
ACTUARY_SLOT(268, infer_input, const ShapeContext*, size_t, ShapeInfo**)  // since 17
ACTUARY_SLOT(270, infer_output, const ShapeContext*, size_t, const ShapeInfo*)  // since 17
ACTUARY_SLOT(271, set_symbols, ShapeInfo*, const char**, size_t)  // since 17
ACTUARY_SLOT(274, parallel_for, const Context*, void (*)(void*, size_t), size_t, size_t, void*)  // since 17
ACTUARY_SLOT(414, type_and_shape, const Value*, int*, const int64_t**, size_t*)  // since 24
#undef ACTUARY_SLOT

inline void release_shape(Api api, ShapeInfo* info) { reinterpret_cast<void (*)(ShapeInfo*)>(api[99])(info); }

// OrtCustomOp: one operator for one element type on one provider.
struct CustomOp {
  uint32_t version;
  void* (*create_kernel_v1)(const CustomOp*, Api, const KernelInfo*);
  const char* (*name)(const CustomOp*);
  const char* (*provider)(const CustomOp*);
  int (*input_type)(const CustomOp*, size_t);
  size_t (*input_count)(const CustomOp*);
  int (*output_type)(const CustomOp*, size_t);
  size_t (*output_count)(const CustomOp*);
  void (*compute_v1)(void*, Context*);
  void (*destroy_kernel)(void*);
  int (*input_characteristic)(const CustomOp*, size_t);
  int (*output_characteristic)(const CustomOp*, size_t);
  int (*input_memory)(const CustomOp*, size_t);
  int (*variadic_input_min)(const CustomOp*);
  int (*variadic_input_same)(const CustomOp*);
  int (*variadic_output_min)(const CustomOp*);
  int (*variadic_output_same)(const CustomOp*);
  Status* (*create_kernel)(const CustomOp*, Api, const KernelInfo*, void**);  // since 16
  Status* (*compute)(void*, Context*);  // since 16
  Status* (*infer_shape)(const CustomOp*, ShapeContext*);  // since 17
  int (*start_version)(const CustomOp*);  // since 17
  int (*end_version)(const CustomOp*);  // since 17
  size_t (*may_inplace)(int** inputs, int** outputs);  // since 18
  void (*release_inplace)(int*, int*);
  size_t (*alias)(int** inputs, int** outputs);
  void (*release_alias)(int*, int*);
};

}  // namespace ort
