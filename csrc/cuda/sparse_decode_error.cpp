// The operator sparse_decode_error on CUDA: check, allocate, launch, register.
#include "cuda/sparse_decode_error.h"

#include <tuple>

#include "cuda/sparse_acts_args.h"

namespace fastsae::cuda {
namespace {

using Found = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Found sparse_decode_error(const Tensor& values, const Tensor& indices,
                          std::optional<Tensor> offsets, const Tensor& W_dec,
                          std::optional<Tensor> b_dec, const Tensor& target_in,
                          std::optional<Tensor> bf16_W_dec) {
  constexpr const char* op = "sparse_decode_error";
  check_matrix(op, "W_dec", W_dec);
  const Format format = format_of(op, "W_dec", W_dec);
  const int64_t d = W_dec.size(1);
  check_values_type(op, values, "W_dec", W_dec);
  check_device(op, "target", target_in, W_dec, "W_dec");
  check_decoder_bias(op, b_dec, W_dec);
  const DeviceScope device(W_dec);
  const Tensor W = as_contiguous(checked_decoder_rows(op, W_dec, bf16_W_dec));
  const Tensor target = as_contiguous(target_in);
  const SparseActsArgs e = checked_sparse_acts(op, values, indices, offsets, W.size(0),
                                               W_dec.scalar_type(), "W_dec", W_dec);
  const int64_t n = e.params.n;
  FASTSAE_CHECK(target.dim() == 2 && target.size(0) == n && target.size(1) == d, op,
                ": expected target to be [", n, ", ", d, "], got ", shape_of(target));
  FASTSAE_CHECK(target.scalar_type() == W_dec.scalar_type(), op,
                ": expected target to have the dtype of W_dec");
  std::optional<Tensor> bias;
  if (b_dec) bias = as_contiguous(*b_dec);
  const ScalarType sums = accumulator_type(W_dec);
  Tensor out = new_empty(W, {n, d}, W_dec.scalar_type()), error = new_empty(W, {n, d}, sums);
  Tensor squared = new_empty(W, {n}, sums);
  Tensor products =
      offsets ? new_empty(W, {e.params.capacity}, sums) : new_empty(W, {n, e.params.k}, sums);
  const DecodeErrorParams params{
      e.params,
      W.const_data_ptr(),
      bias ? bias->const_data_ptr() : nullptr,
      target.const_data_ptr(),
      static_cast<int32_t>(d),
      out.mutable_data_ptr(),
      error.mutable_data_ptr(),
      squared.mutable_data_ptr(),
      products.mutable_data_ptr(),
  };
  check_launch(
      op, launch_sparse_decode_error(params, format_of(op, "W_dec", W), format, device.stream()));
  return {out, error, squared, products};
}

}  // namespace

FASTSAE_CUDA_LIBRARY_IMPL(m) {
  m.impl("sparse_decode_error", TORCH_BOX(&sparse_decode_error));
}

}  // namespace fastsae::cuda
