// Runs csrc/cuda/label_rank_kernel.cuh on the host with cases from a file (tests/native/test_cuda_host.py writes it).
//
//   label_rank_host CASES RESULTS [--skip-barrier N] [--cut BYTES] [--shift BYTES]
//
// --skip-barrier N   every thread leaves out its N-th __syncthreads: the thread sanitizer must report a race
// --cut BYTES        the logits are allocated BYTES too short: the address sanitizer must report the overrun
// --shift BYTES      the rows start BYTES later than they should: misaligned, for the undefined-behaviour sanitizer
#define EFFKERN_HOST_CUDA
#include "cuda/label_rank_kernel.cuh"

#include <fstream>
#include <string>

namespace {

// Mirrored by struct.pack in the test.
struct Header {
  int64_t element_bytes, is_bfloat16, num_rows, row_stride, offset, vocab, ignore_index, threads, logits_bytes;
};

// Heap blocks of exactly the array's size: one byte past the end is an error.
std::unique_ptr<char[]> read(std::ifstream& file, int64_t bytes, int64_t cut = 0) {
  std::unique_ptr<char[]> exact(new char[bytes - cut]);
  file.read(exact.get(), bytes - cut);
  file.ignore(cut);
  return exact;
}

template <typename T>
void run(const Header& h, const char* logits, const char* labels, std::ofstream& results) {
  std::vector<float> loss(h.num_rows, NAN), lse(h.num_rows, NAN), label_logit(h.num_rows, NAN);
  std::vector<int64_t> rank(h.num_rows, -2);
  const effkern::LabelRankArgs<T> args{reinterpret_cast<const T*>(logits) + h.offset,
                                       h.row_stride,
                                       reinterpret_cast<const int64_t*>(labels),
                                       loss.data(),
                                       lse.data(),
                                       label_logit.data(),
                                       rank.data(),
                                       h.num_rows,
                                       static_cast<int>(h.vocab),
                                       h.ignore_index};
  effkern::launch_label_rank(args, static_cast<int>(h.threads), nullptr);
  for (const auto* column : {&loss, &lse, &label_logit})
    results.write(reinterpret_cast<const char*>(column->data()), h.num_rows * sizeof(float));
  results.write(reinterpret_cast<const char*>(rank.data()), h.num_rows * sizeof(int64_t));
}

}  // namespace

int main(int argc, char** argv) {
  int64_t cut = 0, shift = 0;
  for (int i = 3; i + 1 < argc; i += 2) {
    if (std::string(argv[i]) == "--skip-barrier") effkern::host::skip_barrier = std::atoi(argv[i + 1]);
    if (std::string(argv[i]) == "--cut") cut = std::atoi(argv[i + 1]);
    if (std::string(argv[i]) == "--shift") shift = std::atoi(argv[i + 1]);
  }
  std::ifstream cases(argv[1], std::ios::binary);
  std::ofstream results(argv[2], std::ios::binary);
  Header h;
  while (cases.read(reinterpret_cast<char*>(&h), sizeof(h))) {
    const auto logits = read(cases, h.logits_bytes, cut), labels = read(cases, h.num_rows * 8);
    if (h.element_bytes == 4)
      run<float>(h, logits.get() + shift, labels.get(), results);
    else if (h.is_bfloat16)
      run<__nv_bfloat16>(h, logits.get() + shift, labels.get(), results);
    else
      run<__half>(h, logits.get() + shift, labels.get(), results);
  }
  return results.good() ? 0 : 1;
}
