// One training step, latent by latent. For each latent f, while its rows are in cache:
//
//   g_dec = sum over its entries of value grad_output[row],  g_enc = sum of g (x - b_dec)[row],
//   g_b = sum of g;  g_dec loses what points along W_dec[f];  Adam on all three;  |W_dec[f]| <- 1
//
// and -g_b W_enc[f], the part of b_dec in the encoder, is added to the gradient of b_dec. So no
// gradient of a matrix is ever stored: the step reads and writes parameters and Adam's averages
// once, 24 bytes a float32 parameter, and everything else comes from caches. With clipping, a first
// pass over the same sums finds the norm of the whole gradient.
// With one average of squares for each row (Adam-mini) these are 16 bytes a parameter.
//
// Threads own latents, and b_dec is summed over fixed groups of latents in order: the result does
// not depend on the number of threads. Rows without entries take the same step with gradient 0, as
// Adam does with dense gradients.
#include <cmath>
#include <limits>

#include "cpu/counting_sort.h"
#include "cpu/kernels.h"
#include "sparse_adam_call.h"

namespace fastsae::cpu {
namespace {

constexpr const char* kOp = AdamCall::kOp;
constexpr int64_t kGroup =
    64;  // latents whose shares of the gradient of b_dec are added up together

// A parameter and Adam's two averages of it.
template <class A>
struct Parameter {
  A *p, *m, *v;
  Parameter at(int64_t offset) const { return {p + offset, m + offset, v + offset}; }
  // Row f of a matrix of width d; by_rows: with one v for the row.
  Parameter row(int64_t f, int64_t d, bool by_rows) const {
    return {p + f * d, m + f * d, v + (by_rows ? f : f * d)};
  }
};

template <class A>
struct Step {
  int64_t n, d, d_sae;
  Parameter<A> W_enc, W_dec, b_enc, b_dec;
  const A *values, *grad_values;
  const int32_t *offsets, *rows, *slots;  // feature-major lists
  const A *centered, *grad_output;        // [n, d]
  const int32_t* extra;                   // [d_sae]: row of the extra gradients, or -1; or null
  const A *extra_W_enc, *extra_W_dec, *extra_b_enc;
  AdamConstants<A> adam;
  bool unit_norm, by_rows;
  const Kernels<A>& kernel;
  const AdamKernels<A>& row;

  struct Gradient {
    std::vector<A> enc, dec, weights;
    A b;
  };

  // Forms the gradients of latent f; false if all are 0.
  bool gradient(int64_t f, Gradient& g) const {
    const int64_t begin = offsets[f], count = offsets[f + 1] - begin;
    const int32_t more = extra ? extra[f] : -1;
    g.b = A(0);
    if (count == 0 && more < 0) return false;
    if (static_cast<int64_t>(g.weights.size()) < count)
      g.weights.resize(static_cast<size_t>(count));
    const int32_t* tokens = rows + begin;
    for (int64_t j = 0; j < count; ++j) g.weights[j] = values[slots[begin + j]];
    kernel.gather_sum(g.weights.data(), tokens, count, 0, grad_output, d, nullptr, g.dec.data());
    for (int64_t j = 0; j < count; ++j) g.b += g.weights[j] = grad_values[slots[begin + j]];
    kernel.gather_sum(g.weights.data(), tokens, count, 0, centered, d, nullptr, g.enc.data());
    if (more >= 0) {
      row.add_scaled(g.dec.data(), extra_W_dec + more * d, A(1), d);
      row.add_scaled(g.enc.data(), extra_W_enc + more * d, A(1), d);
      g.b += extra_b_enc[more];
    }
    const A* w = W_dec.p + f * d;
    const A squared = row.row_dot(w, w, d);
    if (squared > A(0)) {
      row.add_scaled(g.dec.data(), w, -row.row_dot(g.dec.data(), w, d) / squared, d);
    }
    return true;
  }

  // Calls f(first, last) for groups of latents, on threads of about equal work.
  template <class F>
  void for_groups(F&& f) const {
    const int64_t groups = (d_sae + kGroup - 1) / kGroup;
    // A row costs as much as about ten entries (bytes moved); lists may be very unequal.
    const auto cost = [this](int64_t latent) { return offsets[latent] + 10 * latent; };
    const int64_t parts = std::max<int64_t>(1, torch::stable::get_num_threads());
    const auto bound = [&](int64_t part) {
      int64_t low = 0, high = groups;
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (cost(middle * kGroup) * parts < cost(d_sae) * part) low = middle + 1;
        else high = middle;
      }
      return low;
    };
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t last = part + 1 == parts ? groups : bound(part + 1);
        Gradient g;
        g.enc.resize(static_cast<size_t>(d));
        g.dec.resize(static_cast<size_t>(d));
        for (int64_t group = bound(part); group < last; ++group) {
          f(group, std::min(d_sae, (group + 1) * kGroup), g);
        }
      }
    });
  }

  // -W_enc^T g_b of one group, added to out [d].
  void add_encoder_share(int64_t f, A g_b, A* out) const {
    if (g_b != A(0)) row.add_scaled(out, W_enc.p + f * d, -g_b, d);
  }

  // The gradient of b_dec from the shares [groups, d].
  std::vector<A> b_dec_gradient(const std::vector<A>& shares) const {
    std::vector<A> g(static_cast<size_t>(d), A(0));
    for (int64_t r = 0; r < n; ++r) row.add_scaled(g.data(), grad_output + r * d, A(1), d);
    for (size_t s = 0; s < shares.size(); s += static_cast<size_t>(d)) {
      row.add_scaled(g.data(), shares.data() + s, A(1), d);
    }
    return g;
  }

  // What all gradients have to be multiplied with so that their norm is at most max_norm.
  A clip_factor(double max_norm) const {
    const int64_t groups = (d_sae + kGroup - 1) / kGroup;
    std::vector<A> shares(static_cast<size_t>(groups * d), A(0));
    std::vector<double> squares(static_cast<size_t>(groups), 0.0);
    for_groups([&](int64_t group, int64_t last, Gradient& g) {
      for (int64_t f = group * kGroup; f < last; ++f) {
        if (!gradient(f, g)) continue;
        squares[group] += static_cast<double>(row.row_dot(g.dec.data(), g.dec.data(), d)) +
                          static_cast<double>(row.row_dot(g.enc.data(), g.enc.data(), d)) +
                          static_cast<double>(g.b) * static_cast<double>(g.b);
        add_encoder_share(f, g.b, shares.data() + group * d);
      }
    });
    const std::vector<A> g = b_dec_gradient(shares);
    double total = static_cast<double>(row.row_dot(g.data(), g.data(), d));
    for (double square : squares) total += square;
    return static_cast<A>(std::min(1.0, max_norm / (std::sqrt(total) + 1e-6)));
  }

  void run(double max_norm) const {
    const A scale = std::isinf(max_norm) ? A(1) : clip_factor(max_norm);
    std::vector<A> shares(static_cast<size_t>((d_sae + kGroup - 1) / kGroup * d), A(0));
    const auto move_row = by_rows ? row.adam_mini_row : row.adam_row;
    for_groups([&](int64_t group, int64_t last, Gradient& g) {
      for (int64_t f = group * kGroup; f < last; ++f) {
        const bool any = gradient(f, g);
        add_encoder_share(f, g.b, shares.data() + group * d);
        const Parameter<A> enc = W_enc.row(f, d, by_rows), dec = W_dec.row(f, d, by_rows);
        const Parameter<A> b = b_enc.at(f);
        move_row(enc.p, enc.m, enc.v, any ? g.enc.data() : nullptr, scale, d, adam);
        const A squared =
            move_row(dec.p, dec.m, dec.v, any ? g.dec.data() : nullptr, scale, d, adam);
        if (unit_norm && squared > A(0)) row.scale_row(dec.p, A(1) / std::sqrt(squared), d);
        row.adam_row(b.p, b.m, b.v, &g.b, scale, 1, adam);
      }
    });
    const std::vector<A> g = b_dec_gradient(shares);
    row.adam_row(b_dec.p, b_dec.m, b_dec.v, g.data(), scale, d, adam);
  }
};

void run(AdamCall& c) {
  const int64_t d_sae = c.W_enc.size(0), d = c.W_enc.size(1);
  const SparseActsArgs e = checked_sparse_acts(kOp, c.values, c.indices, c.offsets, d_sae);
  const Tensor grad = as_contiguous(c.grad_values), grad_output = as_contiguous(c.grad_output);
  const Tensor centered = as_contiguous(torch::stable::subtract(c.x, c.b_dec));

  std::vector<int32_t> extra;
  Tensor extra_enc = c.W_enc, extra_dec = c.W_enc, extra_b = c.b_enc;
  if (c.extra_latents) {
    extra.assign(static_cast<size_t>(d_sae), -1);
    const Tensor list = as_contiguous(*c.extra_latents);
    for (int64_t j = 0; j < list.numel(); ++j) {
      const int32_t f = data_of<int32_t>(list)[j];
      FASTSAE_CHECK(f >= 0 && f < d_sae, kOp, ": expected 0 <= rows < d_sae = ", d_sae, ", got ",
                    f);
      FASTSAE_CHECK(extra[f] < 0, kOp, ": expected different rows, got ", f, " twice");
      extra[f] = static_cast<int32_t>(j);
    }
    extra_enc = as_contiguous(*c.extra_W_enc);
    extra_dec = as_contiguous(*c.extra_W_dec);
    extra_b = as_contiguous(*c.extra_b_enc);
  }

  const auto run = [&](auto type) {
    using A = typename decltype(type)::type;
    const int64_t capacity = e.values.numel();
    std::vector<int32_t> lists(static_cast<size_t>(d_sae + 1 + 2 * capacity));
    int32_t *bounds = lists.data(), *tokens = bounds + d_sae + 1, *slots = tokens + capacity;
    counting_sort<A>(e, d_sae, bounds, tokens, slots);
    const auto parameter = [](Tensor& p, Tensor& m, Tensor& v) {
      return Parameter<A>{mutable_data_of<A>(p), mutable_data_of<A>(m), mutable_data_of<A>(v)};
    };
    const Step<A> all{e.n,
                      d,
                      d_sae,
                      parameter(c.W_enc, c.m_W_enc, c.v_W_enc),
                      parameter(c.W_dec, c.m_W_dec, c.v_W_dec),
                      parameter(c.b_enc, c.m_b_enc, c.v_b_enc),
                      parameter(c.b_dec, c.m_b_dec, c.v_b_dec),
                      data_of<A>(e.values),
                      data_of<A>(grad),
                      bounds,
                      tokens,
                      slots,
                      data_of<A>(centered),
                      data_of<A>(grad_output),
                      c.extra_latents ? extra.data() : nullptr,
                      data_of<A>(extra_enc),
                      data_of<A>(extra_dec),
                      data_of<A>(extra_b),
                      c.constants().to<A>(),
                      c.unit_norm,
                      c.by_rows(),
                      kernels<A>(),
                      adam_kernels<A>()};
    all.run(c.max_norm);
  };
  if (c.W_enc.scalar_type() == ScalarType::Double) run(Type<double>{});
  else run(Type<float>{});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("sparse_adam_step_", TORCH_BOX(&sparse_adam_step<&run>));
}

}  // namespace fastsae::cpu
