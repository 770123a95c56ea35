// fake_quantize of many tensors at a time: a model's weights are small, and a launch costs more
// than the work on one of them. A launch takes a table of tensors, and each block finds its own.
#include "fake_quantize_all.h"
#include "fake_quantize_ops.h"

namespace dfq {
namespace {

constexpr int kMostJobs = 64;  // about 11 KB of kernel parameters, of 32

// Tensors, and how many blocks all those before each of them have.
template <class Job>
struct Table {
  Job jobs[kMostJobs];
  int64_t blocks_before[kMostJobs + 1];
  int count = 0;

  void add(const Job& job, int64_t blocks) {
    if (count == 0) {
      blocks_before[0] = 0;
    }
    jobs[count] = job;
    blocks_before[count + 1] = blocks_before[count] + blocks;
    ++count;
  }
  int64_t blocks() const { return blocks_before[count]; }

  DFQ_DEVICE int job_of(int64_t block) const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (blocks_before[middle] <= block) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

template <class Op>
struct Walk {
  Op op;
  Dense source;
  Blocks blocks;
};
struct Finish {
  FinishQuantizer finish;
  Blocks blocks;
  const Pair<double>* partials;
};

template <class T, class Op>
__global__ void __launch_bounds__(kMaxThreads, 2)
    walk_all(const __grid_constant__ Table<Walk<Op>> table) {
  const int64_t block = blockIdx.x;
  const int job = table.job_of(block);
  const Walk<Op>& walk = table.jobs[job];
  walk_block<T, true>(walk.op, walk.source, walk.blocks, block - table.blocks_before[job]);
}

__global__ void __launch_bounds__(kFinishThreads)
    finish_all(const __grid_constant__ Table<Finish> table) {
  const int64_t block = blockIdx.x;
  const int job = table.job_of(block);
  const Finish& of = table.jobs[job];
  finish_channel(of.finish, of.blocks, of.partials, block - table.blocks_before[job]);
}

// Launches as often as the table is full, and for the rest.
template <class Entry>
class Launcher {
 public:
  Launcher(void (*kernel)(Table<Entry>), int threads, void* stream)
      : kernel_(kernel), threads_(threads), stream_(stream) {}

  Failure add(const Entry& entry, int64_t blocks) {
    table_.add(entry, blocks);
    return table_.count == kMostJobs ? flush() : nullptr;
  }
  Failure flush() {
    if (table_.count == 0) {
      return nullptr;
    }
    const Failure failure = launch(kernel_, table_.blocks(), threads_, stream_, table_);
    table_.count = 0;
    return failure;
  }

 private:
  void (*kernel_)(Table<Entry>);
  int threads_;
  void* stream_;
  Table<Entry> table_;
};

// One kernel for each storage type.
template <class Op, class MakeOp>
Failure walk_jobs(const std::vector<FakeQuantizeJob>& jobs, void* stream, const MakeOp& make_op) {
  for (const Storage storage : {Storage::kFloat, Storage::kHalf, Storage::kBFloat16}) {
    const Failure failure = with_storage(storage, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      Launcher<Walk<Op>> launcher(&walk_all<T, Op>, kMaxThreads, stream);
      for (const FakeQuantizeJob& job : jobs) {
        const Layout& layout = job.layout;
        const Walk<Op> walk{make_op(job), {{layout.input[0], layout.input[1]}}, layout.blocks};
        Failure failed = nullptr;
        if (layout.storage == storage) {
          failed = launcher.add(walk, layout.blocks.count());
        }
        if (failed) {
          return failed;
        }
      }
      return launcher.flush();
    });
    if (failure) {
      return failure;
    }
  }
  return nullptr;
}

Failure finish_jobs(const std::vector<FakeQuantizeJob>& jobs, void* stream) {
  constexpr int kThreads = 64;  // the weights of a channel are in few blocks
  Launcher<Finish> launcher(&finish_all, kThreads, stream);
  for (const FakeQuantizeJob& job : jobs) {
    const QuantizerGradients& to = job.gradients;
    if (!to.needed()) {
      continue;
    }
    const Finish finish{{job.quantizer, to.scale, to.zero_point}, job.layout.blocks, to.partials};
    if (const Failure failure = launcher.add(finish, job.layout.blocks.channels)) {
      return failure;
    }
  }
  return launcher.flush();
}

}  // namespace

Failure fake_quantize_all(const std::vector<FakeQuantizeJob>& jobs, void* stream) {
  return walk_jobs<FakeQuantize>(jobs, stream, [](const FakeQuantizeJob& job) {
    return FakeQuantize{job.quantizer, job.out, nullptr, 0};
  });
}

Failure fake_quantize_all_backward(const std::vector<FakeQuantizeJob>& jobs, void* stream) {
  const Failure failure =
      walk_jobs<FakeQuantizeBackward>(jobs, stream, [](const FakeQuantizeJob& job) {
        return FakeQuantizeBackward{job.quantizer, job.out, nullptr, 0, job.gradients.partials};
      });
  return failure ? failure : finish_jobs(jobs, stream);
}

}  // namespace dfq
