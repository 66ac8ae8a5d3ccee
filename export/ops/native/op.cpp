// The operators of domain ai.actuary as ONNX Runtime sees them: NAME and biased_NAME of every activation, for float
// and float16 on the CPU and, where nvcc was there, float, float16 and bfloat16 on CUDA; and those of attention_op.cpp and
// int8_linear.cpp. One exported symbol registers them all.
#include <climits>
#include <cstdio>
#include <mutex>
#include <utility>
#include <vector>

#include "activation.h"
#include "attention.h"
#include "int8_linear.h"

namespace actuary {

const Activation kActivations[] = {
#include "activations.inc"
};
const int kActivationCount = sizeof kActivations / sizeof *kActivations;

namespace {

struct Op : ort::CustomOp {
  ort::Api api;
  int activation;
  bool biased, cuda;
  ort::ElementType type;
};

const Op& op_of(const ort::CustomOp* op) { return *static_cast<const Op*>(op); }
const Activation& activation_of(const ort::CustomOp* op) { return kActivations[op_of(op).activation]; }

ort::Status* create_kernel(const ort::CustomOp* op, ort::Api, const ort::KernelInfo*, void** kernel) {
  *kernel = const_cast<ort::CustomOp*>(op);  // a kernel has no state of its own
  return nullptr;
}

ort::Status* compute(void* kernel, ort::Context* context) {
  const Op& op = *static_cast<const Op*>(static_cast<ort::CustomOp*>(kernel));
  Call call;
  if (auto* error = check(op.api, context, kActivations[op.activation], op.biased, op.type, &call)) return error;
  if (call.rows * call.H == 0) return nullptr;
#ifdef ACTUARY_CUDA
  if (op.cuda) {
    void* stream = nullptr;
    if (auto* error = ort::gpu_stream(op.api, context, &stream)) return error;
    const char* wrong = compute_cuda(op.activation, op.type, call, stream);
    return wrong ? ort::create_status(op.api, ort::kFail, wrong) : nullptr;
  }
#endif
  return compute_cpu(op.api, context, op.activation, op.type, call);
}

// y has x's shape, but H where x has 2H. Says nothing where x's shape is not known (the rank reads 0), or where one of its
// dimensions is not, not even by name: ONNX Runtime would take all such for one size, and their memory for one.
ort::Status* infer_shape(const ort::CustomOp* self, ort::ShapeContext* context) {
  const ort::Api api = op_of(self).api;
  ort::ShapeInfo *x = nullptr, *y = nullptr;
  size_t rank = 0;
  int type = 0;
  if (auto* error = ort::infer_input(api, context, size_t{0}, &x)) return error;
  if (auto* error = ort::get_rank(api, x, &rank)) return error;
  if (rank == 0) return nullptr;
  std::vector<int64_t> dims(rank);
  std::vector<const char*> symbols(rank);
  if (auto* error = ort::get_dims(api, x, dims.data(), rank)) return error;
  if (auto* error = ort::get_symbols(api, x, symbols.data(), rank)) return error;
  for (size_t i = 0; i < rank; ++i) {
    if (dims[i] < 0 && !*symbols[i]) return nullptr;
  }
  if (activation_of(self).tensors == 1) return ort::infer_output(api, context, size_t{0}, x);

  if (auto* error = ort::get_type(api, x, &type)) return error;
  dims.back() = dims.back() < 0 ? -1 : dims.back() / 2;
  symbols.back() = "";  // half of what was called 2H has no name
  if (auto* error = ort::create_shape(api, &y)) return error;
  ort::Status* error = ort::set_type(api, y, type);
  if (!error) error = ort::set_dims(api, y, dims.data(), rank);
  if (!error) error = ort::set_symbols(api, y, symbols.data(), rank);
  if (!error) error = ort::infer_output(api, context, size_t{0}, y);
  ort::release_shape(api, y);
  return error;
}

// A pointwise result may be written over its input; a gated one has another size.
int first_tensor = 0;
size_t in_place(int** inputs, int** outputs) {
  *inputs = *outputs = &first_tensor;
  return 1;
}

Op make_op(ort::Api api, int activation, bool biased, bool cuda, ort::ElementType type) {
  Op op{};
  op.version = ort::kCustomOpVersion;
  op.name = [](auto* self) { return op_of(self).biased ? activation_of(self).biased_name : activation_of(self).name; };
  op.provider = [](auto* self) { return op_of(self).cuda ? "CUDAExecutionProvider" : "CPUExecutionProvider"; };
  op.input_count = [](auto* self) { return size_t{1} + op_of(self).biased + activation_of(self).learned; };
  op.output_count = [](auto*) { return size_t{1}; };
  op.input_type = op.output_type = [](auto* self, size_t) { return static_cast<int>(op_of(self).type); };
  op.input_characteristic = op.output_characteristic = op.input_memory = [](auto*, size_t) { return 0; };
  op.start_version = [](auto*) { return 1; };
  op.end_version = [](auto*) { return INT_MAX; };
  op.create_kernel = create_kernel;
  op.destroy_kernel = [](void*) {};
  op.compute = compute;
  op.infer_shape = infer_shape;
  if (kActivations[activation].tensors == 1) {
    op.may_inplace = in_place;
    op.release_inplace = [](int*, int*) {};
  }
  op.api = api;
  op.activation = activation;
  op.biased = biased;
  op.cuda = cuda;
  op.type = type;
  return op;
}

std::vector<Op> make_ops(ort::Api api) {
  struct {
    bool cuda;
    ort::ElementType type;
  } const forms[] = {{false, ort::kFloat},
                     {false, ort::kFloat16},
#ifdef ACTUARY_CUDA
                     {true, ort::kFloat},
                     {true, ort::kFloat16},
                     {true, ort::kBFloat16},
#endif
  };
  std::vector<Op> ops;
  for (int activation = 0; activation < kActivationCount; ++activation) {
    for (const bool biased : {false, true}) {
      for (const auto& [cuda, type] : forms) ops.push_back(make_op(api, activation, biased, cuda, type));
    }
  }
  return ops;
}

// Whether the next registration takes those that are no activation too. They have CPU kernels alone, which in a session
// on CUDA would pull their work off the device.
thread_local bool with_structural = true;

// One domain of each kind for all sessions of the process; it lives as long as the library.
ort::Status* domain(ort::Api api, bool structural, ort::Domain** out) {
  static std::mutex one_at_a_time;
  static std::vector<Op> ops = make_ops(api);
  static ort::Domain* made[2] = {};  // once it holds them all
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (!made[structural]) {
    // Tried anew after a failure, for a status of its own: ONNX Runtime frees each that it is handed.
    ort::Domain* begun = nullptr;
    if (auto* error = ort::create_domain(api, ACTUARY_DOMAIN, &begun)) return error;
    std::vector<const ort::CustomOp*> all;
    for (const Op& op : ops) all.push_back(&op);
    if (structural) {
      all.insert(all.end(), attention_ops(api).begin(), attention_ops(api).end());
      all.insert(all.end(), linear_ops(api).begin(), linear_ops(api).end());
    }
    for (const ort::CustomOp* op : all) {
      if (auto* error = ort::add_op(api, begun, op)) return error;
    }
    made[structural] = begun;
  }
  *out = made[structural];
  return nullptr;
}

}  // namespace
}  // namespace actuary

#define ACTUARY_EXPORT extern "C" __attribute__((visibility("default")))

// The version of these operators' contract, and a hash of everything that the library was made of.
ACTUARY_EXPORT int actuary_ops_version() { return ACTUARY_OPS_VERSION; }
ACTUARY_EXPORT const char* actuary_ops_inputs() { return ACTUARY_INPUTS; }

// For a session on CUDA 0, else 1; of the next RegisterCustomOps in this thread.
ACTUARY_EXPORT void actuary_ops_structural(int wanted) { actuary::with_structural = wanted != 0; }

ACTUARY_EXPORT ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
  const ort::Api api = base->get_api(ort::kOrtApi);
  if (!api) {
    char message[160];
    snprintf(message, sizeof message, "Actuary's operators need an ONNX Runtime with API %u; this one is %s",
             ort::kOrtApi, base->get_version());
    return ort::create_status(base->get_api(1), ort::kFail, static_cast<const char*>(message));
  }
  ort::Domain* ours = nullptr;
  if (auto* error = actuary::domain(api, std::exchange(actuary::with_structural, true), &ours)) return error;
  return ort::add_domain(api, options, ours);
}
