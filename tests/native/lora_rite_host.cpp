// Runs the r x r kernels of csrc/cuda/lora_rite_*.cuh on the host (tests/native/test_cuda_lora_rite.py writes the cases).
//
//   lora_rite_host CASES RESULTS [--skip-barrier N]     every thread leaves out its N-th __syncthreads
//
// A case is one precondition and one rebase of all factors: what a step does between and after its tall passes.
#define EFFKERN_HOST_CUDA
#include "cuda/lora_rite_rebase.cuh"

#include <fstream>
#include <string>

namespace {

// Mirrored by struct.pack in the test.
struct Header {
  int64_t count, n, tiles, relative_eps, escaped_mass, sum_second, scratch, single;
  double beta1, beta2, eps, weight_decay, clip, skip_rms, tolerance;
};

// Heap blocks of exactly the array's size: one byte past the end is an error.
template <typename T>
std::unique_ptr<T[]> read(std::ifstream& file, int64_t size) {
  std::unique_ptr<T[]> exact(new T[size]);
  file.read(reinterpret_cast<char*>(exact.get()), size * static_cast<int64_t>(sizeof(T)));
  return exact;
}

template <typename T>
void write(std::ofstream& file, const std::unique_ptr<T[]>& x, int64_t size) {
  file.write(reinterpret_cast<const char*>(x.get()), size * static_cast<int64_t>(sizeof(T)));
}

std::unique_ptr<double[]> fresh(int64_t size) {
  std::unique_ptr<double[]> exact(new double[size]);
  std::fill_n(exact.get(), size, NAN);
  return exact;
}

void run(const Header& h, std::ifstream& cases, std::ofstream& results) {
  const int64_t square = h.n * h.n, all = h.count * square, slot = 2 * square + 1;
  const int n = static_cast<int>(h.n);
  const auto partial = read<double>(cases, h.count * h.tiles * square);
  const auto rows = read<double>(cases, h.count), lr = read<double>(cases, h.count);
  auto whiten = read<double>(cases, all), second = read<double>(cases, h.count * h.n);
  auto transport = read<double>(cases, all), escaped = read<double>(cases, h.count);
  auto steps = read<int64_t>(cases, h.count);
  // The second half starts from the same state: the first half's choice of eigenvectors is free.
  auto old_whiten = fresh(all), old_transport = fresh(all);
  std::copy_n(whiten.get(), all, old_whiten.get());
  std::copy_n(transport.get(), all, old_transport.get());
  const auto products = read<double>(cases, h.count * h.tiles * slot);
  auto exact = read<int>(cases, h.count);
  const std::unique_ptr<int64_t[]> first(new int64_t[h.count + 1]);
  for (int64_t f = 0; f <= h.count; ++f) first[f] = f * h.tiles;
  const std::unique_ptr<double[]> grams = fresh(all), traces = fresh(h.count), gate = fresh(1), carry = fresh(all), take = fresh(all);
  const std::unique_ptr<double[]> apply = fresh(all), shrink = fresh(h.count), scratch = fresh(h.count * effkern::jacobi_elements(n));
  double* const memory = h.scratch ? scratch.get() : nullptr;
  effkern::launch_rite_reduce(
      {partial.get(), first.get(), rows.get(), grams.get(), traces.get(), square, n, h.skip_rms}, h.count, nullptr);
  effkern::PreconditionArgs args{};
  args.grams = grams.get(), args.traces = traces.get(), args.rows = rows.get(), args.lr = lr.get();
  args.whiten = whiten.get(), args.second = second.get(), args.transport = transport.get();
  args.escaped = escaped.get(), args.steps = steps.get(), args.gate = gate.get(), args.carry = carry.get();
  args.take = take.get(), args.apply = apply.get(), args.shrink = shrink.get(), args.scratch = memory;
  args.num_traces = h.count, args.n = n;
  args.terms = {h.beta1, h.beta2, h.eps, h.weight_decay, h.clip, h.skip_rms,
                h.relative_eps != 0, h.escaped_mass != 0, h.sum_second != 0};
  effkern::launch_rite_precondition(args, h.count, nullptr);
  write(results, gate, 1);
  for (const std::unique_ptr<double[]>* x : {&carry, &take, &apply}) write(results, *x, all);
  write(results, whiten, all);
  write(results, second, h.count * h.n);
  write(results, shrink, h.count);
  write(results, escaped, h.count);
  write(results, steps, h.count);
  effkern::RebaseArgs rebase{};
  rebase.grams = products.get(), rebase.crosses = products.get() + square, rebase.sizes = products.get() + 2 * square;
  rebase.first = first.get();
  rebase.gram_step = rebase.cross_step = rebase.size_step = slot;
  rebase.gate = gate.get(), rebase.whiten = old_whiten.get();
  rebase.transport = old_transport.get();
  rebase.exact = exact.get(), rebase.scratch = memory, rebase.n = n, rebase.single = h.single != 0;
  rebase.tolerance = h.tolerance;
  effkern::launch_rite_rebase(rebase, h.count, nullptr);
  write(results, old_whiten, all);
  write(results, old_transport, all);
  write(results, exact, h.count);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 4 && std::string(argv[3]) == "--skip-barrier") effkern::host::skip_barrier = std::atoi(argv[4]);
  std::ifstream cases(argv[1], std::ios::binary);
  std::ofstream results(argv[2], std::ios::binary);
  Header h;
  while (cases.read(reinterpret_cast<char*>(&h), sizeof(h))) run(h, cases, results);
  return results.good() ? 0 : 1;
}
