// out [n, m] = a [n, k] b [k, m] (+ bias [m]), then relu of it, then 0 where `where` is 0: what
// codes that are hardly sparse are multiplied with. No derivative.
#include "check.h"
#include "cpu/huge_pages.h"
#include "cpu/matmul.h"
#include "dispatch.h"

namespace fastsae::cpu {
namespace {

constexpr const char* kOp = "dense_matmul";

// A matrix one of whose steps is 1, as it is or copied.
Tensor with_unit_step(const Tensor& t) {
  return t.stride(0) == 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

template <class A>
Strided<A> strided(const Tensor& t) {
  return {data_of<A>(t), t.stride(0), t.stride(1)};
}

Tensor dense_matmul(const Tensor& a_in, const Tensor& b_in, std::optional<Tensor> bias_in,
                    std::optional<Tensor> where_in, bool relu) {
  check_matrix(kOp, "a", a_in);
  check_matrix(kOp, "b", b_in);
  FASTSAE_CHECK(a_in.size(1) == b_in.size(0), kOp, ": expected b to have ", a_in.size(1),
                " rows, got ", shape_of(b_in));
  check_same_type(kOp, "b", b_in, a_in.scalar_type());
  const int64_t n = a_in.size(0), k = a_in.size(1), m = b_in.size(1);
  const Tensor a = with_unit_step(a_in), b = with_unit_step(b_in);
  Tensor bias = a, where = a;
  if (bias_in) {
    check_vector(kOp, "bias", *bias_in, m);
    check_same_type(kOp, "bias", *bias_in, a.scalar_type());
    bias = as_contiguous(*bias_in);
  }
  if (where_in) {
    FASTSAE_CHECK(where_in->dim() == 2 && where_in->size(0) == n && where_in->size(1) == m, kOp,
                  ": expected where to be [", n, ", ", m, "], got ", shape_of(*where_in));
    check_same_type(kOp, "where", *where_in, a.scalar_type());
    where = as_contiguous(*where_in);
  }
  Tensor out = new_empty(a, {n, m}, a.scalar_type());
  const auto run = [&](auto number) {
    using A = decltype(number);
    A* to = mutable_data_of<A>(out);
    prefer_huge_pages(to, sizeof(A) * static_cast<size_t>(n * m));
    const Finish<A> finish{bias_in ? data_of<A>(bias) : nullptr, relu,
                           where_in ? data_of<A>(where) : nullptr};
    if (isa() != Isa::kScalar) {
      matmul<A>(n, m, k, strided<A>(a), strided<A>(b), finish, to);
      return;
    }
    mm_out(a, b, out);
    for (int64_t i = 0; i < n; ++i) finish.apply(to + i * m, i, 0, m, m);
  };
  if (a.scalar_type() == ScalarType::Double) {
    run(double{});
  } else {
    FASTSAE_CHECK(a.scalar_type() == ScalarType::Float, kOp,
                  ": expected a to be float32 or float64");
    run(float{});
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("dense_matmul", TORCH_BOX(&dense_matmul));
}

}  // namespace fastsae::cpu
