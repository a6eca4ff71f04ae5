// The primitives of csrc/cuda/hopper_*.cuh, each in a kernel of its own, and the product made of
// them, against values that are computed here in another way. A program: `hopper_cases [CASE]`
// prints "wrong: ..." or what the emulator says, and ends with 1, if something is not right.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "cuda/hopper_copy.cuh"
#include "cuda/hopper_mma.cuh"
#include "cuda/hopper_product.h"
#include "cuda/hopper_select.h"
#include "cuda/hopper_topk.h"

namespace fastsae::cuda {
namespace {

int wrong = 0;

void expect(bool right, const std::string& what) {
  if (right) return;
  if (wrong++ < 5) std::printf("wrong: %s\n", what.c_str());
}

std::string place(int64_t row, int64_t column, double got, double want) {
  return "(" + std::to_string(row) + ", " + std::to_string(column) + "): expected " +
         std::to_string(want) + ", got " + std::to_string(got);
}

struct Matrix {
  int rows, columns;
  std::vector<uint4> memory;  // aligned to 16 bytes

  Matrix(int rows, int columns)
      : rows(rows), columns(columns), memory(static_cast<size_t>(rows * columns) / 8 + 1) {}
  uint16_t* data() { return reinterpret_cast<uint16_t*>(memory.data()); }
  uint16_t& at(int row, int column) { return data()[row * columns + column]; }
  float value(int row, int column) { return half_bits(at(row, column)); }
  static float half_bits(uint16_t bits) {
    return bits_as<float>(static_cast<uint32_t>(bits) << 16);
  }

  static Matrix random(int rows, int columns, unsigned seed) {
    Matrix m(rows, columns);
    std::mt19937 bits(seed);
    std::normal_distribution<float> normal;
    for (int i = 0; i < rows * columns; ++i) m.data()[i] = float_to_bfloat16(normal(bits));
    return m;
  }
};

// ---- barriers: values go through a ring of 2 places, from one warp to 32 threads of another ----

constexpr int kRounds = 7;

__global__ void ring_kernel(int* seen) {
  FASTSAE_DYN_SMEM(unsigned char, raw);
  int* value = reinterpret_cast<int*>(raw);
  const uint32_t full = shared_address(raw) + 16, empty = full + 16;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    for (uint32_t i = 0; i < 2; ++i) {
      init_barrier(full + 8 * i, 32);
      init_barrier(empty + 8 * i, 32);
    }
  }
  __syncthreads();  // the barriers are there
  for (int round = 0; round < kRounds; ++round) {
    const uint32_t at = static_cast<uint32_t>(round) % 2;
    const unsigned parity = static_cast<unsigned>(round) / 2 % 2;
    if (threadIdx.x < 32) {
      wait_phase(empty + 8 * at, parity ^ 1u);
      if (lane == 0) value[at] = 100 + round;
      arrive(full + 8 * at);
    } else {
      wait_phase(full + 8 * at, parity);
      seen[32 * round + lane] = value[at];
      arrive(empty + 8 * at);
    }
  }
}

void barriers() {
  std::vector<int> seen(32 * kRounds, -1);
  FASTSAE_LAUNCH(ring_kernel, 1, 64, 64, nullptr, seen.data());
  for (int i = 0; i < 32 * kRounds; ++i) {
    expect(seen[static_cast<size_t>(i)] == 100 + i / 32,
           place(i / 32, i % 32, seen[static_cast<size_t>(i)], 100 + i / 32));
  }
}

// ---- copies: tiles of a ragged matrix, as they lie in shared memory ----

constexpr int kBoxRows = 24, kBoxBytes = kBoxRows * 2 * kTileDepth;

__global__ void copy_kernel(const __grid_constant__ TensorMap map, int row, uint16_t* out) {
  FASTSAE_DYN_SMEM(unsigned char, raw);
  const uint32_t tiles = (shared_address(raw) + 1023) / 1024 * 1024,
                 barrier = tiles + 2 * kBoxBytes;
  if (threadIdx.x == 0) {
    init_barrier(barrier, 1);
    show_to_async_units();
  }
  __syncthreads();  // the barrier is there
  if (threadIdx.x == 0) {
    arrive_expecting(barrier, 2 * kBoxBytes);
    load_tile(tiles, map, 0, row, barrier);
    load_tile(tiles + kBoxBytes, map, kTileDepth, row, barrier);
  }
  wait_phase(barrier, 0);
  const uint16_t* from = reinterpret_cast<const uint16_t*>(raw + (tiles - shared_address(raw)));
  for (unsigned i = threadIdx.x; i < kBoxBytes; i += blockDim.x) out[i] = from[i];
}

void copies() {
  for (const int row : {0, 8, 40}) {
    Matrix m = Matrix::random(50, 104, 1);
    TensorMap map;
    expect(describe_matrix(&map, m.data(), m.rows, m.columns, kBoxRows) == nullptr, "description");
    std::vector<uint16_t> out(kBoxBytes, 0x7fc0);  // 2 bytes each, of two tiles
    allow_shared(&copy_kernel, 40 * 1024);
    FASTSAE_LAUNCH(copy_kernel, 1, 96, 40 * 1024, nullptr, map, row, out.data());
    for (int tile = 0; tile < 2; ++tile) {
      for (int r = 0; r < kBoxRows; ++r) {
        for (int c = 0; c < kTileDepth; ++c) {
          const int column = tile * kTileDepth + c;
          const bool inside = row + r < m.rows && column < m.columns;
          const uint16_t want = inside ? m.at(row + r, column) : uint16_t{0};
          const int piece = c / 8 ^ r % 8;
          const uint16_t got =
              out[static_cast<size_t>((tile * kBoxRows + r) * kTileDepth + 8 * piece + c % 8)];
          expect(got == want, "copied " + place(row + r, column, got, want));
        }
      }
    }
  }
  Matrix m(4, 12);
  TensorMap map;
  expect(describe_matrix(&map, m.data(), 4, 12, 4) != nullptr, "a pitch of 24 bytes was accepted");
  expect(describe_matrix(&map, m.data() + 1, 4, 8, 4) != nullptr, "an odd address was accepted");
}

// ---- products: operands that threads wrote; two groups, of which the first is waited for alone --

constexpr int kDepth = 64;

__global__ void product_kernel(const uint16_t* a, const uint16_t* b, float* out, float* early) {
  FASTSAE_DYN_SMEM(unsigned char, raw);
  const uint32_t start = shared_address(raw), at_a = (start + 1023) / 1024 * 1024;
  const uint32_t at_b = at_a + kProductRows * 128;
  const auto write = [&](uint32_t to, const uint16_t* from, int rows) {
    for (int i = static_cast<int>(threadIdx.x); i < rows * kDepth; i += 128) {
      const int row = i / kDepth, column = i % kDepth;
      const uint32_t byte =
          to + static_cast<uint32_t>(128 * row + (column / 8 ^ row % 8) * 16 + column % 8 * 2);
      memcpy(raw + (byte - start), from + i, 2);
    }
  };
  write(at_a, a, kProductRows);
  write(at_b, b, kProductColumns);
  show_to_async_units();
  __syncthreads();  // written, and shown, before anyone multiplies
  float s[kSums] = {};
  fence_products();
  multiply_add(s, operand(at_a), operand(at_b), false);
  multiply_add(s, operand(at_a + 32), operand(at_b + 32), true);
  commit_products();
  multiply_add(s, operand(at_a + 64), operand(at_b + 64), true);
  multiply_add(s, operand(at_a + 96), operand(at_b + 96), true);
  commit_products();
  wait_products<1>(s);
  early[threadIdx.x] = s[0];
  wait_products<0>(s);
  const int row = first_row_of_sums(), column = first_column_of_sums();
  for (int i = 0; i < kSums; ++i) {
    out[(row + 8 * (i / 2 % 2)) * kProductColumns + column + 8 * (i / 4) + i % 2] = s[i];
  }
}

void products() {
  Matrix a(kProductRows, kDepth), b(kProductColumns, kDepth);
  std::mt19937 bits(2);
  for (Matrix* m : {&a, &b}) {  // integers: every order of the sums gives the same
    for (int i = 0; i < m->rows * m->columns; ++i) {
      m->data()[i] = float_to_bfloat16(static_cast<float>(static_cast<int>(bits() % 17) - 8));
    }
  }
  std::vector<float> out(kProductRows * kProductColumns, -1e9f), early(128);
  const size_t shared = 1024 + (kProductRows + kProductColumns) * 128;
  allow_shared(&product_kernel, shared);
  FASTSAE_LAUNCH(product_kernel, 1, 128, shared, nullptr, a.data(), b.data(), out.data(),
                 early.data());
  for (int r = 0; r < kProductRows; ++r) {
    for (int c = 0; c < kProductColumns; ++c) {
      double want = 0;
      for (int k = 0; k < kDepth; ++k) want += double{a.value(r, k)} * b.value(c, k);
      const float got = out[static_cast<size_t>(r * kProductColumns + c)];
      expect(got == static_cast<float>(want), "product " + place(r, c, got, want));
    }
  }
  for (const float s : early) expect(s != s, "sums are there while their product is under way");
}

// ---- the product of whole matrices, against float64 ----

void multiply(int n, int columns, int d, unsigned seed) {
  Matrix x = Matrix::random(n, d, seed), W = Matrix::random(columns, d, seed + 1);
  std::vector<float> out(static_cast<size_t>(n * columns) + 2, 12345.0f);
  HopperProductParams p{x.data(), W.data(), n, columns, d, out.data() + 1 - (columns % 2 == 0),
                        columns};
  const char* error = launch_hopper_product(p, nullptr);
  expect(error == nullptr, error ? error : "");
  const std::string shape =
      std::to_string(n) + " x " + std::to_string(columns) + " x " + std::to_string(d);
  for (int r = 0; r < n; ++r) {
    for (int c = 0; c < columns; ++c) {
      double want = 0, size = 0;
      for (int k = 0; k < d; ++k) {
        const double term = double{x.value(r, k)} * W.value(c, k);
        want += term;
        size += std::fabs(term);
      }
      const double got =
          p.out[static_cast<size_t>(r) * static_cast<size_t>(columns) + static_cast<size_t>(c)];
      // d roundings of at most half a unit of the sum of magnitudes.
      expect(std::fabs(got - want) <= d * size * 0x1p-24, shape + " " + place(r, c, got, want));
    }
  }
  expect(p.out[-(columns % 2)] == 12345.0f || columns % 2 == 0,
         shape + ": written before the output");
  expect(p.out[static_cast<size_t>(n) * static_cast<size_t>(columns)] == 12345.0f,
         shape + ": written behind the output");
}

void matrices() {
  multiply(1, 1, 8, 1);
  multiply(128, 256, 64, 2);
  multiply(130, 259, 72, 3);   // 4 tiles, each of them ragged
  multiply(40, 1290, 328, 4);  // more stages than the ring has, and several tiles to a block
  multiply(300, 70, 600, 5);
  expect(launch_hopper_product({nullptr, nullptr, 0, 4, 8, nullptr, 4}, nullptr) == nullptr,
         "no rows");
}

void not_numbers() {
  Matrix x = Matrix::random(3, 16, 1), W = Matrix::random(5, 16, 2);
  x.at(1, 3) = 0x7fc0;  // NaN
  W.at(4, 0) = 0x7f80;  // +inf
  x.at(0, 0) = x.at(2, 0) = float_to_bfloat16(-1.0f);
  std::vector<float> out(15);
  launch_hopper_product({x.data(), W.data(), 3, 5, 16, out.data(), 5}, nullptr);
  for (int i = 0; i < 15; ++i) {
    const float got = out[static_cast<size_t>(i)];
    if (i / 5 == 1) expect(got != got, place(1, i % 5, got, NAN));
    else if (i % 5 == 4) expect(got == -INFINITY, place(i / 5, 4, got, -INFINITY));
    else expect(std::isfinite(got), place(i / 5, i % 5, got, 0));
  }
}

// ---- selection within the product, against a sort of the product's own sums ----

enum class Kind { kNormal, kTies, kAscending, kSpecial };

// What is selected from: the factors, what is added to a column, and whether it counts.
struct Problem {
  int n, m, d;
  Kind kind;
  Matrix x = Matrix::random(n, d, 11), W = Matrix::random(m, d, 12);
  std::vector<float> bias = std::vector<float>(static_cast<size_t>(m));
  std::vector<uint8_t> mask = std::vector<uint8_t>(static_cast<size_t>(m));

  Problem(int n, int m, int d, Kind kind) : n(n), m(m), d(d), kind(kind) {
    std::mt19937 bits(13);
    for (int i = 0; i < m * d && kind == Kind::kTies; ++i) {
      W.data()[i] = float_to_bfloat16(static_cast<float>(bits() % 2));
    }
    for (int i = 0; i < n * d && kind == Kind::kTies; ++i) {
      x.data()[i] = float_to_bfloat16(static_cast<float>(bits() % 2));
    }
    if (kind == Kind::kAscending) {  // later columns are larger in half of the rows
      for (int j = 0; j < m; ++j) W.at(j, 0) = float_to_bfloat16(static_cast<float>(j));
      for (int r = 0; r < n; ++r) x.at(r, 0) = float_to_bfloat16(r % 2 ? 1.0f : -0.01f);
    }
    if (kind == Kind::kSpecial) {
      for (int i = 0; i < 6; ++i)
        W.at(static_cast<int>(bits() % static_cast<unsigned>(m)), i) = i % 2 ? 0x7fc0 : 0xff80;
      x.at(0, 2) = 0x7f80;
      for (int k = 0; k < d; ++k) x.at(n - 1, k) = 0;
    }
    for (float& b : bias) b = static_cast<float>(static_cast<int>(bits() % 9) - 4) / 4;
    for (uint8_t& b : mask) b = bits() % 4 != 0;
  }

  std::vector<float> sums() {
    std::vector<float> sums(static_cast<size_t>(n * m));
    launch_hopper_product({x.data(), W.data(), n, m, d, sums.data(), m}, nullptr);
    return sums;
  }
};

struct Choice {
  int n, m, d, k;
  Kind kind;
  bool bias, mask, relu, absolute;
};

void choose(const Choice& c) {
  Problem problem(c.n, c.m, c.d, c.kind);
  Matrix& x = problem.x;
  Matrix& W = problem.W;
  const std::vector<float>& bias = problem.bias;
  const std::vector<uint8_t>& mask = problem.mask;
  const std::vector<float> sums = problem.sums();
  const size_t size = static_cast<size_t>(c.n * c.k);
  std::vector<float> values(size, NAN);
  std::vector<int32_t> indices(size, -1);
  HopperTopkParams p{x.data(),
                     W.data(),
                     c.bias ? bias.data() : nullptr,
                     c.mask ? reinterpret_cast<const bool*>(mask.data()) : nullptr,
                     c.n,
                     c.m,
                     c.d,
                     c.k,
                     c.relu,
                     c.absolute,
                     values.data(),
                     indices.data(),
                     nullptr};
  const size_t bytes = static_cast<size_t>(hopper_topk_scratch(p));
  void* scratch = std::aligned_alloc(256, bytes);
  std::memset(scratch, 0xff, bytes);
  p.scratch = scratch;
  const char* error = launch_hopper_topk(p, nullptr);
  expect(error == nullptr, error ? error : "");
  std::free(scratch);

  for (int r = 0; r < c.n; ++r) {
    std::vector<float> row(static_cast<size_t>(c.m)), rank(row);
    std::vector<int> order(static_cast<size_t>(c.m));
    for (int j = 0; j < c.m; ++j) {
      const size_t at = static_cast<size_t>(j);
      row[at] = sums[static_cast<size_t>(r * c.m + j)] + (c.bias ? bias[at] : 0.0f);
      rank[at] = c.absolute ? std::fabs(row[at]) : row[at];
      if (rank[at] != rank[at]) rank[at] = INFINITY;
      if (c.mask && !mask[at]) rank[at] = -INFINITY;
      order[at] = j;
    }
    const auto is_nan = [&](int j) {
      const size_t at = static_cast<size_t>(j);
      return row[at] != row[at] && !(c.mask && !mask[at]);
    };
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
      if (is_nan(a) != is_nan(b)) return is_nan(a);
      return !is_nan(a) && rank[static_cast<size_t>(a)] > rank[static_cast<size_t>(b)];
    });
    std::sort(order.begin(), order.begin() + c.k);
    for (int i = 0; i < c.k; ++i) {
      const size_t at = static_cast<size_t>(r * c.k + i);
      const int j = order[static_cast<size_t>(i)];
      float want = row[static_cast<size_t>(j)];
      if ((c.mask && !mask[static_cast<size_t>(j)]) || (c.relu && want <= 0)) want = 0;
      expect(indices[at] == j, "index " + place(r, i, indices[at], j));
      expect(values[at] == want || (values[at] != values[at] && want != want),
             "value " + place(r, i, values[at], want));
    }
  }
}

void choices() {
  choose({3, 40, 8, 5, Kind::kNormal, false, false, false, false});  // one product only
  choose({130, 1290, 72, 9, Kind::kNormal, true, false, true, false});
  choose({20, 1290, 72, 9, Kind::kNormal, true, true, false, true});
  choose({20, 1027, 24, 70, Kind::kTies, false, true, false, false});
  choose({40, 1290, 24, 20, Kind::kAscending, true, false, false, false});  // lists overflow
  choose({40, 1290, 24, 3, Kind::kAscending, false, true, true, true});
  choose({9, 800, 40, 12, Kind::kSpecial, true, true, false, false});
  choose({9, 800, 40, 12, Kind::kSpecial, false, false, true, true});
}

// ---- the same in the whole matrix ----

enum class Threshold { kNone, kCommon, kPerColumn };

struct MatrixChoice {
  int n, m, d, capacity;
  Kind kind;
  Threshold threshold;
  bool bias, mask;
};

void choose_in_matrix(const MatrixChoice& c) {
  Problem problem(c.n, c.m, c.d, c.kind);
  const std::vector<float> sums = problem.sums();
  std::vector<float> thresholds(static_cast<size_t>(c.m));
  for (int j = 0; j < c.m; ++j) {  // a common one of -1.5
    thresholds[static_cast<size_t>(j)] = static_cast<float>(j % 4) - 1.5f;
  }

  const size_t capacity = static_cast<size_t>(c.capacity);
  std::vector<float> values(capacity, NAN), smallest(1, NAN);
  std::vector<int32_t> indices(capacity, -1), offsets(static_cast<size_t>(c.n) + 1, -1);
  HopperSelectParams p;
  p.x = problem.x.data();
  p.W = problem.W.data();
  p.d = c.d;
  p.select.n = c.n;
  p.select.m = c.m;
  p.select.capacity = c.capacity;
  p.select.threshold = c.threshold == Threshold::kNone ? nullptr : thresholds.data();
  p.select.per_column = c.threshold == Threshold::kPerColumn;
  p.select.bias = c.bias ? problem.bias.data() : nullptr;
  p.select.mask = c.mask ? reinterpret_cast<const bool*>(problem.mask.data()) : nullptr;
  p.select.values = values.data();
  p.select.indices = indices.data();
  p.select.offsets = offsets.data();
  p.select.smallest = smallest.data();
  const size_t bytes = static_cast<size_t>(hopper_select_scratch(p));
  void* scratch = std::aligned_alloc(256, bytes);
  std::memset(scratch, 0xff, bytes);
  p.select.scratch = scratch;
  const char* error = launch_hopper_select(p, nullptr);
  expect(error == nullptr, error ? error : "");
  std::free(scratch);

  std::vector<std::pair<float, int>> kept;  // of what may be kept, the value and its place
  for (int i = 0; i < c.n * c.m; ++i) {
    const size_t j = static_cast<size_t>(i % c.m);
    const float value = sums[static_cast<size_t>(i)] + (c.bias ? problem.bias[j] : 0.0f);
    const float least = c.threshold == Threshold::kNone     ? 0.0f
                        : c.threshold == Threshold::kCommon ? thresholds[0]
                                                            : thresholds[j];
    if (value > least && !(c.mask && !problem.mask[j])) kept.push_back({value, i});
  }
  std::stable_sort(kept.begin(), kept.end(),
                   [](const auto& a, const auto& b) { return a.first > b.first; });
  kept.resize(std::min(kept.size(), capacity));
  const float least = kept.empty() ? INFINITY : kept.back().first;
  expect(smallest[0] == least, "smallest " + place(0, 0, smallest[0], least));
  std::sort(kept.begin(), kept.end(),
            [](const auto& a, const auto& b) { return a.second < b.second; });
  for (size_t i = 0; i < capacity; ++i) {
    const int64_t at = static_cast<int64_t>(i);
    const float value = i < kept.size() ? kept[i].first : 0.0f;
    expect(values[i] == value, "value " + place(0, at, values[i], value));
    if (i >= kept.size()) continue;
    const int column = kept[i].second % c.m;
    expect(indices[i] == column, "index " + place(0, at, indices[i], column));
  }
  for (int r = 0; r <= c.n; ++r) {
    const auto before = std::count_if(kept.begin(), kept.end(),
                                      [&](const auto& entry) { return entry.second < r * c.m; });
    const int32_t got = offsets[static_cast<size_t>(r)];
    expect(got == before, "offset " + place(r, 0, got, static_cast<double>(before)));
  }
}

void choices_in_matrix() {
  choose_in_matrix({3, 40, 8, 7, Kind::kNormal, Threshold::kNone, false, false});  // one product
  choose_in_matrix({130, 1290, 72, 500, Kind::kNormal, Threshold::kNone, true, false});
  choose_in_matrix({5, 1290, 72, 40, Kind::kNormal, Threshold::kNone, true, true});
  choose_in_matrix({20, 1027, 24, 300, Kind::kTies, Threshold::kNone, false, true});
  choose_in_matrix({40, 1290, 24, 33, Kind::kAscending, Threshold::kCommon, true, false});
  choose_in_matrix({5, 2000, 24, 10000, Kind::kAscending, Threshold::kCommon, false, false});
  choose_in_matrix({20, 1027, 24, 400, Kind::kTies, Threshold::kPerColumn, true, false});
  choose_in_matrix({9, 800, 40, 60, Kind::kSpecial, Threshold::kNone, true, true});
  choose_in_matrix({9, 800, 40, 7200, Kind::kSpecial, Threshold::kPerColumn, false, false});
}

}  // namespace
}  // namespace fastsae::cuda

int main(int count, char** arguments) {
  using namespace fastsae::cuda;
  const std::pair<const char*, void (*)()> cases[] = {
      {"barriers", barriers},
      {"copies", copies},
      {"products", products},
      {"matrices", matrices},
      {"not_numbers", not_numbers},
      {"choices", choices},
      {"choices_in_matrix", choices_in_matrix},
  };
  int ran = 0;
  for (const auto& [name, run] : cases) {
    if (count > 1 && std::string(arguments[1]) != name) continue;
    ++ran;
    try {
      run();
    } catch (const std::exception& error) {
      std::printf("%s\n", error.what());
      ++wrong;
    }
  }
  std::printf("ran %d cases, %d wrong\n", ran, wrong);
  return wrong || !ran ? 1 : 0;
}
