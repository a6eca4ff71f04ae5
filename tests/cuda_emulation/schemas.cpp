// The emulated kernels as operators on CPU tensors, in a namespace of their own.
#include "torch.h"

STABLE_TORCH_LIBRARY(fastsae_emulated, m) {
  m.def("topk(Tensor x, int k, bool sorted) -> (Tensor values, Tensor indices)");
}
