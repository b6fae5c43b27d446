// Runs csrc/cuda/jacobi_kernel.cuh on the host with cases from a file (tests/native/test_cuda_jacobi.py writes it).
//
//   jacobi_host CASES RESULTS [--skip-barrier N]     every thread leaves out its N-th __syncthreads
#define EFFKERN_HOST_CUDA
#include "cuda/jacobi_kernel.cuh"

#include <fstream>
#include <string>

namespace {

// Mirrored by struct.pack in the test.
struct Header {
  int64_t element_bytes, count, n, scratch;
};

template <typename T>
void run(const Header& h, std::ifstream& cases, std::ofstream& results) {
  // Heap blocks of exactly the array's size: one byte past the end is an error.
  const int64_t size = h.count * h.n * h.n;
  const std::unique_ptr<T[]> matrices(new T[size]), values(new T[h.count * h.n]), vectors(new T[size]);
  const std::unique_ptr<int[]> status(new int[h.count]);
  const std::unique_ptr<T[]> scratch(new T[h.scratch ? h.count * effkern::jacobi_elements(static_cast<int>(h.n)) : 1]);
  cases.read(reinterpret_cast<char*>(matrices.get()), size * static_cast<int64_t>(sizeof(T)));
  effkern::launch_batched_eigh(effkern::EighArgs<T>{matrices.get(), values.get(), vectors.get(), status.get(),
                                                    h.scratch ? scratch.get() : nullptr, h.count,
                                                    static_cast<int>(h.n)},
                               nullptr);
  results.write(reinterpret_cast<const char*>(values.get()), h.count * h.n * static_cast<int64_t>(sizeof(T)));
  results.write(reinterpret_cast<const char*>(vectors.get()), size * static_cast<int64_t>(sizeof(T)));
  results.write(reinterpret_cast<const char*>(status.get()), h.count * 4);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 4 && std::string(argv[3]) == "--skip-barrier") effkern::host::skip_barrier = std::atoi(argv[4]);
  std::ifstream cases(argv[1], std::ios::binary);
  std::ofstream results(argv[2], std::ios::binary);
  Header h;
  while (cases.read(reinterpret_cast<char*>(&h), sizeof(h))) {
    if (h.element_bytes == 4) run<float>(h, cases, results);
    else run<double>(h, cases, results);
  }
  return results.good() ? 0 : 1;
}
