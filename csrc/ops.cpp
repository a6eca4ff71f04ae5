// Every operator of the library: the table of contents.
//
// Shapes: n tokens, F = d_sae latents, d width of an activation, k active latents per token.
// Sparse activations travel as (values, indices, offsets): offsets is absent for the fixed-k layout
// [n, k] and [n + 1] for the variable layout [capacity]; see
// python/fastsae/reference/sparse_acts.py. Both weight matrices are feature-major, [F, d]. Indices,
// offsets, rows and slots are int32. Numbers that may follow from a batch size are SymInt, so that
// a graph compiled or exported for one batch size serves all of them; kernels get them as int64_t.
#include "torch.h"

// The tests compile this again, for the emulated kernels.
#ifndef FASTSAE_NAMESPACE
#define FASTSAE_NAMESPACE fastsae
#endif
#define FASTSAE_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)

FASTSAE_LIBRARY(FASTSAE_NAMESPACE, m) {
  // The k largest entries of each row of x [n, F]; ascending index, or descending value if sorted.
  m.def("topk(Tensor x, int k, bool sorted) -> (Tensor values, Tensor indices)");

  // The `budget` largest positive entries of the whole matrix x [n, F], and the smallest of their
  // values. threshold_guess [] may predict it; a wrong prediction costs only time.
  m.def(
      "batch_topk(Tensor x, SymInt budget, Tensor? threshold_guess)"
      " -> (Tensor values, Tensor indices, Tensor offsets, Tensor threshold)");

  // The m[j] largest positive entries of each column j of x [n, F]; m [F] int32, and
  // capacity >= the sum of min(m, n).
  m.def(
      "feature_topk(Tensor x, Tensor m, SymInt capacity)"
      " -> (Tensor values, Tensor indices, Tensor offsets)");

  // Entries of x [n, F] above threshold ([] or [F]); the `capacity` largest of them if there are
  // more.
  m.def(
      "threshold_select(Tensor x, Tensor threshold, SymInt capacity)"
      " -> (Tensor values, Tensor indices, Tensor offsets)");

  // topk, batch_topk and threshold_select of (x - b_dec) W_enc^T + b_enc, which is never stored
  // whole. Only latents where mask [F] is true are eligible. bf16_product: both factors of the
  // matmul may be rounded to bfloat16, its sums are float32. absolute: by magnitude.
  m.def(
      "encode_topk(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor? b_dec, int k, Tensor? mask,"
      " bool relu, bool absolute, bool bf16_product) -> (Tensor values, Tensor indices)");
  m.def(
      "encode_batch_topk(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor? b_dec, SymInt budget,"
      " Tensor? mask, bool bf16_product, Tensor? threshold_guess)"
      " -> (Tensor values, Tensor indices, Tensor offsets, Tensor threshold)");
  m.def(
      "encode_threshold(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor? b_dec, Tensor threshold,"
      " SymInt capacity, bool bf16_product) -> (Tensor values, Tensor indices, Tensor offsets)");

  // relu of the largest of each of k equal groups of columns of that matrix.
  m.def(
      "encode_group_max(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor? b_dec, int k,"
      " bool bf16_product) -> (Tensor values, Tensor indices)");

  // relu of its entries z of each row where relu(z) (1 + beta |e|) is among the k largest, with
  // e = grad W_dec^T, over the mean of |e| in the row if normalize.
  m.def(
      "encode_gradient_topk(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor? b_dec, Tensor grad,"
      " Tensor W_dec, int k, float beta, bool normalize, bool bf16_product)"
      " -> (Tensor values, Tensor indices)");

  // Of each of its columns, with a = relu: the norm of a, or the entropy of a / sum(a); and the
  // budget-th largest positive entry, as encode_batch_topk's threshold.
  m.def(
      "latent_scores(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor? b_dec, bool entropy,"
      " SymInt budget, bool bf16_product) -> (Tensor scores, Tensor threshold)");

  // a [n, k] b [k, m] (+ bias [m]), relu of it, and 0 where `where` [n, m] is 0. CPU only; has no
  // derivative. Codes that are hardly sparse are multiplied by it, see ops/_matmul.py.
  m.def("dense_matmul(Tensor a, Tensor b, Tensor? bias, Tensor? where, bool relu) -> Tensor");

  // out[n, d] = sum over the active entries j of row n of values_j W_dec[indices_j] (+ b_dec).
  // Decoders read the rows of bf16_W_dec, in bfloat16, in place of those of a float32 W_dec; all
  // else remains float32, and gradients are those of W_dec.
  m.def(
      "sparse_decode(Tensor values, Tensor indices, Tensor? offsets, Tensor W_dec, Tensor? b_dec,"
      " Tensor? bf16_W_dec=None) -> Tensor");

  // Gradient of sparse_decode in values: <grad[row], W_dec[index]>, 0 for inactive entries.
  m.def(
      "sparse_decode_values_grad(Tensor grad, Tensor values, Tensor indices, Tensor? offsets,"
      " Tensor W_dec, Tensor? bf16_W_dec=None) -> Tensor");

  // sparse_decode, and what the squared error of its result needs, from one gather: error = out -
  // target [n, d], squared [n] = the sum of error^2 of each row, and products, in the shape of
  // values, <error[row], W_dec[index]>, 0 for inactive entries. error, squared and products are in
  // the dtype of sums. products have no derivative.
  m.def(
      "sparse_decode_error(Tensor values, Tensor indices, Tensor? offsets, Tensor W_dec,"
      " Tensor? b_dec, Tensor target, Tensor? bf16_W_dec=None)"
      " -> (Tensor out, Tensor error, Tensor squared, Tensor products)");

  // The active entries grouped by latent, rows ascending: offsets [F + 1], rows [capacity], slots
  // [capacity].
  m.def(
      "group_by_latent(Tensor values, Tensor indices, Tensor? offsets, SymInt d_sae)"
      " -> (Tensor offsets, Tensor rows, Tensor slots)");

  // weight[f] = sum over f's list of values[slot] x[row]; bias[f] = sum of values[slot].
  m.def(
      "sparse_weight_grad(Tensor values, Tensor offsets, Tensor rows, Tensor slots, Tensor x)"
      " -> (Tensor weight, Tensor bias)");

  // One training step of both matrices and both biases, latent by latent, without a gradient
  // tensor. m_, v_: Adam's averages of each. The gradient of W_dec is made of the entries (values,
  // indices, offsets) of the rows of grad_output, that of W_enc and b_enc of the entries
  // (grad_values, enc_indices, enc_offsets) of the rows of x; without enc_indices these are the
  // same entries. extra_*: more gradients of some latents (from an auxiliary loss). grad_*: more
  // gradients of whole parameters; grad_b_dec takes the place of the sum of grad_output.
  // apply_b_dec: b_dec is subtracted from x. A max_norm of inf does not clip; clip [2] holds the
  // squared norm of other gradients, and gets the factor that clipping multiplies all with.
  // lr_tensor [] float64 and step_tensor [] int64 are read in place of lr and step when the step is
  // done; with a step_tensor below 1 it is not. bf16_W_enc and bf16_W_dec get the new matrices,
  // rounded to bfloat16. m_ and v_ of both matrices may be bfloat16: rounded stochastically, by a
  // generator that rounding_seed and the step seed.
  m.def(
      "sparse_adam_step_(Tensor(a!) W_enc, Tensor(b!) W_dec, Tensor(c!) b_enc, Tensor(d!) b_dec,"
      " Tensor(e!) m_W_enc, Tensor(f!) m_W_dec, Tensor(g!) m_b_enc, Tensor(h!) m_b_dec,"
      " Tensor(i!) v_W_enc, Tensor(j!) v_W_dec, Tensor(k!) v_b_enc, Tensor(l!) v_b_dec,"
      " Tensor values, Tensor indices, Tensor? offsets, Tensor grad_output,"
      " Tensor grad_values, Tensor? enc_indices, Tensor? enc_offsets, Tensor x,"
      " Tensor? extra_latents, Tensor? extra_W_enc, Tensor? extra_W_dec, Tensor? extra_b_enc,"
      " Tensor? grad_W_enc, Tensor? grad_W_dec, Tensor? grad_b_enc, Tensor? grad_b_dec,"
      " Tensor(m!)? clip, float lr, float beta1, float beta2, float eps, int step, float max_norm,"
      " bool unit_norm, bool apply_b_dec, bool bf16_rows, Tensor? lr_tensor=None,"
      " Tensor? step_tensor=None, Tensor(n!)? bf16_W_enc=None, Tensor(o!)? bf16_W_dec=None, int "
      "rounding_seed=0) -> ()");
}
