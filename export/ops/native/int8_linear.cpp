// The operators of Int8Linear's forms: the host check of a call, which loops run, and how the call is cut for threads.
#include "int8_linear.h"

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstring>
#include <new>

#include "tensor.h"

extern "C" const char* actuary_ops_isa();  // cpu.cpp: "x86-64-v4"

namespace actuary {

// ACTUARY_INT8_ISAS(X): X(name, "the level it belongs to", whether this processor has what it takes besides), best
// first; printed by build.py.
#include "isas.h"
#define ACTUARY_DECLARE(name, called, runs) extern const Int8Loops int8_##name;
ACTUARY_INT8_ISAS(ACTUARY_DECLARE)

namespace {

struct Choice {
  const char* called;
  const Int8Loops* loops;
  bool (*runs)();
};
#define ACTUARY_CHOICE(name, called, runs) {called, &int8_##name, [] { return static_cast<bool>(runs); }},
const Choice kChoices[] = {ACTUARY_INT8_ISAS(ACTUARY_CHOICE)};

// The best of the level at which the activations run too; "x86-64" < "x86-64-v3" < "x86-64-v4".
const Int8Loops& loops() {
  const char* level = actuary_ops_isa();
  for (const Choice& choice : kChoices) {
    if (std::strcmp(choice.called, level) <= 0 && choice.runs()) return *choice.loops;
  }
  return *std::end(kChoices)[-1].loops;
}

enum Norm { kNone, kRms, kLayer };

struct Form {
  const char* name;
  Norm norm;
  bool residual;
  // x, weights, step, sums, bias; then gain and epsilon, and for a centred norm shift; or the residual.
  size_t inputs() const { return 5 + (norm == kLayer ? 3 : norm == kRms ? 2 : 0) + residual; }
};

constexpr Form kForms[] = {
    {"Int8Linear", kNone, false},
    {"Int8LinearAdd", kNone, true},
    {"RmsNormInt8Linear", kRms, false},
    {"LayerNormInt8Linear", kLayer, false},
};
constexpr size_t kExtra = 5;  // the first input that not all forms have

// One call, checked: x [rows, K] -> y [rows, N].
struct Call {
  const float *x, *step, *bias;
  const int8_t* weights;
  const int32_t* sums;
  Int8Norm norm;
  const float* residual;
  float* y;
  int64_t rows, K, N;
};

template <class T>
ort::Status* vector_of(ort::Api api, const ort::Context* context, size_t index, const char* op, const char* called,
                       ort::ElementType type, int64_t size, const T** pointer) {
  char text[96];
  Tensor tensor;
  const void* found = nullptr;
  if (auto* error = read(api, context, index, op, type, &tensor)) return error;
  if (tensor.rank != 1 || tensor.dims[0] != size) {
    return refuse(api, "%s: %s has shape %s; it must be [%lld]", op, called, shape(tensor, text),
                  static_cast<long long>(size));
  }
  if (auto* error = data(api, tensor.value, &found)) return error;
  *pointer = static_cast<const T*>(found);
  return nullptr;
}

ort::Status* check_norm(ort::Api api, const ort::Context* context, const Form& form, Call* call) {
  const char* op = form.name;
  const float* epsilon = nullptr;
  call->norm = {};
  if (form.norm == kNone) return nullptr;
  if (auto* error = vector_of(api, context, kExtra, op, "gain", ort::kFloat, call->K, &call->norm.gain)) return error;
  if (auto* error = vector_of(api, context, kExtra + 1, op, "epsilon", ort::kFloat, 1, &epsilon)) return error;
  call->norm.epsilon = *epsilon;
  if (form.norm == kRms) return nullptr;
  return vector_of(api, context, kExtra + 2, op, "shift", ort::kFloat, call->K, &call->norm.shift);
}

ort::Status* check_residual(ort::Api api, const ort::Context* context, const Form& form, const int64_t* dims,
                            size_t rank, Call* call) {
  char text[96], other[96];
  Tensor tensor;
  const void* found = nullptr;
  call->residual = nullptr;
  if (!form.residual) return nullptr;
  if (auto* error = read(api, context, kExtra, form.name, ort::kFloat, &tensor)) return error;
  if (tensor.rank != rank || !std::equal(dims, dims + rank, tensor.dims)) {
    const Tensor y = {nullptr, ort::kFloat, dims, rank};
    return refuse(api, "%s: residual has shape %s; it must be %s, as y", form.name, shape(tensor, text),
                  shape(y, other));
  }
  if (auto* error = data(api, tensor.value, &found)) return error;
  call->residual = static_cast<const float*>(found);
  return nullptr;
}

ort::Status* check(ort::Api api, ort::Context* context, const Form& form, Call* call) {
  const char* op = form.name;
  char text[96], other[96];
  Tensor x, weights, step;
  const void* pointer = nullptr;
  if (auto* error = read(api, context, 0, op, ort::kFloat, &x)) return error;
  if (auto* error = read(api, context, 1, op, ort::kInt8, &weights)) return error;
  if (auto* error = read(api, context, 2, op, ort::kFloat, &step)) return error;
  if (x.rank == 0 || x.rank > kMaxRank) {
    return refuse(api, "%s: x has %zu dimensions; it must have 1 to %d, the last of them K", op, x.rank, kMaxRank);
  }
  call->K = x.dims[x.rank - 1];
  call->N = step.rank == 1 ? step.dims[0] : -1;
  const int64_t panels = (call->N + kPanel - 1) / kPanel;
  if (call->N < 0) return refuse(api, "%s: step has shape %s; it must be [N]", op, shape(step, text));
  if (weights.rank != 4 || weights.dims[0] != panels || weights.dims[1] * kDepth != call->K ||
      weights.dims[2] != kPanel || weights.dims[3] != kDepth || call->K > kMostRows) {
    return refuse(api, "%s: weights have shape %s; for x %s and N = %lld it must be [%lld, K / 4, 64, 4], K at most %lld",
                  op, shape(weights, text), shape(x, other), static_cast<long long>(call->N),
                  static_cast<long long>(panels), static_cast<long long>(kMostRows));
  }
  if (auto* error = vector_of(api, context, 3, op, "sums", ort::kInt32, call->N, &call->sums)) return error;
  if (auto* error = vector_of(api, context, 4, op, "bias", ort::kFloat, call->N, &call->bias)) return error;
  if (auto* error = check_norm(api, context, form, call)) return error;
  if (auto* error = data(api, x.value, &pointer)) return error;
  call->x = static_cast<const float*>(pointer);
  if (auto* error = data(api, weights.value, &pointer)) return error;
  call->weights = static_cast<const int8_t*>(pointer);
  if (auto* error = data(api, step.value, &pointer)) return error;
  call->step = static_cast<const float*>(pointer);

  int64_t dims[kMaxRank];
  call->rows = 1;
  for (size_t i = 0; i + 1 < x.rank; ++i) call->rows *= dims[i] = x.dims[i];
  dims[x.rank - 1] = call->N;
  if (auto* error = check_residual(api, context, form, dims, x.rank, call)) return error;
  ort::Value* y = nullptr;
  if (auto* error = ort::get_output(api, context, size_t{0}, static_cast<const int64_t*>(dims), x.rank, &y)) {
    return error;
  }
  void* out = nullptr;
  if (auto* error = ort::mutable_data(api, y, &out)) return error;
  call->y = static_cast<float*>(out);
  return nullptr;
}

// Rows as the loops want them; each thread keeps the room.
struct Quantised {
  std::vector<uint8_t> q;
  std::vector<float> step, room;
  std::vector<int32_t> zero;

  void fill(const Int8Loops& loops, const Call& call, int64_t first, int64_t rows) {
    if (q.size() < static_cast<size_t>(rows * call.K)) q.resize(rows * call.K);
    if (step.size() < static_cast<size_t>(rows)) step.resize(rows), zero.resize(rows);
    if (call.norm.gain && room.size() < static_cast<size_t>(call.K)) room.resize(call.K);
    loops.quantise(call.x + first * call.K, rows, call.K, call.norm, room.data(), q.data(), step.data(), zero.data());
  }
};
thread_local Quantised of_this_thread;

struct Work {
  const Int8Loops* loops;
  const Call* call;
  const Quantised* quantised;       // of all rows, where the call is cut by columns
  int64_t size;                     // rows or panels of a task
  std::atomic<bool> failed{false};  // for want of memory: ONNX Runtime's threads carry no exception
};

// Of `rows` rows from the one at `row`, the panels [first, last).
void panels(const Work& work, const Quantised& x, int64_t row, int64_t rows, int64_t first, int64_t last) {
  const Call& call = *work.call;
  const int64_t at = row * call.N;
  for (int64_t p = first; p < last; ++p) {
    const int64_t n = p * kPanel;
    const Int8Panel panel = {call.weights + n * call.K, call.sums + n, call.step + n,
                             call.bias + n,             call.K,        std::min(kPanel, call.N - n)};
    work.loops->multiply(x.q.data(), x.step.data(), x.zero.data(), rows, panel,
                         call.residual ? call.residual + at + n : nullptr, call.y + at + n, call.N);
  }
}

int64_t panels_of(const Call& call) { return (call.N + kPanel - 1) / kPanel; }

void some_rows(void* pointer, size_t index) {
  Work& work = *static_cast<Work*>(pointer);
  const Call& call = *work.call;
  const int64_t first = static_cast<int64_t>(index) * work.size, rows = std::min(work.size, call.rows - first);
  try {
    of_this_thread.fill(*work.loops, call, first, rows);
  } catch (const std::bad_alloc&) {
    work.failed = true;
    return;
  }
  panels(work, of_this_thread, first, rows, 0, panels_of(call));
}

void some_columns(void* pointer, size_t index) {
  const Work& work = *static_cast<const Work*>(pointer);
  const int64_t first = static_cast<int64_t>(index) * work.size;
  panels(work, *work.quantised, 0, work.call->rows, first, std::min(first + work.size, panels_of(*work.call)));
}

constexpr int64_t kBlockProducts = 2'000'000;  // that are worth another thread: about 10 us
constexpr int64_t kFewRows = 32;               // up to these, W is cut: cut by rows, each thread would read all of it

ort::Status* compute(ort::Api api, const ort::Context* context, const Call& call) {
  Work work{&loops(), &call, &of_this_thread, 0};
  const auto run = [&](void (*task)(void*, size_t), int64_t total) -> ort::Status* {
    const auto count = static_cast<size_t>((total + work.size - 1) / work.size);
    if (count == 1) {
      task(&work, 0);
    } else if (auto* error = ort::parallel_for(api, context, task, count, size_t{0}, static_cast<void*>(&work))) {
      return error;
    }
    return work.failed ? refuse(api, "int8 product: no memory for its rows; send smaller batches") : nullptr;
  };
  if (call.rows > kFewRows) {
    // Of one size, in whole tiles of 4 rows.
    const int64_t count = (call.rows + kFewRows - 1) / kFewRows + 1;
    work.size = ((call.rows + count - 1) / count + 3) / 4 * 4;
    return run(some_rows, call.rows);
  }
  of_this_thread.fill(*work.loops, call, 0, call.rows);
  const int64_t of_a_panel = std::max<int64_t>(call.rows * call.K * kPanel, 1);
  work.size = std::clamp<int64_t>(kBlockProducts / of_a_panel, 1, panels_of(call));
  return run(some_columns, panels_of(call));
}

struct Op : ort::CustomOp {
  ort::Api api;
  const Form* form;
};

const Op& op_of(const ort::CustomOp* op) { return *static_cast<const Op*>(op); }

ort::Status* create_kernel(const ort::CustomOp* op, ort::Api, const ort::KernelInfo*, void** kernel) {
  *kernel = const_cast<ort::CustomOp*>(op);  // a kernel has no state of its own
  return nullptr;
}

ort::Status* run(void* kernel, ort::Context* context) {
  const Op& op = op_of(static_cast<ort::CustomOp*>(kernel));
  Call call;
  if (auto* error = check(op.api, context, *op.form, &call)) return error;
  return call.rows && call.N ? compute(op.api, context, call) : nullptr;
}

// y has x's shape, but N, of step [N], where x has K. Says nothing where x's shape is not known: then the rank reads 0;
// nor where one of its dimensions is not, not even by name, as op.cpp.
ort::Status* infer_shape(const ort::CustomOp* self, ort::ShapeContext* context) {
  const ort::Api api = op_of(self).api;
  ort::ShapeInfo *x = nullptr, *step = nullptr, *y = nullptr;
  size_t rank = 0, one = 0;
  int64_t N = -1;
  if (auto* error = ort::infer_input(api, context, size_t{0}, &x)) return error;
  if (auto* error = ort::infer_input(api, context, size_t{2}, &step)) return error;
  if (auto* error = ort::get_rank(api, x, &rank)) return error;
  if (auto* error = ort::get_rank(api, step, &one)) return error;
  if (rank == 0) return nullptr;
  std::vector<int64_t> dims(rank);
  std::vector<const char*> symbols(rank);
  if (one == 1) {
    if (auto* error = ort::get_dims(api, step, &N, size_t{1})) return error;
  }
  if (auto* error = ort::get_dims(api, x, dims.data(), rank)) return error;
  if (auto* error = ort::get_symbols(api, x, symbols.data(), rank)) return error;
  dims.back() = N;
  symbols.back() = "";
  for (size_t i = 0; i < rank; ++i) {
    if (dims[i] < 0 && !*symbols[i]) return nullptr;
  }
  if (auto* error = ort::create_shape(api, &y)) return error;
  ort::Status* error = ort::set_type(api, y, static_cast<int>(ort::kFloat));
  if (!error) error = ort::set_dims(api, y, static_cast<const int64_t*>(dims.data()), rank);
  if (!error) error = ort::set_symbols(api, y, symbols.data(), rank);
  if (!error) error = ort::infer_output(api, context, size_t{0}, static_cast<const ort::ShapeInfo*>(y));
  ort::release_shape(api, y);
  return error;
}

// y may be written over the residual.
int residual_input = kExtra, only_output = 0;
size_t in_place(int** inputs, int** outputs) {
  *inputs = &residual_input;
  *outputs = &only_output;
  return 1;
}

Op make_op(ort::Api api, const Form& form) {
  Op op{};
  op.version = ort::kCustomOpVersion;
  op.name = [](auto* self) { return op_of(self).form->name; };
  op.provider = [](auto*) { return "CPUExecutionProvider"; };
  op.input_count = [](auto* self) { return op_of(self).form->inputs(); };
  op.output_count = [](auto*) { return size_t{1}; };
  op.input_type = [](auto*, size_t index) {
    return static_cast<int>(index == 1 ? ort::kInt8 : index == 3 ? ort::kInt32 : ort::kFloat);
  };
  op.output_type = [](auto*, size_t) { return static_cast<int>(ort::kFloat); };
  op.input_characteristic = op.output_characteristic = op.input_memory = [](auto*, size_t) { return 0; };
  op.start_version = [](auto*) { return 1; };
  op.end_version = [](auto*) { return INT_MAX; };
  op.create_kernel = create_kernel;
  op.destroy_kernel = [](void*) {};
  op.compute = run;
  op.infer_shape = infer_shape;
  if (form.residual) {
    op.may_inplace = in_place;
    op.release_inplace = [](int*, int*) {};
  }
  op.api = api;
  op.form = &form;
  return op;
}

}  // namespace

const std::vector<const ort::CustomOp*>& linear_ops(ort::Api api) {
  static const auto ops = [&] {
    std::vector<Op> made;
    for (const Form& form : kForms) made.push_back(make_op(api, form));
    return made;
  }();
  static const auto pointers = [] {
    std::vector<const ort::CustomOp*> all;
    for (const Op& op : ops) all.push_back(&op);
    return all;
  }();
  return pointers;
}

}  // namespace actuary
