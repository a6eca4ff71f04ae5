// One training step, latent by latent. For each latent f, while its rows are in cache:
//
//   g_dec = sum over its entries of value grad_output[row],  g_enc = sum of g (x - b_dec)[row],
//   g_b = sum of g;  g_dec loses what points along W_dec[f];  Adam on all three;  |W_dec[f]| <- 1
//
// and -g_b W_enc[f], the part of b_dec in the encoder, is added to the gradient of b_dec. Encoder
// and decoder may have entries of their own. So no
// gradient of a matrix is ever stored: the step reads and writes parameters and Adam's averages
// once, 24 bytes a float32 parameter, and everything else comes from caches. With clipping, a first
// pass over the same sums finds the norm of the whole gradient.
// With one average of squares for each row (Adam-mini) these are 16 bytes a parameter.
//
// Threads own latents, and b_dec is summed over fixed groups of latents in order: the result does
// not depend on the number of threads. Rows without entries take the same step with gradient 0, as
// Adam does with dense gradients.
#include <cmath>
#include <optional>
#include <utility>

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

// Entries by latent, and the rows that the gradient of a matrix is a sum of.
template <class A>
struct Entries {
  const A* values;
  const int32_t *offsets, *rows, *slots;
  const A* x;  // [n, d]
  int64_t d;

  int64_t count(int64_t f) const { return offsets[f + 1] - offsets[f]; }
};

template <class A>
struct Step {
  int64_t d_sae;
  Parameter<A> W_enc, W_dec, b_enc, b_dec;
  Entries<A> enc, dec;
  const int32_t* extra;  // [d_sae]: row of the extra gradients, or -1; or null
  const A *extra_W_enc, *extra_W_dec, *extra_b_enc;
  const A *more_W_enc, *more_W_dec, *more_b_enc;  // gradients of whole parameters, or null
  const A* g_b_dec;                               // [d_out]: without the encoder's share
  double* clip;  // [2] squared norm of other gradients, and the factor found; or null
  AdamConstants<A> adam;
  bool unit_norm, apply_b_dec, by_rows;
  bool bf16_averages;             // m and v of W_enc and W_dec hold bfloat16
  bf16 *bf16_W_enc, *bf16_W_dec;  // get the moved matrices, or null
  const Kernels<A>& kernel;
  const AdamKernels<A>& row;

  struct Gradient {
    std::vector<A> enc, dec, weights;
    bool any_enc, any_dec;  // false: all are 0, and the vector holds something else
    A b;                    // what reaches b_dec through the encoder
  };

  // Adds up the entries of latent f; false without any. Returns the sum of their values in *total.
  bool sum(const Entries<A>& e, int64_t f, Gradient& g, A* out, A* total) const {
    const int64_t begin = e.offsets[f], count = e.count(f);
    if (count == 0) return false;
    if (static_cast<int64_t>(g.weights.size()) < count)
      g.weights.resize(static_cast<size_t>(count));
    A values(0);
    for (int64_t j = 0; j < count; ++j) values += g.weights[j] = e.values[e.slots[begin + j]];
    kernel.gather_sum(g.weights.data(), e.rows + begin, count, 0, e.x, e.d, nullptr, out);
    *total = values;
    return true;
  }

  // Adds the row of a gradient that is given to one that may not be there yet.
  void add(const A* given, int64_t d, bool& any, A* out) const {
    if (any) row.add_scaled(out, given, A(1), d);
    else std::copy(given, given + d, out);
    any = true;
  }

  // Forms the gradients of latent f.
  void gradient(int64_t f, Gradient& g) const {
    A unused;
    g.b = A(0);
    g.any_dec = sum(dec, f, g, g.dec.data(), &unused);
    g.any_enc = sum(enc, f, g, g.enc.data(), &g.b);
    const int64_t more = extra ? extra[f] : -1;
    if (more >= 0) {
      add(extra_W_dec + more * dec.d, dec.d, g.any_dec, g.dec.data());
      add(extra_W_enc + more * enc.d, enc.d, g.any_enc, g.enc.data());
      g.b += extra_b_enc[more];
    }
    if (more_W_dec) add(more_W_dec + f * dec.d, dec.d, g.any_dec, g.dec.data());
    if (more_W_enc) add(more_W_enc + f * enc.d, enc.d, g.any_enc, g.enc.data());
    if (!g.any_dec) return;
    const A* w = W_dec.p + f * dec.d;
    const A squared = row.row_dot(w, w, dec.d);
    if (squared > A(0)) {
      row.add_scaled(g.dec.data(), w, -row.row_dot(g.dec.data(), w, dec.d) / squared, dec.d);
    }
  }

  A b_enc_gradient(int64_t f, const Gradient& g) const {
    return more_b_enc ? g.b + more_b_enc[f] : g.b;
  }

  // Calls f(group, last, gradient) for groups of latents, on threads of about equal work.
  template <class F>
  void for_groups(F&& f) const {
    const int64_t groups = (d_sae + kGroup - 1) / kGroup;
    // A row costs as much as about ten entries (bytes moved); lists may be very unequal.
    const auto cost = [this](int64_t latent) {
      return (int64_t{enc.offsets[latent]} + dec.offsets[latent]) / 2 + 10 * latent;
    };
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
        g.enc.resize(static_cast<size_t>(enc.d));
        g.dec.resize(static_cast<size_t>(dec.d));
        for (int64_t group = bound(part); group < last; ++group) {
          f(group, std::min(d_sae, (group + 1) * kGroup), g);
        }
      }
    });
  }

  // -W_enc^T g_b of one group, added to its share of the gradient of b_dec.
  void add_encoder_share(int64_t f, A g_b, int64_t group, std::vector<A>& shares) const {
    if (apply_b_dec && g_b != A(0)) {
      row.add_scaled(shares.data() + group * dec.d, W_enc.p + f * enc.d, -g_b, enc.d);
    }
  }
  std::vector<A> no_shares() const {
    const int64_t groups = apply_b_dec ? (d_sae + kGroup - 1) / kGroup : 0;
    return std::vector<A>(static_cast<size_t>(groups * dec.d), A(0));
  }

  // The gradient of b_dec with the shares [groups, d].
  std::vector<A> b_dec_gradient(const std::vector<A>& shares) const {
    std::vector<A> g(g_b_dec, g_b_dec + dec.d);
    for (size_t s = 0; s < shares.size(); s += static_cast<size_t>(dec.d)) {
      row.add_scaled(g.data(), shares.data() + s, A(1), dec.d);
    }
    return g;
  }

  // What all gradients have to be multiplied with so that their norm is at most max_norm.
  A clip_factor(double max_norm) const {
    const int64_t groups = (d_sae + kGroup - 1) / kGroup;
    std::vector<A> shares = no_shares();
    std::vector<double> squares(static_cast<size_t>(groups), 0.0);
    for_groups([&](int64_t group, int64_t last, Gradient& g) {
      for (int64_t f = group * kGroup; f < last; ++f) {
        gradient(f, g);
        const double b = static_cast<double>(b_enc_gradient(f, g));
        squares[group] += b * b;
        for (const auto& [any, rows] : {std::pair{g.any_dec, &g.dec}, {g.any_enc, &g.enc}}) {
          const int64_t d = static_cast<int64_t>(rows->size());
          if (any)
            squares[group] += static_cast<double>(row.row_dot(rows->data(), rows->data(), d));
        }
        add_encoder_share(f, g.b, group, shares);
      }
    });
    const std::vector<A> g = b_dec_gradient(shares);
    double total = static_cast<double>(row.row_dot(g.data(), g.data(), dec.d));
    if (clip) total += clip[0];
    for (double square : squares) total += square;
    const double factor = std::min(1.0, max_norm / (std::sqrt(total) + 1e-6));
    if (clip) clip[1] = factor;
    return static_cast<A>(factor);
  }

  // Moves row f of a matrix with gradient scale * g, or 0 if g is null; returns its new square.
  // matrix: 0 for W_enc, 1 for W_dec.
  A move_row(const Parameter<A>& W, int64_t f, const A* g, A scale, int64_t d, int matrix) const {
    if (bf16_averages) {
      const auto average = [&](A* of) { return reinterpret_cast<bf16*>(of) + f * d; };
      return row.adam_row_bf16(W.p + f * d, average(W.m), average(W.v), g, scale, d, adam,
                               dither_of_row(adam.dither, f, matrix));
    }
    const Parameter<A> of = W.row(f, d, by_rows);
    return (by_rows ? row.adam_mini_row : row.adam_row)(of.p, of.m, of.v, g, scale, d, adam);
  }

  void run(double max_norm) const {
    const A scale = std::isinf(max_norm) ? A(1) : clip_factor(max_norm);
    std::vector<A> shares = no_shares();
    for_groups([&](int64_t group, int64_t last, Gradient& g) {
      for (int64_t f = group * kGroup; f < last; ++f) {
        gradient(f, g);
        add_encoder_share(f, g.b, group, shares);
        const Parameter<A> of_b = b_enc.at(f);
        move_row(W_enc, f, g.any_enc ? g.enc.data() : nullptr, scale, enc.d, 0);
        const A squared = move_row(W_dec, f, g.any_dec ? g.dec.data() : nullptr, scale, dec.d, 1);
        A* moved = W_dec.p + f * dec.d;
        if (unit_norm && squared > A(0)) row.scale_row(moved, A(1) / std::sqrt(squared), dec.d);
        if (bf16_W_enc) row.narrow_row(W_enc.p + f * enc.d, enc.d, bf16_W_enc + f * enc.d);
        if (bf16_W_dec) row.narrow_row(moved, dec.d, bf16_W_dec + f * dec.d);
        const A b = b_enc_gradient(f, g);
        row.adam_row(of_b.p, of_b.m, of_b.v, &b, scale, 1, adam);
      }
    });
    const std::vector<A> g = b_dec_gradient(shares);
    row.adam_row(b_dec.p, b_dec.m, b_dec.v, g.data(), scale, dec.d, adam);
  }
};

// Latents [d_sae] of the rows of extra gradients, -1 where there is none.
std::vector<int32_t> rows_of_latents(const Tensor& latents, int64_t d_sae) {
  std::vector<int32_t> rows(static_cast<size_t>(d_sae), -1);
  const Tensor list = as_contiguous(latents);
  for (int64_t j = 0; j < list.numel(); ++j) {
    const int32_t f = data_of<int32_t>(list)[j];
    FASTSAE_CHECK(f >= 0 && f < d_sae, kOp, ": expected 0 <= rows < d_sae = ", d_sae, ", got ", f);
    FASTSAE_CHECK(rows[f] < 0, kOp, ": expected different rows, got ", f, " twice");
    rows[f] = static_cast<int32_t>(j);
  }
  return rows;
}

void run(AdamCall& c) {
  const AdamRate<double> rate =
      adam_rate(c.lr_tensor ? *data_of<double>(*c.lr_tensor) : c.lr, c.beta1, c.beta2,
                c.step_tensor ? *data_of<int64_t>(*c.step_tensor) : c.step, c.rounding_seed);
  if (rate.inverse_correction2 == 0) return;
  const int64_t d_sae = c.W_enc.size(0);
  const SparseActsArgs dec = checked_sparse_acts(kOp, c.values, c.indices, c.offsets, d_sae);
  const Tensor grad_values = as_contiguous(c.grad_values);
  const bool own = c.enc_indices.has_value();  // whether the encoder has entries of its own
  const SparseActsArgs enc =
      own ? checked_sparse_acts(kOp, grad_values, *c.enc_indices, c.enc_offsets, d_sae) : dec;
  const Tensor grad_output = as_contiguous(c.grad_output);
  const Tensor x = as_contiguous(c.apply_b_dec ? torch::stable::subtract(c.x, c.b_dec) : c.x);
  const auto optional = [](const std::optional<Tensor>& t) {
    return t ? std::optional<Tensor>(as_contiguous(*t)) : std::nullopt;
  };
  const std::optional<Tensor> extra_enc = optional(c.extra_W_enc),
                              more_enc = optional(c.grad_W_enc);
  const std::optional<Tensor> extra_dec = optional(c.extra_W_dec),
                              more_dec = optional(c.grad_W_dec);
  const std::optional<Tensor> extra_b = optional(c.extra_b_enc), more_b = optional(c.grad_b_enc);
  std::vector<int32_t> extra;
  if (c.extra_latents) extra = rows_of_latents(*c.extra_latents, d_sae);

  const auto run = [&](auto type) {
    using A = typename decltype(type)::type;
    const auto pointer = [](const std::optional<Tensor>& t) {
      return t ? data_of<A>(*t) : static_cast<const A*>(nullptr);
    };
    const auto copy = [](std::optional<Tensor>& t) {
      return t ? static_cast<bf16*>(t->mutable_data_ptr()) : nullptr;
    };
    const auto parameter = [](Tensor& p, Tensor& m, Tensor& v) {
      const auto data = [](Tensor& t) { return static_cast<A*>(t.mutable_data_ptr()); };
      return Parameter<A>{data(p), data(m), data(v)};
    };
    std::vector<int32_t> dec_lists, enc_lists;
    const auto sort = [&](const SparseActsArgs& e, std::vector<int32_t>& lists) {
      const int64_t capacity = e.values.numel();
      lists.resize(static_cast<size_t>(d_sae + 1 + 2 * capacity));
      int32_t* rows = lists.data() + d_sae + 1;
      counting_sort<A>(e, d_sae, lists.data(), rows, rows + capacity);
    };
    const auto entries = [&](const Tensor& values, const std::vector<int32_t>& lists,
                             const Tensor& x) {
      const int32_t* rows = lists.data() + d_sae + 1;
      return Entries<A>{data_of<A>(values),    lists.data(),  rows,
                        rows + values.numel(), data_of<A>(x), x.size(1)};
    };
    sort(dec, dec_lists);
    if (own) sort(enc, enc_lists);

    const AdamKernels<A>& row = adam_kernels<A>();
    const int64_t d_out = c.W_dec.size(1);
    std::vector<A> g_b_dec(static_cast<size_t>(d_out), A(0));
    if (c.grad_b_dec) {
      std::copy_n(data_of<A>(*c.grad_b_dec), d_out, g_b_dec.data());
    } else {
      for (int64_t r = 0; r < dec.n; ++r) {
        row.add_scaled(g_b_dec.data(), data_of<A>(grad_output) + r * d_out, A(1), d_out);
      }
    }
    const Step<A> all{d_sae,
                      parameter(c.W_enc, c.m_W_enc, c.v_W_enc),
                      parameter(c.W_dec, c.m_W_dec, c.v_W_dec),
                      parameter(c.b_enc, c.m_b_enc, c.v_b_enc),
                      parameter(c.b_dec, c.m_b_dec, c.v_b_dec),
                      entries(grad_values, own ? enc_lists : dec_lists, x),
                      entries(dec.values, dec_lists, grad_output),
                      c.extra_latents ? extra.data() : nullptr,
                      pointer(extra_enc),
                      pointer(extra_dec),
                      pointer(extra_b),
                      pointer(more_enc),
                      pointer(more_dec),
                      pointer(more_b),
                      g_b_dec.data(),
                      c.clip ? mutable_data_of<double>(*c.clip) : nullptr,
                      {c.settings().to<A>(), rate.to<A>()},
                      c.unit_norm,
                      c.apply_b_dec,
                      c.by_rows(),
                      c.bf16_averages(),
                      copy(c.bf16_W_enc),
                      copy(c.bf16_W_dec),
                      kernels<A>(),
                      row};
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
