// The operator group_by_latent on CUDA: check, allocate, launch on the current stream, register.
#include "cuda/group_by_latent.h"

#include "cuda/sparse_acts_args.h"

namespace fastsae::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> group_by_latent(const Tensor& values, const Tensor& indices,
                                                   std::optional<Tensor> offsets, int64_t d_sae) {
  constexpr const char* op = "group_by_latent";
  check_d_sae(op, d_sae);
  const Format format = format_of(op, "values", values);
  const DeviceScope device(values);
  const SparseActsArgs e = checked_sparse_acts(op, values, indices, offsets, d_sae,
                                               values.scalar_type(), "values", values);
  Tensor bounds = new_empty(values, {d_sae + 1}, ScalarType::Int);
  Tensor rows = new_empty(values, {e.params.capacity}, ScalarType::Int);
  Tensor slots = new_empty(values, {e.params.capacity}, ScalarType::Int);
  Tensor space = scratch(values, group_by_latent_scratch(e.params));
  const GroupByLatentParams params{e.params, mutable_data_of<int32_t>(bounds),
                                   mutable_data_of<int32_t>(rows), mutable_data_of<int32_t>(slots),
                                   space.mutable_data_ptr()};
  check_launch(op, launch_group_by_latent(params, format, device.stream()));
  return {bounds, rows, slots};
}

}  // namespace

FASTSAE_CUDA_LIBRARY_IMPL(m) {
  m.impl("group_by_latent", TORCH_BOX(&group_by_latent));
}

}  // namespace fastsae::cuda
