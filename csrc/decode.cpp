// Who computes what: splits of the keys, tasks, threads, and the merge of splits.
//
// How a row is split depends on its number of keys and of queries alone, and the arithmetic of a
// query row does not depend on the rows that share its task. So results are bit-identical whatever
// the batch, the threads and the order in which they take tasks.
#include "decode.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "checks.h"
#include "scratch.h"

namespace mla {
namespace {

constexpr int64_t kMaxTaskRows = 128;        // scores and sums of a task stay in a 1 MiB L2 cache
constexpr int64_t kMaxPartialBytes = 16 << 20;  // of one wave of batch rows
constexpr int64_t kManyRows = 1024;          // enough for all threads without splitting keys
constexpr double kMinParallelWork = 2e6;     // multiplications; below, waking threads costs more

int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// 256 keys at least; 512 at 4096 keys, 1024 at 16384: both enough splits for the threads and
// enough work in each to pay for its partial result.
void split_keys(RowPlan& row, int64_t M, int64_t block) {
  const int64_t n = row.end - row.begin;
  int64_t size = static_cast<int64_t>(8.0 * std::sqrt(static_cast<double>(n)));
  size = size < 256 ? 256 : size;
  row.num_splits = n <= 0 ? 0 : M >= kManyRows ? 1 : ceil_div(n, size);
  if (row.num_splits == 0) return;
  row.split_keys = ceil_div(ceil_div(n, row.num_splits), block) * block;
  row.num_splits = ceil_div(n, row.split_keys);
}

RowPlan plan_row(const DecodeParams& p, int64_t b, const DecodeKernels& kernels) {
  const Cache& cache = p.cache;
  RowPlan row;
  row.b = b;
  row.count = p.query_lengths == nullptr ? p.L : p.query_lengths[b];
  MLA_CHECK(
      row.count >= 0 && row.count <= p.L, "mla_decode: query_lengths has value ", row.count,
      ", expected 0 to L=", p.L);
  row.begin = cache.starts == nullptr ? 0 : cache.local_count(cache.starts[b]);
  row.end = cache.local_count(cache.lengths[b]);
  if (row.count == 0 || row.end < row.begin) row.end = row.begin;
  split_keys(row, p.L * p.H, kernels.block_keys);
  return row;
}

// What no task writes: queries that do not exist, or see no key.
void clear_rest(const DecodeParams& p, const RowPlan& row) {
  const int64_t M = p.L * p.H, first = row.num_splits == 0 ? 0 : row.count * p.H;
  const int64_t row_bytes = p.C * bytes_of(p.out_dtype);
  char* out = static_cast<char*>(p.out) + (row.b * M + first) * row_bytes;
  if (row_bytes > 0 && first < M) std::memset(out, 0, (M - first) * row_bytes);
  for (int64_t m = first; m < M; ++m) p.lse[row.b * M + m] = -INFINITY;
}

// The tasks of some batch rows, and how many of them each group of query rows waits for.
struct Wave {
  const DecodeParams& p;
  const DecodeKernels& kernels;
  const RowPlan* rows;
  int64_t num_rows;
  std::vector<Task> tasks;
  std::vector<int64_t> groups;  // of each task
  std::unique_ptr<std::atomic<int64_t>[]> waiting;
  Partials parts;
  int64_t max_rows = 0;
  double work = 0.0;

  void plan(int64_t threads) {
    int64_t splits = 0;
    for (int64_t i = 0; i < num_rows; ++i) splits += rows[i].num_splits;
    const int64_t step = kernels.row_step;
    // As few groups as keep the threads busy: each reads the keys anew.
    const int64_t wanted = splits == 0 ? 1 : ceil_div(threads, splits);
    std::vector<int64_t> counts;
    for (int64_t i = 0; i < num_rows; ++i) {
      const int64_t M = rows[i].count * p.H;
      if (rows[i].num_splits == 0) continue;
      int64_t size = ceil_div(ceil_div(M, wanted), step) * step;
      size = size > kMaxTaskRows ? kMaxTaskRows : size;
      size = ceil_div(ceil_div(M, ceil_div(M, size)), step) * step;  // of nearly equal height
      for (int64_t m = 0; m < M; m += size) {
        const int64_t end = m + size < M ? m + size : M;
        for (int64_t x = 0; x < rows[i].num_splits; ++x) {
          tasks.push_back({i, x, m, end});
          groups.push_back(static_cast<int64_t>(counts.size()));
        }
        counts.push_back(rows[i].num_splits);
      }
      max_rows = size > max_rows ? size : max_rows;
      work += static_cast<double>(rows[i].end - rows[i].begin) * M * (2 * p.C + p.R);
    }
    waiting = std::make_unique<std::atomic<int64_t>[]>(counts.size());
    for (std::size_t g = 0; g < counts.size(); ++g) waiting[g] = counts[g];
  }

  void run_task(const Task& task, int64_t group, char* scratch) {
    const RowPlan& row = rows[task.row];
    kernels.run(p, row, task, parts, scratch);
    if (row.num_splits > 1 && waiting[group].fetch_sub(1, std::memory_order_acq_rel) == 1) {
      kernels.merge(p, row, task.m0, task.m1, parts);
    }
  }

  void run(int64_t threads) {
    if (tasks.empty()) return;
    std::atomic<std::size_t> next{0};
    const int64_t bytes = kernels.scratch_bytes(p, max_rows);
    const auto take_tasks = [&](int64_t, int64_t) {
      thread_local Scratch memory;
      char* scratch = memory.reserve(bytes);
      for (std::size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks.size();) {
        run_task(tasks[i], groups[i], scratch);
      }
    };
    if (threads == 1 || tasks.size() == 1 || work < kMinParallelWork) {
      take_tasks(0, 1);
    } else {
      torch::stable::parallel_for(0, threads, 1, take_tasks);
    }
  }
};

}  // namespace

void decode(const DecodeParams& p, const DecodeKernels& kernels) {
  const int64_t M = p.L * p.H, part_bytes = M * (p.C + 2) * 4;
  check_lengths("CacheView", p.cache, p.B);
  std::vector<RowPlan> rows;
  PageRange pages;
  for (int64_t b = 0; b < p.B; ++b) {
    rows.push_back(plan_row(p, b, kernels));
    pages.include(p.cache, b, rows.back().begin, rows.back().end);
  }
  pages.check(p.cache);
  for (const RowPlan& row : rows) clear_rest(p, row);
  const int64_t threads = torch::stable::get_num_threads();
  thread_local Scratch partials;
  for (int64_t first = 0, last = 0; first < p.B; first = last) {
    int64_t parts = 0;
    for (; last < p.B; ++last) {
      const int64_t more = rows[last].num_splits > 1 ? rows[last].num_splits : 0;
      if (last > first && (parts + more) * part_bytes > kMaxPartialBytes) break;
      rows[last].first_part = parts;
      parts += more;
    }
    float* memory = reinterpret_cast<float*>(partials.reserve(parts * part_bytes));
    Wave wave{p, kernels, rows.data() + first, last - first, {}, {}, nullptr, {}};
    wave.parts = {memory, memory + parts * M * p.C, memory + parts * M * (p.C + 1)};
    wave.plan(threads);
    wave.run(threads);
  }
  partials.trim(kMaxPartialBytes);
}

}  // namespace mla
