#include "cpu/matmul.h"

#include <algorithm>
#include <cstring>

#include "torch.h"

namespace fastsae::cpu {
namespace {

constexpr int64_t kMostDepth = 512;                // of k in a block
constexpr int64_t kPanelBytes = int64_t{5} << 18;  // of the panels of b that are held

int64_t blocks_of(int64_t size, int64_t most) {
  return std::max<int64_t>(1, (size + most - 1) / most);
}

// `size` in equal parts that are multiples of `unit`.
int64_t part_of(int64_t size, int64_t parts, int64_t unit) {
  return ((size + parts - 1) / parts + unit - 1) / unit * unit;
}

// What a thread does: some rows and some columns of c.
template <class A>
class Block {
 public:
  Block(int64_t n, int64_t k, Strided<A> a, Strided<A> b, const Finish<A>& finish, A* c)
      : n_(n), k_(k), a_(a), b_(b), finish_(finish), c_(c) {
    depth_ = std::max<int64_t>(8, part_of(k, blocks_of(k, kMostDepth), 8));
    const int64_t bytes = depth_ * tile_.tokens * static_cast<int64_t>(sizeof(A));
    most_panels_ = std::max<int64_t>(1, kPanelBytes / bytes);
  }

  void run(int64_t first_row, int64_t last_row, int64_t first, int64_t last) {
    const int64_t panels = (last - first + tile_.tokens - 1) / tile_.tokens;
    const int64_t width = part_of(panels, blocks_of(panels, most_panels_), 1) * tile_.tokens;
    for (int64_t column = first; column < last; column += width) {
      const int64_t end = std::min(last, column + width);
      for (int64_t p = 0; p == 0 || p < k_; p += depth_) {
        const int64_t depth = std::min(depth_, k_ - p);
        pack_panels(p, depth, column, end);
        for (int64_t row = first_row; row < last_row; row += kGroup * tile_.latents) {
          const int64_t rows = std::min(last_row, row + kGroup * tile_.latents);
          pack_rows(row, rows, p, depth);
          for (int64_t i = row; i < rows; i += tile_.latents) {
            multiply(i, std::min(rows, i + tile_.latents), row, p, depth, column, end);
          }
        }
      }
    }
  }

 private:
  static constexpr int64_t kGroup = 8;  // tiles of a that are packed at once, for its cache lines

  // Panels of columns [first, last): word p of all columns of a panel lies together.
  void pack_panels(int64_t p, int64_t depth, int64_t first, int64_t last) {
    const int64_t width = tile_.tokens, count = (last - first + width - 1) / width;
    A* to = panels_.reserve(count * width * depth_);
    for (int64_t j = first; j < last; j += width, to += width * depth) {
      const int64_t here = std::min(width, last - j);
      if (here < width) std::memset(static_cast<void*>(to), 0, sizeof(A) * width * depth);
      if (b_.column == 1) {
        for (int64_t q = 0; q < depth; ++q) {
          std::memcpy(to + q * width, b_.data + (p + q) * b_.row + j, sizeof(A) * here);
        }
      } else {
        // Eight words of all columns at a time: a line of the panel and lines of b are met whole.
        for (int64_t q = 0; q < depth; q += 8) {
          const int64_t words = std::min<int64_t>(8, depth - q);
          for (int64_t l = 0; l < here; ++l) {
            const A* from = b_.data + p + q + (j + l) * b_.column;
            for (int64_t w = 0; w < words; ++w) to[(q + w) * width + l] = from[w];
          }
        }
      }
    }
  }

  // Rows [first, last) of a, words [p, p + depth): word p of all rows of a tile lies together.
  void pack_rows(int64_t first, int64_t last, int64_t p, int64_t depth) {
    const int64_t height = tile_.latents;
    A* to = rows_.reserve(kGroup * height * depth_);
    for (int64_t i = first; i < last; i += height, to += height * depth) {
      const int64_t here = std::min(height, last - i);
      if (here < height) std::memset(static_cast<void*>(to), 0, sizeof(A) * height * depth);
      if (a_.row == 1) {
        const A* from = a_.data + i + p * a_.column;
        for (int64_t q = 0; q < depth; ++q, from += a_.column) {
          for (int64_t l = 0; l < here; ++l) to[q * height + l] = from[l];
        }
      } else {
        for (int64_t q = 0; q < depth; q += 8) {
          const int64_t words = std::min<int64_t>(8, depth - q);
          for (int64_t l = 0; l < here; ++l) {
            const A* from = a_.data + (i + l) * a_.row + p + q;
            for (int64_t w = 0; w < words; ++w) to[(q + w) * height + l] = from[w];
          }
        }
      }
    }
  }

  // Rows [i, last) and columns [first, end) of c, with words [p, p + depth).
  void multiply(int64_t i, int64_t last, int64_t packed, int64_t p, int64_t depth, int64_t first,
                int64_t end) {
    const int64_t width = tile_.tokens;
    const A* w = rows_.data() + (i - packed) * depth;
    A* space = space_.reserve(tile_.latents * width);
    for (int64_t j = first; j < end; j += width) {
      const A* x = panels_.data() + (j - first) * depth;
      const int64_t here = std::min(width, end - j);
      const bool whole = here == width && last - i == tile_.latents;
      A* out = c_ + i * n_ + j;
      tile_.add(w, x, depth, whole && p > 0, whole ? out : space, whole ? n_ : width);
      for (int64_t l = i; l < last && !whole; ++l, out += n_) {
        const A* sums = space + (l - i) * width;
        for (int64_t t = 0; t < here; ++t) out[t] = p > 0 ? out[t] + sums[t] : sums[t];
      }
      for (int64_t l = i; l < last && p + depth == k_; ++l) {
        finish_.apply(c_ + l * n_ + j, l, j, here, n_);
      }
    }
  }

  const TileKernels<A>& tile_ = tile_kernels<A>();
  const int64_t n_, k_;
  const Strided<A> a_, b_;
  const Finish<A>& finish_;
  A* c_;
  int64_t depth_, most_panels_;
  AlignedBuffer<A> panels_, rows_, space_;
};

}  // namespace

template <class A>
void matmul(int64_t m, int64_t n, int64_t k, Strided<A> a, Strided<A> b, const Finish<A>& finish,
            A* c) {
  if (m == 0 || n == 0) return;
  const TileKernels<A>& tile = tile_kernels<A>();
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  // A grid of threads over c for which each packs the least.
  int64_t down = 1;
  for (int64_t r = 1; r <= threads; ++r) {
    if (threads % r == 0 && m / r + n * r / threads < m / down + n * down / threads) down = r;
  }
  const int64_t rows = part_of(m, down, tile.latents);
  const int64_t columns = part_of(n, threads / down, tile.tokens);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    Block<A> block(n, k, a, b, finish, c);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t i = at % down * rows, j = at / down * columns;
      if (i < m && j < n) block.run(i, std::min(m, i + rows), j, std::min(n, j + columns));
    }
  });
}

template void matmul(int64_t, int64_t, int64_t, Strided<float>, Strided<float>,
                     const Finish<float>&, float*);
template void matmul(int64_t, int64_t, int64_t, Strided<double>, Strided<double>,
                     const Finish<double>&, double*);

}  // namespace fastsae::cpu
