// The sums of expert_batch_norm on a GPU, for each expert and channel: over tiles of rows, then merged in double, both
// in a fixed order.
#pragma once

#include <algorithm>

#include "cuda/rows.cuh"

namespace moe {

// None of these is measured.
constexpr int kNormThreads = 256;   // of a block
constexpr int kNormDepth = 32;      // most rows that a thread sums in the arithmetic of the storage type (wide_t)
constexpr int kPlaneValues = 4096;  // by plane: values that a block sums, in whole planes, but at least one plane
constexpr int kMergeLanes = 8;      // channels whose partial sums a block merges

// A batch [images, channels, pixels], sorted by expert, as rows. By pixel (channels-last, or one pixel per image) a row
// is a pixel with one value of each channel; by plane it is an image with `pixels` neighbouring values of each.
//   offsets: [experts + 1], in images
struct NormBatch {
  const int32_t* offsets;
  int64_t experts, channels, pixels, images;
  bool by_pixel;

  __host__ __device__ int64_t rows_per_image() const { return by_pixel ? pixels : 1; }
  __host__ __device__ int64_t rows() const { return images * rows_per_image(); }
  __host__ __device__ int64_t values_per_row() const { return by_pixel ? 1 : pixels; }
  __device__ int64_t begin(int64_t e) const { return offsets[e] * rows_per_image(); }
  __device__ int64_t values(int64_t e) const { return (begin(e + 1) - begin(e)) * values_per_row(); }
  // Neighbouring elements that an access may span: by pixel those of a row, by plane those of a channel.
  __host__ __device__ int64_t run() const { return by_pixel ? channels : pixels; }
};

// How blocks cover a batch to sum it. A tile is `rows` rows, and a block has a tile and `lanes` packs of channels, a
// thread for each; by plane one lane, with one channel. The sums of tile i over rows of expert e are row i + e of the
// partial sums: from one such pair to the next either i or e grows, so that no two share a row.
struct NormTiles {
  int lanes = 1;
  int64_t rows;    // of a tile
  int64_t chunks;  // blocks along the channels
  int64_t count;   // tiles

  NormTiles(const NormBatch& b, int pack) {
    const int64_t packs = b.by_pixel ? (b.channels + pack - 1) / pack : b.channels;
    while (b.by_pixel && lanes < packs && lanes < kWarp) lanes *= 2;
    rows = b.by_pixel ? kNormThreads / lanes * kNormDepth : std::max<int64_t>(1, kPlaneValues / b.pixels);
    chunks = (packs + lanes - 1) / lanes;
    count = (b.rows() + rows - 1) / rows;
  }
  // The rows of a tile that lie in [begin, end), an expert's.
  __device__ int64_t first(int64_t tile, int64_t begin) const { return begin > tile * rows ? begin : tile * rows; }
  __device__ int64_t last(int64_t tile, int64_t end) const { return end < (tile + 1) * rows ? end : (tile + 1) * rows; }
};

// Rows of the partial sums, each of `channels` pairs: enough for the narrowest access, which needs the most tiles.
inline int64_t norm_partial_rows(const NormBatch& b) { return NormTiles(b, 1).count + b.experts; }

// Two sums for each of W channels.
template <class A, int W>
struct Pairs {
  A first[W], second[W];

  __device__ __forceinline__ Pairs& operator+=(const Pairs& other) {
    for (int w = 0; w < W; ++w) first[w] += other.first[w], second[w] += other.second[w];
    return *this;
  }
};
using Pair = Pairs<double, 1>;

// The sum of a value over the threads that are a multiple of `lanes` apart, in a fixed order. Each of them receives it,
// and all threads of the block must call.
//   shared: [kNormThreads], shared memory
template <class P>
__device__ __forceinline__ P lane_sum(const P& value, P (&shared)[kNormThreads], int lanes) {
  const int thread = threadIdx.x;
  shared[thread] = value;
  __syncthreads();
  for (int half = kNormThreads / 2; half >= lanes; half /= 2) {
    if (thread < half) shared[thread] += shared[thread + half];
    __syncthreads();
  }
  const P sum = shared[thread % lanes];
  __syncthreads();
  return sum;
}

// Rows [first, last) of a tile, all of one expert, of which a thread has W channels from `channel` on.
template <int V, bool by_pixel>
struct NormTile {
  static constexpr int W = by_pixel ? V : 1;
  NormBatch b;
  int lanes;
  int64_t channel, first, last;

  __device__ __forceinline__ bool has_channel() const { return channel < b.channels; }
  __device__ __forceinline__ bool writes() const { return static_cast<int>(threadIdx.x) < lanes && has_channel(); }
  // Calls f with the index of each of this thread's packs.
  template <class F>
  __device__ __forceinline__ void each(F f) const {
    if constexpr (by_pixel) {
      if (!has_channel()) return;
      for (int64_t r = first + threadIdx.x / lanes; r < last; r += kNormThreads / lanes) f(r * b.channels + channel);
    } else {
      const unsigned packs = static_cast<unsigned>(b.pixels / V), end = static_cast<unsigned>(last - first) * packs;
      for (unsigned i = threadIdx.x; i < end; i += kNormThreads) {
        f(((first + i / packs) * b.channels + channel) * b.pixels + int64_t{i % packs} * V);
      }
    }
  }
  // The sums of this thread's channels over these rows; add(index of a pack, sums) adds one of a thread's packs.
  template <class A, class Add>
  __device__ __forceinline__ Pairs<A, W> sums(Pairs<A, W> (&shared)[kNormThreads], Add add) const {
    Pairs<A, W> sum = {};
    each([&](int64_t at) { add(at, sum); });
    return lane_sum(sum, shared, lanes);
  }
};

// Calls f(part, row, e) for every expert e with rows in this block's tile: `part` is those rows, a NormTile, and `row`
// the row of their partial sums.
template <int V, bool by_pixel, class F>
__device__ __forceinline__ void each_expert(const NormBatch& b, const NormTiles& tiles, F f) {
  const int64_t tile = blockIdx.x / tiles.chunks, begin = tile * tiles.rows;
  const int64_t lane = blockIdx.x % tiles.chunks * tiles.lanes + threadIdx.x % tiles.lanes;
  const int64_t end = tiles.last(tile, b.rows());
  for (int64_t e = expert_of(begin, b.offsets, b.experts, b.rows_per_image()); e < b.experts && b.begin(e) < end; ++e) {
    const NormTile<V, by_pixel> part{b, tiles.lanes, lane * NormTile<V, by_pixel>::W, tiles.first(tile, b.begin(e)),
                                     tiles.last(tile, b.begin(e + 1))};
    if (part.first < part.last) f(part, tile + e, e);
  }
}

// Sums of x, and of its squared distances from the mean of the tile.
//   x: [images, channels, pixels] in the batch's layout -> partial: [norm_partial_rows, channels]
template <class T, int V, bool by_pixel>
__global__ void __launch_bounds__(kNormThreads)
    norm_moments_kernel(NormBatch b, NormTiles tiles, const T* x, Pair* partial) {
  using A = wide_t<T>;
  constexpr int W = NormTile<V, by_pixel>::W;
  __shared__ Pairs<A, W> shared[kNormThreads];
  each_expert<V, by_pixel>(b, tiles, [&](const auto& part, int64_t row, int64_t) {
    const A count = static_cast<A>((part.last - part.first) * b.values_per_row());
    const auto total = part.sums(shared, [&](int64_t at, Pairs<A, W>& sum) {
      const auto pack = load<V>(x + at);
      for (int v = 0; v < V; ++v) sum.first[v % W] += widen(pack.at[v]);
    });
    const auto rest = part.sums(shared, [&](int64_t at, Pairs<A, W>& sum) {
      const auto pack = load<V>(x + at);
      for (int v = 0; v < V; ++v) {
        const A centred = widen(pack.at[v]) - total.first[v % W] / count;
        sum.first[v % W] += centred;
        sum.second[v % W] += centred * centred;
      }
    });
    if (!part.writes()) return;
    for (int w = 0; w < W; ++w) {
      const double error = rest.first[w];  // the rounding error of the mean, times count
      Pair& sums = partial[row * b.channels + part.channel + w];
      sums.first[0] = static_cast<double>(total.first[w] / count) * count + error;
      sums.second[0] = rest.second[w] - error * error / count;
    }
  });
}

// Sums of grad, and of grad * (x - mean).
//   grad, x: [images, channels, pixels], mean: [experts, channels] -> partial: [norm_partial_rows, channels]
template <class T, int V, bool by_pixel>
__global__ void __launch_bounds__(kNormThreads) norm_products_kernel(NormBatch b, NormTiles tiles, const T* grad,
                                                                     const T* x, const wide_t<T>* mean, Pair* partial) {
  using A = wide_t<T>;
  constexpr int W = NormTile<V, by_pixel>::W;
  __shared__ Pairs<A, W> shared[kNormThreads];
  each_expert<V, by_pixel>(b, tiles, [&](const auto& part, int64_t row, int64_t e) {
    A centre[W] = {};
    for (int w = 0; w < W && part.has_channel(); ++w) centre[w] = mean[e * b.channels + part.channel + w];
    const auto total = part.sums(shared, [&](int64_t at, Pairs<A, W>& sum) {
      const auto g = load<V>(grad + at), pack = load<V>(x + at);
      for (int v = 0; v < V; ++v) {
        sum.first[v % W] += widen(g.at[v]);
        sum.second[v % W] += widen(g.at[v]) * (widen(pack.at[v]) - centre[v % W]);
      }
    });
    if (!part.writes()) return;
    for (int w = 0; w < W; ++w) {
      Pair& sums = partial[row * b.channels + part.channel + w];
      sums.first[0] = total.first[w];
      sums.second[0] = total.second[w];
    }
  });
}

// The sum of term(partial sums, number of values) over the tiles of expert e for one channel, shared among the block's
// threads of that channel, each of which receives it.
//   partial: [norm_partial_rows, channels], shared: [kNormThreads], shared memory
template <class Term>
__device__ __forceinline__ Pair merged(const NormBatch& b, const NormTiles& tiles, const Pair* partial, int64_t e,
                                       int64_t channel, Pair (&shared)[kNormThreads], Term term) {
  const int64_t begin = b.begin(e), end = b.begin(e + 1);
  Pair sum = {};
  for (int64_t i = begin / tiles.rows + threadIdx.x / kMergeLanes; channel < b.channels && i * tiles.rows < end;
       i += kNormThreads / kMergeLanes) {
    const int64_t rows = tiles.last(i, end) - tiles.first(i, begin);
    if (rows > 0) sum += term(partial[(i + e) * b.channels + channel], double(rows * b.values_per_row()));
  }
  return lane_sum(sum, shared, kMergeLanes);
}

// Blocks that merge the partial sums of one expert.
__host__ __device__ inline int64_t merge_chunks(const NormBatch& b) {
  return (b.channels + kMergeLanes - 1) / kMergeLanes;
}

// The expert and the channel of a thread of a merging block, and their index in tables [experts, channels].
struct MergePlace {
  int64_t e, channel, index;
  bool writes;

  __device__ __forceinline__ explicit MergePlace(const NormBatch& b)
      : e(blockIdx.x / merge_chunks(b)),
        channel(blockIdx.x % merge_chunks(b) * kMergeLanes + threadIdx.x % kMergeLanes),
        index(e * b.channels + channel),
        writes(threadIdx.x < kMergeLanes && channel < b.channels) {}
};

}  // namespace moe
