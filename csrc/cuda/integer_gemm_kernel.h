// The kernel of integer layers, once for each way in which x and the weights are stored.
#pragma once

#include "integer_loads.h"
#include "integer_output.h"
#include "integer_tile.h"

namespace dfq {

// In shared memory: of one stage products are added while others are loaded. And how many blocks of
// wide tiles should find room in a multiprocessor.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kStages = 2, kWideAtOnce = 1;
#else
constexpr int kStages = 3, kWideAtOnce = 2;
#endif
constexpr int kNarrowAtOnce = 3;

template <class T>
struct Shared {
  static constexpr int kStages_ = kStages * T::kStageSlots;
  static constexpr int kWarps = T::kThreads / kWarp;
  static constexpr int kExchange = kWarps * Exchange<T>::kSize;
  static constexpr int kOutput = (kExchange + T::kRows + T::kColumns) / 4;  // of uint4
  static constexpr int kSize = kStages_ > kOutput ? kStages_ : kOutput;
};

// What this thread sums beside the products: a row of x, and one of the weights, a column here.
template <class T>
struct RowSums {
  bool rows, columns;  // whether they are needed
  int32_t row = 0, column = 0;

  DFQ_DEVICE RowSums(const IntegerLayer& layer)
      : rows(layer.weight_zero.values && threadIdx.x < T::kRows),
        columns(layer.x_zero != 0 && threadIdx.x < T::kColumns) {}

  DFQ_DEVICE void add(const uint4* x, const uint4* weight) {
    const int thread = static_cast<int>(threadIdx.x);
    if (rows) {
      row += sum_of_row<T::kPackedX, T::kXSegments>(x, thread);
    }
    if (columns) {
      column += sum_of_row<T::kPackedWeight, T::kWeightSegments>(weight, thread);
    }
  }

  DFQ_DEVICE Corrections share(const IntegerLayer& layer, int32_t* memory) const {
    if (threadIdx.x < T::kRows) {
      const int32_t all = row >> (T::kPackedX ? 4 : 0);
      memory[threadIdx.x] = rows ? all - layer.k * layer.x_zero : 0;
    }
    if (threadIdx.x < T::kColumns) {
      const int32_t all = column >> (T::kPackedWeight ? 4 : 0);
      memory[T::kRows + threadIdx.x] = all * layer.x_zero;
    }
    return {memory, memory + T::kRows};
  }
};

// The steps along K: what is loaded goes round the stages, `kStages` - 1 steps ahead.
template <class T>
DFQ_DEVICE void add_all(const IntegerLayer& layer, const WarpTile<T>& at, uint4* stages,
                        typename T::Sums& sums, RowSums<T>& row_sums) {
  Loader<WindowSource, T::kRows, T::kXSegments, T::kThreads, T::kVectors> x(
      WindowSource(layer, at.group), at.tile_row);
  Loader<WeightSource, T::kColumns, T::kWeightSegments, T::kThreads, T::kVectors> weight(
      WeightSource(layer, at.group), at.tile_column);
  const Products<T> products;
  const int32_t steps = (layer.k + T::kK - 1) / T::kK;
  uint4* const last = stages + (kStages - 1) * T::kStageSlots;
  const auto next = [&](uint4* stage) { return stage == last ? stages : stage + T::kStageSlots; };
  const auto begin = [&](uint4* stage, int32_t step) {
    if (step < steps) {
      x.begin(stage, step);
      weight.begin(stage + T::kXSlots, step);
    }
    close_group();
  };
  const auto end = [&](uint4* stage, int32_t step) {
    if (step < steps) {
      x.end(stage);
      weight.end(stage + T::kXSlots);
    }
  };
  uint4 *filled = stages, *read = stages;
  for (int32_t step = 0; step < kStages - 1; ++step, filled = next(filled)) {
    begin(filled, step);
    end(filled, step);
  }
  DFQ_ROLLED
  for (int32_t step = 0; step < steps; ++step, filled = next(filled), read = next(read)) {
    wait_for_groups<kStages - 2>();
    __syncthreads();  // everyone's part has come, and nobody reads what is filled now
    begin(filled, step + kStages - 1);
    products.add(sums, read, read + T::kXSlots);
    row_sums.add(read, read + T::kXSlots);
    end(filled, step + kStages - 1);
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kWarpColumns == 1 ? kNarrowAtOnce : kWideAtOnce)
    integer_gemm_kernel(const __grid_constant__ IntegerLayer layer) {
  DFQ_SHARED(uint4, memory, Shared<T>::kSize);
  const int64_t columns = (layer.group_channels + T::kColumns - 1) / T::kColumns;
  const int64_t rows = (layer.output.rows + T::kRows - 1) / T::kRows;
  const int64_t line = quotient(blockIdx.x, columns), group = quotient(line, rows);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const WarpTile<T> at = {
      (line - group * rows) * T::kRows, (blockIdx.x - line * columns) * T::kColumns, group,
      warp / T::kWarpColumns * T::kRowsOfWarp, warp % T::kWarpColumns * T::kColumnsOfWarp};
  typename T::Sums sums = {};
  RowSums<T> row_sums(layer);
  add_all<T>(layer, at, memory, sums, row_sums);
  __syncthreads();  // the stages are read; their memory is for the output now
  auto* integers = reinterpret_cast<int32_t*>(memory);
  const Corrections corrections = row_sums.share(layer, integers + Shared<T>::kExchange);
  __syncthreads();
  const Exchange<T> exchange{integers + warp * Exchange<T>::kSize};
  write_outputs<T>(layer, sums, at, corrections, exchange);
}

template <class T>
int64_t blocks_of(const IntegerLayer& layer) {
  const int64_t columns = (layer.group_channels + T::kColumns - 1) / T::kColumns;
  const int64_t rows = (layer.output.rows + T::kRows - 1) / T::kRows;
  return columns * rows * layer.groups;
}
template <class T>
Failure launch_tiles(const IntegerLayer& layer, void* stream) {
  return launch(&integer_gemm_kernel<T>, blocks_of<T>(layer), T::kThreads, stream, layer);
}

// Wide tiles read x half as often; there must be enough of them for a large GPU.
constexpr int64_t kWideBlocks = 128;

template <bool kPackedX, bool kPackedWeight>
Failure launch_integer_gemm(const IntegerLayer& layer, void* stream) {
  using Wide = Tile<kPackedX, kPackedWeight, true, 2>;
  using Narrow = Tile<kPackedX, kPackedWeight, true, 1>;
  if (!layer.vectors) {
    return launch_tiles<Tile<kPackedX, kPackedWeight, false, 1>>(layer, stream);
  }
  const bool wide =
      layer.group_channels > Narrow::kColumns && blocks_of<Wide>(layer) >= kWideBlocks;
  return wide ? launch_tiles<Wide>(layer, stream) : launch_tiles<Narrow>(layer, stream);
}

}  // namespace dfq
