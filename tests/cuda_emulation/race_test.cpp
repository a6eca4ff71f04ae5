// The kernels alone, to run under a sanitizer: compares topk with a sort, prints what is wrong.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/topk.h"

using fastsae::cuda::Format;
using fastsae::cuda::launch_topk;

static int wrong_topk(int n, int m, int k, unsigned distinct, bool sorted) {
  std::mt19937 generator(7);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(n) * m);
  for (float& v : x) v = distinct ? static_cast<float>(generator() % distinct) : normal(generator);
  std::vector<float> values(static_cast<size_t>(n) * k);
  std::vector<int32_t> indices(values.size());
  fastsae::cuda::TopkParams params{x.data(), nullptr,       nullptr,       n, m, k, sorted,
                                   false,    values.data(), indices.data()};
  std::vector<char> space(
      static_cast<size_t>(fastsae::cuda::topk_scratch(params, Format::kFloat32)));
  params.scratch = space.data();
  const char* error = launch_topk(params, Format::kFloat32, nullptr);
  if (error) {
    std::printf("%s\n", error);
    return 1;
  }
  int wrong = 0;
  std::vector<int> order(static_cast<size_t>(m));
  for (int r = 0; r < n; ++r) {
    const float* row = x.data() + static_cast<size_t>(r) * m;
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [row](int a, int b) { return row[a] > row[b]; });
    if (!sorted) std::sort(order.begin(), order.begin() + k);
    for (int j = 0; j < k; ++j) {
      const size_t at = static_cast<size_t>(r) * k + j;
      wrong += indices[at] != order[j] || values[at] != row[order[j]];
    }
  }
  std::printf("topk n=%d m=%d k=%d distinct=%u sorted=%d: %d wrong\n", n, m, k, distinct, sorted,
              wrong);
  return wrong;
}

int main() {
  int wrong = 0;
  for (const bool sorted : {false, true}) {
    wrong += wrong_topk(6, 2048, 24, 0, sorted) + wrong_topk(5, 999, 100, 7, sorted) +
             wrong_topk(3, 100, 10, 0, sorted);
  }
  return wrong != 0;
}
