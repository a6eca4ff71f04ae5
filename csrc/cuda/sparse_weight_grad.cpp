// The operator sparse_weight_grad on CUDA: check, allocate, launch, register.
#include "cuda/sparse_weight_grad.h"

#include "cuda/sparse_acts_args.h"

namespace fastsae::cuda {
namespace {

std::tuple<Tensor, Tensor> sparse_weight_grad(const Tensor& values_in, const Tensor& offsets_in,
                                              const Tensor& rows_in, const Tensor& slots_in,
                                              const Tensor& x_in) {
  constexpr const char* op = "sparse_weight_grad";
  check_matrix(op, "x", x_in);
  const Format format = format_of(op, "x", x_in);
  check_values_type(op, values_in, "x", x_in);
  check_lists_layout(op, offsets_in, rows_in, slots_in);
  check_device(op, "values", values_in, x_in);
  check_device(op, "offsets", offsets_in, x_in);
  check_device(op, "rows", rows_in, x_in);
  check_device(op, "slots", slots_in, x_in);
  check_entries(op, values_in.numel());
  check_entries(op, rows_in.numel());
  const DeviceScope device(x_in);
  const Tensor x = as_contiguous(x_in), offsets = as_contiguous(offsets_in),
               rows = as_contiguous(rows_in), slots = as_contiguous(slots_in),
               values = as_contiguous(values_in);
  const int64_t d_sae = offsets.size(0) - 1, d = x.size(1);
  Tensor weight = new_empty(x, {d_sae, d}, x.scalar_type());
  Tensor bias = new_empty(x, {d_sae}, x.scalar_type());
  const ListsParams lists{data_of<int32_t>(offsets),
                          data_of<int32_t>(rows),
                          data_of<int32_t>(slots),
                          static_cast<int32_t>(d_sae),
                          static_cast<int32_t>(rows.numel()),
                          static_cast<int32_t>(std::min<int64_t>(x.size(0), INT32_MAX)),
                          values.const_data_ptr(),
                          static_cast<int32_t>(values.numel()),
                          is_wide(values, x.scalar_type())};
  WeightGradParams params{lists, x.const_data_ptr(), static_cast<int32_t>(d),
                          weight.mutable_data_ptr(), bias.mutable_data_ptr()};
  Tensor space = scratch(x, sparse_weight_grad_scratch(params, format));
  params.scratch = space.mutable_data_ptr();
  check_launch(op, launch_sparse_weight_grad(params, format, device.stream()));
  return {weight, bias};
}

}  // namespace

FASTSAE_CUDA_LIBRARY_IMPL(m) {
  m.impl("sparse_weight_grad", TORCH_BOX(&sparse_weight_grad));
}

}  // namespace fastsae::cuda
